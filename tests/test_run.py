"""run.py: the results, the card and the files of an exported model, and the memory that a run is expected to need.

Its flags, its plan and its resumed runs are tested as a user meets them, in test_sft.py and test_dpo.py.
"""
import json

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file

import model as M
import run
import train
from data import Tokenizer
from parallel import World
from weights import checkpoint_names, stop_ids_of

# ----- the exported model --------------------------------------------------------------------------------------------


def test_results_of_a_run_whose_first_step_was_skipped(tmp_path):
    """NaN is written as text, and an empty file has no results."""
    path = tmp_path / "metrics.jsonl"
    rows = {"step": 0, "val_loss": "inf"}, {"step": 1, "loss": "nan"}, {"step": 2, "loss": 1.0, "val_loss": 2}
    path.write_text("\n".join(map(json.dumps, rows)))
    assert run.results_of(tmp_path, ("loss",)) == {"steps": 2, "training loss": "nan → 1.0000",
                                                   "held-out loss": "inf → 2.0000"}
    path.write_text("")
    assert run.results_of(tmp_path, ("loss",)) == {}


def test_a_model_made_from_llama_says_so():
    card = run.model_card("FineMedLM-o1-sft-1", M.LlamaConfig(), source="models/Llama-3.1-8B", recipe={"lr": 3e-5},
                          files=[{"file": "a.jsonl", "rows": 3, "sha256": "0" * 64}], results={"steps": 3})
    assert "# Llama-FineMedLM-o1-sft-1" in card and "**Built with Llama**" in card and "license: llama3.1" in card


@pytest.mark.parametrize("llama", [False, True])
def test_an_export_has_the_masters_and_ends_its_turns(base, tmp_path, monkeypatch, llama):
    """A base model's own stop token is no end of a turn: both stand in the export. Llama's notice goes with it."""
    source = tmp_path / "source"
    source.mkdir()
    for path in base.iterdir():
        if path.name not in ("chat_template.jinja", "tokenizer_config.json", "tokenizer.json"):
            (source / path.name).symlink_to(path)
    raw = json.loads((base / "tokenizer.json").read_text())
    raw["model"]["dropout"] = 0.1
    (source / "tokenizer.json").write_text(json.dumps(raw))
    (source / "added_tokens.json").write_text('{"<|im_end|>": 2}')
    (source / "generation_config.json").unlink(missing_ok=True)
    (source / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.5}')
    monkeypatch.setattr(run, "is_llama3", lambda config: llama)
    training = train.load_training(source, World(0, 1, torch.device("cpu")))
    for master in training.masters.values():
        master.mul_(1.001)
    run.export_model(training, tmp_path / "model", source=source, dtype=torch.float32, card="a card")
    exported, names = load_file(tmp_path / "model/model.safetensors"), checkpoint_names(training.model.config)
    for name, master in training.masters.items():
        assert torch.equal(torch.cat([exported[one] for one in names[name]]), master)
    tokenizer = Tokenizer.from_dir(source)
    assert stop_ids_of(tmp_path / "model") == {0, tokenizer.end_of_turn()}
    assert json.loads((tmp_path / "model/generation_config.json").read_text())["temperature"] == 0.5
    served = json.loads((tmp_path / "model/tokenizer.json").read_text())
    assert served["model"].pop("dropout", None) is None and raw["model"].pop("dropout") and served == raw
    assert (tmp_path / "model/added_tokens.json").read_text() == '{"<|im_end|>": 2}'
    assert "<|im_start|>" in (tmp_path / "model/chat_template.jinja").read_text()
    assert (tmp_path / "model/README.md").read_text() == "a card"
    assert (tmp_path / "model/NOTICE").exists() is llama

# ----- memory --------------------------------------------------------------------------------------------------------


def test_memory_of_eight_billion_parameters_over_eight_gpus():
    """18 bytes a parameter over 8 shards: 18.07 GB; embedding, head and two layers gathered, with their gradients."""
    world = World(0, 8, torch.device("cuda"), shards=8)
    parts = run.expected_memory(M.LlamaConfig(), world, dtype=torch.bfloat16, tokens=8192,
                                activation_checkpointing=True)
    state, activations, logits, gathered = parts.values()
    assert state == pytest.approx(18 * 8.03e9 / 8, rel=1e-3) and logits == 12 * 2**26 + 2 * 2**27
    assert gathered == pytest.approx(4 * (2 * 128256 * 4096 + 2 * 218.1e6), rel=1e-3)
    assert activations == pytest.approx(8192 * 2 * (32 * 4096 + 4 * 4096 + 2 * 14336 + 4 * 5120), rel=1e-6)


def test_the_table_of_what_a_gpu_needs():
    lines = (ROOT / "bench/README.md").read_text().splitlines()
    rows = [line.split("|")[2:4] for line in lines if line.count("|") == 4]
    rows = [cells for cells in rows if all(cell.endswith(" GB ") for cell in cells)]
    assert len(rows) == 4
    for row, (ranks, shards) in zip(rows, [(1, 1), (8, 8), (16, 8), (16, 16)]):
        world = World(0, ranks, torch.device("cuda"), shards=shards)
        for cell, recompute in zip(row, (False, True)):
            parts = run.expected_memory(M.LlamaConfig(), world, dtype=torch.bfloat16, tokens=8192,
                                        activation_checkpointing=recompute)
            assert cell.strip() == f"{sum(parts.values()) / 1e9:.0f} GB", (ranks, shards, recompute)

"""run.py: the results, the card and the files of an exported model, and the memory that a run is expected to need.

Its flags, its plan and its resumed runs are tested as a user meets them, in test_sft.py and test_dpo.py.
"""
import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import transformers
from conftest import ROOT
from safetensors.torch import load_file

import model as M
import run
import train
from data import Tokenizer
from files import InputError
from parallel import World
from weights import checkpoint_names, parameter_count, stop_ids_of

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
        if path.name not in ("chat_template.jinja", "tokenizer_config.json"):
            (source / path.name).symlink_to(path)
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
    assert "<|im_start|>" in (tmp_path / "model/chat_template.jinja").read_text()
    assert (tmp_path / "model/README.md").read_text() == "a card"
    assert (tmp_path / "model/NOTICE").exists() is llama

def test_a_head_of_its_own_outlives_training(declared_tied, tmp_path):
    """The logits of the model that was declared tied are those of its export, both as transformers loads them."""
    training = train.load_training(declared_tied, World(0, 1, torch.device("cpu")))
    run.export_model(training, tmp_path / "model", source=declared_tied, dtype=torch.float32, card="")
    one, other = (transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.arange(9)[None])
                  for folder in (declared_tied, tmp_path / "model"))
    assert torch.equal(one.logits, other.logits)

# ----- the model of a plan -------------------------------------------------------------------------------------------


def test_a_plan_counts_a_head_of_its_own(declared_tied):
    """49,152 rows of 32 for the embedding, as many for the head, and two layers of 18,496."""
    args = SimpleNamespace(model=declared_tied, dry_run=True, inspect=None)
    assert parameter_count(run.config_of(args)) == 2 * 49152 * 32 + 2 * (2 * 32 + (64 + 32 + 32 + 64) * 32
                                                                         + 3 * 96 * 32) + 32


def test_a_plan_needs_no_weights(base, tmp_path):
    (tmp_path / "config.json").symlink_to(base / "config.json")
    for dry_run in (True, False):
        args = SimpleNamespace(model=tmp_path, dry_run=dry_run, inspect=None)
        with nullcontext() if dry_run else pytest.raises(InputError, match="no such file; expected model"):
            assert run.config_of(args) == M.LlamaConfig.from_json(base / "config.json")

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

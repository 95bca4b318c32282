"""sft.py: the loss by hand and beside transformers, and the command as a user meets it."""
import gzip
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
import transformers
from conftest import CONFIG, ROOT
from ranks import run_ranks
from safetensors.torch import load_file

import model as M
import sft
import train
from data import Tokenizer, collate, render_chat, render_rows
from sft import loss_fn, sft_loss

# ----- the loss ------------------------------------------------------------------------------------------------------


def test_loss_by_hand():
    # position 0: logits (0, 0), label 0: -log(1/2) = log 2
    # position 1: logits (log 3, 0), label 1: -log(1 / (3 + 1)) = log 4
    # position 2: not trained
    logits = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0], [5.0, -5.0]]])
    loss, n = sft_loss(logits, torch.tensor([[0, 1, -100]]))
    assert loss.item() == pytest.approx(math.log(2) + math.log(4), rel=1e-6) and n == 2
    # 1,000 is beyond e^88, where fp32 exponentials overflow: log(e^1000 + e^0) - 1000 = 0
    loss, n = sft_loss(torch.tensor([[[1000.0, 0.0]]], dtype=torch.bfloat16), torch.tensor([[0]]))
    assert loss.item() == 0 and n == 1
    loss, n = sft_loss(logits, torch.full((1, 3), -100))
    assert loss.item() == 0 and n == 0


def random_examples(lengths, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for n in lengths:
        ids = rng.integers(0, 300, n).astype(np.int32)
        labels = np.append(ids[1:], ids[:1])
        labels[rng.random(n) < 0.3] = -100
        rows.append(("", ids, labels))
    return rows


def tiny(seed=1, tied=False):
    return M.Llama(replace(CONFIG, tie_word_embeddings=tied)).init_weights(seed)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_close(one, other, relative):
    for name in one:
        assert (one[name] - other[name]).abs().max() <= relative * one[name].abs().max(), name


def test_loss_without_all_logits_is_the_naive_loss():
    """About 1,750 of 2,500 positions are trained: two chunks, each checkpointed. Loss and gradients."""
    model, batch = tiny(), collate(random_examples([250] * 10))
    naive, n = sft_loss(model(batch["ids"]), batch["labels"])
    loss, own_n, _ = loss_fn(model, batch)
    assert n == own_n and loss.item() == pytest.approx(naive.item(), rel=1e-6)
    assert_close(gradients(model, naive), gradients(model, loss_fn(model, batch)[0]), 1e-5)


def test_loss_and_gradients_equal_transformers(tmp_path):
    model, batch = tiny(), collate(random_examples([30, 30, 30]))
    M.save_model(model, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    loss, n, _ = loss_fn(model, batch)
    ours = gradients(model, loss / n)
    # transformers' labels stand at the token's own position: ours one further on; the first token has none
    shifted = torch.cat([torch.full((3, 1), -100), batch["labels"][:, :-1]], 1)
    shifted_n = (shifted != -100).sum()
    expected = theirs(batch["ids"], labels=shifted).loss
    lost, _ = sft_loss(model(batch["ids"])[:, -1:], batch["labels"][:, -1:])  # our label behind the last position
    assert (expected * shifted_n + lost).item() == pytest.approx(loss.item(), rel=1e-5)
    batch["labels"][:, -1] = -100
    loss, n, _ = loss_fn(model, batch)
    ours = gradients(model, loss / n)
    theirs.zero_grad()
    expected.backward()
    their_grads = {name: p.grad for name, p in theirs.named_parameters()}
    for own, parts in M.checkpoint_names(CONFIG).items():
        assert_close({own: torch.cat([their_grads[part] for part in parts])}, ours, 1e-5)


@pytest.mark.parametrize("lengths", [[40, 7, 23, 1, 15], [90, 60]])
def test_packed_documents_do_not_see_each_other(lengths):
    """Loss and gradients of rows packed one behind the other, padded one below the other, and each alone."""
    model, rows = tiny(tied=True), random_examples(lengths)
    alone = sum(loss_fn(model, collate([row]))[0] for row in rows)
    expected = gradients(model, alone)
    for packed in (True, False):
        loss = loss_fn(model, collate(rows, packed))[0]
        assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
        assert_close(expected, gradients(model, loss), 1e-5)
    changed = collate([(where, (ids + 1) % 300, labels) if i == 0 else (where, ids, labels)
                       for i, (where, ids, labels) in enumerate(rows)], packed=True)
    with torch.no_grad():
        before, after = (train.label_logps(model, batch) for batch in (collate(rows, packed=True), changed))
    assert torch.equal(before[:, lengths[0]:], after[:, lengths[0]:])
    assert not torch.equal(before[:, :lengths[0]], after[:, :lengths[0]])


def test_a_micro_batch_without_rows_gives_gradients_of_zero():
    model = tiny()
    loss, n, _ = loss_fn(model, collate([]))
    assert loss.item() == 0 and n == 0
    assert all((grad == 0).all() for grad in gradients(model, loss).values())


def test_supervised_spans_are_the_answers():
    """The decoded labels of a conversation of two turns, for each template (characters stand for tokens)."""
    control = {name: i for i, name in enumerate((
        "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>",
        "<s>", "</s>"))}
    talk = [{"role": "user", "content": "Why <|eot_id|>?"}, {"role": "assistant", "content": "Because."},
            {"role": "user", "content": "So?"}, {"role": "assistant", "content": "Yes."}]
    expected = {"llama3": "Because.<|eot_id|>Yes.<|eot_id|>", "chatml": "Because.<|im_end|>Yes.<|im_end|>",
                "llama2": "Because. </s>Yes. </s>"}  # the template's own space before its end
    names = {i: name for name, i in control.items()}
    for template, answers in expected.items():
        tokenizer = Tokenizer(lambda text: [ord(c) + 100 for c in text], None, control, set(), template, 1 << 21)
        (_, ids, labels), = render_rows(tokenizer, [("", talk)], 10_000)[0]
        assert "".join(names.get(i) or chr(i - 100) for i in labels if i != -100) == answers
        assert render_chat(tokenizer, talk)[0][1:] == [*ids[1:], render_chat(tokenizer, talk)[0][-1]]

# ----- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"instruction": f"What is {i} times two?", "response": f"It is {2 * i}. " * (1 + i % 7),
             "instruction_type": "complex" if i % 2 else "common"} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(base, rows_file, out, *more):
    return ["--stage", "1", "--model", str(base), "--data", str(rows_file), "--out", str(out), "--batch-size", "8",
            "--lr", "1e-2", "--device", "cpu", "--val-rows", "6", *map(str, more)]


def command(*args):
    return ranks.command(sft.main, *args)


def run_main(argv):
    sft.main([str(arg) for arg in argv])


def test_the_script_starts():
    done = subprocess.run([sys.executable, ROOT / "sft.py", "--stage", "2", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "(default 25,600: the paper's summary)" in " ".join(done.stdout.split())


@pytest.fixture(scope="session")
def trained(base, rows_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "sft"
    run_ranks(1, run_main, arguments(base, rows_file, out, "--epochs", "2", "--save-every", "4"))
    return out


def test_a_run_leaves_what_it_should_and_learns(trained, rows_file):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 11)) and steps[-1]["rows"] == 68
    assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_s", "peak_memory_gb", "rows"} <= set(steps[0])
    held = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert list(held) == [0, 4, 8, 10] and held[10] < held[0] - 0.5
    config = json.loads((trained / "config.json").read_text())
    assert config["lr"] == 1e-2 and config["files"][0]["rows"] == 40 and len(config["files"][0]["sha256"]) == 64
    assert [path.name for path in train.checkpoints_of(trained / "checkpoints")] == ["step-000010", "step-000008"]
    card = (trained / "model/README.md").read_text()
    assert "Not medical advice" in card and str(rows_file) in card and "Llama" not in card.split("##")[0]


def test_the_export_loads_in_transformers_with_the_same_logits(trained, smollm2):
    assert "lm_head.weight" not in load_file(trained / "model/model.safetensors")  # tied: stored once
    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained / "model", dtype=torch.float32).eval()
    ours = M.load_model(trained / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "model")
    talk = [{"role": "user", "content": "What is 4 times two?"}]
    text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert ids == render_chat(Tokenizer.from_dir(trained / "model"), talk, add_generation_prompt=True)[0]
    with torch.no_grad():
        assert (theirs(torch.tensor([ids])).logits - ours(torch.tensor([ids]))).abs().max() <= 1e-4


def test_the_export_is_the_masters_stochastically_rounded(trained, base, rows_file, tmp_path):
    """An fp32 export of the same run: the bf16 one lies within one ulp of it, and not always at the nearest."""
    out = tmp_path / "again"
    run_ranks(1, run_main, arguments(base, rows_file, out, "--epochs", 2, "--save-every", 4, "--export-dtype", "fp32"))
    exact, kept = load_file(out / "model/model.safetensors"), load_file(trained / "model/model.safetensors")
    moved = 0
    for name, values in exact.items():
        assert kept[name].dtype == torch.bfloat16 and values.dtype == torch.float32
        assert ((kept[name].float() - values).abs() <= values.abs() * 2**-7).all()
        moved += (kept[name] != values.bfloat16()).sum().item()
    assert 0.05 < moved / sum(v.numel() for v in exact.values()) < 0.5


def test_two_ranks_export_the_same_rows_and_a_whole_model(base, rows_file, tmp_path):
    argv = arguments(base, rows_file, tmp_path / "two", "--dtype", "fp32", "--export-dtype", "fp32")
    run_ranks(2, run_main, argv)
    run_ranks(1, run_main, [*argv, "--out", str(tmp_path / "one")])
    losses = [[json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
              for name in ("one", "two")]
    for one, two in zip(*losses):
        for key in {"loss", "val_loss"} & set(one):
            assert one[key] == pytest.approx(two[key], rel=1e-5)
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    # AdamW divides by the gradient's size, so where one is nearly nothing the order of sums decides the step
    assert np.mean([((one[name] - two[name]).abs() <= 1e-5).float().mean().item() for name in one]) > 0.99


def test_stages_chain_and_the_cold_start_takes_complex_rows(trained, rows_file, tmp_path):
    done = command(*arguments(trained / "model", rows_file, tmp_path, "--stage", "cold-start", "--dry-run"))
    assert done.returncode == 0, done.stderr
    assert "40 read, 0 bad, 20 of another kind" in done.stdout and "trained: 14 of 12,800" in done.stdout


def test_dry_run_and_inspect_touch_nothing(base, rows_file, tmp_path):
    done = command(*arguments(base, rows_file, tmp_path / "out", "--dry-run"))
    assert done.returncode == 0 and "steps: 5 of 8 rows over 1 rank(s)" in done.stdout
    for part in ("trained: 34 of 228,000", "held out: 6 rows", "GB  state: 18", "GB  libraries and data"):
        assert part in done.stdout
    done = command(*arguments(base, rows_file, tmp_path / "out", "--inspect", 2))
    assert done.returncode == 0 and done.stdout.count("⟦It is ") == 2 and done.stdout.count("<|im_end|>⟧") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, message", [
    (["--model", "nowhere"], "nowhere/config.json: no such file"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file; expected a .jsonl file"),
    (["--data", "BAD"], ":2: found no text under response or chosen or completion"),
    (["--max-length", "9000"], "--max-length 9000: found more than the model's context of 8192 tokens"),
    (["--lr", "-1"], "argument --lr: found '-1', expected a number above 0"),
    (["--batch-size", "0"], "argument --batch-size: found '0', expected a whole number of at least 1"),
    (["--stage", "5"], "invalid choice: '5'"),
    (["--replicate", "2"], "--replicate 2: 1 ranks do not divide by it"),
    (["--val-rows", "40"], "no row left to train on (40 read, 40 held out)"),
])
def test_wrong_input_ends_in_one_line_and_status_2(base, rows_file, tmp_path, change, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "?", "response": "!"}\n{"prompt": "?"}\n')
    done = command(*arguments(base, rows_file, tmp_path / "out", *[str(bad) if x == "BAD" else x for x in change]))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_bad_rows_can_be_skipped_and_gz_is_read(base, tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "?", "response": "!"}\n{"prompt": "?"}\n'))
    done = command(*arguments(base, path, tmp_path / "out", "--dry-run", "--on-bad-row", "skip", "--val-rows", 0))
    assert done.returncode == 0 and f"skipped: {path}:2: found no text" in done.stderr and "1 bad" in done.stdout


def test_an_existing_run_is_not_overwritten_but_resumed(base, rows_file, trained):
    argv = arguments(base, rows_file, trained, "--epochs", "2", "--save-every", "4")
    done = command(*argv)
    assert done.returncode == 2 and "holds the checkpoints of an earlier run; expected --resume" in done.stderr
    done = command(*argv, "--resume", "--lr", "0.5")
    assert done.returncode == 2 and "lr was 0.01 and is 0.5" in done.stderr
    before = (trained / "metrics.jsonl").read_text(), (trained / "model/model.safetensors").read_bytes()
    done = command(*argv, "--resume")
    assert done.returncode == 0 and "resuming from" in done.stderr and "held-out loss" in done.stdout
    assert before == ((trained / "metrics.jsonl").read_text(), (trained / "model/model.safetensors").read_bytes())


@pytest.mark.parametrize("stage, numbers", [("1", "228,000"), ("2", "25,600"), ("3", "10,240"),
                                            ("cold-start", "12,800")])
def test_help_shows_each_stages_numbers_and_their_source(stage, numbers, capsys):
    with pytest.raises(SystemExit):
        sft.parse_args(["--stage", stage, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"(default {numbers}: the paper's summary)" in shown and "the authors' code" in shown


def test_a_model_made_from_llama_says_so():
    card = train.model_card("FineMedLM-o1-sft-1", M.LlamaConfig(), source="models/Llama-3.1-8B", recipe={"lr": 3e-5},
                            files=[{"file": "a.jsonl", "rows": 3, "sha256": "0" * 64}], results={"steps": 3})
    assert "# Llama-FineMedLM-o1-sft-1" in card and "**Built with Llama**" in card and "license: llama3.1" in card


def test_memory_of_eight_billion_parameters_over_eight_gpus():
    """18 bytes a parameter over 8 shards: 18.07 GB; embedding, head and two layers gathered, with their gradients."""
    world = train.World(0, 8, torch.device("cuda"), shards=8)
    parts = train.expected_memory(M.LlamaConfig(), world, dtype=torch.bfloat16, tokens=8192,
                                  activation_checkpointing=True)
    state, activations, logits, gathered = parts.values()
    assert state == pytest.approx(18 * 8.03e9 / 8, rel=1e-3) and logits == 12 * 2**26 + 2 * 2**27
    assert gathered == pytest.approx(4 * (2 * 128256 * 4096 + 2 * 218.1e6), rel=1e-3)
    assert activations == pytest.approx(8192 * 2 * (32 * 4096 + 4 * 4096 + 2 * 14336 + 4 * 5120), rel=1e-6)


def test_the_readmes_table_of_what_a_gpu_needs():
    rows = [line.split("|")[2:4] for line in (ROOT / "README.md").read_text().splitlines() if line.count("|") == 4]
    rows = [cells for cells in rows if all(cell.endswith(" GB ") for cell in cells)]
    assert len(rows) == 4
    for row, (ranks_, shards) in zip(rows, [(1, 1), (8, 8), (16, 8), (16, 16)]):
        world = train.World(0, ranks_, torch.device("cuda"), shards=shards)
        for cell, recompute in zip(row, (False, True)):
            parts = train.expected_memory(M.LlamaConfig(), world, dtype=torch.bfloat16, tokens=8192,
                                          activation_checkpointing=recompute)
            assert cell.strip() == f"{sum(parts.values()) / 1e9:.0f} GB", (ranks_, shards, recompute)


def test_readme_paths_of_the_chain():
    for stage, following in zip(["1", "2", "3"], ["2", "3", "cold-start"]):
        assert sft.STAGES[following]["model"][0] == str(Path(sft.STAGES[stage]["out"][0]) / "model")

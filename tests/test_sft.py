"""sft.py: the loss by hand and beside transformers, and the command as a user meets it."""
import errno
import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
import transformers
from conftest import CONFIG, ROOT, assert_close, gradients, held_elsewhere, random_examples, tiny_llama
from ranks import metrics_in, run_ranks
from safetensors.torch import load_file, save_file

import files
import model as M
import run
import sft
import train
from chat import render_chat
from checkpoints import checkpoints_of
from data import collate
from files import InputError
from sft import loss_fn, sft_loss
from tokenizer import Tokenizer
from weights import checkpoint_names

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
    # the docstring's example
    logits = torch.tensor([[[5.0, 5.0, 5.0], [0.0, 0.0, math.log(2)], [0.0, 0.0, math.log(2)]]])
    loss, n = sft_loss(logits, torch.tensor([[-100, 2, 1]]))
    assert loss.item() == pytest.approx(3 * math.log(2), rel=1e-6) and n == 2


def test_loss_without_all_logits_is_the_naive_loss():
    """About 1,750 of 2,500 positions are trained, all 300 words in one block. Loss and gradients."""
    model, batch = tiny_llama(), collate(random_examples([250] * 10))
    naive, n = sft_loss(model(batch["ids"]), batch["labels"])
    loss, own_n, _ = loss_fn(model, batch)
    assert n == own_n and loss.item() == pytest.approx(naive.item(), rel=1e-6)
    assert_close(gradients(model, naive), gradients(model, loss_fn(model, batch)[0]), 1e-5)


def test_loss_and_gradients_equal_transformers(tmp_path):
    model, batch = tiny_llama(), collate(random_examples([30, 30, 30]))
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
    for own, parts in checkpoint_names(CONFIG).items():
        assert_close({own: torch.cat([their_grads[part] for part in parts])}, ours, 1e-5)


@pytest.mark.parametrize("lengths", [[40, 7, 23, 1, 15], [90, 60]])
def test_packed_documents_do_not_see_each_other(lengths):
    """Loss and gradients of rows packed one behind the other, padded one below the other, and each alone."""
    model, rows = tiny_llama(tied=True), random_examples(lengths)
    alone = sum(loss_fn(model, collate([row]))[0] for row in rows)
    expected = gradients(model, alone)
    for packed in (True, False):
        loss = loss_fn(model, collate(rows, packed))[0]
        assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
        assert_close(expected, gradients(model, loss), 1e-5)
    changed = collate([(where, (ids + 1) % 300, labels) if i == 0 else (where, ids, labels)
                       for i, (where, ids, labels) in enumerate(rows)], packed=True)
    with torch.no_grad():
        before, after = (sft.label_logps(model, batch) for batch in (collate(rows, packed=True), changed))
    assert torch.equal(before[:, lengths[0]:], after[:, lengths[0]:])
    assert not torch.equal(before[:, :lengths[0]], after[:, :lengths[0]])


def test_a_micro_batch_without_rows_gives_gradients_of_zero():
    model = tiny_llama()
    loss, n, _ = loss_fn(model, collate([]))
    assert loss.item() == 0 and n == 0
    assert all((grad == 0).all() for grad in gradients(model, loss).values())


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
    rows = metrics_in(trained)
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 11)) and steps[-1]["rows"] == 68
    assert {"loss", "lr", "grad_norm", "tokens", "tokens_per_s", "peak_memory_gb", "rows"} <= set(steps[0])
    held = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert list(held) == [0, 4, 8, 10] and held[10] < held[0] - 0.5
    config = json.loads((trained / "config.json").read_text())
    assert config["lr"] == 1e-2 and config["files"][0]["rows"] == 40 and len(config["files"][0]["sha256"]) == 64
    assert [path.name for path in checkpoints_of(trained / "checkpoints")] == ["step-000010", "step-000008"]
    card = (trained / "model/README.md").read_text()
    assert "Not medical advice" in card and str(rows_file) in card and "Llama" not in card.split("##")[0]


def test_the_flags_reach_the_optimizer_and_the_schedule(base, rows_file, tmp_path, monkeypatch):
    """Learning rates by hand: 5 steps, of which 2 rise, then a cosine over 3: 1, 3/4, 1/4 of the highest."""
    seen, take_step = [], train.take_step

    def noted(training, stream, loss_fn, lr, clip, signals):
        seen.append((lr, clip, *(group["weight_decay"] for group in training.optimizer.param_groups)))
        return take_step(training, stream, loss_fn, lr, clip, signals)
    monkeypatch.setattr(train, "take_step", noted)
    monkeypatch.setattr(sft, "finish", lambda *args: None)
    sft.main(arguments(base, rows_file, tmp_path, "--lr", 0.02, "--warmup", 0.4, "--clip", 0.25, "--weight-decay", 0.3,
                       "--val-rows", 0))
    rates = pytest.approx([0.01, 0.02, 0.02, 0.015, 0.005])
    assert [lr for lr, *_ in seen] == rates and {tuple(rest) for _, *rest in seen} == {(0.25, 0.3, 0.0)}
    rows = metrics_in(tmp_path)
    assert [row["lr"] for row in rows] == rates


def test_rows_held_out_are_not_trained(base, rows_file, tmp_path, monkeypatch):
    """The numbers in the questions of both kinds of micro-batches, as they come to `fit`."""
    found, tokenizer = {}, Tokenizer.from_dir(base)

    def numbers_in(micro_batches):
        texts = (tokenizer.decode(batch["ids"].flatten().tolist()) for batch in micro_batches)
        return [int(number) for text in texts for number in re.findall(r"What is (\d+) times two", text)]

    def fit(training, batches, loss_fn, *, held, steps, **settings):
        found["held"] = numbers_in(held)
        found["trained"] = [number for _, (_, own) in zip(range(steps), batches(0)) for number in numbers_in(own)]
    monkeypatch.setattr(sft, "fit", fit)
    monkeypatch.setattr(sft, "finish", lambda *args: None)
    sft.main(arguments(base, rows_file, tmp_path, "--epochs", 1))
    assert len(found["held"]) == 6 and sorted(found["held"] + found["trained"]) == list(range(40))


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
    for one, two in zip(metrics_in(tmp_path / "one"), metrics_in(tmp_path / "two")):
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
    assert not [path for path in (tmp_path / "out").glob("*") if path.name != ".config.json.lock"]  # until the end


@pytest.mark.parametrize("more", [("--dry-run",), ()])
def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(too_few_rows, rows_file, tmp_path, more):
    with pytest.raises(InputError, match=r"its tokenizer gives ids up to 49151; .* vocab_size, 49151"):
        sft.main(arguments(too_few_rows, rows_file, tmp_path / "out", *more))


def test_no_row_of_the_kind_that_is_wanted(base, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "?", "response": "!", "instruction_type": "common"}\n' * 2)
    with pytest.raises(InputError, match=r"no row left to train on \(2 read, 2 of another kind \(instruction_type is "
                                         r"not 'complex'\)\); expected at least one"):
        sft.main(arguments(base, path, tmp_path / "out", "--stage", "cold-start"))


def test_bad_rows_can_be_skipped_and_gz_is_read(base, tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "? <|im_end|>", "response": "!"}\n{"prompt": "?"}\n'))
    done = command(*arguments(base, path, tmp_path / "out", "--dry-run", "--on-bad-row", "skip", "--val-rows", 0))
    assert done.returncode == 0 and f"skipped: {path}:2: found no text" in done.stderr and "1 bad" in done.stdout
    assert done.stderr.count("added tokens in texts that are read as plain text: <|im_end|>\n") == 1


def test_two_runs_do_not_share_a_folder(base, rows_file, tmp_path):
    """Nor with --resume; a plan may be looked at. The lock lies in the folder: the one above may be another's."""
    with held_elsewhere(tmp_path / "out/config.json") as other:
        for more in ((), ("--resume",)):
            done = command(*arguments(base, rows_file, tmp_path / "out", *more))
            assert done.returncode == 2 and f"out/config.json: process {other.pid} on " in done.stderr, done.stderr
        assert command(*arguments(base, rows_file, tmp_path / "out", "--dry-run")).returncode == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".config.json.lock"]


def refused(argv, full_disk=None):
    """The OSError in one line that ends sft.main; files named `full_disk` cannot be written by rank 0."""
    plain = files.flush

    def flush(path, **more):
        if full_disk and f".{full_disk}.partial" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(path, **more)
    files.flush = flush
    try:
        sft.main([str(arg) for arg in argv])
    except OSError as error:
        return files.one_line(error)


def test_a_file_in_the_place_of_the_folder_is_refused_on_every_rank(base, rows_file, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert run_ranks(2, refused, arguments(base, rows_file, tmp_path / "out")) == [f"{tmp_path}/out: File exists"] * 2


def refused_by_rank_0(argv):
    """The InputError of sft.main on this rank, where rank 1 sees another disk, on which the folder is new."""
    if os.environ["RANK"] == "1":
        run.checkpoints_of = lambda folder: []
    try:
        sft.main([str(arg) for arg in argv])
    except InputError as error:
        return files.one_line(error)


def test_rank_0_alone_looks_for_an_earlier_run(base, rows_file, tmp_path):
    (tmp_path / "out/checkpoints/step-000001").mkdir(parents=True)
    said = run_ranks(2, refused_by_rank_0, arguments(base, rows_file, tmp_path / "out"))
    assert said[0] == said[1] and "holds the checkpoints of an earlier run" in said[0]


@pytest.mark.parametrize("name", ["config.json", "model"])
def test_a_disk_that_is_full_on_rank_0_ends_every_rank(base, rows_file, tmp_path, name):
    expected = [f"{tmp_path}/out/{name}: No space left on device"] * 2
    assert run_ranks(2, refused, arguments(base, rows_file, tmp_path / "out", "--max-steps", 1), name) == expected


def test_a_finished_model_without_checkpoints_is_not_overwritten(base, rows_file, trained, tmp_path):
    """`make chain` leaves such a folder."""
    shutil.copytree(trained / "model", tmp_path / "out/model")
    done = command(*arguments(base, rows_file, tmp_path / "out"))
    assert done.returncode == 2 and "holds the model of an earlier run; expected --resume to go on, or another" \
        in done.stderr


def test_a_run_is_resumed_by_what_its_model_is_and_not_by_where_it_lies(base, rows_file, trained, tmp_path):
    out, moved = tmp_path / "out", tmp_path / "moved"
    shutil.copytree(trained, out)
    shutil.copytree(base, moved)
    more = ("--epochs", "2", "--save-every", "4", "--resume")
    done = command(*arguments(f"{moved}/", rows_file, out, *more))
    assert done.returncode == 0, done.stderr
    settings = moved / "tokenizer_config.json"
    given = settings.read_text()
    settings.write_text(given.replace("named SmolLM", "named Smol"))
    done = command(*arguments(moved, rows_file, out, *more))
    assert done.returncode == 2 and "made with other settings: template was '" in done.stderr
    settings.write_text(given)
    tensors = load_file(moved / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    done = command(*arguments(moved, rows_file, out, *more))
    assert done.returncode == 2 and "made with other settings: model was '" in done.stderr


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


def test_readme_paths_of_the_chain():
    for stage, following in zip(["1", "2", "3"], ["2", "3", "cold-start"]):
        assert sft.STAGES[following]["model"][0] == str(Path(sft.STAGES[stage]["out"][0]) / "model")

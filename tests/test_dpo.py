"""dpo.py: the losses by hand, beside TRL's and beside two plain models; the reference; the command as users meet it."""
import errno
import hashlib
import math
import os
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ranks
import torch
import torch.nn.functional as F
from conftest import ROOT, assert_close, gradients, random_pairs, tiny_llama, write_jsonl
from ranks import metrics_in, run_ranks
from safetensors.torch import load_file, save_file

import data
import dpo
import model as M
import train
from data import collate_pairs
from dpo import dpo_loss, pair_logps, preference_loss, sequence_logps
from files import InputError, one_line
from parallel import World
from tokenizer import Tokenizer

# ----- the losses ----------------------------------------------------------------------------------------------------

LENGTHS = {"chosen_lengths": torch.tensor([4.0]), "rejected_lengths": torch.tensor([2.0])}
SETTINGS = {"sigmoid": {}, "cdpo": {"label_smoothing": 0.2}, "robust": {"loss_type": "robust", "label_smoothing": 0.2},
            "hinge": {"loss_type": "hinge"}, "ipo": {"loss_type": "ipo"}, "norm": {"loss_type": "sigmoid_norm"},
            "free": {"reference_free": True}, "nll": {"alpha": 0.5}, "ipo+nll": {"loss_type": "ipo", "alpha": 2.0}}


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


# policy -8 and -10, reference -10 and -9: r_w = 2, r_l = -1, h = 3; per token h' = 2/4 - (-1)/2 = 1; beta 0.5
BY_HAND = {
    "sigmoid": 0.201413277983,          # -log s(1.5) = log(1 + e^-1.5)
    "cdpo": 0.501413277983,             # 0.8 log(1 + e^-1.5) + 0.2 log(1 + e^1.5) = the above + 0.2 * 1.5
    "robust": -0.298586722017,          # (0.8 * 0.201413 - 0.2 * 1.701413) / 0.6
    "hinge": 0.0,                       # 1 - 1.5 < 0
    "ipo": 0.0,                         # (1 - 1 / (2 * 0.5))^2
    "norm": 0.474076984180,             # log(1 + e^-0.5)
    "free": 0.313261687518,             # h = -8 + 10 = 2: log(1 + e^-1)
    "nll": 1.201413277983,              # sigmoid + 0.5 * 8 / 4
    "ipo+nll": 4.0}                     # 0 + 2 * 8 / 4


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_by_hand(name):
    logps = [torch.tensor([x], dtype=torch.float64) for x in (-8.0, -10.0, -10.0, -9.0)]
    losses, chosen, rejected = dpo_loss(*logps, beta=0.5, **LENGTHS, **SETTINGS[name])
    assert losses.item() == pytest.approx(BY_HAND[name], abs=1e-10)
    # rewards: 0.5 * 2 and 0.5 * -1; without a reference 0.5 * -8 and 0.5 * -10
    assert (chosen.item(), rejected.item()) == ((-4.0, -5.0) if name == "free" else (1.0, -0.5))


@pytest.mark.parametrize("settings, loss", [
    ({}, math.log(2)), ({"label_smoothing": 0.3}, math.log(2)), ({"loss_type": "robust"}, math.log(2)),
    ({"loss_type": "robust", "label_smoothing": 0.3}, math.log(2)), ({"loss_type": "hinge"}, 1.0),
    ({"loss_type": "ipo"}, 25.0), ({"loss_type": "sigmoid_norm"}, math.log(2))], ids=str)
def test_where_policy_and_reference_agree(settings, loss):
    """h = 0: -log s(0) = log 2; the hinge's 1 - 0; IPO's (0 - 1 / 0.2)^2 = 25."""
    logps = torch.tensor([-8.0]), torch.tensor([-10.0])
    assert dpo_loss(*logps, *logps, **LENGTHS, **settings)[0].item() == pytest.approx(loss, rel=1e-6)


def test_extreme_margins_stay_finite():
    """h = 20,000 and -20,000 at beta 0.1: the losses are 0 and 2,000, with smoothing 0.1 * 2,000 and 0.9 * 2,000."""
    zero, far = torch.zeros(2), torch.tensor([20_000.0, -20_000.0])
    assert dpo_loss(far, zero, zero, zero)[0].tolist() == [0.0, 2000.0]
    assert dpo_loss(far, zero, zero, zero, label_smoothing=0.1)[0].tolist() == pytest.approx([200.0, 1800.0])


@pytest.mark.parametrize("name", SETTINGS)
def test_gradients_are_finite_differences(name):
    generator = torch.Generator().manual_seed(3)
    logps = [-20 * torch.rand(6, dtype=torch.float64, generator=generator) for _ in range(4)]
    lengths = {key: torch.randint(1, 30, (6,), generator=generator).double() for key in LENGTHS}

    def total(chosen, rejected):
        return dpo_loss(chosen, rejected, *logps[2:], **lengths, **SETTINGS[name])[0].sum()
    own = [x.clone().requires_grad_() for x in logps[:2]]
    total(*own).backward()
    for side in (0, 1):
        for i in range(6):
            step = torch.zeros(6, dtype=torch.float64)
            step[i] = 1e-5
            up, down = (total(*(x + sign * step if k == side else x for k, x in enumerate(logps[:2])))
                        for sign in (1, -1))
            assert own[side].grad[i].item() == pytest.approx((up - down).item() / 2e-5, abs=1e-8)


def trl_loss(name, per_token, reference, mask, beta, label_smoothing):
    """TRL's DPOTrainer._compute_loss of per-token log-probabilities [2B, T], chosen above rejected."""
    trainer_class = pytest.importorskip("trl", reason="TRL is the peer (extra: test)").DPOTrainer
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x), aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[name], loss_weights=[1.0], beta=beta,
        label_smoothing=label_smoothing, use_weighting=False, _total_train_tokens=0, _tp_size=1,
        _metrics=defaultdict(lambda: defaultdict(list)))
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask,
              "ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
    zeros = torch.zeros_like(per_token)

    def model(**inputs):
        return SimpleNamespace(log_probs=per_token, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    loss = trainer_class._compute_loss(trainer, model, inputs, False)
    return loss.item(), {key: value[0] for key, value in trainer._metrics["train"].items()}


@pytest.mark.parametrize("ours, theirs", [("sigmoid", "sigmoid"), ("robust", "robust"), ("hinge", "hinge"),
                                          ("ipo", "ipo"), ("norm", "sigmoid_norm"), ("cdpo", "aot"), ("nll", "sft")])
def test_losses_and_rewards_equal_trl(ours, theirs):
    """TRL's sigmoid ignores label smoothing, its aot of a single pair does not; its sft is the NLL term alone."""
    generator = torch.Generator().manual_seed(5)
    pairs = 1 if theirs in ("aot", "sft") else 7
    mask = torch.zeros(2 * pairs, 31, dtype=torch.long)
    for row, n in enumerate(torch.randint(1, 31, (2 * pairs,), generator=generator).tolist()):
        mask[row, 1:1 + n] = 1  # TRL's mask marks the token itself, so never the first
    per_token = -3 * torch.rand(2 * pairs, 30, generator=generator) * mask[:, 1:]
    reference = (-3 * torch.rand(2 * pairs, 30, generator=generator) * mask[:, 1:]).sum(1).chunk(2)
    settings = SETTINGS[ours]
    expected, logged = trl_loss(theirs, per_token, reference, mask, 0.3, settings.get("label_smoothing", 0.0))
    (chosen, rejected), lengths = per_token.sum(1).chunk(2), mask.sum(1).chunk(2)
    losses, _, _ = dpo_loss(chosen, rejected, *reference, beta=0.3, chosen_lengths=lengths[0],
                            rejected_lengths=lengths[1], **settings)
    if theirs == "sft":
        losses = (losses - dpo_loss(chosen, rejected, *reference, beta=0.3)[0]) / settings["alpha"]
    assert losses.mean().item() == pytest.approx(expected, rel=1e-6)
    _, _, metrics = preference_loss(torch.stack([chosen, rejected], 1), torch.stack(reference, 1),
                                    torch.stack(lengths, 1), beta=0.3)
    for key, name in (("rewards_chosen", "rewards/chosen"), ("rewards_rejected", "rewards/rejected"),
                      ("margin", "rewards/margins"), ("accuracy", "rewards/accuracies"),
                      ("logps_chosen", "logps/chosen"), ("logps_rejected", "logps/rejected")):
        assert metrics[key].item() / pairs == pytest.approx(logged[name], rel=1e-5, abs=1e-6)


def test_metrics_by_hand():
    """Two pairs, beta 0.1: r is (1, -3) and (2, 2); a draw is no success. Drift: -(1 - 3 + 2 + 2) / 2 = -1."""
    reference = torch.tensor([[-10.0, -10.0], [-5.0, -5.0]])
    loss, n, metrics = preference_loss(reference + torch.tensor([[1.0, -3.0], [2.0, 2.0]]), reference,
                                       torch.tensor([[4, 5], [6, 7]]))
    assert n == 2 and loss.item() == pytest.approx(-log_sigmoid(0.4) + math.log(2), rel=1e-6)
    assert {key: round(value.item(), 5) for key, value in metrics.items()} == {
        "rewards_chosen": 0.3, "rewards_rejected": -0.1, "margin": 0.4, "accuracy": 1.0, "drift": -1.0,
        "logps_chosen": -12.0, "logps_rejected": -16.0, "length_chosen": 10, "length_rejected": 12}


@pytest.mark.parametrize("settings, message", [
    ({"beta": 0.0}, "beta 0: expected a number above 0"), ({"beta": math.nan}, "beta nan"),
    ({"label_smoothing": 0.5}, "label smoothing 0.5: expected 0 to below 0.5"),
    ({"label_smoothing": -0.1}, "label smoothing -0.1"),
    ({"loss_type": "hinge", "label_smoothing": 0.1}, "label smoothing 0.1 with loss 'hinge'"),
    ({"loss_type": "ipo", "label_smoothing": 0.1}, "label smoothing 0.1 with loss 'ipo'"),
    ({"loss_type": "kto"}, "loss type 'kto': expected one of sigmoid"),
    ({"alpha": -1.0}, "alpha -1: expected 0 or more"),
    ({"loss_type": "ipo"}, "found no lengths"), ({"alpha": 1.0}, "found no lengths")], ids=str)
def test_what_has_no_meaning_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        dpo_loss(*torch.zeros(4, 1), **settings)


def test_sequence_logps_by_hand():
    # row 0: logits (0, 0), label 0: log 1/2; (log 3, 0), label 1: log 1/4; a third position without a label
    # row 1: (1000, 0), label 0, in bf16: log 1 = 0, where exponentials would overflow
    logits = torch.tensor([[[0.0, 0.0], [math.log(3), 0.0], [5.0, -5.0]], [[1000.0, 0.0]] * 3])
    logps, n = sequence_logps(logits, torch.tensor([[0, 1, -100], [0, -100, -100]]))
    assert logps.tolist() == pytest.approx([-math.log(8), 0.0], rel=1e-6) and n.tolist() == [2, 1]
    assert sequence_logps(logits.bfloat16(), torch.full((2, 3), -100))[0].tolist() == [0.0, 0.0]
    # the docstring's example
    logits = torch.tensor([[[5.0, 5.0, 5.0], [0.0, 0.0, math.log(2)], [0.0, 0.0, math.log(2)]]])
    logps, n = sequence_logps(logits, torch.tensor([[-100, 2, 1]]))
    assert logps.tolist() == pytest.approx([-3 * math.log(2)], rel=1e-6) and n.tolist() == [2]

# ----- both answers in one pass --------------------------------------------------------------------------------------


SIZES = [(9, 14, 5), (1, 3, 8), (30, 1, 2), (4, 20, 20)]  # of prompt, chosen and rejected


def plain_logp(model, prompt, answer):
    """log p(answer | prompt), the textbook way: one row, all logits, log-softmax, a token at a time."""
    ids = torch.from_numpy(np.concatenate([prompt, answer])).long()
    table = F.log_softmax(model(ids[None])[0].double(), -1)
    return sum(table[t - 1, ids[t]] for t in range(len(prompt), len(ids)))


def test_one_pass_is_two_rows_is_the_textbook():
    """Log-probabilities and gradients: prompt once, prompt twice, and each answer alone; in one micro-batch or four."""
    model, pairs = tiny_llama(), random_pairs(SIZES)
    expected = torch.stack([torch.stack([plain_logp(model, prompt, answer) for answer in answers])
                            for _, prompt, *answers in pairs])
    weights = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))
    expected_gradients = gradients(model, (expected * weights).sum())
    for shared in (True, False):
        for parts in ([pairs], [[pair] for pair in pairs]):
            logps = torch.cat([pair_logps(model, collate_pairs(part, shared)) for part in parts])
            assert (logps - expected).abs().max() <= 1e-6 * expected.abs().max()
            assert_close(expected_gradients, gradients(model, (logps * weights).sum()), 1e-5)
    rows = data.rows_of_answers(*pairs[0][1:])
    for (ids, labels), value in zip(rows, expected[0]):
        logps, n = sequence_logps(model(torch.from_numpy(ids).long()[None]), torch.from_numpy(labels).long()[None])
        assert logps.item() == pytest.approx(value.item(), rel=1e-6) and n == (labels != -100).sum()


def test_answers_and_pairs_do_not_see_each_other():
    """Another first token of one chosen answer changes that answer's log-probability and no other, to the bit."""
    model, pairs = tiny_llama(), random_pairs(SIZES)
    changed = [(where, prompt, (chosen + 1) % 300 if where == "pair 0" else chosen, rejected)
               for where, prompt, chosen, rejected in pairs]
    with torch.no_grad():
        same = pair_logps(model, collate_pairs(pairs)) == pair_logps(model, collate_pairs(changed))
    assert same.tolist() == [[False, True]] + [[True, True]] * 3


def test_a_micro_batch_without_pairs_gives_gradients_of_zero():
    model, batch = tiny_llama(), collate_pairs([])
    loss, n, metrics = preference_loss(pair_logps(model, batch), torch.zeros(0, 2), batch["lengths"])
    assert loss.item() == 0 and n == 0 and set(map(float, metrics.values())) == {0.0} and "drift" in metrics
    assert all((grad == 0).all() for grad in gradients(model, loss).values())


@pytest.mark.parametrize("name", ["sigmoid", "ipo", "nll"])
def test_gradient_of_a_step_is_that_of_two_plain_models(name):
    """Policy and reference as two models, a row at a time, the loss written out with log(1 + e^-x)."""
    policy, reference, pairs = tiny_llama(1, tied=True), tiny_llama(2, tied=True), random_pairs(SIZES)
    total = 0
    for _, prompt, *answers in pairs:
        better, worse = (plain_logp(policy, prompt, answer) for answer in answers)
        with torch.no_grad():
            better_ref, worse_ref = (plain_logp(reference, prompt, answer) for answer in answers)
        r_w, r_l = better - better_ref, worse - worse_ref
        if name == "ipo":
            total = total + (r_w / len(answers[0]) - r_l / len(answers[1]) - 5) ** 2
        else:
            total = total + torch.log1p(torch.exp(-0.1 * (r_w - r_l)))
            total = total - (0.5 * better / len(answers[0]) if name == "nll" else 0)
    expected = gradients(policy, total / 4)
    batch = collate_pairs(pairs)
    with torch.no_grad():
        logps_ref = pair_logps(reference, batch)
    loss, n, _ = preference_loss(pair_logps(policy, batch), logps_ref, batch["lengths"], **SETTINGS[name])
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert_close(expected, gradients(policy, loss / n), 1e-5)


def test_margin_and_accuracy_are_what_the_loss_compares():
    # log-ratios -10 of 100 tokens and -1 of 2: -0.1 and -0.5 a token, so per token the chosen answer is the better
    logps, reference, lengths = (torch.tensor([row]) for row in ([-110.0, -10.0], [-100.0, -9.0], [100, 2]))
    for loss_type, margin in (("ipo", 0.1 * 0.4), ("sigmoid", 0.1 * -9)):
        found = preference_loss(logps, reference, lengths, loss_type=loss_type)[2]
        assert found["margin"].item() == pytest.approx(margin) and found["accuracy"] == (margin > 0)

# ----- the command ---------------------------------------------------------------------------------------------------


def pair_rows(n, first=0):
    return [{"prompt": f"What is {i} times two?", "chosen": f"It is {2 * i}, of course. " * (1 + i % 4),
             "rejected": f"{i + 1}? " * (1 + i % 3)} for i in range(first, first + n)]


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", pair_rows(46))


def arguments(base, pairs_file, out, *more):
    return ["--model", str(base), "--data", str(pairs_file), "--out", str(out), "--batch-size", "8", "--lr", "1e-2",
            "--device", "cpu", "--val-rows", "6", "--micro-tokens", "400", *map(str, more)]


def command(*args):
    return ranks.command(dpo.main, *args)


def run_main(argv, kill=None):
    """dpo.main; with `kill` ("step", n) SIGKILL when step n is done, ("block", n) when n blocks are in the cache.

    Returns how many blocks of references were computed.
    """
    blocks, step, save = [], train.take_step, dpo.write_safetensors

    def take_step(training, *more):
        if kill == ("step", training.step):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(training, *more)

    def write_safetensors(tensors, path, metadata):
        if kill == ("block", len(blocks)):
            os.kill(os.getpid(), signal.SIGKILL)
        blocks.append(path)
        save(tensors, path, metadata)
    train.take_step, dpo.write_safetensors = take_step, write_safetensors
    dpo.main([str(arg) for arg in argv])
    return len(blocks)


def metrics_of(out):
    """[each line of metrics.jsonl], without what the clock and the machine say."""
    timed = {"tokens_per_s", "peak_memory_gb"}
    return [{key: value for key, value in row.items() if key not in timed} for row in metrics_in(out)]


def exported(out):
    return (Path(out) / "model/model.safetensors").read_bytes()


TWO_EPOCHS = ("--epochs", 2, "--save-every", 1, "--keep", 1)  # 40 pairs: five steps an epoch


@pytest.fixture(scope="session")
def trained(base, pairs_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "dpo"
    run_ranks(1, run_main, arguments(base, pairs_file, out, *TWO_EPOCHS))
    return out


def test_the_script_starts():
    done = subprocess.run([sys.executable, ROOT / "dpo.py", "--help"], capture_output=True, text=True)
    shown = " ".join(done.stdout.split())
    for part in ("(default 33,000: the paper's summary)", "(default 1e-07: the authors' code)",
                 "(default 0.1: our choice,", "of sigmoid_norm 5: arXiv 2411.15124)",
                 "(default 16: 16 a GPU in the authors' code, times 1 here; name it to resume on another number of "
                 "ranks)", "6,144: the authors' later runs)"):
        assert part in shown
    assert done.returncode == 0


def test_a_run_leaves_what_it_should_and_learns(trained, pairs_file):
    rows = metrics_of(trained)
    start, steps = rows[0], rows[1:]
    # tiny as it is, the model computes in bf16, and passes are packed differently: margins of 0 within rounding
    assert start["step"] == 0 and start["val_loss"] == pytest.approx(math.log(2), abs=1e-2)
    assert abs(start["val_margin"]) < 0.02 and steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-2)
    assert [row["step"] for row in steps] == list(range(1, 11)) and {row["count"] for row in steps} == {8}
    assert steps[-1]["val_accuracy"] == 1.0 and steps[-1]["val_margin"] > 1 and steps[-1]["val_loss"] < 0.3
    for row in steps:
        assert row["margin"] == pytest.approx(row["rewards_chosen"] - row["rewards_rejected"], abs=1e-5)
        assert row["drift"] == pytest.approx(-5 * (row["rewards_chosen"] + row["rewards_rejected"]), abs=1e-3)
        assert {"accuracy", "logps_chosen", "logps_rejected", "length_chosen", "length_rejected"} <= set(row)
    card = (trained / "model/README.md").read_text()
    assert "held-out accuracy" in card and "held-out logps chosen" in card and str(pairs_file) in card
    assert "FineMedLM-o1-dpo" in card and "| beta | 0.1 |" in card
    M.load_model(trained / "model")


@pytest.mark.parametrize("step", [3, 5])
def test_killed_and_resumed_bit_for_bit(base, pairs_file, trained, tmp_path, step):
    """In the middle of an epoch and at its end: the same metrics and the same exported bytes."""
    argv = arguments(base, pairs_file, tmp_path, *TWO_EPOCHS)
    run_ranks(1, run_main, argv, ("step", step))
    assert run_ranks.exit_codes == [-signal.SIGKILL] and len(metrics_of(tmp_path)) == step + 1
    assert run_ranks(1, run_main, [*argv, "--resume"]) == [0]  # blocks of references computed again
    assert metrics_of(tmp_path) == metrics_of(trained) and exported(tmp_path) == exported(trained)


def test_a_killed_precompute_goes_on(base, pairs_file, trained, tmp_path):
    """46 pairs are two blocks; after the first only the second is computed, and the numbers are the same bits."""
    argv = arguments(base, pairs_file, tmp_path, *TWO_EPOCHS, "--max-steps", 1)
    run_ranks(1, run_main, argv, ("block", 1))
    assert run_ranks.exit_codes == [-signal.SIGKILL]
    half = load_file(tmp_path / "reference.safetensors")["logps"]
    assert half.isnan().any(1).sum() == 14 and not (tmp_path / "metrics.jsonl").exists()
    assert run_ranks(1, run_main, argv) == [1]
    assert torch.equal(load_file(tmp_path / "reference.safetensors")["logps"],
                       load_file(trained / "reference.safetensors")["logps"])


def on_a_full_disk(argv):
    def write_safetensors(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    dpo.write_safetensors = write_safetensors
    try:
        dpo.main(list(map(str, argv)))
    except OSError as error:
        return one_line(error)


def test_a_reference_that_cannot_be_written_ends_every_rank(base, pairs_file, tmp_path):
    said = run_ranks(2, on_a_full_disk, arguments(base, pairs_file, tmp_path))
    assert said == [f"{tmp_path}/reference.safetensors: No space left on device"] * 2


def test_ranks_and_micro_batches_change_nothing_but_the_order_of_sums(base, pairs_file, tmp_path):
    """fp32: one rank, two ranks, small micro-batches, and recomputed activations."""
    fp32 = ("--dtype", "fp32", "--export-dtype", "fp32", "--max-steps", 3)
    variants = {"one": (1, ()), "two": (2, ()), "small": (1, ("--micro-tokens", 60)),
                "recomputed": (2, ("--activation-checkpointing",))}
    for name, (world, more) in variants.items():
        run_ranks(world, run_main, arguments(base, pairs_file, tmp_path / name, *fp32, *more))
    expected, weights = metrics_of(tmp_path / "one"), load_file(tmp_path / "one/model/model.safetensors")
    assert [expected[0]["val_margin"], expected[1]["margin"]] == pytest.approx([0, 0], abs=1e-5)
    for name in variants:
        for row, own in zip(expected, metrics_of(tmp_path / name), strict=True):
            assert own.keys() == row.keys()
            for key in row.keys() - {"accuracy", "val_accuracy", "tokens"}:  # a toss at margin 0; empty ones have one
                assert own[key] == pytest.approx(row[key], rel=1e-4, abs=1e-4), (name, key)
        other = load_file(tmp_path / name / "model/model.safetensors")
        # AdamW divides by the gradient's size, so where one is nearly nothing the order of sums decides the step
        assert np.mean([((weights[key] - other[key]).abs() <= 1e-5).float().mean().item() for key in weights]) > 0.99


def change_a_weight(model):
    """One weight of the middle layer."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, model / "model.safetensors")


@pytest.mark.parametrize("what, change", [
    ("weights", "model"), ("data", "data"), ("template", "template"), ("max_length", ["--max-length", 300]),
    ("dtype", ["--dtype", "fp32"]), ("pairs", ["--val-rows", 5, "--rows", 20])])
def test_a_stale_reference_is_refused(base, pairs_file, trained, tmp_path, what, change):
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(trained / "reference.safetensors", out)
    model, more = base, change if isinstance(change, list) else []
    if change == "model":
        model = shutil.copytree(base, tmp_path / "model")
        change_a_weight(model)
    if change == "data":
        pairs_file = write_jsonl(tmp_path / "pairs.jsonl", [*pair_rows(45), {**pair_rows(1, 45)[0], "chosen": "Hm."}])
    if change == "template":
        model = shutil.copytree(base, tmp_path / "model")
        settings = model / "tokenizer_config.json"
        settings.write_text(settings.read_text().replace("named SmolLM", "named Smol"))
    with pytest.raises(InputError, match=rf"reference.safetensors: computed with another .*{what}.*; expected the"):
        dpo.main(arguments(model, pairs_file, out, *more))
    assert not (out / "metrics.jsonl").exists()


@pytest.mark.parametrize("stored, names", [(torch.bfloat16, set()), (torch.float32, {"seed", "shards"})])
def test_a_reference_depends_on_ranks_and_seed_only_where_weights_are_rounded(base, tmp_path, stored, names):
    model = shutil.copytree(base, tmp_path / "model")
    tensors = {name: tensor.to(stored) for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors")

    def facts(seed, shards, dtype):
        args = SimpleNamespace(model=model, dtype=dtype, seed=seed, max_length=300)
        run = SimpleNamespace(args=args, world=World(0, shards, torch.device("cpu"), shards=shards), files=[],
                              tokenizer=Tokenizer.from_dir(model), facts={"model": "a digest", "template": "another"})
        return dpo.reference_facts(run, [])
    one, other = facts(1, 1, "bf16"), facts(2, 4, "bf16")
    assert {name for name in one if one[name] != other[name]} == names
    assert facts(1, 1, "fp32") == facts(2, 4, "fp32")


def test_a_run_is_resumed_on_another_number_of_ranks(base, pairs_file, tmp_path):
    argv = arguments(base, pairs_file, tmp_path, *TWO_EPOCHS, "--max-steps", 5)
    run_ranks(1, run_main, argv, ("step", 4))
    assert run_ranks(2, run_main, [*argv, "--resume"]) == [0, 0]  # blocks of references computed again
    assert [row["step"] for row in metrics_of(tmp_path)] == [0, 1, 2, 3, 4, 5]


def test_a_reference_of_another_model_is_noticed_before_the_first_step(base, pairs_file, trained, tmp_path):
    """The facts of the cache are right and one of its numbers is not: margins at step 0 would not be 0."""
    from safetensors import safe_open
    with safe_open(trained / "reference.safetensors", "pt") as file:
        logps, facts = file.get_tensor("logps"), file.metadata()
    wrong = logps + torch.tensor([3.0, 0.0])
    save_file({"logps": wrong}, tmp_path / "reference.safetensors", metadata=facts)
    with pytest.raises(InputError, match="damaged, or not ours"):  # its SHA-256 says so
        dpo.main(arguments(base, pairs_file, tmp_path))
    facts["sha256"] = hashlib.sha256(wrong.numpy().tobytes()).hexdigest()
    save_file({"logps": wrong}, tmp_path / "reference.safetensors", metadata=facts)
    with pytest.raises(InputError, match=r"off the reference's by .* nats .*; expected at most 0.3"):
        dpo.main(arguments(base, pairs_file, tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()
    (tmp_path / "reference.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(InputError, match=r"reference\.safetensors: damaged safetensors file"):
        dpo.main(arguments(base, pairs_file, tmp_path))


@pytest.mark.parametrize("more, beta", [
    ((), 0.1), (("--loss-type", "sigmoid_norm"), 5.0), (("--loss-type", "ipo"), 0.1),
    (("--loss-type", "sigmoid_norm", "--beta", "0.1"), 0.1), (("--beta", "5"), 5.0)], ids=str)
def test_beta_is_the_loss_s_own_unless_it_is_given(more, beta):
    assert dpo.parse_args(["--data", "pairs.jsonl", *more]).beta == beta


@pytest.mark.parametrize("more, loss", [
    (("--loss-type", "ipo", "--beta", "0.5"), 1.0), (("--reference-free",), None),
    (("--loss-type", "robust", "--label-smoothing", "0.1"), math.log(2))], ids=str)
def test_the_flags_reach_the_loss(base, pairs_file, tmp_path, more, loss):
    dpo.main(arguments(base, pairs_file, tmp_path, "--dtype", "fp32", "--max-steps", 1, *more))
    (start, step), free = metrics_of(tmp_path), "--reference-free" in more
    assert ("drift" in step) is not free and (tmp_path / "reference.safetensors").exists() is not free
    if free:  # rewards are 0.1 * log p; the chosen answers are longer, so far less likely
        assert step["rewards_chosen"] == pytest.approx(0.1 * step["logps_chosen"], rel=1e-6) and start["val_loss"] > 1
    else:
        assert start["val_loss"] == pytest.approx(loss, rel=1e-5) and step["loss"] == pytest.approx(loss, rel=1e-5)


def test_dry_run_and_inspect_touch_nothing(base, tmp_path):
    rows = [*pair_rows(4), {"prompt": "?", "chosen": "Same.", "rejected": "Same."}, {"prompt": "?"},
            {"prompt": "?", "chosen": "Yes.", "rejected": " "}]
    path = write_jsonl(tmp_path / "pairs.jsonl.gz", rows)
    argv = arguments(base, path, tmp_path / "out", "--val-rows", 0, "--on-bad-row", "skip")
    done = command(*argv, "--dry-run")
    assert done.returncode == 0 and "steps: 1 of 8 rows over 1 rank(s)" in done.stdout, done.stderr
    for part in ("7 read, 1 bad; dropped: 1 with an empty answer, 1 with equal", "trained: 4 of"):
        assert part in done.stdout
    assert f"skipped: {path}:6: found no answer under chosen" in done.stderr
    assert f"skipped: {path}:5: the answers are equal" in done.stderr
    done = command(*argv, "--inspect", 2)
    assert done.returncode == 0 and done.stdout.count("<|im_end|>⟧") == 4 and done.stdout.count("⟦It is ") == 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, message", [
    (["--model", "nowhere"], "nowhere/config.json: no such file"),
    (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file; expected a .jsonl file"),
    (["--data", "BAD"], ":2: found no answer under rejected"),
    (["--max-length", "9000"], "--max-length 9000: found more than the model's context of 8192 tokens"),
    (["--beta", "0"], "argument --beta: found '0', expected a number above 0"),
    (["--label-smoothing", "0.5"], "label smoothing 0.5: expected 0 to below 0.5"),
    (["--loss-type", "hinge", "--label-smoothing", "0.1"], "label smoothing 0.1 with loss 'hinge'"),
    (["--loss-type", "robust"], "--loss-type robust without --label-smoothing"),
    (["--val-rows", "46"], "no row left to train on (46 read, 46 held out)")], ids=str)
def test_wrong_input_is_one_line(base, pairs_file, tmp_path, change, message):
    bad = write_jsonl(tmp_path / "bad.jsonl", [pair_rows(1)[0], {"prompt": "?", "chosen": "!"}])
    argv = arguments(base, pairs_file, tmp_path / "out", *[bad if x == "BAD" else x for x in change])
    with pytest.raises(InputError) as caught:
        dpo.main(argv)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "out").glob("*") if path.name != ".config.json.lock"]  # until the end


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(too_few_rows, pairs_file, tmp_path):
    with pytest.raises(InputError, match=r"its tokenizer gives ids up to 49151; .* vocab_size, 49151"):
        dpo.main(arguments(too_few_rows, pairs_file, tmp_path / "out", "--dry-run"))


def test_an_earlier_run_is_resumed_with_the_same_settings_only(base, pairs_file, trained):
    argv = arguments(base, pairs_file, trained, *TWO_EPOCHS)
    done = command(*argv)
    assert done.returncode == 2 and "holds the checkpoints of an earlier run; expected --resume" in done.stderr
    before = (trained / "config.json").read_bytes()
    done = command(*argv, "--resume", "--beta", "0.2")
    assert (trained / "config.json").read_bytes() == before
    assert done.returncode == 2 and "beta was 0.1 and is 0.2" in done.stderr and "Traceback" not in done.stderr

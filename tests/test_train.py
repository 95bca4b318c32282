"""train.py: the same gradients however the work is divided, and runs that survive being killed."""
import hashlib
import math
import os
import resource
import signal
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUN_CONFIG
from ranks import (
    ALONE,
    BATCH,
    ROWS,
    batches_for,
    begin,
    equal,
    examples,
    losses_in,
    metrics_in,
    run_ranks,
    state_of,
    whole_tensors,
)
from safetensors.torch import load_file

import parallel
import train
from checkpoints import checkpoint_to_resume, checkpoints_of, fault_of, look
from data import collate
from files import one_line
from model import Llama, save_model
from parallel import stop
from sft import loss_fn

# ----- gradients -----------------------------------------------------------------------------------------------------


def gradients(folder, budget, options):
    """The clipped gradients that AdamW sees in each of the first two steps, whole, and the row numbers."""
    world, training = begin(folder, **options)
    seen, found, update = [], [], training.optimizer.step

    def step():
        found.append(whole_tensors(training, training.grads))
        update()
    training.optimizer.step = step
    train.fit(training, batches_for(world, budget, seen), loss_fn, steps=2, lr=1e-3)
    stop(world)
    return found, seen


@pytest.fixture(scope="session")
def plain_gradients(tiny_folder):
    return run_ranks(1, gradients, tiny_folder, 10_000, {})[0]


@pytest.mark.parametrize("world, budget, options", [
    (1, 40, {}), (1, 90, {"checkpoint_above": 0}), (2, 10_000, {}), (2, 40, {}), (2, 64, {"replicate": 2}),
    (3, 64, {"checkpoint_above": 30})], ids=str)
def test_gradients_do_not_depend_on_how_the_rows_are_divided(tiny_folder, plain_gradients, world, budget, options):
    expected, rows = plain_gradients
    for found, found_rows in run_ranks(world, gradients, tiny_folder, budget, options):
        assert found_rows == rows
        for one, other in zip(expected, found):
            for name in one:
                assert np.abs(one[name] - other[name]).max() <= 1e-6 * max(1, np.abs(one[name]).max()), name


def test_gradient_is_that_of_the_mean_over_all_supervised_tokens(tiny_folder, plain_gradients):
    """Against one plain autograd pass over each row of the first step, clipped by torch."""
    model = Llama(RUN_CONFIG)
    training = train.load_training(tiny_folder, ALONE, dtype=torch.float32)
    model.load_state_dict(training.model.state_dict())
    rows, (first, *_) = examples(), plain_gradients[1]
    loss = sum(loss_fn(model, collate([rows[i]]))[0] for i in first) / sum((rows[i][2] != -100).sum() for i in first)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for name, parameter in model.named_parameters():
        assert np.abs(parameter.grad.numpy() - plain_gradients[0][0][name]).max() <= 1e-6


def test_micro_batch_gradients_are_added_in_fp32():
    """Adding 2^-10 a thousand times to 1 in bf16 stays at 1."""
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    total = torch.ones(1)
    weight.register_post_accumulate_grad_hook(train.add_gradient_to(total))
    for _ in range(1000):
        (weight * 2**-10).sum().backward()
    assert weight.grad is None and total.item() == 1 + 1000 * 2**-10


def test_learning_rate_by_hand():
    # 10 steps, warm-up 0.2: two rising steps 1/2, 2/2, then cos over 8: 1, …, half of it after 4 more, never 0
    rates = [train.learning_rate(step, 10, 4.0, 0.2) for step in range(10)]
    assert rates[:3] == [2.0, 4.0, 4.0] and rates[6] == pytest.approx(2.0)
    assert rates[9] == pytest.approx(2 * (1 + math.cos(math.pi * 7 / 8))) and rates[9] > 0
    assert train.learning_rate(0, 1, 4.0, 0.1) == 4.0 and train.learning_rate(0, 5, 4.0, 0) == 4.0


def test_only_matrices_decay(tiny_folder):
    training = train.load_training(tiny_folder, ALONE, weight_decay=0.3)
    decays = {id(m): group["weight_decay"] for group in training.optimizer.param_groups for m in group["params"]}
    assert {name: decays[id(master)] for name, master in training.masters.items()} == {
        name: 0.0 if "norm" in name else 0.3 for name in training.masters}


def plain_adamw(weights, targets, count, *, lr, warmup, clip, weight_decay):
    """AdamW (arXiv 1711.05101) written out in double precision: one step on each of `targets` [{name: tensor}, …].

    The loss of a step is sum((w - target)^2 / 2) / count, so its gradient (w - target) / count. Yields (learning rate,
    norm of the gradient before it is clipped, weights {name: tensor}).
    """
    rise = math.ceil(warmup * len(targets))
    w = {name: weight.double() for name, weight in weights.items()}
    m, v = ({name: torch.zeros_like(one) for name, one in w.items()} for _ in range(2))
    for t, target in enumerate(targets, 1):
        rate = lr * t / rise if t <= rise else lr / 2 * (1 + math.cos(math.pi * (t - 1 - rise) / (len(targets) - rise)))
        grads = {name: (w[name] - target[name]) / count for name in w}
        norm = math.sqrt(sum((grad ** 2).sum().item() for grad in grads.values()))
        for name, grad in grads.items():
            grad = grad * min(1, clip / norm)
            m[name] = 0.9 * m[name] + 0.1 * grad
            v[name] = 0.999 * v[name] + 0.001 * grad ** 2
            w[name] = w[name] * (1 - rate * (0 if "norm" in name else weight_decay))
            w[name] = w[name] - rate * m[name] / (1 - 0.9 ** t) / ((v[name] / (1 - 0.999 ** t)).sqrt() + 1e-8)
        yield rate, norm, dict(w)


def test_a_run_is_plain_adamw_with_clip_warm_up_and_cosine(tiny_folder, tmp_path):
    """Ten steps, some of them clipped, in fp32: learning rates, gradient norms and weights of each."""
    training = train.load_training(tiny_folder, ALONE, dtype=torch.float32, weight_decay=0.3)
    generator, count, settings = torch.Generator().manual_seed(0), 7, {"lr": 1e-2, "warmup": 0.25, "clip": 0.9}
    start = {name: weight.detach().clone() for name, weight in training.model.named_parameters()}
    targets = [{name: weight + 0.03 * (1 + t % 4) * torch.randn(weight.shape, generator=generator)
                for name, weight in start.items()} for t in range(10)]
    seen = []

    def squares(model, batch):
        weights = dict(model.named_parameters())
        seen.append({name: weight.detach().clone() for name, weight in weights.items()})
        return sum(((weights[name] - target) ** 2).sum() / 2 for name, target in batch["target"].items()), count, {}

    def batches(consumed):
        yield from (([0], [{"target": target, "tokens": 1}]) for target in targets)
    train.fit(training, batches, squares, steps=10, out=tmp_path, **settings)
    expected = list(plain_adamw(start, targets, count, weight_decay=0.3, **settings))
    rows = metrics_in(tmp_path)
    assert [row["lr"] for row in rows] == pytest.approx([rate for rate, *_ in expected], rel=1e-12)
    norms = [norm for _, norm, _ in expected]
    assert [row["grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-5) and min(norms) < 0.9 < max(norms)
    for found, (_, _, weights) in zip([*seen[1:], training.masters], expected, strict=True):
        for name, weight in weights.items():
            assert (found[name] - weight).abs().max() < 1e-6, name


def one_row_gradients(folder):
    """Gradients of a step of a single row, which leaves all ranks but one with an empty micro-batch."""
    world, training = begin(folder)
    batch = collate(examples()[:1] if world.rank == 0 else [])
    train.take_step(training, iter([([0], [batch])]), loss_fn, 0.0, 1.0, ())  # at rate 0, then again for the gradients
    loss_fn(training.model, batch)[0].backward()
    found = whole_tensors(training, training.grads)
    stop(world)
    return {name: grad * world.size for name, grad in found.items()}


def test_a_rank_without_rows_takes_part(tmp_path):
    """Also with a head of its own, which nothing but supervised positions would give a gradient."""
    save_model(Llama(replace(RUN_CONFIG, tie_word_embeddings=False)).init_weights(1), tmp_path / "untied")
    one, two = (run_ranks(world, one_row_gradients, tmp_path / "untied")[0] for world in (1, 2))
    assert all(np.abs(one[name] - two[name]).max() <= 1e-6 * max(1, np.abs(one[name]).max()) for name in one)


def masters_of(folder):
    world, training = begin(folder)
    found = whole_tensors(training, training.masters)
    stop(world)
    return found


def test_a_head_of_its_own_is_sharded_like_any_other_weight(declared_tied):
    """Also where config.json declares it tied."""
    stored = load_file(declared_tied / "model.safetensors")
    for found in run_ranks(2, masters_of, declared_tied):
        for ours, theirs in (("embed.weight", "model.embed_tokens.weight"), ("head.weight", "lm_head.weight")):
            assert np.array_equal(found[ours], stored[theirs].float().numpy())


def test_busy_cores_are_left_before_each_step_and_taken_again_at_the_end(tiny_folder, monkeypatch):
    training, order = train.load_training(tiny_folder, ALONE), []

    class Watched(train.Threads):
        def leave_busy_cores(self):
            order.append("threads")

        def close(self):
            order.append("closed")

    def loss(model, batch):
        order.append("loss")
        return loss_fn(model, batch)
    monkeypatch.setattr(train, "Threads", Watched)
    train.fit(training, batches_for(ALONE, budget=10_000), loss, steps=2, lr=1e-3)
    assert order == ["threads", "loss", "threads", "loss", "closed"]


# ----- bf16 weights --------------------------------------------------------------------------------------------------


def test_the_weights_of_a_step_are_its_masters_stochastically_rounded(tiny_folder):
    """Each weight is a neighbour of its master, the upper one as often as the master lies towards it, so a quarter are
    not the nearest; another step draws other noise."""
    training = train.load_training(tiny_folder, ALONE)

    def compared():
        weights = torch.cat([weight.detach().flatten() for weight in training.model.parameters()]).double()
        masters = torch.cat([master.flatten() for master in training.masters.values()])
        below = (masters.view(torch.int32) & -65536).view(torch.float32).double()  # towards zero
        above = ((masters.view(torch.int32) & -65536) + 65536).view(torch.float32).double()
        between = masters != below
        assert ((weights == below) | (weights == above)).all() and torch.equal(weights[~between], below[~between])
        up = (weights == above)[between].double()
        p = ((masters - below) / (above - below))[between]
        assert abs((up - p).sum()) < 4 * (p * (1 - p)).sum().sqrt()  # four standard errors
        assert 0.2 < (weights != masters.bfloat16()).double().mean() < 0.3
        return weights == above
    first = compared()
    for master in training.masters.values():
        master.add_(1e-6)
    training.updates += 1
    train.refresh_weights(training)
    assert (compared() != first).double().mean() > 0.2


def replica_hashes(folder):
    """(the shard of this rank, hashes of its weights and of its masters after two steps in bf16)."""
    world, training = begin(folder, "bf16", replicate=2)
    train.fit(training, batches_for(world), loss_fn, steps=2, lr=1e-2)
    weights = [parallel.local(weight).detach().view(torch.int16) for weight in training.model.parameters()]
    stop(world)
    return world.shard, *(hashlib.sha256(b"".join(x.numpy().tobytes() for x in state)).hexdigest()
                          for state in (weights, training.masters.values()))


def test_replicas_stay_equal_to_the_bit(tiny_folder):
    """Two copies of two shards: those of one shard round alike, so that the copies do not drift apart."""
    first, second, *copies = run_ranks(4, replica_hashes, tiny_folder)
    assert copies == [first, second] and first[0] == 0 and second[0] == 1 and not set(first[1:]) & set(second[1:])


# ----- resuming ------------------------------------------------------------------------------------------------------


def run(folder, out, steps, kill_after=None, dtype="bf16"):
    """fit to `steps`, resuming what is there; SIGKILL to itself when step `kill_after` is saved and the next begun."""
    world, training = begin(folder, dtype)
    found = checkpoint_to_resume(world, Path(out) / "checkpoints", {})
    if found:
        train.load_checkpoint(training, *found)

    def lethal(model, batch):
        if training.step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss_fn(model, batch)
    seen, first = [], training.step
    train.fit(training, batches_for(world, seen=seen), lethal, steps=steps, lr=1e-2, out=out, save_every=1)
    state = state_of(training)
    stop(world)
    return state, first, seen


@pytest.fixture(scope="session", params=[1, 2])
def uninterrupted(request, tiny_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    state, _, seen = run_ranks(request.param, run, tiny_folder, out, 10)[0]
    return request.param, state, seen, losses_in(out)


@pytest.mark.parametrize("kill_after", [
    1, 5, 9, *(pytest.param(n, marks=pytest.mark.heavy) for n in (2, 3, 4, 6, 7, 8))])
def test_killed_after_any_step_and_resumed_bit_for_bit(tiny_folder, tmp_path, uninterrupted, kill_after):
    world, state, seen, losses = uninterrupted
    run_ranks(world, run, tiny_folder, tmp_path, 10, kill_after)
    assert run_ranks.exit_codes[0] == -signal.SIGKILL
    resumed, first, later = run_ranks(world, run, tiny_folder, tmp_path, 10)[0]
    assert first == kill_after and later == seen[kill_after:] and losses_in(tmp_path) == losses
    assert equal(state, resumed)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (1, 3)])
def test_another_number_of_ranks_resumes(tiny_folder, tmp_path, before, after):
    """Killed in the middle of the second epoch, and gone on with more or fewer ranks: same rows, same losses (fp32)."""
    _, _, seen = run_ranks(1, run, tiny_folder, tmp_path / "whole", 8, None, "fp32")[0]
    run_ranks(before, run, tiny_folder, tmp_path / "cut", 8, 5, "fp32")
    _, first, later = run_ranks(after, run, tiny_folder, tmp_path / "cut", 8, None, "fp32")[0]
    assert first == 5 and later == seen[5:]
    assert sorted(chain(*seen[:4])) == sorted(chain(*seen[4:])) == list(range(ROWS))
    for (_, loss, norm), (_, own, own_norm) in zip(losses_in(tmp_path / "whole"), losses_in(tmp_path / "cut")):
        assert own == pytest.approx(loss, rel=1e-5) and own_norm == pytest.approx(norm, rel=1e-4)


def test_the_checkpoint_that_a_run_goes_on_from_counts_as_verified(tiny_folder, tmp_path):
    run_ranks(1, run, tiny_folder, tmp_path, 1)
    _, training = begin(tiny_folder, "bf16")
    found = checkpoint_to_resume(training.world, tmp_path / "checkpoints", {})
    train.load_checkpoint(training, *found)
    assert training.verified == {tmp_path / "checkpoints/step-000001": look(tmp_path / "checkpoints/step-000001")}


def test_metrics_of_undone_steps_and_half_lines_are_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    train.open_metrics(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def run_on_a_full_disk(folder, out):
    world, training = begin(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))  # a line and a part of the next
    try:
        train.fit(training, batches_for(world), loss_fn, steps=10, lr=1e-2, out=out)
    except OSError as error:
        return one_line(error)


def test_a_disk_that_is_full_is_named_by_the_metrics(tiny_folder, tmp_path):
    assert run_ranks(1, run_on_a_full_disk, tiny_folder, tmp_path) == [f"{tmp_path}/metrics.jsonl: File too large"]

# ----- signals -------------------------------------------------------------------------------------------------------


def signalled(folder, out, number, times):
    """Rank 0 gets the signal in the middle of step 3, `times` times."""
    world, training = begin(folder)

    def interrupted(model, batch):
        if training.step == 2 and world.rank == 0:
            for _ in range(times):
                os.kill(os.getpid(), number)
        return loss_fn(model, batch)
    train.fit(training, batches_for(world), interrupted, steps=10, lr=1e-2, out=out)


@pytest.mark.parametrize("world, number, times", [(1, signal.SIGTERM, 1), (1, signal.SIGINT, 2), (2, signal.SIGTERM, 2),
                                                  (2, signal.SIGINT, 1)])
def test_a_signal_to_one_rank_stops_all_at_the_step_boundary(tiny_folder, tmp_path, world, number, times):
    run_ranks(world, signalled, tiny_folder, tmp_path, number, times)
    assert run_ranks.exit_codes == [128 + number] * world
    assert [path.name for path in checkpoints_of(tmp_path / "checkpoints")] == ["step-000003"]
    assert fault_of(tmp_path / "checkpoints/step-000003") is None


def signalled_while_saving(folder, out, number, steps):
    """The last rank gets the signal, twice, in the middle of the save after step 2."""
    world, training = begin(folder)
    save = train.save_tensors

    def interrupted(world, *args, **options):
        if world.rank == world.size - 1:
            for _ in range(2):
                os.kill(os.getpid(), number)
        save(world, *args, **options)
    train.save_tensors = interrupted
    train.fit(training, batches_for(world), loss_fn, steps=steps, lr=1e-2, out=out, save_every=2)


@pytest.mark.parametrize("world, number, steps", [(1, signal.SIGINT, 2), (2, signal.SIGTERM, 10)])
def test_a_signal_during_a_save_ends_the_run_with_that_checkpoint(tiny_folder, tmp_path, world, number, steps):
    """Neither a further step nor a second save, for which there may be no time; in the last save no export either."""
    run_ranks(world, signalled_while_saving, tiny_folder, tmp_path, number, steps)
    assert run_ranks.exit_codes == [128 + number] * world
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    assert fault_of(tmp_path / "checkpoints/step-000002") is None and len(losses_in(tmp_path)) == 2

# ----- numbers that are not finite -----------------------------------------------------------------------------------


def poisoned(folder, out, value, place, poisoned_steps):
    """fit with `value` in the loss or in one gradient element of the last rank: the state around each step."""
    world, training = begin(folder, "bf16")
    states = []

    def bad_loss_fn(model, batch):
        if len(states) == training.step:
            states.append(state_of(training))
        loss, n, extra = loss_fn(model, batch)
        if training.step in poisoned_steps and world.rank == world.size - 1:
            if place == "loss":
                loss = loss + value
            else:
                training.grads["layers.1.mlp.down.weight"].view(-1)[3] = value
        return loss, n, extra
    try:
        train.fit(training, batches_for(world, budget=10_000), bad_loss_fn, steps=8, lr=1e-2, out=out)
        code = 0
    except SystemExit as error:
        code = error.code
    states.append(state_of(training))
    stop(world)
    return states, code


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("place", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_changes_nothing(tiny_folder, tmp_path, world, place, value):
    outcomes = run_ranks(world, poisoned, tiny_folder, tmp_path, value, place, [1, 3, 4])
    for states, code in outcomes:
        assert code == 0 and len(states) == 9
        same = [equal(one, other) for one, other in pairwise(states)]
        assert same == [False, True, False, True, True, False, False, False]
    rows = metrics_in(tmp_path)
    assert [row["finite"] for row in rows] == [not same for same in [0, 1, 0, 1, 1, 0, 0, 0]]
    assert len(rows[1]["skipped_rows"]) == BATCH and rows[1]["skipped_rows"][0].isdigit()


@pytest.mark.parametrize("world", [1, 2])
def test_three_in_a_row_stop_with_a_checkpoint(tiny_folder, tmp_path, world):
    for states, code in run_ranks(world, poisoned, tiny_folder, tmp_path, math.nan, "loss", [2, 3, 4]):
        assert code == 1 and len(states) == 6
    assert checkpoints_of(tmp_path / "checkpoints")[0].name == "step-000005"

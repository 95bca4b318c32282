"""train.py: the same gradients however the work is divided, and runs that survive being killed."""
import builtins
import errno
import io
import json
import math
import os
import shutil
import signal
import sys
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks

import train
from data import collate, steps_of_epochs
from files import InputError
from model import Llama, LlamaConfig, save_model
from sft import loss_fn

CONFIG = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     num_key_value_heads=2, head_dim=8, max_position_embeddings=512, rope_scaling=None,
                     tie_word_embeddings=True)
ROWS, BATCH = 22, 6  # 4 steps an epoch, the last with 4 rows


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a tiny random model with tied weights, stored in fp32."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_model(Llama(CONFIG).init_weights(1), folder)
    return folder


def examples(n=ROWS):
    """n rows of random ids, 5 to 40 tokens, of which the first third is not trained."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(n):
        ids = rng.integers(0, 96, rng.integers(5, 40)).astype(np.int32)
        labels = np.append(ids[1:], ids[:1])
        labels[:len(ids) // 3] = -100
        rows.append((f"row {i}", ids, labels))
    return rows


def begin(folder, dtype="fp32", replicate=1, checkpoint_above=math.inf):
    """(world, training) of this rank."""
    world = train.start("cpu", replicate)
    return world, train.load_training(folder, world, dtype=train.DTYPES[dtype], checkpoint_above=checkpoint_above)


def batches_for(world, budget=64, seen=None):
    """The function `batches` that fit asks for, over `examples()`; notes the rows of each step in `seen`."""
    rows = examples()

    def batches(consumed):
        for step_rows, bins in steps_of_epochs([len(ids) for _, ids, _ in rows], batch_size=BATCH, budget=budget,
                                               seed=7, rank=world.rank, world=world.size, consumed=consumed):
            if seen is not None:
                seen.append(step_rows)
            yield step_rows, [collate([rows[i] for i in own]) for own in bins]
    return batches


def whole_tensors(training, tensors):
    """{name: the whole tensor} of per-rank rows."""
    whole = {}
    for name, rows in tensors.items():
        tensor = train.sharded(training, name, rows.clone())
        whole[name] = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return {name: tensor.numpy() for name, tensor in whole.items()}


def state_of(training):
    """Masters, moments and computing weights, whole, as numpy arrays."""
    moments = {kind: whole_tensors(training, {name: training.optimizer.state[master][kind]
                                              for name, master in training.masters.items()})
               for kind in ("exp_avg", "exp_avg_sq")}
    weights = {name: train.local(p).detach().float() for name, p in training.model.named_parameters()}
    masters = whole_tensors(training, training.masters)
    return {"masters": masters, "weights": whole_tensors(training, weights), **moments}


def equal(one, other):
    return all(one[kind][name].tobytes() == other[kind][name].tobytes() for kind in one for name in one[kind])


def losses_in(out):
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows]

# ----- gradients -----------------------------------------------------------------------------------------------------


def gradients(folder, budget, steps=2, **options):
    """The clipped gradients that AdamW sees in each of the first steps, whole, and the row numbers."""
    world, training = begin(folder, **options)
    seen, found, update = [], [], training.optimizer.step

    def step():
        found.append(whole_tensors(training, training.grads))
        update()
    training.optimizer.step = step
    train.fit(training, batches_for(world, budget, seen), loss_fn, steps=steps, lr=1e-3)
    train.stop(world)
    return found, seen


@pytest.fixture(scope="session")
def plain_gradients(tiny):
    return run_ranks(1, gradients, tiny, 10_000)[0]


@pytest.mark.parametrize("world, budget, options", [
    (1, 40, {}), (1, 90, {"checkpoint_above": 0}), (2, 10_000, {}), (2, 40, {}), (2, 64, {"replicate": 2}),
    (3, 64, {"checkpoint_above": 30})], ids=str)
def test_gradients_do_not_depend_on_how_the_rows_are_divided(tiny, plain_gradients, world, budget, options):
    expected, rows = plain_gradients
    for found, found_rows in run_ranks(world, _gradients, tiny, budget, options):
        assert found_rows == rows
        for one, other in zip(expected, found):
            for name in one:
                assert np.abs(one[name] - other[name]).max() <= 1e-6 * max(1, np.abs(one[name]).max()), name


def _gradients(folder, budget, options):
    return gradients(folder, budget, **options)


def test_gradient_is_that_of_the_mean_over_all_supervised_tokens(tiny, plain_gradients):
    """Against one plain autograd pass over each row of the first step, clipped by torch."""
    model = Llama(CONFIG)
    training = train.load_training(tiny, train.World(0, 1, torch.device("cpu")), dtype=torch.float32)
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
    weight.register_post_accumulate_grad_hook(train.gradient_hook(total))
    for _ in range(1000):
        (weight * 2**-10).sum().backward()
    assert weight.grad is None and total.item() == 1 + 1000 * 2**-10


def test_learning_rate_by_hand():
    # 10 steps, warm-up 0.2: two rising steps 1/2, 2/2, then cos over 8: 1, …, half of it after 4 more, never 0
    rates = [train.learning_rate(step, 10, 4.0, 0.2) for step in range(10)]
    assert rates[:3] == [2.0, 4.0, 4.0] and rates[6] == pytest.approx(2.0)
    assert rates[9] == pytest.approx(2 * (1 + math.cos(math.pi * 7 / 8))) and rates[9] > 0
    assert train.learning_rate(0, 1, 4.0, 0.1) == 4.0 and train.learning_rate(0, 5, 4.0, 0) == 4.0


def test_only_matrices_decay(tiny):
    training = train.load_training(tiny, train.World(0, 1, torch.device("cpu")), weight_decay=0.3)
    decays = {id(m): group["weight_decay"] for group in training.optimizer.param_groups for m in group["params"]}
    assert {name: decays[id(master)] for name, master in training.masters.items()} == {
        name: 0.0 if "norm" in name else 0.3 for name in training.masters}


def shard_sizes(folder):
    world, training = begin(folder, "bf16")
    sizes = {name: tuple(master.shape) for name, master in training.masters.items()}
    exact = all(torch.equal(whole, torch.from_numpy(other)) for whole, other in zip(
        dict(reference_masters(folder)).values(), whole_tensors(training, training.masters).values()))
    train.stop(world)
    return sizes, exact


def reference_masters(folder):
    return train.load_training(folder, train.World(0, 1, torch.device("cpu"))).masters.items()


def test_each_rank_reads_only_its_rows(tiny):
    """3 ranks: 96 words are 32 a rank; 32 rows are cut as 11, 11, 10; together they are the file's fp32 values."""
    outcomes = run_ranks(3, shard_sizes, tiny)
    assert [sizes["embed.weight"] for sizes, _ in outcomes] == [(32, 32)] * 3
    assert [sizes["norm.weight"] for sizes, _ in outcomes] == [(11,), (11,), (10,)]
    assert all(exact for _, exact in outcomes)



def one_row_gradients(folder):
    """Gradients of a step of a single row, which leaves all ranks but one with an empty micro-batch."""
    world, training = begin(folder)
    batch = collate(examples()[:1] if world.rank == 0 else [])
    train.take_step(training, iter([([0], [batch])]), loss_fn, 0.0, 1.0, ())  # at rate 0, then again for the gradients
    loss_fn(training.model, batch)[0].backward()
    found = whole_tensors(training, training.grads)
    train.stop(world)
    return {name: grad * world.size for name, grad in found.items()}


def test_a_rank_without_rows_takes_part(tmp_path):
    """Also with a head of its own, which nothing but supervised positions would give a gradient."""
    save_model(Llama(replace(CONFIG, tie_word_embeddings=False)).init_weights(1), tmp_path / "untied")
    one, two = (run_ranks(world, one_row_gradients, tmp_path / "untied")[0] for world in (1, 2))
    assert all(np.abs(one[name] - two[name]).max() <= 1e-6 * max(1, np.abs(one[name]).max()) for name in one)


def shard_of_8b():
    world = train.start("cpu")
    model = train.sharded_model(LlamaConfig(), world, torch.bfloat16)
    sizes = [train.local(parameter).numel() for parameter in model.parameters()]
    train.stop(world)
    return sum(sizes), all(train.local(parameter).is_meta for parameter in model.parameters())


def test_an_8b_model_is_cut_before_it_takes_memory():
    """Llama-3.1-8B over two ranks: half of its 8,030,261,248 parameters each, on the meta device."""
    assert run_ranks(2, shard_of_8b) == [(8_030_261_248 // 2, True)] * 2

# ----- resuming ------------------------------------------------------------------------------------------------------


def resume(training, folder, facts=None):
    """What `train.run` does of a resume; whether there was a checkpoint to resume from."""
    found = train.checkpoint_to_resume(training.world, folder, facts or {})
    if found:
        train.load_checkpoint(training, *found)
    return bool(found)


def run(folder, out, steps, kill_after=None, dtype="bf16", save_every=1, options=None):
    """fit to `steps`, resuming what is there; SIGKILL to itself when step `kill_after` is saved and the next begun."""
    world, training = begin(folder, dtype)
    resume(training, Path(out) / "checkpoints")

    def lethal(model, batch):
        if training.step == kill_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss_fn(model, batch)
    seen, first = [], training.step
    train.fit(training, batches_for(world, seen=seen), lethal, steps=steps, lr=1e-2, out=out, save_every=save_every,
              **options or {})
    state = state_of(training)
    train.stop(world)
    return state, first, seen


@pytest.fixture(scope="session", params=[1, 2])
def uninterrupted(request, tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    state, _, seen = run_ranks(request.param, run, tiny, out, 10)[0]
    return request.param, state, seen, losses_in(out)


@pytest.mark.parametrize("kill_after", [
    1, 5, 9, *(pytest.param(n, marks=pytest.mark.heavy) for n in (2, 3, 4, 6, 7, 8))])
def test_killed_after_any_step_and_resumed_bit_for_bit(tiny, tmp_path, uninterrupted, kill_after):
    world, state, seen, losses = uninterrupted
    run_ranks(world, run, tiny, tmp_path, 10, kill_after)
    assert run_ranks.exit_codes[0] == -signal.SIGKILL
    resumed, first, later = run_ranks(world, run, tiny, tmp_path, 10)[0]
    assert first == kill_after and later == seen[kill_after:] and losses_in(tmp_path) == losses
    assert equal(state, resumed)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2), (1, 3)])
def test_another_number_of_ranks_resumes(tiny, tmp_path, before, after):
    """Killed in the middle of the second epoch, and gone on with more or fewer ranks: same rows, same losses (fp32)."""
    _, _, seen = run_ranks(1, run, tiny, tmp_path / "whole", 8, None, "fp32")[0]
    run_ranks(before, run, tiny, tmp_path / "cut", 8, 5, "fp32")
    _, first, later = run_ranks(after, run, tiny, tmp_path / "cut", 8, None, "fp32")[0]
    assert first == 5 and later == seen[5:]
    assert sorted(chain(*seen[:4])) == sorted(chain(*seen[4:])) == list(range(ROWS))
    for (_, loss, norm), (_, own, own_norm) in zip(losses_in(tmp_path / "whole"), losses_in(tmp_path / "cut")):
        assert own == pytest.approx(loss, rel=1e-5) and own_norm == pytest.approx(norm, rel=1e-4)


def test_resume_refuses_another_run(tiny, tmp_path):
    training = train.load_training(tiny, train.World(0, 1, torch.device("cpu")))
    train.save_checkpoint(training, tmp_path, facts={"lr": 1e-5})
    with pytest.raises(InputError, match=r"step-000000: made with other settings: lr was 1e-05 and is 3e-05"):
        resume(training, tmp_path, {"lr": 3e-5})


def test_metrics_of_undone_steps_and_half_lines_are_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    train.open_metrics(tmp_path, 2).close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n'


def test_results_of_a_run_whose_first_step_was_skipped(tmp_path):
    """NaN is written as text, and an empty file has no results."""
    path = tmp_path / "metrics.jsonl"
    rows = {"step": 0, "val_loss": "inf"}, {"step": 1, "loss": "nan"}, {"step": 2, "loss": 1.0, "val_loss": 2}
    path.write_text("\n".join(map(json.dumps, rows)))
    assert train.results_of(tmp_path, ("loss",)) == {"steps": 2, "training loss": "nan → 1.0000",
                                                     "held-out loss": "inf → 2.0000"}
    path.write_text("")
    assert train.results_of(tmp_path, ("loss",)) == {}


def test_only_checkpoints_count_as_such(tmp_path):
    for name in ("step-000010", "step-000002", "step-000010-old", "step-x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in train.checkpoints_of(tmp_path)] == ["step-000010", "step-000002"]

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
def test_a_signal_to_one_rank_stops_all_at_the_step_boundary(tiny, tmp_path, world, number, times):
    run_ranks(world, signalled, tiny, tmp_path, number, times)
    assert run_ranks.exit_codes == [128 + number] * world
    assert [path.name for path in train.checkpoints_of(tmp_path / "checkpoints")] == ["step-000003"]
    assert train.fault_of(tmp_path / "checkpoints/step-000003") is None

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
    train.stop(world)
    return states, code


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("place", ["loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_changes_nothing(tiny, tmp_path, world, place, value):
    outcomes = run_ranks(world, poisoned, tiny, tmp_path, value, place, [1, 3, 4])
    for states, code in outcomes:
        assert code == 0 and len(states) == 9
        same = [equal(one, other) for one, other in pairwise(states)]
        assert same == [False, True, False, True, True, False, False, False]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["finite"] for row in rows] == [not same for same in [0, 1, 0, 1, 1, 0, 0, 0]]
    assert len(rows[1]["skipped_rows"]) == BATCH and rows[1]["skipped_rows"][0].isdigit()


@pytest.mark.parametrize("world", [1, 2])
def test_three_in_a_row_stop_with_a_checkpoint(tiny, tmp_path, world):
    for states, code in run_ranks(world, poisoned, tiny, tmp_path, math.nan, "loss", [2, 3, 4]):
        assert code == 1 and len(states) == 6
    assert train.checkpoints_of(tmp_path / "checkpoints")[0].name == "step-000005"

# ----- checkpoints ---------------------------------------------------------------------------------------------------


def single(folder, step=0):
    training = train.load_training(folder, train.World(0, 1, torch.device("cpu")), dtype=torch.float32)
    training.step = step
    for master in training.masters.values():
        master.detach().fill_(step)
    return training


def test_damaged_checkpoints_are_passed_over_and_do_not_count(tiny, tmp_path, capsys):
    for step in (1, 2, 3):
        train.save_checkpoint(single(tiny, step), tmp_path, keep=2)
    assert [path.name for path in train.checkpoints_of(tmp_path)] == ["step-000003", "step-000002"]
    state = tmp_path / "step-000003/state.json"
    state.write_bytes(state.read_bytes().replace(b'"step": 3', b'"step": 4'))
    train.save_checkpoint(single(tiny, 4), tmp_path, keep=2)
    assert len(train.checkpoints_of(tmp_path)) == 3  # 4 and 2 verify, 3 stays between them
    (tmp_path / "step-000004/.metadata").unlink()
    training = single(tiny)
    assert resume(training, tmp_path) and training.step == 2
    assert all((master == 2).all() for master in training.masters.values())
    printed = capsys.readouterr().err
    assert "passed over" in printed and ".metadata is missing" in printed and "state.json is damaged" in printed


def test_every_single_byte_corruption_is_found(tiny, tmp_path):
    train.save_checkpoint(single(tiny, 1), tmp_path)
    folder, rng = tmp_path / "step-000001", np.random.default_rng(3)
    files = sorted(folder.iterdir())
    for i in range(200):
        path = files[i % len(files)]  # also the small ones
        content = bytearray(path.read_bytes())
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        good = path.read_bytes()
        path.write_bytes(content)
        assert train.fault_of(folder), path.name
        assert not resume(single(tiny), tmp_path)
        path.write_bytes(good)
    assert train.fault_of(folder) is None


class Faults:
    """Makes the n-th file operation below `folder` fail: an error, a short write, or a kill before or after it."""

    def __init__(self, folder, n, kind):
        self.folder, self.n, self.kind, self.count = str(folder), n, kind, 0

    def operation(self, name, call, *args, path=None, **options):
        if path is not None and not str(path).startswith(self.folder):
            return call(*args, **options)
        self.count += 1
        if self.count != self.n:
            return call(*args, **options)
        if self.kind == "kill before":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "short write" and name == "write":
            call(args[0][:len(args[0]) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        if self.kind == "kill after":
            call(*args, **options)
            os.kill(os.getpid(), signal.SIGKILL)
        number = errno.EIO if self.kind == "EIO" else errno.ENOSPC
        raise OSError(number, os.strerror(number))

    def install(self):
        fault = self

        class Raw(io.FileIO):
            """What lies under a buffered file: one write here is one system call."""
            def write(self, data):
                return fault.operation("write", super().write, bytes(data))
        plain_open = io.open

        def opened(path, mode="r", *args, **options):
            if not str(path).startswith(self.folder) or not set(mode) & set("wax+"):
                return plain_open(path, mode, *args, **options)
            raw = fault.operation("open", Raw, path, mode.replace("b", "").replace("t", ""), path=path)
            buffered = io.BufferedWriter(raw, 8192)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")
        io.open = builtins.open = opened
        for name in ("mkdir", "rename", "replace", "unlink", "rmdir", "remove"):
            plain = getattr(os, name)
            setattr(os, name, lambda path, *args, plain=plain, name=name, **options: fault.operation(
                name, plain, path, *args, path=path, **options))
        plain_fsync = os.fsync
        os.fsync = lambda handle: fault.operation("fsync", plain_fsync, handle)
        import files
        plain_exchange = files.exchange
        files.exchange = lambda new, old: fault.operation("exchange", plain_exchange, new, old)


def save_with_fault(tiny, folder, n, kind):
    """Saves step 2 beside step 1; the number of operations, if it got to the end."""
    training, faults = single(tiny, 2), Faults(folder, n, kind)
    faults.install()
    sys.stderr = io.StringIO()
    train.save_checkpoint(training, folder, keep=1)
    return faults.count


def sweep(tiny, folder, kinds, points):
    """After a fault at each point the loader yields all of step 1 or all of step 2."""
    train.save_checkpoint(single(tiny, 1), folder / "first")
    shutil.copytree(folder / "first", folder / "counted")
    total = run_ranks(1, save_with_fault, tiny, folder / "counted", 0, "none")[0]
    outcomes = set()
    for n in points(total):
        for kind in kinds:
            target = folder / "run"
            shutil.copytree(folder / "first", target)
            run_ranks(1, save_with_fault, tiny, target, n, kind)
            training = single(tiny)
            assert resume(training, target), (n, kind)
            assert training.step in (1, 2)
            assert all((master == training.step).all() for master in training.masters.values()), (n, kind)
            outcomes.add(training.step)
            shutil.rmtree(target)
    assert outcomes == {1, 2}


def test_a_fault_while_saving_leaves_the_old_or_the_new_checkpoint(tiny, tmp_path):
    sweep(tiny, tmp_path, ["ENOSPC", "kill after"], lambda total: {*range(1, total, total // 12), total - 2, total})


@pytest.mark.heavy
def test_a_fault_at_any_file_operation_leaves_the_old_or_the_new_checkpoint(tiny, tmp_path):
    kinds = ["ENOSPC", "EIO", "kill before", "kill after", "short write"]
    sweep(tiny, tmp_path, kinds, lambda total: range(1, total + 1))


def test_a_full_disk_ends_in_one_line_and_status_1(tiny, tmp_path):
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(SystemExit, match=r"error: could not save .*checkpoints"):
        train.save_checkpoint(single(tiny), tmp_path / "checkpoints")

"""Runs a function in 1, 2 or 3 fresh processes that see each other as ranks, as torchrun would start them.

They are forked from a server that has imported torch and train but run nothing, so each starts in milliseconds. Below
it stands the small run that they train: a few random rows, and all of its state as arrays to compare.
"""
import json
import math
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_WAIT_POLICY"] = "passive"
context = multiprocessing.get_context("forkserver")
# what a run imports on its way, torch at its first optimizer step, is imported once here as well
context.set_forkserver_preload(["pytest", "torch._dynamo", "sft", "dpo", "ranks"])

import train  # noqa: E402 (after sys.path)
from data import collate, steps_of_epochs  # noqa: E402
from parallel import World, full, local, sharded_like, start  # noqa: E402
from weights import DTYPES  # noqa: E402

ALONE = World(0, 1, torch.device("cpu"))


def run_ranks(world, function, *args):
    """[what `function(*args)` returned on each rank]; AssertionError with the traceback if a rank failed."""
    pipes, processes = [], []
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for rank in range(world):
        mine, its = context.Pipe(duplex=False)
        processes.append(context.Process(target=_rank, args=(rank, world, port, its, function, args)))
        processes[-1].start()
        its.close()
        pipes.append(mine)
    outcomes = []
    for pipe in pipes:
        try:
            outcomes.append(pipe.recv())
        except EOFError:  # killed, or ended by SystemExit
            outcomes.append((True, None))
    for process in processes:
        process.join()
    failures = [text for good, text in outcomes if not good]
    assert not failures, failures[0]
    run_ranks.exit_codes = [process.exitcode for process in processes]
    return [value for _, value in outcomes]


def _rank(rank, world, port, pipe, function, args):
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost",
                       "MASTER_PORT": str(port)}
    try:
        pipe.send((True, function(*args)))
    except SystemExit:
        raise
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def command(main, *args):
    """`main([args])` as a program in a process of its own: its exit status, stdout and stderr."""
    with tempfile.TemporaryDirectory() as folder:
        run_ranks(1, _redirected, main, [str(arg) for arg in args], folder)
        return SimpleNamespace(returncode=run_ranks.exit_codes[0], stdout=Path(folder, "1").read_text(),
                               stderr=Path(folder, "2").read_text())


def _redirected(main, argv, folder):
    from files import run_main
    for handle, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        os.dup2(os.open(Path(folder, str(handle)), os.O_WRONLY | os.O_CREAT), handle)
    run_main(lambda: main(argv))

# ----- a small run ---------------------------------------------------------------------------------------------------

ROWS, BATCH = 22, 6  # 4 steps an epoch, the last with 4 rows


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
    world = start("cpu", replicate)
    return world, train.load_training(folder, world, dtype=DTYPES[dtype], checkpoint_above=checkpoint_above)


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
    """{name: the whole tensor, as an array} of per-rank rows."""
    return {name: full(sharded_like(training.world, training.model.get_parameter(name), rows.clone())).numpy()
            for name, rows in tensors.items()}


def state_of(training):
    """Masters, moments and computing weights, whole, as numpy arrays."""
    moments = {kind: whole_tensors(training, {name: training.optimizer.state[master][kind]
                                              for name, master in training.masters.items()})
               for kind in ("exp_avg", "exp_avg_sq")}
    weights = {name: local(p).detach().float() for name, p in training.model.named_parameters()}
    masters = whole_tensors(training, training.masters)
    return {"masters": masters, "weights": whole_tensors(training, weights), **moments}


def equal(one, other):
    """Whether two results of `state_of` are the same bits."""
    return all(one[kind][name].tobytes() == other[kind][name].tobytes() for kind in one for name in one[kind])


def metrics_in(out):
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def losses_in(out):
    """[(step, loss, gradient norm)] of a run's metrics.jsonl."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in metrics_in(out)]

"""Runs a function in 1, 2 or 3 fresh processes that see each other as ranks, as torchrun would start them.

They are forked from a server that has imported torch and train but run nothing, so each starts in milliseconds.
"""
import multiprocessing
import os
import socket
import sys
import tempfile
import traceback
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["OMP_WAIT_POLICY"] = "passive"
context = multiprocessing.get_context("forkserver")
# what a run imports on its way, torch at its first optimizer step, is imported once here as well
context.set_forkserver_preload(["pytest", "torch._dynamo", "train", "sft", "dpo", "ranks"])


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
    import torch
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

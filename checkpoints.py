"""Checkpoints: named tensors and a few numbers on disk, which survive a kill, a full disk and a flipped bit.

    folder/step-000100/__0_0.distcp …      each rank's shards, written side by side (torch.distributed.checkpoint)
    folder/step-000100/state.json          the numbers
    folder/step-000100/SHA256SUMS          of every file (`sha256sum -c` reads it); SHA256SUMS.sha256 is its own sum

A checkpoint is written into a folder beside its name, flushed and renamed, so that a kill at any moment leaves the old
one or the new one; what is read is verified byte by byte first. This file knows no model. torch's .metadata is a
pickle: resume from your own runs only.
"""
import contextlib
import json
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from files import InputError, one_line, read_json, remove, sha256, written_aside
from parallel import barrier, computed_on_rank_0, from_rank_0

# ----- writing -------------------------------------------------------------------------------------------------------


def save_tensors(world, folder, step, tensors, numbers, *, keep=2):
    """Writes folder/step-000100 and removes all older than the newest `keep` that verify. SystemExit if it cannot.

    tensors {name: tensor, sharded or not}; numbers: a dict for state.json, which gets `step` too. All ranks write into
    one folder (on several nodes: on a shared disk).
    """
    target = Path(folder) / f"step-{step:06d}"
    try:
        with written_aside(target) if world.rank == 0 else contextlib.nullcontext() as aside:
            aside = from_rank_0(world, aside)
            with single_process_is_fine():
                dcp.save(tensors, no_dist=world.size == 1, storage_writer=dcp.FileSystemWriter(aside))
            if world.rank == 0:
                (aside / "state.json").write_text(json.dumps({"step": step} | numbers, indent=2))
                write_manifest(aside)
        if world.rank == 0:
            remove_old_checkpoints(folder, keep)
    except (OSError, CheckpointException) as error:
        raise SystemExit(f"error: could not save {target}: {one_line(error)}") from None
    barrier(world)


@contextlib.contextmanager
def single_process_is_fine():
    """torch warns when one process saves or loads alone, as it is told to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def write_manifest(folder):
    """SHA256SUMS over all files of `folder` and, over that, SHA256SUMS.sha256."""
    sums = folder / "SHA256SUMS"
    sums.write_text("".join(f"{hexdigest}  {name}\n" for name, hexdigest in sorted(hashes(folder).items())))
    (folder / "SHA256SUMS.sha256").write_text(f"{sha256(sums)}  SHA256SUMS\n")


def hashes(folder):
    """{file name: SHA-256} of all files in `folder` but the two that hold the sums."""
    names = [path.name for path in Path(folder).iterdir() if not path.name.startswith("SHA256SUMS")]
    with ThreadPoolExecutor(8) as pool:  # hashlib releases the interpreter
        return dict(zip(names, pool.map(lambda name: sha256(Path(folder) / name), names)))


def remove_old_checkpoints(folder, keep):
    """Removes what is older than the `keep` newest checkpoints that verify; a damaged one does not count."""
    good = 0
    for path in checkpoints_of(folder):
        if good == keep:
            remove(path)
        elif fault_of(path) is None:
            good += 1

# ----- finding and reading -------------------------------------------------------------------------------------------


def checkpoints_of(folder):
    """The checkpoints in `folder`, newest first."""
    found = [path for path in Path(folder).glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def fault_of(folder):
    """The first fault of a checkpoint, in a few words, or None; every byte of every file is checked."""
    sums = Path(folder) / "SHA256SUMS"
    try:
        if (Path(folder) / "SHA256SUMS.sha256").read_bytes() != f"{sha256(sums)}  SHA256SUMS\n".encode():
            return "SHA256SUMS is damaged"
        expected = dict(reversed(line.split("  ", 1)) for line in sums.read_text().splitlines())
        found = hashes(folder)
    except OSError as error:
        return one_line(error)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if expected.get(name) != found[name]:
            return f"{name} is damaged" if name in expected else f"{name} does not belong there"
    return None


def checkpoint_to_resume(world, folder, facts):
    """(path, its numbers) of the newest checkpoint in `folder` that verifies, on every rank; None if there is none.

    InputError when the run it belongs to differed in one of `facts` (the settings that fix the data and its order).
    """
    return computed_on_rank_0(world, lambda: find_checkpoint(folder, facts))


def find_checkpoint(folder, facts):
    """`checkpoint_to_resume` on one rank."""
    for path in checkpoints_of(folder):
        fault = fault_of(path)
        if fault:
            print(f"passed over {path}: {fault}", file=sys.stderr)
            continue
        numbers = read_json(path / "state.json")
        differing = [f"{key} was {numbers['facts'].get(key)!r} and is {facts[key]!r}"
                     for key in facts if numbers["facts"].get(key) != facts[key]]
        if differing:
            raise InputError(f"{path}: made with other settings: {'; '.join(differing)}; expected the same, or "
                             "another --out")
        print(f"resuming from {path}", file=sys.stderr)
        return path, numbers
    return None


def load_tensors(world, path, tensors):
    """Fills `tensors` {name: tensor, sharded or not} in place; the number of ranks may have changed since the save."""
    with single_process_is_fine():
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=world.size == 1)

"""Checkpoints: named tensors and a few numbers on disk, which survive a kill, a full disk and a flipped bit.

    folder/step-000100/__0_0.distcp …      each rank's shards, written side by side (torch.distributed.checkpoint)
    folder/step-000100/state.json          the numbers
    folder/step-000100/SHA256SUMS          of every file (`sha256sum -c` reads it); SHA256SUMS.sha256 is its own sum

A checkpoint is written under another name, flushed and renamed, so that a kill at any moment leaves the old one or the
new one. Each rank hashes its own file; before a checkpoint is loaded, its every byte is verified. torch's .metadata is
a pickle, which is refused if it names anything but the classes that describe tensors. This file knows no model.
"""
import contextlib
import json
import pickle
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from files import InputError, one_line, read_json, remove, sha256, written_aside
from parallel import barrier, computed_on_rank_0, from_all

# ----- writing -------------------------------------------------------------------------------------------------------


def save_tensors(world, folder, step, tensors, numbers, *, keep=2, verified=None):
    """Writes folder/step-000100, then removes all older than the newest `keep` that verify. SystemExit(1) on an error.

    tensors: {name: tensor, sharded or not}; numbers: a dict for state.json, to which `step` is added. All ranks write
    into one folder (on several nodes: on a shared disk). verified {path: its `look`}: the checkpoints that this run has
    written or verified, which are not read again while they look the same; the new one is added.
    """
    target, verified = Path(folder) / f"step-{step:06d}", {} if verified is None else verified
    with contextlib.ExitStack() as stack:
        try:
            aside = computed_on_rank_0(world, lambda: stack.enter_context(written_aside(target)))
            with single_process_is_fine():
                dcp.save(tensors, no_dist=world.size == 1, storage_writer=Writer(aside))
            sums = hashes_of_ranks(world, aside)

            def finish():
                state = aside / "state.json"
                state.write_text(json.dumps({"step": step} | numbers, indent=2), encoding="utf-8")
                write_manifest(aside, sums | {name: sha256(aside / name) for name in (".metadata", "state.json")})
                stack.close()  # renames `aside` to `target`
                verified[target] = look(target)
            computed_on_rank_0(world, finish)
            remove_old_checkpoints(world, folder, keep, verified)
        except (OSError, CheckpointException) as error:
            reason = reason_of(error).removeprefix(f"{target}: ")
            if world.rank == 0:  # printed here, because torchrun terminates this rank once another has ended
                print(f"error: could not save {target}: {reason}", file=sys.stderr)
            raise SystemExit(1) from None
    barrier(world)


@contextlib.contextmanager
def single_process_is_fine():
    """Silences torch's warning that a single process saves or loads, because here that is intended."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


class Writer(dcp.FileSystemWriter):
    """torch's writer, which raises the OSError of a failed write and not the RuntimeError that hides it.

    After a failed write torch closes its archive; that fails too, with a message about positions in a file.
    """

    def write_data(self, plan, planner):
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause = error
            while cause and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            raise cause or error from None


def reason_of(error):
    """Why a checkpoint could not be written, in one line; if several ranks failed, the reason of the lowest."""
    failures = getattr(error, "failures", None)
    if not failures:
        return one_line(error)
    rank, (cause, _) = min(failures.items())
    return f"{one_line(cause)} (rank {rank})"


def hashes_of_ranks(world, folder):
    """{file name: SHA-256} of all ranks' files, on every rank; each rank reads only the files that it has written."""
    try:
        own = hashes(folder, f"__{world.rank}_*")
    except OSError as error:
        own = error
    return {name: hexdigest for one in from_all(world, own) for name, hexdigest in one.items()}


def write_manifest(folder, sums):
    """Writes `sums` {file name: SHA-256} as SHA256SUMS and, over that, SHA256SUMS.sha256."""
    path = folder / "SHA256SUMS"
    lines = "".join(f"{hexdigest}  {name}\n" for name, hexdigest in sorted(sums.items()))
    path.write_text(lines, encoding="utf-8")
    (folder / "SHA256SUMS.sha256").write_text(f"{sha256(path)}  SHA256SUMS\n", encoding="utf-8")


def hashes(folder, pattern="*"):
    """{file name: SHA-256} of the files in `folder` that match `pattern`, without the two files that hold the sums."""
    names = [path.name for path in Path(folder).glob(pattern) if not path.name.startswith("SHA256SUMS")]
    with ThreadPoolExecutor(8) as pool:  # hashlib releases the GIL
        return dict(zip(names, pool.map(lambda name: sha256(Path(folder) / name), names)))


def look(folder):
    """[(name, bytes, time of change in ns)] of a checkpoint's files: while it is the same, they count as unchanged."""
    files = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    return [(name, status.st_size, status.st_mtime_ns) for name, status in files]


def remove_old_checkpoints(world, folder, keep, verified):
    """Removes the checkpoints older than the newest `keep` that verify; a damaged one does not count among these.

    With no more than `keep` checkpoints nothing is read. Rank 0 reports after each checkpoint that it has read, because
    the other ranks wait half an hour at most.
    """
    paths, good = computed_on_rank_0(world, lambda: checkpoints_of(folder)), 0
    for path in paths if len(paths) > keep else ():
        if good < keep:
            good += computed_on_rank_0(world, lambda path=path: fault_unless(verified, path)) is None
        elif world.rank == 0:
            try:
                remove(path)
            except OSError as error:  # the new one is saved, and the other ranks go on
                print(f"could not remove {path}: {one_line(error)}", file=sys.stderr)


def fault_unless(verified, path):
    """`fault_of(path)`, but a checkpoint in `verified` that looks the same is not read; a sound one is added there."""
    try:
        seen = look(path)
    except OSError as error:
        return one_line(error)
    if verified.get(path) != seen:
        fault = fault_of(path)
        if fault:
            return fault
        verified[path] = seen
    return None

# ----- finding and reading -------------------------------------------------------------------------------------------


def checkpoints_of(folder):
    """The checkpoints in `folder`, newest first."""
    found = [path for path in Path(folder).glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def fault_of(folder):
    """The first fault of a checkpoint, in a few words, or None if every byte of every file is as it was saved."""
    sums = Path(folder) / "SHA256SUMS"
    try:
        if (Path(folder) / "SHA256SUMS.sha256").read_bytes() != f"{sha256(sums)}  SHA256SUMS\n".encode():
            return "SHA256SUMS is damaged"
        expected = dict(reversed(line.split("  ", 1)) for line in sums.read_text(encoding="utf-8").splitlines())
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

    InputError if it was saved with another value of one of `facts`, the settings that fix the data and its order.
    """
    for path in computed_on_rank_0(world, lambda: checkpoints_of(folder)):
        numbers = computed_on_rank_0(world, lambda path=path: verified_numbers(path, facts))
        if numbers is not None:
            return path, numbers
    return None


def verified_numbers(path, facts):
    """The numbers in state.json; None, and a line on stderr, for a damaged checkpoint; InputError for other `facts`."""
    fault = fault_of(path)
    if fault:
        print(f"passed over {path}: {fault}", file=sys.stderr)
        return None
    numbers = read_json(path / "state.json")
    differing = [f"{key} was {numbers['facts'].get(key)!r} and is {facts[key]!r}"
                 for key in facts if numbers["facts"].get(key) != facts[key]]
    if differing:
        raise InputError(f"{path}: made with other settings: {'; '.join(differing)}; expected the same, or "
                         "another --out")
    print(f"resuming from {path}", file=sys.stderr)
    return numbers


def load_tensors(world, path, tensors):
    """Fills `tensors` {name: tensor, sharded or not} in place; the number of ranks may have changed since the save."""
    computed_on_rank_0(world, lambda: check_metadata(path / ".metadata"))  # because torch unpickles anything
    with single_process_is_fine():
        try:
            dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=world.size == 1)
        except CheckpointException as error:
            raise InputError(f"{path}: cannot be loaded: {reason_of(error)}") from None


METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", "bfloat16", "float32"},
    "pathlib": {"Path", "PosixPath", "WindowsPath"}}


def check_metadata(path):
    """InputError if the pickle `path` names anything but METADATA_CLASSES, none of which runs code from a file."""
    class Restricted(pickle.Unpickler):
        def find_class(self, module, name):
            if name not in METADATA_CLASSES.get(module, ()):
                raise InputError(f"{path}: names {module}.{name}; expected the description of tensors alone")
            return super().find_class(module, name)
    with open(path, "rb") as file:
        try:
            Restricted(file).load()
        except (pickle.UnpicklingError, AttributeError, EOFError, IndexError, TypeError) as error:
            raise InputError(f"{path}: not readable ({one_line(error)})") from None

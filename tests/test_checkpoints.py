"""checkpoints.py: whatever happens while one is written, the old one or the new one is there, whole."""
import builtins
import errno
import io
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import ALONE, run_ranks
from torch.distributed.tensor import Shard

import checkpoints
import files
from checkpoints import (
    checkpoint_to_resume,
    checkpoints_of,
    fault_of,
    hashes,
    load_tensors,
    save_tensors,
    write_manifest,
)
from files import InputError
from parallel import local, sharded_like, start, stop


def tensors(value):
    """{name: tensor} as of a small run, filled with `value`; some have more, some fewer bytes than one write takes."""
    shapes = [(96, 32), *[(64, 32), (32,), (32, 48), (32,), (32, 32), (96, 32)] * 2, (32,)]
    return {f"{kind}/{i}": torch.full(shape, float(value)) for kind in ("master", "exp_avg", "exp_avg_sq")
            for i, shape in enumerate(shapes)}


def save(folder, step, keep=2, **numbers):
    save_tensors(ALONE, folder, step, tensors(step), {"facts": {}} | numbers, keep=keep)


def resumed(folder, facts=None):
    """The step of the checkpoint that a run in `folder` resumes from, or None; all its tensors must be of that step."""
    found = checkpoint_to_resume(ALONE, folder, facts or {})
    if found is None:
        return None
    path, numbers = found
    loaded = tensors(-1)
    load_tensors(ALONE, path, loaded)
    assert all((tensor == numbers["step"]).all() for tensor in loaded.values())
    return numbers["step"]

# ----- finding -------------------------------------------------------------------------------------------------------


def test_numbers_come_back(tmp_path):
    save(tmp_path, 3, rows=17, updates=2, facts={"lr": 1e-5})
    path, numbers = checkpoint_to_resume(ALONE, tmp_path, {"lr": 1e-5})
    assert path == tmp_path / "step-000003"
    assert numbers == {"step": 3, "rows": 17, "updates": 2, "facts": {"lr": 1e-5}}


def test_resume_refuses_another_run(tmp_path):
    save(tmp_path, 0, facts={"lr": 1e-5})
    with pytest.raises(InputError, match=r"step-000000: made with other settings: lr was 1e-05 and is 3e-05"):
        resumed(tmp_path, {"lr": 3e-5})


def test_only_checkpoints_count_as_such(tmp_path):
    for name in ("step-000010", "step-000002", "step-000010-old", "step-x"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step-000010", "step-000002"]

# ----- damage --------------------------------------------------------------------------------------------------------


def test_damaged_checkpoints_are_passed_over_and_do_not_count(tmp_path, capsys):
    for step in (1, 2, 3):
        save(tmp_path, step)
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step-000003", "step-000002"]
    state = tmp_path / "step-000003/state.json"
    state.write_bytes(state.read_bytes().replace(b'"step": 3', b'"step": 4'))
    save(tmp_path, 4)
    assert len(checkpoints_of(tmp_path)) == 3  # 4 and 2 verify, 3 stays between them
    (tmp_path / "step-000004/.metadata").unlink()
    assert resumed(tmp_path) == 2
    printed = capsys.readouterr().err
    assert "passed over" in printed and ".metadata is missing" in printed and "state.json is damaged" in printed


def test_every_single_byte_corruption_is_found(tmp_path):
    save(tmp_path, 1)
    folder, rng = tmp_path / "step-000001", np.random.default_rng(3)
    paths = sorted(folder.iterdir())
    for i in range(200):
        path = paths[i % len(paths)]  # also the small ones
        content = bytearray(path.read_bytes())
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        good = path.read_bytes()
        path.write_bytes(content)
        assert fault_of(folder), path.name
        assert resumed(tmp_path) is None
        path.write_bytes(good)
    assert fault_of(folder) is None


def test_a_checkpoint_that_cannot_be_loaded_ends_in_one_line(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(InputError, match=r"step-000001: cannot be loaded: .*another.* \(rank 0\)$"):
        load_tensors(ALONE, tmp_path / "step-000001", {"master/another": torch.zeros(2)})

# ----- faults while writing ------------------------------------------------------------------------------------------


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
            """The raw file under a buffered one: one write here is one system call."""
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
        plain_exchange = files.exchange
        files.exchange = lambda new, old: fault.operation("exchange", plain_exchange, new, old)


def save_with_fault(folder, n, kind):
    """Saves step 2 beside step 1 and returns the number of file operations, if it comes to the end."""
    faults = Faults(folder, n, kind)
    faults.install()
    sys.stderr = io.StringIO()
    save(folder, 2, keep=1)
    return faults.count


def sweep(folder, kinds, points):
    """After each of `kinds` of faults at each of points(number of operations), all of step 1 or all of step 2 loads."""
    save(folder / "first", 1)
    shutil.copytree(folder / "first", folder / "counted")
    total = run_ranks(1, save_with_fault, folder / "counted", 0, "none")[0]
    outcomes = set()
    for n in points(total):
        for kind in kinds:
            target = folder / "run"
            shutil.copytree(folder / "first", target)
            run_ranks(1, save_with_fault, target, n, kind)
            step = resumed(target)
            assert step in (1, 2) and fault_of(checkpoints_of(target)[0]) is None, (n, kind)
            outcomes.add(step)
            shutil.rmtree(target)
    assert outcomes == {1, 2}


def test_a_fault_while_saving_leaves_the_old_or_the_new_checkpoint(tmp_path):
    sweep(tmp_path, ["ENOSPC", "kill after"], lambda total: {*range(1, total, total // 12), total - 2, total})


@pytest.mark.heavy
def test_a_fault_at_any_file_operation_leaves_the_old_or_the_new_checkpoint(tmp_path):
    kinds = ["ENOSPC", "EIO", "kill before", "kill after", "short write"]
    sweep(tmp_path, kinds, lambda total: range(1, total + 1))


def test_what_is_in_the_way_ends_in_one_line_and_status_1(tmp_path, capsys):
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(SystemExit) as ended:
        save(tmp_path / "checkpoints", 0)
    assert ended.value.code == 1
    assert capsys.readouterr().err == (f"error: could not save {tmp_path}/checkpoints/step-000000: "
                                       f"{tmp_path}/checkpoints: File exists\n")


def save_on_a_full_disk(folder, errors):
    """The last rank cannot write, because a limit on the size of its files stands for the full disk."""
    world = start("cpu")
    sys.stderr = open(f"{errors}-{world.rank}", "w")  # noqa: SIM115
    if world.rank == world.size - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    save_tensors(world, folder, 1, sharded(world, 1), {"facts": {}})


@pytest.mark.parametrize("size", [1, 2])
def test_a_full_disk_ends_in_one_line_and_status_1(tmp_path, size):
    (tmp_path / "out").mkdir()
    run_ranks(size, save_on_a_full_disk, tmp_path / "out", tmp_path / "errors")
    assert run_ranks.exit_codes == [1] * size
    said = [(tmp_path / f"errors-{rank}").read_text() for rank in range(size)]
    assert said == [f"error: could not save {tmp_path}/out/step-000001: File too large (rank {size - 1})\n",
                    *[""] * (size - 1)]
    assert list((tmp_path / "out").iterdir()) == []

# ----- many ranks ----------------------------------------------------------------------------------------------------


def sharded(world, value):
    """{name: tensor} of 8 and of 4099 rows whose numbers all differ, sharded over the ranks."""
    found = {}
    for name, n in (("master/a", 8), ("master/b", 4099)):
        whole = torch.arange(n * 2.0).view(n, 2) + value
        share = -(-n // world.size)
        found[name] = sharded_like(world, SimpleNamespace(
            device_mesh=world.mesh, placements=[Shard(0)], shape=whole.shape, stride=whole.stride),
            whole[world.rank * share:(world.rank + 1) * share].clone())
    return found


def save_and_count(folder, steps, keep):
    """{file name: how often this rank has hashed such a file} over the saves of `steps` in one run."""
    world, counts, verified, plain = start("cpu"), Counter(), {}, checkpoints.sha256

    def counted(path):
        counts[path.name] += 1
        return plain(path)
    checkpoints.sha256 = counted
    for step in steps:
        save_tensors(world, folder, step, sharded(world, step), {"facts": {}}, keep=keep, verified=verified)
    stop(world)
    return dict(counts)


def load_sharded(folder):
    """(the step that a run with this many ranks resumes from, whether all of this rank's rows are of that step)."""
    world = start("cpu")
    path, numbers = checkpoint_to_resume(world, folder, {})
    loaded, expected = sharded(world, -1), sharded(world, numbers["step"])
    load_tensors(world, path, loaded)
    same = [torch.equal(local(loaded[name]), local(expected[name])) for name in expected]
    stop(world)
    return numbers["step"], all(same)


def test_a_rank_hashes_its_own_file_and_each_file_is_hashed_once(tmp_path, capfd):
    """Four ranks save four times and keep two checkpoints; two ranks load the newest, or if damaged the other."""
    counts = run_ranks(4, save_and_count, tmp_path, [1, 2, 3, 4], 2)
    assert counts == [{f"__{rank}_0.distcp": 4} | ({".metadata": 4, "state.json": 4, "SHA256SUMS": 4} if rank == 0
                                                   else {}) for rank in range(4)]
    assert [path.name for path in checkpoints_of(tmp_path)] == ["step-000004", "step-000003"]
    newest = tmp_path / "step-000004"
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=newest, capture_output=True, text=True)
    assert checked.stdout.count(": OK\n") == 6 and checked.returncode == 0
    assert run_ranks(2, load_sharded, tmp_path) == [(4, True)] * 2
    for rank in range(4):
        path = newest / f"__{rank}_0.distcp"
        good = path.read_bytes()
        path.write_bytes(good[:700] + bytes([good[700] ^ 16]) + good[701:])
        assert fault_of(newest) == f"{path.name} is damaged"
        if rank < 3:
            path.write_bytes(good)
    assert run_ranks(2, load_sharded, tmp_path) == [(3, True)] * 2


def test_nothing_is_read_again_unless_something_is_removed_on_its_account(tmp_path, monkeypatch):
    read, verified, fault_of = [], {}, checkpoints.fault_of
    monkeypatch.setattr(checkpoints, "fault_of", lambda path: read.append(path.name) or fault_of(path))

    def save_and_read(step, keep=2):
        read.clear()
        save_tensors(ALONE, tmp_path, step, tensors(step), {"facts": {}}, keep=keep, verified=verified)
        return list(read)
    assert [save_and_read(step) for step in (1, 2, 3)] == [[], [], []]
    verified.clear()  # another run goes on
    assert save_and_read(4, keep=3) == [] and save_and_read(5, keep=3) == ["step-000003"]
    assert save_and_read(6, keep=3) == []
    state = tmp_path / "step-000005/state.json"  # changed behind the run's back
    state.write_bytes(state.read_bytes().replace(b'"step": 5', b'"step": 7'))
    assert save_and_read(7, keep=3) == ["step-000005"]
    assert [path.name[-1] for path in checkpoints_of(tmp_path)] == ["7", "6", "5", "4"]


def save_where_none_can_be_removed(folder):
    """What this rank prints over two saves, of which one is to be kept."""
    def refuse(path):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
    checkpoints.remove, sys.stderr = refuse, io.StringIO()
    world = start("cpu")
    for step in (1, 2):
        save_tensors(world, folder, step, sharded(world, step), {"facts": {}}, keep=1)
    stop(world)
    return sys.stderr.getvalue()


def test_an_old_checkpoint_that_cannot_be_removed_stops_no_rank(tmp_path):
    said = f"could not remove {tmp_path}/step-000001: {tmp_path}/step-000001: Directory not empty\n"
    assert run_ranks(2, save_where_none_can_be_removed, tmp_path) == [said, ""]
    assert len(checkpoints_of(tmp_path)) == 2


def test_scraps_of_other_steps_are_cleared_by_the_next_save(tmp_path):
    run_ranks(1, save_with_fault, tmp_path, 4, "kill after")
    assert len(list(tmp_path.iterdir())) == 2 and not checkpoints_of(tmp_path)
    save(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000003"]

# ----- the pickle ----------------------------------------------------------------------------------------------------


class Opens:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_that_names_anything_else_is_not_run(tmp_path):
    """Its sums are right, because anyone who can write to the folder can make them so."""
    save(tmp_path, 1)
    path = tmp_path / "step-000001/.metadata"
    path.write_bytes(pickle.dumps(Opens(str(tmp_path / "made"))))
    write_manifest(path.parent, hashes(path.parent))
    with pytest.raises(InputError, match=r"\.metadata: names io\.open; expected the description of tensors alone"):
        resumed(tmp_path)
    assert not (tmp_path / "made").exists()
    path.write_bytes(b"no pickle")
    with pytest.raises(InputError, match=r"\.metadata: not readable"):
        load_tensors(ALONE, path.parent, tensors(-1))

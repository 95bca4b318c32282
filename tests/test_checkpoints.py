"""checkpoints.py: whatever happens while one is written, the old one or the new one is there, whole."""
import builtins
import errno
import io
import os
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
from ranks import run_ranks

import files
from checkpoints import checkpoint_to_resume, checkpoints_of, fault_of, load_tensors, save_tensors
from files import InputError
from parallel import World

ALONE = World(0, 1, torch.device("cpu"))


def tensors(value):
    """As many as a small run has, some of more and some of fewer bytes than are written at once, full of `value`."""
    shapes = [(96, 32), *[(64, 32), (32,), (32, 48), (32,), (32, 32), (96, 32)] * 2, (32,)]
    return {f"{kind}/{i}": torch.full(shape, float(value)) for kind in ("master", "exp_avg", "exp_avg_sq")
            for i, shape in enumerate(shapes)}


def save(folder, step, keep=2, **numbers):
    save_tensors(ALONE, folder, step, tensors(step), {"facts": {}} | numbers, keep=keep)


def resumed(folder, facts=None):
    """The step of the checkpoint that a run in `folder` goes on from, every number of which must be of that step."""
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
    """Saves step 2 beside step 1; the number of operations, if it got to the end."""
    faults = Faults(folder, n, kind)
    faults.install()
    sys.stderr = io.StringIO()
    save(folder, 2, keep=1)
    return faults.count


def sweep(folder, kinds, points):
    """After a fault at each point the loader yields all of step 1 or all of step 2."""
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


def test_a_full_disk_ends_in_one_line_and_status_1(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where a folder should be")
    with pytest.raises(SystemExit, match=r"error: could not save .*checkpoints"):
        save(tmp_path / "checkpoints", 0)

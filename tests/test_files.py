"""files.py: strict reading, writing that leaves the old or the new, and how a program ends."""
import errno
import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from datetime import date

import pyarrow
import pytest
from conftest import ROOT, held_elsewhere
from pyarrow import parquet

import files
import ttt
from files import (
    InputError,
    appended,
    finished_rows,
    read_data,
    read_json,
    read_jsonl,
    sha256,
    write_json,
    written_aside,
)


def test_strict_json(tmp_path):
    path = tmp_path / "x.json"
    for text, found in (("{", "not valid"), ('{"a": NaN}', "NaN is not JSON"),
                        ('{"a": 1, "a": 2}', "'a' stands twice"), ('{"a": 1e999}', "too large"),
                        ("[" * 200_000, "nested too deeply"), ("[1]", "found a JSON list"), ("", "not valid")):
        path.write_text(text)
        with pytest.raises(InputError, match=found):
            read_json(path)
    begin = time.process_time()  # the key that stands twice is found in one pass
    path.write_text("{" + ", ".join(f'"{i}": 1' for i in [*range(50_000), 49_999]) + "}")
    with pytest.raises(InputError, match="'49999' stands twice"):
        read_json(path)
    assert time.process_time() - begin < 2
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8"):
        read_json(path)
    with pytest.raises(InputError, match="no such file"):
        read_json(tmp_path / "none.json")
    path.write_text('{"a": {"b": [1, 2.5, null, "é"]}}')
    assert read_json(path) == {"a": {"b": [1, 2.5, None, "é"]}}


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_jsonl_names_the_line_and_goes_on(name, tmp_path):
    lines = [b'{"a": 1}', b"", b"{oops", b"[1]", b'{"a": "\xff"}', b'{"a": 2}']
    with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wb") as file:
        file.write(b"\n".join(lines))
    rows = list(read_jsonl(tmp_path / name))
    assert [number for number, _ in rows] == [1, 3, 4, 5, 6]
    assert rows[0][1] == {"a": 1} and rows[4][1] == {"a": 2}
    for number, row in rows[1:4]:
        assert isinstance(row, InputError) and f"{name}:{number}:" in str(row) and "\n" not in str(row)


def test_an_endless_line_costs_no_memory_and_the_next_line_is_read(tmp_path):
    """A line of 1 GB (sparse, so that it costs no disk) is reported; memory grows by the limit, not by the line."""
    with open(tmp_path / "x.jsonl", "wb") as file:
        file.seek(1 << 30)
        file.write(b'\n{"a": 1}\n')
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from files import read_jsonl\n"
            "rows = list(read_jsonl(sys.argv[2])); print(rows[0][1], '|', rows[1])\n"
            "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])")
    out = subprocess.run([sys.executable, "-c", code, ROOT, tmp_path / "x.jsonl"], capture_output=True, text=True)
    first, peak_kb = out.stdout.splitlines()
    assert "x.jsonl:1: a line of more than 16,777,216 bytes" in first and "(2, {'a': 1})" in first
    assert int(peak_kb) < 100_000


def test_a_cut_gzip_file_is_reported(tmp_path):
    whole = gzip.compress(b'{"a": 1}\n' * 10_000)
    (tmp_path / "x.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(InputError, match="damaged gzip"):
        list(read_jsonl(tmp_path / "x.jsonl.gz"))
    whole, refused = gzip.compress(os.urandom(3000).hex().encode() + b"\n"), 0
    for position in range(10, len(whole), 20):  # a flipped bit may raise nothing but InputError
        damaged = bytearray(whole)
        damaged[position] ^= 4
        (tmp_path / "x.jsonl.gz").write_bytes(damaged)
        try:
            refused += any(isinstance(row, InputError) for _, row in read_jsonl(tmp_path / "x.jsonl.gz"))
        except InputError:
            refused += 1
    assert refused == len(range(10, len(whole), 20))
    with pytest.raises(InputError, match="no such file"):
        list(read_jsonl(tmp_path / "none.jsonl"))


def test_a_byte_order_mark_is_skipped(tmp_path):
    bom = b"\xef\xbb\xbf"
    (tmp_path / "x.json").write_bytes(bom + b'{"a": 1}')
    assert read_json(tmp_path / "x.json") == {"a": 1}
    (tmp_path / "x.jsonl").write_bytes(bom + b'{"a": 1}\n' + bom + b'{"a": 2}\n' + bom)  # two files put together
    assert list(read_jsonl(tmp_path / "x.jsonl")) == [(1, {"a": 1}), (2, {"a": 2})]
    (tmp_path / "x.txt").write_bytes(bom + "Be brief: 38 °C.".encode())
    assert ttt.read_text(tmp_path / "x.txt", "--system") == "Be brief: 38 °C."


def test_the_content_decides_how_rows_are_read(tmp_path):
    rows, path = [{"a": 1}, {"a": "é"}], tmp_path / "x"
    lines = "\n".join(map(json.dumps, rows)).encode()
    for content, places in ((lines, [f"{path}:1", f"{path}:2"]),
                            (json.dumps(rows).encode(), [f"{path}: row 1", f"{path}: row 2"]),
                            (b"\n " + json.dumps(rows, indent=2).encode(), [f"{path}: row 1", f"{path}: row 2"])):
        path.write_bytes(content)
        assert list(read_data(path)) == [(1, places[0], rows[0]), (2, places[1], rows[1])]
    path.write_text('[{"a": 1}, 2]')
    (_, _, first), (_, _, second) = read_data(path)
    assert first == {"a": 1} and "x: row 2: found int, expected a JSON object" in str(second)
    for content, found in (('["a"]\n{"a": 1}', None), ('[{"a": 1}\n', "x: not valid JSON"),
                           ('[{"a": NaN}]', "NaN is")):
        path.write_text(content)
        if found:
            with pytest.raises(InputError, match=found):
                list(read_data(path))
        else:  # a wrong line of many
            assert [isinstance(row, InputError) for *_, row in read_data(path)] == [True, False]


def test_an_array_too_large_or_packed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 10)
    (tmp_path / "x.json").write_text('[{"a": 1}, {"a": 2}]')
    with pytest.raises(InputError, match=r"x\.json: 20 bytes; expected JSON of at most 10, or one object a line"):
        list(read_data(tmp_path / "x.json"))
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(b'[{"a": 1}]'))
    with pytest.raises(InputError, match=r"x.json.gz: a JSON array in .gz; expected it unpacked"):
        list(read_data(tmp_path / "x.json.gz"))
    with pytest.raises(InputError, match="no such file"):
        list(read_data(tmp_path / "none.parquet"))


def test_parquet_has_what_json_has(tmp_path):
    """Against the values put in: a date becomes text, a number that is missing becomes None."""
    rows = [{"text": "é\u2028", "turns": [{"role": "user", "n": None}], "n": 2**60, "x": 0.5, "day": date(2024, 2, 1)},
            {"text": None, "turns": [], "n": None, "x": math.nan, "day": None}] * 200  # several batches
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    expected = [rows[0] | {"day": "2024-02-01"}, rows[1] | {"x": None}] * 200
    found = list(read_data(tmp_path / "x.parquet"))
    assert [row for *_, row in found] == expected
    assert found[399][:2] == (400, f"{tmp_path}/x.parquet: row 400")
    whole = (tmp_path / "x.parquet").read_bytes()
    for damaged in (whole[:-40], b"version https://git-lfs", whole[:4] + b"\xff" * 200 + whole[204:]):
        (tmp_path / "x.parquet").write_bytes(damaged)
        with pytest.raises(InputError, match=r"x.parquet: not a readable parquet file \(.") as error:
            list(read_data(tmp_path / "x.parquet"))
        assert "\n" not in str(error.value)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"found no pyarrow to read parquet; expected pip install .*parquet"):
        list(read_data(tmp_path / "x.parquet"))


def test_sha256_is_the_standard_one(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_written_aside_replaces_files_and_folders_whole(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    write_json(tmp_path / "x.json", {"a": 2})
    for content in ("old", "new"):
        with written_aside(tmp_path / "folder") as aside:
            aside.mkdir()
            (aside / content).write_text(content)
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 2}
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]
    with pytest.raises(ValueError, match="boom"), written_aside(tmp_path / "folder") as aside:
        aside.mkdir()
        raise ValueError("boom")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "x.json"]


def test_two_renames_where_folders_cannot_be_exchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(files.sys, "platform", "darwin")
    test_written_aside_replaces_files_and_folders_whole(tmp_path)


@pytest.mark.parametrize("fails, error", [(1, OSError), (2, OSError), (1, SystemExit), (2, SystemExit)])
def test_the_old_folder_is_put_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch, fails, error):
    """A SystemExit is a signal that came during the rename and is raised after it."""
    calls, rename = [], os.rename

    def fail(one, other):
        calls.append(other)
        if len(calls) != fails or error is SystemExit:
            rename(one, other)
        if len(calls) == fails:
            raise error(5, "Input/output error") if error is OSError else error(143)
    monkeypatch.setattr(files.sys, "platform", "darwin")
    with written_aside(tmp_path / "x") as aside:
        aside.mkdir()
        (aside / "old").write_text("old")
    monkeypatch.setattr(files.os, "rename", fail)
    with pytest.raises(error), written_aside(tmp_path / "x") as aside:
        aside.mkdir()
        (aside / "new").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["new" if (fails, error) == (2, SystemExit) else "old"]


def test_a_scrap_whose_removal_is_interrupted_is_removed_by_the_next_program(tmp_path, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(files, "remove", interrupted)
        with written_aside(tmp_path / "x") as aside:
            aside.write_text("half")
            raise KeyboardInterrupt
    assert len(list(tmp_path.iterdir())) == 2
    write_json(tmp_path / "y", {})
    assert [path.name for path in tmp_path.iterdir()] == ["y"]


def test_a_name_that_is_not_utf_8_is_written_as_jsons_escape(tmp_path):
    row = {"data": [os.fsdecode(b"r\xe9sum\xe9.jsonl")]}
    write_json(tmp_path / "x.json", row)
    with appended(tmp_path / "x.jsonl") as append:
        append(row)
    assert read_json(tmp_path / "x.json") == row and list(read_jsonl(tmp_path / "x.jsonl")) == [(1, row)]


HALF = ("import sys, time; sys.path.insert(0, sys.argv[1]); from files import written_aside\n"
        "with written_aside(sys.argv[2]) as aside:\n"
        "    aside.mkdir(); (aside / 'half').write_text('half'); print('ready', flush=True); time.sleep(60)")


def test_scraps_of_the_killed_are_cleared_whatever_their_name_and_those_of_the_living_stay(tmp_path, monkeypatch):
    """Process ids play no part, because in another container the living writer's would not be found."""
    write_json(tmp_path / "step-2", {"a": 1})
    killed, living = (subprocess.Popen([sys.executable, "-c", HALF, ROOT, tmp_path / name], stdout=subprocess.PIPE)
                      for name in ("step-1", "step-3"))
    for process in (killed, living):
        process.stdout.readline()
    killed.kill()
    killed.wait()

    def unknown(pid, number):
        raise ProcessLookupError
    monkeypatch.setattr(files.os, "kill", unknown)
    assert json.loads((tmp_path / "step-2").read_text()) == {"a": 1} and len(list(tmp_path.iterdir())) == 5
    write_json(tmp_path / "step-2", {"a": 2})
    monkeypatch.undo()
    scrap, lock, kept = sorted(tmp_path.iterdir())
    assert kept.name == "step-2" and lock.name == f"{scrap.name}.lock" and (scrap / "half").read_text() == "half"
    living.terminate()
    living.wait()
    write_json(tmp_path / "step-2", {"a": 3})
    assert [path.name for path in tmp_path.iterdir()] == ["step-2"]


@pytest.mark.skipif(sys.platform == "win32", reason="no fcntl")
def test_a_lock_that_is_taken_for_a_scrap_is_waited_for_and_made_anew(tmp_path, monkeypatch):
    """Another process that clears scraps locks and removes the file after it is made and before it is locked here."""
    import fcntl
    ways = []

    def flock(file, how, real=fcntl.flock):
        ways.append(how)
        if len(ways) == 1:
            os.unlink(file.name)
        real(file, how)
    monkeypatch.setattr(fcntl, "flock", flock)
    with written_aside(tmp_path / "x") as aside:
        aside.write_text("whole")
        assert [path.name for path in tmp_path.glob(".x.*.lock")] == [f"{aside.name}.lock"]
    assert ways == [fcntl.LOCK_EX] * 2 and [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "large disk").mkdir()
    for target in ("model", "none yet"):
        (tmp_path / target).symlink_to(tmp_path / "large disk" / target)
        for content in ("old", "new"):
            with written_aside(tmp_path / target) as aside:
                assert aside.parent == tmp_path / "large disk"  # else the rename would cross disks
                aside.mkdir()
                (aside / content).write_text(content)
        assert (tmp_path / target).is_symlink()
        assert [path.name for path in (tmp_path / "large disk" / target).iterdir()] == ["new"]


@pytest.mark.parametrize("name", ["", "x/.."])
def test_a_name_is_needed(tmp_path, name):
    with pytest.raises(InputError, match="found no name to write to"), written_aside(f"{tmp_path}/{name}" * bool(name)):
        pass


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_get_the_mode_of_any_new_file(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        for name in ("file", "folder/file"):
            with written_aside(tmp_path / name.partition("/")[0]) as aside:
                if "/" in name:
                    aside.mkdir()
                path = aside / "file" if "/" in name else aside
                os.close(os.open(path, os.O_CREAT, 0o600))  # as safetensors makes it
            assert (tmp_path / name).stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


def test_without_locks_scraps_stay_and_writing_goes_on(tmp_path, monkeypatch):
    """As on Windows, which also lacks resource."""
    for name in ("fcntl", "resource"):
        monkeypatch.setitem(sys.modules, name, None)
    for suffix in ("", ".lock"):
        (tmp_path / f".x.partial-0{suffix}").write_text("half")
    write_json(tmp_path / "y", {"a": 1})
    assert len(list(tmp_path.iterdir())) == 3 and files.resident("no such") == 0


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_all_of_it_is_flushed_before_the_rename_and_the_rename_after(tmp_path, monkeypatch, kind, replaced):
    """A power cut then leaves the old or the new one. Folders are flushed because they hold the names."""
    calls, fsync, replace, exchange = [], os.fsync, os.replace, files.exchange
    target = tmp_path / "x"

    def write(path):
        if kind == "file":
            path.write_text("new")
            return
        (path / "inner").mkdir(parents=True)
        for name in ("a", "inner/b"):
            (path / name).write_text("new")
    if replaced:
        write(target)
    names = {}

    def named(handle):
        status = os.fstat(handle)
        calls.append((names.get(status.st_ino), status.st_size if kind == "file" else None))
        fsync(handle)

    def renamed(call):
        def rename(*args):
            calls.append("rename")
            call(*args)
        return rename
    monkeypatch.setattr(files.os, "fsync", named)
    monkeypatch.setattr(files.os, "replace", renamed(replace))
    monkeypatch.setattr(files, "exchange", renamed(exchange))
    with written_aside(target) as aside:
        write(aside)
        names |= {path.stat().st_ino: path.relative_to(aside).as_posix() for path in (aside, *aside.rglob("*"))}
        names[tmp_path.stat().st_ino] = "the folder above"
    *before, rename, after = calls
    assert rename == "rename" and after[0] == "the folder above"
    assert sorted(name for name, _ in before) == ([".", "a", "inner", "inner/b"] if kind == "folder" else ["."])
    assert kind == "folder" or before == [(".", 3)]  # with all that was written


# a file of answers, a row for each question
ANSWERS = [{"question": question, "answer": answer} for question, answer in (
    ("Why?", "Because."), ("What is 39 °C?", "Fever,\nin 肺炎 too."), ("", "\u2028"), ("Is it over?", "Yes."))]
BEGINS_WITH = b'{"question": "'


def answer_all(path):
    """Appends the answers that are missing; returns how many were there before."""
    done = list(finished_rows(path, BEGINS_WITH))
    assert done == [(i + 1, row) for i, row in enumerate(ANSWERS[:len(done)])]
    with appended(path) as append:
        for row in ANSWERS[len(done):]:
            append(row)
    return len(done)


def test_rows_cut_off_at_any_byte_are_resumed_to_the_identical_file(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", lambda handle: None)  # 500 times
    path = tmp_path / "new/answers.jsonl"
    assert list(finished_rows(path, BEGINS_WITH)) == [] and answer_all(path) == 0
    whole = path.read_bytes()
    assert whole.decode() == "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ANSWERS)
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert answer_all(path) == whole[:cut].count(b"\n")
        assert path.read_bytes() == whole


def test_a_row_is_on_disk_when_append_returns(tmp_path, monkeypatch):
    sizes, path = [], tmp_path / "answers.jsonl"
    monkeypatch.setattr(files.os, "fsync", lambda handle: sizes.append(os.fstat(handle).st_size))
    with appended(path) as append:
        for n, row in enumerate(ANSWERS, 1):
            append(row)
            assert len(sizes) == n and sizes[-1] == path.stat().st_size
            assert path.read_bytes().count(b"\n") == n


def test_killed_in_the_middle_of_a_row_it_goes_on(tmp_path):
    """The kernel kills the process after 100 bytes, which is in the middle of the second row."""
    path, code = tmp_path / "answers.jsonl", (
        "import resource, signal, sys; sys.path.insert(0, sys.argv[1]); from files import appended\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
        "with appended(sys.argv[2]) as append:\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "    for row in eval(sys.argv[3]): append(row); print('done', flush=True)")
    rows = [row | {"answer": row["answer"] * 4} for row in ANSWERS]
    killed = subprocess.run([sys.executable, "-c", code, ROOT, path, repr(rows)], stdout=subprocess.PIPE, text=True)
    assert killed.returncode == -signal.SIGXFSZ and killed.stdout == "done\n" and path.stat().st_size == 100
    assert list(finished_rows(path, BEGINS_WITH)) == [(1, rows[0])]
    with appended(path) as append:
        for row in rows[1:]:
            append(row)
    assert list(finished_rows(path, BEGINS_WITH)) == list(enumerate(rows, 1))


@pytest.mark.parametrize("content, message", [
    (b"a thesis", "answers.jsonl:1: found something else than answers; expected a new name for --out"),
    (b'{"question": "Why?"}\n{"quest? no', "answers.jsonl:2: found something else than answers"),
    (b'{"question": "Why?"}\na line\n{"question": "', "answers.jsonl:2: not valid JSON"),
    (b'[1]\n', "answers.jsonl:1: found list, expected a JSON object")])
def test_a_foreign_file_is_refused_and_left_as_it_is(tmp_path, content, message):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        list(finished_rows(path, BEGINS_WITH))
    assert message in str(error.value) and path.read_bytes() == content


@pytest.mark.parametrize("body, status, words", [
    ("return None", 0, ""), ("raise InputError('found a\\nexpected b')", 2, "error: found a expected b"),
    ("open('/nowhere/x')", 2, "error: /nowhere/x: No such file or directory"),
    ("raise KeyboardInterrupt", 130, "interrupted"),
    ("raise MemoryError", 1, "error: out of memory"),
    ("import torch; torch.empty(1 << 52)", 1, "error: out of memory"),
    ("with written_aside('/tmp/x'): raise OSError(28, 'No space left on device')", 1,
     "error: /tmp/x: No space left on device"),
    ("with appended('y'): raise OSError(27, 'File too large')", 1, "error: y: File too large"),
    ("hold('/')", 2, "error: /: found no name to write to; expected the path of a new file or folder"),
    ("raise OSError(12, 'Cannot allocate memory')", 1, "error: Cannot allocate memory"),
    ("raise OSError(24, 'Too many open files', 'x')", 1, "error: x: Too many open files"),
    ("raise OSError(122, 'Disk quota exceeded')", 1, "error: Disk quota exceeded"), ("time.sleep(60)", 143, "")])
def test_exit_statuses(body, status, words, tmp_path):
    code = ("import sys, time; sys.path.insert(0, sys.argv[1]); from files import *\n"
            f"def main():\n    print('on', flush=True)\n    {body}\nrun_main(main)")
    process = subprocess.Popen([sys.executable, "-c", code, ROOT], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, cwd=tmp_path)
    process.stdout.readline()
    if status == 143:
        time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == status and errors.strip() == words


def test_a_terminal_without_the_letters_gets_their_numbers():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from files import run_main\n"
            "def main():\n    print('°C → 肺', 'half \\ud83d'); print('ñ', file=sys.stderr)\nrun_main(main)")
    for encoding, expected in (("ascii", b"\\xb0C \\u2192 \\u80ba"), ("latin-1", b"\xb0C \\u2192 \\u80ba"),
                               ("utf-8", "°C → 肺".encode())):
        out = subprocess.run([sys.executable, "-c", code, ROOT], capture_output=True,
                             env=os.environ | {"PYTHONIOENCODING": encoding})
        assert out.stdout == expected + b" half \\ud83d\n" and out.returncode == 0 and len(out.stderr) < 6


def test_a_reader_that_leaves_is_no_error():
    code = ("import sys; sys.path.insert(0, sys.argv[1]); from files import run_main\n"
            "def main():\n    for i in range(100000): print('line', i)\nrun_main(main)")
    pipe = '"$0" -c "$1" "$2" | head -1; echo ${PIPESTATUS[0]}'
    out = subprocess.run(["bash", "-c", pipe, sys.executable, code, ROOT], capture_output=True, text=True)
    assert out.stdout.splitlines() == ["line 0", "141"] and "Traceback" not in out.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="no fcntl")
def test_what_another_process_writes_is_held_until_that_ends_however_it_ends(tmp_path):
    out = tmp_path / "runs/one"
    for end in (signal.SIGKILL, signal.SIGTERM):
        with held_elsewhere(out) as other:
            with pytest.raises(InputError, match=rf"one: process {other.pid} on .* is writing there; expected another"):
                files.hold(tmp_path / "runs/../runs/one")
            files.hold(tmp_path / "runs/two")
            other.send_signal(end)
            other.wait()
        done = subprocess.run([sys.executable, "-c", f"import files; files.hold({str(out)!r})"], cwd=ROOT)
        assert done.returncode == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [".two.lock"]  # this process's own
    files.hold(out)
    files.hold(out)  # again in one process: the same run
    files.release(out, out.with_name(".one.lock"), os.getpid())


@pytest.mark.skipif(sys.platform == "win32", reason="no fcntl")
def test_a_lock_file_that_its_holder_has_just_removed_is_not_taken_for_a_lock(tmp_path, monkeypatch):
    """The holder ends and removes the file between our open and our flock: the lock must be on a new file."""
    import fcntl
    lock, taken = tmp_path / ".out.lock", []

    def flock(file, how, real=fcntl.flock):
        if not taken:
            lock.unlink()
        taken.append(os.fstat(file.fileno()).st_ino)
        real(file, how)
    monkeypatch.setattr(fcntl, "flock", flock)
    files.hold(tmp_path / "out")
    assert len(taken) == 2 and lock.stat().st_ino == taken[1]
    files.release(tmp_path / "out", lock, os.getpid())


def test_a_link_that_leads_to_itself_is_held_by_its_own_name(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    files.hold(tmp_path / "loop")
    assert (tmp_path / ".loop.lock").is_file()
    files.release(tmp_path / "loop", tmp_path / ".loop.lock", os.getpid())


@pytest.mark.skipif(sys.platform == "win32", reason="no fcntl")
def test_a_disk_without_locks_is_named(tmp_path, monkeypatch, capsys):
    import fcntl

    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", flock)
    files.hold(tmp_path / "out")
    assert capsys.readouterr().err == f"{tmp_path}/out: the disk has no locks that would keep other runs away\n"


def test_a_flag_is_taken_by_its_whole_name_only():
    parser = files.Parser()
    parser.add_argument("--reference-free", action="store_true")
    parser.add_subparsers(dest="command").add_parser("build").add_argument("--data")
    assert parser.parse_args(["--reference-free", "build", "--data", "x"]).data == "x"
    for line in (["--reference"], ["build", "--dat", "x"]):
        with pytest.raises(InputError, match="unrecognized"):
            parser.parse_args(line)

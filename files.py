"""How every program here reads and writes files, and how it ends.

Four promises, kept in one place because every program here makes them:
  1. Wrong input ends in one line (file, line or flag; what was found; what was expected) and exit status 2.
  2. Files are written under another name, flushed to disk and renamed: a killed run leaves the old file or the new
     one. The next program that writes into the folder removes the half-written rest.
  3. Input is JSON, parquet or safetensors, read strictly: no pickle, no NaN, no duplicate keys, no endless line.
  4. A program that appends a row per question goes on where it was killed (`finished_rows`, `appended`).
"""
import argparse
import atexit
import contextlib
import ctypes
import errno
import gzip
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import socket
import sys
import zlib
from collections import Counter
from pathlib import Path

MAX_JSON_BYTES = 64 << 20  # a tokenizer.json has 17 MB, a training row a few KB: a larger file is none that we read
DISK_FAILS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # full, over a quota or a size limit, broken
FAILS = (*DISK_FAILS, errno.ENOMEM, errno.EMFILE, errno.ENFILE)  # memory or open files ran out: no wrong input
BOM = b"\xef\xbb\xbf"  # the byte order mark, which some editors and spreadsheets put in front of UTF-8

# every answer and every model card carries this
DISCLAIMER = "Research use only. Not medical advice: do not act on it without a physician."


class InputError(ValueError):
    """The user's input is wrong. The message is one line: file, line or flag; what was found; what was expected."""


def run_main(main):
    """Calls `main()` and exits: 0 done, 2 the input is wrong, 1 it failed, 130 interrupted, 143 terminated."""
    def terminated(signum, frame):
        raise SystemExit(128 + signum)  # unwinds through every `finally`: weights are restored, files closed
    signal.signal(signal.SIGTERM, terminated)
    for stream in (sys.stdout, sys.stderr):  # an ASCII terminal shows an arrow as \\u2192 and the program goes on
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main() or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our stdout left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (InputError, OSError) as error:
        print("error:", one_line(error), file=sys.stderr)
        sys.exit(1 if getattr(error, "errno", None) in FAILS else 2)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # of CUDA
                or "DefaultCPUAllocator" in str(error)):
            raise
        print("error: out of memory", file=sys.stderr)
        sys.exit(1)


def resident(field):
    """Bytes of main memory that this process holds ("VmRSS") or has held at most ("VmHWM").

    macOS reports the second for both; Windows reports neither, which gives 0.
    """
    try:
        return int(Path("/proc/self/status").read_text(encoding="utf-8").split(field + ":")[1].split()[0]) * 1024
    except (OSError, IndexError):
        try:
            import resource
        except ImportError:  # Windows
            return 0
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def one_line(error):
    """The message of an exception without line breaks; `No such file or directory: PATH` for an OSError."""
    if isinstance(error, OSError) and error.strerror:
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{names}: {error.strerror}" if names else error.strerror
    return " ".join(str(error).split())


class Parser(argparse.ArgumentParser):
    """argparse that raises its errors as InputError and takes a flag by its whole name only."""

    def __init__(self, **settings):
        super().__init__(**{"allow_abbrev": False, **settings})

    def error(self, message):
        raise InputError(message)

    def flag(self, name, text, default=None, *, says=None, **more):
        """add_argument whose help ends with the default, or with `says` in its place, unless the flag is required."""
        shown = "" if default is None or more.get("required") else f" (default: {default if says is None else says})"
        self.add_argument(name, default=default, help=text + shown, **more)


def whole(least, most=2**63 - 1):
    """An argparse type: a whole number of at least `least` that fits 64 bits."""
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number of at least {least}"
                                             + (" that fits 64 bits" if value > most else ""))
        return value
    return parse


def number(least, most=float("inf"), open_end=False):
    """An argparse type: a finite number from `least` (above it with `open_end`) to `most`."""
    def parse(text):
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (least < value if open_end else least <= value) or not value <= most or value == float("inf"):
            upto = f" to {most}" if most < float("inf") else ""
            raise argparse.ArgumentTypeError(
                f"found {text!r}, expected a number {'above' if open_end else 'from'} {least}{upto}")
        return value
    return parse


# ----- reading -------------------------------------------------------------------------------------------------------

def require_dir(directory, what):
    """`directory` as a Path; InputError if it is no folder. `what` says whose folder was expected."""
    directory = Path(directory)
    if not directory.is_dir():
        found = "is a file" if directory.exists() else "does not exist"
        raise InputError(f"{directory}: {found}; expected the folder of {what}")
    return directory


def parse_json(text, where, strict=True):
    """Strict JSON: refuses NaN and Infinity, duplicate keys, and nesting deep enough to exhaust the stack; with
    `strict` control characters in a text, such as a line break, too."""
    def refuse_constant(name):
        raise ValueError(f"{name} is not JSON")

    def finite(text):
        value = float(text)
        if math.isinf(value):
            raise ValueError(f"{text} is too large")
        return value

    def unique(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = Counter(key for key, _ in pairs)
            raise ValueError(f"the key {next(key for key in keys if keys[key] > 1)!r} stands twice")
        return found
    try:
        return json.loads(text, parse_constant=refuse_constant, parse_float=finite, object_pairs_hook=unique,
                          strict=strict)
    except RecursionError:
        raise InputError(f"{where}: nested too deeply; expected plain JSON") from None
    except ValueError as error:
        raise InputError(f"{where}: not valid JSON ({one_line(error)})") from None


def read_text(path, where=None):
    """The text of a UTF-8 file, without a byte order mark; an InputError names it by `where`, else by its path."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{where or path}: not UTF-8 text (byte {error.start})") from None


def read_json(path, expect=dict):
    """The JSON value in the file `path`; it must be of the type `expect`."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a JSON file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InputError(f"{path}: {path.stat().st_size:,} bytes; expected JSON of at most {MAX_JSON_BYTES:,}"
                         + (", or one object a line" if expect is list else ""))
    value = parse_json(read_text(path), path)
    if not isinstance(value, expect):
        raise InputError(f"{path}: found a JSON {type(value).__name__}, expected a {expect.__name__}")
    return value


def read_json_if_there(path):
    """The JSON object in the file `path`, or {} if there is no such file."""
    return read_json(path) if Path(path).exists() else {}


def read_jsonl(path, max_line_bytes=16 << 20):
    """Yields (line number, dict or InputError) for every non-blank line of a .jsonl or .jsonl.gz file.

    A wrong line is yielded as the InputError that describes it, so that the caller decides between stopping
    (`raise row`) and counting it. Never holds more than `max_line_bytes` of one line in memory.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}; expected a .jsonl file")
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        number = 0

        def read(most):
            try:
                return file.readline(most)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise InputError(f"{path}: damaged gzip file after line {number} ({one_line(error)})") from None
        while line := read(max_line_bytes + 1):
            number += 1
            line = line.removeprefix(BOM)  # of any line, because files are concatenated
            if len(line) > max_line_bytes:
                yield number, InputError(f"{path}:{number}: a line of more than {max_line_bytes:,} bytes; "
                                         "expected one JSON object a line")
                while line and not line.endswith(b"\n"):
                    line = read(1 << 20)
            elif line.strip():
                yield number, parse_row(line, f"{path}:{number}")


def parse_row(line, where):
    """One line of a jsonl file as a dict, or the InputError that says what is wrong with it."""
    try:
        row = parse_json(line.decode("utf-8"), where)
    except UnicodeDecodeError as error:
        return InputError(f"{where}: not UTF-8 text (byte {error.start} of the line)")
    except InputError as error:
        return error
    return row if isinstance(row, dict) else InputError(f"{where}: found {type(row).__name__}, expected a JSON object")


def read_data(path):
    """Yields (row number, where, dict or InputError) for every row of a data file; `where` names the row in messages.

    The content decides the format: JSON lines (where: "a.jsonl:3"; see `read_jsonl`), a JSON array, which is read
    whole, or parquet, which is read in batches (both "a.json: row 3", counted from 1).
    """
    path, beginning = Path(path), b""
    if path.is_file():
        with contextlib.suppress(OSError, EOFError, zlib.error), \
                gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            beginning = file.read(4096).removeprefix(BOM)  # a file that cannot be read is left to read_jsonl
    if (beginning and path.suffix == ".parquet") or beginning.startswith(b"PAR1"):
        rows = read_parquet(path)
    elif re.match(rb"\s*\[\s*\{", beginning):
        if path.suffix == ".gz":
            raise InputError(f"{path}: a JSON array in .gz; expected it unpacked, or one JSON object a line")
        rows = read_json(path, expect=list)
    else:
        yield from ((number, f"{path}:{number}", row) for number, row in read_jsonl(path))
        return
    for number, row in enumerate(rows, 1):
        where = f"{path}: row {number}"
        yield number, where, row if isinstance(row, dict) else InputError(
            f"{where}: found {type(row).__name__}, expected a JSON object")


def read_parquet(path):
    """Yields the rows of a parquet file as dicts of JSON's types: NaN, a missing number, becomes None, a date text."""
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{path}: found no pyarrow to read parquet; expected pip install -e '.[parquet]'") from None
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    yield json.loads(json.dumps(row, default=str), parse_constant=lambda name: None)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable parquet file ({one_line(error)})") from None


def finished_rows(path, begins_with):
    """Yields (line number, row) of every complete row that a run has appended to `path`; none if there is no such file.

    A last line that a kill has cut short is passed over if it begins as every row does, with the bytes `begins_with`.
    InputError for a file that holds anything else.
    """
    if not Path(path).exists():
        return
    lines, n_bytes = complete_lines(path)
    with open(path, "rb") as file:
        file.seek(n_bytes)
        tail = file.read(len(begins_with))
    if not begins_with.startswith(tail):
        raise InputError(f"{path}:{lines + 1}: found something else than answers; expected a new name for --out")
    for line, row in read_jsonl(path):
        if line > lines:
            return
        if isinstance(row, InputError):
            raise row
        yield line, row


@contextlib.contextmanager
def appended(path):
    """`with appended(path) as append:` append(row) adds a dict to a jsonl file and returns once it is on the disk.
    A half-written last line is cut off: call `finished_rows` first, which refuses a foreign file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with naming(path), open(path, "ab") as file:
        file.truncate(complete_lines(path)[1])

        def append(row):  # half a character, as in a file's name that is not UTF-8, becomes JSON's escape
            file.write(json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        yield append


def complete_lines(path):
    """(the number of lines in a file that end in a newline, their bytes)."""
    lines = n_bytes = 0
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                lines, n_bytes = lines + 1, n_bytes + len(line)
    return lines, n_bytes


def sha256(path):
    """The SHA-256 of a file as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ----- one writer at a time ------------------------------------------------------------------------------------------

HELD = {}  # {path: its open lock file} of all paths that `hold` has locked


def hold(path):
    """Locks the file or folder that a run will write, until this process ends. InputError if another has locked it.

    The lock is on the file .NAME.lock beside it, which names this process for that error. On a disk without locks the
    run goes on after a warning.
    """
    path = Path(os.path.realpath(path))
    if not path.name:
        raise InputError(f"{path}: found no name to write to; expected the path of a new file or folder")
    if path in HELD:
        return
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, holder = path.with_name(f".{path.name}.lock"), ""
    try:
        file, has_lock = locked(lock)
    except BlockingIOError:
        with contextlib.suppress(FileNotFoundError):
            holder = lock.read_text(encoding="utf-8").strip()
        raise InputError(f"{path}: {holder or 'another process'} is writing there; expected another place, or that one "
                         "ended") from None
    if not has_lock:
        print(f"{path}: the disk has no locks that would keep other runs away", file=sys.stderr)
    HELD[path] = file
    atexit.register(release, path, lock, os.getpid(), made)
    with naming(lock):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()


def release(path, lock, pid, made=False):
    """Removes the lock file of `path` and frees the lock, and removes the folder if it was `made` for the lock and is
    empty. A fork of the process, which also exits by here, does nothing."""
    if os.getpid() == pid and path in HELD:
        lock.unlink(missing_ok=True)
        HELD.pop(path).close()
        if made:
            with contextlib.suppress(OSError):  # not empty
                lock.parent.rmdir()


def locked(path, wait=False):
    """Opens the file `path`, made if there is none, and locks it: (the open file, False if the disk has no locks).

    The kernel frees the lock when the file is closed or the process ends, however it ends. If another process has it:
    BlockingIOError, or with `wait` a wait until it is free.
    """
    while True:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115 (open as long as the lock is to last)
        try:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        except (ImportError, OSError):  # Windows, some network disks
            return file, False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file, True
        file.close()  # its holder has removed it between our open and our flock: try again with a new file

# ----- writing -------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def naming(path):
    """Inside, an error of the disk is raised as one of `path`: a failed write names no file, or the one aside."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FAILS:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


@contextlib.contextmanager
def written_aside(path):
    """`with written_aside(path) as aside:` write a file or folder to `aside`; on leaving the block it becomes `path`.

    Its files get the mode of any new file and all is flushed to disk before one rename puts it in place (`exchange`, if
    `path` is a folder already). A symbolic link stays: the place that it points to is written. On an exception `path`
    stays as it was and `aside` is removed. After a kill `aside` is left, and the next call for any name in this folder
    removes it. InputError for a path without a name; OSError names `path` when the disk is full.
    """
    if Path(path).name in ("", ".."):
        raise InputError(f"{path}: found no name to write to; expected the path of a new file or folder")
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_scraps(target.parent)
    aside = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    with naming(path), contextlib.ExitStack() as stack:
        mode = stack.enter_context(marked_as_living(aside))
        stack.callback(remove, aside)
        yield aside
        share(aside, mode)
        flush(aside)
        if target.is_dir() and aside.is_dir():
            exchange(aside, target)
        else:
            os.replace(aside, target)
        flush(target.parent, recursive=False)


@contextlib.contextmanager
def marked_as_living(aside):
    """Locks the file `aside`.lock during the block, so that no `clear_scraps` removes `aside`; yields the mode of that
    new file. A process id would not do, because ids repeat in containers and on hosts that share a disk."""
    lock = aside.with_name(f"{aside.name}.lock")
    try:
        with locked(lock, wait=True)[0] as file:  # wait for a clear_scraps that looks at it
            yield os.fstat(file.fileno()).st_mode & 0o777
    finally:
        if not os.path.lexists(aside):  # else a second signal struck in the removal, which the next program repeats
            lock.unlink(missing_ok=True)


def clear_scraps(folder):
    """Removes what killed processes have left half written in `folder`, except on a disk without locks."""
    for lock in folder.glob(".*.partial-*.lock"):
        with contextlib.suppress(OSError):  # a living process has the lock, or another user owns the file
            file, has_lock = locked(lock)
            with file:
                if has_lock:
                    remove(lock.with_suffix(""))
                    lock.unlink()


def share(path, mode):
    """Sets the mode of every file under `path`, because safetensors makes files that only their owner may read."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and file.stat().st_mode & 0o777 != mode:
            file.chmod(mode)


def write_json(path, value):
    """Writes `value` as indented JSON, aside and renamed."""
    with written_aside(path) as aside:
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")  # as in `appended`


def remove(path):
    """Deletes a file or a whole folder; one that is not there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path, recursive=True):
    """fsync of a file, or of a folder and (recursive) all that is in it."""
    if recursive and path.is_dir():
        for child in path.iterdir():
            flush(child)
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def exchange(new, old):
    """Puts the folder `new` in the place of `old`, by one swap where Linux can, else (also on NFS) by three renames."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 and renameat2(-100, os.fsencode(new), -100, os.fsencode(old), 2) == 0:  # AT_FDCWD, RENAME_EXCHANGE
        return
    spare = new.with_name(f"{new.name}.old")
    try:
        os.rename(old, spare)
        os.rename(new, old)
    finally:  # a failure or a signal on the way puts the old one back
        if spare.exists():
            os.rename(spare, new if old.exists() else old)

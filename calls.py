"""A call to a model that writes data, what counts as its reply, the store in which none is lost, and batch files.

    key = sha256(model, messages, parameters, schema)
    a text that ended is a reply; one that was cut is asked again with more room, wrong JSON once with its fault
    a reply that is stored is never paid again

teachers.py asks. `python synth.py export-batch` and `import-batch` write and read the batch files, so that an engine
such as vLLM can answer millions of calls at once. Extra `synth`: jsonschema.

    store = Store("runs/synth/calls.sqlite")
    store.put(Reply(key_of("qwen", call), "Yes."))
"""
import contextlib
import hashlib
import json
import os
import re
import sqlite3
import threading
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from files import InputError, one_line, parse_json, read_jsonl, written_aside
from messages import check_messages

MAX_REPLY_BYTES = 16 << 20  # a reply of 8,192 tokens has 40 KB
MORE_ROOM = 1  # how often a cut reply is asked again with twice the room: a poor teacher fills any
THINKING = 4096  # tokens more for one that was cut in its thought
ENDED = ("stop", "eos_token", None)  # the finish reasons of a whole reply; some servers give none
OURS = ("model", "messages", "stream", "n", "response_format", "tools")  # parameters that are no caller's
UNFINISHED = "imported, but not usable as it is; to be asked again"


@dataclass(frozen=True)
class Call:
    """One question to a teacher. `parameters` are the API's (temperature, max_tokens, seed, …); `schema` is the JSON
    schema of the reply, None for text."""
    messages: tuple
    parameters: dict = field(default_factory=dict)
    schema: dict | None = None


@dataclass(frozen=True)
class Reply:
    """What a teacher said to a call, or why it said nothing usable. `usage` counts all requests of the call."""
    key: str
    text: str | None = None  # None: failed
    thought: str | None = None  # the reasoning, if the server gives it apart
    value: object = None  # the parsed JSON, if there was a schema
    finish_reason: str | None = None
    usage: dict = field(default_factory=dict)  # prompt_tokens, completion_tokens
    repaired: bool = False  # asked again because the JSON was wrong
    failure: str | None = None  # one line


def canonical(value):
    """`value` as JSON text that does not depend on the order of keys. InputError for what JSON cannot hold."""
    try:
        text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        text.encode()  # a ValueError for half a character
        return text
    except (TypeError, ValueError) as error:
        raise InputError(f"a call holds a value that is not JSON ({one_line(error)}); expected texts, numbers, "
                         "lists and objects") from None


def key_of(model, call):
    """The key of a call: 64 hexadecimal digits that model, messages, parameters and schema decide, nothing else."""
    check_messages(list(call.messages))
    if wrong := [name for name in OURS if name in call.parameters]:
        raise InputError(f"a call has the parameter {wrong[0]!r}; expected none of {', '.join(OURS)}")
    if call.schema is not None:
        validator(canonical(call.schema))
    return hashlib.sha256(canonical([model, call.messages, call.parameters, call.schema]).encode()).hexdigest()

# ----- the store -----------------------------------------------------------------------------------------------------


class Store:
    """An append-only file of replies, shared by threads and processes: the last reply under a key counts.

    It is SQLite, flushed to the disk at each `put`: 2,700 replies a second in groups of 32. A jsonl file is as safe and
    takes twice as many, more than any server gives; but it holds its keys in memory, and is read whole at each start.
    """

    def __init__(self, path):
        self.path, self.lock = Path(path), threading.Lock()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.db = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            version = self.db.execute("PRAGMA user_version").fetchone()[0]
            foreign = version == 0 and self.db.execute("SELECT 1 FROM sqlite_schema").fetchone()
            if foreign or version not in (0, 1):
                raise InputError(f"{path}: found another program's database; expected a store of calls, or a new name")
            for line in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", "PRAGMA user_version = 1",
                         "CREATE TABLE IF NOT EXISTS replies (id INTEGER PRIMARY KEY, key TEXT, reply TEXT)",
                         "CREATE INDEX IF NOT EXISTS keys ON replies (key)"):
                self.db.execute(line)
        except sqlite3.DatabaseError as error:
            raise InputError(f"{path}: {one_line(error)}; expected a store of calls, or a new name") from None

    def get(self, key):
        """The Reply under `key`, None if there is none."""
        with self.lock, self.as_os_error():
            row = self.db.execute("SELECT reply FROM replies WHERE key = ? ORDER BY id DESC LIMIT 1", (key,)).fetchone()
        return Reply(**json.loads(row[0])) if row else None

    def put(self, *replies):
        """Appends replies and returns once they are on the disk: all of them, or after a kill none."""
        rows = [(reply.key, json.dumps(asdict(reply), ensure_ascii=False).encode(errors="backslashreplace").decode())
                for reply in replies]  # half a character becomes JSON's escape
        with self.lock, self.as_os_error():
            self.db.execute("BEGIN IMMEDIATE")
            with self.db:
                self.db.executemany("INSERT INTO replies (key, reply) VALUES (?, ?)", rows)

    def close(self):
        self.db.close()

    @contextlib.contextmanager
    def as_os_error(self):
        try:
            yield
        except sqlite3.OperationalError as error:  # the disk is full, another process holds the file
            raise OSError(f"{self.path}: {one_line(error)}") from None

# ----- what counts as a reply ----------------------------------------------------------------------------------------


def redact(value):
    """A text, or a JSON value, in which the key of OPENAI_API_KEY reads [key]: a server may echo it."""
    key = api_key()
    if len(key) < 6:  # "EMPTY" and the like, which servers that want no key are given, are no secrets
        return value
    if isinstance(value, str):
        return value.replace(key, "[key]")
    if isinstance(value, dict):
        return {redact(name): redact(one) for name, one in value.items()}
    return [redact(one) for one in value] if isinstance(value, list) else value


def api_key():
    return os.environ.get("OPENAI_API_KEY", "").strip()


def failed(key, why):
    """The Reply that says in one short line why there is none."""
    return Reply(key, failure=one_line(redact(why))[:500])  # redacted first: half a key is one too


def dialogue(key, call, counts):
    """A generator that decides what counts as the reply to a call: yields (messages, parameters) to ask with, is sent
    the Reply that this gave, and returns the call's Reply.

        a text that ended            is the reply; with a schema, if its JSON fits
        a text that was cut          is asked again with twice the room, MORE_ROOM times; in its thought, with more
        JSON that is wrong           is shown to the teacher with the fault, once
    """
    messages, parameters, repaired, cuts, usage = list(call.messages), dict(call.parameters), False, 0, Counter()
    while True:
        answer = yield messages, parameters
        limit = next((name for name in ("max_completion_tokens", "max_tokens") if parameters.get(name)), "max_tokens")
        room = parameters.get(limit) or answer.usage.get("completion_tokens") or 1024
        usage.update(answer.usage)
        answer = replace(answer, usage=dict(usage), repaired=repaired)

        def give_up(why, answer=answer):
            return replace(answer, text=None, failure=failed(key, why).failure)
        if answer.failure:
            return give_up(("cut by length, then " if cuts else "") + answer.failure)
        if answer.finish_reason == "length":
            if cuts == MORE_ROOM:
                return give_up(f"cut by length at {room:,} tokens")
            counts["cut"] += 1
            thinks = answer.thought if not answer.text else "<think>" in answer.text and "</think>" not in answer.text
            cuts, parameters = cuts + 1, {**parameters, limit: 2 * room + (THINKING if thinks else 0)}
        elif answer.finish_reason not in ENDED:
            return give_up(f"finish_reason {answer.finish_reason!r}")
        elif not answer.text.strip():
            return give_up("an empty reply")
        elif call.schema is None:
            return answer
        else:
            try:
                found = json_in(answer.text, call.schema)
            except InputError as error:
                if repaired:
                    return give_up(error)
                repaired = True
                messages += [{"role": "assistant", "content": answer.text}, {"role": "user", "content": (
                    f"This cannot be used: {error}. Answer again, with JSON alone that fits this schema: "
                    f"{json.dumps(call.schema, ensure_ascii=False)}")}]
                continue
            return with_value(answer, found)


def with_value(reply, found):
    """The Reply with the JSON value that was found in its text, where JSON's escapes may have hidden the key."""
    value = redact(found)
    return replace(reply, value=value, text=reply.text if value == found else json.dumps(value))


def json_in(text, schema=None):
    """The JSON value of a reply, which may stand behind a thought, in a fence or among words. InputError says in one
    line why there is none, or why it does not fit the schema."""
    text = text.rpartition("</think>")[2].strip()
    fenced = text.split("```")[1:2]  # by hand: patterns take quadratic time on a text that opens and never closes
    starts, end = [i for i in (text.find("["), text.find("{")) if i >= 0], max(text.rfind("]"), text.rfind("}")) + 1
    for one in (text, *(part.removeprefix("json") for part in fenced), *(text[i:end] for i in sorted(starts))):
        try:
            value = parse_json(one, "the reply", strict=False)  # models, and grammars, break lines in a text
            break
        except InputError as error:
            wrong = error
    else:
        raise wrong
    if schema is not None:
        import jsonschema
        fault = jsonschema.exceptions.best_match(validator(canonical(schema)).iter_errors(value))
        if fault:
            at = "".join(f"[{part!r}]" for part in fault.absolute_path)
            raise InputError(f"the reply{at} does not fit the schema ({one_line(fault.message)[:200]})")
    return value


@lru_cache(maxsize=64)
def validator(schema):
    """The validator of a JSON schema, given as canonical text; no reference in it is looked up on the net."""
    try:
        import jsonschema
        import referencing
    except ImportError:
        raise InputError("found no jsonschema to check replies; expected pip install -e '.[synth]'") from None
    schema = json.loads(schema)
    try:
        kind = jsonschema.validators.validator_for(schema)
        kind.check_schema(schema)
        return kind(schema, registry=referencing.Registry())
    except (jsonschema.SchemaError, AttributeError, TypeError) as error:
        raise InputError(f"not a JSON schema ({one_line(getattr(error, 'message', error))})") from None


def read_completion(key, body):
    """The Reply in a chat completion, a dict as OpenAI's API gives it. ValueError if it is none."""
    try:
        choice, usage = body["choices"][0], body.get("usage") or {}
        said, usage = choice["message"], {name: usage[name] for name in ("prompt_tokens", "completion_tokens")
                                          if type(usage.get(name)) is int and 0 <= usage[name] < 1 << 40}
        texts = [said.get(name) for name in ("content", "reasoning", "reasoning_content")]
        text, *thoughts = [one.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # half characters: U+FFFD
                           if isinstance(one, str) else "" for one in texts]
        return Reply(key, redact(text), redact(thoughts[0] or thoughts[1]) or None,
                     finish_reason=redact(choice.get("finish_reason")), usage=usage)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("found no chat completion") from None


def response_format(schema, form="json_schema"):
    """The parameter by which a server is given a schema: OpenAI's form, or the one that llama-cpp-python takes."""
    if form == "json_object":
        return {"type": "json_object", "schema": schema}
    return {"type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": schema}}

# ----- batch files ---------------------------------------------------------------------------------------------------


def export_batch(calls, path, model):
    """Writes calls as a batch file of OpenAI's, which `vllm run-batch` reads; returns how many, each key once."""
    written = set()
    with written_aside(path) as aside, open(aside, "w", encoding="utf-8") as file:
        for call in calls:
            key, asks_json = key_of(model, call), call.schema is not None
            if (short := bytes.fromhex(key)) in written:
                continue
            written.add(short)
            body = {"model": model, "messages": list(call.messages), **call.parameters,
                    **({"response_format": response_format(call.schema)} if asks_json else {})}
            row = {"custom_id": key + ".json" * asks_json, "method": "POST", "url": "/v1/chat/completions",
                   "body": body}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return len(written)


def import_batch(path, store):
    """Stores the replies in a batch's output file; returns how many are "stored", "unfinished", "failed" and "known".

    An unfinished reply, cut or with wrong JSON, is stored with the failure UNFINISHED: `Teacher.ask` goes on from it.
    Failed requests are left out, so that they are asked. InputError for a line that is none of a batch.
    """
    counts, batch = Counter(), []
    for number, row in read_jsonl(path, max_line_bytes=2 * MAX_REPLY_BYTES):
        if isinstance(row, InputError):
            raise row
        key, _, kind = str(row.get("custom_id")).partition(".")
        if not re.fullmatch("[0-9a-f]{64}", key) or kind not in ("", "json"):
            raise InputError(f"{path}:{number}: found the custom_id {str(row.get('custom_id'))[:80]!r}; expected one "
                             "that export_batch wrote")
        stored = store.get(key)
        try:
            if stored and not stored.failure:
                counts["known"] += 1
                continue
            if row["response"]["status_code"] != 200:
                raise ValueError
            reply = read_completion(key, row["response"]["body"])
        except (ValueError, KeyError, TypeError):
            counts["failed"] += 1
            continue
        try:
            if reply.finish_reason not in ENDED or not reply.text.strip():
                raise InputError(UNFINISHED)
            reply = with_value(reply, json_in(reply.text)) if kind else reply
        except InputError:
            reply = replace(reply, failure=UNFINISHED)
        counts["unfinished" if reply.failure else "stored"] += 1
        batch.append(reply)
        if len(batch) == 256:
            store.put(*batch)
            batch = []
    store.put(*batch)
    return dict(counts)

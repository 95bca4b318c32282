"""The keys of calls, the JSON in replies, the store and the batch files."""
import json
import os
import signal
import sqlite3
import sys
import threading

import pytest

import calls
from calls import (
    UNFINISHED,
    Call,
    Reply,
    Store,
    export_batch,
    failed,
    import_batch,
    json_in,
    key_of,
    read_completion,
    redact,
)
from files import InputError

pytest.importorskip("jsonschema", reason="no jsonschema: pip install -e '.[synth]'")
HI = ({"role": "user", "content": "Hi"},)
SCHEMA = {"type": "object", "properties": {"score": {"type": "integer"}}, "required": ["score"]}


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "deep/calls.sqlite")
    yield store
    store.close()

# ----- calls ----------------------------------------------------------------------------------------------------------


def test_the_key_is_a_hash_of_model_messages_parameters_and_schema():
    call = Call(({"role": "user", "content": "Grüße"},), {"temperature": 0.5, "seed": 1}, {"type": "object"})
    text = ('["m",[{"content":"Grüße","role":"user"}],{"seed":1,"temperature":0.5},{"type":"object"}]')
    import hashlib
    assert key_of("m", call) == hashlib.sha256(text.encode()).hexdigest()
    other_order = Call(({"content": "Grüße", "role": "user"},), {"seed": 1, "temperature": 0.5}, {"type": "object"})
    assert key_of("m", other_order) == key_of("m", call)
    others = [key_of("n", call), key_of("m", Call(call.messages, call.parameters)),
              key_of("m", Call(call.messages, {"seed": 1}, call.schema)),
              key_of("m", Call(HI, call.parameters, call.schema))]
    assert len({key_of("m", call), *others}) == 5


@pytest.mark.parametrize("call, why", [
    (Call(HI, {"stream": True}), "parameter 'stream'"), (Call(HI, {"n": 2}), "parameter 'n'"),
    (Call(HI, {"temperature": float("nan")}), "not JSON"), (Call(HI, {"seed": {1}}), "not JSON"),
    (Call(({"role": "user", "content": "a\ud83d"},)), "not JSON .*surrogates not allowed"),
    (Call(()), "no messages"), (Call(({"role": "user"},)), "message 1"),
    (Call(HI, schema={"type": "objekt"}), "not a JSON schema"), (Call(HI, schema=["type"]), "not a JSON schema")])
def test_a_call_that_cannot_be_asked_is_refused(call, why):
    with pytest.raises(InputError, match=why):
        key_of("m", call)


@pytest.mark.parametrize("text, value", [
    ('{"score": 1}', {"score": 1}), (' \n{"score": 1}\n', {"score": 1}), ('```json\n{"score": 1}\n```', {"score": 1}),
    ('```\n{"score": 1}\n``` as you asked', {"score": 1}), ('Here it is: {"score": 1}. Good?', {"score": 1}),
    ('<think>{"score": 5} or [2]?</think>\n{"score": 1}', {"score": 1}), ("[1, 2]", [1, 2]), ("7", 7),
    ('{"a": "```"}', {"a": "```"}), ('Given [x]: {"score": 1}', {"score": 1}),
    ('{"a": "1\n\t2"}', {"a": "1\n\t2"})])
def test_json_is_found_in_what_a_model_writes_around_it(text, value):
    assert json_in(text) == value


@pytest.mark.parametrize("text", ["", "no", '{"score": 1', '{"score": NaN}', '{"score": 1, "score": 2}', "{'score': 1}",
                                  '{"score": 1}{"score": 2}', "[" * 100_000, "```" + " " * 100_000,
                                  "```" * 50_001, "{" * 99_999 + "]", '{"score": ' + "9" * 5000 + "}"])
def test_what_is_no_json_is_refused_in_one_line(text):
    with pytest.raises(InputError) as error:
        json_in(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_the_schema_decides_and_its_references_stay_here(monkeypatch):
    assert json_in('{"score": 1}', SCHEMA) == {"score": 1}
    with pytest.raises(InputError, match=r"reply\['score'\] does not fit the schema \('a' is not of type 'integer'\)"):
        json_in('{"score": "a"}', SCHEMA)
    with pytest.raises(InputError) as error:
        json_in(json.dumps({"score": "a" * 5000}), SCHEMA)
    assert len(str(error.value)) < 300
    asked = []
    monkeypatch.setattr("urllib.request.urlopen", lambda *given, **_: asked.append(given))
    with pytest.raises(Exception, match="Unresolvable"):
        json_in("{}", {"$ref": "http://127.0.0.1:1/schema.json"})
    assert not asked


def test_the_key_is_redacted_in_all_of_a_value(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", " sk-abcdef ")
    assert redact({"sk-abcdef": ["a sk-abcdef.", 1, None, {"b": "sk-abcdef" * 2}]}) == {
        "[key]": ["a [key].", 1, None, {"b": "[key][key]"}]}
    assert failed("k", "x" * 494 + "sk-abcdef\nb").failure == "x" * 494 + "[key] "
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    assert redact("EMPTY") == "EMPTY"


@pytest.mark.parametrize("body", [{}, [], None, {"choices": []}, {"choices": [{"message": None}]}, {"choices": [3]},
                                  {"choices": {"0": 1}}, {"choices": [{}], "usage": {}}])
def test_what_is_no_completion_is_refused(body):
    with pytest.raises(ValueError, match="no chat completion"):
        read_completion("k", body)


def test_half_a_character_becomes_the_replacement_character():
    reply = read_completion("k", {"choices": [{"message": {"content": "a\ud83db\ud83d\ude00", "reasoning": "\udc00"}}]})
    assert (reply.text, reply.thought) == ("a\ufffdb😀", "\ufffd")


def test_odd_fields_of_a_completion_are_left_out():
    body = {"usage": {"prompt_tokens": "3", "completion_tokens": 4, "other": 5},
            "choices": [{"message": {"content": [1], "reasoning": {"a": 1}}}]}
    assert read_completion("k", body) == Reply("k", "", usage={"completion_tokens": 4})
    for wrong in (-1, 10 ** 400, True, 2.5):  # tokens are added up, and cost money
        body["usage"] = {"prompt_tokens": wrong, "completion_tokens": 0}
        assert read_completion("k", body).usage == {"completion_tokens": 0}

# ----- the store ------------------------------------------------------------------------------------------------------


def test_the_last_reply_under_a_key_counts_and_all_are_kept(store):
    one = Reply("a", "Grüße \ud83d ☤", "Hm.", {"x": [1, None]}, "stop", {"prompt_tokens": 1}, True)
    assert store.get("a") is None
    store.put(Reply("a", failure="no"), Reply("b", "B"))
    store.put(one)
    assert store.get("a") == one and store.get("b") == Reply("b", "B") and store.get("c") is None
    again = Store(store.path)
    assert again.get("a") == one and again.db.execute("SELECT count(*) FROM replies").fetchone() == (3,)
    again.close()


def test_each_put_is_flushed_to_the_disk_in_wal_mode(store):
    assert store.db.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert store.db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert store.db.execute("EXPLAIN QUERY PLAN SELECT reply FROM replies WHERE key = 'a' ORDER BY id DESC LIMIT 1"
                            ).fetchone()[3] == "SEARCH replies USING INDEX keys (key=?)"


def test_a_put_is_whole_or_not_at_all(store):
    store.put(Reply("a", "A"))
    with pytest.raises(TypeError):
        store.put(Reply("b", "B"), Reply("c", {1}))
    store.db.execute(f"PRAGMA max_page_count = {store.db.execute('PRAGMA page_count').fetchone()[0]}")
    with pytest.raises(OSError, match=r"calls.sqlite: database or disk is full"):
        store.put(*[Reply(str(i), "x" * 1000) for i in range(50)])
    assert store.db.execute("SELECT key FROM replies").fetchall() == [("a",)]
    store.db.execute("PRAGMA max_page_count = 1000000")
    store.put(Reply("b", "B"))
    assert store.get("b").text == "B"


def test_threads_and_processes_share_it(store):
    other = Store(store.path)
    threads = [threading.Thread(target=lambda n=n, one=one: [one.put(Reply(f"{n}-{i}", "x")) for i in range(10)])
               for n, one in enumerate((store, store, other))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(store.get(f"{n}-{i}") == other.get(f"{n}-{i}") == Reply(f"{n}-{i}", "x")
               for n in range(3) for i in range(10))
    other.close()


def test_a_killed_writer_has_lost_nothing_that_was_put(tmp_path):
    for after in (3, 17, 30):
        path, (read, write) = tmp_path / f"{after}.sqlite", os.pipe()
        if not (pid := os.fork()):
            store = Store(path)
            for i in range(10_000):
                store.put(Reply(str(i), "x" * 3000))
                os.write(write, b".")
        os.close(write)
        said = 0
        while said < after:
            said += len(os.read(read, after - said))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        said += len(os.read(read, 10_000))
        os.close(read)
        store = Store(path)
        assert all(store.get(str(i)) == Reply(str(i), "x" * 3000) for i in range(said))
        assert store.db.execute("SELECT count(*) FROM replies").fetchone()[0] in (said, said + 1)
        assert store.db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        store.close()


def test_another_file_is_no_store(tmp_path):
    (tmp_path / "text").write_text("This is no database. " * 100)
    with pytest.raises(InputError, match="text: file is not a database; expected a store of calls"):
        Store(tmp_path / "text")
    with sqlite3.connect(tmp_path / "other") as db:
        db.execute("CREATE TABLE a (b)")
    db.close()
    before = (tmp_path / "other").read_bytes()
    with pytest.raises(InputError, match="found another program's database"):
        Store(tmp_path / "other")
    assert (tmp_path / "other").read_bytes() == before
    with pytest.raises(InputError, match="unable to open"):
        Store(tmp_path)


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    calls.validator.cache_clear()
    with pytest.raises(InputError, match=r"expected pip install -e '\.\[synth\]'"):
        key_of("m", Call(HI, schema=SCHEMA))

# ----- batch files ----------------------------------------------------------------------------------------------------


def output(key, text="A", finish="stop", status=200, error=None):
    body = {"choices": [{"message": {"content": text}, "finish_reason": finish}], "usage": {"completion_tokens": 5}}
    return {"id": "x", "custom_id": key, "response": {"status_code": status, "request_id": "y", "body": body},
            "error": error}


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_batch_file_has_openais_shape_and_each_call_once(tmp_path):
    text, scored = Call(HI, {"max_tokens": 5}), Call(HI, {"max_tokens": 5}, SCHEMA)
    assert export_batch(iter([text, scored, text]), tmp_path / "batch.jsonl", "qwen") == 2
    rows = [json.loads(line) for line in (tmp_path / "batch.jsonl").read_text().splitlines()]
    body = {"model": "qwen", "messages": list(HI), "max_tokens": 5}
    assert rows == [
        {"custom_id": key_of("qwen", text), "method": "POST", "url": "/v1/chat/completions", "body": body},
        {"custom_id": key_of("qwen", scored) + ".json", "method": "POST", "url": "/v1/chat/completions",
         "body": {**body, "response_format": {"type": "json_schema", "json_schema": {
             "name": "reply", "strict": True, "schema": SCHEMA}}}}]


def test_an_export_that_fails_leaves_no_file(tmp_path):
    with pytest.raises(InputError):
        export_batch([Call(HI), Call(())], tmp_path / "batch.jsonl", "m")
    assert list(tmp_path.iterdir()) == []


def test_replies_of_a_batch_are_stored_by_their_key(tmp_path, store):
    keys = [key_of("m", Call(HI, {"seed": i})) for i in range(9)]
    store.put(Reply(keys[6], "known"), Reply(keys[7], failure="500"))
    rows = [output(keys[0]), output(keys[1] + ".json", 'So: {"score": 1}'), output(keys[2], "c", "length"),
            output(keys[3] + ".json", '{"score": '), output(keys[4], status=500), output(keys[5], text=""),
            output(keys[6], "other"), output(keys[7], "now"),
            {"custom_id": keys[8], "response": None, "error": {"code": "expired"}}]
    assert import_batch(written(tmp_path / "out.jsonl", rows), store) == {
        "stored": 3, "unfinished": 3, "failed": 2, "known": 1}
    used = {"completion_tokens": 5}
    assert [store.get(key) for key in keys] == [
        Reply(keys[0], "A", finish_reason="stop", usage=used),
        Reply(keys[1], 'So: {"score": 1}', value={"score": 1}, finish_reason="stop", usage=used),
        Reply(keys[2], "c", finish_reason="length", usage=used, failure=UNFINISHED),
        Reply(keys[3], '{"score": ', finish_reason="stop", usage=used, failure=UNFINISHED), None,
        Reply(keys[5], "", finish_reason="stop", usage=used, failure=UNFINISHED), Reply(keys[6], "known"),
        Reply(keys[7], "now", finish_reason="stop", usage=used), None]


def test_a_large_batch_is_stored_whole(tmp_path, store):
    keys = [key_of("m", Call(HI, {"seed": i})) for i in range(600)]
    assert import_batch(written(tmp_path / "out.jsonl", map(output, keys)), store) == {"stored": 600}
    assert all(map(store.get, keys))


@pytest.mark.parametrize("row, why", [({"custom_id": "request-1"}, "custom_id 'request-1'"), ({}, "custom_id 'None'"),
                                      (output("0" * 64 + ".xml"), "custom_id"), ([], "found list")])
def test_a_line_of_another_file_is_named(tmp_path, store, row, why):
    path = written(tmp_path / "out.jsonl", [output("0" * 64), row])
    with pytest.raises(InputError, match=r"out.jsonl:2: .*" + why):
        import_batch(path, store)

"""Teachers against a scripted server on loopback, which refuses, hangs, drips, cuts, echoes and lies."""
import asyncio
import contextlib
import itertools
import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import ROOT, Scripted, completion

import teachers
from calls import Call, Reply, Store, export_batch, import_batch, key_of
from files import InputError, resident
from teachers import Teacher

pytest.importorskip("openai", reason="no openai: pip install -e '.[synth]'")
SECRET = "sk-secret-0123456789abcdef"
SCHEMA = {"type": "object", "properties": {"score": {"type": "integer", "maximum": 10}}, "required": ["score"],
          "additionalProperties": False}


def ask(text, schema=None, **parameters):
    return Call(({"role": "user", "content": text},), parameters, schema)


@pytest.fixture
def server():
    server = Scripted()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C raises, as in a terminal: a shell's background jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "calls.sqlite")
    yield store
    store.close()


@pytest.fixture
def opened(server, store, monkeypatch):
    """Opens a Teacher at the server, with short pauses, and closes it afterwards."""
    monkeypatch.setattr(teachers, "BACKOFF", (0.01, 0.04))
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    made = []

    def opened(**settings):
        made.append(Teacher.open(server.url, store, **{"model": "m", "timeout": 5, "patience": 10, **settings}))
        return made[-1]
    yield opened
    for teacher in made:
        teacher.close()


def answers(teacher, *given):
    return [reply for _, reply in sorted(teacher.ask(given), key=lambda pair: pair[0])]


def test_replies_come_with_their_numbers_and_are_stored(server, store, opened):
    teacher = opened()
    found = dict(teacher.ask(ask(str(i), temperature=0.5, top_k=3) for i in range(30)))
    assert {i: reply.text for i, reply in found.items()} == {i: f"to {i}" for i in range(30)}
    assert all(store.get(reply.key) == reply for reply in found.values())
    assert found[4] == Reply(key_of("m", ask("4", temperature=0.5, top_k=3)), "to 4", finish_reason="stop",
                             usage={"prompt_tokens": 3, "completion_tokens": 5})
    assert {"model": "m", "messages": [{"role": "user", "content": "4"}], "temperature": 0.5,
            "top_k": 3} in server.requests

# ----- what a server may do -------------------------------------------------------------------------------------------


def test_in_a_burst_of_refusals_nothing_is_sent_before_retry_after_and_the_limit_is_cut_once(server, opened):
    begin, times = time.monotonic(), []

    async def script(request, writer):
        times.append(time.monotonic() - begin)
        if times[-1] < times[0] + 0.2:
            return 429, {"retry-after": "0.3"}, {"error": {"message": "slow down"}}
        return await server.echo(request, writer)
    server.script = script
    teacher = opened(concurrency=8)
    assert [reply.text for reply in answers(teacher, *map(ask, "abcdefghij"))] == [f"to {c}" for c in "abcdefghij"]
    burst = [one for one in times if one < times[0] + 0.2]
    assert 1 <= len(burst) <= 8 and min(set(times) - set(burst)) > times[0] + 0.29
    assert teacher.counts["refused"] == len(burst) and teacher.counts["requests"] == 10 + len(burst)
    assert 7.0 <= teacher.pool.gate.limit < 7.5  # 8 - 1, and a little for the replies


def test_a_longer_wait_than_our_patience_fails_at_once(server, opened):
    async def script(request, writer):
        return 429, {"retry-after": "60"}, {"error": {"message": "tomorrow"}}
    server.script = script
    begin = time.monotonic()
    teacher = opened()
    reply, = answers(teacher, ask("a"))
    assert reply.text is None and reply.failure.startswith("429: tomorrow; it asks to wait 60 s; given up after 0 s")
    others = answers(teacher, *map(ask, "bcd"))  # nor does it keep the others waiting
    assert all(reply.failure for reply in others) and time.monotonic() - begin < 1 and len(server.requests) == 4


@pytest.mark.parametrize("status", [500, 502, 408])
def test_an_error_of_the_server_is_retried_and_pauses_grow(server, opened, status, monkeypatch):
    monkeypatch.setattr(teachers, "BACKOFF", (0.02, 0.1))
    monkeypatch.setattr(teachers.random, "uniform", lambda low, high: high)
    times = []

    async def script(request, writer):
        times.append(time.monotonic())
        if len(times) < 5:
            return status, {}, {"error": {"message": "oh"}}
        return await server.echo(request, writer)
    server.script = script
    teacher = opened()
    assert answers(teacher, ask("a"))[0].text == "to a" and teacher.counts["broken"] == 4
    pauses = [after - before for before, after in itertools.pairwise(times)]
    for pause, least in zip(pauses, (0.02, 0.04, 0.08, 0.1)):
        assert least <= pause < least + 0.035


def test_a_server_that_always_fails_is_given_up_and_asked_again_only_on_demand(server, opened, store):
    async def script(request, writer):
        return 500, {}, {"error": {"message": "line one\nline two"}}
    server.script = script
    first, = answers(opened(), ask("a"))
    assert first.failure == "500: line one line two; given up after 0 s" and first.text is None
    assert len(server.requests) == teachers.TRIES
    assert answers(opened(), ask("a")) == [first] and len(server.requests) == teachers.TRIES
    server.script = server.echo
    again, = answers(opened(retry_failed=True), ask("a"))
    assert again.text == "to a" and store.get(again.key) == again
    assert answers(opened(retry_failed=True), ask("a")) == [again] and len(server.requests) == teachers.TRIES + 1


@pytest.mark.parametrize("status", [400, 403, 413, 422, 501])
def test_what_no_retry_mends_is_asked_once(server, opened, status):
    async def script(request, writer):
        return status, {}, {"error": {"message": "no"}}
    server.script = script
    reply, = answers(opened(), ask("a"))
    assert reply.failure == f"{status}: no" and len(server.requests) == 1


@pytest.mark.parametrize("status, code", [(401, None), (402, None), (404, None), (429, "insufficient_quota")])
def test_what_all_calls_would_meet_ends_the_run_and_is_no_failure_of_a_call(server, opened, store, status, code):
    async def script(request, writer):
        if request["messages"][-1]["content"] == "b":
            await asyncio.sleep(0.05)
            return status, {}, {"error": {"message": f"no, {SECRET}", "code": code}}
        await asyncio.sleep(0.1 * (request["messages"][-1]["content"] == "c"))
        return await server.echo(request, writer)
    server.script = script
    with pytest.raises(InputError) as error:
        answers(opened(concurrency=3), *map(ask, "abcdefghijklmnop"))
    assert str(error.value) == (f"{server.url}, model m: {status}: no, [key]; expected a server that takes this "
                                "model's name and the key in OPENAI_API_KEY")
    assert store.get(key_of("m", ask("b"))) is None and store.get(key_of("m", ask("c"))).text == "to c"


def test_a_server_that_is_not_there_ends_the_run_and_is_no_failure_of_a_call(server, opened, store):
    server.url, begin = "http://127.0.0.1:1/v1", time.monotonic()
    teacher = opened()
    with pytest.raises(InputError, match=r"^http://127.0.0.1:1/v1: All connection attempts failed; expected a server"):
        answers(teacher, *map(ask, "ab"))
    assert time.monotonic() - begin < 3 and teacher.counts["requests"] <= 2 * teachers.TRIES
    assert store.get(key_of("m", ask("a"))) is None


def test_a_host_that_takes_no_connection_is_not_there(server, opened, monkeypatch):
    monkeypatch.setattr(teachers, "CONNECT", 0.05)
    with socket.socket() as deaf, contextlib.ExitStack() as stack:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        for _ in range(3):  # its queue is full
            other = stack.enter_context(socket.socket())
            other.setblocking(False)
            other.connect_ex(deaf.getsockname())
        server.url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"
        with pytest.raises(InputError, match=r"ConnectTimeout; expected a server of OpenAI's API"):
            answers(opened(), ask("a"))


def test_a_server_that_starts_again_is_waited_for(server, opened):
    """Once it has answered, its absence is bounded by time alone."""
    async def last(request, writer):
        server.listening.close()
        return 200, {"connection": "close"}, completion("to a")
    server.script, teacher = last, opened()
    assert answers(teacher, ask("a"))[0].text == "to a"
    server.script, teacher.pool.patience = server.echo, 0.5
    with pytest.raises(InputError, match="All connection attempts failed"):
        answers(teacher, ask("b"))
    teacher.pool.patience, before = 10, teacher.counts["away"]

    def start_again():
        while teacher.counts["away"] <= before + teachers.TRIES:
            time.sleep(0.01)
        asyncio.run_coroutine_threadsafe(server.listen(), server.loop)
    threading.Thread(target=start_again, daemon=True).start()
    assert answers(teacher, ask("b"))[0].text == "to b"


async def hang(request, writer):
    await asyncio.sleep(30)


async def drip(request, writer):
    writer.write(b"HTTP/1.1 200 x\r\ncontent-length: 5000\r\n\r\n")
    while not writer.is_closing():
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.02)


async def endless(request, writer, status=200, extra=b""):
    writer.write(b"HTTP/1.1 %d x\r\ntransfer-encoding: chunked\r\n%s\r\n" % (status, extra))
    with contextlib.suppress(ConnectionError):
        while not writer.is_closing():
            writer.write(b"1000\r\n" + b" " * 4096 + b"\r\n")
            await writer.drain()


async def endless_error(request, writer):
    await endless(request, writer, status=500)


async def compressed(request, writer):
    await endless(request, writer, extra=b"content-encoding: gzip\r\n")


async def cut_off(request, writer):
    writer.write(b"HTTP/1.1 200 x\r\ncontent-length: 5000\r\n\r\n{\"choices\": [")
    await writer.drain()


async def broken(request, writer):
    return 200, {}, b'{"choices": [{"message": {"content": "ab'


async def other_shape(request, writer):
    return 200, {}, {"choices": []}


@pytest.mark.parametrize("script, why", [
    (hang, "no whole reply within 0.2 s"), (drip, "no whole reply within 0.2 s"),
    (endless, "a reply of more than 100,000 bytes"), (endless_error, "a reply of more than 100,000 bytes"),
    (compressed, "a compressed reply"), (cut_off, "peer closed connection"), (broken, "the reply is broken: "),
    (other_shape, "the reply is broken: found no chat completion")])
def test_a_hostile_body_is_bounded_retried_and_ends_as_a_failure(server, opened, script, why, monkeypatch):
    monkeypatch.setattr(teachers, "MAX_REPLY_BYTES", 100_000)
    monkeypatch.setattr(teachers, "TRIES", 2)

    async def on_b_only(request, writer):
        return await (script if request["messages"][-1]["content"] == "b" else server.echo)(request, writer)
    server.script = on_b_only
    begin = time.monotonic()
    teacher = opened(timeout=0.2)
    first, second, third = answers(teacher, *map(ask, "abc"))
    assert teacher.counts["timed out" if script in (hang, drip) else "broken"] == 2
    assert (first.text, third.text) == ("to a", "to c") and second.text is None and why in second.failure
    assert server.asked().count("b") == 2 and time.monotonic() - begin < 1.5


def test_a_call_that_fails_once_in_each_way_is_answered_in_the_end(server, opened, monkeypatch):
    ways = [cut_off, broken, hang, other_shape, Scripted.echo]

    async def script(request, writer):
        return await ways.pop(0)(request, writer)
    server.script = script
    assert answers(opened(timeout=0.2), ask("a"))[0].text == "to a" and not ways


def test_time_and_not_tries_bounds_refusals(server, opened):
    async def script(request, writer):
        return 429, {}, {}
    server.script = script
    begin = time.monotonic()
    reply, = answers(opened(patience=0.5), ask("a"))
    assert "429" in reply.failure and len(server.requests) > teachers.TRIES and time.monotonic() - begin < 1


def test_patience_bounds_a_request_too(server, opened):
    server.script, begin = hang, time.monotonic()
    reply, = answers(opened(patience=0.2), ask("a"))
    assert reply.failure.startswith("no whole reply within 0.2 s") and time.monotonic() - begin < 1


def test_no_proxy_of_the_environment_sees_the_texts(server, opened, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    assert answers(opened(), ask("a"))[0].text == "to a"


def test_a_redirect_is_not_followed(server, opened):
    other = Scripted()

    async def script(request, writer):
        return 307, {"location": f"http://localhost:{other.port}/v1/chat/completions?key={SECRET}"}, b""
    server.script = script
    reply, = answers(opened(), ask("a"))
    other.close()
    assert reply.failure == f"307: a redirect to 'localhost:{other.port}', which is not followed"
    assert len(server.requests) == 1 and other.requests == []


def test_the_key_is_sent_and_then_in_no_reply_error_log_or_file(server, opened, store, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    hidden = "".join(f"\\u{ord(c):04x}" for c in SECRET)
    scripts = {
        "text": lambda: (200, {"x-key": SECRET}, completion(f"it is {SECRET}.", reasoning=f"Hm, {SECRET}")),
        "json": lambda: (200, {}, completion(f'{{"score": 1, "at": "{hidden}"}}')),
        "error": lambda: (400, {"x-key": SECRET}, {"error": {"message": "x" * 290 + SECRET}}),
        "plain": lambda: (403, {}, f"wrong key {SECRET}".encode()),
        "reason": lambda: (200, {}, completion("a", finish=SECRET)),
        "retried": lambda: (500, {}, {"error": {"message": SECRET, "code": SECRET}}),
        "broken": lambda: (200, {}, f"{SECRET} is no JSON".encode()),
        "status": lambda: (302, {"location": f"http://{SECRET}/"}, b"")}

    async def script(request, writer):
        return scripts[request["messages"][-1]["content"]]()
    server.script = script
    teacher = opened()
    logging.getLogger("openai").setLevel(logging.DEBUG)  # as a curious user might
    found = answers(teacher, *(ask(name, {"type": "object"} if name == "json" else None) for name in scripts))
    store.close()
    assert server.headers[0]["authorization"] == f"Bearer {SECRET}"
    assert (found[0].text, found[0].thought) == ("it is [key].", "Hm, [key]")
    assert found[1].value == {"score": 1, "at": "[key]"} == json.loads(found[1].text)
    assert found[3].failure == "403: wrong key [key]" and "[key]" in found[5].failure and "[key]" in found[7].failure
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert b"it is [key]." in b"".join(files)
    for text in (repr(found), caplog.text, *capfd.readouterr(), *map(repr, files)):
        assert SECRET not in text and SECRET[:-3] not in text and hidden not in text


def test_a_key_that_no_header_can_hold_is_refused_unseen(server, store, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-ümlaut")
    with pytest.raises(InputError, match="OPENAI_API_KEY") as error:
        Teacher.open(server.url, store, model="m")
    assert "mlaut" not in str(error.value)


def test_a_server_that_needs_no_key_gets_a_word(server, opened, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "")
    assert answers(opened(), ask("none a"))[0].text == "to none a"  # and it is no secret
    assert server.headers[0]["authorization"] == "Bearer none"


@pytest.mark.parametrize("said, thought", [
    ({"reasoning_content": "Hm."}, "Hm."), ({"reasoning": "Hm."}, "Hm."), ({}, None),
    ({"reasoning": "", "reasoning_content": "So."}, "So."), ({"reasoning": None}, None)])
def test_the_thought_is_taken_where_the_server_puts_it(server, opened, said, thought):
    async def script(request, writer):
        return 200, {}, completion("Yes.", **said)
    server.script = script
    reply, = answers(opened(), ask("a"))
    assert (reply.text, reply.thought) == ("Yes.", thought)

# ----- what counts as a reply -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given, rooms", [
    ({"max_tokens": 8}, [("max_tokens", 8), ("max_tokens", 16)]),
    ({"max_completion_tokens": 8}, [("max_completion_tokens", n) for n in (8, 16)]),
    ({}, [None, ("max_tokens", 10)])])  # the server's own limit cut it at 5 tokens
def test_a_cut_reply_is_asked_again_with_more_room_and_is_never_a_success(server, opened, given, rooms):
    async def script(request, writer):
        enough = len(server.requests) % 2 == 0 and request["messages"][-1]["content"] == "b"
        return 200, {}, completion("whole" if enough else "cu", "stop" if enough else "length")
    server.script = script
    teacher = opened()
    reply, = answers(teacher, ask("a", **given))
    assert reply.text is None and reply.failure == f"cut by length at {rooms[-1][1]} tokens"
    assert [next(((name, request[name]) for name in ("max_tokens", "max_completion_tokens") if name in request), None)
            for request in server.requests] == rooms
    reply, = answers(teacher, ask("b", **given))
    assert reply.text == "whole" and len(server.requests) == 4 and teacher.counts["cut"] == 2
    assert reply.usage == {"prompt_tokens": 6, "completion_tokens": 10}  # of both requests


@pytest.mark.parametrize("cut, thought, room", [
    ("", "Hm", 4112), ("<think>Hm", None, 4112), ("So", "Hm", 16), ("<think>Hm</think>So", None, 16)])
def test_a_reply_that_was_cut_in_its_thought_is_given_room_for_it(server, opened, cut, thought, room):
    async def script(request, writer):
        first = len(server.requests) == 1
        return 200, {}, completion(cut if first else "So.", "length" if first else "stop", reasoning_content=thought)
    server.script = script
    assert answers(opened(), ask("a", max_tokens=8))[0].text == "So."
    assert [request["max_tokens"] for request in server.requests] == [8, room]


@pytest.mark.parametrize("finish, text, failure", [
    ("content_filter", "a", "finish_reason 'content_filter'"), ("abort", "a", "finish_reason 'abort'"),
    ("stop", " \n", "an empty reply"), ("stop", None, "an empty reply"), (None, "a", None), ("eos_token", "a", None)])
def test_only_a_whole_text_is_a_reply(server, opened, finish, text, failure):
    async def script(request, writer):
        return 200, {}, completion(text, finish)
    server.script = script
    reply, = answers(opened(), ask("a"))
    assert reply.failure == failure and (reply.text is None) == bool(failure) and len(server.requests) == 1


def test_json_is_asked_for_by_its_schema_and_checked_here(server, opened):
    said = ['```json\n{"score": 7}\n```', '{"score": 11}', '{"score": 3}', '{"score": 1', '{"score": "1"}']

    async def script(request, writer):
        return 200, {}, completion(said[len(server.requests) - 1])
    server.script = script
    teacher = opened(concurrency=1)
    first, = answers(teacher, ask("a", SCHEMA))
    assert first.value == {"score": 7} and first.text == said[0] and not first.repaired
    assert server.requests[0]["response_format"] == {
        "type": "json_schema", "json_schema": {"name": "reply", "strict": True, "schema": SCHEMA}}
    second, = answers(teacher, ask("b", SCHEMA))
    assert second.value == {"score": 3} and second.repaired and second.usage["completion_tokens"] == 10
    asked, wrong, please = server.requests[2]["messages"]
    assert asked["content"] == "b" and wrong == {"role": "assistant", "content": said[1]}
    assert "11 is greater than the maximum of 10" in please["content"] and json.dumps(SCHEMA) in please["content"]
    third, = answers(teacher, ask("c", SCHEMA))
    assert third.text is third.value is None and third.repaired and "'1' is not of type 'integer'" in third.failure
    assert len(server.requests) == 5 and teacher.counts["repaired"] == 2 and teacher.counts["failed"] == 1


def test_a_server_without_schemas_is_asked_without_and_then_no_more_with(server, opened):
    async def script(request, writer):
        if "response_format" in request:
            return 400, {}, {"error": {"message": "response_format is not known"}}
        return 200, {}, completion('{"score": 1}')
    server.script = script
    teacher = opened()
    for text in "ab":
        assert answers(teacher, ask(text, SCHEMA))[0].value == {"score": 1}
    assert ["response_format" in request for request in server.requests] == [True, False, False]


def test_a_server_that_takes_the_schema_elsewhere_is_given_it_there(server, opened):
    async def script(request, writer):  # llama-cpp-python's words, and its status
        if request.get("response_format", {}).get("type") == "json_schema":
            return 500, {}, {"error": {"message": "'loc': ('body', 'response_format', 'type'), 'msg': \"Input should "
                                                  "be 'text' or 'json_object'\"", "type": "internal_server_error"}}
        return 200, {}, completion('{"score": 1}')
    server.script = script
    teacher = opened()
    for text in "ab":
        assert answers(teacher, ask(text, SCHEMA))[0].value == {"score": 1}
    assert [request.get("response_format") for request in server.requests][1:] == [
        {"type": "json_object", "schema": SCHEMA}] * 2
    assert answers(teacher, ask("c"))[0].text == '{"score": 1}' and "response_format" not in server.requests[-1]


def test_a_server_that_takes_no_form_of_the_schema_is_asked_without(server, opened):
    async def script(request, writer):
        if "response_format" in request:
            return 500, {}, {"error": {"message": "response_format: json_object and json_schema are unknown"}}
        return 200, {}, completion('{"score": 1}')
    server.script = script
    assert answers(opened(), ask("a", SCHEMA))[0].value == {"score": 1}
    assert [request.get("response_format", {}).get("type") for request in server.requests] == [
        "json_schema", "json_object", None]


def test_a_bad_request_does_not_switch_the_schemas_off(server, opened):
    async def script(request, writer):
        if request["messages"][-1]["content"] == "bad":
            return 400, {}, {"error": {"message": "too long"}}
        return 200, {}, completion('{"score": 1}')
    server.script = script
    teacher = opened()
    (bad,), (good,) = answers(teacher, ask("bad", SCHEMA)), answers(teacher, ask("good", SCHEMA))
    assert bad.failure == "400: too long" and good.value == {"score": 1}
    assert ["response_format" in request for request in server.requests] == [True, False, True]

# ----- state ----------------------------------------------------------------------------------------------------------


def test_a_stored_call_is_not_asked_again_nor_one_call_twice_at_once(server, opened):
    first = answers(opened(), ask("a"), ask("b"), ask("a"))
    assert first[0] == first[2] != first[1] and sorted(server.asked()) == ["a", "b"]
    teacher = opened()
    assert answers(teacher, ask("b"), ask("a"), ask("a", seed=1))[:2] == [first[1], first[0]]
    assert len(server.requests) == 3 and teacher.counts["stored"] == 2 and teacher.counts["requests"] == 1


def test_calls_are_read_only_as_there_is_room_and_nothing_is_kept(server, opened):
    taken = yielded = most = 0

    def given():
        nonlocal taken
        for taken in range(1, 101):
            yield ask(str(taken))
    teacher = opened(concurrency=4)
    for _ in teacher.ask(given()):
        yielded += 1
        most = max(most, taken - yielded)
    assert yielded == 100 and most <= teacher.pool.window == 8
    assert server.most <= 4 and not teacher.pool.sessions and not teacher.pool.in_flight and not teacher.pool.gate.turns


@pytest.mark.heavy
def test_memory_is_flat_over_10_000_calls(server, opened):
    teacher, seen = opened(), []

    async def script(request, writer):
        server.requests.clear()
        server.headers.clear()
        return await server.echo(request, writer)
    server.script = script
    for n, _ in enumerate(teacher.ask(ask(f"{i} " + "x" * 4000) for i in range(10_000)), 1):
        if n % 2000 == 0:
            seen.append(resident("VmRSS") / 1e6)
    assert max(seen) - seen[0] < 10, seen  # MB; the texts alone have 80


def test_a_caller_who_leaves_loses_nothing_that_was_paid(server, opened, store, capsys):
    async def script(request, writer):
        await asyncio.sleep(0.02 if request["messages"][-1]["content"] == "0" else 0.2)
        return await server.echo(request, writer)
    server.script = script
    teacher = opened(concurrency=4)
    asking = teacher.ask(map(ask, map(str, range(20))))
    assert next(asking)[1].text == "to 0"
    asking.close()
    asked = server.asked()
    assert 4 <= len(asked) <= 5 and "4 calls in flight" in capsys.readouterr().err
    assert [store.get(key_of("m", ask(text))).text for text in asked] == [f"to {text}" for text in asked]
    time.sleep(0.05)
    assert server.asked() == asked
    assert sum(1 for _ in teacher.ask(map(ask, map(str, range(20))))) == 20 and sorted(server.asked()) == sorted(
        map(str, range(20)))


def test_a_caller_may_be_slow_and_ask_within_asking(server, opened):
    teacher = opened(concurrency=2, timeout=0.3)
    inner = (ask(reply.text) for _, reply in teacher.ask(map(ask, map(str, range(10)))))
    found = []
    for _, reply in teacher.ask(inner):
        time.sleep(0.05)
        found.append(reply.text)
    assert sorted(found) == [f"to to {i}" for i in range(10)]


def test_a_store_that_fails_stops_the_caller(server, opened, store, monkeypatch):
    def full(*replies):
        raise OSError(28, "No space left on device", "calls.sqlite")
    teacher = opened()
    monkeypatch.setattr(store, "put", full)
    with pytest.raises(OSError, match="No space left"):
        list(teacher.ask([ask("a")]))


def test_a_store_that_fails_in_the_drain_is_reported(server, opened, store, monkeypatch):
    async def script(request, writer):
        await asyncio.sleep(0.2 * (request["messages"][-1]["content"] == "b"))
        return await server.echo(request, writer)
    server.script = script
    asking = opened().ask([ask("a"), ask("b")])
    assert next(asking)[1].text == "to a"

    def full(*replies):
        if replies:
            raise OSError(28, "No space left on device", "calls.sqlite")
    monkeypatch.setattr(store, "put", full)
    with pytest.raises(OSError, match="No space left"):
        asking.close()


def test_nothing_is_retried_in_the_drain(server, opened, store):
    async def script(request, writer):
        if request["messages"][-1]["content"] == "a":
            return await server.echo(request, writer)
        await asyncio.sleep(0.1)
        return 500, {}, {}
    server.script = script
    asking = opened().ask([ask("a"), ask("b")])
    next(asking)
    asking.close()
    assert server.asked() == ["a", "b"] and store.get(key_of("m", ask("b"))) is None


RUN = """
import sys
from files import run_main
from calls import Call, Store
from teachers import Teacher
def main():
    teacher = Teacher.open(sys.argv[1], Store(sys.argv[2]), model="m", concurrency=6)
    for _, reply in teacher.ask(Call(({"role": "user", "content": str(i)},)) for i in range(40)):
        print(reply.text, flush=True)
run_main(main)
"""


async def slow(request, writer):
    await asyncio.sleep(0.1)
    return await Scripted.echo(request, writer)


def check_resumed(server, path, most_lost):
    """A second run asks nothing that is stored; the first has lost at most so many replies."""
    asked, store = server.asked(), Store(path)
    kept = [text for text in asked if store.get(key_of("m", ask(text)))]
    assert len(asked) - len(kept) <= most_lost and len(kept) >= 8 and len(asked) < 40
    teacher = Teacher.open(server.url, store, model="m", concurrency=6)
    assert sum(1 for _ in teacher.ask(ask(str(i)) for i in range(40))) == 40
    teacher.close()
    store.close()
    assert len(server.asked()) == 40 + len(asked) - len(kept)
    assert all(server.asked().count(text) == 1 for text in kept)


def test_ctrl_c_drains_what_is_in_flight(server, store, opened, capsys):
    server.script, teacher = slow, opened(concurrency=6)
    with pytest.raises(KeyboardInterrupt):
        for n, _ in enumerate(teacher.ask(ask(str(i)) for i in range(40))):
            if n == 8:  # strikes while the next reply is waited for
                threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGINT)).start()
    assert "6 calls in flight" in capsys.readouterr().err
    check_resumed(server, store.path, 0)


def test_a_second_ctrl_c_gives_up_what_is_in_flight(server, opened, monkeypatch):
    server.script, teacher = hang, opened(concurrency=2)
    for after in (0.1, 0.2):
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(teacher.ask([ask("a"), ask("b")]))
    assert time.monotonic() - begin < 1
    teacher.close()
    assert time.monotonic() - begin < 1


def test_a_killed_run_loses_at_most_what_was_in_flight(server, tmp_path):
    server.script = slow
    if not (pid := os.fork()):
        teacher = Teacher.open(server.url, Store(tmp_path / "calls.sqlite"), model="m", concurrency=6)
        for n, _ in enumerate(teacher.ask(ask(str(i)) for i in range(40))):
            if n == 15:
                time.sleep(0.05)
                os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    check_resumed(server, tmp_path / "calls.sqlite", 6)


@pytest.mark.heavy
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_asks_again_at_most_what_was_in_flight(server, tmp_path, how):
    server.script = slow
    command = [sys.executable, "-c", RUN, server.url, str(tmp_path / "calls.sqlite")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(8):
            process.stdout.readline()
        process.send_signal(how)
        _, said = process.communicate(timeout=20)
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how], said
    check_resumed(server, tmp_path / "calls.sqlite", 6 if how == signal.SIGKILL else 0)

# ----- how many at once -----------------------------------------------------------------------------------------------


def with_places(server, places, seconds):
    """Lets a server answer after some seconds and refuse more than so many at once; returns [(time, refused), …]."""
    busy, log = 0, []

    async def script(request, writer):
        nonlocal busy
        if busy >= places:
            log.append((time.monotonic(), True))
            return 429, {"retry-after": str(seconds)}, {}
        busy += 1
        await asyncio.sleep(seconds)
        busy -= 1
        log.append((time.monotonic(), False))
        return await server.echo(request, writer)
    server.script = script
    return log


def test_a_server_with_few_places_is_spared(server, opened):
    with_places(server, 8, 0.05)
    teacher = opened(concurrency=64)
    assert sum(reply.failure is None for _, reply in teacher.ask(map(ask, map(str, range(150))))) == 150
    assert teacher.counts["refused"] > 0 and 7 <= teacher.pool.gate.limit < 10


@pytest.mark.heavy
def test_ninety_percent_of_a_real_server_is_used(server, opened):
    log, teacher, begin = with_places(server, 48, 1.0), opened(), time.monotonic()
    for _ in teacher.ask(ask(str(i)) for i in itertools.takewhile(lambda i: time.monotonic() < begin + 180,
                                                                 itertools.count())):
        pass
    late = [refused for at, refused in log if 60 <= at - begin < 180]
    done, refused = late.count(False), late.count(True)
    print(f"{done / 120 / 48:.1%} of the capacity used, {refused / done:.2%} refused")
    assert done > 0.9 * 120 * 48 and refused < 0.02 * done, (done, refused)

# ----- opening --------------------------------------------------------------------------------------------------------


def test_the_only_model_of_a_server_needs_no_name(server, opened, store):
    models = ["qwen"]

    async def script(request, writer):
        if request == "/v1/models":
            return 200, {}, {"object": "list", "data": [{"id": name} for name in models]}
        return await server.echo(request, writer)
    server.script = script
    teacher = opened(model=None)
    assert teacher.model == "qwen" and answers(teacher, ask("a"))[0].key == key_of("qwen", ask("a"))
    models.append("llama")
    with pytest.raises(InputError, match=r"found the models qwen, llama; expected one, or a name beside the address"):
        opened(model=None)
    for models[:] in ([f"m {SECRET}"], [{"name": "m"}], [None]):  # a name is written to files, and a key is no name
        with pytest.raises(InputError, match="found no list of models; expected") as error:
            opened(model=None)
        assert SECRET not in str(error.value)
    for server.script in (broken, other_shape):
        with pytest.raises(InputError, match="found no list of models"):
            opened(model=None)
    server.script = hang
    with pytest.raises(InputError, match="no answer in time"):
        opened(model=None, timeout=0.1)


@pytest.mark.parametrize("url", ["http://localhost:8000/v1", "http://127.3.2.1:8000/v1", "https://[::1]/v1"])
def test_this_machine_needs_no_leave(url):
    teachers.check_url(url)


@pytest.mark.parametrize("host", ["api.openai.com", "localhost.example.com", "10.0.0.5", "0.0.0.0", "[::]", "127.1"])
def test_another_machine_needs_leave(host, store):
    with pytest.raises(InputError, match="to which the texts would go; expected localhost, or --allow-remote"):
        Teacher.open(f"http://{host}:8000/v1", store, model="m")
    teachers.check_url(f"http://{host}:8000/v1", allow_remote=True)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://localhost/v1", "http://me:secret@localhost/v1", "http://[::1",
                                 "http://localhost:x/v1", "http:///v1", "http://localhost/v1?key=secret", ""])
def test_what_is_no_plain_address_is_refused_and_not_shown(url):
    with pytest.raises(InputError, match="found no plain URL") as error:
        teachers.check_url(url, allow_remote=True)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("headers, seconds", [
    ({"retry-after": "7"}, 7), ({"retry-after-ms": "250", "retry-after": "7"}, 0.25), ({}, 0),
    ({"retry-after": "-3"}, 0), ({"retry-after": "soon"}, 0), ({"retry-after": "nan"}, 0), ({"retry-after": "inf"}, 0),
    ({"retry-after": "Thu, 01 Jan 2026 00:00:20 GMT"}, 20), ({"retry-after": "Wed, 31 Dec 2025 23:00:00 GMT"}, 0)])
def test_retry_after_is_seconds_milliseconds_or_a_date(headers, seconds, monkeypatch):
    monkeypatch.setattr(teachers.time, "time", lambda: 1767225600.0)  # 1 January 2026
    assert teachers.retry_after(headers) == pytest.approx(seconds)


def test_without_the_extra_the_error_names_it(server, store, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"expected pip install -e '\.\[synth\]'"):
        Teacher.open(server.url, store, model="m")

# ----- batch files ----------------------------------------------------------------------------------------------------


def test_a_batch_with_gaps_then_a_run_equals_the_run_online(server, opened, tmp_path):
    def said(request):
        """A model that is the same function of a request for the server and for the batch engine."""
        words = request["messages"][0]["content"].split()
        if words[0] == "long" and request.get("max_tokens", 0) < 20:
            return completion("cut", "length")
        if words[0] == "wrong" and len(request["messages"]) == 1:
            return completion('{"score": 99}' if words[1] == "1" else "{")
        if words[0] == "filtered":
            return completion("a", "content_filter")
        return completion('{"score": 4}' if "response_format" in request else " ".join(words), reasoning_content="Hm.")

    async def script(request, writer):
        return 200, {}, said(request)
    server.script = script
    given = [ask(f"{kind} {i}", SCHEMA if kind in ("wrong", "score") else None, max_tokens=10)
             for i in range(20) for kind in ("long", "wrong", "score", "text", "filtered")]
    online = answers(opened(), *given)
    assert sum(reply.repaired for reply in online) == 20 == sum(reply.failure is not None for reply in online)
    n_online = len(server.requests)

    export_batch(given, tmp_path / "in.jsonl", "m")
    rows = [json.loads(line) for line in (tmp_path / "in.jsonl").read_text().splitlines()]
    random.Random(0).shuffle(rows)
    (tmp_path / "out.jsonl").write_text("".join(json.dumps({"id": "b", "custom_id": row["custom_id"], "error": None,
        "response": {"status_code": 200, "request_id": "r", "body": said(row["body"])}}) + "\n" for row in rows[3:]))
    store = Store(tmp_path / "imported.sqlite")
    counts = import_batch(tmp_path / "out.jsonl", store)
    assert counts["stored"] + counts["unfinished"] == 97
    teacher = Teacher.open(server.url, store, model="m")
    assert answers(teacher, *given) == online
    teacher.close()
    asked = len(server.requests) - n_online
    assert asked <= 20 + 20 + 3 * 2  # more room for the cut, a second try for wrong JSON, and what was missing
    teacher = Teacher.open(server.url, store, model="m")
    assert answers(teacher, *given) == online
    teacher.close()
    store.close()
    assert len(server.requests) == n_online + asked

"""The pipeline with a teacher that is a function, and as a process that is killed, against a server that is a script:
stages, resume, provenance, preview, batches and the command line."""
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    FakeTeacher,
    Killed,
    MemoryStore,
    Scripted,
    completion,
    tiny_encoder,
    tiny_vocabulary,
    write_jsonl,
)

import plot
import prompts
import stages
import synth
from calls import Call, Reply, key_of
from files import InputError, sha256
from retrieve import read_records
from rows import messages_of, pair_of
from stages import Scores
from synth import Run, chain, compare_files, corpus, judge_files, main, report, settle


@pytest.fixture(scope="module", autouse=True)
def no_fsync():
    """Most of a small run is the disk's work and the drawing, which test_files.py and test_plot.py test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(plot, "DPI", 10)
        yield


WORDS = ["fever", "cough", "anemia", "stroke", "sepsis", "asthma", "gout", "lupus", "angina", "rash", "edema"]


def texts(count=40):
    rng = random.Random(3)
    return [{"text": f"{i}: " + " ".join(rng.choice(WORDS) for _ in range(20)), "url": f"page/{i % 7}"}
            for i in range(count)] + [
        {"question": f"Q{i}?", "options": ["Gout", "Lupus", "Rash"], "answer_idx": i % 3} for i in range(8)]


def answer(call):
    """Plausible replies that depend on the call's own words alone; some fail, and some are not as asked."""
    text, rng = call.messages[-1]["content"], random.Random(json.dumps([call.messages, call.parameters]))
    asked = {*call.schema["properties"]} if call.schema else set()
    if rng.random() < 0.04:
        return ValueError("timed out")
    if "question_1" in asked:
        return {f"question_{i}": f"Which {rng.choice(WORDS)} is it, {rng.random():.6f}?" for i in (1, 2)}
    if "relevance" in asked:
        return {"quality": rng.randint(6, 10), "difficulty": rng.choice([3, 8, 9, 10]), "relevance": rng.randint(5, 7),
                "mentions_case_details": rng.random() < 0.2}
    if "answer_1" in asked:
        return {"answer_1": f"It is {rng.random()}.", "answer_2": f"- {rng.random()}"}
    if "score" in asked:
        return {"score": rng.randint(1, 3)}
    if "complexity" in asked:
        return {"quality": rng.randint(1, 10), "complexity": rng.randint(1, 10)}
    if "better" in asked:
        return {"better": "first"}
    for names in ([*prompts.DEPARTMENTS], *map(list, prompts.DEPARTMENTS.values())):
        if "\n".join(names) in text:
            return rng.choice([*names, "None", "I think Cardiology"])
    if "Now choose" in text:
        return f"The answer is ({rng.choice('ABC')})."
    if "## Thought" in text or "A check shows" in text:
        return rng.choice([f"## Thought\nHm {rng.random()}.\n## Summarization\nSo.", ("Hm.", f"So {rng.random()}.")])
    return f"Plain {rng.random()}."


def run_of(out, store=None, **more):
    store = MemoryStore() if store is None else store
    teacher, judge = FakeTeacher(store, answer, "teacher"), FakeTeacher(store, answer, "judge")
    return Run(out, store, **{"teacher": teacher, "reasoner": teacher, "judge": judge, "ranker": judge} | more)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", texts())


def go(run, source):
    chain(run, synth.CHAIN, lambda: corpus([source]))
    report(run)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, source):
    return go(run_of(tmp_path_factory.mktemp("whole")), source)


def files_of(out):
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def rows(run, stage, folder="stages"):
    return [json.loads(line) for line in run.path(folder, stage).read_text().splitlines()]

# ----- the whole -----------------------------------------------------------------------------------------------------


def test_every_row_is_kept_or_dropped_with_its_reason(whole):
    before = rows(whole, "texts")
    assert len(before) == 48
    for stage in synth.CHAIN[1:]:
        kept, lost = rows(whole, stage), rows(whole, stage, "dropped")
        ids = [row["id"] for row in before]
        assert sorted([row["id"] for row in kept + lost], key=ids.index) == ids
        assert [row["id"] for row in kept] == [one for one in ids if one in {row["id"] for row in kept}]
        assert all(row["rule"] and row["evidence"] for row in lost)
        state = json.loads((whole.out / "stages" / f"{stage}.json").read_text())
        assert (state["in"], state["out"], sum(state["dropped"].values())) == (len(before), len(kept), len(lost))
        before = kept
    assert len(before) > 15
    found = json.loads((whole.out / "manifest.json").read_text())["stages"]
    unknown = sum(row["department"] == "unknown" for row in rows(whole, "classify"))
    assert found["classify"]["found"]["unknown"] == unknown > 3
    assert {"no scores", "case details", "chosen without scores"} & {*found["select"]["dropped"]}
    assert found["verify"]["found"]["unproven"] > 10 and found["verify"]["found"]["verified"] >= 1


def test_the_outputs_are_read_as_they_are(whole):
    done = rows(whole, "filter")
    files = sorted((whole.out / "FineMed-SFT").glob("*.jsonl"))
    pairs = whole.out / "FineMed-DPO/FineMed-DPO.jsonl"
    found = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(found) == len(done) and all(messages_of(row)[-1]["content"] == row["response"] for row in found)
    found = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert len(found) == sum("rejected" in row for row in done) > 3
    for row in found:
        prompt, chosen, rejected = pair_of(row)
        assert "## Thought" in chosen and rejected.startswith("Plain") and len(prompt) == 1
    records, _, bad = read_records([*files, pairs], "instruction")
    assert (len(records), bad) == (len(done) + len(found), 0)


def test_every_call_of_a_row_is_in_its_provenance(whole):
    for file in ("FineMed-DPO/FineMed-DPO.jsonl", *(f"FineMed-SFT/{path.name}" for path in
                                                    (whole.out / "FineMed-SFT").iterdir())):
        for line in (whole.out / "provenance" / file).read_text().splitlines():
            row = json.loads(line)
            assert {"classify", "score", "respond"} <= {*row["calls"]}
            assert all(key in whole.store or key in whole.failed for keys in row["calls"].values() for key in keys)
            asked = row["calls"]["score"]
            said = {reply.value["difficulty"] for key in asked if (reply := whole.store.get(key))}
            assert row["difficulty"] in said


def test_no_call_is_asked_twice_and_a_second_run_asks_nothing(whole, source, tmp_path):
    for teacher in whole.teachers():
        assert len(teacher.asked) == len(set(teacher.asked))
    again = go(run_of(tmp_path, whole.store, failed=whole.failed), source)
    assert [teacher.asked for teacher in again.teachers()] == [[], []]
    assert files_of(tmp_path) == files_of(whole.out)


def test_texts_that_are_the_same_are_asked_about_once(tmp_path):
    run = run_of(tmp_path)
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": "gout"}] * 5)
    settle(run, "ask", lambda: corpus([path]))
    assert len(run.teacher.asked) == 1
    pair = {"id": "1", "instruction": "Q?", "questions": ["Q?"] * 5, "text": "gout", "calls": {}}
    settle(run, "score", lambda: iter([pair, pair]))  # in one row, too, and while the first is in flight
    assert len(run.teacher.asked) == 2


def test_what_is_counted_is_what_was_used(whole):
    models = json.loads((whole.out / "manifest.json").read_text())["models"]
    for teacher in whole.teachers():
        n, failed = len(teacher.asked), sum(key in whole.failed for key in teacher.asked)
        counts = models[teacher.model]
        assert (counts["calls"], counts["failed"]) == (n, failed) and failed > 0
        assert (counts["prompt_tokens"], counts["completion_tokens"]) == (10 * (n - failed), 3 * (n - failed))

# ----- killed, changed, failed ---------------------------------------------------------------------------------------


def test_a_run_killed_at_random_ends_in_the_same_files(whole, source, tmp_path):
    store, rng, asked, deaths = MemoryStore(), random.Random(5), [], 0
    failed = {}
    while True:
        shutil.rmtree(tmp_path / ".stages", ignore_errors=True)
        run = run_of(tmp_path, store, failed=failed)
        run.teacher.lives = run.judge.lives = rng.randint(1, 60)
        stored = {*store}
        try:
            go(run, source)
            break
        except Killed:
            deaths += 1
        finally:
            for teacher in run.teachers():
                assert not stored & {*teacher.asked}  # no stored reply is asked for again
                asked += teacher.asked
    assert deaths > 5 and files_of(tmp_path) == files_of(whole.out)
    assert len(asked) - len(set(asked)) <= 3 * deaths  # only those in flight are asked again


def test_a_changed_prompt_asks_again_its_calls_and_those_that_depend_on_them(whole, source, tmp_path, monkeypatch):
    old = prompts.PROMPTS["score"]["question"]
    monkeypatch.setitem(prompts.PROMPTS["score"], "question", old + " ")
    run = go(run_of(tmp_path, MemoryStore(whole.store), failed=dict(whole.failed)), source)
    changed = {row["id"] for row in rows(run, "score")}
    assert len(changed) == len(rows(whole, "score"))
    new = {key: stage for row in rows(run, "filter") for stage, keys in row["calls"].items() for key in keys
           if key not in whole.store and key not in whole.failed}
    assert "score" in new.values() and not {"classify", "ask"} & {*new.values()}
    scores = sum(len(row["questions"]) for row in rows(run, "ask"))
    questions = {(row["id"], row["instruction"]) for row in rows(whole, "select")}
    same = [row for row in rows(run, "select") if (row["id"], row["instruction"]) in questions]
    assert len(same) > 5
    kinds = {row["id"]: row["instruction_type"] for row in rows(whole, "select")}
    for row in rows(run, "filter"):  # the same question of the same kind is not answered again
        if (row["id"], row["instruction"]) in questions and row["instruction_type"] == kinds[row["id"]]:
            assert {new.get(key) for key in row["calls"]["respond"]} == {None}
    assert len([key for key in run.teacher.asked if key not in whole.store]) == len(run.teacher.asked) > scores


@pytest.mark.parametrize("stage, name, role", [
    ("verify", "reference", "judge"), ("rank", "answer", "judge"), ("pair", "plain", "teacher")])
def test_a_late_prompt_leaves_the_stages_before_it_alone(whole, source, tmp_path, monkeypatch, stage, name, role):
    monkeypatch.setitem(prompts.PROMPTS[stage], name, prompts.PROMPTS[stage][name] + " ")
    run = go(run_of(tmp_path, MemoryStore(whole.store), failed=dict(whole.failed)), source)
    keys = [key for row in rows(run, stage) for key in row["calls"].get(stage, ())]
    assert sorted(getattr(run, role).asked) == sorted(keys if stage != "verify" else [])
    other = run.teacher if role == "judge" else run.judge
    assert other.asked == []


def by_kind(call):
    """Replies that depend on a call's question or passage, not on the words of its prompt: even texts are common."""
    text, asked = call.messages[-1]["content"], {*call.schema["properties"]} if call.schema else set()
    number = next((int(word[1:-1]) for message in call.messages for word in message["content"].split()
                   if word[0] == "t" and word[1:-1].isdigit()), 0)
    new = "new" * any("(new)" in message["content"] for message in call.messages)
    values = {"question_1": f"Why t{number}? {new}", "question_2": f"How t{number}? {new}", "quality": 8,
              "difficulty": 9 if number % 2 else 3, "relevance": 5, "mentions_case_details": False, "complexity": 5,
              "answer_1": f"So t{number}: {new}.", "answer_2": f"Thus t{number}: {new}.", "score": 5}
    if asked:
        return {name: values[name] for name in call.schema["properties"]}
    if "Reply with one name" in text:
        return "Surgery" if "\nSurgery\n" in text else "Urology"
    seed = call.parameters["seed"]
    return (f"Hm {seed}.", f"So t{number}: {new}.") if "## Thought" in text else f"Plain t{number}: {new}."


def counts_of_new(out, path, store):
    """{stage: the calls that a run over a corpus pays, judge too}; each of them once, and none that is stored."""
    before = {*store}
    teacher, judge = FakeTeacher(store, by_kind, "teacher"), FakeTeacher(store, by_kind, "judge")
    run = go(Run(out, store, teacher=teacher, reasoner=teacher, judge=judge, ranker=judge), path)
    judge_files(run, {"all": run.path("stages", "filter")})
    new = [*teacher.asked, *judge.asked]
    assert not before & {*new} and len(new) == len({*new})
    stage_of = {key: at.removesuffix("-all") for at in (*synth.CHAIN[:-1], "judge-all") for row in rows(run, at)
                for at, keys in row["calls"].items() for key in keys}
    return dict(Counter(stage_of[key] for key in new))


@pytest.fixture(scope="module")
def paid_for(tmp_path_factory):
    """(a corpus of 12 texts, the store of a run over them)."""
    folder, store = tmp_path_factory.mktemp("paid"), MemoryStore()
    path = write_jsonl(folder / "c.jsonl", [{"text": f"A text t{i}. More of it."} for i in range(12)])
    assert counts_of_new(folder / "out", path, store) == {
        "classify": 24, "ask": 12, "score": 24, "respond": 18, "rank": 24, "pair": 6, "judge": 12}
    assert counts_of_new(folder / "out", path, store) == {}
    return path, store


@pytest.mark.parametrize("stage, name, mark, paid", [  # mark: a word by which the replies become others
    ("classify", "department", "", {"classify": 12}),
    ("classify", "specialty", "", {"classify": 12}),
    ("ask", "questions", "", {"ask": 12}),
    ("ask", "questions", " (new)", {"ask": 12, "score": 24, "respond": 18, "rank": 24, "pair": 6, "judge": 12}),
    ("score", "question", " (new)", {"score": 24}),  # the scores stay
    ("respond", "common", "", {"respond": 6}),
    ("respond", "common", " (new)", {"respond": 6, "rank": 12, "judge": 6}),
    ("respond", "complex", " (new)", {"respond": 12, "rank": 12, "judge": 6}),
    ("rank", "answer", "", {"rank": 24}),
    ("pair", "plain", " (new)", {"pair": 6}),
    ("judge", "row", "", {"judge": 12})])
def test_a_changed_prompt_pays_for_exactly_so_many_calls(tmp_path, monkeypatch, paid_for, stage, name, mark, paid):
    path, store = paid_for
    monkeypatch.setitem(prompts.PROMPTS[stage], name, prompts.PROMPTS[stage][name] + mark + " ")
    assert counts_of_new(tmp_path / "out", path, MemoryStore(store)) == paid


def test_failures_are_noted_not_asked_again_and_retried_on_request(tmp_path, source):
    noted = []
    run = go(run_of(tmp_path / "a", note=noted.append), source)
    assert noted and {row["key"] for row in noted} == {*run.failed}
    assert {row["reason"] for row in noted} == {"timed out", "JSON that was not asked for"}
    assert {row["model"] for row in noted} == {"teacher", "judge"}
    assert any(row["evidence"] == "timed out" for stage in synth.CHAIN for row in rows(run, stage, "dropped"))
    again = go(run_of(tmp_path / "b", run.store), source)  # a run without those failures
    assert {*again.teacher.asked, *again.judge.asked} == {*run.failed}


def test_no_pass_over_the_rows_is_made_for_a_teacher_of_whom_nothing_is_wanted(tmp_path):
    run, passes = run_of(tmp_path), []
    row = {"id": "1", "source": "s", "text": "gout", "questions": [], "calls": {}, "instruction": "Why?",
           "response": "So."}

    def once():
        passes.append(row)
        yield row
    for stage, first in (("ask", 2), ("judge", 3)):  # to ask, to see that nothing is missing; before, the teacher's
        passes.clear()
        settle(run, stage, once)
        assert len(passes) == first and not run.failed
        settle(run, stage, once)
        assert len(passes) == first + 1
    assert (len(run.teacher.asked), len(run.judge.asked)) == (1, 1)


def test_a_stored_failure_is_no_reply(tmp_path):
    run = run_of(tmp_path)
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": "gout"}])
    (key, _), = synth.missing_calls(run, "ask", lambda: corpus([path]), run.teacher)
    run.store[key] = Reply(key=key, text=None, thought=None, value=None, finish_reason=None, usage={}, repaired=False,
                           failure="of another day")
    settle(run, "ask", lambda: corpus([path]))
    assert run.teacher.asked == [key]


def test_a_teacher_that_does_not_reply_ends_the_run(tmp_path):
    class Silent(FakeTeacher):
        def ask(self, calls):
            list(calls)
            yield from ()
    run = run_of(tmp_path, teacher=Silent(MemoryStore(), answer))
    with pytest.raises(RuntimeError, match="1 calls to fake came back without a reply"):
        settle(run, "ask", lambda: iter([{"id": "1", "text": "gout", "questions": [], "calls": {}}]))


def test_json_that_does_not_fit_is_a_failure_not_asked_for_ever(tmp_path):
    run, path = run_of(tmp_path, ranker=None, judge=None), write_jsonl(tmp_path / "c.jsonl", [{"text": "gout"}])
    run.teacher.answer = lambda call: {"question_1": "Why?"}
    settle(run, "ask", lambda: corpus([path]))
    assert [*run.failed.values()] == ["JSON that was not asked for"] and len(run.teacher.asked) == 1


def test_a_stage_without_its_model_says_so(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": "gout"}])
    with pytest.raises(InputError, match="ask: a row wants a model that is not given; expected --teacher"):
        synth.run_stage(run_of(tmp_path, teacher=None, reasoner=None), "ask", lambda: corpus([path]))


def test_other_rooms_have_their_hooks(tmp_path, source):
    seen = []

    def filtered(rows, settings):
        seen.append(settings)
        for i, row in enumerate(rows):
            yield row, ("spam", "it shouts") if i % 4 == 3 else None
    store = MemoryStore()
    ranker = Scores("reward", lambda pairs: [float(len(text)) for _, text in pairs], store)
    policy = FakeTeacher(store, lambda call: "Short.", "policy")
    run = go(run_of(tmp_path, store, filtered=filtered, settings="as given", ranker=ranker, policy=policy),
             source)
    assert seen == ["as given"] * 2
    lost = rows(run, "texts", "dropped")
    assert len(lost) == 12 and {(row["rule"], row["evidence"]) for row in lost} == {("spam", "it shouts")}
    assert rows(run, "filter", "dropped")
    for row in rows(run, "rank"):
        left = [one["text"] for one in row["responses"] if one["label"] != "wrong"]
        assert len(left) == 1 or row["ranking"] == [len(text) for text in left]
    assert {row["paired"] for row in rows(run, "pair")} <= {"common", "scored lower", "no other answer", "wrong"}
    assert any(row.get("rejected") == "Short." for row in rows(run, "pair"))

# ----- a process against a server -------------------------------------------------------------------------------------


def call_of(request):
    """(the model, the Call that was asked first, whether this request only has its JSON repaired) of a request."""
    body = dict(request)
    messages, model = body.pop("messages"), body.pop("model")
    schema = body.pop("response_format", {"json_schema": {"schema": None}})["json_schema"]["schema"]
    repair = messages[-1]["content"].startswith("This cannot be used")
    return model, Call(tuple(messages[:-2] if repair else messages), dict(sorted(body.items())), schema), repair


def answered(request):
    """(status, body) by `answer`, which is a function of the call; a repair has other words, and so another chance."""
    _, call, repair = call_of(request)
    said = answer(replace(call, messages=tuple(request["messages"])) if repair else call)
    if isinstance(said, Exception):
        return 413, {"error": {"message": str(said)}}
    thought, text = said if isinstance(said, tuple) else (None, said)
    return 200, completion(json.dumps(text) if isinstance(text, dict) else text, reasoning=thought)


@pytest.fixture
def site(monkeypatch):
    """A server with the models "teacher" and "judge", each at an address of its own. `log` has [key, when its reply
    was sent or None] of every request, `opened` counts the runs that have begun."""
    pytest.importorskip("openai", reason="no openai: pip install -e '.[synth]'")
    server, rng = Scripted(), random.Random(0)
    server.log, server.opened, server.seconds = [], 0, 0.0

    async def script(request, writer):
        if isinstance(request, str):
            server.opened += "teacher" in request
            return 200, {}, {"data": [{"id": request.split("/")[1]}]}
        model, call, _ = call_of(request)
        server.log.append(entry := [key_of(model, call), None])
        await asyncio.sleep(server.seconds * rng.uniform(0.5, 1.5))
        status, body = answered(request)
        entry[1] = time.monotonic()
        return status, {}, body
    server.script = script
    root = server.url.removesuffix("/v1")
    server.flags = ["--teacher", f"{root}/teacher/v1", "--judge", f"{root}/judge/v1", "--concurrency", "8"]
    yield server
    server.close()


def forked(flags):
    """The process of a run, without the two seconds in which a new Python imports torch."""
    if pid := os.fork():
        return pid
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        main(flags)
        os._exit(0)
    finally:
        os._exit(1)


def started(flags):
    return subprocess.Popen([sys.executable, str(ROOT / "synth.py"), *flags], stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL).pid


def stored_keys(out, copy):
    """The keys in the store of a run that was killed, read in a copy: to open the files would mend them."""
    shutil.rmtree(copy, ignore_errors=True)
    copy.mkdir()
    for path in out.glob("calls.sqlite*"):
        shutil.copy(path, copy)
    if not (copy / "calls.sqlite").exists():
        return set()
    with sqlite3.connect(copy / "calls.sqlite") as db:
        return {key for key, in db.execute("SELECT key FROM replies")} if db.execute(
            "SELECT 1 FROM sqlite_schema WHERE name = 'replies'").fetchone() else set()


def results_of(out):
    return {name: data for name, data in files_of(out).items() if not name.startswith("calls.sqlite")}


def waited(pid, until):
    """The exit status of a process that ends before `until`, None for one that does not."""
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def check_killed(server, tmp_path, source, start, kills, longest):
    """Kills runs `kills` times, each at a random moment of at most `longest` seconds after it has opened, and starts
    them again; a run that ends before a kill has to end is followed by one in a new folder. Returns the figures."""
    rng, lost, unsaved, asked, runs, deaths = random.Random(0), 0, 0, 0, 0, []
    out = tmp_path / "out"  # of all runs, because rows that are judged name the file in it
    flags = ["run", "--corpus", source, *server.flags, "--out", str(out)]
    assert waited(start(flags), time.monotonic() + 600) == 0
    expected, needed = results_of(out), {key for key, _ in server.log}
    while len(deaths) < kills:
        out.rename(tmp_path / f"run{runs}")
        status, paid, runs = None, set(), runs + 1
        while status != 0:
            before, first, opened = stored_keys(out, tmp_path / "copy"), len(server.log), server.opened
            pid = start(flags)
            while server.opened == opened and (status := waited(pid, time.monotonic() + 0.005)) is None:
                pass
            begun = time.monotonic()
            kill_at = begun + (rng.uniform(0, longest) if len(deaths) < kills else 600)
            if status is None and (status := waited(pid, kill_at)) is None:
                os.kill(pid, signal.SIGKILL)
                died = time.monotonic()
                deaths.append(died - begun)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                time.sleep(0.05)  # the server reads what is still on its way
            assert status in (0, -signal.SIGKILL)
            life = dict(server.log[first:])
            assert not before & {*life}  # no call whose reply was stored is asked again
            assert {*life} <= needed
            gone = {*life} - stored_keys(out, tmp_path / "copy")
            assert status or not gone
            late = [died - life[key] for key in gone if life[key] and life[key] < died]  # since these were sent
            # no more than were in flight: asked, or answered in the last moments, and then on the way to the disk
            assert len(gone) - len(late) <= 8 and len(gone) <= 2 * 8 and max(late, default=0) < 2, (len(gone), late)
            unsaved += len(late)
            lost, asked, paid = lost + len(gone), asked + len(life), paid | {*life}
        assert paid == needed
        found = results_of(out)
        assert [name for name in expected if expected[name] != found.get(name)] == [] and {*found} == {*expected}
    assert asked == runs * len(needed) + lost  # exactly what was lost is asked again
    return {"kills": len(deaths), "runs": runs, "calls": len(needed), "asked again": lost,
            "of these sent, but not yet stored": unsaved,
            "seconds to the kills": [round(one, 2) for one in sorted(deaths)]}


FINDINGS = ["a swollen calf", "a low sodium", "a loud murmur", "a stiff neck", "a dry cough", "a high lactate",
            "a weak pulse", "a red eye", "a painful hip", "a pale skin", "a slow reflex", "a broad complex"]


def passages(count, questions):
    """English texts that the filter keeps, but for the first, which comes twice, and questions with options."""
    rng, rows = random.Random(4), []
    for i in range(count - 1):
        rows.append({"text": " ".join(
            f"In ward {rng.randint(2, 999)} the patient with {one} was seen again because of {other} after "
            f"{rng.randint(2, 40)} days." for one, other in (rng.sample(FINDINGS, 2) for _ in range(4))),
            "url": f"page/{i}"})
    return [*rows, rows[0]] + [
        {"question": f"Which of these explains {FINDINGS[i]} in the morning?", "options": ["Gout", "Lupus", "Rash"],
         "answer_idx": i % 3} for i in range(questions)]


def test_a_killed_process_ends_in_the_same_files(site, tmp_path):
    from filters import language_identifier
    language_identifier()  # once, and not in each process
    site.seconds = 0.02
    source = write_jsonl(tmp_path / "corpus.jsonl", passages(5, 1))
    figures = check_killed(site, tmp_path, source, forked, 3, 0.4)
    assert figures["kills"] == 3 and figures["calls"] > 40


@pytest.mark.heavy
def test_a_process_killed_50_times_ends_in_the_same_files(site, tmp_path):
    site.seconds = 0.8
    source = write_jsonl(tmp_path / "corpus.jsonl", passages(40, 8))
    figures = check_killed(site, tmp_path, source, started, 50, 4.0)
    print(figures)
    assert figures["kills"] == 50 and figures["calls"] > 300
    names = {*results_of(tmp_path / "out")}
    assert {"manifest.json", "failed.jsonl", "FineMed-DPO/FineMed-DPO.jsonl", "dropped/texts.jsonl"} <= names

def test_a_batch_that_another_engine_answered_is_the_online_run(site, tmp_path):
    """Its replies come shuffled and one in thirty is missing; wrong JSON, which nobody knows as such at the import, is
    repaired by the run that follows, as it was online."""
    source, out, batch = write_jsonl(tmp_path / "c.jsonl", passages(12, 3)), tmp_path / "out", tmp_path / "batch.jsonl"
    whole = ["--no-filter", "--out", str(out)]
    main(["run", "--corpus", source, *site.flags, *whole])
    expected, online, rng = results_of(out), site.log, random.Random(2)
    out.rename(tmp_path / "online")
    site.log, wrong, missing, paid = [], 0, 0, set()
    main(["texts", "--corpus", source, *whole])
    for stage in [*synth.CHAIN[1:], "judge"]:
        role = "judge" if stage in ("rank", "judge") else "teacher"
        at = site.flags[site.flags.index(f"--{role}"):][:2] if stage in stages.SCRIPTS and stage != "select" else []
        data = ["--data", str(out / "stages/FineMed-SFT.jsonl")] if stage == "judge" else []
        if data:
            (out / "stages/FineMed-SFT.jsonl").symlink_to("filter.jsonl")
        for _ in range((2 if stage == "classify" else 1) if at else 0):  # verify: the first round
            main(["export-batch", "--stage", stage, "--role", role, "--batch", str(batch), *at, *whole, *data])
            replies = []
            for row in map(json.loads, batch.read_text().splitlines()):
                status, body = answered(row["body"])
                useful, schema = status == 200, call_of(row["body"])[1].schema
                if useful and schema:
                    text = body["choices"][0]["message"]["content"]
                    useful = synth.fits(Reply("", text, value=json.loads(text)), schema)
                    wrong += not useful
                if rng.random() < 0.03:
                    missing += 1
                    continue
                replies.append({"custom_id": row["custom_id"], "response": {"status_code": status, "body": body}})
                paid |= {row["custom_id"].partition(".")[0]} if useful else set()
            rng.shuffle(replies)
            main(["import-batch", "--batch", write_jsonl(tmp_path / "replies.jsonl", replies or [" "]), "--out",
                  str(out)])
        main([stage, *at, *whole, *data])
    (out / "stages/FineMed-SFT.jsonl").unlink()
    main(["report", "--out", str(out)])
    found = results_of(out)
    assert wrong > 0 and missing > 0 and len(paid) > 70, (wrong, missing, len(paid))
    assert {*found} == {*expected}
    assert [name for name in expected if expected[name] != found[name].replace(
        b"FineMed-SFT.jsonl", b"filter.jsonl")] == []
    assert not paid & {key for key, _ in site.log} and {key for key, _ in online} == paid | {key for key, _ in site.log}


# ----- judge ---------------------------------------------------------------------------------------------------------


def test_data_sets_are_judged_and_compared(tmp_path):
    ours = write_jsonl(tmp_path / "ours.jsonl", [{"instruction": f"Q{i}", "response": f"A{i}"} for i in range(9)])
    theirs = write_jsonl(tmp_path / "theirs.jsonl",
                         [{"instruction": f"Q{i}", "response": f"B{i}"} for i in range(4, 12)])
    run = run_of(tmp_path / "out", teacher=None, reasoner=None)
    found = judge_files(run, {"ours": ours, "theirs": theirs})
    assert [state["in"] for state in found.values()] == [9, 8]
    kept = rows(run, "judge-ours")
    assert kept and all({"quality", "complexity", "instruction", "source"} <= {*row} for row in kept)
    found, = compare_files(run, ours, theirs).values()
    assert found["in"] == 5 and found["found"] == {"neither": found["out"], "the same place twice": found["out"]}

# ----- command line --------------------------------------------------------------------------------------------------


@pytest.fixture
def servers(monkeypatch):
    """Addresses name fake teachers; the store of a folder outlives the command."""
    stores, made = {}, {}

    class Opened:
        @classmethod
        def open(cls, spec, store, *, model=None, allow_remote=False, retry_failed=False):
            made[spec] = FakeTeacher(store, answer, model or spec)
            return made[spec]
    monkeypatch.setattr(synth, "Teacher", Opened)
    monkeypatch.setattr(synth, "Store", lambda path: stores.setdefault(str(path), MemoryStore()))
    return made


def test_run_and_stages_by_themselves_give_the_same(tmp_path, source, servers, capsys):
    flags = ["--teacher", "T", "--judge", "J", "--no-filter", "--licence", "CC0"]
    main(["run", "--corpus", source, "--out", str(tmp_path / "a"), *flags])
    assert "CC0" in capsys.readouterr().out
    out = ["--out", str(tmp_path / "b"), *flags]
    main(["texts", "--corpus", source, *out])
    for stage in synth.CHAIN[1:]:
        main([stage, *out])
    (tmp_path / "b/stages/FineMed-SFT.jsonl").symlink_to("filter.jsonl")
    main(["judge", *out, "--data", str(tmp_path / "b/stages/FineMed-SFT.jsonl")])
    (tmp_path / "b/stages/FineMed-SFT.jsonl").unlink()
    main(["report", "--json", *out[:2]])
    manifest = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert manifest["roles"] == {"teacher": "T", "reasoner": "T", "judge": "J", "ranker": "J"}
    a, b = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    assert {*a} == {*b} and "failed.jsonl" in a and any("judge-" in name for name in a)
    there, here = b"/b/stages/FineMed-SFT.jsonl", b"/a/stages/filter.jsonl"
    assert [name for name in a if a[name] != b[name].replace(there, here)] == []


def test_preview_shows_rows_in_full_and_the_run_does_not_pay_again(tmp_path, source, servers, capsys):
    flags = ["--corpus", source, "--teacher", "T", "--judge", "J", "--out", str(tmp_path), "--no-filter"]
    main(["preview", "20", "--price", "T=1,2", *flags])
    text = capsys.readouterr().out
    shown, estimate = text[:text.rindex("\n{")], json.loads(text[text.rindex("\n{"):])
    assert [line for line in shown.splitlines() if line.startswith("-----")] == [
        f"----- {source}:{i}" for i in range(1, 21)]
    assert shown.count("\ntext: ") == 20
    assert all(f"\n{name}: " in shown for name in ("rule", "response", "scores", "department"))
    asked = servers["T"].asked
    assert (estimate["texts"], estimate["previewed"]) == (48, 20)
    failed = [json.loads(line)["key"] for line in (tmp_path / "failed.jsonl").read_text().splitlines()]
    paid = len([key for key in asked if key not in failed])
    assert estimate["models"]["T"]["calls"] == round(len(asked) * 48 / 20)
    assert estimate["models"]["T"]["cost"] == round(round(paid * (10 * 1 + 3 * 2) / 1e6, 4) * 48 / 20, 2)
    main(["run", *flags])
    assert not {*asked} & {*servers["T"].asked} and len(servers["T"].asked) > len(asked)


@pytest.mark.parametrize("flags, message", [
    (["run", "--out", "o"], "run: expected --corpus FILE"),
    (["preview", "--corpus", "c", "--out", "o"], "expected preview N"),
    (["run", "3", "--corpus", "c", "--out", "o"], "expected preview N"),
    (["judge", "--out", "o"], "judge: expected --data FILE"),
    (["judge", "--data", "a", "b", "--against", "c", "--out", "o"], "or one FILE and --against another"),
    (["run", "--corpus", "c", "--out", "o", "--price", "T=1"], "expected MODEL=READ,WRITTEN"),
    (["run", "--corpus", "c", "--out", "o", "--price", "T=1,-2"], "expected MODEL=READ,WRITTEN"),
    (["judge", "--data", "a/c.jsonl", "b/c.jsonl", "--out", "o"], "two files have one name; expected different names"),
    (["export-batch", "--batch", "b", "--out", "o"], "export-batch: expected --batch FILE and --stage"),
    (["import-batch", "--out", "o"], "import-batch: expected --batch FILE"),
    (["export-batch", "--batch", "b", "--stage", "ask", "--out", "o"], "found no --teacher"),
    (["run", "--corpus", "c", "--out", "o", "--benchmark", "medq=x"], "expected KIND=FILE with one of medqa"),
    (["classified", "--out", "o"], "invalid choice"),
])
def test_wrong_flags_are_refused(flags, message, tmp_path, monkeypatch, servers):
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "c", [{"text": "gout"}])
    (tmp_path / "o/stages").mkdir(parents=True)
    write_jsonl(tmp_path / "o/stages/classify.jsonl", [{"text": "gout"}])
    with pytest.raises(InputError) as error:
        main(flags)
    assert message in str(error.value)


def test_a_model_does_not_judge_itself_without_saying_so(tmp_path, source, servers):
    flags = ["--corpus", source, "--out", str(tmp_path / "a"), "--no-filter", "--limit", "3", "--teacher"]
    with pytest.raises(InputError, match="--judge: T is also a model that writes; expected another, or --same-judge"):
        main(["run", *flags, "T", "--judge", "J", "--judge-model", "T"])
    with pytest.raises(InputError, match="--judge: R is also"):
        main(["run", *flags, "T", "--reasoner", "R", "--judge", "R"])
    with pytest.raises(InputError, match="--judge: P is also"):  # it would rank its own answers below the traces
        main(["run", *flags, "T", "--policy", "P", "--judge", "P"])
    main(["run", *flags, "T", "--same-judge"])
    data = [str(path) for path in (tmp_path / "a/FineMed-SFT").glob("*.jsonl")]
    with pytest.raises(InputError, match="--judge: T is also"):  # the manifest above the data names its writers
        main(["judge", "--data", *data, "--judge", "T", "--out", str(tmp_path / "b")])
    main(["judge", "--data", *data, "--judge", "T", "--same-judge", "--out", str(tmp_path / "b")])
    main(["judge", "--data", *data, "--judge", "J", "--out", str(tmp_path / "b")])
    manifest = json.loads((tmp_path / "b/manifest.json").read_text())
    assert manifest["roles"]["judge"] == "J" and {*manifest["stages"]} == {f"judge-{Path(path).stem}" for path in data}


def test_what_no_run_can_be_made_of_is_named(tmp_path, servers):
    out = ["--out", str(tmp_path / "o"), "--teacher", "T"]
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"empty\.jsonl: found no rows; expected rows with text"):
        main(["run", "--corpus", str(tmp_path / "empty.jsonl"), *out])
    with pytest.raises(InputError, match="o: found no stages; expected the folder of a run"):
        main(["report", *out])
    (tmp_path / "half.jsonl").write_text('{"text": "gout"}\n{"text": "\\ud83d"}\n')
    with pytest.raises(InputError, match=r"classify, .*half\.jsonl:2: a call holds a value that is not JSON"):
        main(["run", "--corpus", str(tmp_path / "half.jsonl"), "--no-filter", *out])


def test_failures_of_a_server_wait_for_retry_failed(site, tmp_path, monkeypatch):
    flags = ["run", "--corpus", write_jsonl(tmp_path / "c.jsonl", passages(12, 3)), *site.flags, "--no-filter", "--out",
             str(tmp_path / "out")]
    main(flags)
    failed = [json.loads(line) for line in (tmp_path / "out/failed.jsonl").read_text().splitlines()]
    assert [row["key"] for row in failed] == sorted({row["key"] for row in failed}) and len(failed) > 3
    assert all({*row} == {"key", "stage", "model", "reason"} for row in failed)
    assert {row["reason"] for row in failed} >= {"413: timed out"}
    before, site.log = results_of(tmp_path / "out"), []
    main(flags)
    assert site.log == [] and results_of(tmp_path / "out") == before
    main([*flags, "--retry-failed"])
    assert {key for key, _ in site.log} == {row["key"] for row in failed} and results_of(tmp_path / "out") == before
    site.log, mended = [], answered  # the server recovers: only then new calls follow
    monkeypatch.setitem(globals(), "answered", lambda request: (
        mended(request) if mended(request)[0] == 200 else (200, completion("Surgery"))))
    main([*flags, "--retry-failed"])
    keys = [key for key, _ in site.log]
    assert {row["key"] for row in failed} <= {*keys}
    assert "413" not in (tmp_path / "out/failed.jsonl").read_text()


def test_a_hostile_server_delays_a_run_and_changes_nothing(site, tmp_path, monkeypatch):
    """Each call's first request is refused, fails, hangs or breaks off; the files are those of a kind server."""
    source, out = write_jsonl(tmp_path / "c.jsonl", passages(8, 2)), tmp_path / "out"
    flags = ["run", "--corpus", source, *site.flags, "--no-filter", "--out", str(out)]
    main(flags)
    expected, asked, rng = results_of(out), {key for key, _ in site.log}, random.Random(3)
    out.rename(tmp_path / "kind")
    kind, seen, used = site.script, set(), Counter()

    async def hostile(request, writer):
        text = json.dumps(request, sort_keys=True)
        if isinstance(request, str) or text in seen:
            return await kind(request, writer)
        seen.add(text)
        way = "hang" if len(seen) == 40 else rng.choice(["429", "429", "429", "500", "cut off", "no JSON", "kind"])
        used[way] += 1
        if way == "kind":
            return await kind(request, writer)
        if way == "hang":
            await asyncio.sleep(9)
        elif way == "cut off":
            writer.write(b"HTTP/1.1 200 x\r\ncontent-length: 5000\r\n\r\n{\"choices\": [")
        else:
            return {"429": (429, {"retry-after": "0.03"}, {}), "500": (500, {}, {}), "no JSON": (200, {}, b"{")}[way]
    site.script, site.log = hostile, []
    made, opened = [], synth.Teacher.open
    monkeypatch.setattr("teachers.BACKOFF", (0.01, 0.04))
    monkeypatch.setattr(synth.Teacher, "open", lambda *args, **more: made.append(
        opened(*args, timeout=0.5, **more)) or made[-1])
    main(flags)
    found = results_of(out)
    assert [name for name in expected if expected[name] != found.get(name)] == [] and {*found} == {*expected}
    assert len(used) == 6 and {key for key, _ in site.log} == asked
    counts = sum((teacher.counts for teacher in made), Counter())
    assert (counts["refused"], counts["broken"]) == (used["429"], used["500"] + used["cut off"] + used["no JSON"])
    assert counts["timed out"] >= used["hang"] == 1


def test_no_key_is_in_any_file_of_a_run(site, tmp_path, monkeypatch, capsys):
    """Every reply holds the key: in its text, in the thought, in JSON's escapes, in an error."""
    secret = "sk-secret-0123456789abcdef"
    hidden, whole = "".join(f"\\u{ord(c):04x}" for c in secret), answered
    monkeypatch.setenv("OPENAI_API_KEY", secret)

    def echoing(request):
        status, body = whole(request)
        if status == 200:
            message = body["choices"][0]["message"]
            if message["content"].startswith("{"):
                message["content"] = message["content"].replace("Which ", f"Which {hidden} ").replace(
                    "It is ", f"It is {secret} ")
            else:
                message["content"] += f" {secret}" * (" " in message["content"])
            message["reasoning"] = f"{message['reasoning']} {secret}" if message["reasoning"] else None
        return status, body if status == 200 else {"error": {"message": f"{secret} is wrong"}}
    monkeypatch.setitem(globals(), "answered", echoing)
    source = write_jsonl(tmp_path / "c.jsonl", passages(8, 2))
    main(["run", "--corpus", source, *site.flags, "--no-filter", "--out", str(tmp_path / "out")])
    found = files_of(tmp_path)
    assert b"[key]" in found["out/stages/filter.jsonl"] and b"[key] is wrong" in found["out/failed.jsonl"]
    for text in (*map(repr, found.values()), *capsys.readouterr()):
        assert secret not in text and secret[:-3] not in text and hidden not in text

# ----- flags ---------------------------------------------------------------------------------------------------------


ENGLISH = ("Warfarin thins the blood of patients with an irregular heartbeat, and its effect has to be measured every "
           "few weeks because food and other drugs change it.")
GERMAN = ("Warfarin verdünnt das Blut von Patienten mit unregelmäßigem Herzschlag, und seine Wirkung muss alle paar "
          "Wochen gemessen werden, weil Nahrung und andere Arzneimittel sie verändern.")
HELD = "Which vitamin is withheld from a patient whose warfarin is meant to thin the blood for the rest of her life?"


def kept_texts(tmp_path, *flags, given=None):
    """[(the rule by which a row goes or None), …] of the texts stage over rows that have each their fault."""
    given = given or [{"text": ENGLISH}, {"text": GERMAN}, {"text": f"{ENGLISH} {HELD} It is vitamin K."},
                      {"text": ENGLISH.upper()}, {"text": "Buy now, order online and get free shipping! " + ENGLISH}]
    out = tmp_path / "out"
    main(["texts", "--corpus", write_jsonl(tmp_path / "c.jsonl", given), "--out", str(out), *flags])
    lost = {row["source"]: row["rule"] for row in map(json.loads, (
        out / "dropped/texts.jsonl").read_text().splitlines())}
    kept = {row["source"] for row in map(json.loads, (out / "stages/texts.jsonl").read_text().splitlines())}
    places = [f"{tmp_path / 'c.jsonl'}:{i + 1}" for i in range(len(given))]
    assert sorted([*lost, *kept]) == sorted(places[:len(lost) + len(kept)])
    return [lost.get(place, None if place in kept else "not read") for place in places]


def test_the_flags_of_the_filter(tmp_path, servers):
    benchmark = write_jsonl(tmp_path / "medqa.jsonl", [
        {"question": HELD, "options": {"A": "Vitamin A", "B": "Vitamin K"}, "answer_idx": "B"}])
    assert kept_texts(tmp_path) == [None, "language", None, "exact", "spam"]
    assert kept_texts(tmp_path, "--languages", "en", "de") == [None, None, None, "exact", "spam"]
    assert kept_texts(tmp_path, "--languages", "de")[:2] == ["language", None]
    assert kept_texts(tmp_path, "--benchmark", f"medqa={benchmark}") == [None, "language", "leak", "exact", "spam"]
    assert json.loads((tmp_path / "out/manifest.json").read_text())["filter"] == {
        "languages": ["en"], "encoder": None,
        "benchmarks": [{"kind": "medqa", "path": benchmark, "sha256": sha256(benchmark)}]}
    assert kept_texts(tmp_path, "--no-filter", "--benchmark", f"medqa={benchmark}") == [None] * 5
    assert kept_texts(tmp_path, "--limit", "2") == [None, "language", *["not read"] * 3]


def test_an_encoder_drops_questions_that_are_nearly_the_same(tmp_path, servers):
    """The tiny encoder reads 40 tokens, so the third text has the first's vector, but other words after them."""
    from encoder import Encoder
    folder, _ = tiny_encoder(tmp_path / "bge-tiny-en")
    rng = random.Random(0)
    begin, *ends = (" ".join(rng.choice(["patient", "pain", "chest", "fever", "drug", "asthma", "surgery", "give"])
                             for _ in range(45)) for _ in range(3))
    given = [{"text": text} for text in (f"{begin} {ends[0]}", ends[1], f"{begin} {ends[1]}")]
    first, second, third = Encoder.from_dir(folder).encode([row["text"] for row in given])
    assert first @ third > 0.99 > first @ second
    assert kept_texts(tmp_path, "--encoder", str(folder), "--device", "cpu", given=given) == [None, None, "embedding"]
    assert kept_texts(tmp_path, given=given) == [None] * 3
    with pytest.raises(InputError, match="no-encoder: does not exist; expected the folder of an encoder"):
        kept_texts(tmp_path, "--encoder", str(tmp_path / "no-encoder"))


def test_a_limit_holds_for_a_run_and_for_a_stage(tmp_path, source, servers):
    flags = ["--teacher", "T", "--no-filter", "--out", str(tmp_path)]
    main(["run", "--corpus", source, "--limit", "5", *flags])
    states = {stage: json.loads((tmp_path / f"stages/{stage}.json").read_text()) for stage in ("texts", "classify")}
    assert [state["in"] for state in states.values()] == [5, 5]
    main(["classify", "--limit", "2", *flags])
    assert json.loads((tmp_path / "stages/classify.json").read_text())["in"] == 2
    with pytest.raises(InputError, match="found '0', expected a whole number of at least 1"):
        main(["classify", "--limit", "0", *flags])


def test_prices_make_the_cost(tmp_path, source, servers):
    flags = ["--teacher", "T", "--judge", "J", "--no-filter", "--out", str(tmp_path)]
    main(["run", "--corpus", source, "--limit", "5", "--price", "T=1000,50", "=ModelWithoutCalls=1,1", *flags])
    models = json.loads((tmp_path / "manifest.json").read_text())["models"]
    counts = models["T"]
    assert counts["cost"] == round((1000 * counts["prompt_tokens"] + 50 * counts["completion_tokens"]) / 1e6, 4) > 0
    assert "cost" not in models["J"] and f"| {counts['cost']} |" in (tmp_path / "README.md").read_text()


def test_a_reward_model_ranks(tmp_path, servers):
    transformers = pytest.importorskip("transformers")
    from reward import load_reward, rewards
    folder = tmp_path / "rewarding"
    transformers.LlamaForSequenceClassification(transformers.LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, num_labels=1, pad_token_id=0)).save_pretrained(folder)
    tiny_vocabulary(tmp_path / "v", "chatml")
    shutil.copy(tmp_path / "v/tokenizer.json", folder)
    given = [{"instruction": f"What is {word}?", "id": word,
              "responses": [{"text": f"{word} {i}", "label": "unproven"} for i in "ab"],
              "source": "s", "text": "", "questions": [], "calls": {}} for word in WORDS]
    given[3]["responses"][0]["text"] = "long " * 200  # does not fit the model's context: no score
    out = tmp_path / "out"
    main(["rank", "--data", write_jsonl(tmp_path / "r.jsonl", given), "--reward", str(folder), "--device", "cpu",
          "--judge", "J", "--out", str(out)])
    found = [json.loads(line) for line in (out / "stages/rank.jsonl").read_text().splitlines()]
    model, tokenizer = load_reward(folder)
    assert len(found) == len(WORDS) and servers["J"].asked == []
    for i, (before, row) in enumerate(zip(given, found)):
        texts = [one["text"] for one in before["responses"]]
        scores = [None if len(text) > 500 else rewards(model, tokenizer, [[
            {"role": "user", "content": before["instruction"]}, {"role": "assistant", "content": text}]])[0]
            for text in texts]
        assert row["ranking"] == pytest.approx(scores, abs=0.02) if i != 3 else row["ranking"][0] is None
        best = max(score for score in row["ranking"] if score is not None)
        assert row["response"] == texts[row["ranking"].index(best)]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["roles"]["ranker"].startswith("reward:rewarding@") and manifest["roles"]["judge"] == "J"
    assert manifest["models"][manifest["roles"]["ranker"]]["calls"] == 2 * len(WORDS)


def test_a_stage_before_its_time_names_the_missing_file(tmp_path, servers):
    with pytest.raises(InputError, match=r"stages/ask\.jsonl: no such file; expected the rows of stage ask"):
        main(["score", "--teacher", "T", "--out", str(tmp_path)])


def test_rows_of_another_file_go_into_a_stage(tmp_path, servers):
    path = write_jsonl(tmp_path / "t.jsonl", [
        {"instruction": "Q?", "response": f"The answer is ({letter}).", "options": ["a", "b"], "answer_idx": "B"}
        for letter in "BA"])
    main(["verify", "--data", path, "--out", str(tmp_path / "o")])
    run = replace(run_of(tmp_path / "o"))
    assert [row["responses"][0]["label"] for row in rows(run, "verify")] == ["verified"]
    assert [row["rule"] for row in rows(run, "verify", "dropped")] == ["wrong"]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    import tracemalloc
    peaks = []
    for count in (50, 200):
        path = write_jsonl(tmp_path / f"{count}.jsonl", [{"text": f"{i} " + "gout " * 400} for i in range(count)])
        run = run_of(tmp_path / str(count), teacher=FakeTeacher(MemoryStore(), lambda call: "Surgery"))
        run.store = run.teacher.store
        settle(run, "classify", lambda path=path: corpus([path]))
        tracemalloc.start()
        synth.run_stage(run, "classify", lambda path=path: corpus([path]))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000


def test_the_encoder_is_the_filter_s_and_the_report_s(tmp_path, servers, source, monkeypatch):
    monkeypatch.setattr(synth, "encoder_of", lambda args: f"of {args.encoder}")
    flags = ["run", "--corpus", source, "--teacher", "T", "--same-judge", "--out", str(tmp_path)]
    for more, expected in (["--encoder", "E"], "of E"), ([], None):
        with contextlib.ExitStack() as stack:
            run = synth.opened(synth.parse_args([*flags, *more]), stack)
        assert run.encode == run.settings.encode == expected

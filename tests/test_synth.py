"""The pipeline with a teacher that is a function, and as a process that is killed, against a server that is a script:
stages, resume, provenance, preview, batches and the command line."""
import asyncio
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import ROOT, FakeTeacher, Killed, MemoryStore, Scripted, completion, write_jsonl

import prompts
import stages
import synth
from calls import Call, Reply, key_of
from files import InputError
from retrieve import read_records
from rows import messages_of, pair_of
from stages import Scores
from synth import Run, chain, compare_files, corpus, judge_files, main, report, settle


@pytest.fixture(scope="module", autouse=True)
def no_fsync():
    """Most of a small run is the disk's work, which test_files.py tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
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


def test_failures_are_noted_not_asked_again_and_retried_on_request(tmp_path, source):
    noted = []
    run = go(run_of(tmp_path / "a", note=noted.append), source)
    assert noted and {row["key"] for row in noted} == {*run.failed}
    assert {row["reason"] for row in noted} == {"timed out", "JSON that was not asked for"}
    assert {row["model"] for row in noted} == {"teacher", "judge"}
    assert any(row["evidence"] == "timed out" for stage in synth.CHAIN for row in rows(run, stage, "dropped"))
    again = go(run_of(tmp_path / "b", run.store), source)  # a run without those failures
    assert {*again.teacher.asked, *again.judge.asked} == {*run.failed}


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
        return 404, {"error": {"message": str(said)}}
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
    rng, lost, asked, runs, deaths = random.Random(0), 0, 0, 0, []
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
            assert len(gone) <= 8 if status else not gone
            assert all(life[key] is None or life[key] > died - 0.25 for key in gone)  # what was in flight, no more
            lost, asked, paid = lost + len(gone), asked + len(life), paid | {*life}
        assert paid == needed
        found = results_of(out)
        assert [name for name in expected if expected[name] != found.get(name)] == [] and {*found} == {*expected}
    assert asked == runs * len(needed) + lost  # exactly what was lost is asked again
    return {"kills": len(deaths), "runs": runs, "calls": len(needed), "asked again": lost,
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
    source = write_jsonl(tmp_path / "corpus.jsonl", passages(6, 2))
    figures = check_killed(site, tmp_path, source, forked, 3, 0.5)
    assert figures["kills"] == 3 and figures["calls"] > 50


@pytest.mark.heavy
def test_a_process_killed_50_times_ends_in_the_same_files(site, tmp_path):
    site.seconds = 0.8
    source = write_jsonl(tmp_path / "corpus.jsonl", passages(40, 8))
    figures = check_killed(site, tmp_path, source, started, 50, 4.0)
    print(figures)
    assert figures["kills"] == 50 and figures["calls"] > 300
    names = {*results_of(tmp_path / "out")}
    assert {"manifest.json", "failed.jsonl", "FineMed-DPO/FineMed-DPO.jsonl", "dropped/texts.jsonl"} <= names

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


def test_failed_calls_wait_for_retry_failed(tmp_path, source, servers):
    flags = ["run", "--corpus", source, "--teacher", "T", "--judge", "J", "--out", str(tmp_path), "--no-filter"]
    main(flags)
    failed = [json.loads(line) for line in (tmp_path / "failed.jsonl").read_text().splitlines()]
    assert [row["key"] for row in failed] == sorted({row["key"] for row in failed}) and len(failed) > 3
    assert all({*row} == {"key", "stage", "model", "reason"} for row in failed)
    before = files_of(tmp_path)
    main(flags)
    assert servers["T"].asked == servers["J"].asked == [] and files_of(tmp_path) == before
    main([*flags, "--retry-failed"])
    assert {*servers["T"].asked, *servers["J"].asked} == {row["key"] for row in failed}
    assert files_of(tmp_path) == before


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
    main(["run", *flags, "T", "--same-judge"])
    data = [str(path) for path in (tmp_path / "a/FineMed-SFT").glob("*.jsonl")]
    with pytest.raises(InputError, match="--judge: T is also"):  # the manifest above the data names its writers
        main(["judge", "--data", *data, "--judge", "T", "--out", str(tmp_path / "b")])
    main(["judge", "--data", *data, "--judge", "T", "--same-judge", "--out", str(tmp_path / "b")])
    main(["judge", "--data", *data, "--judge", "J", "--out", str(tmp_path / "b")])


def test_a_batch_that_another_engine_answered_is_the_online_run(tmp_path, source, servers, capsys):
    """Its replies come shuffled, one in thirty is missing, and a schema is not known where they are imported."""
    flags = ["--teacher", "T", "--judge", "J", "--no-filter"]
    main(["run", "--corpus", source, "--out", str(tmp_path / "a"), *flags])
    out, batch, rng, sent = ["--out", str(tmp_path / "b"), *flags], tmp_path / "batch.jsonl", random.Random(1), 0
    main(["texts", "--corpus", source, *out])
    for stage in synth.CHAIN[1:]:
        for role in ("teacher", "judge") * 2 if stage in stages.SCRIPTS else ():
            main(["export-batch", "--stage", stage, "--role", role, "--batch", str(batch), *out])
            replies = []
            for line in batch.read_text().splitlines():
                row = json.loads(line)
                body = row.pop("body")
                schema = body.pop("response_format", {"json_schema": {"schema": None}})["json_schema"]["schema"]
                messages, model = tuple(body.pop("messages")), body.pop("model")
                reply = servers[model].reply(Call(messages, body, schema))
                assert row["custom_id"].partition(".")[0] == reply.key
                if not reply.failure and rng.random() > 0.03:
                    message = {"role": "assistant", "content": reply.text, "reasoning": reply.thought}
                    replies.append({"custom_id": row["custom_id"], "response": {"status_code": 200, "body": {
                        "choices": [{"message": message, "finish_reason": "stop"}], "usage": reply.usage}}})
            rng.shuffle(replies)
            sent += len(replies)
            main(["import-batch", "--batch", write_jsonl(tmp_path / "replies.jsonl", replies or [" "]), *out])
        main([stage, *out])
        sent -= len(servers["T"].asked) + len(servers["J"].asked)
    assert sent > 200
    a, b = (files_of(tmp_path / name) for name in "ab")
    del a["stages/judge-FineMed-SFT.json"], a["stages/judge-FineMed-SFT.jsonl"], a["dropped/judge-FineMed-SFT.jsonl"]
    assert [name for name in a if a[name] != b.get(name)] == ["README.md", "failed.jsonl", "manifest.json"]


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

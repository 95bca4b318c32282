"""ttt.py: what the program trains on, shows, prints and writes (test_adapt.py: the steps)."""
import argparse
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, bits, held_elsewhere, same
from safetensors.torch import load_file, save_file

import adapt
import arms
import model as M
import retrieve
import ttt
from benchmarks import Question
from files import InputError, run_main
from rows import messages_of
from tokenizer import Tokenizer

# ----- the program ---------------------------------------------------------------------------------------------------

QUESTIONS = ["What causes a fever?", "How is asthma treated?", "Why does the thyroid swell?", "What is sepsis?",
             "When is surgery needed for appendicitis?", "How does insulin work?", "What is a stroke?",
             "Which drugs harm the kidney?", "What is glaucoma?", "How is pre-eclampsia recognised?"]


@pytest.fixture(scope="session")
def toy(smollm2, minilm, tmp_path_factory):
    """A random two-layer Llama with SmolLM2's tokenizer, and an index of the demo's traces: fast, and all real code."""
    folder = tmp_path_factory.mktemp("toy")
    config = M.LlamaConfig(vocab_size=49152, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=4096,
                           rope_scaling=None, tie_word_embeddings=True)
    M.save_model(M.Llama(config).to(torch.bfloat16).init_weights(), folder / "model", source=smollm2)
    records, sources, _ = retrieve.read_records([ROOT / "demo/data/traces.jsonl"], "instruction")
    retrieve.Index.build(retrieve.Encoder.from_dir(minilm), records, sources=sources).save(folder / "index")
    return folder


def settings(toy, **changes):
    argv = ["--question", "x", "--model", str(toy / "model"), "--index", str(toy / "index"), "--max-new-tokens", "12"]
    args = ttt.parse_args(argv)
    return ttt.settings_of(args) | {"k": 4, "context": 0, "check": False} | changes


def test_ten_questions_in_two_orders_give_the_same_tokens(toy, monkeypatch):
    monkeypatch.setattr(ttt, "MAX_TRACE_TOKENS", 250)  # for speed; at 200 four questions find only prompts
    answerer, answers = ttt.Answerer(settings(toy, lr=1e-3, k=2)), [{}, {}]
    plain = ttt.Answerer(settings(toy, ttt=False))
    for order, found in zip((QUESTIONS, QUESTIONS[::-1]), answers):
        for question in order:
            found[question] = answerer.answer(question)["answer"]
    assert answers[0] == answers[1]
    assert any(plain.answer(question)["answer"] != answers[0][question] for question in QUESTIONS)


def test_an_answer_tells_its_neighbours_before_and_its_report_after_the_steps(toy, monkeypatch):
    monkeypatch.setattr(ttt, "MAX_TRACE_TOKENS", 250)  # for speed
    answerer, told = ttt.Answerer(settings(toy, k=2)), []
    before = bits(answerer.model)

    def tell(what):
        return lambda found: told.append((what, found, same(answerer.model, before)))
    result = answerer.answer("What is asthma?", (), tell("neighbours"), tell("report"), tell("text"))
    assert [what for what, *_ in told[:3]] == ["neighbours", "report", "text"] and len(result["neighbours"]) == 2
    assert told[0][1:] == (result["neighbours"], True)
    assert told[1][1].applied and told[1][1].loss_before == result["ttt"]["loss_before"]
    assert all(not untouched for _, _, untouched in told[1:])
    assert "".join(found for what, found, _ in told if what == "text") == result["answer"]
    assert same(answerer.model, before)


def test_busy_cores_are_left_before_the_steps_and_before_the_answer(toy, monkeypatch):
    monkeypatch.setattr(ttt, "MAX_TRACE_TOKENS", 250)  # for speed
    answerer, order = ttt.Answerer(settings(toy, k=1, max_new_tokens=2)), []
    monkeypatch.setattr(answerer.threads, "leave_busy_cores", lambda: order.append("threads"))
    answerer.answer("What is asthma?", (), *(lambda found, what=what: order.append(what)
                                             for what in ("neighbours", "report", "text")))
    assert order[:5] == ["neighbours", "threads", "report", "threads", "text"]


def test_the_steps_are_taken_nearest_first_and_as_the_flags_say(toy, monkeypatch):
    """Three neighbours by their vectors, brute force, and the order in which their traces come to `adapted`."""
    monkeypatch.setattr(ttt, "MAX_TRACE_TOKENS", 250)  # for speed
    flags = ["--question", "What is asthma?", "--model", str(toy / "model"), "--index", str(toy / "index"), "--k", "3",
             "--max-new-tokens", "1", "--lr", "0.002", "--steps", "2", "--optimizer", "sgd", "--seed", "5",
             "--context", "0"]
    answerer, seen, adapted = ttt.Answerer(ttt.settings_of(ttt.parse_args(flags))), [], ttt.adapted

    def noted(model, examples, **settings):
        seen.append((examples, {name: value for name, value in settings.items() if name != "unless"}))
        return adapted(model, examples, **settings)
    monkeypatch.setattr(ttt, "adapted", noted)
    answerer.answer("What is asthma?")
    scores = answerer.index.vectors @ answerer.encoder.encode(["What is asthma?"])[0]
    nearest = [answerer.example(i, []) for i in np.argsort(-scores)[:3]]
    assert seen == [(nearest, {"steps": 2, "lr": 0.002, "optimizer": "sgd", "seed": 5,
                               "check": True})]


def prompts_of(answerer, monkeypatch):
    """A list of the prompts that `generate` gets from now on; it ends each answer at once."""
    prompts = []
    monkeypatch.setattr(ttt, "generate", lambda model, ids, **more: prompts.append(ids) or iter(more["stop_ids"]))
    return prompts


def test_neighbours_in_the_prompt_stand_as_those_of_the_context_arm(toy, monkeypatch):
    """The nearest last, beside the question; other ones are trained on, and with --k 0 none."""
    monkeypatch.setattr(ttt, "MAX_TRACE_TOKENS", 250)  # for speed
    answerer, trained, adapted = ttt.Answerer(settings(toy, k=0, context=3, max_new_tokens=1)), [], ttt.adapted
    prompts = prompts_of(answerer, monkeypatch)
    monkeypatch.setattr(ttt, "adapted", lambda model, examples, **more: trained.append(len(examples)) or adapted(
        model, examples, **more))
    result = answerer.answer("What is asthma?")
    scores = answerer.index.vectors @ answerer.encoder.encode(["What is asthma?"])[0]
    records = [messages_of(answerer.index.records[i]) for i in np.argsort(-scores)[:3]]
    flags = argparse.Namespace(prompt="chat", measure="bpb", by="letter")
    run = arms.Evaluation(flags, None, answerer.tokenizer, 4096, [], set())
    question = Question(1, "", "What is asthma?", {}, None, "", "", None, None)
    wanted = [(0, 0, messages, False) for messages in records]
    assert prompts == [arms.prompt_of(run, question, wanted[::-1])]
    assert [neighbour["in_prompt"] for neighbour in result["neighbours"]] == [True, True, True]
    assert not result["ttt"]["applied"] and result["ttt"]["reason"] == "switched off" and result["ttt"]["context"] == 3
    answerer.settings |= {"k": 3, "context": 1, "system": "Be brief."}
    history = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Yes?"}]
    result = answerer.answer("What is asthma?", history)
    assert prompts[1] == ttt.prompt_ids(answerer.tokenizer, "Be brief.", "What is asthma?", [*records[0], *history])
    assert trained == [0, 3] and [one.get("in_prompt") for one in result["neighbours"]] == [True, None, None]


def test_neighbours_that_would_take_the_answers_room_stay_out_of_the_prompt(toy, monkeypatch):
    answerer = ttt.Answerer(settings(toy, k=0, context=3, max_new_tokens=100))
    prompts = prompts_of(answerer, monkeypatch)
    answerer.answer("What is asthma?")
    whole = len(prompts[0])
    for room, expected in ((100, 3), (99, 2)):
        answerer.model.config = replace(answerer.model.config, max_position_embeddings=whole + room)
        result = answerer.answer("What is asthma?")
        assert sum("in_prompt" in neighbour for neighbour in result["neighbours"]) == expected
    assert prompts[1] == prompts[0] and len(prompts[2]) < whole


@pytest.mark.parametrize("applied, typical, check, expected", [
    (True, 2.0, True, True), (False, 2.0, True, False), (False, -1.0, True, True), (False, 2.0, False, True)])
def test_neighbours_stand_in_the_prompt_where_the_steps_helped_or_the_nearest_is_near(toy, applied, typical, check,
                                                                                     expected, monkeypatch):
    answerer = ttt.Answerer(settings(toy, k=5, context=2, check=check, max_new_tokens=1))
    prompts, checks = prompts_of(answerer, monkeypatch), []
    answerer.far, answerer.near = -1.0, typical

    @contextlib.contextmanager
    def scripted(model, examples, **more):
        checks.append((len(examples), more["check"]))
        yield adapt.Report(applied=applied)
    monkeypatch.setattr(ttt, "adapted", scripted)
    neighbours = answerer.answer("What is asthma?")["neighbours"]
    first, second = (messages_of(answerer.index.records[one["id"]]) for one in neighbours[:2])
    assert prompts == [ttt.prompt_ids(answerer.tokenizer, None, "What is asthma?", [*second, *first] * expected)]
    assert ["in_prompt" in one for one in neighbours] == [expected] * 2 + [False] * 3 and checks == [(5, check)]


@pytest.mark.parametrize("check", [True, False])
def test_a_question_outside_of_the_index_changes_nothing(toy, check, monkeypatch):
    """By the nearest that can be trained on; the model is not even asked; --always asks nobody."""
    answerer = ttt.Answerer(settings(toy, k=2, context=2, check=check, max_new_tokens=1))
    monkeypatch.setattr(ttt, "MAX_TRACE_TOKENS", 250)  # for speed
    monkeypatch.setattr(ttt, "greedy_nll", lambda *_: pytest.fail("asked") if outside else (9.0, 9))
    plain = ttt.prompt_ids(answerer.tokenizer, None, "What is asthma?")
    scores, found = answerer.index.search(answerer.encoder.encode(["What is asthma?"], is_query=True), 2)
    (first, second), nearest, example = scores[0].tolist(), found[0, 0], answerer.example

    def maybe_without_answer(i, system):
        if i == nearest and not usable:
            raise InputError("it has no answer")
        return example(i, system)
    monkeypatch.setattr(answerer, "example", maybe_without_answer)
    prompts = prompts_of(answerer, monkeypatch)
    for far, usable, outside in ((first + 1e-3, True, True), (first - 1e-3, True, False), (first - 1e-3, False, True)):
        answerer.far = far
        result = answerer.answer("What is asthma?")["ttt"]
        assert result["applied"] == (prompts[-1] != plain) == (not (outside and check))
        assert result["reason"] == (f"the index holds nothing like the question: its nearest scores "
                                    f"{first if usable else second:.3f}, expected {far:.3f}"
                                    if outside and check else None)


def test_the_index_says_what_is_near_and_far(toy):
    answerer = ttt.Answerer(settings(toy, check=True))
    assert (answerer.far, answerer.near) == retrieve.Index.load(toy / "index").thresholds()


@pytest.mark.parametrize("nats, new, check, asked, k", [
    (0.29, 4, True, True, 5), (0.31, 4, True, True, 5), (0.29, 3, True, True, 5), (0.29, 4, False, False, 5),
    (0.29, 4, True, True, 0)])
def test_a_model_that_is_sure_of_its_own_answer_is_left_as_it_is(toy, nats, new, check, asked, k, monkeypatch):
    """It is asked with the question alone, and named as the reason also with --k 0; another, or one that copies, reads
    near neighbours, and --always asks nobody."""
    answerer = ttt.Answerer(settings(toy, k=k, context=2, check=check, lr=1e-9, max_new_tokens=1))
    prompts, questions = prompts_of(answerer, monkeypatch), []
    answerer.far = answerer.near = -1.0
    monkeypatch.setattr(ttt, "MAX_TRACE_TOKENS", 250)  # for speed
    monkeypatch.setattr(ttt, "greedy_nll", lambda model, ids, stop_ids: (
        questions.append((ids, stop_ids)) or (nats, new)))
    result = answerer.answer("What is asthma?")
    plain = ttt.prompt_ids(answerer.tokenizer, None, "What is asthma?")
    assert questions == [(plain, answerer.stop_ids)] * asked
    sure = asked and nats < 0.3 and new >= 4
    assert (prompts == [plain]) == sure and ["in_prompt" in one for one in result["neighbours"]] == [
        not sure] * 2 + [False] * max(0, k - 2)
    assert ("the model is sure of its own answer: 0.29 nats" in (result["ttt"]["reason"] or "")) == sure
    assert result["ttt"]["applied"] == (not check)
    answerer.settings["k"] = 0  # neighbours only stand in the prompt; the reason why they do not is told, too
    assert answerer.answer("What is asthma?")["ttt"]["reason"].startswith("the model is sure" if sure else "switched")
    answerer.settings |= {"ttt": False, "k": 5}
    answerer.answer("What is asthma?")
    assert questions == [(plain, answerer.stop_ids)] * 2 * asked


def test_the_papers_recipe_asks_nobody():
    args = ttt.parse_args(["--question", "Q?", "--recipe", "paper"])
    assert (args.k, args.context, args.steps, args.lr, args.optimizer) == (1, 0, 1, 1e-5, "adam")
    assert ttt.settings_of(args)["check"] is False and ttt.settings_of(ttt.parse_args(["--chat"]))["check"] is True


def test_a_question_is_embedded_with_the_instruction_the_index_was_built_with(toy, tmp_path, monkeypatch):
    index, found = retrieve.Index.load(toy / "index"), []
    index.manifest["encoder"]["query_instruction"] = "drug: "
    index.save(tmp_path / "index")
    answerer = ttt.Answerer(settings(toy, index=tmp_path / "index", max_new_tokens=1, k=1))
    monkeypatch.setattr(answerer.index, "search", lambda vectors, k: found.append(vectors) or (
        np.array([[-9e37]]), np.array([[-1]])))
    answerer.answer("asthma")
    assert (found == answerer.encoder.encode(["drug: asthma"])).all()
    assert not np.allclose(found, answerer.encoder.encode(["asthma"]), atol=1e-3)


def test_ids_that_faiss_did_not_find_are_no_neighbours(toy, monkeypatch):
    answerer = ttt.Answerer(settings(toy))
    monkeypatch.setattr(ttt, "MAX_TRACE_TOKENS", 100)
    monkeypatch.setattr(answerer.index, "search", lambda vectors, k: (np.array([[0.5, -9e37]]), np.array([[3, -1]])))
    assert [neighbour["id"] for neighbour in answerer.answer("Q?")["neighbours"]] == [3]


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(toy, too_few_rows):
    with pytest.raises(InputError, match=r"its tokenizer gives ids up to 49151; .* vocab_size, 49151"):
        ttt.Answerer(settings(toy, model=str(too_few_rows), ttt=False))


def test_a_trace_is_cut_at_the_models_context(toy):
    answerer = ttt.Answerer(settings(toy))
    answerer.model.config = replace(answerer.model.config, max_position_embeddings=300)
    ids, labels = answerer.example(0, [])
    assert len(ids) == len(labels) == 300


def test_the_nearest_trace_of_a_stored_question_is_its_own(toy):
    answerer = ttt.Answerer(settings(toy))
    for i in (0, 20, 54):
        found = answerer.answer(answerer.index.records[i]["instruction"])["neighbours"]
        assert found[0]["id"] == i and found[0]["score"] > 0.999 and len(found) == 4
        assert [n["score"] for n in found] == sorted((n["score"] for n in found), reverse=True)


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs the program in this process, to save the imports: `.returncode`, `.stdout`, `.stderr`."""
    def run(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as ended:
            run_main(lambda: ttt.main(list(map(str, argv))))
        signal.signal(signal.SIGTERM, handler)
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(argv, ended.value.code, out, err)
    return run


def test_json_output_is_complete(toy, run):
    out = run("--question", "What is asthma?", "--model", toy / "model", "--index", toy / "index", "--json",
              "--max-new-tokens", 5, "--recipe", "paper")
    assert out.returncode == 0, out.stderr
    result = json.loads(out.stdout)
    assert list(result) == ["question", "answer", "thought", "summary", "finish_reason", "neighbours", "ttt",
                            "restored", "timings", "model", "disclaimer"]
    assert set(result["ttt"]) == {"applied", "reason", "k", "context", "check", "steps", "lr", "optimizer",
                                  "loss_before", "loss_after"}
    assert set(result["timings"]) == {"load_s", "retrieve_s", "adapt_s", "generate_s", "restore_s", "tokens_per_s"}
    assert result["ttt"]["applied"] and result["ttt"]["k"] == 1 == len(result["neighbours"]) and result["restored"]
    assert result["ttt"]["loss_after"] < result["ttt"]["loss_before"] and result["finish_reason"] == "length"
    assert {*result["neighbours"][0]} == {"id", "score", "instruction"} and "not medical advice" in \
        result["disclaimer"].lower()


def test_text_output_and_switching_it_off(toy, run, tmp_path):
    (tmp_path / "system.txt").write_text("Answer briefly.")
    arguments = ["--question", "What is asthma?", "--model", toy / "model", "--max-new-tokens", 5]
    arguments += ["--always"]
    adapted = run(*arguments, "--index", toy / "index", "--system", tmp_path / "system.txt").stdout
    assert "neighbour" in adapted and "loss on the nearest" in adapted and "Not medical advice" in adapted
    nearest = re.findall(r"^neighbour (\d+)  score", adapted, re.M)
    assert len(nearest) == 10 and f"in the prompt: neighbours {nearest[0]}" in adapted
    plain = run(*arguments, "--no-ttt", "--index", "no/such/index").stdout
    assert "not adapted: switched off" in plain and "neighbour " not in plain


def test_chat_answers_in_turns(toy, run):
    out = run("--chat", "--model", toy / "model", "--index", toy / "index", "--max-new-tokens", 3, "--json", "--k", 1,
              stdin="What is asthma?\n\nAnd in children?\n")
    assert out.returncode == 0, out.stderr
    assert [json.loads(line)["question"] for line in out.stdout.splitlines()] == ["What is asthma?", "And in children?"]


def test_a_chat_that_has_filled_the_context_goes_on_without_its_oldest_turns(toy, run, tmp_path, monkeypatch):
    """The context holds the prompt of the third question and an answer of 8 tokens, and not one token more. A question
    that does not fit at all drops nothing."""
    answer, asked = "yes " * 12, []
    turns = [{"role": role, "content": text} for question in ("One?", "Two?")
             for role, text in (("user", question), ("assistant", answer))]
    tokens = len(ttt.prompt_ids(Tokenizer.from_dir(toy / "model"), None, "Three?", turns)) + 8
    model = small_context(toy, tmp_path / "model", tokens)
    monkeypatch.setattr(ttt.Answerer, "answer", lambda self, question, history=(), *more: asked.append(
        [message["content"] for message in history]) or {"answer": answer, "question": question})
    out = run("--chat", "--model", model, "--no-ttt", "--max-new-tokens", 8, "--json",
              stdin=f"One?\nTwo?\n{'why ' * tokens}\nThree?\nFour?\n")
    assert out.returncode == 0, out.stderr
    assert out.stderr.count("error: the prompt has") == 1
    assert asked == [[], ["One?", answer], ["One?", answer, "Two?", answer], ["Two?", answer, "Three?", answer]]
    assert out.stderr.count(f"context of {tokens} tokens is full: the oldest 1 question(s)") == 1


def small_context(toy, folder, tokens):
    """A copy of the toy's model with a context of so many tokens."""
    shutil.copytree(toy / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": tokens}))
    return folder


def test_a_question_that_does_not_fit_is_refused_before_anything_is_loaded(toy, run, tmp_path, monkeypatch):
    questions = [{"question": "What is asthma?"}, {"question": "why " * 200}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    monkeypatch.setattr(ttt, "Answerer", None)
    out = run("--questions", tmp_path / "q.jsonl", "--out", tmp_path / "a.jsonl", "--model",
              small_context(toy, tmp_path / "model", 150), "--index", toy / "index")
    assert out.returncode == 2 and not (tmp_path / "a.jsonl").exists()
    assert re.search(r"q.jsonl:2: the prompt has 2\d\d tokens; expected at most 150, the model's context", out.stderr)


def test_a_question_that_does_not_fit_is_refused_before_it_is_looked_up(toy, tmp_path):
    answerer = ttt.Answerer(settings(toy, model=str(small_context(toy, tmp_path / "model", 150))))
    answerer.index = answerer.encoder = None
    with pytest.raises(InputError, match="expected at most 150, the model's context"):
        answerer.answer("why " * 200)


def test_a_neighbour_without_an_answer_is_passed_over(toy, run, monkeypatch):
    """One has no response, one is so long that nothing of its answer is within the cut."""
    monkeypatch.setattr(ttt, "MAX_TRACE_TOKENS", 250)  # for speed
    answerer = ttt.Answerer(settings(toy, k=3))
    first, second, third = (neighbour["id"] for neighbour in answerer.answer("What is asthma?")["neighbours"])
    records = answerer.index.records
    records[first] = {"instruction": records[first]["instruction"]}
    records[third] = records[third] | {"instruction": "why " * 300}
    shown = ttt.answer_one(answerer, "What is asthma?", as_json=True)
    found = {neighbour["id"]: neighbour.get("skipped") for neighbour in shown["neighbours"]}
    assert found[first].startswith("found no text under response") and found[second] is None
    assert found[third] == "its first 250 tokens hold nothing of the answer"
    assert shown["ttt"]["applied"] and shown["restored"]


def test_a_neighbour_that_is_passed_over_is_shown(toy, capsys):
    answerer = ttt.Answerer(settings(toy, k=1, max_new_tokens=2))
    answerer.index.records[:] = [{"instruction": record["instruction"]} for record in answerer.index.records]
    ttt.answer_one(answerer, "What is asthma?", as_json=False)
    shown = capsys.readouterr().out
    assert "  passed over: found no text under response" in shown and "not adapted: no neighbour" in shown


@pytest.mark.parametrize("what", ["weights", "index_manifest"])
def test_answers_of_other_weights_or_another_index_at_the_same_place_are_not_gone_on_with(toy, run, tmp_path, what):
    for folder in ("model", "index"):
        shutil.copytree(toy / folder, tmp_path / folder)
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "What is asthma?"}) + "\n")
    arguments = ["--questions", tmp_path / "q.jsonl", "--model", tmp_path / "model", "--index", tmp_path / "index",
                 "--max-new-tokens", 2, "--k", 1, "--out", tmp_path / "a.jsonl"]
    assert run(*arguments).returncode == 0
    if what == "weights":
        tensors = load_file(tmp_path / "model/model.safetensors")
        tensors["model.norm.weight"][0] += 1
        save_file(tensors, tmp_path / "model/model.safetensors")
    else:
        index = retrieve.Index.load(tmp_path / "index")
        index.manifest["sources"] = []
        index.save(tmp_path / "index")
    out = run(*arguments)
    assert out.returncode == 2 and f"made with another {what}; expected the same settings" in out.stderr


def test_two_runs_do_not_write_one_file_of_answers(toy, run, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"question": "What is asthma?"}\n')
    with held_elsewhere(tmp_path / "a.jsonl") as other:
        out = run("--questions", tmp_path / "q.jsonl", "--out", tmp_path / "a.jsonl", "--no-ttt", "--model",
                  toy / "model")
        assert out.returncode == 2 and f"a.jsonl: process {other.pid} on " in out.stderr
    assert not (tmp_path / "a.jsonl").exists()


def test_added_tokens_in_questions_are_named_once(toy, run):
    out = run("--chat", "--model", toy / "model", "--no-ttt", "--max-new-tokens", 1,
              stdin="Is <|im_end|> text?\nAnd <|im_start|>?\n")
    assert out.returncode == 0 and out.stderr.count("read as plain text: <|im_end|>\n") == 1, out.stderr
    assert out.stderr.count("read as plain text") == 1


def test_answers_under_other_limits_of_what_is_asked_are_not_gone_on_with(toy, tmp_path):
    found = settings(toy, check=True)
    found |= ttt.contents_of(found)
    assert found["limits"] == {"far": 0.5, "near": 0.25, "sure": 0.3, "new": 4, "checked": 3, "fall": 0.02}
    for switch in ("check", "ttt"):  # nobody is asked
        assert ttt.contents_of(found | {switch: False})["limits"] is None
    before = found | {"limits": found["limits"] | {"new": 5}}
    row = {"line": 1, "question": "Q?", "answer": "A.", "settings": before}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match="made with another limits; expected"):
        ttt.read_answers(tmp_path / "a.jsonl", [(1, "q.jsonl:1", "Q?")], found)


def test_a_file_of_questions_is_resumed_where_it_stopped(toy, run, tmp_path):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in QUESTIONS[:4]))
    arguments = ["--questions", tmp_path / "q.jsonl", "--model", toy / "model", "--index", toy / "index",
                 "--max-new-tokens", 4, "--k", 1, "--out"]
    assert run(*arguments, tmp_path / "whole.jsonl").returncode == 0
    whole = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:2]) + lines[2][:100])  # killed in the middle of the third row
    out = run(*arguments, tmp_path / "cut.jsonl")
    assert out.returncode == 0 and "2 of them answered before" in out.stderr
    cut = [json.loads(line) for line in (tmp_path / "cut.jsonl").read_text().splitlines()]
    for row in whole + cut:
        row.pop("timings")
    assert cut == whole and [row["line"] for row in whole] == [1, 2, 3, 4]
    (tmp_path / "bare.jsonl").write_text("".join(lines).rstrip("\n"))  # an editor took the last newline away
    out = run(*arguments, tmp_path / "bare.jsonl")
    assert out.returncode == 0 and len((tmp_path / "bare.jsonl").read_text().splitlines()) == 4
    (tmp_path / "thesis.txt").write_text("my only copy, one line")
    out = run(*arguments, tmp_path / "thesis.txt")
    assert out.returncode == 2 and (tmp_path / "thesis.txt").read_text() == "my only copy, one line"
    other = run(*arguments, tmp_path / "cut.jsonl", "--seed", 1)
    assert other.returncode == 2 and "another seed" in other.stderr
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "Another?"}) + "\n")
    other = run(*arguments, tmp_path / "cut.jsonl")
    assert other.returncode == 2 and "another question" in other.stderr
    assert [json.loads(line)["answer"] for line in (tmp_path / "cut.jsonl").read_text().splitlines()] \
        == [row["answer"] for row in whole]


def test_wrong_input_is_one_line_and_status_2(toy, run, tmp_path):
    good = ["--question", "Q?", "--model", toy / "model", "--index", toy / "index", "--max-new-tokens", 2]
    (tmp_path / "bad.jsonl").write_text('{"question": "a"}\n{"question": ""}\n')
    (tmp_path / "broken.jsonl").write_text('{"question": "a"}\n{"question"\n')
    (tmp_path / "one.jsonl").write_text('{"question": "a"}\n')
    (tmp_path / "long.jsonl").write_text('\n{"question": "%s"}\n' % ("a b " * 5000))
    (tmp_path / "half.jsonl").write_text('{"question": "a \\ud800"}\n')
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1"))
    truncated = tmp_path / "truncated"
    shutil.copytree(toy / "model", truncated)
    os.truncate(truncated / "model.safetensors", 1000)
    other_encoder = tmp_path / "encoder"
    shutil.copytree(ROOT / "models/all-minilm-l6-v2", other_encoder)
    raw = bytearray((other_encoder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (other_encoder / "model.safetensors").write_bytes(raw)
    damaged = tmp_path / "index"
    shutil.copytree(toy / "index", damaged)
    (damaged / "records.jsonl").write_text("{}\n")
    cases = [
        ([*good, "--model", "no/such/model"], "no/such/model: does not exist"),
        (["--question", "  "], "empty question"), ([*good, "--index", "no/index"], "no/index"),
        ([*good, "--model", truncated], "damaged safetensors"), ([*good, "--encoder", other_encoder], "sha256"),
        ([*good, "--index", damaged], "damaged"),
        ([*good, "--k", "0", "--context", "0"], "--k 0 and --context 0"), ([*good, "--k", "-1"], "--k"),
        ([*good, "--lr", "nan"], "--lr"),
        ([*good, "--top-p", "1.5"], "--top-p"), ([*good, "--seed", "9" * 20], "--seed"),
        ([*good, "--recipe", "paper", "--k", "3"], "--recipe paper and --k 3"),
        ([*good, "--recipe", "paper", "--lr", "6e-5"], "--recipe paper and --lr 6e-05"),
        (["--questions", tmp_path / "long.jsonl", "--out", tmp_path / "o", *good[2:]], "long.jsonl:2: the prompt has"),
        (["--questions", tmp_path / "half.jsonl", "--out", tmp_path / "o"], "half.jsonl:1: half a character"),
        (["--questions", tmp_path / "one.jsonl", "--out", "/proc/none/o", *good[2:]], "/proc/none"),
        ([*good, "--system", tmp_path / "latin1.txt"], "latin1.txt"),
        ([*good, "--system", "none.txt"], "none.txt: No such file"), ([*good, "--device", "cuda"], "--device cuda"),
        (["--questions", tmp_path / "bad.jsonl", "--out", tmp_path / "o"], "bad.jsonl:2: found no question"),
        (["--questions", tmp_path / "broken.jsonl", "--out", tmp_path / "o"], "broken.jsonl:2: not valid JSON"),
        (["--questions", tmp_path / "none.jsonl", "--out", tmp_path / "o"], "none.jsonl"),
        (["--questions", tmp_path / "one.jsonl", "--out", "o.jsonl.gz"], "--out o.jsonl.gz: found a name of a packed"),
        (["--questions", tmp_path / "bad.jsonl"], "--out"), ([], "required")]
    if torch.cuda.is_available():
        cases = [case for case in cases if case[1] != "--device cuda"]
    for argv, found in cases:
        out = run(*argv)
        lines = [line for line in out.stderr.splitlines() if not line.startswith("model: ")]
        assert out.returncode == 2 and len(lines) == 1 and found in lines[0] and not out.stdout, (argv, out.stderr)
    assert not (tmp_path / "o").exists() or not (tmp_path / "o").read_text()


def test_terminated_in_the_middle_ends_with_143_and_no_traceback(toy):
    process = subprocess.Popen([sys.executable, ROOT / "ttt.py", "--question", "Q?", "--model", toy / "model",
                                "--index", toy / "index", "--max-new-tokens", "3000", "--temperature", "1.5",
                                "--always", "--context", "0", "--k", "2"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = iter(process.stdout.readline, "")
    assert next(lines).startswith("neighbour")
    assert any(line.startswith("adapted") for line in lines)  # now it writes
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143 and "Traceback" not in errors


def test_thought_and_summarization_are_told_apart():
    assert ttt.split_answer("## Thought\n\nhm\n\n## Summarization\n\nso") == ("hm", "so")
    assert ttt.split_answer("plain") == (None, None)
    assert ttt.split_answer("## Thought\n\ncut off") == ("cut off", None)
    assert ttt.split_answer("## Summarization\nso") == (None, "so")


def test_the_default_model_is_the_furthest_of_the_chain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="make demo"):
        ttt.default_model()
    for directory in reversed(ttt.CHAIN):
        (tmp_path / directory).mkdir(parents=True)
        (tmp_path / directory / "config.json").write_text("{}")
        assert ttt.default_model() == directory

"""arms.py: what each arm trains on and reads, beside records told by hand."""
import argparse
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import said, say, tiny_sentencepiece, tiny_vocabulary

from arms import Arm, Evaluation, arm_of, cut_record, example_of, prompt_of, ranked, records_for, records_of_kinds
from benchmarks import Question
from chat import render_chat
from tokenizer import Tokenizer

WORDS = ["aspirin", "asthma", "biopsy", "cough", "fever", "gout", "heart", "insulin", "kidney", "liver"]


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return Tokenizer.from_dir(smollm2)


def evaluation(tokenizer, records, vectors, *, context=4096, system=None, measure="bpb", leaks="off", **args):
    """An Evaluation whose index has these records and vectors, searched by brute force."""
    vectors = np.array(vectors, np.float32)

    def search(queries, k):
        scores = queries @ vectors.T
        ids = np.argsort(-scores, axis=1)[:, :k]
        return np.take_along_axis(scores, ids, 1), ids
    args = {"measure": measure, "leaks": leaks, "seed": 0, "record_tokens": 384, "answer_tokens": 64, "by": "letter",
            "prompt": "chat"} | args
    index = SimpleNamespace(records=records, vectors=vectors, search=search, manifest={"field": "instruction"})
    return Evaluation(argparse.Namespace(**args), None, tokenizer, context, say(system=system), set(), index=index)


def question(number=1, text="What helps against a cough?", answer="Honey.", page=None, **more):
    return Question(**{"number": number, "where": f"q:{number}", "text": text, "options": {}, "gold": None,
                       "answer": answer, "group": str(number), "page": page, "kind": None} | more)


def record(i, words=8, **more):
    return {"instruction": f"What is {WORDS[i % 10]} number {i}?",
            "response": " ".join(f"{WORDS[(i + j) % 10]}{j}" for j in range(words)), **more}


@pytest.fixture
def ten(tokenizer):
    """Ten records whose vectors lie at angles of 0.5, 0.6, … from TOWARDS: record 3 is the nearest, then 4, …, 1, 2."""
    angles = [0.5 + (i - 3) % 10 * 0.1 for i in range(10)]
    return evaluation(tokenizer, [record(i) for i in range(10)], [[np.cos(a), np.sin(a)] for a in angles])


TOWARDS = np.array([1, 0], np.float32)


@pytest.mark.parametrize("text, arm", [
    ("none", Arm("none", None, None)), ("nearest", Arm("nearest", "nearest", None)),
    ("random-context:k=2", Arm("random-context:k=2", None, "random", k=2)),
    ("nearest:lr=1e-4,k=10,steps=2,optimizer=sgd,order=last",
     Arm("nearest:lr=1e-4,k=10,steps=2,optimizer=sgd,order=last", "nearest", None, 10, 1e-4, 2, "sgd", "last")),
    ("nearest+context:k=3,context=2", Arm("nearest+context:k=3,context=2", "nearest", "nearest", 3, context_k=2)),
    ("random-ttt:lr=1e-4", Arm("random-ttt:lr=1e-4", "random", "random", 10, 1e-4, context_k=4, check=True))])
def test_an_arm_is_its_kind_and_settings(text, arm):
    assert arm_of(text) == arm


def test_the_arm_ttt_is_what_the_program_does_by_default():
    import ttt
    settings, arm = ttt.settings_of(ttt.parse_args(["--question", "Q?", "--model", "m"])), arm_of("ttt")
    assert (arm.train, arm.context, arm.k, arm.context_k, arm.lr, arm.steps, arm.optimizer, arm.check) == (
        "nearest", "nearest", *(settings[name] for name in ("k", "context", "lr", "steps", "optimizer", "check")))
    records = [*"abcdefghijkl"]
    assert arm.trained(records) == records[:10] and arm.in_prompt(records) == ["d", "c", "b", "a"]


@pytest.mark.parametrize("text, reason", [
    ("context:context=2", "found 'context=2'"),
    ("near", "expected one of none, nearest"), ("none:k=2", "expected each of no settings"), ("nearest:k", "found 'k'"),
    ("nearest:k=2,k=3", "found 'k=3'"), ("nearest:k=0", "found '0'"), ("context:lr=1", "found 'lr=1'"),
    ("nearest:lr=x", "found 'x'"), ("nearest:order=best", "expected first or last")])
def test_a_wrong_arm_is_named(text, reason):
    with pytest.raises(argparse.ArgumentTypeError, match=reason):
        arm_of(text)


def test_the_nearest_is_trained_on_first_and_stands_next_to_the_question():
    arm, turned = arm_of("nearest+context:k=2"), arm_of("nearest+context:k=2,order=last")
    assert arm.trained([1, 2, 3]) == [1, 2] and arm.in_prompt([1, 2, 3]) == [2, 1]
    assert turned.trained([1, 2, 3]) == [2, 1] and turned.in_prompt([1, 2, 3]) == [2, 1]
    assert arm_of("context:k=2,order=first").in_prompt([1, 2, 3]) == [1, 2]


def test_records_come_by_similarity_over_more_than_one_search(tokenizer):
    vectors = np.random.default_rng(0).normal(size=(150, 8))
    run = evaluation(tokenizer, [record(i) for i in range(150)], vectors)
    query = vectors[7].astype(np.float32)
    found = list(ranked(run, question(), query, "nearest"))
    assert [i for i, _ in found] == np.argsort(-(run.index.vectors @ query)).tolist()
    assert [score for _, score in found] == pytest.approx(sorted(run.index.vectors @ query, reverse=True))


def test_random_records_are_drawn_for_each_question_by_the_seed(ten):
    def drawn(number, seed=0):
        ten.args.seed = seed
        return [i for i, _ in ranked(ten, question(number), TOWARDS, "random")]
    assert drawn(1) == drawn(1) and sorted(drawn(1)) == list(range(10))
    assert drawn(1) != drawn(2) and drawn(1) != drawn(1, seed=1)
    assert dict(ranked(ten, question(), TOWARDS, "random"))[3] == pytest.approx(np.cos(0.5))


def test_the_nearest_k_are_taken(ten):
    found, notes = records_for(ten, question(), TOWARDS, "nearest", 3)
    assert [(i, score) for i, score, *_ in found] == [(3, 0.8776), (4, 0.8253), (5, 0.7648)]
    assert notes == {"masked": {}, "left_out": 0} and not any(was_cut for *_, was_cut in found)
    assert found[0][2] == say(record(3)["instruction"], record(3)["response"])


@pytest.mark.parametrize("leaks, taken, masked", [("strict", [5, 6], {"page": 1, "13-gram": 1}),
                                                  ("same-page", [3, 5], {"13-gram": 1}), ("off", [3, 4], {})])
def test_masked_records_are_replaced_by_the_next(ten, leaks, taken, masked):
    """The nearest stands on the question's page, the second has its answer."""
    answer = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    ten.args.leaks = leaks
    ten.index.records[3]["url"] = "https://a.org/cough/"
    ten.index.records[4]["response"] = f"Well: {answer.upper()}!"
    for kind in ("nearest", "random"):
        found, notes = records_for(ten, question(answer=answer, page="http://a.org/cough"), TOWARDS, kind, 2)
        if kind == "nearest":
            assert [i for i, *_ in found] == taken and notes["masked"] == masked
        assert not {i for i, *_ in found} & ({3, 4} - {*taken})


def test_a_record_whose_vector_is_the_question_s_is_masked(ten):
    ten.args.leaks = "strict"
    ten.index.vectors[3] = 2 * TOWARDS  # of any length
    found, notes = records_for(ten, question(), TOWARDS, "nearest", 1)
    assert [i for i, *_ in found] == [4] and notes["masked"] == {"question": 1}


def test_what_an_index_of_another_field_asks_is_masked(ten):
    ten.args.leaks, ten.index.manifest["field"] = "strict", "topic"
    ten.index.records = [one | {"topic": one["instruction"]} for one in ten.index.records]
    ten.index.records[3]["topic"] = question().text
    found, notes = records_for(ten, question(), TOWARDS, "nearest", 1)
    assert [i for i, *_ in found] == [4] and notes["masked"] == {"question": 1}


def test_a_record_that_does_not_fit_is_left_out_of_every_arm(ten):
    """The window holds the question, two of three records and the room for an answer; the farthest goes."""
    found, _ = records_for(ten, question(), TOWARDS, "nearest", 3)
    ten.context = len(prompt_of(ten, question(), found[:2])) + ten.room
    fitting, notes = records_for(ten, question(), TOWARDS, "nearest", 3)
    assert [i for i, *_ in fitting] == [3, 4] and notes["left_out"] == 1
    ten.context -= 1
    assert [i for i, *_ in records_for(ten, question(), TOWARDS, "nearest", 3)[0]] == [3]


def test_a_record_without_an_answer_or_too_long_is_left_out_and_none_follows(ten):
    del ten.index.records[3]["response"]
    ten.index.records[4]["instruction"] = "why " * 400
    found, notes = records_for(ten, question(), TOWARDS, "nearest", 3)
    assert [i for i, *_ in found] == [5] and notes["left_out"] == 2


def test_a_record_whose_last_answer_is_not_to_be_trained_is_left_out(ten):
    talk = [*say("One?", "First.", "Two?"), said("assistant", "Wrong. " * 200) | {"weight": 0}]
    ten.index.records[3] = {"messages": talk}
    found, notes = records_for(ten, question(), TOWARDS, "nearest", 2)
    assert [i for i, *_ in found] == [4] and notes["left_out"] == 1


def test_as_many_records_are_nearest_as_random(ten):
    del ten.index.records[3]["response"]
    asked = question(next(n for n in range(1, 99) if 3 not in [
        i for i, _ in ranked(ten, question(n), TOWARDS, "random")][:3]))
    found = records_of_kinds(ten, asked, TOWARDS, {"nearest", "random"}, 3)
    assert [len(records) for records, _ in found.values()] == [2, 2]
    assert [i for i, *_ in found["nearest"][0]] == [4, 5] and found["nearest"][1]["left_out"] == 1
    assert found["random"][0] == records_for(ten, asked, TOWARDS, "random", 3)[0][:2]
    assert found["random"][1]["left_out"] == 1
    assert records_of_kinds(ten, asked, TOWARDS, set(), 0) == {}


def test_a_cut_record_keeps_its_question_and_ends_where_its_tokens_do(tokenizer):
    messages, was_cut = cut_record(tokenizer, record(0, words=200), 100)
    whole = record(0, words=200)
    assert was_cut and messages[0]["content"] == whole["instruction"] and whole["response"].startswith(
        messages[1]["content"])
    ids, _ = render_chat(tokenizer, messages)
    assert len(ids) in (100, 101, 102)  # with <|im_end|> and a new line
    assert cut_record(tokenizer, whole, 10_000) == (say(whole["instruction"], whole["response"]), False)
    before = len(render_chat(tokenizer, messages[:1], add_generation_prompt=True)[0])
    assert cut_record(tokenizer, whole, before + 15) is None and cut_record(tokenizer, whole, before + 16)[1]
    emoji = {"instruction": "?", "response": "🤒" * 100}
    assert set(cut_record(tokenizer, emoji, 75)[0][1]["content"]) == {"🤒"}


def test_only_the_last_answer_is_trained_and_a_cut_one_without_its_end(tokenizer):
    run = evaluation(tokenizer, [], np.zeros((0, 2)), system="Be brief.")
    messages = say("One?", "First.", "Two?", "Second answer.")
    for was_cut, trained in ((False, "Second answer.<|im_end|>"), (True, "Second answer.")):
        ids, labels = example_of(run, messages, was_cut)
        assert tokenizer.decode([label for label in labels if label != -100]) == trained
        assert tokenizer.decode(ids).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne?")


def test_a_cut_answer_of_llama_2_is_trained_without_the_space_at_its_end(tmp_path):
    run = evaluation(Tokenizer.from_dir(tiny_sentencepiece(tmp_path / "it")), [], np.zeros((0, 2)))
    for was_cut, trained in ((False, "a fever </s>"), (True, "a fever")):
        _, labels = example_of(run, say("What?", "a fever"), was_cut)
        assert run.tokenizer.decode([label for label in labels if label != -100]) == trained


@pytest.mark.parametrize("template, bos", [("llama3", "<|begin_of_text|>"), ("llama2", "<s>")])
def test_a_raw_prompt_of_llama_begins_with_its_bos(tmp_path, template, bos):
    folder = tiny_sentencepiece(tmp_path / "it") if template == "llama2" else tiny_vocabulary(tmp_path / "it", template)
    run = evaluation(Tokenizer.from_dir(folder), [], np.zeros((0, 2)), measure="loglik", prompt="raw")
    ids = prompt_of(run, question(options={"A": "honey", "B": "salt"}, gold="A"))
    assert run.tokenizer.decode(ids).startswith(f"{bos}Question: What helps") and ids.count(ids[0]) == 1


def test_a_records_own_system_message_gives_way_to_the_questions(tokenizer):
    messages, _ = cut_record(tokenizer, record(0, system="Speak Latin."), 384)
    assert [message["role"] for message in messages] == ["user", "assistant"]


def test_records_in_the_prompt_are_earlier_turns(ten):
    found, _ = records_for(ten, question(), TOWARDS, "nearest", 2)
    text = ten.tokenizer.decode(prompt_of(ten, question(), arm_of("context:k=2").in_prompt(found)))
    ten.system = say(system="Be brief.")
    with_system = ten.tokenizer.decode(prompt_of(ten, question(), found))
    assert with_system.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    expected = say(*(text for i in (4, 3) for text in (record(i)["instruction"], record(i)["response"])),
                   question().text)
    assert text == ten.tokenizer.decode(render_chat(ten.tokenizer, expected, add_generation_prompt=True)[0])


def test_a_raw_prompt_is_plain_text(tokenizer):
    run = evaluation(tokenizer, [], np.zeros((0, 2)), measure="loglik", prompt="raw")
    asked = question(options={"A": "honey", "B": "salt"}, gold="A")
    text = tokenizer.decode(prompt_of(run, asked))
    assert text == "Question: What helps against a cough?\nA. honey\nB. salt\nAnswer:"
    run.args.prompt = "chat"
    assert "letter" in tokenizer.decode(prompt_of(run, asked))
    run.args.by = "text"
    assert "its text" in tokenizer.decode(prompt_of(run, asked))
    run.args.measure = "generate"
    assert "The answer is (X)" in tokenizer.decode(prompt_of(run, asked))

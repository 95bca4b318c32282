"""benchmarks.py: every released shape by hand, what is refused by name, the prompts' words, and the letters that a
reader finds in outputs."""
import json
import re
import time

import pyarrow
import pytest
from conftest import say, write_jsonl
from pyarrow import parquet

from benchmarks import (
    LETTERS,
    Question,
    choice_prompt,
    continuations,
    extracted,
    flattering,
    read_benchmark,
    split_thought,
)
from files import InputError

MEDQA = {"question": "Which vitamin prevents scurvy?\n", "answer": "Vitamin C", "meta_info": "step1",
         "options": {"A": "Vitamin A", "B": "Vitamin B12", "C": "Vitamin C", "D": "Vitamin D"}, "answer_idx": "C"}
MEDMCQA = {"question": "All are bones except", "exp": "Ans- B.", "cop": 2, "opa": "Femur", "opb": "Biceps",
           "opc": "Ulna", "opd": "Tibia", "subject_name": "Anatomy", "topic_name": None, "choice_type": "multi"}
PUBMEDQA = {"QUESTION": "Does aspirin help?", "CONTEXTS": ["Pain is common.", "Of 90 patients, 60 felt better. "],
            "LABELS": ["BACKGROUND", "RESULTS"], "final_decision": "no", "LONG_ANSWER": "It was SECRETLY useless."}
PRO = {"question": "Which organ?", "options": [f"organ {i}" for i in range(10)], "answer": "J", "answer_index": 9,
       "category": "health", "src": "ori"}
CHOICE = {"question": "Which one?", "options": ["red", "green", "blue"], "answer_idx": 1}


def read(name, tmp_path, *rows, **settings):
    if name == "pubmedqa":
        path = tmp_path / "q.json"
        path.write_text(json.dumps({f"1000{i}": row for i, row in enumerate(rows)}, indent=1), encoding="utf-8")
    else:
        path = tmp_path / "q.jsonl"
        write_jsonl(path, rows)
    return read_benchmark(name, path, **settings)

# ----- shapes --------------------------------------------------------------------------------------------------------


def test_a_row_of_medqa(tmp_path):
    assert read("medqa", tmp_path, MEDQA) == [Question(
        1, f"{tmp_path}/q.jsonl:1", "Which vitamin prevents scurvy?", MEDQA["options"], "C", "Vitamin C", "1", None,
        None)]


def test_medqa_has_five_options_too(tmp_path):
    row = MEDQA | {"options": {"E": " Vitamin E", **MEDQA["options"]}, "answer": "Vitamin E", "answer_idx": "E"}
    question, = read("medqa", tmp_path, row)
    assert list(question.options.items()) == [*MEDQA["options"].items(), ("E", "Vitamin E")]
    assert (question.gold, question.answer) == ("E", "Vitamin E")


@pytest.mark.parametrize("first", [0, 1])
def test_medmcqa_s_cop_counts_from_0_or_from_1(tmp_path, capsys, first):
    kinds = {3: "single", 1: "multi", 0: "multi"}
    rows = [MEDMCQA | {"cop": cop + first, "choice_type": kind} for cop, kind in kinds.items()]
    questions = read("medmcqa", tmp_path, *rows)
    assert [(q.gold, q.answer, q.kind) for q in questions] == [
        ("D", "Tibia", "single"), ("B", "Biceps", "multi"), ("A", "Femur", "multi")]
    assert list(questions[0].options.items()) == [("A", "Femur"), ("B", "Biceps"), ("C", "Ulna"), ("D", "Tibia")]
    assert f"q.jsonl: cop counts from {first}, because it is {4 * first} in some rows\n" in capsys.readouterr().err


def test_the_whole_file_tells_how_cop_counts_even_if_less_is_read(tmp_path):
    rows = [MEDMCQA | {"cop": cop} for cop in (1, 2, 0)]
    assert [q.gold for q in read("medmcqa", tmp_path, *rows, limit=1)] == ["B"]
    rows[2]["cop"] = 4
    assert [q.gold for q in read("medmcqa", tmp_path, *rows, limit=1)] == ["A"]


def test_medmcqa_s_repeated_options_are_kept_and_counted(tmp_path, capsys):
    repeated = MEDMCQA | {"opa": "Ulna", "cop": 4}
    of_gold = MEDMCQA | {"opa": "Ulna ", "cop": 3}
    assert [q.gold for q in read("medmcqa", tmp_path, MEDMCQA, repeated, of_gold)] == ["B", "D", "C"]
    assert ("2 of 3 questions have the same text under two letters, 1 of them the right option's (the first: "
            f"{tmp_path}/q.jsonl:2)") in capsys.readouterr().err


def test_pubmedqa_is_asked_with_its_abstract_and_without_its_conclusion(tmp_path):
    questions = read("pubmedqa", tmp_path, PUBMEDQA, PUBMEDQA | {"final_decision": "yes"},
                     PUBMEDQA | {"final_decision": "maybe"})
    assert questions[0] == Question(
        1, f"{tmp_path}/q.json: 10000", "Pain is common.\nOf 90 patients, 60 felt better.\n\nDoes aspirin help?",
        {"A": "yes", "B": "no", "C": "maybe"}, "B", "no", "1", None, None)
    assert [(q.number, q.gold, q.answer) for q in questions[1:]] == [(2, "A", "yes"), (3, "C", "maybe")]
    assert "SECRETLY" not in repr(questions)


@pytest.mark.parametrize("row", [
    PRO, PRO | {"answer_index": None}, PRO | {"answer": None}, PRO | {"answer": "organ 9", "answer_idx": "J"},
    PRO | {"answer": " organ  9", "answer_index": None},
    PRO | {"options": {letter: f"organ {i}" for i, letter in enumerate("ABCDEFGHIJ")}}])
def test_forms_of_mmlu_pro(tmp_path, row):
    question, = read("mmlu-pro", tmp_path, row)
    assert question.options == {letter: f"organ {i}" for i, letter in enumerate("ABCDEFGHIJ")}
    assert (question.gold, question.answer, question.kind) == ("J", "organ 9", "health")


def test_places_without_an_option_are_absent(tmp_path):
    options = [*PRO["options"][:3], "N/A", "N/A"]
    row = PRO | {"options": options, "answer": "C", "answer_index": 2}
    assert list(read("mmlu-pro", tmp_path, row)[0].options) == ["A", "B", "C"]
    assert list(read("medqa", tmp_path, MEDQA | {"options": MEDQA["options"] | {"E": None}})[0].options) == list("ABCD")


@pytest.mark.parametrize("row, gold", [
    (CHOICE, "B"), (CHOICE | {"answer_idx": 0}, "A"), (CHOICE | {"answer_idx": 2}, "C"),
    (CHOICE | {"answer_idx": "B"}, "B"), (CHOICE | {"answer": "green"}, "B"), (CHOICE | {"answer": "B"}, "B"),
    (CHOICE | {"answer_idx": None, "answer": "blue"}, "C"), (CHOICE | {"answer_idx": None, "answer": 2}, "C"),
    (CHOICE | {"answer_idx": None, "label": "C"}, "C"),  # MedXpertQA
    (CHOICE | {"options": {"B": "green", "A": "red"}}, "B"),
    ({"question": "Q?", "opa": "x", "opb": "y", "ope": None, "opc": "z", "answer_idx": "B", "answer": "y"}, "B"),
    (CHOICE | {"options": ["AB", "A", "0"], "answer": "A"}, "B"),  # blood groups: the letter A, or the text of B
    (CHOICE | {"options": ["AB", "A", "0"], "answer": "A", "answer_idx": 0}, "A")])
def test_forms_of_a_choice(tmp_path, row, gold):
    question, = read("choice", tmp_path, row)
    assert question.gold == gold and question.answer == question.options[gold]
    assert list(question.options) == list("ABC")[:len(question.options)] and question.kind is None


@pytest.mark.parametrize("row", [
    {"instruction": " Why?", "response": "Because."}, {"messages": say(" Why?", "Because.")},
    {"messages": say(" Why?", "Because.", system="Be brief.")},
    {"prompt": say(" Why?"), "chosen": say("", "Because.")[1:], "rejected": "No."}])
def test_forms_of_sft(tmp_path, row):
    assert read("sft", tmp_path, row | {"url": "http://a"}) == [
        Question(1, f"{tmp_path}/q.jsonl:1", " Why?", {}, None, "Because.", "1", "http://a", None)]


def test_other_files_are_read_too(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([MEDQA, MEDQA]), encoding="utf-8")
    parquet.write_table(pyarrow.Table.from_pylist([PRO, PRO]), tmp_path / "a.parquet")
    assert [q.where for q in read_benchmark("medqa", tmp_path / "a.json")] == [f"{tmp_path}/a.json: row {i}"
                                                                              for i in (1, 2)]
    assert [(q.number, q.gold) for q in read_benchmark("mmlu-pro", tmp_path / "a.parquet")] == [(1, "J"), (2, "J")]


def test_limit_takes_the_first_rows_and_checks_no_more(tmp_path):
    rows = [MEDQA | {"question": f"Q{i}?"} for i in range(3)] + [{"wrong": 1}]
    assert [q.text for q in read("medqa", tmp_path, *rows, limit=2)] == ["Q0?", "Q1?"]
    with pytest.raises(InputError, match=r"q.jsonl:4: "):
        read("medqa", tmp_path, *rows, limit=4)


def test_groups_are_rows_with_one_value_under_the_cluster_key(tmp_path):
    rows = [MEDQA | {"page": page, "url": url} for page, url in (("p", "u"), (7, ""), ("p", None), (" p", 3))]
    questions = read("medqa", tmp_path, *rows, cluster="page")
    assert [(q.group, q.page) for q in questions] == [("p", "u"), ("7", None), ("p", None), (" p", None)]
    assert [q.group for q in read("medqa", tmp_path, *rows)] == ["1", "2", "3", "4"]
    assert [q.group for q in read("pubmedqa", tmp_path, PUBMEDQA | {"YEAR": "2000"}, cluster="YEAR")] == ["2000"]

# ----- refusals ------------------------------------------------------------------------------------------------------


OPTIONS = MEDQA["options"]


@pytest.mark.parametrize("name, change, found", [
    ("medqa", {"question": " \n"}, r"found no text under question \(keys: answer, answer_idx, "),
    ("medqa", {"question": ["Q?"]}, "found no text under question"),
    ("medqa", {"options": None}, r"found no options \(keys: answer, answer_idx, meta_info, options, question\)"),
    ("medqa", {"options": "A) x B) y"}, "found no options"), ("medqa", {"options": []}, "found no options"),
    ("medqa", {"options": {"A": "x"}}, "options are A; expected A, B, … to T at most"),
    ("medqa", {"options": OPTIONS | {"F": "x"}}, "options are A, B, C, D, F; expected"),
    ("medqa", {"options": {"a": "x", "b": "y"}}, "options are a, b"),
    ("medqa", {"options": {"B": "x", "C": "Vitamin C"}}, "options are B, C"),
    ("medqa", {"options": {"A": None, "B": None}}, "options are null"),
    ("medqa", {"options": [str(i) for i in range(21)]}, "found no options"),
    ("medqa", {"options": OPTIONS | {"B": " "}}, "option B is ' '; expected text"),
    ("medqa", {"options": OPTIONS | {"B": 7}}, "option B is 7; expected text"),
    ("medqa", {"options": OPTIONS | {"A": "Vitamin  B12"}}, "options A, B repeat a text"),
    ("medqa", {"answer_idx": "E"}, "answer_idx is 'E'; expected a letter from A to D, a number from 0 to 3$"),
    ("medqa", {"answer_idx": "c"}, "answer_idx is 'c'"), ("medqa", {"answer_idx": 4}, "answer_idx is 4"),
    ("medqa", {"answer_idx": -1}, "answer_idx is -1"), ("medqa", {"answer_idx": True}, "answer_idx is True"),
    ("medqa", {"answer_idx": "2"}, "answer_idx is '2'"), ("medqa", {"answer_idx": "Vitamin C"}, "answer_idx is 'Vit"),
    ("medqa", {"answer_idx": ["C"]}, "answer_idx is "), ("medqa", {"answer_idx": 2.0}, r"answer_idx is 2\.0"),
    ("medqa", {"answer_idx": "B"}, "answer_idx and answer mean different options; expected one"),
    ("medqa", {"answer_index": 1}, "answer_idx and answer_index and answer mean different options"),
    ("medqa", {"answer": "Vitamin K" + 60 * "x"}, "answer is 'Vitamin Kx+…; expected .*, or an option's text$"),
    ("medqa", {"answer": None, "answer_idx": None}, "nothing under answer_idx or answer_index or answer .keys: a"),
    ("mmlu-pro", {"category": None}, "found no text under category"), ("mmlu-pro", {"answer": "A"}, "mean different"),
    ("choice", {"options": ["AB", "A"], "answer_idx": None, "answer": "A"}, "answer mean more than one option"),
    ("choice", {"answer": "red"}, "answer_idx and answer mean different"), ("choice", {"label": "A"}, "mean different"),
    ("medmcqa", {"cop": 5}, "cop is 5 of 4 options; expected 1 to 4 of 4"), ("medmcqa", {"cop": "4"}, "cop is '4'"),
    ("medmcqa", {"cop": None}, r"cop is None of 4 .*\(keys: choice_type, cop, exp, "),
    ("medmcqa", {"cop": -1}, "cop is -1"), ("medmcqa", {"opd": None}, "cop is 2 of 3 options; expected 1 to 4 of 4"),
    ("medmcqa", {"opb": None}, "options are A, C, D"), ("medmcqa", {"opa": ""}, "option A is ''; expected text"),
    ("medmcqa", {"choice_type": "many"}, "choice_type is 'many'; expected single or multi"),
    ("medmcqa", {"question": ""}, "found no text under question"),
    ("pubmedqa", {"CONTEXTS": "Pain."}, "CONTEXTS is 'Pain.'; expected a list of texts"),
    ("pubmedqa", {"CONTEXTS": []}, r"CONTEXTS is \[\]"), ("pubmedqa", {"CONTEXTS": ["Pain.", " "]}, "CONTEXTS is"),
    ("pubmedqa", {"CONTEXTS": [1]}, r"CONTEXTS is \[1\]"), ("pubmedqa", {"QUESTION": None}, "no text under QUESTION"),
    ("pubmedqa", {"final_decision": "Yes"}, "final_decision is 'Yes'; expected yes, no or maybe"),
    ("sft", {"messages": say("Q1", "A1", "Q2", "A2")}, "found user, assistant, user, assistant; expected one question"),
    ("sft", {"messages": say("Q?")}, "the last message is from the user"),
    ("sft", {"messages": say(" ", "A.")}, "found user, assistant; expected one question"),
    ("sft", {"instruction": "Q?"}, "found no text under response")])
def test_a_wrong_row_is_refused_with_its_place(tmp_path, name, change, found):
    good = {"medqa": MEDQA, "medmcqa": MEDMCQA, "pubmedqa": PUBMEDQA, "mmlu-pro": PRO, "choice": CHOICE}.get(name, {})
    first = {"sft": {"instruction": "Q?", "response": "A."}, "medmcqa": MEDMCQA | {"cop": 4}}.get(name, good)
    with pytest.raises(InputError, match=found) as error:
        read(name, tmp_path, first, good | change)
    place = "q.json: 10001: " if name == "pubmedqa" else "q.jsonl:2: "
    assert str(error.value).startswith(f"{tmp_path}/{place}") and "\n" not in str(error.value)


@pytest.mark.parametrize("name, row", [("medqa", MEDMCQA), ("medmcqa", MEDQA), ("mmlu-pro", MEDQA), ("choice", MEDMCQA),
                                       ("pubmedqa", MEDQA), ("sft", PUBMEDQA)])
def test_a_row_of_another_benchmark_is_refused_with_its_keys(tmp_path, name, row):
    with pytest.raises(InputError, match=r"q.json.*1.*\(keys: "):
        read(name, tmp_path, row)


@pytest.mark.parametrize("value", [None, "", " ", True, ["p"], {"a": 1}])
def test_a_row_without_the_cluster_key_is_refused(tmp_path, value):
    with pytest.raises(InputError, match=r"q.jsonl:2: found .* under page; expected .*--cluster.*keys: answer"):
        read("medqa", tmp_path, MEDQA | {"page": "p"}, MEDQA | {"page": value}, cluster="page")
    with pytest.raises(InputError, match="found None under pages"):
        read("medqa", tmp_path, MEDQA | {"page": "p"}, cluster="pages")


@pytest.mark.parametrize("cops, found", [((1, 2, 3), "never 0 and never 4"), ((0, 4), "0 and also 4")])
def test_a_cop_that_may_count_either_way_is_refused(tmp_path, cops, found):
    with pytest.raises(InputError, match=rf"q.jsonl: cop is {found}; expected one of them"):
        read("medmcqa", tmp_path, *(MEDMCQA | {"cop": cop} for cop in cops))


def test_files_that_hold_no_benchmark_are_refused(tmp_path):
    for name in ("medqa", "medmcqa", "pubmedqa"):
        with pytest.raises(InputError, match=r"q.jsonl?: found no rows"):
            read(name, tmp_path)
    with pytest.raises(InputError, match="found the benchmark 'medqq'; expected medqa, medmcqa, pubmedqa, mmlu-pro, "):
        read("medqq", tmp_path, MEDQA)
    with pytest.raises(InputError, match=r"q.json: 10000: found str, expected a JSON object"):
        read("pubmedqa", tmp_path, "yes")
    (tmp_path / "q.jsonl").write_text('{"question": NaN}\n', encoding="utf-8")
    with pytest.raises(InputError, match=r"q.jsonl:1: not valid JSON"):
        read_benchmark("medqa", tmp_path / "q.jsonl")

# ----- prompts -------------------------------------------------------------------------------------------------------


def question_with(**options):
    return Question(3, "q.jsonl:3", "Which one?", options, "A", options.get("A", "x"), "3", None, None)


def test_the_raw_prompt_and_a_continuation_are_one_string_with_single_spaces():
    question = question_with(A="red", B="dark green")
    prompt = choice_prompt(question, "raw")
    assert prompt == "Question: Which one?\nA. red\nB. dark green\nAnswer:"
    assert [prompt + c for c in continuations(question, "raw", "letter")] == [prompt + " A", prompt + " B"]
    assert continuations(question, "raw", "text") == [" red", " dark green"]


@pytest.mark.parametrize("style", ["chat", "chat-letter"])
def test_a_chat_prompt_shows_the_options_and_its_continuations_begin_at_once(style):
    question = question_with(A="red", B="dark green")
    assert choice_prompt(question, style).startswith("Which one?\n\nA. red\nB. dark green\n\n")
    assert continuations(question, style, "letter") == ["A", "B"]
    assert continuations(question, style, "text") == ["red", "dark green"]


def test_the_chat_prompts_ask_for_different_things():
    question = question_with(A="red", B="green")
    assert choice_prompt(question, "chat").endswith(
        "step by step and choose exactly one. Close with a line of this form, where X is the letter of your choice:\n"
        "The answer is (X).")
    assert choice_prompt(question, "chat-letter").endswith("Reply with its letter and nothing else.")
    assert extracted(choice_prompt(question, "chat"), LETTERS) is None


def test_a_prompt_needs_options():
    with pytest.raises(InputError, match=r"q.jsonl:3: found no options"):
        choice_prompt(question_with(), "chat")

# ----- thoughts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, thought, answer", [
    ("So.", None, "So."), ("", None, ""), (" So.\n", None, "So."),
    ("## Thought\n\nHm.\n\n## Summarization\n\nSo.\n", "Hm.", "So."), ("<think>\nHm.\n</think>\n\nSo.", "Hm.", "So."),
    ("## Thinking\n\nHm.\n\n## Final Response\n\nSo.", "Hm.", "So."),
    ("Sure. ## Thought Hm. ## Summarization So.", "Hm.", "So."),
    ("Hm.</think>So.", "Hm.", "So."), ("Hm.\n## Summarization\nSo.", "Hm.", "So."),  # it began in the prompt
    ("## Thought\nHm. The answer", "Hm. The answer", ""), ("<think>Hm.", "Hm.", ""), ("Sure. <think>Hm.", "Hm.", ""),
    ("<think></think>So.", "", "So."), ("<think>Hm.</think>", "Hm.", ""),
    ("<think>Hm. ## Summarization Oh.</think>So.", "Hm. ## Summarization Oh.", "So."),
    ("<think>a</think>b<think>c</think>d", "a\nc", "b\nd"), ("<think>a</think>b<think>c", "a\nc", "b"),
    ("## Thought a ## Summarization b ## Thought c", "a\nc", "b"),
    ("<think>a</think>## Thought b ## Summarization c", "a\nb", "c"),
    ("## Thoughts on care\nSo.", None, "## Thoughts on care\nSo.")])
def test_thought_and_answer_are_told_apart(text, thought, answer):
    assert split_thought(text) == (thought, answer)

# ----- letters -------------------------------------------------------------------------------------------------------


OUTPUTS = [
    # the form that is asked for, and its decorations
    ("The answer is (B).", "B"), ("the answer is (b)", "B"), ("The answer is B", "B"), ("The answer is b.", "B"),
    ("THE ANSWER IS (C)!", "C"), ("The correct answer is: D.", "D"), ("The best answer is option C.", "C"),
    ("The answer is **B**.", "B"), ("**The answer is (B).**", "B"), ("**Answer:** B", "B"), ("**Answer**: (B)", "B"),
    ("The answer is **(B) Scurvy**", "B"), ("*Answer: __B__*", "B"), ("### Final Answer:\n\nB\n", "B"),
    (r"The answer is $\boxed{B}$.", "B"), (r"The answer is \boxed{\text{B}}", "B"),
    (r"The answer is \(\boxed{B}\)", "B"), (r"The answer is \(B\).", "B"),
    (r"The answer is $\mathbf{(B)}$", "B"), ("The answer is $B$.", "B"), ('The answer is "B".', "B"),
    ("The answer is “B”.", "B"), ("The answer is 'B'.", "B"), ("The answer is `B`", "B"), ("The answer is [B]", "B"),
    ('{"answer": "B"}', "B"), ("The answer is ( B ).", "B"), ("Answer:B", "B"), ("answer : (B)", "B"),
    # signs beyond ASCII
    ("Answer：B", "B"), ("The answer is：（B）。", "B"), ("The answer is (Ｂ).", "B"), ("The answer is – (B).", "B"),
    ("The answer is B—scurvy", "B"), ("The answer is (B) – scurvy.", "B"), ("The answer is\u00a0(B)", "B"),
    ("The answer is (\u0412)", None), ("答案是B", None),
    # more behind the letter
    ("The answer is B. Scurvy", "B"), ("The answer is B) scurvy", "B"), ("The answer is B, scurvy.", "B"),
    ("The answer is B: scurvy", "B"), ("The answer is (B) because (C) is late.", "B"), ("The answer is B because", "B"),
    ("The answer is B - scurvy", "B"), ("The answer is A (a fever).", "A"), ("The answer is (B), not (A).", "B"),
    ("The answer is (B). (A) and (C) are wrong.", "B"), ("The answer is (B), a disease of sailors.", "B"),
    ("The answer is (B) - A condition of old sailors", "B"), ("The answer is (B), B.", "B"),
    ("The answer is (B), I think.", "B"), ("The answer is (B) and I am sure.", "B"),
    ("The answer is B\nA is wrong", "B"),
    # words that only look like a letter
    ("The answer is a fever.", None), ("The answer is A fever.", None), ("Answer: A 24-hour urine sample.", None),
    ("The answer is I think unclear.", None), ("The answer is a (rare) fever.", None),
    ("The answer is a *rare* one", None),
    ("The answer is B12 deficiency.", None), ("The answer is B cell lymphoma.", None), ("The answer is D-dimer.", None),
    ("The answer is C. difficile.", None), ("The answer is E. coli.", None), ("The answer is B.5", None),
    ("The answer is (A fever).", None), ("The answer is Dapsone.", None), ("The answer is (Dapsone).", None),
    ("The answer is B's", None), ("The answer is not clear.", None), ("The answer is C-section.", None),
    ("The answer is A -3 SD.", None), ("The answer is (A). The answer is Band C.", "A"),
    ("The answer isB.", None), ("My answers: A", None),
    # no such option
    ("The answer is (F).", None), ("The answer is (X).", None), ("The answer is (AB).", None),
    ("The answer is 2.", None),
    ("The answer is (A). No: the answer is (H).", None), ("The answer is (B). Form: the answer is (X).", "B"),
    # no statement
    ("", None), ("  \n", None), ("(A)", None), ("B", None), ("B. Scurvy", None), ("I choose (B).", None),
    (r"\boxed{B}", None), ("Answer B", None), ("Scurvy", None), ("<answer>B</answer>", None),
    # several
    ("The answer is (A). No, the answer is (C).", "C"), ("Answer: A\nAnswer: B\nAnswer: C.", "C"),
    ("The answer is (A) or (B).", None), ("The answer is A or B.", None), ("The answer is (A) and (B).", None),
    ("The answer is A, B.", None), ("The answer is (A, B)", None), ("The answer is A/B.", None),
    ("The answer is A & C", None), ("The answer is A-C.", None), ("The answer is A–C", None),
    ("The answer is A to C.", None),
    ("The answer is (A) through (C).", None), ("The answer is either (A) or (B).", None),
    ("The answer is **A** or **B**.", None), ("The answer is neither A nor B.", None),
    ("The answer is both (A) and B", None),
    ("The answer is (A). Or the answer is B or C.", None), ("The answer is (A or B).", None),
    ("The answer is (A). The answer is either (B) or (C).", None),
    ("Answer: A. The answer is neither (b) nor (c).", None),
    ("The answer is (A) and B are wrong.", None), ("The answer is (a) or (b)", None), ("The answer is (A), (B)", None),
    # denied, asked, supposed
    ("The answer is not (B).", None), ("The answer isn't (B).", None), ("I do not think the answer is (B).", None),
    ("I don't believe that the correct answer is (B).", None), ("It’s not true that the answer is (B).", None),
    ("If the answer is (B), then.", None), ("The wrong answer is (B).", None), ("An incorrect answer: B", None),
    ("Is it so that the answer is (B)?", None), ("So the answer is B?", None), ("So the answer is **(B)**? No.", None),
    ("The answer is (A). The answer is not (B).", "A"), ("It is not C, so the answer is (B).", "B"),
    ("This is not viral. The answer is (B).", "B"), ("I doubt the answer is (C); the answer is (D).", "D"),
    ("The least likely answer is (D).", "D"),
    # thoughts
    ("## Thought\nThe answer is (A).\n## Summarization\nThe answer is (B).", "B"),
    ("## Thought\nThe answer is (A).\n## Summarization\nScurvy.", None), ("<think>The answer is (A).</think>", None),
    ("<think>The answer is (A).</think>\n\nThe answer is (C).", "C"), ("## Thought\nThe answer is (A). Wait", None),
    ("<think>Hm. The answer is (A).", None), ("The answer is (A).</think>Scurvy", None),
    ("Sure, the answer is (A). <think>Or", None),
]


def test_there_are_enough_outputs():
    assert len({text for text, _ in OUTPUTS}) == len(OUTPUTS) >= 60


@pytest.mark.parametrize("text, letter", OUTPUTS)
def test_the_letter_of_an_output(text, letter):
    assert extracted(text, "ABCDE") == letter
    assert extracted(text, dict.fromkeys("ABCDE", "an option")) == letter


@pytest.mark.parametrize("letter", LETTERS)
def test_every_letter_is_found_the_same_way(letter):
    assert extracted(f"The answer is {letter} (scurvy)", LETTERS) == letter
    for form in ("The answer is ({}).", "The answer is {}.", "Answer: {}", "The answer is **{}**"):
        for written in (form.format(letter), form.format(letter.lower())):
            assert extracted(written, LETTERS) == letter
            assert extracted(written, LETTERS.replace(letter, "")) is None
    for form in ("The answer is {} cell", "The answer is {}-x", "The answer is {}. coli", "The answer is {}x"):
        assert extracted(form.format(letter), LETTERS) is None


def test_long_outputs_take_no_longer_than_they_are():
    """100,000 signs take milliseconds; n² steps would take minutes."""
    start = time.process_time()
    for begin, repeated in (("", "answer is "), ("answer is ", "* "), ("answer is", " "), ("answer is option", " "),
                            ("answer is (A)", " )"), ("answer is A", " "), ("", "not "), ("", "<think>"),
                            ("", "## Thought "), ("", "</think>"), ("", "<think></think>"), ("answer", "*")):
        assert extracted(begin + repeated * (100_000 // len(repeated)) + "z", "BC") is None
    assert time.process_time() - start < 5


THOUGHTFUL = "<think>Is the answer is (B)? The answer is (A).</think>\nThe answer is (C)."


@pytest.mark.parametrize("text, gold, first, best, strict", [
    (THOUGHTFUL, "A", "A", "A", "C"), (THOUGHTFUL, "C", "A", "C", "C"), (THOUGHTFUL, "B", "A", "A", "C"),
    ("The answer is (A). The answer is (B). The answer is (C).", "B", "A", "A", "C"),
    ("The answer is (A) or (B). The answer is (H). The answer is (D).", "D", "D", "D", "D"),
    ("<think>The answer is (A). Wait,", "A", "A", "A", None), ("The answer is (A) or (B).", "B", "A", "B", None),
    ("(B) seems better than (A).", "A", "B", "A", None), ("D", "A", "D", "D", None), ("C. Scurvy", "C", "C", "C", None),
    ("Vitamin C", "A", "C", "C", None), ("(H) (B)", "B", "B", "B", None), ("", "A", None, None, None),
    ("Scurvy, a disease.", "A", None, None, None)])
def test_laxer_scorers_count_more(text, gold, first, best, strict):
    assert flattering(text, "ABCD", gold) == {"first": first, "best_of_two": best, "dropped_empty": strict}


def test_the_prompt_s_form_is_the_form_that_is_found():
    line = choice_prompt(question_with(A="red", B="green"), "chat").splitlines()[-1]
    assert extracted(re.sub("X", "B", line), "AB") == "B"

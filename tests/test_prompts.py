"""The prompts and the rules that read replies: names, scores, traces, and the original's choice between two questions.
"""
import itertools

import pytest

import calls
import prompts
from prompts import (
    DEPARTMENTS,
    answers_of,
    choose,
    filled,
    mention_of,
    name_of,
    questions_of,
    schema_of,
    scores_of,
    trace_of,
    version,
)

# ----- names ---------------------------------------------------------------------------------------------------------

NEAR_MISSES = [
    "cardiology", "CARDIOLOGY", "Cardiology.", "Cardiologist", "Cardiac", "Cardiology, Neurology",
    "Cardiology\nNeurology", "Cardiology and Neurology", "The answer is Cardiology", "Department: Surgery",
    "**Surgery**", '"Surgery"', "surgery", "Surgeries", "General Surgery", "Internal medicine",
    "Internal Medicine (Cardiology)", "Internal", "Medicine", "Obstetrics & Gynecology", "Obstetrics and Gynaecology",
    "Gynecology and Obstetrics", "Pediatric", "Paediatrics", "Otorhinolaryngology", "ENT", "Otorhinolaryngology (ENT",
    "Otolaryngology (ENT)", "Other", "Other departments", "Dentistry", "Oral Medicine", "Traditional Chinese Medicine",
    "TCM", "Orthopaedic Surgery", "Haematology", "Anaesthesiology", "Dermatology", "", "Rehabilitation  Medicine"]


def test_the_35_names_are_read():
    names = [*DEPARTMENTS, *itertools.chain(*DEPARTMENTS.values())]
    assert len(DEPARTMENTS) == 6 and len(names) == 35
    for name in names:
        assert name_of(name, names) == name_of(f" {name}\n", names) == name


def test_40_near_misses_are_unknown():
    names = [*DEPARTMENTS, *itertools.chain(*DEPARTMENTS.values())]
    assert len(set(NEAR_MISSES)) == 40
    assert [name_of(miss, names) for miss in NEAR_MISSES] == ["unknown"] * 40
    assert name_of(None, names) == name_of("None", names) == "unknown"

# ----- replies -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value, expected", [
    ({"question_1": " Why? ", "question_2": "How?"}, ["Why?", "How?"]),
    ({"question_1": "Why?", "question_2": " Why?"}, None),
    ({"question_1": "Why?", "question_2": " "}, None),
    ({"question_1": "Why?"}, None),
    ({"question_1": "Why?", "question_2": 3}, None),
    (["Why?", "How?"], None),
    (None, None),
])
def test_questions_are_two_that_differ(value, expected):
    assert questions_of(value) == expected


def test_answers_that_are_the_same_are_one():
    assert answers_of({"answer_1": "Yes. ", "answer_2": "No."}) == ["Yes.", "No."]
    assert answers_of({"answer_1": "Yes.", "answer_2": " Yes."}) == ["Yes."]
    assert answers_of({"answer_1": "Yes."}) is None


@pytest.mark.parametrize("score, quality, relevance", [
    (1, 1, 1), (10, 10, None), (6, 6, 6), (7, 7, None), (0, None, None), (11, None, None), (8.0, 8, None),
    (8.5, None, None), ("8", None, None), (True, None, None), (None, None, None), (float("inf"), None, None)])
def test_a_score_is_a_whole_number_in_its_range(score, quality, relevance):
    found = scores_of({"quality": score, "difficulty": score, "relevance": score})
    assert found == {"quality": quality, "difficulty": quality, "relevance": relevance}
    assert scores_of(None) == scores_of([8]) == dict.fromkeys(("quality", "difficulty", "relevance"))


def test_case_details_are_said_or_not():
    assert [mention_of({"mentions_case_details": said}) for said in (True, False, "true", 1, None)] == [
        True, False, None, None, None]
    assert mention_of("true") is None


TRACE = "## Thought\n\nHm.\n\n## Summarization\n\nSo."


@pytest.mark.parametrize("text, thought, expected", [
    ("So.", "Hm.", TRACE),
    ("## Thought\nHm.\n## Summarization\nSo.", None, TRACE),
    ("<think>Hm.</think>So.", None, TRACE),
    ("Hm.</think>So.", None, TRACE),
    ("## Thinking\nHm.\n\n## Final Response\nSo.", None, TRACE),
    ("## Thought\nShort.\n## Summarization\nSo.", " Hm. ", TRACE),
    ("So.", None, None),
    ("So.", " ", None),
    ("## Thought\nHm.", None, None),
    ("## Thought\n## Summarization\nSo.", None, None),
    ("## Thought\nHm.\n## Summarization\n", None, None),
    (None, "Hm.", None),
])
def test_a_trace_has_its_thought_from_the_server_or_the_text(text, thought, expected):
    assert trace_of(text, thought) == expected


def test_places_are_filled_once_and_braces_of_values_stay():
    assert filled('{text} {"a": 1} {question}', {"text": "{question}", "question": "{x}"}) == '{question} {"a": 1} {x}'
    assert filled("{text}", {}) == "{text}"


def test_every_prompt_is_asked_with_parameters_and_fills_all_its_places():
    fragments = {*prompts.STRATEGIES}
    for asked in prompts.PROMPTS.values():
        assert {*asked} - fragments <= {*prompts.PARAMETERS}
    assert {name for name in prompts.PARAMETERS if schema_of(name)} == {
        "questions", "question", "common", "reference", "answer", "row", "compare"}
    assert schema_of("question")["properties"]["relevance"] == {"type": "integer", "enum": [1, 2, 3, 4, 5, 6]}


def test_the_original_s_sampling():
    chosen = {"ask": "questions", "score": "question", "respond": "complex", "classify": "department"}
    assert [[prompts.PARAMETERS[name].get(key) for key in ("temperature", "top_p")] for name in chosen.values()] == [
        [1, 0.9], [0.8, None], [1, 0.9], [0, None]]
    assert [prompts.PARAMETERS[name]["max_tokens"] for name in ("complex", "alone", "think", "retry")] == [4096] * 4
    assert calls.MORE_ROOM == 1 and 2 * prompts.PARAMETERS["common"]["max_tokens"] == 4096  # with one more room
    assert prompts.COMPLEX == 8 and prompts.TEXT_CHARACTERS == 32_628


def test_a_version_changes_with_its_prompt_parameters_and_rules_alone(monkeypatch):
    before = {stage: version(stage) for stage in prompts.RULES}
    assert before["select"] == "1" and before["score"].startswith("1-") and len(set(before.values())) == 9

    def changed():
        return [stage for stage in before if version(stage) != before[stage]]
    monkeypatch.setitem(prompts.PROMPTS["score"], "question", "Other? {text} {question}")
    assert changed() == ["score"]
    monkeypatch.setitem(prompts.PARAMETERS, "options", {"temperature": 0.5})
    assert changed() == ["score", "verify"]
    monkeypatch.setitem(prompts.RULES, "select", 2)
    assert changed() == ["score", "select", "verify"]
    monkeypatch.setitem(prompts.DEPARTMENTS, "Surgery", ())
    assert changed() == ["classify", "score", "select", "verify"]

# ----- the choice ----------------------------------------------------------------------------------------------------

# quality, difficulty, relevance, mentions of each; which is chosen by which rule. Random numbers: 0.7 for the first
# question, 0.2 for the second, so the second wins a tie.
CASES = [
    # case details come first
    ((9, 9, 6, True), (9, 9, 6, True), None, "case details"),
    ((9, 9, 6, True), (1, 1, 1, False), 1, "case details of the other"),
    ((1, 1, 1, False), (9, 9, 6, True), 0, "case details of the other"),
    ((9, 9, 6, True), (None, 9, 6, False), 1, "case details of the other"),  # to the letter
    ((None, None, None, True), (None, None, None, True), None, "case details"),
    ((None, None, None, None), (9, 9, 6, True), 0, "case details of the other"),
    # then missing scores
    ((None, 9, 6, False), (1, 1, 1, False), 1, "no scores of the other"),
    ((9, None, 6, False), (1, 1, 1, False), 1, "no scores of the other"),
    ((9, 9, None, False), (1, 1, 1, False), 1, "no scores of the other"),
    ((1, 1, 1, False), (None, None, None, None), 0, "no scores of the other"),
    ((None, 9, 6, False), (9, None, 6, False), None, "no scores"),
    ((None, None, None, None), (None, None, None, None), None, "no scores"),
    # then the sum of three
    ((5, 5, 3, False), (5, 5, 4, False), 1, "sum"),
    ((5, 5, 4, False), (5, 5, 3, False), 0, "sum"),
    ((10, 1, 1, False), (4, 4, 5, False), 1, "sum"),
    ((2, 10, 1, None), (5, 5, 2, False), 0, "sum"),
    # then quality + difficulty
    ((5, 5, 4, False), (5, 6, 3, False), 1, "quality + difficulty"),
    ((6, 5, 3, False), (5, 5, 4, False), 0, "quality + difficulty"),
    ((1, 9, 2, False), (8, 1, 3, False), 0, "quality + difficulty"),
    # then quality
    ((5, 6, 3, False), (6, 5, 3, False), 1, "quality"),
    ((6, 5, 3, False), (5, 6, 3, False), 0, "quality"),
    # then chance
    ((5, 6, 3, False), (5, 6, 3, False), 1, "random"),
]


@pytest.mark.parametrize("first, second, expected, rule", CASES)
def test_the_choice_between_two_questions(first, second, expected, rule):
    names = ("quality", "difficulty", "relevance", "mentions")
    rows = [dict(zip(names, one)) for one in (first, second)]
    assert choose(rows, [0.7, 0.2].__getitem__) == (expected, rule)
    swapped = None if expected is None else 1 - expected
    assert choose(rows[::-1], [0.2, 0.7].__getitem__) == (swapped, rule)


@pytest.mark.parametrize("one, expected, rule", [
    ((1, 9, 1, False), 0, "the only one"), ((9, 9, 6, True), None, "case details"),
    ((None, 9, 6, False), None, "no scores")])
def test_a_question_that_came_with_its_row_is_chosen_alone(one, expected, rule):
    assert choose([dict(zip(("quality", "difficulty", "relevance", "mentions"), one))], lambda i: 0) == (expected, rule)

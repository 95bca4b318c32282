"""rows.py: every form of a row is read as by hand and as TRL reads it, or refused by name; how rows are drawn."""
import contextlib
import json
import random
from collections import Counter

import pyarrow
import pytest
from conftest import said, say, write_jsonl
from pyarrow import parquet

import ttt
from data import render_rows
from files import InputError
from messages import CONVERSATIONS, THOUGHTS, TRAINED
from retrieve import read_records
from rows import (
    ANSWERS,
    MATERIAL,
    OPTIONS,
    QUESTIONS,
    SYSTEMS,
    draw_rows,
    lone_question,
    messages_of,
    pair_of,
    question_of,
)
from tokenizer import Tokenizer

FINEMED = {"text": "a passage", "instruction": "What is ketosis?", "complexity": 3, "quality": 8, "language": "en",
           "response": "Ketones in the blood.", "instruction_type": "common"}
MESSAGES = {"messages": say("Why?", "Because.", system="Be brief.")}
PAIR = {"prompt": "How many?", "response": "Two."}
PREFERENCE = {"prompt": [said("user", "Who?")], "chosen": [said("assistant", "The nurse.")],
              "rejected": [said("assistant", "Nobody.")]}
PROMPT, GOOD, BAD = PREFERENCE.values()
NULLS = dict.fromkeys(("messages", "conversations", "instruction", "prompt", "question", "response", "input", "system",
                       "history", "tools", "instruction_type", "chosen", "reasoning", "images", "weight"))

# ----- rows of one answer --------------------------------------------------------------------------------------------


def test_the_released_forms_are_read():
    """FineMed's SFT and DPO files, and the plainest forms of others."""
    sft = {"text": "…", "instruction": "Q?", "complexity": 9, "quality": 9, "language": "en", "response": "A.",
           "instruction_type": "complex"}
    dpo = {"prompt": [{"content": "Q?", "role": "user"}], "chosen": [{"content": "A.", "role": "assistant"}],
           "rejected": [{"content": "B.", "role": "assistant"}]}
    for row in (sft, dpo, {"prompt": "Q?", "response": "A."}, {"prompt": "Q?", "completion": "A."},
                {"messages": say("Q?", "A.")}, {"prompt": "Q?", "chosen": "A.", "rejected": "B."}):
        assert messages_of(row) == say("Q?", "A.") and question_of(row) == "Q?"
    assert question_of({"messages": say("Q1", "A1", "Q2", "A2")}) == "Q2"


ALPACA = {"instruction": "Sum up.", "input": "A long text.", "output": "Short."}
SHAREGPT = {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]}
WHOLE = {"chosen": say("Q?", "A."), "rejected": say("Q?", "B.")}


@pytest.mark.parametrize("row, expected", [
    (ALPACA, say("Sum up.\nA long text.", "Short.")), (ALPACA | {"input": ""}, say("Sum up.", "Short.")),
    ({"instruction": "", "input": "Q?", "output": "A.", "refusal": "no", "prefix": "x-"}, say("Q?", "A.")),
    (ALPACA | {"system": "Be brief.", "history": [["Q1", "A1"], ["Q2", "A2"]]},
     say("Q1", "A1", "Q2", "A2", "Sum up.\nA long text.", "Short.", system="Be brief.")),
    (SHAREGPT, say("Q?", "A.")),
    (SHAREGPT | {"system": "Be brief.", "tools": "[]"}, say("Q?", "A.", system="Be brief.")),
    ({"conversations": SHAREGPT["conversations"][:1], "chosen": SHAREGPT["conversations"][1]}, say("Q?", "A.")),
    (WHOLE, say("Q?", "A.")), (WHOLE | {"prompt": "Q?"}, say("Q?", "A.")),
    (WHOLE | {"prompt": [said("user", "Q?")]}, say("Q?", "A.")),
    (WHOLE | {"prompt": say("Q?", system="Be brief.")}, say("Q?", "A.", system="Be brief.")),
    (WHOLE | {"prompt": "Q?", "messages": say("Q?", "A.")}, say("Q?", "A.")),  # UltraFeedback
    ({"prompt": "Q1", "messages": say("Q1", "A1", "Q2", "A2")}, say("Q1", "A1", "Q2", "A2")),  # UltraChat
    ({"prompt": say("Q1", "A1", "Q2"), "completion": say("", "A2")[1:]}, say("Q1", "A1", "Q2", "A2")),
    (SHAREGPT | {"instruction": "Q?", "response": "A."}, say("Q?", "A.")),  # Magpie
    ({"system_prompt": "Be brief.", "question": "Q?", "response": "A."}, say("Q?", "A.", system="Be brief.")),  # Orca
    ({"instruction": "Q?", "context": "It is so.", "response": "A."}, say("Q?\nIt is so.", "A.")),  # Dolly
    ({"query": "Q2", "response": "A2", "history": [["Q1", "A1"]]}, say("Q1", "A1", "Q2", "A2")),  # ms-swift
    ({"prompt": "Q?", "completion": "A.", "label": True}, say("Q?", "A.")),  # KTO
    ({"question": "Q?", "answer": "A."}, say("Q?", "A.")),
    ({"question": "Which? A: this B: that", "options": {"A": "this", "B": "that", "C": None}, "answer": "this"},
     say("Which? A: this B: that", "this")),
    ({"instruction": "Q?", "response": "A.", "question": "Which of these?", "options": {"A": "this"}, "answer": "A"},
     say("Q?", "A.")),  # a benchmark's own question and key beside the row made of it
    ({"Question": "Q?", "Complex_CoT": "Hm.", "Response": "A."},
     say("Q?", "## Thought\n\nHm.\n\n## Summarization\n\nA.")),
    ({"instruction": "Q?", "reasoning": "Hm.", "response": "A."},
     say("Q?", "## Thought\n\nHm.\n\n## Summarization\n\nA.")),
    ({"messages": [said("user", [{"type": "text", "text": "Q?"}]), said("assistant", "A.") | {"thinking": "Hm."}]},
     say("Q?", "## Thought\n\nHm.\n\n## Summarization\n\nA.")),
    ({"prompt": "\n\nHuman: Q?\n\nAssistant:", "response": " A."}, say("Q?", " A.")),
    ({"input": {"messages": say("Q?"), "tools": []}, "preferred_output": say("", "A.")[1:],
      "non_preferred_output": say("", "B.")[1:]}, say("Q?", "A."))])
def test_rows_as_people_write_them(row, expected):
    """With nulls under other keys too; the question is the user's last message; the row itself is not changed."""
    before = json.dumps(row)
    for one in (row, NULLS | row):
        assert messages_of(one) == expected
        assert question_of(one) == [turn["content"] for turn in expected if turn["role"] == "user"][-1]
    assert json.dumps(row) == before


@pytest.mark.parametrize("row, found", [
    ({}, "keys: none"), ({"instruction": "Q"}, "response or chosen or completion or output"),
    ({"instruction": " ", "response": "A"}, "instruction or prompt"), ({"messages": 3}, "messages is of type int"),
    ({"messages": "x"}, "type str"), ({"messages": []}, "no messages"), ({"messages": say("Q")}, "from the user"),
    ({"messages": say("Q", " ")}, "empty"), ({"messages": [{"role": "tool", "content": "x"}]}, "'tool'"),
    ({"messages": [{"role": "user", "content": 3}]}, "type int"), ({"messages": ["x"]}, "message 1"),
    ({"messages": [*say("Q", "A"), {"role": "system", "content": "s"}]}, "message 3 is a system message"),
    ({"messages": [{"role": "system", "content": "s"}]}, "only a system message"),
    (NULLS, "keys: none"), ({"instruction": 3, "prompt": "Q", "response": "A"}, "instruction is of type int"),
    (ALPACA | {"tools": [{"name": "f"}]}, "found tools"), (ALPACA | {"images": ["x.png"]}, "found images"),
    (ALPACA | {"chat_template_kwargs": {"enable_thinking": True}}, "found chat_template_kwargs"),
    (ALPACA | {"input": ["A long text."]}, "input or context is a list"),
    (ALPACA | {"prompt": "Something else."}, "prompt is no part of the question"),
    ({"instruction": "Answer the question.", "question": "Why?", "response": "A."}, "question is no part"),
    (ALPACA | {"response": "Long."}, "answers that differ"), (ALPACA | {"weight": 0}, "weight is 0"),
    (ALPACA | {"history": ["Q1", "A1"]}, "history holds a value of type str; expected .question, answer"),
    (ALPACA | {"history": 3}, "history holds a value of type int"),
    (ALPACA | {"system": "Be brief.", "system_prompt": "Be long."}, "system and system_prompt differ"),
    (ALPACA | {"system": 3}, "system is of type int"), (MESSAGES | {"system": "Be long."}, "two system messages"),
    (MESSAGES | {"history": [["Q1", "A1"]]}, "history beside a list"),
    (MESSAGES | {"input": "x ray"}, "input is no part"),
    (MESSAGES | {"response": "Hm."}, "answers that differ"),
    (MESSAGES | {"reasoning": "Hm."}, "reasoning beside messages"),
    (MESSAGES | SHAREGPT, "two prompts that differ"), (PREFERENCE | {"reasoning": "B is wrong."}, "reasoning beside"),
    (WHOLE | {"prompt": "Why?"}, "prompt is no part of the question"),
    ({"instruction": "Q", "prompt": say("Another"), "response": "A"}, "prompt is no part of the question"),
    ({"prompt": "Q?", "completion": "A.", "label": False}, "label is False"),
    ({"question": "Which?", "options": {"A": "this", "B": "that"}, "answer": "this"}, "options is no part"),
    ({"question": "Which?", "opa": "this", "opb": "that", "cop": 1, "answer": "this"}, "opa is no part"),
    ({"messages": [said("user", "Q"), said("assistant", "A") | {"weight": 0}]}, "on every answer"),
    ({"messages": say("Q", "A"), "conversations": say("Q", "B")}, "answers that differ")])
def test_malformed_rows_are_named(row, found):
    with pytest.raises(InputError, match=found.replace("(", r"\(")) as error:
        messages_of(row)
    assert "\n" not in str(error.value)


def test_a_row_of_junk_raises_input_error_and_nothing_else():
    """2,500 random rows: wrong types under known keys, and good messages under wrong ones; no row is changed."""
    rng, keys = random.Random(0), [*QUESTIONS, *MATERIAL, *OPTIONS, *ANSWERS, *CONVERSATIONS, *SYSTEMS, "rejected",
                                   "history", "reasoning", "tools", "weight", "label", "preferred_output"]

    def value(depth=0):
        texts = ["", "Q", " a\n", "user", "assistant", "system", "\n\nHuman: a\n\nAssistant: b", "[]"]
        kinds = [lambda: rng.choice(texts), lambda: rng.choice([0, 1, 0.5, True, False, 10**40, None])] + [
            lambda: [value(depth + 1) for _ in range(rng.randrange(4))], lambda: message(depth + 1),
            lambda: [message(depth + 1) for _ in range(rng.randrange(5))]] * (depth < 4)
        return rng.choice(kinds)()

    def message(depth):
        if rng.random() < 0.7:
            return said(rng.choice(["user", "assistant", "system"]), value(depth) if rng.random() < 0.2 else "x")
        return {rng.choice(["role", "content", "from", "value", *TRAINED, *THOUGHTS]): value(depth) for _ in range(3)}
    read = Counter()
    for _ in range(2500):
        row = {rng.choice(keys): value() for _ in range(rng.randrange(6))}
        before = json.dumps(row)
        for function in (messages_of, pair_of, question_of, lone_question):
            with contextlib.suppress(InputError):
                function(row)
                read[function.__name__] += 1
        assert json.dumps(row) == before
    assert read["messages_of"] > 20 and read["question_of"] > 50


@pytest.mark.parametrize("template, answer", [("llama3", "Yes.<|eot_id|>"), ("chatml", "Yes.<|im_end|>"),
                                              ("llama2", " Yes. </s>")])
def test_weight_0_reaches_the_labels(template, answer):
    """Characters stand for tokens; of three answers the middle one alone is trained, its end of turn too."""
    control = {name: i for i, name in enumerate((
        "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>",
        "<s>", "</s>"))}
    names = {i: name for name, i in control.items()}
    tokenizer = Tokenizer(lambda text: [ord(c) + 100 for c in text], None, control, set(), template, 1 << 21)
    talk = say("Q1", "No.", "Q2", "Yes.", "Q3", "Never.")
    row = {"messages": [talk[0], talk[1] | {"weight": 0}, talk[2], talk[3] | {"weight": 1}, talk[4],
                        talk[5] | {"train": False}]}
    (_, ids, labels), = render_rows(tokenizer, [("", messages_of(row))], 10_000)[0]
    assert "".join(names.get(i) or chr(i - 100) for i in labels if i != -100) == answer
    (_, all_ids, _), = render_rows(tokenizer, [("", talk)], 10_000)[0]
    assert ids.tolist() == all_ids.tolist()

# ----- questions -----------------------------------------------------------------------------------------------------


def test_a_question_is_read_from_the_named_field_or_refused():
    row = {"instruction": "Q?", "topic": "T", "list": say("Q1", "A1", "Q2"), "number": 3, "blank": " ", "null": None,
           "response": "A."}
    assert [question_of(row, field) for field in ("instruction", "topic", "list")] == ["Q?", "T", "Q2"]
    for field in ("number", "blank", "null", "none", "prompt"):
        with pytest.raises(InputError, match=field):
            question_of(row, field)
    assert question_of({"instruction": "Q?"}) == "Q?"  # an index to look things up in needs no answers
    with pytest.raises(InputError, match="label is False"):  # what could not be trained on is not indexed
        question_of({"prompt": "Q?", "completion": "A.", "label": False})


@pytest.mark.parametrize("row, question", [
    ({"question": "Q?"}, "Q?"), ({"instruction": "Q?"}, "Q?"), ({"question": None, "instruction": "Q?"}, "Q?"),
    ({"instruction": "Sum up.", "input": "A text."}, "Sum up.\nA text."), (PREFERENCE, "Who?"),
    (FINEMED, "What is ketosis?"),
    ({"question": "Q?", "answer": {"value": "A.", "aliases": []}}, "Q?"), ({"messages": say("Q?")}, "Q?"),
    ({"question": "Which?\nA. this", "options": ["this"]}, "Which?\nA. this"), (SHAREGPT, "Q?")])
def test_a_row_of_one_question_alone(row, question):
    assert lone_question(row) == lone_question(NULLS | row) == question


@pytest.mark.parametrize("row, found", [
    ({}, "found no question"), ({"question": " "}, "found no question"), ({"question": 3}, "question is of type int"),
    ({"question": "Q?", "options": {"A": "this"}}, "options is no part"),
    ({"question": "Q?", "image": "x"}, "found image"),
    ({"question": "Q?", "instruction": "Another?"}, "instruction is no part"),
    ({"question": "Q?", "system": "Be brief."}, "found system, user; expected one question"),
    ({"messages": say("Q1", "A1", "Q2")}, "found user, assistant, user; expected one question")])
def test_more_than_a_lone_question_is_refused(row, found):
    with pytest.raises(InputError, match=found):
        lone_question(row)

# ----- pairs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [
    {"text": "a passage", "complexity": 9, "quality": 8, "language": "en", "prompt": PROMPT, "chosen": GOOD,
     "rejected": BAD},
    {"prompt": "Who?", "chosen": "The nurse.", "rejected": "Nobody."},
    {"instruction": "Who?", "chosen": "The nurse.", "rejected": "Nobody."},
    {"chosen": PROMPT + GOOD, "rejected": PROMPT + BAD},
    {"prompt": "Who?", "chosen": PROMPT + GOOD, "rejected": PROMPT + BAD},
    {"question": "Who?", "chosen": "The nurse.", "rejected": "Nobody."},  # Orca
    {"conversations": [{"from": "human", "value": "Who?"}], "chosen": {"from": "gpt", "value": "The nurse."},
     "rejected": {"from": "gpt", "value": "Nobody."}},  # LLaMA-Factory
    {"prompt": "Who?", "messages": PROMPT + GOOD, "chosen": PROMPT + GOOD, "rejected": PROMPT + BAD, "score_chosen": 5},
    {"chosen": "\n\nHuman: Who?\n\nAssistant: The nurse.", "rejected": "\n\nHuman: Who?\n\nAssistant: Nobody."},
    {"input": {"messages": PROMPT}, "preferred_output": GOOD, "non_preferred_output": BAD}])
def test_all_kinds_of_pairs_are_read(row):
    assert pair_of(row) == pair_of(NULLS | row) == (PROMPT, "The nurse.", "Nobody.")


def test_a_pair_has_the_system_message_the_history_and_the_input_of_its_row():
    whole = {"chosen": PROMPT + GOOD, "rejected": PROMPT + BAD}
    for row in (whole | {"prompt": say("Who?", system="Be brief.")}, whole | {"system": "Be brief."},
                {"system": "Be brief.", "question": "Who?", "chosen": "The nurse.", "rejected": "Nobody."}):
        assert pair_of(row) == (say("Who?", system="Be brief."), "The nurse.", "Nobody.")
    row = {"instruction": "Sum up.", "input": "A text.", "history": [["Q1", "A1"]], "chosen": "C", "rejected": "R"}
    assert pair_of(row) == (say("Q1", "A1", "Sum up.\nA text."), "C", "R")


def test_sharegpt_and_an_implicit_prompt_are_what_trl_makes_of_them():
    trl = pytest.importorskip("trl.data_utils", reason="TRL is the reference (extra: test)")
    talk = [{"from": "system", "value": "Be brief."}, {"from": "user", "value": "Why?"},
            {"from": "assistant", "value": "Because."}]
    expected = trl.maybe_convert_to_chatml({"conversations": [dict(turn) for turn in talk]})
    assert {"messages": messages_of({"conversations": talk})} == expected
    row = {"chosen": say("Q1", "A1", "Q2", "C"), "rejected": say("Q1", "A1", "Q2", "R")}
    theirs = trl.extract_prompt(row)
    assert pair_of(row) == (theirs["prompt"], theirs["chosen"][0]["content"], theirs["rejected"][0]["content"])
    assert messages_of(row) == theirs["prompt"] + theirs["chosen"]


@pytest.mark.parametrize("row, message", [
    ({"prompt": "?", "chosen": "!"}, r"found no answer under rejected \(keys: chosen, prompt\)"),
    ({"prompt": "?", "chosen": [], "rejected": "!"}, "found no answer under chosen"),
    ({"prompt": "?", "chosen": 7, "rejected": "!"}, "found no answer under chosen"),
    ({"chosen": "yes", "rejected": "no"}, "found no text under instruction or prompt"),
    ({"prompt": "", "chosen": "yes", "rejected": "no"}, "found no text under instruction or prompt"),
    ({"chosen": PROMPT + GOOD, "rejected": [said("user", "What?"), *BAD]}, "differ before their last message"),
    ({"chosen": say("Q1", "A1", "Q2", "A"), "rejected": say("Q2", "B")}, "differ before their last message"),
    ({"prompt": "Why?", "chosen": PROMPT + GOOD, "rejected": PROMPT + BAD}, "prompt is no part of the question"),
    ({"prompt": say("Why?"), "chosen": PROMPT + GOOD, "rejected": PROMPT + BAD}, "found two prompts that differ"),
    ({"prompt": PROMPT, "chosen": PROMPT, "rejected": BAD}, "chosen has 0 message.s., the last from 'user'"),
    ({"prompt": PROMPT, "chosen": GOOD + GOOD, "rejected": BAD}, "chosen has 2 message.s."),
    ({"prompt": PROMPT + GOOD, "chosen": GOOD, "rejected": BAD}, "after a prompt that ends with the user's"),
    ({"prompt": [said("system", "Hi.")], "chosen": GOOD, "rejected": BAD}, "after a prompt that ends with the user's"),
    ({"prompt": PROMPT, "chosen": [{"role": "assistant", "content": None}], "rejected": BAD}, "of type NoneType"),
    (PREFERENCE | {"tools": [{"name": "f"}]}, "found tools"),
    (PREFERENCE | {"rejected": [BAD[0] | {"weight": 0}]}, "rejected has weight 0"),
    (PREFERENCE | {"reasoning": "B is wrong."}, "reasoning beside the pair"),
    (PREFERENCE | {"input": "An X-ray."}, "input is no part of the question")])
def test_a_bad_pair_is_refused(row, message):
    with pytest.raises(InputError, match=message):
        pair_of(row)

# ----- files ---------------------------------------------------------------------------------------------------------


def test_all_kinds_of_rows_are_read_from_plain_and_gz_files(tmp_path):
    files = [write_jsonl(tmp_path / "a.jsonl", [FINEMED, MESSAGES]),
             write_jsonl(tmp_path / "b.jsonl.gz", [PAIR, PREFERENCE])]
    rows, report = draw_rows(files, 10, seed=0)
    found = {where.rsplit("/")[-1]: messages for where, messages in rows}
    assert sorted((where, messages[-1]["content"]) for where, messages in found.items()) == [
        ("a.jsonl:1", "Ketones in the blood."), ("a.jsonl:2", "Because."), ("b.jsonl.gz:1", "Two."),
        ("b.jsonl.gz:2", "The nurse.")]
    assert found["a.jsonl:2"][0] == {"role": "system", "content": "Be brief."}
    assert report == {"read": 4, "files": {files[0]: 2, files[1]: 2}, "faults": []}


def test_a_json_array_and_parquet_are_read_wherever_json_lines_are(tmp_path):
    """The parquet file is two tables put together, as concatenate_datasets does: what a row lacks is null."""
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([FINEMED, PREFERENCE], indent=1).encode())
    tables = [pyarrow.Table.from_pylist([row]) for row in (FINEMED, PREFERENCE)]
    parquet.write_table(pyarrow.concat_tables(tables, promote_options="default"), tmp_path / "b.parquet")
    expected = {" row 1": messages_of(FINEMED), " row 2": messages_of(PREFERENCE)}
    for name in ("a.json", "b.parquet"):
        path = tmp_path / name
        rows, report = draw_rows([path], 10, seed=0)
        assert {where.removeprefix(f"{path}:"): messages for where, messages in rows} == expected
        assert report["read"] == 2 and report["files"] == {str(path): 2}
        records, (source,), bad = read_records([path], "instruction")
        assert [messages_of(json.loads(json.dumps(record))) for record in records] == list(expected.values())
        assert source["rows"] == 2 and bad == 0
        assert ttt.read_questions(path) == [(1, f"{path}: row 1", "What is ketosis?"), (2, f"{path}: row 2", "Who?")]
        with pytest.raises(InputError, match=f"{name}: row 1: found no answer under chosen"):
            draw_rows([path], 10, seed=0, parse=pair_of)


@pytest.mark.parametrize("row, message", [
    ("{not json", "rows.jsonl:2: not valid JSON"),
    ("[1, 2]", "rows.jsonl:2: found list, expected a JSON object"),
    ({"instruction": "only a question"},
     r"rows.jsonl:2: found no text under response or chosen or completion .* or answer \(keys: instruction\)"),
    ({"messages": "hello"}, "rows.jsonl:2: messages is of type str; expected a list"),
    ({"messages": [{"role": "user", "content": "?"}]}, "rows.jsonl:2: the last message is from the user"),
    ({"instruction": "?", "response": 7}, "rows.jsonl:2: response is of type int; expected"),
])
def test_a_bad_row_stops_the_draw_or_is_counted(tmp_path, row, message):
    path = write_jsonl(tmp_path / "rows.jsonl", [PAIR, row, PAIR])
    with pytest.raises(InputError, match=message):
        draw_rows([path], 10, seed=0)
    rows, report = draw_rows([path], 10, seed=0, on_bad_row="skip")
    assert len(rows) == 2 and report["bad"] == 1 and report["faults"][0].startswith(str(path) + ":2")


def test_rows_as_editors_leave_them(tmp_path):
    """Byte order mark, CRLF, blank lines, U+2028, a decomposed letter, an integer of 40 digits: nothing is changed."""
    odd = "cafe\u0301\u2028or \u00e9"
    rows = [PAIR | {"response": odd, "id": 10**40 + 1}, PAIR]
    text = "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n \r\n"
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = dict(draw_rows([tmp_path / "rows.jsonl"], 10, seed=0)[0])
    assert found == {f"{tmp_path}/rows.jsonl:1": say("How many?", odd),
                     f"{tmp_path}/rows.jsonl:3": say("How many?", "Two.")}
    assert read_records([tmp_path / "rows.jsonl"], "instruction")[0] == rows

# ----- the draw ------------------------------------------------------------------------------------------------------


def test_the_draw_depends_on_the_seed_and_the_place_alone(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [PAIR | {"response": str(i)} for i in range(200)])
    all_rows = [where for where, _ in draw_rows([path], 200, seed=1)[0]]
    assert len(set(all_rows)) == 200
    assert [where for where, _ in draw_rows([path], 50, seed=1)[0]] == all_rows[:50]
    assert [where for where, _ in draw_rows([path], 50, seed=2)[0]] != all_rows[:50]
    # about a quarter of a quarter: 50 of 200 drawn, 12.5 of them expected among the first 50
    assert 4 < sum(int(where.rpartition(":")[2]) <= 50 for where in all_rows[:50]) < 24


def test_rows_of_another_kind_are_left_out(tmp_path):
    path = write_jsonl(tmp_path / "rows.jsonl", [FINEMED, FINEMED | {"instruction_type": "complex"}, PAIR,
                                                 PAIR | {"instruction_type": None}])
    rows, report = draw_rows([path], 10, seed=0, kind="complex")
    assert sorted(where[-1] for where, _ in rows) == ["2", "3", "4"] and report["other kind"] == 1

"""data.py's training half: rendering rows and pairs, and dividing them into steps and micro-batches."""
from itertools import chain, islice

import numpy as np
import pytest
import torch
from conftest import said
from hypothesis import given, settings
from hypothesis import strategies as st

from chat import LLAMA3_SYSTEM, chat_template, render_chat
from data import (
    collate,
    collate_pairs,
    render_pairs,
    render_rows,
    rows_of_answers,
    show_example,
    split_step,
    steps_of_epochs,
)
from files import InputError
from tokenizer import Tokenizer

# ----- rows ----------------------------------------------------------------------------------------------------------


def test_rendering_truncates_answers_and_drops_what_has_none_left(smollm2):
    tokenizer = Tokenizer.from_dir(smollm2)
    rows = [("short", messages("Hi?", "Yes.")), ("long", messages("Hi?", "word " * 100)),
            ("prompt", messages("word " * 100, "Yes."))]
    examples, report = render_rows(tokenizer, rows, 60)
    assert [where for where, *_ in examples] == ["short", "long"] and report["dropped"] == 1
    assert report["truncated"] == 2 and [len(ids) for _, ids, _ in examples][1] == 60
    with pytest.raises(InputError, match="bad: half a character"):
        render_rows(tokenizer, [("bad", messages("\ud800", "Yes."))], 60)
    assert render_rows(tokenizer, [("bad", messages("\ud800", "Yes."))], 60, on_bad_row="skip")[1]["bad"] == 1


def messages(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_inspection_marks_exactly_what_is_trained(smollm2):
    tokenizer = Tokenizer.from_dir(smollm2)
    (_, ids, labels), = render_rows(tokenizer, [("", messages("Why?", "Because."))], 100)[0]
    assert show_example(tokenizer, ids, labels, colour=False).endswith(
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n⟦Because.<|im_end|>⟧")
    assert "\x1b[30;42mBecause.<|im_end|>\x1b[0m" in show_example(tokenizer, ids, labels)


@pytest.mark.parametrize("template, default", [
    ("llama3", LLAMA3_SYSTEM), ("llama3", None), ("chatml", None), ("chatml", ""), ("chatml", "It's\n\"a\" \\n 'é'."),
    ("llama2", None)])
def test_exported_chat_templates_are_ours(template, default):
    """Jinja from chat_template against render_chat, with and without a system message and a generation prompt."""
    jinja2 = pytest.importorskip("jinja2")
    control = {name: i for i, name in enumerate((
        "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>",
        "<s>", "</s>"))}
    names = {i: name for name, i in control.items()}
    characters = Tokenizer(lambda text: [ord(c) + 100 for c in text], None, control, set(), template, 1 << 21)
    characters.default_system = default
    compiled = jinja2.Template(chat_template(characters), keep_trailing_newline=True)
    for system in ([], [{"role": "system", "content": " Be brief. "}]):
        for ask in (True, False):
            talk = [*system, *messages(" Why? ", "Because."), *messages("So?", " Yes. ")][:-1 if ask else None]
            ids, _ = render_chat(characters, talk, add_generation_prompt=ask)
            ours = "".join(names.get(i) or chr(i - 100) for i in ids)
            assert compiled.render(messages=talk, add_generation_prompt=ask) == ours


def test_supervised_spans_are_the_answers():
    """The decoded labels of a conversation of two turns, for each template (characters stand for tokens)."""
    control = {name: i for i, name in enumerate((
        "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>", "<|im_end|>",
        "<s>", "</s>"))}
    talk = [{"role": "user", "content": "Why <|eot_id|>?"}, {"role": "assistant", "content": "Because."},
            {"role": "user", "content": "So?"}, {"role": "assistant", "content": "Yes."}]
    expected = {"llama3": "Because.<|eot_id|>Yes.<|eot_id|>", "chatml": "Because.<|im_end|>Yes.<|im_end|>",
                "llama2": " Because. </s> Yes. </s>"}  # the template's own spaces around an answer
    names = {i: name for name, i in control.items()}
    for template, answers in expected.items():
        tokenizer = Tokenizer(lambda text: [ord(c) + 100 for c in text], None, control, set(), template, 1 << 21)
        (_, ids, labels), = render_rows(tokenizer, [("", talk)], 10_000)[0]
        assert "".join(names.get(i) or chr(i - 100) for i in labels if i != -100) == answers
        assert render_chat(tokenizer, talk)[0][1:] == [*ids[1:], render_chat(tokenizer, talk)[0][-1]]

# ----- pairs ---------------------------------------------------------------------------------------------------------


PROMPT = [said("user", "Who?")]


def test_rendering_keeps_prompts_cuts_answers_and_drops_what_says_nothing(smollm2):
    tokenizer = Tokenizer.from_dir(smollm2)
    long, prompt = "word " * 40, len(render_chat(tokenizer, PROMPT, add_generation_prompt=True)[0])
    rows = [("plain", (PROMPT, "The nurse.", "Nobody.")), ("cut", (PROMPT, "a " + long, "b " + long)),
            ("same", (PROMPT, "Yes.", "Yes.")), ("same when cut", (PROMPT, long + "a", long + "b")),
            ("blank", (PROMPT, "Yes.", " \n")), ("crowded", ([said("user", long)], "Yes.", "No."))]
    pairs, report = render_pairs(tokenizer, rows, prompt + 20)
    assert [where for where, *_ in pairs] == ["plain", "cut"]
    assert report == {"truncated": 2, "equal": 2, "empty": 1, "dropped": 1, "faults": [
        "same: the answers are equal", "same when cut: the answers are equal within the length",
        "blank: an answer is empty", f"crowded: a prompt of {prompt + 39} tokens leaves no room for an answer"]}
    (_, ids, chosen, rejected), cut = pairs
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(chosen) == "The nurse.<|im_end|>" and tokenizer.decode(rejected) == "Nobody.<|im_end|>"
    assert len(cut[1]) == prompt and len(cut[2]) == len(cut[3]) == 21  # the last of 21 is no input: 20 + the prompt
    shown = show_example(tokenizer, *rows_of_answers(ids, chosen, rejected)[1], colour=False)
    assert shown.endswith("Who?<|im_end|>\n<|im_start|>assistant\n⟦Nobody.<|im_end|>⟧")
    with pytest.raises(InputError, match="bad: half a character"):
        render_pairs(tokenizer, [("bad", (PROMPT, "\ud800", "No."))], 60)

# ----- steps and micro-batches ---------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(50, 2000), st.integers(1, 8))
def test_a_step_is_divided_without_loss_within_the_budget(lengths, budget, world):
    bins = split_step(lengths, budget, world)
    assert len(bins) % world == 0 and sorted(chain(*bins)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in own) <= budget or len(own) == 1 for own in bins)
    by_length = sorted(filter(None, bins), key=lambda own: (-lengths[own[0]], own[0]))
    order = [lengths[i] for i in chain(*by_length)]
    assert order == sorted(order, reverse=True)  # rows of similar length lie together
    loads = [sum(lengths[i] for i in own) for own in bins]
    turns = [max(loads[i:i + world]) for i in range(0, len(loads), world)]
    assert turns == sorted(turns, reverse=True)
    order = [own for own in by_length if own]
    for i in range(0, len(bins), world):  # the ranks work on neighbours at a time: rows of about one length
        places = sorted(order.index(own) for own in bins[i:i + world] if own)
        assert not places or places[-1] - places[0] < world
    assert max(loads) <= sum(lengths) / len(bins) + max(lengths)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_row_exactly_once_an_epoch_and_the_same_rows_in_each_step(world):
    lengths = np.random.default_rng(0).integers(10, 500, 101).tolist()
    reference = [rows for rows, _ in islice(steps_of_epochs(lengths, batch_size=8, budget=10**6, seed=3), 26)]
    assert sorted(chain(*reference[:13])) == sorted(chain(*reference[13:])) == list(range(101))
    assert reference[:13] != reference[13:]
    ranks = [list(islice(steps_of_epochs(lengths, batch_size=8, budget=600, seed=3, rank=rank, world=world), 26))
             for rank in range(world)]
    for step, rows in enumerate(reference):
        assert all(own[step][0] == rows for own in ranks)
        assert sorted(chain(*(micro for own in ranks for micro in own[step][1]))) == sorted(rows)
        assert len({len(own[step][1]) for own in ranks}) == 1  # every rank takes part in every collective


@pytest.mark.parametrize("consumed", [0, 8, 96, 101, 109, 202])
def test_the_position_follows_from_the_rows_consumed(consumed):
    """96: before the last, smaller step of an epoch; 101 and 202: at the border of two."""
    plan = {"batch_size": 8, "budget": 600, "seed": 3}
    lengths = np.random.default_rng(0).integers(10, 500, 101).tolist()
    steps = [rows for rows, _ in islice(steps_of_epochs(lengths, **plan), 40)]
    before = 0
    while sum(map(len, steps[:before])) < consumed:
        before += 1
    later = [rows for rows, _ in islice(steps_of_epochs(lengths, **plan, world=2, consumed=consumed), 10)]
    assert later == steps[before:before + 10]


def row(*ids):
    labels = [*ids[1:], -100]
    return "where", np.array(ids, np.int32), np.array(labels, np.int32)


def test_packed_and_padded_by_hand():
    """Filled up to 8 tokens, or a multiple, with untrained ones."""
    packed = collate([row(1, 2, 3), row(4, 5)], packed=True)
    assert packed["ids"].tolist() == [[1, 2, 3, 4, 5, 0, 0, 0]]
    assert packed["labels"].tolist() == [[2, 3, -100, 5, -100, -100, -100, -100]]
    assert packed["positions"].tolist() == [0, 1, 2, 0, 1, 2, 3, 4] and packed["documents"] == [3, 5]
    padded = collate([row(1, 2, 3), row(4, 5)], packed=False)
    assert padded["ids"].tolist() == [[1, 2, 3, 0], [4, 5, 0, 0]]
    assert padded["labels"].tolist() == [[2, 3, -100, -100], [5, -100, -100, -100]]
    assert packed["tokens"] == padded["tokens"] == 5
    assert collate([row(1, 2, 3)] * 3, packed=False)["ids"].shape == (3, 8)
    assert collate([row(1, 2), row(4, 5)])["documents"] is None  # nothing to gain: one length
    assert collate([row(*range(9))] * 7)["ids"].shape == (1, 64)  # 7 rows would be of 16
    empty = collate([])
    assert empty["ids"].shape == (1, 8) and empty["ids"].dtype == torch.int64
    assert empty["tokens"] == 0 and (empty["labels"] == -100).all()


def test_a_pair_by_hand():
    """Filled up to 8 tokens with a document of untrained ones."""
    batch = collate_pairs([("", *(np.array(ids, np.int32) for ids in ([1, 2, 3], [4, 5], [6])))])
    assert batch["ids"].tolist() == [[1, 2, 3, 4, 3, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 4, 5, 6, -100, -100, -100]]
    assert batch["positions"].tolist() == [0, 1, 2, 3, 2, 0, 1, 2] and batch["documents"] == [(2, [2, 1]), (0, [3])]
    assert batch["parts"] == [4, 1, 3] and batch["lengths"].tolist() == [[2, 1]] and batch["tokens"] == 5
    two = collate_pairs([("", *(np.array(ids, np.int32) for ids in ([1, 2, 3], [4, 5], [6])))], shared=False)
    assert two["ids"].tolist() == [[1, 2, 3, 4, 1, 2, 3, 0]]
    assert two["positions"].tolist() == [0, 1, 2, 3, 0, 1, 2, 0]
    assert two["labels"].tolist() == [[-100, -100, 4, 5, -100, -100, 6, -100]]
    assert two["documents"] == [(0, [4]), (0, [3]), (0, [1])]

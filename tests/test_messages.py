"""messages.py: every form of a message becomes ours, by hand, or is refused by name; test_rows.py compares with TRL."""
import pytest
from conftest import said

from files import InputError
from messages import check_messages, one_prompt, read_message, read_turns, with_thought
from ttt import split_answer


@pytest.mark.parametrize("message", [
    {"role": "assistant", "content": "So."}, {"from": "gpt", "value": "So."},
    {"role": "assistant", "content": "So.", "from": None, "tool_calls": None, "reasoning": "", "weight": None},
    {"role": "assistant", "content": "So.", "tool_calls": [], "weight": 1, "name": "bot", "id": 7},
    {"role": "assistant", "content": [{"type": "text", "text": "S"}, {"type": "text", "text": "o.", "image": None}]}])
def test_one_message_in_many_forms(message):
    assert read_message(message, 1) == said("assistant", "So.")


def test_roles_have_other_names_too():
    for theirs, ours in (("human", "user"), ("gpt", "assistant"), ("developer", "system"), ("user", "user")):
        assert read_message({"from": theirs, "value": "x"}, 1) == said(ours, "x")


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_beside_the_answer_becomes_its_thought(name):
    content = read_message({"role": "assistant", "content": "\nSo. ", name: " Hm.\nOh. "}, 2)["content"]
    assert content == "## Thought\n\nHm.\nOh.\n\n## Summarization\n\nSo."
    assert split_answer(content) == ("Hm.\nOh.", "So.")


@pytest.mark.parametrize("flag, trained", [({"weight": 0}, False), ({"train": False}, False), ({"loss": False}, False),
                                           ({"weight": 0.0, "train": None}, False), ({"weight": 1}, True),
                                           ({"train": True}, True), ({"weight": 1, "train": False}, False)])
def test_an_answer_of_weight_0_is_marked_as_not_trained(flag, trained):
    message = read_message({"role": "assistant", "content": "So.", **flag}, 1)
    assert message == said("assistant", "So.") | ({} if trained else {"train": False})
    assert check_messages([said("user", "?"), message])[1] == [("user", "?", False), ("assistant", "So.", trained)]


def test_weight_0_on_a_users_message_changes_nothing():
    assert read_message({"role": "user", "content": "?", "weight": 0, "train": False}, 1) == said("user", "?")


@pytest.mark.parametrize("message, found", [
    ({"tool_calls": [{"function": "f"}]}, "message 2: found tool_calls"), ({"prefix": True}, "found prefix"),
    ({"function_call": {"name": "f"}}, "found function_call"), ({"images": ["x.png"]}, "found images"),
    ({"train_detail": [{"begin_offset": 0}]}, "found train_detail"), ({"refusal": "No."}, "found refusal"),
    ({"content": [{"type": "image_url", "image_url": {}}]}, "a part of type 'image_url'"),
    ({"content": ["So."]}, "a part of type 'str'"),
    ({"content": [{"type": "text", "text": 3}]}, "a part of type 'text'"),
    ({"from": "human"}, "message 2: role and from differ"), ({"value": "No."}, "content and value differ"),
    ({"role": "tool"}, "message 2 has role 'tool'"), ({"role": ["user"]}, r"message 2 has role \['user'\]"),
    ({"content": None}, "content of type NoneType"), ({"weight": 0.5}, "message 2: weight is 0.5"),
    ({"train": "no"}, "train is 'no'"), ({"role": "user", "train": True}, "train is True on a message of the user"),
    ({"reasoning": "Hm.", "role": "user"}, "found reasoning of type str beside no answer"),
    ({"reasoning": "Hm.", "content": " "}, "beside no answer"), ({"reasoning": ["Hm."]}, "reasoning of type list"),
    ({"reasoning": "Hm.", "content": "## Thought\n\nOh."}, "one that has its own"),
    ({"reasoning": "Hm.", "thinking": "Oh."}, "reasoning and thinking differ")])
def test_a_key_that_changes_the_meaning_of_a_message_is_refused_by_name(message, found):
    with pytest.raises(InputError, match=found) as error:
        read_message({"role": "assistant", "content": "So."} | message, 2)
    assert "\n" not in str(error.value)


def test_the_transcripts_of_hh_rlhf():
    """Human and Assistant open a turn at the start of a paragraph only; a text of one turn stays as it is."""
    two = [said("user", "Hi there\nHuman: you?"), said("assistant", "Hello.\n\nHow are you?"),
           said("user", "Well: fine"), said("assistant", "Good.")]
    text = ("\n\nHuman: Hi there\nHuman: you?\n\nAssistant: Hello.\n\nHow are you?"
            "\n\nHuman: Well: fine\n\nAssistant: Good.")
    assert read_turns({"chosen": text}, "chosen", "assistant") == two
    assert read_turns({"prompt": text[:-len(" Good.")]}, "prompt", "user") == two[:-1]
    assert read_turns({"chosen": text[:-len(" Good.")]}, "chosen", "assistant") == [*two[:-1], said("assistant", "")]
    for plain in ("Human: who are you?", "A Human: x\n\nAssistant: y"):
        assert read_turns({"prompt": plain}, "prompt", "user") == [said("user", plain)]


SYSTEM, ASK, MORE = said("system", "Be brief."), said("user", "Who?"), said("user", "Why?")


@pytest.mark.parametrize("given, context, expected", [
    ([], [ASK], [ASK]), ([ASK], [ASK], [ASK]), ([SYSTEM], [ASK], [SYSTEM, ASK]), ([SYSTEM, ASK], [ASK], [SYSTEM, ASK]),
    ([ASK], [SYSTEM, ASK], [SYSTEM, ASK]), ([SYSTEM, ASK], [SYSTEM, ASK], [SYSTEM, ASK]),
    ([ASK, said("assistant", "I."), MORE], [MORE], [ASK, said("assistant", "I."), MORE]),
    ([MORE], [ASK, said("assistant", "I."), MORE], [ASK, said("assistant", "I."), MORE])])
def test_a_prompt_that_a_row_states_twice_is_read_once(given, context, expected):
    assert one_prompt(given, context) == expected


@pytest.mark.parametrize("given, context, found", [
    ([ASK], [MORE], "two prompts that differ"),
    ([ASK], [ASK, said("assistant", "I."), MORE], "two prompts that differ"),
    ([SYSTEM, ASK], [said("system", "Be long."), ASK], "two system messages that differ")])
def test_two_prompts_that_differ_are_refused(given, context, found):
    with pytest.raises(InputError, match=found):
        one_prompt(given, context)


def test_a_thought_needs_an_answer():
    with pytest.raises(InputError, match="found reasoning of type str beside no answer"):
        with_thought({"reasoning": "Hm."}, "")

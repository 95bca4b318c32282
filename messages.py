"""Messages as people write them, read into one form: {"role": "system" | "user" | "assistant", "content": str}.

    {"role": "user", "content": "Why?"}                                             OpenAI, TRL, FineMed-DPO
    {"role": "user", "content": [{"type": "text", "text": "Why?"}]}                 text in parts
    {"from": "human", "value": "Why?"}                                              ShareGPT
    {"role": "assistant", "reasoning_content": "Hm.", "content": "So."}             reasoning beside the answer
    {"role": "assistant", "content": "So.", "weight": 0}                            an answer that is not to be trained

The last becomes a message with "train": False. rows.py and chat.py both read messages by this file. A key that changes
the meaning is read or refused by name, null counts as absent, and any other key is ignored.
"""
import re

from files import InputError

CONVERSATIONS = ("messages", "conversations")
ROLES = {"human": "user", "Human": "user", "gpt": "assistant", "Assistant": "assistant", "developer": "system"}
THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought", "Complex_CoT")
TRAINED = ("train", "weight", "loss", "loss_mask")  # axolotl's, OpenAI's, ms-swift's, Megatron's
REFUSED = frozenset((  # they change what the model reads or writes, and the templates here have no place for them
    "tools", "functions", "tool_calls", "function_call", "image", "images", "video", "videos", "audio", "audios",
    "documents", "chat_template", "chat_template_kwargs"))
REFUSED_IN_MESSAGES = REFUSED | {"tool_call_id", "refusal", "prefix", "train_detail"}
# how a text in HH-RLHF's form begins, and how a turn in it does
TRANSCRIPT = re.compile(r"\s*Human:"), re.compile(r"(?:^|\n\n)(Human|Assistant):")

# ----- keys ----------------------------------------------------------------------------------------------------------


def is_empty(value):
    """Whether a value says nothing: null, false, white space, or a list or dict of such values only."""
    if isinstance(value, (list, dict)):
        return all(map(is_empty, value.values() if isinstance(value, dict) else value))
    return value is None or value is False or (isinstance(value, str) and (not value or value.isspace()))


def names_in(mapping, names):
    """Those of `names` whose value in `mapping` is not empty."""
    return [name for name in names if name in mapping and not is_empty(mapping[name])]


def value_under(mapping, names, where=""):
    """The value under one of `names`, which all mean the same; None if it has none, InputError if two differ."""
    found = names_in(mapping, names) or [name for name in names if mapping.get(name) is not None]
    for name in found[1:]:
        if mapping[name] != mapping[found[0]]:
            raise InputError(f"{where}{found[0]} and {name} differ; expected one of them")
    return mapping[found[0]] if found else None


def refuse(mapping, names=REFUSED, where=""):
    """InputError if a row or a message has a value under one of `names`."""
    for name in sorted(names & mapping.keys()):
        if not is_empty(mapping[name]) and mapping[name] not in ("[]", "{}"):  # "tools": "[]" is JSON within JSON
            raise InputError(f"{where}found {name}, which changes the meaning and cannot be read here; expected none")

# ----- messages ------------------------------------------------------------------------------------------------------


def check_messages(messages):
    """messages in our form -> (system text or None, [(role, content, trained), …]); InputError names the fault."""
    if not isinstance(messages, list) or not messages:
        raise InputError("found no messages; expected a list of {role, content}")
    turns = []
    for i, message in enumerate(messages, 1):
        role, content = check_message(message, i)
        if role == "system" and i > 1:
            raise InputError(f"message {i} is a system message; expected one only at the start")
        turns.append((role, content, role == "assistant" and message.get("train", True)))
    system = turns.pop(0)[1] if turns[0][0] == "system" else None
    if not turns:
        raise InputError("found only a system message; expected a user's message after it")
    return system, turns


def check_message(message, number):
    """(role, content) of a message in our form; InputError for anything else."""
    role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
    if role not in ("system", "user", "assistant") or not isinstance(content, str):
        raise InputError(f"message {number} has role {role!r} and content of type {type(content).__name__}; "
                         "expected role system, user or assistant and a string")
    return role, content


def read_turns(record, name, role):
    """The messages under the key `name` of a row: a list of them, one of them, or a text of `role`; [] for null."""
    value = record.get(name)
    if isinstance(value, str) and name not in CONVERSATIONS:
        return read_transcript(value, role) or [{"role": role, "content": value}]
    if value is not None and not isinstance(value, (list, dict)):
        raise InputError(f"{name} is of type {type(value).__name__}; expected a list of {{role, content}}"
                         + ("" if name in CONVERSATIONS else " or text"))
    value = [value] if isinstance(value, dict) else value or []
    return [read_message(message, i) for i, message in enumerate(value, 1)]


def read_transcript(text, role):
    """The messages of a text in HH-RLHF's form, "Human: … Assistant: …"; None for any other text.

    A prompt (`role` "user") ends with an empty "Assistant:", which is left out.
    """
    begins, turn = TRANSCRIPT
    parts = turn.split(text.strip()) if begins.match(text) else ()  # "", "Human", text, "Assistant", text, …
    if len(parts) < 5:
        return None
    turns = [{"role": ROLES[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2])]
    return turns[:-1] if role == "user" and not turns[-1]["content"] else turns


def read_message(message, number):
    """One message of a row in our form. InputError with the message's number for one that cannot be read."""
    if not isinstance(message, dict):
        check_message(message, number)
    where = f"message {number}: "
    refuse(message, REFUSED_IN_MESSAGES, where)
    role, content = (value_under(message, names, where) for names in (("role", "from"), ("content", "value")))
    if isinstance(content, list):
        content = "".join(text_of_part(part, where) for part in content)  # as chat templates join them
    role, content = check_message({"role": ROLES.get(str(role), role), "content": content}, number)
    read = {"role": role, "content": content}
    if names_in(message, THOUGHTS):
        read["content"] = with_thought(message, content if role == "assistant" else "", where)
    for name in TRAINED:
        flag = message.get(name)
        if flag is not None and (flag not in (0, 1) or (flag and role != "assistant")):
            raise InputError(f"{where}{name} is {flag!r} on a message of the {role}; expected 0 or 1, and only the "
                             "assistant's to be trained")
        if flag is not None and not flag and role == "assistant":
            read["train"] = False
    return read


def text_of_part(part, where):
    """The text of one part of a message's content; InputError for an image or any other part."""
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise InputError(f"{where}found a part of type {kind!r} in the content; expected text alone")
    return part["text"]


def with_thought(mapping, answer, where=""):
    """The answer with the reasoning that stands beside it in `mapping`, in one text; ttt.split_answer undoes it.

        {"reasoning": "Hm."} and "So."    becomes    "## Thought\\n\\nHm.\\n\\n## Summarization\\n\\nSo."
    """
    thought = value_under(mapping, THOUGHTS, where)
    if not isinstance(thought, str) or not answer.strip() or "## Thought" in answer:
        raise InputError(f"{where}found reasoning of type {type(thought).__name__} beside no answer, or one that has "
                         "its own; expected text beside the assistant's answer")
    return f"## Thought\n\n{thought.strip()}\n\n## Summarization\n\n{answer.strip()}"


def one_prompt(given, context):
    """One list of the messages before an answer, where a row has two: `given` by other keys, and in a conversation.

        [question 2] and [question 1, answer 1, question 2]     become the second: one must be the end of the other
        [system] and [question]                                 become [system, question]
    """
    systems = [part[0]["content"] for part in (given, context) if part and part[0]["role"] == "system"]
    if len(set(systems)) > 1:
        raise InputError("found two system messages that differ; expected one")
    rest = [part[1:] if part and part[0]["role"] == "system" else part for part in (given, context)]
    shorter, longer = sorted(rest, key=len)
    if shorter and longer[-len(shorter):] != shorter:
        raise InputError("found two prompts that differ; expected one for the whole row")
    return [{"role": "system", "content": text} for text in systems[:1]] + longer

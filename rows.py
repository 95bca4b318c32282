"""Data rows as people have them: one reader of a conversation for SFT, DPO, the index and TTT.

    {"instruction": …, "response": …}                    FineMed-SFT
    {"prompt": …, "chosen": …, "rejected": …}            FineMed-DPO, TRL
    {"messages": [{"role": …, "content": …}, …]}         conversations

A row is a dict of one jsonl line; a conversation is a list of messages {"role": "system" | "user" | "assistant",
"content": str}.
"""
import hashlib
import heapq
from collections import Counter

from files import InputError, read_jsonl

# ----- conversations -------------------------------------------------------------------------------------------------


def check_messages(messages):
    """(system text or None, [(role, content), …]) of a list of messages; InputError names the fault."""
    if not isinstance(messages, list) or not messages:
        raise InputError("found no messages; expected a list of {role, content}")
    turns = []
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise InputError(f"message {i + 1} has role {role!r} and content of type {type(content).__name__}; "
                             "expected role system, user or assistant and a string")
        if role == "system" and i > 0:
            raise InputError(f"message {i + 1} is a system message; expected one only at the start")
        turns.append((role, content))
    system = turns.pop(0)[1] if turns[0][0] == "system" else None
    if not turns:
        raise InputError("found only a system message; expected a user's message after it")
    return system, turns


def messages_of(record):
    """The conversation of one data row as messages that end with the assistant's answer. InputError if it has none.

    Reads FineMed-SFT's columns (instruction, response), FineMed-DPO's and TRL's (prompt, chosen; either may be a string
    or a list of messages), prompt/response, prompt/completion and messages.
    """
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list):
            raise InputError(f"messages is of type {type(messages).__name__}; expected a list of {{role, content}}")
    else:
        messages = _side(record, ("instruction", "prompt"), "user") \
            + _side(record, ("response", "chosen", "completion"), "assistant")
    _, turns = check_messages(messages)
    if turns[-1][0] != "assistant" or not turns[-1][1].strip():
        raise InputError(f"the last message is {'empty' if turns[-1][0] == 'assistant' else 'from the user'}; "
                         "expected the assistant's answer")
    return messages


def pair_of(record):
    """(prompt messages, chosen answer, rejected answer) of a preference row; an answer may be empty. Else InputError.

    Reads prompt (or instruction), chosen and rejected, each a string or a list of messages: FineMed-DPO's columns,
    TRL's, and instruction/chosen/rejected. Where chosen and rejected have several messages they are whole conversations
    that differ in their last one (TRL's implicit prompt), and a prompt beside them says nothing new.
    """
    answers = []
    for key in ("chosen", "rejected"):
        value = record.get(key)
        if not isinstance(value, str) and not (isinstance(value, list) and value):
            raise InputError(f"found no answer under {key} (keys: {', '.join(sorted(record)) or 'none'})")
        answers.append([{"role": "assistant", "content": value}] if isinstance(value, str) else value)
    chosen, rejected = answers
    if len(chosen) == 1 or len(rejected) == 1:
        prompt = _side(record, ("instruction", "prompt"), "user")
    else:
        prompt, chosen = chosen[:-1], chosen[-1:]
        if rejected[:-1] != prompt:
            raise InputError("chosen and rejected differ before their last message; expected one prompt for both")
        if (record.get("instruction") or record.get("prompt")) and \
                _side(record, ("instruction", "prompt"), "user")[-1] != prompt[-1]:
            raise InputError("the prompt is not what chosen and rejected answer; expected one prompt for all")
        rejected = rejected[-1:]
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        _, turns = check_messages([*prompt, *answer])
        if len(answer) != 1 or [role for role, _ in turns[-2:]] != ["user", "assistant"]:
            raise InputError(f"{key} has {len(answer)} message(s), the last from {turns[-1][0]!r}; expected one, the "
                             "assistant's, after a prompt that ends with the user's")
    return prompt, chosen[0]["content"], rejected[0]["content"]


def _side(record, keys, role):
    for key in keys:
        value = record.get(key)
        if isinstance(value, str) and value.strip():
            return [{"role": role, "content": value}]
        if isinstance(value, list) and value:
            return value
    raise InputError(f"found no text under {' or '.join(keys)} (keys: {', '.join(sorted(record)) or 'none'})")


def question_of(record, field="instruction"):
    """The question a row asks: the string under `field`, else the last user message of its conversation."""
    value = record.get(field)
    if isinstance(value, str) and value.strip():
        return value
    turns = [message for message in messages_of(record) if message["role"] == "user"]
    if not turns:
        raise InputError(f"found no question: neither {field!r} nor a user message")
    return turns[-1]["content"]

# ----- drawing rows --------------------------------------------------------------------------------------------------


def draw_rows(paths, count, seed, *, parse=messages_of, on_bad_row="stop", kind=None):
    """`count` rows drawn from jsonl files (plain or .gz), in random order: ([(where, parse(row)), …], report).

    One pass that holds only the rows it will return: each row has a random number that depends on `seed` and its place
    alone, and the `count` smallest win. All rows if there are fewer. `kind` leaves out rows whose instruction_type is
    another one. A wrong row raises InputError ("stop") or is counted ("skip"). The report counts what was "read",
    "bad" and "other kind", "files" holds the rows read from each file, and "faults" describes the first bad ones.
    """
    counts, per_file, faults = Counter(), Counter(), []

    def good_rows():
        for place, path in enumerate(paths):
            for number, row in read_jsonl(path):
                counts["read"] += 1
                per_file[str(path)] += 1
                error, parsed = row, None
                if not isinstance(row, InputError):
                    error, parsed = try_to(parse, row, f"{path}:{number}")
                if error:
                    note_bad_row(error, on_bad_row, counts, faults)
                elif kind and row.get("instruction_type", kind) != kind:
                    counts["other kind"] += 1
                else:
                    yield random_number(seed, place, number), (f"{path}:{number}", parsed)
    drawn = heapq.nsmallest(count, good_rows(), key=lambda keyed: keyed[0])
    return [row for _, row in drawn], {**counts, "files": dict(per_file), "faults": faults}


def try_to(parse, record, where):
    """(None, parse(record)), or (the InputError that says where and what is wrong, None)."""
    try:
        return None, parse(record)
    except InputError as error:
        return InputError(f"{where}: {error}"), None


def note_bad_row(error, on_bad_row, counts, faults):
    if on_bad_row == "stop":
        raise error
    counts["bad"] += 1
    faults.extend([str(error)][:5 - len(faults)] if len(faults) < 5 else [])


def random_number(*parts):
    """A 64-bit number that is a fixed function of `parts`, the same on every machine and for every library version."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")

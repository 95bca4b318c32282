"""Data rows as people write them, read into conversations for SFT, DPO, the index and TTT.

    {"instruction": …, "response": …}                      FineMed-SFT; Alpaca with input and output; Orca's question
    {"prompt": …, "chosen": …, "rejected": …}              FineMed-DPO, TRL; texts, messages or whole conversations
    {"messages": [{"role": …, "content": …}, …]}           OpenAI; ShareGPT's conversations of from and value
    each with system, history [[question, answer], …], or reasoning beside the response

A row is a dict; messages.py reads its messages. A key that changes the meaning is read or refused by name, null counts
as absent, and any other key (text, source, score, …) is ignored. A question under several keys is read once.
"""
import hashlib
import heapq
from collections import Counter

from files import InputError, read_data
from messages import (
    CONVERSATIONS,
    THOUGHTS,
    check_messages,
    names_in,
    one_prompt,
    read_turns,
    refuse,
    value_under,
    with_thought,
)

QUESTIONS = ("instruction", "prompt", "query", "Question", "question")
MATERIAL = ("input", "context")  # Alpaca's and Dolly's: text that the user adds below the question
OPTIONS = ("options", "choices", "opa", "opb", "opc", "opd")
ANSWERS = ("response", "chosen", "completion", "output", "Response", "answer")
SYSTEMS = ("system", "system_prompt", "system_message")
OPENAI_PAIR = {"preferred_output": "chosen", "non_preferred_output": "rejected"}

# ----- before an answer ----------------------------------------------------------------------------------------------


def prepared(record):
    """A row without nulls, OpenAI's preference pairs under our names; InputError for a row that must not be trained."""
    if isinstance(record.get("input"), dict) and "messages" in record["input"]:
        record = {**record, "input": None, **record["input"]}
    refuse(record)
    for name in ("weight", "train", "label", "kto_tag"):  # KTO's label: false marks an answer as bad
        if record.get(name) is False or (name in ("weight", "train") and record.get(name) == 0):
            raise InputError(f"{name} is {record[name]!r}; expected a row to learn from")
    return {OPENAI_PAIR.get(name, name): value for name, value in record.items() if value is not None}


def read_row(record, keys, questions=QUESTIONS):
    """(the messages before the answers, [the messages of the answer under key, for each of `keys`]).

        {"prompt": "Q", "chosen": "A", "rejected": "B"}, keys chosen and rejected
            -> ([user Q], [[assistant A], [assistant B]])
        {"messages": [user Q, assistant A]}, key messages
            -> ([user Q], [[assistant A]]), and [[]] if the conversation ends with the user
    """
    contexts, answers = [], []
    for key in keys:
        turns = read_turns(record, key, "assistant")
        if turns[0]["role"] == "assistant" and key not in CONVERSATIONS:
            start = 0  # an answer alone, which goes on from the prompt
        elif turns[-1]["role"] == "assistant":
            start = len(turns) - 1  # a whole conversation, which ends with the answer
        else:
            start = len(turns)
        contexts.append(turns[:start])
        answers.append(turns[start:])
    whole = [context for key, context in zip(keys, contexts) if context and key not in CONVERSATIONS]
    if any(context != whole[0] for context in whole):
        raise InputError(f"{' and '.join(keys)} differ before their last message; expected one prompt for both")
    return prompt_of(record, contexts, questions), answers


def prompt_of(record, contexts, questions=QUESTIONS):
    """The messages before a row's answer, from its own texts or from the conversations in it (`contexts`).

        {"system": "S", "instruction": "Q", "input": "I"}      [system S, user "Q\\nI"]
        {"prompt": "Q", "messages": [user Q, assistant A]}     [user Q], from contexts [[user Q]]

    InputError if there is no question, or if the row has text beside the conversation or options beside the question
    that are not part of it.
    """
    name = next(iter(names_in(record, questions)), None)  # the key of the question
    asked, history = read_turns(record, name, "user"), read_history(record)
    value_under(record, SYSTEMS)
    prompt = [turn for key in names_in(record, SYSTEMS)[:1] for turn in read_turns(record, key, "system")]
    others = {*QUESTIONS, *MATERIAL}  # keys whose text must be part of the prompt
    if names_in(record, OPTIONS):  # a benchmark's own question may stand beside the one made of it and its options
        others.remove("question")
    if len(asked) > 1 or (asked and not isinstance(record[name], str)):
        contexts, others = [asked, *contexts], others - {name}
    if any(contexts):
        if history:
            raise InputError("found history beside a list of messages; expected it within the list")
        for context in contexts:
            prompt = one_prompt(prompt, context)
    elif asked or names_in(record, ["input"]):
        texts = [turn["content"] for turn in asked] + [record[key] for key in names_in(record, MATERIAL)]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"{' or '.join(MATERIAL)} is a list or an object; expected text")
        prompt += [*history, {"role": "user", "content": "\n".join(texts)}]
        others -= {name, *MATERIAL}
        if name not in ("instruction", "prompt"):
            others |= {*OPTIONS}
    else:
        raise nothing_under(questions, record)
    check_parts(record, names_in(record, sorted(others)), prompt)
    return prompt


def check_parts(record, keys, prompt):
    """InputError if the text under one of `keys` is no part of the user's messages in `prompt`, nor they of it."""
    said = squeezed(" ".join(turn["content"] for turn in prompt if turn["role"] == "user")) if keys else ""
    for key in keys:
        for text in map(squeezed, texts_in(record[key])):
            if not said or (text not in said and said not in text):
                raise InputError(f"{key} is no part of the question; expected the whole question in one place")


def read_history(record):
    """LLaMA-Factory's history, [[question, answer], …] before the question, as messages."""
    messages, history = [], record["history"] if names_in(record, ["history"]) else []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise InputError(f"history holds a value of type {type(pair).__name__}; expected [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def nothing_under(names, record):
    """The InputError for a row that has text under none of `names`."""
    no_messages = " and no messages" if names[0] not in ANSWERS else ""
    return InputError(f"found no text under {' or '.join(names)}{no_messages} {keys_of(record)}")


def keys_of(record):
    """The keys of a row, for a message."""
    names = sorted(map(str, record))
    return f"(keys: {', '.join(names[:12]) or 'none'}{', …' if names[12:] else ''})"


def squeezed(text):
    """The text with single spaces for all white space."""
    return " ".join(text.split())


def shorten(text, length=100):
    """A text on one line, at most `length` characters of it, without those that move a terminal's cursor."""
    text = "".join(char for char in squeezed(text) if char.isprintable())
    return text if len(text) <= length else text[:length - 1] + "…"


def texts_in(value):
    """Every text and number in a value, in nested lists and dicts too, as strings."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [text for one in value for text in texts_in(one)]
    return [] if value is None else [str(value)]

# ----- rows ----------------------------------------------------------------------------------------------------------


def messages_of(record):
    """The conversation of a data row: messages that end with the assistant's answer. InputError if it has none."""
    record = prepared(record)
    conversations, names = names_in(record, CONVERSATIONS), names_in(record, ANSWERS)
    if names[1:] and names[-1] == "answer":
        names.pop()  # beside a response, "answer" is a benchmark's letter or short solution
    prompt, answers = read_row(record, conversations + names)
    answers = [answer for answer in answers if answer] or [[]]
    if any(answer[-1]["content"] != answers[0][-1]["content"] for answer in answers[1:]):
        raise InputError(f"found answers that differ {keys_of(record)}; expected one")
    if not answers[0] and not conversations:
        raise nothing_under(ANSWERS, record)
    messages = prompt + answers[0]
    if names_in(record, THOUGHTS):
        if conversations or names[0] == "chosen" or not isinstance(record[names[0]], str):
            raise InputError("found reasoning beside messages or a pair; expected it in the message, or beside one "
                             "response")
        messages[-1]["content"] = with_thought(record, messages[-1]["content"])
    _, turns = check_messages(messages)
    if turns[-1][0] != "assistant" or not turns[-1][1].strip():
        raise InputError(f"the last message is {'empty' if turns[-1][0] == 'assistant' else 'from the user'}; "
                         "expected the assistant's answer")
    if not any(trained for _, _, trained in turns):
        raise InputError("found weight 0 or train false on every answer; expected one to train on")
    return messages


def pair_of(record):
    """(prompt messages, chosen answer, rejected answer) of a preference row; an answer may be empty.

    chosen and rejected are texts, messages, or whole conversations that differ in their last message. InputError for
    any other row.
    """
    record = prepared(record)
    for key in ("chosen", "rejected"):
        if not isinstance(record.get(key), (str, list, dict)) or record[key] in ([], {}):
            raise InputError(f"found no answer under {key} {keys_of(record)}")
    prompt, answers = read_row(record, [*names_in(record, CONVERSATIONS), "chosen", "rejected"])
    for key, answer in zip(("chosen", "rejected"), answers[-2:]):
        _, turns = check_messages([*prompt, *answer])
        if len(answer) != 1 or prompt[-1]["role"] != "user":
            raise InputError(f"{key} has {len(answer)} message(s), the last from {turns[-1][0]!r}; expected one, the "
                             "assistant's, after a prompt that ends with the user's")
        if not answer[0].get("train", True) or names_in(record, THOUGHTS):
            raise InputError(f"{key} has weight 0, train false, or reasoning beside the pair; expected two answers to "
                             "compare")
    return prompt, *(answer[0]["content"] for answer in answers[-2:])


def question_of(record, field="instruction"):
    """The question of a row for an index: the user's last message, or the text under `field`. InputError if none."""
    if field != "instruction":
        turns = read_turns(record, field, "user")
    elif names_in(row := prepared(record), (*CONVERSATIONS, *ANSWERS)):
        turns = messages_of(row)
    else:
        turns = prompt_of(row, [])
    texts = [turn["content"] for turn in turns if turn["role"] == "user" and turn["content"].strip()]
    if not texts:
        raise InputError(f"found no question under {field} {keys_of(record)}")
    return texts[-1]


def lone_question(record):
    """The question of a row that holds one user message and nothing else to read; "question" goes before other keys."""
    record, names = prepared(record), ("question", *QUESTIONS[:-1])
    if not names_in(record, (*names, *MATERIAL, *CONVERSATIONS)):
        raise InputError('found no question; expected text under "question" or "instruction"')
    prompt, _ = read_row(record, names_in(record, CONVERSATIONS), names)
    if [turn["role"] for turn in prompt] != ["user"]:
        raise InputError(f"found {', '.join(turn['role'] for turn in prompt)}; expected one question of the user")
    return prompt[0]["content"]

# ----- drawing rows --------------------------------------------------------------------------------------------------


def draw_rows(paths, count, seed, *, parse=messages_of, on_bad_row="stop", kind=None):
    """`count` rows drawn from data files (see files.read_data), in random order: ([(where, parse(row)), …], report).

    One pass that holds only `count` rows: each row has a random number that depends on `seed` and its place alone, and
    the rows with the smallest numbers are drawn, or all if there are fewer. `kind` leaves out rows with another
    instruction_type. A wrong row raises InputError (on_bad_row "stop") or is counted ("skip"). The report counts rows
    "read", "bad" and of "other kind", and those of each of the "files"; "faults" describes the first five bad ones.
    """
    counts, per_file, faults = Counter(), Counter(), []

    def good_rows():
        for place, path in enumerate(paths):
            for number, where, row in read_data(path):
                counts["read"] += 1
                per_file[str(path)] += 1
                error, parsed = row, None
                if not isinstance(row, InputError):
                    error, parsed = try_to(parse, row, where)
                if error:
                    note_bad_row(error, on_bad_row, counts, faults)
                elif kind and row.get("instruction_type") not in (kind, None):
                    counts["other kind"] += 1
                else:
                    yield random_number(seed, place, number), (where, parsed)
    drawn = heapq.nsmallest(count, good_rows(), key=lambda keyed: keyed[0])
    return [row for _, row in drawn], {**counts, "files": dict(per_file), "faults": faults}


def try_to(parse, record, where):
    """(None, parse(record)), or (the InputError that says where and what is wrong, None)."""
    try:
        return None, parse(record)
    except InputError as error:
        return InputError(f"{where}: {error}"), None


def note_bad_row(error, on_bad_row, counts, faults):
    """Raises `error` ("stop"), or counts it and keeps the messages of the first five ("skip")."""
    if on_bad_row == "stop":
        raise error
    counts["bad"] += 1
    if len(faults) < 5:
        faults.append(str(error))


def random_number(*parts):
    """A 64-bit number that is a fixed function of `parts`, the same on every machine and for every library version."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")

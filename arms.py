"""The arms of an evaluation: what each trains on, and what stands in its prompt.

    nearest:k=2            train on [r1, r2]      prompt: question
    context:k=2            no training            prompt: r2 as a turn, r1 as a turn, question
    nearest+context:k=2    train on [r1, r2]      prompt: r2 as a turn, r1 as a turn, question
    ttt                    as ttt.py does by default: both, where it finds that this helps; records are cut and masked
                           as for the other arms

r1, r2, … are the question's records, nearest first (or drawn at random): not masked by leaks.py, and cut to the same
tokens for all arms. A record that does not fit the window is left out of every arm.
"""
import argparse
import math
from dataclasses import dataclass

import numpy as np

from benchmarks import choice_prompt
from chat import render_chat
from data import training_example
from files import InputError, number, whole
from leaks import reason_to_mask
from rows import messages_of

# ----- arms ----------------------------------------------------------------------------------------------------------

ARMS = {  # what is trained on, what stands in the prompt
    "none": (None, None), "nearest": ("nearest", None), "random": ("random", None), "context": (None, "nearest"),
    "random-context": (None, "random"), "nearest+context": ("nearest", "nearest"), "ttt": ("nearest", "nearest"),
    "random-ttt": ("random", "random")}
TTT = {"k": 10, "context_k": 4, "lr": 6e-5}  # ttt.py's defaults; a test compares them


@dataclass(frozen=True)
class Arm:
    """One way to answer. `order`: where the nearest record stands; by default it is trained on first, and stands last
    in the prompt, next to the question."""
    name: str
    train: str | None
    context: str | None
    k: int = 4
    lr: float = 1e-5
    steps: int = 1
    optimizer: str = "signsgd"
    order: str | None = None
    context_k: int | None = None  # records in the prompt, by default k
    check: bool = False  # as ttt.py without --always

    @property
    def most(self):
        """How many records it needs."""
        return max(self.k, self.context_k or 0)

    def trained(self, records):
        return records[:self.k][::-1] if self.order == "last" else records[:self.k]

    def in_prompt(self, records):
        shown = records[:self.context_k or self.k]
        return shown if self.order == "first" else shown[::-1]


def arm_of(text):
    """An argparse type: "nearest" or "nearest:k=10,lr=1e-4,steps=2,optimizer=sgd,order=last" as an Arm. `context` is
    the number of records in the prompt, where they are not those that are trained on."""
    kind, _, settings = text.partition(":")
    readers = {"k": whole(1), "context": whole(1), "lr": number(0), "steps": whole(1),
               "optimizer": one_of("signsgd", "adam", "sgd"), "order": one_of("first", "last")}
    if kind not in ARMS:
        raise argparse.ArgumentTypeError(f"found {kind!r}, expected one of {', '.join(ARMS)}")
    train, context = ARMS[kind]
    known = [*(["k", "order"] if train or context else []), *(["lr", "steps", "optimizer"] if train else []),
             *(["context"] if train and context else [])]
    values = {}
    for setting in settings.split(",") if settings else ():
        name, equals, value = setting.partition("=")
        if not equals or name not in known or name in values:
            raise argparse.ArgumentTypeError(f"found {setting!r} in {text!r}, expected each of "
                                             f"{', '.join(known) or 'no settings'} at most once, as in k=4")
        values[name] = readers[name](value)
    if "context" in values:
        values["context_k"] = values.pop("context")
    return Arm(text, train, context, **(TTT | {"check": True} if kind.endswith("ttt") else {}) | values)


def one_of(*names):
    def parse(text):
        if text not in names:
            raise argparse.ArgumentTypeError(f"found {text!r}, expected {' or '.join(names)}")
        return text
    return parse

# ----- records -------------------------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """What a run has loaded: the model, the records, the flags."""
    args: argparse.Namespace
    world: object
    tokenizer: object
    context: int  # tokens of the model's window
    system: list  # the system message, or none
    stop_ids: set
    model: object = None
    index: object = None
    encoder: object = None
    far: float = math.nan  # scores, see Index.thresholds
    near: float = math.nan

    @property
    def room(self):
        """Tokens that the prompt must leave for the answer."""
        if self.args.measure == "generate":
            return min(self.args.max_new_tokens, self.context // 2)
        return self.args.answer_tokens


def cut_record(tokenizer, record, most):
    """(messages of an index record, whether its end was cut): the last answer loses what is over `most` tokens of the
    conversation. None where the other messages leave it less than 16 tokens, or where it is not to be trained. A system
    message is left out: the question's own stands in every arm."""
    messages = [message for message in messages_of(record) if message["role"] != "system"]
    *before, last = messages
    if not last.get("train", True):
        return None
    room = most - len(render_chat(tokenizer, before, add_generation_prompt=True)[0])
    ids = tokenizer.encode(last["content"])
    if len(ids) <= room:
        return messages, False
    if room < 16:
        return None
    return [*before, {**last, "content": tokenizer.decode(ids[:room]).rstrip("\ufffd")}], True


def example_of(run, messages, was_cut):
    """(ids, labels) to train on: the last answer, and its end of turn unless the answer was cut before its end."""
    *before, last = messages
    ids, labels = training_example(run.tokenizer, [
        *run.system, *({**message, "train": False} if message["role"] == "assistant" else message
                       for message in before), last])
    if was_cut:
        end = 1 + max(i for i, label in enumerate(labels) if label != -100) - ending(run.tokenizer)
        labels = [*labels[:end], *[-100] * (len(labels) - end)]
    return ids, labels


def ending(tokenizer):
    """How many tokens end an answer: the end of turn and, in Llama 2's template, the space before it."""
    return 2 if tokenizer.template == "llama2" else 1


def ranked(run, question, vector, kind):
    """Yields (id, score) of all records, nearest first or, of `kind` "random", in an order drawn for the question."""
    n = len(run.index.records)
    if kind == "random":
        order = np.random.default_rng([run.args.seed, question.number]).permutation(n)
        yield from ((int(i), float(run.index.vectors[i] @ vector)) for i in order)
        return
    seen, k = set(), 64
    while len(seen) < n:
        scores, ids = run.index.search(vector[None], k)
        new = [(int(i), float(score)) for i, score in zip(ids[0], scores[0]) if i >= 0 and int(i) not in seen]
        yield from new
        seen.update(i for i, _ in new)
        if k >= n:
            return
        k *= 8


def records_for(run, question, vector, kind, k):
    """(up to k records for a question, as (id, score, messages, whether cut), nearest or random first;
    {"masked": {rule: number}, "left_out": number}).

    Masked are records that give the answer away; others follow in their place. Left out of the k are those that do not
    fit the window, the last first, and those that are too long or have no answer to train on: none follow.
    """
    found, masked, left_out = [], {}, 0
    for i, score in ranked(run, question, vector, kind):
        if len(found) + left_out == k:
            break
        record = run.index.records[i]
        if reason := reason_to_mask(question, record, rule=run.args.leaks, field=run.index.manifest["field"],
                                    cosine=cosine(run.index.vectors[i], vector)):
            masked[reason[0]] = masked.get(reason[0], 0) + 1
            continue
        try:
            cut = cut_record(run.tokenizer, record, run.args.record_tokens)
        except InputError:
            cut = None
        if cut is None:
            left_out += 1
        else:
            found.append((i, round(score, 4), *cut))
    while found and len(prompt_of(run, question, found)) + run.room > run.context:
        found.pop()
        left_out += 1
    return found, {"masked": masked, "left_out": left_out}


def records_of_kinds(run, question, vector, kinds, k):
    """{kind: `records_for`}, as many records of each kind: what is left out of one is left out, the last, of the other,
    or nearest − random would be a difference of their number too."""
    found = {kind: records_for(run, question, vector, kind, k) for kind in sorted(kinds)}
    fewest = min((len(records) for records, _ in found.values()), default=0)
    return {kind: (records[:fewest], notes | {"left_out": notes["left_out"] + len(records) - fewest})
            for kind, (records, notes) in found.items()}


def cosine(a, b):
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-12))


def messages_before(run, question, records=()):
    """The conversation up to the question's answer; `records` are earlier turns, in that order."""
    style = "chat" if run.args.measure == "generate" else "chat-letter" if run.args.by == "letter" else "chat-text"
    asked = choice_prompt(question, style) if question.options else question.text
    return [*run.system, *(message for _, _, messages, _ in records for message in messages),
            {"role": "user", "content": asked}]


def prompt_of(run, question, records=()):
    """The ids after which the answer begins. Raw text has Llama's BOS in front, as its tokenizer puts it there."""
    if run.args.prompt == "raw":
        bos = {"llama3": ["<|begin_of_text|>"], "llama2": ["<s>"]}.get(run.tokenizer.template, [])
        return [*(run.tokenizer.special[name] for name in bos), *run.tokenizer.encode(choice_prompt(question, "raw"))]
    return render_chat(run.tokenizer, messages_before(run, question, records), add_generation_prompt=True)[0]

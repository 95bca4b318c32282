"""The stages of synth.py, each a script for one row: it yields the calls that it wants, and returns what follows.

    def score(run, row):
        replies = yield [(run.teacher, call), …]        the replies, in order; one without text has a `failure`
        return row | {"scores": …}                      or raise Dropped(rule, evidence)

A script reads no file and asks no one. It must want the same calls whenever it is run with the same row and replies,
because synth.py runs it again from its beginning each time that replies have come; chance is drawn from the row's own
text (rows.random_number), so the order of rows is nothing. `run` is a synth.Run.
"""
import json
from dataclasses import dataclass
from itertools import islice

import prompts
from benchmarks import extracted, split_thought
from calls import Call, Reply, Store, key_of
from files import InputError, one_line
from prompts import COMPLEX, DEPARTMENTS, NO_SPECIALTY, STRATEGIES, UNKNOWN
from rows import random_number

PROOF = {"verified": 2, "judged": 1, "unproven": 0}  # the better proved answer is ranked first; "wrong" is none


class Dropped(Exception):
    """A row goes no further. Its arguments are the rule and the evidence."""


def call(run, name, *messages, sample=0, **values):
    """The Call of a prompt: `messages` before it, `values` in its places. `sample` tells equal calls apart."""
    template = next(asked[name] for asked in prompts.PROMPTS.values() if name in asked)
    turns = [*messages, prompts.filled(template, values)]
    return Call(tuple({"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)),
                {**prompts.PARAMETERS[name], "seed": run.seed + sample}, prompts.schema_of(name))


def text_of(row, without="(none)"):
    """The row's text as prompts have it, cut to the original's length; `without` for a row that has only a question."""
    return row["text"][:prompts.TEXT_CHARACTERS] or without


def need(reply):
    """The reply; Dropped if there is none."""
    if reply.failure:
        raise Dropped("no reply", reply.failure)
    return reply


def drop(rule, reply):
    raise Dropped(rule, (reply.text or "")[:2000])


def together(*scripts):
    """Runs scripts side by side, so that their calls are asked in one go; the values that they return."""
    values, waiting = [None] * len(scripts), {i: None for i in range(len(scripts))}  # script: replies to be sent
    while True:
        wanted = {}
        for i, replies in waiting.items():
            try:
                wanted[i] = scripts[i].send(replies)
            except StopIteration as end:
                values[i] = end.value
        if not wanted:
            return values
        replies = iter((yield [call for calls in wanted.values() for call in calls]))
        waiting = {i: [next(replies) for _ in calls] for i, calls in wanted.items()}


@dataclass
class Scores:
    """A function as a teacher: `score([(question, answer), …]) -> [number, …]`, asked in batches, its scores stored."""
    model: str
    score: object
    store: Store
    batch: int = 16

    def ask(self, calls):
        """Yields (index, Reply) for each Call of two messages, question and answer; the value is {"score": number}."""
        calls = enumerate(calls)
        while part := list(islice(calls, self.batch)):
            pairs = [tuple(message["content"] for message in call.messages) for _, call in part]
            try:
                scores = self.score(pairs)
            except InputError:  # one does not fit the model's context: each by itself
                scores = [self.alone(pair) for pair in pairs]
            for (i, call), score in zip(part, scores):
                key = key_of(self.model, call)
                reply = (Reply(key, failure=score) if isinstance(score, str) else
                         Reply(key, repr(score), value={"score": float(score)}))
                self.store.put(reply)
                yield i, reply

    def alone(self, pair):
        """The score of one pair, or why there is none."""
        try:
            return self.score([pair])[0]
        except InputError as error:
            return one_line(error)

# ----- scripts: a row, the calls it wants, the row that follows ------------------------------------------------------


def classify(run, row):
    """The department, then its specialty: a name, or "None" or "unknown", with which the row is kept."""
    def name(prompt, names, **values):
        text = text_of(row, "\n".join(row["questions"]))
        reply, = yield [(run.teacher, call(run, prompt, text=text, names="\n".join(names), **values))]
        return prompts.name_of(reply.text, (*names, NO_SPECIALTY) if prompt == "specialty" else names)
    department, specialty = (yield from name("department", DEPARTMENTS)), UNKNOWN
    if department != UNKNOWN:
        specialty = yield from name("specialty", DEPARTMENTS[department], department=department)
    return row | {"department": department, "specialty": specialty}


def ask(run, row):
    """Two questions; a row that came with one keeps it."""
    if row["questions"]:
        return row
    reply, = yield [(run.teacher, call(run, "questions", text=text_of(row)))]
    return row | {"questions": prompts.questions_of(need(reply).value) or drop("no two questions", reply)}


def score(run, row):
    """A question whose reply is missing or out of range has a score of None, which `select` knows to handle."""
    replies = yield [(run.teacher, call(run, "question", text=text_of(row), question=question))
                     for question in row["questions"]]
    return row | {"scores": [prompts.scores_of(reply.value) | {"mentions": prompts.mention_of(reply.value)}
                             for reply in replies]}


def select(run, row):
    """One question by prompts.choose. Its random number is that of its text, so the order of the two is nothing."""
    yield []
    chosen, rule = prompts.choose(row["scores"], lambda i: random_number(run.seed, row["id"], row["questions"][i]))
    if chosen is None:
        raise Dropped(rule, json.dumps(row["scores"]))
    scores = row["scores"][chosen]
    if None in (scores["quality"], scores["difficulty"]):  # the other mentions case details; but is this one complex?
        raise Dropped("chosen without scores", json.dumps(row["scores"]))
    return row | {"instruction": row["questions"][chosen], **scores, "chosen_by": rule,
                  "instruction_type": "complex" if scores["difficulty"] > COMPLEX else "common"}


def respond(run, row):
    """Two answers of different style, or two long traces."""
    if row["responses"]:
        return row
    if row["instruction_type"] == "common":
        reply, = yield [(run.teacher, call(run, "common", question=row["instruction"], text=text_of(row)))]
        texts = prompts.answers_of(need(reply).value) or drop("no two answers", reply)
    else:
        name = "complex" if row["text"] else "alone"
        replies = yield [(run.reasoner, call(run, name, question=row["instruction"], text=text_of(row), sample=i))
                         for i in range(2)]
        traces = [prompts.trace_of(reply.text, reply.thought) for reply in replies]
        texts = list(dict.fromkeys(filter(None, traces))) or drop("no thought and answer", need(replies[0]))
    return row | {"responses": [{"text": text} for text in texts]}


def verify(run, row):
    """Every response with its label; one that stays wrong is kept here as "wrong" and goes no further."""
    found = yield from together(*(prove(run, row, one["text"], i) for i, one in enumerate(row["responses"])))
    if all(one["label"] == "wrong" for one in found):
        raise Dropped("wrong", json.dumps([one["evidence"] for one in found]))
    return row | {"responses": found}


def prove(run, row, text, sample):
    """Checks a response, and has a wrong one written again (HuatuoGPT-o1), at most `attempts` times, each in another
    of the four ways. The right answer is never told: the writer learns only that its conclusion is wrong."""
    writer = run.reasoner if row.get("instruction_type") == "complex" else run.teacher
    label, evidence = yield from proof(run, writer, row, text)
    ways = sorted(STRATEGIES, key=lambda way: random_number(run.seed, row["id"], sample, way))
    tried = []
    while label == "wrong" and writer and len(tried) < run.attempts:
        way = ways[len(tried) % len(ways)]
        reply, = yield [(writer, call(run, "retry", row["instruction"], text, sample=sample + len(tried),
                                          strategy=prompts.PROMPTS["verify"][way]))]
        tried.append(way)
        again = prompts.trace_of(reply.text, reply.thought) if "## Thought" in text else reply.text
        if again and again.strip():
            text = again.strip()
            label, evidence = yield from proof(run, writer, row, text)
    return {"text": text, "label": label, "evidence": evidence, "tried": tried}


def proof(run, writer, row, text):
    """(verified | judged | unproven | wrong, the evidence) of a response, by the row's truth, if it has one.

    Options: the finished answer is asked again with them, and the letter of benchmarks.extracted is compared; without
    a writer the response's own letter is. No letter, or a doubtful one, proves nothing. A reference: by the judge.
    """
    truth, answer = row.get("truth"), split_thought(text)[1] or text
    if not truth:
        return "unproven", "no ground truth"
    if "letter" in truth:
        if writer:
            options = "\n".join(f"{letter}. {option}" for letter, option in truth["options"].items())
            reply, = yield [(writer, call(run, "options", row["instruction"], answer, options=options))]
            text = reply.text or ""
        letter = extracted(text, truth["options"])
        label = "unproven" if letter is None else "verified" if letter == truth["letter"] else "wrong"
        return label, f"letter {letter}"
    if not run.judge:
        return "unproven", "no judge"
    reply, = yield [(run.judge, call(run, "reference", question=row["instruction"], reference=truth["reference"],
                                         answer=answer))]
    agrees = reply.value.get("agrees") if isinstance(reply.value, dict) else None
    label = "judged" if agrees is True else "wrong" if agrees is False else "unproven"
    return label, f"judge {run.judge.model}: {agrees}"


def rank(run, row):
    """The best response: the best proved, of these the one with the highest score, of equal ones one at random."""
    left = [one for one in row["responses"] if one["label"] != "wrong"]
    scores = yield from scores_of(run, row["instruction"], [one["text"] for one in left] if left[1:] else [])
    keys = [(PROOF[one["label"]], float("-inf") if score is None else score)
            for one, score in zip(left, scores or [None])]
    best = [one for one, key in zip(left, keys) if key == max(keys)]
    chosen = min(best, key=lambda one: random_number(run.seed, row["id"], one["text"]))
    return row | {"response": chosen["text"], "label": chosen["label"], "ranking": scores,
                  "ranked_by": "random" if best[1:] else "the only one" if not left[1:] else
                  "proof" if max(keys)[0] > min(keys)[0] else "score"}


def scores_of(run, question, texts):
    """The score of each answer to a question, by the reward model or the judge; None where there is no score."""
    if not run.ranker or not texts:
        return [None] * len(texts)
    if isinstance(run.ranker, Scores):
        calls = [Call(({"role": "user", "content": question}, {"role": "assistant", "content": text}), {})
                 for text in texts]
        replies = yield [(run.ranker, call) for call in calls]
        return [reply.value["score"] if reply.value else None for reply in replies]
    replies = yield [(run.ranker, call(run, "answer", question=question, answer=text)) for text in texts]
    return [prompts.scores_of(reply.value, ("score",))["score"] for reply in replies]


def pair(run, row):
    """A complex row's plain answer, to be rejected. On-policy it must be wrong, or scored lower than the trace."""
    if row["instruction_type"] != "complex":
        return row | {"paired": "common"}
    writer, name = (run.policy, "think") if run.policy else (run.teacher, "plain")
    reply, = yield [(writer, call(run, name, question=row["instruction"]))]
    text = (reply.text or "").strip()
    if not text or text == row["response"]:
        return row | {"paired": "no other answer"}
    paired = "plain"
    if run.policy:
        label, _ = yield from proof(run, writer, row, text)
        chosen, rejected = yield from scores_of(run, row["instruction"], [row["response"], text])
        paired = ("wrong" if label == "wrong" else
                  "scored lower" if None not in (chosen, rejected) and rejected < chosen else None)
    return row | ({"rejected": text, "paired": paired} if paired else {"paired": "not worse"})


def judge(run, row):
    """Quality and complexity, 1 to 10, of a row of any data set."""
    reply, = yield [(run.judge, call(run, "row", question=row["instruction"], answer=row["response"]))]
    scores = prompts.scores_of(need(reply).value, ("quality", "complexity"))
    if None in scores.values():
        drop("no scores", reply)
    return {"source": row["source"], "instruction": row["instruction"], **scores, "calls": row["calls"]}


def compare(run, row):
    """Which of two answers is better: the one that the judge prefers in either order, else neither."""
    question, answers = row["instruction"], row["answers"]
    replies = yield [(run.judge, call(run, "compare", question=question, first=first, second=second))
                     for first, second in (answers, answers[::-1])]
    said = [need(reply).value.get("better") if isinstance(reply.value, dict) else None for reply in replies]
    if any(one not in ("first", "second", "equal") for one in said):
        drop("no preference", replies[0])
    winner = {("first", "second"): "A", ("second", "first"): "B"}.get(tuple(said), "neither")
    return {"source": row["source"], "instruction": question, "better": winner, "said": said, "calls": row["calls"]}


SCRIPTS = {"classify": classify, "ask": ask, "score": score, "select": select, "respond": respond, "verify": verify,
           "rank": rank, "pair": pair, "judge": judge, "compare": compare}
# stage: what is counted of its rows
TALLIES = {"classify": lambda row: [row["department"], f"{row['department']}: {row['specialty']}",
                                    *["text cut"] * (len(row["text"]) > prompts.TEXT_CHARACTERS)],
           "select": lambda row: [row["chosen_by"], row["instruction_type"]],
           "verify": lambda row: [one["label"] for one in row["responses"]],
           "rank": lambda row: [row["ranked_by"], row["label"]], "pair": lambda row: [row["paired"]],
           "compare": lambda row: [row["better"]] + ["the same place twice"] * (row["said"] in SAME_PLACE)}
SAME_PLACE = ["first", "first"], ["second", "second"]  # a judge that goes by the order

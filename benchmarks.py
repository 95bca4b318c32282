r"""Benchmark files read in the shapes they are released in; the prompts made of them; the answers found in outputs.

    medqa      {"question": …, "options": {"A": …}, "answer_idx": "B", "answer": text of B}
    medmcqa    {"question": …, "opa": …, …, "opd": …, "cop": 2, "choice_type": "single"}    cop from 0 or from 1
    pubmedqa   {pmid: {"QUESTION": …, "CONTEXTS": […], "final_decision": "yes"}}            one JSON object
    mmlu-pro   {"question": …, "options": […], "answer": "B", "answer_index": 1, "category": "health"}
    choice     {"question": …, "options": {…} or […] or opa, opb, …, "answer_idx": "B" or 1}
    sft        any row for SFT of one question and one answer (see rows.py)

An answer counts if the output says "the answer is (B)" after its thought. The last such statement decides; one that
names two letters is no answer. `flattering` gives the letters that laxer scorers would have counted, for comparison.

    python evaluate.py --help
"""
import argparse
import re
import string
import sys
import unicodedata
from dataclasses import dataclass
from functools import partial
from itertools import islice

from files import InputError, read_data, read_json
from messages import names_in
from rows import keys_of, messages_of, shorten, squeezed

LETTERS = string.ascii_uppercase[:20]  # A to T: "The answer is (X)" in the prompt itself can name no option
DECISIONS = {"A": "yes", "B": "no", "C": "maybe"}


@dataclass(frozen=True)
class Question:
    number: int  # of the row in the file, from 1
    where: str  # its place, for messages: "medqa.jsonl:3"
    text: str  # the question as asked; material, as PubMedQA's abstract, is part of it
    options: dict  # {"A": text, …} in order; {} for a row of "sft"
    gold: str | None  # the letter of the right option
    answer: str  # the reference: the right option's text, or the row's response
    group: str  # questions of one group are not independent: the value of the cluster key, else the row's number
    page: str | None  # the row's "url": questions of one page share its content
    kind: str | None  # accuracy is reported for each: MedMCQA's choice_type, MMLU-Pro's category

# ----- parts of a row ------------------------------------------------------------------------------------------------


def text_under(row, name):
    """The text under `name` without white space around it; InputError if there is none."""
    if not isinstance(row.get(name), str) or not row[name].strip():
        raise InputError(f"found no text under {name} {keys_of(row)}")
    return row[name].strip()


def options_of(row, *, may_repeat=False):
    """{"A": text, …} of a row's options: a dict by letter, a list, or texts under opa, opb, …

    null and "N/A", with which MMLU-Pro fills up ten places, count as absent. InputError unless they are 2 to 20 texts
    under A, B, C, … without a gap; for an empty text; and, without `may_repeat`, for two equal ones.
    """
    value = row.get("options")
    if value is None:
        value = {name[2].upper(): row[name] for name in row if re.fullmatch("op[a-j]", name)}
    if isinstance(value, list):
        value = dict(zip(LETTERS, value)) if len(value) <= len(LETTERS) else {}
    if not isinstance(value, dict) or not value:
        raise InputError(f"found no options {keys_of(row)}; expected 2 to {len(LETTERS)} under options or opa, opb, …")
    options = {letter: value[letter] for letter in sorted(value) if value[letter] not in (None, "N/A")}
    if list(options) != list(LETTERS[:len(options)]) or len(options) < 2:
        raise InputError(f"options are {', '.join(options) or 'null'}; expected A, B, … to {LETTERS[-1]} at most "
                         f"{keys_of(row)}")
    for letter, text in options.items():
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"option {letter} is {shown(text)}; expected text")
    options = {letter: text.strip() for letter, text in options.items()}
    if not may_repeat and repeats(options):
        raise InputError(f"options {', '.join(repeats(options))} repeat a text; expected different texts")
    return options


def repeats(options):
    """The letters of the options whose text another option has too."""
    texts = list(map(squeezed, options.values()))
    return [letter for letter, text in zip(options, texts) if texts.count(text) > 1]


def gold_of(row, options, names=("answer_idx", "answer_index", "answer")):
    """The letter of the right option; InputError if the keys `names` give none, one that is no option, or several.

    A value is a letter or a number that counts from 0. "answer" may also be the text of an option: if "A" is a letter
    and also the text of another option, a blood group, another key must say which is meant.
    """
    found = names_in(row, names)
    if not found:
        raise InputError(f"found nothing under {' or '.join(names)} {keys_of(row)}")
    agreed = set(options)
    for name in found:
        value = row[name]
        meant = {letter for i, (letter, text) in enumerate(options.items()) if value == letter
                 or (type(value) is int and value == i)
                 or (name == "answer" and isinstance(value, str) and squeezed(value) == squeezed(text))}
        if not meant:
            raise InputError(f"{name} is {shown(value)}; expected a letter from A to {max(options)}, a number from 0 "
                             f"to {len(options) - 1}" + (", or an option's text" if name == "answer" else ""))
        agreed &= meant
    if len(agreed) != 1:
        raise InputError(f"{' and '.join(found)} mean {'different options' if not agreed else 'more than one option'}; "
                         "expected one")
    return agreed.pop()


def shown(value):
    """A value for a message, cut to 60 characters."""
    return shorten(repr(value), 60)

# ----- a row ---------------------------------------------------------------------------------------------------------


def medqa(row):
    """(text, options, gold, answer, kind) of a row of MedQA, with four or five options. The other readers return the
    same five, and raise InputError for a row of another shape."""
    options = options_of(row)
    gold = gold_of(row, options)
    return text_under(row, "question"), options, gold, options[gold], None


def mmlu_pro(row):
    return *medqa(row)[:4], text_under(row, "category")


def choice(row):
    options = options_of(row)
    gold = gold_of(row, options, ("answer_idx", "answer_index", "label", "answer"))
    return text_under(row, "question"), options, gold, options[gold], None


def medmcqa(row, first):
    """A row of MedMCQA, whose cop counts from `first`. A question of the kind "multi" weighs several facts, but one
    option is right. Some rows were released with two equal options, and are read as they are."""
    options = options_of(row, may_repeat=True)
    cop, kind = row.get("cop"), row.get("choice_type")
    if type(cop) is not int or not first <= cop < first + 4 or len(options) != 4:
        raise InputError(f"cop is {shown(cop)} of {len(options)} options; expected {first} to {first + 3} of 4 "
                         f"{keys_of(row)}")
    if kind not in ("single", "multi"):
        raise InputError(f"choice_type is {shown(kind)}; expected single or multi {keys_of(row)}")
    gold = LETTERS[cop - first]
    return text_under(row, "question"), options, gold, options[gold], kind


def pubmedqa(row):
    """A row of PubMedQA: the abstract without its conclusion (LONG_ANSWER), which would give the answer away."""
    question, contexts, decision = text_under(row, "QUESTION"), row.get("CONTEXTS"), row.get("final_decision")
    if not isinstance(contexts, list) or not contexts or not all(isinstance(c, str) and c.strip() for c in contexts):
        raise InputError(f"CONTEXTS is {shown(contexts)}; expected a list of texts {keys_of(row)}")
    if decision not in DECISIONS.values():
        raise InputError(f"final_decision is {shown(decision)}; expected yes, no or maybe {keys_of(row)}")
    gold = next(letter for letter, text in DECISIONS.items() if text == decision)
    return "\n".join([*map(str.strip, contexts), "", question]), dict(DECISIONS), gold, decision, None


def sft(row):
    """A row for SFT of one question and one answer; its system message, if any, is not part of the question."""
    messages = messages_of(row)
    roles = [message["role"] for message in messages]
    if roles[roles[0] == "system":] != ["user", "assistant"] or not messages[-2]["content"].strip():
        raise InputError(f"found {', '.join(roles)}; expected one question of the user and its answer")
    return messages[-2]["content"], {}, None, messages[-1]["content"], None


SHAPES = {"medqa": medqa, "medmcqa": medmcqa, "pubmedqa": pubmedqa, "mmlu-pro": mmlu_pro, "choice": choice, "sft": sft}

# ----- a file --------------------------------------------------------------------------------------------------------


def read_benchmark(name, path, *, cluster=None, limit=None):
    """[Question] of a benchmark file, in its order: all, or the first `limit`. `name`, a key of SHAPES, is its shape.

    .jsonl, .jsonl.gz, a JSON array or parquet (files.read_data); for pubmedqa one JSON object. Rows with the same value
    under the key `cluster` form a group. InputError names the place of the first wrong row.
    """
    if name not in SHAPES:
        raise InputError(f"found the benchmark {name!r}; expected {', '.join(SHAPES)}")
    rows, read, questions = read_data(path), SHAPES[name], []
    if name == "pubmedqa":
        rows = ((i, f"{path}: {pmid}", row) for i, (pmid, row) in enumerate(read_json(path).items(), 1))
    elif name == "medmcqa":
        read = partial(medmcqa, first=first_cop(path))
    for number, where, row in islice(rows, limit):
        if isinstance(row, InputError):
            raise row
        try:
            if not isinstance(row, dict):
                raise InputError(f"found {type(row).__name__}, expected a JSON object")
            text, options, gold, answer, kind = read(row)
            group = str(number) if cluster is None else group_of(row, cluster)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        page = row["url"] if isinstance(row.get("url"), str) and row["url"].strip() else None
        questions.append(Question(number, where, text, options, gold, answer, group, page, kind))
    if not questions:
        raise InputError(f"{path}: found no rows; expected questions")
    if repeated := [one for one in questions if repeats(one.options)]:
        of_gold = sum(one.gold in repeats(one.options) for one in repeated)
        print(f"{path}: {len(repeated)} of {len(questions)} questions have the same text under two letters, {of_gold} "
              f"of them the right option's (the first: {repeated[0].where}); one letter is scored as right",
              file=sys.stderr)
    return questions


def kind_and_file(text):
    """An argparse type: "medqa=FILE" as ("medqa", "FILE"), the two that `read_benchmark` takes."""
    kind, _, file = text.partition("=")
    if not file or kind not in SHAPES:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected KIND=FILE with one of {', '.join(SHAPES)}")
    return kind, file


def group_of(row, cluster):
    """The value under the key `cluster` as text; InputError if it is no text and no number."""
    value = row.get(cluster)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)) or not str(value).strip():
        raise InputError(f"found {shown(value)} under {cluster}; expected the text or number that --cluster goes by "
                         f"{keys_of(row)}")
    return str(value)


def first_cop(path):
    """0 or 1: where MedMCQA's cop begins to count, which differs between copies; a line on stderr says which it is.

    The whole file decides: a cop of 0 shows that it counts from 0, one of 4 that it counts from 1. InputError if
    neither is there, or both are.
    """
    cops = {row["cop"] for _, _, row in read_data(path) if isinstance(row, dict) and type(row.get("cop")) is int}
    if not cops:
        return 1  # the first row is refused then, with its keys
    if (0 in cops) == (4 in cops):
        raise InputError(f"{path}: cop is {'0 and also 4' if 0 in cops else 'never 0 and never 4'}; expected one of "
                         "them, which tells whether it counts from 0 or from 1")
    first = 0 if 0 in cops else 1
    print(f"{path}: cop counts from {first}, because it is {4 * first} in some rows", file=sys.stderr)
    return first

# ----- prompts -------------------------------------------------------------------------------------------------------


def choice_prompt(question, style):
    """The prompt that asks a multiple-choice question.

        "raw"          text for a base model, "Question: …\\nA. …\\nB. …\\nAnswer:", without a space at its end
        "chat"         a user message that asks for reasoning and, at its end, for "The answer is (X)."
        "chat-letter"  a user message that asks for the letter alone, whose log-likelihood is compared
        "chat-text"    one that asks for the option's text alone
    """
    if not question.options:
        raise InputError(f"{question.where}: found no options; expected a multiple-choice question")
    options = "\n".join(f"{letter}. {text}" for letter, text in question.options.items())
    if style == "raw":
        return f"Question: {question.text}\n{options}\nAnswer:"
    ask = {"chat": "Weigh the options step by step and choose exactly one. Close with a line of this form, where X is "
                   "the letter of your choice:\nThe answer is (X).",
           "chat-letter": "Exactly one option is right. Reply with its letter and nothing else.",
           "chat-text": "Exactly one option is right. Reply with its text and nothing else."}[style]
    return f"{question.text}\n\n{options}\n\n{ask}"


def continuations(question, style, by):
    """The text to score after the prompt for each option, in order: its letter (`by` "letter") or its text ("text").

    After a "raw" prompt it begins with the space that joins the two; in a chat model's turn it begins at once.
    """
    space = " " if style == "raw" else ""
    return [space + {"letter": letter, "text": text}[by] for letter, text in question.options.items()]

# ----- answers -------------------------------------------------------------------------------------------------------

# A thought up to its end, or to the end of a text that was cut off. HuatuoGPT-o1 has the second headings of each pair.
THOUGHT = re.compile(r"<think>(.*?)(?:</think>|\Z)"
                     r"|## (?:Thought|Thinking)\b(.*?)(?:## (?:Summarization|Final Response)\b|\Z)", re.DOTALL)
THOUGHT_ENDS = re.compile(r"</think>|## (?:Summarization|Final Response)\b")

# Marks around a letter: brackets, quotes, Markdown's * and _, LaTeX's $, \( and \boxed{.
OPENING = r"""(?:[\s(\[{*_$"“'‘`]|\\(?:boxed|text|textbf|mathbf|mathrm|[(\[]))*"""
CLOSING = r"""(?:[\s)\]}*_$"”'’`]|\\[)\]])*"""
# "answer is" or "answer:", then a letter … No two repeats side by side may match the same text: that takes n² steps.
STATEMENT = re.compile(
    r"""\b(?i:answer)["”*_`]*\s*(?:(?i:is)\b(?:\s*[:=–—-])?|:)""" + OPENING
    + rf"(?:(?i:option|choice|letter|either|both|between|neither)\b{OPENING})?" + r"(?P<letter>[A-Ta-t])(?![^\W_])")
# … that ends here. No word may follow a bare letter: "a fever", "B cell", "E. coli", "D-dimer".
ENDS = rf"(?!{CLOSING}\?)(?:" + "|".join((
    r"""[)\]}*_$"”`,;:!/&]|\\[)\]]|['’](?!\w)|\s+[)\]}]""",  # a closing mark; no apostrophe
    r"(?<=[A-T])\s*\(",  # B (metformin)
    r"\.(?!\d|[ \t]*[a-z])",  # a full stop
    r"\s*[–—]|\s+-\s",  # a dash
    r"[ \t]*(?:\n|\Z)",  # the line's end
    r"\s+(?i:because|since|as)\b")) + ")"
LETTER_ENDS = re.compile(ENDS)
# "(A) or (B)", "A, C", "A-C" name more than one; "(B), I think" and "(B) - A condition" do not.
MORE = re.compile(rf"{CLOSING}(?:(?:[,/&–—-]|(?i:and|or|nor|to|through)\b){OPENING}(?P<marked>[A-Ta-t]){ENDS}"
                  rf"|(?i:and|or|nor)\b{OPENING}(?P<bare>[A-HJ-T])(?!\w))")
# "I do not think the correct", "if the", "the wrong": before "answer is" they mean that nothing is stated.
NOT_STATED = re.compile(
    r"(?:(?:\b(?:not|cannot|never|doubt|if|whether|unless)|n['’]t)(?:\s+(?:be|think|believe|say|mean|sure|certain|clear|"
    r"true|that|if|whether))*(?:\s+the)?(?:\s+(?:single|correct|right|best|final|most|likely|appropriate))*"
    r"|\b(?:wrong|incorrect|worst))[\s*_]+\Z", re.IGNORECASE)
LONE = re.compile(r"\b([A-T])(?=[).:*]|\s*\Z)")  # "(B)", "B." or "B" alone, which laxer scorers take for a statement


def split_thought(text):
    """(thought, answer) of an output; (None, text) without a thought, and answer "" if its thought was cut off.

    A thought stands between "## Thought" and "## Summarization", or in <think> … </think>. The opening mark may be
    missing, because some templates write it into the prompt. Text in front of the mark belongs to neither.
    """
    end = THOUGHT_ENDS.search(text)
    if end and not THOUGHT.search(text, 0, end.start()):
        text = ("<think>" if end[0] == "</think>" else "## Thought ") + text
    thoughts = list(THOUGHT.finditer(text))
    if not thoughts:
        return None, text.strip()
    starts = [thought.start() for thought in thoughts[1:]] + [len(text)]
    return ("\n".join((one[1] or one[2] or "").strip() for one in thoughts),
            "\n".join(text[one.end():start].strip() for one, start in zip(thoughts, starts)).strip())


def statements(text, letters):
    """Yields the letter of each "the answer is (B)" in `text`, in order; None for one that is not in `letters`, and for
    a statement that names two. A statement that is denied, asked or supposed is left out."""
    text = unicodedata.normalize("NFKC", text)  # "（Ｂ）：" becomes "(B):"
    for found in STATEMENT.finditer(text):
        if NOT_STATED.search(text, max(0, found.start() - 100), found.start()):
            continue
        letter, more = found["letter"].upper(), MORE.match(text, found.end())
        if more and (more["marked"] or more["bare"]).upper() != letter:
            yield None
        elif LETTER_ENDS.match(text, found.end()):
            yield letter if letter in letters else None


def extracted(text, letters):
    """The letter that an output gives as its answer, or None: the last statement after the thought decides.

    `letters` are those of the options: "ABCD", or the options themselves. None counts as wrong: an output without a
    statement is no answer, however clear it seems, so that every model is held to the same form.
    """
    return [None, *statements(split_thought(text)[1], letters)][-1]


def flattering(text, letters, gold):
    """The letters that laxer scorers count for an output, each of them to be compared with `gold`:

        "first"          the first statement anywhere, in the thought too, or else the first letter that stands alone
        "best_of_two"    `gold` if the first or the last of these is right, else the first
        "dropped_empty"  as `extracted`; where it is None, the output is left out of the denominator
    """
    found = [letter for letter in statements(text, letters) if letter]
    found = found or [letter for letter in LONE.findall(text) if letter in letters] or [None]
    return {"first": found[0], "best_of_two": gold if gold in (found[0], found[-1]) else found[0],
            "dropped_empty": extracted(text, letters)}

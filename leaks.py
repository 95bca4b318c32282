"""Leaks: which records (training rows, the records of an index) give the answer to an evaluated question away.

    page       both come from one page: their "url" is the same
    13-gram    the reference answer and the record share 13 words in a row
    question   the record asks the evaluated question (similarity >= 0.95, or cosine >= 0.99), or quotes 13 words of it

    similarity(a, b) = min(|A ∩ B| / |A ∪ B|, difflib's ratio of their words in order)
    A, B = the words of a and b without "the", "of", "what", …, in the singular and in American spelling

13-grams are GPT-3's rule (arXiv 2005.14165, appendix C): lower case, no punctuation. Of a text of 8 to 12 words the
whole must be shared; a shorter one never matches by this rule. The same 13 words may be boilerplate: the evidence is
kept, and a report names the runs that are shared most often.

The characters of two questions do not tell whether they are the same: "… symptoms of spastic paraplegia 16" and "… 18"
agree in 98 % of them. Therefore the similarity counts words: in a question of fewer than 19, one more or one other
word is another question, as is a typing error; a long question is found by its 13-grams too. The cosine tells little
more: of MedQuAD's pairs above 0.9 by all-MiniLM-L6-v2 most name two diseases, up to 0.988. SAME_COSINE lies above
that, and so finds the same words in another order or spelling. Paraphrases, at 0.87 to 0.95, it does not find.

    python evaluate.py leaks --train data/sft.jsonl index/traces --benchmark medqa.jsonl --out leaks.jsonl
"""
import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from difflib import SequenceMatcher
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from files import InputError, hold, read_data, read_json, written_aside
from retrieve import FORMAT
from rows import messages_of, note_bad_row, question_of, texts_in, try_to

RUN, SHORTEST = 13, 8  # words of a shared run; of a text that is shared as a whole
SAME, SAME_COSINE = 0.95, 0.99  # at least; the cosine is for all-MiniLM-L6-v2
MASKED = {"strict": ("page", "13-gram", "question"), "same-page": ("13-gram", "question"), "off": ()}
# not "no", "except" or "causes", which change the question
FUNCTION_WORDS = frozenset(("a", "an", "the", "of", "in", "for", "to", "is", "are", "was", "were", "what", "which"))
LETTER_A = re.compile(r"(?<=\w )A\b(?![.):])")  # hepatitis A: neither an article nor the first of the options
IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # Chinese and Japanese have no spaces: a character is a word
WORD = re.compile(f"[{IDEOGRAPHS}]|[^\\W_{IDEOGRAPHS}]+")
POWERS = np.array([pow(0x9E3779B97F4A7C15, i, 1 << 64) for i in range(RUN)], np.uint64)  # of an odd number
DROPPED = re.compile("['\u2019\u02bc\u0300-\u036f]")  # apostrophes, and the accents that NFKD takes off their letters

# ----- two texts -----------------------------------------------------------------------------------------------------


def words(text):
    """The words of a text: lower case, without punctuation, accents and apostrophes ("Sjögren's" is "sjogrens")."""
    return WORD.findall(DROPPED.sub("", unicodedata.normalize("NFKD", text).casefold()))


def grams(words, n=RUN):
    """The set of all runs of `n` words, as tuples."""
    return set(zip(*(words[i:] for i in range(n))))


def shared_run(text, other):
    """The first 13 words in a row of `text` that `other` has too, or None. A `text` of 8 to 12 words counts whole."""
    text = words(text)
    return first_shared(text, lambda n: grams(words(other), n))


def first_shared(text, grams_of):
    """`shared_run` for a text as words; grams_of(n) is the set of runs of n words of the other text."""
    n = min(RUN, len(text))
    if n < SHORTEST:
        return None
    others = grams_of(n)
    return next((" ".join(run) for run in zip(*(text[i:] for i in range(n))) if run in others), None)


def content(text):
    """The words of a question without function words, in the singular and in American spelling; in their order."""
    return [word if len(word) < 4 else
            word.replace("ae", "e").replace("oe", "e").replace("our", "or").removesuffix("s")
            for word in words(LETTER_A.sub("letterA", text)) if word not in FUNCTION_WORDS]


def same_question(a, b):
    """The similarity of two questions, 0 to 1. They are the same from SAME; below it the value is an upper bound."""
    return similarity(content(a), content(b))


def similarity(a, b):
    """`same_question` for the two lists of `content`."""
    shared, union = len({*a} & {*b}), len({*a} | {*b})
    overlap = shared / union if union else 0.0
    if overlap < SAME:  # the order of the words can only lower it
        return overlap
    return min(overlap, SequenceMatcher(None, *sorted((a, b)), autojunk=False).ratio())  # sorted: it is not symmetric


def page_of(url):
    """A page's address without scheme, fragment and trailing slash; None if there is none."""
    if not isinstance(url, str):
        return None
    return re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*://", "", url.strip()).partition("#")[0].rstrip("/") or None

# ----- one record, one question --------------------------------------------------------------------------------------


class Evaluated(NamedTuple):
    """An evaluated question, read once."""
    page: str | None
    answer: list  # words of the reference answer
    text: list  # words of the question
    forms: list  # the `content` of the question alone, and with its options as a row for training has them

    @classmethod
    def read(cls, question):
        """From an object with text, answer, page and maybe options, as benchmarks.Question; None is an empty text."""
        text, options = question.text or "", getattr(question, "options", None) or {}
        options = options if isinstance(options, dict) else {chr(65 + i): option for i, option in enumerate(options)}
        lists = [f"{text} {' '.join(options.values())}",
                 f"{text} {' '.join(f'{letter}. {option}' for letter, option in options.items())}"] if options else []
        # interned: the same words come in thousands of questions
        once = [[*map(sys.intern, found)] for found in
                (words(question.answer or ""), words(text), *map(content, (text, *lists)))]
        return cls(page_of(question.page), *once[:2], once[2:])


class Record:
    """A training row or a record of an index, read once: its page, its texts, their words and what its users ask."""

    def __init__(self, row, field="instruction"):
        """InputError for a row that neither the trainers nor an index of `field` can read."""
        fault, messages = try_to(messages_of, row, "")
        asked = [] if fault else [message["content"] for message in messages if message["role"] == "user"]
        if fault or field != "instruction":
            asked.append(question_of(row, field))
        self.texts = [*asked, *(message["content"] for message in messages or () if message["role"] != "user")]
        self.rejected = texts_in(row["rejected"]) if row.get("rejected") else []  # DPO trains on it too
        self.page, self.asked = page_of(row.get("url")), asked
        self.words = [words(text) for text in (*self.texts, *self.rejected)]
        self.sets = {}

    @cached_property
    def contents(self):
        return [content(text) for text in self.asked]

    def grams(self, n):
        """The runs of n words of all texts; none goes over the end of a text."""
        if n not in self.sets:
            self.sets[n] = set().union(*(grams(text, n) for text in self.words))
        return self.sets[n]


def reasons(evaluated, record, cosine=None):
    """Yields (rule, evidence) for each rule by which a Record gives an Evaluated away."""
    if evaluated.page and evaluated.page == record.page:
        yield "page", evaluated.page
    if run := first_shared(evaluated.answer, record.grams):
        yield "13-gram", run
    pairs = [(similarity(form, asked), text) for asked, text in zip(record.contents, record.asked)
             for form in evaluated.forms]
    score, text = max(pairs, default=(0.0, ""))
    if score >= SAME:
        yield "question", f"similarity {score:.3f}: {' '.join(text.split())[:300]}"
    elif run := first_shared(evaluated.text, record.grams):
        yield "question", f"quoted: {run}"
    elif cosine is not None and cosine >= SAME_COSINE:
        yield "question", f"cosine {cosine:.3f}"


def reason_to_mask(question, record, *, rule="strict", cosine=None, field="instruction"):
    """(rule, evidence) if a record is not to be used for an evaluated question, else None.

    `question` has text, answer and page (benchmarks.Question), `record` is a row as in Index.records. rule: "strict"
    masks by page, 13-gram and question; "same-page" allows the page; "off" masks nothing. `cosine` is that of the two
    questions' vectors, where the caller has them; `field` is the index's. InputError for another rule.
    """
    if rule not in MASKED:
        raise InputError(f"found rule {rule!r}; expected one of {', '.join(MASKED)}")
    if not MASKED[rule]:
        return None
    found = reasons(Evaluated.read(question), Record(record, field), cosine)
    return next((reason for reason in found if reason[0] in MASKED[rule]), None)

# ----- many records, many questions ----------------------------------------------------------------------------------


class Scanner:
    """`reasons` for every evaluated question at once: tables of the questions, through which the records stream.

    A question is compared with a record only if they share a page, the hash of a run of words, or one of the rarest
    words of both. Two sets of words with an overlap of at least 0.95 agree in one of the first n // 20 + 1 of their n
    words, in any order that both follow (prefix filtering, Chaudhuri et al., ICDE 2006); the rarest come first here.
    """

    def __init__(self, questions):
        self.questions = [Evaluated.read(question) for question in questions]
        self.pages, self.rare, runs, wholes = defaultdict(list), defaultdict(list), [], []
        self.counts = Counter(word for one in self.questions for form in one.forms for word in {*form})
        for number, one in enumerate(self.questions):
            if one.page:
                self.pages[one.page].append(number)
            for word in {word for form in one.forms for word in self.rarest(form)}:
                self.rare[word].append(number)
            for text in (one.answer, one.text):
                if len(text) >= RUN:
                    runs.append((number, run_hashes(word_hashes(text), RUN)))
                elif len(text) >= SHORTEST:  # by its end: many questions begin alike
                    wholes.append((number, run_hashes(word_hashes(text), SHORTEST)[-1:]))
        self.tables = {RUN: table_of(runs), SHORTEST: table_of(wholes)}

    def rarest(self, form):
        """The words of a question by which it is found."""
        found = sorted({*form}, key=lambda word: (self.counts[word], word))
        return found[:int(len(found) * (1 - SAME) + 1e-9) + 1]

    def hits(self, row, field="instruction"):
        """[(number of a question, rule, evidence), …] of all questions that a row gives away. InputError as Record."""
        return self.hits_of(Record(row, field))

    def hits_of(self, record):
        """`hits` for a row that has been read already."""
        near = {*self.pages.get(record.page, ())}
        for form in record.contents:
            for word in self.rarest(form):
                near.update(self.rare.get(word, ()))
        for text in map(word_hashes, record.words):
            for n, table in self.tables.items():
                near.update(look_up(table, run_hashes(text, n)))
        return [(number, *reason) for number in sorted(near) for reason in reasons(self.questions[number], record)]


def word_hashes(words):
    """uint64 [N]: the same for equal words within this process."""
    return np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)


def run_hashes(hashes, n):
    """uint64 [N] of words -> uint64 [N − n + 1]: a hash of every run of n words, a sum of powers modulo 2^64."""
    return np.correlate(hashes, POWERS[:n], "valid") if len(hashes) >= n else hashes[:0]


def table_of(runs):
    """[(number, hashes), …] -> (all hashes, sorted; the number that each belongs to; which upper 24 bits occur)."""
    keys = np.concatenate([np.empty(0, np.uint64), *(hashes for _, hashes in runs)])
    owners = np.repeat(np.array([number for number, _ in runs], np.int64), [len(hashes) for _, hashes in runs])
    order, seen = np.argsort(keys, kind="stable"), np.zeros(1 << 24, bool)
    seen[keys >> np.uint64(40)] = True
    return keys[order], owners[order], seen


def look_up(table, hashes):
    """The numbers to which a table has one of the hashes. Nearly all rows end at the first lines."""
    keys, owners, seen = table
    hashes = hashes[seen[hashes >> np.uint64(40)]]
    if not len(hashes):
        return ()
    begins, ends = (np.searchsorted(keys, hashes, side).tolist() for side in ("left", "right"))
    return {number for begin, end in zip(begins, ends) for number in owners[begin:end].tolist()}

# ----- files ---------------------------------------------------------------------------------------------------------


def read_rows(path):
    """Yields (where, row or InputError, field) of a data file, or of the records of an index folder."""
    path, field = Path(path), "instruction"
    if path.is_dir():
        manifest = read_json(path / "manifest.json")
        if manifest.get("format") != FORMAT:
            raise InputError(f"{path}/manifest.json: format is {manifest.get('format')!r}; expected {FORMAT}, an index")
        path, field = path / "records.jsonl", manifest.get("field", field)
    for _, where, row in read_data(path):
        yield where, row, field


def scan(paths, questions, counts, *, on_bad_row="skip", progress=False):
    """Yields {"benchmark": where, "train": where, "rule": …, "evidence": …} for all that data files and index folders
    share with benchmark questions, one for each rule that holds.

    `counts` is a dict: {"rows": 0, "bad": 0, "faults": []} is filled in, with the messages of the first five bad rows.
    With on_bad_row "stop" the first bad row raises its InputError.
    """
    counts |= {"rows": 0, "bad": 0, "faults": []}
    scanner = Scanner(questions)
    with tqdm(desc="rows", unit="row", disable=None if progress else True, file=sys.stderr) as bar:
        for path in paths:
            for where, row, field in read_rows(path):
                counts["rows"] += 1
                bar.update()
                error, hits = row, ()
                if not isinstance(row, InputError):
                    error, hits = try_to(lambda row, field=field: scanner.hits(row, field), row, where)
                if error:
                    note_bad_row(error, on_bad_row, counts, counts["faults"])
                for number, rule, evidence in hits or ():
                    yield {"benchmark": questions[number].where, "train": where, "rule": rule, "evidence": evidence}


def report(found, questions, counts, write=lambda hit: None, examples=5):
    """What `scan` found as a dict; every hit also goes to `write`. `counts` is the dict that scan fills in.

        "rows", "bad", "faults"        of the training side
        "hits"                         {rule: pairs of a question and a record}
        "benchmarks"                   {file: {"questions": n, "touched": n, "share": touched / questions, rule: n}}
        "examples"                     {rule: the first hits}
        "runs"                         the runs of 13 words found most often, with the number of pairs
    """
    hits, runs, first, touched = Counter(), Counter(), defaultdict(list), defaultdict(set)
    for hit in found:
        write(hit)
        rule, name = hit["rule"], hit["benchmark"].rpartition(":")[0]  # "a.jsonl:3", "a.json: row 3"
        hits[rule] += 1
        touched[name].add(hit["benchmark"])
        touched[name, rule].add(hit["benchmark"])
        if rule == "13-gram":
            runs[hit["evidence"]] += 1
        if len(first[rule]) < examples:
            first[rule].append(hit)
    asked = Counter(question.where.rpartition(":")[0] for question in questions)
    rules = MASKED["strict"]
    return {**counts, "hits": {rule: hits[rule] for rule in rules},
            "benchmarks": {name: {"questions": n, "touched": len(touched[name]), "share": len(touched[name]) / n,
                                  **{rule: len(touched[name, rule]) for rule in rules}} for name, n in asked.items()},
            "examples": dict(first), "runs": runs.most_common(3)}


def show(summary):
    """Prints a report for people."""
    rules = MASKED["strict"]
    print(f"{summary['rows']:,} rows for training or retrieval, {summary['bad']:,} of them unreadable; pairs: "
          + ", ".join(f"{rule}: {summary['hits'][rule]:,}" for rule in rules))
    print("questions touched, by benchmark and rule:")
    width = max(map(len, summary["benchmarks"]), default=0)
    for name, found in summary["benchmarks"].items():
        print(f"  {name:{width}}  {found['touched']:,} of {found['questions']:,} ({found['share']:.1%}); "
              + ", ".join(f"{rule} {found[rule]:,}" for rule in rules))
    for rule in rules:
        for hit in summary["examples"].get(rule, ()):
            print(f"  {rule}: {hit['benchmark']} in {hit['train']}: {printable(hit['evidence'])}")
    if summary["runs"]:
        print("runs of words shared most often (boilerplate, if many):")
        for run, count in summary["runs"]:
            print(f"  {count:,} times: {printable(run)}")


def printable(text):
    """The beginning of a text, without what moves a terminal's cursor."""
    return "".join(char for char in text if char.isprintable())[:160]


def leaks_command(args, questions):
    """`evaluate.py leaks`: args.train, args.out (or None) and args.json; the questions are those of args.benchmark."""
    counts, out = {}, None
    found = scan(args.train, questions, counts, progress=True)
    if args.out:
        hold(args.out)
        with written_aside(args.out) as aside, open(aside, "w", encoding="utf-8") as out:
            summary = report(found, questions, counts,
                             lambda hit: out.write(json.dumps(hit, ensure_ascii=False) + "\n"))
    else:
        summary = report(found, questions, counts)
    for fault in summary["faults"]:
        print(f"warning: left out {fault}", file=sys.stderr)
    if args.json:
        print(json.dumps(summary, ensure_ascii=False))
    else:
        show(summary)
        if args.out:
            print(f"all of them: {args.out}")

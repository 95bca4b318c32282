"""Leaks: which records (training rows, the records of an index) give the answer to an evaluated question away.

    page       both come from one page: their "url" is the same
    13-gram    the reference answer and the record share 13 words in a row
    question   the record asks the evaluated question (similarity >= 0.95, or cosine >= 0.99), or quotes 13 words of it

    similarity(a, b) = min(|A ∩ B| / |A ∪ B|, difflib's ratio of their words in order)
    A, B = the words of a and b without "the", "of", "what", …, in the singular and in American spelling

13-grams are GPT-3's rule (arXiv 2005.14165, appendix C): lower case, no punctuation. A text of 8 to 12 words matches
only as a whole, and a shorter one never. The shared words may be boilerplate: each hit keeps them as its evidence, and
the report names the runs that are shared most often.

The characters of two questions do not tell whether they are the same: "… symptoms of spastic paraplegia 16" and "… 18"
agree in 98 % of them. Therefore the similarity counts words: in a question of fewer than 19, one word more or one
typing error makes another question; a long question is found by its 13-grams too. The cosine tells little more: of
MedQuAD's pairs above 0.9 by all-MiniLM-L6-v2 most name two diseases, up to 0.988. SAME_COSINE lies above that: it finds
the same words in another order or spelling, but not paraphrases, which lie at 0.87 to 0.95.

    python evaluate.py leaks --train data/sft.jsonl index/traces --benchmark medqa.jsonl --out leaks.jsonl
"""
import json
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from files import InputError, hold, read_data, read_json, written_aside
from retrieve import FORMAT
from rows import messages_of, note_bad_row, question_of, shorten, texts_in, try_to

RUN, SHORTEST = 13, 8  # words of a shared run; of a text that may be shared as a whole
BLOCK = (RUN + 1) // 2  # words by which a run is looked up, see Scanner
SAME, SAME_COSINE = 0.95, 0.99  # at least; the cosine is for all-MiniLM-L6-v2
MASKED = {"strict": ("page", "13-gram", "question"), "same-page": ("13-gram", "question"), "off": ()}
# not "no", "except" or "causes", which change the question
FUNCTION_WORDS = frozenset(("a", "an", "the", "of", "in", "for", "to", "is", "are", "was", "were", "what", "which"))
LETTER_A = re.compile(r"(?<=\w )A\b(?![.):])")  # hepatitis A: neither an article nor the first of the options
IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # Chinese and Japanese have no spaces: a character is a word
WORD = re.compile(f"[{IDEOGRAPHS}]|[^\\W_{IDEOGRAPHS}]+")
DROPPED = re.compile("['\u2019\u02bc\u0300-\u036f]")  # apostrophes, and the accents that NFKD takes off their letters

# ----- two texts -----------------------------------------------------------------------------------------------------


def words(text):
    """The words of a text: lower case, without punctuation, accents and apostrophes ("Sjögren's" is "sjogrens")."""
    return WORD.findall(DROPPED.sub("", unicodedata.normalize("NFKD", text).casefold()))


def grams(words, n):
    """Every run of `n` words in a row, as tuples, in order."""
    return zip(*(words[i:] for i in range(n)))


def content(text):
    """The words of a question without function words, in the singular and in American spelling; in their order."""
    return [word if len(word) < 4 else
            word.replace("ae", "e").replace("oe", "e").replace("our", "or").removesuffix("s")
            for word in words(LETTER_A.sub("letterA", text)) if word not in FUNCTION_WORDS]


def similarity(a, b):
    """The similarity of two questions, given as their `content`: 0 to 1, the same question from SAME on.

    Below SAME the value is an upper bound, because the order of the words, which can only lower it, is not looked at.
    """
    shared, union = len({*a} & {*b}), len({*a} | {*b})
    overlap = shared / union if union else 0.0
    if overlap < SAME:
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
        """From a benchmarks.Question."""
        text, options, forms = question.text, question.options, [question.text]
        if options:
            forms += [f"{text} {' '.join(options.values())}",
                      f"{text} {' '.join(f'{letter}. {option}' for letter, option in options.items())}"]
        # interned: the same words come in thousands of questions
        answer, text, *forms = [[*map(sys.intern, found)] for found in
                                (words(question.answer), words(text), *map(content, forms))]
        return cls(page_of(question.page), answer, text, forms)


class Record:
    """A training row or a record of an index, read once: its page, its texts, their words and what its users ask."""

    def __init__(self, row, field="instruction"):
        """InputError for a row that neither the trainers nor an index of `field` can read."""
        fault, messages = try_to(messages_of, row, "")
        asked = [message["content"] for message in messages or () if message["role"] == "user"]
        if fault or field != "instruction":  # a record of an index needs no answer
            asked.append(question_of(row, field))
        self.texts = [*asked, *(message["content"] for message in messages or () if message["role"] != "user")]
        self.rejected = texts_in(row["rejected"]) if row.get("rejected") else []  # DPO trains on it too
        self.page, self.asked, self.contents = page_of(row.get("url")), asked, [*map(content, asked)]
        self.words, self.runs = [words(text) for text in (*self.texts, *self.rejected)], {}

    def shared_run(self, text):
        """The first 13 words in a row of `text` (a list of words) that one text of the record has too, or None.

        A `text` of 8 to 12 words counts as a whole, a shorter one never.
        """
        n = min(RUN, len(text))
        if n < SHORTEST:
            return None
        if n not in self.runs:
            self.runs[n] = set().union(*(grams(own, n) for own in self.words))
        return next((" ".join(run) for run in grams(text, n) if run in self.runs[n]), None)


def reasons(evaluated, record, cosine=None):
    """Yields (rule, evidence) for each rule by which a Record gives an Evaluated away."""
    if evaluated.page and evaluated.page == record.page:
        yield "page", evaluated.page
    if run := record.shared_run(evaluated.answer):
        yield "13-gram", run
    pairs = [(similarity(form, asked), text) for asked, text in zip(record.contents, record.asked)
             for form in evaluated.forms]
    score, text = max(pairs, default=(0.0, ""))
    if score >= SAME:
        yield "question", f"similarity {score:.3f}: {shorten(text, 300)}"
    elif run := record.shared_run(evaluated.text):
        yield "question", f"quoted: {run}"
    elif cosine is not None and cosine >= SAME_COSINE:
        yield "question", f"cosine {cosine:.3f}"


def reason_to_mask(question, record, *, rule="strict", cosine=None, field="instruction"):
    """(rule, evidence) if a record is not to be used for an evaluated question, else None.

    `question` is a benchmarks.Question, `record` a row as in Index.records. rule: "strict" masks by page, 13-gram and
    question; "same-page" allows the page; "off" masks nothing. `cosine` is that of the two questions' vectors, where
    the caller has them; `field` is the index's. InputError for another rule, and for a record without a question.
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

    A question is compared with a record only if they share a page, a block of 7 words or one of the rarest words of
    both. The blocks of a text lie end to end, the last one at its end: 13 words in a row hold one of them whole. Two
    sets of words with an overlap of at least 0.95 agree in one of the first n // 20 + 1 of their n words, in any order
    that both follow (prefix filtering, Chaudhuri et al., ICDE 2006); the rarest come first here.
    """

    def __init__(self, questions):
        self.questions = [Evaluated.read(question) for question in questions]
        self.pages, self.blocks, self.rare = defaultdict(list), defaultdict(list), defaultdict(list)
        self.counts = Counter(word for one in self.questions for form in one.forms for word in {*form})
        for number, one in enumerate(self.questions):
            if one.page:
                self.pages[one.page].append(number)
            for word in {word for form in one.forms for word in self.rarest(form)}:
                self.rare[word].append(number)
            for text in (one.answer, one.text):
                if len(text) >= SHORTEST:
                    for end in range(len(text), BLOCK - 1, -BLOCK):  # from the end: many questions begin alike
                        self.blocks[tuple(text[end - BLOCK:end])].append(number)

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
        for text in record.words:
            for block in grams(text, BLOCK):
                near.update(self.blocks.get(block, ()))
        return [(number, *reason) for number in sorted(near) for reason in reasons(self.questions[number], record)]

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


def scan(paths, questions, counts):
    """Yields {"benchmark": where, "train": where, "rule": …, "evidence": …} for all that data files and index folders
    share with benchmark questions, one for each rule that holds.

    Fills the dict `counts`: "rows" and, of them, "bad" ones, which are passed over; "faults", the messages of the first
    five of these.
    """
    counts |= {"rows": 0, "bad": 0, "faults": []}
    scanner = Scanner(questions)
    with tqdm(desc="rows", unit="row", disable=None, file=sys.stderr) as bar:
        for path in paths:
            for where, row, field in read_rows(path):
                counts["rows"] += 1
                bar.update()
                error, hits = (row, ()) if isinstance(row, InputError) else try_to(
                    partial(scanner.hits, field=field), row, where)
                if error:
                    note_bad_row(error, "skip", counts, counts["faults"])
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
            print(f"  {rule}: {hit['benchmark']} in {hit['train']}: {shorten(hit['evidence'], 160)}")
    if summary["runs"]:
        print("runs of words shared most often (boilerplate, if many):")
        for run, count in summary["runs"]:
            print(f"  {count:,} times: {shorten(run, 160)}")


def leaks_command(args, questions):
    """`evaluate.py leaks`: args.train, args.out (or None) and args.json; the questions are those of args.benchmark."""
    counts = {}
    found = scan(args.train, questions, counts)
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

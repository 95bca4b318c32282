r"""How well copies of benchmark questions are found: recall and false positives of each method, side by side.

    200 exact copies, 200 edited (a tenth of the words replaced, dropped or swapped), 100 with shuffled options,
    each planted into a text of its own, of 2,000 texts; the other 1,500 are as they were

A host is raw text, between two sentences of which the copy is set as a paragraph, or a row with a question, which the
copy replaces. A copy has the options below the question in half of the cases (always where they are shuffled, never
where they are yes, no and maybe). Recall is the share of the planted texts that a method names, precision the share of
the named texts that are planted, false positives the share of the others that it names.

    python bench/decontaminate.py --texts corpus.jsonl medquad_sft.jsonl --benchmark medqa=medqa.jsonl \
        --benchmark pubmedqa=pubmedqa.json
"""
import json
import random
import re
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import DECISIONS, SHAPES, read_benchmark
from encoder import Encoder
from files import InputError, Parser, read_data, run_main, whole
from filters import Settings, filtered, question_alone, unit
from leaks import grams, words
from retrieve import DEFAULT_ENCODER

KINDS = {"exact": 200, "edited": 200, "shuffled": 100}


def edited(text, rng, vocabulary, share=0.1):
    """The text with a share of its words, at least one, each replaced by one of `vocabulary`, dropped, or swapped with
    the next; its line breaks become spaces."""
    found = text.split()
    places = rng.sample(range(len(found)), max(1, round(share * len(found))))
    for place in sorted(places, reverse=True):  # from the end, so that a drop moves none of the places ahead
        edit = rng.choice(("replace", "drop", "swap"))
        if edit == "drop" and len(found) > 1:
            del found[place]
        elif edit == "swap" and place + 1 < len(found):
            found[place:place + 2] = found[place + 1], found[place]
        else:
            found[place] = rng.choice(vocabulary)
    return " ".join(found)


def copy_of(question, kind, rng, vocabulary, with_options=True):
    """The text of a benchmark question as another data set may have it; `kind` of KINDS."""
    options = list(question.options.values())
    if kind == "shuffled":
        rng.shuffle(options)
    lines = [f"{chr(65 + i)}. {option}" for i, option in enumerate(options)] if with_options else []
    text = "\n".join([question_alone(question), *lines])
    return edited(text, rng, vocabulary) if kind == "edited" else text


def planted(row, copy, rng):
    """A row with a copy in it: in raw text as a paragraph, in a row for training as its question."""
    if "instruction" in row:
        return row | {"instruction": copy}
    sentences = re.split(r"(?<=[.!?])\s+", row["text"])
    cut = rng.randrange(len(sentences) + 1)
    return row | {"text": "\n".join(filter(None, (" ".join(sentences[:cut]), copy, " ".join(sentences[cut:]))))}


def plant(rows, questions, seed, kinds=KINDS):
    """(the rows, some with a copy in them; [None, or (kind, the question's number), …])."""
    rng, rows, labels = random.Random(seed), list(rows), [None] * len(rows)
    vocabulary = [word for row in rows for word in row.get("text", "").split()]
    hosts = iter(rng.sample(range(len(rows)), sum(kinds.values())))
    for kind, count in kinds.items():
        can = [i for i, one in enumerate(questions) if kind != "shuffled" or has_options(one)]
        for i, number in enumerate(rng.sample(can, count)):
            host, question = next(hosts), questions[number]
            with_options = has_options(question) and (kind == "shuffled" or i % 2 == 0)
            rows[host] = planted(rows[host], copy_of(question, kind, rng, vocabulary, with_options), rng)
            labels[host] = kind, number
    return rows, labels


def has_options(question):
    return set(question.options.values()) != {*DECISIONS.values()}


def text_of(row):
    return row["text"] if "instruction" not in row else f"{row['instruction']}\n{row['response']}"

# ----- methods: rows and questions -> whether each row is named, or how like a question it is -------------------------


def n_gram(n, rows, questions):
    """A run of n words of a question and its options stands in the text."""
    table = set().union(*(grams(words("\n".join((question_alone(one), *one.options.values()))), n)
                          for one in questions))
    return [not table.isdisjoint(grams(words(text_of(row)), n)) for row in rows]


def fuzzy(rows, questions):
    """rapidfuzz's partial ratio of words: of the question and the window of the text most like it, 0 to 1."""
    from rapidfuzz.fuzz import partial_ratio
    asked, best = [words(question_alone(one)) for one in questions], []
    for row in rows:
        text, score = words(text_of(row)), 70  # below it the values do not matter
        for one in asked:
            score = max(score, partial_ratio(one, text, score_cutoff=score))
        best.append(score / 100)
    return np.array(best)


def minhash(rows, questions):
    """Sketches of runs of three words; the question, and where the row asks something, its question."""
    from rensa import RMinHash, RMinHashLSH

    def sketch(text):
        made, found = RMinHash(128, 42), words(text)
        made.update([" ".join(found[i:i + 3]) for i in range(max(1, len(found) - 2))])
        return made
    index, sketches = RMinHashLSH(0.4, 128, 64), []
    for one in questions:
        for text in {question_alone(one), "\n".join((question_alone(one), *one.options.values()))}:
            index.insert(len(sketches), sketch(text))
            sketches.append(sketch(text))
    made = [sketch(row.get("instruction") or row["text"]) for row in rows]
    return np.array([max((one.jaccard(sketches[i]) for i in index.query(one)), default=0.0) for one in made])


def embedding(rows, questions, encode):
    """The cosine of a question and of the question or the paragraph nearest to it."""
    asked = unit(encode([question_alone(one) for one in questions]))
    pieces = [(i, piece) for i, row in enumerate(rows)
              for piece in ([row["instruction"]] if "instruction" in row else row["text"].split("\n"))]
    best = np.zeros(len(rows))
    for (i, _), score in zip(pieces, (unit(encode([piece for _, piece in pieces])) @ asked.T).max(1)):
        best[i] = max(best[i], score)
    return best


def shipped(rows, questions, encode=None):
    """filters.py's rule `leak`."""
    settings = Settings(questions=tuple(questions), rules=("leak",), encode=encode)
    return [reason is not None for _, reason in filtered(rows, settings)]

# ----- the table -----------------------------------------------------------------------------------------------------


def score(named, labels):
    """{kind: recall of its copies, "precision", "false positives"} of a method."""
    result = {kind: np.mean([hit for hit, label in zip(named, labels) if label and label[0] == kind])
              for kind in dict.fromkeys(label[0] for label in labels if label)}
    wrong = [hit for hit, label in zip(named, labels) if not label]
    right = sum(hit for hit, label in zip(named, labels) if label)
    return result | {"precision": right / max(1, right + sum(wrong)), "false positives": np.mean(wrong)}


def main():
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", nargs="+", required=True, help="jsonl of raw texts, or of instruction and response")
    parser.add_argument("--benchmark", action="append", required=True, metavar="NAME=FILE", help=f"of {[*SHAPES]}")
    parser.add_argument("--count", type=whole(500), default=2000, help="texts, as many from each file")
    parser.add_argument("--encoder", default=DEFAULT_ENCODER)
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    questions = []
    for given in args.benchmark:
        name, _, path = given.partition("=")
        questions += read_benchmark(name, path)
    rows, rng = [], random.Random(args.seed)
    for path in args.texts:
        found = [row for _, _, row in read_data(path)]
        if faults := [row for row in found if isinstance(row, InputError)]:
            raise faults[0]
        rows += rng.sample(found, min(len(found), args.count // len(args.texts)))
    rows, labels = plant(rows, questions, args.seed)
    encode = Encoder.from_dir(args.encoder).encode
    methods = {"8-gram": lambda: n_gram(8, rows, questions), "13-gram": lambda: n_gram(13, rows, questions),
               "fuzzy": lambda: fuzzy(rows, questions), "MinHash": lambda: minhash(rows, questions),
               "embedding": lambda: embedding(rows, questions, encode), "shipped": lambda: shipped(rows, questions),
               "shipped, encoder": lambda: shipped(rows, questions, encode)}
    cuts = {"fuzzy": (0.75, 0.8, 0.9), "MinHash": (0.5, 0.7), "embedding": (0.8, 0.9, 0.95)}
    results = {}
    for name, method in methods.items():
        start = time.perf_counter()
        found, seconds = method(), {"seconds": time.perf_counter() - start}
        for cut in cuts.get(name, (None,)):
            named = found if cut is None else (found >= cut).tolist()
            results[name if cut is None else f"{name} {cut}"] = score(named, labels) | seconds
    if args.json:
        print(json.dumps(results))
        return
    print(f"{len(rows)} texts, {sum(map(bool, labels))} with a copy, of {len(questions)} questions; %, and seconds")
    columns = [*KINDS, "precision", "false positives", "seconds"]
    print(f"{'':17}" + "".join(f"{column:>17}" for column in columns))
    for name, result in results.items():
        print(f"{name:17}" + "".join(f"{result[c] * (1 if c == 'seconds' else 100):17.1f}" for c in columns))


if __name__ == "__main__":
    run_main(main)

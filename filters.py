r"""The last gate before training: which rows of a data set stay, and why each other one goes.

    for row, reason in filtered(rows, settings):        reason: None, or (rule, evidence)

    unreadable   the row has no text to learn from
    reference    it speaks of a text that its reader does not see: "according to the passage"
    spam         a third of it repeats itself, most of it is no letters, it advertises, or it is a list of addresses
    language     it is in none of the languages wanted (py3langid)
    switch       it changes the language in mid-text: "The patient 需要 rest", or one sentence in German
    leak         it holds a benchmark question: leaks.Scanner (page, 13-gram, question), a fuzzy copy, a cosine
    exact        its words are those of an earlier row: same hash, whatever case and punctuation
    minhash      its runs of five words nearly are: Jaccard estimate >= 0.8 (Broder 1997; rensa's R-MinHash)
    embedding    its question nearly is: cosine >= 0.99 (see leaks.py, which says why so high)

A fuzzy copy is a benchmark question that was edited, or whose options were shuffled:

    share(question, text) = weight of its words that stand in the window of the text most like it / weight of them all
    weight(word) = log(1 + questions / questions with that word)

It is one from a share of 0.7, if the words found, without COMMON ones, weigh as much as one and a half that a single
question has. rapidfuzz finds the window. FineMedLM-o1 (arXiv 2501.09213) has no such gate; one of its released answers
changes language in mid-thought.

Rows are streamed. Of a row that stays, memory keeps a hash, a sketch of 128 numbers and, with `encode`, a vector.
"""
import functools
import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from types import SimpleNamespace

import faiss
import numpy as np

from files import InputError
from leaks import RUN, SAME_COSINE, Record, Scanner, content, words
from messages import CONVERSATIONS, names_in
from rows import MATERIAL, QUESTIONS, try_to
from tokenizer import check_unicode

RULES = ("unreadable", "reference", "spam", "language", "switch", "leak", "exact", "minhash", "embedding")
BATCH = 256  # rows whose questions are encoded together


@dataclass(frozen=True)
class Settings:
    """The gate; each default is explained at the top of this module."""
    questions: tuple = ()  # of all benchmark files: benchmarks.Question, or what has text, answer, page, options, where
    languages: tuple = ("en",)  # ISO 639-1
    similarity: float = 0.8  # of two rows, from which they are near-duplicates
    cosine: float = SAME_COSINE  # of two questions' vectors; for all-MiniLM-L6-v2
    encode: Callable | None = None  # texts -> float32 [N, D]: Encoder.encode, or a look-up of vectors made before
    rules: tuple = RULES  # those that are applied

# ----- the whole -----------------------------------------------------------------------------------------------------


def filtered(rows, settings=None):
    """Yields (row, None) for each dict that stays and (row, (rule, evidence)) for each that goes, in order.

    A row is raw text ({"text": …}) or anything that rows.py reads; a row with a question is judged by its question and
    its answers. A rejected answer may be as poor as it likes, but holds no benchmark question. The first of RULES that
    holds is given, and a row is a duplicate only of one that stays. Evidence is one line: the words that tell, or the
    number of the earlier row, from 1. InputError for wrong settings, and where the packages of the extra `synth` are
    needed and missing.
    """
    settings = settings or Settings()
    if unknown := {*settings.rules} - {*RULES}:
        raise InputError(f"found the rule {min(unknown)!r}; expected {', '.join(RULES)}")
    checks = {"reference": reference, "spam": spam}
    if {"language", "switch"} & {*settings.rules}:
        checks["language"], checks["switch"] = language_checks(settings.languages)
    if "leak" in settings.rules and settings.questions:
        checks["leak"] = leak_check(settings.questions, settings.encode, settings.cosine)
    memories = {"exact": exact_memory, "minhash": lambda: minhash_memory(settings.similarity),
                "embedding": lambda: embedding_memory(settings.cosine)}
    if not settings.encode:
        memories.pop("embedding")
    memories = {rule: make() for rule, make in memories.items() if rule in settings.rules}
    numbered = enumerate(rows, 1)
    while batch := [read(number, row) for number, row in islice(numbered, BATCH if settings.encode else 1)]:
        encode_questions(batch, settings.encode)
        for one in batch:
            yield one.row, reason_to_drop(one, checks, memories, settings.rules)


def reason_to_drop(one, checks, memories, rules):
    """(rule, evidence) of the first rule by which a row that was `read` goes; None if it stays, and is remembered."""
    if one.fault:
        return ("unreadable", one.fault) if "unreadable" in rules else None
    for rule in RULES:
        found = None
        if rule in checks and rule in rules:
            found = checks[rule](one)
        elif rule in memories:
            found = memories[rule][0](one)
        if found:
            return rule, " ".join(found.split())
    for _, keep in memories.values():
        keep(one)
    return None


def read(number, row):
    """A row as the rules see it: its texts, what is asked, its words; `fault` says why it cannot be read."""
    raw = not names_in(row, (*QUESTIONS, *CONVERSATIONS, *MATERIAL)) and isinstance(row.get("text"), str)
    given = {"instruction": row["text"], "url": row.get("url")} if raw else row
    fault, record = try_to(Record, given, f"row {number}")
    fault = fault or try_to(check_unicode, json.dumps(row, ensure_ascii=False), f"row {number}")[0]
    if not fault and not any(record.words):
        fault = InputError(f"row {number}: found no words; expected text")
    return SimpleNamespace(number=number, row=row, raw=raw, record=record, fault=fault and str(fault), vector=None)


def encode_questions(batch, encode):
    """Gives every row its `vector` of length 1: that of the last question asked, or of a raw text."""
    batch = [one for one in batch if not one.fault]
    if encode and batch:
        for one, vector in zip(batch, unit(encode([(one.record.asked or one.record.texts)[-1] for one in batch]))):
            one.vector = vector


def unit(vectors):
    """float32 [N, D] with rows of length 1; a row of zeros stays."""
    vectors = np.asarray(vectors, np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def needed(package):
    """The InputError for a package of the extra `synth` that is not installed."""
    return InputError(f"found no {package}; expected pip install -e '.[synth]'")

# ----- what it says --------------------------------------------------------------------------------------------------


TEXT = r"(?:passage|text|article|excerpt|paragraph|document)\b(?!\s+(?:of|messages?|box|file|neck)\b)"
SEEN = r"(?:above|given|provided|preceding|foregoing|supplied|aforementioned|above-mentioned)"
ABOVE = re.compile(rf"\b(?:the|this)\s+{SEEN}\s+{TEXT}"
                   rf"|\b(?:the|this)\s+{TEXT}\s+(?:above|provided|given|supplied|(?:that )?you (?:gave|provided))\b",
                   re.IGNORECASE)
REFERENCE = re.compile(
    rf"\b(?:according to|based on|in|from|by|per)\s+(?:the|this)\s+(?:{SEEN}\s+|source\s+|original\s+)?{TEXT}"
    rf"|\b(?:the|this)\s+{TEXT}\s+(?:does|states?|says?|mentions?|mentioned|describes?|discuss(?:es)?|explains?|"
    r"suggests?|reports?|indicates?|notes?|highlights?|emphasi[sz]es?|provides?|refers?)\b", re.IGNORECASE)


def reference(one):
    """The words by which a row refers to a text above; in a raw text, which may call itself "this article", only the
    plainest of them."""
    patterns = (ABOVE,) if one.raw else (ABOVE, REFERENCE)
    found = next(filter(None, (pattern.search(text) for text in one.record.texts for pattern in patterns)), None)
    return found and found[0]


# bounded, because a text without spaces is one long word
ADDRESS = re.compile(r"https?://\S+|www\.\S+|[^\s@]{1,64}@[^\s@]{1,250}\.\w+")
ADVERTISING = re.compile(
    r"\b(?:buy now|order (?:now|today|online)|click here|free shipping|add to cart|limited[- ]time offer|act now|"
    r"(?:discount|promo|coupon) code|money[- ]back guarantee|subscribe (?:now|to our)|sign up (?:now|today)|"
    r"best price|lowest prices?|no prescription (?:needed|required|necessary)|call now|special offer)\b", re.IGNORECASE)


def spam(one):
    """The first of four rules by which a text is spam, or None."""
    for text, found in zip(one.record.texts, one.record.words):
        if (phrases := {phrase.lower() for phrase in ADVERTISING.findall(text)}) and len(phrases) > 1:
            return f"advertises: {', '.join(sorted(phrases))}"
        addresses = ADDRESS.findall(text)
        if len(addresses) >= 3 and 20 * len(addresses) > len(text.split()):
            return f"{len(addresses)} addresses in {len(text.split())} words: {addresses[0]}"
        dense = "".join(text.split())
        if len(dense) >= 200 and (letters := sum(map(str.isalpha, dense))) < 0.5 * len(dense):
            return f"{letters} letters in {len(dense)} characters: {text[:80]}"
        if (repeated := repeated_words(found)) > len(found) / 3:
            return f"{repeated} of {len(found)} words repeat ten words in a row: {text[:80]}"
    return None


def repeated_words(found, n=10):
    """How many words stand in a run of n that stood in the text before."""
    seen, covered = set(), 0
    end = 0  # of the words that are counted already
    for start, run in enumerate(zip(*(found[i:] for i in range(n)))):
        if run in seen:
            covered += start + n - max(start, end)
            end = start + n
        seen.add(run)
    return covered

# ----- language ------------------------------------------------------------------------------------------------------

CERTAIN = 0.9  # py3langid's probability; below it no row goes
LONG = 40  # letters and spaces of a sentence, of which the language can be told
# script: (its letters, how many in a row are more than a stray sign, the languages that are written in it)
SCRIPTS = {
    "Chinese or Japanese": (r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff", 2, ("zh", "ja")),
    "Korean": (r"\uac00-\ud7af", 2, ("ko",)),
    "Cyrillic": (r"\u0400-\u052f", 4, ("be", "bg", "kk", "ky", "mk", "mn", "ru", "sr", "uk")),
    "Arabic": (r"\u0600-\u06ff", 4, ("ar", "fa", "ps", "ug", "ur")),
    "Hebrew": (r"\u0590-\u05ff", 4, ("he",)),
    "Devanagari": (r"\u0900-\u097f", 4, ("hi", "mr", "ne")),
    "Thai": (r"\u0e00-\u0e7f", 4, ("th",)),
}
ANY_SCRIPT = re.compile(f"[{''.join(chars for chars, _, _ in SCRIPTS.values())}]")
QUOTED = re.compile(r"\([^()]*\)|\[[^\[\]]*\]|（[^（）]*）")  # a name in its own script, as "Huangqi (黄芪)"
SENTENCE = re.compile(r"(?<=[.!?。！？])\s*(?=\S)|\n+")


@functools.cache
def language_identifier():
    """py3langid's identifier with its own model, which takes a second to load."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise needed("py3langid") from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_checks(languages):
    """(the rule `language`, the rule `switch`) for the languages wanted. InputError if py3langid does not know one."""
    identifier = language_identifier()
    known = {str(label) for label in identifier.nb_classes}
    if not languages or {*languages} - known:
        raise InputError(f"found the languages {', '.join(languages) or 'none'}; expected some of "
                         f"{', '.join(sorted(known))}")

    @functools.lru_cache(16)  # because both rules ask for the same texts
    def certain(text):
        """The language of a text, or None if it cannot be told: a list of species or of muscles passes for Latin."""
        name, probability = identifier.classify(text)
        return str(name) if probability >= CERTAIN and name != "la" else None

    def language(one):
        for text in one.record.texts:
            script = main_script(text)
            if script and not {*SCRIPTS[script][2]} & {*languages}:
                return f"{script}: {text[:80]}"
            found = certain(text) if len(text) >= LONG else None
            if found and found not in languages and not (script and {*SCRIPTS[script][2]} & {*languages}):
                return f"{found}: {text[:80]}"

    def switch(one):
        for text in one.record.texts:
            script = main_script(text)
            if script is None and (run := foreign_run(text)):
                return run
            whole = certain(text) if len(text) >= LONG else None
            for sentence in SENTENCE.split(text) if script is None else ():
                found = certain(sentence) if len(sentence) >= LONG else None
                if found and found != whole and (whole or found not in languages):
                    return f"{found} in {whole or languages[0]}: {sentence[:80]}"
    return language, switch


def main_script(text):
    """The name of the script in SCRIPTS that half of a text's letters are in, or None."""
    if not ANY_SCRIPT.search(text):
        return None
    letters = sum(map(str.isalpha, text))
    return next((name for name, (chars, _, _) in SCRIPTS.items()
                 if 2 * len(re.findall(f"[{chars}]", text)) > letters), None)


def foreign_run(text):
    """The first run of letters of another script outside of brackets, with the words around it; None without one."""
    text = QUOTED.sub("", text) if ANY_SCRIPT.search(text) else ""
    for chars, least, _ in SCRIPTS.values():
        if found := re.search(f"[{chars}]{{{least},}}", text):
            return f"{found[0][:40]} in: {text[max(0, found.start() - 40):found.end() + 40]}"

# ----- benchmarks ----------------------------------------------------------------------------------------------------

SHARE, RARE = 0.7, 1.5  # of a question's weight that must be found; in words that a single question has
# not counted for the second: rare among a few hundred terse questions, yet in every text ("is also known as")
COMMON = frozenset(content(
    "about above after again all also am and any as at be because been before being below between both but by can "
    "cannot could did do does done during each either from had has have having he her here him his how if into it its "
    "known less may might more most much must my no nor not off on once one only or other our out over own same she "
    "should so some such than that their them then there these they this those through too under until up very we when "
    "where while who whom whose why will with within without would you your called seen used true false following"))


def leak_check(questions, encode=None, cosine=SAME_COSINE):
    """The rule `leak` for benchmark questions: evidence, which names the question's place, or None.

    Where material stands before the question, as PubMedQA's abstract, Scanner looks for both, fuzzy_copies for the
    question alone.
    """
    scanner, copies, sentences = Scanner(questions), fuzzy_copies(questions), short_questions(questions)
    vectors = unit(encode([question_alone(one) for one in questions])) if encode else None

    def leak(one):
        if hit := next(iter(scanner.hits_of(one.record)), None):
            number, rule, evidence = hit
            return f"{rule} of {questions[number].where}: {evidence}"
        for text in (*one.record.texts, *one.record.rejected):
            if found := sentences(text) or copies(text):
                return found
        if vectors is not None and (scores := vectors @ one.vector).max() >= cosine:
            return f"cosine {scores.max():.3f} to {questions[scores.argmax()].where}"
    return leak


def question_alone(question):
    """The question without the material above it, from which an empty line parts it."""
    return question.text.rpartition("\n\n")[2]


def short_questions(questions):
    """A function of a text: evidence if whole sentences of it are a question of fewer than 13 words, or None.

    Scanner looks for no run as short as "Serum is:", which stands in many sentences, and as a sentence in few.
    """
    table = {tuple(words(one.text)): one.where for one in questions}  # never a vignette's last line alone
    table = {key: where for key, where in table.items() if 0 < len(key) < RUN}

    def find(text):
        sentences = [found for sentence in re.split(r"[.!?:;\n]+", text) if (found := words(sentence))]
        for i, _ in enumerate(sentences):
            for upto in range(i + 1, i + 4):
                key = tuple(chain.from_iterable(sentences[i:upto]))
                if key in table:
                    return f"question of {table[key]}: {' '.join(key)}"
    return find


def fuzzy_copies(questions):
    """A function of a text: evidence if a window of it is a copy of a question, edited or with other options' order.

    Each question is looked for alone and with its options. Of all questions only those are aligned whose words the
    whole text has to a share of SHARE.
    """
    try:
        from rapidfuzz.fuzz import partial_ratio_alignment
    except ImportError:
        raise needed("rapidfuzz") from None
    forms, count = [], Counter()  # (place, words) of each question alone and with its options; questions with a word
    for one in questions:
        alone = content(question_alone(one))
        whole = content("\n".join((question_alone(one), *one.options.values())))
        forms += [(one.where, form) for form in ([alone, whole] if whole != alone else [alone]) if form]
        count.update({*whole})
    weight = {word: math.log(1 + len(questions) / n) for word, n in count.items()}
    least = RARE * math.log(1 + len(questions))
    totals = np.array([sum(weight[word] for word in {*form}) for _, form in forms])
    holders = defaultdict(list)
    for number, (_, form) in enumerate(forms):
        for word in {*form}:
            holders[word].append(number)
    holders = {word: np.array(numbers) for word, numbers in holders.items()}

    def find(text):
        text = content(text)
        if not (shared := [word for word in {*text} if word in holders]):
            return None
        numbers = [holders[word] for word in shared]
        repeated = np.repeat([weight[word] for word in shared], [*map(len, numbers)])
        sums = np.bincount(np.concatenate(numbers), repeated, len(forms))
        for number in np.flatnonzero((sums >= SHARE * totals) & (sums >= least)):
            where, form = forms[number]
            begin, end = 0, len(text)
            if len(form) < len(text):
                place, margin = partial_ratio_alignment(form, text), math.ceil(len(form) / 8) + 1  # edits move words
                begin, end = max(0, place.dest_start - margin), place.dest_end + margin
            found = {*form} & {*text[begin:end]}
            weighs = sum(weight[word] for word in found)
            if weighs >= SHARE * totals[number] and sum(weight[word] for word in found - COMMON) >= least:
                return f"{weighs / totals[number]:.0%} of {where}: {' '.join(text[begin:end])[:200]}"
    return find

# ----- duplicates ----------------------------------------------------------------------------------------------------
# A memory is two functions: find(row) gives evidence of an earlier row, or None; keep(row) remembers one that stays.


def exact_memory():
    """The rule `exact`: a hash of each row's words."""
    seen = {}

    def key(one):
        return hashlib.blake2b("\n".join(map(" ".join, one.record.words)).encode(), digest_size=16).digest()

    def find(one):
        return f"row {seen[key(one)]}" if key(one) in seen else None

    def keep(one):
        seen[key(one)] = one.number
    return find, keep


def minhash_memory(least, permutations=128, bands=32, run=5):
    """The rule `minhash`: sketches of each row's runs of five words, found by bands that agree and compared whole."""
    try:
        from rensa import RMinHash, RMinHashLSH
    except ImportError:
        raise needed("rensa") from None
    index, sketches = RMinHashLSH(least, permutations, bands), {}

    def sketch(one):
        if getattr(one, "sketch", None) is None:
            one.sketch = RMinHash(permutations, 42)
            one.sketch.update([" ".join(found[i:i + run]) for found in one.record.words
                               for i in range(max(1, len(found) - run + 1))])
        return one.sketch

    def find(one):
        near = ((sketch(one).jaccard(sketches[number]), -number) for number in index.query(sketch(one)))
        score, number = max(near, default=(0.0, 0))
        return f"row {-number}: similarity {score:.2f}" if score >= least else None

    def keep(one):
        index.insert(one.number, sketch(one))
        sketches[one.number] = sketch(one)
    return find, keep


def embedding_memory(least):
    """The rule `embedding`: the vectors of all questions, searched exactly."""
    index, numbers = None, []

    def find(one):
        if not numbers:
            return None
        scores, places = index.search(one.vector[None], 1)
        return f"row {numbers[places[0, 0]]}: cosine {scores[0, 0]:.3f}" if scores[0, 0] >= least else None

    def keep(one):
        nonlocal index
        index = index or faiss.IndexFlatIP(len(one.vector))
        index.add(one.vector[None])
        numbers.append(one.number)
    return find, keep

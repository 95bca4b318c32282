"""filters.py: every rule on rows judged by hand, planted copies of small benchmarks, and the stream as a whole."""
import itertools
import random
import re
import sys
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

import filters
from bench.decontaminate import KINDS, copy_of, edited, has_options, plant, planted, score
from benchmarks import Question
from files import InputError
from filters import (
    RULES,
    Settings,
    filtered,
    foreign_run,
    fuzzy_copies,
    main_script,
    repeated_words,
    short_questions,
)
from leaks import content, words

HYPERTENSION = ("Most adults with high blood pressure feel nothing at all. A cuff around the arm measures it twice, "
                "and the lower of the two values is written down.")
DIFFERENT = "Children lose about twenty milk teeth between their sixth and their twelfth birthday, front teeth first."


def asked(text, options=(), where="bench.jsonl:1", answer="", page=None):
    return Question(1, where, text, dict(zip("ABCDEFGHIJ", options)), None, answer, "1", page, None)


MEDQA = asked("A 24-year-old woman at 39 weeks of gestation presents to the emergency department complaining of "
              "painful contractions every ten minutes for two hours. Her pulse is 86/min, her temperature is 37.6 °C. "
              "Which of the following is the best next step in management?",
              ["Nifedipine", "Betamethasone", "Admission to the delivery room", "Expectant management at home"],
              "medqa.jsonl:1")
MEDMCQA = asked("Hutchinson's pupil is seen in", ["Uncal herniation", "Pontine bleed", "Argyll Robertson", "Horner"],
                "medmcqa.jsonl:1")
PUBMEDQA = asked("Telephone counselling is a promising method to promote screening. Little research has compared it.\n"
                 "Women were drawn at random from a register.\n\nDoes tailored print increase mammography use?",
                 ["yes", "no", "maybe"], "pubmedqa.json: 10808977")
TINY = asked("Serum is:", ["Plasma without clotting factors", "Blood without cells"], "medmcqa.jsonl:2")
QUESTIONS = (MEDQA, MEDMCQA, PUBMEDQA, TINY)


def row(instruction="What is hypertension?", response=HYPERTENSION, **more):
    return {"instruction": instruction, "response": response, **more}


def reasons(rows, **settings):
    return [reason for _, reason in filtered(rows, Settings(**settings))]


def reason(one, **settings):
    """The reason of one row, by the rules named, or by all."""
    return reasons([one], **settings)[0]


def rule(one, **settings):
    found = reason(one, **settings)
    return found and found[0]

# ----- the stream ----------------------------------------------------------------------------------------------------


def test_rows_come_in_order_with_their_reasons():
    rows = [row(), row("What is a milk tooth?", DIFFERENT), row(), {"text": "Gout hurts most at night."},
            row("According to the passage, what is lost?"), {"source": "x"}]
    found = list(filtered(iter(rows)))
    assert [one for one, _ in found] == rows and all(one is given for (one, _), given in zip(found, rows))
    assert [reason and reason[0] for _, reason in found] == [None, None, "exact", None, "reference", "unreadable"]
    assert found[2][1] == ("exact", "row 1")
    assert found[5][1][1].startswith("row 6: found no ")


def test_a_row_is_a_duplicate_only_of_one_that_stays():
    leaking = row("What is it?", f"{MEDQA.text} {HYPERTENSION}")
    near = row("What is it?", f"{MEDQA.text} {HYPERTENSION} Indeed.")
    assert [one[0] for one in reasons([leaking, leaking, near], questions=QUESTIONS)] == ["leak"] * 3
    a, b, c = ([1, 0], [0.6, 0.8], [0.2, 0.98])  # b is near a, c is near b only
    rows = [row("one", HYPERTENSION), row("two", DIFFERENT), row("three", f"{DIFFERENT} {HYPERTENSION}")]
    found = reasons(rows, encode=looked_up({"one": a, "two": b, "three": c}), cosine=0.55)
    assert [one and one[0] for one in found] == [None, "embedding", None]


def test_rows_are_streamed():
    """A row is judged before the next is asked for, without an encoder; with one, before the batch after it."""
    taken = []

    def source():
        for i in range(600):
            taken.append(i)
            yield row(f"Question {i}?", f"answer {i}")
    stream = filtered(source(), Settings(rules=("exact",)))
    for i in range(3):
        assert next(stream)[1] is None and len(taken) == i + 1
    taken.clear()
    next(filtered(source(), Settings(rules=("exact", "embedding"), encode=lambda texts: np.eye(len(texts)))))
    assert len(taken) == filters.BATCH


def test_memory_keeps_no_rows(monkeypatch):
    """Of rows that stay, only hashes and sketches are kept: a long text costs no more than a short one."""
    records, read = [], filters.read

    def noted(*given):
        one = read(*given)
        records.append(weakref.ref(one.record))
        return one
    monkeypatch.setattr(filters, "read", noted)
    stream = filtered((row(f"Question {i}?", f"answer {i} " * 50) for i in range(20)),
                      Settings(rules=("exact", "minhash", "embedding"), encode=lambda texts: np.eye(len(texts), 40),
                               similarity=1.0))
    monkeypatch.setattr(filters, "BATCH", 5)
    for _ in range(15):
        next(stream)
    assert len(records) == 15 and not any(record() for record in records[:10])


def test_only_the_rules_named_are_applied():
    bad = row("According to the passage, what is lost?")
    assert rule(bad) == "reference"
    assert rule(bad, rules=("spam", "exact")) is None
    assert [one and one[0] for one in reasons([row(), row()], rules=("minhash",))] == [None, "minhash"]
    assert [one and one[0] for one in reasons([row(), row()], rules=("spam",))] == [None, None]
    assert rule({"source": "x"}, rules=("spam",)) is None
    with pytest.raises(InputError, match="found the rule 'toxic'; expected unreadable, reference, spam"):
        reason(row(), rules=("spam", "toxic"))


def test_the_first_rule_that_holds_is_given():
    assert RULES.index("leak") < RULES.index("exact") < RULES.index("minhash")
    several = row("According to the passage, why?", "Click here to buy now. Wir behandeln die Ursache der Krankheit.")
    assert rule(several) == "reference"


def test_all_shapes_of_rows_are_read():
    text = "According to the article, rest helps."
    for one in (row(text), row(response=text), {"messages": [{"role": "user", "content": text},
                                                             {"role": "assistant", "content": "Yes."}]},
                {"prompt": [{"role": "user", "content": text}], "chosen": [{"role": "assistant", "content": "A"}],
                 "rejected": [{"role": "assistant", "content": "B"}]}, {"instruction": text}):
        assert rule(one, rules=("reference",)) == "reference"
    pair = {"prompt": "Why?", "chosen": HYPERTENSION, "rejected": text}
    assert rule(pair, rules=("reference",)) is None  # what is rejected may be poor
    edited_copy = "Horner? Pontine bleed? Argyll Robertson? Uncal herniation? Hutchinson's pupil?"
    for leaking in (MEDQA.text, edited_copy):  # but is trained on as well
        assert rule(pair | {"rejected": leaking}, rules=("leak",), questions=QUESTIONS) == "leak"
    assert rule(row(text=text), rules=("reference",)) is None  # the source beside a question is not trained on
    assert rule({"text": "  ...  "}) == rule(row("\ud800?")) == "unreadable"


def test_a_missing_package_names_the_extra(monkeypatch):
    for package, one in (("py3langid.langid", "language"), ("rensa", "minhash"), ("rapidfuzz.fuzz", "leak")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            filters.language_identifier.cache_clear()
            with pytest.raises(InputError, match=rf"found no {package.partition('.')[0]}; expected pip install -e "
                                                 r"'\.\[synth\]'"):
                reason(row(), rules=(one,), questions=QUESTIONS)

# ----- reference and spam --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [
    "According to the passage, what lowers the risk?", "Based on the given text, name two causes.",
    "What does the article say about insulin?", "Which drug is mentioned in the text?",
    "From this excerpt, can you infer the dose?", "Summarise the passage above.", "Explain the above text.",
    "What is the treatment in the document provided?", "The article states that rest helps; why?",
    "As described in the source text, when is surgery due?", "IN THE PARAGRAPH ABOVE, what is meant?"])
def test_questions_that_need_a_text_above_go(text):
    found = reason(row(text), rules=("reference",))
    assert found[0] == "reference" and found[1] in text


@pytest.mark.parametrize("text", [
    "Why is the passage of stool painful?", "Pain in the passage of urine: which causes?", "What is a text neck?",
    "How do I read an article about cancer?", "Is texting in the dark harmful?", "What causes narrow nasal passages?",
    "Does air flow from the passage of the nose?", "Which documents does a patient need?"])
def test_questions_that_stand_alone_stay(text):
    assert rule(row(text), rules=("reference",)) is None


@pytest.mark.parametrize("text", ["a@" * 10_000, "a" * 50_000, "\u60a3" * 20_000, "a@" + "b" * 50_000, "www." * 10_000,
                                  "the " * 10_000, "the" + " " * 50_000, "(" * 50_000])
def test_a_hostile_text_takes_no_time(text):
    """A pattern that may begin anywhere in a long word takes the square of its length, and with two parts the cube."""
    begin = time.process_time()
    rule({"text": text}, rules=("reference", "spam"))
    assert time.process_time() - begin < 1


def test_raw_text_may_call_itself_an_article():
    assert rule({"text": "In this article, we discuss gout. The article describes diets."}) is None
    assert rule({"text": "The passage above describes gout."}) == "reference"


@pytest.mark.parametrize("text, evidence", [
    ("Click here for pills. No prescription required, order now!", "advertises: click here, no prescription required"),
    ("See https://a.example/x and www.b.example, or write to me@c.example today.", "3 addresses in 9 words: https://a"),
    ("12.5 % | 33/44 | " * 30, "0 letters in "),
    (f"{HYPERTENSION} " * 2, "28 of 56 words repeat ten words in a row: Most adults")])
def test_spam_goes(text, evidence):
    found = reason({"text": text}, rules=("spam",))
    assert found[0] == "spam" and evidence in found[1]


@pytest.mark.parametrize("text", [
    "Click here for more.", "Order now and order now, order NOW.", HYPERTENSION,
    "More at https://a.example, https://b.example and https://c.example. " + " ".join(f"word{i}" for i in range(60)),
    f"{HYPERTENSION} {DIFFERENT} {DIFFERENT} {HYPERTENSION[::-1]} " + " ".join(f"word{i}" for i in range(30)),
    "Hb 12.5 g/dl, Na 140, K 4.1, Cl 101 mmol/l."])
def test_what_is_not_spam_stays(text):
    assert rule({"text": text}, rules=("spam",)) is None


def test_repeated_words_by_hand():
    letters = list("abcdefghijklmnopqrstuvwxyz")
    assert repeated_words(letters) == 0
    assert repeated_words(letters[:10] + letters[:10]) == 10
    assert repeated_words(letters[:9] + letters[:9]) == 0
    assert repeated_words(letters + letters) == 26
    assert repeated_words([*letters[:12], "-", *letters[:11], "+", *letters[1:11]]) == 21
    assert repeated_words(["a"] * 30) == 29  # the run from place 1 on stood at 0

# ----- language ------------------------------------------------------------------------------------------------------

GERMAN = "Die Behandlung der Herzinsuffizienz richtet sich nach der Ursache und dem Stadium der Erkrankung."
FRENCH = "Le traitement de l'insuffisance cardiaque dépend de la cause et du stade de la maladie."
RUSSIAN = "Лечение сердечной недостаточности зависит от причины и стадии заболевания."
CHINESE = "心力衰竭的治疗取决于病因和疾病的阶段。"
LANGUAGE = {"rules": ("language", "switch")}


@pytest.mark.parametrize("text, name", [(GERMAN, "de"), (FRENCH, "fr"), (RUSSIAN, "Cyrillic"), (CHINESE, "Chinese"),
                                        ("患者发热。", "Chinese"), ("يعتمد علاج قصور القلب على السبب.", "Arabic")])
def test_a_text_in_another_language_goes(text, name):
    found = reason(row(text), **LANGUAGE)
    assert found[0] == "language" and found[1].startswith(name)
    assert rule(row(HYPERTENSION, text), **LANGUAGE) == "language"


def test_wanted_languages_stay():
    assert rule(row(GERMAN, GERMAN + " " + GERMAN), languages=("en", "de"), **LANGUAGE) is None
    assert rule(row(CHINESE, CHINESE), languages=("zh",), **LANGUAGE) is None
    assert rule(row(RUSSIAN, RUSSIAN), languages=("en", "ru"), **LANGUAGE) is None
    assert rule(row(GERMAN, GERMAN), languages=("fr",), **LANGUAGE) == "language"
    assert rule(row(HYPERTENSION), languages=("de",), **LANGUAGE) == "language"
    with pytest.raises(InputError, match="found the languages en, klingon; expected some of ace, af, am"):
        reason(row(), languages=("en", "klingon"))
    with pytest.raises(InputError, match="found the languages none"):
        reason(row(), languages=())


@pytest.mark.parametrize("text, evidence", [
    (f"{HYPERTENSION} {GERMAN} {DIFFERENT}", "de in en: Die Behandlung"),
    (f"{HYPERTENSION}\n{FRENCH}\n{DIFFERENT}", "fr in en: Le traitement"),
    ("Okay, so the patient 需要 rest. " + HYPERTENSION, "需要 in: Okay, so the patient 需要 rest."),
    (HYPERTENSION + " Hmm, это значит rest. " + DIFFERENT, "значит in: "),
    (HYPERTENSION + " 통증 is pain.", "통증 in: ")])
def test_a_switch_in_mid_text_goes(text, evidence):
    """As in one of FineMed's released chosen answers."""
    found = reason(row(response=text), **LANGUAGE)
    assert found[0] == "switch" and evidence in found[1]
    assert rule(row(response=text), languages=("en", "de", "fr", "ru", "zh", "ko"), **LANGUAGE) == "switch"


@pytest.mark.parametrize("text", [
    "Huangqi (黄芪) is a root; so is [人参].", "The qi 气 of the lung.", "The α- and β-blockers, 5 μg, Δ9-THC and Ω-3.",
    "Staphylococcus aureus, Streptococcus pneumoniae, Haemophilus influenzae and Moraxella catarrhalis. " + DIFFERENT,
    "Sjögren's, Ménière's and Behçet's were described in Zürich. " + HYPERTENSION, "Die Ursache?",
    "Is Chaalia/Pan Masala harmful for health?"])
def test_names_and_signs_are_no_switch(text):
    assert rule(row(response=text), **LANGUAGE) is None


@pytest.mark.parametrize("probability, found", [(0.89, None), (0.9, "language")])
def test_only_what_is_certain_goes(probability, found, monkeypatch):
    sure = SimpleNamespace(nb_classes=["de", "en"], classify=lambda text: ("de", probability))
    monkeypatch.setattr(filters, "language_identifier", lambda: sure)
    assert rule({"text": DIFFERENT}, **LANGUAGE) == found


def test_an_english_term_in_a_text_of_another_script_is_no_switch():
    assert rule(row(CHINESE, f"{CHINESE} CT 和 MRI 检查。{CHINESE}"), languages=("zh",), **LANGUAGE) is None


def test_scripts_by_hand():
    assert main_script("心力衰竭 CT") == "Chinese or Japanese" and main_script("CT 心力") is None
    assert main_script("CT 心力衰") == "Chinese or Japanese"
    assert main_script("") is None and main_script("123") is None and main_script("Да") == "Cyrillic"
    assert foreign_run("abc") is None and foreign_run("a 气 b") is None and foreign_run("a да b") is None
    assert foreign_run("a нет да b") is None and foreign_run("a четыре b") == "четыре in: a четыре b"

# ----- benchmarks ----------------------------------------------------------------------------------------------------

LEAK = {"rules": ("leak",), "questions": QUESTIONS}


@pytest.mark.parametrize("text, evidence", [
    (MEDQA.text, "question of medqa.jsonl:1: similarity 1.000"),
    (f"{DIFFERENT} {MEDQA.text} {DIFFERENT}", "question of medqa.jsonl:1: quoted: a 24 year old woman at 39 weeks"),
    ("A text.\nSerum is:\n" + DIFFERENT, "question of medmcqa.jsonl:2: serum is"),
    (f"{DIFFERENT} Does tailored print increase mammography use? {DIFFERENT}",
     "100% of pubmedqa.json: 10808977: teeth first de tailored print"),
    (f"{DIFFERENT} Telephone counselling is a promising method to promote screening. Little research has compared it.",
     "question of pubmedqa.json: 10808977: quoted: telephone counselling is a promising"),
    ("Horner? Pontine bleed? Argyll Robertson? Uncal herniation? So Hutchinson's pupil, seen where?",
     "100% of medmcqa.jsonl:1: herniation so hutchinson pupil seen where"),
    ("De tailored print does the increase really mammography use?", "83% of pubmedqa.json: 10808977: de tailored")])
def test_benchmark_questions_are_found_and_named(text, evidence):
    found = reason({"text": text}, **LEAK)
    assert found[0] == "leak" and found[1].startswith(evidence)


@pytest.mark.parametrize("text", [
    HYPERTENSION, DIFFERENT, "The serum is clear after ten minutes, the plasma is not.",
    "A 24-year-old woman presents to the emergency department. Which of the following is the best next step?",
    "Uncal herniation presses on the third nerve. Horner described a small pupil.",
    "Yes, no, maybe: does it matter? Print is a use."])
def test_texts_that_share_only_phrases_stay(text):
    assert rule({"text": text}, **LEAK) is None
    assert rule(row(text, text), **LEAK) is None


def test_pages_and_answers_leak_as_in_leaks():
    one = asked("Why?", [], page="https://a.example/gout", answer=" ".join(f"word{i}" for i in range(13)))
    assert reason({"text": DIFFERENT, "url": "http://a.example/gout/"}, rules=("leak",), questions=(one,)) == (
        "leak", "page of bench.jsonl:1: a.example/gout")
    found = reason(row(response=f"So {one.answer}."), rules=("leak",), questions=(one,))
    assert found == ("leak", f"13-gram of bench.jsonl:1: {one.answer}")


def test_the_share_by_hand():
    """Two questions: a word of one weighs ln 3, one of both ln 2; 0.7 of the weight and 1.5 ln 3 are wanted."""
    first, second = asked("alpha beta gamma delta", where="a:1"), asked("alpha zeta eta iota", where="b:1")
    find = fuzzy_copies((first, second))
    assert find("alpha beta gamma omega") == "72% of a:1: alpha beta gamma omega"  # (ln 2 + 2 ln 3) / (ln 2 + 3 ln 3)
    assert find("omega alpha beta omega") is None  # 0.45
    assert find("omega beta gamma delta omega") == "83% of a:1: omega beta gamma delta omega"
    assert find("gamma delta beta") == "83% of a:1: gamma delta beta"
    # the same words far apart: a window has 4 words and two on each side
    filler = " ".join(f"word{i}" for i in range(9))
    assert find(f"beta {filler} gamma {filler} delta {filler} alpha") is None
    assert find("") is None and find("word") is None
    # ln 3 + ln 2 is 1.63 ln 3; common words weigh nothing there, and a single rare word is too little
    find = fuzzy_copies((asked("alpha beta", where="a:1"), asked("alpha is also known", where="b:1"), asked("zeta?")))
    assert find("so beta or alpha") == "100% of a:1: beta or alpha" and find("zeta") is None
    assert find("alpha also known") is None


def test_a_short_question_is_a_whole_sentence():
    find = short_questions((TINY, asked("Bu is late. Which type?", where="c:1")))
    assert find("One. Serum is: two") == "question of medmcqa.jsonl:2: serum is"
    assert find("The serum is clear. It serum") is None
    assert find("So? Bu is late. Which type? B.") == "question of c:1: bu is late which type"
    assert find("Bu is late. Not so. Which type?") is None
    vignette = asked("A man has chest pain.\n\nWhich of the following is the most likely diagnosis?")
    assert short_questions((vignette,))("Which of the following is the most likely diagnosis?") is None
    for n in (12, 13):  # Scanner finds the longer one
        long = asked(" ".join(f"word{i}" for i in range(n)))
        assert (short_questions((long,))(f"So: {long.text}?") is None) == (n == 13)


def looked_up(table):
    return lambda texts: np.array([table.get(text, [0, -1]) for text in texts], np.float32)


def test_a_paraphrase_is_found_by_its_vector():
    table = {"Why did the pupil blow?": [3, 4], MEDMCQA.text: [6, 8.2]}
    found = reason(row("Why did the pupil blow?"), rules=("leak",), questions=QUESTIONS, encode=looked_up(table))
    assert found == ("leak", "cosine 1.000 to medmcqa.jsonl:1")
    table["Why did the pupil blow?"] = [4, 3]  # cosine 0.96
    assert rule(row("Why did the pupil blow?"), encode=looked_up(table), **LEAK) is None
    assert rule(row("Why did the pupil blow?"), encode=looked_up(table), cosine=0.95, **LEAK) == "leak"


# words of a made-up vocabulary, so that only what is planted is shared
def made_up(rng, n):
    return [rng.choice("bdfgklmnprst") + rng.choice("aeiou") + rng.choice("bdfgklmnprst") + rng.choice("aeiou")
            + rng.choice("bdfglmnprt") for _ in range(n)]


def benchmark_of(rng, count):
    """Questions of all four shapes: long with a case, short, one with an abstract, one with ten options."""
    common = ["the", "patient", "of", "which", "following", "is", "most", "likely", "cause", "with"]
    for i in range(count):
        shape = i % 4
        n = (60, 7, 10, 14)[shape]
        text = " ".join(rng.choice(common) if rng.random() < 0.4 else word for word in made_up(rng, n)) + "?"
        options = [" ".join(made_up(rng, 2)) for _ in range((4, 4, 3, 10)[shape])]
        if shape == 2:
            text, options = f"{' '.join(made_up(rng, 40))}.\n\n{text}", ["yes", "no", "maybe"]
        yield asked(text, options, f"bench.jsonl:{i + 1}")


def test_planted_copies_are_found_and_nothing_else():
    """The generator of bench/decontaminate.py, in small: exact 100 %, edited at least 95 %, false positives 0.5 %."""
    rng = random.Random(5)
    questions = list(benchmark_of(rng, 120))
    rows = [{"text": ". ".join(" ".join(made_up(rng, 12)) for _ in range(6)) + "."} if i % 2 else
            row(" ".join(made_up(rng, 9)) + "?", " ".join(made_up(rng, 50))) for i in range(300)]
    rows, labels = plant(rows, questions, 3, {"exact": 40, "edited": 40, "shuffled": 20})
    assert sum(map(bool, labels)) == 100
    named = [found is not None for found in reasons(rows, rules=("leak",), questions=tuple(questions))]
    result = score(named, labels)
    assert result["exact"] == 1 and result["edited"] >= 0.95 and result["shuffled"] == 1
    assert result["false positives"] <= 0.005


def test_the_generator_of_edits():
    rng, vocabulary = random.Random(0), ["new"]
    text = " ".join(f"w{i}" for i in range(50))
    seen = set()
    for _ in range(60):
        found = edited(text, rng, vocabulary).split()
        new, gone = found.count("new"), {*text.split()} - {*found}
        order = [int(word[1:]) for word in found if word != "new"]
        swaps = sum(a > b for a, b in itertools.pairwise(order))
        assert len(found) == 50 - len(gone) + new and 0 < new + (len(gone) - new) + swaps <= 5
        seen |= {edit for edit, done in (("replace", new), ("drop", len(gone) > new), ("swap", swaps)) if done}
    assert seen == {"replace", "drop", "swap"}
    assert edited(text, random.Random(4), vocabulary) == edited(text, random.Random(4), vocabulary)
    assert edited("one", random.Random(1), vocabulary) in ("new", "one") and edited("one two", rng, ["x"]) != ""


def test_copies_and_hosts():
    assert sum(KINDS.values()) == 500 and not has_options(PUBMEDQA) and has_options(MEDMCQA)
    rng = random.Random(2)
    exact = copy_of(MEDMCQA, "exact", rng, [])
    assert exact == ("Hutchinson's pupil is seen in\nA. Uncal herniation\nB. Pontine bleed\nC. Argyll Robertson\n"
                     "D. Horner")
    assert copy_of(PUBMEDQA, "exact", rng, [], with_options=False) == "Does tailored print increase mammography use?"
    shuffled = copy_of(MEDMCQA, "shuffled", rng, [])
    assert shuffled != exact and sorted(content(shuffled)) == sorted(content(exact))
    host = planted({"text": HYPERTENSION}, "COPY", rng)["text"]
    assert host.split("\n").count("COPY") == 1 and words(host.replace("COPY", "")) == words(HYPERTENSION)
    assert planted(row(), "COPY", rng) == row("COPY")

# ----- duplicates ----------------------------------------------------------------------------------------------------


def test_exact_duplicates_by_their_words():
    rows = [row("Why?", "Because, well, so."), row("WHY", "because well  so"), row("Why? Because", "well so"),
            row("Why?", "Because, well, no."), row("Why?", "Because, well, so.", source="other")]
    assert reasons(rows, rules=("exact",)) == [None, ("exact", "row 1"), None, None, ("exact", "row 1")]


def jaccard(a, b):
    a, b = ({tuple(w[i:i + 5]) for i in range(len(w) - 4)} for w in map(words, (a, b)))
    return len(a & b) / len(a | b)


def test_minhash_follows_jaccard():
    """Texts of 200 words whose runs of five overlap by more than 0.9 go, those below 0.7 stay."""
    rng = random.Random(9)
    for share, goes in ((0.005, True), (0.01, True), (0.05, False), (0.1, False)):
        for _ in range(10):
            base = " ".join(made_up(rng, 200))
            near = edited(base, rng, made_up(rng, 50), share)
            assert jaccard(base, near) > 0.87 if goes else jaccard(base, near) < 0.7
            found = reasons([{"text": base}, {"text": near}], rules=("minhash",))[1]
            assert (found is not None) == goes
            if goes:
                number, estimate = re.fullmatch(r"row (\d+): similarity (\d\.\d\d)", found[1]).groups()
                assert number == "1" and abs(float(estimate) - jaccard(base, near)) < 0.12
    near = edited(base, random.Random(0), made_up(rng, 50), 0.03)
    assert reasons([{"text": base}, {"text": near}], rules=("minhash",), similarity=0.5)[1] is not None


def test_minhash_names_the_nearest_row():
    rng = random.Random(11)
    base = made_up(rng, 100)
    rows = [" ".join(made_up(rng, 100)), " ".join([*base[:96], *made_up(rng, 4)]), " ".join(base)]
    found = reasons([{"text": text} for text in [*rows, " ".join(base[:99])]], rules=("minhash",), similarity=0.99)
    assert found[:3] == [None] * 3
    found = reasons([{"text": text} for text in [rows[0], rows[1], " ".join(base[:95])]], rules=("minhash",))
    assert found[2][1].startswith("row 2: similarity ")
    assert [bool(one) for one in reasons([{"text": "yes"}, {"text": "no"}, {"text": "Yes!"}], rules=("minhash",))] == [
        False, False, True]


def test_questions_with_near_vectors_go_whatever_their_answers():
    table = {"one": [1, 0], "two": [8, 1], "three": [0, 2], "four": [0.1, 9]}
    rows = [row(name, answer) for name, answer in zip(table, (HYPERTENSION, DIFFERENT, GERMAN, FRENCH))]
    found = reasons(rows, rules=("embedding",), encode=looked_up(table))
    assert found == [None, ("embedding", "row 1: cosine 0.992"), None, ("embedding", "row 3: cosine 1.000")]
    assert reasons(rows, rules=("embedding",)) == [None] * 4  # no encoder, no rule
    assert reasons(rows, rules=("embedding",), encode=looked_up(table), cosine=0.995)[1] is None


def test_vectors_are_asked_for_the_question_and_for_raw_text():
    given = []

    def encode(texts):
        given.extend(texts)
        return np.eye(len(texts), 8)
    talk = {"messages": [{"role": role, "content": text} for role, text in (
        ("user", "First?"), ("assistant", "Yes."), ("user", "Second?"), ("assistant", "No."))]}
    rows = [row(), {"text": DIFFERENT}, talk, {"source": "x"}]
    assert len(reasons(rows, rules=("embedding",), encode=encode)) == 4
    assert given == ["What is hypertension?", DIFFERENT, "Second?"]


def test_settings_are_what_a_caller_has():
    duck = SimpleNamespace(text=MEDMCQA.text, options={}, answer="", page=None, where="x:1")
    assert rule({"text": f"{MEDMCQA.text}?"}, rules=("leak",), questions=(duck,)) == "leak"
    assert reasons([]) == [] and filters.needed("x").args[0].startswith("found no x")

"""leaks.py: each rule on pairs judged by hand, the tables beside brute force, files, and the report."""
import difflib
import json
import random
import re
from collections import Counter
from types import SimpleNamespace

import pytest
from conftest import held_elsewhere, write_json, write_jsonl

import leaks
from files import InputError
from leaks import (
    Evaluated,
    Record,
    Scanner,
    content,
    leaks_command,
    page_of,
    reason_to_mask,
    reasons,
    report,
    scan,
    similarity,
    words,
)
from retrieve import FORMAT

ANSWER = ["The", "symptoms", "of", "night", "blindness", "begin", "in", "childhood", "and", "grow", "worse", "over",
          "many", "years", "until", "the", "patient", "can", "no", "longer"]


def question(text="Why?", answer="", page=None, options=None, where="bench.jsonl:1"):
    return SimpleNamespace(text=text, answer=answer, page=page, options=options or {}, where=where)


def row(instruction="How?", response="So.", **others):
    return {"instruction": instruction, "response": response, **others}


def shared_run(text, other):
    return Record(row(response=other)).shared_run(words(text))


def same_question(a, b):
    return similarity(content(a), content(b))

# ----- words and runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, expected", [
    ("What is (are) Sjögren's syndrome?", ["what", "is", "are", "sjogrens", "syndrome"]),
    ("Sjo\u0308gren\u2019s", ["sjogrens"]),
    ("Lesch-Nyhan, 37.6°C; IL_6", ["lesch", "nyhan", "37", "6", "c", "il", "6"]),
    ("\uff26\uff35\uff2c\uff2c \ufb01ne Straße", ["full", "fine", "strasse"]),
    ("β-blocker", ["β", "blocker"]),
    ("高血压 is 2 级", ["高", "血", "压", "is", "2", "级"]),
    (" \n…", []),
])
def test_words_by_hand(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize("length, shared, expected", [
    (20, 13, True), (20, 12, False), (13, 13, True), (13, 12, False),  # 13 of a long text
    (12, 12, True), (12, 11, False), (8, 8, True), (8, 7, False), (7, 7, False)])  # the whole of a short one
def test_a_run_is_13_words_or_a_whole_text_of_8(length, shared, expected):
    answer = ANSWER[:length]
    for start in {0, length - shared}:
        run = answer[start:start + shared]
        other = " ".join(["before", *run, "after"])
        assert shared_run(" ".join(answer), other) == (" ".join(run).lower() if expected else None)


def test_the_first_of_several_runs_is_the_evidence_and_order_counts():
    text = " ".join(ANSWER)
    assert shared_run(text, " ".join(ANSWER[3:])) == " ".join(ANSWER[3:16])
    assert shared_run(text, f"{' '.join(ANSWER[8:])} . {' '.join(ANSWER[:14])}") == " ".join(ANSWER[:13]).lower()
    assert shared_run(text, " ".join(reversed(ANSWER))) is None
    assert shared_run(text, " ".join(ANSWER[:12])) is None  # the short side is the record


def test_case_punctuation_and_accents_do_not_hide_a_run():
    other = re.sub(" ", ",\n… ", " ".join(ANSWER[:13]).upper().replace("NIGHT", "NÍGHT"))
    assert shared_run(" ".join(ANSWER), other)

# ----- the same question ---------------------------------------------------------------------------------------------

NINETEEN = " ".join(f"word{i}" for i in range(19))


@pytest.mark.parametrize("a, b", [
    ("What are the symptoms of Thalassemia ?", "What are the symptoms of Thalassemias?"),
    ("What are the symptoms of Parkinson's Disease ?", "what are the symptoms of PARKINSONS disease"),
    ("What is (are) Aneurysms ?", "What is an aneurysm?"),
    ("Is Lesch-Nyhan syndrome inherited ?", "Is Lesch Nyhan syndrome inherited?"),
    ("Which tumour causes anaemia and oedema?", "Which tumor causes anemia and edema?"),
    ("What are the symptoms of a kidney stone?", "What are the symptoms of kidney stones ?"),
    ("Which eye hurts?", "Which eyes hurt?"),
    (NINETEEN, f"{NINETEEN} more"),
    ("Is hepatitis A a liver disease?", "Is hepatitis A a liver disease"),
])
def test_the_same_question(a, b):
    assert same_question(a, b) >= leaks.SAME and same_question(b, a) == same_question(a, b)


@pytest.mark.parametrize("a, b", [
    ("What are the symptoms of Spastic paraplegia 16 ?", "What are the symptoms of Spastic paraplegia 18 ?"),
    ("What are the symptoms of hyperthyroidism?", "What are the symptoms of hypothyroidism?"),
    ("What are the symptoms of gout?", "What are the treatments for gout?"),
    ("What causes gout?", "What is gout?"),
    ("What is (are) Hepatitis ?", "What is (are) Hepatitis A ?"),
    ("What is (are) Hepatitis B ?", "What is (are) Hepatitis C ?"),
    ("What are the symptoms of Hodgkin lymphoma ?", "What are the symptoms of Adult Hodgkin Lymphoma ?"),
    ("Which drug is used in asthma?", "Which drug is not used in asthma?"),
    ("All are true of the ductus arteriosus", "All are true of the ductus arteriosus except"),
    ("What is (are) Kidney Failure: Choosing a Treatment That's Right for You ?",
     "What are the treatments for Kidney Failure: Choosing a Treatment That's Right for You ?"),
    (NINETEEN, NINETEEN.replace("word7", "other")),
    (" ".join(NINETEEN.split()[:18]), " ".join(NINETEEN.split()[:18]) + " more"),
    (NINETEEN, " ".join(reversed(NINETEEN.split()))),
    (NINETEEN, " ".join(["more", *reversed(NINETEEN.split())])),
    ("", ""), ("What is the?", "What is the?"),
])
def test_another_question(a, b):
    assert same_question(a, b) < leaks.SAME


@pytest.mark.parametrize("word", [
    "a", "an", "the", "of", "in", "for", "to", "is", "are", "was", "were", "what", "which"])
def test_function_words_do_not_count_and_others_do(word):
    assert same_question("gout pain", f"Gout {word} pain") == 1
    assert same_question("gout pain", f"gout {word}x pain") == 2 / 3


def test_the_order_of_the_two_questions_does_not_matter():
    a, b = "tango india delta echo", "delta india echo tango"
    ratios = {difflib.SequenceMatcher(None, *pair).ratio() for pair in ((a.split(), b.split()), (b.split(), a.split()))}
    assert len(ratios) == 2 and same_question(a, b) == same_question(b, a)


def test_a_similarity_by_hand():
    assert same_question("gout in men", "gout in men and dogs") == 0.5  # {gout, men} of {gout, men, and, dog}
    assert same_question(NINETEEN, f"{NINETEEN} more") == 19 / 20
    moved = "word1 word0 " + NINETEEN[12:]
    assert same_question(NINETEEN, moved) == pytest.approx(18 / 19)  # all words shared, 18 of 19 in order

# ----- pages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("url, expected", [
    ("http://nih.gov/gout", "nih.gov/gout"), ("https://nih.gov/gout/", "nih.gov/gout"),
    ("nih.gov/gout#causes", "nih.gov/gout"), ("HTTPS://nih.gov/gout/#a/b#c", "nih.gov/gout"),
    (" http://nih.gov/Gout?id=1 ", "nih.gov/Gout?id=1"), ("doc-17", "doc-17"),
    (None, None), ("", None), ("https://", None), ("#top", None), (17, None)])
def test_a_page_by_hand(url, expected):
    assert page_of(url) == expected


def test_pages_that_are_missing_are_not_the_same_page():
    for page in (None, "", "http://"):
        assert reason_to_mask(question(page=page), row(url=page)) is None

# ----- one record against one question -------------------------------------------------------------------------------


def test_each_setting_of_the_mask():
    whole = " ".join(ANSWER)
    asked = question("What is night blindness?", whole, "https://nih.gov/night/")
    page, run, same = row(url="http://nih.gov/night"), row(response=whole), row("what is NIGHT-blindness")
    both = row(response=f"{whole}.", url="http://nih.gov/night#b")
    thirteen = ("13-gram", " ".join(ANSWER[:13]).lower())
    expected = {"strict": [("page", "nih.gov/night"), thirteen,
                           ("question", "similarity 1.000: what is NIGHT-blindness"), ("page", "nih.gov/night")],
                "same-page": [None, thirteen, ("question", "similarity 1.000: what is NIGHT-blindness"), thirteen],
                "off": [None] * 4}
    for rule, verdicts in expected.items():
        assert [reason_to_mask(asked, record, rule=rule) for record in (page, run, same, both)] == verdicts
    assert reason_to_mask(asked, page) == expected["strict"][0]  # the default
    assert reason_to_mask(asked, row("Another one?", "Nothing.", url="http://nih.gov/day")) is None
    with pytest.raises(InputError, match=r"found rule 'loose'; expected one of strict, same-page, off"):
        reason_to_mask(asked, page, rule="loose")


def test_a_cosine_counts_from_its_threshold():
    asked, record = question("Adult polyglucosan body disease?"), row("What of polyglucosan body disease, adult?")
    assert reason_to_mask(asked, record) is None and reason_to_mask(asked, record, cosine=0.9899) is None
    for rule in ("strict", "same-page"):
        assert reason_to_mask(asked, record, rule=rule, cosine=0.99) == ("question", "cosine 0.990")
    assert reason_to_mask(asked, record, rule="off", cosine=1.0) is None


def test_every_text_of_a_record_is_read():
    whole = " ".join(ANSWER)
    for record in (row(whole), row(response=whole), row(system=whole),
                   {"prompt": "Q", "chosen": whole, "rejected": "B"}, {"prompt": "Q", "chosen": "A", "rejected": whole},
                   {"prompt": [{"role": "user", "content": "Q"}], "chosen": [{"role": "assistant", "content": "A"}],
                    "rejected": [{"role": "assistant", "content": whole}]},
                   {"question": whole},  # of an index: no answer
                   {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"},
                                 {"role": "user", "content": "R"}, {"role": "assistant", "content": whole}]}):
        assert reason_to_mask(question(answer=whole), record)[0] == "13-gram", record
        assert reason_to_mask(question(answer=whole[4:]), record)[0] == "13-gram", record
    first, last = " ".join(ANSWER[:7]), " ".join(ANSWER[7:13])
    assert reason_to_mask(question(answer=whole), row(first, last)) is None  # no run goes over the end of a text
    with pytest.raises(InputError, match="found no text"):
        reason_to_mask(question(), {"text": "raw"})


def test_every_question_of_a_conversation_is_compared():
    turns = [{"role": role, "content": text} for role, text in (
        ("user", "What is gout?"), ("assistant", "What is fever?"), ("user", "And asthma?"), ("assistant", "A"))]
    for text, expected in (("What is gout?", True), ("And asthma", True), ("What is fever?", False)):
        assert bool(reason_to_mask(question(text), {"messages": turns})) == expected
    assert reason_to_mask(question("Fever?"), row("Gout?", title="Fever"), field="title")[0] == "question"
    assert reason_to_mask(question("Gout?"), row("Gout?", title="Fever"), field="title")[0] == "question"
    assert reason_to_mask(question("Fever?"), row("Gout?", title="Fever")) is None


def test_a_question_with_its_options_is_the_same_question():
    asked = question("Which drug lowers uric acid?", options={"A": "Allopurinol", "B": "Aspirin", "C": "Atenolol"})
    for text in ("Which drug lowers uric acid?", "Which drug lowers uric acid? Allopurinol, Aspirin, Atenolol",
                 "Which drug lowers uric acid?\nA. Allopurinol\nB. Aspirin\nC. Atenolol"):
        assert reason_to_mask(asked, row(text)), text
    asked.text = "Uric acid is lowered by"  # no mark between it and an A that is no letter of its own
    for between in (" ", "\n"):
        assert reason_to_mask(asked, row(f"{asked.text}{between}A. Allopurinol{between}B. Aspirin{between}C. Atenolol"))
    assert reason_to_mask(asked, row("Uric acid is lowered by\nA. Codeine\nB. Morphine\nC. Heroin")) is None


def test_13_words_of_the_question_are_the_question():
    case = "A man of 40 years " + " ".join(ANSWER)
    record = row(f"I read of {' '.join(case.split()[:13])}, and more.")
    assert reason_to_mask(question(case), record) == ("question", "quoted: " + " ".join(case.split()[:13]).lower())
    assert reason_to_mask(question(case), row(f"I read of {' '.join(case.split()[:12])}, and more.")) is None

# ----- the tables beside brute force ---------------------------------------------------------------------------------


def plain_reasons(asked, record):
    """The rules again, in the plainest words: strings, all pairs, no tables."""
    def flat(text):
        return " ".join(words(text))

    def shares(text, others):
        found, n = flat(text).split(), min(13, len(flat(text).split()))
        return n >= 8 and any(f" {' '.join(found[i:i + n])} " in f" {flat(other)} " for other in others
                              for i in range(len(found) - n + 1))

    def alike(a, b):
        a, b = sorted((content(a), content(b)))
        if not a or not b:
            return False
        same = len(set(a) & set(b)) / len(set(a) | set(b))
        return min(same, difflib.SequenceMatcher(None, a, b, False).ratio()) >= 0.95
    texts = (record["instruction"], record["response"])
    return [rule for rule, holds in (
        ("page", asked.page and asked.page == record.get("url")), ("13-gram", shares(asked.answer, texts)),
        ("question", alike(asked.text, record["instruction"]) or shares(asked.text, texts))) if holds]


VOCABULARY = [*(f"w{i}" for i in range(40)), "what", "the", "anaemia", "stones"]


def nearly(pool, draw):
    """One text of the pool, whole or nearly so, alone or within other words."""
    some, around = list(draw.choice(pool)), draw.choice((0, 0, 0, 3))
    for _ in range(draw.choice((0, 0, 0, 1, 2))):
        some[draw.randrange(len(some))] = draw.choice(VOCABULARY)
    some = some[draw.choice((0, 0, 0, 1)):]
    return " ".join(draw.choices(VOCABULARY, k=around) + some + draw.choices(VOCABULARY, k=around))


@pytest.mark.parametrize("seed", range(6))
def test_the_tables_find_as_much_as_brute_force(seed):
    draw, found = random.Random(seed), Counter()
    pool = [draw.choices(VOCABULARY, k=draw.choice((2, 3, 6, 8, 9, 12, 13, 14, 25, 45))) for _ in range(12)]
    pages = [None, *"abcdefgh"]
    questions = [question(nearly(pool, draw), nearly(pool, draw), draw.choice(pages)) for _ in range(25)]
    scanner, read = Scanner(questions), [Evaluated.read(asked) for asked in questions]
    for _ in range(40):
        record = row(nearly(pool, draw), nearly(pool, draw), url=draw.choice(pages))
        hits = scanner.hits(record)
        expected = [(number, rule) for number, asked in enumerate(questions) for rule in plain_reasons(asked, record)]
        assert [(number, rule) for number, rule, _ in hits] == expected
        record = Record(record)
        assert hits == [(number, *reason) for number, asked in enumerate(read) for reason in reasons(asked, record)]
        found.update(rule for _, rule in expected)
    assert min(found[rule] for rule in leaks.MASKED["strict"]) > 10  # there was something to find


def test_a_long_question_is_found_whichever_word_is_missing():
    text = [f"w{i:02}" for i in range(40)]
    scanner = Scanner([question(" ".join(text))])
    for i in range(40):  # an overlap of 39 / 40, and function words between, so that no 13-gram finds it
        hit, = scanner.hits(row(" the ".join(text[:i] + text[i + 1:])))
        assert hit[:2] == (0, "question") and hit[2].startswith("similarity 0.975")


def test_a_question_is_found_with_its_options():
    names = ["Allopurinol", "Aspirin", "Atenolol", "Abacavir"]
    scanner = Scanner([question("Which drug?", options=dict(zip("ABCD", names, strict=True)))])
    for text in ("Which drug?", f"Which drug? {', '.join(names)}",
                 "Which drug?\nA. Allopurinol\nB. Aspirin\nC. Atenolol\nD. Abacavir"):
        assert [hit[1] for hit in scanner.hits(row(text))] == ["question"]


@pytest.mark.parametrize("length", [8, 9, 12, 13, 14, 20])
def test_a_run_is_found_wherever_it_begins_and_a_shorter_one_is_no_hit(length):
    answer, n = ANSWER[:length], min(length, 13)
    scanner = Scanner([question(answer=" ".join(answer))])
    for start in range(length - n + 1):
        run = answer[start:start + n]
        for around in range(8):
            other = ["before"] * around
            assert [hit[:2] for hit in scanner.hits(row(response=" ".join(other + run + other)))] == [(0, "13-gram")]
            assert scanner.hits(row(response=" ".join(other + run[:-1] + other))) == []


def test_nothing_to_compare_with_finds_nothing():
    assert Scanner([]).hits(row()) == [] and Scanner([question("", "")]).hits(row("x", "…")) == []

# ----- files ---------------------------------------------------------------------------------------------------------


def an_index(path, rows, field="instruction", **changes):
    path.mkdir()
    write_jsonl(path / "records.jsonl", rows)
    write_json(path / "manifest.json", {"format": FORMAT, "field": field} | changes)
    return path


def test_a_scan_of_all_kinds_of_files(tmp_path):
    asked = [question("What is gout?", where="medqa.jsonl:7"), question("And fever?", page="p", where="b.json: row 2")]
    jsonl = write_jsonl(tmp_path / "a.jsonl", [row(), row("What is gout")])
    write_jsonl(tmp_path / "b.jsonl.gz", [row("Gout", url="p")])
    write_json(tmp_path / "c.json", [row("and FEVER")])
    index = an_index(tmp_path / "index", [{"title": "Gout"}, {"title": "Cold"}], "title")
    counts = {}
    found = list(scan([jsonl, tmp_path / "b.jsonl.gz", tmp_path / "c.json", index], asked, counts))
    assert [tuple(hit.values()) for hit in found] == [
        ("medqa.jsonl:7", f"{jsonl}:2", "question", "similarity 1.000: What is gout"),
        ("medqa.jsonl:7", f"{tmp_path}/b.jsonl.gz:1", "question", "similarity 1.000: Gout"),
        ("b.json: row 2", f"{tmp_path}/b.jsonl.gz:1", "page", "p"),
        ("b.json: row 2", f"{tmp_path}/c.json: row 1", "question", "similarity 1.000: and FEVER"),
        ("medqa.jsonl:7", f"{index}/records.jsonl:1", "question", "similarity 1.000: Gout")]
    assert [*found[0]] == ["benchmark", "train", "rule", "evidence"]
    assert counts == {"rows": 6, "bad": 0, "faults": []}


def test_bad_rows_are_counted_and_said_or_stop(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": i} for i in range(6)] + [row("What is gout"), "{"])
    counts = {}
    assert len(list(scan([path], [question("Gout?")], counts))) == 1
    assert (counts["rows"], counts["bad"], len(counts["faults"])) == (8, 7, 5)
    assert counts["faults"][1].startswith(f"{path}:2: found no text under ")


def test_a_folder_that_is_no_index_is_refused(tmp_path):
    other = an_index(tmp_path / "other", [], format="else")
    with pytest.raises(InputError, match="format is 'else'; expected finemedlm-index-1"):
        list(scan([other], [], {}))
    with pytest.raises(InputError, match=r"manifest.json: no such file"):
        list(scan([tmp_path], [], {}))


HITS = [{"benchmark": "a.jsonl:1", "train": "t:1", "rule": "13-gram", "evidence": "boiler plate"},
        {"benchmark": "a.jsonl:1", "train": "t:2", "rule": "13-gram", "evidence": "boiler plate"},
        {"benchmark": "a.jsonl:1", "train": "t:3", "rule": "page", "evidence": "p"},
        {"benchmark": "a.jsonl:3", "train": "t:2", "rule": "13-gram", "evidence": "other"},
        {"benchmark": "b.json: row 1", "train": "t:9", "rule": "question", "evidence": "cosine 1.000"}]
ASKED = [question(where=where) for where in ("a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "a.jsonl:4", "b.json: row 1")]


def test_a_report_worked_out_by_hand():
    written = []
    summary = report(iter(HITS), ASKED, {"rows": 9, "bad": 1, "faults": ["x"]}, written.append, examples=1)
    assert written == HITS
    assert summary == {
        "rows": 9, "bad": 1, "faults": ["x"], "hits": {"page": 1, "13-gram": 3, "question": 1},
        "benchmarks": {
            "a.jsonl": {"questions": 4, "touched": 2, "share": 0.5, "page": 1, "13-gram": 2, "question": 0},
            "b.json": {"questions": 1, "touched": 1, "share": 1.0, "page": 0, "13-gram": 0, "question": 1}},
        "examples": {"13-gram": HITS[:1], "page": HITS[2:3], "question": HITS[4:]},
        "runs": [("boiler plate", 2), ("other", 1)]}


def test_the_command(tmp_path, capsys):
    rows = [row("What is gout?", " ".join(ANSWER), url="p"), {"text": 1}, row("So\x1b[2J what?")]
    train, out = write_jsonl(tmp_path / "train.jsonl", rows), tmp_path / "leaks.jsonl"
    asked = [question("Gout", " ".join(ANSWER), "p", where="b.jsonl:1"), question("so \x1b[2j WHAT", where="b.jsonl:2"),
             question("Fever?", where="b.jsonl:3")]
    leaks_command(SimpleNamespace(train=[train], out=out, json=False), asked)
    printed, said = capsys.readouterr()
    assert "3 rows for training or retrieval, 1 of them unreadable; pairs: page: 1, 13-gram: 1, question: 2" in printed
    assert "b.jsonl  2 of 3 (66.7%); page 1, 13-gram 1, question 2" in printed and f"all of them: {out}" in printed
    assert f"13-gram: b.jsonl:1 in {train}:1: the symptoms of night" in printed and "\x1b" not in printed
    assert "1 times: the symptoms of night" in printed
    assert said.startswith(f"warning: left out {train}:2: found no text")
    hits = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(hit["benchmark"], hit["rule"]) for hit in hits] == [
        ("b.jsonl:1", "page"), ("b.jsonl:1", "13-gram"), ("b.jsonl:1", "question"), ("b.jsonl:2", "question")]
    leaks_command(SimpleNamespace(train=[train], out=None, json=True), asked)
    summary = json.loads(capsys.readouterr().out)
    assert summary["hits"] == {"page": 1, "13-gram": 1, "question": 2} and summary["rows"] == 3


def test_the_list_of_hits_has_one_writer_and_is_whole_or_not_there(tmp_path):
    train, out = write_jsonl(tmp_path / "train.jsonl", [row(url="p")]), tmp_path / "leaks.jsonl"
    with held_elsewhere(out), pytest.raises(InputError, match="writing there"):
        leaks_command(SimpleNamespace(train=[train], out=out, json=True), [question(page="p")])
    other = tmp_path / "other.jsonl"
    with pytest.raises(InputError, match="no such file"):
        leaks_command(SimpleNamespace(train=[train, "none.jsonl"], out=other, json=True), [question(page="p")])
    assert not other.exists()

"""Rows as they come in, and the data set as it goes out: columns, files, provenance, manifest and card."""
import json
import sys

import numpy as np
import pytest
from conftest import write_jsonl

import plot
from dataset import card, corpus, data_rows, dpo_row, file_of, provenance, release, report, sample, sft_row, work_row
from files import InputError
from prompts import DEPARTMENTS, RULES, version
from retrieve import read_records
from rows import messages_of, pair_of
from synth import Run

OPTIONS = {"A": "Heparin", "B": "Warfarin"}
DONE = {"id": "1f", "source": "c.jsonl:1", "text": "Warfarin.", "language": "en", "department": "Internal Medicine",
        "specialty": "Hematology", "instruction": "Why?", "quality": 8, "difficulty": 9, "relevance": 6,
        "chosen_by": "sum", "instruction_type": "complex", "label": "verified", "ranking": [7, 4],
        "ranked_by": "score", "response": "## Thought\n\nHm.\n\n## Summarization\n\nSo.", "rejected": "No.",
        "paired": "plain", "calls": {"ask": ["k1"], "pair": ["k2"]}}

# ----- rows in -------------------------------------------------------------------------------------------------------


def test_a_text_of_a_corpus():
    row = work_row({"text": "Warfarin.", "url": "u", "token_count": 3, "domain": "med"}, "c.jsonl:1")
    assert row.pop("id") == work_row({"text": "Warfarin."}, "other.jsonl:9")["id"]
    assert row == {"source": "c.jsonl:1", "text": "Warfarin.", "language": "en", "truth": None, "questions": [],
                   "responses": [], "url": "u", "calls": {}}
    assert work_row({"text": "Warfarin!"}, "c")["id"] != work_row({"text": "Warfarin."}, "c")["id"]
    assert work_row({"text": "甲", "language": "zh"}, "c")["language"] == "zh"


@pytest.mark.parametrize("row, truth", [
    ({"question": "Q?", "options": OPTIONS, "answer_idx": "B"}, {"options": OPTIONS, "letter": "B"}),
    ({"question": "Q?", "options": ["Heparin", "Warfarin"], "answer_idx": 0}, {"options": OPTIONS, "letter": "A"}),
    ({"question": "Q?", "opa": "Heparin", "opb": "Warfarin", "answer": "Warfarin"},
     {"options": OPTIONS, "letter": "B"}),
    ({"question": "Q?", "answer": "Warfarin"}, {"reference": "Warfarin"}),
    ({"instruction": "Q?", "reference": "Warfarin", "answer": "?"}, {"reference": "Warfarin"}),
    ({"instruction": "Q?"}, None),
    ({"text": "T", "answer": "Warfarin"}, None),
])
def test_a_row_may_bring_its_question_and_its_truth(row, truth):
    found = work_row(row, "c")
    assert found["truth"] == truth and found["questions"] == (["Q?"] if "text" not in row else [])


def test_a_row_may_bring_its_response_and_one_of_ours_stays_as_it_is():
    row = {"instruction": "Q?", "question": "Q with options?", "response": "R.", "instruction_type": "complex"}
    found = work_row(row, "c")
    assert (found["instruction"], found["questions"], found["responses"]) == ("Q?", ["Q?"], [{"text": "R."}])
    assert found["instruction_type"] == "complex" and work_row(found, "elsewhere") is found


@pytest.mark.parametrize("row, message", [
    ({"title": "x"}, "found no text (keys: title); expected text, or a question under instruction or question"),
    ({"text": " "}, "found no text"), ({"text": 3}, "found no text"), ({"question": ["Q"]}, "found no text"),
    ({"question": "Q?", "options": OPTIONS, "answer_idx": "C"}, "answer_idx is 'C'"),
])
def test_a_wrong_row_is_refused_by_its_place(tmp_path, row, message):
    path = write_jsonl(tmp_path / "c.jsonl", [{"text": "T"}, row])
    with pytest.raises(InputError) as error:
        list(corpus([path]))
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)
    assert [one["text"] for one in corpus([path], limit=1)] == ["T"]
    with pytest.raises(InputError, match="not valid JSON"):
        list(corpus([write_jsonl(tmp_path / "d.jsonl", ["{"])]))


def test_a_data_set_to_be_judged_may_have_any_shape(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [
        {"instruction": "Q?", "response": "R."},
        {"messages": [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "R1"},
                      {"role": "user", "content": "Q2"}, {"role": "assistant", "content": "R2"}]}])
    assert list(data_rows(path)) == [
        {"source": f"{path}:1", "instruction": "Q?", "response": "R.", "calls": {}},
        {"source": f"{path}:2", "instruction": "Q2", "response": "R2", "calls": {}}]
    with pytest.raises(InputError, match=r"d\.jsonl:1: found no text"):
        list(data_rows(write_jsonl(tmp_path / "d.jsonl", [{"instruction": "Q?"}])))

# ----- rows out ------------------------------------------------------------------------------------------------------


def test_the_released_columns():
    assert list(sft_row(DONE).items()) == [
        ("text", "Warfarin."), ("instruction", "Why?"), ("complexity", 9), ("quality", 8), ("language", "en"),
        ("response", DONE["response"]), ("instruction_type", "complex")]
    row = dpo_row(DONE)
    assert list(row) == ["text", "complexity", "quality", "language", "prompt", "chosen", "rejected"]
    assert row["chosen"] == [{"content": DONE["response"], "role": "assistant"}]
    assert row["rejected"] == [{"content": "No.", "role": "assistant"}]
    assert [one["role"] for one in row["prompt"]] == ["user"] and row["prompt"][0]["content"].startswith("Why?\n\n")
    assert [row[name] for name in ("text", "complexity", "quality", "language")] == ["Warfarin.", 9, 8, "en"]


@pytest.mark.parametrize("department, specialty, file", [
    ("Internal Medicine", "Endocrinology", "Endocrinology"), ("Internal Medicine", "None", "InternalMedicine"),
    ("Internal Medicine", "Respiratory and Critical Care Medicine", "RespiratoryAndCriticalCareMedicine"),
    ("Other Departments", "Anesthesiology", "OtherDepartments"), ("Other Departments", "unknown", "OtherDepartments"),
    ("Surgery", "unknown", "Surgery"), ("unknown", "unknown", "Unknown"),
    ("Otorhinolaryngology (ENT)", "Dentistry (Oral Medicine)", "DentistryOralMedicine"),
    ("Otorhinolaryngology (ENT)", "Otorhinolaryngology (ENT)", "OtorhinolaryngologyENT")])
def test_the_file_of_a_row(department, specialty, file):
    assert file_of({"department": department, "specialty": specialty}) == f"{file}.jsonl"


def test_two_specialties_never_share_a_file():
    pairs = [(department, one) for department, names in DEPARTMENTS.items() for one in names
             if department != "Other Departments"]
    assert len({file_of(dict(zip(("department", "specialty"), pair))) for pair in pairs}) == len(pairs) == 25


def test_a_written_row_names_its_origin():
    found = provenance(DONE)
    assert {name: found[name] for name in ("id", "source", "instruction", "quality", "difficulty", "relevance", "label",
                                           "ranking", "calls")} == {
        "id": "1f", "source": "c.jsonl:1", "instruction": "Why?", "quality": 8, "difficulty": 9, "relevance": 6,
        "label": "verified", "ranking": [7, 4], "calls": {"ask": ["k1"], "pair": ["k2"]}}
    assert found["rules"] == {stage: version(stage) for stage in RULES if stage != "judge"}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_data_set_is_written_by_specialty_and_read_by_everyone(tmp_path):
    common = {key: value for key, value in DONE.items() if key != "rejected"} | {
        "specialty": "Cardiology", "instruction_type": "common", "difficulty": 3, "response": "So.", "id": "2"}
    (tmp_path / "stages").mkdir()
    write_jsonl(tmp_path / "stages/filter.jsonl", [DONE, common, DONE | {"id": "3", "instruction": "How?"}])
    (tmp_path / "FineMed-SFT").mkdir()
    (tmp_path / "FineMed-SFT/Old.jsonl").write_text("of an earlier run")
    run = Run(tmp_path, {})
    release(run)
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.jsonl"))
    assert files == ["FineMed-DPO/FineMed-DPO.jsonl", "FineMed-SFT/Cardiology.jsonl", "FineMed-SFT/Hematology.jsonl",
                     "provenance/FineMed-DPO/FineMed-DPO.jsonl", "provenance/FineMed-SFT/Cardiology.jsonl",
                     "provenance/FineMed-SFT/Hematology.jsonl", "stages/filter.jsonl"]
    assert [one["instruction"] for one in lines(tmp_path / "FineMed-SFT/Hematology.jsonl")] == ["Why?", "How?"]
    for file in files[:3]:
        rows, origins = lines(tmp_path / file), lines(tmp_path / "provenance" / file)
        assert len(rows) == len(origins)
        for row, origin in zip(rows, origins):
            messages = messages_of(row)
            assert origin["instruction"] in messages[0]["content"] and origin["quality"] == row["quality"]
    prompt, chosen, rejected = pair_of(lines(tmp_path / "FineMed-DPO/FineMed-DPO.jsonl")[0])
    assert prompt[0]["content"].startswith("Why?") and (chosen, rejected) == (DONE["response"], "No.")
    records, _, bad = read_records([tmp_path / file for file in files[:3]], "instruction")
    assert len(records) == 5 and bad == 0

# ----- the report ----------------------------------------------------------------------------------------------------


def test_the_manifest_and_the_card(tmp_path):
    (tmp_path / "stages").mkdir()
    write_jsonl(tmp_path / "stages/filter.jsonl", [DONE, DONE | {"quality": 5, "difficulty": 10}])
    used = {"big": {"calls": 3, "failed": 1, "repaired": 0, "prompt_tokens": 2_000_000, "completion_tokens": 500_000}}
    state = {"in": 3, "out": 2, "dropped": {"no reply": 1}, "found": {"sum": 2}, "version": "1-ab", "models": used}
    for stage in ("select", "ask"):
        (tmp_path / f"stages/{stage}.json").write_text(json.dumps(state))

    class Model:
        model = "big"
    run = Run(tmp_path, {}, teacher=Model, prices={"big": (1.5, 6.0)}, licence="CC BY 4.0", failed={"k": "timed out"},
              sources=[{"path": "c.jsonl", "rows": 3, "sha256": "ff"}])
    found = report(run)
    assert json.loads((tmp_path / "manifest.json").read_text()) == found
    assert found["models"] == {"big": {"calls": 6, "failed": 2, "repaired": 0, "prompt_tokens": 4_000_000,
                                       "completion_tokens": 1_000_000, "cost": 12.0}}
    assert list(found["stages"]) == ["ask", "select"]
    assert found["stages"]["ask"] == {key: state[key] for key in state if key != "models"}
    assert found["means"] == {"complex": {"rows": 2, "quality": 6.5, "complexity": 9.5}}
    assert found["roles"] == {"teacher": "big"} and found["failed"] == 1 and found["sources"] == run.sources
    assert found["rules"] == {stage: version(stage) for stage in RULES}
    text = (tmp_path / "README.md").read_text()
    assert text == card(found)
    for part in ("Not medical advice", "| c.jsonl | 3 | ff |", "CC BY 4.0",
                 "| ask | 3 | 2 | 1 no reply | 2 sum | 1-ab |",
                 "| big | 6 | 2 | 0 | 4000000 | 1000000 | 12.0 |", "| complex | 2 | 6.5 | 9.5 |", "teacher: big"):
        assert part in text
    kept = report(Run(tmp_path, {}), keep=True)
    assert [kept[name] for name in ("sources", "licence", "roles")] == [run.sources, "CC BY 4.0", {"teacher": "big"}]
    assert "not stated" in card(report(Run(tmp_path, {})))

# ----- the pictures --------------------------------------------------------------------------------------------------


def states(out, **counts):
    for stage, (before, after) in counts.items():
        (out / "stages").mkdir(exist_ok=True)
        (out / f"stages/{stage}.json").write_text(json.dumps({
            "in": before, "out": after, "dropped": {"leak": before - after} if before > after else {}, "found": {},
            "version": "1", "models": {}}))


def test_a_report_draws_what_there_is_and_says_what_there_is_not(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plot, "DPI", 20)
    monkeypatch.setattr(plot, "draw_stages", lambda figure, stages, name: drawn.update(stages=stages))
    monkeypatch.setattr(plot, "draw_scores", lambda figure, scores: drawn.update(scores=scores))
    monkeypatch.setattr(plot, "in_the_plane", lambda vectors: vectors[:, :2])  # t-SNE takes seconds
    monkeypatch.setattr(plot, "draw_vectors", lambda figure, *more: drawn.update(vectors=more))
    states(tmp_path, ask=(3, 2))
    found = report(Run(tmp_path, {}), draw=True)
    assert found["pictures"] == {"stages": "figures/stages.png",
                                 "scores": "no scores yet; expected the stage filter or judge to have run",
                                 "departments": "no --encoder; expected the folder of an embedding model"}
    assert (drawn["stages"]["ask"]["in"], drawn["stages"]["ask"]["out"]) == (3, 2)
    assert "![stages](figures/stages.png)" in card(found) and "No picture of departments: no --encoder" in card(found)

    rows = [DONE | {"id": str(i), "instruction": f"Q{i}", "department": f"D{i % 2}", "difficulty": 9 + i % 2}
            for i in range(30)]
    write_jsonl(tmp_path / "stages/filter.jsonl", rows)
    for name, scores in {"ours": [(7, 5), (9, 6)], "theirs": [(4, 3)]}.items():
        write_jsonl(tmp_path / f"stages/judge-{name}.jsonl", [
            {"source": "s", "instruction": "Q", "quality": q, "complexity": c, "calls": {}} for q, c in scores])
    asked = []

    def encode(texts):
        asked.extend(texts)
        return np.eye(30, dtype=np.float32)[[int(text[1:]) for text in texts]]
    found = report(Run(tmp_path, {}, encode=encode), keep=True, draw=True)
    assert found["pictures"] == {name: f"figures/{name}.png" for name in ("stages", "scores", "departments")}
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == [
        "departments.png", "scores.png", "stages.png"]
    assert {name: {column: sorted(values) for column, values in one.items()} for name, one in drawn["scores"].items()
            } == {"this data set (teacher)": {"quality": [8] * 30, "complexity or difficulty": [9] * 15 + [10] * 15},
                  "ours (judge)": {"quality": [7, 9], "complexity or difficulty": [5, 6]},
                  "theirs (judge)": {"quality": [4], "complexity or difficulty": [3]}}
    points, labels, name, key = drawn["vectors"]
    assert points.tolist() == [[float(text == "Q0"), float(text == "Q1")] for text in asked]
    assert labels == [f"D{int(text[1:]) % 2}" for text in asked]
    assert sorted(asked) == sorted(row["instruction"] for row in rows) and key == "department"
    assert found["means"]["ours, judged"] == {"rows": 2, "quality": 8.0, "complexity": 5.5}
    assert found["means"]["theirs, judged"] == {"rows": 1, "quality": 4.0, "complexity": 3.0}
    assert report(Run(tmp_path, {}), keep=True)["pictures"] == found["pictures"]  # a stage by itself draws nothing


def test_without_matplotlib_the_report_has_its_counts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    states(tmp_path, ask=(3, 2))
    found = report(Run(tmp_path, {}), draw=True)
    assert found["stages"]["ask"]["out"] == 2 and (tmp_path / "README.md").exists()
    assert found["pictures"]["stages"].startswith("stages.png: found no matplotlib to draw with; expected pip install")


def test_a_picture_has_at_most_so_many_questions_of_each_department(tmp_path):
    rows = [DONE | {"id": str(i), "instruction": f"Q{i}", "department": "B" if i < 9 else "A"} for i in range(12)]
    for name, one in (("a.jsonl", rows), ("b.jsonl", rows[::-1])):
        write_jsonl(tmp_path / name, one)
    labels, questions = sample(tmp_path / "a.jsonl", 4)
    assert labels == ["A"] * 3 + ["B"] * 4 and sorted(questions[:3]) == ["Q10", "Q11", "Q9"]
    assert len({*questions}) == 7 and (labels, questions) == sample(tmp_path / "b.jsonl", 4)
    assert sorted(questions[3:]) not in (["Q0", "Q1", "Q2", "Q3"], ["Q5", "Q6", "Q7", "Q8"])  # drawn

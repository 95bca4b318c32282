"""report.py beside numbers worked out by hand, on folders written here."""
import json

import pytest

import report
from files import InputError

ARMS = {"none": 4, "nearest": 4, "context:k=2": 2, "random": 4}


def write_run(folder, measure, rows, arms=ARMS, timings=()):
    """An evaluation's folder; rows {arm: [{the measure's fields}, …]}."""
    folder.mkdir()
    settings = {"measure": measure, "benchmark": "medqa", "model": "models/x",
                "arms": {name: {"name": name, "k": k} for name, k in arms.items()}}
    (folder / "config.json").write_text(json.dumps(settings))
    lines = [json.dumps({"number": i, "arm": arm, "group": str(i // 2), **own[i]})
             for i in range(len(rows[next(iter(arms))])) for arm, own in rows.items()]
    (folder / "results.jsonl").write_text("".join(line + "\n" for line in lines))
    (folder / "timings.jsonl").write_text("".join(json.dumps(one) + "\n" for one in timings))
    return folder


def bpb(*values):
    return [{"bpb": value, "nats": value, "bytes": 1, "tokens": 1} for value in values]


def choices(letters, gold="AABB", margins=None, p_gold=None, options=2):
    """Rows of loglik; the last question has `options`, the others have two."""
    margins, p_gold = margins or [1.0] * len(letters), p_gold or [0.5] * len(letters)
    rows = [{"gold": g, "choice": c, "correct": c == g, "choice_by_byte": "A", "correct_by_byte": g == "A",
             "margin": m, "p_gold": p, "logps": [-1.0, -2.0]} for c, g, m, p in zip(letters, gold, margins, p_gold)]
    rows[-1]["logps"] = [-1.0] * options
    return rows


def test_every_arm_is_compared_with_the_first_and_with_its_control_at_the_same_k():
    arms = {"none": 4, "nearest:k=2": 2, "nearest": 4, "random": 4, "context:k=2": 2, "context": 4,
            "nearest+context": 4}
    pairs = report.pairs_of(arms)
    assert pairs[0] == ("nearest:k=2", "context:k=2")  # the first of nearest − context
    assert set(pairs) == {*((arm, "none") for arm in list(arms)[1:]), ("nearest:k=2", "random"), ("nearest", "random"),
                          ("nearest:k=2", "context:k=2"), ("nearest", "context"), ("nearest+context", "context")}
    assert len(pairs) == len(set(pairs))
    assert report.pairs_of(arms, ("random", "context"))[0] == ("random", "context")
    assert report.pairs_of(arms, ("nearest", "none"))[0] == ("nearest", "none")
    assert report.pairs_of({"none": 4}) == [] and report.pairs_of({"none": 4, "random": 4}) == [("random", "none")]


def test_a_summary_compares_arms_at_the_same_k(tmp_path):
    arms = {"none": 4, "nearest:k=2": 2, "nearest": 4, "context:k=2": 2, "context": 4}
    found = report.summarise(write_run(tmp_path / "run", "bpb", dict.fromkeys(arms, bpb(1.0, 2.0, 3.0, 4.0)), arms))
    pairs = {(one["arm"], one["against"]) for one in found["comparisons"]}
    assert pairs == {*((arm, "none") for arm in list(arms)[1:]), ("nearest:k=2", "context:k=2"), ("nearest", "context")}


def test_means_and_differences_by_hand(tmp_path):
    """nearest − none is −0.1, −0.2, 0, +0.1: a mean of −0.05; one of four is worse by more than 1 %."""
    timings = [{"arm": "nearest", "questions": 1, "seconds": 3.0, "memory_gb": 1.5},
               {"arm": "nearest", "questions": 3, "seconds": 5.0, "memory_gb": 1.0}]
    folder = write_run(tmp_path / "run", "bpb", {
        "none": bpb(1.0, 1.0, 2.0, 2.0), "nearest": bpb(0.9, 0.8, 2.0, 2.1),
        "context:k=2": bpb(1.0, 1.0, 2.019, 2.0201), "random": bpb(1.0, 1.0, 2.0, 2.0)}, timings=timings)
    found = report.summarise(folder)
    assert found == json.loads((folder / "summary.json").read_text()) and found["questions"] == 4
    nearest = found["arms"]["nearest"]
    assert nearest["mean"] == pytest.approx(1.45) and nearest["seconds"] == 2.0 and nearest["memory_gb"] == 1.5
    by_pair = {(one["arm"], one["against"]): one for one in found["comparisons"]}
    one = by_pair["nearest", "none"]
    assert one["difference"] == pytest.approx(-0.05) and one["worse"]["count"] == 1 and one["clusters"] == 2
    assert by_pair["context:k=2", "none"]["worse"]["count"] == 1  # 2.019 is 0.95 % worse, 2.0201 is 1.005 %
    assert by_pair["nearest", "context:k=2"]["primary"] and "p_holm" not in by_pair["nearest", "context:k=2"]
    others = [one for one in found["comparisons"] if not one["primary"]]
    assert len(others) == 4 and [one["p_holm"] for one in others] == report.stats.holm([one["p"] for one in others])


def test_accuracy_baselines_and_changed_answers(tmp_path):
    """none has A A B A of gold A A B B; context:k=2 gains the last and loses the first."""
    folder = write_run(tmp_path / "run", "loglik", {
        "none": choices("AABA", margins=[1.0, 1.0, 1.0, -1.0]), "nearest": choices("AABA"),
        "context:k=2": choices("BABB", margins=[-1.0, 1.0, 1.0, 3.0]), "random": choices("AABA")})
    found = report.summarise(folder)
    none = found["arms"]["none"]
    assert none["accuracy"] == 0.75 and none["mean"] == 0.5 and none["accuracy_by_byte"] == 0.5
    assert (none["accuracy_low"], none["accuracy_high"]) == report.stats.wilson(3, 4)
    assert found["baselines"] == {"majority": 0.5, "random": 0.5}
    one = next(one for one in found["comparisons"] if (one["arm"], one["against"]) == ("context:k=2", "none"))
    assert one["difference"] == pytest.approx(0.5) and (one["mcnemar"]["gained"], one["mcnemar"]["lost"]) == (1, 1)
    assert one["mcnemar"]["p"] == 1.0 and "p_holm" in one["mcnemar"]


def test_a_choice_that_changed_by_hand(tmp_path, capsys):
    """Of four questions in two pages, context:k=2 gains the last two and loses none; the right option loses 0.02 of its
    probability on the first, 0.005 on the second; the last question has four options."""
    rows = {"none": choices("AAAA", p_gold=[0.9, 0.9, 0.2, 0.2], options=4),
            "context:k=2": choices("AABB", p_gold=[0.88, 0.895, 0.6, 0.6], margins=[1.0, 1.0, 2.0, 3.0], options=4)}
    found = report.summarise(write_run(tmp_path / "run", "loglik", rows, {"none": 4, "context:k=2": 2}))
    one, = found["comparisons"]
    assert (one["mcnemar"]["gained"], one["mcnemar"]["lost"]) == (2, 0)
    assert one["mcnemar"]["smallest_effect"] is None  # of two questions: larger than any difference could be
    assert one["worse"]["count"] == 1 and found["baselines"]["random"] == pytest.approx((3 / 2 + 1 / 4) / 4)
    assert (one["accuracy"]["difference"], one["accuracy"]["clusters"], one["accuracy"]["n"]) == (0.5, 2, 4)
    report.show(found)
    lines = capsys.readouterr().out.splitlines()
    low, high = report.stats.wilson(2, 4)
    assert f"| 50.0%    | {low:.1%} to {high:.1%} " in lines[3]
    assert "; 2 became right and 0 wrong (McNemar p = 0.5 by Holm; could have seen –); accuracy +50.0% (" in lines[-1]
    assert report.gains("generate", rows["context:k=2"], rows["none"]).tolist() == [0, 0, 1, 1]
    hundred = [rows["none"][i % 4] | {"number": i, "group": str(i)} for i in range(100)]
    changed = [row | {"correct": not row["correct"]} if i < 20 else row for i, row in enumerate(hundred)]
    found = report.compared("loglik", changed, hundred, ("b", "a"), True)["mcnemar"]
    assert found["smallest_effect"] == report.stats.smallest_accuracy_effect(0.2, 100)


def test_questions_of_one_page_have_no_interval(tmp_path, capsys):
    folder = write_run(tmp_path / "run", "bpb", {"none": bpb(1.0, 1.2), "random": bpb(1.5, 1.6)},
                       {"none": 4, "random": 4})
    report.show(report.summarise(folder))
    found = json.loads((folder / "summary.json").read_text(), parse_constant=pytest.fail)  # JSON has no Infinity
    assert found["comparisons"][0]["low"] is None and found["arms"]["none"]["high"] is None
    out = capsys.readouterr().out
    assert "– to –" in out and "no difference was shown; the run could have seen –;" in out


def test_laxer_scorers_stand_beside(tmp_path, capsys):
    last_and_first = (("A", "B"), ("B", "A"), (None, "A"), ("A", "A"))
    rows = [{"gold": "A", "choice": last, "correct": last == "A", "first": first, "truncated": last is None,
             "best_of_two": "A" if "A" in (last, first) else first} for last, first in last_and_first]
    found = report.summarise(write_run(tmp_path / "run", "generate", {"none": rows}, {"none": 4}))
    none = found["arms"]["none"]
    assert [none[key] for key in ("accuracy", "unparsed", "truncated", "first_match", "best_of_two")] \
        == [0.5, 0.25, 0.25, 0.75, 1.0]
    assert none["without_unparsed"] == pytest.approx(2 / 3) and found["comparisons"] == []
    report.show(found)
    said = capsys.readouterr().out
    assert "first match 75.0%, the better of first and last 100.0%, without the unparsed 66.7%" in said


def test_kinds_of_questions_are_told_apart(tmp_path):
    rows = [row | {"kind": kind} for row, kind in zip(choices("AAAA"), ("single", "multi", "single", "multi"))]
    found = report.summarise(write_run(tmp_path / "run", "loglik", {"none": rows}, {"none": 4}))
    assert {kind: (own["n"], own["accuracy"]) for kind, own in found["arms"]["none"]["by_kind"].items()} \
        == {"single": (2, 0.5), "multi": (2, 0.5)}


def test_the_table_and_the_sentences(tmp_path, capsys):
    folder = write_run(tmp_path / "run", "bpb", {"none": bpb(1.0, 1.2, 0.9, 1.1), "random": bpb(1.5, 1.6, 1.4, 1.6)},
                       {"none": 4, "random": 4})
    report.show(report.summarise(folder))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "medqa, 4 questions, models/x" and lines[3].startswith("| none   | 1.0500 ")
    assert lines[-1].startswith("random − none: +0.4750 bits per byte (") and "the primary comparison" in lines[-1]
    assert "4 of 4 questions became worse by more than 1 % (at most 100% of all)" in lines[-1]


@pytest.mark.parametrize("measure, difference, verdict", [
    ("bpb", -0.1, "better"), ("bpb", 0.1, "worse"), ("loglik", 0.1, "better"), ("generate", -0.1, "worse")])
def test_less_is_better_of_bits_and_worse_of_margins(measure, difference, verdict):
    comparison = {"arm": "a", "against": "b", "primary": True, "difference": difference, "p": 0.01, "n": 9,
                  "low": difference - 0.05, "high": difference + 0.05, "smallest_effect": 0.1,
                  "worse": {"count": 1, "upper": 0.4}}
    assert f"; {verdict}; the run could have seen 0.1000;" in report.sentence(measure, comparison)
    comparison |= {"p": 0.06}
    assert "; no difference was shown;" in report.sentence(measure, comparison)


def test_a_verdict_is_that_of_the_corrected_p():
    comparison = {"arm": "a", "against": "b", "primary": False, "difference": 0.2, "p": 0.03, "p_holm": 0.2, "n": 9,
                  "low": 0.1, "high": 0.3, "smallest_effect": 0.1, "worse": {"count": 1, "upper": 0.4}}
    assert "p = 0.2 by Holm); no difference was shown;" in report.sentence("loglik", comparison)
    assert "p = 0.04 by Holm); better;" in report.sentence("loglik", comparison | {"p_holm": 0.04})


def test_two_arms_are_compared_once():
    assert report.pairs_of({"nearest": 4, "context": 4}) == [("nearest", "context")]
    assert report.pairs_of({"nearest": 4, "context": 4}, ("context", "nearest")) == [("context", "nearest")]
    assert report.pairs_of({"none": 4, "random": 4}, ("none", "random")) == [("none", "random")]


def test_answers_that_were_cut_elsewhere_are_not_compared():
    rows = [{"number": i, "group": str(i), **bpb(1.0)[0]} for i in range(3)]
    others = [*rows[:2], rows[2] | {"bytes": 2}]
    with pytest.raises(InputError, match=r"b and a: found question \(and bytes of its answer\) \(2, 2\) and \(2, 1\)"):
        report.compared("bpb", others, rows, ("b", "a"), True)
    with pytest.raises(InputError, match="2 and 3; expected the same"):
        report.compared("bpb", rows[:2], rows, ("b", "a"), True)


def test_records_are_counted_once_and_questions_without_a_step_are_shown(tmp_path, capsys):
    def with_records(left_out, **more):
        return [row | {"masked": {"page": 2}, "left_out": left_out, **more} for row in bpb(1.0, 1.0)]
    folder = write_run(tmp_path / "run", "bpb", {
        "nearest": with_records(1, applied=False), "context:k=2": with_records(1),
        "random": with_records(0, applied=True)}, {"nearest": 4, "context:k=2": 2, "random": 4})
    found = report.summarise(folder)
    assert found["records"] == {"masked": {"page": 8}, "left_out": 2}
    assert [arm.get("not_adapted") for arm in found["arms"].values()] == [2, None, 0]
    report.show(found)
    out = capsys.readouterr().out
    assert "nearest: 2 of 2 questions were answered without a step" in out and out.count("without a step") == 1


def test_the_folder_of_something_else_and_a_run_stopped_between_questions_are_refused(tmp_path):
    folder = write_run(tmp_path / "run", "bpb", {"none": bpb(1.0, 1.0)}, {"none": 4})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"questions": 3}))
    with pytest.raises(InputError, match="not every question has a result of every arm"):
        report.summarise(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"config.json: found no arms; expected the folder of an evaluation"):
        report.results_of(folder)


def test_a_run_that_is_not_finished_is_refused(tmp_path):
    folder = write_run(tmp_path / "run", "bpb", {"none": bpb(1.0, 1.0)}, {"none": 4, "random": 4})
    with pytest.raises(InputError, match="not every question has a result of every arm"):
        report.summarise(folder)
    with open(folder / "results.jsonl", "a") as file:
        file.write(json.dumps({"number": 0, "arm": "random", "group": "0", **bpb(1.0)[0]}) + "\n")
    with pytest.raises(InputError, match="not every question has a result of every arm"):
        report.summarise(folder)

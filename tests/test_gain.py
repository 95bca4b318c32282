"""bench/gain.py: percent of `none`, the mean over seeds, the questions that lose, and what cannot be compared."""
import json

import numpy as np
import pytest
from conftest import write_jsonl

from bench import gain
from files import InputError
from stats import paired


def evaluation(folder, values_of, seed=0, **more):
    """A finished evaluation; values_of {arm: [bits per byte of each question]}."""
    folder.mkdir()
    settings = {"data_sha256": "d", "limit": None, "measure": "bpb", "weights": "w", "index_manifest": "i",
                "leaks": "strict", "seed": seed, "arms": {arm: {"k": 4} for arm in values_of}, "questions": 4}
    (folder / "config.json").write_text(json.dumps(settings | more))
    rows = [{"number": n, "arm": arm, "group": str(n), "bpb": value} | ({"applied": n > 1} if arm == "ttt" else {})
            for arm, values in values_of.items() for n, value in enumerate(values)]
    write_jsonl(folder / "results.jsonl", rows[::-1] if seed else rows)
    write_jsonl(folder / "timings.jsonl", [{"arm": row["arm"], "questions": 2, "seconds": 2.0 + 4 * row["number"]}
                                           for row in rows])
    return folder


def test_an_arm_in_percent_of_none(tmp_path, capsys):
    none = [1.0, 2.0, 3.0, 4.0]
    folders = [evaluation(tmp_path / "a", {"none": none, "ttt": [1.016, 1.0, 3.0, 4.0]}),
               evaluation(tmp_path / "b", {"none": none, "ttt": [1.0, 1.0, 3.0, 4.0]}, seed=1),
               evaluation(tmp_path / "c", {"none": [2.0] * 4, "context:k=1": [1.0, 1.5, 2.5, 2.015]}, limit=4)]
    cells, primary = gain.cells_of(folders)
    assert not primary and list(cells) == ["a", "c"] and list(cells["a"]) == ["none", "ttt"]
    found = gain.change(cells["a"]["none"], cells["a"]["ttt"])
    both = paired(np.array(none), np.array([1.008, 1.0, 3.0, 4.0]), "0123")
    assert found["change"] == pytest.approx(100 * (0.008 - 1.0) / 10)
    assert [found["low"], found["high"]] == pytest.approx([40 * both["low"], 40 * both["high"]])
    assert found["by_seed"] == pytest.approx([-9.84, -10.0])
    assert (found["worse"], found["n"]) == (0, 4)  # 0.8 % in the mean of both seeds
    other = gain.change(cells["c"]["none"], cells["c"]["context:k=1"])
    assert other["change"] == pytest.approx(-100 * 0.985 / 8) and other["worse"] == 1
    # Clopper & Pearson's bound of 0 and of 1 of 4: (1 - x)^4 = 0.05, and (1 - x)^4 + 4 x (1 - x)^3 = 0.05
    assert (found["most"], other["most"]) == (pytest.approx(0.52713, abs=1e-5), pytest.approx(0.75140, abs=1e-5))
    assert np.median(cells["a"]["ttt"]["seconds"]) == 4.0 and cells["a"]["ttt"]["kept"] == {True: 4, False: 4}
    gain.show(cells, {"a": ["ttt", "none"]})
    out = capsys.readouterr().out
    assert "ttt − none, the primary comparison: −9.9 (" in out
    assert "a: 2.5000 bits per byte" in out and "| 4 of 8 " in out and "| −9.8, −10.0 |" in out


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"a: found bpb and the arms ttt; expected bpb, and none and another"):
        gain.cells_of([evaluation(tmp_path / "a", {"ttt": [1.0] * 4})])
    with pytest.raises(InputError, match=r"b: found loglik"):
        gain.cells_of([evaluation(tmp_path / "b", {"none": [1.0] * 4}, measure="loglik")])
    with pytest.raises(InputError, match=r"f: found bpb and the arms none; expected bpb, and none and another"):
        gain.cells_of([evaluation(tmp_path / "f", {"none": [1.0] * 4})])
    arms = {"none": [1.0] * 4, "ttt": [1.0] * 4}
    settings = {"none": {"k": 4}, "ttt": {"k": 4, "sure": 0.3}}
    folders = [evaluation(tmp_path / "c", arms), evaluation(tmp_path / "d", arms, 1, arms=settings)]
    with pytest.raises(InputError, match=r"d: the arm ttt has the settings {'k': 4, 'sure': 0.3}, and {'k': 4} in"):
        gain.cells_of(folders)
    other = evaluation(tmp_path / "e", arms, record_tokens=64, primary=["ttt", "none"])
    assert [list(found) for found in gain.cells_of([folders[0], other])] == [["c", "e"], ["e"]]
    (folders[0] / "timings.jsonl").unlink()
    with pytest.raises(InputError, match=r"c/timings.jsonl: found times of no arm; expected of none, ttt"):
        gain.cells_of(folders[:1])


def test_the_primary_comparison_is_in_percent_of_none():
    none, one, other = ({"bpb": [values], "groups": "0123"}
                        for values in ([2.0] * 4, [1.0] * 4, [1.5, 1.25, 1.5, 1.75]))
    found = gain.change(none, one, other)
    assert found["change"] == pytest.approx(-25) and found["low"] < -25 < found["high"] and found["worse"] == 0
    assert gain.change(none, other, one)["worse"] == 4 and found["by_seed"] == pytest.approx([-25])


def test_a_rank_without_a_question_has_no_seconds_a_question(tmp_path):
    folder = evaluation(tmp_path / "a", {"none": [1.0] * 4, "ttt": [1.0] * 4})
    with open(folder / "timings.jsonl", "a") as file:
        file.write(json.dumps({"arm": "none", "questions": 0, "seconds": 0.0}) + "\n")
    assert gain.cells_of([folder])[0]["a"]["none"]["seconds"] == [1.0, 3.0, 5.0, 7.0]


def test_the_picture_has_a_panel_a_cell_and_a_point_an_arm(tmp_path):
    figure_of = pytest.importorskip("matplotlib.figure", reason="pictures need matplotlib, of the extra plot")
    arms = {"none": [2.0] * 4, "ttt": [1.0, 1.5, 2.5, 2.0]}
    cells, _ = gain.cells_of([evaluation(tmp_path / name, arms, weights=name) for name in "ab"])
    gain.draw(figure := figure_of.Figure(), cells)
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [line.get_xydata().tolist() for line in points] == [[[4.0, -12.5]]]

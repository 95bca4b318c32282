"""bench/gain.py: percent of `none`, the mean over seeds, the questions that lose, and what cannot be compared."""
import json

import numpy as np
import pytest
from conftest import write_jsonl

from bench import gain
from files import InputError
from stats import paired


def evaluation(folder, arms, seed=0, **more):
    """A finished evaluation; arms {name: [bits per byte of each question]}."""
    folder.mkdir()
    settings = {"data_sha256": "d", "limit": None, "measure": "bpb", "weights": "w", "index_manifest": "i",
                "leaks": "strict", "seed": seed, "arms": dict.fromkeys(arms), "questions": 4}
    (folder / "config.json").write_text(json.dumps(settings | more))
    rows = [{"number": n, "arm": arm, "group": str(n), "bpb": value} | ({"applied": n > 1} if arm == "ttt" else {})
            for arm, values in arms.items() for n, value in enumerate(values)]
    write_jsonl(folder / "results.jsonl", rows[::-1] if seed else rows)
    write_jsonl(folder / "timings.jsonl", [{"arm": row["arm"], "questions": 2, "seconds": 2.0 + 4 * row["number"]}
                                           for row in rows])
    return folder


def test_an_arm_in_percent_of_none(tmp_path, capsys):
    none = [1.0, 2.0, 3.0, 4.0]
    folders = [evaluation(tmp_path / "a", {"none": none, "ttt": [1.016, 1.0, 3.0, 4.0]}),
               evaluation(tmp_path / "b", {"none": none, "ttt": [1.0, 1.0, 3.0, 4.0]}, seed=1),
               evaluation(tmp_path / "c", {"none": [2.0] * 4, "context:k=1": [1.0, 1.5, 2.5, 2.015]}, limit=4)]
    cells = gain.cells_of(folders)
    assert list(cells) == ["a", "c"] and list(cells["a"]) == ["none", "ttt"]
    found = gain.change(cells["a"]["none"], cells["a"]["ttt"])
    both = paired(np.array(none), np.array([1.008, 1.0, 3.0, 4.0]), "0123")
    assert found["change"] == pytest.approx(100 * (0.008 - 1.0) / 10)
    assert [found["low"], found["high"]] == pytest.approx([40 * both["low"], 40 * both["high"]])
    assert found["by_seed"] == pytest.approx([-9.84, -10.0])
    assert (found["worse"], found["n"]) == (0, 4)  # 0.8 % in the mean of both seeds
    other = gain.change(cells["c"]["none"], cells["c"]["context:k=1"])
    assert other["change"] == pytest.approx(-100 * 0.985 / 8) and other["worse"] == 1
    assert np.median(cells["a"]["ttt"]["seconds"]) == 4.0 and cells["a"]["ttt"]["kept"] == {True: 4, False: 4}
    gain.show(cells)
    out = capsys.readouterr().out
    assert "a: 2.5000 bits per byte" in out and "| 4 of 8 " in out and "| −9.8, −10.0 |" in out


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"a: found bpb and the arms ttt; expected bpb, and none among them"):
        gain.cells_of([evaluation(tmp_path / "a", {"ttt": [1.0] * 4})])
    with pytest.raises(InputError, match=r"b: found loglik"):
        gain.cells_of([evaluation(tmp_path / "b", {"none": [1.0] * 4}, measure="loglik")])


def test_the_picture_has_a_panel_a_cell_and_a_point_an_arm(tmp_path):
    figure_of = pytest.importorskip("matplotlib.figure", reason="pictures need matplotlib, of the extra plot")
    cells = gain.cells_of([evaluation(tmp_path / name, {"none": [2.0] * 4, "ttt": [1.0, 1.5, 2.5, 2.0]}, weights=name)
                           for name in "ab"])
    gain.draw(figure := figure_of.Figure(), cells)
    assert [axes.get_title() for axes in figure.axes] == ["a", "b"]
    points = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [line.get_xydata().tolist() for line in points] == [[[4.0, -12.5]]]

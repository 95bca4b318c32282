"""plot.py: the pictures show the given numbers; whatever cannot be drawn is refused by name."""
import contextlib
import json
import struct
import sys

import numpy as np
import pytest
from conftest import write_jsonl

import plot
import retrieve
from files import InputError

matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib, of the extra plot")
from matplotlib.figure import Figure  # noqa: E402

SFT = [{"step": 0, "val_loss": 2.5},
       {"step": 1, "finite": True, "loss": 2.75, "lr": 2e-5, "grad_norm": 3.0},
       {"step": 2, "finite": False, "loss": "nan", "lr": 4e-5, "grad_norm": "inf"},
       {"step": 3, "finite": True, "loss": 2.25, "lr": 1e-5, "grad_norm": 1.5, "val_loss": 2.0}]
DPO = [{"step": 0, "val_loss": 0.69, "val_margin": 0.0, "val_accuracy": 0.25},
       {"step": 1, "finite": True, "loss": 0.69, "lr": 1e-6, "grad_norm": 9.0, "margin": 0.5, "accuracy": 0.5},
       {"step": 2, "finite": True, "loss": 0.4, "lr": 5e-7, "grad_norm": 8.0, "margin": 1.5, "accuracy": 1.0,
        "val_loss": 0.3, "val_margin": 2.0, "val_accuracy": 0.75}]


def summary_of(arms, measure="bpb", **more):
    """A summary.json; arms {name: (seconds, mean, low, high)}, of which the first is compared with by all others."""
    keys = ("seconds", "accuracy", "accuracy_low", "accuracy_high") if measure == "generate" else (
        "seconds", "mean", "low", "high")
    return {"measure": measure, "arms": {arm: dict(zip(keys, row)) for arm, row in arms.items()}, **more}


PICTURES = ["plot-arms.png", "plot-gain.png"]
ARMS = {"none": (0.5, 1.25, 1.125, 1.5), "nearest:k=4": (2.0, 1.0, 0.75, 1.125), "random:k=4": (2.25, 1.25, 1.0, 1.375)}


def answers(key="bpb"):
    """Rows of results.jsonl: 6 questions, of which the last has no row under nearest:k=4."""
    rows = []
    for number in range(6):
        rows.append({"number": number, "arm": "none", key: 1.0 + number, "neighbours": []})
        rows.append({"number": number, "arm": "random:k=4", key: 1.5 + number, "neighbours": [
            {"id": 3, "score": 0.125}, {"id": 1, "score": 0.125 * number}]})
        rows.append({"number": number, "arm": "nearest:k=4", key: 1.0 + number - number / 8,
                     "neighbours": [{"id": 0, "score": 1 - number / 16}, {"id": 1, "score": 0.5}]})
    return rows[:-1]


def evaluation(folder, summary=None, rows=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(summary or summary_of(ARMS)))
    write_jsonl(folder / "results.jsonl", answers() if rows is None else rows)
    return folder


def index(folder, vectors, records):
    """An index as retrieve.py writes it, without an encoder."""
    vectors = np.asarray(vectors, dtype=np.float32)
    retrieve.Index(vectors, records, {"format": retrieve.FORMAT, "encoder": {"directory": "encoder"}, "field": "q",
                                      "factory": "Flat", "count": len(records), "dimension": vectors.shape[1]}
                   ).save(folder)
    return folder


def two_clusters(n=20):
    """(float32 [2n, 8] of length 1 around two directions, [the label of each])."""
    rng = np.random.default_rng(1)
    vectors = 0.2 * rng.standard_normal((2 * n, 8))
    vectors[::2, 0] += 1
    vectors[1::2, 1] += 1
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), ["a", "b"] * n


@pytest.fixture
def figure():
    return Figure(figsize=(plot.WIDTH, plot.HEIGHT), dpi=plot.DPI, layout="constrained")


def drawn(axes):
    """{label: [(x, y)]} of the lines and points."""
    return {line.get_label(): [tuple(point) for point in line.get_xydata().tolist()] for line in axes.lines}


def texts(axes):
    return [text.get_text() for text in axes.texts if text.get_text()]


def titled(figure):
    """{title of a panel: its axes}."""
    return {axes.get_title(loc="left") or axes.get_title(): axes for axes in figure.axes}

# ----- which kind ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["run", "metrics", "evaluation", "results", "scores", "array", "vectors"])
def test_each_kind_is_recognised(tmp_path, kind):
    write_jsonl(tmp_path / "metrics.jsonl", SFT)
    write_jsonl(tmp_path / "other.jsonl", SFT)
    evaluation(tmp_path / "evals")
    write_jsonl(tmp_path / "judged.jsonl", [{"text": "x"}, {"text": "x", "difficulty": 4}])
    (tmp_path / "judged.json").write_text(json.dumps([{"quality": 4.5}]))
    index(tmp_path / "index", np.eye(3), [{"q": str(i)} for i in range(3)])
    given, expected = {
        "run": ("", ("run", "metrics.jsonl")), "metrics": ("other.jsonl", ("run", "other.jsonl")),
        "evaluation": ("evals", ("evaluation", "evals")), "results": ("evals/results.jsonl", ("evaluation", "evals")),
        "scores": ("judged.jsonl", ("scores", "judged.jsonl")), "array": ("judged.json", ("scores", "judged.json")),
        "vectors": ("index", ("vectors", "index"))}[kind]
    assert plot.kind_of(tmp_path / given) == (expected[0], tmp_path / expected[1])


@pytest.mark.parametrize(("name", "content", "found"), [
    ("folder", None, "found a folder of a.txt, b.txt, c.txt, d.txt, e.txt, …"),
    ("empty", [], "found a folder of nothing"),
    ("none.jsonl", None, "no such file or folder"), ("text.txt", "Hello", "text.txt:1: not valid JSON"),
    ("rows.jsonl", '{"text": "x", "quality": "good"}\n', "found rows with text, quality;"),
    ("truth.jsonl", '{"quality": true}\n', "found rows with quality;"), ("no.jsonl", "", "found no rows"),
    ("half", ["results.jsonl"], "found a folder of results.jsonl")])
def test_anything_else_is_refused_with_what_was_found(tmp_path, name, content, found):
    path = tmp_path / name
    if name in ("folder", "empty", "half"):
        path.mkdir()
        for child in ["f.txt", "a.txt", "c.txt", "b.txt", "e.txt", "d.txt", ".x"] if content is None else content:
            (path / child).write_text("")
    elif content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as error:
        plot.draw(path)
    message = str(error.value)
    assert str(path) in message and found in message and "\n" not in message
    for expected in ("metrics.jsonl", "results.jsonl and summary.json", "quality", "vectors.safetensors"):
        assert expected in message.split("; ")[-1]

# ----- a run ---------------------------------------------------------------------------------------------------------


def test_a_run_is_drawn_step_by_step(figure):
    plot.draw_run(figure, SFT, "sft")
    panels = titled(figure)
    assert list(panels) == ["loss (nats a token)", "learning rate (times 1e-05)", "gradient norm"]
    loss, rate, norm = panels.values()
    assert drawn(loss) == {"each step": [(1, 2.75), (3, 2.25)], "held out": [(0, 2.5), (3, 2.0)],
                           "skipped": [(2, 0.02)]}
    assert [(x, pytest.approx(y)) for x, y in drawn(rate)["each step"]] == [(1, 2), (2, 4), (3, 1)]
    assert drawn(norm) == {"each step": [(1, 3.0), (3, 1.5)]}
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["each step", "held out", "skipped"]
    assert figure.get_suptitle() == "sft: held-out loss 2.500 → 2.000 in 3 steps"
    assert figure.get_supxlabel() == "optimizer step"


def test_a_dpo_run_has_margins_and_accuracy(figure):
    plot.draw_run(figure, DPO, "dpo")
    panels = titled(figure)
    assert sorted(panels) == ["accuracy (%)", "gradient norm", "learning rate (times 1e-06)", "loss",
                              "margin of the rewards"]
    assert drawn(panels["margin of the rewards"]) == {"each step": [(1, 0.5), (2, 1.5)],
                                                        "held out": [(0, 0), (2, 2)]}
    assert drawn(panels["accuracy (%)"]) == {"each step": [(1, 50), (2, 100)], "held out": [(0, 25), (2, 75)]}
    assert [title for title, axes in panels.items() if axes.get_legend()] == ["loss"]
    assert figure.get_suptitle() == "dpo: held-out accuracy 25 % → 75 % in 2 steps"


@pytest.mark.parametrize(("rows", "message"), [
    ([*SFT[1:3], {"step": 4, "loss": 1.0}], "r: loss of a step 2.750 → 1.000 in 4 steps"), (SFT[:1], "r: 0 steps")])
def test_a_run_without_held_out_rows_is_titled_by_its_loss(figure, rows, message):
    plot.draw_run(figure, rows, "r")
    assert figure.get_suptitle() == message


def test_the_last_line_of_a_killed_run_does_not_count(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2}\n{"st')
    assert plot.read_run(path) == [{"step": 1, "loss": 2}]
    path.write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}')
    assert [row["step"] for row in plot.read_run(path)] == [1, 2]


@pytest.mark.parametrize(("text", "found"), [
    ('{"step": 1}\n{"st\n', ":2: not valid JSON"), ('{"step": 1}\n{"loss": 2}\n', ":2: found step None"),
    ("", ": found no rows")])
def test_a_broken_run_is_refused(tmp_path, text, found):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=f"metrics.jsonl{found}"):
        plot.draw(tmp_path)

# ----- an evaluation -------------------------------------------------------------------------------------------------


def boxes_of_texts(axes):
    axes.figure.draw_without_rendering()
    return [text.get_window_extent() for text in axes.texts if text.get_text()]


def test_each_arm_is_a_row_with_its_interval_and_its_time(figure):
    plot.draw_arms(figure, summary_of(ARMS), "e")
    measure, times = figure.axes
    lines = drawn(measure)
    for i, (arm, (_, mean, low, high)) in enumerate(ARMS.items()):
        assert lines[arm] == [(mean, i)] and lines[f"{arm} interval"] == [(low, i), (high, i)]
    assert texts(measure) == ["1.250", "1.000", "1.250"]
    assert [text.get_color() for text in measure.texts] == [plot.BLACK, plot.BLUE, plot.BLUE]
    dashed, = (line for line in measure.lines if line.get_linestyle() == "--")
    assert dashed.get_xdata() == [1.25, 1.25]
    assert measure.get_xlabel() == "bits per byte (lower is better)"
    assert [(bar.get_width(), bar.get_y() + bar.get_height() / 2) for bar in times.patches] == [
        (0.5, 0), (2.0, 1), (2.25, 2)]
    assert texts(times) == ["0.5", "2", "2.25"] and times.get_xlabel() == "time (s a question)"
    assert [text.get_text() for text in measure.get_yticklabels()] == list(ARMS) and measure.yaxis_inverted()
    boxes = boxes_of_texts(measure)
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


def test_a_margin_stands_beside_its_accuracy(figure):
    accuracy = {"accuracy": 0.5, "accuracy_low": 0.25, "accuracy_high": 0.75}
    summary = summary_of(ARMS, "loglik")
    summary["arms"] = {arm: row | accuracy for arm, row in summary["arms"].items()}
    plot.draw_arms(figure, summary, "e")
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "nats of margin (higher is better)", "accuracy (%)", "time (s a question)"]
    margin, share, _ = map(drawn, figure.axes)
    assert margin["nearest:k=4 interval"] == [(0.75, 1), (1.125, 1)]
    assert share["nearest:k=4"] == [(50, 1)] and share["nearest:k=4 interval"] == [(25, 1), (75, 1)]


def test_accuracy_stands_beside_the_shares_without_a_model(figure):
    arms = {"none": (1.0, 0.5, 0.25, 0.75), "nearest": (2.0, 0.625, 0.5, 0.875)}
    plot.draw_arms(figure, summary_of(arms, "generate", baselines={"majority": 0.375, "random": 0.25}), "e")
    axes, _ = figure.axes
    lines = drawn(axes)
    assert lines["none"] == [(50, 0)] and lines["nearest interval"] == [(50, 1), (87.5, 1)]
    assert {text: lines[text][0][0] for text in ("random", "majority")} == {"random": 25.0, "majority": 37.5}
    assert texts(axes) == ["50.0", "62.5", "random", "majority"]
    one, other = boxes_of_texts(axes)[2:]
    assert not one.overlaps(other)


def test_gain_is_drawn_against_the_nearest_score_arm_by_arm(figure):
    plot.draw_gain(figure, summary_of(ARMS), answers(), "e")
    panels = {title: axes for title, axes in titled(figure).items() if title}
    assert list(panels) == ["nearest:k=4", "random:k=4"]  # the summary's order; none has no neighbours
    nearest, random = panels.values()
    assert drawn(nearest)["questions"] == [(0.75, 0.5), (0.8125, 0.375), (0.875, 0.25), (0.9375, 0.125), (1.0, 0.0)]
    assert drawn(nearest)["means"] == drawn(nearest)["questions"]  # a question a fifth
    assert sorted(drawn(random)["questions"]) == [(0.125, -0.5)] * 2 + [(i / 8, -0.5) for i in (2, 3, 4, 5)]
    assert drawn(random)["means"] == [(0.125, -0.5), (0.25, -0.5), (0.375, -0.5), (0.5, -0.5), (0.625, -0.5)]
    assert texts(nearest) == ["mean +0.250, n 5"] and texts(random) == ["mean -0.500, n 6"]
    assert figure.get_suptitle() == "e: gain of each question over the arm none"
    assert figure.get_supylabel() == "gain (bits per byte)"
    assert nearest.get_ylim() == random.get_ylim() and nearest.get_xlim() == random.get_xlim()


@pytest.mark.parametrize(("measure", "key"), [("loglik", "margin"), ("generate", "correct")])
def test_a_larger_margin_and_a_right_answer_are_gains(measure, key):
    gains = plot.gains_of(summary_of(ARMS, measure), answers(key))
    assert [gain for _, gain in gains["random:k=4"]] == [0.5] * 6


def test_each_gain_is_over_the_same_question_under_the_first_arm():
    rows = [{"number": 7, "arm": "none", "bpb": 4.0}, {"number": 8, "arm": "none", "bpb": 2.0},
            {"number": 8, "arm": "b", "bpb": 1.5, "neighbours": [{"score": 0.5}]},
            {"number": 9, "arm": "b", "bpb": 1.0, "neighbours": [{"score": 0.5}]}]
    assert plot.gains_of({"measure": "bpb", "arms": {"none": {}, "b": {}, "c": {}}}, rows) == {"b": [(0.5, 0.5)]}
    assert plot.gains_of({"measure": "bpb", "arms": {"none": {}}}, rows) == {}


def test_many_arms_have_a_panel_each_and_the_rest_of_the_grid_is_empty(figure):
    arms = {"none": ARMS["none"]} | {f"arm {i}": ARMS["nearest:k=4"] for i in range(5)}
    rows = [{"number": 0, "arm": arm, "bpb": 1.0, "neighbours": [{"score": 0.5}] * (arm != "none")} for arm in arms]
    plot.draw_gain(figure, summary_of(arms), rows, "e")
    assert list(titled(figure)) == [*(f"arm {i}" for i in range(5)), ""]
    assert [axes.axison for axes in figure.axes] == [True] * 5 + [False]


@pytest.mark.parametrize(("change", "found"), [
    ({"measure": "bleu"}, "summary.json: found measure 'bleu'"), ({"arms": {}}, "and arms {}"),
    ({"arms": {"none": 3}}, "arm 'none' has mean, low, high and seconds"),
    ({"arms": {"none": {"mean": 1, "low": 2, "high": 3, "seconds": 1}}}, "the first between the next two"),
    ({"measure": "loglik", "arms": {"none": {"mean": 1, "low": 0, "high": 3, "seconds": 1, "accuracy": 0.5}}},
     "accuracy_high"),
    ({"baselines": {"random": "a quarter"}}, "found baselines")])
def test_a_summary_that_cannot_be_drawn_is_refused(tmp_path, change, found):
    with pytest.raises(InputError, match=found):
        plot.draw(evaluation(tmp_path / "e", summary_of(ARMS) | change))


@pytest.mark.parametrize("change", [
    {"arm": "other"}, {"number": "1"}, {"bpb": "1.0"}, {"bpb": None}, {"neighbours": [{"id": 1}]}, {"neighbours": [1]}])
def test_a_result_that_cannot_be_drawn_is_refused(tmp_path, change):
    with pytest.raises(InputError, match=r"results.jsonl:2: found number .* expected numbers, and an arm"):
        plot.draw(evaluation(tmp_path / "e", rows=[answers()[0], answers()[0] | change]))

# ----- scores --------------------------------------------------------------------------------------------------------


def heights(axes):
    assert [bar.get_x() + bar.get_width() / 2 for bar in axes.patches] == pytest.approx(list(range(1, 11)))
    return [bar.get_height() for bar in axes.patches]


def test_scores_are_counted_in_percent_of_a_data_set(tmp_path, figure):
    one = write_jsonl(tmp_path / "one.jsonl", [{"quality": 10, "complexity": 1, "difficulty": 9}, {"text": "no score"},
                                               {"quality": 7.6, "complexity": 2}, {"quality": 8}, {"quality": 1}])
    two = write_jsonl(tmp_path / "two.jsonl", [{"difficulty": 5}])
    scores = plot.read_scores([one, two])
    assert scores == {"one": {"quality": [10, 7.6, 8, 1], "complexity or difficulty": [1, 2]},
                      "two": {"complexity or difficulty": [5]}}
    plot.draw_scores(figure, scores)
    quality, complexity, empty, difficulty = figure.axes
    assert heights(quality) == [25, 0, 0, 0, 0, 0, 0, 50, 0, 25] and heights(complexity) == [50, 50] + [0] * 8
    assert heights(difficulty) == [0] * 4 + [100] + [0] * 5 and heights(empty) == [0] * 10
    assert [texts(axes) for axes in figure.axes] == [["mean 6.7, n 4"], ["mean 1.5, n 2"], ["no scores"],
                                                     ["mean 5.0, n 1"]]
    assert quality.get_ylabel() == "one" and empty.get_ylabel() == "two"
    assert [axes.get_xlabel() for axes in (empty, difficulty)] == ["quality (1 to 10)",
                                                                   "complexity or difficulty (1 to 10)"]


def test_data_sets_of_one_name_are_told_apart(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    paths = [write_jsonl(tmp_path / name / "rows.jsonl", [{"quality": 3}]) for name in ("a", "b")]
    assert list(plot.read_scores(paths)) == paths


@pytest.mark.parametrize("score", [0, 11])
def test_a_score_outside_the_scale_is_refused(tmp_path, score):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"quality": 3}, {"quality": score}])
    with pytest.raises(InputError, match=rf"rows.jsonl:2: found quality {score}, expected a score from 1 to 10"):
        plot.draw(path)


def test_rows_in_and_out_of_every_stage(figure):
    stages = {"texts": {"in": 1200, "out": 1200, "dropped": {}},
              "ask": {"in": 1200, "out": 900, "dropped": {"leak": 50, "no reply": 200, "no two questions": 50}},
              "filter": {"in": 900, "out": 0, "dropped": {"exact": 900}}}
    plot.draw_stages(figure, stages, "ours")
    axes, = figure.axes
    out, dropped = axes.containers
    assert [bar.get_width() for bar in out] == [1200, 900, 0]
    assert [(bar.get_x(), bar.get_width()) for bar in dropped] == [(1200, 0), (900, 300), (0, 900)]
    assert [text.get_text() for text in axes.texts] == [
        "1,200 of 1,200", "900 of 1,200; 200 no reply; 50 leak; …", "0 of 900; 900 exact"]
    assert [text.get_position()[1] for text in axes.texts] == [0, 1, 2]
    assert all(text.get_position()[0] > one["in"] for text, one in zip(axes.texts, stages.values()))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["texts", "ask", "filter"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first on top
    assert figure.get_suptitle() == "ours: rows in and out of every stage"

# ----- vectors -------------------------------------------------------------------------------------------------------


def test_vectors_keep_their_labels_and_at_most_so_many_of_each(tmp_path):
    vectors, labels = two_clusters()
    records = [{"q": str(i), "of": label} for i, label in enumerate(labels)]
    records[4] = {"q": "4"}  # without a label
    folder = index(tmp_path / "index", vectors, records)
    found, kept = plot.read_vectors(folder, "of", 1000)
    assert np.array_equal(found, np.delete(vectors, 4, axis=0)) and kept == labels[:4] + labels[5:]
    found, kept = plot.read_vectors(folder, "of", 7)
    assert sorted(kept) == ["a"] * 7 + ["b"] * 7 and len(np.unique(found, axis=0)) == 14
    assert all((vector[0] > vector[1]) == (label == "a") for vector, label in zip(found, kept))
    assert np.array_equal(found, plot.read_vectors(folder, "of", 7)[0])
    assert not np.array_equal(found[:7], np.delete(vectors, 4, axis=0)[:7])  # drawn, not the first ones


def test_t_sne_is_scikit_learn_s_of_the_vectors_at_length_1():
    manifold = pytest.importorskip("sklearn.manifold", reason="t-SNE needs scikit-learn, of the extra plot")
    vectors, _ = two_clusters(15)
    lengths = 2.0 ** np.arange(-15, 15)[:, None].astype(np.float32)  # powers of 2: exact
    expected = manifold.TSNE(2, perplexity=25, init="pca", random_state=42, max_iter=1000).fit_transform(
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    assert np.array_equal(plot.in_the_plane(vectors * lengths), expected)


@pytest.mark.parametrize(("vectors", "found"), [(np.eye(25), "found 25 vectors"),
                                                (np.ones((30, 4)), "found 30 equal vectors")])
def test_vectors_that_t_sne_cannot_place_are_refused(vectors, found):
    pytest.importorskip("sklearn", reason="t-SNE needs scikit-learn, of the extra plot")
    with pytest.raises(InputError, match=found):
        plot.in_the_plane(vectors)


def test_points_are_coloured_by_label(figure):
    rng = np.random.default_rng(0)
    labels = [label for i, label in enumerate("abcdefgh") for _ in range(9 - i)]
    points = rng.random((len(labels), 2)) + [[10 * "abcdefgh".index(label), 0] for label in labels]
    plot.draw_vectors(figure, points, labels, "traces", "specialty")
    axes, = figure.axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines) == ["others", *"abcdef"] == [text.get_text() for text in axes.get_legend().get_texts()]
    assert len({line.get_color() for line in axes.lines}) == 7
    for label in "abcdef":
        own = points[[i for i, found in enumerate(labels) if found == label]]
        assert np.array_equal(lines[label].get_xydata(), own)
    assert len(lines["others"].get_xydata()) == 3 + 2
    assert figure.get_suptitle() == "traces: t-SNE of 44 questions by specialty (2 rarer values grey)"


def test_a_label_that_no_record_has_is_refused_with_those_that_would_do(tmp_path):
    folder = index(tmp_path / "index", np.eye(60), [{"q": f"{i}", "source": "ab"[i % 2], "same": 1} for i in range(60)])
    for key in (None, "specialty"):
        with pytest.raises(InputError, match=rf"no record with {key!r}, expected --label KEY, .* such as source$"):
            plot.draw(folder, label=key)


@pytest.mark.parametrize("name", ["records.jsonl", "vectors.safetensors"])
def test_an_edited_index_is_refused(tmp_path, name):
    folder = index(tmp_path / "index", np.eye(3), [{"q": str(i)} for i in range(3)])
    (folder / name).write_bytes((folder / name).read_bytes()[:-1] + b" ")
    with pytest.raises(InputError, match=f"{name}: found other bytes than manifest.json states"):
        plot.draw(folder, label="q")

# ----- input and output ----------------------------------------------------------------------------------------------


def png_size(path):
    """(width, height) in pixels."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in data[-12:]
    return struct.unpack(">II", data[16:24])


def test_pictures_stand_beside_their_input(tmp_path):
    (tmp_path / "run").mkdir()
    write_jsonl(tmp_path / "run/metrics.jsonl", SFT)
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"quality": 3}])
    written = plot.draw(tmp_path / "run", rows)
    assert written == [tmp_path / "plot-scores.png", tmp_path / "run/plot-run.png"]
    assert [png_size(path) for path in written] == [(1280, 720)] * 2


def test_an_index_is_drawn_beside_its_folder_so_that_it_can_be_replaced(tmp_path, capsys):
    pytest.importorskip("sklearn", reason="t-SNE needs scikit-learn, of the extra plot")
    vectors, labels = two_clusters(16)
    folder = index(tmp_path / "index/traces", vectors, [{"q": str(i), "of": own} for i, own in enumerate(labels)])
    assert plot.draw(folder, label="of", most=15) == [tmp_path / "index/plot-traces.png"]
    assert png_size(tmp_path / "index/plot-traces.png") == (1280, 880)
    retrieve.refuse_to_replace(folder)
    assert capsys.readouterr() == ("", "t-SNE of 30 vectors …\n")


def test_out_names_the_picture_and_begins_the_names_of_several(tmp_path, capsys):
    folder = evaluation(tmp_path / "e")
    plot.main([str(folder), "--out", str(tmp_path / "new/ladder.png"), "--json"])
    names = [str(tmp_path / f"new/ladder-{name}.png") for name in ("arms", "gain")]
    assert json.loads(capsys.readouterr().out) == {"written": names}
    assert sorted(str(path) for path in (tmp_path / "new").iterdir()) == sorted(names)
    assert [png_size(tmp_path / name)[0] for name in names] == [1280] * 2


def test_the_same_input_gives_the_same_bytes_whatever_the_user_s_settings(tmp_path, capsys):
    path, out = write_jsonl(tmp_path / "rows.jsonl", [{"quality": 3}]), tmp_path / "one.png"
    plot.main([path, "--out", str(out)])
    assert capsys.readouterr().out == f"{out}\n"
    before = out.read_bytes()
    with matplotlib.rc_context({"font.size": 30, "savefig.dpi": 50, "axes.facecolor": "red"}):
        plot.draw(path, out=out)
        assert matplotlib.rcParams["font.size"] == 30
    assert out.read_bytes() == before and b"tEXt" not in before and b"tIME" not in before


@pytest.mark.parametrize(("summary", "rows", "names"), [
    (summary_of(ARMS), [], PICTURES[:1]), (summary_of(ARMS), None, PICTURES),
    (summary_of(ARMS, "generate"), [], PICTURES[:1])])
def test_an_evaluation_has_the_pictures_that_its_rows_allow(tmp_path, summary, rows, names):
    folder = evaluation(tmp_path / "e", summary, rows)
    assert [path.name for path, _ in plot.pictures_of("evaluation", folder, None, 1)] == names


@pytest.mark.parametrize("fill", [
    lambda figure: plot.draw_run(figure, DPO, "a$b$"), lambda figure: plot.draw_scores(figure, {"x": {"quality": [3]}}),
    lambda figure: plot.draw_arms(figure, summary_of({"costs $1$": (2.0, 0.625, 0.5, 0.875)}), "e"),
    lambda figure: plot.draw_gain(figure, summary_of(ARMS), answers(), "e"),
    lambda figure: plot.draw_arms(figure, summary_of(ARMS, "generate", baselines={"random": 0.2}), "e")])
def test_every_text_has_at_least_nine_points_and_dollars_are_dollars(tmp_path, fill):
    with contextlib.suppress(KeyboardInterrupt), plot.picture(tmp_path / "p.png") as figure:
        fill(figure)
        found = figure.findobj(matplotlib.text.Text)
        assert min(text.get_fontsize() for text in found) >= 9
        assert not any(text.get_parse_math() for text in found)
        raise KeyboardInterrupt  # writing takes most of the time


def test_a_picture_that_fails_leaves_the_old_one(tmp_path):
    path = tmp_path / "p.png"
    path.write_bytes(b"old")
    with pytest.raises(KeyError), plot.picture(path):
        raise KeyError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("more", "found"), [
    (["--out", "x.pdf"], "--out x.pdf: expected a name that ends in .png"),
    (["--label", "source"], "--label source: found no index among"), (["--most", "0"], "--most"), ([], None)])
def test_flags_that_do_not_fit_are_refused(tmp_path, more, found):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"quality": 3}])
    metrics = write_jsonl(tmp_path / "metrics.jsonl", SFT)
    with pytest.raises(InputError, match=found or "plot-run.png: found two pictures of this name"):
        plot.main([path, *more] if found else [metrics, str(tmp_path)])
    assert not list(tmp_path.glob("*.png"))


def test_missing_libraries_are_named_with_their_extra(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"quality": 3}])
    for name in ("matplotlib", "sklearn.manifold"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"found no matplotlib to draw with; expected pip install -e '\.\[plot\]'$"):
        plot.draw(path)
    with pytest.raises(InputError, match=r"found no scikit-learn to project with; expected pip install -e '\.\[plot\]"):
        plot.in_the_plane(np.eye(30))


def test_a_long_name_of_an_arm_is_cut_between_its_settings():
    assert plot.short_lines("nearest:k=4,optimizer=adam") == "nearest:k=4,\noptimizer=adam"

"""Every picture: finds out what a file or folder holds and draws it as PNG, one idea a picture.

    a run: its folder or metrics.jsonl          did it learn: loss, learning rate, gradient norm; DPO's margin, accuracy
    an evaluation: results.jsonl, summary.json  what an arm costs and gives; gain against similarity; accuracy
    rows with numeric scores                    how quality and complexity (or difficulty) are distributed, 1 to 10
    an index that retrieve.py built             its vectors in the plane by t-SNE, coloured by a label of the records

It draws what it is given: every number comes from the files, and t-SNE (van der Maaten and Hinton, JMLR 9, 2008) is the
only thing computed of vectors. Colours: of Okabe and Ito's, for any colour vision. The same input and versions of
the libraries give the same bytes.

    python plot.py runs/dpo                             runs/dpo/plot-run.png
    python plot.py evals/ladder                         evals/ladder/plot-cost.png, plot-gain.png, plot-accuracy.png
    python plot.py ours.jsonl theirs.jsonl --out scores.png
    python plot.py index/traces --label specialty       index/plot-traces.png
"""
import contextlib
import itertools
import json
import math
import re
import sys
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from files import InputError, Parser, read_data, read_json, read_jsonl, run_main, sha256, whole, written_aside

# without sky blue and yellow, which are too light for points on white
BLACK, ORANGE, GREEN, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
GREY = "#999999"
WIDTH, HEIGHT, DPI = 6.4, 3.6, 200  # inches; as wide as a README's column
STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "figure.titlesize": 10,
         "figure.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.titlelocation": "left",
         "text.parse_math": False}  # a $ in a name is a $
EACH = {"linestyle": "", "marker": ".", "color": BLUE, "alpha": 0.4, "markersize": 5, "markeredgewidth": 0}
MEAN = {"linestyle": "-", "marker": "o", "color": VERMILLION, "linewidth": 1.4, "markersize": 4}
DASHED = (0, (4, 3))
INDEX_FILES = {"manifest.json", "records.jsonl", "vectors.safetensors"}
EXPECTED = ("expected a run (metrics.jsonl), an evaluation (results.jsonl and summary.json), rows with numeric quality "
            "and complexity or difficulty, or an index (manifest.json, records.jsonl and vectors.safetensors)")
PERPLEXITY, SEED = 25, 42  # FineMedLM-o1's picture has this perplexity, 1,000 iterations and 1,000 vectors a label
# measure of an evaluation: (its value in a row of results.jsonl, the sign of better, the name of its axis, its unit)
MEASURES = {"bpb": ("bpb", -1, "bits per byte (lower is better)", "bits per byte"),
            "loglik": ("margin", 1, "margin (nats, higher is better)", "nats"),
            "generate": ("correct", 1, "accuracy (share of questions, higher is better)", "right answers")}
ACCURACY = ("accuracy", "accuracy_low", "accuracy_high")

# ----- the sheet -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def picture(path):
    """`with picture(path) as figure:` draw on it; on leaving it is written aside and renamed to the PNG `path`."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(f"{path}: found no matplotlib to draw with; expected pip install -e '.[plot]'") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a user's own settings would give other bytes
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(WIDTH, HEIGHT), dpi=DPI, layout="constrained")
        yield figure
        with written_aside(path) as aside:
            figure.savefig(aside, format="png", metadata={"Software": None})


def figure_title(figure, text):
    """The picture's message, flush left above it, in as many lines as it needs."""
    figure.suptitle(wrapped(text, 74), x=0.01, ha="left")


def wrapped(text, width):
    """`text` in lines of at most `width` characters, cut after a space or mark where there is one, else anywhere."""
    lines = [""]
    for piece in re.findall(r"[^\s,:;/_]*[\s,:;/_]?", " ".join(str(text).split())):
        if len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        while len(piece.rstrip()) > width:
            lines[-1], piece = piece[:width], piece[width:]
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines if line.strip())


def label_points(axes, points, labels, colours, avoid=(), on_top=False):
    """Writes each label near its point (x, y), where it covers no other label and none of the artists `avoid`.

    The nearest free one of places around the point is taken; from one further away a thin line leads back. A label
    `on_top` has a frame and tries its point itself first; another keeps off all points. Where no place is free, the
    label stands at the first.
    """
    axes.figure.draw_without_rendering()  # the layout is known only now
    dot, frame = 3 * DPI / 72, axes.get_window_extent().extents
    centres = axes.transData.transform(points)
    taken = [*(artist.get_window_extent().extents for artist in avoid),
             *((x - dot, y - dot, x + dot, y + dot) for x, y in centres if not on_top)]
    around = [(1, 0), (-1, 0), (0, 1), (0, -1)]  # the frame's sides, then the places between and its corners
    around += [place for t in (0.5, -0.5, 1, -1) for place in ((1, t), (-1, t), (t, 1), (t, -1))]
    for (x, y), text, colour in zip(centres, labels, colours):
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": colour, "alpha": 0.9} if on_top else None
        written = axes.text(0, 0, text, ha="center", va="center", color=BLACK if on_top else colour, transform=None,
                            linespacing=1.0, bbox=box, zorder=4)
        written.set_in_layout(False)
        extent = written.get_window_extent()
        w, h = extent.width / 2 + dot * (0.5 + on_top), extent.height / 2 + dot * on_top
        places = [(x, y)] * on_top + [(x + i * (w + dot * far), y + j * (h + dot * far))
                                      for far in (1, 2, 4, 7, 11, 16, 22, 29, 37) for i, j in around]
        boxes = [(x - w, y - h, x + w, y + h) for x, y in places]
        free = [box for box in boxes if frame[0] <= box[0] and frame[1] <= box[1] and box[2] <= frame[2]
                and box[3] <= frame[3] and not any(overlap(box, other) for other in taken)]
        left, bottom, right, top = box = (free or boxes)[0]
        taken.append(box)
        written.set_position(((left + right) / 2, (bottom + top) / 2))
        end = min(max(x, left), right), min(max(y, bottom), top)  # of the label, nearest to the point
        if math.dist(end, (x, y)) > 3 * dot:
            axes.plot(*zip((x, y), end), color=GREY, linewidth=0.7, transform=None, zorder=1)[0].set_in_layout(False)


def overlap(a, b):
    """Whether two boxes (left, bottom, right, top) share a point."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

# ----- a run ---------------------------------------------------------------------------------------------------------


def draw_run(figure, rows, name):
    """Did it learn? `rows` of metrics.jsonl: each step faint, what was held out as a line, skipped steps as crosses."""
    preferences = any("margin" in row or "val_margin" in row for row in rows)
    unit = 10.0 ** math.floor(math.log10(max([row["lr"] for row in rows if is_number(row.get("lr"))], default=0) or 1))
    panels = {"loss": ("loss" if preferences else "loss (nats a token)", 1),
              "lr": (f"learning rate (times {unit:g})", 1 / unit), "grad_norm": ("gradient norm", 1)}
    places = [["loss", "loss", "lr"], ["loss", "loss", "grad_norm"]]
    if preferences:
        panels |= {"margin": ("margin of the rewards", 1), "accuracy": ("accuracy (%)", 100)}
        places = [["loss"] * 2 + ["margin"] * 2 + ["accuracy"] * 2, ["lr"] * 3 + ["grad_norm"] * 3]
        figure.set_size_inches(WIDTH, 4.6)
    for key, axes in figure.subplot_mosaic(places).items():
        title, scale = panels[key]
        written = []
        for text, field, look in (("each step", key, EACH), ("held out", f"val_{key}", MEAN)):
            drawn = [(row["step"], scale * row[field]) for row in rows if is_number(row.get(field))]
            if drawn:
                axes.plot(*zip(*drawn), **look, label=field)
                written.append((text, look["color"]))
        if key == "loss" and (bad := [row["step"] for row in rows if row.get("finite") is False]):
            axes.plot(bad, [0.02] * len(bad), "x", color=BLACK, label="skipped", transform=axes.get_xaxis_transform())
            written.append(("× skipped", BLACK))
        for i, (text, colour) in enumerate(written if key == "loss" else ()):  # it falls: this corner is mostly free
            axes.annotate(text, (0.98, 0.98), (0, -11 * i), "axes fraction", "offset points", ha="right", va="top",
                          color=colour)
        axes.set_title(title)
        axes.margins(x=0.03)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
        if axes.get_subplotspec().rowspan.stop == len(places):
            axes.set_xlabel("optimizer step")
    figure_title(figure, message_of_run(rows, name))


def message_of_run(rows, name):
    """The first and last value of the most telling metric there is, as a title."""
    for key, what in (("val_accuracy", "held-out accuracy"), ("val_loss", "held-out loss"), ("loss", "loss of a step")):
        values = [row[key] for row in rows if is_number(row.get(key))]
        if len(values) > 1:
            first, last = (f"{100 * x:.0f} %" if key == "val_accuracy" else f"{x:.3f}" for x in (values[0], values[-1]))
            return f"{name}: {what} {first} → {last} in {rows[-1]['step']:,} steps"
    return f"{name}: {rows[-1]['step']:,} steps"


def read_run(path):
    """The rows of a metrics.jsonl, in order. InputError for a row without a step, and for none at all."""
    rows = whole_rows(path)
    if not rows:
        raise InputError(f"{path}: found no rows, expected one a step")
    for line, row in rows:
        if not is_number(row.get("step")):
            raise InputError(f"{path}:{line}: found step {row.get('step')!r}, expected a number")
    return [row for _, row in rows]


def whole_rows(path):
    """[(line number, row)] of a .jsonl file; a last line that a kill has cut short counts as not there."""
    rows = list(read_jsonl(path))
    if rows and isinstance(rows[-1][1], InputError) and not path.read_bytes().endswith(b"\n"):
        rows.pop()
    for _, row in rows:
        if isinstance(row, InputError):
            raise row
    return rows


def is_number(value):
    """Whether it is a finite number; a truth value is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

# ----- an evaluation -------------------------------------------------------------------------------------------------


def draw_cost(figure, summary, name):
    """An arm's measure against its time, a point and an interval each; dashed, the arm that others are compared with"""
    axes, base, bars = figure.add_subplot(), baseline_of(summary), []
    arms = {arm: [row["seconds"], *(row[key] for key in keys_of(summary))] for arm, row in summary["arms"].items()}
    colours = [BLACK if arm == base else BLUE for arm in arms]
    for (arm, (seconds, mean, low, high)), colour in zip(arms.items(), colours):
        axes.plot(seconds, mean, "o", color=colour, markersize=5, label=arm)
        bars += axes.plot([seconds, seconds], [low, high], color=colour, linewidth=1.2, label=f"{arm} interval")
        if arm == base:
            bars.append(axes.axhline(mean, color=BLACK, linewidth=0.8, linestyle=DASHED, zorder=1))
    times = [row[0] for row in arms.values()]
    if max(times) > 30 * min(times) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    axes.margins(x=0.18, y=0.12)
    axes.set(xlabel="time (s a question)", ylabel=MEASURES[summary["measure"]][2])
    figure_title(figure, f"{name}: what each arm takes and gives (mean, 95 % interval)")
    label_points(axes, [row[:2] for row in arms.values()], [wrapped(arm, 18) for arm in arms], colours, avoid=bars)


def draw_gain(figure, summary, rows, name):
    """The gain of each question against the score of its nearest neighbour, a panel an arm; and means of fifths.

    Gain: how much better the measure is than that of the same question in the arm that others are compared with.
    """
    gains = gains_of(summary, rows)
    columns = min(3, len(gains))
    lines = math.ceil(len(gains) / columns)
    figure.set_size_inches(WIDTH, max(HEIGHT, 1.0 + 1.6 * lines))
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (arm, points) in zip(grid.flat, gains.items()):
        scores, values = np.array(sorted(points)).T
        axes.axhline(0, color=BLACK, linewidth=0.8)
        axes.plot(scores, values, **EACH, label="questions")
        fifths = [(part_x.mean(), part_y.mean()) for part_x, part_y in zip(
            np.array_split(scores, 5), np.array_split(values, 5)) if len(part_x)]
        axes.plot(*zip(*fifths), **MEAN, label="means")
        axes.set_title(wrapped(arm, 22))
        axes.text(0.03, 0.97, f"mean {values.mean():+.3f}, n {len(values)}", transform=axes.transAxes, va="top")
        axes.margins(y=0.2)
    for axes in grid.flat[len(gains):]:
        axes.set_axis_off()
    for axes in grid.flat[:len(gains)]:
        axes.tick_params(labelbottom=axes in grid.flat[max(0, len(gains) - columns):len(gains)])
    figure.supxlabel("score of the nearest neighbour (line: means of fifths)", fontsize=9)
    figure.supylabel(f"gain ({MEASURES[summary['measure']][3]})", fontsize=9)
    figure_title(figure, f"{name}: gain of each question over the arm {baseline_of(summary)}")


def gains_of(summary, rows):
    """{arm: [(score of the nearest neighbour, gain)]} of the questions that the arm and the baseline have answered.

    In the summary's order; without the baseline and arms that have no neighbours.
    """
    key, sign, _, _ = MEASURES[summary["measure"]]
    base = baseline_of(summary)
    before = {row["number"]: row[key] for row in rows if row["arm"] == base and row.get(key) is not None}
    gains = defaultdict(list)
    for arm, row in itertools.product(summary["arms"], rows):
        if row["arm"] == arm != base and row.get("neighbours") and row.get(key) is not None and row["number"] in before:
            nearest = max(neighbour["score"] for neighbour in row["neighbours"])
            gains[arm].append((nearest, sign * (row[key] - before[row["number"]])))
    return dict(gains)


def draw_accuracy(figure, summary, name):
    """The share of right answers of each arm with its interval; dashed, the summary's baselines, {name: share}."""
    arms = {arm: row for arm, row in summary["arms"].items() if is_number(row.get("accuracy"))}
    names = [wrapped(arm, 30) for arm in arms]
    lines = max(name.count("\n") + 1 for name in names)
    figure.set_size_inches(WIDTH, max(HEIGHT, 1.3 + len(arms) * max(0.36, 0.16 * lines)))
    axes = figure.add_subplot()
    base = baseline_of(summary)
    for i, (arm, row) in enumerate(arms.items()):
        share, low, high = (100 * row[key] for key in ACCURACY)
        axes.barh(i, share, color=GREY if arm == base else BLUE, height=0.62, label=arm)
        axes.errorbar(share, i, xerr=[[share - low], [high - share]], color=BLACK, linewidth=1.2, capsize=2.5)
        axes.text(high, i, f"  {share:.1f}", va="center")
    for i, (text, share) in enumerate(sorted(summary.get("baselines", {}).items(), key=lambda item: item[1])):
        axes.axvline(100 * share, color=VERMILLION, linewidth=1.2, linestyle=DASHED, label=text)
        axes.text(100 * share, 1.01, f" {text} ", color=VERMILLION, ha="left" if i else "right", va="bottom",
                  transform=axes.get_xaxis_transform())
    axes.set_yticks(range(len(arms)), names)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    shares = [*summary.get("baselines", {}).values(), *(row["accuracy_high"] for row in arms.values())]
    axes.set(xlim=(0, 100 * max(shares) + 12),
             xlabel="accuracy (% of questions, 95 % interval)")
    figure_title(figure, f"{name}: right answers of each arm")


def keys_of(summary):
    """The keys of an arm's mean and the ends of its interval."""
    return ACCURACY if summary["measure"] == "generate" else ("mean", "low", "high")


def baseline_of(summary):
    """The arm that most comparisons are made against, or None."""
    against = Counter(row["against"] for row in summary.get("comparisons", []))
    return against.most_common(1)[0][0] if against else None


def read_evaluation(folder):
    """(summary, rows) of an evaluation's folder. InputError for whatever a picture needs and is not there."""
    path, rows = folder / "summary.json", []
    summary = read_json(path)
    arms, comparisons, baselines = (summary.get(key, {}) for key in ("arms", "comparisons", "baselines"))
    if summary.get("measure") not in MEASURES or not isinstance(arms, dict) or not arms:
        raise InputError(f"{path}: found measure {summary.get('measure')!r} and arms {str(arms)[:40]}; expected one of "
                         f"{', '.join(MEASURES)}, and an object of arms")
    for arm, row in arms.items():
        found = dict_or_empty(row)
        for keys in [keys_of(summary)] + [ACCURACY] * (found.get("accuracy") is not None):
            values = [found.get(key) for key in (*keys, "seconds")]
            if not all(map(is_number, values)) or not values[1] <= values[0] <= values[2]:
                raise InputError(f"{path}: arm {arm!r} has {', '.join(keys)} and seconds {values}; expected numbers, "
                                 "the first between the next two")
    for row in comparisons:
        if (against := dict_or_empty(row).get("against")) not in arms:
            raise InputError(f"{path}: found a comparison against {against!r}, expected one of the arms")
    if not all(map(is_number, dict_or_empty(baselines).values())):
        raise InputError(f"{path}: found baselines {baselines}, expected shares")
    key = MEASURES[summary["measure"]][0]
    for line, row in whole_rows(folder / "results.jsonl"):
        scores = [dict_or_empty(neighbour).get("score") for neighbour in row.get("neighbours") or []]
        value = row.get(key)
        if row.get("arm") not in arms or not all(map(is_number, [row.get("number"), *scores])) or not (
                value is None or isinstance(value, bool) or is_number(value)):
            raise InputError(f"{folder}/results.jsonl:{line}: found number {row.get('number')!r}, arm "
                             f"{row.get('arm')!r}, {key} {value!r}, scores {scores}; expected numbers, and an arm of "
                             "summary.json")
        rows.append(row)
    return summary, rows


def dict_or_empty(value):
    return value if isinstance(value, dict) else {}

# ----- scores --------------------------------------------------------------------------------------------------------


def draw_scores(figure, scores):
    """How each data set's scores are distributed: scores {name: {column: [score]}}, a row of panels a data set."""
    columns = list(dict.fromkeys(column for one in scores.values() for column in one))
    figure.set_size_inches(WIDTH, max(HEIGHT, 1.0 + 1.15 * len(scores)))
    grid = figure.subplots(len(scores), len(columns), sharex=True, sharey=True, squeeze=False)
    for axes_of_set, (name, one) in zip(grid, scores.items()):
        axes_of_set[0].set_ylabel(wrapped(name, 16), rotation=0, ha="right", va="center")
        for axes, column, colour in zip(axes_of_set, columns, (BLUE, ORANGE)):
            values = np.array(one.get(column, []))
            counts, _ = np.histogram(values, np.arange(0.5, 11))
            axes.bar(range(1, 11), 100 * counts / max(len(values), 1), color=colour, width=0.8)
            text = f"mean {values.mean():.1f}, n {len(values):,}" if len(values) else "no scores"
            axes.text(0.03, 0.95, text, transform=axes.transAxes, va="top")
            axes.set_xticks(range(1, 11))
            axes.grid(visible=False, axis="x")
            axes.margins(y=0.3)
    for axes, column in zip(grid[-1], columns):
        axes.set_xlabel(f"{column} (1 to 10)")
    figure.supylabel("rows (%)", fontsize=9)
    figure_title(figure, f"Scores of {', '.join(scores)}" if len(scores) < 3 else f"Scores of {len(scores)} data sets")


def read_scores(paths):
    """{name of the data set: {"quality" and "complexity" or "difficulty": [score]}}; rows without a score are passed
    over. InputError for a score outside 1 to 10."""
    scores = {}
    for path in paths:
        columns = defaultdict(list)
        for _, where, row in read_data(path):
            if isinstance(row, InputError):
                raise row
            for key in score_keys(row):
                if not 1 <= row[key] <= 10:
                    raise InputError(f"{where}: found {key} {row[key]}, expected a score from 1 to 10")
                columns["quality" if key == "quality" else "complexity or difficulty"].append(row[key])
        stems = [Path(other).name.partition(".")[0] for other in paths]
        stem = Path(path).name.partition(".")[0]
        name = stem if stems.count(stem) == 1 else str(path)
        scores[name] = {key: columns[key] for key in ("quality", "complexity or difficulty") if key in columns}
    return scores


def score_keys(row):
    """The keys of a row's scores: quality, and complexity or else difficulty."""
    keys = [key for key in ("quality", "complexity", "difficulty") if is_number(row.get(key))]
    return keys[:-1] if keys[-2:] == ["complexity", "difficulty"] else keys

# ----- vectors -------------------------------------------------------------------------------------------------------


def draw_vectors(figure, points, labels, name, key):
    """points [N, 2] in the plane, coloured by label: the six most frequent labels by name, all others grey."""
    figure.set_size_inches(WIDTH, 4.8)
    axes = figure.add_subplot()
    common = [label for label, _ in Counter(labels).most_common(6)]
    colours = dict(zip(common, (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, BLACK)))
    medians = []
    for label in [None, *common]:
        one = points[[found == label if label is not None else found not in colours for found in labels]]
        axes.plot(*one.T, ".", color=colours.get(label, "#cccccc"), markersize=3.5 if len(points) > 300 else 7,
                  markeredgewidth=0, alpha=0.8, label=label or "others")
        medians.append(np.median(one, axis=0) if len(one) else None)
    axes.set(xticks=[], yticks=[], xlabel="t-SNE axis 1 (no unit)", ylabel="t-SNE axis 2 (no unit)")
    others = len(set(labels)) - len(common)
    figure_title(figure, f"{name}: t-SNE of {len(points):,} questions by {key}"
                         + (f" ({others} rarer values grey)" if others else ""))
    label_points(axes, medians[1:], [wrapped(label, 20) for label in common], list(colours.values()), on_top=True)


def in_the_plane(vectors, perplexity=PERPLEXITY, seed=SEED):
    """float32 [N, D] -> [N, 2] by t-SNE of the vectors at length 1; there euclidean distance ranks as the cosine does.

    One thread, because the order of sums decides where a point lands. InputError for too few vectors, or all equal.
    """
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits  # a dependency of scikit-learn's
    except ImportError:
        raise InputError("found no scikit-learn to project with; expected pip install -e '.[plot]'") from None
    if len(vectors) <= perplexity:
        raise InputError(f"found {len(vectors)} vectors with a label, expected more than the perplexity, {perplexity}")
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    if not np.ptp(units, axis=0).any():
        raise InputError(f"found {len(vectors)} equal vectors, expected different ones")
    print(f"t-SNE of {len(vectors):,} vectors …", file=sys.stderr)
    with threadpool_limits(1):
        return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(units)


def read_vectors(folder, key, most):
    """(float32 [N, D], [label of each]) of an index: of each value of `key` in its records at most `most`, by seed.

    Records without it are passed over. InputError for a damaged index, and for a key that no record has.
    """
    manifest = read_json(folder / "manifest.json")
    for name in ("records.jsonl", "vectors.safetensors"):
        if dict_or_empty(manifest.get("files")).get(name) != sha256(folder / name):
            raise InputError(f"{folder / name}: found other bytes than manifest.json states, expected an index as "
                             "retrieve.py built it")
    found, keys = defaultdict(list), defaultdict(set)
    for place, (_, row) in enumerate(whole_rows(folder / "records.jsonl")):
        for name, value in row.items():
            if isinstance(value, (str, int)) and len(keys[name]) <= 50:
                keys[name].add(value)
        if isinstance(row.get(key), (str, int)):
            found[str(row[key])].append(place)
    if not found:
        would = [name for name, values in keys.items() if 2 <= len(values) <= 50]
        raise InputError(f"{folder}: found no record with {key!r}, expected --label KEY, a key of the records such as "
                         f"{', '.join(would) or 'department'}")
    draw = np.random.default_rng(SEED)
    places = sorted(place for own in found.values() for place in draw.permutation(own)[:most].tolist())
    label_of = {place: label for label, own in found.items() for place in own}
    try:
        with safe_open(folder / "vectors.safetensors", framework="numpy") as file:
            vectors = file.get_tensor("vectors")[places]
    except (SafetensorError, IndexError) as error:
        raise InputError(f"{folder}/vectors.safetensors: not the vectors of the records ({error})") from None
    return vectors, [label_of[place] for place in places]

# ----- input and output ----------------------------------------------------------------------------------------------


def kind_of(path):
    """("run", metrics.jsonl), ("evaluation", folder), ("scores", file) or ("vectors", folder): what `path` holds.

    Content decides, not names of data files. InputError for anything else.
    """
    if path.is_dir():
        names = {child.name for child in path.iterdir()}
        if {"results.jsonl", "summary.json"} <= names:
            return "evaluation", path
        if names >= INDEX_FILES:
            return "vectors", path
        if "metrics.jsonl" in names:
            return "run", path / "metrics.jsonl"
        shown = sorted(name for name in names if not name.startswith("."))
        raise InputError(f"{path}: found a folder of {', '.join(shown[:5]) or 'nothing'}"
                         f"{', …' if len(shown) > 5 else ''}; {EXPECTED}")
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder; {EXPECTED}")
    if path.name in ("results.jsonl", "summary.json") and (path.parent / "summary.json").exists():
        return kind_of(path.parent)
    rows = [row for _, _, row in itertools.islice(read_data(path), 100)]
    keys = dict.fromkeys(key for row in rows if isinstance(row, dict) for key in row)
    if "step" in keys and ("loss" in keys or "val_loss" in keys):
        return "run", path
    if any(score_keys(row) for row in rows if isinstance(row, dict)):
        return "scores", path
    if rows and isinstance(rows[0], InputError):
        raise InputError(f"{rows[0]}; {EXPECTED}")
    raise InputError(f"{path}: found {'rows with ' + ', '.join(list(keys)[:8]) if keys else 'no rows'}; {EXPECTED}")


def draw(*paths, out=None, label=None, most=1000):
    """Draws what `paths` hold and returns the files written, [Path]; several files of scores are one picture.

    `out` names the PNG; an evaluation's pictures add -cost, -gain and -accuracy to it. By default plot-*.png stands in
    the run's or evaluation's folder, beside the data file, and beside an index (a foreign file in its folder would keep
    retrieve.py from replacing it). `label`: the key of an index's records; `most`: vectors a label.
    """
    if out is not None and Path(out).suffix != ".png":
        raise InputError(f"--out {out}: expected a name that ends in .png")
    kinds = [kind_of(Path(path)) for path in paths]
    if label is not None and not any(kind == "vectors" for kind, _ in kinds):
        raise InputError(f"--label {label}: found no index among {', '.join(map(str, paths))}; expected one")
    scored = [path for kind, path in kinds if kind == "scores"]
    pictures = []
    if scored:
        pictures.append((scored[0].parent / "plot-scores.png", partial(draw_scores, scores=read_scores(scored))))
    for kind, path in kinds:
        pictures += pictures_of(kind, path, label, most)
    if out is not None:
        several = len(pictures) > 1
        pictures = [(Path(out).with_stem(Path(out).stem + target.stem.removeprefix("plot") * several), fill)
                    for target, fill in pictures]
    targets = [target for target, _ in pictures]
    if twice := [target for target in targets if targets.count(target) > 1]:
        raise InputError(f"{twice[0]}: found two pictures of this name, expected one input at a time")
    for target, fill in pictures:
        with picture(target) as figure:
            fill(figure)
    return targets


def pictures_of(kind, path, label, most):
    """[(the file to write, a function that draws on a figure)] of one input, which is read here."""
    if kind == "run":
        name = path.resolve().parent.name if path.name == "metrics.jsonl" else path.stem
        return [(path.parent / "plot-run.png", partial(draw_run, rows=read_run(path), name=name))]
    name = path.resolve().name
    if kind == "evaluation":
        summary, rows = read_evaluation(path)
        pictures = [(path / "plot-cost.png", partial(draw_cost, summary=summary, name=name))]
        if gains_of(summary, rows):
            pictures.append((path / "plot-gain.png", partial(draw_gain, summary=summary, rows=rows, name=name)))
        if any(is_number(row.get("accuracy")) for row in summary["arms"].values()):
            pictures.append((path / "plot-accuracy.png", partial(draw_accuracy, summary=summary, name=name)))
        return pictures
    if kind == "vectors":
        vectors, labels = read_vectors(path, label, most)
        points = in_the_plane(vectors)
        return [(path.resolve().parent / f"plot-{name}.png",
                 partial(draw_vectors, points=points, labels=labels, name=name, key=label))]
    return []


def main(argv=None):
    parser = Parser(description="Draw a run, an evaluation, scores of data sets or the vectors of an index as PNG.")
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a run's folder or metrics.jsonl, an evaluation's "
                        "folder, files of rows with scores, or an index's folder")
    parser.add_argument("--out", metavar="FILE.png", help="the picture to write (default: plot-*.png beside the input)")
    parser.add_argument("--label", metavar="KEY", help="for an index: the key of its records that colours the vectors, "
                        "such as department")
    parser.add_argument("--most", type=whole(1), default=1000, metavar="N",
                        help="for an index: vectors a label at most (default %(default)s, the authors' choice)")
    parser.add_argument("--json", action="store_true", help="print one JSON object: written (the files)")
    args = parser.parse_args(argv)
    written = [str(path) for path in draw(*args.paths, out=args.out, label=args.label, most=args.most)]
    print(json.dumps({"written": written}, ensure_ascii=False) if args.json else "\n".join(written))


if __name__ == "__main__":
    run_main(main)

"""Every picture: finds out what a file or folder holds and draws it as PNG, one idea a picture.

    a run: its folder or metrics.jsonl          did it learn: loss, learning rate, gradient norm; DPO's margin, accuracy
    an evaluation: results.jsonl, summary.json  what each arm gives and takes; gain against similarity
    rows with numeric scores                    how quality and complexity (or difficulty) are distributed, 1 to 10
    an index that retrieve.py built             its vectors in the plane by t-SNE, coloured by a label of the records

Every number comes from the files; only the points of an index are computed here, by t-SNE (van der Maaten and Hinton,
JMLR 9, 2008). The colours are Okabe and Ito's, for any colour vision. The same input and versions of the libraries give
the same bytes.

    python plot.py runs/dpo                             runs/dpo/plot-run.png
    python plot.py evals/ladder                         evals/ladder/plot-arms.png, plot-gain.png
    python plot.py ours.jsonl theirs.jsonl --out scores.png
    python plot.py index/traces --label specialty       index/plot-traces.png
"""
import contextlib
import itertools
import json
import math
import sys
import textwrap
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from files import InputError, Parser, read_data, read_json, read_jsonl, run_main, sha256, whole, written_aside
from report import ENDPOINTS

# without sky blue and yellow, which are too light for points on white
BLACK, ORANGE, GREEN, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
WIDTH, HEIGHT, DPI = 6.4, 3.6, 200  # inches; as wide as a README's column
STYLE = {"font.family": "DejaVu Sans", "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "figure.titlesize": 10,
         "figure.titleweight": "bold", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.axisbelow": True, "axes.titlelocation": "left",
         "legend.frameon": False, "text.parse_math": False}  # a $ in a name is a $
FAINT = {"linestyle": "", "marker": "o", "color": BLUE, "alpha": 0.4, "markersize": 3, "markeredgewidth": 0}
STRONG = {"linestyle": "-", "marker": "o", "color": VERMILLION, "linewidth": 1.4, "markersize": 4}
DASHED = {"linewidth": 0.9, "linestyle": (0, (4, 3)), "zorder": 1}
INDEX_FILES = {"manifest.json", "records.jsonl", "vectors.safetensors"}
EXPECTED = ("expected a run (metrics.jsonl), an evaluation (results.jsonl and summary.json), rows with numeric quality "
            "and complexity or difficulty, or an index (manifest.json, records.jsonl and vectors.safetensors)")
PERPLEXITY, SEED = 25, 42  # FineMedLM-o1's picture has this perplexity, 1,000 iterations and 1,000 vectors a label
# keys of an arm in summary.json: a value and the ends of its 95 % interval
MEAN, ACCURACY = ("mean", "low", "high"), ("accuracy", "accuracy_low", "accuracy_high")

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


def entitle(figure, text):
    """The picture's message, flush left above it, in as many lines as it needs."""
    figure.suptitle(textwrap.fill(text, 74), x=0.01, ha="left")


def short_lines(arm, width=22):
    """An arm's name in lines of at most `width` characters, cut between its settings where there are several."""
    return textwrap.fill(arm.replace(",", ", "), width)

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
    grid = figure.subplot_mosaic(places)
    for key, axes in grid.items():
        title, scale = panels[key]
        for field, look, label in ((key, FAINT, "each step"), (f"val_{key}", STRONG, "held out")):
            points = [(row["step"], scale * row[field]) for row in rows if is_number(row.get(field))]
            if points:
                axes.plot(*zip(*points), **look, label=label)
        axes.set_title(title)
        axes.margins(x=0.03)
        axes.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    loss = grid["loss"]
    if skipped := [row["step"] for row in rows if row.get("finite") is False]:
        loss.plot(skipped, [0.02] * len(skipped), "x", color=BLACK, label="skipped",
                  transform=loss.get_xaxis_transform())
    if loss.lines:
        loss.legend(loc="upper right")  # the loss falls: this corner is mostly free
    figure.supxlabel("optimizer step", fontsize=9)
    entitle(figure, message_of_run(rows, name))


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


def draw_arms(figure, summary, name):
    """A row for each arm: its measure and accuracy with their 95 % intervals, and its time; dashed, the first arm, with
    which the others are compared, and in colour the shares of right answers without a model."""
    arms, panels = summary["arms"], panels_of(summary["measure"])
    figure.set_size_inches(WIDTH, 1.5 + 0.4 * len(arms))
    *grid, times = figure.subplots(1, len(panels) + 1, sharey=True, width_ratios=[2] * len(panels) + [1])
    colours = [BLACK] + [BLUE] * (len(arms) - 1)
    for axes, (label, keys, scale, digits) in zip(grid, panels):
        rows = [[scale * row[key] for key in keys] for row in arms.values()]
        for i, ((value, low, high), arm, colour) in enumerate(zip(rows, arms, colours)):
            axes.plot(value, i, "o", color=colour, markersize=5, label=arm)
            axes.plot([low, high], [i, i], color=colour, linewidth=1.2, label=f"{arm} interval")
            axes.annotate(f"{value:.{digits}f}", (value, i), (0, 5), textcoords="offset points", ha="center",
                          color=colour, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axes.axvline(rows[0][0], color=BLACK, **DASHED)
        axes.set_xlabel(label)
        if keys == ACCURACY:
            baselines = sorted(summary.get("baselines", {}).items(), key=lambda item: item[1])
            for i, (text, share) in enumerate(baselines):
                axes.axvline(100 * share, color=VERMILLION, **DASHED, label=text)
                axes.text(100 * share, 1.01, text, color=VERMILLION, ha="left" if i else "right", va="bottom",
                          transform=axes.get_xaxis_transform())
    times.bar_label(times.barh(range(len(arms)), [row["seconds"] for row in arms.values()], height=0.5, color=colours),
                    fmt="{:.3g}", padding=2)
    times.set_xlabel("time (s a question)")
    times.margins(x=0.3)
    times.set_yticks(range(len(arms)), map(short_lines, arms))
    times.set_ylim(len(arms) - 0.5, -0.7)  # the first arm on top
    for axes in (*grid, times):
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
    entitle(figure, f"{name}: what each arm gives and takes (95 % intervals)")


def panels_of(measure):
    """[(label of the axis, keys of an arm, factor, decimals)] of the values that are drawn."""
    _, unit, better = ENDPOINTS[measure]
    mean = (f"{unit} ({'higher' if better > 0 else 'lower'} is better)", MEAN, 1, 3)
    accuracy = ("accuracy (%)", ACCURACY, 100, 1)
    return {"bpb": [mean], "loglik": [mean, accuracy], "generate": [accuracy]}[measure]


def draw_gain(figure, summary, rows, name):
    """The gain of each question against the score of its nearest neighbour, a panel for each arm; and means of fifths.

    Gain: how much better the measure is than that of the same question in the first arm.
    """
    gains, unit = gains_of(summary, rows), ENDPOINTS[summary["measure"]][1]
    columns = min(3, len(gains))
    lines = math.ceil(len(gains) / columns)
    figure.set_size_inches(WIDTH, max(HEIGHT, 1.0 + 1.6 * lines))
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (arm, points) in zip(grid.flat, gains.items()):
        scores, values = np.array(sorted(points)).T
        axes.axhline(0, color=BLACK, linewidth=0.8)
        axes.plot(scores, values, **FAINT, label="questions")
        fifths = [(x.mean(), y.mean()) for x, y in zip(np.array_split(scores, 5), np.array_split(values, 5)) if len(x)]
        axes.plot(*zip(*fifths), **STRONG, label="means")
        axes.set_title(short_lines(arm))
        axes.text(0.03, 0.97, f"mean {values.mean():+.3f}, n {len(values)}", transform=axes.transAxes, va="top")
        axes.margins(y=0.2)
        axes.tick_params(labelbottom=True)
    for axes in grid.flat[len(gains):]:
        axes.set_axis_off()
    figure.supxlabel("score of the nearest neighbour (line: means of fifths)", fontsize=9)
    figure.supylabel(f"gain ({'right answers' if summary['measure'] == 'generate' else unit})", fontsize=9)
    entitle(figure, f"{name}: gain of each question over the arm {next(iter(summary['arms']))}")


def gains_of(summary, rows):
    """{arm: [(score of the nearest neighbour, gain)]} of the questions that the arm and the first arm have answered.

    In the summary's order; without the first arm and those that have no neighbours.
    """
    key, _, better = ENDPOINTS[summary["measure"]]
    first, *others = summary["arms"]
    before = {row["number"]: row[key] for row in rows if row["arm"] == first}
    gains = {arm: [] for arm in others}
    for row in rows:
        if row["arm"] in gains and row.get("neighbours") and row["number"] in before:
            nearest = max(neighbour["score"] for neighbour in row["neighbours"])
            gains[row["arm"]].append((nearest, better * (row[key] - before[row["number"]])))
    return {arm: points for arm, points in gains.items() if points}


def read_evaluation(folder):
    """(summary, rows) of an evaluation's folder. InputError for whatever a picture needs and is not there."""
    path = folder / "summary.json"
    summary = read_json(path)
    measure, arms, baselines = summary.get("measure"), summary.get("arms"), summary.get("baselines", {})
    if measure not in ENDPOINTS or not isinstance(arms, dict) or not arms:
        raise InputError(f"{path}: found measure {measure!r} and arms {str(arms)[:40]}; expected one of "
                         f"{', '.join(ENDPOINTS)}, and an object of arms")
    for arm, row in arms.items():
        for _, keys, *_ in panels_of(measure):
            values = [dict_or_empty(row).get(key) for key in (*keys, "seconds")]
            if not all(map(is_number, values)) or not values[1] <= values[0] <= values[2]:
                raise InputError(f"{path}: arm {arm!r} has {', '.join(keys)} and seconds {values}; expected numbers, "
                                 "the first between the next two")
    if not all(map(is_number, dict_or_empty(baselines).values())):
        raise InputError(f"{path}: found baselines {baselines}, expected shares")
    key, rows = ENDPOINTS[measure][0], []
    for line, row in whole_rows(folder / "results.jsonl"):
        scores = [dict_or_empty(neighbour).get("score") for neighbour in row.get("neighbours") or ()]
        number, arm, value = (row.get(name) for name in ("number", "arm", key))
        if arm not in arms or not all(map(is_number, [number, *scores])) or not (
                is_number(value) or isinstance(value, bool)):
            raise InputError(f"{folder}/results.jsonl:{line}: found number {number!r}, arm {arm!r}, {key} {value!r}, "
                             f"scores {scores}; expected numbers, and an arm of summary.json")
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
        axes_of_set[0].set_ylabel(textwrap.fill(name, 16), rotation=0, ha="right", va="center")
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
    entitle(figure, f"Scores of {', '.join(scores)}" if len(scores) < 3 else f"Scores of {len(scores)} data sets")


def read_scores(paths):
    """{name of the data set: {"quality" and "complexity or difficulty": [score]}}; rows without a score are passed
    over. InputError for a score outside 1 to 10."""
    stems = [Path(path).name.partition(".")[0] for path in paths]
    scores = {}
    for path, stem in zip(paths, stems):
        columns = scores[stem if stems.count(stem) == 1 else str(path)] = {}
        for _, where, row in read_data(path):
            if isinstance(row, InputError):
                raise row
            for name, score in scores_of(row).items():
                if not 1 <= score <= 10:
                    raise InputError(f"{where}: found {name} {score}, expected a score from 1 to 10")
                columns.setdefault(name, []).append(score)
    return scores


def scores_of(row):
    """The scores that a row has, as numbers: {"quality": …, "complexity or difficulty": …}."""
    keys = {"quality": ["quality"], "complexity or difficulty": ["complexity", "difficulty"]}  # the first there is
    found = {name: [row[key] for key in keys if is_number(row.get(key))] for name, keys in keys.items()}
    return {name: values[0] for name, values in found.items() if values}


def draw_stages(figure, stages, name):
    """What a pipeline keeps: stages {name: {"in", "out", "dropped": {rule: rows}}}, a bar for each, the first on top;
    blue the rows that go on, grey those that are dropped, with the rules that drop most."""
    figure.set_size_inches(WIDTH, 1.1 + 0.27 * len(stages))
    axes = figure.add_subplot()
    outs = [one["out"] for one in stages.values()]
    lost = [one["in"] - one["out"] for one in stages.values()]
    most = max([one["in"] for one in stages.values()], default=0) or 1
    axes.barh(range(len(stages)), outs, color=BLUE, height=0.7, label="out")
    axes.barh(range(len(stages)), lost, left=outs, color="#cccccc", height=0.7, label="dropped")
    for i, one in enumerate(stages.values()):
        rules = [f"; {n:,} {rule}" for rule, n in sorted(one["dropped"].items(), key=lambda item: -item[1])]
        text = f"{one['out']:,} of {one['in']:,}"
        fitting = [rule for end, rule in zip(itertools.accumulate(map(len, rules)), rules) if len(text) + end <= 40]
        axes.text(one["in"] + most / 60, i, text + "".join(fitting) + "; …" * (fitting != rules), va="center",
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
    axes.set_yticks(range(len(stages)), [textwrap.shorten(stage, 28, placeholder="…") for stage in stages])
    axes.set(ylim=(len(stages) - 0.4, -0.6), xlim=(0, 2.2 * most))
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= most])
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines["bottom"].set_bounds(0, most)
    axes.set_xlabel("rows (blue: out, grey: dropped)", loc="left")
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    entitle(figure, f"{name}: rows in and out of every stage")

# ----- vectors -------------------------------------------------------------------------------------------------------


def draw_vectors(figure, points, labels, name, key):
    """points [N, 2] in the plane, coloured by label: the six most frequent labels by name, all others grey."""
    figure.set_size_inches(WIDTH, 4.4)
    axes = figure.add_subplot()
    common = [label for label, _ in Counter(labels).most_common(6)]
    others = sorted(set(labels) - set(common))
    groups = [("others", others, "#cccccc")] * bool(others)  # first: the rest is drawn over them
    groups += [(label, [label], colour) for label, colour in zip(
        common, (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, BLACK))]
    for text, own, colour in groups:
        axes.plot(*points[[label in own for label in labels]].T, "o", color=colour, label=textwrap.fill(text, 20),
                  markersize=2 if len(points) > 300 else 3.5, markeredgewidth=0, alpha=0.8)
    axes.set(xticks=[], yticks=[], xlabel="t-SNE axis 1 (no unit)", ylabel="t-SNE axis 2 (no unit)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), markerscale=3 if len(points) > 300 else 1.7)
    entitle(figure, f"{name}: t-SNE of {len(points):,} questions by {key}"
                    + (f" ({len(others)} rarer values grey)" if others else ""))


def in_the_plane(vectors):
    """float32 [N, D] -> [N, 2] by t-SNE of the vectors at length 1; there euclidean distance ranks as the cosine does.

    One thread, because the order of sums decides where a point lands. InputError for too few vectors, or all equal.
    """
    try:
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits  # a dependency of scikit-learn's
    except ImportError:
        raise InputError("found no scikit-learn to project with; expected pip install -e '.[plot]'") from None
    if len(vectors) <= PERPLEXITY:
        raise InputError(f"found {len(vectors)} vectors with a label, expected more than the perplexity, {PERPLEXITY}")
    units = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    if not np.ptp(units, axis=0).any():
        raise InputError(f"found {len(vectors)} equal vectors, expected different ones")
    print(f"t-SNE of {len(vectors):,} vectors …", file=sys.stderr)
    with threadpool_limits(1):
        return TSNE(perplexity=PERPLEXITY, init="pca", random_state=SEED).fit_transform(units)


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
    places, labels = zip(*sorted((place, label) for label, own in found.items()
                                 for place in draw.permutation(own)[:most].tolist()))
    try:
        with safe_open(folder / "vectors.safetensors", framework="numpy") as file:
            vectors = file.get_tensor("vectors")[list(places)]
    except (SafetensorError, IndexError) as error:
        raise InputError(f"{folder}/vectors.safetensors: not the vectors of the records ({error})") from None
    return vectors, list(labels)

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
    if any(scores_of(row) for row in rows if isinstance(row, dict)):
        return "scores", path
    if rows and isinstance(rows[0], InputError):
        raise InputError(f"{rows[0]}; {EXPECTED}")
    raise InputError(f"{path}: found {'rows with ' + ', '.join(list(keys)[:8]) if keys else 'no rows'}; {EXPECTED}")


def draw(*paths, out=None, label=None, most=1000):
    """Draws what `paths` hold and returns the files written, [Path]; several files of scores are one picture.

    `out` names the PNG; an evaluation's pictures add -arms and -gain to it. By default plot-*.png stands in the run's
    or evaluation's folder, beside the data file, and beside an index's folder: retrieve.py replaces no folder that
    holds a foreign file. `label`: the key of an index's records; `most`: vectors a label.
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
        pictures += pictures_of(kind, path, label, most) if kind != "scores" else []
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
    """[(the file to write, a function that draws on a figure)] of a run, an evaluation or an index, read here."""
    if kind == "run":
        name = path.resolve().parent.name if path.name == "metrics.jsonl" else path.stem
        return [(path.parent / "plot-run.png", partial(draw_run, rows=read_run(path), name=name))]
    name = path.resolve().name
    if kind == "evaluation":
        summary, rows = read_evaluation(path)
        pictures = [(path / "plot-arms.png", partial(draw_arms, summary=summary, name=name))]
        if gains_of(summary, rows):
            pictures.append((path / "plot-gain.png", partial(draw_gain, summary=summary, rows=rows, name=name)))
        return pictures
    vectors, labels = read_vectors(path, label, most)
    fill = partial(draw_vectors, points=in_the_plane(vectors), labels=labels, name=name, key=label)
    return [(path.resolve().parent / f"plot-{name}.png", fill)]


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

"""The gain of each arm of several evaluations against its seconds: a table, and a picture with a panel for each cell.

    python bench/gain.py evals/base-other evals/base-other-random evals/base-same … --out bench/figures/gain.png

Folders of the same questions, model, records and settings are one cell, named by the first of them; an arm that stands
in several of them, with other seeds, counts by the mean of each question. Each folder has the arm `none`. Bits per byte
only. Under a table stands the comparison that --primary named, in % of `none` too.
"""
import argparse
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import stats  # noqa: E402
from files import InputError, Parser, finished_rows, run_main  # noqa: E402
from plot import BLACK, BLUE, DASHED, VERMILLION, WIDTH, entitle, picture, short_lines  # noqa: E402
from report import print_table, results_of  # noqa: E402

MAY_DIFFER = {"arms", "seed", "primary", "batch_size", "model", "data", "index"}  # the last three are paths


def cells_of(folders):
    """({name of the cell: {arm: {"bpb": [its rows' values of each folder], "groups": [of each row], "seconds": [of
    a question, by batch], "kept": Counter of the rows by whether steps were kept}}}, {name: primary comparison})."""
    cells, names, settings_of, primary = {}, {}, {}, {}
    for folder in folders:
        settings, rows = results_of(folder)
        if settings["measure"] != "bpb" or "none" not in rows or len(rows) < 2:
            raise InputError(f"{folder}: found {settings['measure']} and the arms {', '.join(rows)}; expected bpb, and "
                             "none and another among them")
        shared = {key: value for key, value in settings.items() if key not in MAY_DIFFER}
        name = names.setdefault(json.dumps(shared, sort_keys=True), folder.name)
        if settings.get("primary"):
            primary.setdefault(name, settings["primary"])
        seconds = {}
        for _, timing in finished_rows(folder / "timings.jsonl", b'{"arm": '):
            if not timing["questions"]:  # of a rank to which none of the last questions fell
                continue
            seconds.setdefault(timing["arm"], []).append(timing["seconds"] / timing["questions"])
        if set(seconds) != set(rows):
            raise InputError(f"{folder}/timings.jsonl: found times of {', '.join(seconds) or 'no arm'}; expected of "
                             f"{', '.join(rows)}")
        for arm, its in settings["arms"].items():
            if settings_of.setdefault((name, arm), its) != its:
                raise InputError(f"{folder}: the arm {arm} has the settings {its}, and {settings_of[name, arm]} in "
                                 f"another folder of {name}; expected the same")
            own = sorted(rows[arm], key=lambda row: row["number"])
            of = cells.setdefault(name, {}).setdefault(arm, {"bpb": [], "seconds": [], "kept": Counter(),
                                                             "groups": [row["group"] for row in own]})
            of["bpb"].append([row["bpb"] for row in own])
            of["seconds"] += seconds[arm]
            of["kept"].update(row["applied"] for row in own if "applied" in row)
    return cells, primary


def change(none, arm, other=None):
    """{"change", "low", "high"}: of an arm against `none` or an `other`, in % of none's mean, 95 % interval by group;
    "p"; "worse": questions that lose over 1 %, and "most", their share at most (one-sided 95 %); "by_seed": the change
    of each folder."""
    a, b = (np.mean(one["bpb"], axis=0) for one in (other or none, arm))
    unit, found = np.mean(none["bpb"]), stats.paired(a, b, arm["groups"])
    worse = stats.worse_share(1 - b / a, 0.01)
    return {"worse": worse["count"], "most": worse["upper"], "n": len(a), "p": found["p"],
            "by_seed": [100 * (np.mean(one) - a.mean()) / unit for one in arm["bpb"]],
            **{key: 100 * found[of] / unit for key, of in (
                ("change", "difference"), ("low", "low"), ("high", "high"))}}


def percent(one):
    return f"{one['change']:+.1f} ({one['low']:+.1f} to {one['high']:+.1f})".replace("-", "−")


def show(cells, primary):
    for name, arms in cells.items():
        none, table = arms["none"], []
        print(f"\n{name}: {np.mean(none['bpb']):.4f} bits per byte as it is\n")
        for arm, of in arms.items():
            if arm != "none":
                one = change(none, of)
                table.append([arm, percent(one), f"{one['worse']} of {one['n']} (at most {one['most']:.0%})",
                              f"{of['kept'][True]} of {of['kept'].total()}" if of["kept"] else "",
                              ", ".join(f"{x:+.1f}" for x in one["by_seed"]).replace("-", "−"),
                              f"{np.median(of['seconds']):.1f}"])
        print_table(["arm", "% (95 %)", "worse by 1 %", "steps kept", "by seed", "s"], table)
        if name in primary:
            one, other = primary[name]
            found = change(none, arms[one], arms[other])
            print(f"\n{one} − {other}, the primary comparison: {percent(found)}, p = {found['p']:.2g}")


def draw(figure, cells):
    """A panel a cell: how much each arm changes the bits per byte, against the seconds of a question."""
    figure.set_size_inches(WIDTH, 2.9 * ((len(cells) + 1) // 2))
    grid = figure.subplots((len(cells) + 1) // 2, 2, squeeze=False)
    seconds_of = [np.median(of["seconds"]) for arms in cells.values() for arm, of in arms.items() if arm != "none"]
    for axes, (name, arms) in zip(grid.flat, cells.items()):
        for arm, of in arms.items():
            if arm == "none":
                continue
            one, seconds = change(arms["none"], of), float(np.median(of["seconds"]))
            colour = VERMILLION if arm == "ttt" else BLACK if "random" in arm else BLUE
            axes.plot([seconds] * 2, [one["low"], one["high"]], color=colour, linewidth=1.2)
            axes.plot(seconds, one["change"], "o", color=colour, markersize=5)
            left = not of["kept"]  # without steps it is fast, and the names of the slow ones stand on the right
            axes.annotate(short_lines(arm, 14), (seconds, one["change"]), (-5 if left else 5, 0), fontsize=7,
                          textcoords="offset points", color=colour, va="center", ha="right" if left else "left",
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})
        axes.axhline(0, color=BLACK, **DASHED)
        axes.set_xscale("log")
        axes.set_xticks([0.5, 1, 2, 5, 10, 20, 50], minor=False)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.minorticks_off()
        axes.set_xlim(min(seconds_of) / 4, max(seconds_of) * 4)  # room for the names
        axes.set_title(name)
        axes.tick_params(labelbottom=True)
    for axes in grid.flat[len(cells):]:
        axes.set_axis_off()
    figure.supxlabel("seconds a question", fontsize=9)
    figure.supylabel("bits per byte, change in %", fontsize=9)
    entitle(figure, "The gain of each arm (lower is better) and its cost; 95 % intervals")


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="finished evaluations")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="the picture")
    args = parser.parse_args()
    cells, primary = cells_of(args.folders)
    show(cells, primary)
    if args.out:
        with picture(args.out) as figure:
            draw(figure, cells)


if __name__ == "__main__":
    run_main(main)

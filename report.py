"""An evaluation's folder in numbers and words: each arm, and paired comparisons of arms and of models.

    results.jsonl, timings.jsonl  →  of_arm: mean and interval, accuracy, seconds, memory
                                     compared: one − other, question by question, with its p and the effect it could see

Statistics after Miller (arXiv 2411.00640): differences are taken within a question, intervals and p-values are
clustered by the rows' group, and stand beside the smallest effect that a run of this size would have seen with 80 %
power. p-values are Holm's over all comparisons but the one that was named beforehand (the primary). At the sizes people
run, accuracy resolves 7 points (300 questions of which 20 % change), so bits per byte and margins are the endpoints.
"""
import math
from pathlib import Path

import numpy as np

import stats
from files import InputError, finished_rows, read_json, write_json

OUR_ROW = b'{"number": '  # how each row of results.jsonl begins
ENDPOINTS = {"bpb": ("bpb", "bits per byte", -1), "loglik": ("margin", "nats of margin", 1),  # 1: more is better
             "generate": ("correct", "of the questions", 1)}
PAIRS = (("nearest", "random"), ("nearest", "context"), ("context", "random-context"), ("nearest+context", "context"))


def kind_of(arm):
    return arm.partition(":")[0]


def pairs_of(arms, primary=None):
    """[(arm, the arm it is compared with)], the primary comparison first: by default nearest − context, else the first.

    `arms` {name: k}. Every arm is compared with the run's first, and those of PAIRS with each other, at the same k if
    there is one.
    """
    names = list(arms)
    pairs = [(arm, names[0]) for arm in names[1:]]
    for kind, other in PAIRS:
        for arm in names:
            others = [name for name in names if kind_of(name) == other]
            if kind_of(arm) == kind and others:
                pairs.append((arm, next((name for name in others if arms[name] == arms[arm]), others[0])))
    if primary is None:
        primary = next((pair for pair in pairs if tuple(map(kind_of, pair)) == ("nearest", "context")), None)
    else:
        pairs.append(primary)
    pairs = sorted(dict.fromkeys(pairs), key=lambda pair: pair != primary)  # stable
    once = {frozenset(pair): pair for pair in (*pairs, *pairs[:1])}  # one − other is the test of other − one
    return [pair for pair in pairs if once[frozenset(pair)] == pair]


def compared(measure, one, other, names, primary):
    """The paired comparison of two lists of rows of the same questions: one − other. InputError for other questions,
    or for answers that were cut elsewhere, as by another tokenizer or for another window."""
    asked, others = ([(row["number"], row.get("bytes")) for row in rows] for rows in (one, other))
    if asked != others:
        differing = next((pair for pair in zip(asked, others) if pair[0] != pair[1]), (len(asked), len(others)))
        raise InputError(f"{' and '.join(names)}: found question (and bytes of its answer) {differing[0]} and "
                         f"{differing[1]}; expected the same, as with an --answer-tokens that cuts no answer")
    endpoint = ENDPOINTS[measure][0]
    a, b = (np.array([float(row[endpoint]) for row in rows]) for rows in (other, one))
    groups = [row["group"] for row in one]
    found = {"arm": names[0], "against": names[1], "primary": primary, **known(stats.paired(a, b, groups)),
             **known({"smallest_effect": stats.smallest_effect(a, b, groups)}),
             "worse": stats.worse_share(gains(measure, one, other), 0.01)}
    if measure != "bpb":
        gained = sum(x["correct"] and not y["correct"] for x, y in zip(one, other))
        lost = sum(y["correct"] and not x["correct"] for x, y in zip(one, other))
        found["mcnemar"] = {"gained": gained, "lost": lost, "p": stats.mcnemar(gained, lost), **known(
            {"smallest_effect": stats.smallest_accuracy_effect((gained + lost) / len(one), len(one))})}
    if measure == "loglik":  # McNemar's test takes questions as independent; this one does not
        right = (np.array([float(row["correct"]) for row in rows]) for rows in (other, one))
        found["accuracy"] = known(stats.paired(*right, groups))
    return found


def known(numbers):
    """The dict with None for the infinite: one group says nothing about others, and JSON has no infinity."""
    return {key: value if math.isfinite(value) else None for key, value in numbers.items()}


def gains(measure, one, other):
    """How much better each question became: in shares of its bits per byte, in the probability of the right option
    among the options, or from wrong (0) to right (1)."""
    if measure == "bpb":
        return np.array([1 - x["bpb"] / y["bpb"] for x, y in zip(one, other)])
    name = "p_gold" if measure == "loglik" else "correct"
    return np.array([float(x[name]) - float(y[name]) for x, y in zip(one, other)])


def with_holm(comparisons):
    """Adds p_holm to every test but that of the one primary comparison."""
    tests = [test for comparison in comparisons for test in (comparison, comparison.get("mcnemar"))
             if test and not test.get("primary")]
    for test, p in zip(tests, stats.holm([test["p"] for test in tests])):
        test["p_holm"] = p
    return comparisons


def of_arm(measure, rows, timings):
    """What is reported of one arm."""
    endpoint, n = ENDPOINTS[measure][0], len(rows)
    found = {"n": n, **known(stats.mean_interval(np.array([float(row[endpoint]) for row in rows]),
                                                 [row["group"] for row in rows]))}
    if measure != "bpb":
        found |= accuracy(rows)
        if kinds := {row["kind"] for row in rows if "kind" in row}:
            found["by_kind"] = {kind: {"n": len(own), **accuracy(own)} for kind in sorted(kinds)
                                for own in [[row for row in rows if row.get("kind") == kind]]}
    if measure == "loglik":
        found["accuracy_by_byte"] = sum(row["correct_by_byte"] for row in rows) / n
    if measure == "generate":
        parsed = [row for row in rows if row["choice"] is not None]
        found |= {"unparsed": 1 - len(parsed) / n, "truncated": sum(row["truncated"] for row in rows) / n,
                  "first_match": sum(row["first"] == row["gold"] for row in rows) / n,
                  "best_of_two": sum(row["best_of_two"] == row["gold"] for row in rows) / n,
                  "without_unparsed": sum(row["correct"] for row in parsed) / len(parsed) if parsed else None}
    if any("applied" in row for row in rows):
        found["not_adapted"] = sum(not row["applied"] for row in rows)
    if timings:
        found |= {"seconds": sum(one["seconds"] for one in timings) / sum(one["questions"] for one in timings),
                  "memory_gb": max(one["memory_gb"] for one in timings)}
    return found


def accuracy(rows):
    right = sum(row["correct"] for row in rows)
    low, high = stats.wilson(right, len(rows))
    return {"accuracy": right / len(rows), "accuracy_low": low, "accuracy_high": high}


def results_of(out):
    """(the settings of an evaluation's folder, {arm: [its rows, by question]})."""
    settings, rows = read_json(Path(out) / "config.json"), {}
    for _, row in finished_rows(Path(out) / "results.jsonl", OUR_ROW):
        rows.setdefault(row["arm"], []).append(row)
    if "arms" not in settings:
        raise InputError(f"{out}/config.json: found no arms; expected the folder of an evaluation")
    numbers = {len(own) for own in rows.values()}
    if len(numbers) != 1 or set(rows) != set(settings["arms"]) or numbers != {settings.get("questions", *numbers)}:
        raise InputError(f"{out}: not every question has a result of every arm; expected a run that was finished")
    return settings, rows


def summarise(out, primary=None):
    """Writes out/summary.json from results.jsonl and timings.jsonl, and returns it."""
    settings, rows = results_of(out)
    measure, arms = settings["measure"], settings["arms"]
    first = rows[next(iter(arms))]
    timings = [row for _, row in finished_rows(Path(out) / "timings.jsonl", b'{"arm": ')]
    summary = {"measure": measure, "benchmark": settings["benchmark"], "model": settings["model"],
               "questions": len(first), "arms": {
                   arm: of_arm(measure, rows[arm], [one for one in timings if one["arm"] == arm]) for arm in arms}}
    if measure != "bpb":
        gold = [row["gold"] for row in first]
        summary["baselines"] = {"majority": max(map(gold.count, set(gold))) / len(gold)}
        if measure == "loglik":
            summary["baselines"]["random"] = sum(1 / len(row["logps"]) for row in first) / len(gold)
    with_records = {(row["number"], "random" in kind_of(row["arm"])): row  # arms of a kind have the same ones
                    for own in rows.values() for row in own if "masked" in row}.values()
    if with_records:
        summary["records"] = {
            "masked": {rule: sum(row["masked"].get(rule, 0) for row in with_records)
                       for rule in sorted({rule for row in with_records for rule in row["masked"]})},
            "left_out": sum(row["left_out"] for row in with_records)}
    pairs = pairs_of({name: arm["k"] for name, arm in arms.items()}, primary)
    summary["comparisons"] = with_holm([
        compared(measure, rows[arm], rows[other], (arm, other), i == 0) for i, (arm, other) in enumerate(pairs)])
    write_json(Path(out) / "summary.json", summary)
    return summary


def show(summary):
    """Prints the table of a summary, with a sentence under it for each comparison."""
    measure = summary["measure"]
    print(f"{summary['benchmark']}, {summary['questions']} questions, {summary['model']}")
    heading = {"bpb": "bits per byte", "loglik": "margin, nats", "generate": "right"}[measure]
    columns = [heading, "95 % interval", *(["accuracy", "95 % interval"] if measure == "loglik" else []),
               "s a question", "GB"]
    table = []
    for name, arm in summary["arms"].items():
        cells = [f"{arm['mean']:.4f}", interval(arm, ".4f")] if measure != "generate" else []
        if measure != "bpb":
            cells += [f"{arm['accuracy']:.1%}", accuracy_interval(arm)]
        table.append([name, *cells, *(f"{arm[key]:.2f}" if key in arm else "" for key in ("seconds", "memory_gb"))])
    print_table(["arm", *columns], table)
    for name, arm in summary["arms"].items():
        for kind, own in arm.get("by_kind", {}).items():
            print(f"{name}, {kind}: {own['accuracy']:.1%} of {own['n']} ({accuracy_interval(own)})")
        if arm.get("not_adapted"):
            print(f"{name}: {arm['not_adapted']} of {arm['n']} questions were answered without a step")
        if measure == "loglik":
            print(f"{name}, by byte: {arm['accuracy_by_byte']:.1%}")
        if measure == "generate":
            kept = arm["without_unparsed"]
            print(f"{name}: {arm['unparsed']:.1%} gave no answer and count as wrong, {arm['truncated']:.1%} were cut. "
                  f"Laxer scorers: first match {arm['first_match']:.1%}, the better of first and last "
                  f"{arm['best_of_two']:.1%}, without the unparsed {'–' if kept is None else f'{kept:.1%}'}")
    if "baselines" in summary:
        print("; ".join(f"{name} {value:.1%}" for name, value in summary["baselines"].items()))
    if "records" in summary:
        masked = ", ".join(f"{n} by {rule}" for rule, n in summary["records"]["masked"].items()) or "none"
        print(f"records masked: {masked}; left out: {summary['records']['left_out']}")
    for comparison in summary["comparisons"]:
        print(sentence(measure, comparison))


def sentence(measure, c):
    """A comparison in words."""
    unit, better = ENDPOINTS[measure][1:]
    words = f"{c['arm']} − {c['against']}: {c['difference']:+.4f} {unit} ({interval(c, '+.4f')}, "
    words += f"p = {c['p']:.3g}, the primary comparison)" if c["primary"] else f"p = {c['p_holm']:.3g} by Holm)"
    shown = (c["p"] if c["primary"] else c["p_holm"]) < 0.05  # the interval is uncorrected
    verdict = "no difference was shown" if not shown else "better" if c["difference"] * better > 0 else "worse"
    worse = c["worse"]
    words += (f"; {verdict}; the run could have seen {as_text(c['smallest_effect'], '.4f')}; {worse['count']} of "
              f"{c['n']} questions became worse by more than 1 % (at most {worse['upper']:.0%} of all)")
    if m := c.get("mcnemar"):
        p = f"p = {m['p']:.3g}" if "p_holm" not in m else f"p = {m['p_holm']:.3g} by Holm"
        words += (f"; {m['gained']} became right and {m['lost']} wrong (McNemar {p}; could have seen "
                  f"{as_text(m['smallest_effect'], '.1%')})")
    if accuracy := c.get("accuracy"):
        words += f"; accuracy {accuracy['difference']:+.1%} ({interval(accuracy, '+.1%')})"
    return words


def as_text(value, form):
    return "–" if value is None else format(value, form)


def interval(found, form):
    return f"{as_text(found['low'], form)} to {as_text(found['high'], form)}"


def accuracy_interval(found):
    return f"{found['accuracy_low']:.1%} to {found['accuracy_high']:.1%}"


def print_table(columns, rows):
    """Prints a Markdown table."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, ["-" * width for width in widths], *rows]:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")

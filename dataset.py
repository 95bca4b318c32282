"""The data of synth.py: rows as they come in, and the data set as it goes out.

    work_row    any row → {"id", "source", "text", "questions", "truth", "responses", …, "calls"}, as the stages pass it
    release     the finished rows → FineMed-SFT/, FineMed-DPO/ in the released columns; provenance/ line for line
    report      the counts of the stages → manifest.json, and README.md, the dataset card
    pictures    the same as figures/: rows by stage, scores beside those of other data sets, t-SNE of the departments

FineMed-SFT has a file for each specialty, as released; a row whose specialty is not known is in its department's file.
"""
import contextlib
import heapq
import json
import re
from collections import Counter, defaultdict
from functools import partial
from itertools import islice

import plot
import prompts
from benchmarks import gold_of, options_of
from files import DISCLAIMER, InputError, read_data, read_json_if_there, write_json, written_aside
from messages import names_in
from prompts import CHAIN, NO_SPECIALTY, ROLES, RULES, UNKNOWN, version
from rows import keys_of, messages_of, random_number

# ----- rows in -------------------------------------------------------------------------------------------------------


def line_of(row):
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"


def rows_in(path):
    """Yields the rows that a stage has written; InputError if it has not run."""
    if not path.exists():
        raise InputError(f"{path}: no such file; expected the rows of stage {path.stem}: run it first")
    for _, _, row in read_data(path):
        if isinstance(row, InputError):
            raise row
        yield row



def work_row(row, where):
    """A row of a corpus or data set as the stages pass it on; InputError if it has neither a text nor a question.

    {"text": …} is asked about. A row may bring its question (instruction or question), its truth (options and the
    letter of one, as in benchmarks.choice, or a reference) and a response, which then are not asked for.
    """
    if {"id", "source", "calls", "questions"} <= row.keys():
        return row
    question = next((row[name] for name in names_in(row, ("instruction", "question"))), None)
    text, response = row.get("text") or "", next((row[name] for name in names_in(row, ("response", "output"))), None)
    if not all(isinstance(one or "", str) for one in (question, text, response)) or not (text.strip() or question):
        raise InputError(f"found no text {keys_of(row)}; expected text, or a question under instruction or question")
    truth = None
    if names_in(row, ("options", "opa")):
        options = options_of(row, may_repeat=True)
        truth = {"options": options, "letter": gold_of(row, options, ("answer_idx", "answer_index", "label", "answer"))}
    elif isinstance(reference := row.get("reference") or row.get("answer"), str) and question:
        truth = {"reference": reference}
    name = f"{random_number('text', text, question):016x}"
    return {"id": name, "source": where, "text": text, "language": row.get("language") or "en", "truth": truth,
            "questions": [question] if question else [], "responses": [{"text": response}] if response else [],
            **({"instruction": question} if question else {}),
            **{key: row[key] for key in ("url", "instruction_type") if row.get(key)}, "calls": {}}


def corpus(paths, limit=None):
    """Yields the first `limit` rows of corpus files, each through work_row; InputError names the first wrong one."""
    def found():
        for path in paths:
            for _, where, row in read_data(path):
                if isinstance(row, InputError):
                    raise row
                try:
                    yield work_row(row, where)
                except InputError as error:
                    raise InputError(f"{where}: {error}") from None
    return islice(found(), limit)


def data_rows(path):
    """Yields {source, instruction, response, calls} for the last question and answer of every row of a data set."""
    for _, where, row in read_data(path):
        try:
            if isinstance(row, InputError):
                raise row
            messages = messages_of(row)
        except InputError as error:
            raise error if error is row else InputError(f"{where}: {error}") from None
        question = next((turn["content"] for turn in messages[-2::-1] if turn["role"] == "user"), "")
        yield {"source": where, "instruction": question, "response": messages[-1]["content"], "calls": {}}

# ----- rows out ------------------------------------------------------------------------------------------------------


def file_of(row):
    """The file of a row in FineMed-SFT, as released: its specialty's, else its department's; one for all of the Other
    Departments."""
    known = row["specialty"] not in (UNKNOWN, NO_SPECIALTY) and row["department"] != "Other Departments"
    name = row["specialty" if known else "department"]
    return "".join(word[0].upper() + word[1:] for word in re.findall("[A-Za-z]+", name)) + ".jsonl"


def sft_row(row):
    return {"text": row["text"], "instruction": row["instruction"], "complexity": row["difficulty"],
            "quality": row["quality"], "language": row["language"], "response": row["response"],
            "instruction_type": row["instruction_type"]}


def dpo_row(row):
    prompt = prompts.filled(prompts.PROMPTS["pair"]["think"], {"question": row["instruction"]})
    turns = {"prompt": ("user", prompt), "chosen": ("assistant", row["response"]),
             "rejected": ("assistant", row["rejected"])}
    return {**{name: sft_row(row)[name] for name in ("text", "complexity", "quality", "language")},
            **{name: [{"content": text, "role": role}] for name, (role, text) in turns.items()}}


def provenance(row):
    """Of a written row: its text and place, its question and how it was chosen, scores, proof, calls, rule versions."""
    names = ("id", "source", "url", "department", "specialty", "instruction", "chosen_by", "quality", "difficulty",
             "relevance", "label", "ranking", "ranked_by", "paired", "calls")
    return {**{name: row[name] for name in names if name in row}, "rules": {stage: version(stage) for stage in CHAIN}}


def release(run):
    """Writes FineMed-SFT/ and FineMed-DPO/ in the released shapes, and provenance/ with a line for each line."""
    with contextlib.ExitStack() as stack:
        folders = {name: stack.enter_context(written_aside(run.out / name))
                   for name in ("FineMed-SFT", "FineMed-DPO", "provenance")}
        files = {}

        def write(folder, file, row, made):
            for path, line in ((folders[folder] / file, made),
                               (folders["provenance"] / folder / file, provenance(row))):
                if path not in files:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    files[path] = stack.enter_context(open(path, "wb"))
                files[path].write(line_of(line))
        for folder in folders.values():
            folder.mkdir()
        for row in rows_in(run.path("stages", "filter")):
            write("FineMed-SFT", file_of(row), row, sft_row(row))
            if "rejected" in row:
                write("FineMed-DPO", "FineMed-DPO.jsonl", row, dpo_row(row))
        for file in files.values():
            file.close()  # before its folder is flushed and renamed


def report(run, keep=False, draw=False):
    """Writes manifest.json and README.md, the dataset card, from the states of the stages; the manifest.

    With `keep` (one stage was run by itself) sources, licence and roles that this run has none of stay as they were.
    With `draw` the pictures are drawn too.
    """
    before = read_json_if_there(run.out / "manifest.json") if keep else {}
    roles = {role: getattr(run, role).model for role in ROLES if getattr(run, role)}
    states = {path.stem: read_json_if_there(path) for path in sorted((run.out / "stages").glob("*.json"))}
    states = {name: states[name] for name in (*CHAIN, *sorted({*states} - {*CHAIN})) if name in states}
    if not states:
        raise InputError(f"{run.out}: found no stages; expected the folder of a run")
    used = defaultdict(Counter)
    for state in states.values():
        for model, counts in state["models"].items():
            used[model].update(counts)
    for model, counts in used.items():
        if model in run.prices:
            counts["cost"] = round(sum(price * counts[name] for price, name in zip(
                run.prices[model], ("prompt_tokens", "completion_tokens"))) / 1e6, 4)
    manifest = {"sources": run.sources or before.get("sources", []), "licence": run.licence or before.get("licence"),
                "seed": run.seed, "filter": run.filtering or before.get("filter"),
                "roles": before.get("roles", {}) | roles,
                "models": {model: dict(counts) for model, counts in sorted(used.items())},
                "parameters": prompts.PARAMETERS, "rules": {stage: version(stage) for stage in RULES},
                "stages": {name: {key: state[key] for key in state if key != "models"}
                           for name, state in states.items()},
                "means": means(run), "failed": len(run.failed),
                "pictures": pictures(run, states) if draw else before.get("pictures", {})}
    write_json(run.out / "manifest.json", manifest)
    with written_aside(run.out / "README.md") as aside:
        aside.write_text(card(manifest), encoding="utf-8", errors="backslashreplace")
    return manifest


def means(run):
    """{"common": {rows, quality, complexity}, "complex": …} of the rows that are written, and of each judged data set.
    """
    sums, path = defaultdict(Counter), run.path("stages", "filter")
    for row in rows_in(path) if path.exists() else ():
        sums[row["instruction_type"]].update(rows=1, quality=row["quality"], complexity=row["difficulty"])
    for path in judged(run):
        for row in rows_in(path):
            sums[f"{set_of(path)}, judged"].update(rows=1, quality=row["quality"], complexity=row["complexity"])
    return {kind: {"rows": one["rows"], "quality": round(one["quality"] / one["rows"], 3),
                   "complexity": round(one["complexity"] / one["rows"], 3)} for kind, one in sorted(sums.items())}


def judged(run):
    """The files of data sets that a judge has scored."""
    return sorted((run.out / "stages").glob("judge-*.jsonl"))


def set_of(path):
    return path.stem.removeprefix("judge-")


def pictures(run, states):
    """Draws figures/ and returns {picture: its file below OUT, or why there is none}.

    stages: rows in and out.  scores: how quality and complexity are distributed, as the teacher scored the questions,
    and, below, as the judge scored each data set.  departments: t-SNE of the questions' vectors, which need the
    encoder of --encoder; of each department at most 1,000 questions, drawn by their texts.
    """
    path, found = run.path("stages", "filter"), {}
    shown = {"this data set (teacher)": path, **{f"{set_of(one)} (judge)": one for one in judged(run)}}

    def scores(figure):
        sets = {name: columns for name, one in shown.items() if one.exists()
                for columns in plot.read_scores([one]).values() if columns}
        if not sets:
            raise InputError("no scores yet; expected the stage filter or judge to have run")
        plot.draw_scores(figure, sets)

    def departments(figure):
        if not run.encode:
            raise InputError("no --encoder; expected the folder of an embedding model")
        labels, questions = sample(path)
        plot.draw_vectors(figure, plot.in_the_plane(run.encode(questions)), labels, "The data set", "department")
    with written_aside(run.out / "figures") as folder:
        folder.mkdir()
        for name, fill in {"stages": partial(plot.draw_stages, stages=states, name="The data set"), "scores": scores,
                           "departments": departments}.items():
            try:
                with plot.picture(folder / f"{name}.png") as figure:
                    fill(figure)
                found[name] = f"figures/{name}.png"
            except InputError as error:  # a package or rows are missing: the counts are there all the same
                found[name] = str(error).removeprefix(f"{folder}/")
    return found


def sample(path, most=1000):
    """([department], [question]) of the rows of a file: of each department at most `most`, drawn by their ids."""
    heaps = defaultdict(list)
    for row in rows_in(path):
        heap, one = heaps[row["department"]], (random_number("picture", row["id"]), row["instruction"])
        (heapq.heappush if len(heap) < most else heapq.heappushpop)(heap, one)
    pairs = [(label, question) for label, heap in sorted(heaps.items()) for _, question in sorted(heap)]
    return [label for label, _ in pairs], [question for _, question in pairs]


def card(manifest):
    """The dataset card in Markdown."""
    def table(columns, rows):
        return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (columns, ["---"] * len(columns), *rows))
    stages = [(name, state["in"], state["out"], ", ".join(f"{n} {rule}" for rule, n in state["dropped"].items()),
               ", ".join(f"{n} {what}" for what, n in state["found"].items() if ": " not in what), state["version"])
              for name, state in manifest["stages"].items()]
    models = [(model, *(counts.get(name, "") for name in ("calls", "failed", "repaired", "prompt_tokens",
                                                          "completion_tokens", "cost")))
              for model, counts in manifest["models"].items()]
    return "\n\n".join([
        "# A medical data set written by language models", DISCLAIMER,
        "Made by synth.py after FineMedLM-o1 (arXiv 2501.09213). FineMed-SFT/ has questions and answers by department, "
        "FineMed-DPO/ preference pairs, provenance/ the origin of each of their lines. No clinician has reviewed them.",
        "## Sources", f"Licence of the sources: {manifest['licence'] or 'not stated'}.",
        table(["file", "rows", "SHA-256"], [(one["path"], one["rows"], one["sha256"]) for one in manifest["sources"]]),
        "## Stages", table(["stage", "in", "out", "dropped", "found", "rules"], stages),
        "A response is *verified* if its letter is the right option's, *judged* if a model found it to agree with the "
        "reference, and *unproven* otherwise.",
        "## Pictures", "\n\n".join(f"![{name}]({file})" if file.startswith("figures/") else f"No picture of {name}: "
                                   f"{file}." for name, file in manifest["pictures"].items()) or "None.",
        "## Means", table(["rows", "n", "quality", "complexity"], [(kind, *one.values())
                                                                  for kind, one in manifest["means"].items()]),
        "## Models", ", ".join(f"{role}: {model}" for role, model in manifest["roles"].items()),
        table(["model", "calls", "failed", "repaired", "tokens read", "tokens written", "cost"], models),
        "Parameters, and the hashes of the prompts as `rules`, are in manifest.json."]) + "\n"

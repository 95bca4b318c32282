"""Raw medical text in; rows for SFT, reasoning traces and preference pairs out: FineMed, made again (arXiv 2501.09213).

    texts     the corpus, filtered                        classify  6 departments, then 29 specialties
    ask       two questions a text                        score     quality, difficulty, relevance, case details
    select    one of the two, by the original's rules     respond   common: two styles; complex: two long traces
    verify    verified | judged | unproven, wrong again   rank      the better of two answers
    pair      chosen: the trace, rejected: a plain answer filter    what is left is written in the released shapes
    judge     quality and complexity of any data set      report    manifest.json, README.md

A stage is a script for one row: it yields the calls that it wants, is sent their replies, and returns the row. Every
reply is stored under a hash of its call (teachers.py), so a script is simply run again from its beginning, over every
row, until no call is missing. A run that was killed, a changed prompt and a batch that another engine answered are
therefore one case: what is stored is read, what is missing is asked. No more than a row is held, and rows are written
in the order of the corpus, so the files do not depend on when a reply came.

    python synth.py preview 3 --corpus corpus.jsonl --teacher http://localhost:8000/v1 --out data/finemed
    python synth.py run --corpus corpus.jsonl --teacher http://localhost:8000/v1 --judge http://localhost:8001/v1 \\
        --out data/finemed
    python synth.py score --teacher local:models/smollm2-135m-instruct --out data/finemed    one stage of it
    python synth.py export-batch --stage score --batch in.jsonl --teacher URL --teacher-model NAME --out data/finemed
    python synth.py import-batch --batch out.jsonl --out data/finemed    what `vllm run-batch` made of in.jsonl
    python synth.py judge --data ours.jsonl theirs.jsonl --judge URL --out data/judged       any files

OUT has FineMed-SFT/ and FineMed-DPO/ (sft.py, dpo.py and retrieve.py take them), provenance/ (a line for each of their
lines), stages/ and dropped/ (each stage's rows, and those it dropped, with rule and evidence), failed.jsonl, the calls.
"""
import argparse
import contextlib
import json
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from benchmarks import kind_and_file, read_benchmark
from calls import Reply, Store, export_batch, import_batch, json_in, key_of
from dataset import card, corpus, data_rows, line_of, release, report, rows_in
from files import (
    InputError,
    Parser,
    appended,
    finished_rows,
    hold,
    number,
    read_data,
    read_json_if_there,
    run_main,
    sha256,
    whole,
    write_json,
    written_aside,
)
from parallel import pick_device
from prompts import CHAIN, version
from stages import SCRIPTS, TALLIES, Dropped, Scores
from teachers import Teacher
from weights import weights_sha256


@dataclass
class Run:
    """All that stages share. A role that nobody has is None; the same teacher may have several roles."""
    out: Path
    store: Store
    teacher: Teacher | None = None  # classifies, asks, scores, answers
    reasoner: Teacher | None = None  # writes the long traces
    judge: Teacher | None = None
    ranker: object = None  # scores answers: the judge, or Scores of a reward model
    policy: Teacher | None = None  # writes the rejected answers, if they are to be on-policy
    filtered: object = None  # filters.filtered
    settings: object = None  # filters.Settings
    filtering: dict | None = None  # what the manifest says of them
    encode: object = None  # texts -> vectors, for the filter and the picture of the departments
    attempts: int = 3  # at a trace that was found wrong
    seed: int = 0
    failed: dict = field(default_factory=dict)  # {key: why there is no reply}
    note: object = lambda row: None  # appends to failed.jsonl
    prices: dict = field(default_factory=dict)  # {model: (of a million tokens read, written)}
    sources: list = field(default_factory=list)
    licence: str | None = None

    def teachers(self):
        """The teachers, each once."""
        found = {id(one): one for one in (self.teacher, self.reasoner, self.judge, self.ranker, self.policy) if one}
        return list(found.values())

    def path(self, folder, stage):
        return self.out / folder / f"{stage}.jsonl"

# ----- a stage -------------------------------------------------------------------------------------------------------


def reply_of(run, key, call):
    """The stored Reply of a call, or one that says why there is none, or None if it is still to be asked."""
    reply = run.store.get(key)
    if reply and not reply.failure and fits(reply, call.schema):
        return reply
    return Reply(key, failure=run.failed[key]) if key in run.failed else None


def fits(reply, schema):
    """Whether a reply is JSON of the schema: one that was imported may not be, and the teacher then has it repaired."""
    try:
        return schema is None or json_in(reply.text, schema) == reply.value
    except InputError:
        return False


def played(run, stage, row):
    """Runs a script over one row as far as stored replies carry it.

    (the row that follows, None) | (the row, (rule, evidence)) | None if calls are missing; [(teacher, key, Call)] of
    those; {key: (model, Reply)} of those that it had, each once.
    """
    script, replies, had = SCRIPTS[stage](run, row), None, {}
    try:
        while True:
            missing, wanted, replies = [], script.send(replies), []
            for teacher, call in wanted:
                if teacher is None:
                    raise InputError(f"{stage}: a row wants a model that is not given; expected --teacher, and --judge "
                                     "for judge")
                key = key_of(teacher.model, call)
                if reply := reply_of(run, key, call):
                    had[key] = teacher.model, reply
                    replies.append(reply)
                else:
                    missing.append((teacher, key, call))
            if missing:
                return None, missing, had
    except InputError as error:
        raise InputError(f"{stage}, {row['source']}: {error}") from None
    except StopIteration as end:
        return (end.value | {"calls": end.value["calls"] | ({stage: [*had]} if had else {})}, None), [], had
    except Dropped as lost:
        return (row, lost.args), [], had


def missing_calls(run, stage, rows, teacher):
    """Yields (key, Call) for what the rows want of a teacher and the store does not have."""
    for row in rows():
        for of, key, call in played(run, stage, row)[1]:
            if of is teacher:
                yield key, call


def settle(run, stage, rows):
    """Asks until no row misses a reply: a teacher, again for what depends on its replies, then one that is still to be
    asked. A pass over the rows takes time in which no one is asked, so none is made for a teacher without calls."""
    teacher = next(iter(run.teachers()), None)
    while teacher:
        found, others, flying = False, [], {}  # flying, {key: Call}: the same call of two rows is asked once

        def calls(teacher=teacher, others=others, flying=flying):
            for row in rows():
                for of, key, call in played(run, stage, row)[1]:
                    if of is not teacher:
                        others[:] = [of]
                    elif key not in flying and not reply_of(run, key, call):  # it may have come by now
                        flying[key] = call
                        yield call
        bar = tqdm(desc=f"{stage}: {teacher.model}", unit="call", delay=2, disable=None, file=sys.stderr)
        with bar, contextlib.closing(teacher.ask(calls())) as replies:
            for _, reply in replies:
                found, call = True, flying.pop(reply.key)
                if why := reply.failure or (None if fits(reply, call.schema) else "JSON that was not asked for"):
                    run.failed[reply.key] = why
                    run.note({"key": reply.key, "stage": stage, "model": teacher.model, "reason": why})
                bar.update()
        if flying:
            raise RuntimeError(f"{stage}: {len(flying)} calls to {teacher.model} came back without a reply")
        if not found:
            teacher = others[0] if others else None


def run_stage(run, stage, rows, name=None):
    """Asks what the rows of `rows()` want, then writes what follows of them, in their order; the state."""
    settle(run, stage, rows)
    used = defaultdict(Counter)

    def results():
        for row in rows():
            result, _, had = played(run, stage, row)
            for model, reply in had.values():
                used[model].update(calls=1, failed=bool(reply.failure), repaired=bool(reply.repaired), **{
                    name: reply.usage.get(name) or 0 for name in ("prompt_tokens", "completion_tokens")})
            yield result
    return written(run, stage, results(), name, used)


def written(run, stage, results, name=None, used=None):
    """Writes the rows of [(row, None or (rule, evidence)), …] to stages/ and dropped/, and their counts beside."""
    name = name or stage
    counts, dropped, tally = Counter({"in": 0, "out": 0}), Counter(), Counter()
    with written_aside(run.path("stages", name)) as kept, written_aside(run.path("dropped", name)) as lost, \
            open(kept, "wb") as rows, open(lost, "wb") as others:
        for row, reason in results:
            counts["in"] += 1
            if reason:
                dropped[reason[0]] += 1
                others.write(line_of({"rule": reason[0], "evidence": reason[1], **row}))
            else:
                counts["out"] += 1
                tally.update(TALLIES.get(stage, lambda row: [])(row))
                rows.write(line_of(row))
    state = {**counts, "dropped": dict(sorted(dropped.items())), "found": dict(sorted(tally.items())),
             "version": version("judge" if stage == "compare" else stage),
             "models": {model: dict(one) for model, one in sorted((used or {}).items())}}
    write_json(run.out / "stages" / f"{name}.json", state)
    lost = "".join(f", {n:,} {rule}" for rule, n in sorted(dropped.items()))
    print(f"{name}: {counts['in']:,} in, {counts['out']:,} out{lost}", file=sys.stderr)
    return state


def filtered(run, rows):
    """A filter's (row, None or (rule, evidence)) of rows; all are kept where there is no filter."""
    return run.filtered(rows, run.settings) if run.filtered else ((row, None) for row in rows)

# ----- the whole -----------------------------------------------------------------------------------------------------


def chain(run, stages, first):
    """Runs the stages one after another: `first()` yields the rows of the first, and each reads what the one before
    has written. After `filter` the data set is written too."""
    rows = first
    for stage in stages:
        if stage in SCRIPTS:
            run_stage(run, stage, rows)
        else:
            written(run, stage, filtered(run, rows()))
        if stage == "filter":
            release(run)
        rows = lambda stage=stage: rows_in(run.path("stages", stage))


def judge_files(run, files):
    """Quality and complexity of the rows of data sets, {name: file}, each into stages/judge-NAME.jsonl."""
    return {name: run_stage(run, "judge", lambda file=file: data_rows(file), f"judge-{name}")
            for name, file in files.items()}


def compare_files(run, one, other):
    """Which of two models' answers to the questions that both files have are better: stages/compare-ONE-OTHER.jsonl."""
    answers = {row["instruction"]: row["response"] for row in data_rows(other)}

    def both():
        for row in data_rows(one):
            if row["instruction"] in answers:
                yield row | {"answers": (row["response"], answers[row["instruction"]])}
    name = f"compare-{Path(one).stem}-{Path(other).stem}"
    return {name: run_stage(run, "compare", both, name)}

# ----- preview -------------------------------------------------------------------------------------------------------


def preview(run, args):
    """Takes the first rows through all stages, prints each in full, and returns what the whole corpus would take.

    Its replies are stored like any other, so the run that follows does not pay for them again.
    """
    own = replace(run, out=run.out / "preview")
    chain(own, CHAIN, lambda: corpus(args.corpus, args.n))
    last = {}
    for stage in CHAIN:  # a row as the furthest stage has it; a dropped one with its reason
        for folder in ("stages", "dropped"):
            last |= {row["id"]: row for row in rows_in(own.path(folder, stage))}
    for row in last.values():
        print(f"----- {row['source']}")
        for name, value in row.items():
            if name not in ("id", "source", "calls") and value not in (None, [], ""):
                print(f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    manifest, total = report(own), sum(source["rows"] for source in run.sources)
    scale = total / max(len(last), 1)
    return {"texts": total, "previewed": len(last), "models": {
        model: {name: round(n * scale, 2) if name == "cost" else round(n * scale) for name, n in counts.items()}
        for model, counts in manifest["models"].items()}}

# ----- command line --------------------------------------------------------------------------------------------------


def price(text):
    model, _, prices = text.rpartition("=")
    try:
        read, wrote = map(number(0), prices.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected MODEL=READ,WRITTEN, for a million tokens") from None
    return model, (read, wrote)


def parse_args(argv):
    parser = Parser(prog="synth.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.flag
    commands = ("run", "preview", *CHAIN, "judge", "report", "export-batch", "import-batch")
    parser.add_argument("command", choices=commands, metavar="COMMAND",
                        help=f"run, preview N, report, export-batch, import-batch, a stage: {', '.join(CHAIN)}, judge")
    parser.add_argument("n", nargs="?", type=whole(1), help="preview: how many texts")
    flag("--corpus", "run, preview, texts: rows with text", nargs="+", metavar="FILE")
    flag("--data", "one stage: its rows, instead of those of the stage before; judge: data sets", nargs="+",
         metavar="FILE")
    flag("--against", "judge: another model's answers to the same questions", metavar="FILE")
    flag("--out", "the folder of everything that is made; goes on where it stopped", required=True, metavar="DIR")
    for role, text in (("teacher", "classifies, asks, scores, answers"),
                       ("reasoner", "writes the long traces (default: the teacher)"),
                       ("judge", "checks against references, ranks where there is no reward model, judges data sets"),
                       ("policy", "its answers become the rejected ones (default: plain ones of the teacher)")):
        flag(f"--{role}", f"{text}; an address such as http://localhost:8000/v1, or local:DIR", metavar="URL")
        flag(f"--{role}-model", "its name at that address, if there are several", metavar="NAME")
    flag("--reward", "a reward model that ranks, a LlamaForSequenceClassification (default: the judge)", metavar="DIR")
    flag("--same-judge", "the judge may be a model that writes; without --judge, the teacher", action="store_true")
    flag("--allow-remote", "an address may be another machine's, which then sees the corpus", action="store_true")
    flag("--concurrency", "calls at a time, at most", type=whole(1))
    flag("--retry-failed", "asks again what failed.jsonl lists", action="store_true")
    flag("--attempts", "at a trace that was found wrong", 3, type=whole(0))
    flag("--limit", "only the first so many texts", type=whole(1))
    flag("--benchmark", "questions that no row may hold", type=kind_and_file, nargs="+", default=[],
         metavar="KIND=FILE")
    flag("--languages", "of the rows that are kept, as ISO 639-1", ["en"], nargs="+", metavar="CODE")
    flag("--encoder", "drops questions whose vectors are nearly those of another or of --benchmark, by a folder of "
         "sentence-transformers; the threshold is of all-MiniLM-L6-v2 (default: by their words alone). run and report "
         "draw the departments by it", metavar="DIR")
    flag("--no-filter", "keeps duplicates, leaks and spam", action="store_true")
    flag("--stage", "export-batch: whose missing calls are written", choices=[*SCRIPTS], metavar="STAGE")
    flag("--role", "export-batch: whose calls", "teacher", choices=("teacher", "reasoner", "judge", "policy"))
    flag("--batch", "export-batch writes it, import-batch reads it, in OpenAI's batch format", metavar="FILE")
    flag("--device", "of a reward model and an encoder", "auto", choices=("auto", "cpu", "cuda"))
    flag("--licence", "of the sources, for the card (default: not stated)")
    flag("--price", "for the estimate, of a million tokens read and written", type=price, nargs="+", default=[],
         metavar="MODEL=READ,WRITTEN")
    flag("--seed", "of samples and ties", 0, type=whole(0))
    flag("--json", "print one JSON object instead of text", action="store_true")
    args = parser.parse_args(argv)
    if (args.command == "preview") != (args.n is not None):
        parser.error("found preview without N, or a number after another command; expected preview N")
    if args.command in ("run", "preview", "texts") and not args.corpus:
        parser.error(f"{args.command}: expected --corpus FILE")
    if args.command == "judge" and (not args.data or (args.against and len(args.data) > 1)):
        parser.error("judge: expected --data FILE…, or one FILE and --against another")
    if args.command.endswith("batch") and (not args.batch or (args.command == "export-batch" and not args.stage)):
        parser.error(f"{args.command}: expected --batch FILE{' and --stage' * (args.command == 'export-batch')}")
    return args


def opened(args, stack):
    """The Run of the flags: its store, its teachers, and the failures of earlier runs."""
    out = Path(args.out)
    hold(out)
    out.mkdir(parents=True, exist_ok=True)
    if args.retry_failed:
        (out / "failed.jsonl").unlink(missing_ok=True)
    failed = {row["key"]: row["reason"] for _, row in finished_rows(out / "failed.jsonl", b'{"key": ')}
    store = stack.enter_context(contextlib.closing(Store(out / "calls.sqlite")))
    run = Run(out, store, attempts=args.attempts, seed=args.seed, failed=failed,
              note=stack.enter_context(appended(out / "failed.jsonl")), prices=dict(args.price), licence=args.licence)
    for role in ("teacher", "reasoner", "judge", "policy"):
        if spec := getattr(args, role):
            settings = {"concurrency": args.concurrency} if args.concurrency else {}
            teacher = Teacher.open(spec, run.store, model=getattr(args, f"{role}_model"),
                                   allow_remote=args.allow_remote, retry_failed=args.retry_failed, **settings)
            setattr(run, role, stack.enter_context(contextlib.closing(teacher)))
    run.reasoner = run.reasoner or run.teacher
    run.judge = run.judge or (run.teacher if args.same_judge else None)
    run.ranker = reward_scores(args, run.store) if args.reward else run.judge
    if not args.same_judge:
        check_judge(run, args.data or ())
    run.sources = [{"path": str(path), "rows": sum(1 for _ in read_data(path)), "sha256": sha256(path)}
                   for path in args.corpus or ()]
    if empty := [source["path"] for source in run.sources if not source["rows"]]:
        raise InputError(f"{empty[0]}: found no rows; expected rows with text")
    run.encode = encoder_of(args) if args.encoder else None
    if not args.no_filter and {"texts", "filter", "run", "preview"} & {args.command}:
        from filters import Settings, filtered
        questions = [question for kind, file in args.benchmark for question in read_benchmark(kind, file)]
        run.filtered = filtered
        run.settings = Settings(questions=questions, languages=tuple(args.languages), encode=run.encode)
        run.filtering = {"languages": args.languages, "encoder": args.encoder, "benchmarks": [
            {"kind": kind, "path": file, "sha256": sha256(file)} for kind, file in args.benchmark]}
    return run


def encoder_of(args):
    """texts -> float32 [N, D] by the encoder of --encoder."""
    from encoder import Encoder
    return Encoder.from_dir(args.encoder, args.device).encode


def reward_scores(args, store):
    """The reward model of --reward as a teacher whose replies are scores."""
    from reward import load_reward, rewards
    model, tokenizer = load_reward(args.reward, pick_device(args.device))

    def score(pairs):
        return rewards(model, tokenizer, [[{"role": "user", "content": question},
                                           {"role": "assistant", "content": text}] for question, text in pairs])
    return Scores(f"reward:{Path(args.reward).name}@{weights_sha256(args.reward)[:12]}", score, store)


def check_judge(run, data):
    """InputError if the judge is a model that writes here, or that wrote the data by the manifest beside or above it.
    """
    writers = {one.model for one in (run.teacher, run.reasoner, run.policy) if one}
    for folder in {parent for path in data for parent in list(Path(path).resolve().parents)[:2]}:
        roles = read_json_if_there(folder / "manifest.json").get("roles", {})
        writers |= {roles.get(role) for role in ("teacher", "reasoner", "policy")} if isinstance(roles, dict) else set()
    if run.judge and run.judge.model in writers:
        raise InputError(f"--judge: {run.judge.model} is also a model that writes; expected another, or --same-judge")


def tidy(out):
    """Sorts failed.jsonl, so that it does not depend on when a reply came."""
    rows = {row["key"]: row for _, row in finished_rows(out / "failed.jsonl", b'{"key": ')}
    with written_aside(out / "failed.jsonl") as aside:
        aside.write_bytes(b"".join(line_of(rows[key]) for key in sorted(rows)))


def rows_for(run, args, stage):
    """A function that yields the rows of a stage that is run by itself."""
    if stage == "judge" and args.data:
        return lambda: (row for path in args.data for row in data_rows(path))
    if stage == "texts" or args.data:
        return lambda: corpus(args.data or args.corpus, args.limit)
    before = CHAIN[CHAIN.index(stage) - 1]
    return lambda: islice(rows_in(run.path("stages", before)), args.limit)


def main(argv=None):
    args = parse_args(sys.argv[1:] if argv is None else argv)
    with contextlib.ExitStack() as stack:
        run = opened(args, stack)
        if args.command == "preview":
            found = preview(run, args)
        elif args.command == "export-batch":
            teacher, rows = getattr(run, args.role), rows_for(run, args, args.stage)
            if teacher is None:
                raise InputError(f"export-batch: found no --{args.role}; expected the model whose calls are exported")
            calls = (call for _, call in missing_calls(run, args.stage, rows, teacher))
            found = {"exported": export_batch(calls, args.batch, teacher.model)}
        elif args.command == "import-batch":
            found = import_batch(args.batch, run.store)
        elif args.command == "judge":
            files = {Path(file).stem: file for file in args.data}
            if len(files) < len(args.data):
                raise InputError(f"--data {' '.join(args.data)}: two files have one name; expected different names")
            found = compare_files(run, args.data[0], args.against) if args.against else judge_files(run, files)
            report(run, keep=True)
        else:
            if args.command == "run":
                chain(run, CHAIN, lambda: corpus(args.corpus, args.limit))
                if run.judge:
                    judge_files(run, {"FineMed-SFT": run.path("stages", "filter")})
            elif args.command != "report":
                chain(run, [args.command], rows_for(run, args, args.command))
            found = report(run, keep=args.command != "run", draw=args.command in ("run", "report"))
    tidy(run.out)
    if args.json or "stages" not in found:
        print(json.dumps(found, ensure_ascii=False, indent=None if args.json else 2))
    else:
        print(card(found))


if __name__ == "__main__":
    run_main(main)

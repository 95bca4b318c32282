"""Does it help? One model, a file of questions, several arms, and the statistics of their differences.

    none                       the model as it is
    nearest, random            after test-time training on the k nearest records of the question, or on k random ones
    context, random-context    the same records as earlier turns of the conversation
    nearest+context            both
    ttt, random-ttt            both, as ttt.py does by default: where it finds that this helps

What is new in a question's neighbours shows in nearest − random; whether training on them pays, in nearest − context.

    --measure bpb         bits per byte of the reference answer, −log2 p(answer | question) / its bytes in UTF-8
              loglik      log p of each option; `margin` = log p(right) − the highest log p of a wrong one, in nats
              generate    the model thinks and answers; the last "the answer is (X)" behind the Thought counts

    python evaluate.py --benchmark medqa --data medqa.jsonl --measure loglik --out evals/medqa
    python evaluate.py --benchmark sft --data medquad.jsonl --measure bpb --index index/medquad --cluster url \\
        --arms none nearest random context random-context nearest+context --out evals/medquad
    python evaluate.py compare evals/one evals/other        the same questions, two models
    python evaluate.py ladder …                             one table of several models and files
    python evaluate.py leaks --train FILE … --benchmark …   what training files and questions share

All arms of a run get the same records: masked alike where they give the answer away (leaks.py), cut to the same tokens,
under the same template and system message; what does not fit the model's window is left out of every arm. Training's
loss is on the record's last answer only. OUT has config.json, results.jsonl (a line for each question and arm; a run
that was killed goes on where it stopped and ends in the same file), timings.jsonl and summary.json.
"""
import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from adapt import adapted
from arms import Evaluation, arm_of, ending, example_of, messages_before, prompt_of, records_of_kinds
from benchmarks import (
    SHAPES,
    choice_prompt,
    continuations,
    extracted,
    flattering,
    kind_and_file,
    read_benchmark,
)
from chat import render_chat
from data import answer_ids, collate_answers, on_device
from fast import Threads, answer_logps, reuse_freed_memory
from files import (
    InputError,
    Parser,
    appended,
    finished_rows,
    hold,
    number,
    read_json,
    read_text,
    run_main,
    sha256,
    whole,
    write_json,
)
from generate import generate_batch
from leaks import MASKED, leaks_command
from model import load_model
from parallel import computed_on_rank_0, from_all, peak_memory, start, stop
from report import (
    ENDPOINTS,
    OUR_ROW,
    accuracy,
    compared,
    interval,
    print_table,
    results_of,
    sentence,
    show,
    summarise,
    with_holm,
)
from retrieve import Index
from ttt import ASKED, default_model, open_tokenizer, reason_to_leave, shows_neighbours, system_message
from weights import DTYPES, stop_ids_of, weights_sha256

# ----- measures ------------------------------------------------------------------------------------------------------


def answers_of(run, question):
    """([text of each answer to be scored], [its ids]): the reference answer cut to --answer-tokens, or every option."""
    if run.args.measure == "bpb":
        ids = run.tokenizer.encode(question.answer.strip())[:run.args.answer_tokens]
        texts = [run.tokenizer.decode(ids).rstrip("\ufffd").strip()]  # as Llama's templates strip it: no byte is free
        if not texts[0]:
            raise InputError(f"{question.where}: its answer has no whole character in {run.args.answer_tokens} tokens; "
                             "expected a larger --answer-tokens")
    else:
        texts = continuations(question, run.args.prompt, run.args.by)
    if run.args.prompt == "raw":
        return texts, [run.tokenizer.encode(text, after=choice_prompt(question, "raw")) for text in texts]
    before = messages_before(run, question)  # earlier turns change the prompt, not the answer's ids
    start = len(render_chat(run.tokenizer, before, add_generation_prompt=True)[0])
    return texts, [answer_ids(run.tokenizer, before, text, start)[:-ending(run.tokenizer)] for text in texts]


@torch.no_grad()
def scored(run, asked):
    """[(question, prompt ids)] -> [{the measure's fields}]: log-likelihoods of the answers, in one packed pass."""
    answers = [answers_of(run, question) for question, _ in asked]
    batch = collate_answers([("", *(np.array(ids, np.int32) for ids in (prompt, *ids)))
                             for (_, prompt), (_, ids) in zip(asked, answers)])
    logps = iter(answer_logps(run.model, on_device(batch, run.world.device)).tolist())
    rows = []
    for (question, _), (texts, ids) in zip(asked, answers):
        own = [next(logps) for _ in texts]
        if any(not math.isfinite(logp) for logp in own):
            raise InputError(f"{question.where}: a log-likelihood is not finite; expected sound weights, and a "
                             "learning rate that leaves them so")
        n_bytes = [len(text.encode()) for text in texts]
        if run.args.measure == "bpb":
            rows.append({"bpb": -own[0] / math.log(2) / n_bytes[0], "nats": -own[0], "bytes": n_bytes[0],
                         "tokens": len(ids[0])})
        else:
            rows.append(choice_row(question, own, n_bytes))
    return rows


def choice_row(question, logps, n_bytes):
    """What is reported of one question whose options have these log-likelihoods."""
    letters = list(question.options)
    right = letters.index(question.gold)
    by_byte = [logp / n for logp, n in zip(logps, n_bytes)]
    choice, choice_by_byte = (letters[max(range(len(letters)), key=values.__getitem__)] for values in (logps, by_byte))
    return {"gold": question.gold, "choice": choice, "correct": choice == question.gold,
            "choice_by_byte": choice_by_byte, "correct_by_byte": choice_by_byte == question.gold,
            "margin": logps[right] - max(logp for i, logp in enumerate(logps) if i != right),
            "p_gold": math.exp(logps[right] - float(np.logaddexp.reduce(logps))), "logps": logps}


def generated(run, asked):
    """[(question, prompt ids)] -> [{the measure's fields}]: what the model writes, and the letter it settles on."""
    args = run.args
    texts = generate_batch(run.model, [prompt for _, prompt in asked], max_new_tokens=run.room,
                           temperature=args.temperature, top_p=args.top_p, stop_ids=run.stop_ids, seed=args.seed)
    rows = []
    for (question, _), ids in zip(asked, texts):
        stopped = ids[-1] in run.stop_ids
        text = run.tokenizer.decode(ids[:-1] if stopped else ids)
        letter = extracted(text, question.options)
        laxer = flattering(text, question.options, question.gold)
        rows.append({"gold": question.gold, "choice": letter, "correct": letter == question.gold,
                     "first": laxer["first"], "best_of_two": laxer["best_of_two"], "truncated": not stopped,
                     "tokens": len(ids), "text": text})
    return rows


def measured(run, questions, arms):
    """({(question number, arm): row}, [{arm, questions, seconds, memory_gb}]) of a few questions under all arms."""
    kinds = {kind for arm in arms for kind in (arm.train, arm.context) if kind}
    k = max((arm.most for arm in arms if arm.train or arm.context), default=0)
    records, notes, rows, timings = {}, {}, {}, []
    if kinds and questions:
        vectors = run.encoder.encode([question.text for question in questions], is_query=True)
        for question, vector in zip(questions, vectors):
            for kind, found in records_of_kinds(run, question, vector, kinds, k).items():
                records[question.number, kind], notes[question.number, kind] = found
    measure = generated if run.args.measure == "generate" else scored
    for arm in arms:
        begin_peak(run.world.device)
        start = time.perf_counter()
        asked = [(question, prompt_of(run, question, arm.in_prompt(records[question.number, arm.context])
                                      if arm.context else ())) for question in questions]
        if not arm.train:
            found = measure(run, asked) if asked else []
        else:
            found = []
            for question, prompt in asked:
                examples = [example_of(run, messages, was_cut)
                            for _, _, messages, was_cut in arm.trained(records[question.number, arm.train])]
                shown = arm.in_prompt(records[question.number, arm.context]) if arm.context else []
                nearest = max((score for _, score, _, _ in shown), default=math.nan)
                alone = prompt_of(run, question)
                unless = functools.partial(reason_to_leave, nearest, run.far, run.model, alone, run.stop_ids)
                with adapted(run.model, examples, steps=arm.steps, lr=arm.lr, optimizer=arm.optimizer,
                             seed=run.args.seed, loss_after=False, check=arm.check,
                             unless=unless if arm.check else None) as report:
                    if arm.check and not shows_neighbours(report, nearest, run.near):
                        prompt, shown = alone, []
                    found += measure(run, [(question, prompt)])
                found[-1] |= {"applied": report.applied} | ({"in_prompt": len(shown)} if arm.check else {}) | (
                    {"reason": report.reason} if report.reason else {})
        timings.append({"arm": arm.name, "questions": len(questions), "seconds": round(time.perf_counter() - start, 4),
                        "memory_gb": round(peak_memory(run.world.device) / 1e9, 3)})
        for question, row in zip(questions, found):
            kind = arm.train or arm.context
            used = records[question.number, kind][:arm.most] if kind else []
            rows[question.number, arm.name] = {
                "number": question.number, "arm": arm.name, "group": question.group,
                **({"kind": question.kind} if question.kind else {}), **row,
                **({"neighbours": [{"id": i, "score": score} for i, score, _, _ in used],
                    **notes[question.number, kind]} if kind else {})}
    return rows, timings


def begin_peak(device):
    """Lets `peak_memory` count from here on."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux: VmHWM becomes VmRSS

# ----- a run ---------------------------------------------------------------------------------------------------------


def evaluate(args, world):
    """Measures every question under every arm; returns the summary, which summary.json has too."""
    out = Path(args.out)
    questions = read_benchmark(args.benchmark, args.data, cluster=args.cluster, limit=args.limit)
    computed_on_rank_0(world, lambda: hold(out))
    tokenizer, context = open_tokenizer(args.model)
    run = Evaluation(args, world, tokenizer, context, system_message(args.system), set())
    if args.measure == "generate" or any(arm.check for arm in args.arms):  # it writes
        run.stop_ids = stop_ids_of(args.model) | {tokenizer.end_of_turn()}
    if args.measure == "loglik":
        args.answer_tokens = longest_option(run, questions)
    elif args.measure == "bpb" and args.answer_tokens is None:
        args.answer_tokens = min(1024, context // 4)
    prompts = hashlib.sha256(repr(sorted(run.stop_ids)).encode())
    for question in questions:
        ids = prompt_of(run, question)
        prompts.update(repr(ids).encode())
        if (n := len(ids) + run.room) > context:
            raise InputError(f"{question.where}: prompt and answer have {n:,} tokens; expected at most {context:,}, "
                             "the model's context")
        if args.measure == "bpb":
            answers_of(run, question)  # an answer that cannot be scored is refused before the model is loaded
    settings = computed_on_rank_0(world, lambda: settings_of(args) | {
        "questions": len(questions), "prompts": prompts.hexdigest()})
    done = computed_on_rank_0(world, lambda: finished(out, settings))
    left = [(question, [arm for arm in args.arms if (question.number, arm.name) not in done])
            for question in questions]
    if any(arms for _, arms in left):
        load(run)
    chunk = args.batch_size * world.size
    bar = tqdm(total=len(questions), desc="questions", unit="question", file=sys.stderr,
               disable=None if world.rank == 0 else True)
    with contextlib.ExitStack() as stack:
        threads = stack.enter_context(contextlib.closing(Threads()))
        if world.rank == 0:
            append, note = (stack.enter_context(appended(out / name)) for name in ("results.jsonl", "timings.jsonl"))
        for begin in range(0, len(questions), chunk):
            part = left[begin:begin + chunk]
            if any(arms for _, arms in part):
                threads.leave_busy_cores()
                first = begin + world.rank * args.batch_size  # a batch holds the same questions on any number of ranks
                mine = range(first, min(first + args.batch_size, begin + len(part)))
                try:
                    own = measured(run, [questions[i] for i in mine], args.arms)
                except (InputError, OSError) as error:  # raised on every rank, because none may wait for another
                    own = error
                found = from_all(world, own)
                if world.rank == 0:
                    rows = {key: row for rows, _ in found for key, row in rows.items()}
                    for question, arms in part:
                        for arm in arms:
                            append(rows[question.number, arm.name])
                    for timing in [timing for _, timings in found for timing in timings]:
                        note(timing)
            bar.update(len(part))
        bar.close()
    return computed_on_rank_0(world, lambda: summarise(out, args.primary and tuple(args.primary)))


def load(run):
    """Loads what measuring needs: the index and its encoder, then the model."""
    args = run.args
    if any(arm.train or arm.context for arm in args.arms):
        run.index = Index.load(args.index)
        run.encoder = run.index.load_encoder(args.encoder, run.world.device)
        if any(arm.check for arm in args.arms):
            run.far, run.near = run.index.thresholds()
    run.model = load_model(args.model, run.world.device, DTYPES[args.dtype])


def longest_option(run, questions):
    return max(len(ids) for question in questions for ids in answers_of(run, question)[1])


def settings_of(args):
    """What results depend on, as config.json keeps it: flags, and the contents of the files that they name; and the
    comparison that was named beforehand, by --primary or by the order of --arms."""
    flags = ("benchmark", "limit", "cluster", "measure", "prompt", "by", "leaks", "record_tokens", "answer_tokens",
             "max_new_tokens", "temperature", "top_p", "batch_size", "system", "seed", "dtype", "primary")
    with_index = any(arm.train or arm.context for arm in args.arms)
    return {flag: getattr(args, flag) for flag in flags} | {
        "arms": {arm.name: dataclasses.asdict(arm) | (ASKED if arm.check else {}) for arm in args.arms},
        "model": str(args.model), "weights": weights_sha256(args.model),
        "data": str(args.data), "data_sha256": sha256(args.data), "index": str(args.index) if with_index else None,
        "index_manifest": sha256(Path(args.index) / "manifest.json") if with_index else None}


def finished(out, settings):
    """{(question number, arm)} that are in results.jsonl; InputError if it was made with other settings."""
    paths = ("model", "data", "index")  # a file is what it holds, wherever it lies
    if (out / "config.json").exists():
        before = read_json(out / "config.json")
        differing = [f"{key} was {before.get(key)!r} and is {settings[key]!r}" for key in settings
                     if key not in paths and json.dumps(before.get(key)) != json.dumps(settings[key])]  # in this order
        if differing:
            raise InputError(f"{out}: made with other settings: {'; '.join(differing)}; expected the same, or another "
                             "--out")
    elif (out / "results.jsonl").exists():
        raise InputError(f"{out}: found results.jsonl without config.json; expected a new folder")
    write_json(out / "config.json", settings)
    return {(row["number"], row["arm"]) for _, row in finished_rows(out / "results.jsonl", OUR_ROW)}

# ----- several runs --------------------------------------------------------------------------------------------------

SAME = ("data_sha256", "limit", "cluster", "measure", "prompt", "by")  # what makes two runs comparable


def compare(one, other):
    """Prints B − A for every arm that two finished evaluations share (else their first arms), question by question."""
    (settings, rows), (others, other_rows) = results_of(one), results_of(other)
    differing = [f"{key} is {settings[key]!r} and {others[key]!r}" for key in SAME if settings[key] != others[key]]
    if differing:
        raise InputError(f"{one} and {other}: {'; '.join(differing)}; expected the same questions and measure")
    shared = [(arm, arm) for arm in rows if arm in other_rows] or [(next(iter(rows)), next(iter(other_rows)))]
    found = with_holm([compared(settings["measure"], other_rows[theirs], rows[ours],
                                (f"{other} {theirs}", f"{one} {ours}"), i == 0)
                       for i, (ours, theirs) in enumerate(shared)])
    for comparison in found:
        print(sentence(settings["measure"], comparison))
    return found


def ladder(args, world):
    """Measures every model on every file, the last one also with its neighbours, and prints one table: how far each
    rung lies from the first, paired by question. The folders are OUT/RUNG/FILE."""
    rungs = {rung_of(model): model for model in args.models}
    if len(rungs) < len(args.models):
        raise InputError(f"--models: two are called {', '.join(map(rung_of, args.models))}; expected different folders")
    stems = [Path(file).stem for _, file in args.benchmarks]
    if len(set(stems)) < len(stems):
        raise InputError(f"--benchmark: two files are called {', '.join(stems)}; expected different names")
    table, comparisons = [], []
    for benchmark, file in args.benchmarks:
        rows_of, measure = {}, "bpb" if benchmark == "sft" else args.measure
        for rung, model in rungs.items():
            arms = args.arms if model == args.models[-1] else args.arms[:1]
            out = Path(args.out) / rung / Path(file).stem
            evaluate(argparse.Namespace(**vars(args) | {"benchmark": benchmark, "data": file, "measure": measure,
                                                        "model": model, "arms": arms, "out": out, "primary": None}),
                     world)
            for arm, rows in results_of(out)[1].items():
                rows_of[rung if arm == args.arms[0].name else f"{rung} + {arm}"] = rows
        base, *others = rows_of
        own = with_holm([compared(measure, rows_of[name], rows_of[base], (name, base), name == others[-1])
                         for name in others])
        comparisons += [(measure, one) for one in own]
        for name, rows in rows_of.items():
            difference = next((one for one in own if one["arm"] == name), None)
            cells = [Path(file).stem, name, f"{np.mean([float(row[ENDPOINTS[measure][0]]) for row in rows]):.4f}",
                     f"{difference['difference']:+.4f} ({interval(difference, '+.4f')})" if difference else ""]
            table.append([*cells, f"{accuracy(rows)['accuracy']:.1%}" if measure != "bpb" else ""])
    if world.rank > 0:
        return
    found = {"rows": table, "comparisons": [one for _, one in comparisons]}
    write_json(Path(args.out) / "ladder.json", found)
    if args.json:
        print(json.dumps(found))
        return
    print_table(["file", "rung", "bits per byte or margin", "less the first (95 %)", "accuracy"], table)
    for measure, comparison in comparisons:
        print(sentence(measure, comparison))


def rung_of(model):
    """runs/dpo/model -> dpo; models/smollm2 -> smollm2."""
    path = Path(model)
    return path.parent.name if path.name == "model" else path.name

# ----- command line --------------------------------------------------------------------------------------------------


def parse_args(argv):
    """The flags of a run or, behind the word `ladder`, of several."""
    several = argv[:1] == ["ladder"]
    parser = Parser(prog="evaluate.py" + " ladder" * several, description=__doc__, epilog=None if several else
                    "evaluate.py compare A B, evaluate.py ladder --help and evaluate.py leaks --help do the rest",
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    flag = parser.flag
    if several:
        flag("--models", "the rungs, from the bottom up", required=True, nargs="+", metavar="DIR")
        flag("--benchmark", "one or more: its kind and its file", required=True, nargs="+", metavar="KIND=FILE",
             type=kind_and_file, dest="benchmarks")
    else:
        flag("--benchmark", "the shape of --data", required=True, choices=SHAPES)
        flag("--data", "the questions", required=True, metavar="FILE")
        flag("--model", "the furthest trained model in runs/, else the demo's, by default", metavar="DIR")
        flag("--primary", "the one comparison that Holm's correction spares, the first arm less the second (default: "
             "nearest − context, else the first)", nargs=2, metavar="ARM")
    flag("--measure", "bpb for rows with an answer, loglik and generate for options", required=not several,
         choices=("bpb", "loglik", "generate"), default="loglik" if several else None)
    flag("--arms", "what is compared, the first with all others; settings as in nearest:k=10,lr=1e-4,steps=1,"
         "optimizer=sgd,order=last" + "; all of them for the last rung, the first for the others" * several,
         nargs="+", type=arm_of, default=[arm_of("none")], says="none", metavar="ARM")
    flag("--out", "the folder of the results; resumed if it exists", required=True, metavar="DIR")
    flag("--limit", "only the first so many questions", type=whole(1))
    flag("--cluster", "the key of rows that are not independent, such as url (default: every row on its own)")
    flag("--index", "records for the arms, made by retrieve.py", "index/traces", metavar="DIR")
    flag("--encoder", "default: the one the index was built with", metavar="DIR")
    flag("--leaks", "which records are masked: strict: same page, 13 words of the answer, or the question; same-page "
         "lets the page stand; off", "strict", choices=MASKED)
    flag("--record-tokens", "a record's longest conversation, in training and in the prompt", 384, type=whole(32))
    flag("--answer-tokens", "bpb: where a reference answer is cut (default: 1,024, or a quarter of the window)",
         type=whole(1))
    flag("--prompt", "loglik: the model's chat template, or raw text as in lm-evaluation-harness", "chat",
         choices=("chat", "raw"))
    flag("--by", "loglik: the options' letters or their texts are scored", "letter", choices=("letter", "text"))
    flag("--max-new-tokens", "generate: the longest answer", 1024, type=whole(1))
    flag("--temperature", "generate: 0 is greedy", 0.0, type=number(0))
    flag("--top-p", "generate: nucleus", 0.95, type=number(0, 1, open_end=True))
    flag("--batch-size", "questions at a time, in arms without training", 16, type=whole(1))
    flag("--system", "a text file with the system message", metavar="FILE")
    flag("--seed", "of random records, rounding, sampling", 0, type=whole(0))
    flag("--device", "auto: a GPU if there is one", "auto", choices=("auto", "cpu", "cuda"))
    flag("--dtype", "of the weights", "bf16", choices=("bf16", "fp32"))
    parser.add_argument("--json", action="store_true",
                        help=f"print {'ladder' if several else 'summary'}.json instead of the table")
    return parser, parser.parse_args(argv[several:])


USED_BY = {"answer_tokens": "bpb", "by": "loglik", "prompt": "loglik", "max_new_tokens": "generate",
           "temperature": "generate", "top_p": "generate"}  # by this measure only


def checked(parser, args, kinds):
    """The flags, made consistent; InputError where two contradict each other."""
    names = [arm.name for arm in args.arms]
    if len(set(names)) < len(names):
        parser.error(f"--arms {' '.join(names)}: one stands there twice; expected different arms")
    for kind in kinds:
        if (kind == "sft") != (args.measure == "bpb") and not (kind == "sft" and hasattr(args, "models")):
            parser.error(f"--benchmark {kind} with --measure {args.measure}: expected bpb with sft, whose rows have an "
                         "answer, and loglik or generate with the others, whose rows have options")
    if args.prompt == "raw" and (args.measure != "loglik" or args.system or names != ["none"]):
        parser.error("--prompt raw: expected --measure loglik, --arms none and no --system: raw text has no turns")
    if getattr(args, "primary", None) and (not set(args.primary) <= set(names) or len(set(args.primary)) < 2):
        parser.error(f"--primary {' '.join(args.primary)}: expected two of --arms")
    measures = {"bpb" if kind == "sft" else args.measure for kind in kinds}
    unused = [name for name, measure in USED_BY.items() if measure not in measures]
    if not any(arm.train or arm.context for arm in args.arms):
        unused += ["index", "encoder", "leaks", "record_tokens"]
    if given := [f"--{name.replace('_', '-')}" for name in unused if getattr(args, name) != parser.get_default(name)]:
        parser.error(f"{' and '.join(given)}: expected left out, because --measure {' and '.join(sorted(measures))} of "
                     f"--arms {' '.join(names)} does not use this")
    args.system = read_text(args.system, f"--system {args.system}") if args.system else None
    return args


def compare_command(argv):
    parser = Parser(prog="evaluate.py compare", description=compare.__doc__)
    parser.add_argument("one", metavar="A", help="the folder of a finished evaluation")
    parser.add_argument("other", metavar="B", help="another, of the same questions and measure")
    args = parser.parse_args(argv)
    compare(args.one, args.other)


def leaks_of_files(argv):
    parser = Parser(prog="evaluate.py leaks", description="What training files or indices share with questions.")
    parser.add_argument("--train", nargs="+", required=True, metavar="FILE", help="data files, or folders of an index")
    parser.add_argument("--benchmark", nargs="+", required=True, type=kind_and_file, metavar="KIND=FILE",
                        help=f"the questions; KIND is one of {', '.join(SHAPES)}")
    parser.add_argument("--out", metavar="FILE.jsonl", help="every hit with its evidence")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args(argv)
    leaks_command(args, [question for kind, file in args.benchmark for question in read_benchmark(kind, file)])


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["compare"], ["leaks"]):
        {"compare": compare_command, "leaks": leaks_of_files}[argv[0]](argv[1:])
        return
    parser, args = parse_args(argv)
    several = hasattr(args, "models")
    checked(parser, args, [kind for kind, _ in args.benchmarks] if several else [args.benchmark])
    reuse_freed_memory()
    world = start(args.device)
    if several:
        ladder(args, world)
    else:
        args.model = args.model or default_model()
        print(f"model: {args.model}", file=sys.stderr)
        summary = evaluate(args, world)
        if world.rank == 0:
            print(json.dumps(summary)) if args.json else show(summary)
    stop(world)


if __name__ == "__main__":
    run_main(main)

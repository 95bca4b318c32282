"""Test-time training: retrieve the nearest reasoning traces, take a gradient step on each, answer, restore the weights.

    for each of the k neighbours of the question, nearest first:
        g = gradient of the mean cross-entropy on the supervised part of the trace
        w = stochastic_round(w - lr * g / (|g| + eps))        a fresh Adam's first step: m = g, v = g^2
    answer with w, the nearest also in the prompt, then put back the original w, bit for bit

Source: FineMedLM-o1 (arXiv 2501.09213, section on test-time training: one step of Adam at 1e-5 on one neighbour, which
`--recipe paper` does). adapt.py has the steps and the way back.

The default, found on held-out questions (bench/README.md): k = 10, lr = 6e-5, four neighbours in the prompt, where
that helps. Three are asked whether it does (--always: none):

    the index        before any step: is the nearest record less like the question than two records are like each other,
                     in the median? Then the question lies outside of the index, and nothing is done.
    the model        is it sure of its own answer? Then nothing is done: neighbours disturb what it knows.
    the neighbours   after three steps: has the loss on neighbours 2 to 4, each just before its own step, fallen? Else
                     the steps are undone, as nearly always after SFT. Fewer than four (--k 3) are not asked.

Neighbours stand in the prompt where the steps are kept, and where the nearest may hold the answer: it scores at least
the lower quartile of what records score with their own nearest.

    python ttt.py --question "…"                                    one question
    python ttt.py --questions FILE.jsonl --out ANSWERS.jsonl        many; run again to go on where it stopped
    python ttt.py --chat                                            interactive
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

from tqdm import tqdm

from adapt import CHECKED, FALL, adapted
from chat import check_vocabulary, render_chat
from data import training_example
from fast import Threads, reuse_freed_memory
from files import (
    DISCLAIMER,
    InputError,
    Parser,
    appended,
    finished_rows,
    hold,
    number,
    one_line,
    read_data,
    read_text,
    run_main,
    sha256,
    whole,
)
from generate import generate, greedy_nll
from model import LlamaConfig, load_model
from parallel import pick_device
from retrieve import FAR, NEAR, Index
from rows import lone_question, messages_of, question_of, shorten
from tokenizer import Tokenizer, check_unicode, notice_of, stream_text
from weights import DTYPES, stop_ids_of, weights_sha256

MAX_TRACE_TOKENS = 6144  # upstream's maximum length in training; a longer trace is cut at its end
SURE = 0.3  # nats a token: its tokens have a probability of three quarters, in the geometric mean
NEW = 4  # tokens; with fewer that do not stand in the prompt the model copies an option, say
ASKED = {"far": FAR, "near": NEAR, "sure": SURE, "new": NEW, "checked": CHECKED, "fall": FALL}  # for those who report

# ----- a question ----------------------------------------------------------------------------------------------------


class Answerer:
    """The loaded model, tokenizer, encoder and index, and the settings; `answer` does one question from end to end."""

    def __init__(self, settings, device="cpu"):
        start = time.perf_counter()
        self.settings = settings
        self.threads = Threads()
        self.noticed = False  # whether it was said which added tokens are read as plain text
        self.index = self.encoder = None
        if settings["ttt"]:
            self.index = Index.load(settings["index"])
            self.encoder = self.index.load_encoder(settings["encoder"], device)
            if settings["check"]:
                self.far, self.near = self.index.thresholds()
        self.tokenizer, _ = open_tokenizer(settings["model"])
        self.stop_ids = stop_ids_of(settings["model"]) | {self.tokenizer.end_of_turn()}
        self.model = load_model(settings["model"], device, DTYPES[settings["dtype"]])  # last: it may take minutes
        self.load_s = time.perf_counter() - start

    @property
    def context(self):
        """The tokens that the model's context holds."""
        return self.model.config.max_position_embeddings

    @property
    def room(self):
        """Tokens that the prompt must leave for the answer."""
        return min(self.settings["max_new_tokens"], self.context // 2)

    def example(self, i, system):
        """Record i of the index as (ids, labels), under the system message of the question if there is one. InputError
        for a record that has no answer to learn from."""
        messages = messages_of(self.index.records[i])
        if system and messages[0]["role"] == "system":
            messages = messages[1:]
        longest = min(MAX_TRACE_TOKENS, self.context)
        ids, labels = training_example(self.tokenizer, system + messages, longest)
        if all(label == -100 for label in labels):
            raise InputError(f"its first {longest:,} tokens hold nothing of the answer")
        return ids, labels

    def with_neighbours(self, ids, question, history, neighbours):
        """(the prompt with the nearest neighbours as its first turns, the nearest last, beside the question; these
        neighbours). Those that would take the answer's room are left out, the farthest first."""
        turns, shown = [], []
        for neighbour in [one for one in neighbours if "skipped" not in one][:self.settings["context"]]:
            messages = [one for one in messages_of(self.index.records[neighbour["id"]]) if one["role"] != "system"]
            longer = prompt_ids(self.tokenizer, self.settings["system"], question, [*messages, *turns, *history])
            if len(longer) + self.room > self.context:
                break
            ids, turns, shown = longer, [*messages, *turns], [*shown, neighbour]
        return ids, shown

    def fitting(self, question, history):
        """`history` without the oldest turns that leave too little room for an answer to `question`; says so.
        InputError for a question that does not fit alone."""
        check_length(prompt_ids(self.tokenizer, self.settings["system"], question), self.context)
        dropped = 0
        while history and len(prompt_ids(self.tokenizer, self.settings["system"], question, history)) + self.room \
                > self.context:
            history, dropped = history[2:], dropped + 1
        if dropped:
            print(f"the model's context of {self.context:,} tokens is full: the oldest {dropped} question(s) and "
                  "answer(s) are left out from here on", file=sys.stderr)
        return history

    def answer(self, question, history=(), on_neighbours=None, on_adapted=None, on_text=None):
        """Answers `question` (after earlier messages `history`); returns the dict that --json prints.

        Called on the way: on_neighbours([{id, score, instruction}, …]) before the first step, on_adapted(report) before
        the first token, on_text(piece) with the text as it comes.
        """
        s, start = self.settings, time.perf_counter()
        ids = prompt_ids(self.tokenizer, s["system"], question, history)
        check_length(ids, self.context)
        system, neighbours, examples, longer, shown = system_message(s["system"]), [], [], ids, []
        if s["ttt"]:
            scores, found = self.index.search(self.encoder.encode([question], is_query=True), max(s["k"], s["context"]))
            for score, i in zip(scores[0].tolist(), found[0].tolist()):
                if i >= 0:  # a FAISS index other than Flat fills up with -1
                    neighbours.append({"id": i, "score": round(score, 4), "instruction":
                                       question_of(self.index.records[i], self.index.manifest["field"])})
                    try:
                        examples.append(self.example(i, system))
                    except InputError as error:
                        neighbours[-1]["skipped"] = str(error)
            longer, shown = self.with_neighbours(ids, question, history, neighbours)
            examples = examples[:s["k"]]
        if self.tokenizer.read_as_text and not self.noticed:
            print(notice_of(self.tokenizer.read_as_text), file=sys.stderr)
            self.noticed = True
        retrieve_s = time.perf_counter() - start
        if on_neighbours:
            on_neighbours(neighbours)
        self.threads.leave_busy_cores()
        nearest = next((one["score"] for one in neighbours if "skipped" not in one), math.nan)
        with adapted(self.model, examples, steps=s["steps"], lr=s["lr"], optimizer=s["optimizer"],
                     seed=s["seed"], check=s["check"], unless=(
                         lambda: reason_to_leave(nearest, self.far, self.model, ids, self.stop_ids))
                     if s["check"] and neighbours else None) as report:
            if not (s["ttt"] and s["k"]) and not report.left_alone:
                report.reason = "switched off"
            if shown and (not s["check"] or shows_neighbours(report, nearest, self.near)):
                ids = longer
                for neighbour in shown:
                    neighbour["in_prompt"] = True
            if on_adapted:
                on_adapted(report)
            self.threads.leave_busy_cores()
            start, new_ids, pieces = time.perf_counter(), [], []

            def new_tokens():
                for token in generate(self.model, ids, max_new_tokens=s["max_new_tokens"], stop_ids=self.stop_ids,
                                      temperature=s["temperature"], top_p=s["top_p"], seed=s["seed"]):
                    new_ids.append(token)
                    yield token
            for piece in stream_text(self.tokenizer, new_tokens()):
                pieces.append(piece)
                if on_text:
                    on_text(piece)
            generate_s = time.perf_counter() - start
        text = "".join(pieces)
        thought, summary = split_answer(text)
        return {
            "question": question, "answer": text, "thought": thought, "summary": summary,
            "finish_reason": "stop" if new_ids[-1] in self.stop_ids else "length", "neighbours": neighbours,
            "ttt": {"applied": report.applied, "reason": report.reason, "k": s["k"], "context": s["context"],
                    "check": s["check"], "steps": s["steps"], "lr": s["lr"], "optimizer": s["optimizer"],
                    "loss_before": report.loss_before, "loss_after": report.loss_after},
            "restored": report.restored,
            "timings": {"load_s": round(self.load_s, 3), "retrieve_s": round(retrieve_s, 3),
                        "adapt_s": round(report.adapt_s, 3), "generate_s": round(generate_s, 3),
                        "restore_s": round(report.restore_s, 3), "tokens_per_s": round(len(new_ids) / generate_s, 1)},
            "model": str(s["model"]), "disclaimer": DISCLAIMER}


def open_tokenizer(directory):
    """(the Tokenizer of a model's folder, the tokens that the model's context holds)."""
    tokenizer, config = Tokenizer.from_dir(directory), LlamaConfig.from_json(Path(directory) / "config.json")
    check_vocabulary(tokenizer, config.vocab_size, directory)
    return tokenizer, config.max_position_embeddings


def system_message(text):
    return [{"role": "system", "content": text}] if text else []


def prompt_ids(tokenizer, system, question, history=()):
    """The ids after which the answer to `question` begins; `system` is a text or None, `history` earlier messages."""
    messages = [*system_message(system), *history, {"role": "user", "content": question}]
    return render_chat(tokenizer, messages, add_generation_prompt=True)[0]


def check_length(ids, context):
    if len(ids) > context:
        raise InputError(f"the prompt has {len(ids):,} tokens; expected at most {context:,}, the model's context")


def at_row(where, function, *args):
    """function(*args), an InputError of which names the row of the file."""
    try:
        return function(*args)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def reason_to_leave(nearest, far, model, ids, stop_ids):
    """Why nothing is done for a question: its `nearest` record scores less than `far`, or the model is sure of its own
    answer to the prompt `ids`. None where neither is so."""
    if nearest < far:
        return f"the index holds nothing like the question: its nearest scores {nearest:.3f}, expected {far:.3f}"
    nats, new = greedy_nll(model, ids, stop_ids)
    if nats < SURE and new >= NEW:
        return f"the model is sure of its own answer: {nats:.2f} nats a token, expected {SURE} or more"
    return None


def shows_neighbours(report, nearest, near):
    """Whether neighbours stand in the prompt: where steps were kept, or where nothing spoke against them before and
    the `nearest` scores `near` at least."""
    return report.applied or (not report.left_alone and nearest >= near)


def split_answer(text):
    """(thought, summary) of an answer with the headings "## Thought" and "## Summarization"; None for what it lacks."""
    before, heading, summary = text.partition("## Summarization")
    _, thought_heading, thought = before.partition("## Thought")
    return thought.strip() if thought_heading else None, summary.strip() if heading else None

# ----- command line --------------------------------------------------------------------------------------------------

CHAIN = ("runs/dpo/model", "runs/sft-cold-start/model", "runs/sft-stage3/model", "runs/sft-stage2/model",
         "runs/sft-stage1/model", "models/smollm2-135m-instruct")


def default_model():
    """The furthest model of the chain demo → stage 1 → 2 → 3 → cold start → DPO that exists."""
    for directory in CHAIN:
        if Path(directory, "config.json").is_file():
            return directory
    raise InputError(f"no model found in {', '.join(CHAIN)}; name one with --model, or run `make demo` first")


def parse_args(argv=None):
    parser = Parser(description="Answer medical questions with test-time training: a step on each of the --k nearest "
                    "records, the nearest --context of them in the prompt. By default nothing is done where the index "
                    "holds nothing like the question or the model is sure of its own answer, and steps that do not "
                    "help the next neighbours are undone. The defaults of --k, --context and --lr were found on "
                    "held-out questions (bench/README.md).",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--question", default=argparse.SUPPRESS, help="the question to answer")
    what.add_argument("--questions", metavar="FILE", default=argparse.SUPPRESS,
                      help='many: rows with a "question" or "instruction" (.jsonl, .json, .parquet); needs --out')
    what.add_argument("--chat", action="store_true", default=argparse.SUPPRESS, help="ask and answer in turns")
    parser.add_argument("--out", metavar="FILE.jsonl", help="with --questions: the answers; resumed if it exists")
    parser.add_argument("--model", metavar="DIR", help="default: the furthest trained model in runs/, else the demo's")
    parser.add_argument("--index", metavar="DIR", default="index/traces", help="a retrieval index made by retrieve.py")
    parser.add_argument("--encoder", metavar="DIR", help="default: the one the index was built with")
    parser.add_argument("--k", type=whole(0), default=10,
                        help="neighbours that are trained on, nearest first; fewer than 4 are not asked whether that "
                        "helps (paper: 1)")
    parser.add_argument("--context", type=whole(0), default=4,
                        help="so many of the nearest also stand in the prompt, as earlier turns, where the steps are "
                        "kept, or undone and the nearest is near (paper: 0); with --k 0 they only stand there")
    parser.add_argument("--steps", type=whole(1), default=1, help="gradient steps on each neighbour (paper: 1)")
    parser.add_argument("--lr", type=number(0), default=6e-5, help="learning rate of these steps (paper: 1e-5)")
    parser.add_argument("--optimizer", choices=("signsgd", "adam", "sgd"), default="signsgd",
                        help="signsgd: g / (|g| + eps), the first step of a fresh Adam; adam: its moments kept from "
                        "step to step; with --k 1 --steps 1 the two are one (paper: adam)")
    parser.add_argument("--always", action="store_true",
                        help="train on neighbours and show them; ask neither the index nor the model nor the "
                        "neighbours whether that helps (paper: always)")
    parser.add_argument("--recipe", choices=("paper",), help="paper: --k 1 --context 0 --steps 1 --lr 1e-5 "
                        "--optimizer adam --always")
    parser.add_argument("--no-ttt", action="store_true", help="answer without test-time training")
    parser.add_argument("--max-new-tokens", type=whole(1), default=2048, help="longest answer (paper: 2048)")
    parser.add_argument("--temperature", type=number(0), default=0.7, help="0 is greedy (paper: 0.7)")
    parser.add_argument("--top-p", type=number(0, 1, open_end=True), default=0.95, help="nucleus (paper: 0.95)")
    parser.add_argument("--seed", type=whole(0), default=0, help="of sampling and of stochastic rounding")
    parser.add_argument("--system", metavar="FILE", help="a text file with the system message")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="fp32: twice the memory, no rounding")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args(argv)
    if args.recipe == "paper":
        paper = {"k": 1, "context": 0, "steps": 1, "lr": 1e-5, "optimizer": "adam", "always": True}
        parser.set_defaults(**paper)
        args = parser.parse_args(argv)
        for name, value in paper.items():
            if getattr(args, name) != value:
                parser.error(f"--recipe paper and --{name} {getattr(args, name)}: expected one of them")
    if hasattr(args, "questions") != bool(args.out):
        parser.error("--questions and --out go together: one file to read, one to write")
    if args.out and args.out.endswith(".gz"):
        parser.error(f"--out {args.out}: found a name of a packed file, expected one like answers.jsonl")
    if not args.no_ttt and args.k == args.context == 0:
        parser.error("--k 0 and --context 0: found no use for a neighbour; expected one of them above 0, or --no-ttt")
    if hasattr(args, "question") and not args.question.strip():
        parser.error("--question: found an empty question, expected text")
    return args


def settings_of(args):
    """The settings of `Answerer` as a dict, from the command line."""
    return {"model": args.model or default_model(), "ttt": not args.no_ttt, "index": args.index,
            "encoder": args.encoder, "k": args.k, "context": args.context, "steps": args.steps, "lr": args.lr,
            "check": not args.always, "optimizer": args.optimizer, "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature, "top_p": args.top_p, "seed": args.seed, "dtype": args.dtype,
            "system": read_text(args.system, f"--system {args.system}") if args.system else None}


def main(argv=None):
    args = parse_args(argv)
    questions = read_questions(args.questions) if hasattr(args, "questions") else None
    settings = settings_of(args)
    reuse_freed_memory()
    print(f"model: {settings['model']}", file=sys.stderr)
    if questions:
        hold(args.out)
        check_questions(questions, settings)
        settings |= contents_of(settings)
        answered = read_answers(args.out, questions, settings)
    answerer = Answerer(settings, pick_device(args.device))
    if questions:
        answer_file(answerer, questions, answered, args.out)
    elif hasattr(args, "chat"):
        chat(answerer, args.json)
    else:
        answer_one(answerer, args.question, args.json)


def answer_one(answerer, question, as_json, history=()):
    """Answers one question on stdout, as streamed text or as one JSON object; returns the answer's dict."""
    if as_json:
        result = answerer.answer(question, history)
        print(json.dumps(result, ensure_ascii=False), flush=True)
        return result

    found = []

    def on_neighbours(neighbours):
        found.extend(neighbours)
        for neighbour in neighbours:
            print(f"neighbour {neighbour['id']}  score {neighbour['score']:.3f}  {shorten(neighbour['instruction'])}"
                  + (f"  passed over: {neighbour['skipped']}" if "skipped" in neighbour else ""), flush=True)

    def on_adapted(report):
        if report.applied:
            change = f"{report.loss_before:.3f} → {report.loss_after:.3f}"
            print(f"adapted: loss on the nearest {change}")
        else:
            print(f"not adapted: {report.reason}")
        if shown := [str(neighbour["id"]) for neighbour in found if "in_prompt" in neighbour]:
            print("in the prompt: neighbours " + ", ".join(shown))
        print(flush=True)
    # The answer's own headings, "## Thought" and "## Summarization", set its parts apart.
    result = answerer.answer(question, history, on_neighbours, on_adapted,
                             on_text=lambda piece: print(piece, end="", flush=True))
    t = result["timings"]
    print(f"\n\n{'' if result['finish_reason'] == 'stop' else '(cut at the longest answer allowed) '}"
          f"load {t['load_s']:.1f} s, retrieve {t['retrieve_s']:.2f} s, adapt {t['adapt_s']:.1f} s, "
          f"generate {t['generate_s']:.1f} s ({t['tokens_per_s']:.0f} tokens/s), restore {t['restore_s']:.2f} s"
          f"{'; weights restored bit for bit' if result['ttt']['applied'] else ''}\n{DISCLAIMER}")
    return result


def chat(answerer, as_json):
    """Questions in turns, earlier ones kept as context; each is adapted to and restored. Ends at end of input."""
    history = []
    prompt = "\nquestion (end with Ctrl-D): " if sys.stdin.isatty() else ""
    while True:
        try:
            question = input(prompt).strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError(f"the question is not UTF-8 text (byte {error.start})") from None
        if question:
            try:
                history = answerer.fitting(question, history)
                result = answer_one(answerer, question, as_json, history)
            except InputError as error:  # a question too long, say: the next one may be better
                print("error:", one_line(error), file=sys.stderr)
                continue
            history += [{"role": "user", "content": question}, {"role": "assistant", "content": result["answer"]}]


def read_questions(path):
    """[(row number, where, question)] of a data file; the first bad row stops, by its place, before a model loads."""
    questions = []
    for line, where, row in read_data(path):
        if isinstance(row, InputError):
            raise row
        question = at_row(where, lone_question, row)
        at_row(where, check_unicode, question)
        questions.append((line, where, question))
    if not questions:
        raise InputError(f"{path}: found no rows; expected one question a line")
    return questions


def check_questions(questions, settings):
    """InputError for the first question that the model's context does not hold, by its place in the file."""
    tokenizer, context = open_tokenizer(settings["model"])
    for _, where, question in questions:
        ids = at_row(where, prompt_ids, tokenizer, settings["system"], question)
        at_row(where, check_length, ids, context)


def contents_of(settings):
    """What answers depend on beside the settings: the SHA-256 of files, because another model may lie in its place, and
    the limits of what is asked."""
    return {"weights": weights_sha256(settings["model"]),
            "limits": ASKED if settings["ttt"] and settings["check"] else None,
            "index_manifest": sha256(Path(settings["index"]) / "manifest.json") if settings["ttt"] else None}


OUR_ROW = b'{"line": '  # how each row of --out begins


def read_answers(path, questions, settings):
    """The line numbers answered by an earlier run into `path`; a last line cut short by a kill counts as not there.

    InputError when the file belongs to other questions or was made with other settings.
    """
    answered, asked = set(), {line: question for line, _, question in questions}
    for line, row in finished_rows(path, OUR_ROW):
        if type(row.get("line")) is not int or asked.get(row["line"]) != row.get("question"):
            raise InputError(f"{path}:{line}: answers another question than line {row.get('line')} of --questions; "
                             "expected a file of these questions, or a new name for --out")
        found = row.get("settings")
        differing = [key for key in settings if not isinstance(found, dict) or found.get(key) != settings[key]]
        if differing:
            raise InputError(f"{path}:{line}: made with another {', '.join(differing)}; "
                             "expected the same settings, or a new name for --out")
        answered.add(row["line"])
    return answered


def answer_file(answerer, questions, answered, path):
    """Appends one row to `path` for every question not yet in `answered`, each on disk before the next is begun."""
    with appended(path) as append:
        for line, where, question in tqdm(questions, desc="questions", unit="question", disable=None, file=sys.stderr):
            if line not in answered:
                answer = at_row(where, answerer.answer, question)
                append({"line": line, **answer, "settings": answerer.settings})
    print(f"{len(questions)} questions, {len(answered)} of them answered before; answers in {path}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)

"""Test-time training: retrieve the nearest reasoning traces, take a gradient step on each, answer, restore the weights.

    for each of the k neighbours of the question, nearest first:
        g = gradient of the mean cross-entropy on the supervised part of the trace
        w = stochastic_round(w - lr * g / (|g| + eps))        a fresh Adam's first step: m = g, v = g^2
    answer with w, then put back the original w, bit for bit

Source: FineMedLM-o1 (arXiv 2501.09213, section on test-time training: one step of Adam at 1e-5 on one neighbour, which
`--recipe paper` does). The default takes k = 4 neighbours once each: on 40 held-out MedQuAD questions that lowered the
response loss of SmolLM2-135M by 0.102, the paper's recipe by 0.026, and neither harmed one question.

Why stochastic rounding. A bf16 weight of 0.05 has neighbours 0.00024 away; a step of 1e-5 is a twelfth of half that
gap, so rounding to nearest puts every weight back where it was. Measured on six traces, mean loss on the trace before
the step 2.357; after a step of 1e-5 on it: fp32 weights 2.157, bf16 rounded to nearest 2.351 (3 % of the step kept),
bf16 rounded stochastically 2.157 (all of it). At 5e-5: 1.671, 2.250, 1.671.

Memory: 2 bytes a parameter on the device (the bf16 weights), the gradient of the layer at hand (each is used and freed
as soon as it is complete; on a CPU that of a tied embedding and head is held until both have added to it), and the
activations of one trace; 2 bytes a parameter for the snapshot, in host memory, or on a GPU with room for two copies.
`--optimizer adamw` keeps two fp32 moments across the neighbours: 8 bytes a parameter more. An 8B model and a trace of
2,048 tokens: 16.1 GB of weights, 1.1 GB for the head's gradient, 0.6 GB for the inputs of the layers (they are
recomputed from these in backward), 0.9 GB for logits; bench/gpu.py finds a peak of 18.4 GB. A 24 GB card will do.

    python ttt.py --question "…"                                    one question
    python ttt.py --questions FILE.jsonl --out ANSWERS.jsonl        many; run again to go on where it stopped
    python ttt.py --chat                                            interactive
"""
import argparse
import contextlib
import functools
import hashlib
import json
import os
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import Tokenizer, check_unicode, messages_of, question_of, render_chat, stream_text, training_example
from files import DISCLAIMER, InputError, Parser, number, one_line, read_jsonl, run_main, whole
from model import generate, load_model, random_words, slices, stochastic_rounder, stop_ids_of
from retrieve import Encoder, Index

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
MAX_TRACE_TOKENS = 6144  # upstream's maximum length in training; a longer trace is cut at its end

# ----- the update ----------------------------------------------------------------------------------------------------


def make_update(optimizer, lr, generator, eps=1e-8, betas=(0.9, 0.999)):
    """A function `update(weight, grad)` that takes one step in place, in fp32, slice by slice; says if all is finite.

    "signsgd": w - lr g / (|g| + eps), which is Adam's first step and needs no state. "adamw": Adam (arXiv 1412.6980),
    its moments kept from call to call for each weight; no decay, for a step or two of it would be far below rounding.
    "sgd": w - lr g. bf16 weights are written back by stochastic rounding, fp32 weights as they are.
    """
    moments = {}  # weight: [step, first moment, second moment]
    words = None  # for rounding, drawn once: drawing anew for each weight took a seventh of the time of an update

    def update(weight, grad):
        nonlocal words
        state, round_ = None, None
        if weight.dtype == torch.bfloat16:
            words = random_words(generator, weight.device) if words is None else words
            round_ = stochastic_rounder(weight, generator, words)
        if optimizer == "adamw":
            if weight not in moments:
                moments[weight] = [0, *(torch.zeros_like(weight, dtype=torch.float32) for _ in betas)]
            state = moments[weight]
            state[0] += 1
        whole = [weight, grad.contiguous(), *(state[1:] if state else ())]
        finite = torch.ones((), dtype=torch.bool, device=weight.device)
        for w, g, *moment in zip(*map(slices, whole)):
            g = g.float()
            exact = w.float()  # of fp32 this is w itself
            if optimizer == "signsgd":
                exact.addcdiv_(g, g.abs().add_(eps), value=-lr)
            elif optimizer == "sgd":
                exact.sub_(g, alpha=lr)
            else:
                t, (m, v) = state[0], moment
                m.lerp_(g, 1 - betas[0])
                v.lerp_(g * g, 1 - betas[1])
                exact.addcdiv_(m, (v / (1 - betas[1] ** t)).sqrt_().add_(eps), value=-lr / (1 - betas[0] ** t))
            sound = exact.sum().isfinite()
            finite &= sound
            if round_:
                round_(w, exact, sound)
        return finite
    return update


class NotFinite(Exception):
    """A loss, gradient or step of the adaptation is NaN or infinite."""


def example_loss(model, example):
    """Mean cross-entropy of (ids, labels) over its supervised tokens, fp32 scalar."""
    spare = -len(example[0]) % 8  # see data.collate
    ids, labels = (torch.tensor([[*row, *[empty] * spare]], device=model.norm.weight.device)
                   for row, empty in zip(example, (0, -100)))
    return -model(ids, labels=labels).sum() / (labels != -100).sum()


def take_steps(model, examples, update, steps, hooks=None):
    """`steps` updates on each example in turn; a gradient is used and dropped as soon as it is complete.

    Returns the loss on the first example before any step. NotFinite when a loss, gradient or step is not finite.
    `hooks`: a list for the hooks on gradients, so that a caller can remove those that an interrupt left behind.
    """
    hooks = [] if hooks is None else hooks
    first_loss, all_finite = None, torch.ones((), dtype=torch.bool, device=model.norm.weight.device)

    @torch.no_grad()
    def use(weight, grad):
        nonlocal all_finite
        all_finite &= update(weight, grad)

    def on_gradient(weight):
        if not hooks:  # an interrupt came between this hook and its place in the list
            return
        grad, weight.grad = weight.grad, None
        if grad is not None:  # not the tied one's, below
            use(weight, grad)
    head = model.head.weight
    own_sum = head is model.embed.weight and head.device.type == "cpu"
    try:
        for weight in model.parameters():
            hooks.append(weight.register_post_accumulate_grad_hook(on_gradient))
        if own_sum:  # one gradient as large as the vocabulary, not one of each end and their sum
            head.main_grad = torch.zeros_like(head)
        for example in examples:
            for _ in range(steps):
                with torch.enable_grad():
                    loss = example_loss(model, example)
                    value = loss.item()
                    if value - value != 0:
                        raise NotFinite(f"the loss on the neighbour is {value}")
                    loss.backward()
                if own_sum:
                    use(head, head.main_grad)
                    head.main_grad.zero_()
                first_loss = value if first_loss is None else first_loss
                if not all_finite:
                    raise NotFinite("a gradient or step on the neighbour is not finite")
    finally:
        remove(hooks)
        vars(head).pop("main_grad", None)
    return first_loss


def remove(hooks):
    for hook in hooks:
        hook.remove()
    hooks.clear()

# ----- snapshot and restore ------------------------------------------------------------------------------------------


def digest(model):
    """A fingerprint, 64 hex digits, of the name, dtype, shape and bytes of every parameter and buffer (tied ones once).

    The bytes enter by a multilinear hash: of 32-bit words x and fixed random odd numbers r, each piece gives sum(x r)
    mod 2^64. One word that differs always changes it, several go unnoticed with a chance of at most 2^-32. SHA-256 then
    takes in names and sums only: of all bytes it would take a CPU twice as long, and a GPU's would have to be moved.
    Digests compare on one kind of device, for r is drawn there.
    """
    names, sums = [], []
    for name, tensor in state_of(model):
        names.append(f"{name} {tensor.dtype} {tuple(tensor.shape)}")
        flat = tensor.detach().reshape(-1).view(torch.uint8)
        if len(flat) % 4 or flat.storage_offset() % 4:
            flat = F.pad(flat, (0, -len(flat) % 4))
        r = odd_numbers(tensor.device)
        sums += [(words * r[:len(words)]).sum() for words in flat.view(torch.int32).split(len(r))]
    sums = torch.stack([own.to(sums[0].device) for own in sums]).tolist()
    return hashlib.sha256(repr((names, sums)).encode()).hexdigest()


@functools.lru_cache
def odd_numbers(device):
    """The random numbers of `digest`, int64, as many as a piece has words."""
    r = torch.empty(1 << 19 if device.type == "cpu" else 1 << 22, dtype=torch.int64, device=device)
    return r.random_(-2**63, None, generator=torch.Generator(device).manual_seed(0)).bitwise_or_(1)


def state_of(model):
    """[(name, tensor)] of all parameters and buffers; tied weights appear once."""
    return [*model.named_parameters(), *model.named_buffers()]


class Snapshot:
    """All that adaptation may change about a model, and the way back.

    A weight is copied just before its first step: in backward, into memory that the activations have left by then.
    """

    def __init__(self, model, device="cpu"):
        self.model, self.device = model, device
        self.names = {tensor: name for name, tensor in state_of(model)}  # tied ones once
        self.weights = {}  # {name: the copy}; of buffers, too
        for buffer in model.buffers():  # a forward pass may change them
            self.keep(buffer)
        self.requires_grad = {name: weight.requires_grad for name, weight in model.named_parameters()}
        self.modes = {module: (module.training, getattr(module, "checkpointing", None)) for module in model.modules()}
        self.rng = torch.get_rng_state()
        self.cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        self.digest = digest(model)
        self.hooks = []  # of take_steps

    def keep(self, tensor):
        """Copies a parameter or buffer, once."""
        name = self.names[tensor]
        if name not in self.weights:
            self.weights[name] = copied(tensor.detach(), self.device)

    def keep_all(self):
        for tensor in self.names:
            self.keep(tensor)

    def before(self, update):
        """`update` that keeps the weight first."""
        def kept_update(weight, grad):
            self.keep(weight)
            return update(weight, grad)
        return kept_update

    def restore(self):
        """Puts everything back, in place; may be called again when it was interrupted. RuntimeError if it cannot."""
        remove(self.hooks)
        with torch.no_grad():
            for name, tensor in state_of(self.model):
                if name in self.weights:
                    tensor.copy_(self.weights[name], non_blocking=True)  # the digest below waits for it
        for name, weight in self.model.named_parameters():
            weight.grad = None
            vars(weight).pop("main_grad", None)
            weight.requires_grad_(self.requires_grad[name])
        for module, (training, checkpointing) in self.modes.items():
            module.training = training
            if checkpointing is not None:
                module.checkpointing = checkpointing
        torch.set_rng_state(self.rng)
        if self.cuda_rng is not None:
            torch.cuda.set_rng_state_all(self.cuda_rng)
        if digest(self.model) != self.digest:
            raise RuntimeError("the weights could not be restored after test-time training; load the model anew")


def copied(tensor, device):
    """A copy on `device`. A GPU's goes to pinned host memory if there is any: at 55 GB/s, to other at 2 (16 once it was
    used). To get it takes 0.4 s a GB (all on one machine), so torch keeps it for the next question, in blocks of powers
    of two: by count 18.3 GB for Llama-3.1-8B's 16.1."""
    if tensor.is_cuda and torch.device(device).type == "cpu":
        with contextlib.suppress(RuntimeError):
            return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
    return tensor.to(device, copy=True)


def place_for_snapshot(model, optimizer="signsgd"):
    """The model's device, if a copy of the weights and the optimizer's moments fit there and as much as the weights
    stays free; else the host's memory."""
    weight = model.norm.weight
    if weight.is_cuda:
        tensors = [tensor for _, tensor in state_of(model)]
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        moments = 8 * sum(tensor.numel() for tensor in tensors) if optimizer == "adamw" else 0
        unused = torch.cuda.memory_reserved(weight.device) - torch.cuda.memory_allocated(weight.device)
        if torch.cuda.mem_get_info(weight.device)[0] + unused > 2 * size + moments:
            return weight.device
    return torch.device("cpu")


LOCKS = weakref.WeakKeyDictionary()  # model: the lock that keeps two questions apart


@dataclass
class Report:
    """What `adapted` did: whether it was applied and, if not, why; the loss on the nearest example before and after."""
    applied: bool = False
    reason: str | None = None
    loss_before: float | None = None
    loss_after: float | None = None
    adapt_s: float = 0.0
    restore_s: float = 0.0
    restored: bool = False


@contextlib.contextmanager
def adapted(model, examples, *, steps=1, lr=1e-5, optimizer="signsgd", seed=0, activation_checkpointing=None,
            snapshot_device=None, loss_after=True):
    """Context manager: inside it the model has taken its steps on `examples`, after it the model is what it was.

    examples: [(ids, labels), …] as `data.training_example` makes them, nearest first. Yields a Report. Whatever leaves
    the block, an exception or a signal turned into one: every parameter and buffer is restored bit for bit (compared by
    digest), as are train/eval mode, requires_grad and the random state; gradients are gone. A model that could not be
    restored refuses to run again. One question at a time: another thread waits. Without examples, or when a loss,
    gradient or step is not finite, the block runs with the weights as they were and the report says why. `loss_after`
    False saves the forward pass that measures what the steps brought, and with it the check that this loss is finite.
    The activations of a model of more than a billion parameters are computed again in backward, unless told otherwise.
    `snapshot_device` is where the original weights wait: by default as `place_for_snapshot` says.
    """
    report, recompute = Report(), activation_checkpointing
    if recompute is None:
        recompute = sum(parameter.numel() for parameter in model.parameters()) > 1e9
    with LOCKS.setdefault(model, threading.RLock()):
        if model.unusable:
            raise RuntimeError(model.unusable)
        start = time.perf_counter()
        examples = [example for example in examples if any(label != -100 for label in example[1])]
        if not examples:
            report.reason, report.restored = "no neighbour to learn from", True
            yield report
            return
        snapshot = Snapshot(model, snapshot_device or place_for_snapshot(model, optimizer))
        try:
            try:
                generator = torch.Generator(model.norm.weight.device).manual_seed(seed)
                model.requires_grad_(True)
                for layer in model.layers:
                    layer.checkpointing = recompute
                try:
                    report.loss_before = take_steps(
                        model, examples, snapshot.before(make_update(optimizer, lr, generator)), steps,
                        snapshot.hooks)  # moments end with it
                    if loss_after:
                        with torch.no_grad():
                            report.loss_after = example_loss(model, examples[0]).item()
                        if report.loss_after - report.loss_after != 0:
                            raise NotFinite(f"the loss on the neighbour after the step is {report.loss_after}")
                    report.applied = True
                except NotFinite as error:
                    report.reason = str(error)
                    snapshot.restore()
                snapshot.keep_all()  # what the block itself changes is put back as well
                report.adapt_s = time.perf_counter() - start
                yield report
            finally:
                start = time.perf_counter()
                put_back(snapshot, report)
                report.restore_s = time.perf_counter() - start
        finally:  # a signal may strike in the first instruction of the `finally` above
            put_back(snapshot, report)


def put_back(snapshot, report):
    """Restores once, to the end: an interrupt on the way is kept until it is done and raised then."""
    interrupt = None
    while not report.restored:
        try:
            snapshot.restore()
            report.restored, snapshot.model.unusable = True, None
        except (KeyboardInterrupt, SystemExit) as error:
            interrupt = error
        except BaseException as error:
            snapshot.model.unusable = f"this model could not be restored after test-time training ({one_line(error)})"
            raise
    if interrupt:
        raise interrupt

# ----- a question ----------------------------------------------------------------------------------------------------


class Answerer:
    """The loaded model, tokenizer, encoder and index, and the settings; `answer` does one question from end to end."""

    def __init__(self, settings, device="cpu"):
        start = time.perf_counter()
        self.settings = settings
        self.index = self.encoder = None
        if settings["ttt"]:
            self.index = Index.load(settings["index"])
            self.encoder = Encoder.from_dir(settings["encoder"] or self.index.encoder_dir, device)
            self.index.check_encoder(self.encoder)
        self.tokenizer = Tokenizer.from_dir(settings["model"])
        self.stop_ids = stop_ids_of(settings["model"]) | {self.tokenizer.end_of_turn()}
        self.model = load_model(settings["model"], device, DTYPES[settings["dtype"]])  # last: it may take minutes
        self.load_s = time.perf_counter() - start

    def example(self, i, system):
        """Record i of the index as (ids, labels), under the system message of the question if there is one."""
        try:
            messages = messages_of(self.index.records[i])
            if system and messages[0]["role"] == "system":
                messages = messages[1:]
            longest = min(MAX_TRACE_TOKENS, self.model.config.max_position_embeddings)
            return training_example(self.tokenizer, system + messages, longest)
        except InputError as error:
            raise InputError(f"{self.settings['index']}: record {i}: {error}") from None

    def answer(self, question, history=(), on_neighbours=None, on_text=None):
        """Answers `question` (after earlier messages `history`); returns the dict that --json prints.

        `on_neighbours(neighbours, report)` is called before the first token, `on_text(piece)` with text as it comes.
        """
        s, start = self.settings, time.perf_counter()
        system = [{"role": "system", "content": s["system"]}] if s["system"] else []
        messages = [*system, *history, {"role": "user", "content": question}]
        ids, _ = render_chat(self.tokenizer, messages, add_generation_prompt=True)
        neighbours, examples = [], []
        if s["ttt"]:
            scores, found = self.index.search(self.encoder.encode([question], is_query=True), s["k"])
            for score, i in zip(scores[0].tolist(), found[0].tolist()):
                if i >= 0:  # a FAISS index other than Flat fills up with -1
                    neighbours.append({"id": i, "score": round(score, 4), "instruction":
                                       question_of(self.index.records[i], self.index.manifest["field"])})
                    examples.append(self.example(i, system))
        retrieve_s = time.perf_counter() - start
        where = {"auto": None, "host": "cpu", "device": self.model.norm.weight.device}[s["snapshot"]]
        with adapted(self.model, examples, steps=s["steps"], lr=s["lr"], optimizer=s["optimizer"], seed=s["seed"],
                     activation_checkpointing=s["activation_checkpointing"],
                     snapshot_device=where) as report:
            if not s["ttt"]:
                report.reason = "switched off"
            if on_neighbours:
                on_neighbours(neighbours, report)
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
            "ttt": {"applied": report.applied, "reason": report.reason, "k": s["k"], "steps": s["steps"], "lr": s["lr"],
                    "optimizer": s["optimizer"], "loss_before": report.loss_before, "loss_after": report.loss_after},
            "restored": report.restored,
            "timings": {"load_s": round(self.load_s, 3), "retrieve_s": round(retrieve_s, 3),
                        "adapt_s": round(report.adapt_s, 3), "generate_s": round(generate_s, 3),
                        "restore_s": round(report.restore_s, 3), "tokens_per_s": round(len(new_ids) / generate_s, 1)},
            "model": str(s["model"]), "disclaimer": DISCLAIMER}


def at_line(path, line, function, *args):
    """function(*args), an InputError of which names the line of the file."""
    try:
        return function(*args)
    except InputError as error:
        raise InputError(f"{path}:{line}: {error}") from None


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


def pick_device(name):
    """"auto" is the GPU where there is one; "cuda" without one is an InputError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device; expected one, or --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def parse_args(argv=None):
    parser = Parser(description="Answer medical questions with test-time training.",
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--question", default=argparse.SUPPRESS, help="the question to answer")
    what.add_argument("--questions", metavar="FILE.jsonl", default=argparse.SUPPRESS,
                      help='many: rows with a "question" or "instruction"; needs --out')
    what.add_argument("--chat", action="store_true", default=argparse.SUPPRESS, help="ask and answer in turns")
    parser.add_argument("--out", metavar="FILE.jsonl", help="with --questions: the answers; resumed if it exists")
    parser.add_argument("--model", metavar="DIR", help="default: the furthest trained model in runs/, else the demo's")
    parser.add_argument("--index", metavar="DIR", default="index/traces", help="a retrieval index made by retrieve.py")
    parser.add_argument("--encoder", metavar="DIR", help="default: the one the index was built with")
    parser.add_argument("--k", type=whole(1), default=4, 
                        help="neighbours, nearest first (paper: 1; measured: 4 lower the loss four times as much)")
    parser.add_argument("--steps", type=whole(1), default=1, help="gradient steps on each neighbour (paper: 1)")
    parser.add_argument("--lr", type=number(0), default=1e-5, help="learning rate of these steps (paper: 1e-5)")
    parser.add_argument("--optimizer", choices=("signsgd", "adamw", "sgd"), default="signsgd",
                        help="signsgd: a fresh Adam's first step, no state; adamw: moments across neighbours")
    parser.add_argument("--recipe", choices=("paper",), help="paper: --k 1 --steps 1 --lr 1e-5 --optimizer adamw")
    parser.add_argument("--no-ttt", action="store_true", help="answer without test-time training")
    parser.add_argument("--activation-checkpointing", action=argparse.BooleanOptionalAction,
                        default=argparse.SUPPRESS, help="recompute activations in backward: a tenth more time, a tenth "
                        "less memory (measured; default: for models of more than a billion parameters)")
    parser.add_argument("--snapshot", choices=("auto", "host", "device"), default="auto",
                        help="where the original weights wait; auto: on the device, if it has room for them twice")
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
        paper = {"k": 1, "steps": 1, "lr": 1e-5, "optimizer": "adamw"}
        for name, value in paper.items():
            if getattr(args, name) not in (value, parser.get_default(name)):
                parser.error(f"--recipe paper and --{name} {getattr(args, name)}: expected one of them")
            setattr(args, name, value)
    if hasattr(args, "questions") != bool(args.out):
        parser.error("--questions and --out go together: one file to read, one to write")
    if hasattr(args, "question") and not args.question.strip():
        parser.error("--question: found an empty question, expected text")
    return args


def settings_of(args):
    """The settings of `Answerer` as a dict, from the command line."""
    return {"model": args.model or default_model(), "ttt": not args.no_ttt, "index": args.index,
            "encoder": args.encoder, "k": args.k, "steps": args.steps, "lr": args.lr, "optimizer": args.optimizer,
            "snapshot": args.snapshot, "activation_checkpointing": getattr(args, "activation_checkpointing", None),
            "max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p,
            "seed": args.seed, "system": read_text(args.system, "--system") if args.system else None,
            "dtype": args.dtype}


def main(argv=None):
    args = parse_args(argv)
    questions = read_questions(args.questions) if hasattr(args, "questions") else None
    settings = settings_of(args)
    print(f"model: {settings['model']}", file=sys.stderr)
    answered = read_answers(args.out, questions, recorded(settings)) if questions else None
    answerer = Answerer(settings, pick_device(args.device))
    if questions:
        answer_file(answerer, args.questions, questions, answered, args.out)
    elif hasattr(args, "chat"):
        chat(answerer, args.json)
    else:
        answer_one(answerer, args.question, args.json)


def read_text(path, flag):
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{flag} {path}: not UTF-8 text (byte {error.start})") from None


def answer_one(answerer, question, as_json, history=()):
    """Answers one question on stdout, as streamed text or as one JSON object; returns the answer's dict."""
    if as_json:
        result = answerer.answer(question, history)
        print(json.dumps(result, ensure_ascii=False), flush=True)
        return result

    def on_neighbours(neighbours, report):
        for neighbour in neighbours:
            print(f"neighbour {neighbour['id']}  score {neighbour['score']:.3f}  {shorten(neighbour['instruction'])}")
        if report.applied:
            change = f"{report.loss_before:.3f} → {report.loss_after:.3f}"
            print(f"adapted: loss on the nearest {change}")
        else:
            print(f"not adapted: {report.reason}")
        print(flush=True)
    # The answer's own headings, "## Thought" and "## Summarization", set its parts apart.
    result = answerer.answer(question, history, on_neighbours, lambda piece: print(piece, end="", flush=True))
    t = result["timings"]
    print(f"\n\n{'' if result['finish_reason'] == 'stop' else '(cut at the longest answer allowed) '}"
          f"load {t['load_s']:.1f} s, retrieve {t['retrieve_s']:.2f} s, adapt {t['adapt_s']:.1f} s, "
          f"generate {t['generate_s']:.1f} s ({t['tokens_per_s']:.0f} tokens/s), restore {t['restore_s']:.2f} s"
          f"{'; weights restored bit for bit' if result['ttt']['applied'] else ''}\n{DISCLAIMER}")
    return result


def shorten(text, length=100):
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length - 1] + "…"


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
                result = answer_one(answerer, question, as_json, history)
            except InputError as error:  # a question too long, say: the next one may be better
                print("error:", one_line(error), file=sys.stderr)
                continue
            history += [{"role": "user", "content": question}, {"role": "assistant", "content": result["answer"]}]


def read_questions(path):
    """[(line number, question)] of a jsonl file; the first bad line stops, by number, before any model is loaded."""
    questions = []
    for line, row in read_jsonl(path):
        if isinstance(row, InputError):
            raise row
        question = row.get("question", row.get("instruction"))
        if not isinstance(question, str) or not question.strip():
            raise InputError(f"{path}:{line}: found no question; expected text under \"question\" or \"instruction\"")
        at_line(path, line, check_unicode, question)
        questions.append((line, question))
    if not questions:
        raise InputError(f"{path}: found no rows; expected one question a line")
    return questions


def recorded(settings):
    """The settings that shape an answer, as each row of --out records them."""
    return {key: value for key, value in settings.items() if key not in ("snapshot", "activation_checkpointing")}


OUR_ROW = b'{"line": '  # how each row of --out begins


def read_answers(path, questions, settings):
    """The line numbers answered by an earlier run into `path`; a last line cut short by a kill counts as not there.

    InputError when the file belongs to other questions or was made with other settings.
    """
    answered, asked = set(), dict(questions)
    if not Path(path).exists():
        return answered
    lines, n_bytes = complete_lines(path)
    with open(path, "rb") as file:
        file.seek(n_bytes)
        tail = file.read(len(OUR_ROW))
    if tail and not OUR_ROW.startswith(tail[:len(OUR_ROW)]):
        raise InputError(f"{path}:{lines + 1}: found something else than answers; expected a new name for --out")
    for line, row in read_jsonl(path):
        if line > lines:
            break
        if isinstance(row, InputError):
            raise row
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


def complete_lines(path):
    """(how many lines of the file end in a newline, how many bytes they are)."""
    lines = n_bytes = 0
    with open(path, "rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                lines, n_bytes = lines + 1, n_bytes + len(line)
    return lines, n_bytes


def answer_file(answerer, path_of_questions, questions, answered, path):
    """Appends one row to `path` for every question not yet in `answered`, each on disk before the next is begun."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        file.truncate(complete_lines(path)[1])
        for line, question in tqdm(questions, desc="questions", unit="question", disable=None, file=sys.stderr):
            if line not in answered:
                answer = at_line(path_of_questions, line, answerer.answer, question)
                row = {"line": line, **answer, "settings": recorded(answerer.settings)}
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
    print(f"{len(questions)} questions, {len(answered)} of them answered before; answers in {path}", file=sys.stderr)


if __name__ == "__main__":
    run_main(main)

"""The training that SFT and DPO share: optimizer, fp32 masters, one step, the loop.

    weights w (bf16, sharded) compute the loss; masters m (fp32, sharded) take the steps
    for each step:
        for each micro-batch of this rank:   G += gradient of the summed loss at w      (FSDP reduces, G is fp32)
        g = G · ranks / N                    N: tokens or pairs, counted over all micro-batches and ranks
        m = AdamW(m, clip(g), lr(step))      arXiv 1711.05101
        w = stochastic_round(m)              arXiv 2502.20566; seeded, so that a resume repeats it

One division, by the count over the whole step, gives the gradient of one big batch however the rows are spread over
ranks and micro-batches. G is multiplied by the number of ranks because FSDP averages over them. Masters and stochastic
rounding are needed because a step of 1e-6 is far below half a bf16 ulp of most weights (rounding.py).

The same command on the same CPUs with the same number of ranks gives the same bits, also across kills and resumes (a
GPU's attention adds gradients in no fixed order). Another number of ranks sees the same rows in the same steps: with
--dtype fp32 the weights are the same up to the order of sums (1e-6); in bf16 the rounding noise differs.

Each parameter's state takes 18 bytes in bf16 (2 weight, 4 master, 8 moments, 4 gradient), 16 in fp32, over all shards.
"""
import contextlib
import json
import math
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from checkpoints import load_tensors, look, save_tensors
from data import on_device, split_step, steps_of_epochs
from fast import Threads, return_freed_memory
from files import InputError, naming, read_jsonl, written_aside
from model import Llama, open_checkpoint
from parallel import World, all_sum, first_row, local, peak_memory, shard, sharded_like
from rounding import slices, stochastic_rounder
from rows import random_number
from weights import checkpoint_names, parameter_count, read_rows

# ----- state ---------------------------------------------------------------------------------------------------------


@dataclass
class Training:
    """All that a run changes. The dicts map our parameter names to this rank's rows of each, in fp32."""
    model: Llama
    world: World
    masters: dict  # in fp32 training the weights themselves
    grads: dict  # sums over the micro-batches of a step
    optimizer: torch.optim.AdamW
    seed: int
    checkpoint_above: float = math.inf  # micro-batches of more tokens compute their activations again in backward
    step: int = 0  # optimizer steps tried
    updates: int = 0  # optimizer steps taken: one whose loss or gradient is not finite is skipped
    rows: int = 0  # rows consumed: the position in the data
    verified: dict = field(default_factory=dict)  # checkpoints that need no second reading, see save_tensors


def load_training(directory, world, *, dtype=torch.bfloat16, weight_decay=0.01, checkpoint_above=math.inf, seed=42):
    """The Training at step 0 of the model in `directory`. Each rank reads its own rows; none ever holds the whole."""
    config, files = open_checkpoint(directory)
    names = checkpoint_names(config, files)
    with torch.device("meta"):  # the model takes no memory until it is sharded
        model = Llama(config).to(dtype)
    shard(model, world)
    model.to_empty(device=world.device)
    model.tie_weights()
    masters, grads = {}, {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = local(parameter).detach()
            masters[name] = weight if dtype == torch.float32 else torch.empty_like(weight, dtype=torch.float32)
            first = first_row(world, len(parameter))
            for offset, rows in read_rows(files, names[name], first, first + len(weight)):
                masters[name][offset:offset + len(rows)] = rows
            grads[name] = torch.zeros_like(masters[name])
            masters[name].grad = grads[name]
            parameter.register_post_accumulate_grad_hook(add_gradient_to(grads[name]))
    if world.size == 1 and world.device.type == "cpu":
        model.embed_grad, model.head_grad = grads["embed.weight"], grads.get("head.weight", grads["embed.weight"])
    optimizer = torch.optim.AdamW([
        {"params": [m for m in masters.values() if m.dim() > 1], "weight_decay": weight_decay},
        {"params": [m for m in masters.values() if m.dim() == 1], "weight_decay": 0.0},  # norms
    ], fused=True)
    for master in masters.values():  # made now, not at the first step, because a resume fills them before it
        optimizer.state[master] = {"step": torch.zeros((), device=world.device), "exp_avg": torch.zeros_like(master),
                                   "exp_avg_sq": torch.zeros_like(master)}
    training = Training(model, world, masters, grads, optimizer, seed, checkpoint_above)
    refresh_weights(training)
    return training


def add_gradient_to(total):
    """A hook that adds a parameter's gradient to the fp32 `total` as soon as backward has computed it, and frees it.

    Autograd and FSDP give gradients in the weights' bf16; a sum over micro-batches in bf16 would lose the small ones.
    """
    @torch.no_grad()
    def add(parameter):
        if parameter.grad is not None:  # None where backward has added to `total` itself (model.embed_grad, head_grad)
            total.add_(local(parameter.grad))
            parameter.grad = None
    return add


@torch.no_grad()
def refresh_weights(training):
    """bf16 weights ← masters, stochastically rounded: a function of the masters, seed, updates and shard alone.

    Replicas of a shard draw the same noise. Another number of shards draws other noise for the same rows.
    """
    world = training.world
    generator = torch.Generator(world.device).manual_seed(random_number(training.seed, training.updates, world.shard))
    round_ = stochastic_rounder(generator, world.device)
    for name, parameter in training.model.named_parameters():
        if local(parameter).dtype != torch.float32:
            for rounded, exact in zip(slices(local(parameter)), slices(training.masters[name])):
                round_(rounded, exact)


def state_tensors(training):
    """{name: tensor} of the masters and AdamW's moments, which a checkpoint holds; loading fills these same tensors.

    The bf16 weights are not among them, because they follow from the masters (`refresh_weights`).
    """
    tensors = {}
    for name, parameter in training.model.named_parameters():
        master = training.masters[name]
        state = training.optimizer.state[master]
        for kind, rows in (("master", master), ("exp_avg", state["exp_avg"]), ("exp_avg_sq", state["exp_avg_sq"])):
            tensors[f"{kind}/{name}"] = sharded_like(training.world, parameter, rows)
    return tensors


def save_checkpoint(training, folder, *, keep=2, facts=None):
    """Saves `training` as folder/step-000100 (see checkpoints.save_tensors); `facts`: what a resume must agree on."""
    numbers = {"updates": training.updates, "rows": training.rows, "facts": facts or {}}
    save_tensors(training.world, folder, training.step, state_tensors(training), numbers, keep=keep,
                 verified=training.verified)


def load_checkpoint(training, path, numbers):
    """Fills `training` from the (path, numbers) of `checkpoint_to_resume`; the number of ranks may have changed."""
    load_tensors(training.world, path, state_tensors(training))
    training.verified[path] = look(path)
    training.step, training.updates, training.rows = numbers["step"], numbers["updates"], numbers["rows"]
    for state in training.optimizer.state.values():
        state["step"].fill_(training.updates)
    refresh_weights(training)

# ----- batches -------------------------------------------------------------------------------------------------------


def micro_batches_of(examples, budget, world, *, tokens, collate):
    """[this rank's micro-batches of `examples`], for a pass without optimizer steps; arguments as of `epochs_of`."""
    bins = split_step([tokens(example) for example in examples], budget, world.size)[world.rank::world.size]
    return [collate([examples[i] for i in rows]) for rows in bins]


def epochs_of(examples, *, batch_size, budget, seed, world, tokens, collate):
    """The function batches(consumed) that `fit` asks for: an endless iterator over steps, from that many rows on.

    tokens(example): its length in a micro-batch; collate([example, …]) -> micro-batch of at most `budget` tokens.
    """
    lengths = [tokens(example) for example in examples]

    def batches(consumed):
        for rows, bins in steps_of_epochs(lengths, batch_size=batch_size, budget=budget, seed=seed, rank=world.rank,
                                          world=world.size, consumed=consumed):
            yield rows, [collate([examples[row] for row in bin_]) for bin_ in bins]
    return batches


# ----- one step ------------------------------------------------------------------------------------------------------


def learning_rate(step, steps, peak, warmup):
    """The rate of optimizer step 0 … steps - 1: a linear rise over the fraction `warmup` of them, then a cosine.

    Neither the first nor the last step has rate 0, because such a step would have no effect.
    """
    rise = math.ceil(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def take_step(training, stream, loss_fn, lr, clip, signals):
    """Takes one optimizer step on the next batch of `stream`: (metrics, row numbers, the signal to stop for or 0)."""
    model, world, began = training.model, training.world, time.perf_counter()
    rows, micro_batches = next(stream)
    loss, count, tokens, sums = 0, 0, 0, Counter()
    for batch in micro_batches:
        batch = on_device(batch, world.device)
        for layer in model.layers:
            layer.checkpointing = batch["tokens"] > training.checkpoint_above
        batch_loss, n, extra = loss_fn(model, batch)
        batch_loss.backward()
        loss, count, tokens = loss + batch_loss.detach().double(), count + n, tokens + batch["tokens"]
        for name, value in extra.items():
            sums[name] += value
    squares = sum(torch.linalg.vector_norm(grad).double() ** 2 for grad in training.grads.values())
    names = sorted(sums)
    loss, count, tokens, squares, terminate, interrupt, *sums = all_sum(world, [
        loss, count, tokens, squares, *signals_in(signals), *(sums[name] for name in names)])
    count = max(count, 1)
    # FSDP has divided the sum of the ranks' gradients by `size`; `squares` counts each shard size / shards times
    norm = math.sqrt(squares / (world.size / world.shards)) * world.size / count
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:  # not a factor of 0, because NaN · 0 is NaN; all ranks decide alike, because they see the same sums
        scale = world.size / count * min(1.0, clip / (norm + 1e-6) if clip else 1.0)
        for grad in training.grads.values():
            grad.mul_(scale)
        for group in training.optimizer.param_groups:
            group["lr"] = lr
        training.optimizer.step()
        training.updates += 1
        refresh_weights(training)
    for grad in training.grads.values():
        grad.zero_()
    training.step += 1
    if training.step % 8 == 0:  # not at every step, because mapping the pages again takes 0.1 to 0.2 seconds
        return_freed_memory(world.device)
    training.rows += len(rows)
    seconds = time.perf_counter() - began
    row = {"step": training.step, "finite": finite, "loss": loss / count, "lr": lr, "grad_norm": norm,
           "count": int(count), "tokens": int(tokens), "tokens_per_s": round(tokens / seconds, 1),
           "rows": training.rows, "peak_memory_gb": round(peak_memory(world.device) / 1e9, 3)}
    if world.device.type == "cuda":
        row["mfu"] = round(step_flops(model.config, tokens) / seconds / world.size / peak_flops(world.device), 4)
    row |= {name: value / count for name, value in zip(names, sums)}
    return row, rows, signal_among(terminate, interrupt)


@torch.no_grad()
def validate(training, micro_batches, loss_fn):
    """{"loss": …, name: …}: loss_fn's sums over all ranks' `micro_batches`, divided by the count of tokens or pairs."""
    loss, count, sums = 0, 0, Counter()
    for batch in tqdm(micro_batches, desc="held-out rows", unit="batch", delay=2, leave=False, file=sys.stderr,
                      disable=None if training.world.rank == 0 else True):
        batch_loss, n, extra = loss_fn(training.model, on_device(batch, training.world.device))
        loss, count = loss + batch_loss.double(), count + n
        for name, value in extra.items():
            sums[name] += value
    if training.world.mesh:  # FSDP keeps the root gathered until a backward pass, and here none follows
        training.model.reshard()
    return_freed_memory(training.world.device)
    names = sorted(sums)
    loss, count, *sums = all_sum(training.world, [loss, count, *(sums[name] for name in names)])
    return {name: value / max(count, 1) for name, value in zip(["loss", *names], [loss, *sums])}

# ----- the loop ------------------------------------------------------------------------------------------------------


def fit(training, batches, loss_fn, *, steps, lr, warmup=0.1, clip=1.0, out=None, save_every=0, keep=2, held=None,
        facts=None, where=str):
    """Trains until optimizer step `steps`. SystemExit after a signal (130, 143) and after three bad steps in a row (1).

    batches(consumed) yields (the step's row numbers, [this rank's micro-batches]), from that many rows of the data on.
    loss_fn(model, batch) -> (summed loss, count, {name: sum}): loss and sums are added up over micro-batches and ranks
    and divided by the count. They are also measured on the micro-batches `held`, before the first step, every
    `save_every` steps (0: never) and after the last, and logged as val_NAME. With `out`, each step appends a line to
    out/metrics.jsonl, and a checkpoint that notes `facts` is saved every `save_every` steps and wherever the run stops.
    A bad step, whose loss or gradient norm is not finite, changes nothing; its rows are logged as where(row).
    """
    world, bad_in_a_row = training.world, 0
    metrics_file = open_metrics(out, training.step) if out and world.rank == 0 else None
    bar = tqdm(total=steps, initial=training.step, desc="training", unit="step", file=sys.stderr,
               disable=None if world.rank == 0 else True)

    def say(text):
        if world.rank == 0:
            tqdm.write(text, file=sys.stderr)

    def log(row):
        if metrics_file:  # NaN and infinity are written as text, because JSON has neither
            row = {key: str(x) if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
            metrics_file.write(json.dumps(row) + "\n")
            metrics_file.flush()

    def validated():
        return {f"val_{name}": value for name, value in validate(training, held, loss_fn).items()}
    with (naming(Path(out or "") / "metrics.jsonl"), contextlib.closing(bar), metrics_file or contextlib.nullcontext(),
          contextlib.closing(Threads()) as threads, signals_noted() as signals):
        if held and training.step == 0:
            log({"step": 0} | validated())
        stream = batches(training.rows)
        while training.step < steps:
            rate = learning_rate(training.step, steps, lr, warmup)
            threads.leave_busy_cores()
            row, rows, signal_seen = take_step(training, stream, loss_fn, rate, clip, signals)
            bad_in_a_row = 0 if row["finite"] else bad_in_a_row + 1
            if not row["finite"]:
                row["skipped_rows"] = [where(i) for i in rows]
                say(f"step {training.step}: loss {row['loss']}, gradient norm {row['grad_norm']}: skipped; "
                    f"its rows: {', '.join(row['skipped_rows'])}")
            due = training.step == steps or (save_every and training.step % save_every == 0)
            stopping = signal_seen or bad_in_a_row == 3
            if held and due and not stopping:
                row |= validated()
            log(row)
            bar.update()
            bar.set_postfix_str(f"loss {row['loss']:.4f}, lr {rate:.1e}, {row['tokens_per_s']:,.0f} tok/s")
            if out and (due or stopping):
                save_checkpoint(training, Path(out) / "checkpoints", keep=keep, facts=facts)
                # a signal during the save ends the run now, without another step or save
                signal_seen = signal_seen or signal_among(*all_sum(world, signals_in(signals)))
            if signal_seen:
                say(f"stopped by a signal after step {training.step} of {steps}; --resume goes on from there")
                raise SystemExit(128 + signal_seen)
            if stopping:
                say(f"error: loss or gradient not finite in steps {training.step - 2} to {training.step}: stopped"
                    f"{' with a checkpoint' if out else ''}")
                raise SystemExit(1)


@contextlib.contextmanager
def signals_noted():
    """Inside, SIGTERM and SIGINT only enter the set that is yielded, so that the loop stops between two steps."""
    seen = set()
    before = {number: signal.signal(number, lambda number, frame: seen.add(number))
              for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def signals_in(seen):
    """[whether SIGTERM was seen, whether SIGINT was], which the ranks add up."""
    return [signal.SIGTERM in seen, signal.SIGINT in seen]


def signal_among(terminate, interrupt):
    """The signal to stop for, or 0; `terminate` and `interrupt`: how many ranks have seen SIGTERM and SIGINT."""
    return signal.SIGTERM if terminate else signal.SIGINT if interrupt else 0


def open_metrics(out, step):
    """Opens out/metrics.jsonl to append, without the lines of steps after `step`, which a resume takes again."""
    path, lines = Path(out) / "metrics.jsonl", []
    if step and path.exists():
        for _, row in read_jsonl(path):
            if not isinstance(row, InputError) and row.get("step", 0) <= step:  # a kill may leave half a line
                lines.append(json.dumps(row) + "\n")
    with written_aside(path) as aside:
        aside.write_text("".join(lines), encoding="utf-8")
    return open(path, "a", encoding="utf-8")


def step_flops(config, tokens):
    """FLOPs of forward and backward over `tokens` tokens: 6 per weight and token; the embedding's look-up has none.

    The products of attention are left out, because they depend on the rows' lengths; so the MFU is a lower bound.
    """
    looked_up = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return 6 * tokens * (parameter_count(config) - looked_up)


def peak_flops(device):
    """Dense bf16 FLOP/s of the GPU by its data sheet; infinite, so that the MFU is 0, for one that is not listed."""
    name = torch.cuda.get_device_name(device)
    sheet = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12,
             "L40S": 362e12, "A6000": 155e12, "4090": 165e12, "3090": 71e12}
    return next((flops for key, flops in sheet.items() if key in name), math.inf)

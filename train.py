"""What SFT and DPO share: processes, sharding, the optimizer, the loop, checkpoints and the exported model.

    weights w (bf16, sharded) compute; masters m (fp32, sharded) learn
    for each step:
        for each micro-batch of this rank:   G += gradient of the summed loss at w      (FSDP reduces, G is fp32)
        g = G · ranks / N                    N: what was counted (tokens, pairs) over all micro-batches and ranks
        m = AdamW(m, clip(g), lr(step))      arXiv 1711.05101
        w = stochastic_round(m)              arXiv 2502.20566; seeded, so that a resume repeats it

Dividing once, by the count over the whole step, makes the gradient that of one big batch however the rows are spread
over ranks and micro-batches; FSDP averages over ranks, hence the factor. Why masters and stochastic rounding: a step of
1e-6 is far below half a bf16 ulp of most weights, so rounding to nearest would show the model none of it (README).

What repeats: the same command on the same CPUs with the same number of ranks gives the same bits, also across kills and
resumes (a GPU's attention adds gradients in no fixed order). Another number of ranks sees the same rows in the same
steps; with --dtype fp32 it gives the same weights up to the order of sums (1e-6), in bf16 the rounding noise differs.

State a parameter costs 18 bytes in bf16 (2 weights, 4 master, 8 moments, 4 gradient), 16 in fp32, over all shards.
"""
import contextlib
import functools
import json
import math
import os
import signal
import sys
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from data import CHAT_TEMPLATES, Tokenizer, draw_rows, random_number, split_step, steps_of_epochs
from files import (
    DISCLAIMER,
    InputError,
    number,
    one_line,
    read_json,
    read_jsonl,
    remove,
    resident,
    return_freed_memory,
    reuse_freed_memory,
    sha256,
    whole,
    write_json,
    written_aside,
)
from model import (
    KEPT_KEYS,
    KEPT_LOGITS,
    Llama,
    LlamaConfig,
    attend_apart,
    block_of_logits,
    causal_attention,
    check_checkpoint,
    checkpoint_files,
    checkpoint_names,
    has_fast_bf16,
    read_rows,
    stochastic_round_,
    stop_ids_of,
    write_checkpoint,
)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# ----- processes -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The processes of this run and this one's place: all of it rank 0 of 1 without torchrun."""
    rank: int
    size: int
    device: torch.device
    mesh: object = None  # a DeviceMesh ("shard",) or ("replicate", "shard"); None for one process
    shard: int = 0  # which part of every parameter this rank holds; replicas hold the same
    shards: int = 1


def start(device="auto", replicate=1):
    """The World of this process: one alone under plain `python`, its place among the ranks under torchrun.

    `replicate` copies of the sharded model (HSDP), so that only gradients cross between nodes. InputError when the
    ranks do not divide by it, or for a GPU that is not there.
    """
    reuse_freed_memory()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device; expected one, or --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    device = torch.device(device)
    if size % replicate:
        raise InputError(f"--replicate {replicate}: {size} ranks do not divide by it; expected a divisor of {size}")
    if size == 1:
        return World(0, 1, device)
    # gloo beside NCCL: the few numbers the ranks agree on each step are Python floats on the host
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    shape, names = ((replicate, size // replicate), ("replicate", "shard")) if replicate > 1 else ((size,), ("shard",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    return World(rank, size, device, mesh, mesh.get_local_rank("shard"), size // replicate)


def all_sum(world, values):
    """The sum of each number over all ranks, the same bits on every rank."""
    if world.size == 1:
        return [float(value) for value in values]
    values = torch.tensor([float(value) for value in values], dtype=torch.float64)
    dist.all_reduce(values)
    return values.tolist()


def from_rank_0(world, value):
    """Rank 0's `value` on every rank."""
    if world.size > 1:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        value = box[0]
    return value


def computed_on_rank_0(world, function):
    """The value of function() on rank 0 for every rank; what is wrong with its input is raised on every rank."""
    value = None
    if world.rank == 0:
        try:
            value = function()
        except (InputError, OSError) as error:
            value = error
    value = from_rank_0(world, value)
    if isinstance(value, Exception):
        raise value
    return value


def from_all(world, value):
    """[every rank's `value`], by rank."""
    if world.size == 1:
        return [value]
    values = [None] * world.size
    dist.all_gather_object(values, value)
    return values


def stop(world):
    """Leaves the process group; a rank that failed must not wait for the others, so call it only at a good end."""
    if world.size > 1:
        dist.barrier()
        dist.destroy_process_group()

# ----- model and optimizer -------------------------------------------------------------------------------------------


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
    updates: int = 0  # and done: a step with a loss or gradient that is not finite changes nothing
    rows: int = 0  # rows consumed: the position in the data


def local(tensor):
    """This rank's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_model(config, world, dtype):
    """A Llama on the meta device, without memory yet, cut over the ranks block by block."""
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    if world.mesh:
        for module in (*model.layers, model):  # embedding and head stay with the root: they may be one weight
            fully_shard(module, mesh=world.mesh, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    return model


def load_training(directory, world, *, dtype=torch.bfloat16, weight_decay=0.01, checkpoint_above=math.inf, seed=42):
    """The Training that begins from the model in `directory`. No rank ever holds the whole: each reads its own rows."""
    config = LlamaConfig.from_json(Path(directory) / "config.json")
    files, names = checkpoint_files(directory), checkpoint_names(config)
    check_checkpoint(files, config)
    model = sharded_model(config, world, dtype)
    model.to_empty(device=world.device)
    model.tie_weights()
    masters, grads = {}, {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            own = local(parameter).detach()
            masters[name] = own if dtype == torch.float32 else torch.empty_like(own, dtype=torch.float32)
            first = world.shard * math.ceil(len(parameter) / world.shards)  # FSDP2 cuts rows as torch.chunk does
            for offset, rows in read_rows(files, names[name], first, first + len(own)):
                masters[name][offset:offset + len(rows)] = rows
            grads[name] = torch.zeros_like(masters[name])
            masters[name].grad = grads[name]
            parameter.register_post_accumulate_grad_hook(gradient_hook(grads[name]))
            if world.size == 1 and world.device.type == "cpu" and name in ("embed.weight", "head.weight"):
                parameter.main_grad = grads[name]  # embedding and head add to it themselves
    optimizer = torch.optim.AdamW([
        {"params": [m for m in masters.values() if m.dim() > 1], "weight_decay": weight_decay},
        {"params": [m for m in masters.values() if m.dim() == 1], "weight_decay": 0.0},  # norms
    ], fused=True)
    for master in masters.values():  # made now, not at the first step, so that a checkpoint always has them
        optimizer.state[master] = {"step": torch.zeros((), device=world.device), "exp_avg": torch.zeros_like(master),
                                   "exp_avg_sq": torch.zeros_like(master)}
    training = Training(model, world, masters, grads, optimizer, seed, checkpoint_above)
    refresh_weights(training)
    return training


def gradient_hook(total):
    """Adds each micro-batch's gradient to the fp32 `total` as soon as it is complete, and frees it.

    Autograd and FSDP hand gradients back in the weights' bf16; adding them up in bf16 would lose the small ones.
    """
    @torch.no_grad()
    def add(parameter):
        if parameter.grad is not None:  # None where backward has added to `main_grad` itself
            total.add_(local(parameter.grad))
            parameter.grad = None
    return add


@torch.no_grad()
def refresh_weights(training):
    """bf16 weights ← masters, stochastically rounded; a function of the masters, seed, updates and shard alone.

    Replicas draw the same noise. The noise of one shard differs from that of the same rows cut otherwise.
    """
    world = training.world
    generator = torch.Generator(world.device).manual_seed(random_number(training.seed, training.updates, world.shard))
    for name, parameter in training.model.named_parameters():
        if local(parameter).dtype != torch.float32:
            stochastic_round_(local(parameter), training.masters[name], generator)


def sharded(training, name, tensor):
    """A rank's rows `tensor` of the parameter `name`, as the whole, sharded: a DTensor; for one process itself."""
    if not training.world.mesh:
        return tensor
    parameter = training.model.get_parameter(name)
    return DTensor.from_local(tensor, parameter.device_mesh, parameter.placements, run_check=False,
                              shape=parameter.shape, stride=parameter.stride())


def learning_rate(step, steps, peak, warmup):
    """The rate of optimizer step 0 … steps - 1: rises linearly over the first `warmup` (a fraction), then a cosine.

    Neither the first nor the last step has rate 0: that would be a step without effect.
    """
    rise = math.ceil(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / (steps - rise)))


def label_logps(model, batch):
    """log p(label) [B, T] in fp32 of a micro-batch of data.collate; packed documents do not see each other."""
    documents = batch["documents"]
    attend = functools.partial(attend_apart, documents) if documents and len(documents) > 1 else causal_attention
    return model(batch["ids"], labels=batch["labels"], positions=batch["positions"], attend=attend)

# ----- the loop ------------------------------------------------------------------------------------------------------


def fit(training, batches, loss_fn, *, steps, lr, warmup=0.1, clip=1.0, out=None, save_every=0, keep=2, validate=None,
        facts=None, where=str):
    """Trains until optimizer step `steps`. SystemExit after a signal (130, 143) and after three bad steps in a row (1).

    batches(rows) yields, from that position in the data on, (the step's row numbers, [this rank's micro-batches]).
    loss_fn(model, batch) -> (summed loss, count, {name: sum}); all are added up over micro-batches and ranks, and
    divided by the count. validate() -> {name: number} is called before, at each save and after, and logged as val_name.
    With `out`: a line a step in out/metrics.jsonl, and every `save_every` steps, at the end and on a signal a
    checkpoint, which notes `facts`. A step whose loss or gradient norm is not finite is skipped; its rows are named by
    `where(row)`.
    """
    world, bad_in_a_row = training.world, 0
    metrics_file = open_metrics(out, training.step) if out and world.rank == 0 else None
    bar = tqdm(total=steps, initial=training.step, desc="training", unit="step", file=sys.stderr,
               disable=None if world.rank == 0 else True)

    def log(row):
        if metrics_file:  # NaN and infinity are no JSON: written as text
            row = {key: str(x) if isinstance(x, float) and not math.isfinite(x) else x for key, x in row.items()}
            metrics_file.write(json.dumps(row) + "\n")
            metrics_file.flush()

    def validated():
        return {f"val_{name}": value for name, value in validate().items()}

    def save():
        if out:
            save_checkpoint(training, Path(out) / "checkpoints", keep=keep, facts=facts)
    with contextlib.closing(bar), contextlib.closing(metrics_file or bar), signals_noted() as signals:
        if validate and training.step == 0:
            log({"step": 0} | validated())
        stream = batches(training.rows)
        while training.step < steps:
            rate = learning_rate(training.step, steps, lr, warmup)
            row, rows = take_step(training, stream, loss_fn, rate, clip, signals)
            bad_in_a_row = 0 if row["finite"] else bad_in_a_row + 1
            signal_seen, last = row.pop("signal"), training.step == steps
            if not row["finite"]:
                row["skipped_rows"] = [where(i) for i in rows]
                if world.rank == 0:
                    tqdm.write(f"step {training.step}: loss {row['loss']}, gradient norm {row['grad_norm']}: skipped; "
                               f"its rows: {', '.join(row['skipped_rows'])}", file=sys.stderr)
            due = last or (save_every and training.step % save_every == 0)
            stopping = signal_seen or bad_in_a_row == 3
            if validate and due and not stopping:
                row |= validated()
            log(row)
            bar.update()
            bar.set_postfix_str(f"loss {row['loss']:.4f}, lr {rate:.1e}, {row['tokens_per_s']:,.0f} tok/s")
            if due or stopping:
                save()
            if signal_seen:
                if world.rank == 0:
                    print(f"stopped by a signal after step {training.step} of {steps}; --resume goes on from there",
                          file=sys.stderr)
                raise SystemExit(128 + signal_seen)
            if stopping:
                if world.rank == 0:
                    print(f"error: loss or gradient not finite in steps {training.step - 2} to {training.step}: stopped"
                          f"{' with a checkpoint' if out else ''}", file=sys.stderr)
                raise SystemExit(1)


def on_device(batch, device):
    """A micro-batch with its tensors on `device`."""
    return {key: x.to(device) if torch.is_tensor(x) else x for key, x in batch.items()}


def take_step(training, stream, loss_fn, lr, clip, signals):
    """One optimizer step on the next batch of `stream`: (its row of metrics, its row numbers)."""
    model, world, began = training.model, training.world, time.perf_counter()
    rows, micro_batches = next(stream)
    loss, count, tokens, sums = 0, 0, 0, Counter()
    for batch in micro_batches:
        batch = on_device(batch, world.device)
        for layer in model.layers:
            layer.checkpointing = batch["tokens"] > training.checkpoint_above
        part, n, extra = loss_fn(model, batch)
        part.backward()
        loss, count, tokens = loss + part.detach().double(), count + n, tokens + batch["tokens"]
        for name, value in extra.items():
            sums[name] += value
    squares = sum(torch.linalg.vector_norm(grad).double() ** 2 for grad in training.grads.values())
    names = sorted(sums)
    loss, count, tokens, squares, terminate, interrupt, *sums = all_sum(world, [
        loss, count, tokens, squares, signal.SIGTERM in signals, signal.SIGINT in signals,
        *(sums[name] for name in names)])
    count = max(count, 1)
    # FSDP has divided the sum of the ranks' gradients by their number; each shard is held by size / shards replicas
    norm = math.sqrt(squares / (world.size / world.shards)) * world.size / count
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:  # a branch, for NaN · 0 is NaN; all ranks take the same one, for they see the same sums
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
    if training.step % 8 == 0:  # each time it must be mapped again, which takes a tenth of a second or two
        return_freed_memory(world.device)
    training.rows += len(rows)
    seconds = time.perf_counter() - began
    row = {"step": training.step, "finite": finite, "loss": loss / count, "lr": lr, "grad_norm": norm,
           "count": int(count), "tokens": int(tokens), "tokens_per_s": round(tokens / seconds, 1),
           "rows": training.rows, "peak_memory_gb": round(peak_memory(world.device) / 1e9, 3)}
    if world.device.type == "cuda":
        row["mfu"] = round(step_flops(model.config, tokens) / seconds / world.size / peak_flops(world.device), 4)
    row |= {name: value / count for name, value in zip(names, sums)}
    return row | {"signal": signal.SIGTERM if terminate else signal.SIGINT if interrupt else 0}, rows


@torch.no_grad()
def evaluate(training, micro_batches, loss_fn):
    """{"loss" and the names of loss_fn's sums: per counted token or pair} over all ranks' `micro_batches`."""
    loss, count, sums = 0, 0, Counter()
    for batch in tqdm(micro_batches, desc="held-out rows", unit="batch", delay=2, leave=False, file=sys.stderr,
                      disable=None if training.world.rank == 0 else True):
        part, n, extra = loss_fn(training.model, on_device(batch, training.world.device))
        loss, count = loss + part.double(), count + n
        for name, value in extra.items():
            sums[name] += value
    if training.world.mesh:  # the root stays gathered after a forward pass until a backward pass, which there is not
        training.model.reshard()
    return_freed_memory(training.world.device)
    names = sorted(sums)
    loss, count, *sums = all_sum(training.world, [loss, count, *(sums[name] for name in names)])
    return {name: value / max(count, 1) for name, value in zip(["loss", *names], [loss, *sums])}


@contextlib.contextmanager
def signals_noted():
    """Inside, SIGTERM and SIGINT do nothing but enter the yielded set, which the loop looks at between two steps."""
    seen = set()
    before = {number: signal.signal(number, lambda number, frame: seen.add(number))
              for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def open_metrics(out, step):
    """out/metrics.jsonl for appending, without the lines of steps after `step` that a kill has undone."""
    path, kept = Path(out) / "metrics.jsonl", []
    for _, row in read_jsonl(path) if path.exists() else ():
        if not isinstance(row, InputError) and row.get("step", 0) <= step and step:  # a killed run ends in half a line
            kept.append(json.dumps(row) + "\n")
    with written_aside(path) as aside:
        aside.write_text("".join(kept))
    return open(path, "a")


def peak_memory(device):
    """The most bytes this process has held: on the GPU, or resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resident("VmHWM")


def step_flops(config, tokens):
    """Arithmetic of forward and backward over `tokens`: 6 a weight and token, embedding look-up aside.

    Attention's own products are left out: they depend on how the rows are cut, and so the MFU is a lower bound.
    """
    with torch.device("meta"):
        return 6 * tokens * sum(p.numel() for name, p in Llama(config).named_parameters()
                                if config.tie_word_embeddings or name != "embed.weight")


def peak_flops(device):
    """Dense bf16 FLOP/s of the GPU by its data sheet; infinite (MFU 0) for one not listed here."""
    name = torch.cuda.get_device_name(device)
    sheet = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "A800": 312e12,
             "L40S": 362e12, "A6000": 155e12, "4090": 165e12, "3090": 71e12}
    return next((flops for key, flops in sheet.items() if key in name), math.inf)

# ----- checkpoints of a run ------------------------------------------------------------------------------------------


def state_tensors(training):
    """{name: tensor} of all that a checkpoint holds beside a few numbers; loading writes into these same tensors.

    The bf16 weights are not among them: they are a function of the masters (`refresh_weights`).
    """
    tensors = {}
    for name, master in training.masters.items():
        tensors[f"master/{name}"] = sharded(training, name, master)
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}/{name}"] = sharded(training, name, training.optimizer.state[master][moment])
    rank, device = training.world.rank, training.world.device
    tensors[f"rng/{rank}"] = torch.get_rng_state()
    if device.type == "cuda":
        tensors[f"rng-cuda/{rank}"] = torch.cuda.get_rng_state(device)
    return tensors


def save_checkpoint(training, folder, *, keep=2, facts=None):
    """Writes folder/step-000100 and removes all older than the newest `keep` that verify. SystemExit if it cannot.

    All ranks write their shards into one folder beside it (on several nodes: on a shared disk); rank 0 adds the numbers
    and a SHA-256 of every file, flushes it and renames it, so that a kill at any moment leaves the old or the new one.
    """
    world, target = training.world, Path(folder) / f"step-{training.step:06d}"
    try:
        with written_aside(target) if world.rank == 0 else contextlib.nullcontext() as aside:
            aside = from_rank_0(world, aside)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that one process saves alone, as it is told to
                dcp.save(state_tensors(training), no_dist=world.size == 1,
                         storage_writer=dcp.FileSystemWriter(aside))
            if world.rank == 0:
                numbers = {"step": training.step, "updates": training.updates, "rows": training.rows,
                           "world_size": world.size, "device": world.device.type, "facts": facts or {}}
                (aside / "state.json").write_text(json.dumps(numbers, indent=2))
                write_manifest(aside)
        if world.rank == 0:
            remove_old_checkpoints(folder, keep)
    except (OSError, CheckpointException) as error:
        raise SystemExit(f"error: could not save {target}: {one_line(error)}") from None
    if world.size > 1:
        dist.barrier()


def write_manifest(folder):
    """SHA256SUMS over all files of `folder` (`sha256sum -c` reads it) and, over that, SHA256SUMS.sha256."""
    sums = folder / "SHA256SUMS"
    sums.write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(digests(folder).items())))
    (folder / "SHA256SUMS.sha256").write_text(f"{sha256(sums)}  SHA256SUMS\n")


def digests(folder):
    """{file name: SHA-256} of all files in `folder` but the two that hold the sums."""
    names = [path.name for path in Path(folder).iterdir() if not path.name.startswith("SHA256SUMS")]
    with ThreadPoolExecutor(8) as pool:  # hashlib releases the interpreter
        return dict(zip(names, pool.map(lambda name: sha256(Path(folder) / name), names)))


def fault_of(folder):
    """What is wrong with a checkpoint, in a few words, or None: every byte of every file is checked."""
    sums = Path(folder) / "SHA256SUMS"
    try:
        if (Path(folder) / "SHA256SUMS.sha256").read_bytes() != f"{sha256(sums)}  SHA256SUMS\n".encode():
            return "SHA256SUMS is damaged"
        expected = dict(reversed(line.split("  ", 1)) for line in sums.read_text().splitlines())
        found = digests(folder)
    except OSError as error:
        return one_line(error)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            return f"{name} is missing"
        if expected.get(name) != found[name]:
            return f"{name} is damaged" if name in expected else f"{name} does not belong there"
    return None


def checkpoints_of(folder):
    """The checkpoints in `folder`, newest first."""
    found = [path for path in Path(folder).glob("step-*") if path.name[5:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def remove_old_checkpoints(folder, keep):
    """Removes what is older than the `keep` newest checkpoints that verify; a damaged one does not count."""
    good = 0
    for path in checkpoints_of(folder):
        if good == keep:
            remove(path)
        elif fault_of(path) is None:
            good += 1


def checkpoint_to_resume(world, folder, facts):
    """(path, its numbers) of the newest checkpoint in `folder` that verifies, on every rank; None if there is none.

    InputError when the run it belongs to differed in one of `facts` (what fixes the data and its order).
    """
    return computed_on_rank_0(world, lambda: find_checkpoint(folder, facts))


def load_checkpoint(training, path, numbers):
    """Fills `training` from what `checkpoint_to_resume` found; the number of ranks may have changed.

    The checkpoint's .metadata is a pickle: resume from your own runs only.
    """
    world, tensors = training.world, state_tensors(training)
    if world.rank >= numbers["world_size"]:
        del tensors[f"rng/{world.rank}"]
    if world.rank >= numbers["world_size"] or numbers["device"] != "cuda":
        tensors.pop(f"rng-cuda/{world.rank}", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(path), no_dist=world.size == 1)
    if f"rng/{world.rank}" in tensors:
        torch.set_rng_state(tensors[f"rng/{world.rank}"])
    if f"rng-cuda/{world.rank}" in tensors:
        torch.cuda.set_rng_state(tensors[f"rng-cuda/{world.rank}"], world.device)
    training.step, training.updates, training.rows = numbers["step"], numbers["updates"], numbers["rows"]
    for state in training.optimizer.state.values():
        state["step"].fill_(training.updates)
    refresh_weights(training)


def find_checkpoint(folder, facts):
    """(path, its numbers) of the newest checkpoint that verifies, or None; InputError for one of another run."""
    for path in checkpoints_of(folder):
        fault = fault_of(path)
        if fault:
            print(f"passed over {path}: {fault}", file=sys.stderr)
            continue
        numbers = read_json(path / "state.json")
        differing = [f"{key} was {numbers['facts'].get(key)!r} and is {facts[key]!r}"
                     for key in facts if numbers["facts"].get(key) != facts[key]]
        if differing:
            raise InputError(f"{path}: made with other settings: {'; '.join(differing)}; expected the same, or "
                             "another --out")
        print(f"resuming from {path}", file=sys.stderr)
        return path, numbers
    return None

# ----- the exported model --------------------------------------------------------------------------------------------


def export_model(training, directory, *, source, dtype, card):
    """Writes the masters as a folder that transformers and vLLM load; bf16 by stochastic rounding, seeded.

    One weight at a time is gathered, by all ranks in the same order, and rank 0 writes. Tokenizer and settings come
    from the folder `source`; `card` is the text of README.md.
    """
    def gathered(name):
        master = sharded(training, name, training.masters[name])
        return master.full_tensor() if isinstance(master, DTensor) else master

    def finish(folder):
        tokenizer = Tokenizer.from_dir(source)
        path = folder / "generation_config.json"
        stops = sorted(stop_ids_of(source) | {tokenizer.end_of_turn()})  # a base model's file lacks the end of a turn
        given = read_json(path) if path.is_file() else {}
        path.write_text(json.dumps(given | {"eos_token_id": stops if stops[1:] else stops[0]}, indent=2))
        settings = folder / "tokenizer_config.json"
        if not (folder / "chat_template.jinja").is_file() and not (
                settings.is_file() and read_json(settings).get("chat_template")):
            (folder / "chat_template.jinja").write_text(CHAT_TEMPLATES[tokenizer.template])
        (folder / "README.md").write_text(card)
        if is_llama3(training.model.config):
            (folder / "NOTICE").write_text(LLAMA_NOTICE)
    if training.world.rank == 0:
        write_checkpoint(directory, training.model.config, gathered, source=source, dtype=dtype, seed=training.seed,
                         finish=finish)
    else:
        for name in checkpoint_names(training.model.config):
            gathered(name)
    if training.world.size > 1:
        dist.barrier()


def is_llama3(config):
    """Whether a model descends from Meta's Llama 3: no other family has this vocabulary."""
    return config.vocab_size == 128256


LLAMA_NOTICE = ("Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright © Meta Platforms, Inc. "
                "All Rights Reserved.\n")

def model_card(name, config, *, source, recipe, files, results):
    """README.md of an exported model: its licence, recipe {setting: value}, data [{file, rows, sha256}] and results."""
    llama = is_llama3(config)
    name = f"Llama-{name}" if llama else name  # the licence asks for such a name, and for the notice below
    licence = ("This model was made from Llama 3.1 and carries the Llama 3.1 Community License (NOTICE; a copy of the "
               "licence must go with the model).\n\n**Built with Llama**" if llama else
               f"The licence of the base model, `{source}`, applies, and those of the training data.")
    return "\n".join([
        f"---\nlicense: {'llama3.1' if llama else 'other'}\npipeline_tag: text-generation\n---\n",
        f"# {name}\n\n**{DISCLAIMER}**\n",
        f"Made from `{source}` by the recipe of FineMedLM-o1 (arXiv 2501.09213).\n\n## Licence\n\n{licence}\n",
        "## Recipe\n\n| setting | value |\n|---|---|", *(f"| {key} | {value} |" for key, value in recipe.items()),
        "\n## Data\n\n| file | rows | SHA-256 |\n|---|---|---|",
        *(f"| {one['file']} | {one['rows']:,} | `{one['sha256']}` |" for one in files),
        "\n## Results\n", *(f"- {key}: {value}" for key, value in results.items()), ""])

# ----- the plan and the flags ----------------------------------------------------------------------------------------


def default_budget(world):
    """Tokens of a micro-batch: enough to keep the device busy, few enough to leave it memory."""
    return 8192 if world.device.type == "cuda" else 1280


def expected_memory(config, world, *, dtype, tokens, activation_checkpointing, fast_bf16=True):
    """{part: bytes} that one process is expected to need, and the formula of each in its name; within about a fifth.

    c: bytes of a number computed with; L, D, I, H, K, C, V: layers, width, feed-forward width, heads, key-value heads,
    channels, vocabulary.
    """
    with torch.device("meta"):
        model = Llama(config)
    parameters = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.layers[0].parameters())
    w, c = (4, 4) if dtype == torch.float32 else (2, 2 if fast_bf16 else 4)
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    # a CPU's norms are computed again; its attention keeps copies, not views of a larger whole, and at most this many
    # probabilities a head and token (half of them are hidden)
    n, p = (2, KEPT_KEYS // 2) if world.device.type == "cpu" else (4, 0)
    block = c * (n * config.hidden_size + 2 * config.intermediate_size + n * (queries + keys) +
                 p * config.num_attention_heads)
    layers = config.num_hidden_layers
    kept = layers * c * config.hidden_size + block if activation_checkpointing else layers * block
    logits = min(tokens * config.vocab_size, KEPT_LOGITS)
    parts = {f"state: {16 if w == 4 else 18} × {parameters:,} parameters / {world.shards} shards":
             (16 if w == 4 else 18) * parameters / world.shards,
             f"activations of {tokens:,} tokens: " + ("L · c · D + one layer's" if activation_checkpointing else
             f"L · c · ({n} · D + 2 · I + {n} · (H + K) · C{f' + {p} · H' if p else ''})"): tokens * kept,
             f"logits: c × {logits:,} kept, 12 bytes × a block of {block_of_logits(world.device):,}":
             c * logits + 12 * block_of_logits(world.device)}
    if world.size > 1:
        root = parameters - layers * layer
        parts["gathered: embedding and head, two layers, and the gradients of as much"] = 2 * w * (root + 2 * layer)
    return parts


# where the numbers of the recipe come from
SUMMARY, CODE, REVIEW, OURS = ("the paper's summary", "the authors' code", "a review of the paper", "our choice")


def add_flags(parser, chosen):
    """The flags that SFT and DPO share; `chosen` {name: (default, where the number comes from)}."""
    def flag(name, kind, text, **more):
        if name in chosen:
            default, source = chosen[name]
            shown = f"{default:,}" if isinstance(default, int) else default
            more, text = {"default": default, **more}, f"{text} (default {shown}: {source})"
        parser.add_argument("--" + name.replace("_", "-"), type=kind, help=text, **more)

    def switch(name, text):
        parser.add_argument("--" + name, action="store_true", help=text)
    flag("data", str, "training rows: .jsonl or .jsonl.gz", metavar="FILE", nargs="+", required=True)
    flag("model", str, "the model to start from", metavar="DIR")
    flag("out", str, "the folder of this run", metavar="DIR")
    flag("rows", whole(1), "rows to draw from --data; all if there are fewer")
    flag("epochs", whole(1), "times each row is seen")
    flag("max_steps", whole(1), "at most so many optimizer steps (default: all the epochs)")
    flag("lr", number(0, open_end=True), "highest learning rate")
    flag("warmup", number(0, 1), "part of the steps over which the rate rises; then a cosine to 0")
    flag("weight_decay", number(0), "of AdamW, on matrices only")
    flag("clip", number(0), "largest norm of a gradient; 0: none")
    flag("batch_size", whole(1), "rows of an optimizer step, over all ranks")
    flag("max_length", whole(2), "tokens of a row; the end of a longer answer is cut")
    flag("val_rows", whole(0), "rows held out (default: 5 %% of the rows, at most 200)")
    flag("micro_tokens", whole(1), "tokens in one forward and backward pass of a rank: memory grows with it, the "
         "result stays (default 8,192 on a GPU, 1,280 on a CPU)")
    flag("save_every", whole(0), "steps between checkpoints; 0: only the last (default 200)", default=200)
    flag("keep", whole(1), "checkpoints kept that verify (default 2)", default=2)
    switch("resume", "go on from the newest checkpoint in --out that verifies")
    flag("seed", whole(0), "of the draw, the order and the rounding")
    flag("replicate", whole(1), "copies of the sharded model (HSDP), usually one a node (default 1)", default=1)
    switch("activation-checkpointing", "compute activations again in backward: a third more time, far less memory")
    for name, choices, text in (("device", ("auto", "cpu", "cuda"), "auto: a GPU if there is one"),
                                ("dtype", ("bf16", "fp32"), "of the computing weights (default bf16: upstream's)"),
                                ("export-dtype", ("bf16", "fp32"), "of the exported model (default bf16)"),
                                ("on-bad-row", ("stop", "skip"), "at a row that cannot be read (default stop)")):
        parser.add_argument("--" + name, choices=choices, default=choices[0], help=text)
    flag("inspect", whole(1), "print N rendered rows, trained tokens coloured, and exit", metavar="N")
    switch("dry-run", "print the plan and exit, without touching weights")

# ----- a run ---------------------------------------------------------------------------------------------------------


def open_run(args):
    """(world, config, tokenizer) of a run with the flags of `add_flags`; InputError for what is seen to be wrong."""
    out, world = Path(args.out), start(args.device, args.replicate)
    config = LlamaConfig.from_json(Path(args.model) / "config.json")
    tokenizer = Tokenizer.from_dir(args.model)
    if args.max_length > config.max_position_embeddings:
        raise InputError(f"--max-length {args.max_length}: found more than the model's context of "
                         f"{config.max_position_embeddings} tokens, expected at most that")
    if not args.resume and not args.dry_run and not args.inspect and checkpoints_of(out / "checkpoints"):
        raise InputError(f"--out {out}: holds the checkpoints of an earlier run; expected --resume to go on, or "
                         "another folder")
    args.micro_tokens = args.micro_tokens or default_budget(world)
    return world, config, tokenizer


def read_examples(args, world, parse, render, kind=None):
    """(training examples, held-out examples, plan): rows drawn from --data, read by `parse` and rendered by `render`.

    parse(record) -> what a row holds; render([(where, that)]) -> ([(where, …)], {what happened: rows, "faults": …}).
    Each rank renders its part of the rows, and all get all. The plan counts what became of the rows, and has the
    number of optimizer steps.
    """
    held_out = 200 if args.val_rows is None else args.val_rows
    rows, drawn = draw_rows(args.data, args.rows + held_out, args.seed, parse=parse, on_bad_row=args.on_bad_row,
                            kind=kind)
    mine = tqdm(rows[world.rank::world.size], desc="rendering", unit="row", file=sys.stderr, delay=2,
                disable=None if world.rank == 0 else True)
    try:
        outcome = render(mine)
    except InputError as error:
        outcome = error
    outcomes = from_all(world, outcome)
    for outcome in outcomes:
        if isinstance(outcome, InputError):
            raise outcome
    examples = [example for part, _ in outcomes for example in part]
    place = {where: i for i, (where, _) in enumerate(rows)}
    examples.sort(key=lambda example: place[example[0]])
    if args.val_rows is None:
        held_out = min(200, len(examples) // 20)
    held, examples = examples[:held_out], examples[held_out:held_out + args.rows]
    if not examples:
        raise InputError(f"--data {' '.join(args.data)}: no row left to train on ({drawn.get('read', 0)} read, "
                         f"{held_out} held out); expected at least one")
    faults, counts = drawn.pop("faults"), Counter()
    for _, report in outcomes:
        faults += report.pop("faults")
        counts.update(report)
    for fault in faults[:5] if world.rank == 0 else ():
        print(f"skipped: {fault}", file=sys.stderr)
    steps = args.epochs * math.ceil(len(examples) / args.batch_size)
    counts["bad"] += drawn.get("bad", 0)
    return examples, held, {
        "rows_read": drawn.get("read", 0), "rows_of_another_kind": drawn.get("other kind", 0),
        "answers_truncated": counts.pop("truncated"), **{f"rows_{name}": n for name, n in counts.items()},
        "rows_trained": len(examples), "rows_held_out": len(held), "files": drawn["files"],
        "steps": min(steps, args.max_steps or steps), "ranks": world.size}


def print_plan(args, world, config, plan, found, further=None):
    """The plan of a run, on stdout for --dry-run: `found`, what the data gave, in lines; {part: bytes} `further`."""
    memory = expected_memory(config, world, dtype=DTYPES[args.dtype], fast_bf16=has_fast_bf16(world.device),
                             tokens=args.micro_tokens, activation_checkpointing=args.activation_checkpointing)
    memory |= further or {}
    if world.device.type == "cpu":
        memory["libraries and data: what the process has already"] = resident("VmRSS")
    print("\n".join([
        f"model {args.model} → {args.out}/model", *found,
        f"steps: {plan['steps']:,} of {args.batch_size} rows over {plan['ranks']} rank(s)",
        f"memory a process: about {sum(memory.values()) / 1e9:.1f} GB",
        *(f"  {size / 1e9:6.2f} GB  {part}" for part, size in memory.items())]),
        file=sys.stdout if args.dry_run else sys.stderr)


def micro_batches_of(examples, budget, world, *, tokens, collate):
    """This rank's share of `examples` as micro-batches, for a pass without steps (validation)."""
    bins = split_step([tokens(example) for example in examples], budget, world.size)[world.rank::world.size]
    return [collate([examples[i] for i in own]) for own in bins]


def run(args, name, world, config, examples, held, plan, *, fixed, tokens, collate, loss_fn, prepare=None,
        further_facts=None, reported=("loss",)):
    """Trains, exports and says what came of it: the part of a run that touches weights.

    tokens(example): its length in a micro-batch; collate([example, …]) -> micro-batch; loss_fn: see `fit`. `fixed`
    names the flags that, beside the shared ones, a resume must agree on, `further_facts` {what: value} is what else it
    must agree on. prepare(training, [{file, rows, sha256}] of the data) is called on the model the run starts from,
    before anything of an earlier run is loaded. `reported` are the held-out numbers for the summary and the model card.
    """
    out = Path(args.out)
    files = [{"file": file, "rows": plan["files"].get(file, 0), "sha256": digest} for file, digest in
             computed_on_rank_0(world, lambda: [(file, sha256(file)) for file in args.data])]
    # what fixes the data, its order and the schedule
    recipe = {flag: getattr(args, flag) for flag in (
        *fixed, "model", "rows", "epochs", "max_steps", "lr", "warmup", "weight_decay", "clip", "batch_size",
        "max_length", "seed", "dtype")} | {"held_out": len(held)}
    facts = recipe | {"data": [one["sha256"] for one in files]} | (further_facts or {})
    # before anything is written: a run that may not be resumed so stays as it is
    found = checkpoint_to_resume(world, out / "checkpoints", facts) if args.resume else None
    if world.rank == 0:
        write_json(out / "config.json", vars(args) | {"files": files, "plan": plan})
    # a row longer than a micro-batch should be has its activations computed again rather than kept
    training = load_training(args.model, world, dtype=DTYPES[args.dtype], weight_decay=args.weight_decay,
                             checkpoint_above=0 if args.activation_checkpointing else args.micro_tokens, seed=args.seed)
    if prepare:
        prepare(training, files)
    if found:
        load_checkpoint(training, *found)
    elif args.resume and world.rank == 0:
        print(f"{out / 'checkpoints'}: no checkpoint to resume from; starting anew", file=sys.stderr)
    lengths = [tokens(example) for example in examples]
    held_batches = micro_batches_of(held, args.micro_tokens, world, tokens=tokens, collate=collate) if held else []

    def batches(consumed):
        for rows, bins in steps_of_epochs(lengths, batch_size=args.batch_size, budget=args.micro_tokens, seed=args.seed,
                                          rank=world.rank, world=world.size, consumed=consumed):
            yield rows, [collate([examples[row] for row in own]) for own in bins]
    fit(training, batches, loss_fn, steps=plan["steps"], lr=args.lr, warmup=args.warmup, clip=args.clip, out=out,
        save_every=args.save_every, keep=args.keep, facts=facts, where=lambda row: examples[row][0],
        validate=(lambda: evaluate(training, held_batches, loss_fn)) if held else None)
    results = results_of(out, reported)
    card = None
    if world.rank == 0:
        card = model_card(f"FineMedLM-o1-{name}", config, source=args.model, files=files, results=results,
                          recipe=recipe | {"ranks": world.size, "export": args.export_dtype,
                                           "rows trained": plan["rows_trained"]})
    export_model(training, out / "model", source=args.model, dtype=DTYPES[args.export_dtype], card=card)
    if world.rank == 0:
        print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in results.items()))
        print(f"model: {out / 'model'}")


def results_of(out, reported):
    """{what: value} for the summary and the model card, from the run's metrics.jsonl."""
    rows = [row for _, row in read_jsonl(out / "metrics.jsonl") if not isinstance(row, InputError)]
    steps = [row for row in rows if "loss" in row]
    held = [row for row in rows if "val_loss" in row]
    results = {"steps": steps[-1]["step"]} if steps else {}
    for what, key, kept in [("training loss", "loss", steps)] + [
            (f"held-out {name.replace('_', ' ')}", f"val_{name}", held) for name in reported]:
        if kept:  # NaN and infinity lie there as text
            first, last = (float(row[key]) for row in (kept[0], kept[-1]))
            results[what] = f"{first:.4f} → {last:.4f}"
    return results

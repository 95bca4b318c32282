"""Do small steps survive bf16? The same steps with fp32 weights, as shipped, and with every rounding to the nearest.

    python bench/small_steps.py --data medquad_sft.jsonl           30 SFT steps on 64 rows
    python bench/small_steps.py --loss dpo --data pairs.jsonl      10 DPO steps of 4 pairs, 16 held out

All at a constant rate of 1e-6. "fp32": weights, masters and export in fp32. "shipped": fp32 masters, bf16 weights and
export by stochastic rounding. "nearest": the same with every conversion rounded to nearest, as ordinary mixed precision
does. SFT: the loss on the 64 rows, and how much of the fp32 run's fall the export, loaded again, keeps. DPO: accuracy
and margin (log-probability ratio of the answers over the reference's, in nats) on the held-out pairs, before and after.
"""
import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dpo
import rounding
import sft
import train
from data import collate, collate_pairs, render_pairs, render_rows
from fast import reuse_freed_memory
from files import InputError, run_main, whole
from model import load_model
from parallel import World
from rows import draw_rows, pair_of
from run import export_model
from tokenizer import Tokenizer

BUDGET = 1024
BETA = 0.1


@contextlib.contextmanager
def rounding_to_nearest():
    """Where the rounder is looked up: in train, for each step, and in rounding, for copy_weights_ and so the export."""
    def nearest(generator, device):
        return lambda rounded, exact: rounded.copy_(exact)
    with patch.object(train, "stochastic_rounder", nearest), patch.object(rounding, "stochastic_rounder", nearest):
        yield


def sft_task(args, tokenizer):
    """Trained and measured on the same rows."""
    rows, _ = draw_rows([args.data], args.rows or 64, seed=0)
    examples, _ = render_rows(tokenizer, rows, args.max_length or 128)
    return SimpleNamespace(trained=examples, held=examples, tokens=sft.tokens_of, collate=collate, loss_fn=sft.loss_fn)


def dpo_task(args, tokenizer):
    """Measured on 16 pairs that are not trained; the reference is the model as it lies on disk, in bf16."""
    rows, _ = draw_rows([args.data], (args.rows or args.steps * args.batch_size) + 16, seed=0, parse=pair_of)
    pairs, _ = render_pairs(tokenizer, rows, args.max_length or 1024)
    reference = load_model(args.model, args.device)
    with torch.no_grad():
        logps = {pair[0]: dpo.pair_logps(reference, train.on_device(collate_pairs([pair]), args.device))[0]
                 for pair in pairs}

    def with_reference(pairs):
        known = [logps[where] for where, *_ in pairs]
        return collate_pairs(pairs) | {"reference": torch.stack(known) if known else torch.zeros(0, 2)}

    def loss_fn(model, batch):
        return dpo.preference_loss(dpo.pair_logps(model, batch), batch["reference"], batch["lengths"], beta=BETA)
    return SimpleNamespace(trained=pairs[16:], held=pairs[:16], tokens=dpo.pair_tokens, collate=with_reference,
                           loss_fn=loss_fn)


def trained(args, how, task, folder):
    """Held-out numbers [of the trained model as it computes, of its export loaded again]."""
    world = World(0, 1, torch.device(args.device))
    dtype = torch.float32 if how == "fp32" else torch.bfloat16
    held = train.micro_batches_of(task.held, BUDGET, world, tokens=task.tokens, collate=task.collate)
    with rounding_to_nearest() if how == "nearest" else contextlib.nullcontext():
        training = train.load_training(args.model, world, dtype=dtype, weight_decay=0.01, checkpoint_above=BUDGET)
        stream = train.epochs_of(task.trained, batch_size=args.batch_size, budget=BUDGET, seed=0, world=world,
                                 tokens=task.tokens, collate=task.collate)(0)
        for _ in tqdm(range(args.steps), desc=how, file=sys.stderr):
            train.take_step(training, stream, task.loss_fn, args.lr, 1.0, ())
        if how == "nearest":
            assert all(torch.equal(weight, training.masters[name].bfloat16())
                       for name, weight in training.model.named_parameters())
        computed = train.validate(training, held, task.loss_fn)
        export_model(training, folder / how, source=args.model, dtype=dtype, card="")
    training.model = load_model(folder / how, args.device, dtype)
    return computed, train.validate(training, held, task.loss_fn)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--loss", choices=("sft", "dpo"), default="sft")
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--data", required=True)
    parser.add_argument("--rows", type=whole(1), help="default 64 for SFT, one epoch for DPO")
    parser.add_argument("--steps", type=whole(1), help="default 30 for SFT, 10 for DPO")
    parser.add_argument("--batch-size", type=whole(1), help="default 2 for SFT, 4 for DPO")
    parser.add_argument("--max-length", type=whole(2), help="default 128 for SFT, 1,024 for DPO")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", nargs="+", choices=("fp32", "shipped", "nearest"),
                        help="default all for SFT, shipped and nearest for DPO")
    args = parser.parse_args()
    args.steps = args.steps or {"sft": 30, "dpo": 10}[args.loss]
    args.batch_size = args.batch_size or {"sft": 2, "dpo": 4}[args.loss]
    runs = args.runs or {"sft": ("fp32", "shipped", "nearest"), "dpo": ("shipped", "nearest")}[args.loss]
    reuse_freed_memory()
    task = {"sft": sft_task, "dpo": dpo_task}[args.loss](args, Tokenizer.from_dir(args.model))
    if not task.trained:
        raise InputError(f"--data {args.data}: found no row beyond those held out; expected at least one to train on")
    with tempfile.TemporaryDirectory() as folder:
        results = {how: trained(args, how, task, Path(folder)) for how in runs}
        head = f"{args.steps} steps of {args.batch_size} rows at {args.lr:g}; held out: {len(task.held)} rows"
        if args.loss == "dpo":
            print(f"{head}\n\n| run | accuracy as it computes | margin, nats | accuracy exported | margin, nats |\n"
                  "|---|---|---|---|---|")
            for how, numbers in results.items():
                print(f"| {how} | " + " | ".join(f"{one['accuracy']:.0%} | {one['margin'] / BETA:+.2f}"
                                                      for one in numbers) + " |")
            return
        args.steps = 0
        before = trained(args, "fp32", task, Path(folder))[0]["loss"]
    print(f"{head}; loss before {before:.4f}\n\n| run | as it computes | exported | kept of the fp32 run's fall |\n"
          "|---|---|---|---|")
    for how, (computed, exported) in results.items():
        fall = before - results["fp32"][1]["loss"] if "fp32" in results else float("nan")
        kept = (before - exported["loss"]) / fall
        print(f"| {how} | {computed['loss']:.4f} | {exported['loss']:.4f} | {kept:.0%} |")


if __name__ == "__main__":
    run_main(main)

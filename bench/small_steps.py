"""Do small steps survive bf16? The same 30 SFT steps three times: fp32, as shipped, and rounded to nearest.

    python bench/small_steps.py --model models/smollm2-135m-instruct --data ../shared/data/medquad_sft.jsonl

Trains on 64 rows at a constant rate of 1e-6. "fp32": weights, masters and export in fp32. "shipped": fp32 masters, bf16
weights and export by stochastic rounding. "nearest": the same with every conversion rounded to nearest, as ordinary
mixed precision does. For each the loss on the 64 rows of the exported model, loaded again; the table shows how much of
the fp32 run's fall it keeps.
"""
import argparse
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import model as model_module
import train
from data import Tokenizer, collate, draw_rows, render_rows, steps_of_epochs
from files import run_main, whole
from sft import loss_fn, tokens_of

ROUNDINGS = ("fp32", "shipped", "nearest")


def to_nearest_(target, source, generator=None):
    target.copy_(source)


def run(args, rounding, examples, folder):
    """(loss as the trained model computes, loss of its export) on the examples."""
    world = train.World(0, 1, torch.device(args.device))
    dtype = torch.float32 if rounding == "fp32" else torch.bfloat16
    plain = train.stochastic_round_, model_module.stochastic_round_
    if rounding == "nearest":
        train.stochastic_round_ = model_module.stochastic_round_ = to_nearest_
    try:
        training = train.load_training(args.model, world, dtype=dtype, weight_decay=0.01)
        lengths = [len(ids) for _, ids, _ in examples]
        batches = ((rows, [collate([examples[i] for i in own]) for own in bins]) for rows, bins in steps_of_epochs(
            lengths, batch_size=args.batch_size, budget=1024, seed=0))
        for _ in tqdm(range(args.steps), desc=rounding, file=sys.stderr):
            train.take_step(training, batches, loss_fn, args.lr, 1.0, ())
        held = train.micro_batches_of(examples, 1024, world, tokens=tokens_of, collate=collate)
        computed = train.evaluate(training, held, loss_fn)["loss"]
        train.export_model(training, folder / rounding, source=args.model, dtype=dtype, card="")
    finally:
        train.stochastic_round_, model_module.stochastic_round_ = plain
    training.model = model_module.load_model(folder / rounding, args.device, dtype)
    return computed, train.evaluate(training, held, loss_fn)["loss"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--data", default="../shared/data/medquad_sft.jsonl")
    parser.add_argument("--rows", type=whole(1), default=64)
    parser.add_argument("--steps", type=whole(1), default=30)
    parser.add_argument("--batch-size", type=whole(1), default=2)
    parser.add_argument("--max-length", type=whole(2), default=128)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    train.reuse_freed_memory()
    rows, _ = draw_rows([args.data], args.rows, seed=0)
    examples, _ = render_rows(Tokenizer.from_dir(args.model), rows, args.max_length)
    world = train.World(0, 1, torch.device(args.device))
    start = train.load_training(args.model, world, dtype=torch.float32)
    held = train.micro_batches_of(examples, 1024, world, tokens=tokens_of, collate=collate)
    before = train.evaluate(start, held, loss_fn)["loss"]
    del start
    with tempfile.TemporaryDirectory() as folder:
        losses = {rounding: run(args, rounding, examples, Path(folder)) for rounding in ROUNDINGS}
    fall = before - losses["fp32"][1]
    print(f"{args.steps} steps of {args.batch_size} rows at {args.lr:g} on {len(examples)} rows; "
          f"loss on them before {before:.4f}\n")
    print("| run | as it computes | exported | kept of the fp32 run's fall |\n|---|---|---|---|")
    for rounding, (computed, exported) in losses.items():
        print(f"| {rounding} | {computed:.4f} | {exported:.4f} | {(before - exported) / fall:.0%} |")


if __name__ == "__main__":
    run_main(main)

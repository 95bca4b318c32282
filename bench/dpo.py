"""DPO beside TRL's DPOTrainer: pairs per second, peak memory and the loss of each step, on the same pairs.

    python bench/dpo.py --data traces.jsonl --steps 1      ours and TRL, one after the other, each in its own process

Pairs come from the first rows of --data that have a "## Summarization": chosen is the response, rejected what stands
under that heading alone; at most 1,024 tokens. Eight pairs an optimizer step, a constant rate, no warm-up. Ours: the
reference precomputed once, its time counted in. TRL: a live reference, bf16 autocast on fp32 weights, batches of 1 x 8
accumulated. Times leave out loading and the first import.
"""
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from compare import parse_args, peak_memory, run_each

from data import render_pairs
from files import InputError, read_jsonl, run_main
from tokenizer import Tokenizer

LR = 1e-6
HEADING = "## Summarization"


def read_rows(args):
    """[(prompt messages, chosen, rejected)] as pair_of gives them."""
    rows = []
    for line, row in read_jsonl(args.data):
        if isinstance(row, InputError):
            raise row
        if not all(isinstance(row.get(key), str) for key in ("instruction", "response")):
            raise InputError(f"{args.data}:{line}: found no text under instruction and response; expected a trace")
        thought, found, summary = row["response"].partition(HEADING)
        if found and thought.strip() and summary.strip():
            rows.append(([{"role": "user", "content": row["instruction"]}], row["response"], summary.strip()))
        if len(rows) == args.steps * args.batch_size:
            break
    return rows


def ours(args, rows):
    """[loss of each step], seconds, of which the precomputed reference took so many."""
    import dpo
    import train
    from fast import reuse_freed_memory
    from parallel import start
    from run import Run, default_budget
    reuse_freed_memory()  # as the programs do, before the first tensor
    world, tokenizer = start("auto"), Tokenizer.from_dir(args.model)
    pairs, _ = render_pairs(tokenizer, [(f"pair {i}", row) for i, row in enumerate(rows)], args.max_length)
    budget = args.micro_tokens or default_budget(world)
    training = train.load_training(args.model, world, checkpoint_above=budget)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        settings = SimpleNamespace(out=folder, model=args.model, micro_tokens=budget, max_length=args.max_length,
                                   seed=0, dtype="bf16")
        known = dpo.reference_logps(Run("dpo", settings, (), world, training.model.config, tokenizer), training, pairs)
    precomputed = time.perf_counter() - began

    def collate(pairs):
        reference = torch.tensor([known[where] for where, *_ in pairs])
        return dpo.collate_pairs(pairs) | {"reference": reference.view(-1, 2)}

    def loss_fn(model, batch):
        return dpo.preference_loss(dpo.pair_logps(model, batch), batch["reference"], batch["lengths"])
    stream = train.epochs_of(pairs, batch_size=args.batch_size, budget=budget, seed=0, world=world,
                             tokens=dpo.pair_tokens, collate=collate)(0)
    losses = [train.take_step(training, stream, loss_fn, LR, 1.0, ())[0]["loss"] for _ in range(args.steps)]
    return losses, time.perf_counter() - began, precomputed


def trl(args, rows):
    """[loss of each step], seconds, 0."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    rows = [{"prompt": prompt, "chosen": [{"role": "assistant", "content": chosen}],
             "rejected": [{"role": "assistant", "content": rejected}]} for prompt, chosen, rejected in rows]
    times = {}

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **more):
            times["began"] = time.perf_counter()

        def on_train_end(self, *args, **more):
            times["ended"] = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            ref_model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(args.model), train_dataset=Dataset.from_list(rows),
            args=DPOConfig(output_dir=folder, per_device_train_batch_size=1, gradient_checkpointing=False, bf16=True,
                           gradient_accumulation_steps=args.batch_size, max_length=args.max_length, beta=0.1,
                           max_steps=args.steps, learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.01,
                           max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[],
                           use_cpu=not torch.cuda.is_available()),
            callbacks=[Clock()])
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, times["ended"] - times["began"], 0.0


def measure(args):
    """One opponent in this process; prints a line of JSON."""
    torch.set_num_threads(args.threads)
    rows = read_rows(args)
    losses, seconds, precomputed = (ours if args.measure == "ours" else trl)(args, rows)
    print(json.dumps({"who": args.measure, "pairs": len(rows), "seconds": round(seconds, 1),
                      "of them reference": round(precomputed, 1), "pairs_per_s": round(len(rows) / seconds, 4),
                      "losses": [round(loss, 4) for loss in losses]} | peak_memory()))


def main():
    args = parse_args(__doc__, data="traces: instruction, response with thought and summary", steps=2, batch_size=8,
                      who=["ours", "trl"], choices=["ours", "trl"])
    if args.measure:
        return measure(args)
    results = run_each(__file__, args)
    print("| | pairs/s | seconds a pair | peak memory, GB | losses |\n|---|---|---|---|---|")
    for row in results:
        print(f"| {row['who']} | {row['pairs_per_s']:.3f} | {row['seconds'] / row['pairs']:.2f} | "
              f"{row['peak_rss_gb']:.1f} | {', '.join(f'{loss:.3f}' for loss in row['losses'])} |")


if __name__ == "__main__":
    run_main(main)

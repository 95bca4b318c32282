"""SFT beside TRL's SFTTrainer: tokens per second, peak memory and the loss of each step, on the same rows.

    python bench/sft.py --data medquad_sft.jsonl --steps 4   ours and TRL in turn, each in its own process
    python bench/sft.py --data medquad_sft.jsonl --steps 4 --who ours trl trl-packing

Both take the first rows of --data in the file's order, 16 an optimizer step, at most 1,024 tokens each, with the same
tokens and the same trained ones, a constant rate and no warm-up. TRL: bf16 autocast on fp32 weights, batches of 2 × 8
accumulated. Tokens are those of the rows: padding does not count. Times leave out loading and the first import.
"""
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from compare import parse_args, peak_memory, run_each

from data import collate, render_rows, split_step
from files import read_jsonl, run_main
from rows import messages_of
from tokenizer import Tokenizer

LR = 1e-5


def read_examples(args):
    tokenizer = Tokenizer.from_dir(args.model)
    rows = []
    for number, row in read_jsonl(args.data):
        rows.append((f"{args.data}:{number}", messages_of(row)))
        if len(rows) == args.steps * args.batch_size:
            break
    return render_rows(tokenizer, rows, args.max_length)[0]


def ours(args, examples):
    """[loss of each step], seconds."""
    import parallel
    import train
    from fast import reuse_freed_memory
    from run import default_budget
    from sft import loss_fn
    reuse_freed_memory()  # as the programs do, before the first tensor
    world = parallel.start("auto")
    budget = args.micro_tokens or default_budget(world)
    training = train.load_training(args.model, world, checkpoint_above=budget)

    def batches():
        for start in range(0, len(examples), args.batch_size):
            rows = range(start, min(start + args.batch_size, len(examples)))
            bins = split_step([len(examples[row][1]) for row in rows], budget)
            yield rows, [collate([examples[rows[i]] for i in own]) for own in bins]
    stream, began = batches(), time.perf_counter()
    losses = [train.take_step(training, stream, loss_fn, LR, 1.0, ())[0]["loss"] for _ in range(args.steps)]
    return losses, time.perf_counter() - began


def trl(args, examples, packing=False):
    """[loss of each step], seconds."""
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    rows = [{"input_ids": ids.tolist(), "completion_mask": [0, *(int(label != -100) for label in labels[:-1])]}
            for _, ids, labels in examples]
    times = {}

    class InOrder(SFTTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **more):
            times["began"] = time.perf_counter()

        def on_train_end(self, *args, **more):
            times["ended"] = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = InOrder(
            model=AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
            processing_class=AutoTokenizer.from_pretrained(args.model), train_dataset=Dataset.from_list(rows),
            args=SFTConfig(output_dir=folder, per_device_train_batch_size=2, gradient_checkpointing=False,
                           gradient_accumulation_steps=args.batch_size // 2, max_length=args.max_length, bf16=True,
                           max_steps=args.steps, learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.01,
                           max_grad_norm=1.0, logging_steps=1, save_strategy="no", report_to=[], packing=packing,
                           completion_only_loss=True,
                           use_cpu=not torch.cuda.is_available()), callbacks=[Clock()])
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, times["ended"] - times["began"]


def measure(args):
    """One opponent in this process; prints a line of JSON."""
    torch.set_num_threads(args.threads)
    examples = read_examples(args)
    began = time.process_time()
    losses, seconds = ours(args, examples) if args.measure == "ours" else \
        trl(args, examples, packing=args.measure == "trl-packing")
    cpu = time.process_time() - began  # with loading; says more than the clock where others use the machine too
    tokens = sum(len(ids) for _, ids, _ in examples)
    print(json.dumps({"who": args.measure, "tokens": tokens, "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1),
                      "tokens_per_s": round(tokens / seconds, 1), "losses": [round(loss, 4) for loss in losses]}
                     | peak_memory()))


def main():
    args = parse_args(__doc__, data="rows of messages, or of instruction and response", steps=4, batch_size=16,
                      smallest_batch=2, who=["ours", "trl"], choices=["ours", "trl", "trl-packing"])
    if args.measure:
        return measure(args)
    results = run_each(__file__, args)
    print("| | tokens/s | seconds | peak memory, GB | losses |\n|---|---|---|---|---|")
    for row in results:
        print(f"| {row['who']} | {row['tokens_per_s']:.0f} | {row['seconds']:.0f} | {row['peak_rss_gb']:.1f} | "
              f"{', '.join(f'{loss:.3f}' for loss in row['losses'])} |")


if __name__ == "__main__":
    run_main(main)

"""Supervised fine-tuning in the paper's stages: general medicine, internal medicine, endocrinology, complex reasoning.

    loss = - sum over supervised positions t of log p(label_t | tokens up to t)        / their number in the whole step

Supervised are the assistant's words and its end-of-turn token. Source: FineMedLM-o1 (arXiv 2501.09213), section on
supervised fine-tuning; the numbers of the four stages stand in STAGES with where each comes from.

    python sft.py --stage 1 --data FILE.jsonl …                             one process: a GPU, or this CPU
    torchrun --nproc-per-node 8 sft.py --stage 1 --data FILE.jsonl …        eight GPUs, the model sharded over them
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 sft.py --replicate 2 …
    python sft.py --stage 1 --data FILE.jsonl --dry-run                     the plan: rows, tokens, steps, memory
    python sft.py --stage 1 --data FILE.jsonl --inspect 3                   three rows as they are trained
"""
import sys

from data import collate, messages_of, render_rows, show_example
from files import Parser, run_main
from train import (
    CODE,
    OURS,
    REVIEW,
    SUMMARY,
    add_flags,
    label_logps,
    open_run,
    print_plan,
    read_examples,
    run,
    stop,
)

EVERY_STAGE = {"batch_size": (128, CODE), "warmup": (0.1, CODE), "weight_decay": (0.01, CODE), "clip": (1.0, OURS),
               "seed": (42, CODE), "max_length": (6144, "the authors' later runs")}
STAGES = {
    # all of medicine
    "1": {"model": ("models/Llama-3.1-8B", SUMMARY), "out": ("runs/sft-stage1", OURS),
          "rows": (228_000, SUMMARY), "lr": (3e-5, REVIEW), "epochs": (1, OURS)},
    # internal medicine
    "2": {"model": ("runs/sft-stage1/model", SUMMARY), "out": ("runs/sft-stage2", OURS),
          "rows": (25_600, SUMMARY), "lr": (5e-6, CODE), "epochs": (2, CODE)},
    # endocrinology
    "3": {"model": ("runs/sft-stage2/model", SUMMARY), "out": ("runs/sft-stage3", OURS),
          "rows": (10_240, SUMMARY), "lr": (5e-6, CODE), "epochs": (1, CODE)},
    # complex reasoning, before DPO; only rows marked "complex" where a file marks them
    "cold-start": {"model": ("runs/sft-stage3/model", SUMMARY), "out": ("runs/sft-cold-start", OURS),
                   "rows": (12_800, SUMMARY), "lr": (5e-6, CODE), "epochs": (2, CODE)},
}
ONLY_KIND = {"cold-start": "complex"}

# ----- the loss ------------------------------------------------------------------------------------------------------


def sft_loss(logits, labels):
    """(summed cross-entropy, number of supervised tokens) of logits [B, T, V] and labels [B, T], -100: not trained.

    log Z - logit[label] in fp32. The plain form; `loss_fn` computes the same without ever holding all the logits.
    """
    wanted = labels != -100
    logits = logits[wanted].float()  # [N, V]
    return (logits.logsumexp(-1) - logits.gather(-1, labels[wanted][:, None])[:, 0]).sum(), wanted.sum()


def loss_fn(model, batch):
    """What `train.fit` calls for each micro-batch: (summed loss, supervised tokens, no further metrics)."""
    return -label_logps(model, batch).sum(), (batch["labels"] != -100).sum(), {}

# ----- a run ---------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    stage = Parser(add_help=False)
    stage.add_argument("--stage", choices=STAGES)
    known = stage.parse_known_args(argv)[0].stage or "1"
    parser = Parser(description="One stage of supervised fine-tuning.",
                    epilog=f"Defaults shown are those of stage {known}; add --stage to see another's.")
    parser.add_argument("--stage", choices=STAGES, required=True, help="which stage's numbers to take")
    add_flags(parser, EVERY_STAGE | STAGES[known])
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    world, config, tokenizer = open_run(args)
    examples, held, plan = read_examples(args, world, messages_of, kind=ONLY_KIND.get(args.stage), render=lambda rows:
                                         render_rows(tokenizer, rows, args.max_length, on_bad_row=args.on_bad_row))
    plan |= {"tokens": sum(map(tokens_of, examples)),
             "tokens_supervised": sum(int((labels != -100).sum()) for *_, labels in examples)}
    if world.rank == 0 and args.inspect:
        for where, ids, labels in examples[:args.inspect]:
            print(f"--- {where}: {len(ids)} tokens\n{show_example(tokenizer, ids, labels, sys.stdout.isatty())}")
    if world.rank == 0 and not args.inspect:
        print_plan(args, world, config, plan, [
            f"rows: {plan['rows_read']:,} read, {plan['rows_bad']:,} bad, {plan['rows_of_another_kind']:,} of another "
            f"kind, {plan['rows_dropped']:,} dropped (no answer within --max-length {args.max_length:,}), "
            f"{plan['answers_truncated']:,} answers truncated",
            f"trained: {plan['rows_trained']:,} of {args.rows:,} rows asked for, {plan['tokens']:,} tokens, "
            f"{plan['tokens_supervised']:,} of them supervised; held out: {plan['rows_held_out']:,} rows"])
    if not args.inspect and not args.dry_run:
        run(args, f"sft-{args.stage}", world, config, examples, held, plan, fixed=("stage",), tokens=tokens_of,
            collate=collate, loss_fn=loss_fn)
    stop(world)


def tokens_of(example):
    return len(example[1])


if __name__ == "__main__":
    run_main(main)

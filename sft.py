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
import math
import sys
from pathlib import Path

from tqdm import tqdm

from data import Tokenizer, collate, draw_rows, render_rows, show_example, split_step, steps_of_epochs
from files import InputError, Parser, read_jsonl, run_main, sha256, write_json
from model import LlamaConfig, has_fast_bf16
from train import (
    DTYPES,
    add_flags,
    checkpoints_of,
    default_budget,
    evaluate,
    expected_memory,
    export_model,
    fit,
    from_all,
    from_rank_0,
    label_logps,
    load_training,
    model_card,
    resume,
    start,
    stop,
)

SUMMARY, CODE, REVIEW, OURS = ("the paper's summary", "the authors' code", "a review of the paper", "our choice")

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


def read_examples(args, tokenizer, world):
    """(training examples, held-out examples, report); each rank renders its part of the rows, and all get all."""
    held_out = 200 if args.val_rows is None else args.val_rows
    rows, drawn = draw_rows(args.data, args.rows + held_out, args.seed, on_bad_row=args.on_bad_row,
                            kind=ONLY_KIND.get(args.stage))
    mine = tqdm(rows[world.rank::world.size], desc="rendering", unit="row", file=sys.stderr, delay=2,
                disable=None if world.rank == 0 else True)
    try:
        outcome = render_rows(tokenizer, mine, args.max_length, on_bad_row=args.on_bad_row)
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
    report = {"rows_read": drawn.get("read", 0), "rows_of_another_kind": drawn.get("other kind", 0),
              "rows_bad": drawn.get("bad", 0) + sum(report.get("bad", 0) for _, report in outcomes),
              "rows_dropped": sum(report.get("dropped", 0) for _, report in outcomes),
              "answers_truncated": sum(report.get("truncated", 0) for _, report in outcomes),
              "rows_trained": len(examples), "rows_held_out": len(held), "files": drawn["files"],
              "tokens": sum(len(ids) for _, ids, _ in examples),
              "tokens_supervised": sum(int((labels != -100).sum()) for *_, labels in examples)}
    for fault in [*drawn["faults"], *(fault for _, report in outcomes for fault in report["faults"])][:5]:
        if world.rank == 0:
            print(f"skipped: {fault}", file=sys.stderr)
    return examples, held, report


def micro_batches_of(examples, budget, world):
    """This rank's share of `examples` as micro-batches, for a pass without steps (validation)."""
    bins = split_step([len(ids) for _, ids, _ in examples], budget, world.size)[world.rank::world.size]
    return [collate([examples[i] for i in own]) for own in bins]


def print_plan(args, plan, memory, file):
    print(f"model {args.model} → {args.out}/model", file=file)
    print(f"rows: {plan['rows_read']:,} read, {plan['rows_bad']:,} bad, {plan['rows_of_another_kind']:,} of another "
          f"kind, {plan['rows_dropped']:,} dropped (no answer within --max-length {args.max_length:,}), "
          f"{plan['answers_truncated']:,} answers truncated", file=file)
    print(f"trained: {plan['rows_trained']:,} of {args.rows:,} rows asked for, {plan['tokens']:,} tokens, "
          f"{plan['tokens_supervised']:,} of them supervised; held out: {plan['rows_held_out']:,} rows", file=file)
    print(f"steps: {plan['steps']:,} of {args.batch_size} rows over {plan['ranks']} rank(s)", file=file)
    print(f"memory a process: about {sum(memory.values()) / 1e9:.1f} GB", file=file)
    for part, size in memory.items():
        print(f"  {size / 1e9:6.2f} GB  {part}", file=file)


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
    out = Path(args.out)
    world = start(args.device, args.replicate)
    budget = args.micro_tokens or default_budget(world)
    config = LlamaConfig.from_json(Path(args.model) / "config.json")
    tokenizer = Tokenizer.from_dir(args.model)
    if args.max_length > config.max_position_embeddings:
        raise InputError(f"--max-length {args.max_length}: found more than the model's context of "
                         f"{config.max_position_embeddings} tokens, expected at most that")
    if not args.resume and not args.dry_run and not args.inspect and checkpoints_of(out / "checkpoints"):
        raise InputError(f"--out {out}: holds the checkpoints of an earlier run; expected --resume to go on, or "
                         "another folder")
    examples, held, plan = read_examples(args, tokenizer, world)
    plan["steps"] = args.epochs * math.ceil(len(examples) / args.batch_size)
    plan["steps"] = min(plan["steps"], args.max_steps or plan["steps"])
    plan["ranks"] = world.size
    memory = expected_memory(config, world, dtype=DTYPES[args.dtype], fast_bf16=has_fast_bf16(world.device),
                             tokens=budget, activation_checkpointing=args.activation_checkpointing)
    if world.rank == 0 and args.inspect:
        for where, ids, labels in examples[:args.inspect]:
            print(f"--- {where}: {len(ids)} tokens\n{show_example(tokenizer, ids, labels, sys.stdout.isatty())}")
    if world.rank == 0 and not args.inspect:
        print_plan(args, plan, memory, sys.stdout if args.dry_run else sys.stderr)
    if not args.inspect and not args.dry_run:
        train(args, world, out, config, examples, held, plan, budget)
    stop(world)


def train(args, world, out, config, examples, held, plan, budget):
    """Trains, exports and says what came of it; `plan` is what `read_examples` found and the number of steps."""
    files = [{"file": file, "rows": plan["files"].get(file, 0), "sha256": digest} for file, digest in from_rank_0(
        world, [(file, sha256(file)) for file in args.data] if world.rank == 0 else None)]
    # what fixes the data, its order and the schedule: a resume must agree on it
    facts = {name: getattr(args, name) for name in (
        "stage", "model", "rows", "epochs", "max_steps", "lr", "warmup", "weight_decay", "clip", "batch_size",
        "max_length", "seed", "dtype")} | {"data": [one["sha256"] for one in files], "held_out": len(held)}
    if world.rank == 0:
        write_json(out / "config.json", vars(args) | {"files": files, "plan": plan, "micro_tokens": budget})
    # a row longer than a micro-batch should be has its activations computed again rather than kept
    training = load_training(args.model, world, dtype=DTYPES[args.dtype], weight_decay=args.weight_decay,
                             checkpoint_above=0 if args.activation_checkpointing else budget, seed=args.seed)
    if args.resume and not resume(training, out / "checkpoints", facts) and world.rank == 0:
        print(f"{out / 'checkpoints'}: no checkpoint to resume from; starting anew", file=sys.stderr)
    lengths = [len(ids) for _, ids, _ in examples]
    held_batches = micro_batches_of(held, budget, world) if held else []

    def batches(consumed):
        for rows, bins in steps_of_epochs(lengths, batch_size=args.batch_size, budget=budget, seed=args.seed,
                                          rank=world.rank, world=world.size, consumed=consumed):
            yield rows, [collate([examples[row] for row in own]) for own in bins]
    fit(training, batches, loss_fn, steps=plan["steps"], lr=args.lr, warmup=args.warmup, clip=args.clip, out=out,
        save_every=args.save_every, keep=args.keep, facts=facts, where=lambda row: examples[row][0],
        validate=(lambda: evaluate(training, held_batches, loss_fn)) if held else None)
    results = results_of(out)
    card = None
    if world.rank == 0:
        card = model_card(f"FineMedLM-o1-sft-{args.stage}", config, source=args.model, files=files, results=results,
                          recipe={key: value for key, value in facts.items() if key != "data"} | {
                              "ranks": world.size, "export": args.export_dtype, "rows trained": plan["rows_trained"]})
    export_model(training, out / "model", source=args.model, dtype=DTYPES[args.export_dtype], card=card)
    if world.rank == 0:
        print(f"stage {args.stage}: " + ", ".join(f"{key} {value}" for key, value in results.items()))
        print(f"model: {out / 'model'}")


def results_of(out):
    """{what: value} for the summary and the model card, from the run's metrics.jsonl."""
    rows = [row for _, row in read_jsonl(out / "metrics.jsonl") if not isinstance(row, InputError)]
    steps = [row for row in rows if "loss" in row]
    held = [row["val_loss"] for row in rows if "val_loss" in row]
    results = {"steps": steps[-1]["step"], "training loss": f"{steps[0]['loss']:.4f} → {steps[-1]['loss']:.4f}"}
    return results | ({"held-out loss": f"{held[0]:.4f} → {held[-1]:.4f}"} if held else {})


if __name__ == "__main__":
    run_main(main)

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
import functools

from data import collate, render_rows
from fast import attend_apart, causal_attention
from files import Parser, run_main
from parallel import stop
from rows import messages_of
from run import (
    CODE,
    OURS,
    REVIEW,
    SUMMARY,
    add_flags,
    batches,
    begin,
    finish,
    micro_batches,
    open_run,
    read_examples,
    resume,
    schedule,
    shown,
)
from train import fit

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
    """Labels are already shifted: label t is the token wanted *after* position t (Hugging Face's are not shifted).

    logits [B, T, V], labels [B, T] int64 (-100: not trained) -> (summed cross-entropy in fp32, supervised tokens):
    the sum over supervised t of log Z_t - logit_t[label_t]. By hand, V = 3:

        ids     2 0 1      logits_1 = logits_2 = [0, 0, ln 2], so Z = 1 + 1 + 2 = 4
        labels  . 2 1      position 1 wants token 2, position 2 wants token 1; position 0 is not trained
        loss    (ln 4 - ln 2) + (ln 4 - 0) = 3 ln 2, of 2 tokens

    This is the plain form; `loss_fn` computes the same without ever holding all the logits.
    """
    wanted = labels != -100
    logits = logits[wanted].float()  # [N, V]
    return (logits.logsumexp(-1) - logits.gather(-1, labels[wanted][:, None])[:, 0]).sum(), wanted.sum()


def label_logps(model, batch):
    """log p(label) [B, T] in fp32 of a micro-batch of data.collate; packed documents do not see each other."""
    documents = batch["documents"]
    attend = functools.partial(attend_apart, documents) if documents and len(documents) > 1 else causal_attention
    return model(batch["ids"], labels=batch["labels"], positions=batch["positions"], attend=attend)


def loss_fn(model, batch):
    """The loss of a micro-batch for `train.fit`: (summed loss, supervised tokens, no further metrics)."""
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
    run = open_run(args, f"sft-{args.stage}", fixed=("stage",))
    examples, held = read_examples(run, messages_of, render_rows, kind=ONLY_KIND.get(args.stage))
    if shown(run, examples[:args.inspect or 0], lines_of_plan(run, examples)):
        return stop(run.world)
    training = begin(run)
    resume(run, training)
    fit(training, batches(run, examples, tokens_of, collate), loss_fn, **schedule(run),
        held=micro_batches(run, held, tokens_of, collate), where=lambda row: examples[row][0])
    finish(run, training)
    stop(run.world)


def lines_of_plan(run, examples):
    """The rows of the data, in lines; the plan gets the numbers of tokens."""
    args, plan = run.args, run.plan
    plan |= {"tokens": sum(map(tokens_of, examples)),
             "tokens_supervised": sum(int((labels != -100).sum()) for *_, labels in examples)}
    return [f"rows: {plan['rows_read']:,} read, {plan['rows_bad']:,} bad, {plan['rows_of_another_kind']:,} of another "
            f"kind, {plan['rows_dropped']:,} dropped (no answer within --max-length {args.max_length:,}), "
            f"{plan['answers_truncated']:,} answers truncated",
            f"trained: {plan['rows_trained']:,} of {args.rows:,} rows asked for, {plan['tokens']:,} tokens, "
            f"{plan['tokens_supervised']:,} of them supervised; held out: {plan['rows_held_out']:,} rows"]


def tokens_of(example):
    return len(example[1])


if __name__ == "__main__":
    run_main(main)

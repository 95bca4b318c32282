"""Direct preference optimization (DPO): from the cold start to the o1 model, on pairs of a better and a worse answer.

    r_w, r_l = log p(y | x) - log p_ref(y | x), summed over the tokens of the chosen and of the rejected answer
    loss     = - log sigmoid(beta * (r_w - r_l))                                            arXiv 2305.18290, eq. 7

The reference p_ref is the model the run starts from. Its log-probabilities are computed once, before the first step,
and kept in OUT/reference.safetensors: no second model is held. The two answers of a pair are computed in one pass, with
their prompt once (data.collate_pairs). Source: FineMedLM-o1 (arXiv 2501.09213), section on DPO; the other losses are
cited at `dpo_loss`.

    python dpo.py --data PAIRS.jsonl …                                      one process: a GPU, or this CPU
    torchrun --nproc-per-node 8 dpo.py --data PAIRS.jsonl …                 eight GPUs, the model sharded over them
    python dpo.py --data PAIRS.jsonl --dry-run                              the plan: pairs, tokens, steps, memory
    python dpo.py --data PAIRS.jsonl --inspect 3                            three pairs as they are trained
"""
import hashlib
import json
import math
import os
import sys

import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import collate_pairs, on_device, render_pairs, rows_of_answers, split_step
from fast import answer_logps, has_fast_bf16, return_freed_memory
from files import InputError, Parser, number, parse_json, run_main, written_aside
from parallel import all_sum, computed_on_rank_0, from_all, stop
from rows import pair_of
from run import (
    CODE,
    OURS,
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
from weights import open_safetensors, stored_dtypes, write_safetensors

LOSSES = ("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm")
PER_TOKEN = ("ipo", "sigmoid_norm")  # these compare means over the tokens of an answer
BETA, BETA_OF_MEANS = 0.1, 5.0  # the second is sigmoid_norm's: margins per token are that much smaller
PAIRS_A_RANK = 16  # of an optimizer step
AS_SFT = "as in the SFT stages"
DEFAULTS = {"model": ("runs/sft-cold-start/model", SUMMARY), "out": ("runs/dpo", OURS), "rows": (33_000, SUMMARY),
            "lr": (1e-7, CODE), "epochs": (1, CODE), "warmup": (0.1, AS_SFT), "weight_decay": (0.01, AS_SFT),
            "clip": (1.0, OURS), "seed": (42, AS_SFT), "max_length": (6144, "the authors' later runs")}

# ----- the losses ----------------------------------------------------------------------------------------------------


def sequence_logps(logits, labels):
    """Labels are already shifted: label t is the token wanted *after* position t (Hugging Face's are not shifted).

    logits [B, T, V], labels [B, T] int64 (-100: no label) -> (sum of log p(label) [B] in fp32, number of labels [B]),
    log p(label) = logit[label] - log Z. By hand, V = 3:

        ids     2 0 1      logits_1 = logits_2 = [0, 0, ln 2], so Z = 1 + 1 + 2 = 4
        labels  . 2 1      position 1 wants token 2, position 2 wants token 1; position 0 has no label
        log p   (ln 2 - ln 4) + (0 - ln 4) = -3 ln 2, of 2 labels

    This is the plain form; `pair_logps` computes the same without ever holding all the logits.
    """
    wanted = labels != -100
    labelled = logits[wanted].float()  # [N, V]
    logps = labelled.gather(-1, labels[wanted][:, None])[:, 0] - labelled.logsumexp(-1)
    return torch.zeros(labels.shape, device=logits.device).masked_scatter(wanted, logps).sum(-1), wanted.sum(-1)


def dpo_loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, *, beta=0.1,
             label_smoothing=0.0, loss_type="sigmoid", chosen_lengths=None, rejected_lengths=None,
             reference_free=False, alpha=0.0):
    """(losses [N], chosen rewards [N], rejected rewards [N]) of N pairs, from summed log-probabilities [N] in nats.

    With r = log p - log p_ref of an answer (`reference_free`: log p alone), h = r_w - r_l, e = label_smoothing, and
    h' = r_w / |y_w| - r_l / |y_l| per token (`chosen_lengths`, `rejected_lengths` [N] are the |y|):
      "sigmoid"       -(1 - e) log s(beta h) - e log s(-beta h)                DPO, arXiv 2305.18290, eq. 7; with e > 0
                                                                               conservative DPO (Mitchell 2023)
      "robust"        (-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e)  rDPO, arXiv 2403.00409
      "hinge"         max(0, 1 - beta h)                                       SLiC's, normalized: arXiv 2309.06657
      "ipo"           (h' - 1 / (2 beta))^2                                    IPO, arXiv 2310.12036, eq. 17, per token
                                                                               as its authors confirmed (trl#1265)
      "sigmoid_norm"  -log s(beta h')                                          length-normalized, arXiv 2411.15124
    plus alpha * -log p(y_w) / |y_w|, the chosen answer's NLL (arXiv 2404.19733, eq. 1). Rewards are beta * r, detached.
    InputError for settings without meaning: e outside [0, 0.5) or with another loss, beta <= 0, alpha < 0, no lengths.
    """
    check_loss(beta=beta, label_smoothing=label_smoothing, loss_type=loss_type, alpha=alpha)
    if (chosen_lengths is None or rejected_lengths is None) and (loss_type in PER_TOKEN or alpha):
        raise InputError(f"loss {loss_type!r} with alpha {alpha:g}: found no lengths; expected chosen_lengths and "
                         "rejected_lengths")
    r_w, r_l = policy_chosen_logps, policy_rejected_logps
    if not reference_free:
        r_w, r_l = r_w - ref_chosen_logps, r_l - ref_rejected_logps
    h = r_w / chosen_lengths - r_l / rejected_lengths if loss_type in PER_TOKEN else r_w - r_l
    if loss_type == "ipo":
        losses = (h - 1 / (2 * beta)) ** 2
    elif loss_type == "hinge":
        losses = torch.relu(1 - beta * h)
    elif loss_type == "robust":
        losses = (-(1 - label_smoothing) * F.logsigmoid(beta * h) + label_smoothing * F.logsigmoid(-beta * h)) \
            / (1 - 2 * label_smoothing)
    else:
        losses = -(1 - label_smoothing) * F.logsigmoid(beta * h)
        if label_smoothing:  # left out at 0: where logsigmoid is -inf, 0 times it is NaN
            losses = losses - label_smoothing * F.logsigmoid(-beta * h)
    if alpha:
        losses = losses - alpha * policy_chosen_logps / chosen_lengths
    return losses, (beta * r_w).detach(), (beta * r_l).detach()


def check_loss(*, beta, label_smoothing, loss_type, alpha):
    """InputError for settings of `dpo_loss` that have no meaning."""
    if loss_type not in LOSSES:
        raise InputError(f"loss type {loss_type!r}: expected one of {', '.join(LOSSES)}")
    if not 0 < beta < math.inf:
        raise InputError(f"beta {beta:g}: expected a number above 0; without it the answers do not matter")
    if not 0 <= label_smoothing < 0.5:
        raise InputError(f"label smoothing {label_smoothing:g}: expected 0 to below 0.5, where labels say nothing")
    if label_smoothing and loss_type not in ("sigmoid", "robust"):
        raise InputError(f"label smoothing {label_smoothing:g} with loss {loss_type!r}: expected it with 'sigmoid' or "
                         "'robust', the losses that are defined with it")
    if not 0 <= alpha < math.inf:
        raise InputError(f"alpha {alpha:g}: expected 0 or more; below 0 the chosen answer would be unlearned")

# ----- both answers in one pass --------------------------------------------------------------------------------------


def pair_logps(model, batch):
    """Summed log-probabilities [N, 2] in fp32 of the chosen and rejected answers of a micro-batch of collate_pairs."""
    return answer_logps(model, batch).view_as(batch["lengths"])


def pair_tokens(pair):
    """Inputs of a pair in a micro-batch with its prompt once."""
    _, prompt, chosen, rejected = pair
    return len(prompt) - 1 + len(chosen) + len(rejected)


def preference_loss(logps, reference, lengths, *, loss_type="sigmoid", **settings):
    """The loss of N pairs for `train.fit`: (summed loss, N, {name: sum}); logps, reference, lengths [N, 2]: w, l.

    `margin` is the difference of the rewards (per token for the losses that compare those), `accuracy` counts pairs in
    which it is above 0. `drift` is the mean over both answers of log p_ref - log p, in nats an answer: how much less
    likely the model has made the answers of the data, below 0 where more. It is no estimate of DPO's KL(p || p_ref),
    which would take answers drawn from the model.
    """
    losses, chosen, rejected = dpo_loss(
        *logps.unbind(1), *reference.unbind(1), loss_type=loss_type, chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1], **settings)
    detached = logps.detach()
    margin = chosen / lengths[:, 0] - rejected / lengths[:, 1] if loss_type in PER_TOKEN else chosen - rejected
    metrics = {"rewards_chosen": chosen, "rewards_rejected": rejected, "margin": margin,
               "accuracy": margin > 0, "logps_chosen": detached[:, 0], "logps_rejected": detached[:, 1],
               "length_chosen": lengths[:, 0], "length_rejected": lengths[:, 1]}
    if not settings.get("reference_free"):
        metrics["drift"] = (reference - detached).mean(1)
    return losses.sum(), len(losses), {name: values.sum(dtype=torch.float64) for name, values in metrics.items()}

# ----- the reference -------------------------------------------------------------------------------------------------


def reference_logps(run, training, pairs):
    """{where: (chosen, rejected)}: log-probabilities of `pairs` under the model as it is, from --out or computed now.

    OUT/reference.safetensors holds logps [pairs, 2] in fp32, NaN where not yet computed, and is written again every few
    pairs, so that a killed computation goes on where it was. Its metadata names all that the numbers depend on;
    InputError when that has changed.
    """
    world, path = run.world, run.out / "reference.safetensors"

    def found():
        facts = reference_facts(run, pairs)
        return facts, read_reference(path, facts, len(pairs))
    facts, logps = computed_on_rank_0(world, found)
    todo, block = logps.isnan().any(1).nonzero()[:, 0].tolist(), 32 * world.size
    with tqdm(total=len(pairs), initial=len(pairs) - len(todo), desc="reference", unit="pair", file=sys.stderr, delay=2,
              disable=None if world.rank == 0 else True) as bar, torch.no_grad():
        for start in range(0, len(todo), block):
            rows, computed = todo[start:start + block], {}
            bins = split_step([pair_tokens(pairs[row]) for row in rows], run.args.micro_tokens, world.size)
            for share in bins[world.rank::world.size]:  # as many on each rank: all take part in every collective
                share = [rows[i] for i in share]
                batch = on_device(collate_pairs([pairs[row] for row in share]), world.device)
                computed |= zip(share, pair_logps(training.model, batch).tolist())
            for from_rank in from_all(world, computed):
                for row, values in from_rank.items():
                    logps[row] = torch.tensor(values)
            for row in rows:
                if not logps[row].isfinite().all():
                    raise SystemExit(f"error: {pairs[row][0]}: the model's log-probabilities of the two answers are "
                                     f"{logps[row].tolist()}; expected finite numbers")
            computed_on_rank_0(world, lambda: write_reference(path, facts, logps))
            return_freed_memory(world.device)
            bar.update(len(rows))
    if world.mesh:  # the root stays gathered after a forward pass without a backward pass
        training.model.reshard()
    return {pair[0]: tuple(values) for pair, values in zip(pairs, logps.tolist())}


def reference_facts(run, pairs):
    """{all that the reference log-probabilities depend on: a value or a SHA-256}."""
    args = run.args
    # stored in more than bf16, weights are rounded, which depends on these two
    rounded = {"seed": args.seed, "shards": run.world.shards} if args.dtype == "bf16" and \
        stored_dtypes(args.model) != {"BF16"} else {}
    return {"weights": run.facts["model"],
            "data": [one["sha256"] for one in run.files],
            "template": run.facts["template"],
            "pairs": hashlib.sha256(b"".join(len(ids).to_bytes(8, "big") + ids.tobytes()
                                             for _, *texts in pairs for ids in texts)).hexdigest(),
            "max_length": args.max_length, **rounded,
            "dtype": args.dtype + ("" if has_fast_bf16(run.world.device) else ", computed in fp32")}


def write_reference(path, facts, logps):
    """Writes logps [pairs, 2] and the `facts` they depend on, aside and renamed."""
    with written_aside(path) as aside:
        write_safetensors({"logps": logps}, aside, {
            "facts": json.dumps(facts), "sha256": hashlib.sha256(logps.numpy().tobytes()).hexdigest()})


def read_reference(path, facts, n):
    """logps [n, 2] in the file `path`, all NaN if there is none; InputError when it was computed from other `facts`."""
    if not path.exists():
        return torch.full((n, 2), math.nan)
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        given = parse_json(metadata.get("facts", "{}"), path)
        logps = file.get_tensor("logps") if list(file.keys()) == ["logps"] else torch.empty(0)
    if metadata.get("sha256") != hashlib.sha256(logps.numpy().tobytes()).hexdigest() or not isinstance(given, dict):
        raise InputError(f"{path}: damaged, or not ours; expected what an earlier run wrote, or this file removed")
    differing = [key for key in facts if given.get(key) != facts[key]]
    if differing or logps.shape != (n, 2):
        raise InputError(f"{path}: computed with another {', '.join(differing)}; expected the same, another --out, "
                         "or this file removed so that it is computed again")
    return logps


# how far log-probabilities may be off their reference's for rounding: a pass packed otherwise rounds otherwise, which
# measured 0.025 (SmolLM2 in bf16, the prompt once against twice, 32 pairs); another model is off by several nats
ROUNDING = {"bf16": 0.3, "fp32": 1e-3}


@torch.no_grad()
def check_start(run, training, micro_batches):
    """InputError unless the model gives its reference's log-probabilities: before the first step all margins are 0.

    Compared is the root mean square, over answers, of the difference in nats divided by the root of the length, since
    the rounding of a sum of n terms grows with the root of n.
    """
    squares = count = 0
    for batch in micro_batches:
        batch = on_device(batch, training.world.device)
        off = pair_logps(training.model, batch) - batch["reference"]
        squares, count = squares + (off.double() ** 2 / batch["lengths"]).sum(), count + off.numel()
    if training.world.mesh:
        training.model.reshard()
    squares, count = all_sum(training.world, [squares, count])
    off = math.sqrt(squares / count)
    if not off <= ROUNDING[run.args.dtype]:
        raise InputError(f"{run.out}: before the first step the model's log-probabilities are off the reference's by "
                         f"{off:.3g} nats times the root of the length; expected at most {ROUNDING[run.args.dtype]:g}: "
                         "this is not the model that the reference was computed with")


# ----- a run ---------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    parser = Parser(description="Direct preference optimization.")
    add_flags(parser, DEFAULTS | {"batch_size": (PAIRS_A_RANK * ranks, f"16 a GPU in {CODE}, times {ranks} here; name "
                                                 "it to resume on another number of ranks")})
    parser.add_argument("--beta", type=number(0, open_end=True),
                        help=f"how closely the model is held to the reference (default {BETA:g}: {OURS}, DPO's and "
                        f"TRL's own; of sigmoid_norm {BETA_OF_MEANS:g}: arXiv 2411.15124)")
    parser.add_argument("--loss-type", choices=LOSSES, default="sigmoid", help="see dpo_loss (default sigmoid: DPO)")
    parser.add_argument("--label-smoothing", type=number(0, 0.5), default=0.0,
                        help="part of the pairs taken to be labelled the wrong way round (default 0)")
    parser.add_argument("--alpha", type=number(0), default=0.0, help="weight of the chosen answer's NLL (default 0)")
    parser.add_argument("--reference-free", action="store_true", help="rewards are log p alone, without a reference")
    args = parser.parse_args(argv)
    if args.beta is None:
        args.beta = BETA_OF_MEANS if args.loss_type == "sigmoid_norm" else BETA
    check_loss(beta=args.beta, label_smoothing=args.label_smoothing, loss_type=args.loss_type, alpha=args.alpha)
    if args.loss_type == "robust" and not args.label_smoothing:
        raise InputError("--loss-type robust without --label-smoothing: that is sigmoid; expected one above 0")
    return args


def main(argv=None):
    args = parse_args(argv)
    settings = {name: getattr(args, name) for name in (
        "beta", "label_smoothing", "loss_type", "reference_free", "alpha")}
    run = open_run(args, "dpo", fixed=settings)
    pairs, held = read_examples(run, pair_of, render_pairs)
    if shown(run, samples_of(pairs[:args.inspect or 0]), lines_of_plan(run, pairs)):
        return stop(run.world)
    training = begin(run)
    known = {} if args.reference_free else reference_logps(run, training, pairs + held)

    def collate(pairs):
        logps = [known[where] if known else (0.0, 0.0) for where, *_ in pairs]
        return collate_pairs(pairs) | {"reference": torch.tensor(logps).view(-1, 2)}

    def loss_fn(model, batch):
        return preference_loss(pair_logps(model, batch), batch["reference"], batch["lengths"], **settings)
    if known:
        check_start(run, training, micro_batches(run, pairs[:args.batch_size], pair_tokens, collate))
    resume(run, training)
    fit(training, batches(run, pairs, pair_tokens, collate), loss_fn, **schedule(run),
        held=micro_batches(run, held, pair_tokens, collate), where=lambda row: pairs[row][0])
    finish(run, training, reported=("loss", "accuracy", "margin", "logps_chosen"))
    stop(run.world)


def samples_of(pairs):
    """[(title, ids, labels), …]: the two rows of each pair, for --inspect."""
    return [(f"{where}, {name}", ids, labels) for where, *pair in pairs
            for name, (ids, labels) in zip(("chosen", "rejected"), rows_of_answers(*pair))]


def lines_of_plan(run, pairs):
    """The rows of the data, in lines; the plan gets the numbers of tokens."""
    args, plan = run.args, run.plan
    plan |= {"tokens": sum(map(pair_tokens, pairs)),
             "tokens_supervised": sum(len(chosen) + len(rejected) for *_, chosen, rejected in pairs)}
    return [f"pairs: {plan['rows_read']:,} read, {plan['rows_bad']:,} bad; dropped: {plan['rows_empty']:,} with an "
            f"empty answer, {plan['rows_equal']:,} with equal answers, {plan['rows_dropped']:,} without room for one "
            f"within --max-length {args.max_length:,}; {plan['answers_truncated']:,} answers truncated",
            f"trained: {plan['rows_trained']:,} of {args.rows:,} pairs asked for, {plan['tokens']:,} tokens, "
            f"{plan['tokens_supervised']:,} of them supervised; held out: {plan['rows_held_out']:,} pairs"]


if __name__ == "__main__":
    run_main(main)

"""A training run from the command line: everything before and after the loop of sft.py and dpo.py.

    run = open_run(args, name, fixed)                           processes, config, tokenizer
    examples, held = read_examples(run, parse, render)          rows drawn from --data, rendered by all ranks
    if shown(run, …): return stop(run.world)                    --inspect, --dry-run
    training = begin(run)                                       weights, masters, optimizer
    resume(run, training)                                       the newest checkpoint that verifies
    fit(training, …, **schedule(run))                           train.py
    finish(run, training)                                       the exported model and its card

A run owns the folder --out: config.json (as resolved), metrics.jsonl, checkpoints/ and model/, which transformers and
vLLM load.
"""
import argparse
import hashlib
import json
import math
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from chat import chat_template, check_vocabulary, render_chat
from checkpoints import checkpoint_to_resume, checkpoints_of
from data import show_example
from fast import KEPT_KEYS, KEPT_LOGITS, block_of_logits, has_fast_bf16, reuse_freed_memory
from files import (
    DISCLAIMER,
    InputError,
    hold,
    number,
    read_json_if_there,
    read_jsonl,
    resident,
    sha256,
    whole,
    write_json,
)
from model import LlamaConfig, open_checkpoint
from parallel import World, computed_on_rank_0, from_all, full, sharded_like, shared_rows, start
from rows import draw_rows
from tokenizer import Tokenizer, notice_of
from train import epochs_of, load_checkpoint, load_training, micro_batches_of
from vocabulary import prepare_for_serving
from weights import (
    DTYPES,
    checkpoint_names,
    checkpoint_shapes,
    parameter_count,
    print_notices,
    stop_ids_of,
    weights_sha256,
    write_checkpoint,
)

# ----- flags ---------------------------------------------------------------------------------------------------------

# the sources of the recipe's numbers
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
    flag("data", str, "training rows: .jsonl, .jsonl.gz, .json (an array) or .parquet", metavar="FILE", nargs="+",
         required=True)
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

# ----- before the loop -----------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One run of sft.py or dpo.py: its flags, and all that is known before weights are touched."""
    name: str  # sft-1 … dpo
    args: argparse.Namespace
    fixed: tuple  # the flags that, beside the shared ones, a resume must agree on
    world: World
    config: LlamaConfig
    tokenizer: Tokenizer
    plan: dict = field(default_factory=dict)  # what became of the rows, and the number of steps
    files: list = field(default_factory=list)  # the data: [{file, rows, sha256}]
    recipe: dict = field(default_factory=dict)  # {flag: value}
    facts: dict = field(default_factory=dict)  # recipe and data: what a resume must agree on
    checkpoint: tuple | None = None  # (path, numbers) of the checkpoint to go on from

    @property
    def out(self):
        return Path(self.args.out)


def open_run(args, name, fixed=()):
    """The Run of a program with the flags of `add_flags`; InputError for flags that do not fit the model or --out."""
    reuse_freed_memory()
    world = start(args.device, args.replicate)
    run = Run(name, args, tuple(fixed), world, config_of(args), Tokenizer.from_dir(args.model))
    check_vocabulary(run.tokenizer, run.config.vocab_size, args.model)
    if world.rank == 0:
        print_notices(args.model, run.config)
    if args.max_length > run.config.max_position_embeddings:
        raise InputError(f"--max-length {args.max_length}: found more than the model's context of "
                         f"{run.config.max_position_embeddings} tokens, expected at most that")
    if not args.dry_run and not args.inspect:
        computed_on_rank_0(world, lambda: take_folder(run))
    args.micro_tokens = args.micro_tokens or default_budget(world)
    return run


def take_folder(run):
    """Keeps --out for this run. InputError if another writes there, or for one that holds a run and no --resume."""
    # by a file in it, because the folder above may be another's, as that of a disk mounted for the run
    hold(run.out / "config.json")
    earlier = "the checkpoints" if checkpoints_of(run.out / "checkpoints") else \
        "the model" if (run.out / "model/config.json").is_file() else None
    if earlier and not run.args.resume:
        raise InputError(f"--out {run.out}: holds {earlier} of an earlier run; expected --resume to go on, or "
                         "another folder")


def config_of(args):
    """The LlamaConfig of --model, compared with its weights; --dry-run and --inspect also work without weights."""
    folder = Path(args.model)
    if (args.dry_run or args.inspect) and not any(folder.glob("*.safetensors")):
        return LlamaConfig.from_json(folder / "config.json")
    return open_checkpoint(folder)[0]


def default_budget(world):
    """Tokens of a micro-batch: enough to keep the device busy, few enough to leave it memory."""
    return 8192 if world.device.type == "cuda" else 1280


def read_examples(run, parse, render, kind=None):
    """(training examples, held-out examples), each [(where, array, …)], the same on every rank; sets `run.plan`.

    Draws rows from --data (of `kind`, if given): parse(record) -> the content of a row. Each rank renders its share:
    render(tokenizer, [(where, content)], max_length, on_bad_row=…) -> ([(where, array, …)], {outcome: rows, "faults":
    [text]}). InputError if a row is refused or none is left.
    """
    args, world = run.args, run.world
    held_out = 200 if args.val_rows is None else args.val_rows
    rows, drawn = draw_rows(args.data, args.rows + held_out, args.seed, parse=parse, on_bad_row=args.on_bad_row,
                            kind=kind)
    share = tqdm(rows[world.rank::world.size], desc="rendering", unit="row", file=sys.stderr, delay=2,
                 disable=None if world.rank == 0 else True)
    try:
        rendered, report = render(run.tokenizer, share, args.max_length, on_bad_row=args.on_bad_row)
        outcome = report, run.tokenizer.read_as_text
    except InputError as error:
        outcome = error
    places = [where for where, _ in rows]
    del rows, share  # frees the texts before the arrays of the other ranks come
    reports, unread = zip(*from_all(world, outcome))  # an InputError of any rank is raised on all
    number_of = {where: i for i, where in enumerate(places)}
    examples = shared_rows(world, [(number_of[where], *arrays) for where, *arrays in rendered])
    examples = [(places[i], *arrays) for i, *arrays in sorted(examples, key=lambda row: row[0])]  # as they were drawn
    if args.val_rows is None:
        held_out = min(200, len(examples) // 20)
    held, examples = examples[:held_out], examples[held_out:held_out + args.rows]
    faults, counts = drawn.pop("faults"), Counter()
    for report in reports:
        faults += report.pop("faults")
        counts.update(report)
    counts["bad"] += drawn.get("bad", 0)
    if not examples:
        left_out = {f"of another kind (instruction_type is not {kind!r})": drawn.get("other kind", 0), **counts,
                    "truncated": 0, "held out": len(held)}
        read = ", ".join([f"{drawn.get('read', 0)} read", *(f"{n} {name}" for name, n in left_out.items() if n)])
        raise InputError(f"--data {' '.join(args.data)}: no row left to train on ({read}); expected at least one")
    if any(unread) and world.rank == 0:
        print(notice_of(set().union(*unread)), file=sys.stderr)
    for fault in faults[:5] if world.rank == 0 else ():
        print(f"skipped: {fault}", file=sys.stderr)
    steps = args.epochs * math.ceil(len(examples) / args.batch_size)
    run.plan = {
        "rows_read": drawn.get("read", 0), "rows_of_another_kind": drawn.get("other kind", 0),
        "answers_truncated": counts.pop("truncated"), **{f"rows_{name}": n for name, n in counts.items()},
        "rows_trained": len(examples), "rows_held_out": len(held), "files": drawn["files"],
        "steps": min(steps, args.max_steps or steps), "ranks": world.size}
    return examples, held


def shown(run, samples, found):
    """Prints `samples` for --inspect, the plan otherwise; returns whether the run ends here (--inspect, --dry-run).

    samples [(title, ids, labels), …]: rows as they are trained. found: lines of the plan that describe the data.
    """
    args = run.args
    if run.world.rank == 0 and args.inspect:
        for title, ids, labels in samples:
            print(f"--- {title}: {len(ids)} tokens\n"
                  f"{show_example(run.tokenizer, ids, labels, sys.stdout.isatty())}")
    elif run.world.rank == 0:
        memory = expected_memory(run.config, run.world, dtype=DTYPES[args.dtype],
                                 fast_bf16=has_fast_bf16(run.world.device), tokens=args.micro_tokens,
                                 activation_checkpointing=args.activation_checkpointing)
        if run.world.device.type == "cpu":
            memory["libraries and data: what the process has already"] = resident("VmRSS")
        print("\n".join([
            f"model {args.model} → {args.out}/model", *found,
            f"steps: {run.plan['steps']:,} of {args.batch_size} rows over {run.plan['ranks']} rank(s)",
            f"memory a process: about {sum(memory.values()) / 1e9:.1f} GB",
            *(f"  {size / 1e9:6.2f} GB  {name}" for name, size in memory.items())]),
            file=sys.stdout if args.dry_run else sys.stderr)
    return bool(args.inspect or args.dry_run)


def expected_memory(config, world, *, dtype, tokens, activation_checkpointing, fast_bf16=True):
    """{name with its formula: bytes} that one process is expected to need; within about a fifth.

    c: bytes of a number computed with; L, D, I, H, K, C, V: layers, width, feed-forward width, heads, key-value heads,
    channels, vocabulary.
    """
    parameters = parameter_count(config)
    layer = sum(math.prod(shape) for name, shape in checkpoint_shapes(config).items()
                if name.startswith("model.layers.0."))
    w, c = (4, 4) if dtype == torch.float32 else (2, 2 if fast_bf16 else 4)
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    # n: on a CPU a norm and the next product keep one tensor, and attention keeps copies of q, k, v instead of views of
    # one larger tensor. p: attention also keeps at most KEPT_KEYS probabilities a head and token; causality hides half
    n, p = (2, KEPT_KEYS // 2) if world.device.type == "cpu" else (4, 0)
    block = c * (n * config.hidden_size + 2 * config.intermediate_size + n * (queries + keys) +
                 p * config.num_attention_heads)
    layers = config.num_hidden_layers
    activations = layers * c * config.hidden_size + block if activation_checkpointing else layers * block
    logits = min(tokens * config.vocab_size, KEPT_LOGITS)
    memory = {f"state: {16 if w == 4 else 18} × {parameters:,} parameters / {world.shards} shards":
              (16 if w == 4 else 18) * parameters / world.shards,
              f"activations of {tokens:,} tokens: " + ("L · c · D + one layer's" if activation_checkpointing else
              f"L · c · ({n} · D + 2 · I + {n} · (H + K) · C{f' + {p} · H' if p else ''})"): tokens * activations,
              f"logits: c × {logits:,} kept, 12 bytes × a block of {block_of_logits(world.device):,}":
              c * logits + 12 * block_of_logits(world.device)}
    if world.size > 1:
        root = parameters - layers * layer
        memory["gathered: embedding and head, two layers, and the gradients of as much"] = 2 * w * (root + 2 * layer)
    if world.size > world.shards:
        memory[f"replicas: 4 × {parameters:,} parameters / {world.shards} shards, to add up their gradients"] = \
            4 * parameters / world.shards
    return memory


def begin(run):
    """The Training that starts from --model. InputError, before anything is written, if --resume does not fit --out."""
    args, world = run.args, run.world
    hashes = computed_on_rank_0(world, lambda: [sha256(file) for file in args.data])
    run.files = [{"file": file, "rows": run.plan["files"].get(file, 0), "sha256": hexdigest}
                 for file, hexdigest in zip(args.data, hashes)]
    run.recipe = {flag: getattr(args, flag) for flag in (  # the data, its order and the schedule follow from these
        *run.fixed, "model", "rows", "epochs", "max_steps", "lr", "warmup", "weight_decay", "clip", "batch_size",
        "max_length", "seed", "dtype")} | {"held_out": run.plan["rows_held_out"]}
    # model, prompts and data by their contents, because folders and files may have moved
    run.facts = run.recipe | {"model": computed_on_rank_0(world, lambda: weights_sha256(args.model)),
                              "template": template_sha256(run.tokenizer),
                              "data": [one["sha256"] for one in run.files]}
    if args.resume:
        run.checkpoint = checkpoint_to_resume(world, run.out / "checkpoints", run.facts)
    computed_on_rank_0(world, lambda: write_json(run.out / "config.json",
                                                 vars(args) | {"files": run.files, "plan": run.plan}))
    # the activations of a row longer than --micro-tokens are computed again in backward, not kept
    above = 0 if args.activation_checkpointing else args.micro_tokens
    return load_training(args.model, world, dtype=DTYPES[args.dtype], weight_decay=args.weight_decay,
                         checkpoint_above=above, seed=args.seed)


def template_sha256(tokenizer):
    """A SHA-256 of the prompts that the tokenizer's chat template makes, in hex digits."""
    talk = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    rendered = [render_chat(tokenizer, messages, ask) for messages in (talk, talk[1:]) for ask in (True, False)]
    return hashlib.sha256(repr(rendered).encode()).hexdigest()


def resume(run, training):
    """With --resume, fills `training` from the checkpoint that `begin` found, or says that there is none."""
    if run.checkpoint:
        load_checkpoint(training, *run.checkpoint)
    elif run.args.resume and run.world.rank == 0:
        print(f"{run.out / 'checkpoints'}: no checkpoint to resume from; starting anew", file=sys.stderr)


def batches(run, examples, tokens, collate):
    """The `batches` of train.fit for the run's flags; tokens, collate: see train.epochs_of."""
    return epochs_of(examples, batch_size=run.args.batch_size, budget=run.args.micro_tokens, seed=run.args.seed,
                     world=run.world, tokens=tokens, collate=collate)


def micro_batches(run, examples, tokens, collate):
    """This rank's micro-batches of `examples`, for a pass without steps; none without examples."""
    return micro_batches_of(examples, run.args.micro_tokens, run.world, tokens=tokens, collate=collate) \
        if examples else []


def schedule(run):
    """The run's part of train.fit's settings."""
    args = run.args
    return {"steps": run.plan["steps"], "lr": args.lr, "warmup": args.warmup, "clip": args.clip, "out": run.out,
            "save_every": args.save_every, "keep": args.keep, "facts": run.facts}

# ----- after the loop ------------------------------------------------------------------------------------------------


def finish(run, training, reported=("loss",)):
    """Exports the model with its card and prints a summary; `reported` names the held-out numbers in both."""
    args, world = run.args, run.world
    results = results_of(run.out, reported) if world.rank == 0 else {}
    recipe = run.recipe | {"ranks": world.size, "export": args.export_dtype, "rows trained": run.plan["rows_trained"]}
    card = model_card(f"FineMedLM-o1-{run.name}", run.config, source=args.model, files=run.files, results=results,
                      recipe=recipe)
    export_model(training, run.out / "model", source=args.model, dtype=DTYPES[args.export_dtype], card=card)
    if world.rank == 0:
        print(f"{run.name}: " + ", ".join(f"{key} {value}" for key, value in results.items()))
        print(f"model: {run.out / 'model'}")


def results_of(out, reported):
    """{name: value} for the summary and the model card, from the run's metrics.jsonl."""
    path = Path(out) / "metrics.jsonl"
    rows = [row for _, row in read_jsonl(path) if not isinstance(row, InputError)]
    steps = [row for row in rows if "loss" in row]
    held = [row for row in rows if "val_loss" in row]
    results = {"steps": steps[-1]["step"]} if steps else {}
    for name, key, found in [("training loss", "loss", steps)] + [
            (f"held-out {one.replace('_', ' ')}", f"val_{one}", held) for one in reported]:
        if found:  # NaN and infinity lie there as text
            first, last = (float(row[key]) for row in (found[0], found[-1]))
            results[name] = f"{first:.4f} → {last:.4f}"
    return results


def export_model(training, directory, *, source, dtype, card):
    """Writes the fp32 masters as a folder that transformers and vLLM load; bf16 by seeded stochastic rounding.

    All ranks gather one weight at a time, in the same order, and rank 0 writes it. Tokenizer and settings come from the
    folder `source`; `card` is the text of README.md.
    """
    model, world = training.model, training.world
    left = dict.fromkeys(checkpoint_names(model.config))

    def gathered(name):
        del left[name]
        return full(sharded_like(world, model.get_parameter(name), training.masters[name]))

    def add_files(folder):
        say_what_was_trained(folder, source)
        (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")  # names that are not UTF-8
        if is_llama3(model.config):
            (folder / "NOTICE").write_text(LLAMA_NOTICE, encoding="utf-8")

    def write():
        try:
            write_checkpoint(directory, model.config, gathered, source=source, dtype=dtype, seed=training.seed,
                             add_files=add_files)
        except OSError:  # the other ranks take part in the gathering of the rest, and then hear of it
            for name in list(left):
                gathered(name)
            raise
    for name in list(left) if world.rank else ():
        gathered(name)
    computed_on_rank_0(world, write)


def say_what_was_trained(folder, source):
    """Edits the settings that an exported `folder` has from `source`: programs then prompt and stop as was trained.

        chat_template     the trained one, in both places where programs look
        eos_token         the end-of-turn token, wherever an eos_token is named; a base model's is another
        eos_token_id      the end-of-turn token's id, and the base model's own stop ids
    """
    tokenizer = Tokenizer.from_dir(source)
    template, end = chat_template(tokenizer), tokenizer.end_of_turn()
    ids = sorted(stop_ids_of(source) | {end})
    stops = {"eos_token_id": ids if len(ids) > 1 else end}
    eos = {"eos_token": tokenizer.decode([end])}
    for name, values in {"config.json": stops, "generation_config.json": stops, "special_tokens_map.json": eos,
                         "tokenizer_config.json": {**eos, "chat_template": template}}.items():
        path = folder / name
        given = read_json_if_there(path)
        if given or name != "special_tokens_map.json":
            path.write_text(json.dumps(given | values, indent=2), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    prepare_for_serving(folder, tokenizer.template)


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

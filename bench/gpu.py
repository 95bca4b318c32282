"""One GPU and a model of random weights (speed and memory do not depend on them): decoding, a question, an SFT step.

    python bench/gpu.py [--size 8B] [--tasks decode ttt sft] [--scratch /dev/shm]

Each measurement is a process of its own, so that its peak memory is its own:
  decode  128 greedy tokens after a prompt of 128, per second from the first on, the second time; beside transformers'
          generate with its default cache, which grows, and with a static one, compiled
  evaluate  16 questions of up to 400 tokens: 256 greedy tokens each together and one by one, and their options scored
  ttt     one question: snapshot, one step on a trace of 2,048 tokens, 128 new tokens, restore; the second in a process,
          beside what one writes with transformers: a copy of the weights, AdamW, one step, generate, the copy put back,
          all in bf16, rounded to nearest (fp32 would take 160 GB); and as on a card of 24 GB
  sft     optimizer steps of 8 rows of 4,096 tokens, one a micro-batch, with activation checkpointing: tokens/s, memory,
          and the MFU (6 FLOP a weight and token over the data sheet's dense bf16 peak; attention left out)
"""
import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import numpy as np  # noqa: E402
import torch  # noqa: E402

import model as M  # noqa: E402
from fast import reuse_freed_memory  # noqa: E402
from files import InputError, Parser, run_main  # noqa: E402
from generate import generate  # noqa: E402

LLAMA_8B = M.LlamaConfig()  # Llama-3.1-8B
SIZES = {
    "8B": LLAMA_8B,
    "3B": replace(LLAMA_8B, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
                  rope_scaling=M.RopeScaling(factor=32.0), tie_word_embeddings=True),  # Llama-3.2-3B
    "1B": replace(LLAMA_8B, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, head_dim=64,
                  rope_scaling=M.RopeScaling(factor=32.0), tie_word_embeddings=True),  # Llama-3.2-1B
    "135M": replace(LLAMA_8B, vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                    num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=8192,
                    rope_theta=1e5, rope_scaling=None, tie_word_embeddings=True),  # SmolLM2-135M
}
PROMPT, NEW, TRACE, ROW = 128, 128, 2048, 4096  # tokens


def random_ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, 49152, n)


def peak_gb():
    return torch.cuda.max_memory_allocated() / 1e9


def clock():
    torch.cuda.synchronize()
    return time.perf_counter()


def theirs(folder):
    import transformers
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda").eval()

# ----- decode --------------------------------------------------------------------------------------------------------


def decode_ours(folder):
    reuse_freed_memory()  # as the programs do, before the first tensor
    start = clock()
    model, seconds = M.load_model(folder, "cuda"), []
    load_s = clock() - start
    for _ in range(2):
        tokens = generate(model, random_ids(PROMPT).tolist(), max_new_tokens=NEW, temperature=0)
        next(tokens)
        start = clock()
        assert sum(1 for _ in tokens) == NEW - 1
        seconds.append(clock() - start)
    return {"tokens/s": round((NEW - 1) / seconds[1], 1), "GB": round(peak_gb(), 2),
            "load_s": round(load_s, 1)}


def decode_theirs(folder, **settings):
    model, seconds = theirs(folder), {}
    ids = torch.from_numpy(random_ids(PROMPT))[None].cuda()
    for n in (1, NEW) * 2:
        start = clock()
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n,
                             do_sample=False, pad_token_id=0, **settings)
        assert out.shape[1] == PROMPT + n
        seconds[n] = clock() - start  # of the last round: the first compiles
    return {"tokens/s": round((NEW - 1) / (seconds[NEW] - seconds[1]), 1), "GB": round(peak_gb(), 2)}

# ----- questions of an evaluation ------------------------------------------------------------------------------------


def evaluate_ours(folder, texts=16, prompt=400):
    """Tokens per second of 16 texts together and of one, 256 new tokens each; questions per second whose four letters
    are scored, 16 in a pass. The second time of each."""
    from data import collate_answers, on_device
    from fast import answer_logps
    from generate import generate_batch
    reuse_freed_memory()
    model, rates = M.load_model(folder, "cuda"), {}
    prompts = [random_ids(prompt - 10 * i, i).tolist() for i in range(texts)]
    batch = on_device(collate_answers([("", np.array(ids, np.int32), *np.array([[1], [2], [3], [4]], np.int32))
                                       for ids in prompts]), torch.device("cuda"))

    def scored():
        with torch.no_grad():
            assert answer_logps(model, batch).isfinite().all()
        return texts

    def written(n):
        return sum(map(len, generate_batch(model, prompts[:n], max_new_tokens=2 * NEW, temperature=0)))
    for name, work in (("tokens/s of 16", lambda: written(texts)), ("tokens/s of one", lambda: written(1)),
                       ("questions/s scored", scored)):
        for _ in range(2):
            start = clock()
            done = work()
            rates[name] = round(done / (clock() - start), 1)
    return rates | {"GB": round(peak_gb(), 2)}

# ----- test-time training --------------------------------------------------------------------------------------------


def ttt_ours(folder, snapshot_device, limit_gb=None):
    from adapt import adapted
    reuse_freed_memory()
    if limit_gb:
        torch.cuda.set_per_process_memory_fraction(limit_gb * 1e9 / torch.cuda.get_device_properties(0).total_memory)
    model = M.load_model(folder, "cuda")
    loaded = torch.cuda.memory_allocated()
    trace = random_ids(TRACE + 1).tolist()
    example, rows = (trace[:-1], [-100] * 64 + trace[65:]), []
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        start = clock()
        with adapted(model, [example], snapshot_device=snapshot_device) as report:
            adapted_gb, began = peak_gb(), clock()
            for _ in generate(model, random_ids(PROMPT).tolist(), max_new_tokens=NEW, temperature=0):
                pass
            generate_s = clock() - began
        assert report.applied and report.restored
        rows.append({"s": round(clock() - start, 3), "adapt_s": round(report.adapt_s, 3),
                     "generate_s": round(generate_s, 3), "restore_s": round(report.restore_s, 3),
                     "GB": round(peak_gb(), 2), "bytes a parameter":
                     round(adapted_gb * 1e9 / sum(p.numel() for p in model.parameters()), 3),
                     "loss": [round(report.loss_before, 4), round(report.loss_after, 4)]})
    return rows[1] | {"first": rows[0]["s"], "weights, GB": round(loaded / 1e9, 2)}


def ttt_theirs(folder):
    model, rows = theirs(folder), []
    ids = torch.from_numpy(random_ids(TRACE))[None].cuda()
    prompt = torch.from_numpy(random_ids(PROMPT))[None].cuda()
    for _ in range(2):
        start = clock()
        model.train()
        copy = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            after = model(input_ids=ids, labels=ids).loss
        model.eval()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, min_new_tokens=NEW,
                       do_sample=False, pad_token_id=0)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(copy[name])
        rows.append({"s": round(clock() - start, 3), "GB": round(peak_gb(), 2),
                     "loss": [round(loss.item(), 4), round(after.item(), 4)]})
        del optimizer, loss, after, copy
        gc.collect()
    return rows[1]

# ----- SFT -----------------------------------------------------------------------------------------------------------


def sft_ours(folder, rows=8, steps=3):
    import train
    from data import collate
    from parallel import start
    from run import expected_memory
    from sft import loss_fn
    reuse_freed_memory()
    world = start("cuda")
    training = train.load_training(folder, world, checkpoint_above=0)
    batches = []
    for i in range(rows):
        ids = random_ids(ROW + 1, i).astype(np.int32)
        batches.append(collate([("", ids[:-1], ids[1:])]))
    stream = iter([(range(rows), batches)] * steps)
    done = [train.take_step(training, stream, loss_fn, 1e-5, 1.0, ())[0] for _ in range(steps)]
    expected = expected_memory(training.model.config, world, dtype=torch.bfloat16, tokens=ROW,
                               activation_checkpointing=True)
    seconds = statistics.median(row["tokens"] / row["tokens_per_s"] for row in done[1:])
    return {"tokens/s": round(rows * ROW / seconds, 1), "mfu": max(row["mfu"] for row in done[1:]),
            "GB": round(peak_gb(), 2), "GB by --dry-run": round(sum(expected.values()) / 1e9, 2),
            "losses": [round(row["loss"], 4) for row in done]}

# ----- the table -----------------------------------------------------------------------------------------------------

SIDES = {
    "decode": {"ours": decode_ours, "transformers, dynamic cache": decode_theirs,
               "transformers, static cache": lambda folder: decode_theirs(folder, cache_implementation="static")},
    "ttt": {"ours": lambda folder: ttt_ours(folder, "cuda"),
            "ours, snapshot in host memory, within 24 GB": lambda folder: ttt_ours(folder, "cpu", 24),
            "transformers": ttt_theirs},
    "evaluate": {"ours": evaluate_ours},
    "sft": {"ours": sft_ours},
}


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="8B", help="the model's shape (default 8B)")
    parser.add_argument("--tasks", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--sides", nargs="+", help="only these of a task",
                        choices=sorted({side for sides in SIDES.values() for side in sides}))
    parser.add_argument("--scratch", help="where the random weights lie meanwhile: 2 bytes a parameter")
    parser.add_argument("--measure", nargs=3, metavar=("TASK", "SIDE", "DIR"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError("torch finds no CUDA device; expected one")
    if args.measure:
        task, side, folder = args.measure
        print(json.dumps(SIDES[task][side](folder)))
        return
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        start = time.perf_counter()
        with torch.device("cuda"):
            model = M.Llama(SIZES[args.size]).to(torch.bfloat16).init_weights()
        M.save_model(model, Path(folder) / "model")
        del model
        torch.cuda.empty_cache()
        print(f"{args.size} written in {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {args.size}\n"
              "| task | side | |\n|---|---|---|", flush=True)
        for task in args.tasks:
            for side in SIDES[task]:
                if args.sides and side not in args.sides:
                    continue
                done = subprocess.run([sys.executable, __file__, "--measure", task, side, f"{folder}/model"],
                                      capture_output=True, text=True)
                found = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["failed"]
                print(f"| {task} | {side} | {found[-1]} |", flush=True)


if __name__ == "__main__":
    run_main(main)

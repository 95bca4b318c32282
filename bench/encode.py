"""Texts per second of retrieve.Encoder beside sentence-transformers, both fp32, alternately in one run.

    python bench/encode.py --data data/medquad_sft.jsonl --encoder models/all-minilm-l6-v2

The data: .jsonl rows with `instruction` and `response` (FineMed-SFT, MedQuAD in that shape); a text is both, joined.
Both sides see the same texts, sort them by length, and get the same number of threads. The ratio is of the medians;
on a machine that others use too it flatters us, because threads that wait for each other (theirs) lose more than
threads that do not (ours), so the ratio of the best rounds stands beside it. sentence-transformers runs with its
default batch size and with 8, which is faster on this kind of CPU. Needs the extra `bench`.
"""
import argparse
import json
import os
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import numpy as np
import torch

from files import InputError, read_jsonl, run_main, whole
from retrieve import DEFAULT_ENCODER, Encoder


def read_texts(path, count, field="both"):
    """Every n-th row of the file, so that `count` texts have the mixture of the whole."""
    texts = []
    for number, row in read_jsonl(path):
        if isinstance(row, InputError):
            raise row
        parts = [row.get("instruction"), row.get("response")]
        if not all(isinstance(part, str) for part in parts):
            raise InputError(f"{path}:{number}: no `instruction` and `response` text; expected FineMed-SFT's shape")
        texts.append("\n".join(parts) if field == "both" else parts[0])
    if len(texts) < count:
        raise InputError(f"{path}: {len(texts)} rows; expected at least --texts {count}")
    return texts[::len(texts) // count][:count]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", required=True, help=".jsonl file with instruction and response")
    parser.add_argument("--encoder", default=DEFAULT_ENCODER, help="folder of the encoder")
    parser.add_argument("--texts", type=whole(1), default=200, help="how many texts to encode in a round")
    parser.add_argument("--rounds", type=whole(1), default=5, help="rounds to time, after one that is not")
    parser.add_argument("--threads", type=whole(1), default=2, help="threads for either side")
    parser.add_argument("--field", choices=("both", "instruction"), default="both",
                        help="what a text is: instruction and response, or only what an index embeds")
    parser.add_argument("--their-batch", type=whole(1), nargs="+", default=[32, 8],
                        help="sentence-transformers' batch sizes; 32 is its default")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()

    texts = read_texts(args.data, args.texts, args.field)
    ours = Encoder.from_dir(args.encoder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise InputError("sentence-transformers is not installed; pip install 'finemedlm-o1[bench]'") from None
    theirs = SentenceTransformer(str(args.encoder), device="cpu")
    torch.set_num_threads(args.threads)

    sides = {"ours": ours.encode} | {
        f"sentence-transformers/{size}": partial(theirs.encode, batch_size=size, normalize_embeddings=True,
                                                 show_progress_bar=False) for size in args.their_batch}
    seconds, vectors = {side: [] for side in sides}, {}
    for round_ in range(args.rounds + 1):
        for side, encode in sides.items():
            start = time.perf_counter()
            vectors[side] = encode(texts)
            if round_:
                seconds[side].append(time.perf_counter() - start)

    first, second = list(vectors.values())[:2]
    median = {side: statistics.median(times) for side, times in seconds.items()}
    best = {side: min(times) for side, times in seconds.items()}
    result = {
        "texts": len(texts), "tokens": sum(map(len, ours.token_ids(texts))), "threads": args.threads,
        "texts_per_s": {side: round(len(texts) / value, 2) for side, value in median.items()},
        "texts_per_s_best": {side: round(len(texts) / value, 2) for side, value in best.items()},
        "ratio_of_medians": {side: round(median[side] / median["ours"], 3) for side in sides},
        "ratio_of_best": {side: round(best[side] / best["ours"], 3) for side in sides},
        "max_abs_difference": float(np.abs(first - second).max()),
        "min_cosine": float(np.sum(first.astype(np.float64) * second, axis=1).min()),
        "load_average": os.getloadavg()[0]}
    if args.json:
        print(json.dumps(result))
        return
    print(f"{result['texts']} texts, {result['tokens']} tokens, {args.threads} threads, {args.rounds} rounds, "
          f"load average {result['load_average']:.1f}")
    print(f"{'texts/s':26} {'median':>8} {'best':>8} {'time/ours':>10} {'best/best':>10}")
    for side in sides:
        print(f"{side:26} {result['texts_per_s'][side]:8.1f} {result['texts_per_s_best'][side]:8.1f} "
              f"{result['ratio_of_medians'][side]:10.2f} {result['ratio_of_best'][side]:10.2f}")
    print(f"max |difference| {result['max_abs_difference']:.1e}, min cosine {result['min_cosine']:.7f}")


if __name__ == "__main__":
    run_main(main)

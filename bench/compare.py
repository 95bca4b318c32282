"""What the benches beside TRL share: each side in a process of its own, its peak memory, the results on disk."""
import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch._dynamo  # a first optimizer step would import it, in seconds: that is no side's time

from files import resident, whole


def parse_args(description, *, data, steps, batch_size, who, choices, smallest_batch=1):
    """The command line of such a bench, with its own defaults; `data` says what rows it wants."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--data", metavar="FILE.jsonl", required=True, help=data)
    parser.add_argument("--steps", type=whole(1), default=steps)
    parser.add_argument("--batch-size", type=whole(smallest_batch), default=batch_size)
    parser.add_argument("--max-length", type=whole(2), default=1024)
    parser.add_argument("--micro-tokens", type=whole(1))
    parser.add_argument("--threads", type=whole(1), default=2)
    parser.add_argument("--who", nargs="+", default=who, choices=choices)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def run_each(script, args):
    """Runs `script` once for each of args.who, in order, with --measure: [the JSON object it printed last]."""
    results = []
    for who in args.who:
        done = subprocess.run([sys.executable, script, *sys.argv[1:], "--measure", who], stdout=subprocess.PIPE,
                              text=True, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)})
        if done.returncode:
            sys.exit(f"{who}: failed")  # it has said why
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(results[-1]), file=sys.stderr)
    out = Path("bench/results") / f"{Path(script).stem}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2))
    return results


def peak_memory():
    """{"peak_rss_gb", "gpu_gb"} of this process; None for the latter without a GPU."""
    gpu = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    return {"peak_rss_gb": round(resident("VmHWM") / 1e9, 2),
            "gpu_gb": gpu and round(gpu, 2)}

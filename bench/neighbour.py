"""The cost of a busy neighbour: each task alone and beside a process that keeps one core busy, for each setting.

    python bench/neighbour.py                                               torch's default and our programs'
    python bench/neighbour.py --settings OMP_NUM_THREADS=2 OMP_NUM_THREADS=1 OMP_NUM_THREADS=2,GOMP_SPINCOUNT=500

A setting is a list of environment variables with commas between them. Each measurement is a process of its own, begun
without any variable of OpenMP but those of its setting; settings alternate, alone and beside in turn. Where
OMP_NUM_THREADS is not set, fast.Threads chooses their number, as it does in the programs:
  sft     optimizer steps of two micro-batches of at most 1,280 tokens; tokens per second, the first step not counted
  ttt     a question as in inference.py: one step on a trace of 800 tokens and 128 new tokens; questions per minute
  decode  greedy tokens per second after the prompt, as in inference.py
The neighbour is a loop in another Python, started for one measurement and killed after it.
"""
import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from inference import SMOLLM2, decode_ours, ttt_ours  # noqa: E402

from files import InputError, Parser, run_main, whole  # noqa: E402

UNITS = {"sft": "tokens/s", "ttt": "questions/min", "decode": "tokens/s"}
OPENMP = ("OMP_", "GOMP_", "KMP_", "MKL_")
ROWS, MICRO_TOKENS = 8, 1280
OTHERS = 0.15  # of a core: a measurement beside which others used more is repeated, and left out after four such
BUSY = """import os
parent = os.getppid()
while os.getppid() == parent:  # ends with this script, even if that is killed
    for _ in range(1_000_000):
        pass"""

# ----- one measurement, in this process ------------------------------------------------------------------------------


def sft(steps):
    """Tokens per second of SFT on the demo's first rows, the same ones each step."""
    import train
    from data import collate, render_rows, split_step
    from fast import reuse_freed_memory
    from parallel import start
    from rows import messages_of
    from sft import loss_fn
    from tokenizer import Tokenizer
    lines = (ROOT / "demo/data/sft_all.jsonl").read_text().splitlines()[:ROWS]
    examples = render_rows(Tokenizer.from_dir(SMOLLM2), [(str(i), messages_of(json.loads(line)))
                                                         for i, line in enumerate(lines)], 1024)[0]
    lengths = [len(ids) for _, ids, _ in examples]
    bins = split_step(lengths, MICRO_TOKENS)
    reuse_freed_memory()
    training = train.load_training(SMOLLM2, start("cpu"), checkpoint_above=MICRO_TOKENS)

    def batches():
        while True:
            yield range(len(examples)), [collate([examples[i] for i in rows]) for rows in bins]
    stream = batches()
    for step in range(steps + 1):
        if step == 1:
            began = time.perf_counter()
        loss = train.take_step(training, stream, loss_fn, 1e-5, 1.0, ())[0]["loss"]
    return {"rate": steps * sum(lengths) / (time.perf_counter() - began), "micro-batches": len(bins),
            "tokens": sum(lengths), "loss": loss}


def measure(task, steps):
    """{"rate": …, and the circumstances}."""
    from fast import Threads
    threads = Threads()
    time.sleep(1)  # the programs load a model and an index in the meantime
    threads.leave_busy_cores()
    if task == "sft":
        found = sft(steps)
    else:
        found = ttt_ours() if task == "ttt" else decode_ours()
        found["rate"] = 60 / found["ttt"] if task == "ttt" else found["decode"]
    import torch
    return found | {"threads": torch.get_num_threads(),
                    "set": {name: value for name, value in os.environ.items() if name.startswith(OPENMP)}}

# ----- the table -----------------------------------------------------------------------------------------------------


def variables(setting):
    """{name: value} of "NAME=value,NAME=value", or of "programs", which set none."""
    pairs = [] if setting == "programs" else [pair.partition("=") for pair in setting.split(",")]
    if not all(name and mark for name, mark, _ in pairs):
        raise argparse.ArgumentTypeError(f"{setting!r}; expected NAME=value with commas between, or programs")
    return {name: value for name, _, value in pairs}


def named(setting):
    variables(setting)
    return setting


@contextlib.contextmanager
def busy_processes(n):
    """`n` processes that each keep a core busy while the block runs."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def busy_seconds():
    """(of all processes on this machine, stolen from it included; of the children this process has waited for)."""
    user, nice, system, _, _, irq, soft, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    own = os.times()
    return ((user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK"),
            own.user + own.system + own.children_user + own.children_system)


def in_a_process(task, setting, beside, steps):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(OPENMP)}
    start, (machine, ours) = time.perf_counter(), busy_seconds()
    with busy_processes(beside):
        out = subprocess.run([sys.executable, __file__, "--measure", task, "--steps", str(steps)], cwd=ROOT,
                             capture_output=True, text=True, env=clean | variables(setting) | {"HF_HUB_OFFLINE": "1"})
    last = out.stdout.strip().splitlines()[-1:] or [""]
    if out.returncode or not last[0].startswith("{"):
        raise InputError(f"{task}, {setting}: {(out.stderr.strip().splitlines() or ['failed'])[-1]}")
    machine, ours = (after - before for after, before in zip(busy_seconds(), (machine, ours)))
    return json.loads(last[0]) | {"others": max(0, machine - ours) / (time.perf_counter() - start)}


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", type=named, metavar="NAME=VALUE,…",
                        default=[f"OMP_NUM_THREADS={os.cpu_count()}", "programs"],
                        help="environments to compare; the first is the one that the others' cost is of")
    parser.add_argument("--tasks", nargs="+", choices=list(UNITS), default=list(UNITS))
    parser.add_argument("--rounds", type=whole(1), default=5, help="measurements of each (default 5)")
    parser.add_argument("--steps", type=whole(1), default=1, help="optimizer steps counted (default 1)")
    parser.add_argument("--busy", type=whole(1), default=1, help="busy processes beside (default 1)")
    parser.add_argument("--json", action="store_true", help="print every measurement as JSON, too")
    parser.add_argument("--measure", choices=list(UNITS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.steps)))
        return
    rates = {}  # (task, setting, busy processes): figures
    for task in args.tasks:
        for _ in range(args.rounds):
            for beside in (0, args.busy):
                for setting in args.settings:
                    for _ in range(4):  # again, a few times, when some other process had a part of a core
                        found = in_a_process(task, setting, beside, args.steps)
                        if found["others"] < OTHERS:
                            break
                    figures = rates.setdefault((task, setting, beside), [])
                    figures += [found["rate"]] * (found["others"] < OTHERS)
                    print(f"{task}, {setting}, {beside} beside: {found['rate']:.1f} {UNITS[task]}, "
                          f"{found['others']:.2f} of a core for others", file=sys.stderr)
                    if args.json:
                        print(json.dumps({"task": task, "setting": setting, "beside": beside} | found))

    def median(task, setting, beside):
        return statistics.median(rates[task, setting, beside] or [float("nan")])
    print(f"median [lowest, highest; how many], {os.cpu_count()} cores, {args.busy} busy beside\n"
          "| task | setting | alone | beside | beside / alone | alone / first alone | beside / first alone |\n"
          "|---|---|---|---|---|---|---|")
    for task in args.tasks:
        first = median(task, args.settings[0], 0)
        for setting in args.settings:
            alone, beside = (median(task, setting, n) for n in (0, args.busy))
            shown = []
            for n in (0, args.busy):
                figures = rates[task, setting, n]
                spread = f"[{min(figures):.1f}, {max(figures):.1f}; {len(figures)}]" if figures else ""
                shown.append(f"{median(task, setting, n):.1f} {spread}")
            print(f"| {task} ({UNITS[task]}) | {setting} | {' | '.join(shown)} | {beside / alone:.2f} | "
                  f"{alone / first:.3f} | {beside / first:.2f} |")


if __name__ == "__main__":
    run_main(main)

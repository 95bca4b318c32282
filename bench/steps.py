"""Which step of test-time training pays? A grid of steps against the same neighbours in the prompt.

    python bench/steps.py split --data medquad_sft.jsonl --out evals/steps         MedQuAD's parts, by page
    python sft.py --stage 1 --model models/smollm2-135m-instruct --data evals/steps/sft.jsonl --batch-size 16 \\
        --lr 1e-4 --max-length 1024 --epochs 1 --save-every 0 --out evals/steps/sft
    python bench/steps.py moments --out evals/steps                                AdamW's, for `train`
    python bench/steps.py cells --out evals/steps                                  each question with its neighbours
    python bench/steps.py run --trials grid dev --out evals/steps                  every rate; the best on 60 questions
    python bench/steps.py choose --out evals/steps                                 into protocol.json, to be committed
    python bench/steps.py run --trials test --out evals/steps                      123 questions a cell, three seeds
    python bench/steps.py run --trials variants --out evals/steps                  SIFT, groups and others, on dev
    python bench/steps.py table --trials dev --out evals/steps

    w ← stochastic_round(w − lr · d)        a step on one neighbour, g its gradient; nearest first
    sign      d = g / (|g| + eps)           ttt.py's default: the first step of a fresh Adam
    sgd       d = g                         momentum: d = 0.9 · d of the neighbour before + g
    global    d = g / ‖g‖                   tensor: d = g · ‖w‖ / ‖g‖, of each tensor by itself
    train     d = g / (√v + mean √v)        v: AdamW's second moments at the end of SFT; the mean is over the tensor
    index     the same                      v: the mean of g² over 32 random records of the index
    contrast  d = g − mean g                over the same 32 records: content without format
    contrast-index  d = (g − mean g) / (√v + mean √v)
    mean      one step with the mean gradient of the k neighbours

Every trial is measured after each k of its list, with the question alone and with neighbours in the prompt. Two cores
take a day, a GPU minutes (--workers: processes on one device).
"""
import argparse
import hashlib
import json
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402

from adapt import example_loss  # noqa: E402
from arms import Evaluation, cosine, cut_record, example_of, prompt_of  # noqa: E402
from benchmarks import Question  # noqa: E402
from data import collate_answers, on_device, rounded_up  # noqa: E402
from evaluate import answers_of  # noqa: E402
from fast import answer_logps, causal_attention, embed, token_logps  # noqa: E402
from files import (  # noqa: E402
    InputError,
    Parser,
    appended,
    finished_rows,
    read_data,
    run_main,
    whole,
    write_json,
    written_aside,
)
from leaks import reason_to_mask  # noqa: E402
from model import load_model, rotary_table  # noqa: E402
from ttt import open_tokenizer  # noqa: E402

PROTOCOL = json.loads((ROOT / "bench/protocol.json").read_text())
FEW = 30  # questions of dev that every method is tried on
SMOLLM2, MINILM = ROOT / "models/smollm2-135m-instruct", ROOT / "models/all-minilm-l6-v2"

# ----- parts and cells -----------------------------------------------------------------------------------------------


def part_of(url, alone):
    """The part of a page, by the hash of its address."""
    share = int(hashlib.sha256(url.encode()).hexdigest()[:8], 16) / 2**32
    return next(part for part, edge in PROTOCOL["parts"]["alone" if alone else "several rows"].items() if share < edge)


def split(args):
    """OUT/rows.jsonl: every row with its part; OUT/sft.jsonl: those of A."""
    rows = [row for _, _, row in read_data(args.data)]
    pages = Counter(row["url"] for row in rows)
    rows = [row | {"part": part_of(row["url"], pages[row["url"]] == 1)} for row in rows]
    args.out.mkdir(parents=True, exist_ok=True)
    write_rows(args.out / "rows.jsonl", rows)
    write_rows(args.out / "sft.jsonl", [row for row in rows if row["part"] == "A"])
    print(json.dumps(Counter(row["part"] for row in rows)))


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def question_of(number, row):
    answer = row["response"].strip()
    page = row.get("url")
    return Question(number, f"row {number}", row["instruction"].strip(), {}, None, answer, page or str(number), page,
                    None)


def docstrings():
    """Rows about something else: the functions of Python's library and what they do."""
    import importlib
    import inspect
    found = {}
    for name in sorted(sys.stdlib_module_names - {"antigravity", "this", "idlelib"}):
        try:
            module = importlib.import_module(name)
        except Exception:  # of another platform
            continue
        for of, value in sorted(vars(module).items()):
            if not of.startswith("_") and callable(value) and (text := inspect.getdoc(value)) and len(text) > 200:
                found.setdefault(text, {"instruction": f"What does {name}.{of} of Python do?", "response": text})
    return list(found.values())[::max(1, len(found) // 600)]


def sift(query, points, n, noise=0.01):
    """n of `points` [N, D] by SIFT (arXiv 2410.08020, λ = `noise`): each leaves the variance of the query's value under
    a Gaussian process with kernel x·y smallest, so a point that says the same as one before brings little."""
    points = np.stack([query, *points])
    covariance, chosen = points @ points.T, []
    for _ in range(min(n, len(points) - 1)):
        gain = covariance[0] ** 2 / (covariance.diagonal() + noise)
        gain[[0, *chosen]] = -1
        chosen.append(i := int(gain.argmax()))
        covariance = covariance - np.outer(covariance[:, i], covariance[i]) / (covariance[i, i] + noise)
    return [i - 1 for i in chosen]


def groups(rows, vectors, size=4):
    """The rows in groups that share one list of neighbours: the first that is left, and those nearest to it."""
    left = list(rows)
    while left:
        group = sorted(left, key=lambda i: -cosine(vectors[left[0]], vectors[i]))[:size]
        yield group
        left = [i for i in left if i not in group]


def cells(args):
    """OUT/cells.json: {"records": {index: [row]}, "cells": {cell: {part: [question with its neighbours]}}}."""
    from encoder import Encoder
    encoder = Encoder.from_dir(MINILM)
    rows = [row for _, _, row in read_data(args.out / "rows.jsonl")]
    vectors, answers = (encoder.encode([row[field] for row in rows]) for field in ("instruction", "response"))
    pages, part = Counter(row["url"] for row in rows), np.array([row["part"] for row in rows])
    found, k = {}, PROTOCOL["neighbours"]
    records = {"medquad": rows}

    def neighbours(group, allowed, all_vectors, all_rows, rule, answers=None):
        """{list: [(record, cosine)]} without what gives an answer away, for [(question, its vector)], most often one.
        With the vectors of the records' `answers` also "once" (no two with nearly the same answer) and "sift"."""
        centre = np.mean([vector for _, vector in group], axis=0)

        def unmasked(ranking, n):
            found = []
            for i in map(int, ranking):
                if allowed[i] and not any(reason_to_mask(question, all_rows[i], rule=rule,
                                                         cosine=cosine(all_vectors[i], vector))
                                          for question, vector in group):
                    found.append((i, round(cosine(all_vectors[i], centre), 4)))
                    if len(found) == n:
                        break
            return found
        nearest = unmasked(np.argsort(-(all_vectors @ centre), kind="stable"), k if answers is None else 5 * k)
        lists = {"nearest": nearest[:k], "random": unmasked(np.random.default_rng(
            [PROTOCOL["seed"], group[0][0].number]).permutation(len(all_rows)), k)}
        if answers is not None:
            once = []
            for i, near in nearest:  # an answer that is there already counts once
                if all(cosine(answers[i], answers[j]) < 0.95 for j, _ in once):
                    once.append((i, near))
            lists |= {"once": once[:k], "sift": [nearest[i] for i in sift(
                centre, all_vectors[[i for i, _ in nearest]], k)]}
        return lists
    for cell in PROTOCOL["cells"]:
        model, setting = cell.split("-")
        for name in ("dev", "test", "fresh") if model == "sft" else ("dev", "test"):
            asked, own = [], np.isin(part, [*PROTOCOL["index"][model], "test" if name == "fresh" else name])
            candidates = np.flatnonzero(part == name)
            if name == "fresh":  # what nobody has looked at yet: B, and what is left of test
                used = [one["row"] for one in found[cell]["test"]]
                candidates = [i for i in np.flatnonzero(np.isin(part, ["B", "test"])) if i not in used]
            for i in candidates:
                question = question_of(int(i), rows[i])
                if (pages[rows[i]["url"]] > 1) != (setting == "same") or len(asked) == PROTOCOL["questions"][name]:
                    continue
                allowed, rule = own & (np.arange(len(rows)) != i), "strict" if setting == "other" else "same-page"
                lists = neighbours([(question, vectors[i])], allowed, vectors, rows, rule,
                                   answers if name == "dev" else None)
                if setting == "same" and rows[i]["url"] not in {rows[j]["url"] for j, _ in lists["nearest"]}:
                    continue
                asked.append({"row": int(i), "from": "medquad", "of": "medquad", **lists})
            for group in groups([one["row"] for one in asked], vectors) if name == "dev" else ():
                members = [(question_of(i, rows[i]), vectors[i]) for i in group]
                allowed = own & ~np.isin(np.arange(len(rows)), group)
                shared = neighbours(members, allowed, vectors, rows, rule)["nearest"]
                for one in asked:
                    one.update({"group": shared} if one["row"] in group else {})
            found.setdefault(cell, {})[name] = asked
    folder = args.out / "eval"
    folder.mkdir(exist_ok=True)
    for cell, parts in found.items():  # for evaluate.py: the questions, and the rows of their index
        model, setting = cell.split("-")
        for name, asked in parts.items():
            write_rows(folder / f"{name}-{setting}.jsonl", [rows[one["row"]] for one in asked])
            if name != "fresh":  # its index is the test's
                of_index = [row for row in rows if row["part"] in (*PROTOCOL["index"][model], name)]
                write_rows(folder / f"{model}-{name}.jsonl", of_index)
            if name == "test":  # the same questions with others' answers
                write_rows(folder / f"{model}-shuffled.jsonl", [
                    row | {"response": of_index[(i + len(of_index) // 3) % len(of_index)]["response"]}
                    for i, row in enumerate(of_index)])
    if args.traces:
        traces = [row for _, _, row in read_data(args.traces)]
        records["traces"] = traces
        of_traces = encoder.encode([row["instruction"] for row in traces])
        asked = [{"row": i, "from": "traces", "of": "traces", **neighbours(
            [(question_of(i, row), of_traces[i])], np.arange(len(traces)) != i, of_traces, traces, "strict")}
            for i, row in enumerate(traces)]
        found |= {f"{model}-traces": {"test": asked} for model in ("base", "sft")}
    records["python"] = docstrings()
    write_rows(folder / "python.jsonl", records["python"])
    of_python = encoder.encode([row["instruction"] for row in records["python"]])
    # every answer from the next but 700 row: the same questions with others' answers
    records["shuffled"] = [row | {"response": rows[(i + 700) % len(rows)]["response"]} for i, row in enumerate(rows)]
    for model in ("base", "sft"):
        there = found[f"{model}-other"]["test"]
        found[f"{model}-shuffled"] = {"test": [one | {"of": "shuffled"} for one in there]}
        found[f"{model}-python"] = {"test": [one | {"of": "python", **neighbours(
            [(question_of(one["row"], rows[one["row"]]), vectors[one["row"]])], np.ones(len(of_python), bool),
            of_python, records["python"], "off")} for one in there]}
    write_json(args.out / "cells.json", {"records": records, "cells": found})
    for cell, parts in found.items():
        print(cell, {name: len(asked) for name, asked in parts.items()}, *(
            f"{np.mean([len({*one['nearest'][:10]} - {*one['once'][:10]}) for one in asked]):.1f} of ten counted twice"
            for name, asked in parts.items() if name == "dev"))

# ----- one model, flat -----------------------------------------------------------------------------------------------


def stepped(weights, grad, noise, factor, lr, kind, mean, root):
    """bf16 weights after a step, stochastically rounded (rounding.py's fast form); `lr` and `factor` are tensors."""
    d = grad.float()
    if kind == "sign":
        d = d / (d.abs() + 1e-8)
    if kind.startswith("contrast"):
        d = d - mean
    if kind in ("index", "train", "contrast-index"):
        d = d / root
    exact = weights.float() - lr * d
    if noise is None:
        return exact.to(torch.bfloat16)
    bits = exact.view(torch.int32) + ((noise * factor >> 16) & 0xFFFF)
    return (bits & -65536).view(torch.float32).to(torch.bfloat16)


class Bench:
    """A model whose weights and gradients are one flat tensor each, so that a step is a few operations.

    On a GPU a pass forward and back is recorded once a length, because two thousand launches take longer than it does.
    """

    def __init__(self, args, device):
        self.device = device
        data = json.loads((args.out / "cells.json").read_text())
        self.records, self.cells = data["records"], data["cells"]
        tokenizer, context = open_tokenizer(SMOLLM2)
        flags = SimpleNamespace(measure="bpb", prompt="chat", by="letter", answer_tokens=PROTOCOL["tokens"]["answer"])
        self.model = load_model(SMOLLM2, device)
        self.run = Evaluation(flags, SimpleNamespace(device=device), tokenizer, context, [], set(), self.model)
        weights = [*self.model.parameters()]
        self.flat = torch.cat([weight.detach().view(-1) for weight in weights])
        self.grad = torch.zeros_like(self.flat)
        self.sizes = [weight.numel() for weight in weights]
        for weight, value, grad in zip(weights, self.tensors(self.flat), self.tensors(self.grad)):
            weight.data, weight.grad = value.view_as(weight), grad.view_as(weight)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.originals = {"base": self.flat.clone()}
        self.averages, self.norms, self.batches, self.graphs, self.out, self.root = {}, {}, {}, {}, args.out, None
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        generator = torch.Generator(device).manual_seed(0)
        self.noise = torch.empty(len(self.flat), dtype=torch.int32, device=device).random_(
            -2**31, 2**31 - 1, generator=generator)
        self.fast = device.type == "cuda"
        self.stepped = torch.compile(stepped, dynamic=False) if self.fast else stepped
        self.begin("base")

    def begin(self, name):
        """Puts the weights of a model back; the trained one is read when it is first asked for, and waited for."""
        self.name = name
        if name not in self.originals:
            while not (self.out / "second_moments.pt").exists():
                time.sleep(1)
            other = load_model(self.out / "sft/model", self.device)
            self.originals[name] = torch.cat([weight.detach().view(-1) for weight in other.parameters()])
            self.root = self.damped(torch.load(self.out / "second_moments.pt", map_location=self.device))
        self.flat.copy_(self.originals[name])

    def tensors(self, flat):
        return flat.split(self.sizes)

    def gradient(self, example):
        """The loss on an example before the step; its gradient is in `self.grad`."""
        if not self.fast:
            self.grad.zero_()
            with torch.enable_grad():
                loss = example_loss(self.model, example)
                loss.backward()
            return loss.detach()
        length = rounded_up(len(example[0]), 64 if len(example[0]) <= 448 else 512)
        if length not in self.graphs:
            self.graphs[length] = self.recorded(length)
        graph, tensors, loss = self.graphs[length]
        for tensor, row, empty in zip(tensors, example, (0, -100)):
            tensor.copy_(torch.tensor([*row, *[empty] * (length - len(row))]), non_blocking=True)
        graph.replay()
        return loss

    def recorded(self, length):
        """(a CUDA graph of forward and backward, its ids and labels, its loss) for rows of `length` tokens."""
        model, positions = self.model, torch.arange(length, device=self.device)
        ids, labels = (torch.full((length,), value, device=self.device) for value in (0, -100))

        def passed():
            self.grad.zero_()
            rotary, h = rotary_table(model.config, positions[None]), embed(ids[None], model.embed.weight)
            for layer in model.layers:
                h = layer(h, rotary, causal_attention, None)
            logps = token_logps(model.norm(h)[0], model.head.weight, labels.clamp(min=0))
            wanted = labels != -100
            loss = -(logps * wanted).sum() / wanted.sum()
            loss.backward()
            return loss.detach()
        stream, graph = torch.cuda.Stream(self.device), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.enable_grad(), torch.cuda.stream(stream):
            for _ in range(2):
                passed()
        torch.cuda.synchronize()
        with torch.enable_grad(), torch.cuda.graph(graph, pool=self.pool, stream=stream):
            loss = passed()
        graph.reads = passed  # a graph does not keep the memory that it reads, such as positions
        return graph, (ids, labels), loss

    def average(self):
        """Finds (mean gradient, damped root of its mean square) over 32 random records of the index, once a model."""
        if self.name not in self.averages:
            self.begin(self.name)
            rows = [row for row in self.records["medquad"] if row["part"] == "B"]
            chosen = np.random.default_rng(PROTOCOL["seed"]).permutation(len(rows))[:32]
            mean, square = (torch.zeros(len(self.flat), device=self.device) for _ in range(2))
            for i in chosen:
                cut = cut_record(self.run.tokenizer, rows[i], PROTOCOL["tokens"]["record"])
                self.gradient(example_of(self.run, *cut))
                mean.add_(self.grad, alpha=1 / len(chosen))
                square.addcmul_(self.grad, self.grad, value=1 / len(chosen))
            self.averages[self.name] = mean.bfloat16(), self.damped(square)

    def damped(self, square):
        """√v + the mean of √v over each tensor, bf16: where no record had a gradient the step stays small."""
        root = square.float().sqrt_()
        for tensor in self.tensors(root):
            tensor.add_(tensor.mean())
        return root.bfloat16()

    def scale_tensors(self):
        """g ← g · ‖w‖ / ‖g‖, each tensor by itself; w is the model's own."""
        if self.name not in self.norms:
            self.norms[self.name] = [w.float().norm() for w in self.tensors(self.originals[self.name])]
        for g, norm in zip(self.tensors(self.grad), self.norms[self.name]):
            g.mul_(norm / (g.float().norm() + 1e-12))

    def step(self, trial, state, i, generator):
        """Takes step i of a trial with `self.grad`."""
        method, rate, weights, grad = trial["method"], trial["lr"], self.flat, self.grad
        mean = root = None
        if method == "momentum":
            state["m"] = grad.float() if "m" not in state else state["m"].mul_(0.9).add_(grad)
            grad = state["m"]
        elif method == "mean":
            state["sum"] = grad.float() if "sum" not in state else state["sum"].add_(grad)
            grad, weights, rate = state["sum"], self.originals[self.name], rate / i
        elif method == "tensor":
            self.scale_tensors()
        elif method == "train":
            root = self.root
        elif method in ("index", "contrast", "contrast-index"):
            mean, root = self.averages[self.name]
        lr = torch.full((), rate, device=self.device)
        if method == "global":
            lr = lr / torch.linalg.vector_norm(grad, dtype=torch.float32)
        if "mask" in state:
            grad.mul_(state["mask"])
        factor = torch.empty((), dtype=torch.int32, device=self.device).random_(
            -2**31, 2**31 - 1, generator=generator) | 1
        kind = method if method in ("sign", "train", "index", "contrast", "contrast-index") else "sgd"
        noise = None if trial.get("rounding") == "nearest" else self.noise
        self.flat.copy_(self.stepped(weights, grad, noise, factor, lr, kind, mean, root))

    def bits(self, cell, asked, records, contexts, order):
        """[(nats, bytes)] of the answer after the question alone (0) and after so many neighbours."""
        run, key = self.run, (cell, asked["row"], tuple(i for i, *_ in records[:max(contexts)]), *contexts, order)
        if key not in self.batches:
            question = question_of(asked["row"], self.records[asked["from"]][asked["row"]])
            prompts = [prompt_of(run, question, records[:n][::-1 if order == "last" else 1]) for n in contexts]
            texts, ids = answers_of(run, question)
            batch = collate_answers([("", *(np.array(row, np.int32) for row in (prompt, *ids))) for prompt in prompts])
            self.batches[key] = on_device(batch, self.device), len(texts[0].encode())
        batch, n_bytes = self.batches[key]
        logps = answer_logps(self.model, batch).tolist()
        if not np.isfinite(logps).all():
            raise InputError("a log-likelihood is not finite")
        return [(-logp, n_bytes) for logp in logps]


def mask_of(bench, adapt):
    """1 for the weights that are trained: "mlp", "down", "last:10"."""
    layers = len(bench.model.layers)

    def trained(name):
        if adapt.startswith("last:"):
            return name.startswith("layers.") and int(name.split(".")[1]) >= layers - int(adapt[5:])
        return f".mlp.{'down' if adapt == 'down' else ''}" in name
    return torch.cat([torch.full((size,), float(trained(name)), device=bench.device, dtype=torch.bfloat16)
                      for name, size in zip(bench.names, bench.sizes)])


@torch.no_grad()
def tried(bench, cell, asked, trial, seed):
    """Yields {k, context, nats, bytes, …} for one question after each k neighbours of a trial."""
    tokenizer, tokens = bench.run.tokenizer, PROTOCOL["tokens"]["record"]
    most, records = max(trial["k"]), []
    for i, near in asked[trial.get("records", "nearest")]:
        cut = cut_record(tokenizer, bench.records[asked["of"]][i], tokens)
        if cut and len(records) < max(most, *trial["context"], 1):
            records.append((i, near, *cut))
    contexts, order = [0, *trial["context"]], trial.get("context order", "last")
    begin, state, losses = time.perf_counter(), {}, []
    generator = torch.Generator(bench.device).manual_seed(seed)
    if trial.get("adapt"):
        state["mask"] = mask_of(bench, trial["adapt"])

    def measured(k):
        for n, (nats, n_bytes) in zip(contexts, bench.bits(cell, asked, records, contexts, order)):
            yield {"k": k, "context": n, "nats": round(nats, 4), "bytes": n_bytes, "near": records[0][1],
                   "losses": [round(float(loss), 4) for loss in losses],
                   "seconds": round(time.perf_counter() - begin, 3)}
    if trial["method"] == "none":
        yield from measured(0)
        return
    if trial["method"] in ("index", "contrast", "contrast-index"):
        bench.average()
    used = records[:most]
    for i, (_, _, messages, was_cut) in enumerate(used[::-1] if trial.get("order") == "last" else used, 1):
        if trial.get("form") == "context":  # after the other neighbours, as the question will be
            others = [one for one in used if one[2] is not messages]
            messages = [turn for _, _, turns, _ in others[::-1] for turn in turns] + messages
        losses.append(bench.gradient(example_of(bench.run, messages, was_cut)).clone())
        bench.step(trial, state, i, generator)
        if i in trial["k"]:
            yield from measured(i)
        if trial["method"] == "mean":
            bench.begin(bench.name)


# ----- many trials ---------------------------------------------------------------------------------------------------


def trials_of(name, out):
    """The trials of a phase: of "grid" by the rates of protocol.json, of "test" and "variants" as they stand there, of
    "dev" as `dev_trials` found them."""
    if name == "grid":
        grid = PROTOCOL["grid"]
        settings = {"k": grid["k"], "context": grid["context"], "questions": grid["questions"]}
        return [{"name": f"{method} {lr:g}", "method": method, "lr": lr, "cells": [cell], **settings}
                for cell in PROTOCOL["cells"] for method, rates in grid["rates"].items()
                for lr in rates.get(cell.split("-")[0], ())]
    return PROTOCOL[name] if name in ("test", "variants") else json.loads((out / f"{name}.json").read_text())


def work(args, jobs, results):
    """A process that does trials until there are no more."""
    torch.set_num_threads(1)
    bench = Bench(args, torch.device(args.device))
    while job := jobs.get():
        cell, asked, trial, seed = job
        bench.begin(cell.split("-")[0])
        try:
            found = [*tried(bench, cell, asked, trial, seed)]
        except (InputError, RuntimeError) as error:  # a log-likelihood that is not finite: the rate is too high
            found = [{"failed": str(error)[:300]}]
        results.put([{"cell": cell, "row": asked["row"], "trial": trial["name"], "seed": seed, **one} for one in found])
    results.put(None)


def jobs_of(rows, trials, asked_of, model=""):
    """[(cell, question, trial, seed)] that have not all their rows yet, in the order of `trials`: a kill may have cut
    one short. `asked_of` {cell: its questions}; only cells that begin with `model`."""
    done = Counter()
    for row in rows:
        done[row["cell"], row["row"], row["trial"], row["seed"]] += 99 if "failed" in row else 1
    return [(cell, asked, trial, seed)
            for trial in trials for cell in trial["cells"] if cell.startswith(model)
            for asked in asked_of[cell][:trial.get("questions")] for seed in trial.get("seeds", [0])
            if done[cell, asked["row"], trial["name"], seed] < len(trial["k"]) * (1 + len(trial["context"]))]


def run_trials(args):
    """Appends the rows of all trials to OUT/PHASE.jsonl, those that are not there yet, in the order of the protocol."""
    data, context = json.loads((args.out / "cells.json").read_text())["cells"], mp.get_context("spawn")
    queue, results = context.Queue(), context.Queue()
    workers = [context.Process(target=work, args=(args, queue, results), daemon=True) for _ in range(args.workers)]
    for worker in workers:
        worker.start()
    for phase in args.trials:
        name, _, model = phase.partition(":")
        if name == "dev":
            write_json(args.out / "dev.json", dev_trials(means(rows_of(args.out / "grid.jsonl")), args.out))
        path = args.out / f"{name}.jsonl"
        jobs = jobs_of(rows_of(path), trials_of(name, args.out), {
            cell: parts.get("test" if name == "test" else "dev") for cell, parts in data.items()}, model)
        begin, sent, measured = time.perf_counter(), 0, 0
        with appended(path) as append:
            while measured < len(jobs):
                while sent < min(len(jobs), measured + 2 * args.workers) and time.perf_counter() - begin < args.seconds:
                    queue.put(jobs[sent])
                    sent += 1
                if measured == sent:
                    break
                for row in results.get(timeout=300):
                    append(row)
                measured += 1
        print(f"{phase}: {measured:,} of {len(jobs):,} in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    for worker in workers:
        worker.kill()


def rows_of(path):
    """The rows of a phase; of a question that was begun, cut short and asked again, those of the last time."""
    names = ("cell", "row", "trial", "seed", "k", "context")
    return [*{tuple(row.get(name) for name in names): row for _, row in finished_rows(path, b'{"cell": ')}.values()]

# ----- choices -------------------------------------------------------------------------------------------------------


def means(rows):
    """{(cell, trial, k, context): (mean bits per byte, questions)}, of the trials that never failed."""
    found, failed = defaultdict(list), set()
    for row in rows:
        if "failed" in row:
            failed.add((row["cell"], row["trial"]))
        else:
            found[row["cell"], row["trial"], row["k"], row["context"]].append(
                row["nats"] / np.log(2) / row["bytes"])
    return {key: (float(np.mean(values)), len(values)) for key, values in found.items() if key[:2] not in failed}


def choose(args):
    """The trials of the test by the rules of protocol.json, written into it."""
    full, trials = PROTOCOL["questions"]["dev"], {trial["name"]: trial for trial in trials_of("dev", args.out)}
    rows = rows_of(args.out / "dev.jsonl")
    found = {key: mean for key, (mean, n) in means(rows).items() if n == full}
    chosen, test = {}, []
    for cell in PROTOCOL["cells"]:
        none = found[cell, "none", 0, 0]

        def best(wanted, cell=cell):
            return min((key for key in found if key[0] == cell and wanted(*key[1:])), key=found.get)
        steps = best(lambda trial, k, context: k and not context and "random" not in trial)
        both = best(lambda trial, k, context: k and context and "random" not in trial)
        context = best(lambda trial, k, context: not k and context)
        chosen[cell] = {"none": none, **{role: {"trial": key[1], "k": key[2], "context": key[3], "dev": found[key]}
                                         for role, key in (("step", steps), ("step+context", both),
                                                           ("context", context))}}
    for cell in PROTOCOL["cells"]:
        one, n = chosen[cell], chosen[cell]["context"]["context"]
        order = {"context order": trials[one["context"]["trial"]].get("context order", "last")}
        contexts = sorted({n, one["step+context"]["context"]})

        def add(trial, label, cell=cell, order=order, contexts=contexts, **changes):
            test.append(trials[trial] | order | {"name": f"{trial} {label}", "cells": [cell], "context": contexts} |
                        changes)
        step, both = one["step"], one["step+context"]
        ks = sorted({step["k"], *([both["k"]] if both["trial"] == step["trial"] else [])})
        add(step["trial"], "nearest", k=ks, seeds=[0, 1, 2])
        add(step["trial"], "random", k=ks, records="random")
        add(step["trial"], "rounded to nearest", k=ks, rounding="nearest")
        for records in ("nearest", "random"):
            test.append({"name": f"none {records}", "method": "none", "k": [0], "context": contexts,
                         "records": records, "cells": [cell], **order})
        if both["trial"] != step["trial"]:
            add(both["trial"], "nearest", k=[both["k"]], seeds=[0, 1, 2])
        if cell.endswith("other"):
            model = cell.split("-")[0]
            for records, others in (("nearest", ("traces", "shuffled", "python")), ("random", ("traces",))):
                there = [f"{model}-{other}" for other in others]
                add(step["trial"], records, k=[step["k"]], cells=there, records=records)
                test.append({"name": f"none {records}", "method": "none", "k": [0], "context": contexts,
                             "records": records, "cells": there, **order})
    for trial in test:
        trial.pop("questions", None)
    PROTOCOL.update(chosen=chosen, test=test)
    write_json(ROOT / "bench/protocol.json", PROTOCOL)


def dev_trials(found, out):
    """The trials of dev, the most important first."""
    settings = {"k": [1, 4, 10], "context": [4], "questions": PROTOCOL["questions"]["dev"]}
    trials = [{"name": "none" if order == "last" else "none, nearest first", "method": "none", "k": [0],
               "context": [1, 2, 4, 10], "context order": order, "cells": PROTOCOL["cells"],
               "questions": settings["questions"]} for order in ("last", "first")]
    grid = {(trial["name"], trial["cells"][0]): trial for trial in trials_of("grid", out)}
    variants = []
    for cell in PROTOCOL["cells"]:
        best, with_context = {}, {}
        for (of, name, _, context), (mean, _) in found.items():
            if of == cell:
                table, method = with_context if context else best, grid[name, cell]["method"]
                table[method] = min(table.get(method, (9e9, "")), (mean, name))
        ranking = sorted(best, key=best.get)
        names = [best[method][1] for method in ranking[:4]]
        names += [with_context[method][1] for method in sorted(with_context, key=with_context.get)[:1]]
        trials += [grid[name, cell] | settings for name in dict.fromkeys(names)]
        few = {"questions": FEW}
        for method in ranking[:1]:
            trial = grid[best[method][1], cell] | settings
            variants += [trial | change | {"name": f"{trial['name']} {label}"} for label, change in (
                ("20", {"k": [20]}), ("random", {"records": "random"} | few),
                ("farthest first", {"order": "last"} | few), ("context form", {"form": "context", "k": [4]} | few),
                *((adapt, {"adapt": adapt} | few) for adapt in ("mlp", "down", "last:10")))]
        variants += [grid[best[method][1], cell] | settings | few for method in ranking[4:]]
    return trials + variants


def table(args):
    """Every trial of a phase against the model as it is: %, a clustered 95 % interval, how many became worse by 1 %."""
    from bench.gain import change
    data = json.loads((args.out / "cells.json").read_text())
    values = defaultdict(lambda: defaultdict(list))
    for row in rows_of(args.out / f"{args.trials[0]}.jsonl"):
        if "failed" not in row:
            values[row["cell"], row["trial"], row["k"], row["context"]][row["row"]].append(
                row["nats"] / np.log(2) / row["bytes"])  # the mean over seeds
    for cell in {key[0]: None for key in values}:
        none = next(found for key, found in values.items() if key[0] == cell and key[2:] == (0, 0))
        mean = np.mean([np.mean(found) for found in none.values()])
        print(f"\n{cell}: {mean:.4f} bits per byte as it is\n\n"
              "| trial | neighbours | in the prompt | % (95 %) | questions | worse by 1 % |\n|---|---|---|---|---|---|")
        lines = []
        for (of, trial, k, context), found in values.items():
            if of != cell or not (k or context):
                continue
            rows = [row for row in found if row in none]
            a, b = ([np.mean(one[row]) for row in rows] for one in (none, found))
            records = data["records"][next(iter(data["cells"][cell].values()))[0]["from"]]
            one = change({"bpb": [a]}, {"bpb": [b], "groups": [records[row].get("url", row) for row in rows]})
            lines.append((one["change"], f"| {trial} | {k} | {context} | {one['change']:+.2f} ({one['low']:+.2f} to "
                          f"{one['high']:+.2f}) | {one['n']} | {one['worse']} |"))
        print(*(line for _, line in sorted(lines)), sep="\n")


def moments(args):
    """OUT/second_moments.pt: AdamW's second moments of the last checkpoint of OUT/sft, in the order of the weights."""
    import torch.distributed.checkpoint as dcp
    path = max((args.out / "sft/checkpoints").glob("step-*"))
    model = load_model(SMOLLM2, "cpu")
    tensors = {f"exp_avg_sq/{name}": torch.empty(weight.shape) for name, weight in model.named_parameters()}
    dcp.load(tensors, checkpoint_id=path, no_dist=True)
    flat = torch.cat([tensor.view(-1) for tensor in tensors.values()])
    steps = json.loads((path / "state.json").read_text())["step"]
    with written_aside(args.out / "second_moments.pt") as aside:  # `run` may be waiting for it
        torch.save((flat / (1 - 0.999**steps)).bfloat16(), aside)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["split", "cells", "moments", "run", "choose", "table"], metavar="COMMAND")
    parser.add_argument("--data", metavar="FILE", help="split: MedQuAD's rows")
    parser.add_argument("--traces", metavar="FILE", help="cells: rows of long reasoning, for the leave-one-out cells")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--trials", nargs="+", default=["test"], help="run: grid, dev, test, variants; "
                        "grid:sft: its cells alone; table: one of them")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="run: no trial of a phase begins later")
    parser.add_argument("--workers", type=whole(1), default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    commands = {"split": split, "cells": cells, "moments": moments, "run": run_trials, "choose": choose, "table": table}
    commands[args.command](args)


if __name__ == "__main__":
    run_main(main)

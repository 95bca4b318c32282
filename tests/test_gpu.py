"""On a GPU: the same numbers as on a CPU, and what only a GPU has. Runs with `make test-gpu`."""
import copy
import json
import math
import os
import socket
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from conftest import (
    CONFIGS,
    ROOT,
    RUN_CONFIG,
    bits,
    random_examples,
    random_pairs,
    random_texts,
    reference_filter,
    same,
    tiny,
    tiny_encoder,
    tiny_examples,
    tiny_pair,
)
from ranks import ALONE, batches_for, metrics_in
from torch.distributed.device_mesh import init_device_mesh

import adapt
import dpo
import evaluate
import model as M
import retrieve
import sft
import snapshot
import train
import ttt
from data import collate, collate_pairs
from files import InputError
from generate import generate, generate_batch, recorded_decoder, sample, sample_rows
from parallel import World
from retrieve import Encoder
from rounding import stochastic_round_
from sft import loss_fn

pytestmark = pytest.mark.gpu


def on_gpu(model):
    """A copy of `model` on the GPU."""
    there = copy.deepcopy(model).cuda()
    assert (there.head.weight is there.embed.weight) == model.config.tie_word_embeddings
    return there


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.cpu() for name, p in model.named_parameters()}

# ----- model and generation ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_cpu(name, tmp_path):
    _, here = tiny_pair(name, tmp_path)
    there = on_gpu(here)
    ids = torch.randint(0, 300, (2, 200), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        exact = here(ids)
        torch.testing.assert_close(there(ids.cuda()).cpu(), exact, rtol=1e-4, atol=1e-4)
        rounded = [model.to(torch.bfloat16)(ids.to(model.norm.weight.device)).cpu() for model in (there, here)]
    errors = [(half.float() - exact).norm() / exact.norm() for half in rounded]
    assert errors[0] <= 1.25 * errors[1] < 0.06, errors


@pytest.mark.parametrize("name", CONFIGS)
def test_recorded_decoding_gives_the_tokens_of_the_cpu_and_of_changed_weights(name, tmp_path):
    _, here = tiny_pair(name, tmp_path)
    there = on_gpu(here)
    for _ in range(2):
        for seed in range(5):
            prompt = torch.randint(0, 300, (20,), generator=torch.Generator().manual_seed(seed)).tolist()
            greedy = partial(generate, ids=prompt, max_new_tokens=100, temperature=0)
            assert list(greedy(there)) == list(greedy(here))
        for model in (here, there):  # an adapted model generates with what it has now
            for parameter in model.parameters():
                parameter.data.mul_(1.25)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_recorded_step_sees_weights_changed_after_it_was_recorded(name, tmp_path):
    there = on_gpu(tiny_pair(name, tmp_path)[1])
    ids = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(5)).cuda()
    cache = M.KVCache(there, 12)
    cache.kv.fill_(math.nan)  # what fresh memory may hold
    with torch.no_grad():
        there(ids[:, :5], cache=cache)
        step = recorded_decoder(there, cache)
        for position in range(5, 12):
            torch.testing.assert_close(step(int(ids[0, position])), there(ids[:, :position + 1])[0, -1],
                                       rtol=1e-4, atol=1e-5)
        for parameter in there.parameters():
            parameter.mul_(1.5)
        with pytest.raises(IndexError, match="full"):
            step(7)
        cache.length = 0
        torch.testing.assert_close(step(7), there(torch.tensor([[7]], device="cuda"))[0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_recorded_batch_gives_the_tokens_of_each_text_alone(name, temperature, tmp_path):
    """Texts of different lengths; rows leave the batch, and fewer are recorded anew, down to one."""
    there = on_gpu(tiny_pair(name, tmp_path)[1])
    prompts = [torch.randint(0, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist()
               for n in (60, 1, 7, 30, 59, 12, 20, 3)]
    settings = {"max_new_tokens": 40, "temperature": temperature}
    free = [list(generate(there, ids, **settings)) for ids in prompts]
    assert generate_batch(there, prompts, **settings) == free
    settings["stop_ids"] = {tokens[5 * i] for i, tokens in enumerate(free[:7])}
    stopped = [list(generate(there, ids, **settings)) for ids in prompts]
    assert generate_batch(there, prompts, **settings) == stopped != free


def test_a_recorded_batch_in_bf16_is_as_near_to_fp32_as_the_plain_forward(tmp_path):
    half = on_gpu(tiny_pair("untied, llama3 scaling", tmp_path)[1]).bfloat16()
    exact = copy.deepcopy(half).float()
    ids = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(6)).cuda()
    cache = M.KVCache(half, 40, 3)
    cache.kv.fill_(math.nan)  # what fresh memory may hold
    with torch.no_grad():
        step = recorded_decoder(half, cache, [0, 0, 0])
        junk = [torch.full((n, 1), 10**9, device="cuda") for n in (1, 3) for _ in range(500)]  # in memory set free
        expected, plain = exact(ids), half(ids)
        stepped = torch.stack([step(ids[:, t].tolist()).clone() for t in range(40)], 1)
    errors = [(logits.float() - expected).norm() / expected.norm() for logits in (stepped, plain)]
    assert errors[0] <= 1.25 * errors[1] < 0.05 and len(junk) == 1000, errors


def test_recorded_decoding_in_bf16_is_as_near_to_fp32_as_the_plain_forward(tmp_path):
    half = on_gpu(tiny_pair("untied, llama3 scaling", tmp_path)[1]).bfloat16()
    exact = copy.deepcopy(half).float()
    ids = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(6)).cuda()
    cache = M.KVCache(half, 40)
    with torch.no_grad():
        step = recorded_decoder(half, cache)
        expected, plain = exact(ids)[0], half(ids)[0]
        stepped = torch.stack([step(token).clone() for token in ids[0].tolist()])
    errors = [(logits.float() - expected).norm() / expected.norm() for logits in (stepped, plain)]
    assert errors[0] <= 1.25 * errors[1] < 0.05, errors


def test_sampling_on_the_gpu():
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])
    generator, n = torch.Generator("cuda").manual_seed(8), 5_000
    drawn = torch.tensor([sample(logits.cuda(), generator, 1.0, top_p=0.95) for _ in range(n)])
    found, expected = drawn.bincount(minlength=5) / n, reference_filter(logits, 1.0, 0.95, 0, 0.0).float()
    assert (found - expected).abs().max() < 4 * 0.5 / n ** 0.5 and found[3] == expected[3] == 0
    for temperature in (0, 1.0):
        with pytest.raises(InputError, match="not finite"):
            sample(torch.tensor([0.0, math.nan, 1.0], device="cuda"), generator, temperature)
    assert torch.ones(1, device="cuda").item() == 1  # no assertion on the device has ended the process's use of it


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_the_tokens_of_a_batch_are_waited_for_once(temperature):
    logits = torch.randn(3, 5000, device="cuda") * 5  # more than 512, and the nucleus among the likeliest of them
    generators = [torch.Generator("cuda").manual_seed(0) for _ in logits]
    draw = partial(sample_rows, logits, generators, temperature, top_p=0.95, top_k=0, min_p=0.0)
    draw()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            draw()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1, [str(one.message) for one in waits]


def test_stochastic_rounding_is_unbiased_on_the_gpu():
    exact = torch.randn(1 << 20, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    low = (exact.view(torch.int32) & -0x10000).view(torch.float32)
    high = ((exact.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    generator, n, total = torch.Generator("cuda").manual_seed(1), 64, torch.zeros_like(exact)
    for _ in range(n):
        target = torch.empty_like(exact, dtype=torch.bfloat16)
        stochastic_round_(target, exact, generator)
        assert ((target == low) | (target == high)).all()
        total += target.float()
    error = ((total / n - exact) / (high - low)).mean()
    assert abs(error) < 4 * 0.5 / (n * len(exact)) ** 0.5
    exact[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    stochastic_round_(target, exact, generator)
    torch.testing.assert_close(target[:3].float(), exact[:3], equal_nan=True)

# ----- test-time training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["signsgd", "adam", "sgd"])
def test_fp32_steps_are_those_of_the_cpu(optimizer):
    """lr 1e-3, and small gradients apart: where g is near 0, the sign of a last bit would decide a whole step."""
    here = tiny(torch.float32)
    there = on_gpu(here)
    for model in (here, there):
        generator = torch.Generator(model.norm.weight.device)
        adapt.take_steps(model, tiny_examples(), adapt.make_update(optimizer, 1e-3, generator, eps=1e-3), 2)
    for ours, theirs in zip(there.parameters(), here.parameters()):
        torch.testing.assert_close(ours.detach().cpu(), theirs.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("snapshot_device", ["cpu", "cuda"])
@pytest.mark.parametrize("recompute", [False, True])
def test_everything_is_as_it_was_on_the_gpu(snapshot_device, recompute):
    model = tiny(tied=False).cuda()
    before, rng = bits(model), torch.cuda.get_rng_state()
    ids = list(range(20))

    def ask():
        with adapt.adapted(model, tiny_examples(), lr=1e-3, snapshot_device=snapshot_device,
                         activation_checkpointing=recompute) as report:
            assert report.applied and report.loss_after < report.loss_before and not same(model, before)
            torch.randn(3, device="cuda")
            return list(generate(model, ids, max_new_tokens=20, temperature=1.0))
    first = ask()
    held = torch.cuda.memory_allocated()
    for _ in range(20):
        assert ask() == first
    assert same(model, before) and torch.equal(torch.cuda.get_rng_state(), rng)
    assert torch.cuda.memory_allocated() <= held and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, torch.OutOfMemoryError])
@pytest.mark.parametrize("point", ["copied", "make_update", "block"])
def test_restored_whatever_happens_on_the_gpu(kind, point, monkeypatch):
    """In the middle of backward, which runs in a thread of its own, and in the block."""
    model, calls = tiny().cuda(), []
    before = bits(model)

    def struck(function):
        def striking(*args):
            calls.append(1)
            if len(calls) == 5:
                raise kind
            return function(*args)
        return striking
    if point == "copied":
        monkeypatch.setattr(snapshot, "copied", struck(snapshot.copied))
    if point == "make_update":
        make_update = adapt.make_update
        monkeypatch.setattr(ttt, "make_update", lambda *args: struck(make_update(*args)))
    with pytest.raises(kind), adapt.adapted(model, tiny_examples(), lr=1e-2):
        assert point == "block"
        raise kind
    assert same(model, before) and model.unusable is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("optimizer", ["signsgd", "adam", "sgd"])
def test_a_gradient_that_is_not_finite_is_noticed_on_the_gpu(optimizer, value):
    model = tiny().cuda()
    before = bits(model)
    model.layers[1].mlp.down.weight.register_hook(lambda grad: grad.index_fill(0, torch.tensor([3]).cuda(), value))
    with adapt.adapted(model, tiny_examples(), optimizer=optimizer) as report:
        assert not report.applied and "gradient" in report.reason and same(model, before)
    assert same(model, before)


def test_the_snapshot_waits_where_there_is_room(monkeypatch):
    model, copies, copied = tiny().cuda(), [], snapshot.copied
    size = 2 * sum(weight.numel() for weight in model.parameters())
    monkeypatch.setattr(snapshot, "copied", lambda *args: copies.append(copied(*args)) or copies[-1])
    monkeypatch.setattr(torch.cuda, "memory_reserved", torch.cuda.memory_allocated)
    for optimizer, free, place in (("signsgd", 2 * size + 1, "cuda"), ("signsgd", 2 * size, "cpu"),
                                   ("adam", 6 * size + 1, "cuda"), ("adam", 6 * size, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 1 << 40))
        before = bits(model)
        with adapt.adapted(model, tiny_examples(), lr=1e-2, optimizer=optimizer):
            assert not same(model, before)
        assert same(model, before)
        assert all(copy.device.type == place and copy.is_pinned() == (place == "cpu") for copy in copies)
        copies.clear()


def test_two_texts_at_once_and_one_left_half_read():
    """Each with its own graph, in threads and in turns."""
    models = [tiny(seed=seed).cuda() for seed in range(2)]
    ids = list(range(20))

    def ask(model):
        return list(generate(model, ids, max_new_tokens=30, temperature=0))
    alone = [ask(model) for model in models]
    left = generate(models[0], ids, max_new_tokens=30, temperature=0)
    first = [next(left) for _ in range(10)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, models * 5)) == alone * 5
    assert first + list(left) == alone[0]


def test_the_digest_sees_every_bit_on_the_gpu():
    model = tiny().cuda()
    before = snapshot.digest(model)
    for weight in model.parameters():
        word = weight.data.view(-1).view(torch.int16)
        for place in (0, len(word) // 2, -1):
            word[place] ^= 1
            assert snapshot.digest(model) != before
            word[place] ^= 1
    assert snapshot.digest(model) == before


def test_the_bf16_step_is_kept_on_the_gpu():
    """The mean of many stochastically rounded steps is the fp32 step; rounding to nearest would leave 0 of most."""
    whole = on_gpu(tiny(torch.bfloat16))
    exact = copy.deepcopy(whole).float()
    start = [weight.detach().clone() for weight in exact.parameters()]
    adapt.take_steps(exact, tiny_examples(1), adapt.make_update("signsgd", 1e-5, torch.Generator("cuda")), 1)
    moved, wanted = 0, sum((now - then).abs().sum() for now, then in zip(exact.parameters(), start))
    for seed in range(8):
        half = copy.deepcopy(whole)
        update = adapt.make_update("signsgd", 1e-5, torch.Generator("cuda").manual_seed(seed))
        adapt.take_steps(half, tiny_examples(1), update, 1)
        moved += sum(((now.float() - then) * (target - then).sign()).sum() for now, then, target in
                     zip(half.parameters(), start, exact.parameters()))
    assert 0.8 < moved / 8 / wanted < 1.2

# ----- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sft_gradients_are_those_of_the_cpu(checkpointing):
    here = M.Llama(CONFIG_300).init_weights(1)
    there = on_gpu(here)
    for layer in (*here.layers, *there.layers):
        layer.checkpointing = checkpointing
    batch = collate(random_examples([30, 7, 31, 120, 5]))
    found = gradients(there, loss_fn(there, train.on_device(batch, torch.device("cuda")))[0])
    for name, expected in gradients(here, loss_fn(here, batch)[0]).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_dpo_gradients_are_those_of_the_cpu():
    here = M.Llama(CONFIG_300).init_weights(1)
    there = on_gpu(here)
    batch = collate_pairs(random_pairs([(7, 5, 9), (3, 12, 4), (20, 6, 6)]))
    logps = dpo.pair_logps(here, batch), dpo.pair_logps(there, train.on_device(batch, torch.device("cuda")))
    torch.testing.assert_close(logps[1].detach().cpu(), logps[0].detach(), rtol=1e-4, atol=1e-3)
    found = gradients(there, (logps[1][:, 0] - logps[1][:, 1]).sum())
    for name, expected in gradients(here, (logps[0][:, 0] - logps[0][:, 1]).sum()).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


CONFIG_300 = replace(RUN_CONFIG, vocab_size=300)


@pytest.fixture
def nccl():
    """The World of one rank that is sharded all the same: FSDP2 over NCCL."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl", rank=0, world_size=1)
    yield World(0, 1, torch.device("cuda:0"), init_device_mesh("cuda", (1,), mesh_dim_names=("shard",)))
    dist.destroy_process_group()


def trained(folder, world, dtype=torch.float32, out=None, resume=None):
    """([loss of each step], Training) of 6 steps, a checkpoint after 3; `resume`: only the steps after that one."""
    training, losses = train.load_training(folder, world, dtype=dtype), []
    if resume:
        train.load_checkpoint(training, resume, json.loads((resume / "state.json").read_text()))

    def noting(*args):
        row, *more = take_step(*args)
        losses.append(row["loss"])
        assert world.device.type == "cpu" or "mfu" in row
        return row, *more
    take_step = train.take_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "take_step", noting)
        train.fit(training, batches_for(world), loss_fn, steps=6, lr=1e-3, out=out, save_every=3)
    return losses, training


def test_a_run_sharded_over_nccl_is_that_of_one_process_and_of_the_cpu(tiny_folder, nccl):
    gpu = World(0, 1, torch.device("cuda:0"))
    runs = [trained(tiny_folder, world) for world in (ALONE, gpu, nccl)]
    for losses, training in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-5)
        for name, master in training.masters.items():
            # AdamW makes of a gradient's last bits, where it is near 0, a part of a step of 1e-3
            torch.testing.assert_close(master.detach().cpu(), runs[0][1].masters[name].detach(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_bf16_run_goes_on_where_it_was_stopped(sharded, nccl, tiny_folder, tmp_path):
    world = nccl if sharded else World(0, 1, torch.device("cuda:0"))
    losses, _ = trained(tiny_folder, world, torch.bfloat16, tmp_path)
    again, resumed = trained(tiny_folder, world, torch.bfloat16, resume=tmp_path / "checkpoints/step-000003")
    assert resumed.step == 6 and losses[3:] == pytest.approx(again, rel=1e-3)


def test_the_programs_run_on_the_gpu(base, tmp_path, capsys):
    """SFT → DPO → index → a question; each starts from what the one before has written."""
    demo = ROOT / "demo/data"
    small = ["--device", "cuda", "--max-steps", "2", "--batch-size", "4", "--val-rows", "2", "--max-length", "512"]
    sft.main(["--stage", "1", "--model", str(base), "--data", str(demo / "sft_all.jsonl"),
              "--out", str(tmp_path / "sft"), *small])
    dpo.main(["--model", str(tmp_path / "sft/model"), "--data", str(demo / "pairs.jsonl"),
              "--out", str(tmp_path / "dpo"), *small])
    rows = metrics_in(tmp_path / "dpo")
    assert rows[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-2)  # policy and reference agree
    assert 0 < rows[-1]["peak_memory_gb"] < 4
    tiny_encoder(tmp_path / "encoder")
    retrieve.main(["build", "--data", str(demo / "traces.jsonl"), "--encoder", str(tmp_path / "encoder"),
                   "--out", str(tmp_path / "index"), "--device", "cuda"])
    capsys.readouterr()
    ttt.main(["--question", "Why does the heart fail?", "--model", str(tmp_path / "dpo/model"), "--device", "cuda",
              "--index", str(tmp_path / "index"), "--max-new-tokens", "20", "--json"])
    answer = json.loads(capsys.readouterr().out)
    assert answer["ttt"]["applied"] and answer["restored"]
    assert answer["ttt"]["loss_after"] < answer["ttt"]["loss_before"]


def test_an_evaluation_on_the_gpu_is_that_of_the_cpu(base, tmp_path, capsys):
    """In fp32: bits per byte of every arm, and the texts that are written."""
    demo, arms = ROOT / "demo/data", ["--arms", "none", "nearest:k=2,optimizer=sgd", "context:k=1"]
    tiny_encoder(tmp_path / "encoder")
    retrieve.main(["build", "--data", str(demo / "traces.jsonl"), "--encoder", str(tmp_path / "encoder"),
                   "--out", str(tmp_path / "index"), "--device", "cpu"])
    questions = [{"question": f"What is {text}?", "options": {"A": "a cough", "B": "a cure"}, "answer_idx": "B"}
                 for text in random_texts(5)]
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    for measure, data in (("bpb", ["sft", "--data", str(demo / "sft_all.jsonl")]),
                          ("loglik", ["choice", "--data", str(tmp_path / "choice.jsonl")]),
                          ("generate", ["choice", "--data", str(tmp_path / "choice.jsonl"), "--max-new-tokens", "30"])):
        rows = {}
        for device in ("cpu", "cuda"):
            out = tmp_path / f"{measure}-{device}"
            evaluate.main(["--benchmark", *data, "--measure", measure, "--model", str(base), "--out", str(out), *arms,
                           "--index", str(tmp_path / "index"), "--limit", "5", "--dtype", "fp32", "--device", device])
            rows[device] = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
        for here, there in zip(rows["cpu"], rows["cuda"]):
            if measure == "bpb":
                assert there["bpb"] == pytest.approx(here["bpb"], rel=1e-4)
            elif measure == "loglik":
                assert there["logps"] == pytest.approx(here["logps"], abs=1e-3)
            else:
                assert there["text"] == here["text"] and there["tokens"] == 30

# ----- the encoder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_vectors_are_those_of_the_cpu(pooling, tmp_path):
    tiny_encoder(tmp_path / "encoder", pooling)
    vectors = [Encoder.from_dir(tmp_path / "encoder", device).encode(random_texts(300)) for device in ("cpu", "cuda")]
    assert (vectors[0] * vectors[1]).sum(1).min() > 0.99999

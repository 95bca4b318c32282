"""model.py beside transformers: logits, the cache, gradients, and folders written and read again."""
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers
from conftest import CONFIGS, ROOT, TEXTS, tiny_pair
from safetensors import safe_open

import fast
import model as M
from weights import config_json

# ----- forward -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("start", [0, 16_100])
def test_logits_equal_transformers_on_tiny_models(name, start, tmp_path):
    theirs, ours = tiny_pair(name, tmp_path)
    ids = torch.randint(0, 300, (2, 50), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(start, start + 50)
    with torch.no_grad():
        expected = theirs(ids, position_ids=positions[None].expand(2, -1)).logits
        assert (ours(ids, positions=positions) - expected).abs().max() <= 1e-5


def test_llama3_scaling_is_not_the_plain_rotation():
    """So that the comparison beyond 16,000 could fail: the scaled angles differ from plain ones by radians there."""
    positions = torch.tensor([16_100])
    scaled, _ = M.rotary_table(M.LlamaConfig(), positions)
    plain, _ = M.rotary_table(replace(M.LlamaConfig(), rope_scaling=None), positions)
    assert (scaled - plain).abs().max() > 1


def test_rotation_is_a_product_of_complex_numbers():
    """Channels i and i + C/2 are the real and the imaginary part of a number that is turned by the position's angle."""
    generator = torch.Generator().manual_seed(0)
    config, positions = replace(M.LlamaConfig(), head_dim=8, rope_scaling=None), torch.tensor([0, 1, 7, 20])
    x, grad = (torch.randn(2, 4, 3, 8, generator=generator, dtype=torch.float64) for _ in range(2))  # [B, T, heads, C]
    angle = positions[:, None, None] * torch.tensor([500000.0 ** -(i / 4) for i in range(4)], dtype=torch.float64)

    def turned(numbers, by):
        product = torch.complex(*numbers.chunk(2, -1)) * torch.polar(torch.ones_like(by), by)
        return torch.cat([product.real, product.imag], -1)
    own = x.float().requires_grad_()
    found = M.rotate(own, *M.rotary_table(config, positions))
    torch.testing.assert_close(found.double(), turned(x, angle), rtol=1e-5, atol=1e-5)
    back, = torch.autograd.grad(found, own, grad.float())  # by the opposite angle
    torch.testing.assert_close(back.double(), turned(grad, -angle), rtol=1e-5, atol=1e-5)


def test_logits_equal_transformers_on_the_real_model(real_pair):
    theirs, ours, tokenizer = real_pair
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([tokenizer.encode(text)])
            assert (ours(ids) - theirs(ids).logits).abs().max() <= 2e-4, text


def test_a_prompt_fed_in_pieces_through_the_cache_gives_the_same_logits(tmp_path):
    _, ours = tiny_pair("untied, llama3 scaling", tmp_path)
    ids = torch.randint(0, 300, (1, 30), generator=torch.Generator().manual_seed(3))
    cache = M.KVCache(ours, 30)
    with torch.no_grad():
        pieces = torch.cat([ours(part, cache=cache) for part in ids.split([11, 1, 9, 9], dim=1)], 1)
        torch.testing.assert_close(pieces, ours(ids), rtol=1e-5, atol=1e-5)

# ----- labels and gradients ------------------------------------------------------------------------------------------


def test_label_logps_equal_the_full_softmax_and_so_do_the_gradients(tmp_path, monkeypatch):
    """`model(ids, labels=…)` never forms all logits; here they are formed, and both must agree to fp32 rounding."""
    _, ours = tiny_pair("untied, llama3 scaling", tmp_path)
    ids, labels = torch.randint(0, 300, (2, 2, 40), generator=torch.Generator().manual_seed(2))
    labels[:, :15] = -100
    full = ours(ids).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    expected = torch.autograd.grad(full.sum(), ours.parameters())
    for size, kept in ((300, 2**27), (7, 2**27), (7, 0)):  # one block of the vocabulary; many; computed again
        monkeypatch.setattr(fast, "KEPT_LOGITS", kept)
        blocks = [slice(start, start + size) for start in range(0, 300, size)]
        monkeypatch.setattr(fast, "blocks_of_words", lambda h, weight, blocks=blocks: blocks)
        logps = ours(ids, labels=labels)
        found = torch.autograd.grad(logps.sum(), ours.parameters())
        torch.testing.assert_close(logps, full, rtol=1e-5, atol=1e-5)
        for f, e in zip(found, expected):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


def test_the_tied_weight_adds_up_the_gradients_of_both_its_ends(tmp_path):
    """Those that an embedding and a head of the same numbers get apart; and it adds to a gradient that is there."""
    _, ours = tiny_pair("tied", tmp_path)
    apart = M.Llama(replace(ours.config, tie_word_embeddings=False))
    apart.load_state_dict(ours.state_dict())
    assert apart.head.weight is not apart.embed.weight
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(3))
    apart(ids, labels=ids).sum().backward()
    expected = apart.embed.weight.grad + apart.head.weight.grad
    ours.embed.weight.grad = torch.ones_like(expected)
    ours(ids, labels=ids).sum().backward()
    assert ours.head.weight.grad is ours.embed.weight.grad
    torch.testing.assert_close(ours.embed.weight.grad, expected + 1, rtol=1e-5, atol=1e-5)


def test_no_label_at_all_gives_zero_and_a_zero_gradient(tmp_path):
    _, ours = tiny_pair("tied", tmp_path)
    ids = torch.ones(1, 5, dtype=torch.int64)
    logps = ours(ids, labels=torch.full_like(ids, -100))
    logps.sum().backward()
    assert logps.eq(0).all() and all(p.grad is None or p.grad.eq(0).all() for p in ours.parameters())


def test_activation_checkpointing_changes_nothing(tmp_path, monkeypatch):
    _, ours = tiny_pair("tied", tmp_path)
    ids, gradients, computed, compute = torch.arange(30)[None], [], [], M.Block.compute
    monkeypatch.setattr(M.Block, "compute", lambda self, *args: computed.append(1) or compute(self, *args))
    for on in (False, True):
        for layer in ours.layers:
            layer.checkpointing = on
        gradients.append(torch.autograd.grad(ours(ids, labels=ids).sum(), ours.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and len(computed) == 3 + 2 * 3


def test_bf16_weights_on_a_cpu_without_bf16_products_are_computed_in_fp32(tmp_path, monkeypatch):
    """The same as an fp32 model with these weights, forward and backward (gradients rounded to bf16)."""
    monkeypatch.setattr(M, "has_fast_bf16", lambda device: False)
    _, ours = tiny_pair("untied, llama3 scaling", tmp_path)
    for parameter in ours.parameters():
        parameter.data = parameter.data.bfloat16().float()
    half = M.Llama(ours.config).to(torch.bfloat16)
    half.load_state_dict(ours.state_dict())
    ids = torch.arange(40)[None]
    outputs = [m(ids, labels=ids) for m in (ours, half)]
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)
    for output in outputs:
        output.sum().backward()
    for a, b in zip(ours.parameters(), half.parameters()):
        torch.testing.assert_close(a.grad.bfloat16(), b.grad, rtol=1.6e-2, atol=1e-3)

# ----- load and save -------------------------------------------------------------------------------------------------


def test_config_survives_a_round_trip(tmp_path):
    for config in (M.LlamaConfig(), M.LlamaConfig(rope_scaling=None, tie_word_embeddings=True, head_dim=64)):
        (tmp_path / "config.json").write_text(json.dumps(config_json(config)))
        assert M.LlamaConfig.from_json(tmp_path / "config.json") == config
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        assert theirs.rope_parameters["rope_type"] == ("llama3" if config.rope_scaling else "default")


def test_saved_model_loads_in_transformers_and_here_and_is_the_same(tmp_path):
    for name in CONFIGS:
        theirs, ours = tiny_pair(name, tmp_path / "a")
        M.save_model(ours, tmp_path / "one", source=tmp_path / "a")
        M.save_model(ours, tmp_path / "shards", max_shard_bytes=60_000)
        assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
        for folder in ("one", "shards"):
            again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / folder, dtype=torch.float32)
            for (key, a), (_, b) in zip(theirs.state_dict().items(), again.state_dict().items()):
                assert torch.equal(a, b), key
            for a, b in zip(ours.parameters(), M.load_model(tmp_path / folder, dtype=torch.float32).parameters()):
                assert torch.equal(a, b)
        if name == "tied":
            with safe_open(tmp_path / "one/model.safetensors", "pt") as file:
                assert "lm_head.weight" not in file.keys()  # noqa: SIM118
            index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
            assert "lm_head.weight" not in index["weight_map"]


def test_loading_fp32_as_bf16_rounds_stochastically(tmp_path):
    _, ours = tiny_pair("tied", tmp_path)
    exact = ours.embed.weight.double()
    nearest = exact.bfloat16()
    loaded = M.load_model(tmp_path, dtype=torch.bfloat16).embed.weight
    assert 0.2 < (loaded != nearest).float().mean() < 0.3  # a quarter lands on the farther neighbour
    assert abs((loaded.double() - exact).mean()) < 3e-5
    assert torch.equal(loaded, M.load_model(tmp_path, dtype=torch.bfloat16).embed.weight)


def test_loading_needs_little_more_than_the_weights(tmp_path):
    """Peak resident memory over that before loading ≤ 1.15 × the weights, for a model of 400 MB in fp32 and bf16."""
    config = M.LlamaConfig(vocab_size=20_000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6,
                           num_attention_heads=16, num_key_value_heads=4, head_dim=64, rope_scaling=None)
    model = M.Llama(config).init_weights()
    M.save_model(model, tmp_path / "fp32")
    code = ("import sys, torch; sys.path.insert(0, sys.argv[1]); import model as M\n"
            "status = lambda: open('/proc/self/status').read().split('VmHWM:')[1].split()[0]\n"
            "peak = lambda: int(status()) * 1024\n"
            "with torch.device('meta'): M.Llama(M.LlamaConfig())  # what torch loads for its first one is not ours\n"
            "open('/proc/self/clear_refs', 'w').write('5'); before = peak()\n"
            "m = M.load_model(sys.argv[2], dtype=getattr(torch, sys.argv[3]))\n"
            "print((peak() - before) / sum(p.numel() * p.element_size() for p in m.parameters()))")
    for dtype in ("float32", "bfloat16"):
        out = subprocess.run([sys.executable, "-c", code, ROOT, tmp_path / "fp32", dtype], capture_output=True,
                             text=True)
        assert out.returncode == 0, out.stderr
        assert float(out.stdout) <= 1.15, (dtype, out.stdout)

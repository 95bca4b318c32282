"""model.py beside transformers: logits, generation, files; and the rounding on which everything here stands."""
import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model as M
from data import Tokenizer, render_chat
from files import InputError

TINY = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
CONFIGS = {
    "untied, llama3 scaling": {**TINY, "tie_word_embeddings": False, "rope_parameters": LLAMA3,
                               "max_position_embeddings": 131072},
    "tied": {**TINY, "tie_word_embeddings": True},
    "head_dim is not width / heads": {**TINY, "head_dim": 24, "num_key_value_heads": 4},
}
TEXTS = ["What causes chest pain?", "The patient is a 67-year-old man with fever, cough and confusion.",
         "1 + 1 =", "Metformin lowers glucose because", "甲状腺功能亢进的症状是什么?", 
         "def bmi(weight, height):\n    return", "🙂 ok",
         "Name three causes of hyponatremia.", "Once upon a time", "List the cranial nerves in order:", "HbA1c 9.2 %",
         "A 24-year-old woman at 39 weeks of gestation", "Insulin resistance means", "## Thought\n\nOkay,",
         "Why is the sky blue?", "Wie viele Knochen hat der Mensch?", "Warfarin and vitamin K", "SELECT name FROM",
         "In summary, the treatment of anaphylaxis is", "Dr. Smith said: \"Take two tablets"]


def tiny_pair(name, folder, seed=0):
    """(transformers' model, ours) with the same random weights, in fp32."""
    torch.manual_seed(seed)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIGS[name])).eval()
    theirs.save_pretrained(folder)
    return theirs, M.load_model(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def real_pair(smollm2):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    return theirs, M.load_model(smollm2, dtype=torch.float32), Tokenizer.from_dir(smollm2)


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


def test_logits_equal_transformers_on_the_real_model(real_pair):
    theirs, ours, tokenizer = real_pair
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([tokenizer.encode(text)])
            assert (ours(ids) - theirs(ids).logits).abs().max() <= 2e-4, text


def test_parameter_count_of_llama_3_1_8b():
    assert M.parameter_count(M.LlamaConfig()) == 8_030_261_248


def test_label_logps_equal_the_full_softmax_and_so_do_the_gradients(tmp_path, monkeypatch):
    """`model(ids, labels=…)` never forms all logits; here they are formed, and both must agree to fp32 rounding."""
    _, ours = tiny_pair("untied, llama3 scaling", tmp_path)
    ids, labels = torch.randint(0, 300, (2, 2, 40), generator=torch.Generator().manual_seed(2))
    labels[:, :15] = -100
    full = ours(ids).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    expected = torch.autograd.grad(full.sum(), ours.parameters())
    for size, kept in ((300, 2**27), (7, 2**27), (7, 0)):  # one block of the vocabulary; many; computed again
        monkeypatch.setattr(M, "KEPT_LOGITS", kept)
        blocks = [slice(start, start + size) for start in range(0, 300, size)]
        monkeypatch.setattr(M.TokenLogps, "blocks", staticmethod(lambda h, weight, blocks=blocks: blocks))
        logps = ours(ids, labels=labels)
        found = torch.autograd.grad(logps.sum(), ours.parameters())
        torch.testing.assert_close(logps, full, rtol=1e-5, atol=1e-5)
        for f, e in zip(found, expected):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


def test_a_confident_token_keeps_its_small_gradient_in_bf16():
    """p(label) = 1 - 0.00017: its gradient p - 1 is computed before it is rounded; bf16 of p alone would be 1."""
    h, weight = torch.tensor([[8.0]]).bfloat16(), torch.zeros(4096, 1, dtype=torch.bfloat16)
    weight[5] = 2.125  # logits 17 and 0
    h.requires_grad_()
    M.token_logps(h, weight, torch.tensor([5])).sum().backward()
    missing = 4095 / (math.exp(17) + 4095)
    assert h.grad.item() == pytest.approx(2.125 * missing, rel=0.02)


@pytest.mark.parametrize("kept_keys", [512, 0])
@pytest.mark.parametrize("queries, keys, heads, key_heads", [
    (300, 300, 9, 3), (1, 1, 3, 3), (128, 128, 3, 3), (50, 300, 6, 3), (129, 130, 3, 3), (140, 140, 4, 1)])
def test_blocked_attention_is_masked_attention(queries, keys, heads, key_heads, kept_keys, monkeypatch):
    """Output and gradients in fp32 against one softmax over all scores; p kept and computed again."""
    monkeypatch.setattr(M, "KEPT_KEYS", kept_keys)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, length, 16, generator=generator).requires_grad_()
               for n, length in ((heads, queries), (key_heads, keys), (key_heads, keys)))
    grad = torch.randn(q.shape, generator=generator)
    scores = q @ k.repeat_interleave(heads // key_heads, 1).mT / 4
    seen = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    expected = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(heads // key_heads, 1)
    found = M.BlockedAttention.apply(q, k, v)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for own, other in zip(torch.autograd.grad(found, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad)):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sharpness, most", [(1, 0.006), (3, 0.025)])
def test_blocked_attention_in_bf16_is_as_exact_as_two_bf16_products(sharpness, most):
    """How far output and gradients are from fp32's, on strided views as the model makes them: with scores of deviation
    1 at most twice as far as torch's kernel, with sharp ones (9) no further than attention written out in bf16."""
    heads = torch.randn(1, 300, 15, 64, generator=torch.Generator().manual_seed(0))
    heads[:, :, :12] *= sharpness
    heads = heads.transpose(1, 2).split([9, 3, 3], 1)

    def outcomes(attention, dtype):
        q, k, v = (x.bfloat16().to(dtype).requires_grad_() for x in heads)
        out = attention(q, k, v)
        return out, *torch.autograd.grad(out, (q, k, v), heads[0].to(dtype) / sharpness)

    def torchs(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def written_out(q, k, v):
        scores = q @ k.repeat_interleave(3, 1).mT * 0.125
        later = torch.ones(300, 300, dtype=torch.bool).triu(1)
        return scores.masked_fill(later, -torch.inf).softmax(-1) @ v.repeat_interleave(3, 1)
    exact = outcomes(torchs, torch.float32)
    ours, theirs, plain = ([((own - e).norm() / e.norm()).item() for own, e in zip(outcomes(f, torch.bfloat16), exact)]
                           for f in (M.causal_attention, torchs, written_out))
    assert max(ours) < most and all(own < 1.1 * other for own, other in zip(ours, plain)), (ours, plain)
    assert sharpness > 1 or all(own < 2 * other for own, other in zip(ours, theirs)), (ours, theirs)


def test_norm_and_gate_keep_little_and_lose_nothing():
    """The hand-written backward passes against autograd's through the plain formulas, in fp32 and from bf16 weights."""
    generator = torch.Generator().manual_seed(0)
    x, gate_up, norm, weight, grad = (torch.randn(shape, generator=generator) for shape in
                                      ((2, 5, 32), (2, 5, 64), (32,), (24, 32), (2, 5, 24)))
    for dtype in (torch.float32, torch.bfloat16):
        norm, weight = norm.to(dtype), weight.to(dtype)
        cases = [(lambda x, n, w: M.NormLinear.apply(x, n, 1e-5, w),
                  lambda x, n, w: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * n @ w.T, (x, norm, weight)),
                 (M.GatedLinear.apply, lambda x, w: (F.silu(x[..., :32]) * x[..., 32:]) @ w.T, (gate_up, weight))]
        for own, plain, inputs in cases:
            inputs = [one.clone().requires_grad_() for one in inputs]
            exact = [one.detach().float().requires_grad_() for one in inputs]
            found, expected = own(*inputs), plain(*exact)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            gradients = torch.autograd.grad(expected, exact, grad)
            for f, e in zip(torch.autograd.grad(found, inputs, grad), gradients):
                torch.testing.assert_close(f.float(), e, rtol=1e-2 if f.dtype == torch.bfloat16 else 1e-5, atol=1e-4)
            if dtype == torch.bfloat16:  # all in bf16, as it is computed where bf16 is fast
                inputs = [one.detach().bfloat16().requires_grad_() for one in inputs]
                found = own(*inputs)
                assert (found.float() - expected).norm() < 0.01 * expected.norm()
                for f, e in zip(torch.autograd.grad(found, inputs, grad.bfloat16()), gradients):
                    assert (f.float() - e).norm() < 0.01 * e.norm()


def test_the_head_in_bf16_rounds_d_logits_once():
    """Against double precision, with logits that are exact in bf16: only the gradients are rounded."""
    generator = torch.Generator().manual_seed(0)
    weight, h = (torch.randint(-4, 5, (n, 8), generator=generator) / 4 for n in (4096, 64))
    labels, grad = torch.randint(0, 4096, (64,), generator=generator), torch.rand(64, generator=generator) + 0.5
    own = [x.bfloat16().requires_grad_() for x in (h, weight)]
    exact = [x.double().requires_grad_() for x in (h, weight)]
    expected = (exact[0] @ exact[1].T).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    found = M.token_logps(*own, labels)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    for f, e in zip(torch.autograd.grad(found, own, grad), torch.autograd.grad(expected, exact, grad.double())):
        assert (f.double() - e).norm() < 3e-3 * e.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept_keys", [512, 145])
def test_packed_attention_is_that_of_each_document(dtype, kept_keys, monkeypatch):
    """Output and gradients: documents alike in length share a padded product, and nothing of it is seen."""
    monkeypatch.setattr(M, "KEPT_KEYS", kept_keys)
    lengths, generator = [150, 140, 139, 60, 7, 1], torch.Generator().manual_seed(0)
    assert M.alike(lengths) == [[(0, 150), (150, 140), (290, 139)], [(429, 60)], [(489, 7)], [(496, 1)]]
    heads = torch.randn(1, sum(lengths), 15, 64, generator=generator).to(dtype).requires_grad_()
    q, k, v = heads.transpose(1, 2).split([9, 3, 3], 1)
    grad = torch.randn(q.shape, generator=generator).to(dtype)
    found = M.attend_apart(lengths, q, k, v)
    expected = torch.cat([M.causal_attention(*(x.contiguous() for x in part)) for part in
                          zip(*(x.split(lengths, 2) for x in (q, k, v)))], 2)
    small = {torch.float32: 1e-5, torch.bfloat16: 5e-3}[dtype]
    assert (found.float() - expected.float()).norm() < small * expected.float().norm()
    for own, other in zip(*(torch.autograd.grad(out, heads, grad, retain_graph=True) for out in (found, expected))):
        assert (own.float() - other.float()).norm() < small * other.float().norm()
    with pytest.raises(ValueError, match="documents of 496 tokens in a row of 497"):
        M.attend_apart(lengths[:-1], q, k, v)


def test_embedding_and_head_add_to_main_grad_what_autograd_would_give(tmp_path):
    _, ours = tiny_pair("tied", tmp_path)
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(3))
    ours(ids, labels=ids).sum().backward()
    expected, ours.embed.weight.grad = ours.embed.weight.grad, None
    ours.embed.weight.main_grad = torch.ones_like(expected)
    ours(ids, labels=ids).sum().backward()
    assert ours.embed.weight.grad is None
    torch.testing.assert_close(ours.embed.weight.main_grad, expected + 1, rtol=1e-5, atol=1e-5)


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
    """`product`: the same as an fp32 model with these weights, forward and backward (gradients rounded to bf16)."""
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

# ----- generation ----------------------------------------------------------------------------------------------------


def naive_generate(model, ids, max_new_tokens, stop_ids=()):
    """Greedy decoding as plainly as it can be said: the whole text through the model for every token, no cache."""
    ids, new = list(ids), []
    while len(new) < max_new_tokens and not (new and new[-1] in stop_ids):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new]))[0, -1].argmax()))
    return new


def their_generate(theirs, prompt, n):
    return theirs.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False)[0, len(prompt):].tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_cached_and_naive_generation_agree(name, tmp_path):
    theirs, ours = tiny_pair(name, tmp_path)
    for seed in range(3):
        prompt = torch.randint(0, 300, (7 + seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        cached = list(M.generate(ours, prompt, max_new_tokens=40, temperature=0))
        assert cached == naive_generate(ours, prompt, 40)
        assert cached == their_generate(theirs, prompt, 40)


def greedy_prompts(tokenizer):
    return [render_chat(tokenizer, [{"role": "user", "content": text}], True)[0] for text in TEXTS]


@pytest.mark.parametrize("which", [slice(start, start + 5) for start in range(0, 20, 5)], ids=str)
def test_greedy_generation_equals_transformers(real_pair, which):
    """20 prompts × 128 tokens. transformers' greedy choice after each of our prefixes is our next token: by induction
    its own generation is the same. One prompt goes through its `generate` itself; all of them with --heavy."""
    theirs, ours, tokenizer = real_pair
    for prompt in greedy_prompts(tokenizer)[which]:
        new = list(M.generate(ours, prompt, max_new_tokens=128, temperature=0, stop_ids={2}))
        with torch.no_grad():
            choice = theirs(torch.tensor([prompt + new])).logits[0, len(prompt) - 1:-1].argmax(-1).tolist()
        assert choice == new


@pytest.mark.parametrize("which", [slice(0, 1), pytest.param(slice(1, 20), marks=pytest.mark.heavy)])
def test_greedy_generation_equals_transformers_generate(real_pair, which):
    theirs, ours, tokenizer = real_pair
    for prompt in greedy_prompts(tokenizer)[which]:
        new = list(M.generate(ours, prompt, max_new_tokens=128, temperature=0, stop_ids={2}))
        assert new == their_generate(theirs, prompt, 128)


def test_a_prompt_fed_in_pieces_through_the_cache_gives_the_same_logits(tmp_path):
    _, ours = tiny_pair("untied, llama3 scaling", tmp_path)
    ids = torch.randint(0, 300, (1, 30), generator=torch.Generator().manual_seed(3))
    cache = M.KVCache(ours, 30)
    with torch.no_grad():
        pieces = torch.cat([ours(part, cache=cache) for part in ids.split([11, 1, 9, 9], dim=1)], 1)
        torch.testing.assert_close(pieces, ours(ids), rtol=1e-5, atol=1e-5)


def unrecorded_decoder(model, cache):
    """What `recorded_decoder` records, without a GPU."""
    forward, ids, position = M.one_token_forward(model, cache)

    def step(token):
        ids.fill_(token), position.fill_(cache.length)
        cache.length += 1
        return forward()
    return step


@pytest.mark.parametrize("decoder", [M.decoder, unrecorded_decoder])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_one_token_step_gives_the_logits_of_the_plain_forward(name, decoder, tmp_path):
    """Also after the weights were changed in place, as test-time training does: the step keeps no copies of them."""
    _, ours = tiny_pair(name, tmp_path)
    ids = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(5))
    cache = M.KVCache(ours, 12)
    cache.kv.fill_(math.nan)  # what fresh memory may hold
    with torch.no_grad():
        ours(ids[:, :5], cache=cache)
        step = decoder(ours, cache)
        for position in range(5, 12):
            torch.testing.assert_close(step(int(ids[0, position])), ours(ids[:, :position + 1])[0, -1],
                                       rtol=1e-5, atol=1e-5)
        for parameter in ours.parameters():
            parameter.mul_(1.5)
        cache.length = 0
        torch.testing.assert_close(step(7), ours(torch.tensor([[7]]))[0, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decoder", [M.decoder, unrecorded_decoder])
def test_the_one_token_step_in_bf16_is_as_near_to_fp32_as_the_plain_forward(decoder, tmp_path):
    _, exact = tiny_pair("untied, llama3 scaling", tmp_path)
    for parameter in exact.parameters():
        parameter.data = parameter.data.bfloat16().float()
    half = M.Llama(exact.config).to(torch.bfloat16)
    half.load_state_dict(exact.state_dict())
    ids = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(6))
    cache = M.KVCache(half, 40)
    step = decoder(half, cache)
    with torch.no_grad():
        expected, plain = exact(ids)[0], half(ids)[0]
        stepped = torch.stack([step(token) for token in ids[0].tolist()])
    errors = [(logits.float() - expected).norm() / expected.norm() for logits in (stepped, plain)]
    assert errors[0] <= 1.25 * errors[1] < 0.05, errors


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.randn(1000).to(dtype)
        logits[500] = bad
        with pytest.raises(InputError, match="not finite"):
            M.sample(logits, torch.Generator(), temperature)


def reference_filter(logits, temperature, top_p, top_k, min_p):
    """transformers' own warpers, in its order, as probabilities."""
    from transformers.generation import logits_process as L
    scores = logits[None].double()
    warpers = [L.TemperatureLogitsWarper(temperature)]
    warpers += [L.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [L.TopPLogitsWarper(top_p)] if top_p < 1 else []
    for warper in warpers:
        scores = warper(None, scores)
    if min_p:
        p = scores.softmax(-1)
        scores = scores.masked_fill(p < min_p * p.max(), -math.inf)
    return scores.softmax(-1)[0]


@pytest.mark.parametrize("settings", [
    {"temperature": 0.7, "top_p": 0.95}, {"temperature": 1.0, "top_p": 1.0},
    {"temperature": 1.3, "top_k": 5, "top_p": 1.0}, 
    {"temperature": 0.9, "top_k": 20, "top_p": 0.8}, {"temperature": 1.0, "top_p": 1.0, "min_p": 0.2},
    {"temperature": 2.5, "top_p": 0.99}, {"temperature": 1.0, "top_p": 0.9, "top_k": 700}])
def test_sampling_follows_the_filtered_distribution(settings, monkeypatch):
    """The probabilities one is drawn from are transformers'; peaked and flat logits, more than 512 of them."""
    seen, order = {}, {}
    real_div, real_topk = torch.Tensor.div_, torch.Tensor.topk
    monkeypatch.setattr(torch.Tensor, "div_", lambda self, q: seen.update(p=self.clone()) or real_div(self, q))
    monkeypatch.setattr(torch.Tensor, "topk", lambda self, k: order.update(last=real_topk(self, k)) or order["last"])
    for spread in (0.3, 3.0):
        logits = spread * torch.randn(2000, generator=torch.Generator().manual_seed(4))
        M.sample(logits, None, **settings)
        found = torch.zeros(2000).scatter(0, order["last"].indices, seen["p"] / seen["p"].sum())
        expected = reference_filter(logits, **{"top_k": 0, "min_p": 0.0, "top_p": 1.0, **settings}).float()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_a_nucleus_wider_than_the_first_512_is_drawn_from_whole():
    logits, generator, n = torch.zeros(2000), torch.Generator().manual_seed(9), 2_000
    for settings in ({"top_p": 0.999}, {"top_p": 1.0}):
        drawn = torch.tensor([M.sample(logits, generator, 1.0, **settings) for _ in range(n)])
        assert abs((drawn >= 512).float().mean() - (2000 - 512) / 2000) < 4 * 0.5 / n ** 0.5


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])
    generator, n = torch.Generator().manual_seed(8), 20_000
    found = torch.tensor([M.sample(logits, generator, 1.0, top_p=0.95) for _ in range(n)]).bincount(minlength=5) / n
    expected = reference_filter(logits, 1.0, 0.95, 0, 0.0).float()
    assert (found - expected).abs().max() < 4 * 0.5 / n ** 0.5 and found[3] == expected[3] == 0


def test_sampling_is_repeatable_and_the_seed_matters(tmp_path):
    _, ours = tiny_pair("tied", tmp_path)
    runs = [list(M.generate(ours, [1, 2, 3], max_new_tokens=30, temperature=1.0, seed=seed)) for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]


def test_generation_ends_at_a_stop_id_at_the_limit_and_at_the_end_of_the_context(tmp_path):
    _, ours = tiny_pair("tied", tmp_path)
    free = list(M.generate(ours, [1, 2, 3], max_new_tokens=20, temperature=0))
    stop = free[4]
    assert list(M.generate(ours, [1, 2, 3], max_new_tokens=20, temperature=0, stop_ids={stop, 999})) \
        == free[:free.index(stop) + 1]
    ours.config = replace(ours.config, max_position_embeddings=10)
    assert len(list(M.generate(ours, [1, 2, 3], max_new_tokens=20, temperature=0))) == 8
    for prompt in ([], [1] * 11):
        with pytest.raises(InputError, match="expected 1 to 10"):
            next(M.generate(ours, prompt))

# ----- stochastic rounding -------------------------------------------------------------------------------------------


def test_stochastic_rounding_is_unbiased_and_hits_only_the_two_neighbours():
    generator = torch.Generator().manual_seed(0)
    for value in (0.05 + 1e-5, -3.3e-7, 1.0 + 2**-10, 123.456, -0.0, 2.0, 1e-39):
        source = torch.full((200_001,), value)
        target = torch.empty(200_001, dtype=torch.bfloat16)
        M.stochastic_round_(target, source, generator)
        below = (source[:1].view(torch.int32) & -0x10000).view(torch.float32).item()
        above = ((source[:1].view(torch.int32) & -0x10000) + 0x10000).view(torch.float32).item()
        assert set(target.float().tolist()) <= {below, above}
        exact = source[0].item()
        p = (exact - below) / (above - below)  # of rounding away from zero
        error = 5 * math.sqrt(p * (1 - p) / 200_001)  # five standard errors
        assert abs((target.float() != below).float().mean().item() - p) <= error + 1e-12


def test_stochastic_rounding_keeps_what_needs_no_rounding_and_infinities():
    exact = torch.tensor([1.0, -2.5, 0.0, math.inf, -math.inf, 3e38]).bfloat16()
    target = torch.empty_like(exact)
    M.stochastic_round_(target, exact.float(), torch.Generator().manual_seed(0))
    assert torch.equal(target, exact)
    nans = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001, -0x400000, 0x7FFF0001], dtype=torch.int32)
    M.stochastic_round_(target, nans.view(torch.float32), torch.Generator().manual_seed(0))
    assert target.isnan().all()  # CUDA's own NaN is 0x7FFFFFFF, whose bits overflow when noise is added


def test_stochastic_rounding_draws_independently_and_repeats_with_its_seed():
    n = len(M.slices(torch.empty(10_000_000))[0])
    source = torch.full((5 * n,), 1.0 + 2**-8)  # exactly half way
    rounded = []
    for seed in (0, 0, 1):
        target = torch.empty(5 * n, dtype=torch.bfloat16)
        M.stochastic_round_(target, source, torch.Generator().manual_seed(seed))
        rounded.append(target.float())
    assert torch.equal(rounded[0], rounded[1]) and not torch.equal(rounded[0], rounded[2])
    up = (rounded[0] > 1.0).float() - 0.5
    for lag in (1, 2, 3, 4, 5, 8, n, 2 * n, 3 * n, n + 1):  # two weights share one 64-bit number; slices share them all
        assert abs((up[lag:] * up[:-lag]).mean().item()) < 5 * 0.25 / math.sqrt(5 * n - lag), lag


def test_targets_that_share_random_words_are_rounded_independently_and_without_bias():
    generator = torch.Generator().manual_seed(0)
    words, n, rounds = M.random_words(generator, torch.device("cpu")), 50_000, 40
    source = torch.full((n,), 1.0 + 0.3 * 2**-7)
    ups = []
    for _ in range(rounds):
        target = torch.empty(n, dtype=torch.bfloat16)
        M.stochastic_rounder(target, generator, words)(target, source)
        ups.append((target.float() > 1.0).double())
    ups = torch.stack(ups)
    assert abs(ups.mean().item() - 0.3) < 5 * math.sqrt(0.21 / ups.numel())
    assert abs(ups.mean(0).var().item() * rounds - 0.21) < 0.01  # of a weight over the rounds, as if drawn each time
    correlations = torch.corrcoef(ups)[~torch.eye(rounds, dtype=torch.bool)]
    assert correlations.square().mean().sqrt() < 1.2 / math.sqrt(n) and correlations.abs().max() < 6 / math.sqrt(n)

# ----- files ---------------------------------------------------------------------------------------------------------


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


def test_config_survives_a_round_trip(tmp_path):
    for config in (M.LlamaConfig(), M.LlamaConfig(rope_scaling=None, tie_word_embeddings=True, head_dim=64)):
        (tmp_path / "config.json").write_text(json.dumps(config.to_json()))
        assert M.LlamaConfig.from_json(tmp_path / "config.json") == config
        theirs = transformers.AutoConfig.from_pretrained(tmp_path)
        assert theirs.rope_parameters["rope_type"] == ("llama3" if config.rope_scaling else "default")


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
            "M.parameter_count(M.LlamaConfig())  # what torch itself loads for its first meta tensor is not ours\n"
            "open('/proc/self/clear_refs', 'w').write('5'); before = peak()\n"
            "m = M.load_model(sys.argv[2], dtype=getattr(torch, sys.argv[3]))\n"
            "print((peak() - before) / sum(p.numel() * p.element_size() for p in m.parameters()))")
    for dtype in ("float32", "bfloat16"):
        out = subprocess.run([sys.executable, "-c", code, ROOT, tmp_path / "fp32", dtype], capture_output=True,
                             text=True)
        assert out.returncode == 0, out.stderr
        assert float(out.stdout) <= 1.15, (dtype, out.stdout)


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    raw.update(changes)
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("changes, found", [
    ({"model_type": "qwen2"}, '"qwen2"'), ({"hidden_act": "gelu"}, '"gelu"'),
    ({"attention_bias": True}, "attention_bias"), ({"num_key_value_heads": 3}, "divisor"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling"),
    ({"hidden_size": "64"}, "hidden_size"), ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_size": 32}, "do not fit"), ({"num_hidden_layers": 4}, "missing model.layers.3"),
    ({"num_hidden_layers": 2}, "not expected model.layers.2"), ({"vocab_size": 301}, "[300, 64], expected [301, 64]")])
def test_a_config_that_does_not_fit_is_refused_by_name(changes, found, tmp_path):
    tiny_pair("tied", tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(InputError) as error:
        M.load_model(tmp_path)
    assert found in str(error.value) and "\n" not in str(error.value)


def test_damaged_checkpoints_are_refused_in_one_line(tmp_path):
    _, ours = tiny_pair("tied", tmp_path / "good")
    M.save_model(ours, tmp_path / "shards", max_shard_bytes=60_000)
    index = tmp_path / "shards/model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]

    def refused(match, folder=tmp_path / "shards"):
        with pytest.raises(InputError, match=match) as error:
            M.load_model(folder)
        assert "\n" not in str(error.value)
    for outside in ("../good/model.safetensors", "/etc/passwd", "sub/../../good/model.safetensors", ".."):
        index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": outside}}))
        refused("files of its own folder only")
    index.write_text(json.dumps({"weight_map": weight_map | {"model.norm.weight": "model-00099.safetensors"}}))
    refused("model-00099.safetensors: no such file")
    index.write_text(json.dumps({"weight_map": weight_map | {"lm_tail.weight": weight_map["model.norm.weight"]}}))
    refused("lm_tail.weight missing")
    index.write_text('{"weight_map": {"a": "b", "a": "c"}}')
    refused("stands twice")
    index.write_text("[" * 100_000)
    refused("nested too deeply|not valid JSON")
    weights = tmp_path / "good/model.safetensors"
    whole = weights.read_bytes()
    for length in (0, 5, 8, 200, len(whole) - 1):
        weights.write_bytes(whole[:length])
        refused("damaged safetensors", tmp_path / "good")
    save_file({"model.norm.weight": torch.ones(64)}, weights)
    refused("missing", tmp_path / "good")
    weights.unlink()
    refused("expected model.safetensors", tmp_path / "good")
    refused("does not exist", tmp_path / "nowhere")


def test_tied_checkpoint_with_the_head_stored_again_is_accepted(tmp_path):
    _, ours = tiny_pair("tied", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(M.load_model(tmp_path, dtype=torch.float32).head.weight, ours.embed.weight)


def test_stop_ids_come_from_generation_config_then_config(tmp_path):
    assert M.stop_ids_of(tmp_path) == set()
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert M.stop_ids_of(tmp_path) == {7}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [128001, 128008, 128009]}')
    assert M.stop_ids_of(tmp_path) == {128001, 128008, 128009}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    with pytest.raises(InputError, match="eos_token_id"):
        M.stop_ids_of(tmp_path)


def test_saving_is_atomic(tmp_path, monkeypatch):
    _, ours = tiny_pair("tied", tmp_path / "good")
    M.save_model(ours, tmp_path / "out", source=tmp_path / "good")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(M, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        M.save_model(ours, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "out"]

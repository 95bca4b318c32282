"""generate.py beside transformers and beside decoding without a cache: greedy, step by step, and drawn."""
import math
from dataclasses import replace

import pytest
import torch
from conftest import CONFIGS, TEXTS, reference_filter, tiny_pair

from chat import render_chat
from files import InputError
from generate import decoder, generate, one_token_forward, sample
from model import KVCache, Llama

# ----- greedy --------------------------------------------------------------------------------------------------------


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
        cached = list(generate(ours, prompt, max_new_tokens=40, temperature=0))
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
        new = list(generate(ours, prompt, max_new_tokens=128, temperature=0, stop_ids={2}))
        with torch.no_grad():
            choice = theirs(torch.tensor([prompt + new])).logits[0, len(prompt) - 1:-1].argmax(-1).tolist()
        assert choice == new


@pytest.mark.parametrize("which", [slice(0, 1), pytest.param(slice(1, 20), marks=pytest.mark.heavy)])
def test_greedy_generation_equals_transformers_generate(real_pair, which):
    theirs, ours, tokenizer = real_pair
    for prompt in greedy_prompts(tokenizer)[which]:
        new = list(generate(ours, prompt, max_new_tokens=128, temperature=0, stop_ids={2}))
        assert new == their_generate(theirs, prompt, 128)


def test_generation_ends_at_a_stop_id_at_the_limit_and_at_the_end_of_the_context(tmp_path):
    _, ours = tiny_pair("tied", tmp_path)
    free = list(generate(ours, [1, 2, 3], max_new_tokens=20, temperature=0))
    stop = free[4]
    assert list(generate(ours, [1, 2, 3], max_new_tokens=20, temperature=0, stop_ids={stop, 999})) \
        == free[:free.index(stop) + 1]
    ours.config = replace(ours.config, max_position_embeddings=10)
    assert len(list(generate(ours, [1, 2, 3], max_new_tokens=20, temperature=0))) == 8
    for prompt in ([], [1] * 11):
        with pytest.raises(InputError, match="expected 1 to 10"):
            next(generate(ours, prompt))

# ----- one token at a time -------------------------------------------------------------------------------------------


def unrecorded_decoder(model, cache):
    """`recorded_decoder` without the recording, which needs a GPU."""
    forward, ids, position = one_token_forward(model, cache)

    def step(token):
        ids.fill_(token), position.fill_(cache.length)
        cache.length += 1
        return forward()
    return step


@pytest.mark.parametrize("make_step", [decoder, unrecorded_decoder])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_one_token_step_gives_the_logits_of_the_plain_forward(name, make_step, tmp_path):
    """Also after the weights were changed in place, as test-time training does: the step keeps no copies of them."""
    _, ours = tiny_pair(name, tmp_path)
    ids = torch.randint(0, 300, (1, 12), generator=torch.Generator().manual_seed(5))
    cache = KVCache(ours, 12)
    cache.kv.fill_(math.nan)  # what fresh memory may hold
    with torch.no_grad():
        ours(ids[:, :5], cache=cache)
        step = make_step(ours, cache)
        for position in range(5, 12):
            torch.testing.assert_close(step(int(ids[0, position])), ours(ids[:, :position + 1])[0, -1],
                                       rtol=1e-5, atol=1e-5)
        for parameter in ours.parameters():
            parameter.mul_(1.5)
        cache.length = 0
        torch.testing.assert_close(step(7), ours(torch.tensor([[7]]))[0, -1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make_step", [decoder, unrecorded_decoder])
def test_the_one_token_step_in_bf16_is_as_near_to_fp32_as_the_plain_forward(make_step, tmp_path):
    _, exact = tiny_pair("untied, llama3 scaling", tmp_path)
    for parameter in exact.parameters():
        parameter.data = parameter.data.bfloat16().float()
    half = Llama(exact.config).to(torch.bfloat16)
    half.load_state_dict(exact.state_dict())
    ids = torch.randint(0, 300, (1, 40), generator=torch.Generator().manual_seed(6))
    cache = KVCache(half, 40)
    step = make_step(half, cache)
    with torch.no_grad():
        expected, plain = exact(ids)[0], half(ids)[0]
        stepped = torch.stack([step(token) for token in ids[0].tolist()])
    errors = [(logits.float() - expected).norm() / expected.norm() for logits in (stepped, plain)]
    assert errors[0] <= 1.25 * errors[1] < 0.05, errors

# ----- drawn ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(bad, temperature):
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.randn(1000).to(dtype)
        logits[500] = bad
        with pytest.raises(InputError, match="not finite"):
            sample(logits, torch.Generator(), temperature)


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
        sample(logits, None, **settings)
        found = torch.zeros(2000).scatter(0, order["last"].indices, seen["p"] / seen["p"].sum())
        expected = reference_filter(logits, **{"top_k": 0, "min_p": 0.0, "top_p": 1.0, **settings}).float()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


def test_a_nucleus_wider_than_the_first_512_is_drawn_from_whole():
    logits, generator, n = torch.zeros(2000), torch.Generator().manual_seed(9), 2_000
    for settings in ({"top_p": 0.999}, {"top_p": 1.0}):
        drawn = torch.tensor([sample(logits, generator, 1.0, **settings) for _ in range(n)])
        assert abs((drawn >= 512).float().mean() - (2000 - 512) / 2000) < 4 * 0.5 / n ** 0.5


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0, 1.5])
    generator, n = torch.Generator().manual_seed(8), 20_000
    found = torch.tensor([sample(logits, generator, 1.0, top_p=0.95) for _ in range(n)]).bincount(minlength=5) / n
    expected = reference_filter(logits, 1.0, 0.95, 0, 0.0).float()
    assert (found - expected).abs().max() < 4 * 0.5 / n ** 0.5 and found[3] == expected[3] == 0


def test_sampling_is_repeatable_and_the_seed_matters(tmp_path):
    _, ours = tiny_pair("tied", tmp_path)
    runs = [list(generate(ours, [1, 2, 3], max_new_tokens=30, temperature=1.0, seed=seed)) for seed in (5, 5, 6)]
    assert runs[0] == runs[1] != runs[2]

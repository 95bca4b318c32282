"""generate.py beside transformers and beside decoding without a cache: greedy, step by step, and drawn."""
import copy
import math
import random
from dataclasses import replace

import pytest
import torch
from conftest import CONFIGS, TEXTS, reference_filter, tiny_llama, tiny_pair

import generate as G
import model as model_py
from chat import render_chat
from files import InputError
from generate import decoder, generate, generate_batch, one_token_forward, sample
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


def test_greedy_nll_is_the_mean_surprise_of_the_greedy_tokens(tmp_path):
    """Beside transformers' probabilities; up to a stop, which counts, and never more than the context holds."""
    theirs, ours = tiny_pair("tied", tmp_path)
    prompt = list(range(5, 14))
    new = naive_generate(ours, prompt, 8)
    with torch.no_grad():
        logps = theirs(torch.tensor([prompt + new])).logits[0, len(prompt) - 1:-1].log_softmax(-1).amax(-1)
    assert G.greedy_nll(ours, prompt, n=8)[0] == pytest.approx(-logps.mean().item(), rel=1e-4)
    assert G.greedy_nll(ours, prompt) == G.greedy_nll(ours, prompt, n=32) != G.greedy_nll(ours, prompt, n=31)
    end = new.index(new[3])
    assert G.greedy_nll(ours, prompt, {new[3]}, n=8)[0] == pytest.approx(-logps[:end + 1].mean().item(), rel=1e-4)
    ours.config = replace(ours.config, max_position_embeddings=len(prompt) + 1)
    assert G.greedy_nll(ours, prompt, n=8)[0] == pytest.approx(-logps[:2].mean().item(), rel=1e-4)


def test_of_the_greedy_tokens_those_count_as_new_that_the_prompt_lacks(tmp_path, monkeypatch):
    """Wherever it has them; a stop is none, whether the prompt has it or not."""
    _, ours = tiny_pair("tied", tmp_path)
    prompt = [9, *range(100, 200), 8]
    for tokens, stops, expected in (([9, 8, 150], (), 0), ([7, 9, 7, 3], (), 3), ([7, 9, 5], {5}, 1)):
        monkeypatch.setattr(G, "generate", lambda *_, tokens=tokens, **more: tokens)
        assert G.greedy_nll(ours, prompt, stops)[1] == expected


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
    forward, ids, place = one_token_forward(model, cache)
    cache.kv[..., cache.length:, :] = 0

    def step(token):
        ids.fill_(token), place.fill_(cache.length)
        cache.length += 1
        return forward()[0]
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

# ----- a batch -------------------------------------------------------------------------------------------------------


def mixed_prompts(n, longest=60, seed=0):
    """n prompts of 1 to `longest` tokens, both lengths among them where n > 1."""
    rng = random.Random(seed)
    lengths = [longest, 1] + [rng.randint(1, longest) for _ in range(n)]
    return [[rng.randrange(300) for _ in range(length)] for length in lengths[:n]]


def one_by_one(model, prompts, **settings):
    return [list(generate(model, ids, **settings)) for ids in prompts]


@pytest.fixture
def unclean_memory(monkeypatch):
    """Caches whose memory is NaN before it is written."""
    class Unclean(KVCache):
        def __init__(self, *args):
            super().__init__(*args)
            self.kv.fill_(math.nan)
    monkeypatch.setattr(G, "KVCache", Unclean)


@pytest.mark.parametrize("n", [1, 2, 16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_batch_gives_the_tokens_of_each_alone(name, n, tmp_path, unclean_memory):
    """Without stops; then with stops that end some texts at once, some late and some never, so that rows leave."""
    _, ours = tiny_pair(name, tmp_path)
    prompts, settings = mixed_prompts(n), {"max_new_tokens": 24, "temperature": 0}
    free = one_by_one(ours, prompts, **settings)
    assert generate_batch(ours, prompts, **settings) == free
    settings["stop_ids"] = {tokens[3 * i % 24] for i, tokens in enumerate(free[:12])}
    stopped = one_by_one(ours, prompts, **settings)
    assert generate_batch(ours, prompts, **settings) == stopped != free
    if n == 16:
        assert len(set(map(len, stopped))) >= 4


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_a_batch_fills_the_context(temperature, tmp_path, unclean_memory):
    _, ours = tiny_pair("tied", tmp_path)
    ours.config = replace(ours.config, max_position_embeddings=40)
    prompts = [*mixed_prompts(5, 40), [7] * 39]
    found = generate_batch(ours, prompts, temperature=temperature)
    assert list(map(len, found)) == [41 - len(ids) for ids in prompts]
    assert found == one_by_one(ours, prompts, temperature=temperature)


@pytest.mark.parametrize("settings", [
    {"temperature": 0.7}, {"temperature": 1.5, "top_p": 1.0, "top_k": 7}, {"temperature": 1.0, "min_p": 0.003},
    {"temperature": 0.7, "seed": 5, "stop_ids": set(range(40))}])
def test_a_text_is_drawn_as_alone_whatever_is_beside_it(settings, tmp_path):
    _, ours = tiny_pair("tied", tmp_path)
    prompts, settings = mixed_prompts(9), {"max_new_tokens": 20, **settings}
    alone = one_by_one(ours, prompts, **settings)
    assert generate_batch(ours, prompts, **settings) == alone
    assert generate_batch(ours, prompts[4:6], **settings) == alone[4:6]
    assert generate_batch(ours, prompts[:2], **{**settings, "seed": 6}) != alone[:2]


def test_a_nucleus_wider_than_the_first_512_is_drawn_from_whole_by_the_row_that_has_one():
    """Rows with a wide and with a narrow nucleus side by side: each draws what it draws alone."""
    logits = torch.randn(6, 2000, generator=torch.Generator().manual_seed(2)) * torch.tensor([0.1, 9] * 3)[:, None]
    for seed in range(5):
        generators = [torch.Generator().manual_seed(seed) for _ in range(6)]
        together = G.sample_rows(logits, generators, 1.0, 0.99, 0, 0.0)
        alone = [sample(row, torch.Generator().manual_seed(seed), 1.0, 0.99) for row in logits]
        assert together == alone


def test_without_a_seed_the_texts_of_a_batch_differ(tmp_path):
    _, ours = tiny_pair("tied", tmp_path)
    one, other = generate_batch(ours, [[1, 2, 3]] * 2, max_new_tokens=20, temperature=1.0, seed=None)
    assert one != other


def test_an_empty_batch_and_no_tokens():
    model = tiny_llama()
    assert generate_batch(model, []) == []
    assert generate_batch(model, [[1], [2, 3]], max_new_tokens=0) == [[], []]


def test_a_batch_names_the_prompt_that_does_not_fit():
    model = tiny_llama()
    for wrong in ([], [1] * 513):
        with pytest.raises(InputError, match=f"prompt 1 has {len(wrong)} tokens; expected 1 to 512"):
            generate_batch(model, [[1], wrong, [2]])


def test_logits_of_a_batch_that_are_not_finite_are_refused():
    model = tiny_llama()
    with torch.no_grad():
        model.embed.weight[7] = math.nan
    for temperature in (0, 0.7):
        with pytest.raises(InputError, match="not finite"):
            generate_batch(model, [[1], [7], [2]], temperature=temperature)


def test_a_batch_takes_no_more_places_than_it_says_and_looks_at_fewer_when_rows_have_ended(monkeypatch):
    """Rows are moved to the front when half of them have ended, and the padding that all have is cut off."""
    model, shapes, steps = tiny_llama(), [], []
    real_cache, real_step = G.KVCache, G.step_of

    def cache_of(model, length, batch):
        shapes.append((batch, length))
        return real_cache(model, length, batch)

    def step_of(model, cache, pads):
        steps.append((cache.kv.shape[2], cache.length, pads))
        return real_step(model, cache, pads)
    monkeypatch.setattr(G, "KVCache", cache_of)
    monkeypatch.setattr(G, "step_of", step_of)
    model.config = replace(model.config, max_position_embeddings=20)
    generate_batch(model, [[1] * 19, [1] * 18, [1] * 10, [1] * 15], max_new_tokens=9, temperature=0)
    assert shapes == [(4, 19 + 9 - 1)]
    # ends: after 2, 3, 9 and 6 tokens
    assert steps == [(4, 19, [0, 1, 9, 4]), (2, 21 - 4, [5, 0]), (1, 24 - 9, [0])]


def test_the_last_text_of_a_batch_goes_on_in_the_decoder_written_for_one(monkeypatch):
    """Its products of a matrix and a vector are faster without oneDNN, those of several rows are faster with it."""
    model, seen, real = tiny_llama(), [], {name: getattr(G, name) for name in ("decoder", "one_token_forward")}

    def watched(name):
        def make(*args):
            made = real[name](*args)
            step, *rest = made if isinstance(made, tuple) else [made]

            def watched_step(*args):
                seen.append((name, torch.backends.mkldnn.enabled))
                return step(*args)
            return (watched_step, *rest) if rest else watched_step
        monkeypatch.setattr(G, name, make)
    for name in real:
        watched(name)
    model.config = replace(model.config, max_position_embeddings=20)
    generate_batch(model, [[1] * 18, [1] * 16], temperature=0)  # 3 and 5 tokens
    assert seen == [("one_token_forward", True)] * 2 + [("decoder", False)] * 2


def test_a_batch_where_bf16_products_are_slow_is_computed_in_fp32_as_the_plain_forward_is(monkeypatch, tmp_path):
    """bf16 weights and cache, fp32 in between."""
    half = tiny_pair("tied", tmp_path)[1].bfloat16()
    monkeypatch.setattr(model_py, "has_fast_bf16", lambda device: False)
    caches, ids = [KVCache(half, 6, 2) for _ in range(2)], torch.tensor([[1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4]])
    with torch.no_grad():
        for cache in caches:
            half(ids[:, :5], cache=cache)
        expected = half(ids[:, 5:], cache=caches[0])[:, 0]
        logits = G.step_of(half, caches[1], [0, 0])(ids[:, 5].tolist())
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_a_batched_step_in_bf16_is_as_near_to_fp32_as_the_plain_forward(tmp_path):
    _, exact = tiny_pair("untied, llama3 scaling", tmp_path)
    exact = exact.bfloat16().float()
    half = copy.deepcopy(exact).bfloat16()
    ids = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(6))
    cache = KVCache(half, 40, 3)
    with torch.no_grad():
        step = G.step_of(half, cache, [0, 0, 0])
        expected, plain = exact(ids), half(ids)
        stepped = torch.stack([step(ids[:, t].tolist()) for t in range(40)], 1)
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
        found = torch.zeros(2000).scatter(0, order["last"].indices[0], seen["p"][0] / seen["p"].sum())
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

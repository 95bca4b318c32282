"""Decoding: one token after another from a prompt, and the draw of each.

    logits = model(prompt), keys and values kept in a cache
    repeat:   token = sample(logits);   logits = one-token forward of the token, on the cache

    from generate import generate, generate_batch
    for token in generate(model, ids, max_new_tokens=256, stop_ids=stops): …
    texts = generate_batch(model, [ids, …], max_new_tokens=256, stop_ids=stops)

A token's time goes into reading the weights once. The one-token forward is written out for a CPU (`decoder`), so that
little else is left, and recorded as a CUDA graph for a GPU (`recorded_decoder`); tests compare both with the plain
forward of model.py. A batch reads the weights once for a token of every text.
Shapes: B texts, V vocabulary, D width, H query heads, K key-value heads, C channels, S places of the cache.
"""
import contextlib
import copy
import functools
import math
import threading
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from files import InputError
from model import KVCache, rotary_table

# ----- the loop ------------------------------------------------------------------------------------------------------


def generate(model, ids, *, max_new_tokens=2048, temperature=0.7, top_p=0.95, top_k=0, min_p=0.0, stop_ids=(),
             seed=0):
    """Yields new token ids after the prompt `ids` (a list of ints); one in `stop_ids` is yielded and ends it.

    Stops at `max_new_tokens` or when the model's context is full. The same seed gives the same tokens; `seed` None
    draws a fresh one. InputError when the prompt is empty or does not fit the context.
    """
    device = model.norm.weight.device
    generator = seeded(seed, device)
    max_new_tokens = min(max_new_tokens, room(model, ids))
    cache = KVCache(model, len(ids) + max_new_tokens)
    step = token = None
    for _ in range(max_new_tokens):
        with torch.inference_mode(), onednn(token is None):
            if token is None:
                logits = model(torch.tensor([ids], device=device), cache=cache, last_only=True)[0, -1]
            else:
                step = step or (recorded_decoder if device.type == "cuda" else decoder)(model, cache)
                logits = step(token)
            token = sample(logits, generator, temperature, top_p, top_k, min_p)
        yield token
        if token in stop_ids:
            return


def greedy_nll(model, ids, stop_ids=(), n=32):
    """Of the n tokens (or up to a stop) that the model writes greedily after the prompt `ids`: (mean −log p in nats,
    how many do not stand in the prompt and are no stop, each time that they occur).

    The mean is low where the model is sure of what to say, rightly or not, or where it copies. `ids` as in `generate`.
    """
    tokens = list(generate(model, ids, max_new_tokens=n, temperature=0, stop_ids=stop_ids))
    read, labels = (torch.tensor([row], device=model.norm.weight.device)
                    for row in ([*ids, *tokens[:-1]], [*[-100] * (len(ids) - 1), *tokens]))
    with torch.inference_mode():
        nats = -model(read, labels=labels).sum().item() / len(tokens)
    return nats, len([token for token in tokens if token not in ids and token not in stop_ids])


def room(model, ids, name="the prompt"):
    """The number of tokens that the model's context allows after `ids`; InputError when these do not fit."""
    limit = model.config.max_position_embeddings
    if not 0 < len(ids) <= limit:
        raise InputError(f"{name} has {len(ids):,} tokens; expected 1 to {limit:,}, the model's context")
    return limit - len(ids) + 1  # the last one is not read again


def seeded(seed, device):
    """A generator of random numbers; `seed` None is a fresh one."""
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    return generator


@contextlib.contextmanager
def onednn(on):
    """oneDNN on or off for CPU products: its bf16 matrix-vector product reads weights at half the memory's speed.

    Afterwards it is on, torch's default: the switch is the process's, and another thread may be inside as well.
    """
    torch.backends.mkldnn.enabled = on
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = True


def sample(logits, generator, temperature=0.7, top_p=0.95, top_k=0, min_p=0.0):
    """One token id from logits [V]: temperature, then top-k, top-p (arXiv 1904.09751), min-p (arXiv 2407.01082).

    temperature 0 takes the largest logit; top_k 0, top_p 1 and min_p 0 switch those filters off. InputError when the
    logits are not finite: then the weights are not sound.
    """
    return sample_rows(logits[None], [generator], temperature, top_p, top_k, min_p)[0]


def sample_rows(logits, generators, temperature, top_p, top_k, min_p):
    """`sample` of each row of logits [B, V], with its own generator."""
    lowest, highest = logits.aminmax(dim=-1)  # one quick pass that NaN and infinities come through
    sound = (highest - lowest).isfinite()
    if temperature < 1e-5:  # logits divided by less would overflow
        enough = sound
        tokens = logits.max(-1).indices  # the first of equals, as argmax, which is five times slower for bf16
    else:
        logits = logits.float() / temperature

        def draw(logits, generators, k):
            """(one of the k likeliest of each row, whether the nucleus lies among them)."""
            values, order = logits.topk(k)
            p = (values - (values if top_k else logits).logsumexp(-1, keepdim=True)).exp()  # descending
            complete = p.sum(-1) >= top_p
            if top_p < 1:
                p = p.where(p.cumsum(-1) - p < top_p, 0)  # keeps the token that crosses top_p
            if min_p > 0:
                p = p.where(p >= min_p * p[:, :1], 0)
            # torch.multinomial's own way to draw one, without its checks, for each of which a GPU would have to wait
            noise = torch.stack([torch.empty_like(p[0]).exponential_(generator=one) for one in generators])
            return order.gather(-1, p.div_(noise).argmax(-1, keepdim=True))[:, 0], complete
        most = min(top_k or logits.shape[1], logits.shape[1])
        k = most if top_k or top_p >= 1 else min(most, 512)  # nearly always enough, and sorting all of V is slow
        tokens, enough = draw(logits, generators, k)
    tokens, sound, enough = torch.stack([tokens, sound, enough]).tolist()  # a GPU's only wait, with few exceptions
    if not all(sound):
        raise InputError("the model gives logits that are not finite numbers; expected sound weights")
    return [token if complete or k == most else int(draw(logits[i:i + 1], generators[i:i + 1], most)[0])
            for i, (token, complete) in enumerate(zip(tokens, enough))]

# ----- a batch -------------------------------------------------------------------------------------------------------


def generate_batch(model, prompts, *, max_new_tokens=2048, temperature=0.7, top_p=0.95, top_k=0, min_p=0.0,
                   stop_ids=(), seed=0):
    """[prompt ids, …] -> [new ids, …], each as `generate` would give it: up to a stop id, max_new_tokens or the end of
    the context.

    Every text draws from its own generator with the same `seed`, so its tokens do not depend on the texts beside it;
    but in bf16 the batch's size changes the rounding, which may turn a near tie. The cache takes (number of prompts) ×
    (longest prompt + max_new_tokens) places. InputError names a prompt that is empty or does not fit the context.

    The prompts are read one by one, each into the end of its row of the cache, so that all rows go on at one place:

        cache     . . p p p n n      p prompt, n new; the first two places of this row are its padding, always hidden

    A text that has ended stays in the batch, and its tokens are dropped, until half of the texts have ended.
    """
    most = [min(max_new_tokens, room(model, ids, f"prompt {i}")) for i, ids in enumerate(prompts)]
    new, rows = [[] for _ in prompts], list(range(len(prompts)))  # rows: the texts in the batch
    if not prompts or max_new_tokens < 1:
        return new
    device, longest = model.norm.weight.device, max(map(len, prompts))
    pads, generators = [longest - len(ids) for ids in prompts], [seeded(seed, device) for _ in prompts]
    cache, unfinished = KVCache(model, longest + max(most) - 1, len(prompts)), set(rows)
    with torch.inference_mode():
        first = []
        for i, ids in enumerate(prompts):
            end_of_row = part(cache, slice(i, i + 1), pads[i])
            first.append(model(torch.tensor([ids], device=device), cache=end_of_row, last_only=True)[:, -1])
            cache.kv[:, :, i, :, :pads[i]] = 0  # hidden, but 0 times the NaN that fresh memory may hold is NaN
        logits, cache.length, step = torch.cat(first), longest, None
        while True:
            tokens = sample_rows(logits, generators, temperature, top_p, top_k, min_p)
            for row, token in zip(rows, tokens):
                if row in unfinished:
                    new[row].append(token)
                    if token in stop_ids or len(new[row]) == most[row]:
                        unfinished.remove(row)
            if not unfinished:
                return new
            if 2 * len(unfinished) <= len(rows):  # not sooner: a change copies rows, and is recorded anew on a GPU
                going = [i for i, row in enumerate(rows) if row in unfinished]
                for i, j in enumerate(going):
                    cache.kv[:, :, i, :, :cache.length] = cache.kv[:, :, j, :, :cache.length]
                rows, pads, generators, tokens = ([x[i] for i in going] for x in (rows, pads, generators, tokens))
                cache, pads, step = part(cache, slice(len(rows)), min(pads)), [p - min(pads) for p in pads], None
            step = step or step_of(model, cache, pads)
            with onednn(len(rows) > 1):
                logits = step(tokens).view(len(rows), -1)


def part(cache, rows, start):
    """The `rows` of a KVCache from the place `start` on, as a KVCache on the same memory."""
    view = copy.copy(cache)
    view.kv = cache.kv[:, :, rows, :, start:]
    view.k, view.v = view.kv.unbind(1)
    view.length = max(0, cache.length - start)
    return view


def step_of(model, cache, pads):
    """A function [a token of each text in `cache`] -> their logits, [B, V] or, of one text, [V]: the fastest for this
    device and this number of texts. `pads` as in `one_token_forward`."""
    if cache.kv.is_cuda:
        return recorded_decoder(model, cache, pads)
    if len(pads) == 1:
        one = decoder(model, cache)
        return lambda tokens: one(tokens[0])
    forward, ids, place = one_token_forward(model, cache, pads)

    def step(tokens):
        ids[:, 0] = torch.tensor(tokens)
        place.fill_(cache.length)
        cache.length += 1
        return forward(cache.length)
    return step

# ----- one token on a CPU --------------------------------------------------------------------------------------------


def decoder(model, cache):
    """A function token -> logits [V], the plain forward of one more token of the one text in `cache`, for a CPU.

    There are no modules here, and nothing is allocated that can be kept: every intermediate is a vector of the weights'
    dtype with its place, and every view on it is made once. The weights are those of the model, not copies: a step sees
    changes made in place. Call it without gradients.
    """
    config, like = model.config, model.norm.weight
    H, K, C, eps = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rms_norm_eps
    layers = [(layer.attention_norm.weight, layer.attention.qkv.weight, layer.attention.out.weight,
               layer.mlp_norm.weight, layer.mlp.gate_up.weight, layer.mlp.down.weight) for layer in model.layers]
    h, zeros, added = torch.zeros(3, config.hidden_size, dtype=like.dtype, device=like.device)
    q, qkv = like.new_empty(H, C), like.new_empty((H + 2 * K) * C)
    grouped_q, qkv_heads = q.view(1, K, H // K, C), qkv.view(-1, C)  # the queries that share a key are rows of a matrix
    gate_up = like.new_empty(2 * config.intermediate_size)
    gate, up = gate_up.chunk(2)
    # rotation, in fp32; as v is not turned, its cos is 1 and its sin 0, and all heads go through in one piece
    x, turned, cos, sin = torch.zeros(4, H + 2 * K, C, device=like.device)
    cos[H + K:] = 1
    table = rotary_table(config, torch.arange(cache.kv.shape[4], device=like.device))
    (x1, x2), (turned1, turned2), (sin1, sin2) = [whole.chunk(2, dim=-1) for whole in (x, turned, sin)]
    turned_q, turned_kv = turned[:H], turned[H:].view(2, K, C)

    def step(token):
        if model.unusable:
            raise RuntimeError(model.unusable)
        position, end = cache.length, cache.length + 1
        cos[:H + K], sin[:H + K] = table[0][position], table[1][position]
        places = cache.kv[:, :, 0, :, position].unbind()
        keys, values = cache.k[:, :, :, :end].unbind(), cache.v[:, :, :, :end].unbind()
        h.copy_(model.embed.weight[token])
        for weights, place, k, v in zip(layers, places, keys, values):
            attention_norm, to_qkv, to_out, mlp_norm, to_gate_up, to_down = weights
            torch.mv(to_qkv, rms_norm_vector(h, attention_norm, eps, zeros), out=qkv)
            x.copy_(qkv_heads)
            torch.mul(x, cos, out=turned)
            turned1.addcmul_(x2, sin1)
            turned2.addcmul_(x1, sin2)
            place.copy_(turned_kv)
            q.copy_(turned_q)
            attended = F.scaled_dot_product_attention(grouped_q, k, v)
            h.add_(torch.mv(to_out, attended.reshape(-1), out=added))
            torch.mv(to_gate_up, rms_norm_vector(h, mlp_norm, eps, zeros), out=gate_up)
            F.silu(gate, inplace=True).mul_(up)
            h.add_(torch.mv(to_down, gate, out=added))
        cache.length = end
        return torch.mv(model.head.weight, rms_norm_vector(h, model.norm.weight, eps, zeros))
    return step


def rms_norm_vector(x, weight, eps, zeros):
    """RMSNorm of one vector [D] on a CPU; `zeros` is a vector of them. Two operations where F.rms_norm needs eight,
    each of which costs more than its arithmetic."""
    length = torch.linalg.vector_norm(x, dtype=torch.float32).item()
    return torch.addcmul(zeros, x, weight, value=(length * length / len(x) + eps) ** -0.5)

# ----- one token on a GPU --------------------------------------------------------------------------------------------


RECORDING = threading.Lock()  # a process records one graph at a time


def recorded_decoder(model, cache, pads=(0,)):
    """`decoder` for a GPU, where a token of a small model takes a thousand kernels, each shorter than its launch.

    They are recorded once, as a CUDA graph, and replayed for each token on the same memory. Therefore the token and its
    place are tensors, attention goes over all places of the cache, of which those not yet filled are hidden, and a step
    overwrites the logits of the one before. Recording takes as long as a few tokens. The weights are those of the
    model: a step sees changes made in place. Make it and call it both without gradients, or both in inference mode.
    With the `pads` of a batch, see `one_token_forward`, a step takes a list, a token of each text, and gives [B, V].
    """
    forward, ids, place = one_token_forward(model, cache, pads)
    device, graph = ids.device, torch.cuda.CUDAGraph()
    cache.kv[..., cache.length:, :] = 0  # hidden, but 0 times the NaN that fresh memory may hold is NaN
    for _ in range(2):  # the set-up of a first call cannot be recorded
        forward()
    # "thread_local": work that other threads give the GPU meanwhile is not recorded and does no harm
    with RECORDING, torch.cuda.device(device), torch.cuda.graph(graph, stream=recording_stream(device),
                                                                capture_error_mode="thread_local"):
        logits = forward().squeeze(0)
    graph.reads = forward  # a graph does not keep the memory that it reads, such as pads

    def step(token):
        if model.unusable:
            raise RuntimeError(model.unusable)
        if cache.length == cache.kv.shape[4]:  # a GPU would end the process's use of it
            raise IndexError(f"the cache is full: {cache.length} tokens")
        ids.copy_(torch.tensor(token).view(-1, 1))
        place.fill_(cache.length)
        graph.replay()
        cache.length += 1
        return logits
    return step


@functools.lru_cache
def recording_stream(device):
    """The stream on which graphs of this GPU are recorded; torch's own choice is the GPU of the first recording."""
    return torch.cuda.Stream(device)


def one_token_forward(model, cache, pads=(0,)):
    """(forward, ids [B, 1], place [1]): forward(end) is the plain forward of the tokens `ids`, one of each text, at
    `place`, which all texts share; it gives logits [B, V]. The first `pads[b]` places of text b are hidden.

    Write ids and place, then call forward: it runs the same kernels on the same memory whatever they hold. `end` is the
    number of places that attention goes over, by default all of the cache's.
    """
    device = model.norm.weight.device
    ids = torch.zeros(len(pads), 1, dtype=torch.int64, device=device)
    place = torch.full((1,), cache.length, device=device)
    pads = torch.tensor(pads, device=device)[:, None]

    def layer(i, end):  # as KVCache.layer, but the place is a tensor
        def extend(k, v):
            return [x[i].index_copy_(2, place, new.to(x.dtype))[:, :, :end].to(new.dtype)
                    for x, new in ((cache.k, k), (cache.v, v))]
        return extend

    def attend(hidden, q, k, v):
        grouped = q.reshape(-1, q.shape[1] // k.shape[1], q.shape[3])  # the queries that share a key head, as rows
        k, v = k.flatten(0, 1), v.flatten(0, 1)  # [B K, S, C]
        scores = product_fp32(grouped, k.mT).view(len(q), q.shape[1], 1, -1)
        p = scores.mul_(q.shape[3] ** -0.5).add_(hidden).softmax(-1).to(v.dtype)
        return (p.view(*grouped.shape[:2], -1) @ v).view(q.shape)

    def forward(end=None):
        places = torch.arange(cache.kv.shape[4], device=device)[:end]  # here: a graph keeps what it makes, nothing else
        hidden = torch.zeros(len(ids), 1, 1, len(places), device=device)
        hidden.masked_fill_(((places > place) | (places < pads))[:, None, None], -math.inf)
        as_cache = SimpleNamespace(length=0, layer=functools.partial(layer, end=end))
        return model(ids, positions=place - pads, attend=functools.partial(attend, hidden), cache=as_cache)[:, -1]
    return forward, ids, place


def product_fp32(a, b):
    """a @ b [N, …, …] in fp32; on a GPU without fp32 copies of bf16 a and b, on a CPU rounded to bf16 in between, as in
    fast.BlockedAttention: there a few rows a are multiplied 2.5 times as fast from the right."""
    if a.dtype == torch.float32:
        return a @ b
    if a.device.type == "cpu":
        return (b.mT @ a.mT).mT.float().contiguous()
    return torch.bmm(a, b, out_dtype=torch.float32)

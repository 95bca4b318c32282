"""Llama 3.1 by hand: the model, its key-value cache, generation, and Hugging Face checkpoints in and out.

    h = embed(ids)
    for each layer:   h = h + attention(norm(h));   h = h + swiglu(norm(h))
    logits = head(norm(h))

Grouped-query attention (arXiv 2305.13245), rotary positions (arXiv 2104.09864) with Llama 3.1's frequency scaling
(arXiv 2407.21783), SwiGLU (arXiv 2002.05202), RMSNorm (arXiv 1910.07467). It runs every checkpoint of the Llama
architecture: Llama 2, 3, 3.1, 3.2, SmolLM2, TinyLlama and their fine-tunes.

Shapes: B batch, T time, S keys seen, D width, H query heads, K key-value heads, C channels of a head, V vocabulary.
"""
import contextlib
import functools
import itertools
import json
import math
import platform
import shutil
import threading
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from files import InputError, one_line, read_json, require_dir, reuse_freed_memory, written_aside

# ----- configuration -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary frequencies; the defaults are Llama-3.1-8B's."""
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The sizes of a model, named as in Hugging Face's config.json. The defaults are Llama-3.1-8B's."""
    vocab_size: int = 128256
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = RopeScaling()
    tie_word_embeddings: bool = False

    @classmethod
    def from_json(cls, path):
        """Reads a Hugging Face config.json. InputError for another architecture, or for what this code cannot run."""
        raw = read_json(path)

        def check(right, key, expected):
            if not right:
                raise InputError(f"{path}: {key} is {json.dumps(raw.get(key))}; expected {expected}")
        check(raw.get("model_type") == "llama", "model_type", '"llama": only Llama-architecture models run here')
        check(raw.get("hidden_act", "silu") == "silu", "hidden_act", '"silu"')
        for key in ("attention_bias", "mlp_bias", "rope_interleaved", "quantization_config"):
            check(not raw.get(key), key, "none: this model has no such part")
        heads = raw.get("num_attention_heads")
        kv_heads = raw.get("num_key_value_heads") or heads  # absent before Llama 2 70B
        defaults = {"num_key_value_heads": kv_heads, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048,
                    "tie_word_embeddings": False}  # what transformers takes for a key that is absent
        values = defaults | {key: raw[key] for key in SIZES if raw.get(key) is not None}
        for key in SIZES[:-2]:
            if key != "head_dim" or key in values:
                check(type(values.get(key)) is int and values[key] > 0, key, "a whole number above 0")
        check(type(values["rms_norm_eps"]) in (int, float), "rms_norm_eps", "a number")
        check(type(values["tie_word_embeddings"]) is bool, "tie_word_embeddings", "true or false")
        check(heads % values["num_key_value_heads"] == 0, "num_key_value_heads", f"a divisor of {heads} heads")
        values.setdefault("head_dim", values["hidden_size"] // heads)
        check(values["head_dim"] % 2 == 0, "head_dim", "an even number")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5 writes rope_parameters
        check(isinstance(rope, dict), "rope_scaling", "a JSON object")
        theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
        check(isinstance(theta, (int, float)) and theta > 0, "rope_theta", "a number above 0")
        kind = rope.get("rope_type", rope.get("type", "default"))
        check(kind in ("default", "llama3"), "rope_scaling", 'rope_type "default" or "llama3"')
        scaling = {field.name: rope.get(field.name) for field in fields(RopeScaling)} if kind == "llama3" else None
        check(not scaling or all(isinstance(value, (int, float)) and value > 0 for value in scaling.values()),
              "rope_scaling", f"the numbers {', '.join(field.name for field in fields(RopeScaling))}")
        return cls(rope_theta=float(theta), rope_scaling=RopeScaling(**scaling) if scaling else None, **values)

    def to_json(self):
        """The config.json that transformers and vLLM read, as a dict."""
        scaling = asdict(self.rope_scaling) | {"rope_type": "llama3"} if self.rope_scaling else None
        return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
                "attention_bias": False, "mlp_bias": False} | asdict(self) | {"rope_scaling": scaling}


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")

# ----- numerics ------------------------------------------------------------------------------------------------------


def slices(tensor):
    """Views of a contiguous tensor, flat, in pieces of the cache's size: what is computed between stays there."""
    return tensor.view(-1).split(slice_size(tensor.device))


def slice_size(device):
    return 1 << 17 if device.type == "cpu" else 1 << 24


def stochastic_round_(target, source, generator):
    """Writes fp32 `source` into bf16 `target` of the same shape, rounding up with the probability of the part cut off.

    bf16 is the upper half of fp32: adding a uniform 16-bit integer to the bits and cutting the lower 16 off rounds up
    exactly that often (arXiv 2502.20566), so the expected value is the fp32 one and a step far smaller than half a unit
    in the last place survives in the mean, where rounding to nearest undoes it always. NaN stays NaN. Works in slices
    of the cache's size, in place; a non-contiguous target is refused. `generator` lives on the device of `target`.
    """
    round_ = stochastic_rounder(target, generator)
    for rounded, exact in zip(slices(target), slices(source.contiguous())):
        round_(rounded, exact)


def stochastic_rounder(target, generator, words=None):
    """A function that does `stochastic_round_` for one slice of `target` and its fp32 source, to be called for each.

    Drawing is slow on a CPU, so every slice takes the upper half of (the same random 32-bit x) · (its own random odd
    number) mod 2^32. That is uniform for each weight, for an odd factor only permutes the 2^32 values; and what two
    slices take is independent but for the power of two in x, which matters for one x in 2^16. `words`: the x, from
    `random_words`, for several targets to share; else each target draws its own. Who knows whether a source is finite
    throughout says so as the third argument of the function; on a GPU, where asking would mean waiting, NaN is then not
    kept.
    """
    sizes = [len(part) for part in slices(target)]
    x = draw_int32(max(sizes, default=0), generator, target.device) if words is None else words
    factors = iter(draw_int32(len(sizes), generator, target.device).bitwise_or_(1))

    def round_(rounded, exact, finite=None):
        exact = exact.float()
        bits = (x[:len(rounded)] * next(factors)).bitwise_right_shift_(16).bitwise_and_(0xFFFF)
        bits.add_(exact.view(torch.int32)).bitwise_and_(-0x10000)
        nearby = bits.view(torch.float32)
        on_cpu = exact.device.type == "cpu"
        if on_cpu and finite is None:
            finite = exact.sum().isfinite()
        if finite is None or (on_cpu and not finite):
            nearby = torch.where(exact == exact, nearby, torch.nan)
        rounded.copy_(nearby)
    return round_


def random_words(generator, device):
    """As many random 32-bit integers as a slice has."""
    return draw_int32(slice_size(device), generator, device)


def draw_int32(n, generator, device):
    """n uniform 32-bit integers, two from each 64 bits drawn."""
    pairs = torch.empty((n + 1) // 2, dtype=torch.int64, device=device)
    return pairs.random_(-2**63, None, generator=generator).view(torch.int32)[:n]


def copy_weights_(target, source, generator):
    """`target` ← `source` of any float dtypes; what must lose bits to become bf16 is rounded stochastically."""
    if target.dtype == torch.bfloat16 and source.dtype != torch.bfloat16:
        stochastic_round_(target, source, generator)
    else:
        target.copy_(source)


def has_fast_bf16(device):
    """Whether bf16 matrix products are native: every current GPU, and CPUs with AVX-512-BF16, AMX or Arm's BF16."""
    if torch.device(device).type != "cpu":
        return True
    if platform.machine() in ("x86_64", "AMD64"):  # oneDNN's own answer is yes for any AVX-512, where it emulates them
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def product(x, weight):
    """x [..., in] @ weight [out, in].T in the dtype of x.

    A bf16 weight meets fp32 x on CPUs whose bf16 products are slow (AVX2: 8 times slower than fp32). bf16 to fp32 is
    exact, so this is the same product with less rounding; the fp32 copy lives only as long as the product.
    """
    return F.linear(x, weight.to(x.dtype))


def product_gradients(grad, x, weight):
    """The gradients of `product` for x and for weight, each in the dtype of its own."""
    return grad @ weight.to(grad.dtype), (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)


class Linear(torch.autograd.Function):
    """`product`, keeping the weight for backward as it is and not in the dtype of x."""
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    def backward(ctx, grad):
        return product_gradients(grad, *ctx.saved_tensors)


class NormLinear(torch.autograd.Function):
    """product(F.rms_norm(x), weight), keeping x alone: torch would keep the normed x and four steps on the way to it.

    With s = 1 / sqrt(mean(x^2) + eps), n = x s and g the gradient of n w:  d x = s (g w - n mean(g w n)),
    d w = sum(g n).
    """
    @staticmethod
    def forward(ctx, x, norm, eps, weight):
        ctx.save_for_backward(x, norm, weight)
        ctx.eps = eps
        return product(F.rms_norm(x, x.shape[-1:], norm.to(x.dtype), eps), weight)

    @staticmethod
    def backward(ctx, grad):
        x, norm, weight = ctx.saved_tensors
        norm_exact = norm.float()
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = scale.square_().div_(x.shape[-1]).add_(ctx.eps).rsqrt_()
        normed = x * scale
        grad, grad_weight = product_gradients(grad, (normed * norm_exact).to(x.dtype), weight)
        grad = grad.float()
        along = grad * normed
        grad_norm = along.flatten(0, -2).sum(0).to(norm.dtype)
        mean = (along @ norm_exact).div_(x.shape[-1])[..., None]
        return grad.mul_(norm_exact).addcmul_(normed, mean, value=-1).mul_(scale).to(x.dtype), grad_norm, None, \
            grad_weight


class GatedLinear(torch.autograd.Function):
    """product(silu(gate) * up, weight) for the input [gate | up]; backward keeps this input and no step on the way."""
    @staticmethod
    def forward(ctx, gate_up, weight):
        ctx.save_for_backward(gate_up, weight)
        gate, up = gate_up.chunk(2, dim=-1)
        return product(F.silu(gate).mul_(up), weight)

    @staticmethod
    def backward(ctx, grad):
        gate_up, weight = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        opened = F.silu(gate)
        grad, grad_weight = product_gradients(grad, opened * up, weight)
        torch.mul(grad, opened, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
        return grad_gate_up, grad_weight


def linear(x, weight):
    """x [..., in] @ weight [out, in].T, in the dtype of x."""
    if x.dtype != weight.dtype:
        return Linear.apply(x, weight)
    if x.numel() == x.shape[-1]:  # one token: torch's matrix-vector kernel is up to a quarter faster than its mm
        return torch.mv(weight, x.flatten()).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


def rotary_table(config, positions):
    """cos and signed sin [..., 1, C] in fp32 for integer `positions` [...], as `rotate` wants them.

    With Llama 3.1's scaling a wavelength beyond original_max / low_freq_factor is stretched by `factor`, one below
    original_max / high_freq_factor is kept, and between the two the frequency is interpolated (arXiv 2407.21783).
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=positions.device).float() / config.head_dim
    frequency = 1.0 / config.rope_theta ** exponent
    if config.rope_scaling:
        s = config.rope_scaling
        turns = s.original_max_position_embeddings * frequency / (2 * math.pi)  # in the context first trained on
        kept = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        frequency = kept * frequency + (1 - kept) * frequency / s.factor
    angle = (positions.float()[..., None] * frequency)[..., None, :]
    return torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1)


class Rotation(torch.autograd.Function):
    """x cos + swap(x) sin in fp32, rounded once; the way back is the rotation by the opposite angle."""
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        exact, swapped = x.float(), torch.empty(x.shape, device=x.device)
        (x1, x2), (sin1, sin2), (first, second) = (whole.chunk(2, -1) for whole in (exact, sin, swapped))
        torch.mul(x2, sin1, out=first)
        torch.mul(x1, sin2, out=second)
        return swapped.add_(exact * cos).to(x.dtype)  # not addcmul, which rounds once where transformers rounds twice

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return Rotation.apply(grad, cos, -sin), None, None


def rotate(x, cos, sin):
    """Rotates the channel pairs (i, i + C/2) of x [B, T, N, C], as Hugging Face weights expect; computed in fp32."""
    return Rotation.apply(x, cos, sin)


class BlockedAttention(torch.autograd.Function):
    """Causal attention by matrix products over 128 queries at a time, for bf16 on a CPU.

    scores = q k.T / sqrt(C);  p = softmax(scores);  out = p v. Only [H, 128, keys seen] scores exist at a time. A short
    text's p are kept for backward, those of more than KEPT_KEYS keys are computed again, for they grow with the square.
    Of packed documents (their lengths) each is a text of its own. Torch's own kernel multiplies small tiles, which is
    slow in bf16 (two cores, 9 heads, forward and backward: 512 tokens take it 12.9 ms, this 4.8). It keeps the scores
    in fp32; here they are rounded to bf16, as in any attention written as two bf16 products: in SmolLM2 the output is
    off by 0.4 % of its norm (torch's: 0.2 %), the gradients of q, k, v by 0.5, 0.6, 0.5 % (0.4, 0.5, 0.5 %).
    """
    @staticmethod
    def forward(ctx, q, k, v, documents=None):
        ctx.shape, ctx.groups, ctx.kept, saved = k.shape, alike(documents) if documents else [None], [], []
        keep = any(ctx.needs_input_grad)
        out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
        for group in ctx.groups:
            own = [BlockedAttention.gathered(x, k.shape[1], group) for x in (q, k, v)]
            attended, p = BlockedAttention.attend(*own, q.shape[1] // k.shape[1], keep and own[1].shape[1] <= KEPT_KEYS)
            BlockedAttention.scatter(out, attended, k.shape[1], group)
            ctx.kept.append(len(p))
            saved += [*own, *p]
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    def backward(ctx, grad):
        saved, (B, K, S, C), (_, H, T, _) = iter(ctx.saved_tensors), ctx.shape, grad.shape
        grads = [grad.new_empty(B, n, heads, C).transpose(1, 2) for n, heads in ((T, H), (S, K), (S, K))]
        for group, kept in zip(ctx.groups, ctx.kept):
            own, p = (list(itertools.islice(saved, n)) for n in (3, kept))  # q, k, v
            own_grad = BlockedAttention.gathered(grad, K, group)
            for whole, part in zip(grads, BlockedAttention.attend_backward(own_grad, *own, H // K, p)):
                BlockedAttention.scatter(whole, part, K, group)
        return *grads, None

    @staticmethod
    def attend(q, k, v, shared, keep):
        """q [N, T shared, C], k and v [N, S, C] as `gathered` makes them -> (like q, [the p of each block] or []).

        The `shared` = H / K queries of a token that share a key-value head are rows of one product, one after another.
        """
        out, kept = torch.empty_like(q), []
        for rows, seen in BlockedAttention.blocks(q, k, shared):
            p = BlockedAttention.probabilities(q[:, rows], k[:, :seen], shared)
            out[:, rows] = p @ v[:, :seen]
            if keep:
                kept.append(p)
        return out, kept

    @staticmethod
    def attend_backward(grad, q, k, v, shared, kept):
        """The gradients of `attend` for q, k, v; what p it has not kept is computed again."""
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros(k.shape), torch.zeros(v.shape)  # sums in fp32
        scale = q.shape[-1] ** -0.5
        for i, (rows, seen) in enumerate(BlockedAttention.blocks(q, k, shared)):
            own_q, own_k, own_grad = q[:, rows], k[:, :seen], grad[:, rows]
            p = kept[i] if kept else BlockedAttention.probabilities(own_q, own_k, shared)
            grad_v[:, :seen] += p.mT @ own_grad
            d = torch._softmax_backward_data(own_grad @ v[:, :seen].mT, p, -1, p.dtype)
            grad_q[:, rows] = BlockedAttention.scaled_product(d, own_k, scale)
            grad_k[:, :seen] += BlockedAttention.scaled_product(d.mT, own_q, scale)
        return grad_q, grad_k.to(k.dtype), grad_v.to(v.dtype)

    @staticmethod
    def by_key_head(x, K):
        """x [B, heads, T, C] as a view [B, K, T, heads / K, C]."""
        return x.unflatten(1, (K, -1)).transpose(2, 3)

    @staticmethod
    def gathered(x, K, group):
        """The documents [(start, length), …] of x [1, heads, T, C], zeros behind the shorter, as `attend` wants them:
        [documents K, n heads / K, C]. Without a group: the whole of x [B, heads, T, C], as [B K, T heads / K, C]."""
        x = BlockedAttention.by_key_head(x, K)
        if group is None:
            out = x.contiguous()
        else:
            longest = max(n for _, n in group)
            out = x.new_empty(len(group), K, longest + -longest % 8, *x.shape[3:])
            for own, (start, n) in zip(out, group):
                own[:, :n] = x[0, :, start:start + n]
                own[:, n:] = 0
        return out.flatten(2, 3).flatten(0, 1)

    @staticmethod
    def scatter(x, part, K, group):
        """The way back: writes what `gathered` made into x."""
        x = BlockedAttention.by_key_head(x, K)
        if group is None:
            x.copy_(part.view(x.shape))
            return
        for own, (start, n) in zip(part.view(len(group), K, -1, *x.shape[3:]), group):
            x[0, :, start:start + n] = own[:, :n]

    @staticmethod
    def blocks(q, k, shared, size=128):
        """(the rows of q that are a block of up to 128 tokens, how many keys the last of them sees), block by block."""
        T, S = q.shape[1] // shared, k.shape[1]
        for start in range(0, T, size):
            stop = min(start + size, T)
            yield slice(start * shared, stop * shared), stop + S - T

    @staticmethod
    def probabilities(q, k, shared):
        """p [N, n shared, seen] of a block of n tokens; the last sees all keys, the one before one fewer."""
        scores = BlockedAttention.scaled_product(q, k.mT, q.shape[-1] ** -0.5)
        n = q.shape[1] // shared
        scores[:, :, -n:] += causal_mask(n, shared, q.dtype)
        return scores.softmax(-1)

    @staticmethod
    def scaled_product(a, b, scale):
        """scale a @ b, rounded once."""
        return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)  # beta 0: the first is not looked at


@functools.lru_cache(maxsize=64)  # every layer asks for the same
def causal_mask(n, shared, dtype):
    """[n shared, n]: -inf where one of n queries must not look, 0 elsewhere; each stands there `shared` times."""
    return torch.full((n, n), -math.inf, dtype=dtype).triu(1).repeat_interleave(shared, 0)


KEPT_KEYS = 512  # up to here p takes less memory than the rest of what a layer keeps for backward


def alike(lengths):
    """Consecutive documents of these lengths in groups [[(start, length), …], …] that lose little by being padded to
    their longest: at most a quarter is added to attention's products."""
    groups, start = [[]], 0
    for n in lengths:
        together = [*(own for _, own in groups[-1]), n]
        if len(together) * max(together) ** 2 > 1.25 * sum(own ** 2 for own in together):
            groups.append([])
        groups[-1].append((start, n))
        start += n
    return groups


def blocked(q):
    """Whether attention goes through BlockedAttention."""
    return q.dtype == torch.bfloat16 and q.device.type == "cpu"


def attend_apart(documents, q, k, v):
    """Causal attention within each of the packed `documents` (lengths): q [1, H, T, C], k and v [1, K, T, C].

    Those `alike` in length take part in one call, padded at their end, where causal attention does not look.
    """
    if sum(documents) != q.shape[2]:
        raise ValueError(f"documents of {sum(documents)} tokens in a row of {q.shape[2]}")
    if blocked(q):
        return BlockedAttention.apply(q, k, v, documents)
    outputs = []
    for group in alike(documents):
        padded = [pad_sequence([x[0, :, start:start + n].transpose(0, 1) for start, n in group], batch_first=True)
                  for x in (q, k, v)]  # [documents, longest, heads, C]
        attended = causal_attention(*(x.transpose(1, 2) for x in padded))
        outputs += [own[:, :n] for own, (_, n) in zip(attended, group)]
    return torch.cat(outputs, 1)[None]


def causal_attention(q, k, v):
    """q [B, H, T, C], k and v [B, K, S, C] -> [B, H, T, C]; query i sees the keys up to i + S - T."""
    T, S = q.shape[2], k.shape[2]
    if T > 1 and blocked(q):
        return BlockedAttention.apply(q, k, v)
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if T == 1:  # the H / K queries that share a key-value head become the rows of one product
        grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
        return F.scaled_dot_product_attention(grouped, k, v).reshape(q.shape)
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class Embed(torch.autograd.Function):
    """Rows of a weight that has a `main_grad`, which backward adds to: autograd's own gradient is as large as the
    weight, nearly all zeros."""
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.main_grad = weight.main_grad
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad):
        rows, places = ctx.saved_tensors[0].unique(return_inverse=True)
        sums = grad.new_zeros(len(rows), grad.shape[-1], dtype=torch.float32)
        sums.index_add_(0, places.flatten(), grad.flatten(0, -2).float())
        ctx.main_grad[rows] += sums  # rounded once, should it be bf16
        return None, None


def embed(ids, weight):
    """Rows `ids` of `weight` [V, D]."""
    return Embed.apply(ids, weight) if hasattr(weight, "main_grad") else F.embedding(ids, weight)


class TokenLogps(torch.autograd.Function):
    """log p(label) = logit[label] - logsumexp(logits) in fp32, a block of the vocabulary at a time.

    Never all [N, V] logits exist in fp32. Kept for backward are the exponentials exp(logit - the row's largest in its
    block), in the dtype of h, while they are no more than KEPT_LOGITS; else a block's are computed again. From them
    follow d logits = grad * (onehot(label) - softmax), and backward has done with a block of the weight before the
    next.
    `keep`: whether there will be a backward pass.
    """
    @staticmethod
    def forward(ctx, h, weight, labels, keep):
        normalizer = torch.full(labels.shape, -math.inf, device=h.device)
        wanted = torch.zeros_like(normalizer)
        ctx.kept = [] if keep and len(h) * len(weight) <= KEPT_LOGITS else None
        for words in TokenLogps.blocks(h, weight):
            logits = product(h, weight[words])
            own, inside = TokenLogps.within(labels, words)
            wanted = torch.where(inside, logits.gather(-1, own[:, None])[:, 0].float(), wanted)
            top, sums = TokenLogps.exponentials_(logits)
            normalizer = torch.logaddexp(normalizer, top + sums.log())
            if ctx.kept is not None:
                ctx.kept.append((logits, top))
        ctx.save_for_backward(h, weight, labels, normalizer)
        return wanted - normalizer

    @staticmethod
    def backward(ctx, grad):
        h, weight, labels, normalizer = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # they are written over: a second backward pass computes them again
        grad_h = torch.zeros_like(h, dtype=torch.float32)
        sum_here = getattr(weight, "main_grad", None)  # then no gradient as large as the vocabulary is made
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] and sum_here is None else None
        for words in TokenLogps.blocks(h, weight):
            part = weight[words].to(h.dtype)
            if kept:
                d, top = kept.pop(0)
            else:
                d = F.linear(h, part)
                top, _ = TokenLogps.exponentials_(d)
            own, inside = TokenLogps.within(labels, words)
            hit, factor = torch.where(inside, grad, 0), -grad * (top - normalizer).exp()
            for rows, *column in zip(*(TokenLogps.pieces(x, d) for x in (d, factor, own, hit))):
                f, label, one = (x[:, None] for x in column)
                rows.copy_(rows.float().mul_(f).scatter_add_(-1, label, one))  # then rounded, once
            grad_h += d @ part
            if sum_here is not None:
                sum_here[words] += d.T @ h
            elif grad_weight is not None:
                grad_weight[words] = d.T @ h
        return grad_h.to(h.dtype), grad_weight, None, None

    @staticmethod
    def exponentials_(logits):
        """Writes exp(logit - the largest of its row) over logits [N, words]; (the largest, the sum of a row), in fp32.
        """
        top, sums = torch.empty(2, len(logits), device=logits.device)
        for rows, largest, total in zip(*(TokenLogps.pieces(x, logits) for x in (logits, top, sums))):
            exact = rows.float()
            torch.amax(exact, -1, out=largest)
            torch.sum(exact.sub_(largest[:, None]).exp_(), -1, out=total)
            rows.copy_(exact)
        return top, sums

    @staticmethod
    def blocks(h, weight):
        """Slices of the vocabulary, each with about as many logits as shall exist at a time."""
        size = max(1024, block_of_logits(h.device) // len(h) // 64 * 64)
        return [slice(start, start + size) for start in range(0, len(weight), size)]

    @staticmethod
    def within(labels, words):
        """The labels counted from the start of the block `words`, and which of them lie in it; the others are any."""
        inside = (labels >= words.start) & (labels < words.stop)
        return torch.where(inside, labels - words.start, 0), inside

    @staticmethod
    def pieces(tensor, logits):
        """Rows of `tensor` by as many as of a block's `logits` stay in a CPU's cache while worked on in fp32."""
        return tensor.split(max(1, (1 << 17) // logits.shape[1]) if tensor.device.type == "cpu" else len(tensor))


KEPT_LOGITS = 1 << 27  # 0.27 GB in bf16


def block_of_logits(device):
    """How many logits exist at a time: few on a CPU, where they should stay in its cache."""
    return 1 << 22 if device.type == "cpu" else 1 << 26


def token_logps(h, weight, labels):
    """log p(label) in fp32 for hidden states h [N, D], head weight [V, D], labels [N] (each a real one) -> [N]."""
    if not len(labels):  # the weight must get its gradient of zero here too: FSDP's ranks reduce the same weights
        return linear(h, weight).sum(-1).float()
    spare = -len(labels) % 8  # see data.collate
    h, labels = F.pad(h, (0, 0, 0, spare)), F.pad(labels, (0, spare))
    return TokenLogps.apply(h, weight, labels, torch.is_grad_enabled())[:len(labels) - spare]

# ----- the model -----------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)  # accumulates in fp32

    def then(self, x, weight):
        """linear(self(x), weight), on a CPU with little kept for backward; a GPU's own norm keeps little."""
        if x.device.type == "cpu" and torch.is_grad_enabled():
            return NormLinear.apply(x, self.weight, self.eps, weight)
        return linear(self(x), weight)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.channels = config.head_dim
        self.qkv = nn.Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.channels, bias=False)
        self.out = nn.Linear(self.heads * self.channels, config.hidden_size, bias=False)

    def forward(self, x, norm, rotary, attend, cache):
        qkv = norm.then(x, self.qkv.weight).unflatten(-1, (-1, self.channels))  # [B, T, H + 2K, C]
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        q, k = rotate(qk, *rotary).split([self.heads, self.kv_heads], dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, heads, T, C]
        if cache is not None:
            k, v = cache(k, v)
        return linear(attend(q, k, v).transpose(1, 2).flatten(2), self.out.weight)


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x, norm):
        return GatedLinear.apply(norm.then(x, self.gate_up.weight), self.down.weight)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.attention_norm, self.attention = RMSNorm(config), Attention(config)
        self.mlp_norm, self.mlp = RMSNorm(config), SwiGLU(config)
        self.checkpointing = False  # recompute the block in backward instead of keeping its activations

    def forward(self, h, *context):
        if self.checkpointing and torch.is_grad_enabled():  # inside forward: FSDP's hooks stay outside, in order
            return checkpoint(self.compute, h, *context, use_reentrant=False)
        return self.compute(h, *context)

    def compute(self, h, rotary, attend, cache):
        h = h + self.attention(h, self.attention_norm, rotary, attend, cache)
        return h + self.mlp(h, self.mlp_norm)


class Llama(nn.Module):
    """`Llama(config)(ids)` -> logits [B, T, V] in the compute dtype; upcast them before a softmax."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()
        self.unusable = None  # why this model must not be used again; set when its weights could not be restored

    def tie_weights(self):
        """Makes the head the embedding where the config says so. Materialising a meta model separates the two."""
        if self.config.tie_word_embeddings:
            self.head.weight = self.embed.weight

    def init_weights(self, seed=0):
        """Random weights for tests and benchmarks: normal with deviation 0.02, norms one; repeatable from `seed`."""
        generator = torch.Generator(self.norm.weight.device).manual_seed(seed)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.fill_(1) if parameter.dim() == 1 else parameter.normal_(0, 0.02, generator=generator)
        return self

    def compute_dtype(self, ids):
        """The weights' dtype; but for bf16 weights fp32 where the machine's bf16 products are slow. Not for a single
        token at inference: there the time goes into reading the weights, and bf16 vectors do as well."""
        weight = self.norm.weight
        one_token = ids.numel() == 1 and not torch.is_grad_enabled()
        return weight.dtype if one_token or has_fast_bf16(weight.device) else torch.float32

    def forward(self, ids, *, labels=None, positions=None, attend=causal_attention, cache=None, last_only=False):
        """ids [B, T] int64 -> logits [B, T, V], or [B, 1, V] with `last_only`.

        With `labels` [B, T] (label t is the token wanted *after* position t, -100: not trained) it returns log p(label)
        in fp32, [B, T], 0 where there is no label, without ever holding all the logits: what SFT and DPO need.
        `positions` [T] or [B, T] default to 0, 1, …; `attend(q, k, v)` may stand in another mask (packing);
        `cache` is a KVCache, which is read, extended and advanced.
        """
        if self.unusable:
            raise RuntimeError(self.unusable)
        if positions is None:
            start = cache.length if cache else 0
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        rotary = rotary_table(self.config, positions)
        h = embed(ids, self.embed.weight).to(self.compute_dtype(ids))
        for i, layer in enumerate(self.layers):
            h = layer(h, rotary, attend, cache and cache.layer(i))
        if cache:
            cache.length += ids.shape[1]
        if labels is None:
            return linear(self.norm(h[:, -1:] if last_only else h), self.head.weight)
        wanted = labels != -100
        logps = torch.zeros(labels.shape, device=h.device)
        return logps.masked_scatter(wanted, token_logps(self.norm(h[wanted]), self.head.weight, labels[wanted]))


def parameter_count(config):
    """How many parameters a model of this config has; a tied head counts once."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Llama(config).parameters())

# ----- generation ----------------------------------------------------------------------------------------------------


class KVCache:
    """Keys and values of all layers, allocated once for `max_length` positions: kv [L, B, 2K, max_length, C].

    The heads of k come first, then those of v, so that one token's are written by one copy; k and v are views.
    """

    def __init__(self, model, max_length, batch_size=1):
        config, weight = model.config, model.norm.weight
        shape = (config.num_hidden_layers, batch_size, 2 * config.num_key_value_heads, max_length, config.head_dim)
        self.kv = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.k, self.v = self.kv.chunk(2, dim=2)
        self.length = 0  # positions filled so far

    def layer(self, i):
        """A function that appends one layer's new k, v [B, K, T, C] and returns that layer's up to now."""
        def extend(k, v):
            end = self.length + k.shape[2]
            self.k[i, :, :, self.length:end] = k
            self.v[i, :, :, self.length:end] = v
            if self.length == 0:
                return k, v  # unrounded, when the compute dtype is wider than the cache's
            return self.k[i, :, :, :end].to(k.dtype), self.v[i, :, :, :end].to(v.dtype)
        return extend


def rms_norm_vector(x, weight, eps, zeros):
    """RMSNorm of one vector [D] on a CPU; `zeros` is a vector of them. Two operations where F.rms_norm needs eight,
    each of which costs more than its arithmetic."""
    length = torch.linalg.vector_norm(x, dtype=torch.float32).item()
    return torch.addcmul(zeros, x, weight, value=(length * length / len(x) + eps) ** -0.5)


def decoder(model, cache):
    """A function token -> logits [V]: what `model` gives for one more token of the one text in `cache`, with less ado;
    for a CPU.

    A token's time should go into reading the weights. So here are no modules and nothing is allocated that can be kept:
    every intermediate is a vector of the weights' dtype with its place, and every view on it is made once. The weights
    are those of the model, not copies: a step sees what was changed in place. Call it without gradients.
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
    table = rotary_table(config, torch.arange(cache.kv.shape[3], device=like.device))
    (x1, x2), (turned1, turned2), (sin1, sin2) = [whole.chunk(2, dim=-1) for whole in (x, turned, sin)]
    turned_q, turned_kv = turned.split([H, 2 * K])

    def step(token):
        if model.unusable:
            raise RuntimeError(model.unusable)
        position, end = cache.length, cache.length + 1
        cos[:H + K], sin[:H + K] = table[0][position], table[1][position]
        places = cache.kv[:, 0, :, position].unbind()
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


def recorded_decoder(model, cache):
    """`decoder` for a GPU, to which a token of a small model is a thousand kernels, each shorter than its launch.

    They are recorded once, as a CUDA graph, and replayed for each token, on the same memory: so the token and its place
    are tensors, attention goes over all places of the cache, those not yet filled hidden, and the logits are written
    over by the next step. Recording takes as long as a few tokens. The weights are those of the model: a step sees what
    was changed in place. Call it as it was made, without gradients or in inference mode.
    """
    forward, ids, position = one_token_forward(model, cache)
    device, graph = ids.device, torch.cuda.CUDAGraph()
    for _ in range(2):  # what a first call sets up cannot be recorded
        forward()
    # "thread_local": what other threads ask of the GPU meanwhile is not recorded and does no harm
    with RECORDING, torch.cuda.device(device), torch.cuda.graph(graph, stream=recording_stream(device),
                                                                capture_error_mode="thread_local"):
        logits = forward()

    def step(token):
        if model.unusable:
            raise RuntimeError(model.unusable)
        if cache.length == cache.kv.shape[3]:  # a GPU would end the process's use of it
            raise IndexError(f"the cache is full: {cache.length} tokens")
        ids.fill_(token)
        position.fill_(cache.length)
        graph.replay()
        cache.length += 1
        return logits
    return step


RECORDING = threading.Lock()  # a process can record one graph at a time


@functools.lru_cache
def recording_stream(device):
    """The stream on which graphs of this GPU are recorded; torch's own choice is the GPU of the first recording."""
    return torch.cuda.Stream(device)


def one_token_forward(model, cache):
    """(a function -> logits [V], ids [1, 1], position [1]): the plain forward of the token in `ids` at `position`, the
    same kernels on the same memory wherever that is."""
    device = model.norm.weight.device
    ids = torch.zeros(1, 1, dtype=torch.int64, device=device)
    position = torch.full((1,), cache.length, device=device)
    cache.kv[:, :, :, cache.length:] = 0  # p = 0 there, and 0 times the NaN that may lie in fresh memory is NaN

    def layer(i):
        def extend(k, v):
            return cache.k[i].index_copy_(2, position, k), cache.v[i].index_copy_(2, position, v)
        return extend

    def attend(hidden, q, k, v):
        grouped = q.view(k.shape[1], -1, q.shape[3])  # the queries that share a key-value head, as rows
        scores = product_fp32(grouped, k[0].mT).mul_(q.shape[3] ** -0.5).add_(hidden)
        return (scores.softmax(-1).to(v.dtype) @ v[0]).view(q.shape)

    def forward():
        places = torch.arange(cache.kv.shape[3], device=device)  # here: a graph keeps what it makes and nothing else
        hidden = torch.zeros(len(places), device=device).masked_fill_(places > position, -math.inf)
        as_cache = SimpleNamespace(length=0, layer=layer)
        return model(ids, positions=position, attend=functools.partial(attend, hidden), cache=as_cache)[0, -1]
    return forward, ids, position


def product_fp32(a, b):
    """a @ b [N, …, …] in fp32; on a GPU without fp32 copies of bf16 a and b."""
    if a.dtype == torch.float32 or a.device.type == "cpu":
        return a.float() @ b.float()
    return torch.bmm(a, b, out_dtype=torch.float32)


def sample(logits, generator, temperature=0.7, top_p=0.95, top_k=0, min_p=0.0):
    """One token id from logits [V]: temperature, then top-k, top-p (arXiv 1904.09751), min-p (arXiv 2407.01082).

    temperature 0 takes the largest logit; top_k 0, top_p 1 and min_p 0 switch those filters off. InputError when the
    logits are not finite: then the weights are not sound.
    """
    lowest, highest = logits.aminmax()  # one quick pass that NaN and infinities come through
    sound = (highest - lowest).isfinite()
    if temperature < 1e-5:  # logits divided by less would overflow
        enough = sound
        token = logits.max(0).indices  # the first of equals, as argmax, which is five times slower for bf16
    else:
        logits = logits.float() / temperature
        total = logits.logsumexp(0)

        def draw(k):
            """(one of the k likeliest, whether the nucleus lies among them)."""
            values, order = logits.topk(k)
            p = (values - (values.logsumexp(0) if top_k else total)).exp()  # descending
            complete = p.sum() >= top_p
            if top_p < 1:
                p = p.where(p.cumsum(0) - p < top_p, 0)  # keeps the token that crosses top_p
            if min_p > 0:
                p = p.where(p >= min_p * p[0], 0)
            # torch.multinomial's own way to draw one, without its checks, for each of which a GPU would have to wait
            drawn = p.div_(torch.empty_like(p).exponential_(generator=generator)).argmax()
            return order.take(drawn), complete  # order[drawn] would wait
        most = min(top_k or len(logits), len(logits))
        k = most if top_k or top_p >= 1 else min(most, 512)  # nearly always enough, and sorting all of V is slow
        token, enough = draw(k)
    token, sound, enough = torch.stack([token, sound, enough]).tolist()  # a GPU's only wait, with few exceptions
    if not sound:
        raise InputError("the model gives logits that are not finite numbers; expected sound weights")
    return token if enough or k == most else int(draw(most)[0])


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


def generate(model, ids, *, max_new_tokens=2048, temperature=0.7, top_p=0.95, top_k=0, min_p=0.0, stop_ids=(),
             seed=0):
    """Yields new token ids after the prompt `ids` (a list of ints); one in `stop_ids` is yielded and ends it.

    Stops at `max_new_tokens` or when the model's context is full. The same seed gives the same tokens; `seed` None
    draws a fresh one. InputError when the prompt is empty or does not fit the context.
    """
    limit = model.config.max_position_embeddings
    if not 0 < len(ids) <= limit:
        raise InputError(f"the prompt has {len(ids):,} tokens; expected 1 to {limit:,}, the model's context")
    device = model.norm.weight.device
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    max_new_tokens = min(max_new_tokens, limit - len(ids) + 1)
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

# ----- Hugging Face checkpoints --------------------------------------------------------------------------------------


def checkpoint_names(config):
    """{our parameter: the Hugging Face tensors that are its rows}: q, k, v are one matrix here, as are gate and up."""
    names = {"embed.weight": ["model.embed_tokens.weight"]}
    for i in range(config.num_hidden_layers):
        own, theirs = f"layers.{i}", f"model.layers.{i}"
        names |= {
            f"{own}.attention_norm.weight": [f"{theirs}.input_layernorm.weight"],
            f"{own}.attention.qkv.weight": [f"{theirs}.self_attn.{part}_proj.weight" for part in "qkv"],
            f"{own}.attention.out.weight": [f"{theirs}.self_attn.o_proj.weight"],
            f"{own}.mlp_norm.weight": [f"{theirs}.post_attention_layernorm.weight"],
            f"{own}.mlp.gate_up.weight": [f"{theirs}.mlp.gate_proj.weight", f"{theirs}.mlp.up_proj.weight"],
            f"{own}.mlp.down.weight": [f"{theirs}.mlp.down_proj.weight"]}
    names["norm.weight"] = ["model.norm.weight"]
    if not config.tie_word_embeddings:
        names["head.weight"] = ["lm_head.weight"]
    return names


def checkpoint_shapes(config):
    """{Hugging Face tensor name: shape} of a model of this config, in the order of `checkpoint_names`."""
    with torch.device("meta"):
        parameters = dict(Llama(config).named_parameters())
    kv_rows = config.num_key_value_heads * config.head_dim
    shapes = {}
    for own, parts in checkpoint_names(config).items():
        shape = tuple(parameters[own].shape)
        rows = {3: [shape[0] - 2 * kv_rows, kv_rows, kv_rows], 2: [shape[0] // 2] * 2, 1: [shape[0]]}[len(parts)]
        shapes |= {name: (n, *shape[1:]) for name, n in zip(parts, rows)}
    return shapes


@contextlib.contextmanager
def open_safetensors(path):
    """safe_open that reports a damaged file, by name, as InputError."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"{path}: damaged safetensors file ({one_line(error)})") from None


def checkpoint_files(directory):
    """{tensor name: the safetensors file that holds it} of a folder with one file or with shards and their index."""
    directory = require_dir(directory, "a model (config.json and safetensors files)")
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise InputError(f"{index}: no weight_map; expected tensor names mapped to file names")
        paths = {name: directory / file for name, file in weight_map.items()}
        for path in set(paths.values()):
            if "\0" in str(path) or path.parent.resolve() != directory.resolve() or path.name in ("", ".", ".."):
                raise InputError(f"{index}: names the file {str(path)!r}; expected files of its own folder only")
            if not path.is_file():
                raise InputError(f"{path}: no such file; {index.name} expects it")
        for path in set(paths.values()):
            with open_safetensors(path) as file:
                absent = {name for name, holder in paths.items() if holder == path} - set(file.keys())
            if absent:
                raise InputError(f"{path}: {listed(absent)} missing; {index.name} expects them there")
        return paths
    path = directory / "model.safetensors"
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected model.safetensors or model.safetensors.index.json")
    with open_safetensors(path) as file:
        return dict.fromkeys(file.keys(), path)


def listed(names, most=5):
    names = sorted(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_checkpoint(files, config):
    """Compares every name and shape with what the config asks for; InputError lists what is missing or extra."""
    expected = checkpoint_shapes(config)
    folder = next(iter(files.values())).parent if files else "checkpoint"
    extra = {name for name in set(files) - set(expected) if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings:
        extra.discard("lm_head.weight")  # the same tensor stored twice, as some tools do
    faults = [f"{what} {listed(names)}" for what, names in
              (("missing", set(expected) - set(files)), ("not expected", extra)) if names]
    for path in sorted(set(files.values())):
        with open_safetensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (a safe_open file is no dict)
                if name in expected and files.get(name) == path:
                    shape = tuple(file.get_slice(name).get_shape())
                    if shape != expected[name]:
                        faults.append(f"{name} is {list(shape)}, expected {list(expected[name])}")
    if faults:
        raise InputError(f"{folder}: the tensors do not fit config.json: {'; '.join(faults[:5])}")


def read_rows(files, parts, start, stop):
    """Rows start … stop of the Hugging Face tensors `parts` set one below the other, piece by piece: (offset, tensor).

    The file is memory-mapped anew for each piece of at most 8 MB, so no more than that is resident beside the model.
    """
    begin = 0
    for name in parts:
        with open_safetensors(files[name]) as file:
            shape = file.get_slice(name).get_shape()
        step = max(1, (1 << 21) // math.prod(shape[1:]))
        first, last = max(start - begin, 0), min(stop - begin, shape[0])
        for row in range(first, last, step):
            with open_safetensors(files[name]) as file:
                piece = file.get_slice(name)[row:min(row + step, last)]
            yield begin + row - start, piece
        begin += shape[0]


def load_model(directory, device="cpu", dtype=torch.bfloat16, seed=0):
    """The Llama in `directory` (Hugging Face layout), its weights in `dtype` on `device`, ready for inference.

    Built on the meta device and filled from memory-mapped files piece by piece: the peak is the weights. What is stored
    in more than bf16 becomes bf16 by stochastic rounding, repeatable from `seed`. InputError names what is wrong.
    """
    reuse_freed_memory()
    directory = require_dir(directory, "a model (config.json and safetensors files)")
    config = LlamaConfig.from_json(directory / "config.json")
    files = checkpoint_files(directory)
    check_checkpoint(files, config)
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    model.to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    names = checkpoint_names(config)
    with torch.no_grad():
        for own, parameter in model.named_parameters():
            for offset, rows in read_rows(files, names[own], 0, len(parameter)):
                copy_weights_(parameter[offset:offset + len(rows)], rows.to(device), generator)
    return model.eval()


def save_model(model, directory, *, source=None, dtype=None, seed=0, max_shard_bytes=5_000_000_000):
    """Writes the model as a folder that transformers and vLLM load; see `write_checkpoint`."""
    parameters = dict(model.named_parameters())
    write_checkpoint(directory, model.config, parameters.__getitem__, source=source, seed=seed,
                     dtype=dtype or model.norm.weight.dtype, max_shard_bytes=max_shard_bytes)


def write_checkpoint(directory, config, parameter, *, source=None, dtype=torch.bfloat16, seed=0,
                     max_shard_bytes=5_000_000_000, finish=None):
    """Writes config.json, safetensors shards and their index, aside and renamed; tied weights are stored once.

    `parameter(name)` gives our parameter of that name, whole; it is asked for one at a time. fp32 becomes bf16 by
    stochastic rounding from `seed`. Tokenizer and generation settings are copied from the folder `source`;
    `finish(folder)` may add files (a model card) before the folder gets its name.
    """
    itemsize = torch.empty((), dtype=dtype).element_size()
    shards, size = [[]], 0  # lists of our parameter names
    shapes = checkpoint_shapes(config)
    for own, parts in checkpoint_names(config).items():
        n_bytes = sum(math.prod(shapes[part]) for part in parts) * itemsize
        if shards[-1] and size + n_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(own)
        size += n_bytes
    with written_aside(directory) as aside:
        aside.mkdir()
        weight_map, generator = {}, torch.Generator("cpu").manual_seed(seed)
        for number, names in enumerate(shards, 1):
            file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if shards[1:] else "model.safetensors"
            tensors = {}
            for own in names:
                whole = parameter(own).detach().cpu()
                kept = torch.empty(whole.shape, dtype=dtype)
                copy_weights_(kept, whole, generator)
                parts = checkpoint_names(config)[own]
                tensors |= dict(zip(parts, kept.split([shapes[part][0] for part in parts])))
            save_file(tensors, aside / file_name, metadata={"format": "pt"})
            (aside / file_name).chmod(0o644)  # safetensors makes a file that only its owner may read
            weight_map |= dict.fromkeys(tensors, file_name)
        if shards[1:]:
            total = sum(math.prod(shape) for shape in shapes.values()) * itemsize
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (aside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        for name in COPIED_FILES if source else ():
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, aside / name)
        raw = {"torch_dtype": str(dtype).removeprefix("torch.")} | config.to_json()
        if source:
            given = read_json(Path(source) / "config.json")
            raw = {key: given[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in given} | raw
        (aside / "config.json").write_text(json.dumps(raw, indent=2))
        if finish:
            finish(aside)


COPIED_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                "generation_config.json", "chat_template.jinja", "LICENSE", "LICENSE.txt", "USE_POLICY.md")


def stop_ids_of(directory):
    """The end-of-text ids of generation_config.json, or of config.json where that has none; a set, empty if neither."""
    for name in ("generation_config.json", "config.json"):
        path = Path(directory) / name
        ids = read_json(path).get("eos_token_id") if path.is_file() else None
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not all(isinstance(one, int) for one in ids):
                raise InputError(f"{path}: eos_token_id is {json.dumps(ids)}; expected a number or a list of numbers")
            return set(ids)
    return set()

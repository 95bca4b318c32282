"""Llama 3.1 by hand: the model and its key-value cache.

    h = embed(ids)
    for each layer:   h = h + attention(norm(h));   h = h + mlp(norm(h))
    logits = head(norm(h))

Grouped-query attention (arXiv 2305.13245), rotary positions (arXiv 2104.09864) with Llama 3.1's frequency scaling
(arXiv 2407.21783), SwiGLU (arXiv 2002.05202), RMSNorm (arXiv 1910.07467). It runs every checkpoint of the Llama
architecture: Llama 2, 3, 3.1, 3.2, SmolLM2, TinyLlama and their fine-tunes.

Shapes: B batch, T time, S keys seen, D width, H query heads, K key-value heads, C channels of a head, V vocabulary.
"""
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fast import causal_attention, embed, gated_linear, has_fast_bf16, linear, rms_norm, rotate, token_logps
from files import require_dir
from rounding import copy_weights_
from weights import (
    check_checkpoint,
    checkpoint_files,
    checkpoint_names,
    has_own_head,
    print_notices,
    read_config,
    read_rows,
    write_checkpoint,
)

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
        values = read_config(path)
        scaling = values.pop("rope_scaling")
        return cls(rope_scaling=RopeScaling(**scaling) if scaling else None, **values)

# ----- the parts -----------------------------------------------------------------------------------------------------


def rotary_table(config, positions):
    """cos and signed sin [..., 1, C] in fp32 for integer `positions` [...], as fast.rotate takes them.

    With Llama 3.1's scaling a wavelength beyond original_max / low_freq_factor is stretched by `factor`, one below
    original_max / high_freq_factor is kept, and between the two the frequency is interpolated (arXiv 2407.21783).
    """
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64, device=positions.device).float() / config.head_dim
    frequency = 1.0 / config.rope_theta ** exponent
    if config.rope_scaling:
        s = config.rope_scaling
        turns = s.original_max_position_embeddings * frequency / (2 * math.pi)  # in the context first trained on
        smooth = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        frequency = smooth * frequency + (1 - smooth) * frequency / s.factor
    angle = (positions.float()[..., None] * frequency)[..., None, :]
    return torch.cat([angle.cos(), angle.cos()], -1), torch.cat([-angle.sin(), angle.sin()], -1)


class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.channels = config.head_dim
        self.qkv = nn.Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.channels, bias=False)
        self.out = nn.Linear(self.heads * self.channels, config.hidden_size, bias=False)

    def forward(self, x, rotary, attend, cache):
        qkv = linear(x, self.qkv.weight).unflatten(-1, (-1, self.channels))  # [B, T, H + 2K, C]
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        q, k = rotate(qk, *rotary).split([self.heads, self.kv_heads], dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, heads, T, C]
        if cache is not None:
            k, v = cache(k, v)
        return linear(attend(q, k, v).transpose(1, 2).flatten(2), self.out.weight)  # [B, T, D]


class SwiGLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return gated_linear(linear(x, self.gate_up.weight), self.down.weight)  # down(silu(gate) * up)

# ----- the whole -----------------------------------------------------------------------------------------------------


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
        h = h + self.attention(self.attention_norm(h), rotary, attend, cache)
        h = h + self.mlp(self.mlp_norm(h))
        return h


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
        self.embed_grad = self.head_grad = None  # buffers that take these weights' gradients instead of autograd
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
        """The weights' dtype, or fp32 for bf16 weights on a machine whose bf16 products are slow. A single token at
        inference stays in bf16: its time goes into reading the weights."""
        weight = self.norm.weight
        one_token = ids.numel() == 1 and not torch.is_grad_enabled()
        return weight.dtype if one_token or has_fast_bf16(weight.device) else torch.float32

    def forward(self, ids, *, labels=None, positions=None, attend=causal_attention, cache=None, last_only=False):
        """ids [B, T] int64 -> logits [B, T, V], or [B, 1, V] with `last_only`.

        With `labels` [B, T] (label t is the token wanted *after* position t, -100: not trained) it returns log p(label)
        in fp32, [B, T], 0 where there is no label, without ever holding all the logits: SFT and DPO need no more.
        `positions` [T] or [B, T] default to 0, 1, …; `attend(q, k, v)` may stand in another mask (packing);
        `cache` is a KVCache, which is read, extended and advanced.
        """
        if self.unusable:
            raise RuntimeError(self.unusable)
        if positions is None:
            start = cache.length if cache else 0
            positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        rotary = rotary_table(self.config, positions)
        h = embed(ids, self.embed.weight, self.embed_grad).to(self.compute_dtype(ids))  # [B, T, D]
        for i, layer in enumerate(self.layers):
            h = layer(h, rotary, attend, cache and cache.layer(i))
        if cache:
            cache.length += ids.shape[1]
        if labels is None:
            return linear(self.norm(h[:, -1:] if last_only else h), self.head.weight)
        wanted = labels != -100
        logps = torch.zeros(labels.shape, device=h.device)
        return logps.masked_scatter(wanted, token_logps(self.norm(h[wanted]), self.head.weight, labels[wanted],
                                                        self.head_grad))


class KVCache:
    """Keys and values of all layers, allocated once for `max_length` positions: kv [L, 2, B, K, max_length, C].

    They are one tensor, so that one token's are written by one copy; k and v are views.
    """

    def __init__(self, model, max_length, batch_size=1):
        config, weight = model.config, model.norm.weight
        shape = (config.num_hidden_layers, 2, batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.kv = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.k, self.v = self.kv.unbind(1)
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


# ----- load and save -------------------------------------------------------------------------------------------------


def open_checkpoint(directory):
    """(LlamaConfig, {tensor: its file}) of a model's folder; InputError names the tensors that do not fit the config.

    As in transformers, the files decide on tying: a model declared tied whose files hold another head is untied.
    """
    config = LlamaConfig.from_json(Path(directory) / "config.json")
    files = checkpoint_files(directory)
    if config.tie_word_embeddings and has_own_head(files, config):
        config = replace(config, tie_word_embeddings=False)
    check_checkpoint(files, config)
    return config, files


def load_model(directory, device="cpu", dtype=torch.bfloat16, seed=0):
    """The Llama in `directory` (Hugging Face layout), its weights in `dtype` on `device`, ready for inference.

    The model is built on the meta device and filled from memory-mapped files piece by piece, so memory holds the
    weights and one piece. Weights more exact than bf16 become bf16 by stochastic rounding, repeatable from `seed`.
    InputError names the fault. A program calls fast.reuse_freed_memory() first.
    """
    directory = require_dir(directory, "a model (config.json and safetensors files)")
    config, files = open_checkpoint(directory)
    print_notices(directory, config)
    with torch.device("meta"):
        model = Llama(config).to(dtype)
    return fill(model, files, checkpoint_names(config, files), device, seed)


def fill(model, files, names, device, seed=0):
    """Gives a model on the meta device its weights on `device`, ready for inference; see load_model.

    `files` is {tensor: its file}, `names` {parameter: the tensors that are its rows}, as weights.checkpoint_names.
    """
    model.to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for offset, rows in read_rows(files, names[name], 0, len(parameter)):
                copy_weights_(parameter[offset:offset + len(rows)], rows.to(device), generator)
    return model.eval()


def save_model(model, directory, *, source=None, dtype=None, seed=0, max_shard_bytes=5_000_000_000):
    """Writes the model as a folder that transformers and vLLM load; see `write_checkpoint`."""
    parameters = dict(model.named_parameters())
    write_checkpoint(directory, model.config, parameters.__getitem__, source=source, seed=seed,
                     dtype=dtype or model.norm.weight.dtype, max_shard_bytes=max_shard_bytes)

"""Training's operations, fast and lean. Each section: the plain formula, the fast form, one figure, one test.

    linear        x W.T                                for bf16 weights also on a CPU without bf16 products
    embed         W[ids]                               adds its gradient to a buffer, if given one
    rms_norm      x / sqrt(mean(x^2) + eps) · w        keeps its output alone for backward
    gated_linear  (silu(gate) · up) W.T                keeps [gate | up] alone
    rotate        x cos + swap(x) sin                  keeps the angles alone
    attention     softmax(q k.T / sqrt(C)) v           causal, in blocks of queries; packed documents apart
    token_logps   logit[label] - logsumexp(logits)     never all the logits
    memory        how the process keeps and returns freed memory
    threads       fewer of them beside busy processes

model.py reads as the textbook does because speed lives here. Every function gives the value and the gradients of its
plain formula; tests/test_fast.py compares the two. A gradient of a gradient is refused, not given wrong: backward uses
numbers that forward kept, of which autograd knows nothing.

Shapes: B batch, T queries, S keys, D width, H query heads, K key-value heads, C channels of a head, N labels, V words.
"""
import contextlib
import ctypes
import functools
import math
import os
import platform
import sys
import time

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# ----- linear: x W.T -------------------------------------------------------------------------------------------------


def has_fast_bf16(device):
    """Whether bf16 matrix products are native: every current GPU, and CPUs with AVX-512-BF16, AMX or Arm's BF16."""
    if torch.device(device).type != "cpu":
        return True
    if platform.machine() in ("x86_64", "AMD64"):  # oneDNN's own answer is yes for any AVX-512, where it emulates them
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def linear(x, weight):
    """x [..., in] @ weight [out, in].T, in the dtype of x."""
    if x.dtype != weight.dtype:
        return WidenedLinear.apply(x, weight)
    if x.numel() == x.shape[-1]:  # one token: torch's matrix-vector kernel is up to a quarter faster than its mm
        return torch.mv(weight, x.flatten()).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


def product(x, weight):
    """F.linear(x, weight) with a bf16 weight widened to fp32 x, on CPUs whose bf16 products are 8 times slower (AVX2).

    bf16 to fp32 is exact, so this is the same product with less rounding. The wide copy lives as long as the product.
    """
    return F.linear(x, weight.to(x.dtype))


def product_gradients(grad, x, weight):
    """The gradients of `product` for x and for weight, each in its own dtype."""
    return grad @ weight.to(grad.dtype), (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(weight.dtype)


class WidenedLinear(torch.autograd.Function):
    """`product`; keeps the bf16 weight for backward, not its wide copy."""
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return product_gradients(grad, *ctx.saved_tensors)

# ----- embed: W[ids] -------------------------------------------------------------------------------------------------


def embed(ids, weight, grad_buffer=None):
    """Rows `ids` of weight [V, D]. With `grad_buffer` [V, D] the weight's gradient is added there, not handed back.

    Autograd's is as large as the weight and nearly all zeros; without it an SFT step of SmolLM2 peaks 5 % lower.
    """
    return F.embedding(ids, weight) if grad_buffer is None else BufferedEmbedding.apply(ids, weight, grad_buffer)


class BufferedEmbedding(torch.autograd.Function):
    """F.embedding whose backward adds the rows that were looked up, summed in fp32, to the buffer."""
    @staticmethod
    def forward(ctx, ids, weight, grad_buffer):
        ctx.save_for_backward(ids)
        ctx.grad_buffer = grad_buffer
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        rows, places = ctx.saved_tensors[0].unique(return_inverse=True)
        sums = grad.new_zeros(len(rows), grad.shape[-1], dtype=torch.float32)
        sums.index_add_(0, places.flatten(), grad.flatten(0, -2).float())
        ctx.grad_buffer[rows] += sums
        return None, None, None

# ----- rms_norm: x / sqrt(mean(x^2) + eps) · w -----------------------------------------------------------------------


def rms_norm(x, weight, eps):
    """RMSNorm (arXiv 1910.07467) of x [..., D] in the dtype of x, computed in fp32; weight [D]."""
    if x.device.type == "cpu" and torch.is_grad_enabled():
        return Norm.apply(x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


class Norm(torch.autograd.Function):
    """F.rms_norm that in bf16 keeps y, its output, alone, which the next product keeps as well; torch keeps five more.

    With s = 1 / sqrt(mean(x^2) + eps), n = x s and y = n w, backward takes n = y / w:
    d x = s (g w - n mean(g w n)),   d w = sum(g n).   In fp32, and where a weight is too near 0, x is kept instead.
    """
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, scale, w = torch.empty_like(x), torch.empty(*x.shape[:-1], 1), weight.to(x.dtype)
        # a few rows at a time: of all rows the intermediate results would leave holes in the heap
        for rows, normed, norm in zip(*(rows_in_cache(tensor.flatten(0, -2), x.shape[-1]) for tensor in (x, y, scale))):
            normed.copy_(F.rms_norm(rows, w.shape, w, eps))
            torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32, out=norm)
        if any(ctx.needs_input_grad):
            scale.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
            ctx.divides = x.dtype == torch.bfloat16 and bool(weight.abs().min() > 1e-30)
            ctx.save_for_backward(y if ctx.divides else x, weight, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved, weight, scale = ctx.saved_tensors
        w, g = weight.to(grad.dtype).float(), grad.float()  # as rounded in y
        n = saved / w if ctx.divides else saved * scale
        g_n = g * n
        mean = (g_n @ w).div_(w.shape[0])[..., None]
        grad_x = (g * w).addcmul_(n, mean, value=-1).mul_(scale)
        return grad_x.to(grad.dtype), g_n.flatten(0, -2).sum(0).to(weight.dtype), None

# ----- gated_linear: (silu(gate) · up) W.T ---------------------------------------------------------------------------


def gated_linear(gate_up, weight):
    """linear(silu(gate) * up, weight) for [gate | up] [..., 2 in] and weight [out, in] (SwiGLU, arXiv 2002.05202)."""
    return GatedLinear.apply(gate_up, weight)


class GatedLinear(torch.autograd.Function):
    """Keeps [gate | up] for backward and computes silu(gate) and the product again: half of what torch keeps."""
    @staticmethod
    def forward(ctx, gate_up, weight):
        ctx.save_for_backward(gate_up, weight)
        gate, up = gate_up.chunk(2, dim=-1)
        return product(F.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gate_up, weight = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        grad, grad_weight = product_gradients(grad, activated * up, weight)
        torch.mul(grad, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=grad_gate)
        return grad_gate_up, grad_weight

# ----- rotate: x cos + swap(x) sin -----------------------------------------------------------------------------------


def rotate(x, cos, sin):
    """Rotates the channel pairs (i, i + C/2) of x [B, T, heads, C], as Hugging Face weights expect; computed in fp32.

    Plain: (x.float() * cos + x.float().roll(C // 2, -1) * sin).to(x.dtype), with `sin` negative in its first half.
    """
    return Rotation.apply(x, cos, sin)


class Rotation(torch.autograd.Function):
    """Written out with few intermediate results; the plain form's leave holes in the heap: a TTT question peaks 4 %
    higher. The way back is the rotation by the opposite angle."""
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        exact, swapped = x.float(), torch.empty(x.shape, device=x.device)
        (x1, x2), (sin1, sin2), (first, second) = (whole.chunk(2, -1) for whole in (exact, sin, swapped))
        torch.mul(x2, sin1, out=first)
        torch.mul(x1, sin2, out=second)
        return swapped.add_(exact * cos).to(x.dtype)  # not addcmul, which rounds once where transformers rounds twice

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return Rotation.apply(grad, cos, -sin), None, None

# ----- attention: softmax(q k.T / sqrt(C)) v -------------------------------------------------------------------------


def causal_attention(q, k, v):
    """q [B, H, T, C], k and v [B, K, S, C] -> [B, H, T, C]; query i sees the keys up to i + S - T."""
    T, S = q.shape[2], k.shape[2]
    if T > 1 and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return BlockedAttention.apply(q, k, v)
    if T == S:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if T == 1:  # the H / K queries that share a key-value head become the rows of one product
        grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
        return F.scaled_dot_product_attention(grouped, k, v).reshape(q.shape)
    mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def attend_apart(documents, q, k, v):
    """Causal attention within each of the packed `documents` (lengths): q [1, H, T, C], k and v [1, K, T, C].

    Documents `alike` in length share one call, padded at the end, which causal attention never reads.
    """
    if sum(documents) != q.shape[2]:
        raise ValueError(f"documents of {sum(documents)} tokens in a row of {q.shape[2]}")
    texts = [iter(x[0].transpose(0, 1).split(documents)) for x in (q, k, v)]  # each [n, heads, C]
    outputs = []
    for group in alike(documents):
        longest = max(group)
        longest += -longest % 8  # other numbers of rows cost products up to a fifth
        padded = [torch.stack([F.pad(next(xs), (0, 0, 0, 0, 0, longest - n)) for n in group]) for xs in texts]
        attended = causal_attention(*(x.transpose(1, 2) for x in padded))  # [documents, H, longest, C]
        cuts = [cut for n in group for cut in (n, longest - n)]  # split: the backward of slices would be quadratic
        outputs += attended.transpose(1, 2).flatten(0, 1).split(cuts)[::2]
    return torch.cat(outputs).transpose(0, 1)[None]


def attend_documents(documents, q, k, v):
    """Causal attention over packed `documents` (data.collate_answers): a continuation sees its prefix and itself.

    q [1, H, T, C], k and v [1, K, T, C] -> [1, H, T, C].
    """
    outputs, lengths = [], [prefix + sum(branches) for prefix, branches in documents]
    for (prefix, branches), *qkv in zip(documents, *(x.split(lengths, 2) for x in (q, k, v))):
        first, *others = branches
        outputs.append(causal_attention(*(x[:, :, :prefix + first] for x in qkv)))
        for n, answer in zip(others, zip(*(x[:, :, prefix + first:].split(others, 2) for x in qkv))):
            queries, *seen = (torch.cat([x[:, :, :prefix], y], 2) for x, y in zip(qkv, answer))
            if q.device.type == "cpu":  # a GPU's fast kernels take no mask: there the prefix's queries are computed
                queries = answer[0]     # again and dropped
            outputs.append(causal_attention(queries, *seen)[:, :, -n:])
    return torch.cat(outputs, 2)


def answer_logps(model, batch):
    """Summed log-probabilities in fp32 of all answers of a micro-batch of data.collate_answers, in their order."""
    attend = functools.partial(attend_documents, batch["documents"])
    logps = model(batch["ids"], labels=batch["labels"], positions=batch["positions"], attend=attend)  # [1, T]
    return torch.stack([part.sum() for part in logps[0].split(batch["parts"])])[:batch["answers"]]


def alike(lengths):
    """The lengths of consecutive documents in groups [[length, …], …] that lose little by being padded to their
    longest: at most a quarter is added to attention's products."""
    groups = [[]]
    for n in lengths:
        together = [*groups[-1], n]
        if len(together) * max(together) ** 2 > 1.25 * sum(length ** 2 for length in together):
            groups.append([])
        groups[-1].append(n)
    return groups


KEPT_KEYS = 512  # up to here p takes less memory than the rest of what a layer keeps for backward


class BlockedAttention(torch.autograd.Function):
    """Causal attention by matrix products over 128 queries at a time, for bf16 on a CPU.

    scores = q k.T / sqrt(C);  p = softmax(scores);  out = p v. Only [H, 128, keys seen] scores exist at a time. A short
    text's p are kept for backward; those of more than KEPT_KEYS keys, which grow with the square, are computed again.
    Torch's own kernel multiplies small tiles, which is slow in bf16 (two cores, 9 heads, 512 tokens, forward and
    backward: 12.9 ms, here 4.8). It keeps scores in fp32; here they are rounded to bf16, as in any attention written as
    two bf16 products: SmolLM2's output is off by 0.4 % of its norm instead of 0.2 %.

    Inside, q is [B K, T H/K, C]: the H / K queries of a token that share a key-value head are rows of one product, one
    after another.
    """
    @staticmethod
    def forward(ctx, q, k, v):
        (B, H, T, C), K = q.shape, k.shape[1]
        ctx.shared, keep = H // K, any(ctx.needs_input_grad) and k.shape[2] <= KEPT_KEYS
        heads = q.new_empty(B, T, H, C)  # before what is freed sooner, which would leave a hole in the heap
        q, k, v = rows_by_key_head(q, K), rows_by_key_head(k, K), rows_by_key_head(v, K)
        out, kept = torch.empty_like(q), []
        for rows, seen in blocks_of_queries(q, k, ctx.shared):
            p = probabilities(q[:, rows], k[:, :seen], ctx.shared)
            out[:, rows] = p @ v[:, :seen]
            if keep:
                kept.append(p)
        ctx.save_for_backward(q, k, v, *kept)
        return heads_from_rows(out, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (q, k, v, *kept), (B, H, _, C) = ctx.saved_tensors, grad.shape
        K = len(k) // B
        grad = rows_by_key_head(grad, K)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros(k.shape), torch.zeros(v.shape)  # sums in fp32
        scale = q.shape[-1] ** -0.5
        for i, (rows, seen) in enumerate(blocks_of_queries(q, k, ctx.shared)):
            p = kept[i] if kept else probabilities(q[:, rows], k[:, :seen], ctx.shared)
            grad_v[:, :seen] += p.mT @ grad[:, rows]
            d = torch._softmax_backward_data(grad[:, rows] @ v[:, :seen].mT, p, -1, p.dtype)
            grad_q[:, rows] = scaled_product(d, k[:, :seen], scale)
            grad_k[:, :seen] += scaled_product(d.mT, q[:, rows], scale)
        return tuple(heads_from_rows(x, q.new_empty(B, len(x[0]) * K // heads, heads, C))
                     for x, heads in ((grad_q, H), (grad_k, K), (grad_v, K)))


def rows_by_key_head(x, K):
    """x [B, heads, T, C] -> [B K, T heads/K, C], contiguous."""
    return x.unflatten(1, (K, -1)).transpose(2, 3).flatten(2, 3).flatten(0, 1).contiguous()


def heads_from_rows(rows, heads):
    """The way back: [B K, T heads/K, C] into heads [B, T, heads, C]; returns it as a view [B, heads, T, C]."""
    B, T, n, C = heads.shape
    K = len(rows) // B
    heads.view(B, T, K, n // K, C).copy_(rows.view(B, K, T, n // K, C).transpose(1, 2))
    return heads.transpose(1, 2)


def blocks_of_queries(q, k, shared, size=128):
    """(the rows of q that are a block of up to 128 tokens, the number of keys its last token sees), block by block."""
    T, S = q.shape[1] // shared, k.shape[1]
    for start in range(0, T, size):
        stop = min(start + size, T)
        yield slice(start * shared, stop * shared), stop + S - T


def probabilities(q, k, shared):
    """p [B K, n shared, seen] of a block of n tokens; the last sees all keys, the one before one fewer."""
    scores = scaled_product(q, k.mT, q.shape[-1] ** -0.5)
    n = q.shape[1] // shared
    scores[:, :, -n:] += causal_mask(n, shared, q.dtype)
    return scores.softmax(-1)


def scaled_product(a, b, scale):
    """scale a @ b, rounded once."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)  # beta 0: the first is not looked at


@functools.lru_cache(maxsize=64)  # every layer asks for the same
def causal_mask(n, shared, dtype):
    """[n shared, n]: -inf where one of n queries must not look, 0 elsewhere; each row `shared` times."""
    return torch.full((n, n), -math.inf, dtype=dtype).triu(1).repeat_interleave(shared, 0)

# ----- token_logps: logit[label] - logsumexp(logits) -----------------------------------------------------------------

KEPT_LOGITS = 1 << 27  # 0.27 GB in bf16


def token_logps(h, weight, labels, grad_buffer=None):
    """log p(label) in fp32 for hidden states h [N, D], head weight [V, D], labels [N] (each a real one) -> [N].

    With `grad_buffer` [V, D] the weight's gradient is added there, block by block, and autograd gets none.
    """
    if not len(labels):  # the weight must get its gradient of zero here too: FSDP's ranks reduce the same weights
        return linear(h, weight).sum(-1).float()
    spare = -len(labels) % 8  # see data.collate
    h, labels = F.pad(h, (0, 0, 0, spare)), F.pad(labels, (0, spare))
    return TokenLogps.apply(h, weight, labels, torch.is_grad_enabled(), grad_buffer)[:len(labels) - spare]


class TokenLogps(torch.autograd.Function):
    """log p(label) a block of the vocabulary at a time: never do all [N, V] logits exist in fp32.

    Kept for backward are the exponentials exp(logit - the row's largest in its block), in the dtype of h, while they
    are no more than KEPT_LOGITS; else a block's are computed again. From them follows
    d logits = grad · (onehot(label) - softmax), and backward is done with one block of the weight before the next.
    `keep`: whether there will be a backward pass.
    """
    @staticmethod
    def forward(ctx, h, weight, labels, keep, grad_buffer):
        normalizer = torch.full(labels.shape, -math.inf, device=h.device)
        wanted = torch.zeros_like(normalizer)
        ctx.kept = [] if keep and len(h) * len(weight) <= KEPT_LOGITS else None
        for words in blocks_of_words(h, weight):
            logits = product(h, weight[words])
            place, inside = places_in(labels, words)
            wanted = torch.where(inside, logits.gather(-1, place[:, None])[:, 0].float(), wanted)
            top, sums = exponentials_(logits)
            normalizer = torch.logaddexp(normalizer, top + sums.log())
            if ctx.kept is not None:
                ctx.kept.append((logits, top))
        ctx.save_for_backward(h, weight, labels, normalizer)
        ctx.grad_buffer = grad_buffer
        return wanted - normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        h, weight, labels, normalizer = ctx.saved_tensors
        kept, ctx.kept = ctx.kept, None  # they are written over: a second backward pass computes them again
        grad_h = torch.zeros_like(h, dtype=torch.float32)
        buffer = ctx.grad_buffer
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] and buffer is None else None
        for words in blocks_of_words(h, weight):
            block = weight[words].to(h.dtype)
            if kept:
                d, top = kept.pop(0)
            else:
                d = F.linear(h, block)
                top, _ = exponentials_(d)
            place, inside = places_in(labels, words)
            hit, factor = torch.where(inside, grad, 0), -grad * (top - normalizer).exp()
            for rows, *column in zip(*(rows_in_cache(x, d.shape[1]) for x in (d, factor, place, hit))):
                f, label, one = (x[:, None] for x in column)
                rows.copy_(rows.float().mul_(f).scatter_add_(-1, label, one))  # then rounded, once
            grad_h += d @ block
            if buffer is not None:
                buffer[words] += d.T @ h
            elif grad_weight is not None:
                grad_weight[words] = d.T @ h
        return grad_h.to(h.dtype), grad_weight, None, None, None


def exponentials_(logits):
    """Writes exp(logit - the largest of its row) over logits [N, words]: (the largest, the sum of a row), in fp32."""
    top, sums = torch.empty(2, len(logits), device=logits.device)
    for rows, largest, total in zip(*(rows_in_cache(x, logits.shape[1]) for x in (logits, top, sums))):
        exact = rows.float()
        torch.amax(exact, -1, out=largest)
        torch.sum(exact.sub_(largest[:, None]).exp_(), -1, out=total)
        rows.copy_(exact)
    return top, sums


def blocks_of_words(h, weight):
    """Slices of the vocabulary, each with about as many logits as shall exist at a time."""
    size = max(1024, block_of_logits(h.device) // len(h) // 64 * 64)
    return [slice(start, start + size) for start in range(0, len(weight), size)]


def block_of_logits(device):
    """Logits that exist at a time: few on a CPU, where they should stay in its cache."""
    return 1 << 22 if device.type == "cpu" else 1 << 26


def places_in(labels, words):
    """The labels counted from the start of the block `words`, and which of them lie in it; 0 for the others."""
    inside = (labels >= words.start) & (labels < words.stop)
    return torch.where(inside, labels - words.start, 0), inside


def rows_in_cache(tensor, width):
    """`tensor` in pieces of as many rows as stay in a CPU's cache where a row has `width` numbers in fp32."""
    return tensor.split(max(1, (1 << 17) // width) if tensor.device.type == "cpu" else len(tensor))

# ----- memory: freed and used again ----------------------------------------------------------------------------------


def reuse_freed_memory():
    """Tells glibc to keep large freed blocks for the next tensor; a program calls it before its first one.

    Otherwise every activation is mapped, faulted in by pages of 4 KB and unmapped again: on two cores that took longer
    than the arithmetic of a small model. Elsewhere (macOS, musl) nothing happens.
    """
    # oneDNN keeps the code it made for each shape of a product, 1,024 of them: 0.7 GB when rows come in all lengths
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX: no block, however large, is mapped by itself and given back when it is freed
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and less than 2 GB free at the heap's end stay there


def return_freed_memory(device):
    """Gives the heap's free pages back to the kernel where tensors live there, on a CPU.

    Done now and then between two steps it stops holes from growing (8 steps of SFT: a peak of 4.1 GB, without it 4.6).
    """
    if device.type == "cpu" and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)

# ----- threads: one for each idle core -------------------------------------------------------------------------------


class Threads:
    """Sets torch's CPU threads to one for each core that other processes leave idle, between two steps or answers.

    The threads of a parallel operation wait for the last one: beside one busy process on two cores, two threads keep
    40 % of their rate and one keeps 60 %. The number of threads changes no bit of a result. It is left alone where the
    user has set it (OMP_NUM_THREADS), and outside Linux.
    """

    def __init__(self):
        self.most, self.seen = torch.get_num_threads(), None  # None: the number stays
        if "OMP_NUM_THREADS" not in os.environ and sys.platform == "linux":
            with contextlib.suppress(OSError, ValueError):  # no /proc, or another one
                self.seen = self.look()

    @staticmethod
    def look():
        """(clock, CPU seconds of all processes on the cores we may use, CPU seconds of this process), all up to now."""
        ours, ticks = {f"cpu{i}" for i in os.sched_getaffinity(0)}, 0
        with open("/proc/stat", encoding="utf-8") as file:
            for name, *times in map(str.split, file):
                if name in ours:
                    user, nice, system, _, _, irq, softirq, steal = map(int, times[:8])
                    ticks += user + nice + system + irq + softirq + steal
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()

    def leave_busy_cores(self):
        """Sets the number of threads by the CPU time of other processes since the last call; not within 0.2 s of it."""
        if self.seen is None:
            return
        now = self.look()
        seconds, used, own = (after - before for after, before in zip(now, self.seen))
        if seconds < 0.2:  # the kernel counts in ticks of 10 ms: too few of them
            return
        idle = len(os.sched_getaffinity(0)) - round((used - own) / seconds)
        torch.set_num_threads(max(1, min(self.most, idle)))
        self.seen = now

    def close(self):
        """Sets the number of threads that there was at the start."""
        torch.set_num_threads(self.most)

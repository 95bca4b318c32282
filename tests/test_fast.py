"""fast.py: each operation beside its plain formula, written out here: values and gradients."""
import math
import os
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import gradients, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode

import fast

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = [(FP32, FP32), (FP32, BF16), (BF16, BF16)]  # of x and of the weights; the second: a CPU without bf16 products


def random(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def compare(operation, formula, x, weight, grad, dtypes):
    """Output and gradients of operation(x, weight) in these dtypes against the formula in fp32 on the same numbers."""
    own = [tensor.to(dtype).requires_grad_() for tensor, dtype in zip((x, weight), dtypes)]
    exact = [tensor.detach().float().requires_grad_() for tensor in own]
    found, expected = operation(*own), formula(*exact)
    gradients = torch.autograd.grad(expected, exact, grad.to(dtypes[0]).float())
    found_gradients = torch.autograd.grad(found, own, grad.to(dtypes[0]))
    assert [tensor.dtype for tensor in (found, *found_gradients)] == [dtypes[0], *dtypes]
    if dtypes[0] == FP32:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        for f, e in zip(found_gradients, gradients):  # that of a bf16 weight is rounded once, at the end
            torch.testing.assert_close(f.float(), e, rtol=1e-2 if f.dtype == BF16 else 1e-5, atol=1e-5)
    else:
        for f, e in zip((found, *found_gradients), (expected, *gradients)):
            assert (f.float() - e).norm() < 0.01 * e.norm()


def kept_for_backward(operation, *inputs):
    """[(shape, dtype)] of the tensors that autograd keeps of operation(*inputs)."""
    kept = []

    def pack(tensor):
        kept.append((tuple(tensor.shape), tensor.dtype))
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        operation(*(tensor.requires_grad_() for tensor in inputs))
    return kept

# ----- linear --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 32), (1, 1, 32), (7, 32)], ids=str)
def test_linear_is_x_times_the_weight_transposed(shape, dtypes):
    x, weight, grad = random(shape, (24, 32), (*shape[:-1], 24))
    compare(fast.linear, lambda x, w: x @ w.T, x, weight, grad, dtypes)


def test_linear_keeps_a_bf16_weight_as_it_is():
    x, weight = random((2, 5, 32), (24, 32))
    assert kept_for_backward(fast.linear, x, weight.bfloat16()) == [((2, 5, 32), FP32), ((24, 32), BF16)]

# ----- rms_norm ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_rms_norm_is_x_over_its_root_mean_square(eps, dtypes):
    x, weight, grad = random((2, 5, 32), (32,), (2, 5, 32))
    compare(lambda x, w: fast.rms_norm(x, w, eps),
            lambda x, w: x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w, x, weight, grad, dtypes)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_the_norm_before_a_product_loses_nothing(dtypes):
    """Together, as a block uses them: linear(rms_norm(x), W)."""
    x, norm, weight, grad = random((2, 5, 32), (32,), (24, 32), (2, 5, 24))
    norm = norm.to(dtypes[1])

    def plain(x, w):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.float() @ w.T
    compare(lambda x, w: fast.linear(fast.rms_norm(x, norm, 1e-5), w), plain, x, weight, grad, dtypes)
    compare(lambda x, n: fast.linear(fast.rms_norm(x, n, 1e-5), weight.to(dtypes[1])),
            lambda x, n: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * n @ weight.to(dtypes[1]).float().T,
            x, norm, grad, dtypes)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_rms_norm_gives_the_same_bits_with_and_without_gradients(dtype):
    x, weight = (tensor.to(dtype) for tensor in random((2, 5, 32), (32,)))
    found = fast.rms_norm(x.clone().requires_grad_(), weight, 1e-5)
    with torch.no_grad():
        assert torch.equal(found, fast.rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_rms_norm_keeps_one_tensor_the_weight_and_a_number_a_row(dtype):
    x, weight = (one.to(dtype) for one in random((2, 5, 32), (32,)))
    assert kept_for_backward(lambda x, w: fast.rms_norm(x, w, 1e-5), x, weight) == [
        ((2, 5, 32), dtype), ((32,), dtype), ((2, 5, 1), FP32)]


def test_rms_norm_and_the_product_after_it_keep_the_same_tensor():
    x, weight, matrix = (one.bfloat16().requires_grad_() for one in random((5, 32), (32,), (8, 32)))
    kept = set()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.add(one.untyped_storage().data_ptr()), lambda _: 0):
        fast.linear(fast.rms_norm(x, weight, 1e-5), matrix)
    assert len(kept) == 4 and x.untyped_storage().data_ptr() not in kept  # the output, both weights, a number a row


@pytest.mark.parametrize("near_zero", [0.0, 1e-38])
def test_rms_norm_with_a_weight_that_cannot_be_divided_by(near_zero):
    x, weight, grad = (one.bfloat16() for one in random((2, 5, 32), (32,), (2, 5, 32)))
    weight[3] = near_zero

    def plain(x, w):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * w
    found, expected = [x.clone(), weight.clone()], [x.float(), weight.float()]
    for leaf in found + expected:
        leaf.requires_grad_()
    fast.rms_norm(*found, 1e-5).backward(grad)
    plain(*expected).backward(grad.float())
    for one, other in zip(found, expected):
        assert (one.grad - other.grad).norm() < 0.01 * other.grad.norm()
    assert (found[1].grad[3] - expected[1].grad[3]).abs() < 0.02 * expected[1].grad[3].abs()

# ----- gradients into a buffer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_embedding_s_gradient_is_added_to_the_buffer(dtype):
    weight, grad, before = random((7, 4), (3, 2, 4), (7, 4))
    ids, leaf = torch.tensor([[1, 5], [1, 1], [0, 5]]), weight.to(dtype).requires_grad_()
    expected = before.clone()
    for i, row in zip(ids.flatten(), grad.to(dtype).float().flatten(0, 1)):
        expected[i] += row
    out = fast.embed(ids, leaf, before)
    out.backward(grad.to(dtype))
    assert torch.equal(out, leaf[ids]) and leaf.grad is None
    assert torch.allclose(before, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kept_logits", [0, 1 << 27])
def test_the_head_s_gradient_is_added_to_the_buffer(kept_logits, monkeypatch):
    monkeypatch.setattr(fast, "KEPT_LOGITS", kept_logits)
    h, weight, before = random((6, 4), (2500, 4), (2500, 4))
    labels = torch.tensor([0, 7, 1023, 1024, 2499, 7])
    plain = weight.clone().requires_grad_()
    (h @ plain.T).log_softmax(-1).gather(-1, labels[:, None]).sum().backward()
    leaf, start = weight.clone().requires_grad_(), before.clone()
    fast.token_logps(h.requires_grad_(), leaf, labels, before).sum().backward()
    assert leaf.grad is None and torch.allclose(before - start, plain.grad, rtol=1e-4, atol=1e-5)

# ----- gated_linear --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_gated_linear_is_the_product_of_silu_gate_times_up(dtypes):
    gate_up, weight, grad = random((2, 5, 64), (24, 32), (2, 5, 24))

    def plain(gate_up, w):
        gate, up = gate_up[..., :32], gate_up[..., 32:]
        return (gate / (1 + (-gate).exp()) * up) @ w.T
    compare(fast.gated_linear, plain, gate_up, weight, grad, dtypes)


def test_gated_linear_keeps_its_input_and_the_weight():
    gate_up, weight = random((2, 5, 64), (24, 32))
    assert kept_for_backward(fast.gated_linear, gate_up, weight.bfloat16()) == [((2, 5, 64), FP32), ((24, 32), BF16)]

# ----- attention -----------------------------------------------------------------------------------------------------


def plain_attention(q, k, v, seen=None):
    """softmax(q k.T / sqrt(C)) v, every query head with its key-value head; `seen` [T, S], by default the causal mask.
    """
    queries, keys, group = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    if seen is None:
        seen = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    scores = q @ k.repeat_interleave(group, 1).mT * q.shape[3] ** -0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(group, 1)


@pytest.mark.parametrize("attention, kept_keys", [
    (fast.BlockedAttention.apply, 512), (fast.BlockedAttention.apply, 0), (fast.causal_attention, None)])
@pytest.mark.parametrize("queries, keys, heads, key_heads", [
    (300, 300, 9, 3), (1, 1, 3, 3), (128, 128, 3, 3), (50, 300, 6, 3), (129, 130, 3, 3), (140, 140, 4, 1),
    (1, 300, 6, 3)])
def test_attention_is_masked_attention(queries, keys, heads, key_heads, attention, kept_keys, monkeypatch):
    """Output and gradients in fp32 against one softmax over all scores; p kept and computed again; and the way taken
    in fp32 and on a GPU."""
    monkeypatch.setattr(fast, "KEPT_KEYS", kept_keys)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, length, 16, generator=generator).requires_grad_()
               for n, length in ((heads, queries), (key_heads, keys), (key_heads, keys)))
    grad = torch.randn(q.shape, generator=generator)
    expected, found = plain_attention(q, k, v), attention(q, k, v)
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
    exact = outcomes(torchs, torch.float32)
    ours, theirs, plain = ([((own - e).norm() / e.norm()).item() for own, e in zip(outcomes(f, torch.bfloat16), exact)]
                           for f in (fast.causal_attention, torchs, plain_attention))
    assert max(ours) < most and all(own < 1.1 * other for own, other in zip(ours, plain)), (ours, plain)
    assert sharpness > 1 or all(own < 2 * other for own, other in zip(ours, theirs)), (ours, theirs)


@pytest.mark.parametrize("keys, kept", [(300, 3), (512, 4), (513, 0)])
def test_attention_in_bf16_keeps_the_probabilities_of_short_texts_only(keys, kept):
    """q, k, v, and of up to 512 keys p, 128 queries at a time: those grow with the square of a text's length."""
    q, k, v = (tensor.bfloat16() for tensor in random((1, 6, keys, 16), (1, 3, keys, 16), (1, 3, keys, 16)))
    inputs = [((3, 2 * keys, 16), BF16), ((3, keys, 16), BF16), ((3, keys, 16), BF16)]
    blocks = [((3, 2 * (min(stop, keys) - stop + 128), min(stop, keys)), BF16) for stop in range(128, keys + 128, 128)]
    assert kept_for_backward(fast.causal_attention, q, k, v) == inputs + blocks[:kept]
    assert len(blocks) == kept or not kept


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kept_keys", [512, 145])
def test_packed_attention_is_that_of_each_document(dtype, kept_keys, monkeypatch):
    """Output and gradients: documents alike in length share a padded product, and nothing of it is seen."""
    monkeypatch.setattr(fast, "KEPT_KEYS", kept_keys)
    lengths, generator = [150, 140, 139, 60, 7, 1], torch.Generator().manual_seed(0)
    assert fast.alike(lengths) == [[150, 140, 139], [60], [7], [1]]
    heads = torch.randn(1, sum(lengths), 15, 64, generator=generator).to(dtype).requires_grad_()
    q, k, v = heads.transpose(1, 2).split([9, 3, 3], 1)
    grad = torch.randn(q.shape, generator=generator).to(dtype)
    found = fast.attend_apart(lengths, q, k, v)
    expected = torch.cat([fast.causal_attention(*(x.contiguous() for x in part)) for part in
                          zip(*(x.split(lengths, 2) for x in (q, k, v)))], 2)
    small = {FP32: 1e-5, BF16: 5e-3}[dtype]
    assert (found.float() - expected.float()).norm() < small * expected.float().norm()
    for own, other in zip(*(torch.autograd.grad(out, heads, grad, retain_graph=True) for out in (found, expected))):
        assert (own.float() - other.float()).norm() < small * other.float().norm()
    with pytest.raises(ValueError, match="documents of 496 tokens in a row of 497"):
        fast.attend_apart(lengths[:-1], q, k, v)


def test_packed_attention_is_attention_under_a_mask_of_blocks():
    """Output and gradients in fp32 against one softmax over the whole row, other documents hidden."""
    lengths = [15, 14, 13, 60, 7, 1]
    q, k, v, grad = random((1, 6, 110, 16), (1, 3, 110, 16), (1, 3, 110, 16), (1, 6, 110, 16))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    document = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))
    seen = (document == document[:, None]).tril()
    found, expected = fast.attend_apart(lengths, *inputs), plain_attention(*inputs, seen)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for f, e in zip(torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)

# ----- gradients of gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation, shapes, dtypes", [
    (fast.linear, [(5, 8), (4, 8)], (FP32, BF16)),
    (lambda x, w: fast.rms_norm(x, w, 1e-5), [(5, 8), (8,)], (FP32, FP32)),
    (fast.gated_linear, [(5, 8), (3, 4)], (FP32, FP32)),
    (lambda x, angle: fast.rotate(x, angle.cos(), angle.sin()), [(1, 5, 2, 8), (5, 1, 8)], (FP32, FP32)),
    (lambda q, k: fast.BlockedAttention.apply(q, k, k), [(1, 4, 5, 8), (1, 2, 5, 8)], (FP32, FP32)),
    (lambda h, w: fast.token_logps(h, w, torch.arange(5)), [(5, 8), (9, 8)], (FP32, FP32))],
    ids=["linear", "rms_norm", "gated_linear", "rotate", "attention", "token_logps"])
def test_a_second_derivative_is_refused(operation, shapes, dtypes):
    inputs = [x.to(dtype).requires_grad_() for x, dtype in zip(random(*shapes), dtypes)]
    first, = torch.autograd.grad(operation(*inputs).square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.square().sum().backward()


def test_a_buffer_takes_no_graph_with_it():
    weight, before = (tensor.requires_grad_(i == 0) for i, tensor in enumerate(random((7, 4), (7, 4))))
    out = fast.embed(torch.tensor([1, 5]), weight, before)
    torch.autograd.grad(out.square().sum(), weight, create_graph=True, allow_unused=True)
    assert not before.requires_grad

# ----- token_logps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, kept", [(300, 2**27), (7, 2**27), (7, 0)])
def test_token_logps_are_logits_less_their_logsumexp(words, kept, monkeypatch):
    """One block of the vocabulary; many; many, computed again in backward. A second backward pass gives the same."""
    monkeypatch.setattr(fast, "KEPT_LOGITS", kept)
    monkeypatch.setattr(fast, "blocks_of_words", lambda h, weight: [slice(start, start + words)
                                                                    for start in range(0, 300, words)])
    h, weight, grad = random((61, 16), (300, 16), (61,))
    labels = torch.randint(0, 300, (61,), generator=torch.Generator().manual_seed(1))
    inputs = [h.requires_grad_(), weight.requires_grad_()]
    logits = h @ weight.T
    expected = logits[range(61), labels] - logits.exp().sum(-1).log()
    found = fast.token_logps(h, weight, labels)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(expected, inputs, grad)
    for _ in range(2):
        for f, e in zip(torch.autograd.grad(found, inputs, grad, retain_graph=True), gradients):
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)


def test_a_confident_token_keeps_its_small_gradient_in_bf16():
    """p(label) = 1 - 0.00017: its gradient p - 1 is computed before it is rounded; bf16 of p alone would be 1."""
    h, weight = torch.tensor([[8.0]]).bfloat16(), torch.zeros(4096, 1, dtype=torch.bfloat16)
    weight[5] = 2.125  # logits 17 and 0
    h.requires_grad_()
    fast.token_logps(h, weight, torch.tensor([5])).sum().backward()
    missing = 4095 / (math.exp(17) + 4095)
    assert h.grad.item() == pytest.approx(2.125 * missing, rel=0.02)


def test_the_head_in_bf16_rounds_d_logits_once():
    """Against double precision, with logits that are exact in bf16: only the gradients are rounded."""
    generator = torch.Generator().manual_seed(0)
    weight, h = (torch.randint(-4, 5, (n, 8), generator=generator) / 4 for n in (4096, 64))
    labels, grad = torch.randint(0, 4096, (64,), generator=generator), torch.rand(64, generator=generator) + 0.5
    own = [x.bfloat16().requires_grad_() for x in (h, weight)]
    exact = [x.double().requires_grad_() for x in (h, weight)]
    expected = (exact[0] @ exact[1].T).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    found = fast.token_logps(*own, labels)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    for f, e in zip(torch.autograd.grad(found, own, grad), torch.autograd.grad(expected, exact, grad.double())):
        assert (f.double() - e).norm() < 3e-3 * e.norm()


def test_without_a_label_the_weight_gets_a_gradient_of_zero():
    h, weight = (tensor.requires_grad_() for tensor in random((0, 16), (300, 16)))
    logps = fast.token_logps(h, weight, torch.zeros(0, dtype=torch.int64))
    logps.sum().backward()
    assert logps.shape == (0,) and logps.dtype == FP32 and weight.grad.eq(0).all() and h.grad.shape == h.shape


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("kept_logits", [0, 2**27])
def test_no_tensor_is_as_large_as_all_the_logits(kept_logits, dtype, monkeypatch):
    """64 labels, 4,096 words, 1,024 of them at a time: the largest tensor on the way, forward and backward."""
    sizes = []

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            sizes.extend(tensor.numel() for tensor in (result if isinstance(result, (list, tuple)) else [result])
                         if isinstance(tensor, torch.Tensor))
            return result
    monkeypatch.setattr(fast, "block_of_logits", lambda device: 64 * 1024)
    monkeypatch.setattr(fast, "KEPT_LOGITS", kept_logits)
    h, weight = (tensor.to(dtype).requires_grad_() for tensor in random((64, 8), (4096, 8)))
    with Watched():
        fast.token_logps(h, weight, torch.arange(64)).sum().backward()
    assert 8 * 4096 <= max(sizes) <= 64 * 1024 < 64 * 4096

# ----- threads -------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads(monkeypatch):
    """fast.Threads on 4 cores, most 4 threads, and what it is to find the next time: [seconds, all, this process]."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(fast.sys, "platform", "linux")
    monkeypatch.setattr(fast.os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)
    before, next_look = torch.get_num_threads(), [10.0, 100.0, 50.0]
    monkeypatch.setattr(fast.Threads, "look", staticmethod(lambda: tuple(next_look)))
    torch.set_num_threads(4)
    yield fast.Threads(), next_look
    torch.set_num_threads(before)


@pytest.mark.parametrize("seconds, used, own, expected", [
    (2.0, 8.0, 8.0, 4),  # all cores are our own
    (2.0, 8.0, 6.0, 3),  # one other process
    (2.0, 3.2, 2.0, 3),  # it got 0.6 of a core beside our threads
    (2.0, 0.8, 0.0, 4),  # 0.4 of a core: passing
    (2.0, 8.0, 0.0, 1),  # others have all: one thread remains
    (0.1, 0.4, 0.2, 4),  # too short to tell
    (2.0, 1.9, 2.0, 4)])  # the kernel's clock lags
def test_one_thread_for_each_core_that_others_leave(threads, seconds, used, own, expected):
    chosen, look = threads
    look[:] = 10 + seconds, 100 + used, 50 + own
    chosen.leave_busy_cores()
    assert torch.get_num_threads() == expected
    chosen.close()
    assert torch.get_num_threads() == 4


def test_there_are_never_more_threads_than_at_first(threads):
    torch.set_num_threads(3)  # torch may take fewer than there are cores
    look, chosen = threads[1], fast.Threads()
    look[:] = 12, 100, 50
    chosen.leave_busy_cores()
    assert torch.get_num_threads() == 3


def test_threads_come_back_when_the_others_leave(threads):
    chosen, look = threads
    for seconds, used, own, expected in ((1, 4, 2, 2), (1, 4, 4, 4), (0.1, 0.4, 0, 4), (0.9, 3.6, 0, 1)):
        look[:] = (now + more for now, more in zip(look, (seconds, used, own)))
        chosen.leave_busy_cores()
        assert torch.get_num_threads() == expected


@pytest.mark.parametrize("variable, platform", [("OMP_NUM_THREADS", "linux"), ("ANOTHER", "darwin")])
def test_the_user_s_number_of_threads_stays_and_so_does_torch_s_elsewhere(monkeypatch, threads, variable, platform):
    monkeypatch.setenv(variable, "4")
    monkeypatch.setattr(fast.sys, "platform", platform)
    look, chosen = threads[1], fast.Threads()
    look[:] = 12, 108, 50
    chosen.leave_busy_cores()
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("fault", [FileNotFoundError, ValueError])
def test_without_the_kernel_s_numbers_the_threads_stay(monkeypatch, threads, fault):
    def look():
        raise fault
    monkeypatch.setattr(fast.Threads, "look", staticmethod(look))
    chosen = fast.Threads()
    chosen.leave_busy_cores()
    assert torch.get_num_threads() == 4


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat is Linux's")
def test_the_seconds_of_this_process_are_among_those_of_its_cores():
    before = fast.Threads.look()
    while time.process_time() - before[2] < 0.3:
        pass
    seconds, used, own = (b - a for a, b in zip(before, fast.Threads.look()))
    assert 0.3 <= own <= seconds + 0.05 and used >= own - 0.05
    assert used <= len(os.sched_getaffinity(0)) * (seconds + 0.05)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_no_bit_depends_on_the_number_of_threads(dtype):
    """Log-probabilities and all gradients of a small Llama over 2 × 150 tokens, with 1, 2 and 3 threads."""
    before, model = torch.get_num_threads(), tiny_llama().to(dtype)
    ids = torch.randint(300, (2, 150), generator=torch.Generator().manual_seed(1))
    found = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            logps = model(ids, labels=ids.roll(-1, 1))
            found.append([logps.detach(), *gradients(model, logps.sum()).values()])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others))

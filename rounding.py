"""Stochastic rounding: fp32 becomes bf16, and no step is lost.

The problem. A bf16 number has 8 significant bits. Near 0.05 its neighbours are 0.000244 apart, so a step of 1e-5 is a
twelfth of half that gap. Rounded to nearest, the weight goes back to where it was: every time, for almost every weight.
On the trace it was taken on, one such step lowers SmolLM2's loss from 2.357 to 2.157 with fp32 weights, and to 2.351
with bf16 weights rounded to nearest: 3 % of the step is left.

The solution. Round up with the probability of the part that is cut off, else down: the expected weight is exact, and
many small steps add up to their sum. With stochastic rounding that loss is 2.157 (arXiv 2502.20566).

    0.05001 lies between the bf16 numbers 0.049804688 and 0.050048828, 84 % of the way up:
    84 times in 100 it becomes the upper one, 16 times the lower one; the mean is 0.05001.

The five lines. bf16 is the upper half of fp32's 32 bits, and the lower half, divided by 2^16, is that probability. Add
a uniform 16-bit integer to the bits, cut the lower 16 off: the addition carries into the upper half exactly that often.

    def stochastic_round(exact, generator):                                       # fp32 -> bf16, the plain form
        noise = torch.randint(1 << 16, exact.shape, dtype=torch.int32, generator=generator)
        bits = (exact.view(torch.int32) + noise) & -65536                         # ...11110000000000000000
        rounded = bits.view(torch.float32).to(torch.bfloat16)
        return torch.where(exact.isnan(), torch.nan, rounded)                     # NaN's bits could carry into -0
"""
import torch


def stochastic_round_(target, source, generator):
    """Writes fp32 `source` into bf16 `target` of the same shape, in place; NaN stays NaN, infinities stay.

    `target` is contiguous (else RuntimeError), `generator` lives on its device. Works in slices that stay in the cache.
    """
    round_ = stochastic_rounder(generator, target.device, min(target.numel(), slice_size(target.device)))
    for rounded, exact in zip(slices(target), slices(source.contiguous())):
        round_(rounded, exact)


def stochastic_rounder(generator, device, n=None):
    """The fast form: a function round_(rounded, exact) for slices of any number of tensors.

    Drawing is slow on a CPU: drawn one by one, the random integers take longer than all the rest. So a slice takes the
    upper half of (the same random 32-bit x) · (its own random odd number) mod 2^32. That is uniform for each weight,
    because an odd factor only permutes the 2^32 values; and the integers of two slices are independent, except for the
    power of two in x, which matters for one x in 2^16. That is so over the draw of the factors: once
    they are drawn, the words of one slice are those of another times one fixed odd number. It does no harm: each weight
    stays unbiased, and tests/test_rounding.py finds slices uncorrelated. Tensors of at most `n` numbers need no more
    words than that.
    """
    x, on_cpu = draw_int32(n or slice_size(device), generator, device), torch.device(device).type == "cpu"

    def round_(rounded, exact):
        factor = draw_int32(1, generator, device) | 1
        noise = (x[:len(exact)] * factor).bitwise_right_shift_(16).bitwise_and_(0xFFFF)
        bits = noise.add_(exact.view(torch.int32)).bitwise_and_(-0x10000)
        rounded.copy_(bits.view(torch.float32))
        if not on_cpu or not exact.sum().isfinite():  # a GPU would have to wait for the answer
            rounded.masked_fill_(exact.isnan(), torch.nan)
    return round_


def copy_weights_(target, source, generator):
    """`target` ← `source` of any float dtypes; only a bf16 target of a wider source is rounded, stochastically."""
    if target.dtype == torch.bfloat16 and source.dtype != torch.bfloat16:
        stochastic_round_(target, source.float(), generator)
    else:
        target.copy_(source)


def slices(tensor):
    """Views of a contiguous tensor, flat, of `slice_size` each."""
    return tensor.view(-1).split(slice_size(tensor.device))


def slice_size(device):
    """Numbers that are worked on at a time: few on a CPU, where they should stay in its cache."""
    return 1 << 17 if device.type == "cpu" else 1 << 24


def draw_int32(n, generator, device):
    """n uniform 32-bit integers, two from each 64 bits drawn."""
    pairs = torch.empty((n + 1) // 2, dtype=torch.int64, device=device)
    return pairs.random_(-2**63, None, generator=generator).view(torch.int32)[:n]

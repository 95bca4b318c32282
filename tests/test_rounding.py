"""rounding.py: one number by hand, then the distribution, the independence of the draws, and what must not change."""
import math

import pytest
import torch

from rounding import copy_weights_, slice_size, slices, stochastic_round_, stochastic_rounder

# ----- by hand -------------------------------------------------------------------------------------------------------

# bf16 has 8 significant bits, 7 of them behind the point. 0.05 + 1e-5 = 0.05001 = 1.60032 · 2^-5, so the neighbours
# are 2^-5 · 2^-7 = 2^-12 = 0.000244140625 apart. 0.05001 / 2^-12 = 204.84096 lies between 204 and 205:
BELOW = 0.0498046875  # 204 · 2^-12
ABOVE = 0.050048828125  # 205 · 2^-12; it is also the bf16 number nearest to 0.05
# 0.84096 of the way up; so the probability of going up, (0.05001 - BELOW) / (ABOVE - BELOW), is
# 0.0002053125 / 0.000244140625:
P_UP = 0.84096


def stochastic_round_plainly_(target, source, generator):
    """The plain form of rounding.py's docstring: noise of 16 bits, drawn for each number, then cut."""
    noise = torch.randint(1 << 16, source.shape, dtype=torch.int32, generator=generator)
    rounded = ((source.view(torch.int32) + noise) & -65536).view(torch.float32)
    target.copy_(torch.where(source.isnan(), torch.nan, rounded))


@pytest.mark.parametrize("round_", [stochastic_round_, stochastic_round_plainly_])
def test_rounding_of_one_number_worked_out_by_hand(round_):
    n = 300_000
    source, target = torch.full((n,), 0.05 + 1e-5), torch.empty(n, dtype=torch.bfloat16)
    round_(target, source, torch.Generator().manual_seed(0))
    rounded = target.double()
    assert set(rounded.tolist()) == {BELOW, ABOVE}  # and no third value
    standard_error = math.sqrt(P_UP * (1 - P_UP) / n)
    assert abs((rounded == ABOVE).double().mean().item() - P_UP) < 4 * standard_error
    assert abs(rounded.mean().item() - 0.05001) < 4 * standard_error * (ABOVE - BELOW)
    assert set(source.bfloat16().double().tolist()) == {ABOVE}  # rounded to nearest it is where 0.05 was


def test_small_steps_add_up_where_rounding_to_nearest_never_moves():
    """100 steps of 1e-5 up from 0.050048828125: 0.001 in the mean. Each goes up by 2^-12 with p = 1e-5 / 2^-12."""
    n, generator = 20_000, torch.Generator().manual_seed(0)
    start = torch.full((n,), 0.05, dtype=torch.bfloat16)
    weight, nearest = start.clone(), start.clone()
    for _ in range(100):
        stochastic_round_(weight, weight.float() + 1e-5, generator)
        nearest.copy_(nearest.float() + 1e-5)
    assert torch.equal(nearest, start) and start[0].item() == ABOVE
    p = 0.04096
    standard_error = math.sqrt(100 * p * (1 - p) / n) * 0.000244140625
    assert abs(weight.double().mean().item() - (ABOVE + 0.001)) < 4 * standard_error

# ----- the distribution ----------------------------------------------------------------------------------------------


def test_rounding_is_unbiased_and_hits_only_the_two_neighbours():
    generator = torch.Generator().manual_seed(0)
    for value in (0.05 + 1e-5, -3.3e-7, 1.0 + 2**-10, 123.456, -0.0, 2.0, 1e-39):
        source = torch.full((200_001,), value)
        target = torch.empty(200_001, dtype=torch.bfloat16)
        stochastic_round_(target, source, generator)
        below = (source[:1].view(torch.int32) & -0x10000).view(torch.float32).item()
        above = ((source[:1].view(torch.int32) & -0x10000) + 0x10000).view(torch.float32).item()
        assert set(target.float().tolist()) <= {below, above}
        exact = source[0].item()
        p = (exact - below) / (above - below)  # of rounding away from zero
        error = 5 * math.sqrt(p * (1 - p) / 200_001)  # five standard errors
        assert abs((target.float() != below).float().mean().item() - p) <= error + 1e-12


def test_rounding_keeps_what_needs_none_infinities_and_nan():
    exact = torch.tensor([1.0, -2.5, 0.0, math.inf, -math.inf, 3e38]).bfloat16()
    target = torch.empty_like(exact)
    stochastic_round_(target, exact.float(), torch.Generator().manual_seed(0))
    assert torch.equal(target, exact)
    nans = torch.tensor([0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001, -0x400000, 0x7FFF0001], dtype=torch.int32)
    stochastic_round_(target, nans.view(torch.float32), torch.Generator().manual_seed(0))
    assert target.isnan().all()  # CUDA's own NaN is 0x7FFFFFFF, whose bits overflow when noise is added


def test_one_nan_changes_nothing_else():
    source = torch.rand(1000, generator=torch.Generator().manual_seed(1))
    with_nan, rounded = source.clone(), []
    with_nan[[3, 500]] = torch.tensor([math.nan, -math.nan])
    for numbers in (source, with_nan):
        rounded.append(torch.empty(1000, dtype=torch.bfloat16))
        stochastic_round_(rounded[-1], numbers, torch.Generator().manual_seed(0))
    assert rounded[1].isnan().nonzero()[:, 0].tolist() == [3, 500]
    assert torch.equal(rounded[0][~rounded[1].isnan()], rounded[1][~rounded[1].isnan()])

# ----- independence --------------------------------------------------------------------------------------------------


def test_rounding_draws_independently_and_repeats_with_its_seed():
    n = len(slices(torch.empty(10_000_000))[0])
    source = torch.full((5 * n,), 1.0 + 2**-8)  # exactly half way
    rounded = []
    for seed in (0, 0, 1):
        target = torch.empty(5 * n, dtype=torch.bfloat16)
        stochastic_round_(target, source, torch.Generator().manual_seed(seed))
        rounded.append(target.float())
    assert torch.equal(rounded[0], rounded[1]) and not torch.equal(rounded[0], rounded[2])
    up = (rounded[0] > 1.0).float() - 0.5
    for lag in (1, 2, 3, 4, 5, 8, n, 2 * n, 3 * n, n + 1):  # two weights share one 64-bit number; slices share them all
        assert abs((up[lag:] * up[:-lag]).mean().item()) < 5 * 0.25 / math.sqrt(5 * n - lag), lag


def test_targets_that_share_a_rounder_are_rounded_independently_and_without_bias():
    """A rounder draws its random words once; each call takes them times its own odd number."""
    generator, n, rounds = torch.Generator().manual_seed(0), 50_000, 40
    round_ = stochastic_rounder(generator, torch.device("cpu"))
    source = torch.full((n,), 1.0 + 0.3 * 2**-7)
    ups = []
    for _ in range(rounds):
        target = torch.empty(n, dtype=torch.bfloat16)
        round_(target, source)
        ups.append((target.float() > 1.0).double())
    ups = torch.stack(ups)
    assert abs(ups.mean().item() - 0.3) < 5 * math.sqrt(0.21 / ups.numel())
    assert abs(ups.mean(0).var().item() * rounds - 0.21) < 0.01  # of a weight over the rounds, as if drawn each time
    correlations = torch.corrcoef(ups)[~torch.eye(rounds, dtype=torch.bool)]
    assert correlations.square().mean().sqrt() < 1.2 / math.sqrt(n) and correlations.abs().max() < 6 / math.sqrt(n)

# ----- whole tensors -------------------------------------------------------------------------------------------------


def test_a_tensor_is_rounded_slice_by_slice_whatever_its_shape():
    """Of two slices and a piece, from a source that is not contiguous; the source stays as it is."""
    size = slice_size(torch.device("cpu"))
    rows = 2 * size // 1000 + 77
    source = torch.randn(1000, rows, generator=torch.Generator().manual_seed(1)).T
    before, target = source.clone(), torch.zeros(rows, 1000, dtype=torch.bfloat16)
    assert [len(one) for one in slices(target)] == [size, size, rows * 1000 - 2 * size]
    stochastic_round_(target, source, torch.Generator().manual_seed(0))
    assert torch.equal(source, before)
    # a bf16 number has 2^-7 of its power of two to the next one
    assert ((target.float() - source).abs() < 2.0 ** (source.abs().log2().floor() - 7)).all()
    round_, again = stochastic_rounder(torch.Generator().manual_seed(0), source.device), torch.zeros_like(target)
    for rounded, exact in zip(slices(again), slices(source.contiguous())):
        round_(rounded, exact)
    assert torch.equal(target, again)
    with pytest.raises(RuntimeError):  # written through a view, or not at all
        stochastic_round_(torch.zeros(1000, rows, dtype=torch.bfloat16).T, source, torch.Generator())


@pytest.mark.parametrize("source, target", [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "float32")])
def test_weights_that_lose_nothing_are_copied(source, target):
    exact = torch.randn(1000, generator=torch.Generator().manual_seed(1)).to(getattr(torch, source))
    copy = torch.empty(1000, dtype=getattr(torch, target))
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    copy_weights_(copy, exact, generator)
    assert torch.equal(copy.double(), exact.double()) and torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("source", ["float32", "float16", "float64"])
def test_weights_of_more_than_bf16_are_rounded_stochastically(source):
    exact = torch.full((50_000,), 1.0 + 2**-9, dtype=getattr(torch, source))  # a quarter of the way up
    target = torch.empty(50_000, dtype=torch.bfloat16)
    copy_weights_(target, exact, torch.Generator().manual_seed(0))
    assert set(target.tolist()) == {1.0, 1.0 + 2**-7}
    assert abs((target > 1.0).double().mean().item() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 50_000)

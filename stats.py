"""Statistics of evaluation results: intervals, tests, and the smallest effect that a run could have seen.

Questions come in groups, such as several about one page, and those of a group tend to be right or wrong together.
Taken as independent they give intervals that are too narrow; here the groups are the sample (Miller, arXiv 2411.00640,
sections 2.2, 4.2 and 5).

    mean  = sum of x / n                                           n questions in G groups
    E_g   = sum of (x - mean) over group g;  m_g = its size
    se    = sqrt(G / (G - 1) · sum of E_g²) / n                    clustered standard error (CR1)
    draw  G groups with replacement, each with all its questions;  t* = (mean* - mean) / se*
    mean ± q · se,  q = the 95 % quantile of |t*|                  symmetric bootstrap-t

Sources: Cameron, Gelbach & Miller 2008 (pairs cluster bootstrap-t), Hall 1988 (symmetric intervals). The percentile
bootstrap finds a difference between equal arms in 9 % of runs where a few pages hold most questions, bootstrap-t in 6 %
(`pytest --heavy -s tests/test_stats.py -k equal_arms` or `-k percentile`).

    two arms, right or wrong on independent questions    mcnemar
    two arms, questions share pages, or losses, scores   paired
    one arm's accuracy; where questions share pages      wilson; mean_interval
    several comparisons                                  holm
    how many questions got worse                         worse_share

Numbers in, plain floats and dicts out; the same seed gives the same result. Wrong input is a ValueError in one line.
"""
import math
from statistics import NormalDist

import numpy as np

DRAWN_AT_ONCE = 1 << 16  # groups: half a megabyte, which stays in the cache
SMALLEST_SE = 1 / 3  # of the sample's; see `deviations`
FEW = 10  # groups

# ----- counts: right or wrong ----------------------------------------------------------------------------------------


def wilson(successes, n, level=0.95):
    """(low, high) of a share, `successes` of `n` independent questions; (0, 1) when n = 0. Wilson 1927."""
    n = whole(n, "n")
    successes = whole(successes, "successes", n)
    if n == 0:
        return 0.0, 1.0
    z, share = normal_quantile(1 - tail(level) / 2), successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)
    return 0.0 if successes == 0 else low, 1.0 if successes == n else high  # exactly, whatever the rounding


def mcnemar(b, c):
    """The exact two-sided p of b against c discordant questions: only arm A was right on b, only arm B on c.

    It takes the questions as independent. Where whole pages favour one arm it finds a difference between equal arms in
    11 % of runs: use `paired` there. 1.0 when b + c = 0. McNemar 1947, with the binomial of b + c and 1/2.
    """
    b, c = whole(b, "b"), whole(c, "c")
    term = total = 1
    for k in range(min(b, c)):  # without rounding: total = the sum of C(b + c, k) up to min(b, c)
        term = term * (b + c - k) // (k + 1)
        total += term
    return min(1.0, 2 * total / 2 ** (b + c))


def worse_share(differences, threshold, level=0.95):
    """The share of questions made worse by more than `threshold`: their difference (B - A) is under -threshold.

    Higher is better; of losses, pass A - B. Returns {"share", "count", "upper"}: `upper` is the one-sided bound of
    Clopper & Pearson 1934, the true share at which 5 % of runs see so few or fewer; 1 - 0.05**(1/n) for 0 of n.
    """
    differences = finite(differences, "differences")
    if not threshold >= 0:
        raise ValueError(f"threshold: {threshold}, expected at least 0")
    n, count = len(differences), int((differences < -threshold).sum())
    upper = 1.0 if count == n else root(lambda share: tail(level) - binomial_cdf(count, n, share), 0.0, 1.0)
    return {"share": count / n, "count": count, "upper": upper}


def binomial_cdf(k, n, share):
    """The probability of at most k of n, 0 <= k < n, 0 < share < 1."""
    i = np.arange(1, k + 1)
    combinations = np.concatenate([[0.0], np.cumsum(np.log((n - i + 1) / i))])  # log C(n, 0), …, log C(n, k)
    i = np.arange(k + 1)
    return math.fsum(np.exp(combinations + i * math.log(share) + (n - i) * math.log1p(-share)))


# ----- means, clustered ----------------------------------------------------------------------------------------------


def paired(a, b, groups, *, level=0.95, draws=10_000, seed=0):
    """Arm B against arm A on the same questions: the mean of b - a, with an interval and a p that agree.

    a, b: one number a question [n]; groups: one hashable label a question [n]. Returns {"difference", "low", "high",
    "p", "se", "n", "clusters"}: p < 1 - level exactly when the interval excludes 0. p is two-sided and at least
    1 / (draws + 1). Where all differences are equal the interval has no width. One group says nothing about other
    groups: the interval is (-inf, inf), se inf and p 1. The test takes differences of equal arms as symmetric about 0:
    where a few large ones balance many small ones, and few groups hold most questions, it rejects too often.
    """
    difference, sums, sizes = residuals(paired_differences(a, b), groups)
    drawn = deviations(sums, sizes, draws, seed)
    half = half_width(drawn, level)
    return {"difference": difference, "low": difference - half, "high": difference + half,
            "p": (1 + int((drawn >= abs(difference)).sum())) / (draws + 1), "se": clustered_se(sums, sizes),
            "n": int(sizes.sum()), "clusters": len(sizes)}


def mean_interval(x, groups, *, level=0.95, draws=10_000, seed=0):
    """The mean of one arm: {"mean", "low", "high", "se", "n", "clusters"}, all as in `paired`."""
    mean, sums, sizes = residuals(finite(x, "x"), groups)
    half = half_width(deviations(sums, sizes, draws, seed), level)
    return {"mean": mean, "low": mean - half, "high": mean + half, "se": clustered_se(sums, sizes),
            "n": int(sizes.sum()), "clusters": len(sizes)}


def residuals(x, groups):
    """The mean of x [n]; by group the sum of x - mean [G] and the number of questions [G], in order of appearance."""
    groups = list(groups)
    if len(groups) != len(x):
        raise ValueError(f"groups: {len(groups)} labels, expected one for each of {len(x)} questions")
    places = {}
    place = [places.setdefault(group, len(places)) for group in groups]
    mean = float(np.clip(x.mean(), x.min(), x.max()))  # the mean of equal numbers may round to another
    return mean, np.bincount(place, weights=x - mean), np.bincount(place)


def clustered_se(sums, sizes):
    """The clustered standard error of a mean, from `residuals`; inf for one group."""
    clusters = len(sizes)
    if clusters == 1:
        return math.inf
    return math.sqrt(clusters / (clusters - 1) * float(sums @ sums)) / int(sizes.sum())


def deviations(sums, sizes, draws, seed):
    """|t*| · se of each draw, ascending [draws]: how far the mean of such a sample may lie from the true one.

    A draw of nearly equal groups has an se* near 0 and so a boundless t*: when 3 of 300 questions differ, many draws
    hold none of them. Therefore se* counts as at least a third of se, which many groups never come near. Fewer than ten
    groups make too few different draws (two make three), so there the deviations are at least Student's.
    """
    clusters, se = len(sizes), clustered_se(sums, sizes)
    if clusters == 1 or se == 0:
        return np.full(draws, se)
    generator = np.random.default_rng(seed)
    columns = np.stack([sums, sizes, sums ** 2, sums * sizes, sizes ** 2.0], axis=1)
    totals = np.empty((draws, 5))
    step = max(1, DRAWN_AT_ONCE // clusters)
    for start in range(0, draws, step):  # counts [draws, G] @ columns [G, 5]: a draw is a row
        drawn = generator.integers(clusters, size=(min(step, draws - start), clusters))
        rows = len(drawn)
        drawn += clusters * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * clusters).reshape(rows, clusters)
        totals[start:start + rows] = counts.astype(float) @ columns
    shift = totals[:, 0] / totals[:, 1]  # mean* - mean
    squares = totals[:, 2] - 2 * shift * totals[:, 3] + shift ** 2 * totals[:, 4]  # sum of (E_g - m_g · shift)²
    se_drawn = np.sqrt(clusters / (clusters - 1) * np.maximum(squares, 0)) / totals[:, 1]
    t = np.sort(np.abs(shift) / np.maximum(se_drawn, SMALLEST_SE * se))
    if clusters < FEW:
        t = np.maximum(t, np.sort(np.abs(generator.standard_t(clusters - 1, draws))))
    return t * se * (1 + 1e-12)  # differences of -1, 0, 1 tie: a tie counts as far off, however it rounds


def half_width(deviations, level):
    """The half-width of the interval, from the ascending deviations: a difference is larger exactly when its p is under
    1 - level. ValueError if the draws are too few for the level."""
    draws = len(deviations)
    below = int((np.arange(1, draws + 1) / (draws + 1) < tail(level)).sum())  # 1 + how many p may count
    if below == 0:
        raise ValueError(f"draws: {draws}, too few for the level {level}")
    return float(deviations[draws - below])


# ----- several comparisons -------------------------------------------------------------------------------------------


def holm(p_values):
    """Adjusted p-values, in the order given: at most 5 % of runs have a false one under 0.05 among them. Holm 1979.

    The i-th smallest of m (i = 0, 1, …) is multiplied by m - i, then raised to the largest before it; at most 1.
    """
    p = np.asarray(p_values, float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p_values: expected numbers from 0 to 1")
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted.tolist()


# ----- power ---------------------------------------------------------------------------------------------------------


def smallest_effect(a, b, groups, *, power=0.8, alpha=0.05):
    """The smallest true mean of b - a that a run like this one finds (p < alpha) with probability `power`.

    (t_{1 - alpha/2} + t_power) · clustered se, with Student's quantiles of G - 1 degrees of freedom; inf for one group.
    Miller, section 5; Bloom 1995.
    """
    _, sums, sizes = residuals(paired_differences(a, b), groups)
    if len(sizes) == 1:
        return math.inf
    t = student_quantile(1 - alpha / 2, len(sizes) - 1) + student_quantile(power, len(sizes) - 1)
    return t * clustered_se(sums, sizes)


def smallest_accuracy_effect(discordant_share, n, power=0.8, alpha=0.05):
    """The smallest true difference of two accuracies that `mcnemar` finds on n questions with probability `power`.

    (z_{1 - alpha/2} + z_power) · sqrt(discordant_share / n): on 300 questions of which 20 % are discordant, 7 points.
    The exact test rejects a little less often than this normal approximation says, with 77 to 80 % here. inf where the
    effect would exceed the discordant share, the largest difference possible. Miettinen 1968, without its last term.
    """
    if not (0 <= discordant_share <= 1 and n > 0):
        raise ValueError(f"a discordant share of {discordant_share} of {n} questions, expected 0 to 1 of at least 1")
    effect = (normal_quantile(1 - alpha / 2) + normal_quantile(power)) * math.sqrt(discordant_share / n)
    return effect if effect < discordant_share else math.inf


# ----- quantiles and checks ------------------------------------------------------------------------------------------


def normal_quantile(p):
    return NormalDist().inv_cdf(p)


def student_cdf(t, freedom):
    """P(T <= t) of Student's t with a whole number of degrees of freedom. Abramowitz & Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(freedom))
    k = np.arange(1 + freedom % 2, freedom - 2, 2)  # factors of cos²: 1/2, 3/4, … where even, 2/3, 4/5, … where odd
    series = 1 + np.cumprod(k / (k + 1) * math.cos(angle) ** 2).sum()
    if freedom % 2 == 0:
        return 0.5 + math.sin(angle) * series / 2
    return 0.5 + (angle + (math.sin(angle) * math.cos(angle) * series if freedom > 1 else 0)) / math.pi


def student_quantile(p, freedom):
    """The t that T stays under with probability p, 0.5 <= p < 1."""
    high = 1.0
    while student_cdf(high, freedom) < p:
        high *= 2
    return root(lambda t: student_cdf(t, freedom) - p, 0.0, high)


def root(function, low, high):
    """Where an increasing function passes 0 between `low` and `high`, by bisection to the last bit."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return high


def tail(level):
    """1 - level without its rounding, so that 1 - 0.95 is 0.05."""
    if not 0 < level < 1:
        raise ValueError(f"level: {level}, expected a number between 0 and 1")
    return round(1 - level, 12)


def whole(count, name, most=math.inf):
    """A count, 0 to `most`, as Python's int, which does not overflow; ValueError otherwise."""
    if not (count % 1 == 0 and 0 <= count <= most):
        raise ValueError(f"{name}: {count}, expected a whole number from 0 to {most}")
    return int(count)


def finite(x, name):
    """A non-empty list of finite numbers as a float64 array [n]; ValueError otherwise."""
    x = np.asarray(x, float)
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"{name}: shape {x.shape}, expected one number for each of at least one question")
    if not np.isfinite(x).all():
        raise ValueError(f"{name}: question {int(np.argmin(np.isfinite(x)))} is {x[~np.isfinite(x)][0]}, "
                         "expected a finite number")
    return x


def paired_differences(a, b):
    a, b = finite(a, "a"), finite(b, "b")
    if len(a) != len(b):
        raise ValueError(f"a and b: {len(a)} and {len(b)} questions, expected the same")
    return b - a

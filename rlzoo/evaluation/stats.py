"""Intervals and tests: every number with its uncertainty.

The unit is the problem. Samples of one problem share its difficulty, so they are averaged first, and intervals are over
problems (clustered); a central-limit interval over samples would be far too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..tree import Float64

HALF = 0.5  # pseudo-problems of the largest spread, see `clustered_mean`


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its interval. `n` is the number of problems; `p_value` is two-sided against 0, for differences only."""

    mean: float
    low: float
    high: float
    n: int
    level: float = 0.95
    method: str = ""
    p_value: float | None = None

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def as_dict(self) -> dict[str, float | int | str | None]:
        """For JSON: every field by name."""
        return {name: getattr(self, name) for name in ("mean", "low", "high", "n", "level", "method", "p_value")}


def wilson(successes: float, n: int, level: float = 0.95) -> Estimate:
    """Wilson's score interval of a proportion (Wilson 1927): for one sample per problem. It never leaves [0, 1].

    Raises:
        ValueError: n < 1, successes outside 0..n, or a level outside (0, 1).
    """
    from scipy.special import ndtri

    _check_level(level)
    _check_count(successes, n)
    z = float(ndtri(0.5 + level / 2))
    p, shrink = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    # At 0 and n the bound is exactly 0 or 1; rounding would leave it a hair inside.
    low, high = 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half
    return Estimate(p, low, high, n, level, "wilson")


def clopper_pearson(successes: int, n: int, level: float = 0.95) -> Estimate:
    """Exact interval of a proportion (Clopper and Pearson 1934): never covers less than `level`, and mostly more; wider than Wilson's.

    Raises:
        ValueError: as `wilson`.
    """
    from scipy.special import betaincinv

    _check_level(level)
    _check_count(successes, n)
    tail = (1 - level) / 2
    low = 0.0 if successes == 0 else float(betaincinv(successes, n - successes + 1, tail))
    high = 1.0 if successes == n else float(betaincinv(successes + 1, n - successes, 1 - tail))
    return Estimate(successes / n, low, high, n, level, "clopper-pearson")


def clustered_mean(values: ArrayLike, level: float = 0.95) -> Estimate:
    """Mean over problems of shares in [0, 1] [problems], e.g. of Pass@1, pass@k or maj@k per problem; NaN (nothing graded) is left out.

    Only zeros and ones (one sample per problem, or samples that all agree): Wilson's interval. Otherwise a problem-clustered t
    interval of n - 1 degrees of freedom on the logit scale: logit(m) ± t s / (sqrt(n) m (1 - m)), by the delta method, with the
    variance over problems s² = (sum of squares + m (1 - m) / 2) / (n - 1/2): half a problem of the largest spread that shares can
    have is added, since few problems may show too little. So no bound leaves [0, 1], and the interval is as lopsided as the shares
    are near an end. The plain t interval covers only 0.90 at p = 0.1 or 0.9 and 30 problems, BCa 0.93; this one 0.937 to 0.973
    there, and 0.946 to 0.964 at 100 and 500 problems (tests/unit/test_coverage.py; k = 16, per-problem rates from beta
    distributions of concentration 0.1 to 100). Below 0.05 or above 0.95, with 30 problems, it may still fall to 0.90.
    One problem alone says nothing: its interval is [0, 1].

    Raises:
        ValueError: no values, or one outside [0, 1].
    """
    x = _finite(values)
    _check_level(level)
    if ((x < 0) | (x > 1)).any():
        raise ValueError("shares must lie in [0, 1]")
    n, mean = len(x), float(x.mean())
    if n == 1:
        return Estimate(mean, 0.0, 1.0, 1, level, "one problem")
    if np.isin(x, (0.0, 1.0)).all():
        return wilson(float(x.sum()), n, level)
    largest = mean * (1 - mean)
    variance = (float(((x - mean) ** 2).sum()) + HALF * largest) / (n - 1 + HALF)
    centre, half = math.log(mean / (1 - mean)), t_quantile(level, n - 1) * math.sqrt(variance / n) / largest
    return Estimate(mean, _expit(centre - half), _expit(centre + half), n, level, "clustered logit t")


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Estimate:
    """Mean over problems of b - a with a t interval and p-value; `a`, `b` [problems] are per-problem means of the same problems
    in the same order, in shares. Problems with NaN on either side are left out; without any spread see `standard_error`.

    Raises:
        ValueError: lengths differ, or no problem has both values.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"a paired difference needs the same problems on both sides, not {first.shape} and {second.shape}")
    _check_level(level)
    d = _finite(second - first)
    n, mean, error = len(d), float(d.mean()), standard_error(d, level)
    half = t_quantile(level, n - 1) * error
    return Estimate(mean, mean - half, mean + half, n, level, "paired t", t_p_value(mean, error, n - 1))


def t_mean(values: ArrayLike, level: float = 0.95, floor: float = -math.inf, ceiling: float = math.inf) -> Estimate:
    """Mean of few independent values of any scale [values], e.g. one per training seed, with a t interval, within `floor` and `ceiling`;
    NaN is left out. One value alone says nothing: its interval is endless.

    Raises:
        ValueError: no values.
    """
    x = _finite(values)
    _check_level(level)
    n, mean = len(x), float(x.mean())
    half = t_quantile(level, n - 1) * float(x.std(ddof=1)) / math.sqrt(n) if n > 1 else math.inf
    return Estimate(mean, max(floor, mean - half), min(ceiling, mean + half), n, level, "t")


def stratified_mean(groups: Sequence[ArrayLike], weights: Sequence[float] | None = None, level: float = 0.95) -> Estimate:
    """Overall of a suite: weighted mean over sets of each set's mean over problems; by default the plain (macro) mean.

    `groups` are the sets' shares [problems]; `weights` e.g. the sets' sizes (published overalls weight by size). The interval
    recovers each set's variance from its own interval (MOVER; Zou and Donner 2008): m - sqrt(sum (w (m_i - l_i))²) and
    m + sqrt(sum (w (u_i - m_i))²), [l_i, u_i] being that of `clustered_mean`; for one set it is that set's interval.

    Raises:
        ValueError: no sets, a set without values, or weights that do not fit.
    """
    share = _shares(len(groups), weights)
    each = [clustered_mean(g, level) for g in groups]
    mean = float(sum(w * e.mean for w, e in zip(share, each, strict=True)))
    below = math.sqrt(sum((w * (e.mean - e.low)) ** 2 for w, e in zip(share, each, strict=True)))
    above = math.sqrt(sum((w * (e.high - e.mean)) ** 2 for w, e in zip(share, each, strict=True)))
    return Estimate(mean, mean - below, mean + above, sum(e.n for e in each), level, "stratified")


def stratified_difference(groups: Sequence[ArrayLike], weights: Sequence[float] | None = None, level: float = 0.95) -> Estimate:
    """The same mean for differences: `groups` are each set's per-problem differences [problems]; t interval with Welch's and
    Satterthwaite's degrees of freedom, and p-value. Sets without any spread count with the error of `standard_error`.

    Raises:
        ValueError: as `stratified_mean`.
    """
    _check_level(level)
    share = _shares(len(groups), weights)
    xs = [_finite(g) for g in groups]
    mean = float(sum(w * x.mean() for w, x in zip(share, xs, strict=True)))
    n = sum(len(x) for x in xs)
    parts = [(w * standard_error(x, level)) ** 2 if w else 0.0 for w, x in zip(share, xs, strict=True)]
    if not math.isfinite(sum(parts)):
        return Estimate(mean, -math.inf, math.inf, n, level, "stratified t")
    df, error = satterthwaite(parts, [len(x) - 1 for x in xs]), math.sqrt(sum(parts))
    half = t_quantile(level, df) * error
    return Estimate(mean, mean - half, mean + half, n, level, "stratified t", t_p_value(mean, error, df))


def holm(p_values: ArrayLike) -> Float64:
    """Holm's step-down adjustment (Holm 1979) of p-values [tests], in the order given; reject where the result <= alpha.

    Raises:
        ValueError: a p-value outside [0, 1].
    """
    p: Float64 = np.asarray(p_values, np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError("p-values must lie in [0, 1]")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return adjusted


def _finite(values: ArrayLike) -> Float64:
    x: Float64 = np.asarray(values, np.float64)
    if x.ndim != 1:
        raise ValueError(f"expected one value per problem, not an array of shape {x.shape}")
    x = x[~np.isnan(x)]
    if len(x) == 0:
        raise ValueError("no graded problem to take a mean over")
    return x


def standard_error(x: Float64, level: float) -> float:
    """Standard error of the mean of shares (or of differences of shares) [problems]; infinite for one problem.

    Where all values are the same, the sample shows no spread, but that is no certainty: another problem may still behave
    differently. The upper Wilson bound for 0 of n such problems then is the half width.
    """
    n = len(x)
    if n < 2:
        return math.inf
    if float(np.ptp(x)) < 1e-12:
        return wilson(0, n, level).high / t_quantile(level, n - 1)
    return float(x.std(ddof=1)) / math.sqrt(n)


def satterthwaite(variances: Sequence[float], dfs: Sequence[float]) -> float:
    """Degrees of freedom of a sum of independent variances (Welch 1938, Satterthwaite 1946); those of 0 are left out."""
    kept = [(v, df) for v, df in zip(variances, dfs, strict=True) if v > 0]
    return sum(v for v, _ in kept) ** 2 / sum(v * v / df for v, df in kept)


def t_quantile(level: float, df: float) -> float:
    """The value that Student's t of `df` degrees of freedom exceeds in size with chance 1 - level; infinite for df = 0."""
    from scipy.special import stdtrit

    return float(stdtrit(df, 0.5 + level / 2)) if df > 0 else math.inf


def t_p_value(mean: float, error: float, df: float) -> float | None:
    """Two-sided p-value of mean / error; None where the error is infinite."""
    from scipy.special import stdtr

    return float(2 * stdtr(df, -abs(mean) / error)) if math.isfinite(error) else None


def _shares(sets: int, weights: Sequence[float] | None) -> Float64:
    if sets == 0:
        raise ValueError("no sets to take a mean over")
    share = np.ones(sets) if weights is None else np.asarray(weights, np.float64)
    if len(share) != sets or (share < 0).any() or share.sum() <= 0:
        raise ValueError(f"{sets} sets need as many weights, none negative, not all 0")
    return np.asarray(share / share.sum(), np.float64)


def _expit(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def _check_count(successes: float, n: int) -> None:
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a proportion needs 0 <= successes <= n and n >= 1, not {successes} of {n}")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"confidence level {level}; must lie between 0 and 1")

"""Intervals and tests: every number with its uncertainty.

The unit is the problem. Samples of one problem share its difficulty, so they are averaged first, and intervals are over
problems (clustered); a central-limit interval over samples would be far too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..tree import Float64


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
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"a proportion needs 0 <= successes <= n and n >= 1, not {successes} of {n}")
    z = float(ndtri(0.5 + level / 2))
    p, shrink = successes / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    # At 0 and n the bound is exactly 0 or 1; rounding would leave it a hair inside.
    low, high = 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half
    return Estimate(p, low, high, n, level, "wilson")


def clustered_mean(values: ArrayLike, level: float = 0.95, bounds: tuple[float, float] | None = (0.0, 1.0)) -> Estimate:
    """Mean over problems of per-problem means, with a t interval of problems - 1 degrees of freedom, cut to `bounds`.

    `values` [problems] are shares; NaN (nothing graded) is left out. Without any spread see `_error`; all right or all wrong then
    gives Wilson's interval over problems. One problem alone says nothing: its interval is `bounds`.

    Raises:
        ValueError: no values.
    """
    x = _finite(values)
    _check_level(level)
    mean, half = float(x.mean()), _t_quantile(level, len(x) - 1) * _error(x, level)
    floor, ceiling = bounds if bounds is not None else (-math.inf, math.inf)
    return Estimate(mean, max(floor, mean - half), min(ceiling, mean + half), len(x), level, "clustered t")


def proportion(values: ArrayLike, k: int, level: float = 0.95) -> Estimate:
    """Pass@1 from per-problem means [problems] over k samples each: Wilson for k = 1, clustered t otherwise."""
    x = _finite(values)
    return wilson(float(x.sum()), len(x), level) if k == 1 else clustered_mean(x, level)


def paired_difference(a: ArrayLike, b: ArrayLike, level: float = 0.95) -> Estimate:
    """Mean over problems of b - a with a t interval and p-value; `a`, `b` [problems] are per-problem means of the same problems
    in the same order, in shares. Problems with NaN on either side are left out; without any spread see `_error`.

    Raises:
        ValueError: lengths differ, or no problem has both values.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"a paired difference needs the same problems on both sides, not {first.shape} and {second.shape}")
    _check_level(level)
    d = _finite(second - first)
    n, mean, error = len(d), float(d.mean()), _error(d, level)
    half = _t_quantile(level, n - 1) * error
    return Estimate(mean, mean - half, mean + half, n, level, "paired t", _t_p_value(mean, error, n - 1))


def stratified_mean(
    groups: Sequence[ArrayLike],
    weights: Sequence[float] | None = None,
    level: float = 0.95,
    bounds: tuple[float, float] | None = (0.0, 1.0),
) -> Estimate:
    """Weighted mean over sets of each set's mean over problems, by default the plain (macro) mean; Welch-Satterthwaite t interval.

    Also right for differences: give each set's per-problem differences and `bounds=None`; a p-value comes with it. Sets without
    any spread count with the error of `_error`.

    Raises:
        ValueError: no sets, a set without values, or weights that do not fit.
    """
    _check_level(level)
    xs = [_finite(g) for g in groups]
    if not xs:
        raise ValueError("no sets to take a mean over")
    share = np.ones(len(xs)) if weights is None else np.asarray(weights, np.float64)
    if len(share) != len(xs) or (share < 0).any() or share.sum() <= 0:
        raise ValueError(f"{len(xs)} sets need as many weights, none negative, not all 0")
    share = share / share.sum()
    mean = float(sum(w * x.mean() for w, x in zip(share, xs, strict=True)))
    n = sum(len(x) for x in xs)
    floor, ceiling = bounds if bounds is not None else (-math.inf, math.inf)
    parts = [(w * _error(x, level)) ** 2 if w else 0.0 for w, x in zip(share, xs, strict=True)]
    variance = float(sum(parts))
    if not math.isfinite(variance):
        return Estimate(mean, floor, ceiling, n, level, "stratified t")
    df = variance * variance / sum(v * v / (len(x) - 1) for v, x in zip(parts, xs, strict=True) if v)
    error = math.sqrt(variance)
    half = _t_quantile(level, df) * error
    p_value = _t_p_value(mean, error, df) if bounds is None else None
    return Estimate(mean, max(floor, mean - half), min(ceiling, mean + half), n, level, "stratified t", p_value)


def bootstrap_mean(
    values: ArrayLike,
    level: float = 0.95,
    *,
    resamples: int = 9999,
    seed: int = 0,
    statistic: Callable[..., Float64] = np.mean,
) -> Estimate:
    """BCa bootstrap over problems (Efron 1987), through scipy; `values` [problems], NaN left out. Without spread: the t interval.

    Raises:
        ValueError: no values.
    """
    from scipy.stats import bootstrap

    x = _finite(values)
    _check_level(level)
    point = float(statistic(x))
    if len(x) < 2 or np.all(x == x[0]):  # nothing to resample; BCa is undefined
        return clustered_mean(x, level)
    rng = np.random.default_rng(seed)
    found = bootstrap((x,), statistic, n_resamples=resamples, confidence_level=level, method="BCa", rng=rng, vectorized=True)
    return Estimate(point, float(found.confidence_interval.low), float(found.confidence_interval.high), len(x), level, "bootstrap BCa")


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


def _error(x: Float64, level: float) -> float:
    """Standard error of the mean of shares (or of differences of shares) [problems].

    Where all values are the same, the sample shows no spread, but that is no certainty: another problem may still behave
    differently. The upper Wilson bound for 0 of n such problems then is the half width (for all right or all wrong this is
    Wilson's interval).
    """
    n = len(x)
    if n < 2:
        return math.inf
    if float(np.ptp(x)) < 1e-12:
        return wilson(0, n, level).high / _t_quantile(level, n - 1)
    return float(x.std(ddof=1)) / math.sqrt(n)


def _t_quantile(level: float, df: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(df, 0.5 + level / 2)) if df > 0 else math.inf


def _t_p_value(mean: float, error: float, df: float) -> float | None:
    from scipy.special import stdtr

    return float(2 * stdtr(df, -abs(mean) / error)) if math.isfinite(error) else None


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"confidence level {level}; must lie between 0 and 1")

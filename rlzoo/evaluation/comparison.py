"""Is one arm better than another? Differences over training seeds and problems, with what could have been seen at all.

An arm is one configuration, trained with some seeds and measured on the same problems each time. The question is about the
expected Pass@1 of the arm over training seeds and problems, not about these checkpoints; so both kinds of chance count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from ..report.text import points
from ..tree import Float64
from .stats import Estimate, holm, satterthwaite, standard_error, t_quantile

FEW_SEEDS = 4
"""Up to so many seeds, what could have been seen stands beside every verdict."""
ALPHA = 0.05
POWER = 0.8


@dataclass(frozen=True, slots=True, eq=False)
class Arm:
    """What to compare: `scores` per test set, float64 [seeds, problems], each problem's mean over its samples in shares, NaN where
    nothing was graded; `seeds` name the rows."""

    name: str
    seeds: tuple[int, ...]
    scores: Mapping[str, Float64]


@dataclass(frozen=True, slots=True)
class Part:
    """One source of chance: a variance of the mean difference and its degrees of freedom."""

    variance: float
    df: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean score of b - that of a, in shares, with its two sources of chance.

    `seed` is the variance over training seeds and sampled responses, `rest` the share of it that sampled responses alone explain
    (both None with one seed only: then the difference is one of these checkpoints), `problem` the variance over problems of the true
    differences. `left_out` problems lacked a score somewhere. The half width at a level is sqrt(max(v_seed t_seed², v_rest t_rest²)
    + v_problem t_problem²), each t with its own degrees of freedom: never shorter than the t interval over seeds alone, nor than what
    sampling leaves open where few seeds agree by chance. One t with Satterthwaite's degrees of freedom would be shorter just then,
    and would call too many differences real. p-values are those of these intervals.
    """

    mean: float
    seed: Part | None
    rest: Part | None
    problem: Part
    seeds: tuple[int, int]
    problems: int
    left_out: int = 0
    paired_seeds: bool = False

    def half_width(self, level: float = 1 - ALPHA) -> float:
        """Half the width of the interval of that level, shares."""
        if not math.isfinite(self.problem.variance):
            return math.inf
        return math.sqrt(sum(part.variance * t_quantile(level, part.df) ** 2 for part in self._parts(level)))

    def estimate(self, level: float = 1 - ALPHA) -> Estimate:
        """The difference with its interval and p-value."""
        half = self.half_width(level)
        method = "t over problems" if self.seed is None else f"{'paired' if self.paired_seeds else 'Welch'} t over seeds, t over problems"
        return Estimate(self.mean, self.mean - half, self.mean + half, self.problems, level, method, self.p_value())

    def p_value(self, at: float = 0.0) -> float:
        """Two-sided p-value of a true difference of `at`: 1 - the level of the interval that ends there."""
        from scipy.optimize import brentq

        distance = abs(self.mean - at)
        if distance == 0 or not math.isfinite(self.problem.variance):
            return 1.0
        nearly = 1 - 1e-15
        if distance >= self.half_width(nearly):
            return 1 - nearly
        return 1 - float(brentq(lambda level: self.half_width(level) - distance, 0.0, nearly, xtol=1e-12))

    def equivalence(self, margin: float, alpha: float = ALPHA) -> tuple[str, float]:
        """Two one-sided tests (Schuirmann 1987) of |difference| < `margin` (shares): the outcome and the p-value of equivalence.

        "equivalent": p <= alpha, which is the same as the interval of level 1 - 2 alpha lying within ± margin. "different": that of
        level 1 - alpha lies outside ± margin. Otherwise "inconclusive".

        Raises:
            ValueError: margin <= 0.
        """
        if margin <= 0:
            raise ValueError(f"an equivalence test needs a margin above 0, not {margin:g}")
        inside = abs(self.mean) < margin
        nearest = self.p_value(math.copysign(margin, self.mean)) / 2
        p = nearest if inside else 1 - nearest
        outside = abs(self.mean) - self.half_width(1 - alpha) > margin
        return ("equivalent" if p <= alpha else "different" if outside else "inconclusive"), p

    def detectable(self, power: float = POWER, alpha: float = ALPHA) -> float:
        """The true difference (shares) that a comparison like this one, run anew, shows with chance `power`.

        In the non-central t distribution with Satterthwaite's degrees of freedom, averaged over what the true standard error may be where
        this one was estimated (s² / σ² is χ² / df): taken at its estimate alone, the figure is too small with few seeds (a claimed power
        of 0.80 was 0.61)."""
        from scipy.optimize import brentq
        from scipy.special import nctdtr
        from scipy.stats import chi2

        half = self.half_width(1 - alpha)
        if not math.isfinite(half):
            return math.inf
        parts = self._parts(1 - alpha)
        error = math.sqrt(sum(part.variance for part in parts))
        df = satterthwaite([part.variance for part in parts], [part.df for part in parts])
        spread = np.sqrt(chi2.ppf((np.arange(256) + 0.5) / 256, df) / df)  # estimated over true standard error

        def short(factor: float) -> float:
            return power - float(np.mean(1 - np.nan_to_num(nctdtr(df, factor * spread, half / error), nan=0.0)))

        top = half / error
        while short(top) > 0:
            top *= 2
        return float(brentq(short, 0.0, top, xtol=1e-9)) * error

    def _parts(self, level: float) -> list[Part]:
        runs = [part for part in (self.seed, self.rest) if part is not None]
        return [self.problem] if not runs else [max(runs, key=lambda part: part.variance * t_quantile(level, part.df) ** 2), self.problem]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Arm b against arm a: per set and overall. `adjusted` are the sets' p-values after Holm over sets, `p_value` that of the
    overall after Holm over the `pairs` that were compared together. `improvement`: see `probability_of_improvement`."""

    a: str
    b: str
    sets: Mapping[str, Difference]
    adjusted: Mapping[str, float]
    overall: Difference
    improvement: Estimate
    p_value: float
    pairs: int = 1

    @property
    def winner(self) -> str | None:
        """The name of the better arm; None where no difference is shown, or one seed cannot show any."""
        if self.p_value > ALPHA or self.overall.seed is None:
            return None
        return self.b if self.overall.mean > 0 else self.a

    @property
    def verdict(self) -> str:
        """One sentence."""
        return _verdict(self)

    def as_dict(self) -> dict[str, Any]:
        """Plain data: shares, not points."""

        def plain(d: Difference) -> dict[str, Any]:
            row = {**d.estimate().as_dict(), "detectable": d.detectable(), "seeds": list(d.seeds), "left_out": d.left_out}
            return {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}

        return {
            "a": self.a,
            "b": self.b,
            "verdict": self.verdict,
            "winner": self.winner,
            "p_value": self.p_value,
            "pairs": self.pairs,
            "overall": plain(self.overall),
            "sets": {name: {**plain(d), "p_value_holm": self.adjusted[name]} for name, d in self.sets.items()},
            "probability_of_improvement": self.improvement.as_dict(),
        }


def compare(a: Arm, b: Arm, *, weights: Mapping[str, float] | None = None, pair_seeds: bool = False) -> Comparison:
    """Compare two arms on the sets of both, paired over problems; `weights` of the sets in the overall (default: all the same).

    Seeds are independent draws of either arm by default (Welch). With `pair_seeds` differences are taken within each seed, so that
    what a seed does to both arms cancels; that needs the same seeds, and halves the degrees of freedom. It pays with 5 seeds and more
    that move both arms alike. Simulated (200 problems, k = 16, seeds move an arm by 2 points): 3 seeds show a difference of 5 points
    with chance 0.45, paired 0.33; 5 seeds 0.84, paired 0.75, or 0.90 and 0.92 where half of a seed's variance is common to both.

    Raises:
        ValueError: different sets or problems, no problems in common, repeated seeds, or seeds that cannot be paired.
    """
    for arm in (a, b):
        _check_arm(arm)
    if set(a.scores) != set(b.scores):
        raise ValueError(f"{a.name} and {b.name} were measured on different sets: {', '.join(a.scores)} and {', '.join(b.scores)}")
    if pair_seeds and set(a.seeds) != set(b.seeds):
        raise ValueError(f"seeds can be paired only where both arms have the same; {a.name} has {a.seeds}, {b.name} has {b.seeds}")
    order = [b.seeds.index(seed) for seed in a.seeds] if pair_seeds else list(range(len(b.seeds)))
    scores = {name: (np.asarray(a.scores[name], np.float64), np.asarray(b.scores[name], np.float64)[order]) for name in a.scores}
    kept: dict[str, tuple[Float64, Float64]] = {}
    for name, (first, second) in scores.items():
        if first.shape[1] != second.shape[1]:
            raise ValueError(f"{name}: {a.name} has {first.shape[1]} problems, {b.name} has {second.shape[1]}")
        whole = ~(np.isnan(first).any(axis=0) | np.isnan(second).any(axis=0))
        if not whole.any():
            raise ValueError(f"{name}: no problem has a score in every run of {a.name} and {b.name}")
        kept[name] = first[:, whole], second[:, whole]
    left_out = {name: scores[name][0].shape[1] - kept[name][0].shape[1] for name in kept}
    share = _weights(list(kept), weights)
    sets = {name: _difference([both], [1.0], left_out[name], pair_seeds) for name, both in kept.items()}
    overall = _difference(list(kept.values()), [share[name] for name in kept], sum(left_out.values()), pair_seeds)
    adjusted = dict(zip(sets, holm([d.p_value() for d in sets.values()]).tolist(), strict=True))
    runs = [{name: both[side].mean(axis=1) for name, both in kept.items()} for side in (0, 1)]
    return Comparison(a.name, b.name, sets, adjusted, overall, probability_of_improvement(runs[0], runs[1]), overall.p_value())


def compare_all(arms: Sequence[Arm], *, weights: Mapping[str, float] | None = None, pair_seeds: bool = False) -> list[Comparison]:
    """Every pair of arms, the earlier one as a; overall p-values by Holm over pairs, so that no pair of equal arms is called
    different with more than 5 % chance.

    Raises:
        ValueError: as `compare`.
    """
    found = [compare(a, b, weights=weights, pair_seeds=pair_seeds) for a, b in combinations(arms, 2)]
    adjusted = holm([c.p_value for c in found]).tolist()
    return [replace(c, p_value=p, pairs=len(found)) for c, p in zip(found, adjusted, strict=True)]


def probability_of_improvement(a: Mapping[str, Float64], b: Mapping[str, Float64], level: float = 1 - ALPHA) -> Estimate:
    """Chance that a run of b beats a run of a, averaged over sets (Agarwal et al. 2021, arXiv:2108.13264, section 4.3); ties count half.

    `a`, `b` map each set to its scores per run [seeds]. Per set it is the Mann-Whitney statistic with Newcombe's interval (2006,
    method 5) with a t quantile of runs - 2 degrees of freedom: with the normal one it covers 0.90 at 3 runs each, so 0.96 and more.
    A bootstrap over runs, as in the paper, cannot be used on few runs (where 3 all beat 3 others it would be certain).
    The sets share their runs, so that their intervals are averaged as they are: sound, and wide.
    """
    each = [_mann_whitney(a[name], b[name], level) for name in a]
    mean, low, high = (float(np.mean([e[i] for e in each])) for i in range(3))
    return Estimate(mean, low, high, len(each), level, "Mann-Whitney, Newcombe's method 5")


def _mann_whitney(a: Float64, b: Float64, level: float) -> tuple[float, float, float]:
    from scipy.optimize import brentq

    x, y = np.asarray(a)[:, None], np.asarray(b)[None, :]
    mean = float(((y > x) + 0.5 * (y == x)).mean())
    if x.size + y.size < 3:
        return mean, 0.0, 1.0
    t_level = t_quantile(level, x.size + y.size - 2)
    extra = (x.size + y.size) / 2 - 1

    def variance(t: float) -> float:
        return t * (1 - t) * (1 + extra * ((1 - t) / (2 - t) + t / (1 + t))) / (x.size * y.size)

    def lower(found: float) -> float:
        if found == 0:
            return 0.0
        return float(brentq(lambda t: (found - t) ** 2 - t_level * t_level * variance(t), 0.0, found - 1e-12))

    return mean, lower(mean), 1 - lower(1 - mean)


def _difference(scores: Sequence[tuple[Float64, Float64]], weights: Sequence[float], left_out: int, pair: bool) -> Difference:
    """The weighted mean over sets of b - a; `scores` per set: a [seeds, problems] and b [seeds, problems] of the same problems.

    A sample of runs is crossed with problems: score = mean + run + problem + rest. The variance over runs of a run's mean holds that
    of runs and the rest; the variance over problems of a problem's mean difference holds that of problems and the rest, which is
    taken off there, so that it counts once.
    """
    seeds = len(scores[0][0]), len(scores[0][1])
    means = [b.mean(axis=0) - a.mean(axis=0) for a, b in scores]  # per problem
    mean = float(sum(w * m.mean() for w, m in zip(weights, means, strict=True)))
    problems = sum(len(m) for m in means)
    plain = [(w * standard_error(m, 1 - ALPHA)) ** 2 if w else 0.0 for w, m in zip(weights, means, strict=True)]
    dfs = [len(m) - 1 for m in means]
    whole = _part(plain, dfs)
    if min(seeds) < 2 or not math.isfinite(whole.variance):
        none = None if min(seeds) < 2 else Part(0.0, 1.0)
        return Difference(mean, none, none, whole, seeds, problems, left_out, pair and none is not None)
    samples = [[b - a for a, b in scores]] if pair else [[a for a, _ in scores], [b for _, b in scores]]
    runs = [np.sum([w * x.mean(axis=1) for w, x in zip(weights, xs, strict=True)], axis=0) for xs in samples]
    seed = _part([float(r.var(ddof=1)) / len(r) for r in runs], [len(r) - 1 for r in runs])
    rests = np.array([[_rest(x) for x in xs] for xs in samples])  # [samples, sets], of one set's mean
    shares = np.square(weights)
    rest = _part((rests * shares).ravel().tolist(), [(len(r) - 1) * df for r in runs for df in dfs])
    problem = _part(
        [w * max(float(m.var(ddof=1)) / len(m) - e, 0.0) if w else 0.0 for w, m, e in zip(shares, means, rests.sum(axis=0), strict=True)],
        dfs,
    )
    if seed.variance + rest.variance + problem.variance == 0:
        problem = whole  # no spread at all is no certainty, see `standard_error`
    return Difference(mean, seed, rest, problem, seeds, problems, left_out, pair)


def _part(variances: Sequence[float], dfs: Sequence[float]) -> Part:
    """The sum of independent variances."""
    total = sum(variances)
    return Part(total, satterthwaite(variances, dfs) if 0 < total < math.inf else 1.0)


def _rest(x: Float64) -> float:
    """Variance of the mean of x [runs, problems] that neither runs nor problems explain: mean square of the residuals / size."""
    residuals = x - x.mean(axis=0) - x.mean(axis=1, keepdims=True) + x.mean()
    runs, problems = x.shape
    return float((residuals**2).sum()) / ((runs - 1) * (problems - 1)) / x.size if problems > 1 else 0.0


def _verdict(c: Comparison) -> str:
    d = c.overall
    seeds = f"{min(d.seeds)} seed{'s' if min(d.seeds) > 1 else ''}"
    p = f"p {_p(d.p_value())}" + (f" ({_p(c.p_value)} after Holm over {c.pairs} pairs)" if c.pairs > 1 else "")
    shown = f"{points(d.estimate())} points, {p}"
    if d.seed is None:
        return f"one seed says nothing about training: between these checkpoints, {c.b} - {c.a} is {shown}, over problems alone"
    if not math.isfinite(d.half_width()):
        return f"no difference shown between {c.a} and {c.b}: a set of one problem says nothing about others"
    unseen = f"smaller than {100 * d.detectable():.1f} points cannot be seen with {seeds}"
    if c.winner is None:
        return f"no difference shown between {c.a} and {c.b}: {c.b} - {c.a} is {shown}; {unseen}{_by_set(c)}"
    estimate, other = d.estimate(), c.a if c.winner == c.b else c.b
    if c.winner == c.a:
        estimate = replace(estimate, mean=-estimate.mean, low=-estimate.high, high=-estimate.low)
    few = f"; {unseen}" if min(d.seeds) <= FEW_SEEDS else ""
    return f"{c.winner} is better than {other} by {points(estimate)} points, {p}{few}{_by_set(c)}"


def _by_set(c: Comparison) -> str:
    """What Holm leaves of the sets, where there are several."""
    if len(c.sets) < 2:
        return ""
    clear = [name for name, p in c.adjusted.items() if p <= ALPHA]
    said = ", ".join(f"{c.b if c.sets[name].mean > 0 else c.a} on {name}" for name in clear)
    return f"; by set, after Holm over {len(c.sets)}: {said + ' better' if clear else 'none'}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}" if value < 0.1 else f"= {value:.2f}"


def _weights(names: Sequence[str], weights: Mapping[str, float] | None) -> dict[str, float]:
    given = dict.fromkeys(names, 1.0) if weights is None else {name: float(weights.get(name, -1.0)) for name in names}
    total = sum(given.values())
    if min(given.values()) < 0 or total <= 0:
        raise ValueError(f"each of the sets {', '.join(names)} needs a weight, none negative, not all 0")
    return {name: w / total for name, w in given.items()}


def _check_arm(arm: Arm) -> None:
    if not arm.scores or not arm.seeds:
        raise ValueError(f"{arm.name} has no scores to compare")
    if len(set(arm.seeds)) != len(arm.seeds):
        raise ValueError(f"{arm.name} has a seed twice: {arm.seeds}")
    for name, x in arm.scores.items():
        if np.ndim(x) != 2 or np.shape(x)[0] != len(arm.seeds):
            raise ValueError(f"{arm.name} on {name}: expected scores [{len(arm.seeds)} seeds, problems], not of shape {np.shape(x)}")

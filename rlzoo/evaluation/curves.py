"""Learning curves against their cost: how high on the whole, and at what cost a given Pass@1 was reached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from ..tree import Float64
from .stats import Estimate, t_mean


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """One run: `costs` [points], rising, in any unit (steps, tokens, device-hours), and `values` [points], e.g. Pass@1 in shares.

    Raises:
        ValueError: no points, lengths differ, a value that is not finite, or costs that do not rise.
    """

    costs: Float64
    values: Float64

    @classmethod
    def of(cls, costs: ArrayLike, values: ArrayLike) -> Curve:
        """From sequences."""
        return cls(np.asarray(costs, np.float64), np.asarray(values, np.float64))

    def __post_init__(self) -> None:
        if self.costs.ndim != 1 or self.costs.shape != self.values.shape or not len(self.costs):
            raise ValueError(f"a curve needs one value per cost, not {self.values.shape} values for {self.costs.shape} costs")
        if not (np.isfinite(self.costs).all() and np.isfinite(self.values).all() and (np.diff(self.costs) > 0).all()):
            raise ValueError("a curve needs finite values at finite costs that rise from point to point")

    def cost_to(self, target: float) -> float:
        """The first cost at which `target` is reached, on straight lines between the points; infinite if it never is.

        Noise lets a curve touch a target early; the more points, the earlier. So compare runs that were measured equally often.
        """
        reached = np.flatnonzero(self.values >= target)
        if not len(reached):
            return math.inf
        i = int(reached[0])
        if i == 0:
            return float(self.costs[0])
        share = (target - self.values[i - 1]) / (self.values[i] - self.values[i - 1])
        return float(self.costs[i - 1] + share * (self.costs[i] - self.costs[i - 1]))

    def height(self, low: float, high: float) -> float:
        """Mean value between two costs: the area under the straight lines between the points / (high - low).

        Raises:
            ValueError: the curve does not span both costs, or low >= high.
        """
        if not self.costs[0] <= low < high <= self.costs[-1]:
            raise ValueError(f"no area from {low:g} to {high:g} under a curve from {self.costs[0]:g} to {self.costs[-1]:g}")
        inside = self.costs[(self.costs > low) & (self.costs < high)]
        at = np.concatenate([[low], inside, [high]])
        return float(np.trapezoid(np.interp(at, self.costs, self.values), at)) / (high - low)


@dataclass(frozen=True, slots=True)
class Reach:
    """At what cost the runs of an arm reached `target`: per run, infinite where it never did within its last cost (`budgets`).

    `estimate` is the mean over runs with its t interval, not below 0; None unless every run reached the target: a mean over those
    that did would be too low.
    """

    target: float
    costs: tuple[float, ...]
    budgets: tuple[float, ...]
    estimate: Estimate | None

    @property
    def reached(self) -> int:
        """Runs that reached the target."""
        return sum(math.isfinite(cost) for cost in self.costs)

    def sentence(self, unit: str) -> str:
        """In words, with `unit` behind each cost."""
        runs, goal = len(self.costs), f"{100 * self.target:.1f} %"
        if self.estimate is not None:
            e = self.estimate
            return f"{goal} reached at {e.mean:.4g} {unit} " + (f"[{e.low:.4g}, {e.high:.4g}]" if runs > 1 else "(one run)")
        within = f"within {min(self.budgets):.4g} {unit}"
        if not self.reached:
            return f"{goal} not reached {within} by any of {runs} runs"
        first = min(self.costs)
        return f"{goal} reached by {self.reached} of {runs} runs, the first at {first:.4g} {unit}; no mean, the others did not {within}"


def cost_to_reach(curves: Sequence[Curve], target: float, level: float = 0.95) -> Reach:
    """What it cost the runs of one arm to reach a value.

    Raises:
        ValueError: no curves.
    """
    if not curves:
        raise ValueError("no curves to read a cost from")
    costs = tuple(curve.cost_to(target) for curve in curves)
    estimate = t_mean(costs, level, floor=0.0) if all(map(math.isfinite, costs)) else None
    return Reach(target, costs, tuple(float(curve.costs[-1]) for curve in curves), estimate)


def frontier(costs: ArrayLike, values: ArrayLike) -> tuple[Float64, Float64]:
    """The points [points] of a curve that are higher than every cheaper one: from each on, its value is the best reached for the cost,
    until the next. The costs must not fall. Noise raises it, as it raises every best of many measurements."""
    x, y = np.asarray(costs, np.float64), np.asarray(values, np.float64)
    higher = y > np.concatenate([[-np.inf], np.maximum.accumulate(y)[:-1]]) if len(y) else np.zeros(0, bool)
    return x[higher], y[higher]


def leaders(curves: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> list[tuple[float, float, str]]:
    """The accuracy-per-cost frontier over arms: (cost, value, arm) of every point that no point of any arm reaches at the same cost or
    less (of equal ones the first arm's), beginning above what costs nothing."""
    found = [(float(x), float(y), arm) for arm, (xs, ys) in curves.items() for x, y in zip(np.ravel(xs), np.ravel(ys), strict=True)]
    best, kept = max((y for x, y, _ in found if x <= 0), default=-math.inf), []
    for x, y, arm in sorted(found, key=lambda point: (point[0], -point[1])):
        if y > best:
            best = y
            kept.append((x, y, arm))
    return kept


def mean_height(curves: Sequence[Curve], low: float, high: float, level: float = 0.95) -> Estimate:
    """Mean over runs of the mean value between two costs (the normalised area), with a t interval over runs.

    Raises:
        ValueError: no curves, or one that does not span both costs (see `common_range`).
    """
    return t_mean([curve.height(low, high) for curve in curves], level)


def common_range(curves: Sequence[Curve]) -> tuple[float, float]:
    """The costs that all curves span: for areas to compare, take it over the curves of all arms.

    Raises:
        ValueError: no curves, or no such range.
    """
    if not curves:
        raise ValueError("no curves to compare")
    low, high = max(float(c.costs[0]) for c in curves), min(float(c.costs[-1]) for c in curves)
    if low >= high:
        raise ValueError(f"the curves have no range of costs in common: one begins at {low:g}, one ends at {high:g}")
    return low, high

"""Learning curves against their cost: how high on the whole, and at what cost a given Pass@1 was reached."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

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
    """The most that a curve has reached for each cost, on straight lines between its points (as `Curve.cost_to`): costs and values
    [vertices] of a line that never falls, from its first cost to its last. Noise raises it, as it raises every best of many."""
    x, y = np.asarray(costs, np.float64).tolist(), np.asarray(values, np.float64).tolist()
    vertices = [(x[0], y[0])]
    for (x1, y1), (x2, y2) in pairwise(zip(x, y, strict=True)):
        last, best = vertices[-1]
        if y2 > best:
            rises = x1 + (best - y1) / (y2 - y1) * (x2 - x1)
            vertices += [(rises, best)] if rises > last else []
            vertices.append((x2, y2))
    if vertices[-1][0] < x[-1]:
        vertices.append((x[-1], vertices[-1][1]))
    found = np.array(vertices)
    return found[:, 0], found[:, 1]


def leaders(frontiers: Mapping[str, tuple[ArrayLike, ArrayLike]]) -> list[tuple[float, float, str]]:
    """Whose `frontier` is the highest from which cost on: (cost, value there, arm), up to the last cost of any; of equal ones the first.
    An arm that has ended stays at its best, as that can be had for more, too."""
    lines = {arm: (np.asarray(x, np.float64), np.asarray(y, np.float64)) for arm, (x, y) in frontiers.items()}
    grid = np.unique(np.concatenate([x for x, _ in lines.values()]))
    heights = {arm: np.interp(grid, x, y) for arm, (x, y) in lines.items()}
    cuts = [grid]
    for a, b in combinations(heights.values(), 2):  # where one straight piece crosses another
        before, after = (a - b)[:-1], (a - b)[1:]
        across = before * after < 0
        cuts.append(grid[:-1][across] + (before / (before - after + ~across))[across] * np.diff(grid)[across])
    ends = np.unique(np.concatenate(cuts))
    found: list[tuple[float, float, str]] = []
    for low, high in pairwise(ends.tolist()):
        at = {arm: float(np.interp((low + high) / 2, x, y)) for arm, (x, y) in lines.items()}
        arm = max(at, key=lambda name: at[name])
        if not found or found[-1][2] != arm:
            found.append((low, float(np.interp(low, *lines[arm])), arm))
    return found


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

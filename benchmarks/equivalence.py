"""Do runs on two engines gain the same? Two one-sided tests per algorithm, and over all of them.

    python -m rlzoo.benchmarks.equivalence RUN ... --against RUN ... --margin 5 --out results/NAME.md

A run is a folder or its row (summary.json). The gain is the overall Pass@1 of the trained model minus the base model's, both
measured through the run's own engine. Per algorithm the difference of mean gains is compared with the margin by Welch's t over
seeds (Schuirmann 1987): the engines are called equivalent where the 90 % interval lies within it, different where that interval
lies outside, and the result inconclusive otherwise. Over all, the difference is the mean of the algorithms' differences.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, variance
from typing import Annotated, Any

import tyro

from rlzoo.evaluation.stats import satterthwaite, t_quantile
from rlzoo.report.tables import OVERALL
from rlzoo.store.runs import RunFolder, write_aside

LEVEL = 0.9  # of the interval: two one-sided tests at 5 %


@dataclass(frozen=True, slots=True)
class Group:
    """Runs of one algorithm on one engine: gains in points, one per seed."""

    engine: str
    gains: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """`other` minus `one` in points with its 90 % interval; `p_value` of the two one-sided tests: the larger of both."""

    mean: float
    low: float
    high: float
    p_value: float

    def verdict(self, margin: float) -> str:
        if -margin < self.low and self.high < margin:
            return f"equivalent within ± {margin:g}"
        return "different" if self.low > margin or self.high < -margin else "inconclusive"


def difference(pairs: Sequence[tuple[Sequence[float], Sequence[float]]], margin: float) -> Difference:
    """Mean over pairs of (mean of the second - mean of the first), with Welch's variance.

    Raises:
        ValueError: a group has fewer than two runs, or no spread at all.
    """
    from scipy.special import stdtr

    if any(len(group) < 2 for pair in pairs for group in pair):
        raise ValueError("each algorithm needs at least two runs on each engine")
    shift = mean(mean(other) - mean(one) for one, other in pairs)
    variances = [variance(group) / len(group) / len(pairs) ** 2 for pair in pairs for group in pair]
    if not sum(variances):
        raise ValueError("the runs of a group are all the same: their spread cannot be judged")
    df, error = satterthwaite(variances, [len(group) - 1 for pair in pairs for group in pair]), math.sqrt(sum(variances))
    half = t_quantile(LEVEL, df) * error
    p_value = float(stdtr(df, (abs(shift) - margin) / error))
    return Difference(shift, shift - half, shift + half, p_value)


def equivalence(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional], /, against: tuple[Path, ...], margin: float = 5.0, out: Path | None = None
) -> None:
    """Compare gains of RUN ... with those of --against RUN ...; --margin in points of Pass@1."""
    text = document(_groups(runs), _groups(against), margin)
    print(text)
    if out is not None:
        write_aside(out, text)


def document(one: Mapping[str, Group], other: Mapping[str, Group], margin: float) -> str:
    """The page.

    Raises:
        ValueError: the two sides have other algorithms, or see `difference`.
    """
    if set(one) != set(other):
        raise ValueError(f"one side has {', '.join(sorted(one))}, the other {', '.join(sorted(other))}; both need the same algorithms")
    first, second = (", ".join(sorted({g.engine for g in side.values()})) for side in (one, other))
    lines = [
        f"# Gains: {second} against {first}\n",
        f"Overall Pass@1 of the trained model minus the base model's, points, by seed; differences with {LEVEL:.0%} intervals (Welch over "
        f"seeds), p of the two one-sided tests with margin {margin:g}.\n",
        f"| algorithm | {first} | {second} | difference | p | verdict |",
        "|---" * 6 + "|",
    ]
    pairs = {name: (one[name].gains, other[name].gains) for name in sorted(one)}
    for name, members in [*((name, [pair]) for name, pair in pairs.items()), ("all, mean", list(pairs.values()))]:
        found = difference(members, margin)
        shown = [", ".join(f"{g:+.1f}" for g in group) if len(members) == 1 else "" for group in members[0]]
        told = f"{found.mean:+.1f} [{found.low:+.1f}, {found.high:+.1f}] | {found.p_value:.3f} | {found.verdict(margin)} |"
        lines.append(f"| {name} | {shown[0]} | {shown[1]} | {told}")
    return "\n".join([*lines, ""])


def _groups(runs: Sequence[Path]) -> dict[str, Group]:
    rows: dict[str, list[Mapping[str, Any]]] = {}
    for path in runs:
        row = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else RunFolder.open(path).summary()
        if row is None or "table" not in row:
            raise ValueError(f"{path} has no final measurement: it did not finish, or ran without a suite")
        rows.setdefault(row["algo"], []).append(row)
    groups = {}
    for algo, members in rows.items():
        engines = {row["protocol"]["engine"] for row in members}
        if len(engines) > 1:
            raise ValueError(f"the runs of {algo} on one side used several engines: {', '.join(sorted(engines))}")
        groups[algo] = Group(engines.pop(), tuple(_gain(row) for row in sorted(members, key=lambda row: row["seed"])))
    return groups


def _gain(row: Mapping[str, Any]) -> float:
    """Points, overall."""
    found = [gain for gain in row["table"]["gains"] if gain["set"] == OVERALL]
    return 100 * float(found[0]["pass_at_1"]["mean"])


if __name__ == "__main__":
    tyro.cli(equivalence)

"""Arms over training seeds: the result rows of one configuration as a line of a table."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import registry
from ..config import build
from ..evaluation.arms import TRAINED
from ..evaluation.papers import ABSENT, settings
from ..evaluation.rows import ResultRow
from ..evaluation.stats import t_mean
from .grid import Grid
from .plots import learned
from .text import count, percent

ABOUT = (
    "arms of two training seeds or more: means over seeds, of Pass@1 with a t interval; several runs of one seed count as one, by "
    "their mean"
)
FIGURES: Mapping[str, Callable[[ResultRow], float | None]] = {
    "pass_at_1": lambda row: row.overall[TRAINED].pass_at_1.mean,
    "greedy": lambda row: greedy.mean if (greedy := row.overall[TRAINED].greedy) else None,
    "length": lambda row: row.overall[TRAINED].length.mean,
    "tokens": lambda row: row.sampled_tokens,
    "device_hours": lambda row: row.training.device_hours if row.training else None,
}
"""Of a run's trained model and its training; None where the row lacks it."""


@dataclass(frozen=True, slots=True)
class SeedArm:
    """Rows that differ in the seed and in what learning does not see. `options` by dotted name are all others, without those that do
    what was done before they were there."""

    name: str
    options: Mapping[str, Any]
    rows: Sequence[ResultRow]

    @property
    def seeds(self) -> list[int]:
        return sorted({row.seed for row in self.rows})

    def option(self, key: str) -> Any:
        """Its value, of one that is left out the old one (`papers.ABSENT`); None where it has no such option."""
        return self.options.get(key, ABSENT.get(key))

    @property
    def devices(self) -> list[str]:
        """Names of what it was trained on."""
        return sorted({row.training.device for row in self.rows if row.training is not None})

    def by_seed(self, figure: str) -> list[float] | None:
        """One of FIGURES per seed, of a seed that was run twice the mean; None where a row lacks it."""
        values = [FIGURES[figure](row) for row in self.rows]
        known = [(row.seed, value) for row, value in zip(self.rows, values, strict=True) if value is not None]
        if len(known) < len(values):
            return None
        return [float(np.mean([value for own, value in known if own == seed])) for seed in self.seeds]

    def mean(self, figure: str) -> float | None:
        """The mean over seeds."""
        values = self.by_seed(figure)
        return None if values is None else float(np.mean(values))


def seed_arms(rows: Sequence[ResultRow]) -> list[SeedArm]:
    """The arms among rows of runs, in the order of their first rows; grouped as `rlzoo compare` does (`plots.learned`), where a row that
    lacks a younger option has its old value (`papers.ABSENT`)."""
    found: dict[str, list[ResultRow]] = defaultdict(list)
    for row in rows:
        found[json.dumps(_options(row), sort_keys=True)].append(row)
    return [SeedArm(own[0].arm.name, _options(own[0]), own) for own in found.values()]


def _options(row: ResultRow) -> dict[str, Any]:
    return settings(learned(row.config))


def arms_grid(title: str, rows: Sequence[ResultRow], notes: Sequence[str]) -> Grid | None:
    """A line per arm of two seeds or more, ranked by Pass@1; None where there is no such arm. `rows` were measured alike."""
    arms = [arm for arm in seed_arms(rows) if len(arm.seeds) > 1]
    if not arms:
        return None
    names = [f"{arm.name} ({apart})" if (apart := _apart(arm, arms)) else arm.name for arm in arms]
    ranked = sorted(zip(names, arms, strict=True), key=lambda each: (-(each[1].mean("pass_at_1") or 0.0), each[0]))
    head = ["", "arm", "seeds", "runs", "Pass@1, % [95 %]", "greedy, %", "length", "training: sampled tokens", "training: device-hours"]
    lines = [[str(i), name, *_cells(arm)] for i, (name, arm) in enumerate(ranked, 1)]
    return Grid(title, [*head, "config"], lines, [ABOUT, *notes], names=2)


def _apart(arm: SeedArm, arms: Sequence[SeedArm]) -> str:
    """What tells an arm from its algorithm's defaults, or, where that is not registered here, from the others of the algorithm: its own
    values of the options in which they differ."""
    alike = _defaults(arm.name) or [other for other in arms if other.name == arm.name]
    every = sorted({key for other in (arm, *alike) for key in other.options})
    differing = [key for key in every if any(other.option(key) != arm.option(key) for other in alike)]
    return ", ".join(f"{key} {_value(arm.option(key))}" for key in differing if arm.option(key) is not None)


def _defaults(algorithm: str) -> list[SeedArm]:
    """What choosing a registered algorithm and nothing else is; none for one that is not."""
    if algorithm not in registry.names("algorithm"):
        return []
    return [SeedArm(algorithm, settings(learned(build([("defaults", {"algo": algorithm})]).to_dict())), [])]


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    return str(int(value)) if isinstance(value, float) and value.is_integer() else json.dumps(value)


def _cells(arm: SeedArm) -> list[str]:
    shares = arm.by_seed("pass_at_1")
    greedy, length, tokens, hours = (arm.mean(figure) for figure in ("greedy", "length", "tokens", "device_hours"))
    one_kind = len(arm.devices) == 1  # a mean of hours of unlike devices says nothing
    return [
        str(len(arm.seeds)),
        str(len(arm.rows)),
        percent(None if shares is None else t_mean(shares, floor=0.0, ceiling=1.0)),
        "-" if greedy is None else f"{100 * greedy:.1f}",
        "-" if length is None else f"{length:.0f}",
        "-" if tokens is None else count(tokens),
        f"{'-' if hours is None or not one_kind else f'{hours:.3f}'} ({', '.join(arm.devices)})",
        ", ".join(sorted({row.arm.config_sha256[:8] for row in arm.rows})),
    ]

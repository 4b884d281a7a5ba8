"""The data behind the report's plots: curves with bands over seeds, histograms of length, where the time went."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.curves import frontier
from ..store.cost import PHASES, totals
from ..store.runs import RunFolder, read_rows
from ..store.trees import StoredTree
from ..tree import Float64
from .text import beside

AXES = {"steps": "steps", "sampled tokens": "tokens", "trained tokens": "trained-tokens", "device-hours": "device-hours"}
"""What a curve may run along, and its name in `rlzoo.store.cost.totals`; before the first step all are 0."""
INDIFFERENT = ("seed", "backend", "trackers", "checkpoints")
"""Sections and keys of a config that two runs of one arm may differ in; of the backend its dtype may not. Neither matters where on a disk
its test sets were."""

MOST_POINTS = 300  # of a curve; more than a screen shows
BINS = 24


@dataclass(frozen=True, slots=True, eq=False)
class RunData:
    """A run as the report reads it. `label` tells it from the other runs of the report."""

    label: str
    folder: RunFolder
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None

    @property
    def algorithm(self) -> str:
        return str(self.config.get("algo", "?"))

    @property
    def seed(self) -> int:
        return int(self.config.get("seed", 0))


def learned(config: Mapping[str, Any]) -> dict[str, Any]:
    """What learning sees of a config: all but `INDIFFERENT` and where test sets were; of the backend its dtype."""
    seen = {name: value for name, value in config.items() if name not in INDIFFERENT}
    seen["evaluation"] = {name: value for name, value in config.get("evaluation", {}).items() if name != "data_dir"}
    return seen | {"backend": {"dtype": config.get("backend", {}).get("dtype")}}


def arms(runs: Sequence[RunData]) -> dict[str, list[RunData]]:
    """Runs that differ in nothing but the seed and what learning does not see (`INDIFFERENT`), under one name: the algorithm's, and
    where it has several arms also the label of the arm's first run."""
    found: dict[str, list[RunData]] = defaultdict(list)
    for run in runs:
        found[json.dumps(learned(run.config), sort_keys=True)].append(run)
    often = Counter(members[0].algorithm for members in found.values())
    return {m[0].algorithm if often[m[0].algorithm] == 1 else f"{m[0].algorithm} ({m[0].label})": m for m in found.values()}


def curves(runs: Sequence[RunData]) -> dict[str, Any]:
    """Per data ("dev", "training"), measure ("pass_at_1", "length") and axis: per arm its lines and its band.

    The band of one run is the 95 % interval over dev problems; the band of several is the range of the seeds' lines on the
    stretch of the axis that all of them cover, with the mean between.
    """
    columns = {"dev": {"pass_at_1": "dev/pass_at_1", "length": "dev/length"}, "training": {"pass_at_1": "pass_at_1", "length": "length"}}
    return {
        data: {
            measure: {axis: {arm: _arm(members, column, cost) for arm, members in arms(runs).items()} for axis, cost in AXES.items()}
            for measure, column in measures.items()
        }
        for data, measures in columns.items()
    }


def frontiers(runs: Sequence[RunData]) -> dict[str, dict[str, Any]]:
    """The most accuracy for its cost, per axis and arm: the `frontier` of the mean over its runs of the dev Pass@1, on the costs that all
    its runs cover. None of an arm with a run that has no dev measurements."""
    found: dict[str, dict[str, Any]] = {}
    for axis, cost in AXES.items():
        found[axis] = {}
        for arm, members in arms(runs).items():
            lines = [points(run.rows, "dev/pass_at_1", cost) for run in members]
            if all(len(x) for x, _ in lines):
                x, _, mean, _ = seed_band(lines)
                found[axis][arm] = dict(zip("xy", map(_thin, frontier(x, mean)), strict=True)) if len(x) else {"x": [], "y": []}
    return {axis: {arm: line for arm, line in by_arm.items() if line["x"]} for axis, by_arm in found.items()}


def _arm(members: Sequence[RunData], column: str, cost: str) -> dict[str, Any]:
    lines = [line for run in members if len((line := points(run.rows, column, cost))[0])]
    drawn: dict[str, Any] = {"lines": [{"x": _thin(x), "y": _thin(y)} for x, y in lines], "seeds": len(lines), "band": None}
    if len(lines) > 1:
        x, low, mean, high = seed_band(lines)
        drawn["band"] = {"x": _thin(x), "low": _thin(low), "mean": _thin(mean), "high": _thin(high)} if len(x) else None
    elif lines and column == "dev/pass_at_1":
        x, half = points(members[0].rows, "dev/half_width", cost)
        y = lines[0][1]
        if len(x) == len(y):
            drawn["band"] = {"x": _thin(x), "low": _thin(np.maximum(y - half, 0)), "high": _thin(np.minimum(y + half, 1))}
    return drawn


def points(rows: Sequence[Mapping[str, Any]], column: str, cost: str) -> tuple[Float64, Float64]:
    """Where a column of the metrics has a value: costs so far (see `AXES`), rising, and values, float64 [points] each. Of several values
    at one cost, as between steps that train on nothing, the last counts."""
    found = {total[cost]: float(row[column]) for row, total in zip(rows, totals(rows), strict=True) if row.get(column) is not None}
    return np.array(list(found), np.float64), np.array(list(found.values()), np.float64)


def seed_band(lines: Sequence[tuple[Float64, Float64]]) -> tuple[Float64, Float64, Float64, Float64]:
    """Positions, least, mean and largest value over lines, on the stretch that all of them cover; between its points a line is
    straight. Empty where there is no such stretch."""
    first, last = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    grid = np.unique(np.concatenate([x for x, _ in lines]))
    grid = grid[(grid >= first) & (grid <= last)]
    values = np.array([np.interp(grid, x, y) for x, y in lines]).reshape(len(lines), len(grid))
    return grid, values.min(axis=0), values.mean(axis=0), values.max(axis=0)


def _thin(values: Float64) -> list[float]:
    keep = np.unique(np.linspace(0, len(values) - 1, MOST_POINTS).round().astype(int)) if len(values) else np.zeros(0, int)
    return [float(f"{v:.6g}") for v in values[keep].tolist()]


def lengths(runs: Sequence[RunData], sampled: Mapping[str, Mapping[int, Sequence[StoredTree]]]) -> list[dict[str, Any]]:
    """Response lengths per run as counts in common bins: of the base and the trained model on the suite where the run measured
    them, else of the training responses at the first and the last step that the report reads (`sampled`: label -> step -> trees)."""
    found: list[tuple[str, str, str, Float64]] = []
    for run in runs:
        measured = {model: _measured(run, model) for model in ("base", "trained")}
        if all(len(v) for v in measured.values()):
            found += [(run.label, model, "evaluation, sampled", v) for model, v in measured.items()]
            continue
        steps = sorted(sampled.get(run.label, {}))
        for step in dict.fromkeys([steps[0], steps[-1]] if steps else []):
            trees = [s.tree.response_lengths() for s in sampled[run.label][step]]
            found.append((run.label, f"step {step}", "training responses", np.concatenate([np.zeros(0), *trees])))
    longest = max((float(v.max()) for *_, v in found if len(v)), default=0.0)
    width = max(1, int(np.ceil((longest + 1) / BINS)))
    edges = np.arange(0, longest + width + 1, width)
    return [
        {"run": run, "what": what, "source": source, "n": len(v), "mean": float(v.mean()) if len(v) else None}
        | {"edges": edges.tolist(), "counts": np.histogram(v, edges)[0].tolist()}
        for run, what, source, v in found
    ]


def _measured(run: RunData, model: str) -> Float64:
    rows = read_rows(run.folder.eval_path(model))
    return np.array([row["tokens"] for row in rows if row.get("temperature", 1) > 0], np.float64)


def ledger(run: RunData) -> dict[str, Any]:
    """Device-hours per phase of a run; of an unfinished one what its steps have logged, counted on one device."""
    if run.summary is not None:
        spent = run.summary["ledger"]
        phases, device, devices = spent["device_seconds"], spent["device"], spent["devices"]
    else:
        phases = {name: sum(float(row.get(f"seconds/{name}") or 0) for row in run.rows) for name in PHASES}
        hours = max((float(row.get("device_hours") or 0) for row in run.rows), default=0.0)
        wall = sum(phases.values())
        devices = max(1, round(3600 * hours / wall)) if wall else 1
        phases, device = {name: devices * s for name, s in phases.items()}, "device"
    about = {"run": run.label, "device": device, "devices": devices, "finished": run.summary is not None}
    return about | {
        "beside": [] if run.summary is None else beside(run.summary["ledger"]),
        "hours": {name: float(f"{phases.get(name, 0.0) / 3600:.6g}") for name in PHASES},
    }

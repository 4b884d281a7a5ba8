"""Run folders and result rows as a finished run leaves them, made without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlzoo import registry
from rlzoo.config import build
from rlzoo.credit.base import path_rows
from rlzoo.evaluation.stats import Estimate
from rlzoo.report.tables import OVERALL, Cost, FinalTable, Gain, Line
from rlzoo.store.cost import PHASES
from rlzoo.store.runs import RunFolder
from rlzoo.store.trees import TreeRecord, write_trees
from rlzoo.tree import Role, Segment, Stop, Tree


def suite_table(base: float, trained: float, cost: Cost) -> FinalTable:
    """Base and trained model on one set and overall, intervals of +- 0.05."""

    def estimate(mean: float) -> Estimate:
        return Estimate(mean, mean - 0.05, mean + 0.05, 100)

    def line(name: str, model: str, mean: float, spent: Cost | None) -> Line:
        return Line(name, model, 100, 4, estimate(mean), None, None, 50.0, 0.0, 1000, spent)

    lines = [line("easy", "base", base, None), line("easy", "trained", trained, None)]
    lines += [line(OVERALL, "base", base, Cost()), line(OVERALL, "trained", trained, cost)]
    return FinalTable(
        lines, [Gain(name, estimate(trained - base), None, None, 1.5) for name in ("easy", OVERALL)], "cpu core", ["a <note>"]
    )


def finished(steps: int, table: FinalTable | None = None) -> dict[str, Any]:
    """summary.json of a run on 2 devices that sampled for an hour of device time and updated for half an hour."""
    spent = dict.fromkeys(PHASES, 0.0) | {"sampling": 3600.0, "update": 1800.0}
    summary: dict[str, Any] = {"steps": steps, "ledger": {"device_seconds": spent, "device": "cpu core", "devices": 2}}
    return summary | ({} if table is None else {"table": table.as_dict()})


def small_tree(rewards: tuple[float, ...] = (1.0, 0.0, 1.0), *, tokens: tuple[int, ...] = (65, 66)) -> Tree:
    """Node 1 with leaves 2 and 3; leaf 4 beside it; a probe below node 1."""
    segments = [
        Segment(0, list(tokens), [-0.5, float("nan")]),
        Segment(1, [67], [-0.25], Stop.EOS),
        Segment(1, [68, 69, 70], [-1.0, -2.0, -0.004], Stop.LENGTH),
        Segment(0, [71], [0.0], Stop.ANSWER),
        Segment(1, [72], [-0.1], Stop.EOS, Role.PROBE),
    ]
    return Tree.from_segments([80, 81], segments, dict(zip([2, 3, 4], rewards, strict=True)))


def make_run(
    path: Path,
    *,
    algo: str | None = None,
    seed: int = 0,
    trees: list[Tree] | None = None,
    steps: tuple[int, ...] = (1, 2, 3),
    record: TreeRecord | None = None,
    done: bool = True,
    table: FinalTable | None = None,
    **config: Any,
) -> Path:
    """A run whose dev Pass@1 rises from .4 by .1 a step; a step costs 100 sampled and, but for the first, 30 trained tokens."""
    folder = RunFolder.create(path, build([("test", {"algo": algo or registry.names("algorithm")[0], "seed": seed, **config})]).to_dict())
    for step in steps:
        stored = trees if trees is not None else [small_tree(), small_tree((1.0, 1.0, 1.0))]
        credits = [path_rows(t, [0, 1, 2], [0.5, -0.5, 0.25]) for t in stored]
        write_trees(folder.trees_path(step), stored, credits, [record or TreeRecord()] * len(stored))
    folder.log({"step": 0, "dev/pass_at_1": 0.4, "dev/half_width": 0.1, "dev/length": 50.0})
    for step in steps:
        row = {"step": step, "pass_at_1": 0.1 * step, "length": 10.0, "device_hours": 0.5 * step, "seconds/sampling": 900.0}
        row |= {"sampled_tokens": 100, "update/trained": 30.0 * (step > 1)}
        folder.log(row | {"dev/pass_at_1": 0.4 + 0.1 * step, "dev/half_width": 0.1, "dev/length": 50.0 + step})
    if done:
        folder.write_summary(finished(len(steps), table))
    return path

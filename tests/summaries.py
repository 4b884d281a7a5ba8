"""Result rows as a finished run leaves them, made without a run."""

from __future__ import annotations

from typing import Any

from rlzoo.evaluation.stats import Estimate
from rlzoo.report.tables import OVERALL, Cost, FinalTable, Gain, Line
from rlzoo.store.cost import PHASES


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

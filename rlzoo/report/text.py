"""How numbers are written in tables and lines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..evaluation.stats import Estimate


def count(value: float) -> str:
    """A count in three figures: 950, 12.3k, 4.56M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * limit:  # so that rounding never writes 1000k
            return f"{value / limit:.3g}{unit}" if abs(value) < 999.5 * limit else f"{value / limit:.0f}{unit}"
    return f"{value:.0f}"


def percent(estimate: Estimate | None) -> str:
    """A share with its interval, in percent: `51.2 [47.0, 55.4]`."""
    if estimate is None:
        return "-"
    return f"{100 * estimate.mean:.1f} [{_bound(estimate.low)}, {_bound(estimate.high)}]"


def points(estimate: Estimate | None) -> str:
    """A difference of shares with its interval, in percentage points and signed: `+16.3 [+11.2, +21.4]`."""
    if estimate is None:
        return "-"
    return f"{100 * estimate.mean:+.1f} [{_bound(estimate.low, '+')}, {_bound(estimate.high, '+')}]"


def beside(ledger: Mapping[str, Any]) -> list[str]:
    """A line on the work that overlapped with the phases of a ledger; none where it tells of none."""
    grading_s = (ledger.get("overlapped") or {}).get("grading_cpu_s", 0.0)
    told = f"beside it {grading_s:.3g} s of CPU time in grading workers, which overlaps with the phases and is not in them"
    return [told] if grading_s else []


def _bound(value: float, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}" if math.isfinite(value) else ("-∞" if value < 0 else "∞")

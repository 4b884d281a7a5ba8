"""Recorded outputs of any model, graded as if they had just been sampled: `rlzoo eval --from-outputs FILE...`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..store.files import lines_of, parse_json, read_text
from ..tree import Float64
from .stats import Estimate, clustered_mean, paired_difference

NEEDED = ("gold", "prediction")
Grading = Callable[[list[tuple[str, str]]], Sequence[Any]]
"""[(gold, response text)] in, as many verdicts (`correct`: bool or None, `kind`) out."""


@dataclass(frozen=True, slots=True)
class RecordedResult:
    """One model in one file. `ours` is Pass@1 by our grader, `recorded` by the labels in the file where all rows of the model have
    one, `difference` ours - recorded, paired over problems; `samples` is the largest number of responses to one problem."""

    file: str
    model: str
    problems: int
    samples: int
    rows: int
    ours: Estimate
    recorded: Estimate | None
    difference: Estimate | None
    agree: float | None
    kinds: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        estimates = {n: getattr(self, n) for n in ("ours", "recorded", "difference")}
        plain = {n: getattr(self, n) for n in ("file", "model", "problems", "samples", "rows", "agree")}
        return plain | {n: None if e is None else e.as_dict() for n, e in estimates.items()} | {"kinds": dict(self.kinds)}


def read_outputs(path: Path) -> list[dict[str, Any]]:
    """Rows with `gold` and `prediction` (texts), optionally `model`, `problem_id` or `problem`, and `correct`.

    Raises:
        ValueError: unreadable or empty file, a broken line or a missing field, by number.
    """
    rows = []
    for number, line in enumerate(lines_of(read_text(path)), 1):
        if not line.strip():
            continue
        row = parse_json(line, f"line {number} of {path}")
        missing = [name for name in NEEDED if not isinstance(row, dict) or not isinstance(row.get(name), str)]
        if missing:
            raise ValueError(f"line {number} of {path} has no text in {missing[0]!r}; needed are {' and '.join(NEEDED)}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no output")
    return rows


def grade_outputs(path: Path, grade: Grading) -> list[RecordedResult]:
    """Grade a file of recorded outputs; one result per model, in order of appearance.

    Raises:
        ValueError: see `read_outputs`.
    """
    rows = read_outputs(path)
    verdicts = grade([(row["gold"], row["prediction"]) for row in rows])
    models: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        models.setdefault(str(row.get("model") or "not named"), []).append(i)
    return [_result(path.name, model, [rows[i] for i in places], [verdicts[i] for i in places]) for model, places in models.items()]


def _result(file: str, model: str, rows: Sequence[Mapping[str, Any]], verdicts: Sequence[Any]) -> RecordedResult:
    problems = [str(row.get("problem_id") or row.get("problem") or f"row {i}") for i, row in enumerate(rows)]
    correct = [float("nan") if v.correct is None else float(v.correct) for v in verdicts]
    labels = [row.get("correct") for row in rows]
    ours, samples = _means(problems, correct)
    recorded = difference = agree = None
    if all(isinstance(label, bool) for label in labels):
        theirs, _ = _means(problems, [float(label) for label in labels if label is not None])
        recorded, difference = clustered_mean(theirs), paired_difference(theirs, ours)
        agree = float(np.mean([c == float(label) for c, label in zip(correct, labels, strict=True) if label is not None]))
    kinds = Counter(str(v.kind) for v in verdicts)
    estimate = clustered_mean(ours)
    return RecordedResult(file, model, len(ours), samples, len(rows), estimate, recorded, difference, agree, dict(sorted(kinds.items())))


def _means(problems: Iterable[str], values: Iterable[float]) -> tuple[Float64, int]:
    """Mean per problem [problems], and the largest number of values that a problem has."""
    grouped: dict[str, list[float]] = {}
    for problem, value in zip(problems, values, strict=True):
        grouped.setdefault(problem, []).append(value)
    means = [float(np.nanmean(v)) if not np.isnan(v).all() else float("nan") for v in grouped.values()]
    return np.array(means), max(len(v) for v in grouped.values())

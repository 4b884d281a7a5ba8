"""The tables of `rlzoo eval`: a model on a suite, and models whose outputs were recorded elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.recorded import RecordedResult, grade_outputs, read_outputs
from ..evaluation.stats import Estimate
from ..rewards.math import Grader, GraderConfig, grader_name
from ..store.environment import environment
from ..store.runs import to_json, write_aside
from .grid import Grid
from .tables import OVERALL, weighting
from .text import beside, count, percent, points


def estimate(plain: Mapping[str, Any] | None) -> Estimate | None:
    """An estimate out of a row, where an infinite bound is null."""
    if plain is None:
        return None
    ends = {"low": -math.inf, "high": math.inf, "mean": math.nan}
    fields: dict[str, Any] = {name: ends.get(name) if value is None else value for name, value in plain.items()}
    return Estimate(**fields)


def evaluation_grid(row: Mapping[str, Any], model: str = "model") -> Grid:
    """One model of a result row (`rlzoo.evaluation.rows`): a line per set, and overall where there are several (without pass@k and
    maj@k where the sets differ in k)."""
    protocol, ledger = row["protocol"], row["ledger"]
    sets = row["results"][model]
    lines = [_line(name, metrics, metrics["k"]) for name, metrics in sets.items()]
    whole = row["overall"][model]
    ks = set(protocol["k"].values())
    k = str(min(ks)) if len(ks) == 1 else "k"
    if len(sets) > 1:
        lines.append(_line(OVERALL, whole, min(ks) if len(ks) == 1 else 0))
    head = ["set", "problems", "k", "Pass@1, % [95 %]", "greedy, %", f"pass@{k}, %", f"maj@{k}, %"]
    head += ["length: mean", "median", "95th", "cut off, %", "unparsable, %", "timed out, %", "sampled tokens"]
    spent = ", ".join(f"{name} {s / 3600:.4f}" for name, s in ledger["device_seconds"].items() if s > 0)
    notes = [
        f"temperature {protocol['temperature']:g}, template {protocol['template']}, at most {protocol['max_response_tokens']} "
        f"tokens, sampler {protocol['sampler']['name']}, {protocol['engine']}, seed {protocol['seed']}; overall is the "
        f"{weighting(whole['weights'])} over sets",
        f"{ledger['device_hours']:.4f} {ledger['device']}-hours ({ledger['devices']} x {ledger['wall_s']:.0f} s): {spent}",
    ]
    notes += beside(ledger)
    if protocol["vote"] == "string":
        notes.append(f"maj@{k} by equal strings")
    failed = sum(m["failed"] + (m["greedy"] or {"failed": 0})["failed"] for m in sets.values())
    notes += [f"{failed} gradings failed and are left out"] if failed else []
    return Grid(f"{row['model']} on {row['suite']}", head, lines, notes, strong=(OVERALL,))


def _line(name: str, m: Mapping[str, Any], k: int) -> list[str]:
    greedy = m["greedy"]["pass_at_1"] if m["greedy"] is not None and "pass_at_1" in m["greedy"] else m["greedy"]
    shares = [percent(estimate(e)) for e in (m["pass_at_1"], greedy, m["pass_at"].get(str(k)), m["maj_at_k"])]
    length = [f"{m['length'][n]:.0f}" for n in ("mean", "median", "p95")]
    rates = [f"{100 * m[n]:.1f}" for n in ("truncated", "unparsable", "timed_out")]
    return [name, str(m["n"]), str(k or ""), *shares, *length, *rates, count(m["sampled_tokens"])]


def print_evaluation(row: Mapping[str, Any]) -> None:
    """Print what `rlzoo eval` measured."""
    evaluation_grid(row).print()


def print_recorded(files: Sequence[Path], *, as_json: bool = False, out: Path | None = None) -> None:
    """Grade recorded outputs and print a line per model, or with `as_json` everything for a program; with `out` also write
    `recorded.md` and `recorded.jsonl` (a line per model, with the grader's version and the environment) into that folder.

    Raises:
        ValueError: a file that cannot be read; nothing is graded then.
    """
    for path in files:
        read_outputs(path)
    config = GraderConfig(require_box=False)  # these models were not asked for a box
    with Grader(config) as grader:
        results = [result for path in files for result in grade_outputs(path, grader.grade)]
    made = {"grader": grader_name(config), "environment": environment()}
    grid = recorded_grid(results, grader_name(config))
    if out is not None:
        write_aside(out / "recorded.jsonl", "".join(to_json(r.as_dict() | made) + "\n" for r in results))
        write_aside(out / "recorded.md", grid.markdown())
    if as_json:
        print(to_json(made | {"results": [r.as_dict() for r in results]}))
    else:
        grid.print()


def recorded_grid(results: Sequence[RecordedResult], grader: str) -> Grid:
    """A line per model and file: Pass@1 by our grader beside that of the labels in the file."""
    head = ["file", "model", "problems", "samples", "ours, % [95 %]", "recorded, % [95 %]", "difference, points", "agreement, %"]
    head += ["unparsable", "timed out", "failed"]
    lines = [
        [
            r.file.removesuffix(".jsonl"), r.model, str(r.problems), str(r.samples), percent(r.ours), percent(r.recorded),
            points(r.difference), "-" if r.agree is None else f"{100 * r.agree:.2f}",
            *(str(r.kinds.get(kind, 0)) for kind in ("unparsable", "timed_out", "failed")),
        ]
        for r in results
    ]  # fmt: skip
    notes = [f"{grader}; Pass@1 is the mean over problems of the share of right samples"]
    return Grid("Recorded outputs, graded here and as recorded", head, lines, notes, names=2)

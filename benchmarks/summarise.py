"""Keep finished runs: their rows and one table with every run in it.

    python -m rlzoo.benchmarks.summarise RUN ... [ROW.json ...] --out results/NAME

Copies each run's summary.json to results/NAME/ALGO-sSEED.json and writes results/NAME/README.md; rows kept earlier are given as
files. Nothing is left out: a run that failed has no summary and is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from rlzoo.report.tables import OVERALL
from rlzoo.store.runs import RunFolder, to_json, write_aside

Summary = Mapping[str, Any]


def summarise(runs: Annotated[tuple[Path, ...], tyro.conf.Positional], /, out: Path) -> None:
    """Copy the rows of finished runs to a results folder and write its table."""
    summaries = []
    for path in runs:
        summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else RunFolder.open(path).summary()
        if summary is None or "table" not in summary:
            raise ValueError(f"{path} has no final measurement: it did not finish, or ran without a suite")
        summaries.append(summary)
    summaries.sort(key=lambda s: (s["algo"], s["seed"]))
    out.mkdir(parents=True, exist_ok=True)
    for summary in summaries:
        write_aside(out / f"{summary['algo']}-s{summary['seed']}.json", to_json(summary, indent=1) + "\n")
    write_aside(out / "README.md", document(summaries))


def document(summaries: Sequence[Summary]) -> str:
    """The page: how it was measured, a line per run, and the sets on which training did more than sharpen."""
    first = summaries[0]
    evaluation, machine = first["config"]["evaluation"], first["environment"]
    told = [
        "# Base against trained on the embedded task\n",
        f"Suite {evaluation['suite']}, k = {evaluation['k']} samples per problem at temperature 1; intervals are 95 %, over problems; "
        "overall is the plain mean over the sets. Bold: the interval excludes 0. Every seed that was run is here.\n",
        f"Machine: {machine.get('cpu', 'unknown')}, {machine.get('cores')} cores; wall seconds and core-hours are those of training, "
        "beside whatever else ran. Sampled tokens count a shared token once, unrolled ones once per response (rows from before they "
        "were kept have none).\n",
    ]
    return "\n".join([*told, *_runs(summaries), "", *_sets(summaries), ""])


def _runs(summaries: Sequence[Summary]) -> list[str]:
    head = (
        "algo",
        "seed",
        "commit",
        "steps",
        "sampled tokens",
        "unrolled",
        "threads",
        "core-hours",
        "wall s",
        "base, %",
        "trained, %",
        "gain, points",
        "greedy, %",
        "length",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for s in summaries:
        base, trained = (_line(s, model) for model in ("base", "trained"))
        gain = _gain(s, OVERALL)
        unrolled = f"{s['unrolled_tokens']:,}" if "unrolled_tokens" in s else ""
        training = s["training"]
        cost = f"{s['sampled_tokens']:,} | {unrolled} | {training['devices']} | {training['device_hours']:.3f} | {training['wall_s']:.0f}"
        shares = f"{_percent(base['pass_at_1'])} | {_percent(trained['pass_at_1'])} | {_points(gain['pass_at_1'])}"
        greedy = f"{100 * base['greedy']['mean']:.1f} → {100 * trained['greedy']['mean']:.1f}"
        made = s["environment"]
        commit = f"{str(made.get('commit'))[:7]}{' + changes' if made.get('dirty') else ''}"
        lines.append(
            f"| {s['algo']} | {s['seed']} | {commit} | {s['steps']} | {cost} | {shares} | {greedy} | x {gain['length_ratio']:.2f} |"
        )
    return lines


def _sets(summaries: Sequence[Summary]) -> list[str]:
    names = [g["set"] for g in summaries[0]["table"]["gains"]]
    lines = [
        "## Trained at T = 1 minus base greedy, points\n",
        "| algo | seed | " + " | ".join(names) + " |",
        "|---" * (len(names) + 2) + "|",
    ]
    for s in summaries:
        cells = [_points(_gain(s, name)["over_base_greedy"]) for name in names]
        lines.append(f"| {s['algo']} | {s['seed']} | " + " | ".join(cells) + " |")
    lines += ["", "## Gain in Pass@1 at T = 1, points\n", "| algo | seed | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for s in summaries:
        cells = [_points(_gain(s, name)["pass_at_1"]) for name in names]
        lines.append(f"| {s['algo']} | {s['seed']} | " + " | ".join(cells) + " |")
    return lines


def _line(summary: Summary, model: str) -> Any:
    return next(x for x in summary["table"]["lines"] if x["set"] == OVERALL and x["model"] == model)


def _gain(summary: Summary, name: str) -> Any:
    return next(g for g in summary["table"]["gains"] if g["set"] == name)


def _percent(e: Mapping[str, float]) -> str:
    return f"{100 * e['mean']:.1f} [{100 * e['low']:.1f}, {100 * e['high']:.1f}]"


def _points(e: Mapping[str, float]) -> str:
    text = f"{100 * e['mean']:+.1f} [{100 * e['low']:+.1f}, {100 * e['high']:+.1f}]"
    return f"**{text}**" if e["low"] > 0 or e["high"] < 0 else text


if __name__ == "__main__":
    tyro.cli(summarise, prog="python -m rlzoo.benchmarks.summarise")

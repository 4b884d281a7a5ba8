"""The table at the end of a run: base against trained, each figure with its interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..escape import markdown, visible
from ..evaluation.runner import SetResult
from ..evaluation.stats import Estimate, paired_difference, stratified_difference, stratified_mean
from .grid import columns, pipes
from .text import count, percent, points

OVERALL = "overall"
PLAIN_MEAN = "plain mean"
Results = Mapping[str, SetResult]


@dataclass(frozen=True, slots=True)
class Cost:
    """What a model cost to make: tokens sampled in training and device-hours; 0 for the base."""

    sampled_tokens: int = 0
    device_hours: float = 0.0


@dataclass(frozen=True, slots=True)
class Line:
    """One model on one set (or overall: the plain mean over sets). `pass_at_k` None where k = 1; greedy None where not decoded."""

    set: str
    model: str
    problems: int
    k: int
    pass_at_1: Estimate
    greedy: Estimate | None
    pass_at_k: Estimate | None
    length: float
    truncated: float
    evaluated_tokens: int
    cost: Cost | None  # overall lines only: training is for all sets at once

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a result row."""
        estimates = {n: getattr(self, n) for n in ("pass_at_1", "greedy", "pass_at_k")}
        plain: dict[str, Any] = {n: getattr(self, n) for n in ("set", "model", "problems", "k", "length", "truncated", "evaluated_tokens")}
        plain |= {n: None if e is None else e.as_dict() for n, e in estimates.items()}
        if self.cost is not None:
            plain |= {"sampled_tokens": self.cost.sampled_tokens, "device_hours": self.cost.device_hours}
        return plain


@dataclass(frozen=True, slots=True)
class Gain:
    """What training changed on one set (or overall), paired over problems: Pass@1 of sampled responses, trained - base; greedy, trained -
    base; sampled, trained - base greedy, which is above 0 only if training did more than sharpen; length trained / base."""

    set: str
    pass_at_1: Estimate
    greedy: Estimate | None
    over_base_greedy: Estimate | None
    length_ratio: float

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a result row."""
        named = {n: getattr(self, n) for n in ("pass_at_1", "greedy", "over_base_greedy")}
        return {"set": self.set, "length_ratio": self.length_ratio} | {n: None if e is None else e.as_dict() for n, e in named.items()}


@dataclass(frozen=True, slots=True)
class FinalTable:
    """Lines per set and overall (the mean over sets that `weighting` names), base before trained, and the gains."""

    lines: Sequence[Line]
    gains: Sequence[Gain]
    device: str
    notes: Sequence[str] = ()
    weighting: str = PLAIN_MEAN
    temperature: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a result row."""
        return {
            "lines": [line.as_dict() for line in self.lines],
            "gains": [gain.as_dict() for gain in self.gains],
            "device": self.device,
            "notes": list(self.notes),
            "weighting": self.weighting,
            "temperature": self.temperature,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> FinalTable:
        """The table that `as_dict` wrote, out of JSON (where NaN is null)."""
        lines = []
        for row in plain["lines"]:
            cost = Cost(row["sampled_tokens"], row["device_hours"]) if "device_hours" in row else None
            lines.append(Line(**{n: _read(n, row[n]) for n in Line.__slots__ if n != "cost"}, cost=cost))
        gains = [Gain(**{n: _read(n, row[n]) for n in Gain.__slots__}) for row in plain["gains"]]
        return cls(lines, gains, plain["device"], plain["notes"], plain.get("weighting", PLAIN_MEAN), plain.get("temperature", 1.0))


def _read(name: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        fields: dict[str, Any] = {k: math.nan if v is None and k in ("mean", "low", "high") else v for k, v in value.items()}
        return Estimate(**fields)
    return math.nan if value is None and name in ("length", "truncated", "length_ratio") else value


def weighting(weights: Mapping[str, float]) -> str:
    """Which mean over sets it is that has these weights."""
    if len(set(weights.values())) <= 1:
        return PLAIN_MEAN
    return "mean weighted " + ", ".join(f"{name} {w / sum(weights.values()):.3f}" for name, w in weights.items())


def final_table(
    base: Results,
    trained: Results,
    cost: Cost,
    *,
    weights: Mapping[str, float] | None = None,
    device: str = "device",
    notes: Sequence[str] = (),
) -> FinalTable:
    """Compare two models on the same sets; `weights` of the sets in the overall figures (none: equal).

    Raises:
        ValueError: the two were not measured on the same sets, problems and k.
    """
    if list(base) != list(trained):
        raise ValueError(f"base and trained were measured on different sets: {', '.join(base)} and {', '.join(trained)}")
    for name in base:
        if base[name].ids != trained[name].ids or base[name].k != trained[name].k:
            raise ValueError(f"base and trained were measured on different problems, or with different k, on {name}")
    lines, gains = [], []
    for name in base:
        lines += [_line(name, "base", base[name]), _line(name, "trained", trained[name])]
        gains.append(_gain(name, base[name], trained[name]))
    if len(base) > 1:
        share = [1.0 if weights is None else weights[name] for name in base]
        lines += [_overall("base", base, share, Cost()), _overall("trained", trained, share, cost)]
        gains.append(_overall_gain(base, trained, share))
    else:
        lines = [_with_cost(lines[0], Cost()), _with_cost(lines[1], cost)]
    failed = sum(r.failed + (r.greedy.failed if r.greedy else 0) for results in (base, trained) for r in results.values())
    extra = [f"{failed} gradings failed and are left out"] if failed else []
    temperature = next(iter(base.values())).temperature
    return FinalTable(lines, gains, device, [*notes, *extra], weighting(weights or {}), temperature)


def _line(name: str, model: str, result: SetResult) -> Line:
    greedy = result.greedy
    enough = result.k > 1 and bool((result.graded >= result.k).any())
    return Line(
        set=name,
        model=model,
        problems=result.n,
        k=result.k,
        pass_at_1=result.pass_at_1,
        greedy=None if greedy is None else greedy.pass_at_1,
        pass_at_k=result.pass_at(result.k) if enough else None,
        length=result.length["mean"],
        truncated=result.truncated_rate,
        evaluated_tokens=result.sampled_tokens + (0 if greedy is None else greedy.sampled_tokens),
        cost=None,
    )


def _with_cost(line: Line, cost: Cost) -> Line:
    return Line(**{name: getattr(line, name) for name in Line.__slots__ if name != "cost"}, cost=cost)


def _overall(model: str, results: Results, share: Sequence[float], cost: Cost) -> Line:
    """The mean over sets, weighted by `share`; intervals over problems within sets."""
    each = [_line(name, model, result) for name, result in results.items()]
    greedy = [r.greedy for r in results.values() if r.greedy is not None]
    k = min(r.k for r in results.values())
    with_k = [r.pass_values(k) for r in results.values()] if k > 1 else []
    return Line(
        set=OVERALL,
        model=model,
        problems=sum(line.problems for line in each),
        k=k,
        pass_at_1=stratified_mean([r.means for r in results.values()], share),
        greedy=stratified_mean([r.means for r in greedy], share) if len(greedy) == len(each) else None,
        pass_at_k=stratified_mean(with_k, share) if with_k and all(len(v) for v in with_k) else None,
        length=float(np.average([line.length for line in each], weights=share)),
        truncated=float(np.average([line.truncated for line in each], weights=share)),
        evaluated_tokens=sum(line.evaluated_tokens for line in each),
        cost=cost,
    )


def _gain(name: str, base: SetResult, trained: SetResult) -> Gain:
    both = base.greedy is not None and trained.greedy is not None
    return Gain(
        set=name,
        pass_at_1=paired_difference(base.means, trained.means),
        greedy=paired_difference(base.greedy.means, trained.greedy.means) if both and base.greedy and trained.greedy else None,
        over_base_greedy=None if base.greedy is None else paired_difference(base.greedy.means, trained.means),
        length_ratio=trained.length["mean"] / base.length["mean"],
    )


def _overall_gain(base: Results, trained: Results, share: Sequence[float]) -> Gain:
    def difference(first: Sequence[SetResult | None], second: Sequence[SetResult | None]) -> Estimate | None:
        pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
        return stratified_difference([b.means - a.means for a, b in pairs], share) if len(pairs) == len(first) else None

    befores, afters = list(base.values()), list(trained.values())
    greedy = [r.greedy for r in befores]
    sampled = difference(befores, afters)
    assert sampled is not None  # every set has sampled responses
    lengths = [b.length["mean"] / a.length["mean"] for a, b in zip(befores, afters, strict=True)]
    return Gain(
        OVERALL,
        sampled,
        difference(greedy, [r.greedy for r in afters]),
        difference(greedy, afters),
        float(np.average(lengths, weights=share)),
    )


def _cells(table: FinalTable) -> tuple[list[str], list[list[str]]]:
    k = max((line.k for line in table.lines), default=1)
    head = [
        "set",
        "model",
        f"Pass@1 at T={table.temperature:g}, % [95 %]",
        "greedy, %",
        f"pass@{k}, %",
        "length",
        "cut off, %",
        "sampled tokens",
        f"{table.device}-hours",
    ]
    rows = []
    for line in table.lines:
        cost = ["", ""] if line.cost is None else [count(line.cost.sampled_tokens), f"{line.cost.device_hours:.3f}"]
        shares = [percent(line.pass_at_1), percent(line.greedy), percent(line.pass_at_k)]
        rows.append([line.set, line.model, *shares, f"{line.length:.1f}", f"{100 * line.truncated:.1f}", *cost])
    return head, rows


def _gain_cells(table: FinalTable) -> tuple[list[str], list[list[str]]]:
    at = f"T={table.temperature:g}"
    head = ["set", f"Pass@1 at {at}, points [95 %]", "greedy, points", f"trained at {at} - base greedy, points", "length ratio"]
    rows = [[g.set, points(g.pass_at_1), points(g.greedy), points(g.over_base_greedy), f"{g.length_ratio:.2f}"] for g in table.gains]
    return head, rows


def both(table: FinalTable) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of its two tables, every cell as text."""
    return [("Base and trained model", *_cells(table)), ("Gain by training, paired over problems", *_gain_cells(table))]


def caption(table: FinalTable) -> list[str]:
    """What must be known beside the tables, in lines."""
    problems = max((line.problems for line in table.lines), default=0)
    spent = sum(line.evaluated_tokens for line in table.lines if line.set != OVERALL)
    told = f"{problems} problems, k = {max((line.k for line in table.lines), default=1)}; overall is the {table.weighting} over sets"
    costs = f"sampled tokens and {table.device}-hours are what training cost; the evaluation sampled {count(spent)} tokens more"
    return [told, costs, *table.notes]


def render_table(table: FinalTable) -> RenderableType:
    """The table for a terminal."""
    parts: list[RenderableType] = []
    for title, head, rows in both(table):
        shown = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
        for i, name in enumerate(head):
            shown.add_column(name, justify="left" if i < 2 and name in ("set", "model") else "right")
        for row in rows:
            shown.add_row(*[Text(visible(cell)) for cell in row], style="bold" if row[0] == OVERALL else "", end_section=_ends(row))
        parts.append(shown)
    parts += [Text(visible(line), style="dim") for line in caption(table)]
    return Group(*parts)


def _ends(row: Sequence[str]) -> bool:
    return len(row) > 1 and row[1] == "trained"


def plain_table(table: FinalTable) -> str:
    """The table as text in columns, of whatever width it needs: for logs and pipes."""
    return "\n\n".join([*(columns(head, rows) for _, head, rows in both(table)), "\n".join(map(visible, caption(table)))]) + "\n"


def markdown_table(table: FinalTable, title: str = "") -> str:
    """The table as Markdown, for `results/`."""
    parts = [pipes(head, rows) + "\n" for _, head, rows in both(table)]
    notes = "\n".join(f"- {markdown(line)}" for line in caption(table))
    return "\n".join([*([f"# {markdown(title)}\n"] if title else []), *parts, notes]) + "\n"


def print_table(table: FinalTable, console: Console | None = None) -> None:
    """Print with rich on a terminal, as plain text elsewhere."""
    console = console or Console()
    if console.is_terminal:
        console.print(render_table(table))
    else:
        print(plain_table(table), file=console.file, end="", flush=True)

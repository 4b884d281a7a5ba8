"""`rlzoo reproduce`: published figures beside ours, or a paper's claims tested on the embedded job."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..escape import visible
from ..evaluation.papers import ConfigOf, Found, Paper, Result, check_claim, find_paper, measured, read_rows, rows_of
from ..evaluation.rows import ResultRow
from ..evaluation.stats import Estimate
from ..store.files import write_aside
from .grid import Grid
from .text import percent, points

OVERALL = "overall"
MEASURES = {
    "pass_at_1": "Pass@1, difference",
    "length": "response length, ratio",
    "sampled_tokens": "tokens sampled, ratio",
    "unrolled_share": "tokens sampled / unrolled",
    "device_hours": "device-hours of training, ratio",
}
SEEDS = 3  # of a miniature whose arm was not run


def print_reproduction(name: str, results: Path, *, mini: bool, config_of: ConfigOf, out: Path | None = None) -> None:
    """Print a paper's tables, and write them to `out` as Markdown: a function of the shipped file and the rows alone.

    Raises:
        ValueError: unknown paper, no such folder, a file there that is not a row, or rows that were not measured alike.
    """
    paper = find_paper(name)
    rows = read_rows(results)
    grids = miniature(paper, rows, config_of) if mini else reproduction(paper, rows, config_of)
    if out is not None:
        scale = " --scale mini" if mini else ""
        about = f"Made by `rlzoo reproduce {name}{scale}` from the rows in {results.name}/. {paper.title} (arXiv {paper.arxiv})."
        write_aside(out, f"# {name}: {'its claims on the embedded job' if mini else 'published and ours'}\n\n{about}\n\n" + _pages(grids))
    for i, grid in enumerate(grids):
        print(("\n" if i else "") + visible(grid.title))
        grid.print()


def _pages(grids: Sequence[Grid]) -> str:
    return "\n".join(grid.markdown() for grid in grids)


def reproduction(paper: Paper, rows: Sequence[ResultRow], config_of: ConfigOf) -> list[Grid]:
    """Every published result with ours, where a row has its recipe's config; what to run for the others; all other figures."""
    protocol = paper.protocol
    head = [
        "table",
        "arm",
        "sampling",
        "set",
        f"published, {protocol.metric}",
        "ours [95 %]",
        "difference",
        "GPU-hours, published",
        "status",
    ]
    cells: list[list[str]] = []
    todo: dict[str, list[str]] = {}
    for result in paper.results:
        own = _rows_of(result, rows, config_of)
        cells += _lines(paper, result, own)
        if not own and result.recipe:
            todo.setdefault(result.recipe, [result.arm, result.sampling, f"`rlzoo {result.recipe}`", protocol.hardware, result.cost])
    notes = [f"{protocol.metric}: {protocol.how}; {protocol.overall}", protocol.model]
    notes += [f"held equal: {protocol.matched}"] if protocol.matched else []
    notes += [f"not known: {line}" for line in protocol.unknown]
    notes.append(
        "ours: rows whose config is the recipe's but for seed, trackers and threads; one seed: interval over problems, several: over seeds"
    )
    grids = [Grid("Published and ours, %", head, cells, notes, names=4)]
    if todo:
        grids.append(
            Grid("Not run", ["arm", "sampling", "command", "hardware in the paper", "GPU-hours, estimated"], list(todo.values()), names=5)
        )
    if paper.figures:
        lines = [
            [f.table, f.what, name, f"{'about ' if f.approximate else ''}{value:g} {f.unit}"]
            for f in paper.figures
            for name, value in f.values.items()
        ]
        told = [f"{f.what}: {f.note}" for f in paper.figures if f.note]
        grids.append(Grid("Other published figures", ["table", "what", "of", "published"], lines, told, names=3))
    grids.append(_claims_as_published(paper))
    return grids


def _rows_of(result: Result, rows: Sequence[ResultRow], config_of: ConfigOf) -> list[ResultRow]:
    if result.recipe is None:
        return []
    return rows_of(rows, config_of(result.recipe), result.recipe.split()[0])


def _lines(paper: Paper, result: Result, own: Sequence[ResultRow]) -> Iterator[list[str]]:
    for name, published in {**result.values, OVERALL: result.overall}.items():
        whole = name == OVERALL
        ours = measured(own, result.model, paper.protocol.measure, None if whole else name)
        told = f"{published:.{paper.protocol.decimals}f}" + (f" (derived: {result.derived})" if whole and result.derived else "")
        hours = f"{result.gpu_hours:.2f}" if whole and result.gpu_hours is not None else ""
        difference, status = _judged(result, published / 100, ours)
        yield [result.table, result.arm, result.sampling, name, told, _ours(paper, own, ours), difference, hours, status]


def _ours(paper: Paper, own: Sequence[ResultRow], ours: Estimate | None) -> str:
    votes = {row.protocol.vote for row in own} - {paper.protocol.vote} if paper.protocol.vote else set()
    return percent(ours) + (f" (vote: {', '.join(sorted(str(v) for v in votes))})" if ours and votes else "")


def _judged(result: Result, published: float, ours: Estimate | None) -> tuple[str, str]:
    """Difference and status; the published figure has no interval, so that ours alone decides."""
    if ours is None:
        return "-", "not run" if result.recipe else "not run: no recipe here"
    inside = ours.low <= published <= ours.high
    return f"{100 * (ours.mean - published):+.1f}", "reproduced within interval" if inside else "differs"


def _claims_as_published(paper: Paper) -> Grid:
    lines = [[claim.what, claim.published, "--scale mini"] for claim in paper.claims]
    lines += [[what, "", "not tested"] for what in paper.untested]
    return Grid("Claims", ["claim", "published", "tested by"], lines, names=3)


def miniature(paper: Paper, rows: Sequence[ResultRow], config_of: ConfigOf) -> list[Grid]:
    """The paper's claims on the embedded job, and what to run for those whose arms no row has.

    Raises:
        ValueError: rows that were not measured alike.
    """
    arms = {name: rows_of(rows, config_of(recipe), recipe.split()[0]) for name, recipe in paper.arms.items()}
    found = [check_claim(claim, arms) for claim in paper.claims]
    head = ["claim", "published", "b", "a", "measured", "ours [95 %]", "seeds b, a", "status", "in kind"]
    notes = [f"{f.claim.what}: {f.claim.note}" for f in found if f.claim.note]
    notes.append("miniature: the embedded model and task, never set beside the published figures; verdicts are of direction alone")
    notes.append("differences: b - a in Pass@1, over seeds and problems; ratios: b / a, over seeds; at equal steps, not at equal cost")
    notes += [f"not tested on the embedded job: {line}" for line in paper.untested]
    grids = [Grid("Claims on the embedded job", head, [_claim(f) for f in found], notes, names=5)]
    needed = dict.fromkeys(name for f in found for name in f.missing)
    if needed:
        lines = [[name, f"`rlzoo {paper.arms[name]} --seed {seed}`"] for name in needed for seed in range(SEEDS)]
        spent = [row.training.device_hours for own in arms.values() for row in own if row.training is not None]
        hours = f"{min(spent):.2f} to {max(spent):.2f} device-hours, by the {len(spent)} rows of other arms" if spent else "not known"
        told = [
            f"training per run, estimated: {hours}; measuring comes on top",
            "then put the run's summary.json below the folder of --results",
        ]
        grids.append(Grid("Not run", ["arm", "command"], lines, told, names=2))
    return grids


def _claim(found: Found) -> list[str]:
    claim = found.claim
    difference = claim.measure == "pass_at_1"
    ours = points(found.estimate) + " points" if found.estimate and difference else _ratio(found.estimate)
    told = [claim.what, claim.published, claim.b, "-" if claim.a == claim.b else claim.a, MEASURES[claim.measure], ours]
    if found.missing:
        return [*told, "-", "not run", f"cannot be told: no row of {', '.join(found.missing)}"]
    return [*told, f"{found.seeds[1]}, {found.seeds[0]}", "miniature", found.verdict]


def _ratio(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    high = f"{estimate.high:.3f}" if math.isfinite(estimate.high) else "∞"
    return f"x {estimate.mean:.3f} [{estimate.low:.3f}, {high}]"

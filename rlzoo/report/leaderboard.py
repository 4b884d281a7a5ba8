"""`rlzoo leaderboard`: the result rows of a folder, arms over seeds and every run, ranked; pages that are functions of the rows alone."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..escape import visible
from ..evaluation.arms import TRAINED
from ..evaluation.rows import Protocol, ResultRow, read_row
from ..store.files import write_aside
from .evaluated import estimate
from .grid import Grid
from .seeds import arms_grid
from .text import count, percent

BASE = "base"
FINAL = "final"  # how every run calls the folder of its model: the run's name tells more
TITLE = "Leaderboard"
ABOUT = (
    "Made by `rlzoo leaderboard` from every result row (`*.json`) in this folder; nothing is left out. A table holds what was measured "
    "in the same way on the same problems, ranked by Pass@1. Intervals are 95 %: of an arm over its training seeds, of a run over "
    "problems; those of runs say nothing of the spread between seeds, which is why every seed has its line too. Tokens count a shared "
    "prefix once; device-hours are devices x wall time."
)
BEGIN = "<!-- made by rlzoo leaderboard --page; do not edit -->"
END = "<!-- end of the leaderboard -->"
STYLE = """:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 90rem; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8886; }
th:nth-child(2), td:nth-child(2) { text-align: left; }
li { color: #777; font-size: .9em; }"""


@dataclass(frozen=True, slots=True)
class Entry:
    """One measured model: a line. `group` is the table that it stands in: suite, then how and on what was measured."""

    group: tuple[str, ...]
    name: str
    file: str
    row: ResultRow
    plain: Mapping[str, Any]
    model: str

    @property
    def pass_at_1(self) -> float:
        return self.row.overall[self.model].pass_at_1.mean or 0.0

    @property
    def trained(self) -> bool:
        """Whether the training that the row tells of made this model."""
        return self.row.training is not None and self.model == TRAINED


@dataclass(frozen=True, slots=True)
class Tables:
    """What was measured alike: its trained arms over seeds (None: none has two seeds), and every run and model."""

    arms: Grid | None
    runs: Grid


def write_leaderboard(results: Path, into: Path | None = None) -> None:
    """Write `leaderboard.md` and `leaderboard.html` into `results` from the rows below it, and its tables of arms `into` the place for
    them in another Markdown page.

    Raises:
        ValueError: no such folder, no row in it, a file that is not a row (named with the field), or a page without that place.
    """
    tables = leaderboard(results)
    grids = [grid for own in tables for grid in (own.arms, own.runs) if grid is not None]
    told = {results / "leaderboard.md": f"# {TITLE}\n\n{ABOUT}\n\n{_markdown(grids)}", results / "leaderboard.html": page(grids)}
    if into is not None:
        told[into] = filled(into, results, tables)
    for path, text in told.items():
        write_aside(path, text)
    for grid in grids:
        grid.print()
    print(visible(f"written: {', '.join(map(str, told))}"))


def _markdown(grids: Sequence[Grid], level: int = 2) -> str:
    return "\n".join(grid.markdown(level) for grid in grids)


def filled(path: Path, results: Path, tables: Sequence[Tables]) -> str:
    """The text of a Markdown page with the tables of arms between its two marks (`BEGIN`, `END`), under headings of the third level, and a
    link to `leaderboard.md` in `results`.

    Raises:
        ValueError: the page cannot be read, or has not each mark once, in this order.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"{path} has no place for the leaderboard: it needs the lines {BEGIN} and {END}, once and in this order")
    place = Path(os.path.relpath(results / "leaderboard.md", path.parent)).as_posix()
    arms = _markdown([own.arms for own in tables if own.arms is not None], 3) or "No arm has two seeds yet.\n"
    return f"{before}{BEGIN}\n\n{arms}\nEvery run and every model before training: [{place}]({place}).\n\n{END}{after}"


def leaderboard(results: Path) -> list[Tables]:
    """Tables per suite and way of measuring, in that order.

    Raises:
        ValueError: see `write_leaderboard`.
    """
    if not results.is_dir():
        raise ValueError(f"no folder {results}")
    files = sorted(path for path in results.rglob("*.json"))
    if not files:
        raise ValueError(f"{results} holds no result row (*.json)")
    entries = [entry for path in files for entry in _entries(results, path)]
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in sorted(entries, key=lambda e: (e.group, -e.pass_at_1, e.name, e.row.seed, e.file)):
        groups.setdefault(entry.group, []).append(entry)
    return [_tables(group, _once(members)) for group, members in groups.items()]


def _entries(results: Path, path: Path) -> list[Entry]:
    row, plain = read_row(path)
    problems = [f"{name}: {t.n} problems, {t.sha256[:12]}" for name, t in row.testsets.items()]
    group = (row.suite, _how(row.protocol), "; ".join(problems))
    file = path.relative_to(results).as_posix()
    own = Path(row.model).parent.name + "/" + row.arm.name if row.arm.name == FINAL else row.arm.name
    names = {model: row.model if model == BASE else own for model in row.results}
    return [Entry(group, names[model], file, row, plain, model) for model in row.results]


def _how(protocol: Protocol) -> str:
    """What has to agree for two figures to stand in one table."""
    ks = set(protocol.k.values())
    k = str(min(ks)) if len(ks) == 1 else ", ".join(f"{name} {k}" for name, k in protocol.k.items())
    sampler = ", ".join(f"{name} {value}" for name, value in protocol.sampler.items() if name != "name")
    return (
        f"k = {k}, temperature {protocol.temperature:g}, template {protocol.template}, at most {protocol.max_response_tokens} tokens, "
        f"sampler {protocol.sampler['name']} ({sampler}), {protocol.engine}; {protocol.grader}"
    )


def _once(entries: Sequence[Entry]) -> list[Entry]:
    """Without base models that another run has measured with the very same outcome."""
    seen: set[str] = set()
    kept = []
    for entry in entries:
        outcome = json.dumps([entry.name, entry.plain["results"][entry.model]], sort_keys=True)
        if entry.model != BASE or outcome not in seen:
            kept.append(entry)
        seen.add(outcome)
    return kept


def _tables(group: tuple[str, ...], entries: Sequence[Entry]) -> Tables:
    suite, how, _ = group
    title = f"Arms, over training seeds: suite {suite}, {entries[0].row.protocol.engine}"
    start = [f"before training: {e.name} {percent(estimate(e.plain['overall'][BASE]['pass_at_1']))}" for e in entries if e.model == BASE]
    notes = [*dict.fromkeys(start), how]  # a base model stands there again where the votes of one run were not counted
    return Tables(arms_grid(title, [e.row for e in entries if e.trained], notes), _grid(group, entries))


def _grid(group: tuple[str, ...], entries: Sequence[Entry]) -> Grid:
    ks = {k for entry in entries for k in entry.row.protocol.k.values()}
    k = str(min(ks)) if len(ks) == 1 else "k"
    head = ["", "model or algorithm", "seed", "Pass@1, % [95 %]", "greedy, %", f"pass@{k}, %", f"maj@{k}, %", "length", "cut off, %"]
    head += ["training: sampled tokens", "training: device-hours", "measuring: sampled tokens", "config", "commit", "row"]
    suite, how, problems = group
    return Grid(f"Suite {suite}", head, [[str(i), *_cells(e, k)] for i, e in enumerate(entries, 1)], [how, problems], names=2)


def _cells(entry: Entry, k: str) -> list[str]:
    row, own = entry.row, entry.plain["overall"][entry.model]
    shares = [percent(estimate(e)) for e in (own["pass_at_1"], own["greedy"], own["pass_at"].get(k), own["maj_at_k"])]
    cost, config, seed = ["-", "-"], "", ""
    if entry.trained and row.training is not None:
        tokens = "-" if row.sampled_tokens is None else count(row.sampled_tokens)
        cost = [tokens, f"{row.training.device_hours:.3f} ({row.training.devices} x {row.training.device})"]
    if entry.model != BASE:
        config, seed = row.arm.config_sha256[:8], str(row.seed)
    commit = "-" if row.environment.commit is None else row.environment.commit[:8] + (" + changes" if row.environment.dirty else "")
    told = [f"{own['length']['mean']:.0f}", f"{100 * own['truncated']:.1f}"]
    return [entry.name, seed, *shares, *told, *cost, count(own["sampled_tokens"]), config, commit, entry.file]


def page(grids: Sequence[Grid]) -> str:
    """The tables as one HTML file that needs nothing else."""
    parts = []
    for grid in grids:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in grid.head)
        body = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in grid.rows)
        notes = "".join(f"<li>{escape(line)}</li>" for line in grid.notes)
        parts.append(
            f'<h2>{escape(grid.title)}</h2>\n<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n'
            f"</table></div>\n<ul>{notes}</ul>\n"
        )
    return (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>{TITLE}</title>\n<style>\n{STYLE}\n</style>\n<h1>{TITLE}</h1>\n<p>{escape(ABOUT.replace('`', ''))}</p>\n"
        + "".join(parts)
        + "</html>\n"
    )

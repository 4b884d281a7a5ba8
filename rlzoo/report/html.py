"""`rlzoo report`: runs as one self-contained HTML page. It fetches nothing; whatever a model wrote stands in it as data."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from ..store.cost import PHASES, spent
from ..store.files import refuse_special, write_aside
from ..store.runs import RunFolder
from ..store.trees import StoredTree, read_trees
from ..tree import Tree
from .counterfactual import Judges
from .plots import RunData, arms, curves, frontiers, ledger, lengths
from .tables import FinalTable, Line, both, caption
from .text import count, percent, points
from .treedata import Decode, Pieces, Texts, tree_data

SCRIPTS = ("page.js", "charts.js", "viewer.js")
ASSETS = ("page.html", "report.css", *SCRIPTS)
MAX_TREE_BYTES = 4_500_000  # of all trees together, so that the page stays below 5 MB
MOST_NAMES = 4  # of runs, in the title

Sampled = Mapping[str, Mapping[int, Sequence[StoredTree]]]
"""Stored trees by run label and step."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a report holds: its file, its size, and how many of the chosen trees found room in it."""

    path: Path
    size_bytes: int
    trees: int
    left_out: int


def write_report(runs: Sequence[Path], out: Path, *, trees: int = 6, force: bool = False) -> Written:
    """Write the page of `runs` to `out`, whole or not at all, with up to `trees` sampled trees per run (0: no tree viewer).

    Raises:
        ValueError: no run, a folder that is none, a run without stored trees or with a broken file, or an `out` that exists (unless
            `force`) or cannot be written.
    """
    _check(runs, out, trees, force)
    found = [_read(label, path) for label, path in _labels(runs).items()]
    sampled = {run.label: _stored(run, trees) for run in found} if trees else {}
    viewer, left_out = _viewer(found, sampled, trees)
    page = _page(found, sampled, viewer)
    try:
        write_aside(out, page)
    except OSError as error:
        raise ValueError(f"cannot write the report {out}: {error.strerror or error}") from error
    return Written(out, len(page.encode()), len(viewer["trees"]), left_out)


def _check(runs: Sequence[Path], out: Path, trees: int, force: bool) -> None:
    if not runs:
        raise ValueError("no run given; a report needs at least one run folder: rlzoo report RUN... --out report.html")
    if trees < 0:
        raise ValueError(f"--trees {trees}; allowed: 0 (no tree viewer) or more per run")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"cannot write the report {out}: there is no folder {out.parent}")
    refuse_special(out)
    if out.is_dir():
        raise ValueError(f"cannot write the report {out}: it is a folder; name a file, such as {out / 'report.html'}")
    if out.exists() and not force:
        raise ValueError(f"{out} exists; --force replaces it")


def _labels(runs: Sequence[Path]) -> dict[str, Path]:
    names = [run.resolve().name for run in runs]
    labels = {name if names.count(name) == 1 else str(run): run for name, run in zip(names, runs, strict=True)}
    if len({run.resolve() for run in runs}) < len(runs):
        raise ValueError(f"the same run is given more than once: {', '.join(map(str, runs))}")
    return labels


def _read(label: str, path: Path) -> RunData:
    folder = RunFolder.open(path)
    try:
        run = RunData(label, folder, folder.config(), folder.metrics(), folder.summary())
    except ValueError as error:
        raise ValueError(f"run {path}: {error}") from error
    if run.summary is not None:
        _check_summary(path, run.summary)
    return run


def _check_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """What the page reads of a summary is there, and of the right kind.

    Raises:
        ValueError: it is not.
    """
    try:
        spent, devices = summary["ledger"]["device_seconds"], summary["ledger"]["devices"]
        numbers = [int(summary["steps"]), float(devices), *(float(spent[phase]) for phase in PHASES)]
        if "table" in summary:
            FinalTable.from_dict(summary["table"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"run {path}: its summary.json is not a run's result row ({type(error).__name__}: {error})") from error
    if min(numbers) < 0:
        raise ValueError(f"run {path}: its summary.json has a negative count or time")


def _stored(run: RunData, trees: int) -> dict[int, list[StoredTree]]:
    """The trees of the first, the middle and the last stored step; of fewer steps where there are fewer, or fewer trees asked for."""
    steps = run.folder.tree_steps()
    if not steps:
        raise ValueError(f"{run.folder.path} holds no stored trees; --trees 0 makes a report without the tree viewer")
    chosen = dict.fromkeys([steps[-1], steps[0], steps[len(steps) // 2]][: max(1, trees)])
    try:
        return {step: read_trees(run.folder.trees_path(step)) for step in chosen}
    except ValueError as error:
        raise ValueError(f"run {run.folder.path}: {error}") from error


def _viewer(runs: Sequence[RunData], sampled: Sampled, trees: int) -> tuple[dict[str, Any], int]:
    """The viewer's data, and how many of the chosen trees had no room. The first choices of every run come before the second."""
    texts: Texts = {}
    queues = {run.label: choose(sampled.get(run.label, {}), trees) for run in runs}
    judges = {run.label: Judges(run.config, str(run.folder.path / "config.toml")) for run in runs if queues[run.label]}
    pieces = {run.label: Pieces(_decoder(run)) for run in runs if queues[run.label]}
    shown: list[tuple[int, dict[str, Any]]] = []
    size = left_out = 0
    for turn in range(max((len(q) for q in queues.values()), default=0)):
        for number, run in enumerate(runs):
            if turn >= len(queues[run.label]):
                continue
            step, index = queues[run.label][turn]
            stored = sampled[run.label][step][index]
            data = tree_data(stored, judges[run.label](stored.tree), pieces[run.label], texts)
            size += len(_embedded(data))
            if size > MAX_TREE_BYTES:
                left_out += 1
                continue
            shown.append((number, {"run": run.label, "algorithm": run.algorithm, "step": step, "index": index} | data))
    shown.sort(key=lambda pair: (pair[0], pair[1]["step"]))
    return {"texts": list(texts), "trees": [data for _, data in shown], "leftOut": left_out}, left_out


def choose(stored: Mapping[int, Sequence[StoredTree]], trees: int) -> list[tuple[int, int]]:
    """Up to `trees` pairs (step, index of a tree in it), the best first: the steps take turns in their order; within one, trees with
    right and wrong responses come first, the more even the earlier, of equally even ones the larger."""

    def late(tree: Tree) -> tuple[float, int]:
        right, wrong = int((tree.correct == 1).sum()), int((tree.correct == 0).sum())
        return abs(right - wrong) / (right + wrong) if right + wrong else 1.0, -tree.nodes

    ranked = [[(step, i) for i in sorted(range(len(found)), key=lambda i: late(found[i].tree))] for step, found in stored.items()]
    longest = max((len(r) for r in ranked), default=0)
    return [r[turn] for turn in range(longest) for r in ranked if turn < len(r)][:trees]


def _decoder(run: RunData) -> Decode | None:
    """The run's tokenizer, from its own folder or from that of its model; None where neither holds one."""
    from ..training.checkpoint import steps
    from ..training.models import load_tokenizer, resolve

    checkpoints = [run.folder.checkpoints / f"step-{s}" for s in reversed(steps(run.folder.checkpoints))]
    for folder in (run.folder.final, *checkpoints, Path(resolve(str(run.config.get("model", ""))))):
        if (folder / "tokenizer.json").is_file() or (folder / "tokenizer.model").is_file():
            tokenizer = load_tokenizer(str(folder))
            return lambda ids: str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
    return None


def _page(runs: Sequence[RunData], sampled: Sampled, viewer: Mapping[str, Any]) -> str:
    assets = files("rlzoo.report") / "assets"
    script = "\n".join((assets / name).read_text(encoding="utf-8") for name in SCRIPTS)
    style = (assets / "report.css").read_text(encoding="utf-8")
    hours = [ledger(run) for run in runs]
    data = {
        "arms": {arm: [run.label for run in members] for arm, members in arms(runs).items()},
        "curves": curves(runs),
        "frontiers": frontiers(runs),
        "outcomes": [o for run in runs if (o := _outcome(run)) is not None],
        "lengths": lengths(runs, sampled),
        "ledgers": hours,
        "viewer": viewer,
    }
    names = ", ".join(run.label for run in runs) if len(runs) <= MOST_NAMES else f"{len(runs)} runs"
    return Template((assets / "page.html").read_text(encoding="utf-8")).substitute(
        title=escape(f"rlzoo report: {names}"),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
        runs=_table(*_runs_table(runs)),
        results=_results(runs),
        hours=_table(*_hours_table(hours)),
        data=_embedded(data),
        version=escape(version("rlzoo")),
    )


def _embedded(data: Any) -> str:
    """JSON that can stand in a script element, whatever its texts hold: no <, > or &, and nothing beyond ASCII."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    """For the page's Content-Security-Policy: the browser runs this script and uses this style, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _runs_table(runs: Sequence[RunData]) -> tuple[list[str], list[list[str]]]:
    head = ["run", "algorithm", "seed", "model", "steps", "dev Pass@1, % (± 95 %)", "dev length", "sampled tokens", "device-hours", "state"]
    rows = []
    for run in runs:
        dev = [row for row in run.rows if row.get("dev/pass_at_1") is not None]
        half = dev[-1].get("dev/half_width") if dev else None
        last = run.rows[-1] if run.rows else {}
        planned = run.config.get("schedule", {}).get("steps", "?")
        cost = spent(run.rows)
        rows.append(
            [
                run.label,
                run.algorithm,
                str(run.seed),
                str(run.config.get("model", "?")),
                f"{last.get('step', 0)} of {planned}",
                _change([100 * row["dev/pass_at_1"] for row in dev]) + (f" ± {100 * half:.1f}" if half is not None else ""),
                _change([row["dev/length"] for row in dev if row.get("dev/length") is not None]),
                count(cost["tokens"]),
                f"{cost['device-hours']:.3f}",
                "finished" if run.summary is not None else "not finished",
            ]
        )
    return head, rows


def _hours_table(ledgers: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    phases = [p for p in PHASES if any(one["hours"][p] for one in ledgers)]
    rows = [[one["run"], *(f"{one['hours'][p]:.4f}" for p in phases), f"{sum(one['hours'].values()):.4f}"] for one in ledgers]
    return ["device-hours", *phases, "all"], rows


def _change(values: Sequence[float]) -> str:
    return "-" if not values else f"{values[0]:.1f}" if len(values) == 1 else f"{values[0]:.1f} → {values[-1]:.1f}"


def _final(run: RunData) -> tuple[FinalTable, Line, Line] | None:
    """The run's final table and its lines over all sets, base and trained; None where it was not measured on a suite."""
    if run.summary is None or "table" not in run.summary:
        return None
    table = FinalTable.from_dict(run.summary["table"])
    over_all = {line.model: line for line in table.lines if line.cost is not None}
    return table, over_all["base"], over_all["trained"]


def _outcome(run: RunData) -> dict[str, Any] | None:
    found = _final(run)
    if found is None or found[2].cost is None or run.summary is None:
        return None
    _, base, trained = found
    cost = {"steps": run.summary["steps"], "sampled tokens": found[2].cost.sampled_tokens}
    cost |= {"trained tokens": spent(run.rows)["trained-tokens"], "device-hours": found[2].cost.device_hours}
    estimate = trained.pass_at_1
    return {"run": run.label, "cost": cost, "base": base.pass_at_1.mean} | {n: getattr(estimate, n) for n in ("mean", "low", "high")}


def _results(runs: Sequence[RunData]) -> str:
    """A line per run measured on a suite, the best first, and its complete tables to unfold."""
    found = sorted(((f[2].pass_at_1.mean, run, *f) for run in runs if (f := _final(run)) is not None), key=lambda x: -x[0])
    if not found:
        return "<p class=note>No run of this report was measured on a suite (<code>--evaluation.suite</code>), or none has finished.</p>"
    head = ["run", "algorithm", "seed", "sets", "base Pass@1, % [95 %]", "trained", "gain, points", "length ratio", "sampled tokens"]
    rows, details = [], []
    for _, run, table, base, trained in found:
        gain, cost = table.gains[-1], trained.cost
        sets = str(len({line.set for line in table.lines if line.set != trained.set}) or 1)
        figures = [percent(base.pass_at_1), percent(trained.pass_at_1), points(gain.pass_at_1), f"{gain.length_ratio:.2f}"]
        costs = ["-", "-"] if cost is None else [count(cost.sampled_tokens), f"{cost.device_hours:.3f}"]
        rows.append([run.label, run.algorithm, str(run.seed), sets, *figures, *costs])
        parts = [f"<h4>{escape(title)}</h4>{_table(names, lines)}" for title, names, lines in both(table)]
        notes = "".join(f"<li>{escape(line)}</li>" for line in caption(table))
        details.append(f"<details><summary>All sets of {escape(run.label)}</summary>{''.join(parts)}<ul>{notes}</ul></details>")
    told = "<p class=note>Pass@1 of sampled responses, the mean over the sets; all intervals are over problems.</p>"
    return _table([*head, "device-hours"], rows) + told + "".join(details)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells that begin with a digit or a sign stand right, under a head that does the same."""
    right = [all(r[i][:1] in "0123456789+-−" for r in rows if r[i]) for i in range(len(head))]
    kinds = ["n" if r else "t" for r in right]
    top = "".join(f'<th scope="col" class={k}>{escape(h)}</th>' for h, k in zip(head, kinds, strict=True))
    body = "".join(f"<tr>{''.join(f'<td class={k}>{escape(c)}</td>' for c, k in zip(row, kinds, strict=True))}</tr>" for row in rows)
    return f"<div class=scroll tabindex=0><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"

"""The arms of a comparison: configurations written short, and finished runs grouped by theirs."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import registry
from ..algorithm import PARTS, options
from ..config import PLUGGABLE, RunConfig, build, read_toml
from ..report.plots import RunData
from ..report.plots import arms as grouped
from ..store.runs import RunFolder
from ..tree import Float64
from .comparison import Arm
from .rows import ResultRow, read_row

TRAINED = "trained"
Layers = Sequence[tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """A finished run: its metrics and its checked result row."""

    run: RunData
    row: ResultRow


def parse_arms(text: str, common: Layers = ()) -> dict[str, RunConfig]:
    """Configs by name out of `ALGORITHM[@OPTION=VALUE...]` and `FILE.toml`, separated by commas; `common` lies below each.

    An option is written as in TOML or bare, with its section before it where several have it: `@credit.std=none@optim.lr=1e-4`;
    `@credit=NAME` exchanges a part.

    Raises:
        ValueError: fewer than two arms, one given twice, or an arm that cannot be built (named).
    """
    found: dict[str, RunConfig] = {}
    for entry in (part.strip() for part in text.split(",")):
        name = Path(entry).stem if entry.endswith(".toml") else entry
        if name in found:
            raise ValueError(f"arm {name} is given twice")
        try:
            found[name] = _config(entry, common)
        except ValueError as error:
            raise ValueError(f"arm {entry!r}: {error}") from error
    if len(found) < 2:
        raise ValueError(f"a comparison needs two arms at least, not {text!r}")
    return found


def _config(entry: str, common: Layers) -> RunConfig:
    if entry.endswith(".toml"):
        return build([*common, (entry, read_toml(entry))])
    algo, *changes = entry.split("@")
    registry.find("algorithm", algo)
    layers, choice, values = list(common), {"algo": algo}, []
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key or not value:
            raise ValueError(f"{change!r} is not OPTION=VALUE")
        if key in PLUGGABLE:
            choice[key] = value
        else:
            values.append((key, value))
    config = build(layers, choice)
    tables: dict[str, dict[str, Any]] = {}
    for key, value in values:
        section, option = _locate(config, key)
        tables.setdefault(section, {})[option] = _value(value)
    return build([*layers, ("its options", tables)], choice)


def _locate(config: RunConfig, key: str) -> tuple[str, str]:
    section, dot, option = key.rpartition(".")
    parts = {name: options(getattr(config.algorithm, name)) for name in PARTS}
    having = [name for name, known in parts.items() if (not dot or name == section) and option in known]
    if len(having) != 1:
        allowed = ", ".join(f"{name}.{o}" for name, known in parts.items() for o in known)
        raise ValueError(
            f"option {key!r} is in {' and '.join(having)}; name one" if having else f"unknown option {key!r}; allowed: {allowed}"
        )
    return having[0], option


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def read_member(path: Path) -> Member:
    """A finished run that measured its model on a suite.

    Raises:
        ValueError: no run folder, not finished, without a final measurement, or a broken file.
    """
    folder = RunFolder.open(path)
    if not (path / "summary.json").is_file():
        raise ValueError(f"{path} has not finished; go on with it: rlzoo run --resume --out {path}")
    row, plain = read_row(path / "summary.json")
    if TRAINED not in row.results:
        raise ValueError(f"{path} has no measurement of its trained model to compare (a run with --evaluation.suite none has none)")
    return Member(RunData(folder.name, folder, folder.config(), folder.metrics(), plain), row)


def group(paths: Sequence[Path]) -> dict[str, list[Member]]:
    """Finished runs by arm: runs of one differ in the seed and in what learning does not see.

    Raises:
        ValueError: see `read_member`; or fewer than two arms, or a seed twice in one.
    """
    members = [read_member(path) for path in paths]
    by_run = {id(member.run): member for member in members}
    found = {name: [by_run[id(run)] for run in runs] for name, runs in grouped([m.run for m in members]).items()}
    for name, own in found.items():
        seeds = [m.row.seed for m in own]
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"arm {name} has a seed twice: {', '.join(f'{m.run.folder.path} (seed {m.row.seed})' for m in own)}")
    if len(found) < 2:
        raise ValueError(f"the {len(members)} runs are of one arm, {', '.join(found)}; a comparison needs two")
    return found


def refuse_mixture(arms: Mapping[str, Sequence[Member]], allow: Sequence[str] = ()) -> list[str]:
    """All runs must have been measured in the same way on the same problems; returns a line per difference that is allowed.

    Raises:
        ValueError: they differ in a field that `allow` does not name, or in their problems, which nothing allows.
    """
    members = [member for own in arms.values() for member in own]
    fields = asdict(members[0].row.protocol)
    if unknown := sorted(set(allow) - set(fields)):
        raise ValueError(f"--allow {unknown[0]}: no such field; allowed: {', '.join(fields)}")
    hint = "; if that does not matter, --allow {}"
    return check_alike([m.row for m in members], [str(m.run.folder.path) for m in members], allow=allow, hint=hint)


def check_alike(rows: Sequence[ResultRow], names: Sequence[str], *, allow: Collection[str] = (), hint: str = "") -> list[str]:
    """The measurements of rows must be comparable: the same suite and problems, and the same protocol but for the fields in `allow`, of
    whose differences it returns a line each. `names` tell the rows apart; `hint`, with {} for the field, ends a refusal.

    Raises:
        ValueError: they are not; names two rows and what they differ in.
    """
    first, fields = rows[0], asdict(rows[0].protocol)
    allowed: dict[str, str] = {}
    for other, name in zip(rows[1:], names[1:], strict=True):
        both = f"{names[0]} and {name}"
        if (first.suite, first.testsets, _problems(first)) != (other.suite, other.testsets, _problems(other)):
            raise ValueError(f"{both} were measured on different problems (suites {first.suite} and {other.suite})")
        for field, value in asdict(other.protocol).items():
            if value == fields[field]:
                continue
            told = f"{both} differ in {field}: {fields[field]!r} and {value!r}"
            if field not in allow:
                raise ValueError(told + hint.format(field))
            allowed.setdefault(field, f"allowed: {told}")
    return list(allowed.values())


def _problems(row: ResultRow) -> dict[str, list[str]]:
    return {name: m.problems for sets in row.results.values() for name, m in sets.items()}


def as_arm(name: str, rows: Sequence[ResultRow], model: str = TRAINED) -> Arm:
    """Scores of a model of rows that differ in seed [seeds, problems] per set, in shares; NaN where nothing was graded."""

    def scores(which: str) -> Float64:
        sets = [row.results[model][which] for row in rows]
        right, graded = (np.array([getattr(s, field) for s in sets], np.float64) for field in ("right", "graded"))
        shares: Float64 = np.divide(right, graded, out=np.full(right.shape, np.nan), where=graded > 0)
        return shares

    return Arm(name, tuple(row.seed for row in rows), {which: scores(which) for which in rows[0].results[model]})

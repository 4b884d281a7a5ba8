"""A run's folder: what was configured, what happened step by step, and the row that came out of it. Nothing in it is pickled."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from .environment import environment
from .files import LOCK, PARTIAL, parse_json, read_bytes, read_json, read_text, remove_partials, write_aside
from .toml import dump_toml, parse_toml

__all__ = ["RunFolder", "dump_toml", "environment", "read_rows", "to_json", "write_aside"]

Row = dict[str, Any]


class RunFolder:
    """`config.toml`, `metrics.jsonl`, `trees/step-N.parquet`, `eval/NAME.jsonl`, `checkpoints/`, `final/`, `summary.json`.

    Make one with `create` or `open`, never directly.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: str | Path, config: Mapping[str, Any] | None = None) -> RunFolder:
        """A new run folder, with `config.toml` if a config is given. An existing empty folder is taken.

        Raises:
            ValueError: the folder holds something already, or cannot be made or written.
        """
        folder = Path(path)
        cls.refuse_taken(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            run = cls(folder)
            if config is not None:
                run.write_config(config)  # first of all: with it a run can be resumed, without it the folder is still free
            for part in ("trees", "eval", "checkpoints"):
                (folder / part).mkdir(exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write the run folder {folder}: {error.strerror or error}") from error
        return run

    @staticmethod
    def refuse_taken(folder: Path) -> None:
        """For a new run's start: nothing may be in `folder` but what a start that died at once left.

        Raises:
            ValueError: there is something, or the folder cannot be read.
        """
        try:
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"{folder} is a file; a run needs a folder: choose another --out")
            taken = folder.is_dir() and any(p.name != LOCK and not p.name.startswith(PARTIAL) for p in folder.iterdir())
        except OSError as error:
            raise ValueError(f"cannot read the run folder {folder}: {error.strerror or error}") from error
        if taken:
            raise ValueError(f"{folder} is not empty; a run never overwrites another: choose another --out, or remove it")

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """An existing run folder.

        Raises:
            ValueError: there is none at `path`.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise ValueError(f"no run folder at {folder}")
        if not (folder / "config.toml").is_file():
            raise ValueError(f"{folder} is not a run folder: it has no config.toml")
        return cls(folder)

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write the complete, resolved config; options that are None are left out (TOML has no null)."""
        write_aside(self.path / "config.toml", dump_toml(config))

    def config(self) -> Row:
        """The config as plain tables.

        Raises:
            ValueError: missing or broken file.
        """
        path = self.path / "config.toml"
        return parse_toml(read_text(path), str(path))

    def refuse_change(self, kept: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        """For a resumed run, whose config is `kept`, what is `asked` for this time (all of it, or some keys) must be the same.

        Raises:
            ValueError: it is not; names the first key that differs.
        """
        found = _first_difference(kept, asked)
        if found is not None:
            key, old, new = found
            raise ValueError(f"{self.path} was started with {key} = {old!r}, not {new!r}; --resume goes on with a run as it was started")

    @classmethod
    def place(cls, out: Path | None, name: str, asked: Row, *, resume: bool, whole: Callable[[Row, str], Row]) -> Path:
        """Where a run or an evaluation of the config `asked` works: in a folder that is free, runs/NAME-TIME-PROCESS without `out`; or, to
        `resume` one, in the folder `out` that holds it. `whole` completes a stored config (with its origin) with younger options.

        Raises:
            ValueError: the folder is taken; or there is nothing to go on with in it, or something of another config.
        """
        if not resume:
            path = out or _free(Path("runs"), f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
            cls.refuse_taken(path)
            return path
        if out is None:
            raise ValueError("--resume needs --out FOLDER, the one to go on with")
        folder = cls.open(out)
        folder.refuse_change(whole(folder.config(), str(out / "config.toml")), asked)
        return out

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to `metrics.jsonl`; it is on disk when this returns.

        Raises:
            OSError: the disk refuses; the file is as it was.
        """
        left = (to_json(row) + "\n").encode()
        path = self.path / "metrics.jsonl"
        with path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except OSError as error:
                file.truncate(before)
                raise OSError(error.errno, error.strerror, str(path)) from error

    def metrics(self) -> list[Row]:
        """All rows of `metrics.jsonl`, numbers, lists of numbers or None by name; a last line cut off by a kill is left out.

        Raises:
            ValueError: a broken line that is not the last.
        """
        path = self.path / "metrics.jsonl"
        rows = read_rows(path)
        for number, row in enumerate(rows, 1):
            for name, value in row.items():
                for each in value if isinstance(value, list) else [value]:
                    if each is not None and (isinstance(each, bool) or not isinstance(each, int | float)):
                        raise ValueError(f"line {number} of {path}: {name} is {value!r:.40}, not a number")
        return rows

    def rewind(self, step: int | None) -> None:
        """Forget rows and trees after `step`, as a run resumed from that step's checkpoint makes them anew; all of them for None.
        What an interrupted write left half-done is removed.

        Raises:
            ValueError: a broken line in `metrics.jsonl`.
        """
        remove_partials(self.path)
        kept = [] if step is None else [row for row in self.metrics() if row.get("step", 0) <= step]
        write_aside(self.path / "metrics.jsonl", "".join(to_json(row) + "\n" for row in kept))
        for later in self.tree_steps():
            if step is None or later > step:
                self.trees_path(later).unlink()

    def trees_path(self, step: int) -> Path:
        """Where the trees of a step are stored."""
        return self.path / "trees" / f"step-{step}.parquet"

    def tree_steps(self) -> list[int]:
        """Steps whose trees are stored, rising."""
        found = [p.stem.removeprefix("step-") for p in (self.path / "trees").glob("step-*.parquet")]
        return sorted(int(step) for step in found if step.isdecimal())

    @contextmanager
    def eval_sink(self, name: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
        """A function that writes one row to `eval/NAME.jsonl`, each flushed, for `rlzoo.evaluation.runner.evaluate`. Rows of an
        earlier evaluation, as one that died left them, are replaced."""
        self.eval_path(name).parent.mkdir(parents=True, exist_ok=True)
        with self.eval_path(name).open("w", encoding="utf-8") as file:

            def sink(row: Mapping[str, Any]) -> None:
                file.write(to_json(row) + "\n")
                file.flush()

            yield sink

    def eval_path(self, name: str) -> Path:
        return self.path / "eval" / f"{name}.jsonl"

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the result row; it is there whole or not at all."""
        write_aside(self.path / "summary.json", to_json(summary, indent=2) + "\n")

    def summary(self) -> Row | None:
        """The result row, None while the run has not finished.

        Raises:
            ValueError: a broken file.
        """
        path = self.path / "summary.json"
        if not path.exists():
            return None
        row = read_json(path)
        if not isinstance(row, dict):
            raise ValueError(f"{path} holds {row!r:.40}, not a table of results")
        return row


def _free(folder: Path, name: str) -> Path:
    """A path in `folder` that nothing has, whoever else starts in the same second: with this process's number, and a count if need be."""
    first = folder / f"{name}-{os.getpid()}"
    return next(path for path in chain([first], (first.with_name(f"{first.name}-{i}") for i in count(2))) if not path.exists())


def read_rows(path: Path) -> list[Row]:
    """Rows of a JSONL file, [] without the file; a last line without its line end was cut off by a kill and is left out.

    Raises:
        ValueError: a broken line, by number.
    """
    if not path.exists():
        return []
    rows: list[Row] = []
    whole, _, _ = read_bytes(path).rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if whole else (), 1):
        try:
            row = parse_json(line.decode("utf-8"), f"line {number} of {path}")
        except UnicodeDecodeError as error:
            raise ValueError(f"line {number} of {path} is not UTF-8: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} of {path} holds {row!r:.40}, not a row of names and values")
        rows.append(row)
    return rows


def _first_difference(kept: Mapping[str, Any], asked: Mapping[str, Any], above: str = "") -> tuple[str, Any, Any] | None:
    for key, new in asked.items():
        old = kept.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            if (found := _first_difference(old, new, f"{above}{key}.")) is not None:
                return found
        elif old != new:
            return f"{above}{key}", old, new
    return None


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON: numpy becomes plain, paths become text; NaN and infinities become null, as JSON has no word for them."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value

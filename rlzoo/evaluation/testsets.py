"""Test sets: where each one's problems come from, and how a result on it is to be measured (`benchmarks/testsets/*.toml`).

A set is pinned: its number of problems and the checksums of their texts and answers. A set that does not match is refused, from
wherever it was read, so that two results on one set are results on the same problems.
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import cattrs

from .. import registry
from ..data.loading import load_problems
from ..data.problems import Problem, checksum
from ..rewards.math import GraderConfig

LOCAL_COLUMNS = {"id": "id", "problem": "problem", "answer": "answer"}
SUFFIXES = (".jsonl", ".parquet")

T = TypeVar("T")


@dataclass(frozen=True)
class Hub:
    """Where a set lies on the hub: `source` is `owner/name[:config]`.

    `revision` is a commit that is known to hold the pinned problems; without one the set is read from a folder only. `columns`
    are read by these names, and `id_prefix` before each id makes it the id of the local files: ids enter sampling seeds.
    """

    source: str
    split: str
    columns: Mapping[str, str]
    revision: str | None = None
    id_prefix: str = ""


@dataclass(frozen=True)
class SetSpec:
    """One test set. `rows`, `sha256` (see `data.problems.checksum`) and `answers_sha256` (see `answers_checksum`) pin it.

    `template`, `grader` and `k` (sampled responses per problem) are the defaults of a measurement. A set has a `hub` source or a
    `generator` (`package.module:function` of name, rows and seed). `columns` are those of a local file.
    """

    name: str
    rows: int
    sha256: str
    answers_sha256: str
    licence: str
    template: str
    k: int
    grader: GraderConfig
    columns: Mapping[str, str] = field(default_factory=lambda: LOCAL_COLUMNS)
    hub: Hub | None = None
    generator: str | None = None
    seed: int = 0

    def load(self, data_dir: str | Path | None = None) -> list[Problem]:
        """The problems, from `data_dir/<name>.jsonl` or `.parquet`, or without a folder from the hub; a generated set needs neither.

        Raises:
            ValueError: not to be had, unreadable, or not the pinned problems; names the set and where.
        """
        problems = self._read(data_dir)
        if len(problems) != self.rows:
            raise ValueError(f"test set {self.name} has {len(problems)} problems, expected {self.rows}")
        for what, found, expected in (
            ("problems", checksum(problems), self.sha256),
            ("answers", answers_checksum(problems), self.answers_sha256),
        ):
            if found != expected:
                raise ValueError(
                    f"test set {self.name}: its {what} have checksum {found[:12]}…, expected {expected[:12]}…: they were changed"
                )
        return problems

    def _read(self, data_dir: str | Path | None) -> list[Problem]:
        if self.generator is not None:
            generated: list[Problem] = registry.plugin(self.generator, "generator")(self.name, rows=self.rows, seed=self.seed)
            return generated
        try:
            return self._from_hub() if data_dir is None else load_problems(str(self._file(Path(data_dir))), columns=self.columns)
        except ValueError as error:
            raise ValueError(f"test set {self.name}: {error}") from error

    def _file(self, folder: Path) -> Path:
        found = [path for path in (folder / f"{self.name}{suffix}" for suffix in SUFFIXES) if path.is_file()]
        if not found:
            raise ValueError(f"no {self._wanted} in {folder}")
        return found[0]

    def _from_hub(self) -> list[Problem]:
        if self.hub is None or self.hub.revision is None:
            raise ValueError(f"no hub revision is known to hold its {self.rows} problems; give --data-dir, a folder with {self._wanted}")
        try:
            problems = load_problems(f"{self.hub.source}@{self.hub.revision}", split=self.hub.split, columns=self.hub.columns)
        except ValueError as error:
            raise ValueError(f"{error} (or give --data-dir, a folder with {self._wanted})") from error
        return [replace(problem, id=f"{self.hub.id_prefix}{problem.id}") for problem in problems]

    @property
    def _wanted(self) -> str:
        return " or ".join(f"{self.name}{suffix}" for suffix in SUFFIXES)


def answers_checksum(problems: Sequence[Problem]) -> str:
    """SHA-256 of the gold answers as they are, one per line in order."""
    return hashlib.sha256("\n".join(problem.answer for problem in problems).encode()).hexdigest()


def shipped_sets() -> list[str]:
    """Names of the test sets that are shipped."""
    return shipped("testsets")


def find_testset(name: str) -> SetSpec:
    """The test set called `name`, without its problems.

    Raises:
        ValueError: no such set.
    """
    return read_shipped("testsets", name, "test set", SetSpec)


def shipped(folder: str) -> list[str]:
    """Names of the TOML files in a folder of `rlzoo.benchmarks`."""
    return sorted(f.name.removesuffix(".toml") for f in files("rlzoo.benchmarks").joinpath(folder).iterdir() if f.name.endswith(".toml"))


def read_shipped(folder: str, name: str, what: str, kind: type[T]) -> T:
    """One TOML file of `rlzoo.benchmarks` as a dataclass; unknown keys are refused.

    Raises:
        ValueError: no such file, or not of that form.
    """
    if name not in shipped(folder):
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(shipped(folder))}")
    table: dict[str, Any] = tomllib.loads(files("rlzoo.benchmarks").joinpath(folder, f"{name}.toml").read_text(encoding="utf-8"))
    try:
        return _converter().structure(table, kind)
    except cattrs.BaseValidationError as error:
        raise ValueError(f"{folder}/{name}.toml: {'; '.join(cattrs.transform_error(error))}") from error


@lru_cache(maxsize=1)
def _converter() -> cattrs.Converter:
    return cattrs.Converter(forbid_extra_keys=True)

"""Suites of test sets, each pinned by a checksum."""

from __future__ import annotations

import tomllib
from importlib.resources import files
from typing import Any

from .. import registry
from ..data.problems import Problem, checksum


def suites() -> list[str]:
    """Names of the suites that are shipped."""
    return sorted(f.name.removesuffix(".toml") for f in files("rlzoo.benchmarks").joinpath("suites").iterdir() if f.name.endswith(".toml"))


def load_suite(name: str) -> dict[str, list[Problem]]:
    """The test sets of a suite by name, in order.

    Raises:
        ValueError: unknown suite, or a set whose problems are not the pinned ones.
    """
    if name not in suites():
        raise ValueError(f"unknown suite {name!r}; known: {', '.join(suites())}")
    return {testset: load_testset(testset) for testset in _read("suites", name)["testsets"]}


def load_testset(name: str) -> list[Problem]:
    """The problems of one test set.

    Raises:
        ValueError: number or checksum of the problems is not the pinned one.
    """
    spec = _read("testsets", name)
    problems: list[Problem] = registry.plugin(spec["generator"], "generator")(name, rows=spec["rows"], seed=spec["seed"])
    if len(problems) != spec["rows"]:
        raise ValueError(f"test set {name} has {len(problems)} problems, expected {spec['rows']}")
    found = checksum(problems)
    if found != spec["sha256"]:
        raise ValueError(f"test set {name} has checksum {found[:12]}…, expected {spec['sha256'][:12]}…: its problems have changed")
    return problems


def _read(kind: str, name: str) -> dict[str, Any]:
    return tomllib.loads(files("rlzoo.benchmarks").joinpath(kind, f"{name}.toml").read_text(encoding="utf-8"))

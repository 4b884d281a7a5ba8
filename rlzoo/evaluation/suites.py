"""Suites of test sets, and how the results on a suite's sets become one overall figure (`benchmarks/suites/*.toml`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from numpy.typing import ArrayLike

from ..data.problems import Problem
from .stats import Estimate, stratified_mean
from .testsets import SetSpec, find_testset, read_shipped, shipped


@dataclass(frozen=True)
class Suite:
    """Test sets that are reported together. `weights` are in the order of `sets`, and so is `k`, sampled responses per problem."""

    name: str
    sets: tuple[SetSpec, ...]
    weights: tuple[float, ...]
    k: tuple[int, ...]

    @property
    def weights_by_set(self) -> dict[str, float]:
        """`weights` by the sets' names."""
        return {testset.name: weight for testset, weight in zip(self.sets, self.weights, strict=True)}

    def load(self, data_dir: str | Path | None = None) -> dict[str, list[Problem]]:
        """The problems of each set by its name, in order; see `SetSpec.load`."""
        return {testset.name: testset.load(data_dir) for testset in self.sets}

    def overall(self, values: Mapping[str, ArrayLike], level: float = 0.95) -> Estimate:
        """The weighted mean over the sets with its interval, see `stats.stratified_mean`.

        `values` maps each set's name to per-problem means [problems], in shares. The weights are the suite's, also
        where a set was measured on part of its problems. Of differences: `stats.stratified_difference` with `weights`.

        Raises:
            ValueError: not exactly the suite's sets, or a set without values.
        """
        names = [testset.name for testset in self.sets]
        if set(values) != set(names):
            raise ValueError(
                f"the overall of suite {self.name} needs values of {', '.join(names)}; given are {', '.join(values) or 'none'}"
            )
        return stratified_mean([values[name] for name in names], self.weights, level)


@dataclass(frozen=True)
class _File:
    """A suite's TOML. `overall` is the plain mean over sets, or the mean weighted by their number of problems; `k` overrides the sets'."""

    name: str
    testsets: tuple[str, ...]
    overall: Literal["macro", "size"]
    k: int | None = None


def suites() -> list[str]:
    """Names of the suites that are shipped."""
    return shipped("suites")


def find_suite(name: str) -> Suite:
    """The suite called `name`, without its problems.

    Raises:
        ValueError: no such suite.
    """
    file = read_shipped("suites", name, "suite", _File)
    sets = tuple(find_testset(testset) for testset in file.testsets)
    weights = tuple(1.0 if file.overall == "macro" else float(testset.rows) for testset in sets)
    return Suite(file.name, sets, weights, tuple(file.k or testset.k for testset in sets))


def load_suite(name: str, data_dir: str | Path | None = None) -> dict[str, list[Problem]]:
    """The problems of a suite's test sets by name, in order.

    Raises:
        ValueError: unknown suite, or a set that cannot be read or whose problems are not the pinned ones.
    """
    return find_suite(name).load(data_dir)

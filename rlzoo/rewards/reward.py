"""Rewards as plug-ins: the maths grader, or any function named "package.module:function"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .. import registry
from ..data.problems import Problem
from ..options import LARGEST, short

if TYPE_CHECKING:
    from .math import GraderConfig

Item = tuple[Problem, str]  # problem and response text


@dataclass(frozen=True, slots=True)
class Grade:
    """One response's grade. `correct`: 1 right, 0 wrong, NaN the grader itself failed. `reward`: given by a plug-in that
    returns numbers, which then bypasses shaping; None otherwise. `kind` is what is counted and stored."""

    correct: float
    kind: str
    reward: float | None = None


class Reward(Protocol):
    """Grades in the background where it can: `submit` returns at once, `collect` waits. `cpu_s`: CPU seconds spent in other processes,
    beside the caller's own time."""

    @property
    def cpu_s(self) -> float: ...

    def submit(self, items: Sequence[Item]) -> Any: ...

    def collect(self, ticket: Any) -> list[Grade]: ...

    def close(self) -> None: ...


class MathReward:
    """`rlzoo.rewards.math` behind the plug-in interface."""

    def __init__(self, config: GraderConfig | None = None) -> None:
        from .math import Grader

        self._grader = Grader(config)

    @property
    def cpu_s(self) -> float:
        return self._grader.cpu_s

    def submit(self, items: Sequence[Item]) -> Any:
        return self._grader.submit([(problem.answer, text) for problem, text in items])

    def collect(self, ticket: Any) -> list[Grade]:
        return [grade_of(v) for v in self._grader.collect(ticket)]

    def close(self) -> None:
        self._grader.close()


class PluginReward:
    """A function of [(problem, response text)] that returns as many verdicts, booleans or numbers.

    A number is the reward itself and counts as right if it is above 0; NaN means that grading failed.

    Raises (from `collect`):
        RuntimeError: the function raised, or returned something else.
    """

    def __init__(self, function: Callable[[Sequence[Item]], Sequence[Any]], name: str) -> None:
        self._function, self._name = function, name

    @property
    def cpu_s(self) -> float:
        return 0.0  # it works in the caller's process, while `collect` waits for it

    def submit(self, items: Sequence[Item]) -> Sequence[Item]:
        return items

    def collect(self, ticket: Sequence[Item]) -> list[Grade]:
        try:
            with registry.staying_put():
                values = list(self._function(list(ticket)))
        except Exception as error:  # the user's code, whatever it raises
            raise RuntimeError(f"reward {self._name} failed: {type(error).__name__}: {error}") from error
        if len(values) != len(ticket):
            raise RuntimeError(f"reward {self._name} returned {len(values)} values for {len(ticket)} responses")
        for value in values:
            if not _is_grade(value):
                allowed = f"verdicts, booleans and finite numbers (to {LARGEST:g}) or NaN"
                raise RuntimeError(f"reward {self._name} returned {short(value)}; allowed are {allowed}")
        return [grade_of(v) for v in values]

    def close(self) -> None:
        pass


def _is_grade(value: Any) -> bool:
    if isinstance(value, int):  # of any length; booleans too
        return abs(value) <= LARGEST
    if isinstance(value, float | np.integer | np.floating | np.bool_):
        return bool(np.isnan(value)) or abs(float(value)) <= LARGEST
    correct = getattr(value, "correct", "")
    return hasattr(value, "kind") and (correct is None or isinstance(correct, bool | np.bool_))


def grade_of(value: Any) -> Grade:
    """A grade out of a verdict, a boolean or a number."""
    if isinstance(value, bool | np.bool_):
        return Grade(float(value), "right" if value else "wrong")
    if isinstance(value, int | float | np.number):
        number = float(value)
        if np.isnan(number):
            return Grade(number, "failed", number)
        return Grade(float(number > 0), "right" if number > 0 else "wrong", number)
    correct = float("nan") if value.correct is None else float(value.correct)
    return Grade(correct, str(value.kind))


def open_reward(name: str) -> Reward:
    """The reward called `name`.

    Raises:
        ValueError: neither "math" nor a function that can be loaded.
    """
    if name == "math":
        return MathReward()
    function = registry.plugin(name, "reward")
    if not callable(function):
        raise ValueError(f"reward {name!r} is not a function of [(problem, response text)]")
    return PluginReward(function, name)

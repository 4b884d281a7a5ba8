"""An algorithm is a composition: sampler x reward shaping x group filter x credit x loss, with vetted defaults."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from . import registry
from .credit.base import CreditFunction
from .credit.filters import GroupFilter
from .losses.policy import PolicyLoss
from .rewards.shaping import Outcome
from .sampling.base import Sampler
from .training.optim import Optim

PARTS = ("sampler", "shaping", "filter", "credit", "loss", "optim", "schedule")


@dataclass(frozen=True)
class Schedule:
    """How many problems, how often."""

    steps: int = 60
    """Sampling steps of a run; runs are fixed in steps, never in seconds."""
    problems_per_step: int = 32
    """Trees trained on per step (fewer if groups are dropped and not refilled)."""
    mini_batches: int = 1
    """Optimiser updates per pass over a step's trees."""
    epochs: int = 1
    """Passes over a step's trees."""
    limit: Literal["none", "tokens", "trained-tokens", "device-hours"] = "none"
    """What `budget` counts: sampled tokens, tokens of the updates' rows, or device-hours of training with its dev evaluations."""
    budget: float = 0.0
    """The run ends after the step that reaches it, at the latest after `steps`, which the learning rate goes by all the same."""

    def __post_init__(self) -> None:
        for name in ("steps", "problems_per_step", "mini_batches", "epochs"):
            if (value := getattr(self, name)) < (0 if name == "steps" else 1):
                raise ValueError(f"schedule.{name} = {value} is too small")
        if (self.limit == "none") != (self.budget == 0) or not 0 <= self.budget < math.inf:
            raise ValueError(f"schedule.budget = {self.budget:g} with limit {self.limit!r}; a limit needs a budget above 0, none needs 0")


@dataclass(frozen=True)
class Algorithm:
    """Five parts and their vetted defaults. `credit(trees)` is the credit function itself; `card` is the file's docstring.

    Raises:
        ValueError: two parts that cannot work together; the message names both.
    """

    name: str
    card: str = field(repr=False)
    sampler: Sampler
    credit: CreditFunction
    loss: PolicyLoss = field(default_factory=PolicyLoss)
    shaping: Outcome = field(default_factory=Outcome)
    filter: GroupFilter = field(default_factory=GroupFilter)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)

    def __post_init__(self) -> None:
        provided = self.sampler.provides | self.shaping.provides | {"ref_logprobs", "entropy"}
        for part, need in ((self.credit, self.credit.needs), (self.loss, self.loss.needs)):
            for missing in sorted(need - provided):
                kind = "credit" if part is self.credit else "loss"
                raise ValueError(
                    f"{kind} {part!r} needs {missing}, which neither sampler {self.sampler!r} nor shaping {self.shaping!r} gives"
                )
        overlong, longest = self.shaping.overlong_tokens, self.sampler.max_response_tokens
        if overlong > longest:
            raise ValueError(
                f"shaping.overlong_tokens = {overlong} is more than the longest response of sampler {self.sampler.name} ({longest} tokens)"
            )
        sampling = self.sampler.sampling
        if sampling.top_p < 1 or sampling.top_k > 0:
            raise ValueError(
                f"sampler {self.sampler.name} draws from a cut distribution (top_p = {sampling.top_p}, top_k = {sampling.top_k}), "
                f"which loss {self.loss.name} does not correct for; train with top_p = 1 and top_k = 0"
            )
        if sampling.temperature <= 0:
            raise ValueError(f"sampler.temperature = {sampling.temperature}; training needs a temperature above 0")

    @property
    def title(self) -> str:
        return self.card.strip().splitlines()[0]


def load(name: str, **overrides: Any) -> Algorithm:
    """A registered algorithm, with options changed by name: `load("NAME", prune_tau=0.0)` or `**{"credit.prune_tau": 0.0}`.

    Raises:
        ValueError: unknown algorithm or option, an option that several parts have, or parts that do not fit.
    """
    return override(registry.find("algorithm", name), overrides)


def override(algorithm: Algorithm, overrides: dict[str, Any]) -> Algorithm:
    """`algorithm` with options replaced; keys are "option" or "part.option".

    Raises:
        ValueError: as `load`.
    """
    changes: dict[str, dict[str, Any]] = {}
    for key, value in overrides.items():
        part, option = _locate(algorithm, key)
        changes.setdefault(part, {})[option] = value
    return replace(algorithm, **{part: replace(getattr(algorithm, part), **options) for part, options in changes.items()})


def options(part: Any) -> list[str]:
    """Names of a part's options."""
    return [f.name for f in dataclasses.fields(part) if f.init]


def _locate(algorithm: Algorithm, key: str) -> tuple[str, str]:
    part, dot, option = key.rpartition(".")
    having = [p for p in PARTS if (not dot or p == part) and option in options(getattr(algorithm, p))]
    if len(having) == 1:
        return having[0], option
    if having:
        raise ValueError(f"option {key!r} exists in {' and '.join(having)}; write {having[0]}.{key} or {having[1]}.{key}")
    allowed = ", ".join(f"{p}.{o}" for p in PARTS for o in options(getattr(algorithm, p)))
    raise ValueError(f"unknown option {key!r} of {algorithm.name}; allowed: {allowed}")


__all__ = ["PARTS", "Algorithm", "Optim", "Schedule", "load", "options", "override"]

"""An algorithm is a composition: sampler x reward shaping x group filter x credit x loss, with vetted defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

from . import registry
from .credit.base import CreditFunction
from .credit.filters import GroupFilter
from .losses.policy import PolicyLoss
from .options import Count, CountOrOff, NotNegative, Options, check
from .rewards.shaping import Outcome
from .sampling.base import Sampler
from .training.optim import Optim

PARTS = ("sampler", "shaping", "filter", "credit", "loss", "optim", "schedule")


@dataclass(frozen=True)
class Schedule(Options):
    """How many problems, how often."""

    section: ClassVar[str] = "schedule"

    steps: CountOrOff = 60
    """Sampling steps of a run; runs are fixed in steps, never in seconds."""
    problems_per_step: Count = 32
    """Trees trained on per step (fewer if groups are dropped and not refilled)."""
    mini_batches: Count = 1
    """Optimiser updates per pass over a step's trees."""
    epochs: Count = 1
    """Passes over a step's trees."""
    limit: Literal["none", "tokens", "trained-tokens", "device-hours"] = "none"
    """What `budget` counts: sampled tokens, tokens of the updates' rows, or device-hours of training with its dev evaluations."""
    budget: NotNegative = 0.0
    """The run ends after the step that reaches it, at the latest after `steps`, which the learning rate goes by all the same."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.limit == "none") != (self.budget == 0):
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
        for section in PARTS:
            check(getattr(self, section), section)
        self._refuse_lone_responses()
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

    def _refuse_lone_responses(self) -> None:
        """One response per problem has no siblings to be compared with, and is all right or all wrong."""
        if self.sampler.leaves_per_tree > 1:
            return
        lone = f"sampler {self.sampler.name} gives one response per problem"
        if "siblings" in self.credit.needs:
            raise ValueError(f"{lone}, and credit {self.credit.name} compares the responses of a problem; sample at least 2")
        if self.filter.drop_dead:
            raise ValueError(f"{lone}, and filter.drop_dead drops all problems whose responses are alike; sample at least 2")

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

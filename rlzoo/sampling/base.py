"""A sampler decides, a backend generates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Protocol

import numpy as np

from ..backends.protocol import NucleusShare, SamplingParams, TemperatureOrGreedy
from ..builder import TreeBuilder
from ..options import CountOrOff, Options, Within
from ..tree import Role, Stop
from .stopping import StopRules

MOST_LEAVES = 1 << 16  # responses per problem
Leaves = Annotated[int, Within(1, MOST_LEAVES)]
Levels = Annotated[int, Within(1, 4096)]
Tokens = Annotated[int, Within(1, 1 << 24)]


@dataclass(frozen=True, slots=True)
class Extend:
    """Sample `count` segments of at most `max_tokens` tokens below `node` (a builder id)."""

    node: int
    count: int
    max_tokens: int
    role: Role = Role.TRAINED


class Growth(Protocol):
    """One problem's tree while it grows; inherit from it. The tree is finished when nothing is in flight and the last call
    asked for nothing.

    The builder already holds the segments in flight, as empty OPEN nodes: node ids and the order of children follow
    submission, never arrival. `grown` is called in order of arrival, so a rule that looks at several nodes at once (a
    barrier) should take them in order of their ids.
    """

    def start(self) -> list[Extend]:
        """What to sample first, below the prompt."""

    def grown(self, node: int) -> list[Extend]:
        """`node` is back, its final stop reason recorded in the builder; what to sample next (perhaps nothing yet)."""

    def settled(self, node: int) -> Sequence[int]:
        """Nodes that will hardly be extended any more, asked after `start` (for the prompt) and after each `grown`: the engine
        may drop their state. It is computed anew for one that is extended (or cut) all the same, so this decides speed only.
        """
        return (node,)

    def report(self) -> Mapping[str, float]:
        """Counts worth logging once the tree is finished; they go to its `meta` as "sampler"."""
        return {}


class Sampler(Protocol):
    """How a tree grows. A frozen dataclass of options; `plant` makes the state of one problem's tree."""

    name: ClassVar[str]
    provides: ClassVar[frozenset[str]]

    @property
    def max_response_tokens(self) -> int:
        """Longest response a leaf can have, tokens."""

    @property
    def max_depth(self) -> int:
        """Most segments on a path."""

    @property
    def stopping(self) -> StopRules: ...

    @property
    def sampling(self) -> SamplingParams:
        """The distribution that is sampled from."""

    @property
    def leaves_per_tree(self) -> int:
        """Leaves of a full tree: the group size G of flat sampling."""

    @property
    def full_tree_tokens(self) -> int:
        """Most tokens that a tree can consist of, its prompt left out."""

    def plant(self, builder: TreeBuilder, rng: np.random.Generator, progress: float) -> Growth:
        """A problem's tree, nothing sampled yet; `progress` is the share of the run that is done, for schedules."""


@dataclass(frozen=True, kw_only=True)
class SamplerOptions(Options):
    """Options that every sampler has.

    Raises:
        ValueError: a value is outside its range.
    """

    section: ClassVar[str] = "sampler"

    temperature: TemperatureOrGreedy = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: NucleusShare = 1.0
    """Nucleus sampling: the smallest set of tokens with this probability; 1 switches it off."""
    top_k: CountOrOff = 0
    """Only the k most probable tokens; 0 switches it off."""
    stopping: StopRules = field(default_factory=StopRules)
    """When a path ends, beyond the end-of-text token and the limits."""

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(self.temperature, self.top_p, self.top_k)


__all__ = ["Extend", "Growth", "Sampler", "SamplerOptions", "Stop"]

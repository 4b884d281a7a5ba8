"""A full N-ary tree of token segments per problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..builder import TreeBuilder
from ..tree import ROOT, Stop
from .base import MOST_LEAVES, Extend, Growth, Leaves, Levels, SamplerOptions, Tokens


@dataclass(frozen=True, kw_only=True)
class Nary(SamplerOptions):
    """Sample a full tree: `branching` continuations of the prompt, and of every segment that is still open.

    A segment that ends (end of text, answer, a limit) is a leaf at once, whatever its level.

    With `continuation` (the released code of TreeRPO) an answer is sampled to its end at once and cut into the levels' segments
    afterwards; every place where a segment ends and its answer continues gets `branching` - 1 fresh answers more. The
    distribution of trees is the same; there is one request per answer instead of one per segment.

    Raises:
        ValueError: a value is outside its range.
    """

    name: ClassVar[str] = "nary"
    provides: ClassVar[frozenset[str]] = frozenset({"siblings"})

    branching: Leaves = 4
    """Children of each inner node (N)."""
    segment_tokens: tuple[Tokens, ...] = (24, 24, 80)
    """Longest segment per level, tokens; one value per level, or a single value together with `depth`."""
    depth: Levels | None = None
    """Levels of segments; by default the number of values in `segment_tokens`."""
    continuation: bool = False
    """Sample whole answers and cut them, instead of starting a request anew at every boundary."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.segment_tokens:
            raise ValueError("sampler.segment_tokens is empty; it needs one number of tokens per level")
        if self.depth is not None and len(self.segment_tokens) not in (1, self.depth):
            raise ValueError(
                f"sampler.depth is {self.depth} but sampler.segment_tokens has {len(self.segment_tokens)} values; "
                "give one value, or one per level"
            )
        if self.branching ** min(self.max_depth, 17) > MOST_LEAVES:  # 2^17 is above it already
            raise ValueError(
                f"sampler.branching = {self.branching} on {self.max_depth} levels makes {self.branching}^{self.max_depth} responses per "
                f"problem; allowed: at most {MOST_LEAVES}"
            )
        if self.continuation and (self.stopping.boxed == "alone" or self.stopping.repetition != "off"):
            raise ValueError(
                f"sampler.continuation samples whole answers, but stopping.boxed = {self.stopping.boxed!r} with stopping.repetition = "
                f"{self.stopping.repetition!r} ends them at a segment's end; use boxed 'ended' or 'off' and repetition 'off'"
            )

    @property
    def levels(self) -> tuple[int, ...]:
        """Longest segment of each level, tokens."""
        if self.depth is not None and len(self.segment_tokens) == 1:
            return self.segment_tokens * self.depth
        return self.segment_tokens

    @property
    def max_response_tokens(self) -> int:
        return sum(self.levels)

    @property
    def max_depth(self) -> int:
        return len(self.levels)

    @property
    def leaves_per_tree(self) -> int:
        return int(self.branching**self.max_depth)

    @property
    def full_tree_tokens(self) -> int:
        return sum(self.branching ** (level + 1) * tokens for level, tokens in enumerate(self.levels))

    def plant(self, builder: TreeBuilder, rng: np.random.Generator, progress: float) -> Growth:
        return _WholeAnswers(self, builder) if self.continuation else _Expansion(self, builder)


@dataclass(frozen=True, slots=True)
class _Expansion(Growth):
    options: Nary
    builder: TreeBuilder

    def start(self) -> list[Extend]:
        return [Extend(ROOT, self.options.branching, self.options.levels[0])]

    def grown(self, node: int) -> list[Extend]:
        if self.builder.stop(node) != Stop.OPEN:
            return []
        level = len(self.builder.path(node))
        return [Extend(node, self.options.branching, self.options.levels[level])]


@dataclass(frozen=True, slots=True)
class _WholeAnswers(Growth):
    options: Nary
    builder: TreeBuilder

    def start(self) -> list[Extend]:
        return [Extend(ROOT, self.options.branching, self.options.max_response_tokens)]

    def grown(self, node: int) -> list[Extend]:
        """Cut the answer that ends with `node` at the boundaries that it passes, and ask for the other children there."""
        levels, asked = self.options.levels, []
        for level in range(len(self.builder.path(node)) - 1, len(levels) - 1):
            if len(self.builder.tokens(node)) <= levels[level]:
                break
            upper = self.builder.split(node, levels[level])
            asked.append(Extend(upper, self.options.branching - 1, sum(levels[level + 1 :])))
        return asked if self.options.branching > 1 else []

"""G independent responses per problem: a tree of depth one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..builder import TreeBuilder
from ..tree import ROOT
from .base import Extend, Growth, Leaves, SamplerOptions, Tokens


@dataclass(frozen=True, kw_only=True)
class Chains(SamplerOptions):
    """Sample `group_size` independent responses for each problem.

    Raises:
        ValueError: a value is outside its range.
    """

    name: ClassVar[str] = "chains"
    provides: ClassVar[frozenset[str]] = frozenset({"siblings", "chains"})

    group_size: Leaves = 16
    """Responses per problem (G)."""
    max_response_tokens: Tokens = 128
    """Longest response, tokens."""

    @property
    def max_depth(self) -> int:
        return 1

    @property
    def leaves_per_tree(self) -> int:
        return self.group_size

    @property
    def full_tree_tokens(self) -> int:
        return self.group_size * self.max_response_tokens

    def plant(self, builder: TreeBuilder, rng: np.random.Generator, progress: float) -> _Group:
        return _Group(self)


@dataclass(frozen=True, slots=True)
class _Group(Growth):
    options: Chains

    def start(self) -> list[Extend]:
        return [Extend(ROOT, self.options.group_size, self.options.max_response_tokens)]

    def grown(self, node: int) -> list[Extend]:
        return []

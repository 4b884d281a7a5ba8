"""G independent responses per problem: a tree of depth one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..builder import TreeBuilder
from ..tree import ROOT
from .base import Extend, Growth, SamplerOptions


@dataclass(frozen=True, kw_only=True)
class Chains(SamplerOptions):
    """Sample `group_size` independent responses for each problem.

    Raises:
        ValueError: a value is outside its range.
    """

    name: ClassVar[str] = "chains"
    provides: ClassVar[frozenset[str]] = frozenset({"siblings", "chains"})

    group_size: int = 16
    """Responses per problem (G)."""
    max_response_tokens: int = 128
    """Longest response, tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group_size < 1:
            raise ValueError(f"sampler.group_size is {self.group_size}; it must be at least 1")
        if self.max_response_tokens < 1:
            raise ValueError(f"sampler.max_response_tokens is {self.max_response_tokens}; it must be at least 1")

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

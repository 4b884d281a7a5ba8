"""Group-relative credit: every leaf of a tree against the mean of all its leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from ..options import Options
from ..tree import Tree
from .base import Credit, path_rows

EPS = 1e-6


@dataclass(frozen=True)
class Group(Options):
    """A_i = (R_i - mean R) / (std R + 1e-6), the same on every token of response i (GRPO, arXiv 2402.03300, eq. 3).

    Ungraded leaves (NaN) are left out of mean, std and training. A single graded leaf gets 0.
    """

    name: ClassVar[str] = "group"
    section: ClassVar[str] = "credit"

    std: Literal["sample", "population", "none"] = "sample"
    """Scale: unbiased std (as the common implementations), population std, or no scaling (Dr.GRPO)."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"siblings"})

    def __call__(self, trees: Sequence[Tree]) -> list[Credit]:
        return [self._tree(tree) for tree in trees]

    def _tree(self, tree: Tree) -> Credit:
        leaves = np.flatnonzero(~np.isnan(tree.reward))
        if len(leaves) == 0:
            return Credit.empty(tree)
        reward = tree.reward[leaves]
        centred = reward - reward.mean()
        if self.std == "none" or len(leaves) == 1:
            return path_rows(tree, leaves.tolist(), centred.tolist())
        scale = reward.std(ddof=1 if self.std == "sample" else 0) + EPS
        return path_rows(tree, leaves.tolist(), (centred / scale).tolist())

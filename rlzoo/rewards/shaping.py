"""From verdict to reward: what credit sees. Metrics and filters look at `Tree.correct` instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..tree import Tree


@dataclass(frozen=True)
class Outcome:
    """Reward of the outcome alone."""

    right: float = 1.0
    """Reward of a right answer."""
    wrong: float = 0.0
    """Reward of a wrong, unparsable or timed-out answer."""

    def __post_init__(self) -> None:
        if not self.right > self.wrong:
            raise ValueError(f"shaping.right = {self.right} must be larger than shaping.wrong = {self.wrong}")

    @property
    def provides(self) -> frozenset[str]:
        return frozenset({"rewards in [0,1]"}) if self.wrong >= 0 and self.right <= 1 else frozenset()

    def __call__(self, tree: Tree, correct: Sequence[float]) -> Tree:
        """`tree` with rewards; `correct` [leaves] is 1 right, 0 wrong, NaN where the grader itself failed."""
        right = np.asarray(correct, np.float64)
        reward = np.where(np.isnan(right), np.nan, np.where(right > 0, self.right, self.wrong))
        leaves = [int(leaf) for leaf in tree.leaves]
        return tree.with_rewards(dict(zip(leaves, reward.tolist(), strict=True)), dict(zip(leaves, right.tolist(), strict=True)))

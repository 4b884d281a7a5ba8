"""From verdict to reward: what credit sees. Metrics and filters look at `Tree.correct` instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np

from ..options import CountOrOff, Options, Within
from ..tree import Tree

Reward = Annotated[float, Within(-1e6, 1e6)]


@dataclass(frozen=True)
class Outcome(Options):
    """Reward of the outcome, less a penalty for responses that come close to the length limit (DAPO, arXiv 2503.14476, eq. 13).

    Raises:
        ValueError: a value is outside its range.
    """

    section: ClassVar[str] = "shaping"

    right: Reward = 1.0
    """Reward of a right answer."""
    wrong: Reward = 0.0
    """Reward of a wrong, unparsable or timed-out answer."""

    overlong_tokens: CountOrOff = 0
    """Tokens before the sampler's longest response over which a penalty rises from 0 to `overlong_factor`; 0 switches it off."""
    overlong_factor: Annotated[float, Within(0, 1e6)] = 1.0
    """Penalty of a response of full length (arXiv 2503.14476, eq. 13)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.right > self.wrong:
            raise ValueError(f"shaping.right = {self.right} must be larger than shaping.wrong = {self.wrong}")

    @property
    def provides(self) -> frozenset[str]:
        penalty = self.overlong_factor if self.overlong_tokens else 0.0
        return frozenset({"rewards in [0,1]"}) if self.wrong >= penalty and self.right <= 1 else frozenset()

    def __call__(self, tree: Tree, correct: Sequence[float], max_response_tokens: int) -> Tree:
        """`tree` with rewards; `correct` [leaves] is 1 right, 0 wrong, NaN where the grader itself failed.

        The longest response that the sampler allows, `max_response_tokens`, is where the overlong penalty is full.
        """
        right = np.asarray(correct, np.float64)
        reward = np.where(np.isnan(right), np.nan, np.where(right > 0, self.right, self.wrong))
        if self.overlong_tokens:
            over = tree.response_lengths() - (max_response_tokens - self.overlong_tokens)
            reward = reward - np.maximum(over / self.overlong_tokens, 0.0) * self.overlong_factor
        leaves = [int(leaf) for leaf in tree.leaves]
        return tree.with_rewards(dict(zip(leaves, reward.tolist(), strict=True)), dict(zip(leaves, right.tolist(), strict=True)))

"""Which groups and rows are left out of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..options import CountOrOff, Options
from ..tree import Stop, Tree
from .base import Credit

TRUNCATED = (Stop.LENGTH, Stop.DEPTH, Stop.REPETITION)


@dataclass(frozen=True)
class GroupFilter(Options):
    """What is dropped and refilled."""

    section: ClassVar[str] = "filter"

    drop_dead: bool = True
    """Drop trees whose graded leaves are all right or all wrong: they carry no signal."""
    refill_rounds: CountOrOff = 0
    """Times that dropped trees are replaced by new problems within a step; 0 trains on what is left."""
    mask_truncated: bool = False
    """Leave responses that were cut short (length, depth, repetition) out of the loss; their rewards still count in baselines."""

    def keeps(self, tree: Tree) -> bool:
        """Whether a graded tree may be trained on. Looks at right/wrong, not at the shaped reward."""
        graded = tree.correct[~np.isnan(tree.correct)]
        return len(graded) > 0 and (not self.drop_dead or bool((graded != graded[0]).any()))

    def mask(self, trees: Sequence[Tree], credits: Sequence[Credit]) -> list[Credit]:
        """Credits without the rows that end in a truncated response (if asked for)."""
        if not self.mask_truncated:
            return list(credits)
        return [_without_truncated(tree, credit) for tree, credit in zip(trees, credits, strict=True)]


def _without_truncated(tree: Tree, credit: Credit) -> Credit:
    """A row goes if its last node is a leaf that was cut short; rows of inner nodes stay."""
    last = np.zeros(len(credit.row_leaf), np.int32)
    np.maximum.at(last, credit.row, credit.node)  # parents precede children, so the deepest node of a row is the largest
    cut = np.isin(tree.stop[last], [int(s) for s in TRUNCATED]) & np.isin(last, tree.leaves)
    return credit.without_rows(cut) if cut.any() else credit

"""Sibling-relative credit: every node against the other children of its parent, on its own tokens only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np

from ..options import Options, Share
from ..tree import Float64, Tree
from .base import Credit, node_rows
from .values import branch_shares, leaf_shares, mean_of_children

EPS = 1e-6
TIE = 1e-12  # values are means of means: equal ones may differ by rounding


@dataclass(frozen=True)
class Siblings(Options):
    """A_c = (V_c - mu) / scale over the children c of one parent, mu their mean (TreeRPO, arXiv 2506.05183, eq. 4).

    V is backed up by `mean_of_children`. Groups without any difference give no row; neither do groups whose `prune_metric`
    is below `prune_tau` (eq. 1-2). Pruning a group removes the rows of its own children only; deeper groups are judged
    separately and values always use the whole tree. Ungraded children are left out. Each node is one row of weight
    `unit_weights`.

    Raises (on call):
        ValueError: a reward outside [0, 1] with a Bernoulli scale.
    """

    name: ClassVar[str] = "siblings"
    section: ClassVar[str] = "credit"

    adv_norm: Literal["bernoulli_std", "bernoulli_var", "group_std", "none"] = "bernoulli_var"
    """Scale: sqrt(mu(1-mu)), mu(1-mu) as the paper, the group's unbiased std, or 1. All but the last plus 1e-6."""
    prune_metric: Literal["std", "range", "var"] = "range"
    """What `prune_tau` is compared with: population std, max - min as the paper, or population variance of the group's values."""
    prune_tau: Share = 0.1
    """Groups below it are dropped, groups exactly at it are kept (as the released code); 0 drops exact ties only."""
    unit_weights: Literal["none", "leaves", "branches"] = "none"
    """Weight of a node's row: 1 as the paper; the share of the tree's leaves below the node; or 1 / #children multiplied down its
    path (OPTS-TTPO, arXiv 2609.40035). The last two are equal in full trees; with them a tree's gradient is its chains'."""

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"siblings", "rewards in [0,1]"} if self._bernoulli else {"siblings"})

    @property
    def _bernoulli(self) -> bool:
        return self.adv_norm.startswith("bernoulli")

    def __call__(self, trees: Sequence[Tree]) -> list[Credit]:
        return [self._tree(tree) for tree in trees]

    def _tree(self, tree: Tree) -> Credit:
        if self._bernoulli and ((tree.reward < 0) | (tree.reward > 1)).any():
            raise ValueError(
                f"credit.adv_norm = {self.adv_norm!r} needs rewards in [0,1], found {np.nanmin(tree.reward)} to {np.nanmax(tree.reward)}"
            )
        value = mean_of_children(tree)
        nodes: list[int] = []
        advantages: list[float] = []
        for parent in range(tree.nodes):
            group = [c for c in tree.children(parent) if not np.isnan(value[c])]
            if group and not self._pruned(value[group]):
                nodes += group
                advantages += self._advantages(value[group]).tolist()
        if not nodes:
            return Credit.empty(tree)
        credit = node_rows(tree, nodes, advantages)
        if self.unit_weights == "none":
            return credit
        shares = leaf_shares(tree) if self.unit_weights == "leaves" else branch_shares(tree)
        return replace(credit, row_weight=shares[nodes])

    def _pruned(self, values: Float64) -> bool:
        spread = float(values.max() - values.min())
        metric = {"std": values.std(), "range": spread, "var": values.var()}[self.prune_metric]
        return spread <= TIE or bool(metric < self.prune_tau - TIE)

    def _advantages(self, values: Float64) -> Float64:
        mu = values.mean()
        bernoulli = mu * (1 - mu)
        scale = {
            "bernoulli_std": np.sqrt(max(bernoulli, 0.0)) + EPS,
            "bernoulli_var": bernoulli + EPS,
            "group_std": values.std(ddof=1) + EPS,
            "none": 1.0,
        }[self.adv_norm]
        advantages: Float64 = (values - mu) / scale
        return advantages

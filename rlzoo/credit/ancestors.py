"""Ancestor-relative credit: every leaf against the leaves below each of its ancestors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..options import Options, Share
from ..tree import ROOT, Float64, Int32, Int64, Tree
from .base import Credit, path_rows
from .values import mean_of_children
from .whitening import whiten

Bool = NDArray[np.bool_]


@dataclass(frozen=True)
class Ancestors(Options):
    """a_i = sum_j w_j (R_i - mean R over G_j) / sum_j w_j, G_j the graded leaves below the ancestor of leaf i at depth j
    (arXiv 2508.17445, eq. 5-7, and its released code at f055523).

    At level leaf G_j is the root's group, always, and each deeper one of at least two leaves; a_i stands on every token of
    response i. A tree with a single graded leaf has root mean 0, so that a_i = R_i, as released; without any group a_i = 0.

    At level segment (`tree_segment_reinforce_plus_plus_baseline` of the released code, with weighting group_size and repeated
    groups) all groups count, those of one leaf too. V(leaf) = a_i, V(node) = mean of its children's V, V(root) = 0, and node
    n has A(n) = V(n) - V(parent) on its own tokens as recorded. Rows are whole paths at both levels: a shared token enters
    once per leaf through it.

    Then all is whitened over the response tokens of the batch. Ungraded leaves (NaN) are in no group and no row.
    """

    name: ClassVar[str] = "ancestors"
    section: ClassVar[str] = "credit"

    weighting: Literal["average", "group_size"] = "average"
    """Weight of a group: 1 (eq. 5) or its number of leaves (eq. 6)."""
    repeat_groups: bool = False
    """Count the same leaves again at each depth of an unbranched chain, as released; else each set of leaves counts once."""
    reject_zero_std: bool = False
    """Leave out groups below the root whose rewards are all equal (eq. 7)."""
    include_root: bool = True
    """Count the group of all leaves; without it a set of leaves equal to it is left out too, unless groups repeat."""
    levels: Literal["all", "root"] = "all"
    """Groups of all ancestors, or the root's alone."""
    level: Literal["leaf", "segment", "siblings"] = "leaf"
    """One advantage per response; one per segment; or one per segment from raw rewards (no groups), values standardised among
    siblings first (the released code's `spo`, there without whitening)."""
    eta: Share = 0.0
    """Level segment: A(n) = V(n) - eta^(L - depth of n) V(parent), L the nodes of the row's path with the root; 0 switches it off."""
    whitening: Literal["batch", "none"] = "batch"
    """Mean 0 and variance 1 over the response tokens of the batch, or left as it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels == "root" and not self.include_root:
            raise ValueError("credit.levels = 'root' leaves no group with credit.include_root = false")
        if self.eta and self.level != "segment":
            raise ValueError(f"credit.eta = {self.eta} needs credit.level = 'segment'")

    @property
    def needs(self) -> frozenset[str]:
        """Siblings, but where a lone response keeps its reward, which is compared with the batch only."""
        alone = self.level == "siblings" or (self.level == "leaf" and self.include_root)
        return frozenset() if alone else frozenset({"siblings"})

    def __call__(self, trees: Sequence[Tree]) -> list[Credit]:
        credits = [self._tree(tree) for tree in trees]
        return whiten(credits) if self.whitening == "batch" else credits

    def _tree(self, tree: Tree) -> Credit:
        graded = np.flatnonzero(~np.isnan(tree.reward))
        if len(graded) == 0:
            return Credit.empty(tree)
        relative = tree.reward[graded] if self.level == "siblings" else self._relative(tree, graded)
        credit = path_rows(tree, graded.tolist(), relative.tolist())
        return credit if self.level == "leaf" else self._by_segment(tree, graded, relative, credit)

    def _relative(self, tree: Tree, graded: Int64) -> Float64:
        """a_i of the graded leaves, float64 [graded]."""
        size, mean, mixed = _groups(tree, graded)
        if self.level == "leaf" and len(graded) == 1:
            mean[ROOT] = 0.0
        weight = size.astype(np.float64) if self.weighting == "group_size" else np.ones(tree.nodes)
        weight[~self._counted(tree, size, mixed)] = 0.0
        leaves, parents = tree.leaves[graded], tree.parent
        total, centre = _down(weight, parents)[leaves], _down(weight * mean, parents)[leaves]
        grouped = total > 0
        relative: Float64 = np.where(grouped, tree.reward[graded] - centre / np.where(grouped, total, 1.0), 0.0)
        return relative

    def _counted(self, tree: Tree, size: Int64, mixed: Bool) -> Bool:
        """Which nodes' groups count, bool [nodes]."""
        counted = size >= (2 if self.level == "leaf" else 1)
        if self.reject_zero_std:
            counted &= mixed
        if not self.repeat_groups:  # a group lies within its parent's, so that equal sizes mean equal groups
            counted[1:] &= size[1:] != size[tree.parent[1:]]
        if self.levels == "root":
            counted[:] = False
        counted[ROOT] = self.include_root
        return counted

    def _by_segment(self, tree: Tree, graded: Int64, relative: Float64, credit: Credit) -> Credit:
        leaf_value = np.full(len(tree.leaves), np.nan)
        leaf_value[graded] = relative
        value = mean_of_children(tree, leaf_value)
        if self.level == "siblings":
            value = _standardised(tree, value)
        value[ROOT] = 0.0
        before = value[tree.parent[credit.node]]
        if self.eta:
            nodes = np.bincount(credit.row) + 1  # the root too
            before = before * self.eta ** (nodes[credit.row] - tree.depth[credit.node])
        return replace(credit, advantage=value[credit.node] - before)


def _standardised(tree: Tree, value: Float64) -> Float64:
    """Values minus their siblings' mean, over the siblings' population std (equal ones: 0); a lone child keeps its own."""
    out = value.copy()
    for node in range(tree.nodes):
        group = [c for c in tree.children(node) if not np.isnan(value[c])]
        if len(group) > 1:
            std = value[group].std()
            out[group] = 0.0 if np.isclose(std, 0) else (value[group] - value[group].mean()) / std
    return out


def _down(values: Float64, parents: Int32) -> Float64:
    """Sum of `values` [nodes] over every node and its ancestors."""
    sums, above = values.tolist(), parents.tolist()
    for node in range(1, len(sums)):  # parents precede children
        sums[node] += sums[above[node]]
    return np.array(sums, np.float64)


def _groups(tree: Tree, graded: Int64) -> tuple[Int64, Float64, Bool]:
    """Per node, over the graded leaves at or below it: their number, their mean reward (0 if none), whether rewards differ."""
    enter, leave = tree.intervals
    order = np.argsort(enter[tree.leaves[graded]])
    position, reward = enter[tree.leaves[graded]][order], tree.reward[graded][order]
    first, last = np.searchsorted(position, enter), np.searchsorted(position, leave)  # leaves below a node are neighbours
    size = (last - first).astype(np.int64)
    total = np.concatenate([[0.0], np.cumsum(reward)])
    changes = np.concatenate([[0], np.cumsum(reward[1:] != reward[:-1])])  # changes[k]: between the first k + 1 leaves
    mixed = (size > 1) & (changes[np.maximum(last - 1, 0)] > changes[np.minimum(first, len(reward) - 1)])
    mean = (total[last] - total[first]) / np.maximum(size, 1)
    return size, mean, mixed

"""What a credit function returns: terms, rows, and a dense view for tests and viewers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from ..tree import Float64, Int32, Tree


@dataclass(frozen=True, eq=False)
class Credit:
    """The credit of one tree.

    Term k says: tokens [start[k], stop[k]) of node[k], as part of row[k], have advantage[k]. A row is the unit of
    per-response statistics: a whole path for leaf-level algorithms, one node for node-level ones. Advantage 0 is trained
    (it counts in denominators, KL and entropy); no term counts nowhere. Values are final.

    Shapes: row, node, start, stop, advantage [terms]; row_leaf [rows] (index into tree.leaves of the row's first leaf in
    creation order), row_weight [rows]; token_mask bool [tokens of the tree] or None (all count).
    """

    row: Int32
    node: Int32
    start: Int32
    stop: Int32
    advantage: Float64
    row_leaf: Int32
    row_weight: Float64
    shape: tuple[int, int]  # leaves, nodes
    token_mask: NDArray[np.bool_] | None = None

    def dense(self) -> Float64:
        """Node-constant view, float64 [leaves, nodes]; NaN where there is no term. A node-level row is filed under its
        first leaf in creation order.

        Raises:
            ValueError: the terms of a node differ within the node, so that no node-constant view exists.
        """
        view = np.full(self.shape, np.nan)
        for r, n, a in zip(self.row, self.node, self.advantage, strict=True):
            leaf = self.row_leaf[r]
            if not np.isnan(view[leaf, n]) and view[leaf, n] != a:
                raise ValueError(f"node {int(n)} has more than one advantage in row {int(r)}")
            view[leaf, n] = a
        return view

    def without_rows(self, cut: NDArray[np.bool_]) -> Credit:
        """The credit without the rows where `cut` (bool [rows]), the others numbered anew in their order."""
        number = np.cumsum(~cut) - 1
        terms = ~cut[self.row]
        return replace(
            self,
            row=number[self.row[terms]].astype(np.int32),
            node=self.node[terms],
            start=self.start[terms],
            stop=self.stop[terms],
            advantage=self.advantage[terms],
            row_leaf=self.row_leaf[~cut],
            row_weight=self.row_weight[~cut],
        )

    @classmethod
    def empty(cls, tree: Tree) -> Credit:
        """No term at all: the tree is left out of training."""
        none = np.zeros(0, np.int32)
        return cls(none, none, none, none, np.zeros(0), none, np.zeros(0), (len(tree.leaves), tree.nodes))


class CreditFunction(Protocol):
    """Who deserves what. A frozen dataclass of options. Pure: numpy in, numpy out, the whole batch at once."""

    name: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]:
        """What it requires of the other parts, e.g. "rewards in [0,1]", "siblings", "entropy"."""

    def __call__(self, trees: Sequence[Tree]) -> list[Credit]: ...


def path_rows(tree: Tree, leaves: Sequence[int], advantages: Sequence[float]) -> Credit:
    """One row per leaf of `leaves` (indices into tree.leaves): its whole path with one advantage."""
    row, node, advantage = [], [], []
    for r, (leaf, a) in enumerate(zip(leaves, advantages, strict=True)):
        for n in tree.path(int(tree.leaves[leaf])):
            row.append(r)
            node.append(n)
            advantage.append(a)
    return _credit(tree, row, node, advantage, leaves)


def node_rows(tree: Tree, nodes: Sequence[int], advantages: Sequence[float]) -> Credit:
    """One row per node of `nodes`: the node alone with its advantage, filed under its first leaf."""
    index = {int(leaf): i for i, leaf in enumerate(tree.leaves)}
    first = [index[int(tree.leaves_below(n)[0])] for n in nodes]
    return _credit(tree, list(range(len(nodes))), list(nodes), list(advantages), first)


def _credit(tree: Tree, row: list[int], node: list[int], advantage: list[float], row_leaf: Sequence[int]) -> Credit:
    nodes = np.asarray(node, np.int32)
    return Credit(
        row=np.asarray(row, np.int32),
        node=nodes,
        start=np.zeros(len(nodes), np.int32),
        stop=tree.lengths[nodes].astype(np.int32),
        advantage=np.asarray(advantage, np.float64),
        row_leaf=np.asarray(row_leaf, np.int32),
        row_weight=np.ones(len(row_leaf)),
        shape=(len(tree.leaves), tree.nodes),
    )

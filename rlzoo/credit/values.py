"""Rewards backed up a tree."""

from __future__ import annotations

import math

import numpy as np

from ..tree import ROOT, Float64, Tree


def mean_of_children(tree: Tree, leaf_value: Float64 | None = None) -> Float64:
    """Value of every node, float64 [nodes]: a leaf's reward (or its `leaf_value` [leaves]); else the plain mean over
    its children's values.

    An early leaf thus weighs as much as a sibling with many leaves below it (arXiv 2506.05183, section 3.1). Children without
    value (ungraded, NaN) are left out; a node with none left is NaN. Probes are left out.
    """
    value = np.full(tree.nodes, np.nan)
    value[tree.leaves] = tree.reward if leaf_value is None else leaf_value
    values, parents = value.tolist(), tree.parent.tolist()  # plain numbers: a loop over arrays is ten times slower
    total, count = [0.0] * tree.nodes, [0] * tree.nodes
    for node in range(tree.nodes - 1, ROOT - 1, -1):
        if count[node]:
            values[node] = total[node] / count[node]
        if node != ROOT and not math.isnan(values[node]):
            total[parents[node]] += values[node]
            count[parents[node]] += 1
    return np.array(values, np.float64)


def leaf_shares(tree: Tree) -> Float64:
    """Share of the tree's leaves at or below each node, float64 [nodes]; 0 for probes."""
    count = np.zeros(tree.nodes)
    count[tree.leaves] = 1.0
    for node in range(tree.nodes - 1, ROOT, -1):  # parents precede children
        count[tree.parent[node]] += count[node]
    return count / max(1, len(tree.leaves))


def branch_shares(tree: Tree) -> Float64:
    """1 / #children, multiplied over the path from the prompt to each node, float64 [nodes]; 0 for probes (OPTS-TTPO's branch
    aggregation, arXiv 2609.40035). The chance that a walk which picks a child evenly at every fork comes by the node."""
    share = np.zeros(tree.nodes)
    share[ROOT] = 1.0
    for node in range(tree.nodes):
        children = tree.children(node)
        share[children] = share[node] / max(1, len(children))
    return share

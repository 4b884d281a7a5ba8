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

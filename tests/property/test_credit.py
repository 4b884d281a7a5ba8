"""Invariants of credit on random trees, over every registered algorithm where they hold for all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from rlzoo import registry
from rlzoo.algorithm import load
from rlzoo.credit.values import mean_of_children
from rlzoo.tree import ROOT, Segment, Tree

BINARY = st.sampled_from([0.0, 1.0])


@st.composite
def trees(draw, rewards=BINARY):
    parents = [draw(st.integers(0, i)) for i in range(draw(st.integers(1, 14)))]
    segments = [Segment(p, draw(st.lists(st.integers(0, 5), min_size=0, max_size=3))) for p in parents]
    inner = set(parents)
    return Tree.from_segments([1], segments, {n: draw(rewards) for n in range(1, len(segments) + 1) if n not in inner})


def permuted(tree: Tree, order: np.ndarray) -> tuple[Tree, np.ndarray]:
    """The same tree with siblings created in another order, and new[old node]."""
    new = np.zeros(tree.nodes, int)
    segments: list[Segment] = []
    stack = [ROOT]
    while stack:
        node = stack.pop(0)
        for child in sorted(tree.children(node), key=lambda c: order[c]):
            segments.append(Segment(int(new[node]), tree.node_tokens(child).tolist()))
            new[child] = len(segments)
            stack.append(child)
    rewards = {int(new[leaf]): float(r) for leaf, r in zip(tree.leaves, tree.reward, strict=True)}
    return Tree.from_segments(tree.prompt.tolist(), segments, rewards), new


def by_node(credit):
    return sorted(
        zip(credit.node.tolist(), credit.start.tolist(), credit.stop.tolist(), np.round(credit.advantage, 9).tolist(), strict=True)
    )


@pytest.mark.parametrize("name", registry.names("algorithm"))
@given(tree=trees(), data=st.data())
def test_permuting_siblings_permutes_credit(name, tree, data):
    order = np.array(data.draw(st.permutations(range(tree.nodes))))
    other, new = permuted(tree, order)
    algorithm = load(name)
    a, b = algorithm.credit([tree])[0], algorithm.credit([other])[0]
    moved = sorted((int(new[n]), s, e, v) for n, s, e, v in by_node(a))
    assert_allclose(np.array(moved, float).reshape(-1, 4), np.array(by_node(b), float).reshape(-1, 4), atol=2e-9)


@pytest.mark.parametrize("name", registry.names("algorithm"))
@given(tree=trees(rewards=st.sampled_from([0.0, 1.0, float("nan")])))
def test_credit_is_well_formed(name, tree):
    credit = load(name).credit([tree])[0]
    assert len({len(a) for a in (credit.row, credit.node, credit.start, credit.stop, credit.advantage)}) == 1
    assert len(credit.row_leaf) == len(credit.row_weight) and np.isfinite(credit.advantage).all()
    assert set(credit.row.tolist()) <= set(range(len(credit.row_leaf)))
    assert (credit.node > 0).all() and (credit.start <= credit.stop).all() and (credit.stop <= tree.lengths[credit.node]).all()
    assert credit.dense().shape == (len(tree.leaves), tree.nodes)
    ungraded = np.isnan(tree.reward)
    for leaf in tree.leaves[ungraded]:
        assert leaf not in credit.node


@given(tree=trees(rewards=st.floats(0, 1)), norm=st.sampled_from(["bernoulli_std", "bernoulli_var", "group_std", "none"]))
def test_sibling_credits_sum_to_zero(tree, norm):
    credit = load("treerpo", adv_norm=norm, prune_tau=0.0).credit([tree])[0]
    total = np.zeros(tree.nodes)
    size = np.zeros(tree.nodes)
    for node, advantage in zip(credit.node, credit.advantage, strict=True):
        total[tree.parent[node]] += advantage
        size[tree.parent[node]] = max(size[tree.parent[node]], abs(advantage))
    assert (np.abs(total) <= 1e-9 * np.maximum(1, size)).all()


@given(tree=trees(rewards=st.floats(0, 1)))
def test_credits_of_a_group_sum_to_zero_over_leaves(tree):
    credit = load("grpo").credit([tree])[0]
    leaf_value = {int(credit.row_leaf[r]): a for r, a in zip(credit.row, credit.advantage, strict=True)}
    assert abs(sum(leaf_value.values())) <= 1e-7 * max(1.0, max(map(abs, leaf_value.values())))


@given(tree=trees(rewards=st.floats(0, 1)))
def test_value_is_the_mean_of_the_children(tree):
    value = mean_of_children(tree)
    for node in range(tree.nodes):
        if tree.children(node):
            assert value[node] == pytest.approx(np.mean([value[c] for c in tree.children(node)]))

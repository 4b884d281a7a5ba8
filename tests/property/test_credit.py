"""Invariants of credit on random trees, over every registered algorithm where they hold for all."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from rlzoo import registry
from rlzoo.algorithm import load
from rlzoo.credit.ancestors import Ancestors
from rlzoo.credit.values import mean_of_children
from rlzoo.tree import ROOT, Segment, Tree
from tests.released import leaf_advantages, segment_advantages

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
def test_branch_weights_make_a_tree_the_mean_of_its_walks(tree):
    """Weight x (advantage + the parent's value) of a node is what its walks' rewards add up to, a walk picking a child evenly at
    every fork: REINFORCE of those walks, with the parent's value as the baseline (OPTS-TTPO's theorem, for any shape)."""
    credit = load("treerpo", adv_norm="none", prune_tau=0.0, unit_weights="branches").credit([tree])[0]
    value = mean_of_children(tree)
    chance = {int(leaf): np.prod([1 / len(tree.children(int(tree.parent[n]))) for n in tree.path(int(leaf))]) for leaf in tree.leaves}
    reward = dict(zip(tree.leaves.tolist(), tree.reward.tolist(), strict=True))
    for row, node, advantage in zip(credit.row, credit.node, credit.advantage, strict=True):
        walks = sum(chance[int(leaf)] * reward[int(leaf)] for leaf in tree.leaves_below(int(node)))
        assert credit.row_weight[row] * (advantage + value[tree.parent[node]]) == pytest.approx(walks, abs=1e-12)


@given(tree=trees())
def test_leaf_weights_count_leaves(tree):
    credit = load("treerpo", unit_weights="leaves").credit([tree])[0]
    plain = load("treerpo").credit([tree])[0]
    assert (credit.node == plain.node).all() and (credit.advantage == plain.advantage).all() and (plain.row_weight == 1).all()
    for row, node in zip(credit.row, credit.node, strict=True):
        assert credit.row_weight[row] * len(tree.leaves) == pytest.approx(len(tree.leaves_below(int(node))))


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


def leaf_values(credit):
    """Advantage per leaf of a leaf-level credit, {leaf: advantage}; it must be the same on the whole path."""
    values: dict[int, float] = {}
    for r, a in zip(credit.row, credit.advantage, strict=True):
        assert values.setdefault(int(credit.row_leaf[r]), a) == a
    return values


def as_released(tree: Tree, name: str) -> list[tuple[str, float]]:
    return [("#".join([name, *map(str, tree.path(int(n)))]), float(r)) for n, r in zip(tree.leaves, tree.reward, strict=True)]


batches = st.lists(trees(rewards=st.sampled_from([-1.0, 0.0, 0.3, 1.0])), min_size=1, max_size=4)
options = st.fixed_dictionaries(
    {
        "weighting": st.sampled_from(["average", "group_size"]),
        "repeat_groups": st.booleans(),
        "reject_zero_std": st.booleans(),
        "include_root": st.booleans(),
    }
)


@given(batch=batches, chosen=options)
def test_ancestors_equal_the_released_arithmetic(batch, chosen):
    leaves = [leaf for i, tree in enumerate(batch) for leaf in as_released(tree, f"q{i}")]
    short = {"weighting": "weighting", "repeat_groups": "repeat", "reject_zero_std": "reject", "include_root": "root"}
    ours = [a for credit in Ancestors(**chosen, whitening="none")(batch) for _, a in sorted(leaf_values(credit).items())]
    assert_allclose(ours, leaf_advantages(leaves, **{short[k]: v for k, v in chosen.items()}), atol=1e-12)


@given(batch=batches, eta=st.sampled_from([0.0, 0.5, 1.0]))
def test_ancestors_by_segment_equal_the_released_arithmetic(batch, eta):
    leaves = [leaf for i, tree in enumerate(batch) for leaf in as_released(tree, f"q{i}")]
    credits = Ancestors(level="segment", weighting="group_size", repeat_groups=True, eta=eta, whitening="none")(batch)
    ours = [
        credit.dense()[i, tree.path(int(leaf))] for tree, credit in zip(batch, credits, strict=True) for i, leaf in enumerate(tree.leaves)
    ]
    for own, wanted in zip(ours, segment_advantages(leaves, eta=eta), strict=True):
        assert_allclose(own, wanted, atol=1e-12)


@given(tree=trees(rewards=st.floats(-1, 1)))
def test_each_group_of_leaves_sums_to_zero(tree):
    """A leaf's weights differ from its neighbour's, so that only single groups cancel: the root's, and every pair of leaves that
    are alone below one parent, against that parent's group."""
    if len(tree.leaves) > 1:
        assert sum(leaf_values(Ancestors(levels="root", whitening="none")([tree])[0]).values()) == pytest.approx(0, abs=1e-9)
    both, root = (leaf_values(Ancestors(levels=levels, whitening="none")([tree])[0]) for levels in ("all", "root"))
    index = {int(leaf): i for i, leaf in enumerate(tree.leaves)}
    for node in range(1, tree.nodes):
        group = [index[int(leaf)] for leaf in tree.leaves_below(node)]
        if len(group) > 1 and all(tree.parent[tree.leaves[i]] == node for i in group) and tree.parent[node] == ROOT:
            weight = 1 if len(group) == len(index) else 2  # the root's group again: once
            assert sum(both[i] * weight - root[i] for i in group) == pytest.approx(0, abs=1e-9)


@given(batch=batches, level=st.sampled_from(["leaf", "segment"]))
def test_whitened_tokens_have_mean_zero_and_variance_one(batch, level):
    raw, final = (Ancestors(level=level, whitening=how)(batch) for how in ("none", "batch"))
    before, after = (np.concatenate([np.repeat(c.advantage, c.stop - c.start) for c in credits]) for credits in (raw, final))
    if len(before) == 0:
        return
    assert after.mean() == pytest.approx(0, abs=1e-9)
    if len(before) > 1 and before.var() > 1e-4:  # so that the 1e-8 in the root is below 1e-4 of it
        assert after.var(ddof=1) == pytest.approx(1, abs=1e-4)
        assert (np.diff(after[np.argsort(before)]) >= -1e-9).all()  # the order stays, rounding apart


@given(batch=st.lists(trees(), min_size=1, max_size=4), chosen=options, level=st.sampled_from(["leaf", "segment"]))
def test_right_and_wrong_as_0_1_or_as_plus_minus_1_give_the_same_credit(batch, chosen, level):
    """A single leaf keeps its reward, as released, and is the exception."""
    batch = [tree for tree in batch if len(tree.leaves) > 1]
    signed = [tree.with_rewards({int(n): 2 * float(r) - 1 for n, r in zip(tree.leaves, tree.reward, strict=True)}) for tree in batch]
    ours, other = (Ancestors(**chosen, level=level)(b) for b in (batch, signed))
    raw = Ancestors(**chosen, level=level, whitening="none")(batch)
    tokens = np.concatenate([np.zeros(0), *(np.repeat(c.advantage, c.stop - c.start) for c in raw)])
    if len(tokens) > 1 and tokens.var(ddof=1) > 1e-4:
        for a, b in zip(ours, other, strict=True):
            assert_allclose(a.advantage, b.advantage, rtol=1e-4, atol=1e-9)


@given(tree=trees(rewards=st.sampled_from([-1.0, 0.0, 1.0])), chosen=options, shift=st.floats(-3, 3))
def test_a_constant_added_to_all_rewards_changes_nothing(tree, chosen, shift):
    if len(tree.leaves) > 1:
        shifted = tree.with_rewards({int(n): float(r) + shift for n, r in zip(tree.leaves, tree.reward, strict=True)})
        a, b = (Ancestors(**chosen | {"reject_zero_std": False}, whitening="none")([t])[0] for t in (tree, shifted))
        assert_allclose(a.advantage, b.advantage, atol=1e-9)

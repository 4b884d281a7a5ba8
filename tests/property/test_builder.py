"""Trees and their builder: growing, cutting, merging and freezing never change what a path says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlzoo.builder import TreeBuilder
from rlzoo.tree import ROOT, Role, Segment, Stop, Tree

TOKENS = st.lists(st.integers(0, 3), max_size=5)  # few ids, so that prefixes coincide


@st.composite
def builders(draw: Any) -> TreeBuilder:
    builder = TreeBuilder(draw(st.lists(st.integers(0, 9), min_size=1, max_size=3)))
    roles = {ROOT: Role.TRAINED}
    for _ in range(draw(st.integers(0, 12))):
        parent = draw(st.sampled_from(sorted(roles)))
        role = Role.PROBE if roles[parent] == Role.PROBE or draw(st.integers(0, 5)) == 0 else Role.TRAINED
        tokens = draw(TOKENS)
        logprobs = [-0.25 * t - 0.5 for t in tokens]
        roles[builder.add(parent, tokens, logprobs, draw(st.sampled_from(list(Stop))), role)] = role
    return builder


def ends(tree: Tree) -> list[tuple[Any, ...]]:
    """Every childless node's path: tokens, log-probs, stop and role."""
    inner = set(tree.parent[1:].tolist())
    out = []
    for node in range(1, tree.nodes):
        if node not in inner:
            logprobs = np.concatenate([tree.node_logprobs(n) for n in tree.path(node)])
            out.append((tuple(tree.path_tokens(node).tolist()), tuple(logprobs.tolist()), int(tree.stop[node]), int(tree.role[node])))
    return sorted(out)


@given(builders())
@settings(max_examples=150, deadline=None)
def test_freezing_is_topological_and_keeps_everything(builder: TreeBuilder) -> None:
    for level_order in (False, True):
        tree = builder.freeze(level_order=level_order)
        assert (tree.parent[1:] < np.arange(1, tree.nodes)).all()
        assert tree.nodes == len(builder)
        if not level_order:
            for new, old in enumerate(tree.created.tolist()):
                assert tree.node_tokens(new).tolist() == builder.tokens(old)
                assert tree.children(new, probes=True) == [tree.created.tolist().index(c) for c in sorted(builder.children(old))]
    assert ends(builder.freeze()) == ends(builder.freeze(level_order=True))
    assert (np.diff(builder.freeze(level_order=True).depth) >= 0).all()


@given(builders(), st.data())
@settings(max_examples=150, deadline=None)
def test_cutting_keeps_every_path(builder: TreeBuilder, data: Any) -> None:
    before = ends(builder.freeze())
    for _ in range(3):
        known = builder.freeze().created.tolist()[1:]
        if not known:
            return
        node = data.draw(st.sampled_from(known))
        t = data.draw(st.integers(0, len(builder.tokens(node))))
        context, whole = builder.context(node), builder.tokens(node)
        at = builder.split(node, t)
        assert builder.context(at) == context[: len(context) - len(whole) + t]
        assert builder.context(node) == context  # the node keeps its end
        assert ends(builder.freeze()) == before


@given(builders())
@settings(max_examples=200, deadline=None)
def test_merging_gives_a_prefix_tree_with_the_same_paths(builder: TreeBuilder) -> None:
    before = builder.freeze()
    builder.merge_prefixes()
    after = builder.freeze()
    assert ends(after) == ends(before)
    assert after.sampled_tokens <= before.sampled_tokens
    for node in range(after.nodes):
        for role in Role:
            firsts = [int(after.node_tokens(c)[0]) for c in after.children(node, probes=True) if after.role[c] == role and after.lengths[c]]
            assert len(firsts) == len(set(firsts))
    again = builder.freeze()
    builder.merge_prefixes()
    assert ends(builder.freeze()) == ends(again) and len(builder) == again.nodes


@given(builders())
@settings(max_examples=100, deadline=None)
def test_a_tree_describes_itself_consistently(builder: TreeBuilder) -> None:
    tree = builder.freeze()
    enter, leave = tree.intervals
    for node in range(tree.nodes):
        above = {ROOT, *tree.path(node)}
        assert above == {a for a in range(tree.nodes) if enter[a] <= enter[node] and leave[node] <= leave[a]}
        assert tree.depth[node] == len(tree.path(node))
        assert tree.starts[node] + tree.lengths[node] == len(tree.prompt) + len(tree.path_tokens(node))
        below = [leaf for leaf in tree.leaves if node in {ROOT, *tree.path(int(leaf))}]
        assert tree.leaves_below(node).tolist() == below
    assert tree.response_lengths().tolist() == [len(tree.path_tokens(int(leaf))) for leaf in tree.leaves]
    assert tree.sampled_tokens == sum(len(tree.node_tokens(n)) for n in range(1, tree.nodes))
    assert tree.unrolled_tokens == tree.response_lengths().sum()
    assert all(tree.role[leaf] == Role.TRAINED and not tree.children(int(leaf)) for leaf in tree.leaves)


def test_a_cut_is_open_above_and_keeps_its_end_below() -> None:
    builder = TreeBuilder([9])
    node = builder.add(ROOT, [1, 2, 3], [-1, -2, -3], Stop.EOS)
    child = builder.add(node, [4])
    upper = builder.split(node, 2)
    assert (builder.tokens(upper), builder.stop(upper)) == ([1, 2], Stop.OPEN)
    assert (builder.tokens(node), builder.stop(node), builder.logprobs(node)) == ([3], Stop.EOS, [-3])
    assert builder.parent(node) == upper and builder.parent(child) == node
    assert builder.split(node, 0) == upper and builder.split(node, 1) == node


def test_duplicates_stay_as_empty_leaves() -> None:
    builder = TreeBuilder([9])
    for _ in range(3):
        builder.add(ROOT, [1, 2], stop=Stop.EOS)
    builder.merge_prefixes()
    tree = builder.freeze()
    assert len(tree.leaves) == 3 and tree.sampled_tokens == 2
    assert all(tree.path_tokens(int(leaf)).tolist() == [1, 2] and tree.stop[leaf] == Stop.EOS for leaf in tree.leaves)


def test_a_segment_in_flight_is_filled_once() -> None:
    builder = TreeBuilder([9])
    a, b = builder.add(ROOT, ()), builder.add(ROOT, ())
    builder.fill(b, [5, 6], [-1.0, -2.0], Stop.EOS)
    builder.fill(a, [7], [-1.0], Stop.OPEN)
    assert builder.freeze(level_order=True).tokens.tolist() == [9, 7, 5, 6]
    for bad, match in ((a, "not an empty leaf"), (ROOT, "not an empty leaf"), (17, "no node 17")):
        with pytest.raises(ValueError, match=match):
            builder.fill(bad, [1], [0.0], Stop.OPEN)
    c = builder.add(ROOT, ())
    with pytest.raises(ValueError, match="log-probs"):
        builder.fill(c, [1], [], Stop.OPEN)


def test_bad_growth_is_refused() -> None:
    builder = TreeBuilder([9])
    probe = builder.add(ROOT, [1], role=Role.PROBE)
    for act, match in (
        (lambda: builder.add(5, [1]), "no node 5"),
        (lambda: builder.add(ROOT, [1], [0.0, 0.0]), "log-probs"),
        (lambda: builder.add(probe, [1]), "below a probe"),
        (lambda: builder.split(ROOT, 0), "cannot cut"),
        (lambda: builder.split(probe, 2), "cannot cut"),
        (lambda: builder.split(probe, -1), "cannot cut"),
    ):
        with pytest.raises(ValueError, match=match):
            act()


def test_bad_trees_are_refused() -> None:
    tree = Tree.from_segments([1], [Segment(0, [2]), Segment(1, [3, 4]), Segment(1, [5])], {2: 1.0, 3: 0.0})
    for change, match in (
        ({"parent": np.array([-1, 0, 3, 1], np.int32)}, "node 2 has parent 3"),
        ({"parent": np.array([0, 0, 1, 1], np.int32)}, "prompt"),
        ({"offsets": np.array([0, 1, 2, 4, 4])}, "offsets"),
        ({"offsets": np.array([0, 2, 1, 4, 5])}, "offsets"),
        ({"logprobs": tree.logprobs[:-1]}, "logprobs has 4"),
        ({"entropy": np.zeros(3, np.float32)}, "entropy has 3"),
        ({"stop": np.zeros(3, np.uint8)}, "stop has 3"),
        ({"stop": np.full(4, 99, np.uint8)}, "unknown stop"),
        ({"role": np.array([0, 1, 0, 0], np.uint8)}, "below a probe"),
        ({"tokens": np.array([1, 2, 3, -4, 5], np.int32)}, "negative"),
        ({"created": np.array([0, 1, 1, 3], np.int32)}, "created"),
        ({"leaves": np.array([3, 2], np.int32)}, "leaves"),
        ({"reward": np.zeros(3)}, "2 leaves but 3 rewards"),
    ):
        with pytest.raises(ValueError, match=match):
            replace(tree, **change)
    with pytest.raises(ValueError, match="not a leaf"):
        tree.with_rewards({1: 1.0})
    with pytest.raises(ValueError, match="earlier node"):
        Tree.from_segments([1], [Segment(1, [2])])
    with pytest.raises(ValueError, match="node 1: 1 tokens but 2 log-probs"):
        Tree.from_segments([1], [Segment(0, [2], [0.0, 0.0])])

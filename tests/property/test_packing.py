"""What a pack computes, read off its arrays without a model: every trained token is predicted from exactly its path."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlzoo.training import packing
from rlzoo.training.packing import pack
from rlzoo.tree import Segment, Tree
from tests.reference import random_tree


@st.composite
def forests(draw):
    """Trees with some of their response tokens trained, and a token budget."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    trees = [random_tree(rng, nodes=draw(st.integers(1, 14)), empty=0.25) for _ in range(draw(st.integers(1, 3)))]
    density = draw(st.sampled_from([0.05, 0.5, 1.0]))
    trained = [(np.arange(len(t.tokens)) >= len(t.prompt)) & (rng.random(len(t.tokens)) < density) for t in trees]
    return trees, trained, draw(st.sampled_from([1, 8, 20, 50, 10_000]))


def context(tree, token):
    """Indices of the tokens before `token` on its path, by a walk to the root."""
    node = int(np.searchsorted(tree.offsets, token, side="right")) - 1
    before = list(range(int(tree.offsets[node]), token))
    while node != 0:
        node = int(tree.parent[node])
        before = [*range(int(tree.offsets[node]), int(tree.offsets[node + 1])), *before]
    return before


def seen(p, source):
    """(ids, positions) that the flattened slot `source` attends to, in the order of the pack's keys."""
    if p.attention is None:
        row, place = divmod(int(source), p.ids.shape[1])
        return p.ids[row, : place + 1], p.positions[row, : place + 1]
    place, start = int(p.attention.place[source]), 0
    for group in p.attention.groups:
        if place < start + group.queries.size:
            r, j = divmod(place - start, group.queries.shape[1])
            assert group.queries[r, j] == source
            keys = group.keys[r, : group.offset[r] + j + 1]
            return p.ids[0, keys], p.positions[0, keys]
        start += group.queries.size
    raise AssertionError("the slot is nobody's query")


@settings(max_examples=150, deadline=None)
@given(forests(), st.sampled_from(["packed", "unrolled"]), st.sampled_from([1, 2, 256]))
def test_every_trained_token_is_predicted_from_its_path(forest, layout, block):
    trees, trained, budget = forest
    before, packing.QUERY_BLOCK = packing.QUERY_BLOCK, block
    try:
        packs, stats = pack(trees, trained, budget, layout=layout)
    finally:
        packing.QUERY_BLOCK = before
    base = np.cumsum([0, *(len(t.tokens) for t in trees)])
    shares = np.zeros(base[-1])
    for p in packs:
        np.add.at(shares, p.target, p.share)
        for source, target, target_id in zip(p.source, p.target, p.target_ids, strict=True):
            i = int(np.searchsorted(base, target, side="right")) - 1
            tree, token = trees[i], int(target - base[i])
            path = context(tree, token)
            ids, positions = seen(p, source)
            assert target_id == tree.tokens[token]
            assert ids.tolist() == tree.tokens[path].tolist()
            assert positions.tolist() == list(range(len(path)))
    assert np.allclose(shares, np.concatenate(trained).astype(float))
    assert stats.trained == sum(int(m.sum()) for m in trained)


@settings(max_examples=100, deadline=None)
@given(forests())
def test_only_what_a_prediction_needs_is_forwarded_and_each_token_once(forest):
    trees, trained, _ = forest
    packs, stats = pack(trees, trained, 10**9)
    needed = sum(len({k for t in np.flatnonzero(mask) for k in context(tree, int(t))}) for tree, mask in zip(trees, trained, strict=True))
    assert stats.unique == stats.forwarded == needed
    assert stats.padded == 0
    assert stats.rows == stats.trees == sum(bool(m.any()) for m in trained)
    for p in packs:
        assert (np.sort(np.concatenate([g.queries.ravel() for g in p.attention.groups])[p.attention.place]) == np.arange(p.ids.size)).all()


@settings(max_examples=100, deadline=None)
@given(forests(), st.sampled_from(["packed", "unrolled"]))
def test_packs_keep_to_the_budget_and_repeat_exactly(forest, layout):
    trees, trained, budget = forest
    packs, stats = pack(trees, trained, budget, layout=layout)
    longest = max((len(context(t, int(k))) for t, m in zip(trees, trained, strict=True) for k in np.flatnonzero(m)), default=0)
    assert all(p.ids.size <= max(budget, longest) for p in packs)
    assert stats.forwarded >= stats.unique and stats.dense_pairs >= stats.visible_pairs
    again, _ = pack(trees, trained, budget, layout=layout)
    for p, q in zip(packs, again, strict=True):
        assert np.array_equal(p.ids, q.ids) and np.array_equal(p.target, q.target)


def test_a_shared_prefix_is_forwarded_once():
    tree = Tree.from_segments([1, 2, 3], [Segment(0, [4, 5]), Segment(1, [6, 7, 8]), Segment(1, [9, 10])])
    (p,), stats = pack([tree], [np.arange(10) >= 3], 100)
    assert p.ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 9]]  # a leaf's last token predicts nothing
    assert p.positions.tolist() == [[0, 1, 2, 3, 4, 5, 6, 5]]
    assert dict(zip(p.target_ids.tolist(), p.source.tolist(), strict=True)) == {4: 2, 5: 3, 6: 4, 7: 5, 8: 6, 9: 4, 10: 7}
    assert (stats.unique, stats.unrolled, stats.visible_pairs) == (8, 13, 34)


def test_what_has_no_credit_is_not_forwarded():
    tree = Tree.from_segments([1], [Segment(0, [2, 3]), Segment(0, [4]), Segment(1, [5]), Segment(1, [6, 7])])
    trained = np.isin(tree.tokens, [3, 5])
    (p,), _ = pack([tree], [trained], 100)
    assert p.ids.tolist() == [[1, 2, 3]]


@pytest.mark.parametrize(
    ("tree", "trained", "budget", "message"),
    [
        (Tree.from_segments([1, 2], [Segment(0, [3])]), [False, True, True], 10, "a token of the prompt cannot be trained"),
        (Tree.from_segments([], [Segment(0, [3])]), [True], 10, "empty prompt"),
        (Tree.from_segments([1], [Segment(0, [3])]), [False, True], 0, "token_budget is 0; it must be at least 1"),
    ],
)
def test_bad_input(tree, trained, budget, message):
    with pytest.raises(ValueError, match=message):
        pack([tree], [np.array(trained)], budget)

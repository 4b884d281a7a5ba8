"""TreePO's credit worked out by hand, and against the released code's arithmetic."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from rlzoo.algorithm import load
from rlzoo.credit.ancestors import Ancestors
from rlzoo.credit.base import node_rows, path_rows
from rlzoo.credit.group import Group
from rlzoo.credit.whitening import whiten
from rlzoo.tree import Role, Segment, Stop, Tree
from tests.released import leaf_advantages, segment_advantages, whitened

NAN = float("nan")


def grown(parents, rewards, lengths=None, roles=()):
    """Segment i below parents[i], one token each unless told; rewards {node: reward}."""
    lengths = lengths or [1] * len(parents)
    segments = [
        Segment(p, [1] * n, role=Role.PROBE if i in roles else Role.TRAINED)
        for i, (p, n) in enumerate(zip(parents, lengths, strict=True), 1)
    ]
    return Tree.from_segments([9], segments, rewards)


def fixture(rewards=(1, 0, 0, 0)):
    """Nodes 1, 2 below the prompt; leaves 3, 4 below 1 and 5, 6 below 2; node 1 has two tokens."""
    return grown([0, 0, 1, 1, 2, 2], dict(zip((3, 4, 5, 6), rewards, strict=True)), [2, 1, 1, 1, 1, 1])


def eight():
    """A full binary tree of depth 3, leaves 7 to 14."""
    parents = [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    return grown(parents, dict(zip(range(7, 15), [1, 1, -1, -1, -1, -1, -1, 1], strict=True)))


def leafwise(tree, **options):
    """Advantage per leaf, float64 [leaves], NaN without a row; whitening off unless asked for."""
    (credit,) = Ancestors(**({"whitening": "none"} | options))([tree])
    view = credit.dense()
    return np.array([view[i, leaf] for i, leaf in enumerate(tree.leaves)])


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        ("average", [0.75, 0.75, -7 / 12, -7 / 12, -5 / 12, -5 / 12, -0.75, 1.25]),
        ("group_size", [1, 1, -5 / 7, -5 / 7, -4 / 7, -4 / 7, -5 / 7, 9 / 7]),
    ],
)
def test_eight_leaves(weighting, expected):
    assert_allclose(leafwise(eight(), weighting=weighting), expected, atol=1e-12)


@pytest.mark.parametrize(
    ("weighting", "expected"), [("average", [0.625, -0.375, -0.125, -0.125]), ("group_size", [2 / 3, -1 / 3, -1 / 6, -1 / 6])]
)
def test_two_level_fixture(weighting, expected):
    assert_allclose(leafwise(fixture(), weighting=weighting), expected, atol=1e-12)


def test_one_advantage_on_the_whole_response():
    (credit,) = Ancestors(whitening="none")([fixture()])
    view = credit.dense()
    assert credit.row_leaf.tolist() == [0, 1, 2, 3] and credit.row_weight.tolist() == [1, 1, 1, 1]
    for leaf, (path, value) in enumerate((([1, 3], 0.625), ([1, 4], -0.375), ([2, 5], -0.125), ([2, 6], -0.125))):
        expected = np.full(7, NAN)
        expected[path] = value
        assert_allclose(view[leaf], expected, atol=1e-12)


def test_b7_the_root_group_is_not_lost():
    """In the released non-DAPO trainer the id lacked its first separator, so that no two trees' leaves shared a root."""
    tree = grown([0, 0, 0], {1: 1.0, 2: 0.0, 3: 0.0})  # no group but the root's
    assert_allclose(leafwise(tree), [2 / 3, -1 / 3, -1 / 3], atol=1e-12)
    assert (leafwise(fixture()) != leafwise(fixture(), include_root=False)).any()


def test_groups_of_two_trees_never_mix():
    one, other = fixture(), fixture((1, 1, 1, 0))
    both = Ancestors(whitening="none")([one, other])
    for credit, alone in zip(both, (one, other), strict=True):
        assert_allclose(credit.advantage, Ancestors(whitening="none")([alone])[0].advantage, atol=0)


def test_unbalanced_with_a_leaf_that_ended_early():
    """1 ends at once (reward 1); 2 splits into 3 (reward 0) and 4, which splits into 5 (1) and 6 (0)."""
    tree = grown([0, 0, 2, 2, 4, 4], {1: 1, 3: 0, 5: 1, 6: 0})
    # means: root 1/2, node 2 1/3, node 4 1/2; leaves in order 1, 3, 5, 6
    expected = [1 / 2, (-1 / 2 - 1 / 3) / 2, (1 / 2 + 2 / 3 + 1 / 2) / 3, (-1 / 2 - 1 / 3 - 1 / 2) / 3]
    assert_allclose(leafwise(tree), expected, atol=1e-12)
    sized = [1 / 2, (-4 / 2 - 3 / 3) / 7, (4 / 2 + 3 * 2 / 3 + 2 / 2) / 9, (-4 / 2 - 3 / 3 - 2 / 2) / 9]
    assert_allclose(leafwise(tree, weighting="group_size"), sized, atol=1e-12)


def test_a_chain_without_branches_repeats_its_group_only_if_asked():
    """0 -> 1 -> 2 -> 3, which splits into 4 (1) and 5 (0), beside the leaf 6 (0): {4, 5} stands at three depths."""
    tree = grown([0, 1, 2, 3, 3, 0], {4: 1, 5: 0, 6: 0})
    root, inner = 2 / 3, 1 / 2
    assert_allclose(leafwise(tree), [(root + inner) / 2, (-1 / 3 - inner) / 2, -1 / 3], atol=1e-12)
    assert_allclose(leafwise(tree, repeat_groups=True), [(root + 3 * inner) / 4, (-1 / 3 - 3 * inner) / 4, -1 / 3], atol=1e-12)


def test_a_chain_that_starts_at_the_root_repeats_the_root_group():
    tree = grown([0, 1, 2, 2, 4, 4], {3: 1, 5: 1, 6: -2})  # {3, 5, 6} below root, 1 and 2; {5, 6} below 4
    root, inner = [1.0, 1.0, -2.0], [0, 1.5, -1.5]
    once = [root[0], (root[1] + inner[1]) / 2, (root[2] + inner[2]) / 2]
    assert_allclose(leafwise(tree), once, atol=1e-12)
    thrice = [root[0], (3 * root[1] + inner[1]) / 4, (3 * root[2] + inner[2]) / 4]
    assert_allclose(leafwise(tree, repeat_groups=True), thrice, atol=1e-12)
    assert_allclose(leafwise(tree, include_root=False), [0, inner[1], inner[2]], atol=1e-12)  # the root's leaves go at any depth
    again = [root[0], (2 * root[1] + inner[1]) / 3, (2 * root[2] + inner[2]) / 3]
    assert_allclose(leafwise(tree, include_root=False, repeat_groups=True), again, atol=1e-12)  # only depth 0 goes


def test_groups_without_difference_can_be_rejected_below_the_root():
    tree = fixture((1, 1, 0, -1))
    assert_allclose(leafwise(tree), [3 / 8, 3 / 8, (-1 / 4 + 1 / 2) / 2, (-5 / 4 - 1 / 2) / 2], atol=1e-12)
    assert_allclose(leafwise(tree, reject_zero_std=True), [3 / 4, 3 / 4, 1 / 8, -7 / 8], atol=1e-12)
    dead = fixture((0.1, 0.1, 0.1, 0.1))  # the root's group stays, as released: all 0
    assert_allclose(leafwise(dead, reject_zero_std=True), np.zeros(4), atol=1e-15)


def test_without_the_root_group_a_leaf_without_any_group_has_zero():
    tree = grown([0, 0, 2, 2], {1: 1, 3: 1, 4: 0})
    assert_allclose(leafwise(tree, include_root=False), [0, 0.5, -0.5], atol=1e-12)
    assert_allclose(leafwise(grown([0, 0], {1: 1, 2: 0}), include_root=False), [0, 0])


def test_root_levels_are_the_mean_centred_group():
    rng = np.random.default_rng(3)
    for tree in (fixture(), eight(), grown([0, 0, 2, 2, 4, 4], dict(zip((1, 3, 5, 6), rng.normal(size=4).tolist(), strict=True)))):
        (ours,), (group,) = Ancestors(levels="root", whitening="none")([tree]), Group(std="none")([tree])
        assert_allclose(ours.dense(), group.dense(), atol=1e-12)


def test_a_single_leaf_keeps_its_reward_as_released():
    assert_allclose(leafwise(grown([0, 1], {2: -1.0})), [-1.0])
    assert_allclose(leafwise(grown([0, 1], {2: -1.0}), include_root=False), [0.0])


def test_ungraded_leaves_are_in_no_group_and_no_row():
    tree = fixture((1, NAN, 0, -1))  # root {1, 0, -1}; node 1 has one graded leaf left; node 2 {0, -1}
    expected = [1, NAN, (0 + 0.5) / 2, (-1 - 0.5) / 2]
    assert_allclose(leafwise(tree), expected, atol=1e-12)
    (credit,) = Ancestors()([tree])
    assert credit.row_leaf.tolist() == [0, 2, 3] and 4 not in credit.node
    assert len(Ancestors()([fixture((NAN,) * 4)])[0].row) == 0


def test_probes_are_in_no_group():
    parents = [0, 0, 1, 1, 2, 2]
    with_probe = grown([*parents, 1, 7], dict(zip((3, 4, 5, 6), (1, 0, 0, 0), strict=True)), roles=(7, 8))
    assert_allclose(leafwise(with_probe), [0.625, -0.375, -0.125, -0.125], atol=1e-12)
    view = Ancestors(level="segment", whitening="none")([with_probe])[0].dense()
    assert np.isnan(view[:, 7:]).all()


RELEASED = {"level": "segment", "weighting": "group_size", "repeat_groups": True, "whitening": "none"}


def test_segment_level_fixture():
    """Root mean 1/4, node 1 mean 1/2, weights 4, 2 and 1 (the leaf itself): R' = (3 + 1)/7, (-1 - 1)/7, -1/7, -1/7.
    V(1) = (4/7 - 2/7)/2 = 1/7, V(2) = -1/7."""
    view = Ancestors(**RELEASED)([fixture()])[0].dense()
    expected = np.full((4, 7), NAN)
    expected[0, [1, 3]], expected[1, [1, 4]] = [1 / 7, 3 / 7], [1 / 7, -3 / 7]
    expected[2, [2, 5]], expected[3, [2, 6]] = [-1 / 7, 0], [-1 / 7, 0]
    assert_allclose(view, expected, atol=1e-12)


def test_segment_level_average_weighting():
    """R' over root, node and leaf, a third each: (3/4 + 1/2)/3, (-1/4 - 1/2)/3, -1/12, -1/12."""
    view = Ancestors(level="segment", whitening="none")([fixture()])[0].dense()
    values = np.array([5 / 12, -3 / 12, -1 / 12, -1 / 12])
    assert_allclose(view[[0, 1, 2, 3], [3, 4, 5, 6]], values - np.repeat([1 / 12, -1 / 12], 2), atol=1e-12)
    assert_allclose(view[[0, 3], [1, 2]], [1 / 12, -1 / 12], atol=1e-12)


def test_segment_level_eta_weakens_the_parent():
    """L = 3 nodes on each path; the leaves' parents are weighted eta^(3 - 2), the root's value is 0."""
    view = Ancestors(**RELEASED, eta=0.5)([fixture()])[0].dense()
    assert_allclose(view[[0, 1, 2, 3], [3, 4, 5, 6]], [4 / 7 - 1 / 14, -2 / 7 - 1 / 14, -1 / 7 + 1 / 14, -1 / 7 + 1 / 14], atol=1e-12)
    assert_allclose(view[[0, 2], [1, 2]], [1 / 7, -1 / 7], atol=1e-12)


def test_segment_level_unbalanced_counts_repeated_single_leaves_as_released():
    """1 -> 2 is a chain of one leaf (reward 1) beside the leaf 3 (0): R' of 2 = 2 * 1/2 / (2 + 1 + 1), once: / (2 + 1)."""
    tree = grown([0, 1, 0], {2: 1, 3: 0})
    assert_allclose(Ancestors(**RELEASED)([tree])[0].dense()[[0, 0, 1], [1, 2, 3]], [1 / 4, 0, -1 / 3], atol=1e-12)
    once = Ancestors(level="segment", weighting="group_size", whitening="none")([tree])[0].dense()
    assert_allclose(once[[0, 0, 1], [1, 2, 3]], [1 / 3, 0, -1 / 3], atol=1e-12)


def test_segment_boundaries_are_those_recorded():
    """Segments of 3, 1 and 5 tokens: every token of a segment has the segment's advantage, whatever the segment length was."""
    tree = grown([0, 0, 1, 1, 2, 2], dict(zip((3, 4, 5, 6), (1, 0, 0, 0), strict=True)), [3, 1, 5, 1, 2, 1])
    (credit,) = Ancestors(**RELEASED)([tree])
    assert (credit.start == 0).all() and (credit.stop == tree.lengths[credit.node]).all()
    assert_allclose(credit.dense(), Ancestors(**RELEASED)([fixture()])[0].dense(), atol=1e-12)


def random_batch(rng, trees=5):
    """Random trees beside the same leaves as (id, reward)."""
    batch, leaves = [], []
    for t in range(trees):
        parents = [int(rng.integers(0, i + 1)) for i in range(int(rng.integers(3, 15)))]
        inner = set(parents)
        rewards = {n: float(rng.choice([-1, 0, 0.5, 1])) for n in range(1, len(parents) + 1) if n not in inner}
        tree = grown(parents, rewards, rng.integers(0, 4, len(parents)).tolist())
        batch.append(tree)
        leaves += [("#".join([f"q{t}", *map(str, tree.path(int(n)))]), rewards[int(n)]) for n in tree.leaves]
    return batch, leaves


@pytest.mark.parametrize("weighting", ["average", "group_size"])
@pytest.mark.parametrize("repeat", [True, False])
@pytest.mark.parametrize("reject", [True, False])
@pytest.mark.parametrize("root", [True, False])
def test_leaf_level_equals_the_released_arithmetic(weighting, repeat, reject, root):
    rng = np.random.default_rng(11)
    for _ in range(20):
        batch, leaves = random_batch(rng)
        wanted = leaf_advantages(leaves, weighting=weighting, repeat=repeat, reject=reject, root=root)
        ours = [leafwise(t, weighting=weighting, repeat_groups=repeat, reject_zero_std=reject, include_root=root) for t in batch]
        assert_allclose(np.concatenate(ours), wanted, atol=1e-12)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_segment_level_equals_the_released_arithmetic(eta):
    rng = np.random.default_rng(12)
    for _ in range(20):
        batch, leaves = random_batch(rng)
        wanted = iter(segment_advantages(leaves, eta=eta))
        for tree, credit in zip(batch, Ancestors(**RELEASED, eta=eta)(batch), strict=True):
            view = credit.dense()
            for i, leaf in enumerate(tree.leaves):
                assert_allclose(view[i, tree.path(int(leaf))], next(wanted), atol=1e-12)


def test_standardised_siblings_equal_the_released_arithmetic():
    rng = np.random.default_rng(14)
    for _ in range(20):
        batch, leaves = random_batch(rng)
        wanted = iter(segment_advantages(leaves, siblings=True))
        for tree, credit in zip(batch, Ancestors(level="siblings", whitening="none")(batch), strict=True):
            view = credit.dense()
            for i, leaf in enumerate(tree.leaves):
                assert_allclose(view[i, tree.path(int(leaf))], next(wanted), atol=1e-12)


def test_standardised_siblings_fixture():
    """Values 1/2 and 0 become 1 and -1; leaves 1 and 0 become 1 and -1 below the first, equal ones 0 below the second."""
    view = Ancestors(level="siblings", whitening="none")([fixture()])[0].dense()
    assert_allclose(view[[0, 2], [1, 2]], [1, -1], atol=1e-12)
    assert_allclose(view[[0, 1, 2, 3], [3, 4, 5, 6]], [0, -2, 1, 1], atol=1e-12)


@pytest.mark.parametrize("level", ["leaf", "segment", "siblings"])
def test_whitening_equals_a_plain_list_of_tokens(level):
    rng = np.random.default_rng(13)
    batch, _ = random_batch(rng)
    raw, final = Ancestors(level=level, whitening="none")(batch), Ancestors(level=level)(batch)
    tokens = []  # one entry per token of every response, shared ones again
    for tree, credit in zip(batch, raw, strict=True):
        for i, leaf in enumerate(tree.leaves):
            for node in tree.path(int(leaf)):
                tokens += [float(credit.dense()[i, node])] * len(tree.node_tokens(node))
    assert len(tokens) == sum(t.unrolled_tokens for t in batch)
    wanted = iter(whitened(tokens))
    for tree, credit in zip(batch, final, strict=True):
        for i, leaf in enumerate(tree.leaves):
            for node in tree.path(int(leaf)):
                for _ in tree.node_tokens(node):
                    assert credit.dense()[i, node] == pytest.approx(next(wanted), abs=1e-9)


def test_whitening_weighs_a_leaf_with_its_length():
    tree = grown([0, 0], {1: 1, 2: 0}, [3, 1])  # three tokens of 1/2, one of -1/2: mean 1/4, variance (3/16 + 9/16)/3 = 1/4
    assert_allclose(leafwise(tree, whitening="batch"), [0.5, -1.5], atol=1e-6)


def test_whitening_is_over_the_batch_and_shifts_dead_trees():
    live, dead = grown([0, 0], {1: 1, 2: 0}, [3, 1]), grown([0, 0], {1: 1, 2: 1}, [2, 2])
    credits = Ancestors()([live, dead])  # 3 x 1/2, 1 x -1/2, 4 x 0: mean 1/8, variance (1 - 8/64)/7 = 1/8
    assert_allclose(credits[0].advantage, np.array([3 / 8, -5 / 8]) / np.sqrt(1 / 8), atol=1e-6)
    assert_allclose(credits[1].advantage, np.array([-1 / 8, -1 / 8]) / np.sqrt(1 / 8), atol=1e-6)


def test_whitening_without_variance_gives_zeros_and_never_divides_by_zero():
    with np.errstate(all="raise"):
        assert leafwise(grown([0], {1: 1.0}, [1]), whitening="batch").tolist() == [0.0]
        assert leafwise(grown([0, 0], {1: 1.0, 2: 1.0}, [4, 2]), whitening="batch").tolist() == [0.0, 0.0]
        empty = leafwise(grown([0, 0], {1: 1.0, 2: 0.0}, [0, 0]), whitening="batch")
        assert np.isfinite(empty).all()
        assert Ancestors()([]) == [] and len(Ancestors()([fixture((NAN,) * 4)])[0].row) == 0


def test_whitening_serves_other_rows_and_refuses_token_masks():
    tree = fixture()
    nodes = whiten([node_rows(tree, [1, 3], [1.0, -2.0])])[0]  # tokens 1, 1, -2: mean 0, variance 3
    assert_allclose(nodes.advantage, np.array([1, -2]) / np.sqrt(3), atol=1e-6)
    masked = path_rows(tree, [0], [1.0])
    object.__setattr__(masked, "token_mask", np.ones(len(tree.tokens), bool))
    with pytest.raises(ValueError, match="credits with a token mask cannot be whitened"):
        whiten([masked])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "size"}, "credit.weighting is 'size'; allowed: average, group_size"),
        ({"levels": "none"}, "credit.levels is 'none'; allowed: all, root"),
        ({"level": "token"}, "credit.level is 'token'; allowed: leaf, segment, siblings"),
        ({"whitening": "tree"}, "credit.whitening is 'tree'; allowed: batch, none"),
        ({"levels": "root", "include_root": False}, "credit.levels = 'root' leaves no group with credit.include_root = false"),
        ({"eta": 0.5}, "credit.eta = 0.5 needs credit.level = 'segment'"),
        ({"level": "segment", "eta": 2.0}, "credit.eta is 2.0; allowed: a number from 0 to 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Ancestors(**options)


def test_truncated_responses_can_be_masked_after_whitening():
    tree = Tree.from_segments([9], [Segment(0, [1], stop=Stop.EOS), Segment(0, [2], stop=Stop.LENGTH)], {1: 1.0, 2: 0.0})
    algorithm = load("treepo", mask_truncated=True)
    (credit,) = algorithm.filter.mask([tree], algorithm.credit([tree]))
    assert credit.node.tolist() == [1] and credit.advantage[0] == pytest.approx(np.sqrt(0.5), abs=1e-6)

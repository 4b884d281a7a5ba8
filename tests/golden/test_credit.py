"""Credits worked out by hand. Whitening does not exist for these algorithms, so the values are final."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from rlzoo.algorithm import load
from rlzoo.tree import Segment, Stop, Tree

NAN = float("nan")


def two_level(rewards=(1, 0, 0, 0)) -> Tree:
    """Nodes 1, 2 below the prompt; leaves A=3, B=4 below 1 and C=5, D=6 below 2."""
    segments = [Segment(0, [1, 2]), Segment(0, [3]), *(Segment(p, [t], stop=Stop.EOS) for p, t in ((1, 4), (1, 5), (2, 6), (2, 7)))]
    return Tree.from_segments([9], segments, dict(zip((3, 4, 5, 6), rewards, strict=True)))


def chains(rewards) -> Tree:
    return Tree.from_segments([9], [Segment(0, [1, 2]) for _ in rewards], {i + 1: r for i, r in enumerate(rewards)})


def dense(name, tree, **options):
    return load(name, **options).credit([tree])[0].dense()


def test_treerpo_two_level_fixture():
    view = dense("treerpo", two_level())
    expected = np.full((4, 7), NAN)
    expected[0, 1], expected[2, 2] = 1.333326, -1.333326  # values 1/2 and 0: .25 / (.1875 + 1e-6)
    expected[0, 3], expected[1, 4] = 1.999992, -1.999992
    assert_allclose(view, expected, atol=5e-7)
    view = dense("treerpo", two_level(), adv_norm="bernoulli_std")
    assert_allclose([view[0, 1], view[2, 2], view[0, 3]], [1 / np.sqrt(3), -1 / np.sqrt(3), 1], atol=5e-6)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0, 0, 1, 1], [-1.999992, -1.999992, 1.999992, 1.999992]),
        ([0.49, 0.49, 0.51, 0.51], [-0.04, -0.04, 0.04, 0.04]),
        ([1, 0, 0, 0, 0, 0, 0, 0], [7.999927, *[-1.142847] * 7]),
        ([1, 0, 0, 0], [3.999979, *[-1.333326] * 3]),
        ([0.5, 0], [1.333326, -1.333326]),
        ([0.75, 0.5, 0.25, 0.5], [0.999996, 0, -0.999996, 0]),
    ],
)
def test_treerpo_scales_by_the_variance_of_a_binary_group(values, expected):
    """The released code's arithmetic, to its last printed digit."""
    view = dense("treerpo", chains(values), prune_tau=0.0)
    assert_allclose([view[i, i + 1] for i in range(len(values))], expected, atol=5e-7)


@pytest.mark.parametrize("unit_weights", ["leaves", "branches"])
def test_treerpo_unit_weights_of_a_full_tree(unit_weights):
    """OPTS-TTPO's golden: 1/2 for the two steps, 1/4 for the leaves; the plain differences come out at 1/8 each."""
    credit = load("treerpo", adv_norm="none", prune_tau=0.0, unit_weights=unit_weights).credit([two_level()])[0]
    weight = credit.row_weight[credit.row]
    found = dict(zip(credit.node.tolist(), zip(weight, weight * credit.advantage, strict=True), strict=True))
    assert found == {1: (0.5, 0.125), 2: (0.5, -0.125), 3: (0.25, 0.125), 4: (0.25, -0.125)}  # the equal leaves of node 2 give no row
    plain = load("treerpo", adv_norm="none", prune_tau=0.0).credit([two_level()])[0]
    assert (plain.row_weight == 1).all() and (plain.advantage == credit.advantage).all()


def test_treerpo_unit_weights_of_a_ragged_tree():
    """An early leaf beside a step with three leaves: it is one of four leaves, but one of two children."""
    segments = [Segment(0, [1], stop=Stop.EOS), Segment(0, [2]), *(Segment(2, [3], stop=Stop.EOS) for _ in range(3))]
    tree = Tree.from_segments([9], segments, {1: 0.0, 3: 1.0, 4: 0.0, 5: 1.0})
    weights = {w: load("treerpo", unit_weights=w).credit([tree])[0].row_weight.tolist() for w in ("none", "leaves", "branches")}
    assert weights["none"] == [1, 1, 1, 1, 1]
    assert_allclose(weights["leaves"], [1 / 4, 3 / 4, 1 / 4, 1 / 4, 1 / 4])
    assert_allclose(weights["branches"], [1 / 2, 1 / 2, 1 / 6, 1 / 6, 1 / 6])


def test_grpo_two_level_fixture():
    view = dense("grpo", two_level())
    a, b = 0.75 / 0.5, -0.25 / 0.5  # mean 1/4, unbiased std 1/2
    expected = np.full((4, 7), NAN)
    for leaf, (inner, end, value) in enumerate(((1, 3, a), (1, 4, b), (2, 5, b), (2, 6, b))):
        expected[leaf, [inner, end]] = value
    assert_allclose(view, expected, atol=5e-6)


def test_treerpo_binary_one_of_eight():
    view = dense("treerpo", chains([1] + [0] * 7), adv_norm="bernoulli_std")
    assert_allclose([view[0, 1], view[1, 2]], [2.6458, -0.37796], atol=1e-4)
    view = dense("treerpo", chains([1] + [0] * 7), adv_norm="bernoulli_var")
    assert_allclose([view[0, 1], view[1, 2]], [8.0, -8 / 7], atol=1e-4)


@pytest.mark.parametrize(
    ("adv_norm", "expected"),
    [("bernoulli_std", 0.1), ("bernoulli_var", 0.2), ("group_std", np.sqrt(0.5)), ("none", 0.05)],
)
def test_treerpo_weak_inner_group(adv_norm, expected):
    """Children worth 0.45 and 0.55: a Bernoulli scale keeps the difference small, the group's own std blows it up."""
    view = dense("treerpo", chains([0.45, 0.55]), adv_norm=adv_norm, prune_tau=0.0)
    assert_allclose([view[0, 1], view[1, 2]], [-expected, expected], rtol=1e-4)


def test_treerpo_prunes_the_weak_group_and_only_its_own_rows():
    tree = Tree.from_segments(
        [9],
        [Segment(0, [1]), Segment(0, [2]), Segment(1, [3]), Segment(1, [4]), Segment(2, [5]), Segment(2, [6])],
        {3: 1.0, 4: 0.0, 5: 1.0, 6: 0.1},
    )  # root group: .5 and .55, range .05 < .1
    view = dense("treerpo", tree)
    assert np.isnan(view[:, [1, 2]]).all()
    assert not np.isnan([view[0, 3], view[1, 4], view[2, 5], view[3, 6]]).any()


@pytest.mark.parametrize(("metric", "kept"), [("std", True), ("range", True), ("var", False)])
def test_treerpo_prune_metric(metric, kept):
    view = dense("treerpo", chains([1.0, 0.75, 0.75, 0.75, 0.5]), prune_metric=metric)  # std .158, range .5, var .025
    assert np.isnan(view).all() != kept


@pytest.mark.parametrize(
    ("metric", "values"),
    [
        ("range", [0.45, 0.55]),  # as floats a hair above .1
        ("range", [0.2, 0.3, 0.25]),  # a hair below
        ("std", [0.2, 0.4]),
        ("var", [0.0, 2 * np.sqrt(0.1)]),
    ],
)
def test_treerpo_keeps_a_group_exactly_at_the_threshold(metric, values):
    """As the released code (the paper keeps what is above); rounding does not decide."""
    assert not np.isnan(dense("treerpo", chains(values), prune_metric=metric, prune_tau=0.1)).all()
    below = [v * (1 - 1e-6) for v in values]
    assert np.isnan(dense("treerpo", chains(below), prune_metric=metric, prune_tau=0.1)).all()


def test_treerpo_early_leaf_weighs_as_much_as_a_sibling_with_many_leaves():
    """An EOS leaf at depth 1 among 8 children, the other seven with 4 leaves each: weight 1/8 at the root."""
    segments = [Segment(0, [1], stop=Stop.EOS), *(Segment(0, [2]) for _ in range(7))]
    rewards = {1: 1.0}
    for inner in range(2, 9):
        for _ in range(4):
            segments.append(Segment(inner, [3], stop=Stop.EOS))
            rewards[len(segments)] = 0.0
    view = dense("treerpo", Tree.from_segments([9], segments, rewards))
    assert_allclose([view[0, 1], np.nanmin(view)], [7.999927, -1.142847], atol=5e-7)


@pytest.mark.parametrize("rewards", [[1, 1, 1], [0, 0, 0], [0.5, 0.5, 0.5]])
def test_treerpo_dead_group_has_no_row(rewards):
    credit = load("treerpo", prune_tau=0.0).credit([chains(rewards)])[0]
    assert len(credit.row) == 0 and len(credit.row_leaf) == 0


@pytest.mark.parametrize("std", ["sample", "population", "none"])
@pytest.mark.parametrize("rewards", [[1.0], [1.0, NAN], [NAN, 0.0, NAN]])
def test_grpo_a_single_graded_leaf_gets_zero(rewards, std):
    credit = load("grpo", std=std).credit([chains(rewards)])[0]
    assert credit.advantage.tolist() == [0.0] and credit.row_leaf.tolist() == [int(np.flatnonzero(~np.isnan(rewards))[0])]


def test_grpo_dead_group_is_zero_and_filtered():
    assert (dense("grpo", chains([1, 1, 1]))[[0, 1, 2], [1, 2, 3]] == 0).all()
    algorithm = load("grpo")
    assert not algorithm.filter.keeps(chains([1, 1, 1])) and not algorithm.filter.keeps(chains([0, NAN, 0]))
    assert algorithm.filter.keeps(chains([1, NAN, 0]))


def test_single_child_carries_no_signal_of_its_own():
    tree = Tree.from_segments([9], [Segment(0, [1]), Segment(1, [2]), Segment(1, [3])], {2: 1.0, 3: 0.0})
    view = dense("treerpo", tree, prune_tau=0.0)
    # alone it differs from nobody: no row
    assert np.isnan(view[:, 1]).all() and close(view[0, 2], 2.0)
    assert dense("grpo", chains([1.0]))[0, 1] == 0


def close(a, b) -> bool:
    return bool(np.isclose(a, b, atol=2e-5))


def test_ungraded_leaves_are_left_out_of_means_and_training():
    view = dense("treerpo", two_level((1, 0, 0, NAN)))  # values 1/2 and 0, D unknown
    assert close(view[0, 1], 4 / 3) and np.isnan(view[3]).all() and np.isnan(view[2, 5])
    view = dense("treerpo", two_level((1, 0, NAN, NAN)))  # node 2 has no value: node 1 is alone
    assert np.isnan(view[:, [1, 2]]).all() and close(view[0, 3], 2)
    view = dense("grpo", two_level((1, 0, 0, NAN)))
    assert_allclose([view[0, 3], view[1, 4], view[2, 5]], np.array([2, -1, -1]) / np.sqrt(3), atol=5e-6)
    assert np.isnan(view[3]).all()


def test_depth_one_equals_grpo_with_population_std():
    rng = np.random.default_rng(0)
    for _ in range(50):
        rewards = rng.integers(0, 2, 8).astype(float)
        if rewards.min() == rewards.max():
            continue
        tree = chains(rewards)
        assert_allclose(
            dense("treerpo", tree, prune_tau=0.0, adv_norm="bernoulli_std"), dense("grpo", tree, std="population"), rtol=0, atol=1e-12
        )


def test_bernoulli_refuses_rewards_outside_the_unit_interval():
    with pytest.raises(ValueError, match=r"needs rewards in \[0,1\], found -1.0 to 1.0"):
        load("treerpo").credit([chains([1.0, -1.0])])
    with pytest.raises(ValueError, match=r"needs rewards in \[0,1\], which neither sampler .* nor shaping .*wrong=-1"):
        load("treerpo", wrong=-1.0)
    load("treerpo", wrong=-1.0, adv_norm="group_std")


def test_truncated_responses_can_be_masked():
    tree = Tree.from_segments([9], [Segment(0, [1], stop=Stop.EOS), Segment(0, [2], stop=Stop.LENGTH)], {1: 1.0, 2: 0.0})
    for name in ("grpo", "treerpo"):
        algorithm = load(name, mask_truncated=True)
        credit = algorithm.filter.mask([tree], algorithm.credit([tree]))[0]
        assert credit.node.tolist() == [1] and credit.row_leaf.tolist() == [0] and credit.row.tolist() == [0]

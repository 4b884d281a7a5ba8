"""From verdict to reward."""

import math

import pytest
from numpy.testing import assert_allclose

from rlzoo.algorithm import load
from rlzoo.data.problems import Problem
from rlzoo.rewards.reward import grade_of
from rlzoo.rewards.shaping import Outcome
from rlzoo.training.collect import shape
from rlzoo.tree import Segment, Tree


def responses(*lengths):
    return Tree.from_segments([7, 7, 7], [Segment(0, [1] * n) for n in lengths])


def test_the_penalty_rises_over_the_buffer():
    shaped = Outcome(right=1.0, wrong=-1.0, overlong_tokens=4)(responses(5, 6, 7, 8, 10), [1, 1, 0, 1, 0], 10)
    assert_allclose(shaped.reward, [1, 1, -1.25, 0.5, -2], atol=1e-12)
    assert shaped.correct.tolist() == [1, 1, 0, 1, 0]


def test_the_published_setting():
    """Limit 7168, buffer 512, factor 1: none up to 6656 tokens, half at 6912, all at 7168."""
    shaped = Outcome(overlong_tokens=512)(responses(6656, 6912, 7168), [1, 1, 1], 7168)
    assert_allclose(shaped.reward, [1, 0.5, 0])


def test_the_factor_scales_the_penalty_and_zero_tokens_switch_it_off():
    assert_allclose(Outcome(overlong_tokens=5, overlong_factor=0.5)(responses(10), [0], 10).reward, [-0.5])
    assert_allclose(Outcome()(responses(10), [1], 10).reward, [1])
    assert_allclose(Outcome(overlong_tokens=10)(responses(0, 1, 10), [1, 1, 1], 10).reward, [1, 0.9, 0])


def test_the_length_is_that_of_the_whole_response():
    tree = Tree.from_segments([7, 7], [Segment(0, [1] * 6), Segment(1, [1] * 3), Segment(1, [1] * 4)])
    assert_allclose(Outcome(overlong_tokens=2)(tree, [1, 1], 10).reward, [0.5, 0])


def test_failed_gradings_stay_failed():
    shaped = Outcome(overlong_tokens=2)(responses(10, 10), [float("nan"), 1], 10)
    assert math.isnan(shaped.reward[0]) and math.isnan(shaped.correct[0]) and shaped.reward[1] == 0


def test_the_filter_does_not_see_the_penalty():
    """All right but one too long: rewards differ, verdicts do not, so the problem is dropped."""
    algorithm = load("treepo")
    longest = algorithm.sampler.max_response_tokens
    tree = responses(1, longest)
    graded = shape(tree, Problem("a", "1 + 1", "2"), ("", ""), [grade_of(True), grade_of(True)], algorithm)
    assert_allclose(graded.tree.reward, [1, 0])  # the limit is the sampler's
    assert not algorithm.filter.keeps(graded.tree)


@pytest.mark.parametrize(
    ("options", "unit"),
    [({}, True), ({"wrong": -1.0}, False), ({"right": 2.0}, False), ({"overlong_tokens": 8}, False), ({"wrong": 0.0, "right": 1.0}, True)],
)
def test_what_it_promises_is_kept(options, unit):
    shaping = Outcome(**options)
    assert ("rewards in [0,1]" in shaping.provides) == unit
    reward = shaping(responses(1, 5, 8), [1, 0, 0], 8).reward
    assert bool(((reward >= 0) & (reward <= 1)).all()) == unit


def test_bernoulli_credit_refuses_the_penalty():
    with pytest.raises(ValueError, match=r"needs rewards in \[0,1\], which neither sampler .* nor shaping .*overlong_tokens=8"):
        load("treerpo", overlong_tokens=8)
    load("treerpo", overlong_tokens=8, adv_norm="group_std")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"right": 0.0}, "shaping.right = 0.0 must be larger than shaping.wrong = 0.0"),
        ({"overlong_tokens": -1}, "shaping.overlong_tokens is -1; allowed: a whole number from 0 to "),
        ({"overlong_factor": -0.5}, "shaping.overlong_factor is -0.5; allowed: a number from 0 to "),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Outcome(**options)


def test_a_buffer_longer_than_any_response_is_refused():
    message = r"shaping.overlong_tokens = 193 is more than the longest response of sampler chains \(192 tokens\)"
    with pytest.raises(ValueError, match=message):
        load("grpo", overlong_tokens=193)
    assert load("grpo", overlong_tokens=192).shaping.overlong_tokens == 192

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from rlzoo.evaluation.curves import Curve, common_range, cost_to_reach, frontier, leaders, mean_height

RISING = Curve.of([0, 10, 20, 40], [0.1, 0.3, 0.2, 0.6])


def test_cost_to_is_the_first_crossing():
    assert RISING.cost_to(0.2) == pytest.approx(5)
    assert RISING.cost_to(0.3) == 10
    assert RISING.cost_to(0.4) == pytest.approx(30)
    assert RISING.cost_to(0.05) == 0  # from the start
    assert RISING.cost_to(0.61) == math.inf


def test_height_is_the_area_under_straight_lines():
    assert RISING.height(0, 40) == pytest.approx((10 * 0.2 + 10 * 0.25 + 20 * 0.4) / 40)
    fine = np.linspace(3, 33, 300_001)
    assert RISING.height(3, 33) == pytest.approx(np.interp(fine, RISING.costs, RISING.values).mean(), abs=1e-5)
    with pytest.raises(ValueError, match="no area from 0 to 41"):
        RISING.height(0, 41)


def test_cost_to_reach_over_runs():
    curves = [Curve.of([0, 100], [0, end]) for end in (0.5, 0.8, 1.0)]
    found = cost_to_reach(curves, 0.4)
    assert found.costs == pytest.approx((80, 50, 40)) and found.reached == 3
    expected = scipy_stats.ttest_1samp([80, 50, 40], 0).confidence_interval(0.95)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((max(0, expected.low), expected.high))
    assert found.sentence("steps").startswith("40.0 % reached at 56.67 steps [")


def test_a_run_that_never_arrives_is_told_and_not_averaged_away():
    curves = [Curve.of([0, 100], [0, end]) for end in (0.5, 0.8)]
    some, none = cost_to_reach(curves, 0.6), cost_to_reach(curves, 0.9)
    assert some.costs == pytest.approx((math.inf, 75)) and some.estimate is None and none.estimate is None
    assert some.sentence("h") == "60.0 % reached by 1 of 2 runs, the first at 75 h; no mean, the others did not within 100 h"
    assert none.sentence("h") == "90.0 % not reached within 100 h by any of 2 runs"
    assert cost_to_reach(curves[1:], 0.4).sentence("h") == "40.0 % reached at 50 h (one run)"


COSTS = st.lists(st.integers(0, 9), min_size=1, max_size=8, unique=True).map(sorted)
LINES = COSTS.flatmap(lambda xs: st.tuples(st.just(xs), st.lists(st.floats(0, 1), min_size=len(xs), max_size=len(xs))))


def best_until(line, cost):
    """The highest place of a line up to a cost: at one of its points, or at the cost itself."""
    x, y = line
    return max([b for a, b in zip(x, y, strict=True) if a <= cost] + [float(np.interp(cost, x, y))])


def test_frontier_by_hand():
    x, y = frontier([0, 10, 20, 40, 50], [0.1, 0.3, 0.2, 0.6, 0.5])
    assert x.tolist() == [0, 10, 25, 40, 50] and y == pytest.approx([0.1, 0.3, 0.3, 0.6, 0.6])
    assert [v.tolist() for v in frontier([3], [0.5])] == [[3], [0.5]]


@given(LINES, st.floats(0, 1))
def test_the_frontier_is_the_best_at_or_below_each_cost(line, share):
    cost = line[0][0] + share * (line[0][-1] - line[0][0])
    x, y = frontier(*line)
    assert np.interp(cost, x, y) == pytest.approx(best_until(line, cost), abs=1e-9) and (np.diff(y) >= 0).all()
    assert (x[0], x[-1]) == (line[0][0], line[0][-1])


def test_leaders_change_where_lines_cross():
    lines = {"a": ([0, 10], [0.2, 0.3]), "b": ([0, 5, 10, 20], [0.2, 0.2, 0.4, 0.4]), "c": ([0, 20], [0.2, 0.21])}
    (first, _, a), (cross, height, b) = leaders(lines)
    assert (first, a, b) == (0, "a", "b") and cross == pytest.approx(20 / 3) and height == pytest.approx(0.2 + 1 / 15)
    assert leaders({"a": ([0, 5], [0.1, 0.5]), "b": ([0, 9], [0.1, 0.4])}) == [(0, 0.1, "a")], "the one that ended stays at its best"


@given(st.dictionaries(st.sampled_from("abc"), LINES, min_size=1), st.floats(0, 1))
def test_the_leader_has_the_most(lines, share):
    best = {arm: frontier(*line) for arm, line in lines.items()}
    found = leaders(best)
    low, high = min(x[0] for x, _ in best.values()), max(x[-1] for x, _ in best.values())
    if low == high:
        assert found == []
        return
    cost = low + share * (high - low)
    leader = [arm for start, _, arm in found if start <= cost][-1]
    heights = {arm: np.interp(cost, *line) for arm, line in best.items()}
    assert heights[leader] == pytest.approx(max(heights.values()), abs=1e-9)


def test_mean_height_over_the_common_range():
    curves = [Curve.of([0, 50, 100], [0, 0.2, 0.4]), Curve.of([10, 90], [0.1, 0.9])]
    assert common_range(curves) == (10, 90)
    found = mean_height(curves, *common_range(curves))
    assert found.mean == pytest.approx((0.2 + 0.5) / 2)
    with pytest.raises(ValueError, match="in common"):
        common_range([Curve.of([0, 1], [0, 0]), Curve.of([2, 3], [0, 0])])


@pytest.mark.parametrize(("costs", "values"), [([], []), ([0, 1], [0]), ([0, 0], [1, 1]), ([0, 1], [0, math.nan])])
def test_curves_refuse(costs, values):
    with pytest.raises(ValueError, match="a curve needs"):
        Curve.of(costs, values)
    with pytest.raises(ValueError, match="no curves"):
        cost_to_reach([], 0.5)

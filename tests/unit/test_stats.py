import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from rlzoo.evaluation import stats


@pytest.mark.parametrize(("successes", "n"), [(0, 30), (1, 30), (15, 30), (29, 30), (30, 30), (250, 500)])
def test_wilson_against_scipy_and_its_definition(successes, n):
    got = stats.wilson(successes, n)
    expected = scipy_stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    z = scipy_stats.norm.ppf(0.975)
    for bound in (got.low, got.high):  # the bounds solve |p - bound| = z sqrt(bound (1 - bound) / n), unless at an end
        if 0 < bound < 1:
            assert abs(successes / n - bound) == pytest.approx(z * math.sqrt(bound * (1 - bound) / n), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 30), (1, 30), (15, 30), (30, 30), (250, 500)])
def test_clopper_pearson_against_its_definition(successes, n):
    got = stats.clopper_pearson(successes, n)
    if successes:  # the bounds make as many right ones, or as few, just as unlikely as the level says
        assert scipy_stats.binom.sf(successes - 1, n, got.low) == pytest.approx(0.025)
    if successes < n:
        assert scipy_stats.binom.cdf(successes, n, got.high) == pytest.approx(0.025)
    wilson = stats.wilson(successes, n)
    assert got.low <= wilson.low and wilson.high <= got.high


def logit(p):
    return np.log(p / (1 - p))


def test_clustered_mean_is_a_t_interval_on_the_logit_scale():
    x = np.random.default_rng(0).random(40)
    got = stats.clustered_mean(x, level=0.9)
    padded = np.sum((x - x.mean()) ** 2) + x.mean() * (1 - x.mean()) / 2
    half = scipy_stats.t.ppf(0.95, 39) * np.sqrt(padded / 39.5 / 40) / (x.mean() * (1 - x.mean()))
    assert got.mean == pytest.approx(x.mean()) and got.n == 40
    assert (logit(got.low), logit(got.high)) == pytest.approx((logit(x.mean()) - half, logit(x.mean()) + half))
    many = np.random.default_rng(0).normal(0.5, 0.1, 4000)  # far from the ends, with many problems, no other than the plain one
    got, plain = stats.clustered_mean(many), scipy_stats.ttest_1samp(many, 0).confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((plain.low, plain.high), abs=2e-5)


def test_clustered_mean_edges():
    assert stats.clustered_mean([0.5, np.nan, 0.7]).n == 2
    assert (stats.clustered_mean([0.5]).low, stats.clustered_mean([0.5]).high) == (0, 1)
    assert stats.clustered_mean([1.0, 0, 1, 1, 0, 1]) == stats.wilson(4, 6)  # one sample per problem
    assert stats.clustered_mean([1.0] * 30) == stats.wilson(30, 30)  # no spread seen is not certainty
    same = stats.clustered_mean([0.5] * 30)
    assert 0.45 < same.low < 0.5 < same.high < 0.55
    near = stats.clustered_mean([0.0] * 29 + [1 / 16])
    assert 0 < near.low < near.mean < near.high < 0.1
    with pytest.raises(ValueError, match="no graded problem"):
        stats.clustered_mean([np.nan])
    with pytest.raises(ValueError, match="shares"):
        stats.clustered_mean([0.2, 1.1])


def test_t_mean_against_scipy():
    x = np.random.default_rng(0).normal(100, 20, 5)
    got, expected = stats.t_mean(x), scipy_stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high))
    assert stats.t_mean([1.0, 3.0], floor=0).low == 0 and stats.t_mean([1.0, 3.0], ceiling=4).high == 4
    assert (stats.t_mean([2.0]).low, stats.t_mean([2.0]).high) == (-math.inf, math.inf)


def test_paired_difference_against_scipy():
    rng = np.random.default_rng(1)
    a, b = rng.random(25), rng.random(25)
    got, expected = stats.paired_difference(a, b), scipy_stats.ttest_rel(b, a)
    interval = expected.confidence_interval(0.95)
    assert (got.mean, got.low, got.high) == pytest.approx(((b - a).mean(), interval.low, interval.high))
    assert got.p_value == pytest.approx(expected.pvalue)
    assert got.excludes_zero == (expected.pvalue < 0.05)


def test_paired_difference_edges():
    assert stats.paired_difference([0.5, np.nan, 1], [0.7, 1, 0.9]).n == 2
    # the same difference everywhere: nothing seen of the spread, so as little certainty as 0 of n problems that differ gives
    same = stats.paired_difference([0.1] * 50, [0.1] * 50)
    assert (same.mean, same.p_value, same.excludes_zero) == (0, 1, False)
    assert same.high == -same.low == pytest.approx(stats.wilson(0, 50).high)
    two = stats.paired_difference([0.1, 0.2], [0.6, 0.7])
    assert not two.excludes_zero and two.p_value > 0.05
    assert stats.paired_difference([0.0] * 50, [0.5] * 50).excludes_zero
    lone = stats.paired_difference([0.1], [0.9])
    assert (lone.low, lone.high, lone.p_value) == (-math.inf, math.inf, None)
    with pytest.raises(ValueError, match="same problems"):
        stats.paired_difference([0.1, 0.2], [0.1])


def test_stratified_difference_of_two_equal_weights_is_welch():
    rng = np.random.default_rng(2)
    a, b = rng.random(12), rng.random(30) / 3
    got = stats.stratified_difference([-a, b])  # half of (mean b - mean a): Welch's two-sample test
    welch = scipy_stats.ttest_ind(b, a, equal_var=False)
    interval = welch.confidence_interval(0.95)
    assert (got.mean, got.low, got.high) == pytest.approx(((b.mean() - a.mean()) / 2, interval.low / 2, interval.high / 2))
    assert got.p_value == pytest.approx(welch.pvalue)
    lone = stats.stratified_difference([a, [0.3]])  # one problem alone says nothing
    assert (lone.low, lone.high, lone.p_value) == (-math.inf, math.inf, None)
    assert stats.stratified_difference([a, [0.3]], weights=[1, 0]).p_value == pytest.approx(stats.paired_difference(a * 0, a).p_value)


def test_stratified_mean():
    x = np.random.default_rng(3).random(20)
    one, alone = stats.stratified_mean([x]), stats.clustered_mean(x)
    assert (one.mean, one.low, one.high) == pytest.approx((alone.mean, alone.low, alone.high))
    assert stats.stratified_mean([[0.0, 1, 0, 1], [1.0, 1]], weights=[1, 3]).mean == pytest.approx((0.5 + 3) / 4)
    twice = stats.stratified_mean([x, x])  # two independent sets: the interval shrinks by sqrt(2), on either side
    assert twice.mean - twice.low == pytest.approx((alone.mean - alone.low) / math.sqrt(2))
    assert twice.high - twice.mean == pytest.approx((alone.high - alone.mean) / math.sqrt(2))
    sure = stats.stratified_mean([[1.0] * 50, [1.0] * 80])
    assert 0.9 < sure.low < 1 and sure.high == 1
    unknown = stats.stratified_mean([[1.0] * 500, [1.0]])  # one problem alone says nothing: half of the mean may be lost
    assert unknown.low == pytest.approx(0.5, abs=1e-4)
    with pytest.raises(ValueError, match="as many weights"):
        stats.stratified_mean([x], weights=[1, 2])
    with pytest.raises(ValueError, match="no sets"):
        stats.stratified_mean([])


def test_published_overalls_are_size_weighted_means():
    sizes, scores = (30, 83, 500, 272, 675), (0.2, 0.6, 0.8, 0.4, 0.4)  # all problems alike within a set
    got = stats.stratified_mean([[s] * n for s, n in zip(scores, sizes, strict=True)], weights=sizes)
    assert got.mean == pytest.approx(np.repeat(scores, sizes).mean())


def test_holm_against_its_definition():
    rng = np.random.default_rng(5)
    for _ in range(50):
        p = rng.random(6) ** 3
        adjusted = stats.holm(p)
        for alpha in (0.01, 0.05, 0.2):
            rejected, order = set(), np.argsort(p)
            for i, test in enumerate(order):  # reject from the smallest on, until one is not below alpha / (those left)
                if p[test] > alpha / (len(p) - i):
                    break
                rejected.add(int(test))
            assert rejected == set(np.flatnonzero(adjusted <= alpha).tolist())
    assert stats.holm([0.01, 0.04]).tolist() == [0.02, 0.04]
    assert len(stats.holm([])) == 0
    with pytest.raises(ValueError, match="p-values"):
        stats.holm([1.2])


@pytest.mark.parametrize("bad", [(5, 4), (-1, 4), (0, 0)])
@pytest.mark.parametrize("interval", [stats.wilson, stats.clopper_pearson])
def test_intervals_refuse(interval, bad):
    with pytest.raises(ValueError, match="successes"):
        interval(*bad)
    with pytest.raises(ValueError, match="level"):
        interval(1, 2, 95)

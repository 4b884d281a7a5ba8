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


def test_clustered_mean_is_the_t_interval_over_problems():
    x = np.random.default_rng(0).random(40)
    got = stats.clustered_mean(x, level=0.9)
    expected = scipy_stats.ttest_1samp(x, 0).confidence_interval(0.9)
    assert (got.mean, got.low, got.high, got.n) == pytest.approx((x.mean(), expected.low, expected.high, 40))


def test_clustered_mean_edges():
    assert stats.clustered_mean([0.5, np.nan, 0.7]).n == 2
    assert (stats.clustered_mean([0.5]).low, stats.clustered_mean([0.5]).high) == (0, 1)
    certain = stats.clustered_mean([1.0] * 30)  # no spread seen is not certainty
    assert (certain.low, certain.high) == pytest.approx((stats.wilson(30, 30).low, 1))
    assert stats.clustered_mean([0.0, 0.1]).low == 0  # cut at the end of the scale
    with pytest.raises(ValueError, match="no graded problem"):
        stats.clustered_mean([np.nan])


def test_proportion_takes_wilson_for_one_sample_and_t_for_more():
    x = np.array([1.0, 0, 1, 1, 0, 1])
    assert stats.proportion(x, k=1) == stats.wilson(4, 6)
    assert stats.proportion(x, k=2).method == "clustered t"


@pytest.mark.parametrize(("p", "k", "n"), [(0.1, 1, 30), (0.5, 1, 100), (0.9, 16, 30), (0.1, 16, 100)])
def test_coverage(p, k, n):
    rng = np.random.default_rng(7)
    hit = 0
    for _ in range(1000):
        # difficulty differs between problems, its mean being p: what makes a plain interval over samples too narrow
        problems = rng.beta(4 * p, 4 * (1 - p), n)
        found = stats.proportion(rng.binomial(k, problems) / k, k)
        hit += found.low <= p <= found.high
    assert 0.92 <= hit / 1000 <= 0.99


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


def test_stratified_of_two_equal_weights_is_welch():
    rng = np.random.default_rng(2)
    a, b = rng.random(12), rng.random(30) / 3
    got = stats.stratified_mean([-a, b], bounds=None)  # half of (mean b - mean a): Welch's two-sample test
    welch = scipy_stats.ttest_ind(b, a, equal_var=False)
    interval = welch.confidence_interval(0.95)
    assert (got.mean, got.low, got.high) == pytest.approx(((b.mean() - a.mean()) / 2, interval.low / 2, interval.high / 2))
    assert got.p_value == pytest.approx(welch.pvalue)


def test_stratified_weights_and_one_set():
    x = np.random.default_rng(3).random(20)
    assert stats.stratified_mean([x]).low == pytest.approx(stats.clustered_mean(x).low)
    assert stats.stratified_mean([[0.0, 1, 0, 1], [1.0, 1]], weights=[1, 3]).mean == pytest.approx((0.5 + 3) / 4)
    sure = stats.stratified_mean([[1.0] * 50, [1.0] * 80])
    assert 0.9 < sure.low < 1 and sure.high == 1
    assert stats.stratified_mean([x, [1.0]]).low == 0  # one problem alone says nothing
    with pytest.raises(ValueError, match="as many weights"):
        stats.stratified_mean([x], weights=[1, 2])


def test_bootstrap_agrees_with_t_on_tame_data_and_survives_no_spread():
    x = np.random.default_rng(4).normal(0.5, 0.1, 200)
    boot, t = stats.bootstrap_mean(x, resamples=4000), stats.clustered_mean(x)
    assert (boot.low, boot.high) == pytest.approx((t.low, t.high), abs=2e-3)
    assert boot == stats.bootstrap_mean(x, resamples=4000)
    assert stats.bootstrap_mean([1.0, 1.0, 1.0]).low < 1


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
def test_wilson_refuses(bad):
    with pytest.raises(ValueError, match="successes"):
        stats.wilson(*bad)

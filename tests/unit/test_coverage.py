"""Do 95 % intervals hold what they say? Test sets are simulated whose problems differ in difficulty: the rate of each is drawn from a
beta distribution of mean p; a concentration of 0.1 makes nearly all problems either always or never solved, 100 all about equally hard.

The true value is the mean over all problems that such a set could have held. One sample per problem needs no simulation: whatever
the spread, the number of right ones is binomial."""

import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from rlzoo.evaluation import stats
from rlzoo.evaluation.metrics import maj_at_k, pass_at_k

K = 16
CELLS = list(itertools.product((0.1, 0.5, 0.9), (30, 100, 500)))
CONCENTRATIONS = (0.1, 0.3, 1, 3, 10, 100)
LOW, HIGH = 0.93, 0.985

METRICS = {  # score of a problem by its number of right samples; in a vote two wrong answers compete with the right one
    "pass@1": np.arange(K + 1) / K,
    "pass@4": pass_at_k(K, np.arange(K + 1), 4),
    "maj@8": np.array([maj_at_k([0] * c + [1 + i % 2 for i in range(K - c)], [1] * c + [0] * (K - c), 8) for c in range(K + 1)]),
}


def right_samples(p, concentration, shape, rng):
    return rng.binomial(K, rng.beta(concentration * p, concentration * (1 - p), shape))


def truth(score, p, concentration):
    return float(scipy_stats.betabinom.pmf(np.arange(K + 1), K, concentration * p, concentration * (1 - p)) @ score)


def coverage(score, p, n, concentration, sets, rng):
    expected = truth(score, p, concentration)
    found = [stats.clustered_mean(score[c]) for c in right_samples(p, concentration, (sets, n), rng)]
    return np.mean([e.low <= expected <= e.high for e in found])


@pytest.mark.parametrize(("p", "n"), CELLS)
def test_one_sample_per_problem_exactly(p, n):
    chance = scipy_stats.binom.pmf(np.arange(n + 1), n, p)
    covered = {f: sum(chance[c] for c in range(n + 1) if f(c, n).low <= p <= f(c, n).high) for f in (stats.wilson, stats.clopper_pearson)}
    assert LOW <= covered[stats.wilson] <= HIGH
    assert covered[stats.clopper_pearson] >= 0.95


@pytest.mark.parametrize(("p", "n"), CELLS)
def test_many_samples_per_problem(p, n):
    sets = 1000
    slack = 2 * np.sqrt(0.05 * 0.95 / sets)  # the error of a simulation this small; the slow test needs none
    assert LOW - slack <= coverage(METRICS["pass@1"], p, n, 1, sets, np.random.default_rng(0)) <= HIGH + slack


def test_a_central_limit_interval_would_fail():
    rng, (p, n) = np.random.default_rng(0), (0.1, 30)
    samples = right_samples(p, 1, (1000, n), rng)
    over_samples = (samples.sum(1) / (K * n))[:, None]  # every sample as if it were a problem of its own
    half = 1.96 * np.sqrt(over_samples * (1 - over_samples) / (K * n))
    assert np.mean(np.abs(over_samples - p) <= half) < 0.6
    over_problems = samples / K
    half = 1.96 * over_problems.std(1, ddof=1) / np.sqrt(n)
    assert np.mean(np.abs(over_problems.mean(1) - p) <= half) < 0.92


@pytest.mark.slow
@pytest.mark.parametrize(("p", "n"), CELLS)
def test_many_samples_per_problem_at_every_spread(p, n):
    rng = np.random.default_rng(0)
    for concentration in CONCENTRATIONS:
        covered = coverage(METRICS["pass@1"], p, n, concentration, 8000, rng)
        print(f"pass@1 p={p} n={n} concentration={concentration}: {covered:.4f}")
        assert LOW <= covered <= HIGH


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pass@4", "maj@8"])
@pytest.mark.parametrize("n", [30, 100, 500])
def test_other_metrics_at_every_spread(name, n):
    rng = np.random.default_rng(0)
    for p, concentration in itertools.product((0.1, 0.3, 0.5), (0.3, 1, 3, 10)):
        expected = truth(METRICS[name], p, concentration)
        covered = coverage(METRICS[name], p, n, concentration, 4000, rng)
        print(f"{name} {expected:.3f} (p={p}) n={n} concentration={concentration}: {covered:.4f}")
        if 0.1 <= expected <= 0.9:
            assert LOW <= covered <= HIGH


def overall_coverage(ps, ns, concentration, weights, sets, rng):
    expected = np.average(ps, weights=weights)
    hits = 0
    for _ in range(sets):
        found = stats.stratified_mean([right_samples(p, concentration, n, rng) / K for p, n in zip(ps, ns, strict=True)], weights)
        hits += found.low <= expected <= found.high
    return hits / sets


SUITES = [
    ((0.1, 0.1, 0.1), (30, 30, 30), None),
    ((0.15, 0.55, 0.75, 0.3, 0.35), (30, 83, 500, 272, 675), (30, 83, 500, 272, 675)),
    ((0.15, 0.55, 0.75, 0.3, 0.35), (30, 83, 500, 272, 675), None),
    ((0.9, 0.5), (100, 30), None),
]


@pytest.mark.parametrize(("ps", "ns", "weights"), SUITES)
def test_overall_of_a_suite(ps, ns, weights):
    sets = 600
    slack = 2 * np.sqrt(0.05 * 0.95 / sets)
    assert LOW - slack <= overall_coverage(ps, ns, 1, weights, sets, np.random.default_rng(0)) <= HIGH + slack


@pytest.mark.slow
@pytest.mark.parametrize(("ps", "ns", "weights"), SUITES)
def test_overall_of_a_suite_at_every_spread(ps, ns, weights):
    rng = np.random.default_rng(0)
    for concentration in (0.3, 1, 10):
        covered = overall_coverage(ps, ns, concentration, weights, 6000, rng)
        print(f"overall of {len(ps)} sets, weights {weights}, concentration={concentration}: {covered:.4f}")
        assert LOW <= covered <= HIGH

import itertools
import math

import numpy as np
import pytest
from scipy import special as scipy_special
from scipy import stats as scipy_stats

from rlzoo.evaluation import stats
from rlzoo.evaluation.comparison import Arm, compare, compare_all, probability_of_improvement


def arm(name, scores, seeds=None):
    sets = scores if isinstance(scores, dict) else {"t": scores}
    sets = {name: np.asarray(x, float) for name, x in sets.items()}
    return Arm(name, tuple(seeds or range(len(next(iter(sets.values()))))), sets)


def additive(runs, problems, rng):
    """Scores [runs, problems] of runs that differ by a shift alone, and each run's mean."""
    shift = rng.normal(0, 0.02, runs)
    scores = 0.5 + shift[:, None] + problems
    return scores, scores.mean(axis=1)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_runs_that_differ_by_a_shift_alone_give_welch(rng):
    problems = rng.normal(0, 0.1, 50)
    (a, runs_a), (b, runs_b) = additive(3, problems, rng), additive(5, problems, rng)
    found = compare(arm("a", a), arm("b", b)).overall.estimate()
    welch = scipy_stats.ttest_ind(runs_b, runs_a, equal_var=False)
    interval = welch.confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((runs_b.mean() - runs_a.mean(), interval.low, interval.high))
    assert found.p_value == pytest.approx(welch.pvalue)


def test_paired_seeds_give_the_paired_t_test_whatever_the_order_of_runs(rng):
    problems = rng.normal(0, 0.1, 50)
    (a, runs_a), (b, runs_b) = additive(4, problems, rng), additive(4, problems, rng)
    expected = scipy_stats.ttest_rel(runs_b, runs_a)
    interval = expected.confidence_interval(0.95)
    order = [2, 0, 3, 1]
    found = compare(arm("a", a), arm("b", b[order], order), pair_seeds=True).overall.estimate()
    assert (found.low, found.high, found.p_value) == pytest.approx((interval.low, interval.high, expected.pvalue))


def test_runs_that_all_agree_leave_the_problems(rng):
    a, b = rng.random(40), rng.random(40)
    found, expected = compare(arm("a", [a] * 3), arm("b", [b] * 3)).overall.estimate(), stats.paired_difference(a, b)
    assert (found.low, found.high, found.p_value) == pytest.approx((expected.low, expected.high, expected.p_value))


def test_one_seed_is_about_these_checkpoints(rng):
    a, b = rng.random((1, 40)), rng.random((3, 40)) / 4
    found, expected = compare(arm("a", a), arm("b", b)), stats.paired_difference(a[0], b.mean(axis=0))
    got = found.overall.estimate()
    assert (got.low, got.high, got.p_value) == pytest.approx((expected.low, expected.high, expected.p_value))
    assert expected.p_value < 0.001 and found.winner is None  # however clear, it may be the seed
    assert found.verdict.startswith("one seed says nothing about training: between these checkpoints, b - a is -")


def components(a, b):
    """Variances of the mean difference by the textbook's sums of squares, in loops: runs (Welch), rest, problems."""
    runs = rest = 0.0
    for x in (a, b):
        s, n = x.shape
        grand, row, column = np.mean(x), [np.mean(r) for r in x], [np.mean(c) for c in x.T]
        runs += sum((m - grand) ** 2 for m in row) / (s - 1) / s
        rest += sum((x[i, j] - row[i] - column[j] + grand) ** 2 for i in range(s) for j in range(n)) / ((s - 1) * (n - 1)) / (s * n)
    d = [np.mean(b[:, j]) - np.mean(a[:, j]) for j in range(a.shape[1])]
    return runs, rest, max(sum((x - np.mean(d)) ** 2 for x in d) / (len(d) - 1) / len(d) - rest, 0)


def test_parts_against_sums_of_squares_in_loops(rng):
    scores = {s: (rng.random((3, n)), rng.random((4, n)) + rng.normal(0, 0.5, n)) for s, n in (("one", 10), ("two", 25))}
    found = compare(arm("a", {s: x[0] for s, x in scores.items()}), arm("b", {s: x[1] for s, x in scores.items()}))
    for name, (a, b) in scores.items():
        d = found.sets[name]
        assert (d.seed.variance, d.rest.variance, d.problem.variance) == pytest.approx(components(a, b))
        assert d.problem.variance > 0 and d.problem.df == a.shape[1] - 1
    weighted = compare(
        arm("a", {s: x[0] for s, x in scores.items()}), arm("b", {s: x[1] for s, x in scores.items()}), weights={"one": 1, "two": 3}
    ).overall
    (a1, b1), (a2, b2) = scores.values()
    runs = [0.25 * x.mean(axis=1) + 0.75 * y.mean(axis=1) for x, y in ((a1, a2), (b1, b2))]  # per run, over both sets
    assert weighted.seed.variance == pytest.approx(sum(r.var(ddof=1) / len(r) for r in runs))
    assert weighted.problem.variance == pytest.approx(components(a1, b1)[2] / 16 + components(a2, b2)[2] * 9 / 16)
    assert weighted.mean == pytest.approx(0.25 * found.sets["one"].mean + 0.75 * found.sets["two"].mean)


def test_intervals_and_p_values_agree(rng):
    d = compare(arm("a", rng.random((3, 30))), arm("b", rng.random((3, 30)) + 0.1)).overall
    for at in (0.0, 0.05, -0.2):
        p = d.p_value(at)
        assert d.half_width(1 - p) == pytest.approx(abs(d.mean - at))
    assert d.p_value(d.mean) == 1
    assert d.half_width(0.99) > d.half_width(0.95)


def test_against_permuting_runs(rng):
    """With no difference between arms, their runs can be exchanged: all 252 ways to deal ten runs to two arms."""
    dealt = np.array([np.isin(np.arange(10), c) for c in itertools.combinations(range(10), 5)])
    exact, ours = np.empty(200), np.empty(200)
    for i in range(200):
        x = 0.5 + rng.normal(0, 0.02, (10, 1)) + rng.normal(0, 0.1, 60)
        x[5:] += rng.choice([0.0, 0.03])
        gaps = np.abs(dealt @ x.mean(axis=1) - ~dealt @ x.mean(axis=1))
        exact[i] = np.mean(gaps >= abs(x[:5].mean(axis=1).sum() - x[5:].mean(axis=1).sum()) - 1e-12)
        ours[i] = compare(arm("a", x[:5]), arm("b", x[5:])).overall.p_value()
    assert np.abs(ours - exact).mean() < 0.02
    assert np.mean(ours <= 0.05) == pytest.approx(np.mean(exact <= 0.05), abs=0.05)
    assert 20 < (exact < 0.05).sum() < 180  # both sides of the line were tried


def test_against_flipping_the_signs_of_problems(rng):
    """Where runs agree, each problem's difference could as well have had the other sign: all 4,096 ways."""
    for shift in (0.0, 0.05, 0.1):
        d = shift + rng.normal(0, 0.1, 12)
        signs = np.array(list(itertools.product((-1, 1), repeat=12)))
        as_far = np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-12)
        found = compare(arm("a", np.full((3, 12), 0.5)), arm("b", np.tile(0.5 + d, (3, 1)))).overall
        assert found.p_value() == pytest.approx(as_far, abs=0.03)


def test_equivalence_is_two_one_sided_tests(rng):
    problems = rng.normal(0, 0.1, 50)
    (a, runs_a), (b, runs_b) = additive(4, problems, rng), additive(4, problems, rng)
    d = compare(arm("a", a), arm("b", b), pair_seeds=True).overall
    gain = runs_b - runs_a
    for margin in (0.005, 0.02, 0.05, 0.2):
        above = scipy_stats.ttest_1samp(gain, -margin, alternative="greater").pvalue
        below = scipy_stats.ttest_1samp(gain, margin, alternative="less").pvalue
        outcome, p = d.equivalence(margin)
        assert p == pytest.approx(max(above, below))
        inside = abs(d.mean) + d.half_width(0.9) <= margin
        assert (outcome == "equivalent") == (p <= 0.05) == inside
    assert d.equivalence(0.2)[0] == "equivalent" and d.equivalence(0.005)[0] == "inconclusive"
    far = compare(arm("a", a), arm("b", b + 0.5), pair_seeds=True).overall
    assert far.equivalence(0.05)[0] == "different"
    with pytest.raises(ValueError, match="margin above 0"):
        d.equivalence(0)


def test_detectable_of_many_seeds_is_that_of_the_noncentral_t(rng):
    """With many seeds the estimated error is nearly the true one, and with few the figure is larger."""
    problems = rng.normal(0, 0.1, 50)
    for seeds, most in ((400, 1.01), (4, 1.6)):
        (a, runs_a), (b, runs_b) = additive(seeds, problems, rng), additive(seeds, problems, rng)
        d = compare(arm("a", a), arm("b", b), pair_seeds=True).overall
        error, df = (runs_b - runs_a).std(ddof=1) / math.sqrt(seeds), seeds - 1
        known = scipy_special.nctdtrinc(df, 0.2, scipy_stats.t.ppf(0.975, df)) * error
        assert known < d.detectable() < most * known
    assert d.detectable(power=0.9) > d.detectable()
    single = compare(arm("a", rng.random((3, 1))), arm("b", rng.random((3, 1))))
    assert single.overall.detectable() == math.inf and single.p_value == 1


def power_of_detectable(seeds, runs, rng, *, n=100, sd=0.02):
    """How often a second comparison shows the difference that a first one, of the same kind, calls detectable."""
    firsts, seconds = (simulated(seeds, n, sd, 0.0, runs, rng) for _ in range(2))
    claims = [compare(arm("a", a), arm("b", b)).overall.detectable() for a, b in zip(*firsts, strict=True)]
    shown = [compare(arm("a", a), arm("b", b + c)).p_value <= 0.05 for a, b, c in zip(*seconds, claims, strict=True) if math.isfinite(c)]
    return np.mean(shown), len(shown)


@pytest.mark.parametrize("seeds", [3, 8])
def test_what_is_called_detectable_is_shown_four_times_in_five(seeds):
    power, runs = power_of_detectable(seeds, 300, np.random.default_rng(seeds))
    assert power == pytest.approx(0.8, abs=2.6 * math.sqrt(0.8 * 0.2 / runs))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5, 8])
def test_what_is_called_detectable_is_shown_four_times_in_five_everywhere(seeds):
    for n, sd in ((100, 0.02), (400, 0.02), (200, 0.005)):
        power, _ = power_of_detectable(seeds, 1500, np.random.default_rng(seeds), n=n, sd=sd)
        print(f"seeds={seeds} n={n} sd={sd}: a claimed power of 0.80 is {power:.3f}")
        assert power == pytest.approx(0.8, abs=0.04)


def test_probability_of_improvement():
    a, b = {"t": np.array([1.0, 2, 3])}, {"t": np.array([2.0, 4, 5, 6])}
    found = probability_of_improvement(a, b)
    pairs = [(y > x) + (y == x) / 2 for x in a["t"] for y in b["t"]]
    t = found.mean
    assert t == pytest.approx(np.mean(pairs))
    for bound in (found.low, found.high):  # Newcombe: the true values at which the found one is just not too far off
        spread = bound * (1 - bound) * (1 + 2.5 * ((1 - bound) / (2 - bound) + bound / (1 + bound))) / 12
        assert abs(t - bound) == pytest.approx(scipy_stats.t.ppf(0.975, 5) * math.sqrt(spread), rel=1e-5)
    sure = probability_of_improvement({"t": np.arange(3)}, {"t": np.arange(3) + 9})
    assert sure.mean == 1 and sure.high == 1 and 0.3 < sure.low < 0.5  # three runs that all win are no certainty
    lone = probability_of_improvement({"t": np.zeros(1)}, {"t": np.ones(1)})
    assert (lone.mean, lone.low, lone.high) == (1, 0, 1)
    back = probability_of_improvement(b, a)
    assert (1 - back.high, 1 - back.low) == pytest.approx((found.low, found.high))
    both = probability_of_improvement({**a, "u": np.zeros(3)}, {**b, "u": np.ones(4)})
    assert both.mean == pytest.approx((t + 1) / 2)


def test_verdicts(rng):
    problems = rng.normal(0, 0.1, 200)
    shifts = np.array([-0.01, 0.0, 0.01])[:, None]
    a, better, same = 0.3 + shifts + problems, 0.4 + shifts + problems, 0.305 + shifts + problems
    won = compare(arm("plain", a), arm("tree", better))
    assert won.winner == "tree" and won.adjusted == {"t": pytest.approx(won.p_value)}
    expected = "tree is better than plain by +10.0 [+7.7, +12.3] points, p < 0.001; smaller than 3.8 points cannot be seen with 3 seeds"
    assert won.verdict == expected
    assert compare(arm("tree", better), arm("plain", a)).verdict == expected
    even = compare(arm("plain", a), arm("tree", same))
    assert even.winner is None
    assert even.verdict == (
        "no difference shown between plain and tree: tree - plain is +0.5 [-1.8, +2.8] points, p = 0.57; "
        "smaller than 3.8 points cannot be seen with 3 seeds"
    )
    many = np.linspace(-0.01, 0.01, 5)[:, None]
    told = compare(arm("plain", 0.3 + many + problems), arm("tree", 0.4 + many + problems)).verdict
    assert told.startswith("tree is better than plain by") and "cannot be seen" not in told


def test_identical_runs_are_no_difference_and_no_certainty():
    x = np.full((3, 50), 0.5)
    found = compare(arm("a", x), arm("b", x))
    assert found.p_value == 1 and found.overall.half_width() == pytest.approx(stats.wilson(0, 50).high)


def test_holm_over_sets_and_over_pairs(rng):
    def scores(gain):
        return {s: rng.normal(0, 0.01, (3, 1)) + rng.normal(0.5 + gain * (s == "x"), 0.05, (3, 60)) for s in "xyz"}

    arms = [arm("a", scores(0)), arm("b", scores(0.1)), arm("c", scores(0))]
    first = compare(arms[0], arms[1])
    assert list(first.adjusted.values()) == stats.holm([d.p_value() for d in first.sets.values()]).tolist()
    assert "; by set, after Holm over 3: b on x better" in first.verdict
    found = compare_all(arms)
    assert [(c.a, c.b) for c in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [c.p_value for c in found] == stats.holm([c.overall.p_value() for c in found]).tolist()
    assert all("after Holm over 3 pairs" in c.verdict for c in found)
    assert compare_all(arms[:2])[0].verdict == first.verdict
    plain = found[0].as_dict()
    assert plain["winner"] == found[0].winner and plain["sets"]["x"]["p_value_holm"] == found[0].adjusted["x"]


def test_problems_without_a_score_are_left_out_everywhere(rng):
    a, b = rng.random((3, 20)), rng.random((3, 20))
    gaps = a.copy(), b.copy()
    gaps[0][1, 4], gaps[1][2, 7] = np.nan, np.nan
    kept = [i for i in range(20) if i not in (4, 7)]
    found, expected = (compare(arm("a", x), arm("b", y)).overall for x, y in (gaps, (a[:, kept], b[:, kept])))
    assert found.left_out == 2 and found.estimate() == expected.estimate()


@pytest.mark.parametrize(
    ("a", "b", "options", "said"),
    [
        ({"t": [[1, 0]]}, {"u": [[1, 0]]}, {}, "different sets: t and u"),
        ({"t": [[1, 0]]}, {"t": [[1, 0, 1]]}, {}, "a has 2 problems, b has 3"),
        ({"t": [[math.nan, 0]]}, {"t": [[1, math.nan]]}, {}, "no problem has a score in every run"),
        ({"t": [[1, 0]] * 2}, {"t": [[1, 0]] * 3}, {"pair_seeds": True}, "seeds can be paired only"),
        ({"t": [[1, 0]]}, {"t": [[1, 0]]}, {"weights": {"u": 1}}, "needs a weight"),
        ({"t": [1, 0]}, {"t": [[1, 0]]}, {}, "expected scores"),
    ],
)
def test_bad_input_is_one_sentence(a, b, options, said):
    with pytest.raises(ValueError, match=said):
        compare(arm("a", a), arm("b", b), **options)
    with pytest.raises(ValueError, match="a seed twice"):
        compare(arm("a", [[1, 0], [0, 1]], [7, 7]), arm("b", [[1, 0]]))


FALSE_POSITIVES = 0.063
"""5 % and what 2,000 simulations may add by chance: 0.05 + 2.6 sqrt(0.05 * 0.95 / 2000)."""


def simulated(seeds, n, sd, gain, runs, rng, *, common=0.0, tastes=0.0):
    """Two arms, `runs` times, k = 16 samples: [runs, seeds, n] each. Problems differ in difficulty over the whole range; a seed moves an
    arm by `sd` (shares) on average over problems, of which the share `common` of the variance is the same for both arms, and each
    problem a little more on its own; b is better by `gain`, with a spread over problems of `tastes` on the logit scale."""
    difficulty = rng.uniform(size=(runs, 1, n))
    difficulty = np.log(difficulty / (1 - difficulty))
    both = rng.normal(0, sd, (runs, seeds, 1))
    liked = rng.normal(0, tastes, (runs, 1, n))
    arms = []
    for better in (0, 1):
        moved = math.sqrt(common) * both + math.sqrt(1 - common) * rng.normal(0, sd, (runs, seeds, 1)) + better * gain
        # the mean slope of the logistic curve over these problems is 1 / 6
        logits = difficulty + 6 * moved + better * liked + rng.normal(0, 0.5, (runs, seeds, n))
        arms.append(rng.binomial(16, 1 / (1 + np.exp(-logits))) / 16)
    return arms


def called(pairs, **options):
    """Share of comparisons that call one arm better, and the median detectable difference."""
    found = [compare(arm("a", a), arm("b", b), **options) for a, b in zip(*pairs, strict=True)]
    return np.mean([c.winner is not None for c in found]), np.median([c.overall.detectable() for c in found])


@pytest.mark.parametrize("seeds", [3, 5])
def test_false_positives_on_identical_arms(seeds):
    assert called(simulated(seeds, 100, 0.02, 0.0, 2000, np.random.default_rng(0)))[0] <= FALSE_POSITIVES


def test_the_test_is_not_blind():
    assert called(simulated(3, 200, 0.02, 0.05, 300, np.random.default_rng(0)))[0] > 0.35
    assert called(simulated(5, 200, 0.02, 0.05, 300, np.random.default_rng(0)))[0] > 0.75


def test_problems_alone_would_call_seeds_a_difference():
    """What a comparison of single checkpoints would do: every second pair of equal arms "differs"."""
    pairs = zip(*simulated(1, 200, 0.03, 0.0, 500, np.random.default_rng(0)), strict=True)
    wrong = [stats.paired_difference(a[0], b[0]).excludes_zero for a, b in pairs]
    assert np.mean(wrong) > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(("sd", "n"), [(0.01, 100), (0.02, 200), (0.03, 400), (0.005, 400)])
def test_false_positives_and_power_everywhere(seeds, sd, n, pair):
    for common, tastes in ((0.0, 0.0), (0.5, 0.0), (0.0, 1.0)):
        rates = []
        for gain in (0.0, 0.05):
            rate, detectable = called(
                simulated(seeds, n, sd, gain, 2000, np.random.default_rng(1), common=common, tastes=tastes), pair_seeds=pair
            )
            rates.append(rate)
        told = f"seeds={seeds} sd={sd} n={n} common={common} tastes={tastes} paired={pair}"
        print(f"{told}: false positives {rates[0]:.4f}, power at 5 points {rates[1]:.3f}, median detectable {100 * detectable:.1f} points")
        assert rates[0] <= FALSE_POSITIVES


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_false_positives_over_a_family(seeds):
    """Three equal arms on three sets: any pair called better overall, or any set after Holm within a pair."""
    rng, runs, pairs, sets = np.random.default_rng(2), 1000, 0, 0
    for _ in range(runs):
        scores = [[], [], []]
        moved = rng.normal(0, 0.02, (3, seeds, 1))  # the sets share their runs
        for n in (30, 100, 200):
            difficulty = rng.normal(0, 1.5, n)
            for one, shift in zip(scores, moved, strict=True):
                one.append(rng.binomial(16, 1 / (1 + np.exp(-difficulty - 6 * shift - rng.normal(0, 0.5, (seeds, n))))) / 16)
        found = compare_all([arm(str(i), dict(zip("xyz", x, strict=True))) for i, x in enumerate(scores)])
        pairs += any(c.winner is not None for c in found)
        sets += min(found[0].adjusted.values()) <= 0.05
    print(f"seeds={seeds}: a false winner among 3 pairs {pairs / runs:.3f}, a false set of 3 within one pair {sets / runs:.3f}")
    assert pairs / runs <= 0.065 and sets / runs <= 0.065


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("true", [0.5, 0.7, 0.9, 0.97])
def test_probability_of_improvement_covers(seeds, true):
    rng = np.random.default_rng(3)
    shift = math.sqrt(2) * scipy_stats.norm.ppf(true)
    found = [probability_of_improvement({"t": rng.normal(size=seeds)}, {"t": rng.normal(shift, size=seeds)}) for _ in range(4000)]
    covered = np.mean([e.low <= true <= e.high for e in found])
    print(f"probability of improvement {true}, {seeds} seeds: {covered:.4f}")
    assert covered >= 0.95

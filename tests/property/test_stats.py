"""What must hold of every metric, interval and test, whatever the data."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlzoo.evaluation import stats
from rlzoo.evaluation.metrics import answer_classes, maj_at_k, pass_at_k

SHARES = st.lists(st.integers(0, 16).map(lambda c: c / 16), min_size=1, max_size=40)
SAMPLES = st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 3)), st.sampled_from([0.0, 1.0])), min_size=1, max_size=12)


@given(n=st.integers(1, 300), data=st.data())
def test_pass_at_k_rises_with_right_samples_and_with_k(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    score = pass_at_k(n, c, k)
    assert 0 <= score <= 1
    assert (score == 0) == (c == 0)
    if c < n:
        assert score <= pass_at_k(n, c + 1, k)
    if k < n:
        assert score <= pass_at_k(n, c, k + 1) + 1e-12
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)


@given(samples=SAMPLES, data=st.data())
def test_maj_at_k_does_not_depend_on_order_or_names(samples, data):
    labels, correct = [list(x) for x in zip(*samples, strict=True)]
    k = data.draw(st.integers(1, len(samples)))
    score = maj_at_k(labels, correct, k)
    assert 0 <= score <= 1
    order = data.draw(st.permutations(range(len(samples))))
    names = {0: "x", 1: "y", 2: "z", 3: "w", None: None}
    assert maj_at_k([names[labels[i]] for i in order], [correct[i] for i in order], k) == pytest.approx(score, abs=1e-12)


@given(samples=SAMPLES, data=st.data())
def test_maj_at_k_rises_when_a_verdict_turns_right(samples, data):
    labels, correct = [list(x) for x in zip(*samples, strict=True)]
    k, i = data.draw(st.integers(1, len(samples))), data.draw(st.integers(0, len(samples) - 1))
    turned = [*correct[:i], 1.0, *correct[i + 1 :]]
    assert maj_at_k(labels, correct, k) <= maj_at_k(labels, turned, k) + 1e-12


@given(answers=st.lists(st.one_of(st.none(), st.integers(0, 30).map(str)), max_size=12), modulus=st.integers(1, 5), data=st.data())
def test_answer_classes_of_an_equivalence(answers, modulus, data):
    classes = answer_classes(answers, lambda a, b: int(a) % modulus == int(b) % modulus)
    for a, x in zip(answers, classes, strict=True):
        for b, y in zip(answers, classes, strict=True):
            assert (a is None) == (x is None)
            if a is not None and b is not None:
                assert (x == y) == (int(a) % modulus == int(b) % modulus)
    seen = [c for c in classes if c is not None]
    assert list(dict.fromkeys(seen)) == list(range(len(set(seen))))  # numbered in order of first appearance


@given(values=SHARES, data=st.data())
def test_intervals_of_shares(values, data):
    found = stats.clustered_mean(values)
    assert 0 <= found.low <= found.mean <= found.high <= 1
    shuffled = stats.clustered_mean(data.draw(st.permutations(values)))
    assert (shuffled.low, shuffled.high) == pytest.approx((found.low, found.high), abs=1e-12)
    mirrored = stats.clustered_mean([1 - v for v in values])  # wrong answers counted instead of right ones
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high), abs=1e-9)
    wider = stats.clustered_mean(values, level=0.99)
    assert wider.low <= found.low and found.high <= wider.high


@given(groups=st.lists(SHARES, min_size=1, max_size=4), data=st.data())
def test_overalls(groups, data):
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(groups), max_size=len(groups)))
    found = stats.stratified_mean(groups, weights)
    assert -1e-12 <= found.low <= found.mean <= found.high <= 1 + 1e-12
    doubled = stats.stratified_mean(groups, [2 * w for w in weights])
    assert (doubled.low, doubled.high) == pytest.approx((found.low, found.high))


@given(values=SHARES, data=st.data())
def test_swapping_sides_turns_a_difference_around(values, data):
    other = data.draw(st.lists(st.integers(0, 16).map(lambda c: c / 16), min_size=len(values), max_size=len(values)))
    there, back = stats.paired_difference(values, other), stats.paired_difference(other, values)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
    assert there.p_value == back.p_value
    if there.p_value is not None:
        assume(abs(there.p_value - 0.05) > 1e-9)
        assert there.excludes_zero == (there.p_value < 0.05)


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_only_raises_and_keeps_the_order(p):
    adjusted = stats.holm(p)
    assert (adjusted >= np.array(p)).all() and (adjusted <= 1).all()
    for i, j in np.ndindex(len(p), len(p)):
        if p[i] < p[j]:
            assert adjusted[i] <= adjusted[j]


@settings(max_examples=50)
@given(n=st.integers(1, 200), data=st.data(), level=st.floats(0.5, 0.999))
def test_wilson_and_clopper_pearson_move_with_the_count(n, data, level):
    c = data.draw(st.integers(0, n))
    for interval in (stats.wilson, stats.clopper_pearson):
        found = interval(c, n, level)
        assert 0 <= found.low <= found.mean <= found.high <= 1
        if c < n:
            more = interval(c + 1, n, level)
            assert (found.low < more.low and found.high < more.high) or more.high == 1

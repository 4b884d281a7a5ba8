import itertools
from collections import Counter, defaultdict

import numpy as np
import pytest

from rlzoo.evaluation.metrics import answer_classes, length_summary, maj_at_k, maj_at_k_bootstrap, pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        samples = [1] * c + [0] * (n - c)
        subsets = [any(s) for s in itertools.combinations(samples, k)]
        assert pass_at_k(n, c, k) == pytest.approx(np.mean(subsets), abs=1e-12)


def test_pass_at_k_of_large_numbers_is_finite_and_pass_at_1_is_the_mean():
    assert pass_at_k(10_000, 10, 5_000) == pytest.approx(1 - 2.0**-10, abs=1e-4)
    assert pass_at_k(16, 5, 1) == pytest.approx(5 / 16)


def test_pass_at_k_of_arrays_broadcasts():
    got = pass_at_k(4, np.array([[0, 1], [2, 4]]), 2)
    assert got.shape == (2, 2)
    assert got == pytest.approx(np.array([[0, 0.5], [1 - 1 / 6, 1]]))


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1), (np.array([4, 1]), 1, 2)])
def test_pass_at_k_refuses_what_has_no_answer(n, c, k):
    with pytest.raises(ValueError, match=r"pass@|right samples"):
        pass_at_k(n, c, k)


def voted(labels, correct):
    """One vote, written out: the mean verdict of the candidates with most votes."""
    votes = defaultdict(list)
    for label, right in zip(labels, correct, strict=True):
        if label is not None:
            votes[label].append(right)
    most = max(map(len, votes.values()), default=0)
    return np.mean([np.mean(v) for v in votes.values() if len(v) == most]) if votes else 0.0


VOTES = [
    (["a"], [1]),
    (["a", "b"], [1, 0]),
    ([None, None], [0, 0]),
    (["a", "a", "b", "c", "c", None], [1, 1, 0, 0, 0, 0]),
    (["a", "b", "c", "d", "e", "e"], [0, 1, 0, 1, 0, 0]),  # two candidates that are right
    (["a", "a", "a", "b", "b", "b", None], [1, 1, 0, 0, 0, 0, 0]),  # one that was judged differently
    ([None, "a", None, None, "b"], [0, 0, 0, 0, 1]),
    ([3, 1, 3, 2, 1, 0, 0, 3], [0, 1, 0, 0, 1, 0, 0, 0]),
]


@pytest.mark.parametrize(("labels", "correct"), VOTES)
def test_maj_at_k_is_the_mean_vote_over_all_subsets(labels, correct):
    for k in range(1, len(labels) + 1):
        subsets = itertools.combinations(zip(labels, correct, strict=True), k)
        assert maj_at_k(labels, correct, k) == pytest.approx(np.mean([voted(*zip(*s, strict=True)) for s in subsets]), abs=1e-12)
    assert maj_at_k(labels, correct, 1) == pytest.approx(np.mean(np.where([x is None for x in labels], 0, correct)))
    assert maj_at_k(labels, correct) == pytest.approx(voted(labels, correct))


def test_maj_at_k_of_many_samples():
    # two candidates: the vote of an odd k is right where at least (k + 1) / 2 of the draws are, a hypergeometric tail
    from scipy.stats import hypergeom

    labels, correct = ["a"] * 650 + ["b"] * 550, [1] * 650 + [0] * 550  # more subsets than a float can count
    assert maj_at_k(labels, correct, 401) == pytest.approx(hypergeom.sf(200, 1200, 650, 401), rel=1e-9)


def test_maj_at_k_edges():
    assert maj_at_k(["a", "b"], [1, 0]) == 0.5  # a tie shares the vote
    assert maj_at_k(["a", None, None], [1, 0, 0]) == 1  # no answer, no vote
    assert maj_at_k(["a", "b", "b"], [1, float("nan"), float("nan")]) == 1  # not graded: left out
    with pytest.raises(ValueError, match="k <= 2"):
        maj_at_k(["a", "b"], [1, 0], k=3)
    with pytest.raises(ValueError, match="k <= 1 graded"):
        maj_at_k(["a", "b"], [1, float("nan")], k=2)
    with pytest.raises(ValueError, match="2 labels but 1"):
        maj_at_k(["a", "b"], [1])


def papers_rule(labels, correct, k, resamples, seed):
    """verl's procedure: the global generator, a dict of votes in order of drawing, the first maximum."""
    np.random.seed(seed)
    scores = []
    for _ in range(resamples):
        drawn = np.random.choice(len(labels), size=k, replace=True)
        values = {}
        for i in drawn:
            values.setdefault(labels[i], []).append(correct[i])
        counts = {label: len(v) for label, v in values.items()}
        scores.append(values[max(counts, key=counts.get)][0])
    return np.mean(scores)


@pytest.mark.parametrize(("labels", "correct"), VOTES)
def test_the_papers_bootstrap(labels, correct):
    assert maj_at_k_bootstrap(labels, correct) == pytest.approx(papers_rule(labels, correct, 16, 1000, 42), abs=1e-12)
    assert maj_at_k_bootstrap(labels, correct, 4, resamples=50, seed=1) == pytest.approx(papers_rule(labels, correct, 4, 50, 1), abs=1e-12)


def test_the_papers_bootstrap_counts_no_answer_as_a_candidate():
    assert maj_at_k_bootstrap(["a", None, None, None], [1, 0, 0, 0]) < 0.1
    assert maj_at_k(["a", None, None, None], [1, 0, 0, 0]) == 1
    with pytest.raises(ValueError, match="one verdict per label"):
        maj_at_k_bootstrap([], [])


def test_answer_classes():
    answers = ["1/2", "0.5", None, "1/2", "50%", "7", "7.0"]
    assert answer_classes(answers) == [0, 1, None, 0, 2, 3, 4]
    value = {"1/2": 0.5, "0.5": 0.5, "50%": 0.5, "7": 7, "7.0": 7}
    asked = Counter()

    def same(a, b):
        asked[a, b] += 1
        return value[a] == value[b]

    assert answer_classes(answers, same) == [0, 0, None, 0, 0, 1, 1]
    assert max(asked.values()) == 1
    order = list(value)
    assert all(order.index(a) < order.index(b) for a, b in asked)
    assert ("0.5", "50%") not in asked  # joined through 1/2 already
    assert answer_classes([], same) == []


def test_answer_classes_are_the_transitive_closure():
    near = lambda a, b: abs(float(a) - float(b)) <= 1  # noqa: E731
    assert answer_classes(["1", "3", "9", "2"], near) == [0, 0, 1, 0]


def test_length_summary():
    assert length_summary(range(101)) == {"mean": 50, "median": 50, "p95": 95}
    assert all(np.isnan(v) for v in length_summary([]).values())

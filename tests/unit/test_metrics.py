import itertools

import numpy as np
import pytest

from rlzoo.evaluation.metrics import length_summary, maj_at_k, pass_at_k


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


def test_majority():
    assert maj_at_k(["a", "a", "b"], [1, 1, 0]) == 1
    assert maj_at_k(["a", "b", "b"], [1, 0, 0]) == 0
    assert maj_at_k(["a", "b"], [1, 0]) == 0.5  # a tie shares the vote
    assert maj_at_k(["a", None, None], [1, 0, 0]) == 1  # no answer, no vote
    assert maj_at_k([None, None], [0, 0]) == 0
    assert maj_at_k(["a", "b", "b"], [1, 0, 0], k=1) == 1
    with pytest.raises(ValueError, match="k <= 2"):
        maj_at_k(["a", "b"], [1, 0], k=3)
    with pytest.raises(ValueError, match="2 labels but 1"):
        maj_at_k(["a", "b"], [1])


def test_length_summary():
    assert length_summary(range(101)) == {"mean": 50, "median": 50, "p95": 95}
    assert all(np.isnan(v) for v in length_summary([]).values())

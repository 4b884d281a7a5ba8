"""Pass@1, pass@k and majority votes from counts and verdicts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..tree import Float64


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> Any:
    """Unbiased estimate of the chance that at least one of k samples is right, from c right ones among n.

    1 - C(n-c, k) / C(n, k), computed as a product so that nothing overflows (Chen et al. 2021, arXiv:2107.03374, eq. 1).
    `n` and `c` are scalars or arrays that broadcast; the answer is a float or float64 array of that shape. It is unbiased for
    independent samples at fixed n; k = 1 is the plain mean c / n.

    Raises:
        ValueError: k < 1, k > n, or c outside 0..n.
    """
    total, right = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    if k < 1:
        raise ValueError(f"pass@k needs k >= 1, not {k}")
    if (total < k).any():
        raise ValueError(f"pass@{k} needs at least {k} samples per problem; one problem has {int(total.min())}")
    if ((right < 0) | (right > total)).any():
        raise ValueError("the number of right samples must lie between 0 and the number of samples")
    flat = [_pass_at_k(int(a), int(b), k) for a, b in zip(total.ravel(), right.ravel(), strict=True)]
    return flat[0] if total.ndim == 0 else np.array(flat, np.float64).reshape(total.shape)


def _pass_at_k(n: int, c: int, k: int) -> float:
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def answer_classes(answers: Sequence[str | None], equivalent: Callable[[str, str], bool] | None = None) -> list[int | None]:
    """Sort one problem's answers into candidates for a vote: a class number per answer, None where there is no answer.

    Classes are numbered in order of first appearance. Identical strings are one class; with `equivalent` (the grader's rule) two
    classes are joined where it holds for any pair of their strings, so that the classes are its transitive closure. It is called
    once at most per pair of different strings, the earlier one first, and never for a pair that is joined already. Without it:
    identical strings only, the vote of the papers.
    """
    distinct = list(dict.fromkeys(a for a in answers if a is not None))
    parent = list(range(len(distinct)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    if equivalent is not None:
        for j in range(1, len(distinct)):
            for i in range(j):
                first, second = sorted((root(i), root(j)))
                if first != second and equivalent(distinct[i], distinct[j]):
                    parent[second] = first
    numbers: dict[int, int] = {}
    classes = {answer: numbers.setdefault(root(i), len(numbers)) for i, answer in enumerate(distinct)}
    return [None if a is None else classes[a] for a in answers]


def maj_at_k(labels: Sequence[Hashable | None], correct: Sequence[float], k: int | None = None) -> float:
    """Chance that the vote of k of one problem's n samples is right, in [0, 1]; k = n (the default) is the vote of all of them.

    Exact: the mean over all C(n, k) subsets, so that it is unbiased as pass@k is, and maj@1 is the share of right samples. `labels`
    name what each sample answered: equal labels are one candidate (see `answer_classes`); None answered nothing and does not vote.
    `correct` is 1 right, 0 wrong per sample; NaN (grading failed) leaves the sample out. A tie is broken at random, so the tied
    candidates share the vote. A candidate whose samples were judged differently counts by their mean. Nobody voted: 0.

    With c_j samples of candidate j, a subset has a_j votes for it with chance prod_j C(c_j, a_j) / C(n, k). For each number t of
    winning votes a recursion over the candidates sums those chances by (samples used, candidates with exactly t votes).

    Raises:
        ValueError: lengths differ, or k is outside 1..graded samples.
    """
    candidates, silent = _candidates(labels, correct)
    n = silent + sum(c for c, _ in candidates)
    k = n if k is None else k
    if not 1 <= k <= n:
        raise ValueError(f"maj@k needs 1 <= k <= {n} graded samples, not {k}")
    # Binomial weights with the success chance k / n turn into the hypergeometric ones when conditioned on a total of k: no overflow.
    draws = {c: _binomial(c, k / n) for c in {silent, n, *(c for c, _ in candidates)}}
    most = max((c for c, _ in candidates), default=0)
    score = 0.0
    for t in range(1, min(most, k) + 1):
        chance = np.zeros((k + 1, k // t + 1))  # [samples used, tied candidates]
        chance[0, 0] = 1.0
        right = np.zeros_like(chance)  # the same, times the sum of the tied candidates' shares of right
        for c, share in candidates:
            weights, chance_was, right_was = draws[c], chance, right
            chance, right = np.zeros_like(chance), np.zeros_like(right)
            for a in range(min(c, t - 1) + 1):
                chance[a:] += weights[a] * chance_was[: k + 1 - a]
                right[a:] += weights[a] * right_was[: k + 1 - a]
            if c >= t:
                chance[t:, 1:] += weights[t] * chance_was[: k + 1 - t, :-1]
                right[t:, 1:] += weights[t] * (right_was[: k + 1 - t, :-1] + share * chance_was[: k + 1 - t, :-1])
        used = np.arange(max(0, k - silent), k + 1)
        ties = np.arange(1, chance.shape[1])
        score += float((draws[silent][k - used] @ right[used, 1:] / ties).sum())
    return min(1.0, score / float(draws[n][k]))


def maj_at_k_bootstrap(
    labels: Sequence[Hashable | None], correct: Sequence[float], k: int = 16, *, resamples: int = 1000, seed: int = 42
) -> float:
    """maj@k as the TreePO paper prints it: the mean over `resamples` draws of k of one problem's samples *with* replacement.

    As verl's `bootstrap_metric` and `calc_maj_val` compute it, with the same random numbers (numpy's legacy generator, seeded anew
    for each problem): the most frequent label wins, among tied ones the one that was drawn first, and the verdict of that label's
    first drawn sample is the score. No answer (None) is a candidate like any other, and a draw with replacement repeats samples:
    a biased estimate of the vote of k fresh samples, kept to stand beside published numbers.

    Raises:
        ValueError: no samples, lengths differ, or k or `resamples` below 1.
    """
    if len(labels) != len(correct) or not labels or k < 1 or resamples < 1:
        raise ValueError(f"a bootstrap of maj@{k} needs one verdict per label, k >= 1, and samples; got {len(labels)} and {len(correct)}")
    total = 0.0
    for drawn in np.random.RandomState(seed).choice(len(labels), size=(resamples, k)).tolist():
        # Counter keeps the order of first appearance, and most_common and next both take the first.
        winner = Counter(labels[i] for i in drawn).most_common(1)[0][0]
        total += float(next(correct[i] for i in drawn if labels[i] == winner))
    return total / resamples


def _candidates(labels: Sequence[Hashable | None], correct: Sequence[float]) -> tuple[list[tuple[int, float]], int]:
    """(samples, share of right ones) of each candidate, and the number of samples without an answer; ungraded samples left out."""
    if len(labels) != len(correct):
        raise ValueError(f"{len(labels)} labels but {len(correct)} verdicts")
    votes: dict[Hashable, list[float]] = {}
    silent = 0
    for label, right in zip(labels, correct, strict=True):
        if math.isnan(right):
            continue
        if label is None:
            silent += 1
        else:
            votes.setdefault(label, []).append(float(right))
    return [(len(v), sum(v) / len(v)) for v in votes.values()], silent


def _binomial(n: int, p: float) -> Float64:
    """Chances of 0..n successes, float64 [n + 1]."""
    from scipy.special import gammaln, xlog1py, xlogy

    a = np.arange(n + 1)
    log_choose = gammaln(n + 1) - gammaln(a + 1) - gammaln(n - a + 1)
    return np.asarray(np.exp(log_choose + xlogy(a, p) + xlog1py(n - a, -p)), np.float64)


def length_summary(lengths: ArrayLike) -> dict[str, float]:
    """Mean, median and 95th percentile of response lengths, tokens; NaN for no responses."""
    values: Float64 = np.asarray(lengths, np.float64)
    if values.size == 0:
        return {"mean": float("nan"), "median": float("nan"), "p95": float("nan")}
    return {"mean": float(values.mean()), "median": float(np.median(values)), "p95": float(np.percentile(values, 95))}

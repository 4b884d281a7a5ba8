"""Pass@1, pass@k and majority votes from counts and verdicts."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
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


def maj_at_k(labels: Sequence[Hashable | None], correct: Sequence[float], k: int | None = None) -> float:
    """Chance that the vote of one problem's first k samples is right, in [0, 1].

    `labels` name what each sample answered: equal labels are one candidate (strings for the papers' rule, ids of equivalence
    classes for a vote over equivalent answers); None answered nothing and does not vote. `correct` is 1 right, 0 wrong per
    sample. A tie is broken at random, so the tied candidates share the vote. A candidate whose samples were judged differently
    counts by their mean. Nobody voted: 0.

    Raises:
        ValueError: lengths differ, or k is outside 1..samples.
    """
    if len(labels) != len(correct):
        raise ValueError(f"{len(labels)} labels but {len(correct)} verdicts")
    k = len(labels) if k is None else k
    if not 1 <= k <= len(labels):
        raise ValueError(f"maj@k needs 1 <= k <= {len(labels)} samples, not {k}")
    votes: dict[Hashable, list[float]] = {}
    for label, right in zip(labels[:k], correct[:k], strict=True):
        if label is not None:
            votes.setdefault(label, []).append(float(right))
    if not votes:
        return 0.0
    most = max(len(v) for v in votes.values())
    return float(np.mean([np.mean(v) for v in votes.values() if len(v) == most]))


def length_summary(lengths: ArrayLike) -> dict[str, float]:
    """Mean, median and 95th percentile of response lengths, tokens; NaN for no responses."""
    values: Float64 = np.asarray(lengths, np.float64)
    if values.size == 0:
        return {"mean": float("nan"), "median": float("nan"), "p95": float("nan")}
    return {"mean": float(values.mean()), "median": float(np.median(values)), "p95": float(np.percentile(values, 95))}

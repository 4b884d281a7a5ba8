"""How a budget of continuations is divided among the paths that go on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ..tree import Float64


def uniform_shares(total: int, paths: int, remainder: Literal["random", "last"], rng: np.random.Generator) -> list[int]:
    """`total` in equal whole parts; what is left over goes one each to randomly chosen paths, or all of it to the last one.

    Raises:
        ValueError: less than one for each path.
    """
    _check(total, paths)
    shares = [total // paths] * paths
    left = total % paths
    if remainder == "last":
        shares[-1] += left
    else:
        for i in rng.permutation(paths)[:left]:
            shares[i] += 1
    return shares


def weighted_shares(total: int, weights: Float64) -> list[int]:
    """One for each path, and the rest of `total` in proportion to `weights` [paths] (summing to 1), by largest remainder; of
    equal remainders the first.

    Raises:
        ValueError: less than one for each path.
    """
    _check(total, len(weights))
    quota = weights * (total - len(weights))
    shares = np.floor(quota + 1e-9).astype(int)  # a quota that is whole but for rounding counts as whole
    left = total - len(weights) - int(shares.sum())
    shares[np.argsort(-(quota - shares), kind="stable")[:left]] += 1
    return [1 + int(s) for s in shares]


def softmax(scores: Sequence[float] | Float64, temperature: float) -> Float64:
    """exp(scores / temperature), normalised; float64 [paths]."""
    scaled = np.asarray(scores, np.float64) / temperature
    powers = np.exp(scaled - scaled.max())
    weights: Float64 = powers / powers.sum()
    return weights


def scheduled(temperatures: Sequence[float], progress: float) -> float:
    """A temperature: constant, or half a sine from the first of two to the second as `progress` goes from 0 to 1."""
    first, last = temperatures[0], temperatures[-1]
    return (first + last) / 2 + (last - first) / 2 * math.sin(math.pi * progress - math.pi / 2)


def _check(total: int, paths: int) -> None:
    if total < paths:
        raise ValueError(f"{total} continuations for {paths} paths; each needs one")

"""Advantages of a whole batch brought to mean 0 and variance 1 over its response tokens: those that are trained, where it is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ..tree import Int64, Tree
from .base import Credit, CreditFunction

EPS = 1e-8
OPTION = "whitening"  # of a credit function that whitens; "none" switches it off


def unwhitened(credit: CreditFunction) -> CreditFunction:
    """The credit function without its whitening; itself, the same object, where it has none."""
    if getattr(credit, OPTION, "none") == "none":
        return credit
    return replace(credit, **{OPTION: "none"})  # type: ignore[type-var]


def whiten_trained(trees: Sequence[Tree], credits: Sequence[Credit], old_logprobs: Sequence[NDArray[np.floating]]) -> list[Credit]:
    """`whiten` over the tokens that are trained: those of rows that no mask left out, of the token mask, with a finite old log-prob
    ([tokens] per tree). To be called once all masks are applied, as mean and variance of what is left are others than of the whole."""
    counted = []
    for tree, credit, old in zip(trees, credits, old_logprobs, strict=True):
        trained = np.isfinite(old) if credit.token_mask is None else np.isfinite(old) & credit.token_mask
        before = np.concatenate([[0], np.cumsum(trained)])
        first = tree.offsets[credit.node].astype(np.int64)
        counted.append(before[first + credit.stop] - before[first + credit.start])
    return whiten(credits, counted)


def whiten(credits: Sequence[Credit], counted: Sequence[Int64] | None = None) -> list[Credit]:
    """(a - mu) / sqrt(var + 1e-8), mu and the unbiased var over all tokens of all credits; of each term `counted` [terms] of them
    (default: all).

    A token counts once per term that covers it: in rows of whole paths a shared token counts once per leaf through it, as when
    responses are unrolled (REINFORCE++, arXiv 2501.03262; `masked_whiten` of verl). Equal advantages all become 0, also those
    of a batch of one token.

    Raises:
        ValueError: a credit has a token mask, whose tokens cannot be counted without its tree, and `counted` is not given.
    """
    if counted is None and any(credit.token_mask is not None for credit in credits):
        raise ValueError("credits with a token mask cannot be whitened")
    if not credits:
        return []
    advantage = np.concatenate([credit.advantage for credit in credits])
    tokens = np.concatenate([c.stop - c.start for c in credits] if counted is None else counted).astype(np.float64)
    total = tokens.sum()
    if total == 0:
        return list(credits)
    mean = (tokens * advantage).sum() / total
    variance = (tokens * (advantage - mean) ** 2).sum() / max(total - 1, 1)
    scale = np.sqrt(variance + EPS)
    return [replace(credit, advantage=(credit.advantage - mean) / scale) for credit in credits]

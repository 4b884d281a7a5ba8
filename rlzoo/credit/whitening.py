"""Advantages of a whole batch brought to mean 0 and variance 1 over its response tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .base import Credit

EPS = 1e-8


def whiten(credits: Sequence[Credit]) -> list[Credit]:
    """(a - mu) / sqrt(var + 1e-8), mu and the unbiased var over all trained tokens of all credits.

    A token counts once per term that covers it: in rows of whole paths a shared token counts once per leaf through it, as when
    responses are unrolled (REINFORCE++, arXiv 2501.03262; `masked_whiten` of verl). Equal advantages all become 0, also those
    of a batch of one token.

    Raises:
        ValueError: a credit has a token mask, whose tokens cannot be counted without its tree.
    """
    if any(credit.token_mask is not None for credit in credits):
        raise ValueError("credits with a token mask cannot be whitened")
    if not credits:
        return []
    advantage = np.concatenate([credit.advantage for credit in credits])
    tokens = np.concatenate([credit.stop - credit.start for credit in credits]).astype(np.float64)
    total = tokens.sum()
    if total == 0:
        return list(credits)
    mean = (tokens * advantage).sum() / total
    variance = (tokens * (advantage - mean) ** 2).sum() / max(total - 1, 1)
    scale = np.sqrt(variance + EPS)
    return [replace(credit, advantage=(credit.advantage - mean) / scale) for credit in credits]

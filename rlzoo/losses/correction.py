"""Sampler and trainer give the same token different probabilities: how far apart they are, and what the loss does about it.

A second engine (or precision, or a stale weight) makes training off-policy even on the first step: "Your Efficient RL Framework
Secretly Brings You Off-Policy RL Training" (Yao et al. 2025). The maths and the choices are in docs/correction.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..credit.base import Credit
from ..options import Options, Share, Within
from ..tree import Float32, Float64, Tree
from .aggregate import Terms, write_out
from .policy import LOG_RATIO_LIMIT

OldLogprobs = Literal["auto", "sampler", "recomputed"]
Importance = Literal["auto", "none", "truncated"]
Masking = Literal["none", "mask"]
AtLeastOne = Annotated[float, Within(1)]


class MismatchError(RuntimeError):
    """Sampler and trainer are further apart than allowed; raised before the step's first update, so nothing of it is applied."""


@dataclass(frozen=True)
class CorrectionOptions(Options):
    """What is done about the ratio trainer / sampler of a token's probabilities, both before the step's first update.

    Raises:
        ValueError: an option is out of range, or two do not go together.
    """

    section: ClassVar[str] = "correction"

    old_logprobs: OldLogprobs = "auto"
    """What the policy's ratio is taken against: the sampler's log-probs, or the trainer's, which cost one more forward pass. auto:
    recomputed where importance is truncated, else the sampler's."""
    importance: Importance = "auto"
    """truncated: a token weighs min(ratio, cap). Only with recomputed: against the sampler's log-probs nothing is left to correct.
    auto: truncated where engine or trainer computes in bfloat16 (and old_logprobs is not sampler), else none."""
    cap: AtLeastOne = 2.0
    """Largest importance weight."""
    sequence: Masking = "none"
    """mask: responses outside the bounds below are left out of loss and denominators. Costs the forward pass of recomputed."""
    low: Share = 0.9
    """Least geometric mean of the ratio over a response's tokens."""
    high: AtLeastOne = 1.1
    """Largest geometric mean."""
    token_low: Share = 1e-4
    """Least ratio of any token of a response; 0 switches it off."""
    token_high: AtLeastOne = 100.0
    """Largest ratio of any token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance == "truncated" and self.old_logprobs == "sampler":
            raise ValueError(
                "correction.importance = truncated would correct twice: with correction.old_logprobs = sampler the policy's ratio is "
                "taken against the sampler already; use recomputed, or importance = none"
            )

    def chosen(self, *, rough: bool) -> CorrectionOptions:
        """The same with every auto decided. `rough`: sampler or trainer computes in bfloat16, whose log-probs are off by some percent."""
        importance, old = self.importance, self.old_logprobs
        if importance == "auto":
            importance = "truncated" if rough and old != "sampler" else "none"
        if old == "auto":
            old = "recomputed" if importance == "truncated" else "sampler"
        return replace(self, old_logprobs=old, importance=importance)

    def told(self, chosen: CorrectionOptions) -> str | None:
        """A sentence where auto has switched a correction on."""
        if self.importance == chosen.importance or chosen.importance == "none":
            return None
        return (
            f"bfloat16: the sampler's rounding is corrected for by importance weights up to {self.cap:g}, against old log-probs of the "
            "trainer (--correction.importance none switches it off)"
        )

    @property
    def scored(self) -> bool:
        """Whether the trainer's log-probs are needed before the first update."""
        return self.old_logprobs == "recomputed" or self.sequence == "mask"

    @property
    def active(self) -> bool:
        """Whether the loss changes."""
        return self.importance == "truncated" or self.sequence == "mask"


@dataclass(frozen=True, eq=False)
class Corrected:
    """What the loss takes: `credits` without masked rows; `importance` [tokens] per tree, None for no weights; how many rows are
    masked and how many of the remaining trained tokens weigh the cap instead of their ratio."""

    credits: Sequence[Credit]
    importance: list[Float64] | None = None
    masked_rows: int = 0
    truncated_tokens: int = 0


def log_ratios(trees: Sequence[Tree], scores: Sequence[Float32]) -> list[Float64]:
    """log(trainer / sampler) float64 [tokens] per tree, the trainer's log-probs being `scores`; NaN where one is not finite."""
    with np.errstate(invalid="ignore"):
        found = [s.astype(np.float64) - t.logprobs for t, s in zip(trees, scores, strict=True)]
    return [np.where(np.isfinite(x), x, np.nan) for x in found]


def mismatch(log_ratio: Float64) -> dict[str, float]:
    """How far apart sampler and trainer are over sampled tokens with these log(trainer / sampler) [tokens]; nothing for none.

    `ratio_mean`, `ratio_p99`: of trainer / sampler (the mean's expectation is 1). `kl`: KL(sampler || trainer), the plain mean of
    log(sampler / trainer) (k1); `kl_k3`: the same by ratio - 1 - log ratio, unbiased too, never negative, with less variance
    (Schulman, "Approximating KL divergence"). Ratios are taken up to e^20.
    """
    if len(log_ratio) == 0:
        return {}
    clipped = np.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    ratio = np.exp(clipped)
    return {
        "ratio_mean": float(ratio.mean()),
        "ratio_p99": float(np.quantile(ratio, 0.99)),
        "kl": float(-log_ratio.mean()),
        "kl_k3": float((np.expm1(clipped) - clipped).mean()),
    }


def refuse_drift(found: dict[str, float], allowed: float) -> None:
    """Compare `mismatch(...)` with the KL allowed (k3; 0 allows any).

    Raises:
        MismatchError: it is larger, or there is nothing to measure it on.
    """
    if not allowed:
        return
    if not found:
        raise MismatchError("max_mismatch_kl cannot be kept: no trained token has a log-prob of the sampler's; no update was made")
    if found["kl_k3"] > allowed:
        raise MismatchError(f"KL(sampler || trainer) is {found['kl_k3']:.3g} and max_mismatch_kl allows {allowed:g}; no update was made")


def correct(trees: Sequence[Tree], credits: Sequence[Credit], log_ratio: Sequence[Float64], options: CorrectionOptions) -> Corrected:
    """Masked rows and importance weights by `log_ratio`, log(trainer / sampler) [tokens] per tree. Weights are fixed for the step."""
    kept, masked = (credits, 0) if options.sequence == "none" else mask_rows(trees, credits, log_ratio, options)
    if options.importance != "truncated":
        return Corrected(kept, masked_rows=masked)
    trained = [np.unique(terms.token) for terms in write_out(trees, kept, log_ratio)]
    above = sum(int((x[t] > math.log(options.cap)).sum()) for x, t in zip(log_ratio, trained, strict=True))
    return Corrected(kept, [importance_weights(x, options.cap) for x in log_ratio], masked, above)


def importance_weights(log_ratio: Float64, cap: float) -> Float64:
    """Truncated importance weights [tokens], min(trainer / sampler, cap) (Yao et al. 2025; Ionides 2008); 1 where unknown."""
    return np.where(np.isnan(log_ratio), 1.0, np.exp(np.minimum(log_ratio, math.log(cap))))


def mask_rows(
    trees: Sequence[Tree], credits: Sequence[Credit], log_ratio: Sequence[Float64], options: CorrectionOptions
) -> tuple[list[Credit], int]:
    """Credits without the rows whose tokens the trainer finds too unlike what was sampled, and how many those are.

    A row goes if the geometric mean of trainer / sampler over its counted tokens lies outside [low, high], or the ratio of any one
    of them outside [token_low, token_high] ("When Speed Kills Stability", Liu, Li et al. 2025: geometric rejection and veto).
    Tokens without a known ratio do not decide. What is left out is out of the denominators too.
    """
    kept, masked = [], 0
    for credit, terms, x in zip(credits, write_out(trees, credits, log_ratio), log_ratio, strict=True):
        out = _outside(terms, x, options)
        masked += int(out.sum())
        kept.append(credit.without_rows(out) if out.any() else credit)
    return kept, masked


def _outside(terms: Terms, log_ratio: Float64, options: CorrectionOptions) -> NDArray[np.bool_]:
    """Which rows [rows] lie outside the bounds; a row without counted tokens does not."""
    x, rows = log_ratio[terms.token], len(terms.tokens_of_row)
    mean = np.bincount(terms.row, x, rows) / np.maximum(terms.tokens_of_row, 1)
    least, most = np.full(rows, np.inf), np.full(rows, -np.inf)
    np.minimum.at(least, terms.row, x)
    np.maximum.at(most, terms.row, x)
    with np.errstate(divide="ignore"):  # a bound of 0 is no bound
        low, high, token_low, token_high = np.log([options.low, options.high, options.token_low, options.token_high])
    return np.asarray((mean < low) | (mean > high) | (least < token_low) | (most > token_high))

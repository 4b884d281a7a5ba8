"""The policy loss: a clipped surrogate per unique token, with an optional KL penalty to a reference and an entropy bonus.

A token shared by several responses has one ratio, so its occurrences need only the sums of their weighted positive and
negative advantages (see docs/packing.md); `aggregate` makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from ..options import Count, NotNegative, Options, Share, Within

if TYPE_CHECKING:
    import torch

Aggregation = Literal["token_mean", "sequence_mean", "constant"]

LOG_RATIO_LIMIT = 20.0  # e^20 is far outside any clip range and still finite after squaring in float32


@dataclass(frozen=True)
class TokenBatch:
    """Per unique token, all [tokens]: log-probs of the policy (with gradient), old and reference ones (without), the summed
    weights `a_pos` = Σ w·max(A, 0), `a_neg` = Σ w·min(A, 0), `weight` = Σ w over the rows that hold the token, and the entropy
    of the policy's distribution there (with gradient), in nats."""

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    a_pos: torch.Tensor
    a_neg: torch.Tensor
    weight: torch.Tensor
    ref_logprobs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None


@dataclass(frozen=True)
class PolicyLoss(Options):
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7) with separate clips (DAPO, eq. 10), dual clip (Ye et al. 2020,
    eq. 5), the k3 estimator of KL(policy || reference) (GRPO, eq. 4) and an entropy bonus (A3C, arXiv 1602.01783, section 4).
    Minimised:

        -Σ [min(r, 1 + clip_high)·A⁺ + min(max(r, 1 - clip_low), dual_clip)·A⁻] + Σ w·[kl_coef·(e^d - d - 1) - entropy_coef·H]

    with r = exp(logp - old), d = ref - logp, H the entropy of the token's distribution at the sampling temperature.
    `aggregation` says what one token of one row weighs (see `aggregate`): "token_mean" (every token alike), "sequence_mean"
    (every row alike) or "constant" (1 / (rows · constant_tokens)).

    Raises:
        ValueError: an option is out of range.
    """

    name: ClassVar[str] = "policy"
    section: ClassVar[str] = "loss"

    clip_low: Share = 0.2
    clip_high: NotNegative = 0.2
    dual_clip: Annotated[float, Within(1, above=True)] | None = None
    kl_coef: NotNegative = 0.0
    entropy_coef: NotNegative = 0.0
    aggregation: Aggregation = "token_mean"
    constant_tokens: Count | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aggregation == "constant" and self.constant_tokens is None:
            raise ValueError("loss.aggregation 'constant' needs loss.constant_tokens, a whole number of at least 1")
        if self.aggregation != "constant" and self.constant_tokens is not None:
            raise ValueError(f"loss.constant_tokens is only used by loss.aggregation 'constant', not by {self.aggregation!r}")

    @property
    def needs(self) -> frozenset[str]:
        """What it requires of the other parts."""
        return frozenset({name for name, coef in (("ref_logprobs", self.kl_coef), ("entropy", self.entropy_coef)) if coef > 0})

    def __call__(self, batch: TokenBatch) -> torch.Tensor:
        """The loss of these tokens, a scalar: sums, since the denominators are in the weights.

        Raises:
            ValueError: kl_coef > 0 without reference log-probs, or entropy_coef > 0 without entropies.
        """
        ratio = (batch.logprobs - batch.old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        # clamp, not minimum: a minimum halves the gradient where its arguments tie
        up = ratio.clamp(max=1 + self.clip_high)
        down = ratio.clamp(min=1 - self.clip_low, max=self.dual_clip)
        loss = -(up * batch.a_pos + down * batch.a_neg).sum()
        if self.kl_coef > 0:
            if batch.ref_logprobs is None:
                raise ValueError(f"kl_coef is {self.kl_coef} but the trees carry no reference log-probs")
            loss = loss + self.kl_coef * (batch.weight * k3(batch.ref_logprobs - batch.logprobs)).sum()
        if self.entropy_coef > 0:
            if batch.entropy is None:
                raise ValueError(f"entropy_coef is {self.entropy_coef} but the batch carries no entropies")
            loss = loss - self.entropy_coef * (batch.weight * batch.entropy).sum()
        return loss


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """e^x - x - 1 (Schulman, "Approximating KL divergence"): with x = log p - log q under samples of q, an unbiased,
    never negative estimator of KL(q || p)."""
    clamped = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    return clamped.expm1() - clamped

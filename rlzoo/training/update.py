"""One update of the policy from credited trees, and teacher-forced scoring by the same packed forward pass."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..credit.base import Credit
from ..losses.aggregate import Counts, TokenWeights, aggregate
from ..losses.correction import Corrected, CorrectionOptions, correct, log_ratios, mismatch, refuse_drift
from ..losses.policy import PolicyLoss, TokenBatch
from ..tree import ROOT, Float32, Float64, Int64, Tree
from .forward import Head, autocast, forward_of, pack_logprobs
from .optim import allocate_moments
from .packing import Bool, Pack, PackStats, pack
from .retry import TokenBudget
from .rows import Layout

log = logging.getLogger(__name__)

NO_CORRECTION = CorrectionOptions()
DEFAULT_TOKEN_BUDGET = 8192  # on a CPU, larger packs fall out of its caches: 16384 took 8 % longer on a 0.8 M model


class BrokenStepError(RuntimeError):
    """An optimiser step that failed after it had changed some of the weights."""


class NonFiniteError(RuntimeError):
    """A loss or gradient that is not finite; raised before the optimiser step, so the weights are those of the last one."""


@dataclass(frozen=True)
class ForwardOptions:
    """How trees pass through the model. `vocab_size`: ids of the tokenizer (those beyond have probability 0, and so have `holes`; None: all
    of the head). `token_budget`: rows · length of one pack. `autocast_dtype`: what forward passes compute in, None for the model's own."""

    temperature: float = 1.0
    vocab_size: int | None = None
    token_budget: int = DEFAULT_TOKEN_BUDGET
    layout: Layout = "packed"
    autocast_dtype: torch.dtype | None = None
    entropy: bool = False
    holes: Sequence[int] = ()


@dataclass(frozen=True, eq=False)
class Gradients:
    """What one pass over a mini-batch gave, beside the gradients left in the parameters. Per trained token of every pack,
    concatenated: `target` (index into the concatenated tokens of the trees), `log_ratio` (policy / old), `share`, `entropy`,
    `ref_gap` (ref - policy) and signs of the advantages."""

    loss: float
    target: Int64
    log_ratio: Float64
    share: Float64
    helped: Bool
    hurt: Bool
    entropy: Float64 | None
    ref_gap: Float64 | None
    stats: PackStats


def gradients(
    model: nn.Module,
    trees: Sequence[Tree],
    weights: Sequence[TokenWeights],
    old_logprobs: Sequence[Float32],
    loss: PolicyLoss,
    options: ForwardOptions,
    *,
    head: Head | None = None,
) -> Gradients:
    """Add the gradient of the loss over `trees` to the parameters' `.grad`, pack by pack.

    `weights` carry the denominators of the whole mini-batch, so that the sum over packs is the gradient of one big batch.
    `old_logprobs` [tokens] per tree.

    Raises:
        ValueError: the loss needs reference log-probs and a tree has none.
    """
    head = head or Head.of(model)
    packs, stats = pack(trees, [w.weight > 0 for w in weights], options.token_budget, layout=options.layout)
    flat = _flatten(trees, weights, old_logprobs, loss)
    device, total = next(model.parameters()).device, 0.0
    parts: list[tuple[torch.Tensor | None, ...]] = []
    for p in packs:
        with forward_of(model, options.layout), autocast(device, options.autocast_dtype):
            logprobs, entropy = pack_logprobs(
                model, p, head, temperature=options.temperature, vocab_size=options.vocab_size, holes=options.holes, entropy=options.entropy
            )
        batch = _token_batch(flat, p, logprobs, entropy)
        value = loss(batch)
        with forward_of(model, options.layout):  # checkpointed layers run forward again
            value.backward()  # type: ignore[no-untyped-call]
        total += float(value.detach())
        with torch.no_grad():
            gap = None if batch.ref_logprobs is None else batch.ref_logprobs - logprobs
            parts.append(
                (
                    logprobs.detach() - batch.old_logprobs,
                    batch.a_pos > 0,
                    batch.a_neg < 0,
                    None if entropy is None else entropy.detach(),
                    gap,
                )
            )
    columns = [_column(c) for c in zip(*parts, strict=True)] or [None] * 5
    share = np.concatenate([p.share for p in packs]) if packs else np.zeros(0)
    empty = np.zeros(0)
    return Gradients(
        loss=total,
        target=np.concatenate([p.target for p in packs]) if packs else np.zeros(0, np.int64),
        log_ratio=empty if columns[0] is None else columns[0].astype(np.float64),
        share=share,
        helped=empty.astype(bool) if columns[1] is None else columns[1],
        hurt=empty.astype(bool) if columns[2] is None else columns[2],
        entropy=columns[3],
        ref_gap=columns[4],
        stats=stats,
    )


def _column(values: Sequence[torch.Tensor | None]) -> NDArray[Any] | None:
    present = [v for v in values if v is not None]
    return torch.cat(present).cpu().numpy() if present else None


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    trees: Sequence[Tree],
    credits: Sequence[Credit],
    loss: PolicyLoss,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    holes: Sequence[int] = (),
    token_budget: int | TokenBudget = DEFAULT_TOKEN_BUDGET,
    layout: Layout = "packed",
    correction: CorrectionOptions = NO_CORRECTION,
    max_mismatch_kl: float = 0.0,
    autocast_dtype: torch.dtype | None = None,
    entropy: bool = False,
    max_grad_norm: float | None = 1.0,
    mini_batches: int = 1,
    epochs: int = 1,
    rate: Callable[[int], float] | None = None,
    finish: Callable[[Sequence[Credit], Sequence[Float32]], Sequence[Credit]] | None = None,
    message: Callable[[str], None] = log.warning,
) -> dict[str, float]:
    """Take `mini_batches` · `epochs` optimiser steps on the credited trees and return what happened.

    Trees without a trained token are set aside; the others are cut, in the order given, into `mini_batches` runs of nearly
    equal numbers of trees, the same in every epoch. `correction`: which old log-probs, and what is done where sampler and trainer
    differ (auto: corrected under autocast); `max_mismatch_kl`: how far they may (k3; 0: any). `rate`: the learning rate of the
    n-th of these optimiser steps (from 0), where one that has nothing to train keeps its number. `finish`: from the credits that masks
    have left and the old log-probs to the credits that are trained on. Out of memory halves the token budget, says so through
    `message` and repeats the mini-batch, optimiser step included, from zeroed gradients; the budget left is returned as `token_budget`.

    Returns means over optimiser steps: loss, grad_norm, ratio_mean, ratio_p99, log_ratio_max, clip_low_fraction,
    clip_high_fraction (of trained tokens), kl_old (k1), kl_old_k3, kl_ref (if there is a reference), entropy (on request);
    and sums over them: updates, dropped_terms and the fields of PackStats. `updates` is 0 where nothing could be trained. Before
    the first of them: mismatch/ and the keys of `losses.correction.mismatch`, each unique trained token once, over all mini-batches
    where the trainer's log-probs were computed beforehand and over the first otherwise; masked_rows and truncated_tokens.

    Raises:
        NonFiniteError: a loss or gradient norm is not finite; the weights are as after the last step.
        MismatchError: sampler and trainer are further apart than `max_mismatch_kl`; the weights are as before.
        ValueError: credits do not fit the trees, reference log-probs are missing, options out of range.
        BrokenStepError: the optimiser failed with some weights changed.
        torch.OutOfMemoryError or RuntimeError: out of memory at the smallest token budget.
    """
    if mini_batches < 1 or epochs < 1:
        raise ValueError(f"mini_batches is {mini_batches} and epochs is {epochs}; both must be at least 1")
    budget = token_budget if isinstance(token_budget, TokenBudget) else TokenBudget(token_budget, message)
    options = ForwardOptions(temperature, vocab_size, budget.tokens, layout, autocast_dtype, entropy or "entropy" in loss.needs, holes)
    if len(trees) != len(credits):
        raise ValueError(f"{len(trees)} trees but {len(credits)} credits")
    head, was_training = Head.of(model), model.training
    correction = correction.chosen(rough=autocast_dtype is not None)
    old, corrected, measured = _before(model, trees, credits, correction, max_mismatch_kl, options, budget)
    final = corrected.credits if finish is None else finish(corrected.credits, old)
    everything, counts = aggregate(trees, final, "token_mean", old_logprobs=old)
    if counts.dropped and not counts.terms:
        raise ValueError(f"none of the {counts.dropped} credited tokens has a finite old log-prob; the sampler must record them")
    live = [i for i, w in enumerate(everything) if w.weight.any()]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    steps: list[dict[str, float]] = []
    model.train()
    try:
        for epoch in range(epochs):
            for number, part in enumerate(np.array_split(np.asarray(live, np.int64), mini_batches)):
                if len(part) == 0:
                    continue
                where = f"mini-batch {number + 1} of {mini_batches}, epoch {epoch + 1} of {epochs}"
                some, some_old = [trees[i] for i in part], [old[i] for i in part]
                some_credits = [final[i] for i in part]
                weights, counts = aggregate(
                    some, some_credits, loss.aggregation, constant_tokens=loss.constant_tokens, old_logprobs=some_old
                )
                if corrected.importance is not None:
                    weights = [w.scaled(corrected.importance[i]) for w, i in zip(weights, part, strict=True)]
                if rate is not None:
                    for group in optimizer.param_groups:
                        group["lr"] = rate(epoch * mini_batches + number)

                def attempt(
                    tokens: int, part: Sequence[Tree] = some, weights: Any = weights, old: Any = some_old, where: str = where
                ) -> tuple[Gradients, float]:
                    nonlocal measured
                    optimizer.zero_grad(set_to_none=True)
                    allocate_moments(optimizer)
                    result = gradients(model, part, weights, old, loss, replace(options, token_budget=tokens), head=head)
                    if measured is None:  # old are the sampler's log-probs, and no update has been made yet
                        measured = mismatch(_once(result))
                        refuse_drift(measured, max_mismatch_kl)
                    return result, _step(result.loss, parameters, optimizer, max_grad_norm, where)

                result, norm = budget.run(attempt)
                steps.append(_metrics(result, loss, counts) | {"grad_norm": norm})
    finally:
        model.train(was_training)
    report = (measured or {}) | {"masked_rows": float(corrected.masked_rows), "truncated_tokens": float(corrected.truncated_tokens)}
    return _summary(steps) | {"token_budget": float(budget.tokens)} | {f"mismatch/{k}": v for k, v in report.items()}


def score(
    model: nn.Module,
    trees: Sequence[Tree],
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    holes: Sequence[int] = (),
    token_budget: int | TokenBudget = DEFAULT_TOKEN_BUDGET,
    layout: Layout = "packed",
    autocast_dtype: torch.dtype | None = None,
    only: Sequence[Bool] | None = None,
    message: Callable[[str], None] = log.warning,
) -> list[Float32]:
    """Teacher-forced log-probs float32 [tokens] per tree, each token forwarded as rarely as packing allows; NaN for the
    prompt. `only` (bool [tokens] per tree) leaves the other tokens NaN and uncomputed. Runs in eval mode, without gradient.
    Out of memory halves the token budget, as in `update`; a TokenBudget remembers it."""
    wanted = [np.arange(len(t.tokens)) >= t.lengths[ROOT] for t in trees] if only is None else only
    head, was_training = Head.of(model), model.training
    device = next(model.parameters()).device
    bounds = np.cumsum([0, *(len(t.tokens) for t in trees)])
    flat = np.full(int(bounds[-1]), np.nan, np.float32)
    budget = token_budget if isinstance(token_budget, TokenBudget) else TokenBudget(token_budget, message)

    def attempt(tokens: int) -> None:
        for p in pack(trees, wanted, tokens, layout=layout)[0]:
            with torch.no_grad(), forward_of(model, layout), autocast(device, autocast_dtype):
                values, _ = pack_logprobs(model, p, head, temperature=temperature, vocab_size=vocab_size, holes=holes)
            flat[p.target] = values.float().cpu().numpy()

    model.eval()
    try:
        budget.run(attempt)
    finally:
        model.train(was_training)
    return [flat[a:b] for a, b in pairwise(bounds)]


def credited(trees: Sequence[Tree], credits: Sequence[Credit]) -> list[Bool]:
    """The tokens that credit reaches, bool [tokens] per tree: all that can be trained on."""
    known = [np.zeros(len(t.tokens), np.float32) for t in trees]  # no token is dropped for want of an old log-prob
    return [w.weight > 0 for w in aggregate(trees, credits, "token_mean", old_logprobs=known)[0]]


def _before(
    model: nn.Module,
    trees: Sequence[Tree],
    credits: Sequence[Credit],
    correction: CorrectionOptions,
    max_mismatch_kl: float,
    options: ForwardOptions,
    budget: TokenBudget,
) -> tuple[list[Float32], Corrected, dict[str, float] | None]:
    """Old log-probs, correction and, if the trainer's log-probs had to be computed for them, the mismatch."""
    sampled = [t.logprobs for t in trees]
    if not correction.scored:
        return sampled, Corrected(credits), None
    wanted = credited(trees, credits)
    scores = score(
        model,
        trees,
        temperature=options.temperature,
        vocab_size=options.vocab_size,
        holes=options.holes,
        token_budget=budget,
        layout=options.layout,
        autocast_dtype=options.autocast_dtype,
        only=wanted,
    )
    bad = sum(int((~np.isfinite(s[w])).sum()) for s, w in zip(scores, wanted, strict=True))
    if bad:
        raise NonFiniteError(f"{bad} recomputed old log-probs are not finite: the weights are broken; no step was taken on them")
    log_ratio = log_ratios(trees, scores)
    measured = mismatch(np.concatenate([np.zeros(0), *(x[np.isfinite(x)] for x in log_ratio)]))  # scores are NaN but for `wanted`
    refuse_drift(measured, max_mismatch_kl)
    old = scores if correction.old_logprobs == "recomputed" else sampled
    if correction.active:  # a token that cannot be corrected is dropped like one without an old log-prob
        old = [np.where(np.isnan(x), np.float32(np.nan), o) for x, o in zip(log_ratio, old, strict=True)]
    return old, correct(trees, credits, log_ratio, correction), measured


def _once(result: Gradients) -> Float64:
    """Log ratios with each unique token once: unrolled rows repeat them."""
    return result.log_ratio[np.unique(result.target, return_index=True)[1]]


def _step(
    loss: float, parameters: Sequence[torch.Tensor], optimizer: torch.optim.Optimizer, max_grad_norm: float | None, where: str
) -> float:
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, float("inf") if max_grad_norm is None else max_grad_norm))
    if not (np.isfinite(loss) and np.isfinite(norm)):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(f"loss {loss} and gradient norm {norm} in {where}: both must be finite; no step was taken on them")
    held = [*parameters, *(t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor))]
    versions = [t._version for t in held]
    try:
        optimizer.step()
    except (RuntimeError, MemoryError) as error:
        if any(t._version != version for t, version in zip(held, versions, strict=True)):  # it cannot be repeated
            what = f"the optimiser broke off in a step with some weights changed ({type(error).__name__})"
            raise BrokenStepError(f"{what} in {where}") from error
        raise
    optimizer.zero_grad(set_to_none=True)
    return norm


@dataclass(frozen=True, eq=False)
class _Flat:
    """Per token of all trees, one after another."""

    old: NDArray[np.float32]
    a_pos: Float64
    a_neg: Float64
    weight: Float64
    ref: NDArray[np.float32] | None


def _flatten(trees: Sequence[Tree], weights: Sequence[TokenWeights], old: Sequence[Float32], loss: PolicyLoss) -> _Flat:
    ref = None
    if loss.kl_coef > 0:
        present = [t.ref_logprobs for t in trees if t.ref_logprobs is not None]
        if len(present) < len(trees):
            raise ValueError(
                f"kl_coef is {loss.kl_coef} but {len(trees) - len(present)} of {len(trees)} trees carry no reference log-probs"
            )
        ref = np.concatenate(present)
    return _Flat(
        np.concatenate(old),
        np.concatenate([w.a_pos for w in weights]),
        np.concatenate([w.a_neg for w in weights]),
        np.concatenate([w.weight for w in weights]),
        ref,
    )


def _token_batch(flat: _Flat, p: Pack, logprobs: torch.Tensor, entropy: torch.Tensor | None) -> TokenBatch:
    def on_device(values: NDArray[np.floating]) -> torch.Tensor:
        return torch.as_tensor(values, dtype=logprobs.dtype, device=logprobs.device)

    return TokenBatch(
        logprobs=logprobs,
        old_logprobs=on_device(flat.old[p.target]),
        a_pos=on_device(flat.a_pos[p.target] * p.share),
        a_neg=on_device(flat.a_neg[p.target] * p.share),
        weight=on_device(flat.weight[p.target] * p.share),
        ref_logprobs=None if flat.ref is None else on_device(flat.ref[p.target]),
        entropy=entropy,
    )


def _metrics(result: Gradients, loss: PolicyLoss, counts: Counts) -> dict[str, float]:
    share = result.share / result.share.sum()
    with np.errstate(over="ignore"):
        ratio = np.exp(result.log_ratio)
    values = {
        "loss": result.loss,
        "ratio_mean": float(share @ ratio),
        "ratio_p99": float(np.quantile(ratio, 0.99)),
        "log_ratio_max": float(np.abs(result.log_ratio).max()),
        "clip_low_fraction": float(share @ (result.hurt & (ratio < 1 - loss.clip_low))),
        "clip_high_fraction": float(share @ (result.helped & (ratio > 1 + loss.clip_high))),
        "kl_old": float(share @ -result.log_ratio),
        "kl_old_k3": float(share @ (ratio - 1 - result.log_ratio)),
    }
    if result.ref_gap is not None:
        gap = np.clip(result.ref_gap.astype(np.float64), -20, 20)
        values["kl_ref"] = float(share @ (np.expm1(gap) - gap))
    if result.entropy is not None:
        values["entropy"] = float(share @ result.entropy)
    return values | {"dropped_terms": float(counts.dropped)} | {k: float(v) for k, v in asdict(result.stats).items()}


_SUMS = frozenset({"dropped_terms", *asdict(PackStats())})


def _summary(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Sums of counts, means of the rest."""
    if not steps:
        return {"updates": 0.0}
    summary = {"updates": float(len(steps))}
    for key in steps[0]:
        values = [s[key] for s in steps]
        summary[key] = float(np.sum(values) if key in _SUMS else np.mean(values))
    return summary

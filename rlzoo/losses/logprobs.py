"""Log-probs of given tokens from hidden states, without ever holding all logits at once.

The logits of n tokens over a vocabulary of V cost n·V floats forward and again backward; here they are made in chunks and
made again in the backward pass. This sits below the loss: every loss sees plain per-token log-probs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 29}
"""Logits held at once, by device. On a CPU, below this recomputing costs more than it saves; on a GPU smaller chunks would spend
their time on reading and writing the head's gradient."""


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    holes: Sequence[int] = (),
    chunk_bytes: int | None = None,
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [n] of `targets` int64 [n] under softmax(hidden @ weight.T + bias) at `temperature`, over the first
    `vocab_size` ids only (ids from there on have probability 0, as in sampling, and so have those of `holes`); and, on
    request, the entropies [n], in nats.

    `hidden` [n, H], `weight` [V, H], `bias` [V]. At most `chunk_bytes` of logits, in the precision that their log-probs
    are taken in, are made at once (or one token's; None: CHUNK_BYTES).

    Raises:
        ValueError: temperature or vocab_size out of range.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; training needs one greater than 0")
    vocab = weight.shape[0] if vocab_size is None else vocab_size
    if not 1 <= vocab <= weight.shape[0]:
        raise ValueError(f"vocab_size is {vocab_size}; the model's head has {weight.shape[0]} ids")
    # Slicing is the mask: an id outside the tokenizer has no logit at all.
    width = 8 if weight.dtype == torch.float64 else 4
    most = chunk_bytes or CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cpu"])
    rows = max(1, most // (vocab * width))
    if hidden.shape[0] <= rows:
        logits = _without(_linear(hidden, weight[:vocab], None if bias is None else bias[:vocab]), holes)
        logprobs = (logits / temperature).log_softmax(-1)
        picked = logprobs.gather(1, targets[:, None]).squeeze(1)
        return picked, _entropy(logprobs) if entropy else None
    # The whole weight, sliced inside: autograd would copy the gradient of a slice into one of the whole.
    return _Chunked.apply(hidden, weight, bias, targets, temperature, rows, entropy, vocab, tuple(holes))  # type: ignore[no-untyped-call,no-any-return]


def logits_logprobs(
    logits: Tensor, targets: Tensor, *, temperature: float, vocab_size: int | None, entropy: bool, holes: Sequence[int] = ()
) -> tuple[Tensor, Tensor | None]:
    """The same from given logits [n, V], for models that change their logits after the head."""
    logprobs = (_without(_up(logits)[:, :vocab_size], holes) / temperature).log_softmax(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), _entropy(logprobs) if entropy else None


def _without(logits: Tensor, holes: Sequence[int]) -> Tensor:
    """Logits with those of impossible ids at -inf."""
    return logits.index_fill(1, torch.tensor(holes, device=logits.device), -torch.inf) if holes else logits


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _up(F.linear(hidden, weight, bias))


def _up(logits: Tensor) -> Tensor:
    """Log-probs of half-precision logits are taken in float32."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _entropy(logprobs: Tensor) -> Tensor:
    """Of each row; an impossible id (log-prob -inf) adds nothing to value or gradient."""
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)


class _Chunked(torch.autograd.Function):
    """Logits in chunks of `rows` tokens over the first `vocab` ids, recomputed in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        rows: int,
        entropy: bool,
        vocab: int,
        holes: tuple[int, ...],
    ) -> tuple[Tensor, Tensor | None]:
        device = hidden.device.type
        # backward runs outside autocast: remember the precision, so that both passes see the same logits
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        ctx.temperature, ctx.rows, ctx.vocab, ctx.holes = temperature, rows, vocab, holes
        head, offset = _cast_head(ctx, weight, bias)
        picked, normalisers, entropies = [], [], []
        for i in range(0, len(targets), rows):
            logits = _chunk_logits(ctx, hidden[i : i + rows], head, offset)
            normaliser = logits.logsumexp(-1)
            picked.append(logits.gather(1, targets[i : i + rows, None]).squeeze(1) - normaliser)
            normalisers.append(normaliser)
            if entropy:
                entropies.append(_entropy(logits - normaliser[:, None]))
            del logits  # before the next ones are made
        spread = torch.cat(entropies) if entropy else None
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(normalisers), spread)
        ctx.set_materialize_grads(False)
        return torch.cat(picked), spread

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, entropy_grad = grads
        hidden, weight, bias, targets, normalisers, spread = ctx.saved_tensors
        head, offset = _cast_head(ctx, weight, bias)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        grad_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if bias is not None and ctx.needs_input_grad[2] else None
        for i in range(0, len(targets), ctx.rows):
            part = slice(i, i + ctx.rows)
            logprobs = _chunk_logits(ctx, hidden[part], head, offset).sub_(normalisers[part, None])
            g = _logit_gradient(logprobs, targets[part], _part(grad, part), _part(entropy_grad, part), _part(spread, part))
            g /= ctx.temperature
            if grad_bias is not None:
                grad_bias[: ctx.vocab] += g.sum(0)
            g = g.to(ctx.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = g @ head
            if grad_weight is not None:
                grad_weight[: ctx.vocab] += g.T @ hidden[part].to(ctx.dtype)
            del g
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            *[None] * 6,
        )


def _part(values: Tensor | None, part: slice) -> Tensor | None:
    return None if values is None else values[part]


def _logit_gradient(logprobs: Tensor, targets: Tensor, grad: Tensor | None, entropy_grad: Tensor | None, entropy: Tensor | None) -> Tensor:
    """Gradient [n, V] with respect to the logits, from those [n] of the picked log-probs and of the entropies. Overwrites `logprobs`."""
    pull = None
    if entropy_grad is not None and entropy is not None:  # d H / d logits = -p (log p + H)
        finite = logprobs.clamp(min=torch.finfo(logprobs.dtype).min)
        pull = logprobs.exp() * (finite + entropy[:, None]) * entropy_grad[:, None]
    g = logprobs.exp_().neg_()  # d logp / d logits = onehot - p
    g.scatter_add_(1, targets[:, None], torch.ones_like(g[:, :1]))
    g *= 0.0 if grad is None else grad[:, None]
    return g if pull is None else g - pull


def _cast_head(ctx: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the ids that count, in the precision that is computed in."""
    head: Tensor = weight[: ctx.vocab].to(ctx.dtype)
    return head, None if bias is None else bias[: ctx.vocab].to(ctx.dtype)


def _chunk_logits(ctx: Any, hidden: Tensor, head: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        logits: Tensor = _up(F.linear(hidden.to(ctx.dtype), head, bias)).div_(ctx.temperature)
    return _without(logits, ctx.holes)

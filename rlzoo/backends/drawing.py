"""Drawing tokens: uniforms from counters, distributions from logits, and the inverse of their cumulative sums."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..tree import Float64
from .protocol import SamplingParams

_CHUNK = 1 << 24  # logits handled at once in float64


def uniforms(seeds: NDArray[np.uint64], index: NDArray[np.integer[Any]]) -> Float64:
    """Uniform numbers in (0, 1), float64 [rows]: a pure function of a row's seed and the number of tokens it has drawn.

    splitmix64 of seed + index * golden ratio, upper 53 bits.
    """
    z = seeds + (index.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    u: Float64 = ((z >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return u


class Filters:
    """The sampling parameters of a batch of rows, on the device, ready for `draw`."""

    def __init__(self, temperature: Float64, top_p: Float64, top_k: NDArray[np.int64], device: torch.device) -> None:
        self.rows = len(temperature)
        self.greedy = _on(temperature == 0, device) if (temperature == 0).any() else None
        scale = np.where(temperature == 0, 1.0, temperature)
        self.temperature = _on(scale, device)[:, None] if (scale != 1).any() else None
        # A greedy row reports the whole distribution at temperature 1, so filters do not touch it.
        p, k = np.where(temperature == 0, 1.0, top_p), np.where(temperature == 0, 0, top_k)
        self.top_p = _on(p, device)[:, None] if (p < 1).any() else None
        self.top_k = _on(k, device)[:, None] if (k > 0).any() else None

    @classmethod
    def same(cls, params: SamplingParams, rows: int, device: torch.device) -> Filters:
        """The same parameters for every row."""
        return cls(np.full(rows, params.temperature), np.full(rows, params.top_p), np.full(rows, params.top_k, np.int64), device)

    def part(self, start: int, stop: int) -> Filters:
        part = object.__new__(Filters)
        part.rows = stop - start
        for name in ("greedy", "temperature", "top_p", "top_k"):
            value = getattr(self, name)
            setattr(part, name, None if value is None else value[start:stop])
        return part

    def shape(self, logits: Tensor) -> Tensor:
        """Logits of the distribution sampled from, float64 [rows, vocabulary]: scaled, and -inf where filtered out."""
        if self.temperature is not None:
            logits = logits / self.temperature
        if self.top_k is None and self.top_p is None:
            return logits
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        drop = torch.zeros_like(ranked, dtype=torch.bool)
        if self.top_k is not None:
            rank = torch.arange(ranked.shape[1], device=ranked.device)
            drop |= (rank >= self.top_k) & (self.top_k > 0)
        if self.top_p is not None:
            p = ranked.masked_fill(drop, -torch.inf).softmax(-1)
            # A token stays while the more probable ones hold less than top_p, so the first always stays.
            drop |= (p.cumsum(-1) - p >= self.top_p) & (self.top_p < 1)
        drop[:, 0] = False
        return logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)


def draw(logits: Tensor, u: Float64, filters: Filters) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution at u; greedy rows take the most probable.

    Returns tokens int64 [rows] and log-probs float64 [rows] of the distribution drawn from.

    Raises:
        RuntimeError: a logit is NaN or infinite.
    """
    rows, vocabulary = logits.shape
    size = max(1, _CHUNK // vocabulary)
    if rows <= size:
        return _draw(logits, u, filters)
    parts = [_draw(logits[i : i + size], u[i : i + size], filters.part(i, min(i + size, rows))) for i in range(0, rows, size)]
    return torch.cat([t for t, _ in parts]), torch.cat([x for _, x in parts])


def _draw(logits: Tensor, u: Float64, filters: Filters) -> tuple[Tensor, Tensor]:
    shaped = filters.shape(logits.double())
    top = shaped.max(dim=-1, keepdim=True)
    cdf = (shaped - top.values).exp_().cumsum_(-1)
    total = cdf[:, -1:]
    # Below the total even after rounding, so that the first entry above it exists and has positive probability.
    at = torch.minimum(_on(u, logits.device)[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cdf, at, right=True)
    if filters.greedy is not None:
        tokens = torch.where(filters.greedy[:, None], top.indices, tokens)
    if not bool(torch.isfinite(total).all()):
        raise RuntimeError("the model's logits are not finite (NaN or infinity); its weights or its input are broken")
    logprobs = shaped.gather(1, tokens) - top.values - total.log()
    return tokens[:, 0], logprobs[:, 0]


def log_probs(logits: Tensor, targets: Tensor, params: SamplingParams) -> Tensor:
    """Log-probs of `targets` [rows] under the distribution that `params` makes of `logits`, float64 [rows]."""
    size = max(1, _CHUNK // logits.shape[1])
    parts = []
    for i in range(0, len(logits), size):
        chunk = logits[i : i + size].double()
        shaped = Filters.same(params, len(chunk), logits.device).shape(chunk)
        parts.append(shaped.gather(1, targets[i : i + size, None])[:, 0] - shaped.logsumexp(-1))
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=logits.device)


def forbidden_ids(tokenizer: Any, vocabulary: int) -> list[int]:
    """Ids below `vocabulary` (the model's output size) that the tokenizer does not know: padded rows, never sampled.

    Raises:
        ValueError: the tokenizer has ids that the model cannot produce.
    """
    size, holes = known_vocabulary(tokenizer)
    if size > vocabulary:
        raise ValueError(f"the tokenizer has ids up to {size - 1} but the model's vocabulary has {vocabulary} rows")
    return [*holes, *range(size, vocabulary)]


class Vocabulary(NamedTuple):
    """The ids that are sampled and trained on: those below `vocab_size`, but for `holes`."""

    vocab_size: int
    holes: tuple[int, ...]


def known_vocabulary(tokenizer: Any) -> Vocabulary:
    """The ids that a tokenizer knows."""
    known = set(tokenizer.get_vocab().values())
    size = max(known) + 1
    return Vocabulary(size, tuple(i for i in range(size) if i not in known))


def end_ids(tokenizer: Any, model: Any, turns: Iterable[int] = ()) -> frozenset[int]:
    """Ids that end a text: the tokenizer's, the generation config's (also a list: chat end-of-turn ids), the model config's, and those
    that end a turn of the prompt's template (`turns`), which a base model's configs need not name."""
    found = set(turns)
    for source in (tokenizer, getattr(model, "generation_config", None), getattr(model, "config", None)):
        value: int | Sequence[int] | None = getattr(source, "eos_token_id", None)
        if value is not None:
            found.update([int(value)] if isinstance(value, int) else [int(v) for v in value])
    return frozenset(found)


def _on(array: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)

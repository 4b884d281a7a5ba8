"""Bring the trainer's weights into the engine, and prove each time that the engine samples with them.

Three things are looked at, the first two exactly, whatever the precisions of engine and trainer:

- the weights, read back where the engine can tell (`stale_weights`), against the trainer's cast to the engine's precision;
- how many tokens the engine forwarded for the probes (where it counts them): fewer than their contexts have means that it kept
  prefixes computed with older weights. The prompts and their ids are the same each time on purpose, and long enough to fill a block
  of a block-wise cache, so that a kept prefix would be used;
- the log-probs that it samples with, against a teacher-forced pass of the trainer's module: the mean deviation must be one that
  rounding explains. Not the largest: of a hundred tokens in bfloat16 one may be off by half a nat and nothing be wrong.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..backends.drawing import forbidden_ids, log_probs
from ..backends.protocol import Backend, Receipt, SamplingParams, SegmentRequest, SegmentResult
from ..sampling.grow import next_request_id
from ..sampling.seeds import mix
from ..tree import Int32

TOLERANCE = {"float64": 1e-10, "float32": 1e-4, "bfloat16": 0.1}
"""Mean absolute deviation of log-probs that rounding explains, by the coarser precision of engine and module. Measured on bfloat16
engines of float32 modules: 0.003 (embedded model) to 0.04 (random weights, 16 layers)."""
PROBE_TOKENS = 72  # least length of a probe prompt: two blocks of a prefix cache and a bit


@dataclass(frozen=True, slots=True)
class SyncProof:
    """What a probe showed: `largest` and `mean` absolute deviation of log-probs over `tokens` sampled tokens, of which the mean may be
    `tolerance`."""

    tokens: int
    largest: float
    mean: float
    tolerance: float
    seconds: float


@dataclass(frozen=True, eq=False)
class Sync:
    """Brings weights over and proves it, every time. `probes`: prompts as token ids; `dtype`: the engine's precision."""

    backend: Backend
    probes: Sequence[Sequence[int]]
    dtype: str
    seed: int

    def __call__(self, model: Any, version: int) -> SyncProof:
        """Give the engine the weights of `model`.

        Raises:
            RuntimeError: the engine does not sample with them; see `prove`.
        """
        sync(self.backend, model, version)
        tolerance = max(TOLERANCE[self.dtype], TOLERANCE[str(model.dtype).removeprefix("torch.")])
        return prove(self.backend, model, self.probes, tolerance=tolerance, seed=self.seed, fresh=True)


def sync(backend: Backend, model: torch.nn.Module, version: int) -> Receipt:
    """Copy all parameters of `model` into the engine; see `Backend.load_weights` for errors."""
    return backend.load_weights(model.named_parameters(), version)


def prove(
    backend: Backend,
    model: Any,
    probe_prompts: Sequence[Sequence[int]],
    *,
    tolerance: float = TOLERANCE["float32"],
    seed: int,
    siblings: int = 2,
    max_tokens: int = 8,
    fresh: bool = False,
) -> SyncProof:
    """Sample `siblings` responses of at most `max_tokens` for each probe prompt (token ids) and check their log-probs.

    Nothing else may be in flight. The prompts keep the ids -1, -2, ... in the engine from one proof to the next. `fresh`: nothing
    has been sampled since the engine took over its weights, so that it must compute every context anew.

    Raises:
        ValueError: no probe prompt.
        RuntimeError: log-probs deviate from the module's by more than `tolerance` in the mean, the engine itself can tell stale
            weights, or (fresh) it forwarded fewer tokens than the contexts have; names the deviations and the weights.
    """
    if not probe_prompts:
        raise ValueError("a sync proof needs at least one probe prompt")
    begun = time.perf_counter()
    longest = backend.max_context - max_tokens
    requests = [
        SegmentRequest(next_request_id(), -1 - i, _lengthened(prompt, longest), max_tokens, mix(seed, "probe", i, k))
        for i, prompt in enumerate(probe_prompts)
        for k in range(siblings)
    ]
    before = backend.stats().forwarded_tokens
    results = sample(backend, requests)
    forwarded = backend.stats().forwarded_tokens - before
    sampled = [(np.asarray(r.context, np.int64), results[r.id]) for r in requests]
    expected = _teacher_forced(model, sampled, backend.tokenizer)
    gaps = np.abs(np.concatenate([result.logprobs for _, result in sampled]).astype(np.float64) - expected)
    proof = SyncProof(len(gaps), float(gaps.max()), float(gaps.mean()), tolerance, time.perf_counter() - begun)
    stale, wanted = _stale(backend, model), _distinct_tokens([r.context for r in requests])
    kept = fresh and 0 < forwarded < wanted
    if stale or kept or not proof.mean <= tolerance:
        recomputed = f"it computed {forwarded} tokens where the contexts have {wanted}, so a prefix cache was kept over a sync"
        suspect = recomputed if kept and not stale else _suspect(stale)
        raise RuntimeError(
            f"the engine does not sample with the trainer's weights: log-probs of {proof.tokens} probe tokens differ by up to "
            f"{proof.largest:.3g} and by {proof.mean:.3g} in the mean (at most {tolerance:g} is allowed); {suspect}"
        )
    return proof


def _distinct_tokens(contexts: Sequence[Sequence[int] | Int32]) -> int:
    """Tokens that an engine with nothing in its cache has to forward at least: those of shared beginnings once."""
    return len({tuple(ids[: n + 1]) for ids in (np.asarray(c).tolist() for c in contexts) for n in range(len(ids))})


def _lengthened(prompt: Sequence[int], longest: int) -> Int32:
    """The prompt, repeated to PROBE_TOKENS if it is shorter and the engine takes so many."""
    length = min(max(len(prompt), PROBE_TOKENS), longest)
    return np.resize(np.asarray(prompt, np.int32), length)


def sample(backend: Backend, requests: Sequence[SegmentRequest]) -> dict[int, SegmentResult]:
    """Results of all requests by id; their ids are released."""
    results: dict[int, SegmentResult] = {}
    backend.submit(requests)
    try:
        while len(results) < len(requests):
            results.update((r.id, r) for r in backend.step())
    finally:
        backend.release([r.id for r in requests])
    return results


@torch.no_grad()
def _teacher_forced(model: Any, sampled: Sequence[tuple[np.ndarray[Any, Any], SegmentResult]], tokenizer: Any) -> np.ndarray[Any, Any]:
    """Log-probs of all sampled tokens under the module itself, float64, in order."""
    training = model.training
    model.eval()
    try:
        parts = [torch.from_numpy(np.concatenate([prompt, result.tokens.astype(np.int64)])) for prompt, result in sampled]
        device = next(model.parameters()).device
        ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True).to(device)
        lengths = torch.tensor([len(p) for p in parts], device=device)
        mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
        logits = model(input_ids=ids, attention_mask=mask).logits
    finally:
        model.train(training)
    logits[..., forbidden_ids(tokenizer, logits.shape[-1])] = -torch.inf
    values = []
    for row, (prompt, result) in enumerate(sampled):
        start, stop = len(prompt), len(prompt) + len(result.tokens)
        values.append(log_probs(logits[row, start - 1 : stop - 1], ids[row, start:stop], SamplingParams()).cpu().numpy())
    return np.concatenate(values)


def _stale(backend: Backend, model: Any) -> list[str] | None:
    """Names of weights that the engine knows to differ from the module's; None if it cannot tell."""
    tell = getattr(backend, "stale_weights", None)
    return None if tell is None else tell(model.named_parameters())


def _suspect(stale: list[str] | None) -> str:
    if stale is None:
        return "a sync was skipped or incomplete, or a prefix cache was kept"
    if not stale:
        return "its weights are the trainer's, so a prefix cache was kept over a sync, or it computes with another precision"
    return f"stale are {len(stale)} weights: {', '.join(stale[:3])}{', ...' if len(stale) > 3 else ''}"

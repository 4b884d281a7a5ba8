"""Bring the trainer's weights into the engine, and prove each time that the engine samples with them.

The proof goes the way of every rollout: it samples, and compares the log-probs that come back with a teacher-forced pass of
the trainer's module. Its prompts and their ids are the same each time on purpose, so that an engine that kept a prefix
computed with older weights would use it, and be found out; they are long enough to fill a block of a block-wise cache.
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

TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.5}  # largest log-prob deviation that rounding explains
PROBE_TOKENS = 72  # least length of a probe prompt: two blocks of a prefix cache and a bit


@dataclass(frozen=True, slots=True)
class SyncProof:
    """What a probe showed: `largest` and `mean` absolute deviation of log-probs over `tokens` sampled tokens."""

    tokens: int
    largest: float
    mean: float
    tolerance: float
    seconds: float


@dataclass(frozen=True, eq=False)
class Sync:
    """Brings weights over and proves it, every time. `probes`: prompts as token ids; `tolerance`: see TOLERANCE."""

    backend: Backend
    probes: Sequence[Sequence[int]]
    tolerance: float
    seed: int

    def __call__(self, model: Any, version: int) -> SyncProof:
        """Give the engine the weights of `model`.

        Raises:
            RuntimeError: the engine does not sample with them; see `prove`.
        """
        sync(self.backend, model, version)
        return prove(self.backend, model, self.probes, tolerance=self.tolerance, seed=self.seed)


def sync(backend: Backend, model: torch.nn.Module, version: int) -> Receipt:
    """Copy all parameters of `model` into the engine; see `Backend.load_weights` for errors."""
    return backend.load_weights(model.named_parameters(), version)


def prove(
    backend: Backend,
    model: Any,
    probe_prompts: Sequence[Sequence[int]],
    *,
    tolerance: float = 1e-3,
    seed: int,
    siblings: int = 2,
    max_tokens: int = 8,
) -> SyncProof:
    """Sample `siblings` responses of at most `max_tokens` for each probe prompt (token ids) and check their log-probs.

    Nothing else may be in flight. The prompts keep the ids -1, -2, ... in the engine from one proof to the next.

    Raises:
        ValueError: no probe prompt.
        RuntimeError: a log-prob deviates by more than `tolerance` from the module's, or the engine itself can tell stale
            weights; names the largest deviation and the weights.
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
    results = _sample(backend, requests)
    sampled = [(np.asarray(r.context, np.int64), results[r.id]) for r in requests]
    expected = _teacher_forced(model, sampled, backend.tokenizer)
    gaps = np.abs(np.concatenate([result.logprobs for _, result in sampled]).astype(np.float64) - expected)
    proof = SyncProof(len(gaps), float(gaps.max()), float(gaps.mean()), tolerance, time.perf_counter() - begun)
    stale = _stale(backend, model)
    if stale or not proof.largest <= tolerance:
        raise RuntimeError(
            f"the engine does not sample with the trainer's weights: log-probs of {proof.tokens} probe tokens differ by up to "
            f"{proof.largest:.3g}, allowed is {tolerance:g}; {_suspect(stale)}"
        )
    return proof


def _lengthened(prompt: Sequence[int], longest: int) -> Int32:
    """The prompt, repeated to PROBE_TOKENS if it is shorter and the engine takes so many."""
    length = min(max(len(prompt), PROBE_TOKENS), longest)
    return np.resize(np.asarray(prompt, np.int32), length)


def _sample(backend: Backend, requests: Sequence[SegmentRequest]) -> dict[int, SegmentResult]:
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

"""Does an engine compute a model as the model itself does? Asked at every opening, before anything is sampled.

The engine samples a few tokens after a short prompt and after long ones, as it does in every rollout; their log-probs are compared
with the module's own eager forward over each whole sequence alone. A wrong mask, window, position or a part of attention that the
engine leaves out shows there. The long probes cross every length at which the config says that the model changes what it does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..backends.drawing import forbidden_ids, log_probs
from ..backends.memory import out_of_memory
from ..backends.protocol import Backend, SamplingParams, SegmentRequest
from ..sampling.grow import next_request_id
from ..sampling.seeds import mix
from ..tree import Float64, Int32
from .sync import sample

TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.03}  # mean deviation of log-probs that rounding explains
SHORT_TOKENS, LONG_TOKENS = 12, 96
MOST_TOKENS = 4608  # of the long probe; a model that changes only beyond is judged by reading its config
_NEW_TOKENS = 8
_SWITCHES = ("sliding_window", "window_size", "attention_chunk_size", "original_max_position_embeddings")
_BY_LENGTH = ("longrope", "su", "yarn_dynamic", "dynamic")


@dataclass(frozen=True, slots=True)
class Opening:
    """What the probes showed: mean and largest absolute deviation of log-probs after prompts of `tokens` tokens."""

    tokens: tuple[int, ...]
    mean: tuple[float, ...]
    largest: tuple[float, ...]


def prove_opening(backend: Backend, model: Any, dtype: str) -> Opening:
    """Compare what the engine samples with the forward of `model` (whose weights the engine holds, in `dtype`).

    Raises:
        ValueError: they differ, or the engine cannot compute the model at all; says how, and what to do.
        torch.OutOfMemoryError or RuntimeError: the probes do not fit the device.
    """
    points = switch_points(model.config, backend.max_context)
    far = [length for length in points if length + _NEW_TOKENS > MOST_TOKENS]
    if far and positions_go_by_length(model.config):
        raise ValueError(
            f"this model's positions change with the length of what is computed at once, from {min(far)} tokens on; "
            f"choose --backend.max-context of at most {min(far)}"
        )
    half = _NEW_TOKENS // 2
    longest = min(backend.max_context, max([LONG_TOKENS, *(n + _NEW_TOKENS for n in points if n not in far)]))
    across = [max(2, n - half) for n in points if n not in far]  # the tokens sampled come on both sides
    lengths = sorted({min(SHORT_TOKENS, longest - 2), *across, max(2, longest - _NEW_TOKENS)})
    allowed = TOLERANCE[dtype]
    gaps = []
    for length in lengths:
        try:
            gaps.append(_gaps(backend, model, length, backend.max_context))
        except NotImplementedError as error:
            raise ValueError(f"this engine cannot compute the model: {error}") from error
        except (TypeError, KeyError, AttributeError, IndexError, RuntimeError, ValueError) as error:
            if out_of_memory(error):
                raise
            raise ValueError(
                f"this engine cannot compute the model: its code fails with the engine's cache or masks ({type(error).__name__}: "
                f"{_first_line(error)})"
            ) from error
    found = Opening(tuple(lengths), tuple(float(g.mean()) for g in gaps), tuple(float(g.max()) for g in gaps))
    for length, mean, largest in zip(found.tokens, found.mean, found.largest, strict=True):
        if not mean <= allowed:
            near = [n for n in points if n <= length + _NEW_TOKENS]
            hint = f"; choose --backend.max-context of at most {min(near)}" if near else ""
            raise ValueError(
                f"this engine does not compute the model as the model's own code does: after {length} tokens log-probs differ by "
                f"{mean:.2g} in the mean (at most {allowed:g} is allowed) and by up to {largest:.2g}{hint}"
            )
    return found


def switch_points(config: Any, max_context: int) -> list[int]:
    """Lengths below `max_context` at which a config says that the model changes what it does: windows, chunks, scaled positions."""
    found: set[int] = set()
    for values in _tables(config):
        found |= {int(v) for name in _SWITCHES if isinstance(v := values.get(name), int | float) and not isinstance(v, bool)}
    return sorted(n for n in found if 2 <= n < max_context)


def positions_go_by_length(config: Any) -> bool:
    """Whether rotary positions depend on the longest sequence of a batch."""
    return any(str(values.get("rope_type", values.get("type"))) in _BY_LENGTH for values in _tables(config))


def _tables(config: Any) -> Iterator[Mapping[str, Any]]:
    """A config's options, and those of the tables in it."""
    waiting: list[Any] = [config.to_dict() if hasattr(config, "to_dict") else dict(config)]
    while waiting:
        values = waiting.pop()
        yield values
        waiting.extend(v for v in values.values() if isinstance(v, Mapping))


def _gaps(backend: Backend, model: Any, length: int, max_context: int) -> Float64:
    """Absolute deviations of the log-probs of tokens sampled after a prompt of `length` tokens."""
    known = _known_ids(backend.tokenizer, int(model.get_output_embeddings().weight.shape[0]))
    prompt = np.resize(np.random.default_rng(length).permutation(known), length).astype(np.int32)
    count = min(_NEW_TOKENS, max_context - length)
    requests = [SegmentRequest(next_request_id(), -1000 - length, prompt, count, mix(length, "opening", i)) for i in range(2)]
    results = sample(backend, requests)
    backend.release([-1000 - length])
    gaps = [np.abs(r.logprobs.astype(np.float64) - own_logprobs(model, prompt, r.tokens, backend.tokenizer)) for r in results.values()]
    return np.concatenate(gaps)


def _known_ids(tokenizer: Any, vocabulary: int) -> Int32:
    """Ids of ordinary tokens."""
    special = set(tokenizer.all_special_ids)
    return np.array(sorted(i for i in tokenizer.get_vocab().values() if i < vocabulary and i not in special), np.int32)


@torch.no_grad()
def own_logprobs(model: Any, prompt: Sequence[int] | Int32, tokens: Sequence[int] | Int32, tokenizer: Any | None = None) -> Float64:
    """Log-probs [tokens] under the module's own eager forward over the one sequence, float64."""
    ids = torch.tensor(np.concatenate([prompt, tokens]).astype(np.int64))[None].to(next(model.parameters()).device)
    training = model.training
    model.eval()
    try:
        with eager(model):
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    finally:
        model.train(training)
    if tokenizer is not None:
        logits[..., forbidden_ids(tokenizer, logits.shape[-1])] = -torch.inf
    found: Float64 = log_probs(logits, ids[0, len(prompt) :], SamplingParams()).double().cpu().numpy()
    return found


@contextmanager
def eager(model: Any) -> Iterator[None]:
    """The model with the attention that its authors wrote, without any kernel's."""
    before = getattr(model.config, "_attn_implementation", None)
    changed = before not in (None, "eager")
    if changed:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if changed:
            model.set_attn_implementation(before)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

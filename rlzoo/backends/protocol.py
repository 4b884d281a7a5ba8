"""The contract between the event loop that grows trees and the engines that sample tokens."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Protocol

from ..options import CountOrOff, Within, check
from ..tree import Float32, Float64, Int32, Stop, Tree

if TYPE_CHECKING:
    import torch

LEAST_TEMPERATURE = 0.01  # below it logits / temperature lose their digits in float32; vLLM does not go below it either
Temperature = Annotated[float, Within(LEAST_TEMPERATURE, 1000)]
TemperatureOrGreedy = Annotated[float, Within(LEAST_TEMPERATURE, 1000, off=0)]
NucleusShare = Annotated[float, Within(0, 1, above=True)]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The distribution sampled from; log-probs returned are those of exactly this distribution.

    temperature 0 means greedy (log-probs are then those at temperature 1). top_k 0 and top_p 1 switch the filters off.
    Order: vocabulary mask, temperature, top_k, top_p, renormalised.

    Raises:
        ValueError: a value is outside its range.
    """

    temperature: TemperatureOrGreedy = 1.0
    top_p: NucleusShare = 1.0
    top_k: CountOrOff = 0

    def __post_init__(self) -> None:
        check(self, "")


@dataclass(frozen=True, slots=True)
class SegmentRequest:
    """Sample at most `max_tokens` after `context`.

    `id` is unique among all ids not released and later names the end of this segment. `parent` is the id of an earlier request
    whose path starts with `context` (normally it ends exactly there; a longer path is cut), or a fresh id standing for the
    prompt; all requests with one parent share the work of computing it. `context` holds all ids from the prompt's first on;
    it is what the engine falls back on when it no longer holds the parent's state. What is sampled depends on `context`,
    `seed` and `params` alone.
    """

    id: int
    parent: int
    context: Sequence[int] | Int32
    max_tokens: int
    seed: int
    params: SamplingParams = field(default_factory=SamplingParams)


def check_request(request: SegmentRequest, max_context: int, known: Container[int]) -> None:
    """What every engine asks of a request; `known`: ids that are in use.

    Raises:
        ValueError: see `Backend.submit`.
    """
    n = len(request.context)
    if n == 0 or request.max_tokens < 1:
        raise ValueError(f"request {request.id} has {n} context tokens and max_tokens {request.max_tokens}; both must be at least 1")
    if n + request.max_tokens > max_context:
        raise ValueError(
            f"request {request.id}: context of {n} tokens + max_tokens {request.max_tokens} exceeds the model's context of {max_context}"
        )
    if request.id in known or request.id == request.parent:
        raise ValueError(f"request id {request.id} is in use already")


@dataclass(frozen=True, slots=True, eq=False)
class SegmentResult:
    """A finished segment: tokens int32 [n] and log-probs float32 (float64 from a float64 model) [n], 1 <= n <= max_tokens.

    `stop` is EOS (the last token ends the text) or OPEN (max_tokens reached).
    """

    id: int
    tokens: Int32
    logprobs: Float32 | Float64
    stop: Stop


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a weight sync did. `tensors` and `bytes` count what was copied, `seconds` how long it took."""

    version: int
    tensors: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class BackendStats:
    """Counters since the backend was made.

    forwarded_tokens: non-pad tokens sent through the model; recomputed_tokens: those among them that had been computed
    before and were evicted; cached_tokens: context tokens of requests that were found instead of computed; padded_tokens: batch
    positions paid for beyond them; steps: model calls. What an engine does not count is 0.
    """

    sampled_tokens: int = 0
    forwarded_tokens: int = 0
    recomputed_tokens: int = 0
    cached_tokens: int = 0
    padded_tokens: int = 0
    steps: int = 0


class TraceRow(NamedTuple):
    """One step: its number, the paths it advanced, and the request ids that ended in it and that got a row in it."""

    step: int
    active: int
    finished: tuple[int, ...]
    admitted: tuple[int, ...]


class Backend(Protocol):
    """An engine. Decoding refills continuously: a finished path leaves the batch at once, a waiting one takes its place."""

    tokenizer: Any
    max_context: int  # longest prompt + response, tokens
    capacity: int  # paths decoded at once; the event loop keeps at least so many in flight
    eos_ids: frozenset[int]  # ids that end a text

    def submit(self, requests: Iterable[SegmentRequest]) -> None:
        """Queue requests; returns at once.

        Raises:
            ValueError: a context plus max_tokens exceeds `max_context`, max_tokens < 1, or an id is reused.
        """

    def step(self) -> list[SegmentResult]:
        """Advance every running path by one token (or one engine step); return what finished, possibly nothing."""

    def release(self, ids: Iterable[int]) -> None:
        """Nothing will be asked below these ids any more; their state may be dropped, and what of them still waits or runs is
        abandoned (no result comes). Requests already submitted below them are still served. Unknown ids are ignored."""

    def load_weights(self, named_parameters: Iterable[tuple[str, torch.Tensor]], version: int) -> Receipt:
        """Take over the trainer's weights; drops every cached prefix.

        Raises:
            RuntimeError: requests are in flight.
            ValueError: names or shapes differ from the engine's own.
        """

    def rest(self) -> None:
        """Nothing will be sampled before the next `load_weights`: memory may be given back for an update. Nothing is in flight."""

    def score(self, trees: Sequence[Tree], params: SamplingParams | None = None) -> list[Float32 | Float64]:
        """Teacher-forced log-probs of every token under `params`, float32 (float64 from a float64 model) [tokens] per tree;
        NaN for the prompt."""

    def stats(self) -> BackendStats: ...

    def close(self) -> None:
        """Free everything; idempotent."""

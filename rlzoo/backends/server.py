"""An engine behind HTTP: any OpenAI-compatible completions server that returns token ids and log-probs, such as vLLM's.

A request is a streamed POST to /v1/completions whose prompt are token ids; up to `capacity` of them are under way at once, and
the server batches them. It cannot take over weights, so it serves evaluation, not training.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from torch import Tensor

from ..tree import Float32, Float64, Int32, Stop, Tree
from .drawing import forbidden_ids
from .protocol import BackendStats, Receipt, SamplingParams, SegmentRequest, SegmentResult, check_request
from .scoring import score_trees
from .wire import Call, Server, ServerError

COMPLETIONS = "/v1/completions"
SEEDS = 2**31 - 1  # a prime: request seeds modulo it stay apart, and fit what every server takes
MASKED = -100.0  # the bias that bans an id
TOP = 5  # log-probs of the most probable ids asked of a probe; the most that OpenAI's own interface gives
SLACK = 0.05  # how far a probe's log-probs may be from what they must be: servers compute in bfloat16
_TICK_S = 0.2  # longest that `step` waits when nothing is done
_PLAIN = SamplingParams()
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError)  # what reading an answer of another form raises


@dataclass(slots=True)
class _Answer:
    """What came for a request so far. `top`: log-probs of the most probable ids at its first token."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str | None = None
    prompt: list[int] | None = None
    top: dict[str, float] = field(default_factory=dict)

    def add(self, choice: dict[str, Any]) -> None:
        logprobs = choice.get("logprobs") or {}
        names, ids = logprobs.get("tokens") or [], choice.get("token_ids")
        if ids is None:
            ids = [int(name.removeprefix("token_id:")) for name in names if name.startswith("token_id:")]
        if not self.tokens and logprobs.get("top_logprobs"):
            self.top = logprobs["top_logprobs"][0]
        self.tokens += ids
        self.logprobs += logprobs.get("token_logprobs") or []
        self.finish = choice.get("finish_reason") or self.finish
        self.prompt = choice.get("prompt_token_ids") or self.prompt


@dataclass(slots=True, eq=False)
class _Flight:
    request: SegmentRequest
    top: int = 1
    call: Call = field(default_factory=Call)


class ServerBackend:
    """Samples from the server at `url`, which has to hold the model of `tokenizer`.

    `eos_ids`, `vocabulary` (rows of its embedding) and `max_context` are the model's; the server's own limit may be shorter.
    `model` is its name there, needed where the server has several. `timeout_s`: longest that the server may be silent while
    requests are in flight. `planned` is what will be sampled with. All that can be found out about the server is found out
    here, by a few short requests.

    Raises:
        ValueError: no such server, it serves no such model, gives no token ids or no log-probs, or not those of the distribution
            that `planned` says.
    """

    def __init__(
        self,
        url: str,
        tokenizer: Any,
        *,
        eos_ids: Iterable[int],
        vocabulary: int,
        max_context: int,
        model: str = "",
        capacity: int = 256,
        timeout_s: float = 45.0,
        key: str | None = None,
        planned: Sequence[SamplingParams] = (_PLAIN,),
    ) -> None:
        self.server, self.timeout_s, self.capacity = Server(url, key=key), timeout_s, capacity
        self.tokenizer, self.eos_ids, self.max_context = tokenizer, frozenset(eos_ids), max_context
        self._banned = forbidden_ids(tokenizer, vocabulary)
        self._known = set(tokenizer.get_vocab().values())
        self._flying: dict[int, _Flight] = {}
        self._todo: queue.SimpleQueue[_Flight | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[_Flight, _Answer | Exception]] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._heard = 0.0  # when the server last said something, by the monotonic clock
        self._checked: set[SamplingParams] = set()
        self._sampled = 0
        try:
            self._introduce(model)
            for params in planned:
                self._check(params)
        except ServerError as error:
            self.close()
            raise ValueError(str(error)) from error
        except BaseException:
            self.close()
            raise

    # -- what the server is -----------------------------------------------------------------------------------------

    def _introduce(self, model: str) -> None:
        """Learn the server's kind, version and limit, and the model's name there."""
        listed = self.server.ask("/v1/models", timeout_s=self.timeout_s)
        try:
            cards = {str(card["id"]): card for card in (listed["data"] if listed is not None else ())}
        except _MALFORMED as error:
            raise self._malformed() from error
        self.model = model if model or len(cards) != 1 else next(iter(cards))
        if self.model not in cards and (cards or not model):
            wanted = f"does not serve {model!r}" if model else "does not say that it serves one model"
            self._fail(f"{wanted}; it has: {', '.join(cards) or 'none'}; choose with --served-model")
        card = cards.get(self.model, {})
        self.max_context = min(self.max_context, int(card.get("max_model_len") or self.max_context))
        version = None
        with suppress(ServerError):  # nothing depends on it
            version = self.server.ask("/version", timeout_s=self.timeout_s)
        known = version.get("version") if isinstance(version, dict) else None
        self.engine = "server:" + " ".join(str(part) for part in (card.get("owned_by") or "unknown", known) if part)

    def _check(self, params: SamplingParams) -> None:
        """That log-probs are those of the distribution which `params` make, as far as a few tokens can tell.

        Raises:
            ServerError: they are not.
        """
        if params in self._checked:
            return
        plain = self._probe(_PLAIN)
        greedy = params.temperature == 0
        if greedy:
            said = self._probe(params).logprobs[0]
            if abs(said - max(plain.top.values(), default=said)) > SLACK:
                self._fail("gives greedy tokens other log-probs than at temperature 1")
        elif params != _PLAIN:
            half = self._probe(SamplingParams(temperature=0.5))
            if _spread(half.top, plain.top) < 1.5 * _spread(plain.top, half.top):  # twice, or the same where they are raw
                self._fail(
                    "gives log-probs from before temperature, top-p and top-k, not those of the distribution sampled; "
                    "vLLM has to be started with --logprobs-mode processed_logprobs"
                )
        for alone in [SamplingParams(top_p=1e-6)] * (params.top_p < 1) + [SamplingParams(top_k=1)] * (params.top_k > 0):
            if not greedy and abs(self._probe(alone).logprobs[0]) > SLACK:
                self._fail(f"does not do as told by {'top_p' if alone.top_p < 1 else 'top_k'}: one possible token has not all probability")
        self._checked.add(params)

    def _probe(self, params: SamplingParams) -> _Answer:
        prompt = self.tokenizer.encode("2+2=", add_special_tokens=False)
        flight = _Flight(SegmentRequest(-1, -2, prompt, 2, 1, params), TOP)
        try:
            answer = self.server.stream(COMPLETIONS, self._body(flight), self._collect, flight.call, self.timeout_s)
        except _MALFORMED as error:
            raise self._malformed() from error
        self._result(flight.request, answer)
        if answer.prompt is not None and list(answer.prompt) != list(prompt):
            self._fail(f"samples after the ids {answer.prompt[:8]} when given {prompt[:8]}")
        return answer

    def _malformed(self) -> ServerError:
        return ServerError(f"the server at {self.server.url} does not answer as a completions server does")

    def _fail(self, what: str) -> NoReturn:
        raise ServerError(f"the server at {self.server.url} {what}")

    # -- requests ---------------------------------------------------------------------------------------------------

    def submit(self, requests: Iterable[SegmentRequest]) -> None:
        """Send requests; see the protocol.

        Raises:
            RuntimeError: the server's log-probs are not those of the distribution asked for.
        """
        for request in requests:
            check_request(request, self.max_context, self._flying)
            self._check(request.params)
            if not self._flying:
                self._heard = time.monotonic()
            self._flying[request.id] = flight = _Flight(request)
            self._todo.put(flight)
            if len(self._threads) < min(self.capacity, len(self._flying)):
                self._threads.append(threading.Thread(target=self._work, name="rlzoo server request", daemon=True))
                self._threads[-1].start()

    def _work(self) -> None:
        while (flight := self._todo.get()) is not None:
            if flight.call.gone.is_set():
                continue
            try:
                self._done.put((flight, self.server.stream(COMPLETIONS, self._body(flight), self._collect, flight.call)))
            except Exception as error:
                self._done.put((flight, error))

    def _body(self, flight: _Flight) -> dict[str, Any]:
        """What is asked. Every option that a server could have a default of its own for is given."""
        request, params = flight.request, flight.request.params
        greedy = params.temperature == 0  # of the whole distribution, at temperature 1
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": [int(i) for i in request.context],
            "max_tokens": request.max_tokens,
            "seed": request.seed % SEEDS,
            "temperature": params.temperature,
            "top_p": 1.0 if greedy else params.top_p,
            "top_k": -1 if greedy or not params.top_k else params.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": sorted(self.eos_ids),
            "logprobs": flight.top,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "stream": True,
        }
        if self._banned:
            body["logit_bias"] = {str(i): MASKED for i in self._banned}
        return body

    def _collect(self, events: Iterator[Any]) -> _Answer:
        answer = _Answer()
        for event in events:
            self._heard = time.monotonic()
            for choice in event["choices"]:
                answer.add(choice)
        return answer

    def step(self) -> list[SegmentResult]:
        """What has ended since; waits briefly for the first. After any error nothing is in flight any more.

        Raises:
            RuntimeError: the server died, hangs, or gave what it must not.
        """
        try:
            finished = [self._result(request, answer) for request, answer in self._arrived()]
        except BaseException:
            self.release(list(self._flying))
            raise
        self._sampled += sum(len(result.tokens) for result in finished)
        return finished

    def _arrived(self) -> list[tuple[SegmentRequest, _Answer]]:
        arrived: list[tuple[SegmentRequest, _Answer]] = []
        while self._flying:
            try:
                flight, outcome = self._done.get(timeout=0 if arrived else _TICK_S)
            except queue.Empty:
                if not arrived and time.monotonic() - self._heard > self.timeout_s:
                    self._fail(
                        f"has said nothing for {self.timeout_s:g} s while {len(self._flying)} requests are in flight: "
                        "it hangs, or needs more time (--backend.timeout-s)"
                    )
                break
            if self._flying.get(flight.request.id) is not flight:
                continue  # abandoned
            del self._flying[flight.request.id]
            if isinstance(outcome, _MALFORMED):
                raise self._malformed() from outcome
            if isinstance(outcome, Exception):
                raise outcome
            arrived.append((flight.request, outcome))
        return arrived

    def _result(self, request: SegmentRequest, answer: _Answer) -> SegmentResult:
        """What the server gave, checked. What it sampled after the end of the text is cut off."""
        tokens, logprobs = answer.tokens, answer.logprobs
        if not tokens:
            self._fail("returns no token ids; it has to know return_token_ids, as vLLM does")
        if len(logprobs) != len(tokens) or any(x is None for x in logprobs):
            self._fail(f"returns {len(logprobs)} log-probs for {len(tokens)} sampled tokens; every token needs one")
        strange = [t for t in tokens if t not in self._known]
        if strange:
            self._fail(f"sampled id {strange[0]}, which the tokenizer does not know: it serves another model")
        if not np.isfinite(logprobs).all() or max(logprobs) > SLACK:
            self._fail(f"returns log-probs that are none, from {min(logprobs)} to {max(logprobs)}")
        end = next((i + 1 for i, t in enumerate(tokens) if t in self.eos_ids), None)
        if len(tokens) > request.max_tokens or (end is None and len(tokens) < request.max_tokens):
            self._fail(
                f"ended a response ({answer.finish}) after {len(tokens)} of {request.max_tokens} tokens with id {tokens[-1]}, which ends "
                "no text of the model: it keeps the last id back, or serves another model"
            )
        kept = slice(0, end)
        stop = Stop.OPEN if end is None else Stop.EOS
        return SegmentResult(request.id, np.array(tokens[kept], np.int32), np.array(logprobs[kept], np.float32), stop)

    def release(self, ids: Iterable[int]) -> None:
        """Forget ids and end what runs; see the protocol."""
        for i in ids:
            if (flight := self._flying.pop(i, None)) is not None:
                flight.call.abandon()

    # -- weights and scores -----------------------------------------------------------------------------------------

    def load_weights(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> Receipt:
        """Refused.

        Raises:
            RuntimeError: always.
        """
        self._fail("cannot take over weights; training needs an engine in its own process")

    def rest(self) -> None:
        """Nothing: the server's memory is its own."""

    def score(self, trees: Sequence[Tree], params: SamplingParams | None = None) -> list[Float32 | Float64]:
        """Teacher-forced log-probs of every token, float32 [tokens] per tree; see the protocol. Needs a server that knows
        `prompt_logprobs`, which are those of the whole distribution at temperature 1.

        Raises:
            ValueError: other `params`, or the model has ids that the tokenizer does not know.
            RuntimeError: the server gives none.
        """
        if params not in (None, _PLAIN) or self._banned:
            raise ValueError("a server scores at temperature 1, without top-p, top-k and ids unknown to the tokenizer")
        with ThreadPoolExecutor(self.capacity) as pool:
            return score_trees(trees, lambda rows, prompts: list(pool.map(self._score_row, rows, prompts)), exact=False)

    def _score_row(self, ids: Int32, prompt: int) -> Float64:
        body = {"model": self.model, "prompt": ids.tolist(), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        answer = self.server.ask(COMPLETIONS, body, timeout_s=self.timeout_s)
        said = (answer.get("choices") or [{}])[0].get("prompt_logprobs")
        if not said or len(said) != len(ids):
            self._fail("does not score: it gives no prompt_logprobs")
        return np.array([entry[str(i)]["logprob"] for i, entry in zip(ids[prompt:], said[prompt:], strict=True)], np.float64)

    def stats(self) -> BackendStats:
        """Tokens sampled; what the server forwards for them it does not tell."""
        return BackendStats(sampled_tokens=self._sampled)

    def close(self) -> None:
        """End every request and the threads; idempotent."""
        self.release(list(self._flying))
        for _ in self._threads:
            self._todo.put(None)
        self._threads.clear()


def _spread(top: dict[str, float], other: dict[str, float]) -> float:
    """Largest minus least log-prob among the ids that both have."""
    values = [top[name] for name in top.keys() & other.keys()]
    return max(values) - min(values) if values else 0.0

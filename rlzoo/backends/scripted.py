"""A backend without a network, for tests: a bigram table to sample from, or a script that says what comes next.

It keeps the whole contract (queue, rows, stops, seeds, log-probs, weights) in plain loops.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..tree import Float32, Float64, Stop, Tree
from .drawing import Filters, draw, end_ids, forbidden_ids, log_probs, uniforms
from .protocol import BackendStats, Receipt, SamplingParams, SegmentRequest, SegmentResult, check_request

Script = Callable[[Sequence[int], int], Sequence[int]]
"""(context ids, request seed) -> ids that follow; log-probs are 0, as of a certain event."""


@dataclass(slots=True)
class _Path:
    request: SegmentRequest
    script: list[int] | None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class ScriptedBackend:
    """Samples from a bigram table [vocabulary, vocabulary] of logits (row: last token), drawn from `seed`; or follows `script`.

    Weights are called "bigram". All paths in flight up to `capacity` advance by one token per step.
    """

    def __init__(
        self,
        tokenizer: Any,
        script: Script | None = None,
        *,
        capacity: int = 8,
        max_context: int = 1 << 16,
        vocabulary: int | None = None,
        eos_ids: Iterable[int] | None = None,
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.script, self.capacity, self.max_context = tokenizer, script, capacity, max_context
        size = vocabulary if vocabulary is not None else max(tokenizer.get_vocab().values()) + 1
        self.eos_ids = frozenset(eos_ids) if eos_ids is not None else end_ids(tokenizer, None)
        self.forbidden = forbidden_ids(tokenizer, size)
        table = np.random.default_rng(seed).normal(size=(size, size))
        self.weights: dict[str, Tensor] = {"bigram": torch.from_numpy(table)}
        self.version = 0
        self._queue: deque[SegmentRequest] = deque()
        self._rows: list[_Path] = []
        self._sampled = self._steps = 0

    def submit(self, requests: Iterable[SegmentRequest]) -> None:
        for r in requests:
            check_request(r, self.max_context, [other.id for other in (*self._queue, *(p.request for p in self._rows))])
            self._queue.append(r)

    def step(self) -> list[SegmentResult]:
        while self._queue and len(self._rows) < self.capacity:
            request = self._queue.popleft()
            script = None if self.script is None else [int(t) for t in self.script(list(request.context), request.seed)]
            if script == []:
                raise ValueError(f"the script says nothing after the {len(request.context)} context tokens of request {request.id}")
            self._rows.append(_Path(request, script))
        finished = []
        for path in tuple(self._rows):
            self._advance(path)
            ended = path.tokens[-1] in self.eos_ids
            if ended or len(path.tokens) == path.request.max_tokens or len(path.tokens) == len(path.script or ()):
                self._rows.remove(path)
                stop = Stop.EOS if ended else Stop.OPEN
                tokens, logprobs = np.array(path.tokens, np.int32), np.array(path.logprobs, np.float64)
                finished.append(SegmentResult(path.request.id, tokens, logprobs, stop))
        self._steps += 1
        return finished

    def _advance(self, path: _Path) -> None:
        at = len(path.tokens)
        self._sampled += 1
        if path.script is not None:
            path.tokens.append(path.script[at])
            path.logprobs.append(0.0)
            return
        last = path.tokens[-1] if path.tokens else int(path.request.context[-1])
        filters = Filters.same(path.request.params, 1, torch.device("cpu"))
        u = uniforms(np.array([path.request.seed], np.uint64), np.array([at]))
        token, logprob = draw(self._logits([last]), u, filters)
        path.tokens.append(int(token[0]))
        path.logprobs.append(float(logprob[0]))

    def _logits(self, last: Sequence[int]) -> Tensor:
        logits = self.weights["bigram"][torch.tensor(last, dtype=torch.long)].clone()
        logits[:, self.forbidden] = -torch.inf
        return logits

    def release(self, ids: Iterable[int]) -> None:
        gone = set(ids)
        self._queue = deque(r for r in self._queue if r.id not in gone)
        self._rows = [p for p in self._rows if p.request.id not in gone]

    def load_weights(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> Receipt:
        begun = time.perf_counter()
        if self._queue or self._rows:
            raise RuntimeError(f"weights cannot change while {len(self._queue) + len(self._rows)} requests are in flight")
        given = {name: value.detach().to("cpu", torch.float64).clone() for name, value in named_parameters}
        if {n: v.shape for n, v in given.items()} != {n: v.shape for n, v in self.weights.items()}:
            raise ValueError(f"the scripted backend has one weight, bigram of shape {tuple(self.weights['bigram'].shape)}")
        self.weights, self.version = given, version
        return Receipt(version, len(given), sum(v.nbytes for v in given.values()), time.perf_counter() - begun)

    def rest(self) -> None: ...

    def score(self, trees: Sequence[Tree], params: SamplingParams | None = None) -> list[Float32 | Float64]:
        scores: list[Float32 | Float64] = []
        for tree in trees:
            out = np.full(len(tree.tokens), np.nan)
            for node in range(1, tree.nodes):
                tokens = tree.node_tokens(node)
                if len(tokens) == 0:
                    continue
                above = np.concatenate([tree.prompt, tree.path_tokens(int(tree.parent[node]))])
                previous = [int(above[-1]), *tokens[:-1].tolist()]
                targets = torch.from_numpy(tokens.astype(np.int64))
                values = log_probs(self._logits(previous), targets, params or SamplingParams()).numpy()
                out[tree.offsets[node] : tree.offsets[node + 1]] = 0.0 if self.script is not None else values
            scores.append(out)
        return scores

    def stats(self) -> BackendStats:
        return BackendStats(sampled_tokens=self._sampled, steps=self._steps)

    def close(self) -> None:
        self._queue.clear()
        self._rows.clear()


def respond(tokenizer: Any, responses: Mapping[str, Sequence[str]]) -> Script:
    """A script that answers each prompt text with one of its response texts, chosen by the seed, then ends.

    A path that is already under way continues with one of the responses that begin as it does.

    Raises (when called): ValueError if no response fits the context.
    """
    encode = {}
    for prompt, texts in responses.items():
        start = tokenizer.encode(prompt, add_special_tokens=False)
        encode[tuple(start)] = [[*tokenizer.encode(text, add_special_tokens=False), int(tokenizer.eos_token_id)] for text in texts]

    def script(context: Sequence[int], seed: int) -> Sequence[int]:
        ids = list(context)
        for start, answers in encode.items():
            if tuple(ids[: len(start)]) == start:
                said = ids[len(start) :]
                fitting = [a for a in answers if a[: len(said)] == said and len(a) > len(said)]
                if fitting:
                    return fitting[seed % len(fitting)][len(said) :]
        raise ValueError(f"the script has no response for {tokenizer.decode(ids)!r}")

    return script

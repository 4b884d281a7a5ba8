"""What the torch engine knows of each decoding row, as flat arrays, so that a step costs no Python loop over rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..tree import Float64, Int32, Int64
from .protocol import SegmentRequest


class RowState:
    """One entry per row; a row without a request is a hole, or a path whose last token is being forwarded for its children."""

    _ARRAYS = ("seed", "count", "limit", "length", "last", "temperature", "top_p", "top_k", "_tokens", "_logprobs")

    def __init__(self, capacity: int) -> None:
        self.request: list[SegmentRequest | None] = [None] * capacity
        self.seed = np.zeros(capacity, np.uint64)
        self.count = np.zeros(capacity, np.int64)  # tokens sampled
        self.limit = np.zeros(capacity, np.int64)  # tokens allowed
        self.length = np.zeros(capacity, np.int64)  # tokens whose keys and values are held
        self.last = np.zeros(capacity, np.int64)  # token to forward next, at position `length`
        self.temperature, self.top_p = np.ones(capacity), np.ones(capacity)
        self.top_k = np.zeros(capacity, np.int64)
        self._tokens, self._logprobs = np.zeros((capacity, 64), np.int32), np.zeros((capacity, 64))

    def place(self, row: int, token: int, position: int) -> None:
        """Let `row` forward `token` next, at `position`."""
        self.last[row], self.length[row] = token, position

    def start(self, row: int, request: SegmentRequest, context: int) -> None:
        """Let `row`, which holds all `context` tokens, sample for `request`."""
        self.request[row] = request
        self.seed[row], self.limit[row], self.count[row], self.length[row] = request.seed, request.max_tokens, 0, context
        params = request.params
        self.temperature[row], self.top_p[row], self.top_k[row] = params.temperature, params.top_p, params.top_k
        width = self._tokens.shape[1]
        if request.max_tokens > width:
            wider = ((0, 0), (0, max(request.max_tokens, 2 * width) - width))
            self._tokens, self._logprobs = np.pad(self._tokens, wider), np.pad(self._logprobs, wider)

    def record(self, rows: int, tokens: Int64, logprobs: Float64, ends: NDArray[np.bool_]) -> NDArray[np.intp]:
        """Append one token to each of the first `rows` rows; returns the rows whose segment is finished."""
        at, count = np.arange(rows), self.count[:rows]
        self._tokens[at, count] = tokens
        self._logprobs[at, count] = logprobs
        count += 1
        self.last[:rows] = tokens
        return np.flatnonzero(ends[tokens] | (count >= self.limit[:rows]))

    def take(self, row: int) -> tuple[SegmentRequest, Int32, Float64]:
        """Remove a finished row's request, with its tokens and log-probs."""
        request, n = self.request[row], int(self.count[row])
        assert request is not None
        self.request[row] = None
        return request, self._tokens[row, :n].copy(), self._logprobs[row, :n].copy()

    def move(self, source: Sequence[int], target: Sequence[int]) -> None:
        for name in self._ARRAYS:
            array = getattr(self, name)
            array[target] = array[source]
        for s, t in zip(source, target, strict=True):
            self.request[t], self.request[s] = self.request[s], None

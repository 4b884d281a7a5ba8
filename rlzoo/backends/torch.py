"""A continuously refilled decoding engine for any transformers causal LM with full attention, on CPU or one GPU.

Each step forwards one token of every running path at its own position. A path that ends leaves at once and a waiting one
takes its row. The state of a segment that may be extended is kept; its children share one forward of its last token.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..tree import Float32, Float64, Int32, Stop, Tree
from .drawing import Filters, draw, end_ids, forbidden_ids, uniforms
from .forwards import Forwards
from .kvcache import ATTENTION, Key, Prefix, PrefixStore, Rows
from .memory import free, out_of_memory
from .protocol import BackendStats, Receipt, SamplingParams, SegmentRequest, SegmentResult, TraceRow
from .rowstate import RowState
from .scoring import forward_rows, score_trees
from .waiting import Group, Known, Waiting
from .weights import check_full_attention, context_length, copy_of, copy_weights, floating_type

log = logging.getLogger(__name__)

_PREFILL_TOKENS = 8192  # padded prompt tokens forwarded at once
_PREFILL_LOGITS = 1 << 28  # logits computed at once for them, at most: each prompt's at every prompt's last position


@dataclass(slots=True)
class _Plan:
    """What one step does for a group: `count` of its requests get a row. Its context's keys, values and logits are at
    hand already (`prefix`), or row `row` computes them in this step's forward."""

    group: Group
    count: int
    row: int | None = None
    prefix: Prefix | None = None
    rows: list[int] = field(default_factory=list)


class TorchBackend:
    """Sample with a transformers model.

    `model` is copied, in `dtype` (None: its own), unless `share` says that the trainer's own module is to be used. `capacity`
    paths run at once, half as many whenever memory runs out (or would, for the longest paths that were asked for);
    prefixes kept for forks take at most `cache_bytes` (an evicted one is computed again from its context). Results depend
    on capacity and order only through the rounding of the model's arithmetic: in float64 the same tokens are drawn. `turns`: ids that
    end a response beside those that the model names.

    Raises:
        ValueError: sliding-window, state-space or unequal layers; a tokenizer with more ids than the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        capacity: int = 256,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device = "cpu",
        max_context: int | None = None,
        cache_bytes: int = 1 << 30,
        threads: int | None = None,
        share: bool = False,
        trace: bool = False,
        turns: Iterable[int] = (),
    ) -> None:
        if capacity < 1:
            raise ValueError(f"the torch backend's capacity is {capacity}; it must be at least 1")
        self.max_context = context_length(model.config, max_context)
        check_full_attention(model.config, self.max_context)
        if threads is not None:
            torch.set_num_threads(threads)
        self.device = torch.device(device)
        if share:
            self.model = model
        else:
            self.model = copy_of(model, floating_type(dtype)).to(self.device).eval().requires_grad_(False)
            try:
                self.model.set_attn_implementation(ATTENTION)
            except (ValueError, AttributeError, ImportError) as error:
                raise ValueError(f"the torch backend cannot replace this model's attention: {error}") from error
        self.tokenizer, self.capacity, self.version = tokenizer, capacity, 0
        self.vocabulary = int(self.model.get_output_embeddings().weight.shape[0])
        self.eos_ids = end_ids(tokenizer, model, turns)
        self.forbidden = torch.tensor(forbidden_ids(tokenizer, self.vocabulary), dtype=torch.long, device=self.device)
        self._is_eos = np.zeros(self.vocabulary, bool)
        self._is_eos[[i for i in self.eos_ids if i < self.vocabulary]] = True
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self._store = PrefixStore(cache_bytes)
        self._cache = Rows(capacity, 0)
        self._state = RowState(capacity)
        self._waiting = Waiting(self.max_context, self._forget)
        self._running: dict[int, int] = {}  # request -> row
        self._parked: dict[Key, tuple[int, Int32, Stop]] = {}  # ended in the last step -> its row (not given up yet), path, why
        self._holes: list[int] = []  # free rows below self._rows
        self._rows = 0
        self._counts = dict.fromkeys(BackendStats.__dataclass_fields__, 0)
        self._forwards = Forwards(self.model, self.forbidden, self._pad)
        self.trace: list[TraceRow] | None = [] if trace else None

    def stats(self) -> BackendStats:
        return BackendStats(**self._counts)

    def close(self) -> None:
        self.rest()

    # -- requests ---------------------------------------------------------------------------------------------------

    def submit(self, requests: Iterable[SegmentRequest]) -> None:
        """Queue requests; see the protocol."""
        for request in requests:
            self._waiting.add(request)
            self._cache.max_length = max(self._cache.max_length, len(request.context) + request.max_tokens)

    def release(self, ids: Iterable[int]) -> None:
        """Forget ids, abandon those that wait or run; see the protocol."""
        for i in ids:
            if i in self._running:
                row = self._running.pop(i)
                self._state.request[row] = None
                self._holes.append(row)
            self._waiting.release(i)

    def _forget(self, id: int, known: Known | None) -> None:
        self._store.drop_all(id)
        if known is not None and (id, known.end) in self._parked:
            self._holes.append(self._parked.pop((id, known.end))[0])

    # -- one step ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[SegmentResult]:
        """Advance every running path by one token, and start waiting ones where there is room.

        Out of memory halves the capacity, for good, and starts what was running once more. After any other error the engine is
        empty, and usable once more if its weights are sound.

        Raises:
            RuntimeError: the model's logits are not finite.
            torch.OutOfMemoryError or RuntimeError: out of memory with one path at once.
        """
        if not self._running and not self._waiting.queued:
            return []
        while True:
            try:
                return self._advance()
            except BaseException as error:
                if self.capacity == 1 or not out_of_memory(error):
                    self.close()  # a half-done step cannot be resumed, and numbers that are not finite must not stay in the cache
                    raise
            self._shrink()  # outside the handler: the traceback holds the step's tensors

    def _advance(self) -> list[SegmentResult]:
        plans = self._plan()
        self._compact(plans)
        logits = self._forwards.rows(self._cache, self._state, self._rows)
        self._counts["forwarded_tokens"] += len(self._running)  # the others are counted with their groups
        admitted = self._admit(plans, logits)
        finished = self._draw(logits, plans)
        self._counts["steps"] += 1
        if self.trace is not None:
            ids = tuple(r.id for r in finished)
            self.trace.append(TraceRow(self._counts["steps"], len(self._running) + len(ids), ids, tuple(admitted)))
        return finished

    def _shrink(self) -> None:
        """Halve the capacity and let everything that runs wait again. What a request samples depends on its context and seed alone, so
        the results are the same; the tokens that its row had so far are sampled again and counted once."""
        log.warning("out of memory with %d paths at once; continuing with %d", self.capacity, self.capacity // 2)
        self.capacity //= 2
        for row in reversed(self._running.values()):
            request = self._state.request[row]
            assert request is not None
            self._counts["sampled_tokens"] -= int(self._state.count[row])
            self._waiting.put_back(request)
        self._drop_rows()
        self._cache = Rows(self.capacity, self._cache.max_length)
        self._state = RowState(self.capacity)
        free()

    def _plan(self) -> list[_Plan]:
        """Decide who gets a row, forks first, and bring what can be computed in the next forward into rows."""
        plans, stays = [], self._unpark()
        free = self.capacity - len(self._running) - len(stays)
        for group, row in stays:
            count = 1 + min(len(group.waiting) - 1, free)
            free -= count - 1
            plans.append(_Plan(group, count, row))
        placed = {group.key for group, _ in stays}
        fresh: list[_Plan] = []
        padded = 0
        for group in self._waiting:
            if free == 0 or padded > _PREFILL_TOKENS or len(fresh) ** 2 * self.vocabulary > _PREFILL_LOGITS:
                break
            if group.key in placed:
                continue
            plan = _Plan(group, min(len(group.waiting), free))
            free -= plan.count
            entry = self._store.get(group.key)
            if entry is not None and entry.logits is not None and np.array_equal(entry.tokens, group.context):
                plan.prefix = entry
            else:
                base = self._longest_held(group)
                missing = len(group.context) - (0 if base is None else base.shape[3])
                self._count_forward(group, missing)
                if base is None:
                    fresh.append(plan)
                    padded = len(fresh) * max(len(p.group.context) for p in fresh)
                elif missing == 1:
                    plan.row = self._take_row()
                    self._cache.load([plan.row], base)
                    self._state.place(plan.row, int(group.context[-1]), len(group.context) - 1)
                else:
                    self._compute([plan], base)
            plans.append(plan)
        if fresh:
            self._compute(fresh, None)
        return plans

    def _unpark(self) -> list[tuple[Group, int]]:
        """Segments that ended in the last step stay in their row if a child came meanwhile, else go to the store: OPEN ones always,
        those with an end-of-text token only where something waits below a part of their path."""
        stays = []
        for key, (row, path, stop) in self._parked.items():
            group = self._waiting.fork(key)
            if group is not None:
                self._state.place(row, int(path[-1]), len(path) - 1)
                self._count_forward(group, 1)
                stays.append((group, row))
                continue
            if stop == Stop.OPEN or self._waiting.wanted(key[0]):
                self._store.put(key, Prefix(path, self._cache.prefix(row, len(path) - 1)))
            self._holes.append(row)
        self._parked.clear()
        return stays

    def _longest_held(self, group: Group) -> Tensor | None:
        """Keys and values of the longest held proper prefix of a context, [layers, 2, kv_heads, tokens, head_dim]."""
        wanted = group.context[:-1]
        id: int | None = group.key[0]
        entry = self._store.get(group.key)
        known = self._waiting.known
        while id is not None and id in known:
            entry = entry or self._store.get((id, known[id].end))
            if entry is not None:
                shared = min(entry.kv.shape[3], len(wanted))
                if shared and np.array_equal(entry.tokens[:shared], wanted[:shared]):
                    return entry.kv[:, :, :, :shared]
            entry, id = None, known[id].parent
        return None

    def _count_forward(self, group: Group, missing: int) -> None:
        """Account for the last `missing` tokens of a context, which this step forwards."""
        known, n = self._waiting.known[group.key[0]], len(group.context)
        self._counts["forwarded_tokens"] += missing
        self._counts["recomputed_tokens"] += max(0, min(known.forwarded, n) - (n - missing))
        known.forwarded = max(known.forwarded, n)

    def _compute(self, plans: Sequence[_Plan], past: Tensor | None) -> None:
        """Forward whole contexts (one only, if it continues `past`)."""
        kv, logits, padded = self._forwards.contexts([p.group.context for p in plans], past)
        for i, plan in enumerate(plans):
            plan.prefix = Prefix(plan.group.context, kv[:, :, i, :, : len(plan.group.context)], logits[i])
        self._counts["padded_tokens"] += padded

    def _admit(self, plans: Sequence[_Plan], logits: Tensor | None) -> list[int]:
        """Give each planned request a row that holds its context; returns their ids."""
        admitted = []
        for plan in plans:
            group, n = plan.group, len(plan.group.context)
            rows = [] if plan.row is None else [plan.row]
            added = [self._take_row() for _ in range(plan.count - len(rows))]
            if plan.row is not None:
                self._cache.spread(plan.row, added, n)
            elif added:
                assert plan.prefix is not None
                self._cache.load(added, plan.prefix.kv)
            plan.rows = rows + added
            for row in plan.rows:
                request = self._waiting.take(group)
                self._state.start(row, request, n)
                self._running[request.id] = row
                admitted.append(request.id)
            if group.waiting or group.key[0] not in self._waiting.released:
                self._keep(plan, logits)
            self._waiting.settle(group)
        return admitted

    def _keep(self, plan: _Plan, logits: Tensor | None) -> None:
        """Keep what later children need, unless it is in the store already."""
        group, prefix = plan.group, plan.prefix
        if plan.row is not None:
            assert logits is not None
            kv = self._cache.prefix(plan.row, len(group.context))
            self._store.put(group.key, Prefix(group.context, kv, logits[plan.row].clone()))
        elif self._store.get(group.key) is not prefix:
            assert prefix is not None and prefix.logits is not None
            self._store.put(group.key, Prefix(prefix.tokens, prefix.kv.clone(), prefix.logits.clone()))

    def _draw(self, logits: Tensor | None, plans: Sequence[_Plan]) -> list[SegmentResult]:
        """Draw one token for every row; rows that start take the logits of their context, shared with their siblings."""
        rows, state = self._rows, self._state
        source = np.arange(rows)
        parts = [] if logits is None else [logits]
        size = 0 if logits is None else len(logits)
        for plan in plans:
            if plan.row is None:
                assert plan.prefix is not None and plan.prefix.logits is not None
                parts.append(plan.prefix.logits[None])
                source[plan.rows] = size
                size += 1
            else:
                source[plan.rows] = plan.row
        scores = parts[0] if len(parts) == 1 else torch.cat(parts)
        if plans:
            scores = scores[torch.from_numpy(source).to(self.device)]
        filters = Filters(state.temperature[:rows], state.top_p[:rows], state.top_k[:rows], self.device)
        tokens, logprobs = draw(scores, uniforms(state.seed[:rows], state.count[:rows]), filters)
        ended = state.record(rows, tokens.cpu().numpy(), logprobs.cpu().numpy(), self._is_eos)
        self._counts["sampled_tokens"] += rows
        return [self._finish(int(row)) for row in ended]

    def _finish(self, row: int) -> SegmentResult:
        request, tokens, logprobs = self._state.take(row)
        stop = Stop.EOS if self._is_eos[tokens[-1]] else Stop.OPEN
        del self._running[request.id]
        known = self._waiting.known[request.id]
        known.end = len(request.context) + len(tokens)
        known.forwarded = known.end - 1
        path = np.concatenate([np.asarray(request.context, np.int32), tokens])
        self._parked[request.id, known.end] = (row, path, stop)
        exact = self.model.dtype == torch.float64
        return SegmentResult(request.id, tokens, logprobs if exact else logprobs.astype(np.float32), stop)

    def _take_row(self) -> int:
        if self._holes:
            return self._holes.pop()
        self._rows += 1
        return self._rows - 1

    def _compact(self, plans: Sequence[_Plan]) -> None:
        """Move the last rows into the holes, so that those in use are the first ones."""
        if not self._holes:
            return
        free = set(self._holes)
        rows = self._rows - len(free)
        source = [row for row in range(rows, self._rows) if row not in free]
        target = sorted(row for row in free if row < rows)
        if source:
            self._cache.move(source, target, int(self._state.length[source].max()))
            self._state.move(source, target)
            moved = dict(zip(source, target, strict=True))
            for plan in plans:
                plan.row = moved.get(plan.row, plan.row) if plan.row is not None else None
            for row in target:
                request = self._state.request[row]
                if request is not None:
                    self._running[request.id] = row
        self._holes.clear()
        self._rows = rows

    # -- weights and scores -----------------------------------------------------------------------------------------

    def load_weights(self, named_parameters: Iterable[tuple[str, Tensor]], version: int) -> Receipt:
        """Copy the trainer's weights in place and drop every cached prefix; see the protocol."""
        begun = time.perf_counter()
        flying = len(self._running) + len(self._waiting.queued)
        if flying:
            raise RuntimeError(f"weights cannot change while {flying} requests are in flight")
        tensors, size = copy_weights(self.model, named_parameters)
        self._reset()
        self.version = version
        return Receipt(version, tensors, size, time.perf_counter() - begun)

    def rest(self) -> None:
        """Forget every prefix and give the memory of keys and values back; see the protocol."""
        self._reset()
        self._cache.drop()
        free(self.device)

    def stale_weights(self, named_parameters: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Names of the given weights that are not what the engine computes with (after rounding to its own type)."""
        own = dict(self.model.named_parameters(remove_duplicate=False))
        return [n for n, v in named_parameters if n not in own or not torch.equal(own[n], v.detach().to(own[n].device, own[n].dtype))]

    def _reset(self) -> None:
        """Forget every id, row and prefix."""
        self._waiting.clear()
        self._drop_rows()
        self._cache.max_length = 0

    def _drop_rows(self) -> None:
        """Forget every row and prefix."""
        for held in (self._store, self._running, self._parked, self._holes):
            held.clear()
        self._rows = 0

    @torch.inference_mode()
    def score(self, trees: Sequence[Tree], params: SamplingParams | None = None) -> list[Float32 | Float64]:
        """Teacher-forced log-probs of every token; see the protocol."""
        rows = partial(forward_rows, self.model, params or SamplingParams(), self.forbidden, self.device, self._pad)
        return score_trees(trees, rows, exact=self.model.dtype == torch.float64)

"""The event loop that grows trees: a sampler decides, a backend generates.

Each time a segment is back its problem's growth is asked what to extend next; there is no barrier between problems or
levels. Trees come out the same in whatever order segments arrive: seeds, node numbers and the order of children follow a
segment's place in its tree.
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ..backends.protocol import Backend, SegmentRequest, SegmentResult
from ..builder import TreeBuilder
from ..tree import ROOT, Int32, Stop, Tree
from .base import Extend, Growth, Sampler
from .seeds import fork_seed, growth_seed, root_seed
from .stopping import classify

_request_ids = itertools.count()


def next_request_id() -> int:
    """An id that no other request of this process has."""
    return next(_request_ids)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to sample from: token `ids`, under an `id` that is unique among the prompts of a call and enters every seed."""

    id: str
    ids: Sequence[int]


def grow(
    sampler: Sampler,
    backend: Backend,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    step: int = 0,
    progress: float = 0.0,
    on_tree: Callable[[int, Tree], None] | None = None,
) -> list[Tree]:
    """Sample one tree per prompt; trees in the order of `prompts`, `meta` holds the prompt's id as "problem" and the sampler's
    report as "sampler". `progress` is the share of the run that is done, for a sampler's schedules.

    `on_tree(index, tree)` is called as soon as a tree is finished, while others are still being sampled.

    Raises:
        ValueError: see `grow_iter`.
    """
    trees: dict[int, Tree] = {}
    for index, tree in grow_iter(sampler, backend, prompts, seed=seed, step=step, progress=progress):
        trees[index] = tree
        if on_tree is not None:
            on_tree(index, tree)
    return [trees[i] for i in range(len(prompts))]


def grow_iter(
    sampler: Sampler, backend: Backend, prompts: Sequence[Prompt], *, seed: int, step: int = 0, progress: float = 0.0
) -> Iterator[tuple[int, Tree]]:
    """As `grow`, but yields (index, tree) in the order in which trees finish. Closing the iterator abandons the rest.

    Raises:
        ValueError: a prompt is empty, given twice, or too long for the backend's context.
    """
    _check(sampler, backend, prompts)
    return _loop(sampler, backend, prompts, seed, step, progress)


def _loop(
    sampler: Sampler, backend: Backend, prompts: Sequence[Prompt], seed: int, step: int, progress: float
) -> Iterator[tuple[int, Tree]]:
    waiting = iter(enumerate(prompts))
    room = backend.capacity + backend.capacity // 4  # a few more than run at once, so that refill never waits for this loop
    growing: set[_Growing] = set()
    owner: dict[int, _Growing] = {}  # request in flight -> its tree
    gc.freeze()  # many small lists come to life here: spare the collector from going through everything else each time
    try:
        exhausted = False
        while True:
            while not exhausted and len(owner) < room:
                entry = next(waiting, None)
                if entry is None:
                    exhausted = True
                    break
                tree = _Growing(sampler, backend, *entry, seed=seed, step=step, progress=progress)
                growing.add(tree)
                for request in tree.start():
                    owner[request] = tree
            if not owner:
                return
            for result in backend.step():
                tree = owner.pop(result.id)
                for request in tree.take(result):
                    owner[request] = tree
                if not tree.in_flight:
                    growing.remove(tree)
                    yield tree.index, tree.finish()
    finally:
        gc.unfreeze()
        for tree in growing:
            tree.release_all()


def _check(sampler: Sampler, backend: Backend, prompts: Sequence[Prompt]) -> None:
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ValueError(f"problem {prompt.id!r} is given twice in one call; its trees would be identical")
        seen.add(prompt.id)
        if len(prompt.ids) == 0:
            raise ValueError(f"problem {prompt.id!r} has an empty prompt")
        if len(prompt.ids) + sampler.max_response_tokens > backend.max_context:
            raise ValueError(
                f"problem {prompt.id!r}: prompt of {len(prompt.ids)} tokens + response of at most {sampler.max_response_tokens} "
                f"exceeds the model's context of {backend.max_context} tokens"
            )


class _Place(NamedTuple):
    """Where a segment stands: its seed, which mixes its place in, the response tokens before it, and sampled segments on its path."""

    seed: int
    position: int
    depth: int


@dataclass(eq=False)
class _Growing:
    """One problem's tree in the making."""

    sampler: Sampler
    backend: Backend
    index: int
    prompt: Prompt
    seed: int
    step: int
    progress: float
    builder: TreeBuilder = field(init=False)
    growth: Growth = field(init=False)
    in_flight: dict[int, int] = field(default_factory=dict)  # request -> its (still empty) node
    _request: dict[int, int] = field(default_factory=dict)  # node -> request
    _place: dict[int, _Place] = field(default_factory=dict)  # request -> its place in the tree
    _forks: dict[tuple[int, int], int] = field(default_factory=dict)  # forks made so far below a request at a position
    _unreleased: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.builder = TreeBuilder(self.prompt.ids)
        rng = np.random.default_rng(growth_seed(self.seed, self.step, self.prompt.id))
        self.growth = self.sampler.plant(self.builder, rng, self.progress)
        root = next_request_id()
        self._request[ROOT] = root
        self._place[root] = _Place(root_seed(self.seed, self.step, self.prompt.id), 0, 0)
        self._unreleased.add(root)

    def start(self) -> list[int]:
        requests = self._submit(self.growth.start())
        if not requests:
            raise ValueError(f"problem {self.prompt.id!r}: sampler {self.sampler.name} asks for no segment below the prompt")
        self._settle(ROOT)
        return requests

    def take(self, result: SegmentResult) -> list[int]:
        """Record a finished segment; returns the requests made next."""
        node = self.in_flight.pop(result.id)
        tokens = result.tokens.tolist()
        self.builder.fill(node, tokens, result.logprobs.tolist(), Stop.OPEN)
        self.builder.set_stop(node, self._stop(node, tokens, result.stop == Stop.EOS, self._place[result.id]))
        requests = self._submit(self.growth.grown(node))
        self._settle(node)
        return requests

    def finish(self) -> Tree:
        self.release_all()
        meta = {"problem": self.prompt.id, "sampler": dict(self.growth.report())}
        return self.builder.freeze(meta=meta, level_order=True)

    def release_all(self) -> None:
        self.backend.release(self._unreleased)
        self._unreleased.clear()

    def _settle(self, node: int) -> None:
        requests = [self._request[n] for n in self.growth.settled(node)]
        self._unreleased.difference_update(requests)
        self.backend.release(requests)

    def _stop(self, node: int, segment: list[int], ended: bool, place: _Place) -> Stop:
        rules, decode = self.sampler.stopping, self.backend.tokenizer.decode
        whole = rules.needs_response_text(ended)
        return classify(
            rules,
            ended=ended,
            response_tokens=place.position + len(segment),
            max_response_tokens=self.sampler.max_response_tokens,
            depth=place.depth,
            max_depth=self.sampler.max_depth,
            segment_text=decode(segment) if rules.needs_segment_text else "",
            response_text=decode(self.builder.context(node)[len(self.prompt.ids) :]) if whole else "",
        )

    def _submit(self, extends: Sequence[Extend]) -> list[int]:
        requests: list[SegmentRequest] = []
        for extend in extends:
            requests.extend(self._requests(extend))
        self.backend.submit(requests)
        return [r.id for r in requests]

    def _requests(self, extend: Extend) -> list[SegmentRequest]:
        node, stop = extend.node, self.builder.stop(extend.node)
        context: Int32 = np.asarray(self.builder.context(node), np.int32)
        position = len(context) - len(self.prompt.ids)
        limit = min(extend.max_tokens, self.sampler.max_response_tokens - position)
        origin = self._origin(node)
        above = self._place[origin]
        depth = above.depth + 1  # sampled segments: the parts of one that was cut count once
        if stop != Stop.OPEN or limit < 1 or depth > self.sampler.max_depth or node in self.in_flight.values():
            raise ValueError(
                f"problem {self.prompt.id!r}: sampler {self.sampler.name} extends node {node} (stop {stop.name}, {position} response "
                f"tokens, depth {depth - 1}), which is in flight, ended, or at the limit of length or depth"
            )
        requests = []
        self._unreleased.add(origin)  # once more, if it was settled already
        for _ in range(extend.count):
            ordinal = self._forks.get((origin, position), 0)
            self._forks[origin, position] = ordinal + 1
            child = self.builder.add(node, (), role=extend.role)
            request, seed = next_request_id(), fork_seed(above.seed, position, ordinal)
            self._request[child], self._place[request] = request, _Place(seed, position, depth)
            self.in_flight[request] = child
            self._unreleased.add(request)
            requests.append(SegmentRequest(request, origin, context, limit, seed, self.sampler.sampling))
        return requests

    def _origin(self, node: int) -> int:
        """Request of the segment that `node` is, or that it was cut from: a cut's first child is its lower part."""
        while node not in self._request:
            node = self.builder.children(node)[0]
        return self._request[node]

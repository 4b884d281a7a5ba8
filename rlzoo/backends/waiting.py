"""Requests that wait in the torch engine, grouped by the context they continue, and what is known of every id."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from ..tree import Int32
from .kvcache import Key
from .protocol import SegmentRequest, check_request


@dataclass(slots=True)
class Group:
    """Requests that continue the same context."""

    key: Key
    context: Int32
    waiting: deque[SegmentRequest] = field(default_factory=deque)


@dataclass(slots=True)
class Known:
    """What the engine remembers of an id that is not released."""

    parent: int | None  # None: a prompt
    end: int  # tokens of its path, prompt included
    forwarded: int = 0  # leading tokens that have been through the model at least once


class Waiting:
    """The queue. Groups below a segment (forks) are served before those below a prompt, so that few trees are under way.

    An id is forgotten (`on_forget`) when it is released and nothing waits below it any more.
    """

    def __init__(self, max_context: int, on_forget: Callable[[int, Known | None], None]) -> None:
        self.max_context, self._on_forget = max_context, on_forget
        self.known: dict[int, Known] = {}
        self.released: set[int] = set()  # but still named by waiting requests
        self.queued: dict[int, Key] = {}  # waiting request -> its group
        self._forks: dict[Key, Group] = {}
        self._fresh: dict[Key, Group] = {}
        self._demand: dict[int, int] = {}  # id -> groups that wait below it

    def __iter__(self) -> Iterator[Group]:
        return chain(self._forks.values(), self._fresh.values())

    def fork(self, key: Key) -> Group | None:
        """The group that waits below a segment, if any."""
        return self._forks.get(key)

    def wanted(self, id: int) -> bool:
        """Whether something waits below a segment, at its end or inside."""
        return id in self._demand

    def add(self, request: SegmentRequest) -> None:
        """Queue a request.

        Raises:
            ValueError: see `Backend.submit`; or its context is not that of the siblings it names.
        """
        check_request(request, self.max_context, self.known)
        n = len(request.context)
        above = self.known.get(request.parent) or Known(None, n)
        key, context = (request.parent, n), np.asarray(request.context, np.int32)
        queue = self._fresh if above.parent is None else self._forks
        group = queue.get(key)
        if group is None:
            group = queue[key] = Group(key, context)
            self._demand[request.parent] = self._demand.get(request.parent, 0) + 1
        elif context is not group.context and not np.array_equal(context, group.context):
            raise ValueError(f"request {request.id} names parent {request.parent} but its context is not that of its siblings")
        group.waiting.append(request)
        self.known[request.parent], self.known[request.id] = above, Known(request.parent, n)
        self.queued[request.id] = key

    def put_back(self, request: SegmentRequest) -> None:
        """Let a request that was taken wait again, before its siblings."""
        parent, n = request.parent, len(request.context)
        if parent not in self.known:  # forgotten when its last request was taken
            self.known[parent] = Known(None, n)
            self.released.add(parent)
        key = (parent, n)
        queue = self._fresh if self.known[parent].parent is None else self._forks
        if key not in queue:
            queue[key] = Group(key, np.asarray(request.context, np.int32))
            self._demand[parent] = self._demand.get(parent, 0) + 1
        queue[key].waiting.appendleft(request)
        self.queued[request.id] = key

    def take(self, group: Group) -> SegmentRequest:
        """The group's next request; call `settle` when done with the group."""
        request = group.waiting.popleft()
        del self.queued[request.id]
        return request

    def release(self, id: int) -> None:
        """Forget an id, at once or when the last that waits below it is gone; drop it if it waits itself."""
        if id in self.queued:
            key = self.queued.pop(id)
            group = self._forks[key] if key in self._forks else self._fresh[key]
            group.waiting = deque(r for r in group.waiting if r.id != id)
            self.settle(group)
        if id in self._demand:
            self.released.add(id)
        else:
            self._forget(id)

    def settle(self, group: Group) -> None:
        """Drop a group that nobody waits in any more."""
        if group.waiting:
            return
        self._forks.pop(group.key, None)
        self._fresh.pop(group.key, None)
        parent = group.key[0]
        self._demand[parent] -= 1
        if not self._demand[parent]:
            del self._demand[parent]
            if parent in self.released:
                self._forget(parent)

    def clear(self) -> None:
        for held in (self.known, self.released, self.queued, self._forks, self._fresh, self._demand):
            held.clear()

    def _forget(self, id: int) -> None:
        self.released.discard(id)
        self._on_forget(id, self.known.pop(id, None))

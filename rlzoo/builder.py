"""Grow, split, merge and freeze a tree while it is being sampled."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .tree import ROOT, Role, Stop, Tree, find_leaves


@dataclass(slots=True)
class _Node:
    parent: int
    tokens: list[int]
    logprobs: list[float]
    stop: Stop
    role: Role
    children: list[int]
    alive: bool = True


class TreeBuilder:
    """A growing tree. Node ids stay valid until `freeze`, which renumbers (the old ids are kept in `Tree.created`)."""

    def __init__(self, prompt: Sequence[int]) -> None:
        tokens = [int(t) for t in prompt]
        self._nodes = [_Node(-1, tokens, [float("nan")] * len(tokens), Stop.OPEN, Role.TRAINED, [])]

    def __len__(self) -> int:
        return sum(n.alive for n in self._nodes)

    def add(
        self,
        parent: int,
        tokens: Sequence[int],
        logprobs: Sequence[float] | None = None,
        stop: Stop = Stop.OPEN,
        role: Role = Role.TRAINED,
    ) -> int:
        """Append a segment below `parent` and return its id.

        Raises:
            ValueError: unknown parent, lengths differ, or a trained node below a probe.
        """
        above = self._node(parent)
        values = [float("nan")] * len(tokens) if logprobs is None else [float(x) for x in logprobs]
        if len(values) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens but {len(values)} log-probs")
        if above.role == Role.PROBE and role != Role.PROBE:
            raise ValueError("a trained node cannot hang below a probe")
        self._nodes.append(_Node(parent, [int(t) for t in tokens], values, Stop(stop), Role(role), []))
        node = len(self._nodes) - 1
        above.children.append(node)
        return node

    def split(self, node: int, t: int) -> int:
        """Cut `node` after its first `t` tokens and return the node that ends there, to fork from.

        `node` keeps its id, its end, its stop and its children; the new upper part is OPEN. At t = 0 or t = length nothing
        needs cutting and the parent or the node itself is returned.

        Raises:
            ValueError: t is outside the segment, or the node is the prompt.
        """
        below = self._node(node)
        if node == ROOT or not 0 <= t <= len(below.tokens):
            raise ValueError(f"cannot cut node {node} of {len(below.tokens)} tokens at {t}")
        if t == 0:
            return below.parent
        if t == len(below.tokens):
            return node
        above = self._node(below.parent)
        upper = _Node(below.parent, below.tokens[:t], below.logprobs[:t], Stop.OPEN, below.role, [node])
        self._nodes.append(upper)
        new = len(self._nodes) - 1
        above.children[above.children.index(node)] = new
        below.parent, below.tokens, below.logprobs = new, below.tokens[t:], below.logprobs[t:]
        return new

    def merge_prefixes(self) -> None:
        """Turn siblings that begin alike into a prefix tree; a sampled duplicate stays as an empty leaf."""
        stack = [ROOT]
        while stack:
            node = stack.pop()
            self._merge_children(node)
            stack.extend(self._nodes[node].children)

    def _merge_children(self, node: int) -> None:
        groups: dict[tuple[Role, int], list[int]] = {}
        for child in self._nodes[node].children:
            c = self._nodes[child]
            if c.tokens:
                groups.setdefault((c.role, c.tokens[0]), []).append(child)
        for (role, _), members in groups.items():
            if len(members) < 2:
                continue
            shared = _common_prefix([self._nodes[m].tokens for m in members])
            upper = self.add(node, self._nodes[members[0]].tokens[:shared], self._nodes[members[0]].logprobs[:shared], role=role)
            for m in members:
                self._move_below(m, upper, shared)

    def _move_below(self, node: int, upper: int, shared: int) -> None:
        n = self._nodes[node]
        self._nodes[n.parent].children.remove(node)
        n.parent, n.tokens, n.logprobs = upper, n.tokens[shared:], n.logprobs[shared:]
        if n.tokens or not n.children:
            self._nodes[upper].children.append(node)
            return
        n.alive = False  # an inner node left without tokens says nothing: its children move up
        for child in n.children:
            self._nodes[child].parent = upper
        self._nodes[upper].children.extend(n.children)

    def fill(self, node: int, tokens: Sequence[int], logprobs: Sequence[float], stop: Stop) -> None:
        """Give an empty leaf, added while its segment was still being sampled, its tokens, log-probs and stop reason.

        Raises:
            ValueError: the node is the prompt, has tokens or children already, or lengths differ.
        """
        n = self._node(node)
        if node == ROOT or n.tokens or n.children:
            raise ValueError(f"node {node} is not an empty leaf")
        if len(tokens) != len(logprobs):
            raise ValueError(f"{len(tokens)} tokens but {len(logprobs)} log-probs")
        n.tokens, n.logprobs, n.stop = [int(t) for t in tokens], [float(x) for x in logprobs], Stop(stop)

    def set_stop(self, node: int, stop: Stop) -> None:
        self._node(node).stop = Stop(stop)

    def stop(self, node: int) -> Stop:
        return self._node(node).stop

    def parent(self, node: int) -> int:
        return self._node(node).parent

    def children(self, node: int) -> list[int]:
        return list(self._node(node).children)

    def tokens(self, node: int) -> list[int]:
        return self._node(node).tokens

    def logprobs(self, node: int) -> list[float]:
        return self._node(node).logprobs

    def path(self, node: int) -> list[int]:
        """Nodes from the first segment down to `node`; the prompt is left out."""
        path = []
        while node != ROOT:
            path.append(node)
            node = self._node(node).parent
        return path[::-1]

    def context(self, node: int) -> list[int]:
        """Token ids from the prompt's first to the end of `node`."""
        ids = list(self._nodes[ROOT].tokens)
        for n in self.path(node):
            ids.extend(self._nodes[n].tokens)
        return ids

    def freeze(self, *, meta: Mapping[str, Any] | None = None, level_order: bool = False) -> Tree:
        """The tree, numbered so that parents precede children and otherwise in order of creation.

        With `level_order` numbers and order of creation are those of a breadth-first walk, children in the order of
        `children`: the same tree whatever the order in which its parts arrived.
        """
        order = self._level_order() if level_order else self._creation_order()
        number = {old: new for new, old in enumerate(order)}
        nodes = [self._nodes[old] for old in order]
        parent = np.array([-1, *(number[n.parent] for n in nodes[1:])], np.int32)
        role = np.array([n.role for n in nodes], np.uint8)
        created = np.arange(len(order), dtype=np.int32) if level_order else np.array(order, np.int32)
        leaves = find_leaves(parent, role, created)
        return Tree(
            parent=parent,
            offsets=np.concatenate([[0], np.cumsum([len(n.tokens) for n in nodes])]).astype(np.int64),
            tokens=np.array([t for n in nodes for t in n.tokens], np.int32),
            logprobs=np.array([x for n in nodes for x in n.logprobs], np.float32),
            stop=np.array([n.stop for n in nodes], np.uint8),
            role=role,
            created=created,
            leaves=leaves,
            reward=np.full(len(leaves), np.nan),
            correct=np.full(len(leaves), np.nan),
            meta=dict(meta or {}),
        )

    def _creation_order(self) -> list[int]:
        order: list[int] = []
        heap = [ROOT]
        while heap:
            node = heapq.heappop(heap)
            order.append(node)
            for child in self._nodes[node].children:
                heapq.heappush(heap, child)
        return order

    def _level_order(self) -> list[int]:
        order = [ROOT]
        for node in order:  # grows while it is walked
            order.extend(self._nodes[node].children)
        return order

    def _node(self, node: int) -> _Node:
        if not 0 <= node < len(self._nodes) or not self._nodes[node].alive:
            raise ValueError(f"no node {node} in this tree")
        return self._nodes[node]


def _common_prefix(lists: Sequence[Sequence[int]]) -> int:
    shortest = min(len(x) for x in lists)
    for i in range(shortest):
        if any(x[i] != lists[0][i] for x in lists):
            return i
    return shortest

"""The one data type of the program: a tree of token segments sampled from one prompt.

A group of G independent chains is a tree of depth one. Node 0 is the prompt; every other node is one sampled segment.
All per-node and per-token data are flat numpy arrays, so that a tree is cheap to send, store and pack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

ROOT = 0


class Stop(IntEnum):
    """Why a segment ended."""

    OPEN = 0  # segment limit; may be extended
    EOS = 1
    ANSWER = 2  # a complete boxed answer, and ended
    REPETITION = 3
    LENGTH = 4  # response limit
    DEPTH = 5  # depth limit
    PRUNED = 6


class Role(IntEnum):
    """What a node is for. Probes count in cost, never in reward, length or Pass@1."""

    TRAINED = 0
    PROBE = 1


@dataclass(frozen=True, slots=True)
class Segment:
    """A sampled segment below `parent` (a node id, smaller than the segment's own)."""

    parent: int
    tokens: Sequence[int]
    logprobs: Sequence[float] | None = None
    stop: Stop = Stop.OPEN
    role: Role = Role.TRAINED


@dataclass(frozen=True, eq=False)
class Tree:
    """A frozen tree.

    Shapes: `parent`, `stop`, `role`, `created` [nodes]; `offsets` [nodes + 1] into `tokens`, `logprobs` and the optional
    per-token arrays [tokens]; `leaves` [leaves] node ids in creation order; `reward`, `correct` [leaves].
    Log-probs are those of the distribution actually sampled; they are NaN for the prompt and where unknown.
    `reward` is what credit sees (after shaping); `correct` is 1 right, 0 wrong. NaN in either: the grader itself failed.

    Raises:
        ValueError: the arrays do not describe a tree.
    """

    parent: Int32
    offsets: Int64
    tokens: Int32
    logprobs: Float32
    stop: UInt8
    role: UInt8
    created: Int32
    leaves: Int32
    reward: Float64
    correct: Float64
    ref_logprobs: Float32 | None = None
    entropy: Float32 | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check(self)
        for name in ("parent", "offsets", "tokens", "logprobs", "stop", "role", "created", "leaves", "reward", "correct"):
            getattr(self, name).setflags(write=False)

    @classmethod
    def from_segments(
        cls,
        prompt: Sequence[int],
        segments: Sequence[Segment],
        rewards: Mapping[int, float] | None = None,
        *,
        meta: Mapping[str, Any] | None = None,
    ) -> Tree:
        """Build a tree; segment i becomes node i + 1. Never merges or reorders.

        `rewards` maps leaf nodes to rewards; leaves left out are ungraded (NaN). `correct` becomes reward > 0.

        Raises:
            ValueError: a parent is not smaller than its child, a reward names a node that is no leaf, lengths differ.
        """
        parts = [np.asarray(prompt, np.int32), *(np.asarray(s.tokens, np.int32) for s in segments)]
        logprobs = [np.full(len(parts[0]), np.nan, np.float32)]
        for i, s in enumerate(segments, 1):
            values = np.full(len(parts[i]), np.nan, np.float32) if s.logprobs is None else np.asarray(s.logprobs, np.float32)
            if len(values) != len(parts[i]):
                raise ValueError(f"node {i}: {len(parts[i])} tokens but {len(values)} log-probs")
            logprobs.append(values)
        nodes = len(parts)
        parent = np.array([-1, *(s.parent for s in segments)], np.int32)
        role = np.array([Role.TRAINED, *(s.role for s in segments)], np.uint8)
        leaves = find_leaves(parent, role, np.arange(nodes, dtype=np.int32))
        tree = cls(
            parent=parent,
            offsets=np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64),
            tokens=np.concatenate(parts),
            logprobs=np.concatenate(logprobs),
            stop=np.array([Stop.OPEN, *(s.stop for s in segments)], np.uint8),
            role=role,
            created=np.arange(nodes, dtype=np.int32),
            leaves=leaves,
            reward=np.full(len(leaves), np.nan),
            correct=np.full(len(leaves), np.nan),
            meta=dict(meta or {}),
        )
        return tree if rewards is None else tree.with_rewards(rewards)

    def with_rewards(self, rewards: Mapping[int, float], correct: Mapping[int, float] | None = None) -> Tree:
        """A copy with leaf rewards (and right/wrong, by default reward > 0). Leaves left out become NaN.

        Raises:
            ValueError: a key is not a leaf.
        """
        known = {int(leaf) for leaf in self.leaves}
        for key in [*rewards, *(correct or {})]:
            if key not in known:
                raise ValueError(f"reward for node {key}, which is not a leaf (leaves: {sorted(known)})")
        reward = np.array([rewards.get(int(leaf), np.nan) for leaf in self.leaves], np.float64)
        if correct is None:
            right = np.where(np.isnan(reward), np.nan, (reward > 0).astype(np.float64))
        else:
            right = np.array([correct.get(int(leaf), np.nan) for leaf in self.leaves], np.float64)
        return replace(self, reward=reward, correct=right)

    @property
    def nodes(self) -> int:
        return len(self.parent)

    @cached_property
    def lengths(self) -> Int64:
        """Tokens per node, int64 [nodes]."""
        return np.diff(self.offsets)

    @cached_property
    def _children(self) -> list[list[int]]:
        below: list[list[int]] = [[] for _ in range(self.nodes)]
        for node in sorted(range(1, self.nodes), key=lambda n: int(self.created[n])):
            below[int(self.parent[node])].append(node)
        return below

    def children(self, node: int, *, probes: bool = False) -> list[int]:
        """Child nodes in creation order; probes only on request."""
        return [c for c in self._children[node] if probes or self.role[c] == Role.TRAINED]

    @cached_property
    def depth(self) -> Int32:
        """Nodes between a node and the prompt, int32 [nodes]; the prompt has depth 0."""
        depth = np.zeros(self.nodes, np.int32)
        for node in range(1, self.nodes):
            depth[node] = depth[self.parent[node]] + 1
        return depth

    @cached_property
    def starts(self) -> Int64:
        """Position in the sequence (prompt included) of each node's first token, int64 [nodes]."""
        starts = np.zeros(self.nodes, np.int64)
        for node in range(1, self.nodes):
            starts[node] = starts[self.parent[node]] + self.lengths[self.parent[node]]
        return starts

    @cached_property
    def intervals(self) -> tuple[Int32, Int32]:
        """Enter and exit order of a depth-first walk, int32 [nodes] each: a is an ancestor-or-self of b iff
        enter[a] <= enter[b] and exit[b] <= exit[a]."""
        enter, leave = np.zeros(self.nodes, np.int32), np.zeros(self.nodes, np.int32)
        clock, stack = 0, [(ROOT, False)]
        while stack:
            node, done = stack.pop()
            if done:
                leave[node] = clock
                continue
            enter[node] = clock
            clock += 1
            stack.append((node, True))
            stack.extend((c, False) for c in reversed(self._children[node]))
        return enter, leave

    def path(self, node: int) -> list[int]:
        """Nodes from the first segment down to `node`; the prompt is left out."""
        path = []
        while node != ROOT:
            path.append(node)
            node = int(self.parent[node])
        return path[::-1]

    def node_tokens(self, node: int) -> Int32:
        return self.tokens[int(self.offsets[node]) : int(self.offsets[node + 1])]

    def node_logprobs(self, node: int) -> Float32:
        return self.logprobs[int(self.offsets[node]) : int(self.offsets[node + 1])]

    @property
    def prompt(self) -> Int32:
        return self.node_tokens(ROOT)

    def path_tokens(self, node: int) -> Int32:
        """Response tokens from the prompt's end to the end of `node`, int32."""
        return np.concatenate([np.empty(0, np.int32), *(self.node_tokens(n) for n in self.path(node))])

    def leaves_below(self, node: int) -> Int32:
        """Leaf nodes at or below `node`, in creation order."""
        enter, leave = self.intervals
        below = (enter[self.leaves] >= enter[node]) & (leave[self.leaves] <= leave[node])
        kept: Int32 = self.leaves[below]
        return kept

    def response_lengths(self) -> Int64:
        """Response tokens of each leaf's path, int64 [leaves]."""
        lengths: Int64 = self.starts[self.leaves] + self.lengths[self.leaves] - self.lengths[ROOT]
        return lengths

    @property
    def sampled_tokens(self) -> int:
        """Tokens sampled, each counted once, probes included (they cost)."""
        return int(len(self.tokens) - self.lengths[ROOT])

    @property
    def unrolled_tokens(self) -> int:
        """Response tokens counted once per leaf: what independent chains would have cost."""
        return int(self.response_lengths().sum())


def find_leaves(parent: Int32, role: UInt8, created: Int32) -> Int32:
    """Trained nodes without trained children, in creation order; the bare prompt is none."""
    trained = role == Role.TRAINED
    inner = np.zeros(len(parent), bool)
    children = np.arange(1, len(parent))
    inner[parent[children[trained[1:]]]] = True
    leaves = np.flatnonzero(trained & ~inner)
    leaves = leaves[leaves != ROOT]
    ordered: Int32 = leaves[np.argsort(created[leaves], kind="stable")].astype(np.int32)
    return ordered


def _check(tree: Tree) -> None:
    nodes, tokens, leaves = len(tree.parent), len(tree.tokens), len(tree.leaves)
    if nodes == 0 or tree.parent[ROOT] != -1:
        raise ValueError("node 0 must be the prompt, with parent -1")
    below = tree.parent[1:]
    if nodes > 1 and not ((below >= 0) & (below < np.arange(1, nodes))).all():
        bad = 1 + int(np.flatnonzero(~((below >= 0) & (below < np.arange(1, nodes))))[0])
        raise ValueError(f"node {bad} has parent {int(tree.parent[bad])}; a parent must be an earlier node")
    if len(tree.offsets) != nodes + 1 or tree.offsets[0] != 0 or tree.offsets[-1] != tokens or (np.diff(tree.offsets) < 0).any():
        raise ValueError("offsets must rise from 0 to the number of tokens, one step per node")
    per_token = {"logprobs": tree.logprobs, "ref_logprobs": tree.ref_logprobs, "entropy": tree.entropy}
    for name, array in per_token.items():
        if array is not None and len(array) != tokens:
            raise ValueError(f"{name} has {len(array)} values for {tokens} tokens")
    for name in ("stop", "role", "created"):
        if len(getattr(tree, name)) != nodes:
            raise ValueError(f"{name} has {len(getattr(tree, name))} values for {nodes} nodes")
    if len(np.unique(tree.created)) != nodes:
        raise ValueError("created must name each node once")
    if tokens and int(tree.tokens.min()) < 0:
        raise ValueError("token ids must not be negative")
    if not np.isin(tree.stop, [int(s) for s in Stop]).all() or not np.isin(tree.role, [int(r) for r in Role]).all():
        raise ValueError("unknown stop reason or role")
    if nodes > 1 and ((tree.role[below] == Role.PROBE) & (tree.role[1:] != Role.PROBE)).any():
        raise ValueError("a trained node cannot hang below a probe")
    if not np.array_equal(tree.leaves, find_leaves(tree.parent, tree.role, tree.created)):
        raise ValueError("leaves must be the trained nodes without trained children, in creation order")
    if len(tree.reward) != leaves or len(tree.correct) != leaves:
        raise ValueError(f"{leaves} leaves but {len(tree.reward)} rewards and {len(tree.correct)} verdicts")

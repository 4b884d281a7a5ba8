"""From a tree and its trained tokens to what a model must run: each needed token once, or one row per path."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..tree import ROOT, Float64, Int64, Tree

Bool = NDArray[np.bool_]
Layout = Literal["packed", "unrolled"]


@dataclass(frozen=True, eq=False)
class Row:
    """A part of one tree: nodes closed under ancestors, depth first. Per forwarded token [length]: `token` (index into the
    tree's tokens) and `position` in its path. Per trained token [trained]: `target` (index into the tree's tokens), `source`
    (index into the row of the token whose logits predict it) and `share` of its weight trained here (the shares of a token
    sum to 1 over rows). `spans`: the row's tokens as queries, path by path, each token in one span."""

    token: Int64
    position: Int64
    target: Int64
    source: Int64
    share: Float64
    spans: list[Span]

    @property
    def length(self) -> int:
        return len(self.token)


@dataclass(frozen=True, eq=False)
class Span:
    """Tokens [start, start + size) of a row, consecutive on one path, and `path`: the row's indices of that path's tokens
    from the prompt's first to the span's last."""

    start: int
    size: int
    path: Int64


@dataclass(frozen=True, eq=False)
class _Plan:
    """What of a tree must be forwarded. `order`: needed nodes, depth first. Per node: `keep` (leading tokens to forward:
    what comes after the last prediction is left out), `first` and `last` tip below. Per tip (a needed node with none below
    it, depth first): `tips` (its node), `reach` (forwarded tokens on its path) and `own` (those not on the path of the tip
    before). Per token: `predecessor`, the index of the token before it on its path."""

    order: Int64
    keep: Int64
    first: Int64
    last: Int64
    tips: Int64
    reach: Int64
    own: Int64
    predecessor: Int64


def make_rows(tree: Tree, trained: Bool, *, layout: Layout = "packed", max_length: int | None = None) -> list[Row]:
    """Rows that together train the tokens of `trained` (bool [tokens]).

    "packed": the whole tree in one row, each token once; a tree of more than `max_length` tokens is cut between tips into
    several rows, each repeating the prefix it needs; every trained token is trained in the first row that holds it.
    "unrolled": one row per tip, an equal share of each token trained in every row that holds it.

    Raises:
        ValueError: a trained token in the prompt, or a tree with an empty prompt.
    """
    if not trained.any():
        return []
    plan = _plan(tree, trained)
    cuts = list(range(len(plan.tips) + 1)) if layout == "unrolled" else _cut(plan, max_length)
    return [_row(tree, plan, trained, a, b, layout) for a, b in pairwise(cuts)]


def _plan(tree: Tree, trained: Bool) -> _Plan:
    if tree.lengths[ROOT] == 0:
        raise ValueError("a tree with an empty prompt cannot be trained: nothing predicts its first token")
    if trained[: tree.lengths[ROOT]].any():
        raise ValueError("a token of the prompt cannot be trained")
    needed, keep = np.zeros(tree.nodes, bool), np.zeros(tree.nodes, np.int64)
    inner = np.zeros(tree.nodes, bool)  # has a needed child
    for node in range(tree.nodes - 1, -1, -1):
        own = np.flatnonzero(trained[tree.offsets[node] : tree.offsets[node + 1]])
        needed[node] = inner[node] or len(own) > 0
        keep[node] = tree.lengths[node] if inner[node] else (own[-1] if len(own) else 0)
        if needed[node] and node != ROOT:
            inner[tree.parent[node]] = True
    enter, _ = tree.intervals
    order = np.flatnonzero(needed)
    order = order[np.argsort(enter[order])]
    tips = order[~inner[order]]
    first, last = np.full(tree.nodes, -1, np.int64), np.full(tree.nodes, -1, np.int64)
    own_tokens = np.zeros(len(tips), np.int64)
    for i, tip in enumerate(tips):
        node = int(tip)
        while node >= 0 and first[node] < 0:
            first[node] = i
            own_tokens[i] += keep[node]
            node = int(tree.parent[node])
    last[tips] = np.arange(len(tips))
    for node in range(tree.nodes - 1, 0, -1):
        last[tree.parent[node]] = max(last[tree.parent[node]], last[node])
    return _Plan(order, keep, first, last, tips, tree.starts[tips] + keep[tips], own_tokens, _predecessors(tree))


def _predecessors(tree: Tree) -> Int64:
    """Index of the token before each on its path, int64 [tokens]; -1 for the prompt's first. A segment's first token follows
    the last token above it, which need not be the one before it in storage, nor in the parent (empty segments)."""
    last_above = np.zeros(tree.nodes, np.int64)
    for node in range(tree.nodes):
        last_above[node] = last_above[tree.parent[node]] if tree.lengths[node] == 0 else tree.offsets[node + 1] - 1
    predecessor = np.arange(-1, len(tree.tokens) - 1)
    filled = 1 + np.flatnonzero(tree.lengths[1:] > 0)
    predecessor[tree.offsets[filled]] = last_above[tree.parent[filled]]
    return predecessor


def _cut(plan: _Plan, max_length: int | None) -> list[int]:
    """Where to cut the sequence of tips: as late as `max_length` allows."""
    cuts, length = [0], 0
    for tip in range(len(plan.tips)):
        length += int(plan.own[tip] if tip > cuts[-1] else plan.reach[tip])
        if max_length is not None and length > max_length and tip > cuts[-1]:
            cuts.append(tip)
            length = int(plan.reach[tip])
    return [*cuts, len(plan.tips)]


def _row(tree: Tree, plan: _Plan, trained: Bool, a: int, b: int, layout: Layout) -> Row:
    """The row of tips [a, b)."""
    nodes = plan.order[(plan.first[plan.order] < b) & (plan.last[plan.order] >= a)]
    keep = plan.keep[nodes]
    within = _ranges(keep)
    token = np.repeat(tree.offsets[nodes], keep) + within
    slot = np.full(len(tree.tokens) + 1, -1, np.int64)
    slot[token] = np.arange(len(token))
    here = nodes if layout == "unrolled" else nodes[plan.first[nodes] >= a]  # the first row that holds a node trains it
    lengths = tree.lengths[here]
    candidates = np.repeat(tree.offsets[here], lengths) + _ranges(lengths)
    shared = np.repeat(plan.last[here] - plan.first[here] + 1, lengths) if layout == "unrolled" else np.ones(len(candidates))
    chosen = trained[candidates]
    target = candidates[chosen]
    return Row(
        token=token,
        position=np.repeat(tree.starts[nodes], keep) + within,
        target=target,
        source=slot[plan.predecessor[target]],
        share=1.0 / shared[chosen],
        spans=[] if layout == "unrolled" else _spans(tree, plan, slot, a, b),
    )


def _spans(tree: Tree, plan: _Plan, slot: Int64, a: int, b: int) -> list[Span]:
    """One span per tip that adds tokens: those not on the path of the tip before, a run of slots at the end of its path."""
    spans = []
    for tip in range(a, b):
        size = int(plan.reach[tip] if tip == a else plan.own[tip])
        if size == 0:
            continue
        nodes = np.array([ROOT, *tree.path(int(plan.tips[tip]))])
        path = slot[np.repeat(tree.offsets[nodes], plan.keep[nodes]) + _ranges(plan.keep[nodes])]
        spans.append(Span(int(path[-size]), size, path))
    return spans


def _ranges(lengths: Int64) -> Int64:
    """0..n-1 for each n of `lengths`, one after another."""
    return np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)

"""Trees made into packs: batches that a model can run, under a token budget. The maths is in docs/packing.md.

"packed": the needed tokens of several trees stand one after another in a single sequence, each once and without padding;
only attention goes back to paths (`Attention`). "unrolled": one padded row per path, as without packing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from ..tree import Float64, Int64, Tree
from .rows import Layout, Row, Span, make_rows

Bool = NDArray[np.bool_]

QUERY_BLOCK = 256  # longer spans are cut: a block's dense mask is then less than half empty on long paths
PAIR_COST = 1 / 800  # one (query, key) pair against one token's linear work; measured with benchmarks/perf/update.py
GROUP_COST = 16.0  # one more attention call per layer, in tokens
PACK_COST = 32.0  # one more forward and backward, in tokens


@dataclass(frozen=True, eq=False)
class Group:
    """Attention rows of similar size, computed in one call: `queries` and `keys` int64 [rows, q] and [rows, k], slots of the
    pack (0 in padding); query j of row r sees the keys 0..offset[r] + j of its row."""

    queries: Int64
    keys: Int64
    offset: Int64


@dataclass(frozen=True, eq=False)
class Attention:
    """How the slots of a packed sequence attend. `place` int64 [slots]: where the groups' outputs, flattened and joined, hold
    each slot's."""

    groups: list[Group]
    place: Int64


@dataclass(frozen=True, eq=False)
class Pack:
    """What one forward pass takes, int64. [rows, length]: `ids` (0 in padding, which stands last), `positions`. [trained]:
    `source` (index into the flattened rows of the token whose logits predict), `target` (index into the concatenated tokens
    of all trees packed), `target_ids`, `share` (float64). `attention`: None for plain causal rows."""

    ids: Int64
    positions: Int64
    source: Int64
    target: Int64
    target_ids: Int64
    share: Float64
    attention: Attention | None


@dataclass(frozen=True)
class PackStats:
    """What packing did. Tokens: `trained`, `unique` (distinct tokens that had to be forwarded), `forwarded` (non-padding,
    repeats included), `padded` (padding slots), `unrolled` (what one row per path would forward). Pairs of (query, key):
    `visible_pairs` that attention must cover, `dense_pairs` that its calls span."""

    trees: int = 0
    rows: int = 0
    packs: int = 0
    trained: int = 0
    unique: int = 0
    forwarded: int = 0
    padded: int = 0
    unrolled: int = 0
    visible_pairs: int = 0
    dense_pairs: int = 0

    def __add__(self, other: PackStats) -> PackStats:
        return PackStats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def pack(trees: Sequence[Tree], trained: Sequence[Bool], token_budget: int, *, layout: Layout = "packed") -> tuple[list[Pack], PackStats]:
    """Packs that together train the tokens of `trained` (bool [tokens] per tree), of at most `token_budget` slots each,
    except for a single path that is longer. Trees and nodes without a trained token at or below them are not forwarded.
    The result depends on the arguments only.

    Raises:
        ValueError: token_budget below 1, a trained prompt token, or an empty prompt.
    """
    if token_budget < 1:
        raise ValueError(f"token_budget is {token_budget}; it must be at least 1")
    base = np.concatenate([[0], np.cumsum([len(t.tokens) for t in trees])]).astype(np.int64)
    rows: list[tuple[int, Row]] = []
    stats = PackStats()
    for i, (tree, mask) in enumerate(zip(trees, trained, strict=True)):
        made = make_rows(tree, mask, layout=layout, max_length=token_budget)
        rows.extend((i, row) for row in made)
        stats += _tree_stats(mask, made, layout)
    packs = []
    if layout == "unrolled":
        rows.sort(key=lambda item: -item[1].length)  # stable: equal lengths stay in tree order
    for a, b in _batches([row.length for _, row in rows], token_budget, layout):
        packs.append(_pad(rows[a:b], trees, base) if layout == "unrolled" else _join(rows[a:b], trees, base))
    return packs, stats + PackStats(
        packs=len(packs), padded=sum(p.ids.size for p in packs) - stats.forwarded, dense_pairs=sum(_dense_pairs(p) for p in packs)
    )


def _batches(lengths: Sequence[int], token_budget: int, layout: Layout) -> list[tuple[int, int]]:
    """Runs of rows that make one pack each."""
    sizes = np.asarray(lengths, np.int64)
    if layout == "unrolled":

        def cost(start: int, ends: Int64) -> Float64:
            count = ends - start
            padded = count * sizes[start]  # sorted: the first is the longest
            value = padded * (1 + sizes[start] * PAIR_COST / 2) + PACK_COST
            return np.where((padded <= token_budget) | (count == 1), value, np.inf)

        return _cheapest_runs(len(sizes), cost, max(1, token_budget // max(1, int(sizes.min(initial=token_budget)))))
    runs, start, total = [], 0, 0
    for i, size in enumerate(lengths):
        if i > start and total + size > token_budget:
            runs.append((start, i))
            start, total = i, 0
        total += size
    return [*runs, (start, len(lengths))] if len(lengths) else []


def _cheapest_runs(n: int, cost: Callable[[int, Int64], Float64], longest: int) -> list[tuple[int, int]]:
    """Cut 0..n into runs of at most `longest` at the least total `cost(start, ends[m]) -> [m]`: a shortest path."""
    best, back = np.full(n + 1, np.inf), np.zeros(n + 1, np.int64)
    best[0] = 0
    for start in range(n):
        ends = np.arange(start + 1, min(n, start + longest) + 1)
        candidate = best[start] + cost(start, ends)
        better = candidate < best[ends]
        best[ends[better]] = candidate[better]
        back[ends[better]] = start
    runs, end = [], n
    while end > 0:
        runs.append((int(back[end]), end))
        end = int(back[end])
    return runs[::-1]


def _pad(rows: Sequence[tuple[int, Row]], trees: Sequence[Tree], base: Int64) -> Pack:
    """Paths side by side, padded behind, where causal attention does not see it."""
    length = max(row.length for _, row in rows)
    ids = np.zeros((len(rows), length), np.int64)
    for b, (i, row) in enumerate(rows):
        ids[b, : row.length] = trees[i].tokens[row.token]
    positions = np.broadcast_to(np.arange(length), ids.shape).copy()
    return _finish(rows, trees, base, ids, positions, [b * length for b in range(len(rows))], None)


def _join(rows: Sequence[tuple[int, Row]], trees: Sequence[Tree], base: Int64) -> Pack:
    """Rows one after another in a single sequence."""
    starts = np.concatenate([[0], np.cumsum([row.length for _, row in rows])]).astype(np.int64)
    ids = np.concatenate([trees[i].tokens[row.token] for i, row in rows]).astype(np.int64)
    positions = np.concatenate([row.position for _, row in rows])
    attention = make_attention([_moved(s, int(start)) for (_, row), start in zip(rows, starts, strict=False) for s in row.spans])
    return _finish(rows, trees, base, ids[None], positions[None], starts[:-1].tolist(), attention)


def _finish(
    rows: Sequence[tuple[int, Row]],
    trees: Sequence[Tree],
    base: Int64,
    ids: Int64,
    positions: Int64,
    starts: Sequence[int],
    attention: Attention | None,
) -> Pack:
    return Pack(
        ids=ids,
        positions=positions,
        source=np.concatenate([start + row.source for start, (_, row) in zip(starts, rows, strict=True)]),
        target=np.concatenate([base[i] + row.target for i, row in rows]),
        target_ids=np.concatenate([trees[i].tokens[row.target] for i, row in rows]).astype(np.int64),
        share=np.concatenate([row.share for _, row in rows]),
        attention=attention,
    )


def _moved(span: Span, by: int) -> Span:
    return Span(span.start + by, span.size, span.path + by)


def make_attention(spans: Sequence[Span]) -> Attention:
    """Groups that compute every span's queries, at the least cost of padded pairs and of calls."""
    blocks = [block for span in spans for block in _blocks(span)]
    blocks.sort(key=lambda s: (-s.size, -len(s.path)))
    sizes, reaches = np.array([s.size for s in blocks]), np.array([len(s.path) for s in blocks])

    def cost(start: int, ends: Int64) -> Float64:
        keys = np.maximum.accumulate(reaches[start : ends[-1]])
        return np.asarray((ends - start) * sizes[start] * keys * PAIR_COST + GROUP_COST, np.float64)

    groups, slots = [], []
    for a, b in _cheapest_runs(len(blocks), cost, len(blocks)):
        queries = np.zeros((b - a, sizes[a]), np.int64)
        keys = np.zeros((b - a, reaches[a:b].max()), np.int64)
        written = np.full(queries.shape, -1, np.int64)
        for r, block in enumerate(blocks[a:b]):
            written[r, : block.size] = queries[r, : block.size] = np.arange(block.start, block.start + block.size)
            keys[r, : len(block.path)] = block.path
        groups.append(Group(queries, keys, reaches[a:b] - sizes[a:b]))
        slots.append(written.ravel())
    written = np.concatenate(slots)
    place = np.full(int(written.max()) + 1, -1, np.int64)
    place[written[written >= 0]] = np.flatnonzero(written >= 0)
    return Attention(groups, place)


def _blocks(span: Span) -> list[Span]:
    """A span in pieces of at most QUERY_BLOCK queries, each with the keys it can see."""
    above = len(span.path) - span.size
    pieces = range(0, span.size, QUERY_BLOCK)
    return [Span(span.start + i, min(QUERY_BLOCK, span.size - i), span.path[: above + min(i + QUERY_BLOCK, span.size)]) for i in pieces]


def _dense_pairs(p: Pack) -> int:
    if p.attention is None:
        return int(p.ids.size * p.ids.shape[1])
    return sum(int(g.queries.size * g.keys.shape[1]) for g in p.attention.groups)


def _tree_stats(mask: Bool, rows: list[Row], layout: Layout) -> PackStats:
    if not rows:
        return PackStats()
    return PackStats(
        trees=1,
        rows=len(rows),
        trained=int(mask.sum()),
        unique=len(np.unique(np.concatenate([r.token for r in rows]))),
        forwarded=sum(r.length for r in rows),
        unrolled=sum(r.length if layout == "unrolled" else sum(len(s.path) for s in r.spans) for r in rows),
        visible_pairs=sum(int((r.position + 1).sum()) for r in rows),
    )

"""From the credit of a mini-batch to one weight triple per unique token, with denominators over the whole mini-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..credit.base import Credit
from ..tree import Float64, Int64, Tree
from .policy import Aggregation

Bool = NDArray[np.bool_]
Floats = NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class TokenWeights:
    """One tree's sums over the rows that hold a token, float64 [tokens of the tree] each: `a_pos` = Σ w·max(A, 0),
    `a_neg` = Σ w·min(A, 0), `weight` = Σ w. A token is trained iff its weight is above 0."""

    a_pos: Float64
    a_neg: Float64
    weight: Float64

    def scaled(self, factor: Float64) -> TokenWeights:
        """Each token's sums times `factor` [tokens]: what every row that holds the token shares."""
        return TokenWeights(self.a_pos * factor, self.a_neg * factor, self.weight * factor)


@dataclass(frozen=True)
class Counts:
    """The denominators of a mini-batch: rows with at least one counted token, (row, token) terms, and the terms dropped
    because their old log-prob is not finite."""

    rows: int
    terms: int
    dropped: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(self.rows + other.rows, self.terms + other.terms, self.dropped + other.dropped)


@dataclass(frozen=True, eq=False)
class Terms:
    """Terms written out per token, all [terms]: token (index into the tree), row, advantage; `tokens_of_row` [rows]."""

    token: Int64
    row: Int64
    advantage: Float64
    tokens_of_row: Int64
    dropped: int


def count_terms(trees: Sequence[Tree], credits: Sequence[Credit], old_logprobs: Sequence[Floats] | None = None) -> Counts:
    """The denominators of these trees. `old_logprobs` ([tokens] per tree) default to the sampler's."""
    total = Counts(0, 0)
    for terms in write_out(trees, credits, old_logprobs):
        total += _count(terms)
    return total


def aggregate(
    trees: Sequence[Tree],
    credits: Sequence[Credit],
    aggregation: Aggregation,
    *,
    constant_tokens: int | None = None,
    old_logprobs: Sequence[Floats] | None = None,
    counts: Counts | None = None,
) -> tuple[list[TokenWeights], Counts]:
    """The weights of every unique token. One (row, token) term weighs

        token_mean     row_weight / terms
        sequence_mean  row_weight / (rows · counted tokens of the row)
        constant       row_weight / (rows · constant_tokens)

    where rows and terms are counted over all `trees`, unweighted (a row weight of 0 or 2 changes what a row adds, not what
    the sum is divided by), after `token_mask`. A term whose old log-prob is NaN or infinite is dropped from loss and
    denominator and counted in `Counts.dropped`: without it there is no ratio, and any stand-in would train on a guess.
    `counts` overrides the denominators, for batches of which `trees` is only a part.

    Raises:
        ValueError: a credit does not fit its tree.
    """
    written = write_out(trees, credits, old_logprobs)
    if counts is None:
        counts = Counts(0, 0)
        for terms in written:
            counts += _count(terms)
    weights = []
    for tree, credit, terms in zip(trees, credits, written, strict=True):
        per_term = credit.row_weight[terms.row] / _denominators(terms, aggregation, constant_tokens, counts)
        size = len(tree.tokens)
        weights.append(
            TokenWeights(
                a_pos=_sum(terms.token, per_term * np.maximum(terms.advantage, 0), size),
                a_neg=_sum(terms.token, per_term * np.minimum(terms.advantage, 0), size),
                weight=_sum(terms.token, per_term, size),
            )
        )
    return weights, counts


def _sum(token: Int64, values: Float64, size: int) -> Float64:
    return np.bincount(token, values, size).astype(np.float64)


def _denominators(terms: Terms, aggregation: Aggregation, constant_tokens: int | None, counts: Counts) -> Float64:
    if aggregation == "token_mean":
        return np.full(len(terms.token), float(counts.terms))
    if aggregation == "sequence_mean":
        return counts.rows * terms.tokens_of_row[terms.row].astype(np.float64)
    if constant_tokens is None or constant_tokens < 1:
        raise ValueError(f"aggregation 'constant' needs constant_tokens, a whole number of at least 1, not {constant_tokens}")
    return np.full(len(terms.token), float(counts.rows * constant_tokens))


def _count(terms: Terms) -> Counts:
    return Counts(int((terms.tokens_of_row > 0).sum()), len(terms.token), terms.dropped)


def write_out(trees: Sequence[Tree], credits: Sequence[Credit], old_logprobs: Sequence[Floats] | None) -> list[Terms]:
    """Every (row, token) term of each tree, without those whose old log-prob (the sampler's by default) is not finite.

    Raises:
        ValueError: a credit does not fit its tree.
    """
    if len(trees) != len(credits):
        raise ValueError(f"{len(trees)} trees but {len(credits)} credits")
    old = [t.logprobs for t in trees] if old_logprobs is None else old_logprobs
    return [_write_out(i, t, c, np.isfinite(o)) for i, (t, c, o) in enumerate(zip(trees, credits, old, strict=True))]


def _write_out(index: int, tree: Tree, credit: Credit, finite: Bool) -> Terms:
    _check(index, tree, credit)
    lengths = (credit.stop - credit.start).astype(np.int64)
    first = tree.offsets[credit.node] + credit.start
    within = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    token = np.repeat(first, lengths) + within
    row = np.repeat(credit.row, lengths).astype(np.int64)
    advantage = np.repeat(credit.advantage, lengths)
    if credit.token_mask is not None:
        kept = credit.token_mask[token]
        token, row, advantage = token[kept], row[kept], advantage[kept]
    known = finite[token]
    dropped = int((~known).sum())
    token, row, advantage = token[known], row[known], advantage[known]
    return Terms(token, row, advantage, np.bincount(row, minlength=len(credit.row_leaf)), dropped)


def _check(index: int, tree: Tree, credit: Credit) -> None:
    where = f"credit of tree {index}"
    if credit.shape != (len(tree.leaves), tree.nodes):
        raise ValueError(f"{where}: made for {credit.shape} leaves and nodes, but the tree has {(len(tree.leaves), tree.nodes)}")
    if credit.token_mask is not None and len(credit.token_mask) != len(tree.tokens):
        raise ValueError(f"{where}: token_mask has {len(credit.token_mask)} values for {len(tree.tokens)} tokens")
    if len(credit.row) == 0:
        return
    if credit.row.min() < 0 or credit.row.max() >= len(credit.row_leaf):
        raise ValueError(f"{where}: a term names a row outside 0..{len(credit.row_leaf) - 1}")
    if credit.node.min() < 1 or credit.node.max() >= tree.nodes:
        raise ValueError(f"{where}: a term names a node outside 1..{tree.nodes - 1} (the prompt, node 0, is never trained)")
    if (credit.start < 0).any() or (credit.start > credit.stop).any() or (credit.stop > tree.lengths[credit.node]).any():
        raise ValueError(f"{where}: a term's token range does not lie within its node")
    if not np.isfinite(credit.advantage).all():
        raise ValueError(f"{where}: an advantage is not finite")
    if not (np.isfinite(credit.row_weight) & (credit.row_weight >= 0)).all():
        raise ValueError(f"{where}: row weights must be finite, 0 or more")

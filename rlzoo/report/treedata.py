"""A stored tree as plain data for the viewer: nodes, values, credits as pieces, and the text of every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from ..credit.base import Credit
from ..credit.values import mean_of_children
from ..store.trees import StoredTree
from ..tree import Role, Stop, Tree
from .counterfactual import Counterfactual
from .treeview import mean_of_leaves

Decode = Callable[[Sequence[int]], str]
"""Token ids in, text out, special tokens included."""

Piece = list[float]
"""[start, stop, mean, low, high, terms]: tokens [start, stop) of a node have `terms` terms, whose advantages have this mean
(weighted by `row_weight`), least and largest value."""

Texts = dict[str, int]
"""The texts of tokens and their numbers, so that each text is stored once; what is new gets the next number."""

HUNDREDTHS = 100  # log-probs are kept as whole hundredths: three figures are more than a shade can show


class Pieces:
    """Text of every token of a sequence, so that joined they are the text of the whole. A character made of several tokens
    stands with its last one. Without a tokenizer the text of a token is its id."""

    def __init__(self, decode: Decode | None) -> None:
        self._decode = None if decode is None else cache(lambda ids: decode(list(ids)))

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """One text per id."""
        if self._decode is None:
            return [f"⟨{i}⟩" for i in ids]
        texts, start, done = [], 0, 0  # ids[start:done] are those before: a token's spaces depend on them
        for i in range(1, len(ids) + 1):
            before, now = self._decode(tuple(ids[start:done])), self._decode(tuple(ids[start:i]))
            if now.endswith("\ufffd") and i < len(ids) and i - done < 8:  # the beginning of a character
                texts.append("")
                continue
            texts.append(now[len(before) :])
            start, done = done, i
        return texts


def tree_data(stored: StoredTree, judged: Sequence[Counterfactual], pieces: Pieces, texts: Texts) -> dict[str, Any]:
    """All that the viewer shows of a tree.

    Per node, in lists [nodes]: `parent`, `start` (its first token's position in the response), `length`, `stop` (name), `probe`,
    `value` (mean over children), `leafMean` (mean over leaves below). Per leaf: `leaves` (nodes), `reward`, `correct`, `kind`.
    `tokens` and `logprobs` (in hundredths, null where there is none) are lists of lists [nodes][tokens]; the prompt's are the first.
    `credits`: one per source, `pieces` [nodes] or a `refused` reason; the first is what training used, if it did.
    """
    tree, record = stored.tree, stored.record
    value, leaf_mean = mean_of_children(tree), mean_of_leaves(tree)
    return {
        "id": record.problem_id or str(tree.meta.get("problem", "")),
        "problem": record.problem,
        "gold": record.gold,
        "parent": tree.parent.tolist(),
        "start": (tree.starts - len(tree.prompt)).tolist(),
        "length": tree.lengths.tolist(),
        "stop": [Stop(int(s)).name for s in tree.stop],
        "probe": [int(i) for i in np.flatnonzero(tree.role == Role.PROBE)],
        "order": np.argsort(tree.created, kind="stable").tolist(),
        "value": _numbers(value),
        "leafMean": _numbers(leaf_mean),
        "leaves": tree.leaves.tolist(),
        "reward": _numbers(tree.reward),
        "correct": _numbers(tree.correct),
        "kind": list(record.kinds),
        "sampled": tree.sampled_tokens,
        "unrolled": tree.unrolled_tokens,
        "tokens": [_token_texts(tree, node, pieces, texts) for node in range(tree.nodes)],
        "logprobs": [_hundredths(tree.node_logprobs(node)) for node in range(tree.nodes)],
        "credits": [_trained(stored), *(_counterfactual(tree, c) for c in judged)],
    }


def credit_pieces(tree: Tree, credit: Credit) -> list[list[Piece]]:
    """Per node [nodes] its pieces, in order; tokens without a term, or masked out, are in none."""
    terms: list[list[int]] = [[] for _ in range(tree.nodes)]
    for k, node in enumerate(credit.node.tolist()):
        terms[node].append(k)
    return [_node_pieces(tree, credit, node, np.array(found, np.int64)) for node, found in enumerate(terms)]


def _node_pieces(tree: Tree, credit: Credit, node: int, terms: Any) -> list[Piece]:
    if len(terms) == 0:
        return []
    start, stop, advantage = credit.start[terms], credit.stop[terms], credit.advantage[terms]
    weight = credit.row_weight[credit.row[terms]]
    cuts = {int(c) for c in [*start, *stop]}
    masked = None if credit.token_mask is None else ~credit.token_mask[int(tree.offsets[node]) : int(tree.offsets[node + 1])]
    if masked is not None:
        cuts |= {int(c) + 1 for c in np.flatnonzero(masked[1:] != masked[:-1])}
    edges = sorted(cuts)
    if len(edges) == 1:  # a node without tokens still has its term
        edges *= 2
    pieces: list[Piece] = []
    for first, last in pairwise(edges):
        here = (start <= first) & (last <= stop)
        if here.any() and not (masked is not None and last > first and masked[first]):
            a, w = advantage[here], weight[here]
            mean = float(np.average(a, weights=w)) if w.sum() > 0 else float(a.mean())
            pieces.append([first, last, _figure(mean), _figure(float(a.min())), _figure(float(a.max())), int(here.sum())])
    return pieces


def _trained(stored: StoredTree) -> dict[str, Any]:
    trained = stored.credit is not None and len(stored.credit.row) > 0
    if stored.credit is None or not trained:
        return {"name": "training", "refused": "not trained on: dropped by the run's filter, or without any term"}
    return {"name": "training", "pieces": credit_pieces(stored.tree, stored.credit)}


def _counterfactual(tree: Tree, judged: Counterfactual) -> dict[str, Any]:
    if judged.credit is None:
        return {"name": judged.algorithm, "refused": judged.note}
    return {"name": judged.algorithm, "note": judged.note, "pieces": credit_pieces(tree, judged.credit)}


def _token_texts(tree: Tree, node: int, pieces: Pieces, texts: Texts) -> list[int]:
    return [texts.setdefault(text, len(texts)) for text in pieces(tree.node_tokens(node).tolist())]


def _hundredths(logprobs: Any) -> list[int | None]:
    return [round(HUNDREDTHS * x) if np.isfinite(x) else None for x in logprobs.tolist()]


def _numbers(values: Any) -> list[float | None]:
    return [_figure(x) if np.isfinite(x) else None for x in np.asarray(values, np.float64).tolist()]


def _figure(value: float) -> float:
    return float(f"{value:.4g}")

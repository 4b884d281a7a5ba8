"""Teacher-forced log-probs of whole trees: one row per path, each token taken from the first row that holds it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..tree import ROOT, Float32, Float64, Int32, Tree
from .drawing import log_probs
from .kvcache import causal_mask
from .protocol import SamplingParams

_TOKENS = 8192  # padded tokens forwarded at once


ScoreRows = Callable[[Sequence[Int32], Sequence[int]], Sequence[Float64]]
"""(sequences of ids, prompt length of each) -> response log-probs of each; the first token's come from the prompt's last position."""


def score_trees(trees: Sequence[Tree], score_rows: ScoreRows, *, exact: bool) -> list[Float32 | Float64]:
    """Log-probs [tokens] per tree, NaN for the prompt; float64 if `exact`, else float32."""
    out = [np.full(len(tree.tokens), np.nan) for tree in trees]
    rows = [(i, end) for i, tree in enumerate(trees) for end in _ends(tree)]
    rows.sort(key=lambda row: int(trees[row[0]].starts[row[1]] + trees[row[0]].lengths[row[1]]))
    for batch in _batches(trees, rows):
        sequences = [np.concatenate([trees[i].prompt, trees[i].path_tokens(end)]) for i, end in batch]
        values = score_rows(sequences, [len(trees[i].prompt) for i, _ in batch])
        for (i, end), scores in zip(batch, values, strict=True):
            tree = trees[i]
            for node in tree.path(end):
                start = int(tree.starts[node] - tree.lengths[ROOT])
                span = slice(int(tree.offsets[node]), int(tree.offsets[node + 1]))
                out[i][span] = scores[start : start + int(tree.lengths[node])]
    return [scores if exact else scores.astype(np.float32) for scores in out]


def _ends(tree: Tree) -> list[int]:
    """Nodes without any child, probes included: their paths cover the tree."""
    inner = set(tree.parent[1:].tolist())
    return [node for node in range(1, tree.nodes) if node not in inner]


def _batches(trees: Sequence[Tree], rows: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    batch: list[tuple[int, int]] = []
    for i, end in rows:  # from short to long
        length = int(trees[i].starts[end] + trees[i].lengths[end])
        if batch and (len(batch) + 1) * length > _TOKENS:
            yield batch
            batch = []
        batch.append((i, end))
    if batch:
        yield batch


def forward_rows(
    model: Any,
    params: SamplingParams,
    forbidden: Tensor,
    device: torch.device,
    pad: int,
    sequences: Sequence[Int32],
    prompts: Sequence[int],
) -> list[Float64]:
    """A `ScoreRows` by a forward pass of `model`, once the first five arguments are bound.

    `forbidden` ids have no probability. Padding is on the right, so real tokens see only their own path.
    """
    parts = [torch.from_numpy(s.astype(np.int64)) for s in sequences]
    ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=pad).to(device)
    mask = causal_mask(ids.shape[1], 0, model.dtype, device)
    positions = torch.arange(ids.shape[1], device=device).expand(len(parts), -1)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    if len(forbidden):
        logits = logits.index_fill_(-1, forbidden, -torch.inf)
    scores = []
    for row, (part, prompt) in enumerate(zip(parts, prompts, strict=True)):
        targets = ids[row, prompt : len(part)]
        scores.append(log_probs(logits[row, prompt - 1 : len(part) - 1], targets, params).cpu().numpy())
    return scores

"""When does a packed tree give the gradient of its unrolled responses? Ask before the first update."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from ..tree import Float64, Segment, Tree
from .forward import Head, forward_of, pack_logprobs
from .opening import MOST_TOKENS, own_logprobs, switch_points
from .packing import pack
from .rows import Layout


def exactness(model: nn.Module, longest_path: int | None = None) -> str | None:
    """Why packing is not exact for this model; None if it is.

    `longest_path`: tokens of prompt + response at most (a longer sliding window is no hindrance; unknown: any window is).
    First the configuration is read, for what a small probe cannot show; then small trees are run packed and unrolled, and compared
    with the module's own eager forward over each path alone: one with a short prompt, and one whose prompt crosses the lengths at
    which the config says that the model changes what it does, both in one batch.

    Raises:
        ValueError: unrolled rows are not exact either, so that the model cannot be trained; says why.
    """
    gap, failed = layout_gap(model, "unrolled", longest_path)
    if failed or not gap <= _allowed(model):
        why = failed or f"log-probs of unrolled responses differ from the model's own by {gap:.2g}"
        raise ValueError(f"this model cannot be trained here: {why}")
    reason = _configured(model, longest_path)
    if reason:
        return reason
    gap, failed = layout_gap(model, "packed", longest_path)
    if failed:
        return f"its attention cannot be replaced ({failed})"
    return None if gap <= _allowed(model) else f"on a probe tree the packed log-probs differ from the model's own by {gap:.2g}"


def _configured(model: nn.Module, longest_path: int | None) -> str | None:
    config = model.config
    dropout = max([m.p for m in model.modules() if isinstance(m, nn.Dropout)] + [float(getattr(config, "attention_dropout", 0) or 0)])
    if dropout > 0:
        return f"dropout is {dropout:g}; a shared token would be dropped once instead of once per response"
    kinds = set(getattr(config, "layer_types", None) or [])
    odd = sorted(kinds - {"full_attention", "sliding_attention"})
    if odd:
        return f"layers of kind {', '.join(odd)} are not full attention"
    window = getattr(config, "sliding_window", None)
    if window and (not kinds or "sliding_attention" in kinds) and (longest_path is None or window < longest_path):
        return f"the sliding attention window of {window} tokens is shorter than the longest path ({longest_path or 'not known'})"
    if getattr(config, "output_router_logits", False):
        return "the mixture-of-experts auxiliary loss would count a shared token once"
    if not hasattr(model, "get_decoder"):
        return "the model has no decoder of transformers' kind"
    return None


def _prompt_lengths(model: nn.Module, longest_path: int | None) -> list[int]:
    longest = MOST_TOKENS if longest_path is None else min(longest_path, MOST_TOKENS)
    points = switch_points(model.config, longest)
    return [3, *([max(points) + 1] if points else [])]


def _tree(prompt: int) -> Tree:
    segments = [Segment(0, [2, 1]), Segment(1, [3, 1, 2]), Segment(1, [1, 3]), Segment(0, [0, 2])]
    return Tree.from_segments((np.arange(prompt) % 3 + 1).tolist(), segments)


def _allowed(model: nn.Module) -> float:
    coarse = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    return 0.1 if coarse else 1e-3


def _own(model: nn.Module, trees: Sequence[Tree]) -> Float64:
    """Log-probs of every token under the model's own forward, path by path; NaN for prompts."""
    found = []
    for tree in trees:
        values = np.full(len(tree.tokens), np.nan)
        for leaf in tree.leaves:
            path = np.concatenate([np.arange(tree.offsets[n], tree.offsets[n + 1]) for n in tree.path(int(leaf))])
            values[path] = own_logprobs(model, tree.prompt, tree.tokens[path])
        found.append(values)
    return np.concatenate(found)


def layout_gap(model: nn.Module, layout: Layout, longest_path: int | None = None) -> tuple[float, str | None]:
    """Largest deviation of a layout's log-probs from the model's own on the probe trees (see `exactness`), and what was raised instead."""
    trees = [_tree(length) for length in _prompt_lengths(model, longest_path)]
    trained = [np.arange(len(t.tokens)) >= t.lengths[0] for t in trees]
    training = model.training
    model.eval()
    try:
        own, worst = _own(model, trees), 0.0
        head = Head.of(model)
        with torch.no_grad(), forward_of(model, layout):
            for p in pack(trees, trained, 1 << 20, layout=layout)[0]:
                values = pack_logprobs(model, p, head, temperature=1.0, vocab_size=None)[0].double().cpu().numpy()
                worst = max(worst, float(np.abs(values - own[p.target]).max()))
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, NotImplementedError, RuntimeError) as error:
        return float("inf"), f"{type(error).__name__}: {error}"
    finally:
        model.train(training)
    return worst, None

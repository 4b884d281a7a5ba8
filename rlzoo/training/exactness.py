"""When does a packed tree give the gradient of its unrolled responses? Ask before the first update."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from ..tree import Segment, Tree
from .forward import Head, forward_of, pack_logprobs
from .packing import pack
from .rows import Layout


def exactness(model: nn.Module, longest_path: int | None = None) -> str | None:
    """Why packing is not exact for this model; None if it is.

    `longest_path`: tokens of prompt + response at most (a longer sliding window is no hindrance; unknown: any window is).
    First the configuration is read, for what a small probe cannot show; then a small tree is run packed and unrolled.
    """
    return _configured(model, longest_path) or _probed(model)


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


def _probed(model: nn.Module) -> str | None:
    tree = Tree.from_segments([1, 2, 3], [Segment(0, [2, 1]), Segment(1, [3, 1, 2]), Segment(1, [1, 3]), Segment(0, [0, 2])])
    training = model.training
    model.eval()
    try:
        unrolled = _logprobs(model, tree, "unrolled")
        try:
            packed = _logprobs(model, tree, "packed")
        except (TypeError, ValueError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
            return f"its attention cannot be replaced ({type(error).__name__}: {error})"
    finally:
        model.train(training)
    worst = float((packed - unrolled).abs().max())
    coarse = next(model.parameters()).dtype in (torch.bfloat16, torch.float16)
    if not worst <= (0.1 if coarse else 1e-3):
        return f"on a probe tree the packed log-probs differ from the unrolled ones by {worst:.2g}"
    return None


def _logprobs(model: nn.Module, tree: Tree, layout: Layout) -> Tensor:
    trained = np.arange(len(tree.tokens)) >= tree.lengths[0]
    values, head = torch.zeros(len(tree.tokens), dtype=torch.float64), Head.of(model)
    with torch.no_grad(), forward_of(model, layout):
        for p in pack([tree], [trained], 1 << 20, layout=layout)[0]:
            values[torch.as_tensor(p.target)] = pack_logprobs(model, p, head, temperature=1.0, vocab_size=None)[0].double().cpu()
    return values

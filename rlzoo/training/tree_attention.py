"""Attention over a packed sequence: the token that stands once in it attends as in its own response.

Linear layers see each shared token once. For attention alone, keys and values are gathered back into paths; each token is a
query once, in one call with the other tokens that its path adds to the tree. A gather is cheap beside the linear work that it
saves, and softmax runs over exactly the keys of the path, in path order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from .packing import Attention, Group

NAME = "rlzoo_tree"
REFUSED = ("softcap", "s_aux", "position_bias")  # what some models pass to attention and this function does not compute


@dataclass(frozen=True, eq=False)
class _GroupTensors:
    """`queries` [rows · q], `keys` [rows · k], `mask` bool [rows or 1, 1, q, k], or None for plain causal."""

    rows: int
    queries: Tensor
    keys: Tensor
    mask: Tensor | None


@dataclass(frozen=True, eq=False)
class AttentionTensors:
    """An `Attention` on a device, made once per pack and used by every layer."""

    groups: list[_GroupTensors]
    place: Tensor

    @classmethod
    def of(cls, attention: Attention, device: torch.device) -> AttentionTensors:
        groups = [
            _GroupTensors(len(g.queries), _on(g.queries.ravel(), device), _on(g.keys.ravel(), device), _mask(g, device))
            for g in attention.groups
        ]
        return cls(groups, _on(attention.place, device))


def _on(values: Any, device: torch.device) -> Tensor:
    return torch.as_tensor(values, device=device)


def _mask(group: Group, device: torch.device) -> Tensor | None:
    offset = group.offset[:1] if (group.offset == group.offset[0]).all() else group.offset
    if group.queries.shape[1] == group.keys.shape[1] and not offset.any():
        return None
    last = _on(offset, device)[:, None] + torch.arange(group.queries.shape[1], device=device)
    return (torch.arange(group.keys.shape[1], device=device) <= last[:, :, None])[:, None]


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    rlzoo_tree: AttentionTensors | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function in transformers' interface: query [1, heads, slots, d], key and value [1, key heads, slots, d];
    returns [1, slots, heads, d]."""
    refused = [k for k in REFUSED if kwargs.get(k) is not None]
    if rlzoo_tree is None or refused:
        raise NotImplementedError(f"packed attention does not compute {refused or 'a pass without its plan'}")
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))  # [slots, heads, d]
    shared = query.shape[1] != key.shape[1]
    outputs = []
    for group in rlzoo_tree.groups:
        q, k, v = (
            x.index_select(0, index).view(group.rows, -1, *x.shape[1:]).transpose(1, 2)
            for x, index in ((queries, group.queries), (keys, group.keys), (values, group.keys))
        )
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=group.mask, dropout_p=dropout, scale=scaling, is_causal=group.mask is None, enable_gqa=shared
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, rlzoo_tree.place)[None], None


AttentionInterface.register(NAME, tree_attention)


@contextmanager
def attending_over_trees(model: nn.Module) -> Iterator[None]:
    """Switch a model to packed attention, backward passes (checkpointed layers run again) included."""
    config: Any = model.get_decoder().config  # type: ignore[operator]
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before

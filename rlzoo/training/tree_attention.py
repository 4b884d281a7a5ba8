"""Attention over a packed sequence: the token that stands once in it attends as in its own response.

Linear layers see each shared token once. For attention alone, keys and values are gathered back into paths; each token is a
query once, in one call with the other tokens that its path adds to the tree. A gather is cheap beside the linear work that it
saves, and softmax runs over exactly the keys of the path, in path order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface

from ..backends.kvcache import refuse_unknown_attention
from .attention_forms import aligned, attend, form_on
from .packing import Attention, Group

NAME = "rlzoo_tree"


@dataclass(frozen=True, eq=False)
class _GroupTensors:
    """`queries` [rows · q], `keys` [rows · k], `mask` bool [rows or 1, 1, q, k], or None for causal from the lower right."""

    rows: int
    queries: Tensor
    keys: Tensor
    mask: Tensor | None


@dataclass(frozen=True, eq=False)
class _Plan:
    groups: list[_GroupTensors]
    place: Tensor


class AttentionTensors:
    """An `Attention` on a device, made once per pack and used by every layer, in the form that the device has kernels for."""

    def __init__(self, attention: Attention, device: torch.device) -> None:
        self._attention, self._device = attention, device

    @cached_property
    def masked(self) -> _Plan:
        return self._plan(self._attention, [_mask(g, self._device) for g in self._attention.groups])

    @cached_property
    def aligned(self) -> _Plan:
        attention = aligned(self._attention)
        return self._plan(attention, [None] * len(attention.groups))

    def _plan(self, attention: Attention, masks: Sequence[Tensor | None]) -> _Plan:
        def on(values: NDArray[np.int64]) -> Tensor:
            return torch.as_tensor(values, device=self._device)

        groups = [
            _GroupTensors(len(g.queries), on(g.queries.ravel()), on(g.keys.ravel()), mask)
            for g, mask in zip(attention.groups, masks, strict=True)
        ]
        return _Plan(groups, on(attention.place))


def _mask(group: Group, device: torch.device) -> Tensor | None:
    offset = group.offset[:1] if (group.offset == group.offset[0]).all() else group.offset
    if group.queries.shape[1] == group.keys.shape[1] and not offset.any():
        return None
    last = torch.as_tensor(offset, device=device)[:, None] + torch.arange(group.queries.shape[1], device=device)
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
    refuse_unknown_attention(kwargs)
    if rlzoo_tree is None:
        raise NotImplementedError("packed attention needs the plan of a pack")
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:  # before the gather, which then copies half as much
        query, key, value = (x.to(torch.get_autocast_dtype(query.device.type)) for x in (query, key, value))
    form = form_on(query.device, query.dtype, query.shape[1], key.shape[1], query.shape[3])
    plan = rlzoo_tree.masked if form == "masked" else rlzoo_tree.aligned
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))  # [slots, heads, d]
    outputs = []
    for group in plan.groups:
        q, k, v = (
            x.index_select(0, index).view(group.rows, -1, *x.shape[1:]).transpose(1, 2)
            for x, index in ((queries, group.queries), (keys, group.keys), (values, group.keys))
        )
        outputs.append(attend(form, q, k, v, group.mask, dropout=dropout, scale=scaling).transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, plan.place)[None], None


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

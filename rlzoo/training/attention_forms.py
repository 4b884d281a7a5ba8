"""How blocks of a packed sequence attend: one result, several forms, of which each device has kernels for some.

A block's query j sees keys 0..offset + j. As a boolean mask any kernel's fallback computes it, but with fewer key heads than query
heads a GPU may have nothing better than plain matrix products. Causal from the lower right corner, which flash attention and
the memory-efficient kernel know, it is where all rows of a call share offset and lengths; `aligned` shifts queries so that they do.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from ..tree import Int64
from .packing import Attention, Group

Form = Literal["masked", "grouped", "expanded"]
"""masked: a boolean mask. grouped: causal from the lower right, query heads sharing key heads. expanded: the same with a key head for each
query head."""
FORMS: tuple[Form, ...] = ("masked", "grouped", "expanded")

_WIDER = 1.5  # a call may have so many times the queries by shifting; beyond, its rows are split by offset


def attend(form: Form, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, dropout: float = 0.0, scale: float | None = None) -> Tensor:
    """Attention of q [rows, heads, queries, d] to k and v [rows, key heads, keys, d]: under `mask` (None: causal), or causal from the
    lower right corner, for which `mask` must be None."""
    shared = q.shape[1] != k.shape[1]
    if form == "masked":
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale, is_causal=mask is None, enable_gqa=shared
        )
    if form == "expanded" and shared:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        shared = False
    bias = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale, enable_gqa=shared)


def aligned(attention: Attention) -> Attention:
    """The same attention with the queries of every group shifted so that each row's last real key is at the lower right corner of what
    its queries see: query p of a row sees the keys 0..keys - queries + p."""
    groups, place, first = [], np.full_like(attention.place, -1), 0
    slots = np.full(sum(g.queries.size for g in attention.groups), -1, np.int64)
    slots[attention.place] = np.arange(len(attention.place))
    start = 0
    for group in attention.groups:
        filled = slots[start : start + group.queries.size].reshape(group.queries.shape)
        start += group.queries.size
        for rows in _alike(group):
            keys = group.keys[rows, : int((group.offset[rows][:, None] + np.where(filled[rows] >= 0, _steps(group), -1)).max()) + 1]
            low = int(group.offset[rows].min())
            shape = (len(rows), keys.shape[1] - low)
            row, step = np.nonzero(filled[rows] >= 0)
            at = row * shape[1] + group.offset[rows][row] - low + step
            queries = np.zeros(shape[0] * shape[1], np.int64)
            queries[at] = group.queries[rows][row, step]
            place[filled[rows][row, step]] = first + at
            first += queries.size
            groups.append(Group(queries.reshape(shape), keys, np.full(len(rows), low)))
    return Attention(groups, place)


def _steps(group: Group) -> Int64:
    return np.arange(group.queries.shape[1])


def _alike(group: Group) -> list[Int64]:
    """Rows of a group in parts whose offsets are the same, or not so far apart that shifting would cost much."""
    rows = np.arange(len(group.offset))
    if group.keys.shape[1] - group.offset.min() <= _WIDER * group.queries.shape[1]:
        return [rows]
    return [rows[group.offset == offset] for offset in np.unique(group.offset)]


@cache
def form_on(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int) -> Form:
    """The form to use on a device, found out there: the first that flash attention or the memory-efficient kernel accepts and that gives,
    forward and backward, what the mask gives; else, and on a CPU, the mask."""
    if device.type != "cuda":
        return "masked"
    for form in FORMS[1:]:
        if _served(form, device, dtype, heads, key_heads, size) and _agrees(form, device, dtype, heads, key_heads, size):
            return form
    return "masked"


def _sample(device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, 16, size), (2, key_heads, 24, size), (2, key_heads, 24, size))
    return [torch.randn(*shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def _served(form: Form, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int) -> bool:
    q, k, v = _sample(device, dtype, heads, heads if form == "expanded" else key_heads, size)
    params = SDPAParams(q, k, v, None, 0.0, False, form == "grouped" and heads != key_heads)
    return bool(can_use_flash_attention(params) or can_use_efficient_attention(params))


def _agrees(form: Form, device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int) -> bool:
    mask = torch.arange(24, device=device) <= torch.arange(8, 24, device=device)[:, None]
    found = []
    outside = saved_tensors_hooks(lambda x: x, lambda x: x)  # a checkpointed layer that this runs in must not count our tensors
    try:
        with torch.enable_grad(), outside, torch.autocast(device.type, enabled=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for each in ("masked", form):
                inputs = _sample(device, dtype, heads, key_heads, size)
                out = attend(each, *inputs, mask if each == "masked" else None)  # type: ignore[arg-type,call-arg]
                found.append([out.detach(), *torch.autograd.grad(out.float().square().sum(), inputs)])
    except RuntimeError:
        return False
    close = 3e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-4
    return all(torch.allclose(a.float(), b.float(), rtol=close, atol=close * float(a.abs().max())) for a, b in zip(*found, strict=True))

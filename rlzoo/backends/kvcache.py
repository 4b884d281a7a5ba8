"""Key-value state of the torch engine: the rows being decoded, the prefixes kept for forks, and how attention reads them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..tree import Int32
from .memory import room

ATTENTION = "rlzoo_rows"
KV_SHARE = 0.8  # of the memory that a GPU has to give; the rest is for prefixes, logits and activations
_BLOCK = 8  # lengths are rounded up to this, so that masks stay aligned

Key = tuple[int, int]  # id of a segment (or prompt), tokens of its path that count


class Rows(Cache):  # type: ignore[misc]
    """Keys and values of the rows being decoded, one tensor [2, capacity, kv_heads, length, head_dim] per layer.

    A forward of one token per row writes each at its row's own position and reads [:rows, :, :longest]. The length grows as
    needed, layer by layer, so that no more than one layer is ever held twice. Memory beyond a row's own length holds stale but
    finite numbers, which the mask hides. `max_length`: tokens of the longest path that is asked for so far.
    """

    is_compileable = False

    def __init__(self, capacity: int, max_length: int) -> None:
        self.layers: list[Any] = []
        self.layer_class_to_replicate = None
        self.offloading = False
        self.capacity, self.max_length = capacity, max_length
        self.kv: list[Tensor] = []
        self._rows = self._longest = 0
        self._at: Tensor | None = None

    def drop(self) -> None:
        """Give all memory back."""
        self.kv, self._at = [], None

    def grow(self, length: int) -> None:
        """Make room for `length` tokens per row.

        Raises:
            torch.OutOfMemoryError: the GPU has no room for all rows at `max_length`, so that it would run out of memory later.
        """
        held = self.kv[0].shape[3]
        if held >= length:
            return
        wanted = _round(max(length, 64, min(2 * held, self.max_length)))
        self._check_room(max(wanted, self.max_length))
        for i, old in enumerate(self.kv):
            # Zeros, not empty: a NaN left in memory would pass through a masked attention weight of 0.
            new = old.new_zeros(*old.shape[:3], wanted, old.shape[4])
            new[:, :, :, :held] = old
            self.kv[i] = new
            del old

    def _check_room(self, length: int) -> None:
        like = self.kv[0]
        rest = room(like.device)
        needed = len(self.kv) * 2 * self.capacity * like.shape[2] * length * like.shape[4] * like.itemsize
        if rest is not None and needed > KV_SHARE * (rest + sum(layer.nbytes for layer in self.kv)):
            raise torch.OutOfMemoryError(f"no room for {needed} bytes of keys and values, out of memory before it happens")

    def load(self, rows: Sequence[int], prefix: Tensor) -> None:
        """Copy one prefix [layers, 2, kv_heads, tokens, head_dim] into each of `rows`."""
        layers, _, heads, tokens, dim = prefix.shape
        if not self.kv:
            self.kv = [prefix.new_empty(2, self.capacity, heads, 0, dim) for _ in range(layers)]
        self.grow(tokens + 1)
        for layer, part in zip(self.kv, prefix, strict=True):
            _write(layer, rows, part)

    def spread(self, row: int, rows: Sequence[int], tokens: int) -> None:
        """Copy the first `tokens` tokens of `row` into each of `rows`, if any."""
        if rows:
            for layer in self.kv:
                _write(layer, rows, layer[:, row, :, :tokens])

    def prefix(self, row: int, tokens: int) -> Tensor:
        """A copy of the first `tokens` tokens of a row, [layers, 2, kv_heads, tokens, head_dim]."""
        return torch.stack([layer[:, row, :, :tokens] for layer in self.kv])

    def move(self, source: Sequence[int], target: Sequence[int], tokens: int) -> None:
        """Copy rows `source` over rows `target`."""
        at, to = (torch.as_tensor(rows, device=self.kv[0].device) for rows in (source, target))
        for layer in self.kv:
            part = layer.narrow(3, 0, tokens)
            part[:, to] = part[:, at]

    def aim(self, positions: NDArray[np.int64]) -> Tensor:
        """Prepare a forward of one token per row at `positions` [rows]; returns the additive mask [rows, 1, 1, longest]."""
        rows, longest = len(positions), _round(int(positions.max()) + 1)
        self.grow(longest)
        kv = self.kv[0]
        _, _, heads, length, _ = kv.shape
        self._rows, self._longest = rows, longest
        flat = (np.arange(rows)[:, None] * heads + np.arange(heads)) * length + positions[:, None]
        self._at = torch.from_numpy(flat.reshape(-1)).to(kv.device)
        last = torch.from_numpy(positions).to(kv.device)
        hidden = torch.arange(longest, device=kv.device) > last[:, None]
        mask = torch.zeros(hidden.shape, dtype=kv.dtype, device=kv.device).masked_fill_(hidden, -torch.inf)
        return mask[:, None, None]

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self._at is not None
        both = self.kv[layer_idx]
        views = []
        for store, new in ((both[0], key_states), (both[1], value_states)):
            dim = store.shape[-1]
            store.view(-1, dim).index_copy_(0, self._at, new.reshape(-1, dim))
            views.append(store[: self._rows, :, : self._longest])
        return views[0], views[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._longest


class Recorder(Cache):  # type: ignore[misc]
    """Collects the keys and values of a forward over whole (right-padded) rows, after an optional shared prefix."""

    is_compileable = False

    def __init__(self, past: Tensor | None = None) -> None:
        self.layers: list[Any] = []
        self.layer_class_to_replicate = None
        self.offloading = False
        self.past = past
        self._seen: list[tuple[Tensor, Tensor]] = []

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if layer_idx != len(self._seen):
            raise ValueError("the torch backend needs a model whose layers each keep one key-value cache, in order")
        if self.past is not None:
            key_states = torch.cat([self.past[layer_idx, 0, None], key_states], dim=2)
            value_states = torch.cat([self.past[layer_idx, 1, None], value_states], dim=2)
        self._seen.append((key_states, value_states))
        return key_states, value_states

    def stacked(self) -> Tensor:
        """[layers, 2, rows, kv_heads, tokens, head_dim].

        Raises:
            ValueError: layers differ in shape, or keys from values.
        """
        shapes = {t.shape for pair in self._seen for t in pair}
        if len(shapes) != 1:
            raise ValueError("the torch backend needs a model whose layers all have the same number and size of key and value heads")
        return torch.stack([torch.stack(pair) for pair in self._seen])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.past is None else int(self.past.shape[3])


@dataclass(slots=True)
class Prefix:
    """A computed path: `tokens` [n], keys and values of its first n - 1 or n tokens, and, with n, the logits that follow."""

    tokens: Int32
    kv: Tensor
    logits: Tensor | None = None

    @property
    def bytes(self) -> int:
        logits = 0 if self.logits is None else self.logits.nbytes
        return int(self.kv.nbytes + logits)


class PrefixStore:
    """Prefixes kept for forks, up to `budget` bytes; the least recently used go first."""

    def __init__(self, budget: int) -> None:
        self.budget, self.bytes = budget, 0
        self._entries: OrderedDict[Key, Prefix] = OrderedDict()
        self._keys: dict[int, set[Key]] = {}

    def get(self, key: Key) -> Prefix | None:
        entry = self._entries.get(key)
        if entry is not None:
            self._entries.move_to_end(key)
        return entry

    def put(self, key: Key, entry: Prefix) -> None:
        self.drop(key)
        self._entries[key] = entry
        self._keys.setdefault(key[0], set()).add(key)
        self.bytes += entry.bytes
        while self.bytes > self.budget and self._entries:
            self.drop(next(iter(self._entries)))

    def drop(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self.bytes -= entry.bytes
        keys = self._keys[key[0]]
        keys.discard(key)
        if not keys:
            del self._keys[key[0]]

    def drop_all(self, id: int) -> None:
        """Drop whatever is held for one id."""
        for key in tuple(self._keys.get(id, ())):
            self.drop(key)

    def clear(self) -> None:
        self._entries.clear()
        self._keys.clear()
        self.bytes = 0


def causal_mask(queries: int, past: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask [1, 1, queries, past + queries]. Right padding needs no more: real tokens never look right."""
    mask = torch.full((queries, past + queries), -torch.inf, dtype=dtype, device=device)
    return mask.triu_(past + 1)[None, None]


LEFT_OUT = ("softcap", "s_aux", "sinks", "position_bias", "alibi")
"""What some models pass to their attention and no function of ours computes."""


def refuse_unknown_attention(asked: Mapping[str, Any]) -> None:
    """Raises:
    NotImplementedError: a model passes to attention what is not computed.
    """
    left_out = [name for name in LEFT_OUT if asked.get(name) is not None]
    if left_out:
        raise NotImplementedError(f"its attention uses {' and '.join(left_out)}, which is not computed here")


def rows_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one query per row, without repeating keys and values for grouped heads; else what transformers does.

    Raises:
        NotImplementedError: the model asks for something of attention that is not computed here.
    """
    refuse_unknown_attention(kwargs)
    rows, heads, queries, dim = query.shape
    groups = heads // key.shape[1]
    if queries != 1 or groups == 1 or attention_mask is None:
        out = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return out[0], None
    # The heads that share a key head become queries: one query position sees what the others see.
    grouped = query.reshape(rows, key.shape[1], groups, dim)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling)
    return out.reshape(rows, 1, heads, dim), None


def _write(layer: Tensor, rows: Sequence[int], prefix: Tensor) -> None:
    """Copy `prefix` [2, kv_heads, tokens, head_dim] into each of `rows` of a layer."""
    part = layer.narrow(3, 0, prefix.shape[2])
    consecutive = rows[-1] - rows[0] == len(rows) - 1
    part[:, slice(rows[0], rows[-1] + 1) if consecutive else torch.as_tensor(rows, device=layer.device)] = prefix[:, None]


def _round(tokens: int) -> int:
    return -(-tokens // _BLOCK) * _BLOCK


AttentionInterface.register(ATTENTION, rows_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)

"""The torch engine's passes through its model: whole contexts, and one token of every row."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..tree import Int32
from .kvcache import Recorder, Rows, causal_mask
from .rowstate import RowState


class Forwards:
    """`forbidden`: ids that are never sampled, whose logits become -inf; `pad`: id that fills rows up."""

    def __init__(self, model: Any, forbidden: Tensor, pad: int) -> None:
        self.model, self.forbidden, self.pad, self.device = model, forbidden, pad, forbidden.device
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def contexts(self, contexts: Sequence[Int32], past: Tensor | None) -> tuple[Tensor, Tensor, int]:
        """Forward whole contexts (one only, if it continues `past`), right-padded.

        Returns keys and values [layers, 2, contexts, kv_heads, width, head_dim], the logits after each context
        [contexts, vocabulary], and the number of padded positions.
        """
        held = 0 if past is None else past.shape[3]
        parts = [torch.from_numpy(c[held:].astype(np.int64)) for c in contexts]
        ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=self.pad).to(self.device)
        width = ids.shape[1]
        last = torch.tensor([len(part) - 1 for part in parts], device=self.device)
        keep, at = torch.unique(last, return_inverse=True)
        recorder = Recorder(past)
        out = self.model(
            input_ids=ids,
            attention_mask=causal_mask(width, held, self.model.dtype, self.device),
            position_ids=torch.arange(held, held + width, device=self.device).expand(len(parts), -1),
            past_key_values=recorder,
            use_cache=True,
            **({"logits_to_keep": keep} if self._keeps_logits else {}),
        )
        logits = self._allowed(out.logits[torch.arange(len(parts), device=self.device), at if self._keeps_logits else last])
        return recorder.stacked(), logits, len(parts) * width - sum(len(part) for part in parts)

    def rows(self, cache: Rows, state: RowState, rows: int) -> Tensor | None:
        """Forward the last token of the first `rows` rows; logits [rows, vocabulary], None without rows."""
        if rows == 0:
            return None
        mask = cache.aim(state.length[:rows])
        out = self.model(
            input_ids=torch.from_numpy(state.last[:rows, None]).to(self.device),
            attention_mask=mask,
            position_ids=torch.from_numpy(state.length[:rows, None]).to(self.device),
            past_key_values=cache,
            use_cache=True,
        )
        state.length[:rows] += 1
        return self._allowed(out.logits[:, -1])

    def _allowed(self, logits: Tensor) -> Tensor:
        return logits.index_fill_(1, self.forbidden, -torch.inf) if len(self.forbidden) else logits

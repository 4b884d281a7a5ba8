"""Which engine a run samples with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .protocol import Backend

if TYPE_CHECKING:
    from ..config import BackendOptions

KINDS = ("auto", "torch")


def open_backend(options: BackendOptions, model: Any, tokenizer: Any, device: str) -> Backend:
    """An engine holding its own copy of `model`'s weights.

    Raises:
        ValueError: unknown kind.
    """
    if options.kind not in KINDS:
        raise ValueError(f"backend.kind = {options.kind!r}; allowed: {', '.join(KINDS)}")
    from .torch import TorchBackend

    return TorchBackend(model, tokenizer, capacity=options.capacity, device=device, max_context=options.max_context or None)

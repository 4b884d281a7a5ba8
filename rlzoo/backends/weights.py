"""What engines ask of a model, and how they take over weights."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def copy_of(model: Any, dtype: torch.dtype | None) -> Any:
    """A copy of `model` with its weights in `dtype` (None: their own), as if it had been loaded in it: buffers keep their precision,
    for `to` would round the frequencies of rotary positions too."""
    if dtype is None:
        return copy.deepcopy(model)
    weights = {id(p): nn.Parameter(p.detach().to(dtype, copy=True), p.requires_grad) for p in model.parameters()}
    copied = copy.deepcopy(model, weights)
    copied.config.dtype = dtype
    return copied


def match_weights(own: Mapping[str, Tensor], named: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """`named` as (name, value), each tensor of `own` once under the first name it is given by.

    `own` holds the engine's tensors by name, a tied one under each of its names; tied weights may be given under any or all.

    Raises:
        ValueError: a name is unknown or missing, a shape differs, or tied weights are given with different values.
    """
    matched: dict[int, tuple[str, Tensor]] = {}  # own tensor -> what it becomes
    for name, value in named:
        if name not in own:
            raise ValueError(f"weight {name!r} is not in the engine's model")
        if own[name].shape != value.shape:
            raise ValueError(f"weight {name!r} has shape {tuple(value.shape)}, the engine's has {tuple(own[name].shape)}")
        first = matched.setdefault(id(own[name]), (name, value))
        if first[1] is not value and not torch.equal(first[1].detach(), value.detach()):
            raise ValueError(f"weights {first[0]!r} and {name!r} differ, but the engine's model ties them")
    missing = sorted(name for name, tensor in own.items() if id(tensor) not in matched)
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, first {missing[0]!r}")
    return [(name, value.detach()) for name, value in matched.values()]


def copy_weights(model: Any, named: Iterable[tuple[str, Tensor]]) -> tuple[int, int]:
    """Copy `named` weights into `model` in place; returns how many tensors and bytes were copied.

    Nothing is copied unless everything fits.

    Raises:
        ValueError: see `match_weights`.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    tensors = size = 0
    with torch.no_grad():
        for name, value in match_weights(own, named):
            target = own[name]
            if target.data_ptr() == value.data_ptr():
                continue  # the engine shares the trainer's own tensor
            target.copy_(value)
            tensors, size = tensors + 1, size + target.nbytes
    return tensors, size


def context_length(config: Any, wanted: int | None) -> int:
    """Longest sequence in tokens: `wanted`, at most what the model's positions allow.

    Raises:
        ValueError: more is wanted than the model allows, or neither says anything.
    """
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length")
    allowed = next((int(v) for k in names if isinstance(v := getattr(config, k, None), int) and v > 0), None)
    if wanted is None and allowed is None:
        raise ValueError("the model's config does not state its context length; say it with --backend.max-context")
    if wanted is not None and (wanted < 2 or (allowed is not None and wanted > allowed)):
        raise ValueError(f"max_context is {wanted}; the model allows 2 to {allowed} tokens")
    return wanted if wanted is not None else int(allowed or 0)


def check_full_attention(config: Any, max_context: int) -> None:
    """Every layer must attend to the whole path and keep nothing but keys and values.

    Raises:
        ValueError: sliding windows shorter than the context, or layers of another kind.
    """
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    other = kinds - {"full_attention", "sliding_attention"}
    if other:
        raise ValueError(f"the torch backend needs full attention in every layer; this model has {', '.join(sorted(other))}")
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds or (not getattr(config, "layer_types", None) and getattr(config, "use_sliding_window", True))
    if slides and window is not None and window < max_context:
        raise ValueError(f"the model's attention slides over {window} tokens; choose --backend.max-context of at most {window}")


def floating_type(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating torch type from its name ("bfloat16") or itself.

    Raises:
        ValueError: no such type.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is None and dtype is None:
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is {dtype!r}; allowed are float64, float32, bfloat16 and float16")
    return found

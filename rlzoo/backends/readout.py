"""Reading weights back out of an engine's modules through the very kernels that it computes with.

Engines fuse layers (q, k, v into one) and pack weights into handles of which no tensor is left, so a comparison of tensors
says nothing. A linear layer applied to the identity gives its weight, whatever it was packed into.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_ROWS = 256  # of the identity at once


def stale_weights(
    model: Any, named: Iterable[tuple[str, Tensor]], fused: Mapping[str, Sequence[str]], tied: Mapping[str, str]
) -> list[str] | None:
    """Names of the given weights that are not what the engine's `model` computes with, after rounding to its type; None where nothing
    read is stale, but some weight has no module of its name in the engine (experts that are fused into one, say).

    `fused`: engine's layer -> the layers it consists of, in order, by the last part of their names ("qkv_proj": "q_proj", ...).
    `tied`: name of a weight that the trainer does not list -> name of the one it is tied to.
    """
    weights = {name: value.detach() for name, value in named}
    weights |= {name: weights[source] for name, source in tied.items() if source in weights}
    whole = {part: (layer, place) for layer, parts in fused.items() for place, part in enumerate(parts)}
    modules = dict(model.named_modules())
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for name in weights:
        path, _, kind = name.rpartition(".")
        above, _, last = path.rpartition(".")
        layer, place = whole.get(last, (last, 0))
        module = f"{above}.{layer}" if above else layer
        groups.setdefault((module, kind), []).append((place, name))
    readable = {key: parts for key, parts in groups.items() if key[0] in modules}
    stale: list[str] = []
    with torch.inference_mode():
        for (module, kind), parts in readable.items():
            names = [name for _, name in sorted(parts)]
            held = _weight(modules[module]) if kind == "weight" else getattr(modules[module], kind)
            row = 0
            for name in names:
                want = weights[name]
                have = held[row : row + len(want)]
                row += len(want)
                if have.shape != want.shape or not torch.equal(have.to(want.device, want.dtype), _rounded(want, have.dtype)):
                    stale.append(name)
    return stale or (None if len(readable) < len(groups) else [])


def _rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype).to(value.dtype)


def _weight(module: Any) -> Tensor:
    """What the module computes with: [out, in] of a linear layer, the table of an embedding, the scale of a norm."""
    method = getattr(module, "quant_method", None)
    looked_up = hasattr(module, "num_embeddings") and not type(module).__name__.endswith("Head")
    if method is None or looked_up:
        weight: Tensor = module.weight
        return weight
    size = _input_size(module)
    dtype, device = module.weight.dtype, module.weight.device
    columns = []
    for first in range(0, size, _ROWS):
        probe = torch.zeros(min(_ROWS, size - first), size, dtype=dtype, device=device)
        probe[torch.arange(len(probe)), torch.arange(first, first + len(probe))] = 1
        columns.append(method.apply(module, probe, None))
    return torch.cat(columns).T


def _input_size(module: Any) -> int:
    for name in ("input_size_per_partition", "embedding_dim"):
        if (size := getattr(module, name, None)) is not None:
            return int(size)
    raise ValueError(f"cannot tell the input size of the engine's {type(module).__name__}")

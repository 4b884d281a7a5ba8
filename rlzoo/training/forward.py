"""Teacher-forced log-probs of a pack's trained tokens through any transformers causal LM."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..losses.logprobs import logits_logprobs, token_logprobs
from .packing import Pack
from .rows import Layout
from .tree_attention import NAME, AttentionTensors, attending_over_trees


@dataclass(frozen=True)
class Head:
    """How logits are had from a model. `plain`: they are exactly the output embedding applied to the decoder's last hidden
    state, so that log-probs can be made in chunks; otherwise (scaling, soft-capping, an unusual head) the model's own
    forward makes them in full. `reason` says why not plain."""

    plain: bool
    reason: str | None = None

    @classmethod
    def of(cls, model: nn.Module) -> Head:
        """Find out by comparing both ways on four tokens."""
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
        if not hasattr(model, "get_decoder") or type(head) is not nn.Linear:
            return cls(False, "its head is not one linear layer")
        device, training = next(model.parameters()).device, model.training
        ids = torch.arange(4, device=device).remainder(head.out_features)[None]
        model.eval()
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
            ours = head(model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state)  # type: ignore[operator]
        model.train(training)
        if logits.shape != ours.shape or not torch.allclose(logits.float(), ours.float(), rtol=1e-4, atol=1e-4):
            return cls(False, "it changes its logits after the head")
        return cls(True)


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Mixed precision; `dtype` None: none. Without torch's cache of cast weights, which would keep a copy of all of them to the end of
    the pass: each is used once in it."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype, cache_enabled=False)


def recompute_layers(model: nn.Module) -> None:
    """Gradient checkpointing: in training, keep only the input of each layer and compute the rest again in the backward pass, which
    `forward_of` has to surround too.

    Raises:
        ValueError: the model cannot.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"{type(model).__name__} does not support gradient checkpointing; --update.gradient-checkpointing off trains it")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]


def forward_of(model: nn.Module, layout: Layout) -> AbstractContextManager[None]:
    """The context that forward and backward passes of a layout run in."""
    return attending_over_trees(model) if layout == "packed" else nullcontext()


def pack_logprobs(
    model: nn.Module,
    pack: Pack,
    head: Head,
    *,
    temperature: float,
    vocab_size: int | None,
    holes: Sequence[int] = (),
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs [trained] of the pack's targets and, on request, the entropies [trained] there.

    Packed sequences run under `forward_of`. Weights enter in the model's own precision (or the surrounding autocast's);
    log-probs are float32 at least.
    """
    device = next(model.parameters()).device
    inputs: dict[str, Any] = {
        "input_ids": torch.as_tensor(pack.ids, device=device),
        "position_ids": torch.as_tensor(pack.positions, device=device),
        "use_cache": False,
    }
    if pack.attention is not None:
        inputs[NAME] = AttentionTensors(pack.attention, device)
    source, targets = torch.as_tensor(pack.source, device=device), torch.as_tensor(pack.target_ids, device=device)
    if not head.plain:
        logits = model(**inputs).logits.flatten(0, 1)[source]
        return logits_logprobs(logits, targets, temperature=temperature, vocab_size=vocab_size, holes=holes, entropy=entropy)
    hidden = model.get_decoder()(**inputs).last_hidden_state  # type: ignore[operator]
    output = model.get_output_embeddings()  # type: ignore[operator]
    return token_logprobs(
        hidden.flatten(0, 1)[source],
        output.weight,
        targets,
        bias=output.bias,
        temperature=temperature,
        vocab_size=vocab_size,
        holes=holes,
        entropy=entropy,
    )

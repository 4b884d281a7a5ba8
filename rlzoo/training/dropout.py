"""The policy computes in training what it computes in evaluation: whatever drops or shakes values in training only is off.

The sampler has no dropout, and a ratio of probabilities under two different draws of it is noise: gpt2's default of 0.1 alone makes
the KL between sampler and trainer 0.2 to 0.4. Probabilities are set to 0 rather than the model to eval mode, because transformers
checkpoints gradients in training mode only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

WORDS = ("drop", "jitter", "noise")  # in the names of such probabilities, whether a module or a functional call reads them
SLACK = 1e-4  # of log-probs in training mode against evaluation mode; dropout of 0.01 makes a hundred times that


def switch_off_dropout(model: Any) -> str | None:
    """Set every probability of dropout, layer dropping and router noise in `model` and its config to 0, in place; a sentence about what
    there was, None where there was nothing.

    Raises:
        ValueError: the model still computes other log-probs in training mode than in evaluation mode.
    """
    found: dict[str, float] = {}
    for owner in (*model.modules(), *_configs(model)):
        for name, value in [*vars(owner).items()]:
            if _is_rate(owner, name, value):
                found[name if name != "p" else "dropout"] = max(value, found.get(name, 0.0))
                setattr(owner, name, 0.0)
    if (gap := _gap(model)) > SLACK:
        raise ValueError(
            f"the model's log-probs in training mode differ from those in evaluation mode by up to {gap:.2g}, with every dropout that is "
            "known switched off; it cannot be trained on what it samples"
        )
    if not found:
        return None
    rates = ", ".join(f"{name} {rate:g}" for name, rate in sorted(found.items()))
    return f"dropout is switched off in training, so that the policy is what the engine samples from ({rates})"


def _is_rate(owner: Any, name: str, value: Any) -> bool:
    named = any(word in name.lower() for word in WORDS) or (name == "p" and isinstance(owner, nn.modules.dropout._DropoutNd))
    return named and isinstance(value, float) and value > 0


def _configs(model: Any) -> Iterator[Any]:
    """Every config that a module holds, each once: some read their rates from there in each pass."""
    seen: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "to_dict"):
            seen.setdefault(id(config), config)
    return iter(seen.values())


@torch.no_grad()
def _gap(model: Any) -> float:
    """Largest difference of log-probs between evaluation mode and three passes in training mode, on 2 x 16 ids."""
    training, device = model.training, next(model.parameters()).device
    ids = torch.arange(32, device=device).remainder(model.get_input_embeddings().num_embeddings).reshape(2, 16)

    def logprobs() -> torch.Tensor:
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
        return found

    try:
        model.eval()
        expected = logprobs()
        model.train()
        return max(float((logprobs() - expected).abs().max()) for _ in range(3))
    finally:
        model.train(training)

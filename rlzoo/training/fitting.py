"""From a run's options to what it asks of a GPU, and whether its updates have to recompute activations there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import RunConfig
from .memory import Estimate, Load, ModelShape, estimate

BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
ROOM = 0.92  # of a GPU's memory for what is estimated; the rest for CUDA's context, workspaces and fragments
PROMPT_TOKENS = 1024  # where nothing says how long prompts are
CONTEXT_TOKENS = 1 << 15  # where the model does not say how long it can be


def load_of(config: RunConfig, model: Any, *, checkpointing: bool, engine_share: float = 0.0, longest_path: int | None = None) -> Load:
    """What a run asks of a GPU, at its limits: the longest prompts and responses, full packs. `model`: a transformers config or the
    mapping of a config.json; `longest_path`: tokens of the longest prompt and response, where they are known."""
    sampler, engine = config.algorithm.sampler, BYTES[config.backend.dtype]
    states = model.get("max_position_embeddings") if isinstance(model, Mapping) else getattr(model, "max_position_embeddings", None)
    limit = config.backend.max_context or int(states or CONTEXT_TOKENS)
    prompt = config.max_prompt_tokens or PROMPT_TOKENS
    path = longest_path or min(limit, prompt + sampler.max_response_tokens)
    return Load(
        master=BYTES[config.master_dtype],
        compute=BYTES[config.trainer_dtype],
        engine=engine,
        pack=max(config.update.token_budget, path),
        path=path,
        block=max(1, sampler.max_response_tokens // max(1, sampler.max_depth)),
        eval_path=min(limit, path - sampler.max_response_tokens + config.evaluation.max_response_tokens),
        capacity=config.backend.capacity,
        reference="ref_logprobs" in config.algorithm.loss.needs,
        checkpointing=checkpointing,
        engine_share=engine_share,
        sleeps=config.backend.sleep,
    )


def estimate_both(
    config: RunConfig, model: Any, gpu_bytes: int, engine_share: float = 0.0, longest_path: int | None = None
) -> tuple[bool, dict[bool, Estimate]]:
    """Whether updates recompute activations on a GPU of `gpu_bytes`, and the estimates without and with that; arguments as `load_of`.

    Raises:
        ValueError: the model's config does not say what the estimate needs.
    """
    shape, made = ModelShape.of(model), {}
    for on in (False, True):
        load = load_of(config, model, checkpointing=on, engine_share=engine_share, longest_path=longest_path)
        made[on] = estimate(shape, load, gpu_bytes)
    wanted = config.update.gradient_checkpointing
    return (made[False].phases["update"] > ROOM * gpu_bytes if wanted == "auto" else wanted == "on"), made


def recomputes(config: RunConfig, model: Any, longest_path: int) -> bool:
    """Whether the updates of `model`, where it is, recompute activations: as configured, or as the estimate says of its GPU."""
    from ..backends.memory import device_bytes
    from ..backends.select import choose

    device = next(model.parameters()).device
    total = device_bytes(device)
    if config.update.gradient_checkpointing != "auto" or total is None:
        return config.update.gradient_checkpointing == "on"
    if not getattr(model, "supports_gradient_checkpointing", False):
        return False
    share = config.backend.memory if choose(config.backend, str(device)) == "vllm" else 0.0
    try:
        return estimate_both(config, model.config, total, share, longest_path)[0]
    except ValueError:  # a model that the estimate does not know; running out of memory still halves the packs
        return False

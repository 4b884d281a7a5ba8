"""From a run's options to what it asks of a GPU, and whether its updates have to recompute activations there."""

from __future__ import annotations

from typing import Any

from ..config import RunConfig
from .memory import Estimate, Load, ModelShape, estimate

BYTES = {"bfloat16": 2, "float32": 4, "float64": 8}
ROOM = 0.92  # of a GPU's memory for what is estimated; the rest for CUDA's context, workspaces and fragments


def load_of(config: RunConfig, max_context: int, *, checkpointing: bool, engine_share: float = 0.0) -> Load:
    """What a run asks of a GPU, at its limits: the longest prompts and responses, full packs. `max_context`: of the model."""
    sampler, engine = config.algorithm.sampler, BYTES[config.backend.dtype]
    master = max(4, engine)  # weights that small updates are not rounded away from
    limit = min(config.backend.max_context or max_context, max_context)
    prompt = config.max_prompt_tokens or max(1, limit - sampler.max_response_tokens)
    segments = max(1, sampler.max_depth)
    return Load(
        master=master,
        compute=2 if config.update.autocast else engine,
        engine=engine,
        pack=max(config.update.token_budget, path := min(limit, prompt + sampler.max_response_tokens)),
        path=path,
        block=max(1, sampler.max_response_tokens // segments),
        eval_path=min(limit, prompt + config.evaluation.max_response_tokens),
        capacity=config.backend.capacity,
        reference="ref_logprobs" in config.algorithm.loss.needs,
        checkpointing=checkpointing,
        engine_share=engine_share,
        sleeps=config.backend.sleep,
    )


def estimate_both(config: RunConfig, model_config: Any, gpu_bytes: int, engine_share: float = 0.0) -> tuple[bool, dict[bool, Estimate]]:
    """Whether updates recompute activations on a GPU of `gpu_bytes`, and the estimates without and with that.

    Raises:
        ValueError: the model's config does not say what the estimate needs.
    """
    get = model_config.get if isinstance(model_config, dict) else lambda name, default=None: getattr(model_config, name, default)
    shape, context = ModelShape.of(model_config), int(get("max_position_embeddings") or 1 << 15)
    made = {on: estimate(shape, load_of(config, context, checkpointing=on, engine_share=engine_share), gpu_bytes) for on in (False, True)}
    wanted = config.update.gradient_checkpointing
    return (made[False].phases["update"] > ROOM * gpu_bytes if wanted == "auto" else wanted == "on"), made


def recomputes(config: RunConfig, model: Any) -> bool:
    """Whether the updates of `model`, where it is, recompute activations: as configured, or as the estimate says of its GPU."""
    from ..backends.memory import device_bytes

    total = device_bytes(next(model.parameters()).device)
    if config.update.gradient_checkpointing != "auto" or total is None:
        return config.update.gradient_checkpointing == "on"
    if not getattr(model, "supports_gradient_checkpointing", False):
        return False
    try:
        return estimate_both(config, model.config, total)[0]
    except ValueError:  # a model that the estimate does not know; running out of memory still halves the packs
        return False

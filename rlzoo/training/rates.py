"""A learning rate that was chosen for the embedded model is refused for a real one."""

from __future__ import annotations

from .. import registry
from ..algorithm import Algorithm
from ..config import RunConfig, presets, read_preset
from .models import count_parameters

EMBEDDED_PARAMETERS = 20_000_000
"""Largest model that an algorithm's own learning rate, tuned on the embedded model of under a million parameters, is taken for."""


def refuse_embedded_rate(config: RunConfig) -> None:
    """Nobody gave a learning rate (no preset, file, flag or table: `RunConfig.given`), so it is the algorithm's default, tuned on the
    embedded model: that is a mistake for a larger model, which it would wreck without an error.

    Raises:
        ValueError: the model has more than EMBEDDED_PARAMETERS parameters; names the presets.
    """
    if "optim.lr" in config.given or config.algo not in registry.names("algorithm"):
        return
    algorithm: Algorithm = registry.find("algorithm", config.algo)
    if config.algorithm.optim.lr != algorithm.optim.lr:  # made in Python
        return
    size = count_parameters(config.model)
    if size is None or size <= EMBEDDED_PARAMETERS:
        return
    fitting = [name for name in presets() if read_preset(name).get("algo") == config.algo] or presets()
    raise ValueError(
        f"model {config.model!r} has {size / 1e6:,.0f} million parameters, and optim.lr = {config.algorithm.optim.lr:g} is what "
        f"{config.algo} takes for the embedded model of 0.8 million: use --preset {' or --preset '.join(fitting)}, or give a rate, "
        "such as --optim.lr 1e-6"
    )

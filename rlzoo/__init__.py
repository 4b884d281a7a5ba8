"""Reinforcement learning of reasoning models with tree-structured rollouts.

`rlzoo.run(config)` trains, `rlzoo.build(layers, choice)` makes the config, `rlzoo.load(name)` is an algorithm. Importing this
package loads no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .algorithm import Algorithm, load
from .config import RunConfig, build
from .tree import Segment, Stop, Tree

if TYPE_CHECKING:
    from .training.loop import Run


def run(config: RunConfig, *, out: Path | None = None, resume: bool = False) -> Run:
    """Train as configured; see `rlzoo.training.loop.run`."""
    from .training.loop import run as train

    return train(config, out=out, resume=resume)


__all__ = ["Algorithm", "RunConfig", "Segment", "Stop", "Tree", "build", "load", "run"]

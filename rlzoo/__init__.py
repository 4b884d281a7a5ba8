"""Reinforcement learning of reasoning models with tree-structured rollouts.

`rlzoo.run(config)` trains, `rlzoo.build(layers, choice)` makes the config, `rlzoo.load(name)` is an algorithm;
`rlzoo.evaluate(rlzoo.EvalConfig("tiny"))` measures a model. Importing this package loads no torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .algorithm import Algorithm, load
from .config import RunConfig, build
from .evaluation.options import EvalConfig
from .tree import Segment, Stop, Tree

if TYPE_CHECKING:
    from .evaluation.job import Evaluation
    from .training.loop import Run


def run(config: RunConfig, *, out: Path | None = None, resume: bool = False) -> Run:
    """Train as configured; see `rlzoo.training.loop.run`."""
    from .training.loop import run as train

    return train(config, out=out, resume=resume)


def evaluate(config: EvalConfig, *, out: Path | None = None, resume: bool = False) -> Evaluation:
    """Measure a model on a suite; see `rlzoo.evaluation.job.run_eval`."""
    from .evaluation.job import run_eval

    return run_eval(config, out=out, resume=resume)


__all__ = ["Algorithm", "EvalConfig", "RunConfig", "Segment", "Stop", "Tree", "build", "evaluate", "load", "run"]

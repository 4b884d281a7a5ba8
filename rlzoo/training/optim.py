"""AdamW, and its learning rate over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from ..options import CountOrOff, NotNegative, Options, Positive, Within

if TYPE_CHECKING:
    import torch
    from torch import nn

Schedule = Literal["constant", "linear", "cosine"]
Beta = Annotated[float, Within(0, 1, below=True)]


@dataclass(frozen=True)
class Optim(Options):
    """Options of the optimiser. `warmup_steps` and the schedule count the run's optimiser steps as planned (one that is skipped, because
    nothing could be trained, counts too); the rate rises linearly over the warm-up (step 1 already moves) and then stays, or falls to 0 at
    the last step linearly or by a half cosine.

    Raises:
        ValueError: an option is out of range.
    """

    section: ClassVar[str] = "optim"

    lr: Annotated[float, Within(1e-12, 10)] = 1e-4
    weight_decay: NotNegative = 0.0
    beta1: Beta = 0.9
    beta2: Beta = 0.999
    warmup_steps: CountOrOff = 0
    max_grad_norm: Positive | None = 1.0
    schedule: Schedule = "constant"

    def rate(self, step: int, total_steps: int) -> float:
        """The learning rate of optimiser step `step` (from 0) of `total_steps`."""
        return self.lr * self.factor(step, total_steps)

    def factor(self, step: int, total_steps: int) -> float:
        """What lr is multiplied by there."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        return 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, optim: Optim) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; no weight decay on norms and biases (parameters of one dimension). On a GPU in one kernel,
    which needs no memory beside the moments."""
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": optim.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = True if all(p.is_cuda for p in trainable) else None
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=optim.lr, betas=(optim.beta1, optim.beta2), fused=fused)


def allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """Make the moments that AdamW would make in its first step, so that memory runs out before a step and not in it. Other optimisers
    are left alone.

    Raises:
        torch.OutOfMemoryError or RuntimeError: no memory for them; those that were made stay.
    """
    import torch

    if not isinstance(optimizer, torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        for p in (p for p in group["params"] if p.requires_grad and not optimizer.state[p]):
            moments = {name: torch.zeros_like(p, memory_format=torch.preserve_format) for name in ("exp_avg", "exp_avg_sq")}
            step = torch.zeros((), device=p.device) if group["fused"] else torch.tensor(0.0)
            optimizer.state[p] = {"step": step, **moments}

"""AdamW, and its learning rate over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch
    from torch import nn

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Optim:
    """Options of the optimiser. `warmup_steps` and the schedule count the run's optimiser steps as planned (one that is skipped, because
    nothing could be trained, counts too); the rate rises linearly over the warm-up (step 1 already moves) and then stays, or falls to 0 at
    the last step linearly or by a half cosine.

    Raises:
        ValueError: an option is out of range.
    """

    lr: float = 1e-4
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    warmup_steps: int = 0
    max_grad_norm: float | None = 1.0
    schedule: Schedule = "constant"

    def __post_init__(self) -> None:
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"lr is {self.lr}; it must be a finite number greater than 0")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ValueError(f"weight_decay is {self.weight_decay}; it must be a finite number, 0 or more")
        for key, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise ValueError(f"{key} is {beta}; it must lie between 0 and 1, 1 excluded")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}; it must be 0 or more")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}; it must be greater than 0, or left out")
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"schedule is {self.schedule!r}; allowed are {', '.join(get_args(Schedule))}")

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

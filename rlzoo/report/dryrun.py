"""`rlzoo run --dry-run`: what a run would need of a GPU, said before anything is made."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..config import RunConfig
from ..training.fitting import ROOM, estimate_both, load_of
from ..training.memory import Estimate, Load, ModelShape
from ..training.models import resolve
from .grid import Grid
from .text import count

FLOPS_SHARE, BANDWIDTH_SHARE = 0.4, 0.6  # of a GPU's peak that training and decoding reach; assumed, not measured
SMALLEST_PACK = 1024  # tokens; a smaller budget is not proposed


@dataclass(frozen=True)
class Gpu:
    """Memory in GB (10^9 bytes), dense bfloat16 rate in Tflop/s, memory bandwidth in TB/s. By default those of an A100 with 80 GB."""

    memory: float = 80.0
    tflops: float = 312.0
    bandwidth: float = 2.0

    def __post_init__(self) -> None:
        for name in ("memory", "tflops", "bandwidth"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"--gpu-{name} is {getattr(self, name)}; it must be a positive number")


def dry_run(argv: Sequence[str], parse: Callable[[Sequence[str]], tuple[RunConfig, Any, bool]], console: Console | None = None) -> int:
    """Print the estimate of a `run` command line (with --dry-run, perhaps --gpu-memory GB, --gpu-tflops, --gpu-bandwidth TB/s).

    Raises:
        ValueError: bad option, or a model whose config cannot be had or is not one that the estimate knows.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--dry-run", action="store_true")
    for name in ("memory", "tflops", "bandwidth"):
        first.add_argument(f"--gpu-{name}", type=float, default=getattr(Gpu, name))
    try:
        chosen, rest = first.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    gpu = Gpu(chosen.gpu_memory, chosen.gpu_tflops, chosen.gpu_bandwidth)
    config = parse(rest)[0]
    for grid in describe(config, read_config(config.model), gpu):
        grid.print(console)
        print(file=(console or Console()).file)
    return 0


def read_config(model: str) -> dict[str, Any]:
    """The config.json of a local folder (its weights may be missing), or of a model of the hub.

    Raises:
        ValueError: there is none.
    """
    folder = Path(resolve(model))
    try:
        if folder.is_dir():
            text = (folder / "config.json").read_text(encoding="utf-8")
        else:
            from huggingface_hub import hf_hub_download

            with tempfile.TemporaryDirectory() as place:
                text = Path(hf_hub_download(model, "config.json", local_dir=place)).read_text(encoding="utf-8")
        found = json.loads(text)
    except Exception as error:  # of many kinds: files, hub, network, JSON
        raise ValueError(
            f"model {model!r}: no config.json to estimate from ({type(error).__name__}); a local folder with one will do"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"model {model!r}: its config.json is not a table of options")
    return found


def describe(config: RunConfig, model: dict[str, Any], gpu: Gpu) -> list[Grid]:
    """Tables of pieces and of phases, with the verdict below the second.

    Raises:
        ValueError: a model that the estimate does not know.
    """
    total = int(gpu.memory * 1e9)
    share = config.backend.memory if config.backend.kind == "vllm" else 0.0
    on, both = estimate_both(config, model, total, share)
    shape = ModelShape.of(model)
    load = load_of(config, model, checkpointing=on, engine_share=share)
    names = [name for name in both[False].pieces if both[False].pieces[name] or both[True].pieces[name]]
    pieces = [[name, *(_gb(both[how].pieces[name]) for how in (False, True))] for name in names]
    phases = [[name, *(_gb(both[how].phases[name]) for how in (False, True))] for name in both[False].phases]
    what = f"{config.model}: {count(shape.weights)} weights; at most {load.path} tokens per path, packs of {load.pack}"
    notes = [
        f"prompts of at most {load.path - config.algorithm.sampler.max_response_tokens} tokens are assumed"
        + ("" if config.max_prompt_tokens else " (--max-prompt-tokens says how many)"),
        f"updates {'use' if on else 'do not use'} gradient checkpointing (update.gradient_checkpointing = "
        f"{config.update.gradient_checkpointing})",
        *_speed(config, shape, load, both[on], gpu),
    ]
    if both[on].peak <= total and both[on].capacity < config.backend.capacity:
        notes.append(f"the engine decodes {both[on].capacity} paths at once instead of {config.backend.capacity}: its cache must fit")
    notes.append(verdict(config, model, both[on], gpu, share))
    title = f"Largest phase on a GPU of {gpu.memory:g} GB"
    head = ["activations kept", "with gradient checkpointing"]
    return [Grid("Memory in GB", ["piece, GB", *head], pieces, [what]), Grid(title, ["most in a phase, GB", *head], phases, notes)]


def verdict(config: RunConfig, model: dict[str, Any], made: Estimate, gpu: Gpu, share: float = 0.0) -> str:
    """One sentence: whether the run fits, and what to change if not."""
    total = int(gpu.memory * 1e9)
    phase = max(made.phases, key=lambda name: made.phases[name])
    needs = f"{phase} needs {_gb(made.peak)} of {gpu.memory:g} GB"
    if made.peak <= ROOM * total:
        return f"it fits: {needs}"
    budget = config.update.token_budget
    while budget // 2 >= SMALLEST_PACK:
        budget //= 2
        smaller = replace(config, update=replace(config.update, token_budget=budget, gradient_checkpointing="on"))
        if estimate_both(smaller, model, total, share)[1][True].peak <= ROOM * total:
            return f"it does not fit: {needs}; --update.token-budget {budget} --update.gradient-checkpointing on would"
    state = sum(size for name, size in made.pieces.items() if name.startswith("trainer:"))
    return (
        f"it does not fit: {needs}, of which weights, gradients and moments take {_gb(state)}; "
        f"it needs a smaller model or a GPU of {made.peak / ROOM / 1e9:.0f} GB"
    )


def _speed(config: RunConfig, shape: ModelShape, load: Load, made: Estimate, gpu: Gpu) -> list[str]:
    """Tokens and, of a run that fits, seconds of a step whose trees are all full."""
    sampler, schedule = config.algorithm.sampler, config.algorithm.schedule
    per_tree = getattr(sampler, "full_tree_tokens", sampler.leaves_per_tree * sampler.max_response_tokens)
    sampled = schedule.problems_per_step * per_tree
    tokens = f"a step samples at most {count(sampled)} tokens ({schedule.problems_per_step} trees of {count(per_tree)})"
    if made.peak > gpu.memory * 1e9:
        return [tokens]
    rows = max(1, min(made.capacity, schedule.problems_per_step * sampler.leaves_per_tree))
    used = shape.weights - (0 if shape.tied else shape.table)  # the embedding is looked up
    rate, bandwidth = FLOPS_SHARE * gpu.tflops * 1e12, BANDWIDTH_SHARE * gpu.bandwidth * 1e12
    read = load.engine * used + rows * load.path / 2 * shape.cache_bytes(load.engine)
    decoding = sampled / rows * max(read / bandwidth, 2 * used * rows / rate)
    trained = sampled + schedule.problems_per_step * (load.path - sampler.max_response_tokens)
    per_token = used + shape.layers * shape.heads * shape.head_dim * load.path  # multiply-adds: matrices, attention in the mean
    passes = schedule.epochs * (4 if load.checkpointing else 3) + load.reference + config.corrections.scored
    training = trained * 2 * per_token * passes / rate
    return [
        f"{tokens} and takes about {decoding:.3g} s of sampling and {training:.3g} s of training",
        f"times are arithmetic, not measured: {FLOPS_SHARE:.0%} of {gpu.tflops:g} Tflop/s, {BANDWIDTH_SHARE:.0%} of "
        f"{gpu.bandwidth:g} TB/s; grading and the engine's own overhead are left out",
    ]


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g}" if size < 1e12 else f"{size / 1e9:.0f}"

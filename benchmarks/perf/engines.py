"""Both engines on the rollouts of every algorithm, and a trace of vLLM: is a row ever empty while a prompt waits?

    python -m rlzoo.benchmarks.perf.engines --out results/perf/engines.jsonl

Each registered algorithm's sampler, with its defaults, grows trees for the same problems of the embedded task on the torch engine
and on vLLM, in turn, after a warm-up. A row has, per engine, distinct sampled tokens per second of processor time (this process and
all its threads, medians over the repeats), and of vLLM's last repeat:

- `busy`: the least number of running requests over all steps at which a prompt had not been begun, over the capacity;
- `mixed`: share of steps whose batch holds segments of several depths at once;
- `cached_share`: context tokens found in the prefix cache, of all context tokens that segments were submitted with;
- `active`: running requests at each step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro

from rlzoo import registry
from rlzoo.algorithm import Algorithm
from rlzoo.backends.protocol import Backend, SegmentRequest, TraceRow
from rlzoo.backends.torch import TorchBackend
from rlzoo.backends.vllm import VllmBackend, installed
from rlzoo.data.loading import load_problems
from rlzoo.data.templates import render
from rlzoo.sampling.base import Sampler
from rlzoo.sampling.grow import Prompt, grow
from rlzoo.training.models import load_model

from .recording import provenance, record


@dataclass(frozen=True)
class Options:
    """What to sample."""

    out: Path | None = None
    """Append the rows to this file."""
    model: str = "tiny"
    problems: str = "arithmetic:train"
    count: int = 96
    """Problems."""
    capacity: int = 256
    repeats: int = 3
    threads: int = 1


class Levels:
    """Which depth every request of a backend has, and which prompt those of depth 1 continue, noted as they are submitted."""

    def __init__(self, backend: Backend) -> None:
        self.depth: dict[int, int] = {}
        self.prompt: dict[int, int] = {}
        self.context_tokens = 0
        self._submit = backend.submit
        backend.submit = self  # type: ignore[method-assign, assignment]

    def __call__(self, requests: Sequence[SegmentRequest]) -> None:
        for request in requests:
            self.depth[request.id] = 1 + self.depth.get(request.parent, 0)
            if request.parent not in self.depth:
                self.prompt[request.id] = request.parent
            self.context_tokens += len(request.context)
        self._submit(requests)


def occupancy(trace: Sequence[TraceRow], levels: Levels, capacity: int) -> dict[str, Any]:
    """`busy`, `mixed` and `active` of a trace; see the module."""
    running: set[int] = set()
    unbegun = set(levels.prompt.values())
    least, mixed = capacity, 0
    for row in trace:
        running.update(row.admitted)
        unbegun.difference_update(levels.prompt[r] for r in row.admitted if r in levels.prompt)
        mixed += len({levels.depth[request] for request in running}) > 1
        if unbegun:
            least = min(least, row.active)
        running.difference_update(row.finished)
    return {"busy": least / capacity, "mixed": round(mixed / max(1, len(trace)), 3), "active": [row.active for row in trace]}


def measure(backend: Backend, sampler: Sampler, prompts: Sequence[Prompt], seed: int) -> dict[str, float]:
    """One pass: distinct sampled tokens, and their number per second of processor time and of wall time."""
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = sum(tree.sampled_tokens for tree in grow(sampler, backend, prompts, seed=seed))
    return {"tokens": tokens, "per_cpu_s": tokens / (time.process_time() - cpu), "per_s": tokens / (time.perf_counter() - wall)}


def main(options: Options) -> None:
    """Write one row per algorithm.

    Raises:
        ValueError: vLLM is not installed, or there is no such model or problem set.
    """
    torch.set_num_threads(options.threads)
    origin = provenance() | {"vllm": installed()}
    loaded = load_model(options.model, dtype="float32", device="cpu")
    problems = load_problems(options.problems, limit=options.count)
    prompts = [Prompt(p.id, render("plain", p, loaded.tokenizer)) for p in problems]
    engines: dict[str, Backend] = {
        "torch": TorchBackend(loaded.model, loaded.tokenizer, capacity=options.capacity),
        "vllm": VllmBackend(loaded.model, loaded.tokenizer, capacity=options.capacity, trace=True),
    }
    for name in registry.names("algorithm"):
        algorithm: Algorithm = registry.find("algorithm", name)
        record({"benchmark": "engines", "algo": name, **row(engines, algorithm.sampler, prompts, options), **origin}, options.out)
    for engine in engines.values():
        engine.close()


def row(engines: dict[str, Backend], sampler: Sampler, prompts: Sequence[Prompt], options: Options) -> dict[str, Any]:
    """Figures of one sampler on all engines."""
    vllm = engines["vllm"]
    assert isinstance(vllm, VllmBackend) and vllm.trace is not None
    passes: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for seed in range(1 + options.repeats):  # the first warms up
        for name, engine in engines.items():
            if name == "vllm":
                vllm.trace.clear()
                vllm.load_weights(loaded_weights(engines), seed)  # an empty prefix cache, as after every update
                levels, before = Levels(vllm), vllm.stats()
            passes[name].append(measure(engine, sampler, prompts, seed))
            if name == "vllm":
                after = vllm.stats()
                del vllm.submit
    found: dict[str, Any] = {"count": len(prompts), "capacity": options.capacity, "repeats": options.repeats}
    for name, measured in passes.items():
        found |= {f"{name}_{key}": round(median(p[key] for p in measured[1:]), 1) for key in ("tokens", "per_cpu_s", "per_s")}
    found["ratio_cpu"] = round(found["vllm_per_cpu_s"] / found["torch_per_cpu_s"], 3)
    found["cached_share"] = round((after.cached_tokens - before.cached_tokens) / levels.context_tokens, 3)
    return found | occupancy(vllm.trace, levels, options.capacity)


def loaded_weights(engines: dict[str, Backend]) -> list[tuple[str, torch.Tensor]]:
    """The weights that all engines hold."""
    torch_engine = engines["torch"]
    assert isinstance(torch_engine, TorchBackend)
    return list(torch_engine.model.named_parameters())


if __name__ == "__main__":
    main(tyro.cli(Options))

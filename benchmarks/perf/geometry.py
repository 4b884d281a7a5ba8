"""What trees of segments save against independent chains: tokens, and processor time in the same run.

    python -m rlzoo.benchmarks.perf.geometry --out results/perf/geometry.jsonl

Every shape grows trees of `--width` paths, two starts and at most `depth` segments of limit / depth tokens (rounded up; chains
have the same limit). Tokens saved are counted against independent responses: 1 - tokens sampled / tokens of all paths, in three
ways: paths that all run to the limit (stop rules cannot fire: arithmetic alone, by a scripted engine), and the model's own
stopping with fallback off and on. Time is the processor time of the trees per path token against that of `--width` chains per
token, one thread, arms taken in turn, medians. Both count what a path holds, so that neither fewer paths (no fallback) nor
longer ones count as time saved.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from rlzoo.backends.protocol import Backend
from rlzoo.backends.scripted import ScriptedBackend
from rlzoo.backends.torch import TorchBackend
from rlzoo.data.loading import load_problems
from rlzoo.data.templates import render
from rlzoo.sampling.base import Sampler
from rlzoo.sampling.chains import Chains
from rlzoo.sampling.grow import Prompt, grow
from rlzoo.sampling.segments import Segments
from rlzoo.sampling.stopping import StopRules
from rlzoo.training.models import load_model
from rlzoo.tree import Tree

from .recording import provenance, record

SHAPES = [(4, 2), (5, 2), (6, 2), (7, 2), (14, 2), (28, 2), (14, 4), (14, 8)]  # (segments per path, branching)


@dataclass
class Arm:
    """One sampler, and what its repeats cost."""

    sampler: Sampler
    seconds: list[float] = field(default_factory=list)  # processor time
    unique: int = 0  # tokens sampled, all repeats
    unrolled: int = 0  # tokens of all paths
    leaves: int = 0
    trees: int = 0

    def run(self, backend: Backend, prompts: Sequence[Prompt], seed: int) -> None:
        begun = time.process_time()
        trees = grow(self.sampler, backend, prompts, seed=seed)
        self.seconds.append(time.process_time() - begun)
        self.count(trees)

    def count(self, trees: Sequence[Tree]) -> None:
        self.unique += sum(t.sampled_tokens for t in trees)
        self.unrolled += sum(t.unrolled_tokens for t in trees)
        self.leaves += sum(len(t.leaves) for t in trees)
        self.trees += len(trees)

    @property
    def token_share(self) -> float:
        """Share of the tokens of all paths that was not sampled."""
        return 1 - self.unique / self.unrolled


def full_length(sampler: Segments, tokenizer: Any) -> float:
    """Tokens saved where every path runs to the limit."""
    backend = ScriptedBackend(tokenizer, capacity=sampler.width, eos_ids=[])
    arm = Arm(replace(sampler, fallback="none", stopping=StopRules(boxed="off")))
    arm.count(grow(arm.sampler, backend, [Prompt("0", [1, 2, 3])], seed=0))
    if arm.unrolled != sampler.width * sampler.max_response_tokens:
        raise RuntimeError(f"a tree of {sampler.width} full paths has {arm.unrolled} path tokens")
    return arm.token_share


def opened(options: argparse.Namespace, template: str) -> tuple[TorchBackend, list[Prompt]]:
    """The torch engine and the rendered problems that the options name."""
    loaded = load_model(options.model, dtype="float32", device="cpu")
    problems = load_problems(options.problems, limit=options.count)
    prompts = [Prompt(p.id, render(template, p, loaded.tokenizer)) for p in problems]
    return TorchBackend(loaded.model, loaded.tokenizer, capacity=options.capacity), prompts


def measure(backend: Backend, prompts: Sequence[Prompt], samplers: dict[str, Sampler], repeats: int) -> dict[str, Arm]:
    """Run the arms in turn, the same seeds for each; a short first round warms up and is not counted."""
    arms = {name: Arm(sampler) for name, sampler in samplers.items()}
    for arm in arms.values():
        Arm(arm.sampler).run(backend, prompts[:8], seed=0)
    for seed in range(1, repeats + 1):
        for arm in arms.values():
            arm.run(backend, prompts, seed)
    return arms


def row_of(arm: Arm, chains: Arm) -> dict[str, Any]:
    """Figures of a tree arm against the chains of the same rounds; times are medians over rounds."""
    cost = median(arm.seconds) / (arm.unrolled / len(arm.seconds))
    reference = median(chains.seconds) / (chains.unrolled / len(chains.seconds))
    saved = 1 - cost / reference
    return {
        "token_share_saved": round(arm.token_share, 4),
        "time_share_saved": round(saved, 4),
        "time_over_token_share": round(saved / arm.token_share, 3),
        "cpu_s": round(median(arm.seconds), 3),
        "chains_cpu_s": round(median(chains.seconds), 3),
        "cpu_s_over_chains": round(median(arm.seconds) / median(chains.seconds), 3),
        "path_tokens": arm.unrolled // len(arm.seconds),
        "chains_path_tokens": chains.unrolled // len(chains.seconds),
        "unique_tokens": arm.unique // len(arm.seconds),
        "paths_per_tree": round(arm.leaves / arm.trees, 2),
        "mean_path_tokens": round(arm.unrolled / arm.leaves, 1),
        "chains_mean_path_tokens": round(chains.unrolled / chains.leaves, 1),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Write one row per shape and fallback."""
    parser = argparse.ArgumentParser(prog="python -m rlzoo.benchmarks.perf.geometry", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--template", default="plain")
    parser.add_argument("--problems", default="arithmetic:dev")
    parser.add_argument("--count", type=int, default=64, help="problems")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--limit", type=int, default=168, help="response limit, tokens")
    parser.add_argument("--capacity", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    origin = provenance()  # now: the checkout may change while this runs
    backend, prompts = opened(options, options.template)
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    for depth, branching in SHAPES:
        tokens = -(-options.limit // depth)
        tree = Segments(width=options.width, depth=depth, segment_tokens=tokens, branching=(branching,), initial=(2,))
        chains = Chains(group_size=options.width, max_response_tokens=depth * tokens)
        samplers: dict[str, Sampler] = {"chains": chains, "none": replace(tree, fallback="none"), "random": tree}
        arms = measure(backend, prompts, samplers, options.repeats)
        shape = {"benchmark": "geometry", "depth": depth, "branching": branching, "segment_tokens": tokens}
        shape["full_length_share_saved"] = round(full_length(tree, backend.tokenizer), 4)
        for fallback in ("none", "random"):
            record(shape | {"fallback": fallback} | row_of(arms[fallback], arms["chains"]) | settings | origin, options.out)


if __name__ == "__main__":
    main()

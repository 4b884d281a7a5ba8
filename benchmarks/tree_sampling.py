"""What growing trees does to cost, accuracy and length, with the model held still: segments against independent chains on dev.

    python -m rlzoo.benchmarks.tree_sampling --out results/tree_sampling/NAME [--model FOLDER] [--repeats N]

Every arm samples the same problems of the dev split with the same response limit through the same engine; nothing is trained.
`Pass@1` is the mean over problems of the share of right leaves; the differences to the chains are paired over problems (repeats
of a problem are averaged first). Where all paths are wanted alike, chains are the unbiased reference: a difference in Pass@1 or
length is the bias of the tree. Writes NAME.jsonl (one row per arm) and NAME.md (the table).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from rlzoo.backends.protocol import Backend
from rlzoo.backends.torch import TorchBackend
from rlzoo.data.loading import load_problems
from rlzoo.data.templates import render
from rlzoo.evaluation.stats import clustered_mean, paired_difference
from rlzoo.rewards.reward import Reward, open_reward
from rlzoo.sampling.base import Sampler
from rlzoo.sampling.chains import Chains
from rlzoo.sampling.grow import Prompt, grow
from rlzoo.sampling.segments import Segments
from rlzoo.sampling.stopping import StopRules
from rlzoo.store.environment import environment
from rlzoo.store.runs import to_json, write_aside
from rlzoo.training.collect import decode_leaves
from rlzoo.training.models import load_model
from rlzoo.tree import Float64, Stop, Tree


@dataclass(frozen=True)
class Options:
    """What to sample."""

    out: Path
    """Path of the result without ending."""
    model: str = "tiny"
    problems: str = "arithmetic:dev"
    count: int = 96
    """Problems used."""
    repeats: int = 4
    """Trees per problem and arm, with different seeds."""
    template: str = "plain"
    width: int = 16
    """Responses per problem of every arm."""
    depth: int = 8
    segment_tokens: int = 24
    threads: int = 1


def arms(options: Options) -> dict[str, Sampler]:
    """What is compared; the first is the reference."""
    tree = Segments(width=options.width, depth=options.depth, segment_tokens=options.segment_tokens)
    shorter = replace(tree, depth=2 * options.depth, segment_tokens=options.segment_tokens // 2)
    return {
        "chains": Chains(group_size=options.width, max_response_tokens=tree.max_response_tokens),
        "segments, 2 to 8 starts": tree,
        "2 starts": replace(tree, initial=(2,)),
        "2 starts, no fallback": replace(tree, initial=(2,), fallback="none"),
        "2 starts, restarts only": replace(tree, initial=(2,), fallback="from_start"),
        "2 starts, fallback from all": replace(tree, initial=(2,), fallback_from="random_all"),
        "2 starts, cut at least probable token": replace(tree, initial=(2,), fallback="min_logprob_token"),
        "2 to 8 starts, no fallback": replace(tree, fallback="none"),
        "2 to 8 starts, half the segment length": shorter,
        "2 to 8 starts, a box ends a path": replace(tree, stopping=StopRules(boxed="alone")),
        "2 to 8 starts, repetition first": replace(tree, stopping=StopRules(repetition="first")),
        "2 to 8 starts, low log-prob branches": replace(tree, split="segment_mean", split_favours="low"),
        "2 to 8 starts, high log-prob branches": replace(tree, split="segment_mean", split_favours="high"),
    }


@dataclass(frozen=True, slots=True)
class Measured:
    """An arm's trees: per problem Pass@1 and mean length [problems], and the totals of its row."""

    pass_at_1: Float64
    length: Float64
    row: dict[str, Any]


def measure(name: str, sampler: Sampler, backend: Backend, reward: Reward, problems: Sequence[Any], options: Options) -> Measured:
    """Sample and grade one arm."""
    prompts = [Prompt(p.id, render(options.template, p, backend.tokenizer)) for p in problems]
    begun = time.process_time()
    trees = [grow(sampler, backend, prompts, seed=seed) for seed in range(options.repeats)]
    cpu_s = time.process_time() - begun
    right, length = (np.full((options.repeats, len(problems)), np.nan) for _ in range(2))
    for seed, grown in enumerate(trees):
        tickets = [reward.submit([(p, text) for text in decode_leaves(t, backend.tokenizer)]) for p, t in zip(problems, grown, strict=True)]
        for i, (tree, ticket) in enumerate(zip(grown, tickets, strict=True)):
            right[seed, i] = np.nanmean([g.correct for g in reward.collect(ticket)])
            length[seed, i] = tree.response_lengths().mean()
    row = {"arm": name, "cpu_s": round(cpu_s, 2), **totals([t for grown in trees for t in grown])}
    return Measured(right.mean(axis=0), length.mean(axis=0), row)


def totals(trees: Sequence[Tree]) -> dict[str, float]:
    """Cost and fallback over all trees of an arm."""
    counts: Counter[str] = Counter()
    for tree in trees:
        counts.update(tree.meta["sampler"])
    leaves = sum(len(t.leaves) for t in trees)
    sampled = sum(t.sampled_tokens for t in trees)
    stops = np.concatenate([t.stop[t.leaves] for t in trees])
    cut = [int(s) for s in (Stop.LENGTH, Stop.DEPTH, Stop.REPETITION)]
    return {
        "leaves_per_tree": round(leaves / len(trees), 3),
        "sampled_tokens": sampled,
        "tokens_per_leaf": round(sampled / leaves, 2),
        "truncated": round(float(np.isin(stops, cut).mean()), 4),
        "trees_with_fallback": round(float(np.mean([t.meta["sampler"].get("fallback_rounds", 0) > 0 for t in trees])), 4),
        "leaves_started_by_fallback": round(counts["fallback_paths"] / leaves, 4),
        "restarts_of_fallbacks": round(counts["restarts"] / max(1, counts["fallback_paths"]), 4),
        "kept_share_of_path": round(counts["fallback_kept_tokens"] / max(1, counts["fallback_path_tokens"]), 4),
        "tokens_after_fallback": round(counts["fallback_tokens"] / sampled, 4),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a line per arm."""
    head = (
        "arm", "leaves", "tokens a leaf", "tokens saved", "Pass@1, %", "minus chains, points", "length", "minus chains", "cut off",
        "trees that fall back", "leaves by fallback", "restarts among them", "kept of the path", "tokens after it",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for r in rows:
        p, d, n = r["pass_at_1"], r["pass_at_1_difference"], r["length_difference"]
        cells = [
            r["arm"],
            f"{r['leaves_per_tree']:.1f}",
            f"{r['tokens_per_leaf']:.1f}",
            f"{r['tokens_saved']:.1%}",
            f"{100 * p['mean']:.1f} [{100 * p['low']:.1f}, {100 * p['high']:.1f}]",
            f"{100 * d['mean']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]" if d else "",
            f"{r['length']:.1f}",
            f"{n['mean']:+.1f} [{n['low']:+.1f}, {n['high']:+.1f}]" if n else "",
            f"{r['truncated']:.1%}",
        ]
        shares = (
            "trees_with_fallback",
            "leaves_started_by_fallback",
            "restarts_of_fallbacks",
            "kept_share_of_path",
            "tokens_after_fallback",
        )
        lines.append(f"| {' | '.join([*cells, *(f'{r[s]:.1%}' for s in shares)])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    options = tyro.cli(Options, prog="python -m rlzoo.benchmarks.tree_sampling", description=__doc__)
    torch.set_num_threads(options.threads)
    loaded = load_model(options.model, dtype="float32", device="cpu")
    problems = load_problems(options.problems, limit=options.count)
    backend, reward = TorchBackend(loaded.model, loaded.tokenizer), open_reward("math")
    rows: list[dict[str, Any]] = []
    reference: Measured | None = None
    options.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        for name, sampler in arms(options).items():
            measured = measure(name, sampler, backend, reward, problems, options)
            other = reference is not None
            reference = reference or measured
            row = measured.row | {
                "tokens_saved": round(1 - measured.row["tokens_per_leaf"] / reference.row["tokens_per_leaf"], 4),
                "pass_at_1": clustered_mean(measured.pass_at_1).as_dict(),
                "pass_at_1_difference": paired_difference(reference.pass_at_1, measured.pass_at_1).as_dict() if other else None,
                "length": round(float(measured.length.mean()), 2),
                "length_difference": paired_difference(reference.length, measured.length).as_dict() if other else None,
                "options": {k: v for k, v in vars(options).items() if k != "out"},
                "environment": environment(),
            }
            rows.append(row)
            print(f"{name}: {row['tokens_per_leaf']} tokens a leaf, Pass@1 {row['pass_at_1']['mean']:.1%}", flush=True)
            write_aside(options.out.with_suffix(".jsonl"), "".join(to_json(r) + "\n" for r in rows))
            write_aside(options.out.with_suffix(".md"), table(rows))
    finally:
        reward.close()
        backend.close()


if __name__ == "__main__":
    main()

"""Packed against unrolled updates: forward and backward of one mini-batch, one JSON row per shape.

    python -m rlzoo.benchmarks.perf.update --out results/perf/update.jsonl [--repeats N] [--trees N] [--autocast]

Shapes: 4-ary trees of three levels (24, 24 and 60 tokens, 64 leaves), and 16 independent chains of the same 108 tokens, below
a prompt of 32. Model: a random Qwen2 (hidden 128, 4 layers, 4 heads, 2 of them key/value, vocabulary 200), 0.8 M
parameters. Log-probs and rewards are random: only the work is measured. Times are medians of processor time over the repeats,
layouts taken in turn. The prediction: a forward and backward cost three times the forward's floating-point operations, those of
the linear layers for each token and of attention for each visible pair of tokens, at the rate that the unrolled layout of the
same run reaches; packed, each distinct token counts once. `over_predicted` is packed time measured over packed time predicted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlzoo.credit.base import Credit, path_rows
from rlzoo.losses.aggregate import aggregate
from rlzoo.losses.policy import PolicyLoss
from rlzoo.training.forward import Head
from rlzoo.training.packing import PackStats, pack
from rlzoo.training.rows import Layout
from rlzoo.training.update import ForwardOptions, gradients
from rlzoo.tree import Segment, Tree

from .recording import provenance, record

VOCAB = 200


def make_model() -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return Qwen2ForCausalLM(config)


def make_tree(rng: np.random.Generator, levels: list[tuple[int, int]], prompt: int, ragged: bool) -> Tree:
    """`levels`: (children per node, tokens per segment); `ragged` draws the last level's lengths from the upper half."""
    segments: list[Segment] = []
    above = [0]
    for depth, (width, length) in enumerate(levels):
        here = []
        for parent in above:
            for _ in range(width):
                size = int(rng.integers(length // 2, length + 1)) if ragged and depth == len(levels) - 1 else length
                segments.append(Segment(parent, rng.integers(0, VOCAB, size).tolist(), np.full(size, -5.0).tolist()))
                here.append(len(segments))
        above = here
    return Tree.from_segments(rng.integers(0, VOCAB, prompt).tolist(), segments)


def measure(
    trees: list[Tree], credits: list[Credit], repeats: int, token_budget: int, autocast: torch.dtype | None
) -> dict[Layout, tuple[float, float]]:
    """Median wall and processor seconds of one mini-batch's gradients per layout."""
    model, loss = make_model(), PolicyLoss()
    head = Head.of(model)
    weights, _ = aggregate(trees, credits, loss.aggregation)
    old = [t.logprobs for t in trees]
    seconds: dict[Layout, list[tuple[float, float]]] = {"packed": [], "unrolled": []}
    for repeat in range(repeats + 1):
        for layout, times in seconds.items():
            model.zero_grad(set_to_none=True)
            options = ForwardOptions(token_budget=token_budget, layout=layout, autocast_dtype=autocast)
            wall, cpu = time.perf_counter(), time.process_time()
            gradients(model, trees, weights, old, loss, options, head=head)
            if repeat:  # the first is a warm-up
                times.append((time.perf_counter() - wall, time.process_time() - cpu))
    return {layout: (median(w for w, _ in times), median(c for _, c in times)) for layout, times in seconds.items()}


SHAPES: dict[str, tuple[list[tuple[int, int]], bool]] = {
    "4-ary x 3, 24/24/60": ([(4, 24), (4, 24), (4, 60)], False),
    "4-ary x 3, 24/24/30-60": ([(4, 24), (4, 24), (4, 60)], True),
    "16 chains of 108": ([(16, 108)], False),
    "16 chains of 54-108": ([(16, 108)], True),
}


def flops(model: Any, tokens: int, heads: int, pairs: int) -> float:
    """Floating-point operations of a forward and backward: `tokens` through the layers, `heads` positions through the output
    matrix, `pairs` of visible (query, key)."""
    config = model.config
    linear: int = sum(m.weight.numel() for m in model.get_decoder().modules() if isinstance(m, torch.nn.Linear))
    output: int = model.get_output_embeddings().weight.numel()
    per_pair: int = 4 * config.num_hidden_layers * config.hidden_size  # all heads together
    return 3.0 * (2 * linear * tokens + 2 * output * heads + per_pair * pairs)


def row_of(trees: list[Tree], seconds: dict[Layout, tuple[float, float]], token_budget: int) -> dict[str, Any]:
    """The figures of one shape."""
    model, trained = make_model(), [np.arange(len(t.tokens)) >= t.lengths[0] for t in trees]
    stats: dict[Layout, PackStats] = {}
    work: dict[Layout, float] = {}
    for layout in seconds:
        packs, stats[layout] = pack(trees, trained, token_budget, layout=layout)
        tokens = stats[layout].unique if layout == "packed" else stats[layout].unrolled
        work[layout] = flops(model, tokens, sum(len(p.target) for p in packs), stats[layout].visible_pairs)
    (wall, cpu), (unrolled_wall, unrolled_cpu) = seconds["packed"], seconds["unrolled"]
    predicted = work["packed"] / work["unrolled"] * unrolled_cpu
    packed = stats["packed"]
    return {
        "packed_cpu_s": round(cpu, 4),
        "unrolled_cpu_s": round(unrolled_cpu, 4),
        "predicted_cpu_s": round(predicted, 4),
        "over_predicted": round(cpu / predicted, 3),
        "speedup": round(unrolled_cpu / cpu, 3),
        "token_ratio": round(packed.unrolled / packed.unique, 3),
        "unrolled_gflop_per_s": round(work["unrolled"] / unrolled_cpu / 1e9, 2),
        "packed_wall_s": round(wall, 4),
        "unrolled_wall_s": round(unrolled_wall, 4),
        "unique_tokens": packed.unique,
        "unrolled_tokens": packed.unrolled,
        "visible_pairs": packed.visible_pairs,
        "dense_pairs": packed.dense_pairs,
        "unrolled_visible_pairs": stats["unrolled"].visible_pairs,
        "packs": packed.packs,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Write one row per shape."""
    parser = argparse.ArgumentParser(prog="python -m rlzoo.benchmarks.perf.update", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trees", type=int, default=8)
    parser.add_argument("--token-budget", type=int, default=8192)
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    origin = provenance()  # now: the checkout may change while this runs
    for name, (levels, ragged) in SHAPES.items():
        rng = np.random.default_rng(0)
        trees = [make_tree(rng, levels, 32, ragged) for _ in range(args.trees)]
        credits = [path_rows(t, range(len(t.leaves)), rng.normal(size=len(t.leaves)).tolist()) for t in trees]
        seconds = measure(trees, credits, args.repeats, args.token_budget, torch.bfloat16 if args.autocast else None)
        settings = {"trees": args.trees, "repeats": args.repeats, "token_budget": args.token_budget, "autocast": args.autocast}
        row = {"benchmark": "update", "shape": name} | row_of(trees, seconds, args.token_budget)
        record(row | settings | origin, args.out)


if __name__ == "__main__":
    main()

"""What sampling whole answers and cutting them saves a full N-ary tree, against a request per segment.

    python -m rlzoo.benchmarks.perf.continuation --out results/perf/continuation.jsonl

Both forms grow the same trees in distribution, so the figures beside the time (segments, leaves, tokens per tree) show no more
than chance. Time is processor time per sampled token, one thread, arms taken in turn, medians over rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from rlzoo.sampling.nary import Nary

from .geometry import Arm, measure, opened
from .recording import provenance, record

SHAPES = [(4, (20, 20, 152)), (8, (20, 20, 152)), (2, (12, 12, 12, 12, 12, 132))]  # (branching, tokens per level)


def per_token(arm: Arm) -> float:
    """Processor time per sampled token, seconds."""
    return median(arm.seconds) / (arm.unique / len(arm.seconds))


def main(argv: Sequence[str] | None = None) -> None:
    """Write one row per shape."""
    parser = argparse.ArgumentParser(prog="python -m rlzoo.benchmarks.perf.continuation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="append the rows to this file")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--problems", default="arithmetic:dev")
    parser.add_argument("--count", type=int, default=16, help="problems")
    parser.add_argument("--capacity", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    origin = provenance()  # now: the checkout may change while this runs
    backend, prompts = opened(options, "plain")
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    for branching, tokens in SHAPES:
        forms = {on: Nary(branching=branching, segment_tokens=tokens, continuation=on) for on in (False, True)}
        arms = measure(backend, prompts, {str(on): sampler for on, sampler in forms.items()}, options.repeats)
        row = {"benchmark": "continuation", "branching": branching, "segment_tokens": list(tokens)}
        row["time_ratio"] = round(per_token(arms["True"]) / per_token(arms["False"]), 3)
        for name, arm in (("segments", arms["False"]), ("answers", arms["True"])):
            row |= {f"{name}_us_per_token": round(1e6 * per_token(arm), 2), f"{name}_leaves": round(arm.leaves / arm.trees, 1)}
            row[f"{name}_tokens"] = round(arm.unique / arm.trees, 1)
        record(row | settings | origin, options.out)


if __name__ == "__main__":
    main()

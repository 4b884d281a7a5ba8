"""Grading speed with a cold cache: `python -m rlzoo.benchmarks.perf.grader [--workers 2] [--pairs 2000]`.

Prints one JSON row: verdicts per second for plain numbers (with the fast path, and forced through the workers) and for LaTeX
expressions, the workers' start-up time, and the delay that one hanging answer adds to a batch. Every pair is distinct.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Sequence
from typing import Any

from rlzoo.rewards.math import Grader, GraderConfig, Kind, grader_version

HANG = ("2", "so \\boxed{9^{9^{9^{9}}}}")


def plain_pairs(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """Distinct pairs of plain numbers, half of them equal."""
    rng = random.Random(seed)
    pairs = []
    for i in range(n):
        gold = f"{i}.{rng.randrange(10, 100)}" if i % 3 == 0 else str(i + 7)
        pairs.append((gold, f"steps … \\boxed{{{gold if rng.random() < 0.5 else rng.randrange(10**6)}}}"))
    return pairs


def latex_pairs(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """Distinct pairs of LaTeX expressions of the kinds found in MATH, half of them equal (written differently)."""
    rng = random.Random(seed)
    pairs = []
    for i in range(n):
        a, b, wrong = i + 2, rng.randrange(2, 60), int(rng.random() < 0.5)
        c = b + wrong
        pairs.append(
            (
                (f"\\frac{{{a}\\sqrt{{3}}}}{{{b}}}", f"\\frac{{{a}}}{{{c}}}\\sqrt{{3}}"),
                (f"{a}x^2-{b}x+1", f"1-{c}x+{a}x^{{2}}"),
                (f"\\left({a},-\\frac{{1}}{{{b}}}\\right)", f"({a}, -1/{c})"),
                (f"[-{a},{b})", f"\\left[-{a}, {c}\\right)"),
                (f"\\begin{{pmatrix}} {a} \\\\ {b} \\end{{pmatrix}}", f"\\begin{{pmatrix}} {a} \\\\ {c} \\end{{pmatrix}}"),
                (f"{a}+{b}i", f"{c}i + {a}"),
                (f"{a}\\pi", f"\\pi \\cdot {a + wrong}"),
                (f"y = {a}x + {b}", f"y={c}+{a}x"),
            )[i % 8]
        )
    return [(gold, f"steps … so the answer is $\\boxed{{{answer}}}$.") for gold, answer in pairs]


def rate(grader: Grader, pairs: Sequence[tuple[str, str]]) -> float:
    """Verdicts per second.

    Raises:
        RuntimeError: a verdict failed; then the rate means nothing.
    """
    started = time.perf_counter()
    verdicts = grader.grade(pairs)
    seconds = time.perf_counter() - started
    failed = [v for v in verdicts if v.kind is Kind.FAILED]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(pairs)} gradings failed: {failed[0].detail}")
    return len(pairs) / seconds


def measure(workers: int, pairs: int) -> dict[str, Any]:
    """One row of figures."""
    row: dict[str, Any] = {"benchmark": "grader", "workers": workers, "pairs": pairs, "load_before": round(os.getloadavg()[0], 2)}
    started = time.perf_counter()
    with Grader(GraderConfig(workers=workers)) as grader:
        rate(grader, [("x", "\\boxed{y}")] * 1)
        row["start_s"] = round(time.perf_counter() - started, 2)
        row["plain_per_s"] = round(rate(grader, plain_pairs(pairs)))
        row["latex_per_s"] = round(rate(grader, latex_pairs(pairs)))
    with Grader(GraderConfig(workers=workers, fast_path=False)) as grader:
        grader.grade([("x", "\\boxed{y}")])
        row["plain_without_fast_path_per_s"] = round(rate(grader, plain_pairs(pairs)))
    seconds = []
    for hang in (False, True):
        with Grader(GraderConfig(workers=workers)) as grader:
            grader.grade([("x", "\\boxed{y}"), ("x", "\\boxed{z}"), ("x", "\\boxed{w}")])
            batch = latex_pairs(1000)
            if hang:
                batch[500] = HANG
            seconds.append(1000 / rate(grader, batch))
    row |= {"batch_s": round(seconds[0], 2), "batch_with_one_hang_s": round(seconds[1], 2), "deadline_s": GraderConfig().deadline_s}
    return row | {"grader": grader_version()}


def main(argv: Sequence[str] | None = None) -> None:
    """Print the row."""
    parser = argparse.ArgumentParser(prog="python -m rlzoo.benchmarks.perf.grader", description="Grading speed with a cold cache.")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=2000)
    options = parser.parse_args(argv)
    print(json.dumps(measure(options.workers, options.pairs)))


if __name__ == "__main__":
    main()

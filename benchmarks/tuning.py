"""The learning-rate grid that defaults are chosen with: the same for every algorithm, on the dev split only.

    python -m rlzoo.benchmarks.tuning --algos grpo treerpo@credit.unit_weights=leaves --lrs 1e-4 3e-4 1e-3 --out results/tuning/NAME

An algorithm may have options behind `@`, written SECTION.OPTION=VALUE. Each cell is one ordinary `rlzoo run` without the test
suite. Finished cells are kept, so that the command can be repeated after an interruption. Writes NAME.jsonl (one row per cell)
and NAME.md (the table).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from rlzoo.store.processes import own_environment, own_program
from rlzoo.store.runs import RunFolder, write_aside


@dataclass(frozen=True)
class Grid:
    """Which cells to run."""

    algos: tuple[str, ...]
    lrs: tuple[float, ...]
    out: Path
    """Path of the result without ending."""
    seeds: tuple[int, ...] = (100,)
    """Seeds of the grid; other than those of the final table."""
    flags: str = ""
    """More flags for every cell, separated by blanks."""
    runs: Path = Path("runs/tuning")
    """Where the cells' run folders go."""
    jobs: int = 1
    """Cells at once, with one thread each if more than one."""


def run_cell(grid: Grid, algo: str, lr: float, seed: int) -> dict[str, Any]:
    """One cell's row; runs it unless its folder already holds a summary.

    Raises:
        RuntimeError: the run failed.
    """
    folder = grid.runs / grid.out.name / f"{algo}-lr{lr:g}-s{seed}"
    if not (folder / "summary.json").exists():
        shutil.rmtree(folder, ignore_errors=True)
        threads = ["--backend.threads", "1"] if grid.jobs > 1 else []
        name, *options = algo.split("@")
        changed = [flag for option in options for flag in _flag(option)]
        command = [*own_program("rlzoo.cli"), "run", "--algo", name, *changed, "--out", str(folder), "--seed", str(seed)]
        command += ["--optim.lr", f"{lr:g}", "--evaluation.suite", "none", "--trackers", "none", *threads, *grid.flags.split()]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=own_environment())
        if done.returncode:
            return {"algo": algo, "lr": lr, "seed": seed, "error": done.stderr.strip().splitlines()[-1:]}
    return read_cell(folder, algo, lr, seed)


def _flag(option: str) -> list[str]:
    key, _, value = option.partition("=")
    return ["--" + key.replace("_", "-"), value]


def read_cell(folder: Path, algo: str, lr: float, seed: int) -> dict[str, Any]:
    """The row of a finished cell: dev Pass@1 at the start, at its best, and at the end (what is chosen by)."""
    run = RunFolder.open(folder)
    dev = [(row["step"], row["dev/pass_at_1"], row["dev/length"]) for row in run.metrics() if "dev/pass_at_1" in row]
    summary = run.summary() or {}
    best = max(dev, key=lambda d: d[1])
    return {
        "algo": algo,
        "lr": lr,
        "seed": seed,
        "steps": summary["steps"],
        "dev_start": dev[0][1],
        "dev_end": dev[-1][1],
        "dev_best": best[1],
        "dev_best_step": best[0],
        "length_start": dev[0][2],
        "length_end": dev[-1][2],
        "sampled_tokens": summary["sampled_tokens"],
        "wall_s": round(summary["training"]["wall_s"], 1),
        "config": summary["config"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line per cell, ordered by algorithm and learning rate."""
    lines = ["| algo | lr | seed | dev start | dev end | dev best (step) | length start → end | sampled tokens | wall s |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for r in sorted(rows, key=lambda r: (r["algo"], r["lr"], r["seed"])):
        if "error" in r:
            lines.append(f"| {r['algo']} | {r['lr']:g} | {r['seed']} | failed: {r['error']} | | | | | |")
            continue
        dev = f"{r['dev_start']:.1%} | {r['dev_end']:.1%} | {r['dev_best']:.1%} ({r['dev_best_step']})"
        length = f"{r['length_start']:.0f} → {r['length_end']:.0f}"
        lines.append(f"| {r['algo']} | {r['lr']:g} | {r['seed']} | {dev} | {length} | {r['sampled_tokens']:,} | {r['wall_s']:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    grid = tyro.cli(Grid, prog="python -m rlzoo.benchmarks.tuning", description=__doc__)
    cells = [(algo, lr, seed) for seed in grid.seeds for lr in grid.lrs for algo in grid.algos]
    rows: list[dict[str, Any]] = []
    grid.out.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(grid.jobs) as pool:
        for row in pool.map(lambda cell: run_cell(grid, *cell), cells):
            rows.append(row)
            print({k: v for k, v in row.items() if k != "config"}, flush=True)
            write_aside(grid.out.with_suffix(".jsonl"), "".join(json.dumps(r) + "\n" for r in rows))
            write_aside(grid.out.with_suffix(".md"), table(rows))


if __name__ == "__main__":
    main()

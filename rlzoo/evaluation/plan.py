"""Running what a comparison lacks: every cell is one ordinary `rlzoo run`, so that whatever kills it, the next call goes on."""

from __future__ import annotations

import fcntl
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..config import RunConfig, build
from ..escape import visible
from ..store.cost import spent
from ..store.files import LOCK, write_aside
from ..store.processes import own_environment, own_program
from ..store.runs import RunFolder
from ..store.toml import dump_toml

Match = Literal["tokens", "trained-tokens", "device-hours", "steps"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Which arms to train with how many seeds (0, 1, ...), and what they are to cost alike. `budget` in units of `match`; without one
    it is what the cheapest arm uses at its own steps, see `run_plan`. `jobs` runs at once, each with one thread."""

    arms: Mapping[str, RunConfig]
    seeds: int
    out: Path
    match: Match = "steps"
    budget: float | None = None
    jobs: int = 1

    def __post_init__(self) -> None:
        if self.seeds < 1 or self.jobs < 1:
            raise ValueError(f"--seeds {self.seeds} --jobs {self.jobs}: both must be at least 1")
        if self.budget is not None and (self.budget <= 0 or (self.match == "steps" and self.budget != int(self.budget))):
            raise ValueError(f"--budget {self.budget:g} of --match {self.match} must be above 0, and whole for steps")
        for name, config in self.arms.items():
            if config.evaluation.suite == "none":
                raise ValueError(f"arm {name} has evaluation.suite = 'none': there would be nothing to compare")


def run_plan(plan: Plan) -> tuple[dict[str, list[Path]], float]:
    """Run what is missing below `plan.out`/runs; returns the finished run folders by arm, in the order of the seeds, and the budget.

    Arms end at the step whose cumulated cost first reaches the budget. Without a given one, one step of every arm (seed 0) tells which
    arm is cheapest at its own steps; that arm runs them all, and the least that one of its seeds used is the budget of the others.
    Matching steps, the budget is the fewest steps of an arm, and every arm's learning rate goes by that number.

    Raises:
        ValueError: a folder holds a run of another config.
        RuntimeError: runs failed; says which and why. What has finished is kept.
    """
    jobs = 1 if plan.match == "device-hours" else plan.jobs
    if plan.match == "steps":
        steps = int(plan.budget or min(c.algorithm.schedule.steps for c in plan.arms.values()))
        return _run_all(plan, {name: _scheduled(c, steps=steps) for name, c in plan.arms.items()}, jobs), float(steps)
    if plan.budget is not None:
        limited = {name: _scheduled(c, limit=plan.match, budget=plan.budget) for name, c in plan.arms.items()}
        return _run_all(plan, limited, jobs), plan.budget
    cheapest = _cheapest(plan, jobs)
    done = _run_all(plan, {cheapest: plan.arms[cheapest]}, jobs)
    budget = min(_cost(path, plan.match) for path in done[cheapest])
    others = {name: _scheduled(c, limit=plan.match, budget=budget) for name, c in plan.arms.items() if name != cheapest}
    done |= _run_all(plan, others, jobs)
    return {name: done[name] for name in plan.arms}, budget


def _cheapest(plan: Plan, jobs: int) -> str:
    pilots = {}
    for name, config in plan.arms.items():
        evaluation = replace(config.evaluation, suite="none", every=0)
        pilots[name] = replace(_scheduled(config, steps=1), evaluation=evaluation)
    done = _run_all(replace(plan, seeds=1), pilots, jobs, folder="pilots")
    return min(plan.arms, key=lambda name: _cost(done[name][0], plan.match) * plan.arms[name].algorithm.schedule.steps)


def _cost(path: Path, match: str) -> float:
    return spent(RunFolder.open(path).metrics())[match]


def _scheduled(config: RunConfig, **changes: Any) -> RunConfig:
    return replace(config, algorithm=replace(config.algorithm, schedule=replace(config.algorithm.schedule, **changes)))


def _run_all(plan: Plan, arms: Mapping[str, RunConfig], jobs: int, folder: str = "runs") -> dict[str, list[Path]]:
    places = {(name, seed): plan.out / folder / f"{_file_name(name)}-s{seed}" for name in arms for seed in range(plan.seeds)}
    cells = []
    for (name, seed), place in places.items():  # seeds before arms, so that an interrupted comparison has both sides
        config = replace(arms[name], seed=seed, trackers=("none",), backend=replace(arms[name].backend, threads=1))
        if (place / "config.toml").is_file():
            kept = RunFolder.open(place)
            kept.refuse_change(build([(str(place / "config.toml"), kept.config())]).to_dict(), config.to_dict())
        cells.append((seed, place, config))
    with ThreadPoolExecutor(jobs) as pool:
        failed = [said for said in pool.map(lambda cell: _run_cell(cell[1], cell[2]), sorted(cells, key=lambda c: c[0])) if said]
    if failed:
        raise RuntimeError(f"{len(failed)} of {len(cells)} runs failed; what has finished is kept; the first: {failed[0]}")
    return {name: [places[name, seed] for seed in range(plan.seeds)] for name in arms}


def _run_cell(place: Path, config: RunConfig) -> str | None:
    """Run or go on with a cell; what went wrong, None if nothing. A run that outlived a comparison killed earlier is waited for."""
    if (place / LOCK).is_file():
        with (place / LOCK).open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
    if (place / "summary.json").is_file():
        return None
    command = [*own_program("rlzoo.cli"), "run", "--out", str(place)]
    if (place / "config.toml").is_file():
        command.append("--resume")
    else:
        written = place.with_name(place.name + ".toml")
        written.parent.mkdir(parents=True, exist_ok=True)
        write_aside(written, dump_toml(config.to_dict()))
        command += ["--config", str(written)]
    print(visible(f"{place}: {'goes on' if '--resume' in command else 'starts'}"), file=sys.stderr, flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=own_environment())
    if not done.returncode:
        return None
    said: Sequence[str] = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return f"{place}: {said[-1]}"


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.=@-]", "_", name)

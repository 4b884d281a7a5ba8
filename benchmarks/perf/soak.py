"""A long run watched from outside: `python -m rlzoo.benchmarks.perf.soak --algo NAME --steps 300 --out FOLDER [options of rlzoo run]`.

Starts `rlzoo run` on the embedded job in a child process and looks at it every few seconds: memory, open files, threads, child
processes. Writes one JSON row: memory at 10, 50 and 100 % of the steps and its slope (Theil-Sen, MB per 100 steps) after the
warm-up, the range of open files, the grading processes seen with the pairs that each graded, and what was left behind at the end.
Every answer is graded by a worker process (`through_workers`), as the embedded task's plain numbers would never reach one.
"""

from __future__ import annotations

import argparse
import atexit
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

try:
    import psutil
except ImportError as error:
    raise SystemExit("soak needs psutil, a development dependency: pip install 'rlzoo[dev]'") from error

import numpy as np
from scipy.stats import theilslopes

from rlzoo.rewards.math import Grader, GraderConfig
from rlzoo.rewards.reward import Item
from rlzoo.store.files import PARTIAL, locked
from rlzoo.store.processes import own_program
from rlzoo.store.runs import RunFolder

from .recording import provenance, record

WARM_UP = 50  # steps
MB = 1e6
WORKER = "rlzoo.rewards.worker"
RECYCLE = 200  # pairs per grading process: fewer than the default, so that several generations of them are seen
WRITES_PER_PAIR = 3  # a grading process writes when it starts and ends a pair, and the answer
GONE_S = 5.0  # that processes have to end in after the run itself has


@cache
def _grader() -> Grader:
    grader = Grader(GraderConfig(fast_path=False, recycle=RECYCLE))
    atexit.register(grader.close)
    return grader


def through_workers(items: Sequence[Item]) -> Sequence[Any]:
    """A reward: the default grader's verdicts, without its fast path and with grading processes that are replaced sooner."""
    return _grader().grade([(problem.answer, text) for problem, text in items])


@dataclass(frozen=True, slots=True)
class Look:
    """One look at the run: steps done, resident memory in MB of the process and of all below it, and counts."""

    step: int
    rss_mb: float
    children_mb: float
    fds: int
    threads: int
    children: int


@dataclass(slots=True)
class Watch:
    """What was seen of a process over its life. A process is (pid, creation time); `graded` counts pairs per grading process,
    short of those after the last look at it."""

    looks: list[Look] = field(default_factory=list)
    seen: set[tuple[int, float]] = field(default_factory=set)
    supervisors: set[tuple[int, float]] = field(default_factory=set)
    graded: dict[tuple[int, float], int] = field(default_factory=dict)

    def look(self, process: psutil.Process, step: int) -> Look | None:
        """Look once, and note the processes below; None if the process is gone or going."""
        try:
            children = process.children(recursive=True)
            with process.oneshot():
                own = (process.memory_info().rss / MB, process.num_fds(), process.num_threads())
        except psutil.NoSuchProcess:
            return None
        if not own[0]:  # it has ended, and nobody has asked for its status yet
            return None
        memory = 0.0
        for child in children:
            try:
                memory += child.memory_info().rss / MB
                self._note(child, process.pid)
            except psutil.NoSuchProcess:
                continue
        return Look(step, own[0], memory, own[1], own[2], len(children))

    def _note(self, child: psutil.Process, run: int) -> None:
        key = (child.pid, child.create_time())
        self.seen.add(key)
        if WORKER not in child.cmdline():
            return
        parent = child.ppid()
        if parent == run:
            self.supervisors.add(key)
        elif parent in {pid for pid, _ in self.supervisors}:
            self.graded[key] = child.io_counters().write_count // WRITES_PER_PAIR

    def alive(self) -> list[int]:
        """Ids of the processes seen that still run."""
        found = []
        for pid, created in sorted(self.seen):
            try:
                process = psutil.Process(pid)
                if process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(pid)
            except psutil.NoSuchProcess:
                continue
        return found


def slope(steps: Sequence[float], values: Sequence[float]) -> float | None:
    """Rise per 100 steps: the median slope over all pairs of looks (Theil-Sen), None with fewer than two different steps."""
    if len(set(steps)) < 2:
        return None
    with np.errstate(invalid="ignore"):  # in the slope's interval, which is not used, when many looks fall into few steps
        return round(100 * float(theilslopes(values, steps)[0]), 3)


def summarise(watch: Watch, steps: int) -> dict[str, Any]:
    """The figures of a row.

    Raises:
        RuntimeError: the run ended before it could be looked at.
    """
    if not watch.looks:
        raise RuntimeError("the run ended before the first look at it; look more often (--every)")
    warm_up = min(WARM_UP, steps // 2)
    after = [look for look in watch.looks if look.step >= warm_up] or watch.looks[-1:]
    at = [look.step for look in after]
    row: dict[str, Any] = {"looks": len(watch.looks), "warm_up_steps": warm_up}
    parts: dict[str, Callable[[Look], float]] = {"rss": lambda look: look.rss_mb, "children": lambda look: look.children_mb}
    for name, of in parts.items():
        for share in (10, 50, 100):
            step = min((look.step for look in watch.looks if look.step * 100 >= share * steps), default=watch.looks[-1].step)
            row[f"{name}_mb_at_{share}"] = round(median(of(look) for look in watch.looks if look.step == step), 1)
        row[f"{name}_mb_per_100_steps"] = slope(at, [of(look) for look in after])
    return row | {
        "fds": [min(look.fds for look in after), max(look.fds for look in after)],
        "process_threads": [min(look.threads for look in after), max(look.threads for look in after)],
        "most_children": max(look.children for look in watch.looks),
        "grading_supervisors": len(watch.supervisors),
        "grading_processes": len(watch.graded),
        "pairs_per_grading_process": [int(n) for n in np.sort(list(watch.graded.values()))[::-1]],
    }


def leftovers(watch: Watch, out: Path, temporary: Path) -> dict[str, Any]:
    """What a finished run has left behind that it should not have."""
    until = time.monotonic() + GONE_S
    while watch.alive() and time.monotonic() < until:
        time.sleep(0.1)
    try:
        with locked(out):
            held = False
    except ValueError:
        held = True
    return {
        "left_processes": watch.alive(),
        "left_temporary_files": sorted(p.name for p in temporary.iterdir()),
        "left_partial_files": sorted(p.name for p in out.rglob(f"{PARTIAL}*")),
        "lock_held": held,
    }


def steps_done(folder: Path) -> int:
    """Steps in the run's metrics so far."""
    path = folder / "metrics.jsonl"
    return max((int(row.get("step", 0)) for row in RunFolder(folder).metrics()), default=0) if path.is_file() else 0


def soak(command: Sequence[str], out: Path, steps: int, every_s: float) -> dict[str, Any]:
    """Run `command`, which writes the run folder `out`, and watch it.

    Raises:
        RuntimeError: the run failed; with its last words.
    """
    watch = Watch()
    with TemporaryDirectory(prefix="soak-") as base:
        temporary = Path(base, "tmp")
        temporary.mkdir()
        with Path(base, "output").open("w+") as output:
            started = time.monotonic()
            surroundings = os.environ | {"TMPDIR": str(temporary), "TORCHINDUCTOR_CACHE_DIR": str(Path(base, "torch"))}
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=surroundings)
            try:
                process = psutil.Process(child.pid)
                while child.poll() is None:
                    look = watch.look(process, steps_done(out))
                    if look and not (out / "summary.json").exists():  # from there on it only closes
                        watch.looks.append(look)
                    time.sleep(every_s)
            finally:
                if child.poll() is None:
                    child.terminate()
                    child.wait()
            seconds = time.monotonic() - started
            if child.returncode:
                output.seek(0)
                raise RuntimeError(
                    f"the run ended with status {child.returncode}: {(output.read().strip().splitlines() or ['no output'])[-1]}"
                )
        return summarise(watch, steps) | leftovers(watch, out, temporary) | {"wall_s": round(seconds, 1)}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the row."""
    parser = argparse.ArgumentParser(prog="python -m rlzoo.benchmarks.perf.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--algo", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, required=True, help="run folder, new")
    parser.add_argument("--row", type=Path, help="append the row to this file")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between looks")
    args, flags = parser.parse_known_args(argv)
    run = ["run", "--algo", args.algo, "--schedule.steps", str(args.steps), "--out", str(args.out), "--evaluation.suite", "none"]
    if "--reward" not in flags:
        run += ["--reward", "rlzoo.benchmarks.perf.soak:through_workers"]
    found = soak([*own_program("rlzoo.cli"), *run, *flags], args.out, args.steps, args.every)
    record({"benchmark": "soak", "algo": args.algo, "steps": args.steps, "flags": " ".join(flags)} | found | provenance(), args.row)


if __name__ == "__main__":
    main()

"""Whole runs with vLLM through the command line: killed, hung, and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm

SHORT = ["--schedule.steps", "3", "--checkpoints.every", "1", "--schedule.problems-per-step", "3", "--evaluation.suite", "none"]
SHORT += ["--evaluation.every", "0", "--backend.capacity", "32", "--backend.threads", "1", "--trackers", "none"]
HANGS = """
import sys, time
from rlzoo.backends.vllm_engine import InProcessEngine
real, state = InProcessEngine.step, {"loads": 0}
load = InProcessEngine.load
def count(self, named, asleep):
    load(self, named, asleep)
    state["loads"] += 1
def step(self):
    if state["loads"] > 2:  # the start's, and the first update's and its proof
        time.sleep(3600)
    return real(self)
InProcessEngine.load, InProcessEngine.step = count, step
from rlzoo.cli import main
sys.exit(main(sys.argv[1:]))
"""


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def rows(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def lasting(row: dict[str, Any]) -> dict[str, Any]:
    """What a run's rows have in common with those of its repetition."""
    timed = ("seconds/", "tokens_per_s", "unique_tokens_per_s", "step_s", "device_hours")
    return {name: value for name, value in row.items() if not name.startswith(timed)}


@pytest.mark.parametrize("algo", ["grpo", "treerpo", "treepo"])
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(algo: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-m", "rlzoo.cli", "run"]
    start = [*command, "--algo", algo, "--backend", "vllm", *SHORT]
    subprocess.run([*start, "--out", str(whole)], env=environment(), check=True, capture_output=True, timeout=240)
    process = subprocess.Popen([*start, "--out", str(killed)], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "step-1").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    subprocess.run([*command, "--resume", "--out", str(killed)], env=environment(), check=True, capture_output=True, timeout=240)
    assert [row["step"] for row in rows(killed)] == [1, 2, 3]
    assert [lasting(row) for row in rows(killed)] == [lasting(row) for row in rows(whole)]


def test_an_engine_that_hangs_ends_the_process(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", HANGS, "run", "--algo", "grpo", "--backend", "vllm", *SHORT, "--backend.timeout-s", "4"]
    begun = time.monotonic()
    done = subprocess.run([*command, "--out", str(out)], env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and time.monotonic() - begun < 60
    said = done.stderr.strip().splitlines()[-1]
    assert "the vLLM engine hangs: no answer within 4 s while sampling; once that is mended, go on with rlzoo run --resume" in said
    again = [sys.executable, "-m", "rlzoo.cli", "run", "--resume", "--out", str(out)]
    subprocess.run(again, env=environment(), check=True, capture_output=True, timeout=240)
    assert [row["step"] for row in rows(out)] == [1, 2, 3]

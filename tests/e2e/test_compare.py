"""`rlzoo compare --arms` in miniature: real runs, killed in the middle, and a second call that finishes what was begun."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from rlzoo.cli import main
from rlzoo.store.cost import spent
from rlzoo.store.runs import RunFolder

COMMON = """
[schedule]
steps = 6
problems_per_step = 2
[evaluation]
suite = "mini"
k = 1
every = 2
dev_problems = 2
dev_k = 1
max_response_tokens = 2
[checkpoints]
every = 1
"""
TIMED = ("seconds", "device_hours", "tokens_per_s", "step_s")


def what_was_learnt(path):
    rows = [{k: v for k, v in row.items() if not any(word in k for word in TIMED)} for row in RunFolder.open(path).metrics()]
    return rows, {which: m["right"] for which, m in RunFolder.open(path).summary()["results"]["trained"].items()}


def test_a_comparison_survives_a_kill_and_ends_the_same(tmp_path, capsys):
    (tmp_path / "common.toml").write_text(COMMON)
    out = tmp_path / "out"
    argv = ["compare", "--arms", "grpo@group_size=4,treerpo@branching=2", "--seeds", "2", "--match", "tokens", "--budget", "1000"]
    argv += ["--common", str(tmp_path / "common.toml"), "--out", str(out)]
    first = out / "runs" / "grpo@group_size=4-s0"
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-m", "rlzoo.cli", *argv], start_new_session=True, env=environ, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while not list(first.glob("checkpoints/step-1/*")) and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    os.killpg(process.pid, signal.SIGKILL)  # with the run that it started
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (first / "summary.json").exists() and not (out / "compare.json").exists()

    assert main([*argv, "--json"]) == 0
    told = capsys.readouterr()
    assert f"{first}: goes on" in told.err and told.err.count(": starts") == 3
    compared = json.loads(told.out)
    assert compared == json.loads((out / "compare.json").read_text()) and (out / "compare.md").is_file()
    assert [arm["seeds"] for arm in compared["arms"].values()] == [[0, 1], [0, 1]] and len(compared["pairs"]) == 1
    for name, arm in compared["arms"].items():
        for path, steps in zip(arm["runs"], arm["steps"], strict=True):
            rows = RunFolder.open(path).metrics()
            assert rows[-1]["step"] == steps and "dev/pass_at_1" in rows[-1], name
            reached = spent(rows)["tokens"] >= 1000
            assert spent(rows[:-1])["tokens"] < 1000 and (reached or steps == 6)  # ended at the step that reached it, not later
    fresh = tmp_path / "fresh"
    assert main(["run", "--config", str(first) + ".toml", "--out", str(fresh)]) == 0
    assert what_was_learnt(fresh) == what_was_learnt(first)
    capsys.readouterr()

    assert main([*argv, "--json"]) == 0  # nothing is left to run
    again = capsys.readouterr()
    assert again.err == "" and json.loads(again.out) == compared
    argv[argv.index("1000")] = "900"
    assert main(argv) == 2 and "was started with schedule.budget = 1000" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not finished"):
        (first / "summary.json").unlink()
        from rlzoo.evaluation.arms import read_member

        read_member(first)

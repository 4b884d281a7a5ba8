"""The watcher of long runs: does it see what it is there to see?"""

import json
import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("psutil")

from benchmarks.perf.soak import Look, Watch, main, slope, soak, summarise

JOB = """
import json, os, subprocess, sys, tempfile, time
from pathlib import Path
from rlzoo.rewards.math import Grader, GraderConfig

out, leaks = Path(sys.argv[1]), sys.argv[2] == "leaks"
out.mkdir()
files, memory = [], []
with Grader(GraderConfig(workers=1, fast_path=False, recycle=5)) as grader:
    for step, pairs in enumerate((4, 5, 1, 1, 1, 1)):
        grader.grade([("1", f"so \\\\boxed{{{step}.{k}}}") for k in range(1, pairs + 1)])
        if leaks:
            memory.append(bytearray(os.urandom(1000)) * 20_000)
            files.append(open(os.devnull))
        with (out / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step}) + "\\n")
        time.sleep(0.4)
    if leaks:
        tempfile.mkdtemp(prefix="forgotten-")
        (out / ".partial-final").touch()
        subprocess.Popen(["sleep", "60"], start_new_session=True)
        time.sleep(0.4)
    (out / "summary.json").touch()
"""


def watched(tmp_path, how):
    job = tmp_path / "job.py"
    job.write_text(JOB)
    return soak([sys.executable, str(job), str(tmp_path / "run"), how], tmp_path / "run", 5, 0.1)


def test_a_clean_job(tmp_path):
    row = watched(tmp_path, "clean")
    assert row["left_processes"] == row["left_temporary_files"] == row["left_partial_files"] == [] and not row["lock_held"]
    assert row["grading_supervisors"] == 1 and row["most_children"] == 2
    assert row["grading_processes"] == 3 and row["pairs_per_grading_process"][:2] == [4, 4]  # 13 pairs, 5 a process, seen at rest
    assert row["fds"][1] - row["fds"][0] <= 2 and abs(row["rss_mb_per_100_steps"]) < 300  # far below the leak


def test_a_job_that_leaks_everything(tmp_path):
    row = watched(tmp_path, "leaks")
    for pid in row["left_processes"]:
        os.kill(pid, signal.SIGKILL)
    assert len(row["left_processes"]) == 1 and row["left_partial_files"] == [".partial-final"]
    assert len(row["left_temporary_files"]) == 1 and row["left_temporary_files"][0].startswith("forgotten-")
    assert row["fds"][1] - row["fds"][0] >= 3
    assert row["rss_mb_per_100_steps"] == pytest.approx(2000, rel=0.3) and row["rss_mb_at_100"] > row["rss_mb_at_50"] + 20


def test_a_job_that_fails_is_an_error_with_its_last_words(tmp_path):
    with pytest.raises(RuntimeError, match="the run ended with status 3: no, thanks"):
        soak([sys.executable, "-c", "print('no, thanks'); raise SystemExit(3)"], tmp_path / "run", 5, 0.1)


def test_the_slope_ignores_single_jumps():
    steps = list(range(50))
    assert slope(steps, [100 + 0.02 * s + (500 if s == 7 else 0) for s in steps]) == pytest.approx(2.0, abs=0.01)
    assert slope([3, 3], [1.0, 2.0]) is None


def test_the_figures_of_a_row():
    looks = [Look(step, 100 + step + extra, 2.0 * step, 10 + step % 3, 4, 2) for step in range(101) for extra in (0, 2, 4)]
    row = summarise(Watch(looks), 100)
    assert (row["rss_mb_at_10"], row["rss_mb_at_50"], row["rss_mb_at_100"]) == (112, 152, 202)
    assert row["rss_mb_per_100_steps"] == pytest.approx(100, abs=3) and row["children_mb_per_100_steps"] == pytest.approx(200)
    assert row["fds"] == [10, 12] and row["process_threads"] == [4, 4] and row["warm_up_steps"] == 50
    with pytest.raises(RuntimeError, match="ended before the first look"):
        summarise(Watch(), 100)


def test_without_psutil_it_says_what_to_install():
    code = "import sys; sys.modules['psutil'] = None; import rlzoo.benchmarks.perf.soak"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip() == "soak needs psutil, a development dependency: pip install 'rlzoo[dev]'"


@pytest.mark.slow
def test_two_steps_of_a_real_run(tmp_path, capsys):
    flags = ["--schedule.problems-per-step", "3", "--evaluation.every", "0", "--backend.threads", "1", "--trackers", "none"]
    main(["--algo", "treerpo", "--steps", "2", "--out", str(tmp_path / "run"), "--row", str(tmp_path / "row"), "--every", "0.1", *flags])
    row = json.loads((tmp_path / "row").read_text())
    assert capsys.readouterr().out.strip() == (tmp_path / "row").read_text().strip()
    assert row["steps"] == 2 and row["grading_supervisors"] == 2 and sum(row["pairs_per_grading_process"]) > 0
    assert row["left_processes"] == row["left_temporary_files"] == row["left_partial_files"] == [] and not row["lock_held"]

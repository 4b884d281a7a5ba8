"""`rlzoo run --resume` after any death gives the run that would have been: real processes, really killed."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlzoo import registry
from rlzoo.data import arithmetic
from rlzoo.store.runs import RunFolder, read_rows
from rlzoo.training import checkpoint

KILLABLE = Path(__file__).with_name("killable.py")
STEPS = 3
JOB = [
    "--schedule.steps", str(STEPS), "--schedule.problems-per-step", "3", "--schedule.mini-batches", "2", "--optim.schedule", "linear",
    "--optim.warmup-steps", "2", "--reward", "killable:mixed", "--evaluation.suite", "mini", "--evaluation.k", "2",
    "--evaluation.every", "2", "--evaluation.dev-problems", "4", "--evaluation.dev-k", "1", "--evaluation.max-response-tokens", "48",
    "--checkpoints.every", "1", "--checkpoints.last", "2", "--backend.capacity", "64", "--backend.threads", "1",
]  # fmt: skip
PROBLEMS = 5  # the run begins a second pass over them

SAMPLED = "rlzoo.training.collect:grow_iter"
GRADED = "rlzoo.training.collect:shape"
UPDATED = "rlzoo.training.update:_step"
STORED = "rlzoo.training.loop:Trainer._store"
LOGGED = "rlzoo.store.runs:RunFolder.log"
SAVED = "rlzoo.training.loop:Trainer._save"
WRITTEN = "rlzoo.training.checkpoint:save_file"
RENAMED = "rlzoo.training.checkpoint:prune"
EVALUATED = "rlzoo.evaluation.runner:grow_iter"
FINAL = "rlzoo.training.checkpoint:_write_model"
SUMMED = "rlzoo.store.runs:RunFolder.write_summary"

# One death after another: (where, target, how, the n-th time in that process, steps of the checkpoints found afterwards).
DEATHS = [
    ("while step 1 samples", SAMPLED, "items", 2, []),
    ("while step 1 grades", GRADED, "before", 3, []),
    ("between the mini-batches of step 1", UPDATED, "after", 1, []),
    ("after the update of step 1, before its trees", STORED, "before", 1, []),
    ("between the row and the checkpoint of step 1", SAVED, "before", 1, []),
    ("in the checkpoint of step 1", WRITTEN, "before", 1, []),
    ("after the checkpoint of step 1 has its name", RENAMED, "before", 1, [1]),
    ("in the dev evaluation of step 2", EVALUATED, "items", 2, [1]),
    ("while step 3 samples", SAMPLED, "items", 5, [1, 2]),
    ("in the row of step 3, the checkpoint of step 2 having been cut", LOGGED, "half", 2, [1, 2]),
    ("in final/", FINAL, "after", 2, [2, 3]),
    ("in the final evaluation of the trained model", EVALUATED, "items", 3, [2, 3]),
    ("in the final evaluation of the base model", EVALUATED, "items", 19, [2, 3]),
]


class Driver:
    """The forking process; see killable.py."""

    def __init__(self, log):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, str(KILLABLE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONHASHSEED": "1"},
        )

    def run(self, *argv, kill=None):
        """Exit status of one command."""
        request = {"argv": ["run", *argv], "kill": kill and dict(zip(("target", "how", "nth"), kill, strict=True)), "log": str(self.log)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Flags of a tiny run with a problem file of its own."""
    file = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    rows = [{"id": p.id, "problem": p.problem, "answer": p.answer} for p in arithmetic.generate("dev", PROBLEMS, seed=1)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [*JOB, "--problems", str(file), "--evaluation.dev", str(file)]


@pytest.fixture
def driver(tmp_path):
    made = Driver(tmp_path / "log")
    yield made
    made.close()


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-100])


def timeless(row):
    return {k: v for k, v in row.items() if not (k.startswith("seconds/") or k.endswith("_per_s") or k in ("step_s", "device_hours"))}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"] if timeless({tag: 0})}


def traces(path):
    """Everything of a finished run that time does not enter."""
    folder = RunFolder.open(path)
    summary = folder.summary()
    files = [*sorted(path.glob("final/*")), *sorted(path.glob("trees/*")), *sorted(path.glob("checkpoints/*/*.safetensors"))]
    return {
        "files": {str(f.relative_to(path)): sha256(f) for f in files},
        "metrics": [timeless(row) for row in folder.metrics()],
        "evaluations": {f.name: sorted(json.dumps(row) for row in read_rows(f)) for f in sorted(path.glob("eval/*"))},
        "results": summary["results"],
        "summary": [summary[k] for k in ("steps", "sampled_tokens", "best", "config")],
        "tensorboard": scalars(path),
        "leftovers": [str(f) for f in path.rglob(".*") if f.name != ".lock"],
    }


def assert_same(cut, whole):
    for key, value in traces(whole).items():
        assert traces(cut)[key] == value, key


@pytest.mark.parametrize("name", registry.names("algorithm"))
def test_a_run_that_died_everywhere_is_the_run_that_would_have_been(name, tmp_path, job, driver):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    job = ["--algo", name, *job]
    request = {"argv": ["run", *job, "--out", str(whole)], "kill": None}
    other = {**os.environ, "PYTHONHASHSEED": "2"}  # another order of sets, as any other process may have
    with subprocess.Popen(
        [sys.executable, str(KILLABLE), json.dumps(request)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=other
    ) as process:
        argv = [*job, "--out", str(cut)]
        for where, *kill, expected in DEATHS:
            if "having been cut" in where:
                cut_short(cut / "checkpoints" / "step-2" / "optimizer.safetensors")
            assert driver.run(*argv, kill=kill) == -9, (where, driver.log.read_text())
            assert checkpoint.steps(cut / "checkpoints") == expected, where
            assert not (cut / "summary.json").exists()
            argv = ["--resume", "--out", str(cut)]
        errors = process.communicate()[1].decode()
        assert process.returncode == 0, errors
    assert driver.run(*argv) == 0, driver.log.read_text()
    assert driver.log.read_text().count("it is passed over") == 1
    rows = RunFolder.open(whole).metrics()
    assert [row["step"] for row in rows] == list(range(STEPS + 1)) and rows[1]["update/updates"] == 2
    assert len(traces(whole)["evaluations"]["base.jsonl"]) == 24
    assert_same(cut, whole)

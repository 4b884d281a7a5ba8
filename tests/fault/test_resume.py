"""`rlzoo run --resume` after any death gives the run that would have been: real processes, really killed."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rlzoo import registry
from rlzoo.cli import main, parse_run
from rlzoo.data import arithmetic
from rlzoo.store.files import locked
from rlzoo.store.runs import RunFolder, read_rows
from rlzoo.training import checkpoint

ALGORITHMS = registry.names("algorithm")
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
LOADED = "rlzoo.training.loop:load_model"
FINAL = "rlzoo.training.checkpoint:_write_model"


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
        kill = kill and dict(zip(("target", "how", "nth", "signals"), kill, strict=False))
        request = {"argv": ["run", *argv], "kill": kill, "log": str(self.log)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def said(self):
        """What the commands since the last call have printed."""
        text = self.log.read_text()
        self.log.write_text("")
        return text

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def write_problems(file, odd=None):
    """A small problem file; the first answer is `odd`, if given."""
    rows = [{"id": p.id, "problem": p.problem, "answer": p.answer} for p in arithmetic.generate("dev", PROBLEMS, seed=1)]
    rows[0]["answer"] = odd or rows[0]["answer"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Flags of a tiny run with a problem file of its own."""
    file = write_problems(tmp_path_factory.mktemp("problems") / "problems.jsonl")
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


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_run_that_died_everywhere_is_the_run_that_would_have_been(name, tmp_path, job, driver):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    job = ["--algo", name, *job]
    request = {"argv": ["run", *job, "--out", str(whole)], "kill": None}
    other = {**os.environ, "PYTHONHASHSEED": "2"}  # another order of sets, as any other process may have
    command = [sys.executable, str(KILLABLE), json.dumps(request)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=other) as process:
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


def test_an_interrupted_run_is_saved_and_says_how_to_go_on(tmp_path, job, driver):
    whole, cut = tmp_path / "whole", tmp_path / "a cut"
    job = ["--algo", ALGORITHMS[0], *job, "--checkpoints.every", "0"]
    assert driver.run(*job, "--out", str(whole)) == 0, driver.log.read_text()
    go_on = ["--resume", "--out", str(cut)]
    last = f"rlzoo: interrupted; to go on: rlzoo run --resume --out '{cut}'"
    for where, argv, kill, promise, expected in (
        ("start-up", [*job, "--out", str(cut)], (LOADED, "before", 1, ["SIGINT"]), None, []),
        ("the first dev evaluation", go_on, (EVALUATED, "items", 2, ["SIGTERM"]), None, []),
        ("the update of step 1", go_on, (UPDATED, "after", 1, ["SIGINT"]), "SIGINT: step 1", [1]),
        ("step 2, twice", go_on, (SAMPLED, "items", 2, ["SIGTERM", "SIGINT"]), "SIGTERM: step 2", [1]),
        ("the second dev evaluation", go_on, (EVALUATED, "items", 1, ["SIGTERM"]), "SIGTERM: step 2", [1, 2]),
        ("the last dev evaluation", go_on, (EVALUATED, "items", 1, ["SIGINT"]), "SIGINT: step 3", [2, 3]),
        ("the final evaluation", go_on, (EVALUATED, "items", 3, ["SIGINT"]), None, [2, 3]),
    ):
        driver.said()
        assert driver.run(*argv, kill=kill) == 130, (where, driver.log.read_text())
        said = driver.said().splitlines()
        assert said[-1] == last, where
        promised = [line for line in said if line.startswith("SIG")]
        assert promised == ([f"{promise} is finished and saved first; once more stops at once"] if promise else []), where
        assert checkpoint.steps(cut / "checkpoints") == expected, where
    assert driver.run(*go_on) == 0, driver.log.read_text()
    before, after = traces(whole), traces(cut)
    for kept in (before, after):  # which checkpoints there are depends on when it was interrupted
        kept["files"] = {name: sum for name, sum in kept["files"].items() if not name.startswith("checkpoints")}
    assert after == before

    everything = {f: (sha256(f), f.stat().st_mtime_ns) for f in cut.rglob("*") if f.is_file()}
    table = driver.said().partition("\nset ")[2].splitlines()[:-1]
    assert driver.run(*go_on) == 0  # once more: there is nothing to do
    said = driver.said().removeprefix("set ").splitlines()
    assert said[:-1] == table and said[-1] == f"run folder: {cut}, finished already: nothing is left to do"
    assert {f: (sha256(f), f.stat().st_mtime_ns) for f in cut.rglob("*") if f.is_file()} == everything


def test_one_process_at_a_time_works_in_a_folder(tmp_path, job, driver):
    path = tmp_path / "run"
    new, go_on = ["--algo", ALGORITHMS[0], *job, "--out", str(path)], ["--resume", "--out", str(path)]
    refusal = f"rlzoo: process {os.getpid()} is at work in {path}; wait until it is done, or stop it\n"
    with locked(path):
        assert (driver.run(*new), driver.said()) == (2, refusal)
        assert [f.name for f in path.iterdir()] == [".lock"]
    assert driver.run(*new, kill=(SAMPLED, "items", 1)) == -9
    files = sorted(path.rglob("*"))
    driver.said()
    with locked(path):
        assert (driver.run(*go_on), driver.said()) == (2, refusal)
    assert sorted(path.rglob("*")) == files


def test_killed_from_outside_nothing_survives_and_nothing_is_lost(tmp_path, driver):
    """Grader workers included: the real grader, the real command line, at any moment."""
    rng, whole, cut = random.Random(0), tmp_path / "whole", tmp_path / "cut"
    problems = write_problems(tmp_path / "problems.jsonl", odd=r"\sqrt{2}")  # no quick comparison of texts: needs a worker
    job = ["--algo", ALGORITHMS[0], "--schedule.steps", "8", "--schedule.problems-per-step", "3", "--evaluation.suite", "none"]
    job += ["--evaluation.every", "0", "--checkpoints.every", "2", "--backend.capacity", "64", "--backend.threads", "1"]
    job += ["--problems", str(problems)]
    argv = [*job, "--out", str(cut)]
    for step, kind in ((1, signal.SIGKILL), (3, signal.SIGKILL), (5, signal.SIGINT)):
        with subprocess.Popen([sys.executable, "-m", "rlzoo.cli", "run", *argv], stderr=subprocess.PIPE, text=True) as process:
            children = []
            while process.poll() is None and (len(read_rows(cut / "metrics.jsonl")) < step or not children):
                time.sleep(0.02)
                children = psutil.Process(process.pid).children(recursive=True)
            time.sleep(rng.uniform(0, 0.3))
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(kind)
            errors = process.communicate()[1]
            assert process.returncode == (-9 if kind == signal.SIGKILL else 130), errors
        assert children and psutil.wait_procs(children, timeout=10)[1] == []
        argv = ["--resume", "--out", str(cut)]
    assert driver.run(*argv) == 0, driver.log.read_text()
    assert driver.run(*job, "--out", str(whole)) == 0, driver.log.read_text()
    for key in ("metrics", "summary", "tensorboard", "leftovers"):
        assert traces(cut)[key] == traces(whole)[key], key
    assert sha256(cut / "final" / "model.safetensors") == sha256(whole / "final" / "model.safetensors")


@pytest.fixture
def started(tmp_path):
    """The folder of a run that was just started, with some options of its own."""
    flags = ["--algo", ALGORITHMS[0], "--seed", "3", "--optim.max-grad-norm", "None", "--trackers", "none"]
    config, _, _ = parse_run(flags)
    RunFolder.create(tmp_path / "run", config.to_dict())
    return tmp_path / "run", flags, config


def test_the_folder_knows_its_config(started):
    path, flags, config = started
    assert config.algorithm.optim.max_grad_norm is None
    for again in ([], flags, ["--algo", ALGORITHMS[0]], ["--config", str(path / "config.toml")]):
        assert parse_run(["--resume", "--out", str(path), *again]) == (config, path, True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--algo", ALGORITHMS[-1]], f"algo = '{ALGORITHMS[0]}', not '{ALGORITHMS[-1]}'"),
        (["--sampler", "nary"], "sampler = 'chains', not 'nary'"),
        (["--seed", "4"], "seed = 3, not 4"),
        (["--optim.max-grad-norm", "1.0"], "optim.max_grad_norm = 'none', not 1.0"),
        (["--optim.lr", "0.5", "--schedule.steps", "7"], "optim.lr = 0.0002, not 0.5"),
        (["--config", "other.toml"], "evaluation.dev_k = 4, not 9"),
    ],
)
def test_a_resumed_run_keeps_its_config(started, flags, message, monkeypatch, capsys):
    path, _, _ = started
    monkeypatch.chdir(path.parent)
    Path("other.toml").write_text("[evaluation]\ndev_k = 9\n")
    before = (path / "config.toml").read_text()
    assert main(["run", "--resume", "--out", str(path), *flags]) == 2
    said = capsys.readouterr().err
    assert said == f"rlzoo: {path} was started with {message}; --resume goes on with a run as it was started\n"
    assert (path / "config.toml").read_text() == before and not list((path / "checkpoints").iterdir())


def test_what_cannot_be_resumed_is_said(tmp_path, capsys):
    for argv, message in (
        (["--resume"], "--resume needs --out FOLDER, the run to go on with"),
        (["--resume", "--out", str(tmp_path / "nowhere")], f"no run folder at {tmp_path / 'nowhere'}"),
        (["--resume", "--out", str(tmp_path)], f"{tmp_path} is not a run folder: it has no config.toml"),
    ):
        assert main(["run", *argv]) == 2
        assert capsys.readouterr().err == f"rlzoo: {message}\n"
    assert not list(tmp_path.iterdir())

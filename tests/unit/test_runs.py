import json
import math
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

from rlzoo.store import environment as env
from rlzoo.store.files import aside, locked
from rlzoo.store.runs import RunFolder, dump_toml, environment, read_rows, to_json

CONFIG = {
    "algo": "some",
    "seed": 0,
    "rate": 1e-4,
    "big": 1e22,
    "on": True,
    "inf": float("inf"),
    "trackers": ("tensorboard", "none"),
    "empty": [],
    "text": 'quote " back\\slash tab\t line\n bell\x07 del\x7f π 🌲 #',
    "odd key.é": 1,
    "none": None,
    "sampler": {"name": "x", "widths": [1, 2], "inner": {"deep": {"er": -1.5}}, "nothing": None},
    "list": [{"a": 1, "b": [True]}, {"a": 2}],
    "blank": {},
}


def without_none(value):
    if isinstance(value, dict):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    return [without_none(v) for v in value] if isinstance(value, list | tuple) else value


def test_toml_reads_back_equal():
    assert tomllib.loads(dump_toml(CONFIG)) == without_none(CONFIG)
    assert math.isnan(tomllib.loads(dump_toml({"x": float("nan")}))["x"])
    assert dump_toml({}) == "\n"


@pytest.mark.parametrize("value", [object(), [None], {"a": {1, 2}}, b"x"])
def test_toml_refuses_what_it_cannot_say(value):
    with pytest.raises(ValueError, match=r"config key part\.x.*: TOML cannot hold"):
        dump_toml({"part": {"x": value}})


def test_create_write_and_open(tmp_path):
    run = RunFolder.create(tmp_path / "runs" / "first", CONFIG)
    run.log({"step": 1, "reward": np.float32(0.5), "kl": float("nan"), "lengths": np.array([1, 2])})
    run.log({"step": 2, "reward": 0.75})
    again = RunFolder.open(tmp_path / "runs" / "first")
    assert again.name == "first"
    assert again.config() == without_none(CONFIG)
    assert again.metrics() == [{"step": 1, "reward": 0.5, "kl": None, "lengths": [1, 2]}, {"step": 2, "reward": 0.75}]
    assert again.summary() is None
    again.write_summary({"pass_at_1": 0.3, "folder": Path("x")})
    assert again.summary() == {"pass_at_1": 0.3, "folder": "x"}
    assert not [p for p in again.path.iterdir() if p.name.startswith(".")]  # nothing half-written lies about


def test_create_never_overwrites(tmp_path):
    RunFolder.create(tmp_path / "empty")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(ValueError, match="taken is not empty; a run never overwrites another"):
        RunFolder.create(tmp_path / "taken", CONFIG)
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["file"]
    with pytest.raises(ValueError, match="cannot write the run folder"):
        RunFolder.create(tmp_path / "taken" / "file" / "run")


def test_open_refuses_what_is_no_run(tmp_path):
    with pytest.raises(ValueError, match="no run folder at"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is not a run folder: it has no config.toml"):
        RunFolder.open(tmp_path)
    (tmp_path / "config.toml").write_text("a = = 1")
    with pytest.raises(ValueError, match=r"config.toml is not TOML"):
        RunFolder.open(tmp_path).config()


def test_a_resumed_run_is_asked_for_as_it_was_started():
    run = RunFolder(Path("r"))
    kept = {"algo": "x", "seed": 0, "sampler": {"name": "a", "inner": {"k": (1, 2)}}}
    run.refuse_change(kept, {**kept})
    run.refuse_change(kept, {"seed": 0})
    with pytest.raises(ValueError, match=r"^r was started with seed = 0, not 1; --resume goes on with a run as it was started$"):
        run.refuse_change(kept, {**kept, "seed": 1, "sampler": {"name": "b"}})
    with pytest.raises(ValueError, match=r"started with sampler.inner.k = \(1, 2\), not \(2,\);"):
        run.refuse_change(kept, {"sampler": {"inner": {"k": (2,)}}})


def test_a_line_cut_off_by_a_kill_is_left_out_and_a_broken_one_is_named(tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    run.log({"step": 1})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    assert run.metrics() == [{"step": 1}]
    run.rewind(1)  # as a resumed run does before it appends
    run.log({"step": 2})
    assert [r["step"] for r in run.metrics()] == [1, 2]
    (run.path / "metrics.jsonl").write_text('{"step": 1}\nbroken\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics.jsonl is not JSON"):
        run.metrics()


def test_rewind_forgets_what_comes_after(tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    for step in (1, 2, 10):
        run.log({"step": step})
        run.trees_path(step).write_text("t")
    assert run.tree_steps() == [1, 2, 10]
    (run.path / "trees" / ".partial-step-3.parquet").write_text("half")
    run.rewind(2)
    assert ([r["step"] for r in run.metrics()], run.tree_steps()) == ([1, 2], [1, 2])
    run.rewind(None)
    assert (run.metrics(), run.tree_steps(), list((run.path / "trees").iterdir())) == ([], [], [])


def test_what_is_written_aside_is_there_whole_or_not_at_all(tmp_path):
    with aside(tmp_path / "new" / "folder") as partial:
        partial.mkdir()
        (partial / "a").write_text("1")
        assert not (tmp_path / "new" / "folder").exists()
    with pytest.raises(OSError, match="full"), aside(tmp_path / "new" / "folder") as partial:
        partial.mkdir()
        (partial / "b").write_text("2")
        raise OSError("full")
    assert [p.name for p in tmp_path.rglob("*")] == ["new", "folder", "a"]
    with aside(tmp_path / "new" / "folder") as partial:  # what a death left there does not get in
        partial.mkdir()
        (partial / "c").write_text("3")
    assert [p.name for p in tmp_path.rglob("*")] == ["new", "folder", "c"]


def test_one_process_at_a_time(tmp_path):
    with locked(tmp_path / "run"):
        with pytest.raises(ValueError, match=rf"process {os.getpid()} is at work in .*run; wait until it is done, or stop it"):
            locked(tmp_path / "run").__enter__()
        RunFolder.create(tmp_path / "run", CONFIG)
    with locked(tmp_path / "run"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write the run folder"):
        locked(tmp_path / "file").__enter__()


def test_the_lock_ends_with_its_process(tmp_path):
    code = (
        "import os, signal, subprocess, sys; from pathlib import Path; from rlzoo.store.files import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    print(subprocess.Popen(['sleep', '20'], start_new_session=True).pid, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert done.returncode == -9
        with locked(tmp_path):  # though a child of it is still there
            pass
    finally:
        os.kill(int(done.stdout), 9)


def test_eval_sink_streams(tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    with run.eval_sink("base") as sink:
        sink({"set": "a", "correct": True})
        assert read_rows(run.eval_path("base")) == [{"set": "a", "correct": True}]  # on disk before the end
        sink({"set": "b", "correct": None})
    assert len(read_rows(run.eval_path("base"))) == 2
    with run.eval_sink("base") as sink:
        sink({"set": "c", "correct": None})
    assert [row["set"] for row in read_rows(run.eval_path("base"))] == ["c"]  # an evaluation made anew, not a longer one


def test_json_is_strict():
    assert json.loads(to_json({"a": [float("inf"), np.int64(3), np.bool_(True)], 1: ("x",)})) == {"a": [None, 3, True], "1": ["x"]}
    with pytest.raises(TypeError):
        to_json(object())


def test_environment_is_plain_and_complete():
    found = environment()
    assert json.loads(to_json(found)) == found
    assert found["versions"]["torch"] and found["versions"]["numpy"] == np.__version__
    assert found["cores"] >= 1 and found["cpu"]


def test_checkout(tmp_path):
    def git(*arguments: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e", *arguments], check=True, capture_output=True)

    assert env.checkout(tmp_path) == (None, None)
    git("init")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "m")
    commit, dirty = env.checkout(tmp_path)
    assert commit is not None and len(commit) == 40 and dirty is False
    (tmp_path / "sub" / "file").write_text("2")
    assert env.checkout(tmp_path) == (commit, True)
    assert env.checkout(tmp_path / "sub") == (None, None)  # inside somebody else's repository is not in a checkout of ours

import json
import math
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest

from rlzoo.store import environment as env
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
    with pytest.raises(ValueError, match="cannot read the config"):
        RunFolder.open(tmp_path).config()


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
    with pytest.raises(ValueError, match=r"line 2 of metrics.jsonl is not JSON"):
        run.metrics()


def test_rewind_forgets_what_comes_after(tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    for step in (1, 2, 10):
        run.log({"step": step})
        run.trees_path(step).write_text("t")
    assert run.tree_steps() == [1, 2, 10]
    run.rewind(2)
    assert ([r["step"] for r in run.metrics()], run.tree_steps()) == ([1, 2], [1, 2])


def test_eval_sink_streams(tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    with run.eval_sink("base") as sink:
        sink({"set": "a", "correct": True})
        assert read_rows(run.eval_path("base")) == [{"set": "a", "correct": True}]  # on disk before the end
        sink({"set": "b", "correct": None})
    assert len(read_rows(run.eval_path("base"))) == 2


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

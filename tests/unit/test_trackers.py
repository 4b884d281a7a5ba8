import subprocess
import sys
import time
import types

import numpy as np
import pytest

from rlzoo.store import trackers
from rlzoo.store.trackers import open_trackers


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder))
    read.Reload()
    return read


def test_tensorboard_gets_numbers_by_step_and_the_config(tmp_path):
    opened = open_trackers(["tensorboard"], tmp_path, {"algo": "x", "sampler": {"k": 4}})
    for step in (1, 2):
        opened.log({"reward": np.float32(step), "phase": {"sampling": 2.0 * step}, "note": "text", "kl": float("nan"), "none": None}, step)
    opened.close()
    opened.close()
    read = events(tmp_path / "tensorboard")
    assert sorted(read.Tags()["scalars"]) == ["phase/sampling", "reward"]
    assert [(e.step, e.value) for e in read.Scalars("reward")] == [(1, 1.0), (2, 2.0)]
    (text,) = read.Tags()["tensors"]
    assert b"| sampler/k | 4 |" in read.Tensors(text)[0].tensor_proto.string_val[0]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_tensorboard_of_a_resumed_run_forgets_what_is_made_anew(tmp_path, monkeypatch):
    clock = iter(range(1_800_000_000, 1_900_000_000))
    monkeypatch.setattr(time, "time", lambda: next(clock))  # events files are ordered by the second of their birth
    for after, steps in ((None, (0, 1, 2, 3)), (1, (2, 3, 4)), (2, (3, 4))):
        opened = open_trackers(["tensorboard"], tmp_path, {"algo": "x"}, after=after)
        for step in steps:
            opened.log({"reward": 10 * (after or 0) + step}, step)
        opened.close()
    read = events(tmp_path / "tensorboard")
    assert [(e.step, e.value) for e in read.Scalars("reward")] == [(0, 0), (1, 1), (2, 12), (3, 23), (4, 24)]
    assert len(read.Tags()["tensors"]) == len(read.Tensors("config/text_summary")) == 1
    open_trackers(["tensorboard"], tmp_path, {"algo": "x"}).close()  # from the start once more
    assert events(tmp_path / "tensorboard").Tags()["scalars"] == []


def test_none_opens_and_imports_nothing(tmp_path):
    code = (
        "import sys; from rlzoo.store.trackers import open_trackers; t = open_trackers(['none'], '.', {}); t.log({'a': 1}, 1); t.close();"
        "assert not {'torch', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    open_trackers([], tmp_path, {}).log({"a": 1}, 1)
    assert list(tmp_path.iterdir()) == []


def test_another_tracker_by_name(tmp_path, monkeypatch):
    """wandb is not installed here: a stand-in of the same interface shows that its tracker is started, fed and finished."""
    seen: list[tuple] = []
    run = types.SimpleNamespace(log=lambda values, step: seen.append(("log", values, step)), finish=lambda: seen.append(("finish",)))
    fake = types.ModuleType("wandb")
    fake.init = lambda project, name: (seen.append(("init", project, name)), run)[1]
    fake.config = types.SimpleNamespace(update=lambda values, allow_val_change: seen.append(("config", values)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    opened = open_trackers(["wandb", "wandb"], tmp_path / "my-run", {"a": {"b": (1, 2)}})
    opened.log({"reward": 0.5}, 3)
    opened.close()
    assert seen == [("init", "rlzoo", "my-run"), ("config", {"a/b": "(1, 2)"}), ("log", {"reward": 0.5}, 3), ("finish",)]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tensorbored"], "unknown tracker 'tensorbored'; allowed are tensorboard, wandb, trackio, mlflow or none"),
        (["none", "tensorboard"], "tracker 'none' beside tensorboard"),
    ],
)
def test_refusals(tmp_path, names, message):
    with pytest.raises(ValueError, match=message):
        open_trackers(names, tmp_path, {})


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="tracker 'mlflow' needs the package mlflow, which is not installed: pip install mlflow"):
        open_trackers(["mlflow"], tmp_path, {})
    assert list(tmp_path.iterdir()) == []

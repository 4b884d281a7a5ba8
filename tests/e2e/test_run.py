"""The command line end to end on the embedded model and task, in miniature; every registered algorithm."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlzoo import registry
from rlzoo.cli import main
from rlzoo.store.runs import RunFolder
from rlzoo.store.trees import read_trees
from rlzoo.training.models import load_model, resolve

SMALL = [
    "--schedule.steps", "2", "--schedule.problems-per-step", "6", "--evaluation.suite", "none", "--evaluation.dev-problems", "4",
    "--evaluation.every", "2", "--evaluation.dev-k", "2", "--backend.capacity", "64", "--backend.threads", "1",
]  # fmt: skip


def run(tmp_path, *flags, name="run"):
    out = tmp_path / name
    assert main(["run", "--out", str(out), *SMALL, *flags]) == 0
    return RunFolder.open(out)


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", registry.names("algorithm"))
def test_a_run_leaves_everything_a_run_leaves(name, tmp_path, capsys):
    folder = run(tmp_path, "--algo", name)
    assert f"run folder: {folder.path}" in capsys.readouterr().out
    rows = folder.metrics()
    assert [r["step"] for r in rows] == [0, 1, 2] and "dev/pass_at_1" in rows[0] and "dev/pass_at_1" in rows[2]
    for key in (
        "reward",
        "length",
        "truncated",
        "dead_groups",
        "update/ratio_mean",
        "update/grad_norm",
        "device_hours",
        "unique_tokens_per_s",
    ):
        assert key in rows[1], key
    assert rows[1]["update/ratio_mean"] == pytest.approx(1, abs=1e-2)  # nearly on policy: sampler and trainer agree
    base, trained = weights(Path(resolve("tiny"))), weights(folder.final)
    assert any(not torch.equal(base[k], trained[k]) for k in base)
    assert (folder.checkpoints / "step-2" / "optimizer.safetensors").exists()
    summary = folder.summary()
    assert summary["sampled_tokens"] == sum(r["sampled_tokens"] for r in rows[1:])
    assert sum(summary["ledger"]["seconds"].values()) == pytest.approx(summary["ledger"]["wall_s"])
    assert summary["ledger"]["overlapped"]["grading_cpu_s"] >= 0
    files = {"base": Path(resolve("tiny")), "trained": folder.final}
    hashes = {model: hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest() for model, path in files.items()}
    assert summary["weights_sha256"] == hashes and len(set(hashes.values())) == 2
    stored = read_trees(folder.trees_path(1))
    everything = round(rows[1]["trees"] / (1 - rows[1]["dead_groups"]))  # what was dropped and refilled included
    assert len(stored) == everything >= 6 and any(s.credit is not None for s in stored)
    assert list(folder.path.rglob("events.out.tfevents*")) and not list(folder.path.rglob("*.pkl")) and not list(folder.path.rglob("*.bin"))
    assert main(["show", str(folder.path), "--tree", "1", "--step", "1"]) == 0
    shown = capsys.readouterr().out
    assert stored[1].record.problem[:20] in shown and "value" in shown and any(stop in shown for stop in ("ANSWER", "EOS", "LENGTH"))
    load_model(str(folder.final), dtype="float32", device="cpu")


@pytest.mark.parametrize("name", registry.names("algorithm"))
def test_the_same_seed_gives_the_same_run(name, tmp_path):
    a, b = run(tmp_path, "--algo", name, name="a"), run(tmp_path, "--algo", name, name="b")
    first, second = weights(a.final), weights(b.final)
    assert all(torch.equal(first[k], second[k]) for k in first)
    other = weights(run(tmp_path, "--algo", name, "--seed", "1", name="c").final)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_kl_reference_epochs_and_mini_batches(tmp_path):
    rows = run(
        tmp_path, "--algo", "treerpo", "--loss.kl-coef", "0.01", "--schedule.epochs", "2", "--schedule.mini-batches", "2"
    ).metrics()  # fmt: skip
    assert rows[1]["update/updates"] == 4 and rows[2]["update/kl_ref"] > 0 and rows[1]["seconds/scoring"] > 0


def test_a_plugin_reward_and_a_step_without_signal(tmp_path, monkeypatch, capsys):
    (tmp_path / "same.py").write_text("def score(items):\n    return [1.0 for _ in items]\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = run(tmp_path, "--algo", "grpo", "--reward", "same:score")
    assert folder.metrics()[1]["dead_groups"] == 1 and "update/updates" not in folder.metrics()[1]
    base, trained = weights(Path(resolve("tiny"))), weights(folder.final)
    assert all(torch.equal(base[k], trained[k]) for k in base)
    assert "no tree carries a signal" in "".join(capsys.readouterr())


def test_dead_groups_are_refilled_within_bounds(tmp_path):
    rows = run(tmp_path, "--algo", "grpo", "--filter.refill-rounds", "3").metrics()
    assert all(r["trees"] <= 6 for r in rows[1:])
    assert any(r["trees"] / (1 - r["dead_groups"]) > 6 for r in rows[1:] if r["dead_groups"])


@pytest.mark.parametrize("broken", [3, 4])  # the first or the second mini-batch of step 2
def test_a_non_finite_update_stops_the_run_and_leaves_no_half_step(broken, tmp_path, monkeypatch, capsys):
    from rlzoo.training import update

    real, calls = update.gradients, []

    def overflow(model, *args, **kwargs):
        calls.append(1)
        result = real(model, *args, **kwargs)
        if len(calls) == broken:
            next(model.parameters()).grad.fill_(float("nan"))
        return result

    monkeypatch.setattr(update, "gradients", overflow)
    out = tmp_path / "run"
    assert main(["run", "--algo", "grpo", "--out", str(out), *SMALL]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("rlzoo: step 2: loss ") and f"mini-batch {broken - 2} of 2" in error
    if broken == 3:
        assert f"; the newest checkpoint is step 1 in {out / 'checkpoints'};" in error
        assert all(torch.isfinite(w).all() for w in weights(out / "checkpoints" / "step-1").values())
    else:  # the weights are half a step further: nothing that a run could go on from
        assert "; there is no checkpoint yet;" in error and not list((out / "checkpoints").iterdir())
    monkeypatch.undo()
    assert main(["run", "--out", str(out), "--resume"]) == 0
    resumed, whole = RunFolder.open(out), run(tmp_path, "--algo", "grpo", name="whole")
    first, second = weights(resumed.final), weights(whole.final)
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert [r["reward"] for r in resumed.metrics()[1:]] == [r["reward"] for r in whole.metrics()[1:]]


def test_a_run_whose_sampler_drifts_stops_before_the_step_and_goes_on_once_it_no_longer_does(tmp_path, monkeypatch, capsys):
    from rlzoo.training.collect import Collector

    real = Collector.collect

    def drifted(self, step):
        batch = real(self, step)
        for graded in batch.kept if step == 1 else ():
            object.__setattr__(graded.tree, "logprobs", graded.tree.logprobs - 0.5)  # k3: e^0.5 - 1.5 = 0.149
        return batch

    flags = ["--algo", "grpo", "--max-mismatch-kl", "0.1"]
    monkeypatch.setattr(Collector, "collect", drifted)
    out = tmp_path / "run"
    assert main(["run", "--out", str(out), *SMALL, *flags]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("rlzoo: step 2: KL(sampler || trainer) is 0.149 and max_mismatch_kl allows 0.1; no update was made; ")
    assert "; the newest checkpoint is step 1 in " in error and f"go on with rlzoo run --resume --out {out}" in error
    monkeypatch.undo()
    assert main(["run", "--out", str(out), "--resume"]) == 0
    resumed, whole = RunFolder.open(out), run(tmp_path, *flags, name="whole")
    first, second = weights(resumed.final), weights(whole.final)
    assert all(torch.equal(first[k], second[k]) for k in first)
    for row in resumed.metrics()[1:]:
        assert 0 <= row["mismatch/kl_k3"] < 1e-6 and row["mismatch/ratio_p99"] == pytest.approx(1, abs=1e-2)
        assert row["mismatch/masked_rows"] == row["mismatch/truncated_tokens"] == 0


def test_a_corrected_run_measures_every_token(tmp_path):
    flags = ["--correction.old-logprobs", "recomputed", "--correction.importance", "truncated", "--correction.sequence", "mask"]
    rows = run(tmp_path, "--algo", "treerpo", *flags).metrics()[1:]
    assert all(row["update/updates"] > 0 and abs(row["mismatch/kl"]) < 1e-4 and row["mismatch/masked_rows"] == 0 for row in rows)


def test_bad_input_is_one_sentence_and_a_non_zero_exit_of_the_real_process(tmp_path):
    """All the others: tests/fault/test_bad_input.py."""
    command = [sys.executable, "-m", "rlzoo.cli", "run", "--out", str(tmp_path / "out"), "--algo", "nosuch"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 2, done.stderr
    assert "unknown algorithm 'nosuch'; known:" in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_resumed_with_other_problems(tmp_path, capsys):
    rows = [{"id": str(i), "problem": f"Compute {i}+1.", "answer": str(i + 1)} for i in range(8)]
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = run(tmp_path, "--algo", "grpo", "--problems", str(problems), "--schedule.steps", "1", "--checkpoints.every", "1")
    (folder.path / "summary.json").unlink()  # as if it had died before its end
    before = (folder.path / "metrics.jsonl").read_text()
    problems.write_text("".join(json.dumps(row | {"answer": "0"}) + "\n" for row in rows))
    assert main(["run", "--resume", "--out", str(folder.path)]) == 2
    error = capsys.readouterr().err
    assert "are not those that" in error and str(folder.path) in error
    assert (folder.path / "metrics.jsonl").read_text() == before
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["run", "--resume", "--out", str(folder.path)]) == 0


def test_an_existing_folder_is_never_overwritten(tmp_path, capsys):
    folder = run(tmp_path, "--algo", "grpo")
    before = json.dumps(folder.metrics())
    assert main(["run", "--algo", "grpo", "--out", str(folder.path), *SMALL]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert json.dumps(folder.metrics()) == before

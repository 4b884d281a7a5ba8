"""The trainer's precision is its own: small updates are not rounded away, whatever the engine computes in."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from rlzoo.backends.torch import TorchBackend
from rlzoo.cli import main
from rlzoo.config import build
from rlzoo.credit.group import Group
from rlzoo.data.loading import load_problems
from rlzoo.data.templates import render
from rlzoo.losses.correction import CorrectionOptions
from rlzoo.losses.policy import PolicyLoss
from rlzoo.sampling.chains import Chains
from rlzoo.sampling.grow import Prompt, grow
from rlzoo.training.models import load_model
from rlzoo.training.optim import Optim, make_optimizer
from rlzoo.training.sync import sync
from rlzoo.training.update import update

UPDATES, LR = 20, 1e-6


def moved(config):
    """Where the weights of the embedded model go in UPDATES updates under a config's precisions, float32 [weights]."""
    loaded = load_model("tiny", dtype=config.master_dtype, device="cpu")
    autocast = torch.bfloat16 if config.trainer_dtype == "bfloat16" else None
    return displaced(loaded, config.backend.dtype, autocast, config.corrections)


def displaced(loaded, engine, autocast=None, correction=None):
    model, tokenizer = loaded.model, loaded.tokenizer
    backend, optimizer, start = TorchBackend(model, tokenizer, dtype=engine), make_optimizer(model, Optim(lr=LR)), flat(model)
    prompts = [Prompt(str(i), render("plain", p, tokenizer)) for i, p in enumerate(load_problems("arithmetic:train")[:4])]
    for step in range(UPDATES):
        trees = grow(Chains(group_size=6, max_response_tokens=16), backend, prompts, seed=step)
        trees = [t.with_rewards({int(leaf): float(sum(t.path_tokens(int(leaf)).tolist()) % 3 == 0) for leaf in t.leaves}) for t in trees]
        options = {"vocab_size": len(tokenizer), "autocast_dtype": autocast, "correction": correction or CorrectionOptions()}
        update(model, optimizer, trees, Group()(trees), PolicyLoss(), **options)
        sync(backend, model, step)
    return flat(model) - start


def flat(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def as_in_float32(found, wanted):
    """Whether the weights have moved as in a float32 run."""
    return float(torch.nn.functional.cosine_similarity(found, wanted, dim=0)) > 0.95 and 0.9 < float(found.norm() / wanted.norm()) < 1.1


def config_of(**tables):
    return build([("test", {"algo": "grpo"} | tables)])


def test_small_updates_move_the_weights_as_in_float32():
    wanted = moved(config_of())
    assert as_in_float32(moved(config_of(backend={"dtype": "bfloat16"})), wanted)
    rounded = copy.copy(load_model("tiny", dtype="bfloat16", device="cpu"))  # what a bfloat16 engine once made of the trainer
    lost = displaced(rounded, "bfloat16")
    assert not as_in_float32(lost, wanted)
    assert float((lost != 0).double().mean()) < 0.01


@pytest.mark.parametrize(
    ("engine", "trainer", "computes", "keeps"),
    [
        ("float32", "auto", "float32", "float32"),
        ("float64", "auto", "float64", "float64"),
        ("bfloat16", "auto", "bfloat16", "float32"),
        ("bfloat16", "float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16", "float32"),
        ("float32", "bfloat16", "bfloat16", "float32"),
        ("float64", "float32", "float32", "float32"),
        ("float32", "float64", "float64", "float64"),
    ],
)
def test_the_trainer_never_keeps_bfloat16(engine, trainer, computes, keeps):
    config = config_of(backend={"dtype": engine}, update={"dtype": trainer})
    assert (config.trainer_dtype, config.master_dtype) == (computes, keeps)
    corrected = "bfloat16" in (engine, computes)
    assert config.corrections.importance == ("truncated" if corrected else "none")
    assert config.corrections.old_logprobs == ("recomputed" if corrected else "sampler")


SHORT = ["--schedule.steps", "2", "--schedule.problems-per-step", "4", "--sampler.group-size", "4", "--sampler.max-response-tokens", "24"]
QUIET = ["--evaluation.suite", "none", "--evaluation.every", "0", "--trackers", "none", "--backend.kind", "torch", "--backend.threads", "1"]
ROUGH = ["--filter.no-drop-dead", "--optim.lr", "1e-6"]


@pytest.mark.parametrize(
    ("engine", "trainer", "kept"),
    [("bfloat16", "auto", torch.float32), ("float64", "auto", torch.float64), ("float64", "float32", torch.float32)],
)
def test_a_run_keeps_its_weights_and_moments_whole(engine, trainer, kept, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--backend.dtype", engine, "--update.dtype", trainer]
    assert main(["run", "--algo", "grpo", *SHORT, *QUIET, *ROUGH, *flags, "--out", str(out)]) == 0, capsys.readouterr().err
    said = capsys.readouterr().err
    assert ("importance weights up to 2" in said) == (engine == "bfloat16")
    saved = out / "checkpoints" / "step-2"
    weights, moments = load_file(saved / "model.safetensors"), load_file(saved / "optimizer.safetensors")
    assert {w.dtype for w in weights.values()} == {kept}
    assert {v.dtype for name, v in moments.items() if name.endswith(("exp_avg", "exp_avg_sq"))} == {kept}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    gaps = [row["sync/probe_mean"] for row in rows if "sync/probe_mean" in row]
    assert len(gaps) == 2 and max(gaps) < (0.1 if engine == "bfloat16" else 1e-4)
    found = [(row["mismatch/kl_k3"], row["update/kl_old_k3"]) for row in rows if "mismatch/kl_k3" in row]
    assert len(found) == 2 and (min(mismatch for mismatch, _ in found) > 1e-6) == (engine == "bfloat16")
    assert max(own for _, own in found) < 1e-9  # the ratio is taken against the trainer's own log-probs, or there is no mismatch
    assert main(["run", "--resume", "--out", str(out)]) == 0

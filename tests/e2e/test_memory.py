"""Runs that recompute, run out of memory, or end: what they hold, and that it changes no number."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import rlzoo.training.loop as loop
import rlzoo.training.measure as measure
from rlzoo.backends.forwards import Forwards
from rlzoo.cli import main
from rlzoo.store.runs import RunFolder
from rlzoo.training.models import resolve

SMALL = [
    "--algo", "grpo", "--schedule.steps", "2", "--schedule.problems-per-step", "4", "--evaluation.every", "0", "--backend.capacity", "32",
    "--backend.threads", "1", "--backend.dtype", "float64", "--trackers", "none", "--evaluation.k", "1",
]  # fmt: skip


def final_weights(out: Path, *flags: str) -> dict[str, torch.Tensor]:
    assert main(["run", "--out", str(out), *SMALL, "--evaluation.suite", "none", *flags]) == 0
    return load_file(RunFolder.open(out).final / "model.safetensors")


@pytest.mark.parametrize("layout", ["packed", "unrolled"])
def test_a_run_that_recomputes_layers_is_the_same_run(tmp_path: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    kept = final_weights(tmp_path / "kept", "--update.layout", layout)
    again = final_weights(tmp_path / "again", "--update.layout", layout, "--update.gradient-checkpointing", "on")
    assert "gradient checkpointing" in "".join(capsys.readouterr())
    base = load_file(Path(resolve("tiny")) / "model.safetensors")
    assert max(float((kept[k] - base[k]).abs().max()) for k in kept) > 1e-5
    for name in kept:
        torch.testing.assert_close(again[name], kept[name], rtol=0, atol=1e-9)


def test_an_engine_without_memory_and_scores_with_less_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out in sampling, and in scoring the reference: half the paths, half the pack for the rest of the run."""
    flags = ["--loss.kl-coef", "0.01"]
    expected = final_weights(tmp_path / "plenty", *flags)
    rows, score, wanted, budgets = Forwards.rows, loop.score, [], []

    def few_rows(self: Any, cache: Any, state: Any, count: int) -> Any:
        if count > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return rows(self, cache, state, count)

    def scoring(model: Any, trees: Any, *, only: Any, token_budget: Any, **options: Any) -> Any:
        wanted.append((sum(int(m.sum()) for m in only), sum(len(t.tokens) for t in trees)))
        if not budgets:
            token_budget.run(lambda tokens: budgets.append(tokens) or failing(tokens))
        return score(model, trees, only=only, token_budget=token_budget, **options)

    def failing(tokens: int) -> None:
        if tokens > 4096:
            raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(Forwards, "rows", few_rows)
    monkeypatch.setattr(loop, "score", scoring)
    found = final_weights(tmp_path / "little", *flags)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-9)
    metrics = RunFolder.open(tmp_path / "little").metrics()
    assert [m["update/token_budget"] for m in metrics] == [4096, 4096]
    # the reference scores what credit reaches, not whole trees
    assert [credited for credited, _ in wanted] == [m["update/trained"] for m in metrics]
    assert all(credited < everything for credited, everything in wanted)


def test_the_end_of_a_run_holds_no_moments_and_one_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, final, evaluate = measure.load_model, measure.Measurer.final, measure.Measurer._evaluate
    bases: list[Any] = []
    seen: list[tuple[str, bool]] = []

    def loading(*args: Any, device: str, **options: Any) -> Any:
        assert device == "cpu"  # never beside engine and trainer on their device
        loaded = original(*args, device=device, **options)
        bases.append(weakref.ref(loaded.model))
        return loaded

    def at_the_end(self: Any, model: Any) -> Any:
        optimizers = [o for o in gc.get_objects() if isinstance(o, torch.optim.AdamW)]
        optimizers = [o for o in optimizers if any(p is model.lm_head.weight for p in o.param_groups[0]["params"])]
        assert optimizers and not any(o.state for o in optimizers)
        return final(self, model)

    def evaluating(self: Any, suite: Any, *, name: Any, **settings: Any) -> Any:
        gc.collect()
        held = self._backend.model.model.norm.weight
        base = load_file(Path(resolve("tiny")) / "model.safetensors")["model.norm.weight"]
        seen.append((name, torch.equal(held.to(base.dtype), base)))
        assert not [ref for ref in bases if ref() is not None]
        return evaluate(self, {k: list(v)[:2] for k, v in suite.items()}, name=name, **settings)

    monkeypatch.setattr(measure, "load_model", loading)
    monkeypatch.setattr(measure.Measurer, "final", at_the_end)
    monkeypatch.setattr(measure.Measurer, "_evaluate", evaluating)
    out = tmp_path / "run"
    assert main(["run", "--out", str(out), *SMALL, "--evaluation.suite", "mini", "--evaluation.max-response-tokens", "16"]) == 0
    assert seen == [("trained", False), ("base", True)] and len(bases) == 1

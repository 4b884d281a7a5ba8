"""What an update does when memory runs out, and what it does to need less of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed._tools.mem_tracker import MemTracker

import rlzoo.training.update as update_module
from rlzoo.losses import logprobs as logprobs_module
from rlzoo.losses.correction import CorrectionOptions
from rlzoo.losses.policy import PolicyLoss
from rlzoo.training.forward import autocast, recompute_layers
from rlzoo.training.optim import Optim, allocate_moments, make_optimizer
from rlzoo.training.retry import MIN_TOKEN_BUDGET, TokenBudget
from rlzoo.training.update import BrokenStepError, ForwardOptions, credited, gradients, score, update
from tests.reference import VOCAB, random_credit, random_tree, tiny_model

OUT = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
]


def a_batch(trees: int = 48) -> tuple[list[Any], list[Any]]:
    rng, model = np.random.default_rng(0), tiny_model()
    grown = [random_tree(rng, model, nodes=8) for _ in range(trees)]
    return grown, [random_credit(rng, t) for t in grown]


def trained(trees: Any, credits: Any, steps: int = 2, **options: Any) -> tuple[torch.Tensor, dict[str, float], Any]:
    """Weights after `steps` updates by AdamW, the last one's metrics, and the optimiser."""
    model = tiny_model()
    optimizer = make_optimizer(model, Optim(lr=1e-2, weight_decay=0.1))
    for _ in range(steps):
        metrics = update(model, optimizer, trees, credits, PolicyLoss(), vocab_size=VOCAB, **options)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), metrics, optimizer


@contextmanager
def failing_above(monkeypatch: pytest.MonkeyPatch, tokens: int, error: BaseException) -> Iterator[None]:
    original = update_module.pack_logprobs

    def limited(model: Any, p: Any, *args: Any, **kwargs: Any) -> Any:
        if p.ids.size > tokens:
            raise error
        return original(model, p, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(update_module, "pack_logprobs", limited)
        yield


@pytest.mark.parametrize("error", OUT, ids=lambda e: type(e).__name__)
def test_the_budget_that_scoring_was_left_with_is_kept(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Old log-probs are scored first: the update starts where they ended, and so does the next score."""
    trees, credits = a_batch()
    scored = {"correction": CorrectionOptions(old_logprobs="recomputed")}
    expected, _, _ = trained(trees, credits, **scored)
    said: list[str] = []
    budget = TokenBudget(2048, said.append)
    with failing_above(monkeypatch, 600, error):
        found, metrics, _ = trained(trees, credits, token_budget=budget, **scored)
        score(tiny_model(), trees, token_budget=budget)
    assert said == [f"out of memory at a token budget of {n}; continuing with {n // 2}" for n in (2048, 1024)]
    assert budget.tokens == metrics["token_budget"] == 512
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("moment", [0, 1, 7])
def test_no_memory_for_the_moments_is_out_of_memory_like_any_other(monkeypatch: pytest.MonkeyPatch, moment: int) -> None:
    """The moments are made in the first step: that too is repeated with smaller packs, and nothing else changes."""
    trees, credits = a_batch(6)
    expected, _, _ = trained(trees, credits)
    original, calls = torch.zeros_like, []

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == moment + 1:
            raise OUT[0]
        return original(*args, **kwargs)

    said: list[str] = []
    monkeypatch.setattr(torch, "zeros_like", failing)
    found, metrics, _ = trained(trees, credits, token_budget=TokenBudget(2048, said.append))
    assert len(said) == 1 and metrics["token_budget"] == 1024
    assert torch.equal(found, expected)


def test_an_optimiser_that_finds_no_memory_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    trees, credits = a_batch(6)
    expected, _, _ = trained(trees, credits)
    original, calls = torch.optim.AdamW.step, []

    def failing(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise OUT[1]
        return original(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", failing)
    said: list[str] = []
    found, _, _ = trained(trees, credits, token_budget=2048, message=said.append)
    assert len(said) == 1 and torch.equal(found, expected)


def test_a_step_that_broke_off_half_way_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    def half(self: Any, *args: Any) -> None:
        with torch.no_grad():
            self.param_groups[0]["params"][0].add_(1.0)
        raise OUT[0]

    monkeypatch.setattr(torch.optim.AdamW, "step", half)
    with pytest.raises(BrokenStepError, match="mini-batch 1 of 1"):
        trained(*a_batch(6), token_budget=2048)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_moments_made_beforehand_are_those_of_the_first_step(dtype: torch.dtype) -> None:
    states = []
    for beforehand in (True, False):
        model = tiny_model(dtype=dtype)
        optimizer = make_optimizer(model, Optim(lr=1e-2))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        if beforehand:
            allocate_moments(optimizer)
        optimizer.step()
        states.append(optimizer.state_dict())
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, ours in states[0]["state"].items():
        theirs = states[1]["state"][index]
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)


def test_nothing_is_halved_below_the_floor() -> None:
    def work(tokens: int) -> None:
        raise OUT[0]

    budget = TokenBudget(4 * MIN_TOKEN_BUDGET, lambda _: None)
    with pytest.raises(torch.OutOfMemoryError):
        budget.run(work)
    assert budget.tokens == MIN_TOKEN_BUDGET


def test_credited_tokens_are_all_that_an_update_can_train() -> None:
    trees, credits = a_batch(8)
    _, metrics, _ = trained(trees, credits, steps=1)
    masks = credited(trees, credits)
    assert 0 < metrics["trained"] == sum(int(m.sum()) for m in masks) < sum(len(t.tokens) for t in trees)


# -- less memory -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["packed", "unrolled"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_gradient_checkpointing_gives_the_same_gradient(layout: str, family: str) -> None:
    trees, credits = a_batch(8)
    weights, _ = update_module.aggregate(trees, credits, "token_mean")
    found = []
    for on in (False, True):
        model = tiny_model(family=family).train()
        calls: list[int] = []
        for layer in model.model.layers:
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if on:
            recompute_layers(model)
        options = ForwardOptions(vocab_size=VOCAB, layout=layout)  # type: ignore[arg-type]
        calls.clear()
        result = gradients(model, trees, weights, [t.logprobs for t in trees], PolicyLoss(), options, head=update_module.Head(True))
        assert len(calls) == (1 + on) * len(model.model.layers) * result.stats.packs
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)
    assert found[0].abs().max() > 1e-3


def held_after_forward(on: bool) -> int:
    """Bytes that the forward pass of a pack leaves behind for the backward pass."""
    model = tiny_model(dtype=torch.float32, num_hidden_layers=6).train()
    if on:
        recompute_layers(model)
    tracker, ids = MemTracker(), torch.zeros(4, 64, dtype=torch.long)
    tracker.track_external(model)
    with tracker:
        out = model.model(input_ids=ids, use_cache=False).last_hidden_state
        held = tracker.get_tracker_snapshot("current")[torch.device("cpu")]["Total"]
    del out
    return int(held)


def test_gradient_checkpointing_holds_less() -> None:
    assert held_after_forward(True) < 0.4 * held_after_forward(False)


def test_models_that_cannot_be_checkpointed_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear does not support gradient checkpointing"):
        recompute_layers(torch.nn.Linear(2, 2))


def test_autocast_keeps_no_copies_of_weights() -> None:
    """Under torch's cache every cast weight stays to the end of the pass."""
    layers = torch.nn.Sequential(*[torch.nn.Linear(256, 256, bias=False) for _ in range(8)])
    tracker = MemTracker()
    tracker.track_external(layers)
    x = torch.randn(1, 256)
    with tracker, autocast(torch.device("cpu"), torch.bfloat16):
        for layer in layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    weights = sum(p.nbytes for p in layers.parameters())
    assert tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"] < weights * 1.2


@settings(deadline=None)
@given(st.integers(2, 3000), st.integers(1, 40), st.sampled_from([torch.float32, torch.float64]), st.integers(1 << 8, 1 << 14))
def test_chunks_of_logits_are_sized_by_bytes(vocab: int, tokens: int, dtype: torch.dtype, most: int) -> None:
    made: list[int] = []
    original = logprobs_module._up

    def recording(logits: torch.Tensor) -> torch.Tensor:
        made.append(original(logits).nbytes)
        return original(logits)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs_module, "_up", recording)
        hidden, weight = torch.zeros(tokens, 2, dtype=dtype), torch.zeros(vocab, 2, dtype=dtype)
        logprobs_module.token_logprobs(hidden, weight, torch.zeros(tokens, dtype=torch.long), chunk_bytes=most)
    row = vocab * dtype.itemsize
    assert max(made) <= max(most, row)
    assert len(made) == -(-tokens // max(1, most // row))

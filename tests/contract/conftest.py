"""The backends under contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlzoo.backends.scripted import ScriptedBackend
from rlzoo.backends.torch import TorchBackend
from tests.engines import EOS, VLLM_SHAPE, Bigram, Engine, vllm_engine, with_ends


@pytest.fixture(params=["torch-float64", "torch-float32", "scripted", pytest.param("vllm", marks=pytest.mark.vllm)])
def engine(request: pytest.FixtureRequest, tiny_model: Any, tiny_tokenizer: Any) -> Engine:
    if request.param == "scripted":
        model = Bigram()

        def make_scripted(capacity: int = 8, **_: Any) -> ScriptedBackend:
            return ScriptedBackend(tiny_tokenizer, capacity=capacity, vocabulary=272, eos_ids=EOS, max_context=512)

        return Engine(make_scripted, model, 1e-9, True)
    if request.param == "vllm":
        return vllm_engine(with_ends(tiny_model(**VLLM_SHAPE)), tiny_tokenizer, request.addfinalizer)
    dtype = torch.float64 if request.param == "torch-float64" else torch.float32
    model = with_ends(tiny_model(dtype))

    def make(capacity: int = 8, **options: Any) -> TorchBackend:
        return TorchBackend(model, tiny_tokenizer, capacity=capacity, **options)

    return Engine(make, model, 1e-9 if dtype == torch.float64 else 1e-4, dtype == torch.float64)


@pytest.fixture
def vllm32(request: pytest.FixtureRequest, tiny_model: Any, tiny_tokenizer: Any) -> Engine:
    return vllm_engine(with_ends(tiny_model(**VLLM_SHAPE)), tiny_tokenizer, request.addfinalizer)


@pytest.fixture
def torch64(tiny_model: Any, tiny_tokenizer: Any) -> Engine:
    model = with_ends(tiny_model(torch.float64))
    return Engine(lambda capacity=8, **o: TorchBackend(model, tiny_tokenizer, capacity=capacity, **o), model, 1e-9, True)

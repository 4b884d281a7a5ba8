"""Which engine a run samples with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .protocol import Backend, SamplingParams

if TYPE_CHECKING:
    from ..config import BackendOptions
    from ..training.models import Described
    from .server import ServerBackend

KINDS = ("auto", "torch", "vllm")


def choose(options: BackendOptions, device: str) -> str:
    """The kind of engine that `options` mean on a torch device: auto is vLLM on a GPU where it is installed and fits, else torch.

    Raises:
        ValueError: unknown kind, or vLLM is asked for and cannot be used; it says why.
    """
    from .vllm import refusal

    if options.kind not in KINDS:
        raise ValueError(f"backend.kind = {options.kind!r}; allowed: {', '.join(KINDS)}")
    if options.kind == "torch" or (options.kind == "auto" and device == "cpu"):
        return "torch"
    why = refusal(options.dtype, device)
    if why and options.kind == "vllm":
        raise ValueError(f"backend.kind = 'vllm': {why}")
    return "torch" if why else "vllm"


def open_backend(options: BackendOptions, model: Any, tokenizer: Any, device: str, turns: frozenset[int] = frozenset()) -> Backend:
    """An engine holding its own copy of `model`'s weights, in its own precision (`options.dtype`). `turns`: ids that end a response beside
    those that the model names.

    Raises:
        ValueError: see `choose`, or the model does not fit the engine.
        EngineError: the engine could not be started.
    """
    shared: dict[str, Any] = {
        "capacity": options.capacity,
        "dtype": options.dtype,
        "device": device,
        "max_context": options.max_context or None,
        "turns": turns,
    }
    if choose(options, device) == "vllm":
        from .vllm import VllmBackend

        return VllmBackend(model, tokenizer, memory=options.memory, sleep=options.sleep, timeout_s=options.timeout_s, **shared)
    from .torch import TorchBackend

    return TorchBackend(model, tokenizer, **shared)


def open_server(
    url: str,
    described: Described,
    *,
    model: str,
    planned: Sequence[SamplingParams],
    options: BackendOptions,
    turns: frozenset[int] = frozenset(),
) -> ServerBackend:
    """The engine behind `url`, which has to serve, under the name `model` if it serves several, the model that is `described` here; of
    `options` capacity, max_context and timeout_s count. The environment variable RLZOO_API_KEY holds its key, if it wants one.

    Raises:
        ValueError: see `ServerBackend`.
    """
    from .drawing import end_ids
    from .server import ServerBackend
    from .weights import context_length

    return ServerBackend(
        url,
        described.tokenizer,
        eos_ids=end_ids(described.tokenizer, described, turns),
        vocabulary=int(described.config.get_text_config().vocab_size),
        max_context=context_length(described.config, options.max_context or None),
        model=model,
        capacity=options.capacity,
        timeout_s=options.timeout_s,
        key=os.environ.get("RLZOO_API_KEY"),
        planned=planned,
    )

"""What the tests of every backend share: the trainer's modules, requests, and teacher-forced passes.

The passes are plain forwards of the trainer's module and plain numpy; nothing of the engines is reused.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from rlzoo.backends.protocol import SamplingParams, SegmentRequest, SegmentResult
from rlzoo.backends.torch import TorchBackend
from rlzoo.sampling.chains import Chains
from rlzoo.sampling.grow import Prompt
from rlzoo.sampling.nary import Nary
from rlzoo.tree import Tree

KNOWN_IDS = 258  # of 272 rows of the model's vocabulary
EOS = [1, *range(40, 70)]  # many, so that paths end early and also at once
ids = itertools.count(1_000_000)

SAMPLERS = [
    Nary(branching=3, segment_tokens=(4, 5, 7)),
    Nary(branching=3, segment_tokens=(4, 5, 7), continuation=True),
    Chains(group_size=9, max_response_tokens=14),
]
SAMPLER_IDS = ["nary", "nary-continuation", "chains"]
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0.6),
    SamplingParams(top_p=0.7),
    SamplingParams(top_k=12),
    SamplingParams(temperature=1.4, top_p=0.9, top_k=40),
    SamplingParams(temperature=0),
]


class Bigram(torch.nn.Module):
    """What a trainer of the scripted backend's weights would look like."""

    def __init__(self) -> None:
        super().__init__()
        table = np.random.default_rng(0).normal(size=(272, 272))
        self.bigram = torch.nn.Parameter(torch.from_numpy(table))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.bigram[input_ids])


@dataclass(frozen=True)
class Engine:
    """A backend's maker, the trainer's module it serves, and how exact it promises to be."""

    make: Callable[..., Any]
    model: Any
    tolerance: float
    exact: bool
    hottest: float = 50.0  # temperature


VLLM_SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}  # its kernels want heads of 32


def vllm_engine(model: Any, tokenizer: Any, at_end: Callable[[Callable[[], None]], None]) -> Engine:
    """vLLM on CPU in float32; what `make` made is closed at the end."""
    from rlzoo.backends.vllm import VllmBackend

    def make(capacity: int = 8, **options: Any) -> VllmBackend:
        made = VllmBackend(model, tokenizer, capacity=capacity, **options)
        at_end(made.close)
        return made

    return Engine(make, model, 1e-4, False, hottest=2.0)


def with_ends(model: Any) -> Any:
    model.generation_config.eos_token_id = EOS
    return model


def prompts_of(tokenizer: Any, count: int = 6) -> list[Prompt]:
    """Ragged prompts."""
    return [Prompt(f"p{i}", tokenizer.encode(f"problem {i}: " + "2+3*" * (1 + i % 4))) for i in range(count)]


def requests_of(prompts: Sequence[Prompt], siblings: int, max_tokens: int, params: SamplingParams) -> list[SegmentRequest]:
    made = []
    for p, prompt in enumerate(prompts):
        parent = next(ids)
        made += [SegmentRequest(next(ids), parent, prompt.ids, max_tokens, 1000 * p + k, params) for k in range(siblings)]
    return made


def drain(backend: Any, requests: Sequence[SegmentRequest]) -> dict[int, SegmentResult]:
    backend.submit(requests)
    results: dict[int, SegmentResult] = {}
    while len(results) < len(requests):
        results.update((r.id, r) for r in backend.step())
    return results


def teacher(model: Any, context: Sequence[int], tokens: Sequence[int], params: SamplingParams) -> np.ndarray:
    """Log-probs of `tokens` after `context`: one plain forward, and the sampled distribution written out in numpy."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*context, *tokens]])).logits[0].double().numpy()
    out = []
    for i, token in enumerate(tokens):
        row = logits[len(context) + i - 1, :KNOWN_IDS]
        row = row / (params.temperature or 1.0)
        p = np.exp(row - row.max())
        p /= p.sum()
        if params.temperature > 0:
            if params.top_k:
                p[np.argsort(-p, kind="stable")[params.top_k :]] = 0
                p /= p.sum()
            order = np.argsort(-p, kind="stable")
            mass_before = np.cumsum(p[order]) - p[order]
            p[order[(mass_before >= params.top_p) & (np.arange(len(p)) > 0)]] = 0 if params.top_p < 1 else p[order[-1]]
            p /= p.sum()
        out.append(np.log(p[token]))
    return np.array(out)


def shape_of(tree: Tree) -> tuple[Any, ...]:
    return tuple(getattr(tree, name).tolist() for name in ("parent", "offsets", "tokens", "stop", "leaves"))


def expected_forwards(trees: Sequence[Tree]) -> int:
    """Prompts + sampled tokens - last tokens of paths never extended."""
    return sum(len(t.prompt) + t.sampled_tokens - len(t.leaves) for t in trees)


def holds_anything(backend: TorchBackend) -> bool:
    waiting = backend._waiting
    return bool(waiting.known or waiting.released or waiting.queued or list(waiting) or backend._store.bytes or backend._running)


class Counter:
    """Counts the non-pad tokens that go through a model, by a hook: padding is the run of pad ids that ends a row."""

    def __init__(self, model: Any, pad: int) -> None:
        self.tokens, self.pad = 0, pad
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        for row in kwargs["input_ids"].tolist():
            while len(kwargs["input_ids"][0]) > 1 and row[-1] == self.pad:
                row.pop()
            self.tokens += len(row)


def perturbed(model: Any, only: str = "") -> Any:
    """A trainer one update later."""
    other = copy.deepcopy(model)
    torch.manual_seed(9)
    with torch.no_grad():
        for name, p in other.named_parameters():
            if only in name:
                p.add_(0.05 * torch.randn_like(p))
    return other


def nudged(model: Any, only: str = "") -> Any:
    """A trainer one small update later: log-probs move less than bfloat16 rounds them, and most weights not at all in bfloat16."""
    later = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in later.named_parameters():
            if only in name:
                p.mul_(1 + 1e-3 * torch.randn_like(p))
    return later


def probes(tokenizer: Any) -> list[list[int]]:
    return [list(p.ids) for p in prompts_of(tokenizer, 3)]

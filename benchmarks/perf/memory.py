"""The memory estimate of an update against torch's memory tracker, on fake tensors: shapes and types are real, nothing is computed.

    python -m rlzoo.benchmarks.perf.memory [--models 1.5b 7b] [--tokens 8192 32768] [--layers N]

Two packs of chains (prompt 128, response 1,920 tokens) go through `pack_logprobs`, a loss and `backward` under bfloat16 autocast with
float32 weights, the second with the first one's gradients in place; then one step of AdamW. The tracker (`MemTracker`) counts every
storage that is alive. Fake tensors live on a CPU, so attention keeps a CPU kernel's tensors; the estimate's are those of a kernel of
the same kind. Prints one line per case: measured and estimated peak in GB and their ratio.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlzoo.training.forward import Head, autocast, forward_of, pack_logprobs, recompute_layers
from rlzoo.training.memory import Load, ModelShape, update_bytes
from rlzoo.training.optim import Optim, make_optimizer
from rlzoo.training.packing import pack
from rlzoo.training.rows import Layout
from rlzoo.tree import Segment, Tree

MODELS: dict[str, dict[str, Any]] = {  # Qwen2.5-Math
    "1.5b": {
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7b": {
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
PROMPT, RESPONSE = 128, 1920
CHUNK = 1 << 26  # what fake tensors on a CPU get


def shape_of(name: str, layers: int | None = None) -> tuple[dict[str, Any], ModelShape]:
    sizes = MODELS[name] | ({} if layers is None else {"num_hidden_layers": layers})
    return sizes, ModelShape.of(sizes | {"model_type": "qwen2", "hidden_act": "silu"})


def measure(name: str, tokens: int, checkpointing: bool, layers: int | None = None, layout: Layout = "packed") -> int:
    """Peak bytes of an update with packs of `tokens`, weights, gradients and moments included."""
    sizes, _ = shape_of(name, layers)
    chain = Tree.from_segments([1] * PROMPT, [Segment(0, [1] * RESPONSE, [-1.0] * RESPONSE)])
    trees = [chain] * (tokens // (PROMPT + RESPONSE))
    (packed,), _ = pack(trees, [np.arange(PROMPT + RESPONSE) >= PROMPT for _ in trees], tokens, layout=layout)
    cpu = torch.device("cpu")
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = Qwen2ForCausalLM(Qwen2Config(**sizes, attn_implementation="sdpa", max_position_embeddings=1 << 15)).train()
        if checkpointing:
            recompute_layers(model)
        optimizer = make_optimizer(model, Optim())
        for p in model.parameters():  # moments, as after a first step
            optimizer.state[p] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(2):
                tracker.reset_mod_stats()
                with forward_of(model, layout), autocast(cpu, torch.bfloat16):
                    logprobs, _ = pack_logprobs(model, packed, Head(True), temperature=1.0, vocab_size=sizes["vocab_size"] - 271)
                with forward_of(model, layout):
                    logprobs.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return int(tracker.get_tracker_snapshot("peak")[cpu]["Total"])


def estimated(name: str, tokens: int, checkpointing: bool, layers: int | None = None) -> int:
    """What the estimate says of the same."""
    _, shape = shape_of(name, layers)
    load = Load(pack=tokens, path=PROMPT + RESPONSE, checkpointing=checkpointing, chunk=CHUNK)
    return 4 * load.master * shape.weights + update_bytes(shape, load)["peak"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Memory estimate against torch's memory tracker.")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192, 32768])
    parser.add_argument("--layers", type=int, help="instead of all 28")
    options = parser.parse_args(argv)
    for name in options.models:
        for tokens in options.tokens:
            for checkpointing in (False, True):
                measured = measure(name, tokens, checkpointing, options.layers)
                said = estimated(name, tokens, checkpointing, options.layers)
                how = "checkpointing" if checkpointing else "everything kept"
                print(
                    f"{name:>5} {tokens:>6} tokens, {how:<15}: {measured / 1e9:7.2f} GB measured, {said / 1e9:7.2f} GB estimated, "
                    f"ratio {said / measured:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()

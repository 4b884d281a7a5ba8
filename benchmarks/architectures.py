"""Which architectures the torch engine and the update compute exactly: small random models of each kind against their own eager forward.

    python -m rlzoo.benchmarks.architectures                       # prints the table
    python -m rlzoo.benchmarks.architectures --page docs/models.md # and writes it between the marks of that page

Weights are random and large, so that attention, windows and caps matter; contexts are short and windows shorter. Every model is
opened as a run opens it (`prove_opening`, `exactness`); what is refused is refused in a run too, with the reason given here.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from rlzoo.backends.torch import TorchBackend
from rlzoo.report.grid import Grid
from rlzoo.store.files import read_text, write_aside
from rlzoo.training.dropout import switch_off_dropout
from rlzoo.training.exactness import exactness, layout_gap
from rlzoo.training.models import load_tokenizer
from rlzoo.training.opening import prove_opening

BEGIN, END = "<!-- made by python -m rlzoo.benchmarks.architectures; do not edit -->", "<!-- end of the table -->"
CONTEXT = 64
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT: dict[str, Any] = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16}
LATENT |= {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 24,
    "factor": 2.0,
}
FALCON = {"head_dim": None, "new_decoder_architecture": False, "multi_query": False, "parallel_attn": True}


@dataclass(frozen=True)
class Architecture:
    """A kind of model by its name in transformers, with options beyond `SIZES`; None takes one of those away."""

    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or self.kind


ARCHITECTURES = [
    *map(Architecture, ("llama", "qwen2", "qwen3", "mistral", "gemma", "gemma3_text", "phi", "phi3", "olmo", "olmo2", "granite")),
    *map(Architecture, ("stablelm", "starcoder2", "cohere", "glm", "glm4", "smollm3", "ernie4_5", "exaone4", "nemotron", "helium")),
    *map(Architecture, ("seed_oss", "arcee", "persimmon", "gpt2", "gpt_neox", "opt", "biogpt", "gpt_bigcode", "xglm")),
    *(Architecture(kind, {"rotary_dim": 8}) for kind in ("gptj", "codegen")),
    *(Architecture(kind, EXPERTS) for kind in ("qwen2_moe", "qwen3_moe", "mixtral", "olmoe")),
    Architecture("gpt_oss", EXPERTS | {"sliding_window": CONTEXT}, "gpt_oss (sinks)"),
    Architecture("gemma2", {"sliding_window": CONTEXT}, "gemma2 (soft-capping)"),
    Architecture("mistral", {"sliding_window": 16}, "mistral (window 16)"),
    Architecture("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}, "qwen2 (window 16)"),
    Architecture("cohere2", {"sliding_window": 16}, "cohere2 (window 16)"),
    Architecture("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 16, "num_layers": 2}),
    Architecture("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 24}, "phi3 (longrope)"),
    Architecture("falcon", FALCON | {"alibi": False}, "falcon (rotary)"),
    Architecture("falcon", FALCON | {"alibi": True}, "falcon (alibi)"),
    Architecture("bloom"),
    Architecture("mpt", {"max_seq_len": CONTEXT, "d_model": 32, "n_heads": 4, "n_layers": 2}),
    Architecture("deepseek_v3", EXPERTS | LATENT | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}),
    Architecture("mamba", {"state_size": 8}),
    Architecture("recurrent_gemma"),
]  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What came of one: gaps are the largest deviations of log-probs from the model's own, None where nothing was computed."""

    name: str
    engine: str
    engine_gap: float | None
    update: str
    update_gap: float | None

    def cells(self) -> list[str]:
        def gap(value: float | None) -> str:
            return "" if value is None else "below 1e-4" if value < 1e-4 else f"{value:.1g}"

        return [self.name, self.engine, gap(self.engine_gap), self.update, gap(self.update_gap)]


def build(architecture: Architecture, vocabulary: int) -> Any:
    """A small random model, the same each time."""
    torch.manual_seed(0)
    options = SIZES | {"vocab_size": vocabulary} | architecture.options
    config = AutoConfig.for_model(architecture.kind, **{name: value for name, value in options.items() if value is not None})
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.25)
    return model


def judge(architecture: Architecture, tokenizer: Any) -> Verdict:
    """Open engine and update as a run does."""
    model = build(architecture, max(tokenizer.get_vocab().values()) + 1)
    engine_gap = update_gap = None
    try:
        backend = TorchBackend(model, tokenizer, capacity=4)
        engine_gap = max(prove_opening(backend, model, "float32").largest)
        engine = "exact"
    except ValueError as error:
        engine = f"refused: {_short(error)}"
    try:
        switch_off_dropout(model)
        reason = exactness(model, CONTEXT)
        layout: Any = "unrolled" if reason else "packed"
        update_gap = layout_gap(model, layout, CONTEXT)[0]
        update = f"unrolled: {_short(reason)}" if reason else "packed"
    except ValueError as error:
        update = f"refused: {_short(error)}"
    return Verdict(architecture.name, engine, engine_gap, update, update_gap)


def _short(reason: object) -> str:
    text = " ".join(str(reason).split()).removeprefix("this model cannot be trained here: ")
    return text if len(text) <= 220 else f"{text[:217]}..."


def table(verdicts: Sequence[Verdict]) -> Grid:
    head = ["architecture", "sampling", "largest gap", "update", "largest gap"]
    return Grid("Architectures", head, [verdict.cells() for verdict in verdicts], names=5)


def main(argv: Sequence[str] | None = None) -> None:
    """Judge every architecture, print the table, and write it into --page."""
    parser = argparse.ArgumentParser(prog="python -m rlzoo.benchmarks.architectures", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--page", type=Path, help="Markdown page with the two marks")
    options = parser.parse_args(argv)
    logging.set_verbosity_error()
    tokenizer = load_tokenizer("tiny")
    grid = table([judge(architecture, tokenizer) for architecture in ARCHITECTURES])
    grid.print()
    if options.page is not None:
        before, _, rest = read_text(options.page).partition(BEGIN)
        write_aside(options.page, f"{before}{BEGIN}\n\n{grid.markdown()}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()

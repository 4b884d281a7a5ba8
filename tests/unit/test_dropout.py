"""Training mode is evaluation mode, however a model drops or shakes values in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rlzoo.backends.torch import TorchBackend
from rlzoo.cli import main
from rlzoo.credit.group import Group
from rlzoo.losses.policy import PolicyLoss
from rlzoo.sampling.chains import Chains
from rlzoo.sampling.grow import grow
from rlzoo.training.dropout import switch_off_dropout
from rlzoo.training.exactness import exactness
from rlzoo.training.update import update
from tests.engines import prompts_of

SMALL = {"vocab_size": 272, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "pad_token_id": 0}
SMALL |= {"max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 1, "initializer_range": 0.2}
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 1, "attention_dropout": 0.1},
    "llama": {"num_key_value_heads": 1, "attention_dropout": 0.1},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512},
    "gpt_neo": {"attention_types": [[["global"], 2]], "num_layers": 2, "num_heads": 2, "embed_dropout": 0.1, "resid_dropout": 0.1},
    "gpt_neox": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8, "resid_pdrop": 0.1, "attn_pdrop": 0.1},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "layerdrop": 0.3, "dropout": 0.1},
    "biogpt": {"layerdrop": 0.3, "activation_dropout": 0.1},
    "bloom": {"n_layer": 2, "n_head": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "falcon": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
    "mixtral": {"num_key_value_heads": 1, "num_local_experts": 4, "router_jitter_noise": 0.3, "attention_dropout": 0.1},
    "phi": {"resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 2, "layerdrop": 0.3, "activation_dropout": 0.1},
}  # fmt: skip


def model_of(kind: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(SMALL | KINDS[kind] | changes))
    return transformers.AutoModelForCausalLM.from_config(config)


@torch.no_grad()
def in_training(model: Any) -> torch.Tensor:
    model.train()
    return torch.stack([model(input_ids=torch.arange(40)[None], use_cache=False).logits[0] for _ in range(4)])


@pytest.mark.parametrize("kind", KINDS)
def test_training_computes_what_evaluation_computes(kind: str) -> None:
    model = model_of(kind)
    noisy = in_training(model)
    assert float((noisy - noisy[:1]).abs().max()) > 1e-3  # the seeded fault: passes differ
    told = switch_off_dropout(model)
    assert told and model.training
    quiet = in_training(model)
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=torch.arange(40)[None], use_cache=False).logits[0]
    assert torch.equal(quiet, expected.expand_as(quiet))
    assert switch_off_dropout(model) is None


def test_a_model_without_dropout_is_left_as_it_is() -> None:
    model = model_of("qwen2", attention_dropout=0.0)
    before = model.config.to_dict()
    state = torch.get_rng_state()
    assert switch_off_dropout(model) is None and model.config.to_dict() == before and torch.equal(torch.get_rng_state(), state)


def test_noise_under_a_name_that_nobody_knows_is_refused() -> None:
    model = model_of("qwen2", attention_dropout=0.0)
    inner = model.model.layers[0].mlp
    forward = inner.forward
    inner.forward = lambda x: forward(x) * (1 + 0.05 * torch.randn_like(x) * inner.training)
    with pytest.raises(ValueError, match="in training mode differ from those in evaluation mode by up to"):
        switch_off_dropout(model)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "qwen2"])
def test_the_first_update_is_on_policy(kind: str, tiny_tokenizer: Any) -> None:
    model = model_of(kind).eval()
    switch_off_dropout(model)
    assert exactness(model) is None
    trees = grow(Chains(group_size=4, max_response_tokens=12), TorchBackend(model, tiny_tokenizer), prompts_of(tiny_tokenizer, 3), seed=0)
    rng = np.random.default_rng(0)
    trees = [t.with_rewards({int(leaf): float(rng.integers(2)) for leaf in t.leaves}) for t in trees]
    options = {"vocab_size": len(tiny_tokenizer)}
    metrics = update(model, torch.optim.SGD(model.parameters(), lr=0.1), trees, Group()(trees), PolicyLoss(), **options)
    assert abs(metrics["ratio_mean"] - 1) < 1e-4 and metrics["kl_old_k3"] < 1e-6


def test_a_run_says_so_and_starts_on_policy(tiny_tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "gpt2", tmp_path / "run"
    model_of("gpt2").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    flags = "--schedule.steps 1 --schedule.problems-per-step 3 --schedule.mini-batches 1 --sampler.group-size 3 --filter.no-drop-dead"
    flags += " --sampler.max-response-tokens 16 --evaluation.suite none --evaluation.every 0 --trackers none --backend.threads 1"
    assert main(["run", "--algo", "grpo", "--model", str(folder), *flags.split(), "--out", str(out)]) == 0
    assert "dropout is switched off in training" in capsys.readouterr().err
    (row,) = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    assert abs(row["update/ratio_mean"] - 1) < 1e-4 and row["update/kl_old_k3"] < 1e-6

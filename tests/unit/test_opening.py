"""Every opening of an engine is proved against the model's own eager forward; models that it computes wrongly are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rlzoo.benchmarks.architectures import ARCHITECTURES, BEGIN, CONTEXT, END, Architecture, build, judge

from rlzoo import cli
from rlzoo.backends import forwards, kvcache
from rlzoo.backends.torch import TorchBackend
from rlzoo.backends.weights import context_length
from rlzoo.training.exactness import exactness
from rlzoo.training.models import load_tokenizer
from rlzoo.training.opening import own_logprobs, positions_go_by_length, prove_opening, switch_points

NAMED = {architecture.name: architecture for architecture in ARCHITECTURES}
PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer("tiny")


def made(name: str, tokenizer: Any, **options: Any) -> Any:
    architecture = NAMED[name]
    return build(Architecture(architecture.kind, architecture.options | options), max(tokenizer.get_vocab().values()) + 1)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3_moe", "gpt2", "gemma", "phi3", "cohere", "mpt"])
def test_models_that_are_computed_as_they_are(name: str, tokenizer: Any) -> None:
    model = made(name, tokenizer)
    found = prove_opening(TorchBackend(model, tokenizer, capacity=4), model, "float32")
    assert max(found.largest) < 1e-3 and found.tokens[0] <= 12 < CONTEXT - 8 == found.tokens[-1]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("gemma2 (soft-capping)", "this engine cannot compute the model: its attention uses softcap"),
        ("gpt_oss (sinks)", "this engine cannot compute the model: its attention uses s_aux"),
        (
            "gpt_neo",
            "does not compute the model as the model's own code does: after 12 tokens .* choose --backend.max-context of at most 16",
        ),
        ("phi3 (longrope)", "after 20 tokens log-probs differ by .* choose --backend.max-context of at most 24"),
        ("mistral (window 16)", "slides over 16 tokens; choose --backend.max-context of at most 16"),
        ("bloom", "this engine cannot compute the model"),
        ("falcon (alibi)", "this engine cannot compute the model"),
        ("recurrent_gemma", "this engine cannot compute the model"),
    ],
)
def test_models_that_are_computed_wrongly_are_refused(name: str, said: str, tokenizer: Any) -> None:
    model = made(name, tokenizer)
    with pytest.raises(ValueError, match=said) as caught:
        prove_opening(TorchBackend(model, tokenizer, capacity=4), model, "float32")
    assert "\n" not in str(caught.value)


def test_a_device_that_is_too_small_is_not_called_a_wrong_model(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama", tokenizer)
    backend = TorchBackend(model, tokenizer, capacity=4)

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model, "forward", full)
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory$"):
        prove_opening(backend, model, "float32")


@pytest.mark.parametrize("name", ["phi3 (longrope)", "gpt_neo"])
def test_what_the_refusal_proposes_works(name: str, tokenizer: Any) -> None:
    model = made(name, tokenizer)
    limit = {"phi3 (longrope)": 24, "gpt_neo": 16}[name]
    prove_opening(TorchBackend(model, tokenizer, capacity=4, max_context=limit), model, "float32")


def test_without_the_probe_at_the_switch_longrope_would_pass(tokenizer: Any) -> None:
    """The fault that a short probe and one far beyond the switch cannot show."""
    model = made("phi3 (longrope)", tokenizer)
    assert switch_points(model.config, CONTEXT) == [24] and positions_go_by_length(model.config)
    model.config.original_max_position_embeddings = model.config.rope_parameters["original_max_position_embeddings"] = CONTEXT
    prove_opening(TorchBackend(model, tokenizer, capacity=4), model, "float32")


@pytest.mark.parametrize("fault", ["mask", "position", "weights"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_seeded_fault_of_the_engine_is_found(fault: str, dtype: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama", tokenizer)
    backend = TorchBackend(model, tokenizer, capacity=4, dtype=dtype)
    prove_opening(backend, model, dtype)
    if fault == "mask":
        monkeypatch.setattr(forwards, "causal_mask", lambda q, p, d, device: kvcache.causal_mask(q, p, d, device).triu(p + 3))
    elif fault == "position":
        forward = backend.model.forward

        def shifted(**given: Any) -> Any:
            decoding = given["input_ids"].shape[1] == 1
            return forward(**given | {"position_ids": given["position_ids"] + 5 * decoding})

        monkeypatch.setattr(backend.model, "forward", shifted)
    else:
        with torch.no_grad():
            backend.model.get_output_embeddings().weight.mul_(0.7)
    backend.rest()
    with pytest.raises(ValueError, match="does not compute the model as the model's own code does"):
        prove_opening(backend, model, dtype)


def test_a_model_without_a_context_length_is_refused_by_option(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"does not state its context length; say it with --backend.max-context"):
        context_length(torch.nn.Module(), None)
    assert context_length(made("mpt", tokenizer).config, None) == CONTEXT


def test_training_on_what_is_inexact_even_unrolled_is_refused(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama", tokenizer)
    assert exactness(model, CONTEXT) is None
    monkeypatch.setattr("rlzoo.training.exactness.own_logprobs", lambda m, p, t: own_logprobs(m, p, t) - 0.5)
    with pytest.raises(ValueError, match=r"this model cannot be trained here: log-probs of unrolled responses differ .* by 0\.5"):
        exactness(model, CONTEXT)


@pytest.mark.parametrize("name", ["gemma2 (soft-capping)", "phi3 (longrope)"])
def test_eval_and_run_refuse_such_a_model(name: str, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    made(name, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for argv in (
        ["eval", str(folder), "--suite", "mini", "--max-response-tokens", "8"],
        ["run", "--algo", "grpo", "--model", str(folder), "--evaluation.suite", "none", "--evaluation.every", "0"],
    ):
        assert cli.main([*argv, "--backend.threads", "1", "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("rlzoo: this engine ") and not (tmp_path / "out").exists(), said


def test_the_page_says_what_the_command_finds(tokenizer: Any) -> None:
    text = PAGE.read_text(encoding="utf-8")
    rows = text[text.index(BEGIN) : text.index(END)].splitlines()
    assert len([row for row in rows if row.startswith("| ")]) == len(ARCHITECTURES) + 2 and len(ARCHITECTURES) >= 25
    for name in ("llama", "gpt2", "gemma2 (soft-capping)", "gpt_neo", "phi3 (longrope)", "gptj", "mamba"):
        (row,) = [row for row in rows if row.startswith(f"| {name} |")]
        cells, found = [cell.strip() for cell in row.strip("|").split(" | ")], judge(NAMED[name], tokenizer)
        assert cells[1].partition(":")[0] == found.engine.partition(":")[0] and cells[3].partition(":")[0] == found.update.partition(":")[0]

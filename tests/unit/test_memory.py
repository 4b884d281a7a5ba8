"""The memory estimate against torch's own counts, and what `--dry-run` says and leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from rlzoo.benchmarks.perf import memory as script

from rlzoo.cli import main, parse_run
from rlzoo.losses import logprobs
from rlzoo.sampling.chains import Chains
from rlzoo.sampling.nary import Nary
from rlzoo.sampling.segments import Segments
from rlzoo.training import fitting, memory, packing
from rlzoo.training.memory import Load, ModelShape, estimate

GB = 10**9
SHAPES = {name: script.shape_of(name)[1] for name in script.MODELS}


@pytest.mark.parametrize(
    ("name", "tokens", "checkpointing"), [("1.5b", 8192, False), ("1.5b", 32768, True), ("7b", 8192, False), ("7b", 8192, True)]
)
def test_an_update_takes_what_the_estimate_says(name: str, tokens: int, checkpointing: bool) -> None:
    """Forward, backward, AdamW on fake tensors of the real widths; few layers for speed (docs/memory.md has all of them)."""
    measured = script.measure(name, tokens, checkpointing, layers=2)
    assert script.estimated(name, tokens, checkpointing, layers=2) == pytest.approx(measured, rel=0.1)


def test_the_sizes_that_are_written_twice_are_the_same() -> None:
    """The estimate imports no torch, so it repeats numbers of modules that do."""
    assert memory.QUERY_BLOCK == packing.QUERY_BLOCK
    assert logprobs.CHUNK_BYTES["cuda"] == memory.CHUNK_BYTES


SMALL = {"vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6}


@pytest.mark.parametrize("kind", ["Qwen2", "Qwen3", "Llama", "Mistral", "Gemma", "Phi3", "Olmo2"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_as_torch_counts_them(kind: str, tied: bool) -> None:
    options = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": tied, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**options)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    counted = sum(p.numel() for p in model.parameters())
    assert ModelShape.of(config).weights == pytest.approx(counted, rel=0.01)
    assert ModelShape.of(json.loads(config.to_json_string(use_diff=False))).weights == ModelShape.of(config).weights


def test_the_models_of_the_presets_have_their_size() -> None:
    assert SHAPES["1.5b"].weights == 1_543_714_304
    assert SHAPES["7b"].weights == 7_615_616_512
    assert SHAPES["1.5b"].cache_bytes(2) == 28_672


@pytest.mark.parametrize(
    ("config", "message"),
    [({"hidden_size": 8}, "num_hidden_layers"), ({**SMALL, "num_experts": 8}, "mixture of experts"), ({}, "does not state")],
)
def test_models_that_the_estimate_does_not_know_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelShape.of(config)


@settings(deadline=None)
@given(st.integers(256, 65536), st.integers(64, 8192), st.integers(1, 512), st.booleans(), st.booleans())
def test_more_of_anything_never_needs_less(pack: int, path: int, capacity: int, reference: bool, checkpointing: bool) -> None:
    load = Load(pack=pack, path=path, eval_path=path, capacity=capacity, reference=reference, checkpointing=checkpointing)
    base = estimate(SHAPES["1.5b"], load).phases
    for more in (
        {"pack": 2 * pack},
        {"path": 2 * path, "eval_path": 2 * path},
        {"capacity": 2 * capacity},
        {"reference": True},
        {"engine": 4},
    ):
        grown = estimate(SHAPES["1.5b"], replace(load, **more)).phases
        assert all(grown[phase] >= base[phase] for phase in base)


@settings(deadline=None)
@given(st.integers(1, 1024), st.integers(30, 200))
def test_capacity_is_halved_until_the_cache_fits(capacity: int, gpu_gb: int) -> None:
    load = Load(capacity=capacity, path=4096)
    made = estimate(SHAPES["1.5b"], load, gpu_gb * GB)
    row = (4096 + 8) * SHAPES["1.5b"].cache_bytes(2)
    room = gpu_gb * GB - made.phases["sync"] + memory.PROBE_TOKENS * SHAPES["1.5b"].vocab * 8
    assert made.capacity in {capacity >> i for i in range(11)}
    assert made.capacity == 1 or made.capacity * row <= 0.8 * room
    assert made.capacity == capacity or 2 * made.capacity * row > 0.8 * room


def test_an_engine_with_a_share_of_its_own_keeps_it_unless_it_sleeps() -> None:
    """vLLM: cache and logits are within its share; capacity follows from the share."""
    load = Load(path=4096, eval_path=4096, engine_share=0.3)
    awake, asleep = (estimate(SHAPES["1.5b"], replace(load, sleeps=sleeps), 80 * GB) for sleeps in (False, True))
    assert awake.phases["sampling"] == asleep.phases["sampling"] == 12 * SHAPES["1.5b"].weights + 24 * GB
    assert awake.phases["update"] - asleep.phases["update"] == 24 * GB
    assert awake.capacity == 128  # of 256: 16.7 GB of 24, less 3.1 GB of weights, times 0.8


def test_one_gpu_of_80_gb_takes_full_training_of_the_small_model_and_not_of_the_large_one() -> None:
    for path in (2176, 4096):
        load = Load(pack=32768, path=path, eval_path=4096, capacity=256, reference=True, checkpointing=True)
        assert estimate(SHAPES["1.5b"], load, 80 * GB).peak < fitting.ROOM * 80 * GB
    assert estimate(SHAPES["7b"], Load(checkpointing=True), 80 * GB).phases["update"] > 80 * GB


def test_checkpointing_is_automatic_where_the_estimate_needs_it() -> None:
    config = parse_run(["--algo", "grpo", "--backend.dtype", "bfloat16"])[0]
    sizes, shape = script.shape_of("1.5b")
    loads = [fitting.load_of(config, sizes, checkpointing=on) for on in (False, True)]
    kept, again = (estimate(shape, load).phases["update"] for load in loads)
    assert again < kept
    for gpu, wanted in ((2 * kept, False), (kept, True), (again, True)):
        assert fitting.estimate_both(config, sizes, gpu)[0] is wanted
        for choice in ("on", "off"):
            fixed = replace(config, update=replace(config.update, gradient_checkpointing=choice))
            assert fitting.estimate_both(fixed, sizes, gpu)[0] is (choice == "on")


def test_on_a_gpu_the_trainer_asks_the_estimate(monkeypatch: pytest.MonkeyPatch, tiny_model: Any) -> None:
    model, config = tiny_model(), parse_run(["--algo", "grpo"])[0]
    assert not fitting.recomputes(config, model, 512)  # a CPU's memory is nobody's measure
    for total, wanted in ((1 << 40, False), (1 << 20, True)):
        monkeypatch.setattr("rlzoo.backends.memory.device_bytes", lambda device, total=total: total)
        assert fitting.recomputes(config, model, 512) is wanted


@pytest.mark.parametrize(
    "sampler",
    [
        Chains(group_size=5, max_response_tokens=9),
        Nary(branching=3, segment_tokens=(4, 5, 7)),
        Segments(width=8, depth=4, segment_tokens=6, branching=(2,), initial=(2,), fallback="none"),
    ],
    ids=lambda s: s.name,
)
def test_a_full_tree_has_as_many_tokens_as_its_sampler_says(sampler: Any, tiny_tokenizer: Any) -> None:
    from rlzoo.backends.scripted import ScriptedBackend
    from rlzoo.sampling.grow import grow
    from tests.engines import prompts_of

    endless = ScriptedBackend(tiny_tokenizer, vocabulary=272, eos_ids=frozenset(), max_context=512)
    for tree in grow(sampler, endless, prompts_of(tiny_tokenizer, 2), seed=0):
        assert tree.sampled_tokens == sampler.full_tree_tokens


# -- the command -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model_without_weights(tmp_path: Path) -> Path:
    folder = tmp_path / "math-1.5b"
    folder.mkdir()
    sizes = script.MODELS["1.5b"] | {"model_type": "qwen2", "hidden_act": "silu", "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(sizes))
    return folder


def test_dry_run_needs_no_weights_and_makes_nothing(
    model_without_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    options = ["run", "--preset", "treerpo-paper", "--model", str(model_without_weights)]
    assert main([*options, "--out", str(tmp_path / "made"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    for phase in ("sampling", "update", "sync", "evaluation"):
        assert f"\n{phase} " in said
    assert "it fits" in said and "of 80 GB" in said and "tokens" in said and " s of sampling" in said
    assert main([*options, "--dry-run", "--gpu-memory", "40"]) == 0
    said = capsys.readouterr().out
    assert "use gradient checkpointing" in said and "do not use" not in said
    assert main([*options, "--dry-run", "--gpu-memory", "16"]) == 0
    assert "it does not fit: update needs" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["36", "38", "40"])
def test_the_pack_that_is_proposed_fits(model_without_weights: Path, capsys: pytest.CaptureFixture[str], size: str) -> None:
    options = ["run", "--algo", "grpo", "--model", str(model_without_weights), "--backend.dtype", "bfloat16"]
    options += ["--max-prompt-tokens", "512", "--dry-run", "--gpu-memory", size]
    assert main([*options, "--update.token-budget", "65536"]) == 0
    proposed = capsys.readouterr().out.rsplit("GB; ", 1)[1].removesuffix(" would\n\n").split()
    assert proposed[0] == "--update.token-budget"
    assert main([*options, *proposed]) == 0
    assert "it fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu-memory", "0"], "--gpu-memory is 0.0; it must be a positive number"),
        (["--gpu-tflops", "nan"], "--gpu-tflops is nan"),
        (["--gpu-bandwidth", "fast"], "argument --gpu-bandwidth: invalid float value: 'fast'"),
        (["--model", "/nowhere/at-all"], "no config.json to estimate from"),
        (["--backend.capacity", "0"], "backend.capacity is 0"),
    ],
)
def test_dry_run_refuses_bad_input(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--algo", "grpo", "--dry-run", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_dry_run_loads_no_torch() -> None:
    code = "import sys; from rlzoo.cli import main; main(['run', '--algo', 'grpo', '--dry-run']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0

"""The embedded base model and its build."""

from __future__ import annotations

import hashlib
import json
import random
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2ForCausalLM

import rlzoo.data.tiny as tiny
from rlzoo.data.arithmetic import demonstrate, generate

FOLDER = Path(tiny.__file__).parents[1] / "assets" / "tiny"
SMALL = tiny.Shape(hidden=16, layers=1, heads=2, kv_heads=1, intermediate=16, vocabulary=300)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


def test_the_folder_is_a_plain_small_transformers_model(tokenizer: Any, model: Any) -> None:
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert isinstance(model, Qwen2ForCausalLM)
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) <= 6_000_000
    assert (FOLDER / "model.safetensors").exists()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.vocab_size == len(tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_the_tokenizer_is_exactly_reversible(tokenizer: Any) -> None:
    rng = random.Random(0)
    for p in generate("test", 300, seed=1):
        prompt, response = tiny.prompt_of(p.problem), demonstrate(p, rng)
        ids = tokenizer(prompt).input_ids + tokenizer(response).input_ids
        assert tokenizer.decode(ids) == prompt + response
        assert tokenizer(prompt + response).input_ids == ids  # the line end keeps prompt and response apart
    for text in ("naïve Σ∞ 漢字 🙂\t\r\n  two  spaces , and . dots", "\\frac{1}{2}\x00", "", " ", "<b>", "'s n't"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_committed_tokenizer_is_the_one_that_build_trains(tokenizer: Any) -> None:
    made = json.loads(tiny.build_tokenizer(0, tiny.Shape().vocabulary).backend_tokenizer.to_str())
    kept = json.loads(tokenizer.backend_tokenizer.to_str())
    assert made["model"] == kept["model"]
    assert made["pre_tokenizer"] == kept["pre_tokenizer"]


def test_digits_are_tokens_of_their_own(tokenizer: Any) -> None:
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    assert all(len(t) == 1 for t in texts if any(c.isdigit() for c in t))


def test_the_base_answers_in_the_format(tokenizer: Any, model: Any) -> None:
    """Greedy responses to unseen problems end on their own, in a boxed number; some are right and some wrong."""
    problems = generate("test", 24, seed=5, subjects=["chains"], levels=[1, 2, 3])
    tokens = tokenizer([tiny.prompt_of(p.problem) for p in problems], return_tensors="pt", padding=True)
    with torch.inference_mode():
        rows = model.generate(**tokens, do_sample=False, max_new_tokens=200)[:, tokens.input_ids.shape[1] :]
    texts = [t.split(tiny.EOS_TOKEN)[0] for t in tokenizer.batch_decode(rows)]
    assert all(tokenizer.eos_token_id in row for row in rows.tolist())
    assert sum("\\boxed{" in t and t.endswith("}") for t in texts) >= 23
    right = sum(t.endswith(f"\\boxed{{{p.answer}}}") for t, p in zip(texts, problems, strict=True))
    assert 0 < right < len(problems)


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


def test_build_is_deterministic_and_seeded(tmp_path: Path) -> None:
    lines: list[str] = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        tiny.build(tmp_path / name, seed=seed, steps=3, batch=4, shape=SMALL, threads=1, log=lines.append)
    first, second, other = (digests(tmp_path / name) for name in "abc")
    assert first == second
    assert first["model.safetensors"] != other["model.safetensors"]
    assert set(first) >= {"model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert any("step 3/3" in line for line in lines)
    AutoModelForCausalLM.from_pretrained(tmp_path / "a")


def test_build_learns(tmp_path: Path) -> None:
    losses: list[float] = []

    def log(line: str) -> None:
        if "loss" in line:
            losses.append(float(line.split("loss ")[1].split()[0]))

    tiny.build(tmp_path / "m", seed=0, steps=60, batch=16, shape=tiny.Shape(hidden=32, layers=1, intermediate=64), threads=1, log=log)
    assert losses[-1] < 0.6 * losses[0]


def test_only_response_tokens_are_trained_on(tokenizer: Any) -> None:
    ids, labels = next(tiny._batches(tokenizer, 0, 8, tiny.DEFAULT_MIX))
    texts = {tiny.prompt_of(""): ""} | dict(islice(tiny.demonstrations(0), 8 * 8))
    for row, target in zip(ids, labels, strict=True):
        kept = target != -100
        prompt = tokenizer.decode(row[: int(kept.nonzero()[0])])
        response = tokenizer.decode(target[kept])
        assert texts[prompt] + tiny.EOS_TOKEN == response
        assert torch.equal(row[kept], target[kept])


@pytest.mark.parametrize(("arguments", "said"), [({"steps": 0}, "steps = 0"), ({"batch": 0}, "batch = 0")])
def test_bad_sizes_are_refused(tmp_path: Path, arguments: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny.build(tmp_path / "x", **{"seed": 0, "steps": 1, **arguments})


def test_an_occupied_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ValueError, match="not an empty folder"):
        tiny.build(tmp_path, seed=0, steps=1)
    assert [f.name for f in tmp_path.iterdir()] == ["mine.txt"]


def test_generation_config_stops_at_the_end_token() -> None:
    told = json.loads((FOLDER / "generation_config.json").read_text())
    assert isinstance(told["eos_token_id"], int)

"""Which ids are sampled and trained on, and which end a response: one definition for engine, trainer, reference and probes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from rlzoo import cli
from rlzoo.backends.drawing import end_ids, forbidden_ids, known_vocabulary
from rlzoo.backends.torch import TorchBackend
from rlzoo.data.templates import turn_ends
from rlzoo.losses.logprobs import logits_logprobs, token_logprobs
from rlzoo.sampling.chains import Chains
from rlzoo.sampling.grow import Prompt, grow
from rlzoo.store.runs import RunFolder
from rlzoo.training.opening import own_logprobs
from rlzoo.training.update import score
from rlzoo.tree import Stop

HOLES = (7, 8, 30)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def holey(*added: str, template: str | None = None) -> Any:
    """A tokenizer of characters whose ids have holes, with special tokens beyond them."""
    characters = [chr(c) for c in range(32, 100)] + ["\n"]
    ids = [i for i in range(2, 200) if i not in HOLES][: len(characters)]
    vocabulary = {"<pad>": 0, "<eos>": 1} | dict(zip(characters, ids, strict=True))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<pad>"))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", additional_special_tokens=list(added))
    made.chat_template = template
    return made


def small(tokenizer: Any, *, extra: int = 40, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    rows = max(tokenizer.get_vocab().values()) + 1 + extra
    config = Qwen2Config(
        vocab_size=rows, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=64, initializer_range=0.3, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).to(dtype).eval()


def test_holes_and_padding_are_told_apart() -> None:
    tokenizer = holey("<|im_end|>")
    known = known_vocabulary(tokenizer)
    assert known.holes == HOLES and known.vocab_size == max(tokenizer.get_vocab().values()) + 1 > len(tokenizer)
    assert forbidden_ids(tokenizer, known.vocab_size + 3) == [*HOLES, *range(known.vocab_size, known.vocab_size + 3)]
    with pytest.raises(ValueError, match="the tokenizer has ids up to"):
        forbidden_ids(tokenizer, known.vocab_size - 1)


@pytest.mark.parametrize("chunk", [1, 400, 10**6])
def test_holes_have_no_probability_in_value_gradient_and_entropy(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*s, generator=generator, dtype=torch.float64).requires_grad_() for s in ((9, 5), (40, 5)))
    targets = torch.tensor([i for i in range(9) if i not in HOLES] + [9, 10])
    kept = torch.tensor([i for i in range(36) if i not in HOLES])
    expected = (hidden @ weight[kept].T / 0.7).log_softmax(-1)
    place = torch.tensor([kept.tolist().index(int(t)) for t in targets])
    want = expected[range(9), place].sum() - 0.3 * (expected.exp() * expected).sum()
    values, entropy = token_logprobs(hidden, weight, targets, temperature=0.7, vocab_size=36, holes=HOLES, chunk_bytes=chunk, entropy=True)
    assert entropy is not None
    got = values.sum() + 0.3 * entropy.sum()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    for ours, theirs in zip(torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, (hidden, weight)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    again, _ = logits_logprobs(hidden @ weight.T, targets, temperature=0.7, vocab_size=36, entropy=False, holes=HOLES)
    torch.testing.assert_close(again, values, rtol=0, atol=1e-10)


def test_engine_and_trainer_agree_on_a_tokenizer_with_holes() -> None:
    tokenizer = holey("<|im_end|>")
    model = small(tokenizer)
    backend = TorchBackend(model, tokenizer, capacity=8)
    trees = grow(Chains(group_size=8, max_response_tokens=24), backend, [Prompt("p", tokenizer.encode("12+3="))], seed=0)
    sampled = trees[0].tokens[len(trees[0].prompt) :]
    assert not set(sampled.tolist()) & set(HOLES) and len(set(sampled.tolist())) > 20
    (scores,) = score(model, trees, **known_vocabulary(tokenizer)._asdict())
    trained = slice(len(trees[0].prompt), None)
    np.testing.assert_allclose(scores[trained], trees[0].logprobs[trained], atol=1e-6)
    (without,) = score(model, trees, vocab_size=known_vocabulary(tokenizer).vocab_size)
    assert np.abs(without[trained] - trees[0].logprobs[trained]).max() > 1e-3  # what a bound alone would have given
    path = trees[0].path_tokens(int(trees[0].leaves[0]))
    np.testing.assert_allclose(own_logprobs(model, trees[0].prompt, path, tokenizer), trees[0].logprobs[trained][: len(path)], atol=1e-4)


@pytest.mark.parametrize(
    ("template", "chat_template", "added", "ends"),
    [
        ("qwen-boxed", None, ("<|im_start|>", "<|im_end|>"), ["<|im_end|>"]),
        ("qwen-boxed", None, (), []),
        ("chat", CHATML, ("<|im_start|>", "<|im_end|>"), ["<|im_end|>"]),
        ("chat", "{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}", (), ["<eos>"]),
        ("chat", "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", (), []),
        ("chat", None, (), []),
        ("plain", CHATML, ("<|im_start|>", "<|im_end|>"), []),
    ],
)
def test_what_ends_a_turn(template: str, chat_template: str | None, added: tuple[str, ...], ends: list[str]) -> None:
    tokenizer = holey(*added, template=chat_template)
    assert turn_ends(template, tokenizer) == {tokenizer.get_vocab()[e] for e in ends}
    turns = turn_ends(template, tokenizer)
    assert end_ids(tokenizer, None, turns) == {1, *turns}


def plugin(problem: Any, tokenizer: Any) -> str:
    return str(problem.problem)


def test_a_plug_in_template_names_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{__name__}:plugin"
    monkeypatch.setattr("rlzoo.data.templates.find_template", lambda _: plugin)
    assert turn_ends(name, holey()) == set()
    monkeypatch.setattr(plugin, "turn_ends", lambda tokenizer: [5], raising=False)
    assert turn_ends(name, holey()) == {5}


def test_an_end_of_turn_ends_a_response() -> None:
    """The generation config of a base model names <eos> alone; with the template's end the engine stops there too."""
    tokenizer = holey("<|im_start|>", "<|im_end|>")
    model, end = small(tokenizer), tokenizer.get_vocab()["<|im_end|>"]
    lengths = []
    for turns in (frozenset(), turn_ends("qwen-boxed", tokenizer)):
        backend = TorchBackend(model, tokenizer, capacity=32, turns=turns)
        (tree,) = grow(Chains(group_size=64, max_response_tokens=40), backend, [Prompt("p", tokenizer.encode("1+1="))], seed=3)
        inside = [tree.path_tokens(int(leaf))[:-1].tolist().count(end) for leaf in tree.leaves]
        assert (sum(inside) == 0) == bool(turns)
        lengths.append(tree.response_lengths().mean())
        ended = [Stop(int(tree.stop[leaf])) for leaf in tree.leaves if tree.path_tokens(int(leaf))[-1] == end]
        assert not turns or (ended and set(ended) <= {Stop.EOS, Stop.ANSWER})
    assert lengths[1] < lengths[0]


def test_a_run_on_a_tokenizer_with_holes_is_on_policy(tmp_path: Path) -> None:
    """As a user has it: a folder, a padded embedding, ids with holes; sampler and trainer agree to rounding in the first update."""
    tokenizer = holey("<|im_start|>", "<|im_end|>")
    small(tokenizer, dtype=torch.float32).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    problems = [{"problem": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    argv = ["run", "--algo", "grpo", "--model", str(tmp_path / "model"), "--problems", str(tmp_path / "p.jsonl")]
    argv += ["--out", str(tmp_path / "run")]
    argv += ["--schedule.steps", "1", "--schedule.problems-per-step", "4", "--sampler.max-response-tokens", "12", "--trackers", "none"]
    argv += ["--filter.no-drop-dead", "--evaluation.suite", "none", "--evaluation.every", "0", "--backend.threads", "1"]
    assert cli.main(argv) == 0
    (row,) = RunFolder.open(tmp_path / "run").metrics()
    assert row["update/updates"] > 0 and abs(row["mismatch/kl_k3"]) < 1e-8

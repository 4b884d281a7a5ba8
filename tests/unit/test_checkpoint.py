"""Checkpoints hold everything, are whole or absent, and are never unpickled."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from rlzoo.training import checkpoint
from rlzoo.training.optim import Optim, make_optimizer


class Nothing:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def model(seed=0, hidden=16):
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=11, hidden_size=hidden, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def step(m, optimizer):
    m(torch.arange(5)[None]).logits.logsumexp(-1).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def saved(tmp_path, number=3):
    m = model()
    optimizer = make_optimizer(m, Optim(lr=0.1, weight_decay=0.1))
    step(m, optimizer)
    return m, optimizer, checkpoint.save(tmp_path, number, m, Nothing(), optimizer, {"cursor": 7, "best": {}})


def test_going_on_from_a_checkpoint_is_going_on(tmp_path):
    m, optimizer, folder = saved(tmp_path)
    other = model(seed=1)
    other_optimizer = make_optimizer(other, Optim(lr=0.1, weight_decay=0.1))
    state = checkpoint.restore(folder, other, other_optimizer)
    assert state["cursor"] == 7 and state["step"] == 3 and same(m, other)
    noise = torch.rand(3)
    step(m, optimizer)
    step(other, other_optimizer)
    assert same(m, other)
    checkpoint.restore(folder, other, other_optimizer)
    assert torch.equal(torch.rand(3), noise)


def test_best_and_newest_are_kept_and_leftovers_removed(tmp_path):
    m, optimizer, _ = saved(tmp_path, 1)
    for number in (2, 3, 4):
        checkpoint.save(tmp_path, number, m, Nothing(), optimizer, {})
    (tmp_path / ".partial-step-9").mkdir()
    checkpoint.prune(tmp_path, last=2, keep={1})
    assert checkpoint.steps(tmp_path) == [1, 3, 4] and checkpoint.latest(tmp_path) == tmp_path / "step-4"
    assert not list(tmp_path.glob(".partial*"))


def test_a_write_that_fails_leaves_no_checkpoint(tmp_path, monkeypatch):
    m, optimizer, _ = saved(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path, 2, m, Nothing(), optimizer, {})
    assert checkpoint.steps(tmp_path) == [1]


def test_a_damaged_or_foreign_checkpoint_is_refused(tmp_path):
    m, optimizer, folder = saved(tmp_path)
    with pytest.raises(ValueError, match="of another model"):
        checkpoint.restore(folder, model(hidden=32), optimizer)
    (folder / "optimizer.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.restore(folder, m, optimizer)

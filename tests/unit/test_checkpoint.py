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
    found = checkpoint.newest(tmp_path, other, lambda text: pytest.fail(text))
    assert found.state == {"cursor": 7, "best": {}} and found.step == 3 and not same(m, other)  # read only, so far
    found.apply(other, other_optimizer)
    assert same(m, other)
    step(m, optimizer)
    step(other, other_optimizer)
    assert same(m, other)
    assert not list(folder.parent.glob(".*"))


def test_best_and_newest_are_kept(tmp_path):
    m, optimizer, _ = saved(tmp_path, 1)
    for number in (2, 3, 4, 9):
        checkpoint.save(tmp_path, number, m, Nothing(), optimizer, {})
    checkpoint.prune(tmp_path, last=2, keep={1}, upto=4)  # 9 was passed over; it counts when the run gets there again
    assert checkpoint.steps(tmp_path) == [1, 3, 4, 9]
    checkpoint.prune(tmp_path, last=2, keep={1}, upto=9)
    assert checkpoint.steps(tmp_path) == [1, 4, 9]


def test_a_write_that_fails_leaves_no_checkpoint(tmp_path, monkeypatch):
    m, optimizer, _ = saved(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path, 2, m, Nothing(), optimizer, {})
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match=r"step-3 is of another model: model.embed_tokens.weight differs"):
        checkpoint.newest(tmp_path, model(hidden=32), lambda text: pytest.fail(text))


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # the last weight, by one bit
    file.write_bytes(content)


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", [cut, flip, lambda file: file.unlink(), lambda file: file.write_bytes(b"")])
def test_a_broken_checkpoint_is_passed_over(tmp_path, file, damage):
    m, _, _ = saved(tmp_path, 1)
    saved(tmp_path, 2)
    damage(tmp_path / "step-2" / file)
    notes = []
    found = checkpoint.newest(tmp_path, m, notes.append)
    assert found.step == 1 and len(notes) == 1
    assert notes[0].startswith(f"checkpoint {tmp_path / 'step-2'} is broken: ") and notes[0].endswith("; it is passed over")
    damage(tmp_path / "step-1" / file)
    assert checkpoint.newest(tmp_path, m, notes.append) is None and len(notes) == 3
    assert same(m, model_after_one_step())


def model_after_one_step():
    m = model()
    step(m, make_optimizer(m, Optim(lr=0.1, weight_decay=0.1)))
    return m

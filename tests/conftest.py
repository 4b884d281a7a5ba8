"""Fixtures for every test: tiny random models and a tokenizer, both made in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MODEL_VOCABULARY = 272  # more rows than the tokenizer has ids, as in many released models


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level tokenizer without merges: 256 bytes, <pad>, <eos>. Any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "<eos>": 1} | {letter: i for i, letter in enumerate(letters, 2)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """Factory `tiny_model(dtype=None, kind="qwen2", seed=0, **config)`: a fresh random causal LM (hidden 32, 2 layers).

    Weights are large enough that the next token depends on the whole context. `kind`: qwen2, llama (untied), gpt2.
    """
    import torch
    import transformers

    def make(dtype: Any = None, kind: str = "qwen2", seed: int = 0, **config: Any) -> Any:
        torch.manual_seed(seed)
        ids = {"vocab_size": MODEL_VOCABULARY, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
        if kind == "gpt2":
            options = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "initializer_range": 0.3}
            options |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            made = transformers.GPT2LMHeadModel(transformers.GPT2Config(**(ids | options | config)))
        else:
            options = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
            options |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3}
            options |= {"tie_word_embeddings": kind == "qwen2"}
            name = {"qwen2": "Qwen2", "llama": "Llama"}[kind]
            made_config = getattr(transformers, f"{name}Config")(**(ids | options | config))
            made = getattr(transformers, f"{name}ForCausalLM")(made_config)
        return made.to(dtype or torch.float32).eval()

    return make


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local model in the layout of Qwen2.5: a random Qwen2 (hidden 64, 2 layers) and a byte-level BPE tokenizer with a chat template,
    three special tokens beyond its base vocabulary, and an embedding with more rows than there are ids."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    split = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    texts = [r"Please reason step by step, and put your final answer within \boxed{}.", r"Let $x$ be the number of \frac{1}{2} apples."]
    trainer = trainers.BpeTrainer(vocab_size=360, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False)
    core.train_from_iterator(texts * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", additional_special_tokens=["<|im_start|>"]
    )
    tokenizer.chat_template = (
        "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    folder = tmp_path_factory.mktemp("model") / "qwen2"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=1024, initializer_range=0.1, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder

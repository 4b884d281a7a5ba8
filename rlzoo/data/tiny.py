"""The embedded base model: how `rlzoo/assets/tiny` was made, and how to make it again (`rlzoo tiny build`).

`build` trains a byte-level BPE tokenizer on the task's own text and a Qwen2 model of under a million parameters on imperfect
demonstrations (`arithmetic_demos`), and saves both as any transformers model folder. The prompt is the problem and a newline
(template "plain"); the response is the demonstration and the end-of-sequence token. Losses count response tokens only.

The result is a function of the arguments, the versions of torch and tokenizers, and the number of threads.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .arithmetic import demonstration_problems
from .arithmetic_demos import DEFAULT_MIX, Mix, demonstrate

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
MAX_POSITIONS = 512
STEPS = 1400
MUON_RATE = 0.02
_POOL_BATCHES = 8  # batches drawn together and sorted by length, so that little of a batch is padding


@dataclass(frozen=True, slots=True)
class Shape:
    """Size of the model. The default has 0.85 M parameters."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 384
    vocabulary: int = 512


def prompt_of(problem: str) -> str:
    """The "plain" template: the problem and a newline."""
    return f"{problem}\n"


def demonstrations(seed: int, mix: Mix = DEFAULT_MIX) -> Iterator[tuple[str, str]]:
    """Endless pairs (prompt, response text) out of the train split."""
    rng = random.Random(f"styles:{seed}")
    for problem in demonstration_problems(seed):
        yield prompt_of(problem.problem), demonstrate(problem, rng, mix=mix)


def build_tokenizer(seed: int, vocabulary: int) -> Any:
    """A byte-level BPE `PreTrainedTokenizerFast`, exactly reversible on any text in Unicode's NFC form.

    It cuts text as Qwen2's tokenizer does (digits alone, words with the space before them), since transformers reads every folder of
    model type qwen2 with that tokenizer class, whatever the folder's own tokenizer says.
    """
    from tokenizers import AddedToken, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    blank = Qwen2Tokenizer(eos_token=EOS_TOKEN, pad_token=PAD_TOKEN, unk_token=None)
    core = blank.backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[AddedToken(EOS_TOKEN, special=True), AddedToken(PAD_TOKEN, special=True)],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [prompt + response for prompt, response in itertools.islice(demonstrations(seed), 4000)]
    core.train_from_iterator(texts, trainer)
    learned = json.loads(core.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        eos_token=EOS_TOKEN,
        pad_token=PAD_TOKEN,
        unk_token=None,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        padding_side="left",
    )


def new_model(tokenizer: Any, shape: Shape) -> Any:
    """An untrained Qwen2 with tied embeddings, its initial weights drawn from torch's generator."""
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model


def _batches(tokenizer: Any, seed: int, size: int, mix: Mix) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (ids, labels), each int64 [size, tokens of the longest], right-padded; labels are -100 off the response."""
    source = demonstrations(seed, mix)
    rng = random.Random(f"batches:{seed}")
    while True:
        pairs = list(itertools.islice(source, size * _POOL_BATCHES))
        prompts = tokenizer([p for p, _ in pairs]).input_ids
        responses = [[*ids, tokenizer.eos_token_id] for ids in tokenizer([r for _, r in pairs]).input_ids]
        rows = sorted(zip(prompts, responses, strict=True), key=lambda row: len(row[0]) + len(row[1]))
        order = list(range(_POOL_BATCHES))
        rng.shuffle(order)
        for k in order:
            batch = rows[k * size : (k + 1) * size]
            longest = max(len(p) + len(r) for p, r in batch)
            ids = torch.full((size, longest), tokenizer.pad_token_id)
            labels = torch.full((size, longest), -100)
            for i, (p, r) in enumerate(batch):
                ids[i, : len(p) + len(r)] = torch.tensor(p + r)
                labels[i, len(p) : len(p) + len(r)] = torch.tensor(r)
            yield ids, labels


def _optimizers(model: Any, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers (loss 0.34 after 201 steps where AdamW alone had 0.83), AdamW for the rest; each
    group carries its peak rate."""
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    embedding = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" in n]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    adamw = torch.optim.AdamW(
        [{"params": embedding, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}], lr=learning_rate, betas=(0.9, 0.98)
    )
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Muon(hidden, lr=MUON_RATE, weight_decay=0.01, momentum=0.95), adamw]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def _learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first twentieth, then a cosine to a twentieth of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def build(
    out_dir: str | Path,
    *,
    seed: int = 0,
    steps: int = STEPS,
    batch: int = 64,
    learning_rate: float = 3e-3,
    shape: Shape | None = None,
    mix: Mix = DEFAULT_MIX,
    threads: int | None = 2,
    log: Callable[[str], None] = print,
) -> Path:
    """Trains the embedded base and its tokenizer and saves them to `out_dir` (model.safetensors in float32, tokenizer, configs).

    `threads` is set for torch's intra-op pool (None: left alone); results depend on it in the last bits. `log` gets a line every
    50 steps. Returns the folder. ValueError: steps or batch below 1, or `out_dir` exists and is not an empty folder.
    """
    out = Path(out_dir)
    if steps < 1 or batch < 1:
        raise ValueError(f"steps = {steps}, batch = {batch}: both must be at least 1")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder: name a new one")
    if threads is not None:
        torch.set_num_threads(threads)
    shape = shape or Shape()
    tokenizer = build_tokenizer(seed, shape.vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = new_model(tokenizer, shape)
    model.train()
    optimizers = _optimizers(model, learning_rate)
    started = time.perf_counter()
    log(f"tokenizer {len(tokenizer)} tokens, model {sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps of {batch}")
    for step, (ids, labels) in enumerate(itertools.islice(_batches(tokenizer, seed, batch, mix), steps)):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, steps, group["peak"])
            optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16):  # 1.7 times as fast where the CPU has bfloat16 matrix units
            loss = _response_loss(model, ids, labels)
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss is {loss.item()} at step {step}: lower the learning rate {learning_rate:g}")
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if step % 50 == 0 or step == steps - 1:
            log(f"step {step + 1}/{steps}  loss {loss.item():.4f}  {time.perf_counter() - started:.0f} s")
    model.eval()
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def _response_loss(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over response tokens; only those positions go through the head."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # right-padded: causality hides the padding
    targets = labels[:, 1:]
    kept = targets != -100
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[kept]), targets[kept])

"""Tokens per second of the torch engine against transformers' `generate`, on ragged responses.

    python -m rlzoo.benchmarks.perf.decoding --model rlzoo/assets/tiny --out results/perf/decoding.jsonl

Both sample the same model from the same prompts at temperature 1 with the same limits; a token counts if it is part of a response
(up to and including the end-of-text token). Both are measured with each of `--rows` at once (`generate`: SDPA, dynamic cache; a
batch ends when its last row has); `ratio` compares them at equal rows, `ratio_best` each at its best. Arms are taken in turn,
figures are medians over the repeats. Without --model a random Qwen2 model of about a million parameters is used whose responses
end with probability --end-rate per token. Ratios are of tokens per second of processor time, which other work on the machine
disturbs less than wall time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers

from rlzoo.backends.drawing import end_ids
from rlzoo.backends.torch import TorchBackend
from rlzoo.sampling.base import Sampler
from rlzoo.sampling.chains import Chains
from rlzoo.sampling.grow import Prompt, grow
from rlzoo.sampling.nary import Nary

from .recording import provenance, record

VOCABULARY = 200


class Numbers:
    """A tokenizer of bare numbers, for the random model."""

    eos_token_id, pad_token_id = 1, 0

    def get_vocab(self) -> dict[str, int]:
        return {str(i): i for i in range(VOCABULARY)}

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def encode(self, text: str) -> list[int]:
        return [2 + byte % (VOCABULARY - 2) for byte in text.encode()]


def random_model(end_rate: float) -> Any:
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    model = transformers.Qwen2ForCausalLM(config).eval()
    ends = max(1, round(end_rate * VOCABULARY))  # the random model is close to uniform
    model.generation_config.eos_token_id = list(range(1, 1 + ends))
    model.generation_config.pad_token_id = 0
    return model


class Clock:
    """Wall time and CPU time of this process; on a shared machine the second is the steadier."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def rates(self, tokens: int) -> dict[str, float]:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        return {
            "tokens": tokens,
            "seconds": round(wall, 3),
            "cpu_seconds": round(cpu, 3),
            "tokens_per_s": round(tokens / wall, 1),
            "tokens_per_cpu_s": round(tokens / cpu, 1),
        }


def measure_engine(backend: TorchBackend, sampler: Sampler, prompts: list[Prompt]) -> dict[str, float]:
    clock = Clock()
    trees = grow(sampler, backend, prompts, seed=0)
    return clock.rates(sum(t.sampled_tokens for t in trees))


def measure_generate(model: Any, rows: list[torch.Tensor], batch: int, max_tokens: int, ends: frozenset[int]) -> dict[str, float]:
    tokens, clock = 0, Clock()
    for i in range(0, len(rows), batch):
        chunk = rows[i : i + batch]
        ids = torch.nn.utils.rnn.pad_sequence(chunk, batch_first=True, padding_side="left").to(model.device)
        lengths = torch.tensor([len(row) for row in chunk], device=ids.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - lengths[:, None]).long()
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=max_tokens)
        for response in out[:, ids.shape[1] :].tolist():
            tokens += next((at + 1 for at, token in enumerate(response) if token in ends), len(response))
    return clock.rates(tokens)


def load(options: argparse.Namespace) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    if not options.model:
        return random_model(options.end_rate).to(options.device), Numbers()
    model: Any = (
        transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32, trust_remote_code=False)
        .eval()
        .to(options.device)
    )
    return model, transformers.AutoTokenizer.from_pretrained(options.model, trust_remote_code=False)


def make_prompts(tokenizer: Any, count: int) -> list[Prompt]:
    """Ragged prompts of 20 to 59 characters."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("0123456789+*()"), size=int(rng.integers(20, 60)))) for _ in range(count)]
    return [Prompt(str(i), tokenizer.encode(text)) for i, text in enumerate(texts)]


def main(argv: Sequence[str] | None = None) -> None:
    """Write one row."""
    parser = argparse.ArgumentParser(prog="python -m rlzoo.benchmarks.perf.decoding", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="append the row to this file")
    parser.add_argument("--model", help="a local folder with a causal LM and its tokenizer")
    parser.add_argument("--problems", type=int, default=32)
    parser.add_argument("--group-size", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 128, 64])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--end-rate", type=float, default=0.02)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tree", action="store_true", help="also measure a 4-ary tree with the same response limit")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    origin = provenance(options.device)  # now: the checkout may change while this runs
    model, tokenizer = load(options)
    prompts, ends = make_prompts(tokenizer, options.problems), end_ids(tokenizer, model)
    rows = [torch.tensor(list(p.ids)) for p in prompts for _ in range(options.group_size)]
    samplers: dict[str, Sampler] = {"engine": Chains(group_size=options.group_size, max_response_tokens=options.max_tokens)}
    if options.tree:
        part = options.max_tokens // 5
        samplers["tree"] = Nary(branching=4, segment_tokens=(part, part, options.max_tokens - 2 * part))
    arms: dict[str, Callable[[], dict[str, float]]] = {}
    for batch in options.rows:
        backend = TorchBackend(model, tokenizer, capacity=batch, device=options.device)
        grow(Chains(group_size=2, max_response_tokens=4), backend, prompts[:2], seed=1)  # warm-up
        for name, sampler in samplers.items():
            arms[f"{name}_{batch}"] = partial(measure_engine, backend, sampler, prompts)
        arms[f"generate_{batch}"] = partial(measure_generate, model, rows, batch, options.max_tokens, ends)
    measure_generate(model, rows[:2], 2, 4, ends)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for _ in range(options.repeats):
        for name, arm in arms.items():
            runs[name].append(arm())
    measured = {name: {key: round(median(r[key] for r in done), 3) for key in done[0]} for name, done in runs.items()}
    rates = {name: rate["tokens_per_cpu_s"] for name, rate in measured.items()}
    best = {kind: max(rates[f"{kind}_{batch}"] for batch in options.rows) for kind in ("engine", "generate")}
    row: dict[str, Any] = {
        "benchmark": "decoding",
        **{k: v for k, v in vars(options).items() if k not in ("tree", "out")},
        "parameters": sum(p.numel() for p in model.parameters()),
        "ratio_best": round(best["engine"] / best["generate"], 2),
        "ratio": {batch: round(rates[f"engine_{batch}"] / rates[f"generate_{batch}"], 2) for batch in options.rows},
    }
    row |= {f"{name}_{key}": value for name, figures in measured.items() for key, value in figures.items()}
    record(row | origin, options.out)


if __name__ == "__main__":
    main()

"""How much memory a run needs on one GPU: arithmetic from a model's config and the run's limits, piece by piece and phase by phase.

Nothing is loaded or measured. `benchmarks/perf/memory.py` holds the update's estimate against torch's memory tracker. What a CUDA
context, library workspaces and fragmentation take is not in it: a GPU should have a few GB more than the largest phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

QUERY_BLOCK = 256  # queries that packed attention gathers keys for at once: packing.QUERY_BLOCK
CHUNK_BYTES = 1 << 29  # logits at once on a GPU: losses.logprobs.CHUNK_BYTES
PREFIX_BYTES = 1 << 30  # what the torch engine keeps for forks
KV_SHARE = 0.8  # of the memory that is left: backends.kvcache.KV_SHARE
PROBE_TOKENS = 8 * 80  # of a sync proof


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a dense decoder. `tied`: the head is the embedding; `gated`: the MLP has a gate."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    gated: bool = True
    qkv_bias: bool = False

    @classmethod
    def of(cls, config: Any) -> ModelShape:
        """From a config.json as a mapping, or a transformers config.

        Raises:
            ValueError: a mixture of experts, or a size is not stated.
        """
        get = config.get if isinstance(config, Mapping) else lambda name, default=None: getattr(config, name, default)
        if any(get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
            raise ValueError("the memory estimate knows dense models only; this one is a mixture of experts")
        names = {"hidden": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads", "vocab": "vocab_size"}
        sizes: dict[str, int] = {ours: int(get(name) or 0) for ours, name in names.items()}
        missing = [names[ours] for ours, value in sizes.items() if value < 1]
        if missing:
            raise ValueError(f"the model's config does not state {', '.join(missing)}, which the memory estimate needs")
        gated = str(get("hidden_act") or get("activation_function") or "silu") in ("silu", "swish") or "gemma" in str(get("model_type"))
        return cls(
            **sizes,
            kv_heads=get("num_key_value_heads") or sizes["heads"],
            head_dim=get("head_dim") or sizes["hidden"] // sizes["heads"],
            intermediate=get("intermediate_size") or 4 * sizes["hidden"],
            tied=bool(get("tie_word_embeddings", True)),
            gated=gated,
            qkv_bias=get("model_type") == "qwen2" or bool(get("attention_bias")),
        )

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's matrices."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def table(self) -> int:
        """Weights of the embedding, and of the head."""
        return self.vocab * self.hidden

    @property
    def weights(self) -> int:
        """All weights, tied ones once."""
        bias = self.head_dim * (self.heads + 2 * self.kv_heads) if self.qkv_bias else 0
        small = self.layers * (2 * self.hidden + bias) + self.hidden
        return self.layers * self.layer_weights + small + self.table * (1 if self.tied else 2)

    def cache_bytes(self, itemsize: int) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


@dataclass(frozen=True)
class Load:
    """What a run asks of the GPU. Bytes of a number: `master` (the trainer's weights, gradients, moments), `compute` (its forward and
    backward passes, less than `master` under autocast), `engine`. Tokens: `pack` (forwarded at once in an update), `path` (longest
    prompt and response), `block` (longest run of tokens that packed attention takes at once), `eval_path`. `capacity`: paths decoded
    at once. `engine_share`: share of the GPU that an engine takes for itself whatever it needs, and keeps or gives back (`sleeps`);
    0: as much as its weights and cache need."""

    master: int = 4
    compute: int = 2
    engine: int = 2
    pack: int = 8192
    path: int = 2048
    block: int = QUERY_BLOCK
    eval_path: int = 2048
    capacity: int = 256
    reference: bool = False
    checkpointing: bool = False
    chunk: int = CHUNK_BYTES
    engine_share: float = 0.0
    sleeps: bool = False


def layer_bytes(shape: ModelShape, load: Load) -> int:
    """What one layer keeps of one token for its backward pass, packed attention's gathered keys and values included.

    Per norm its input and the normed input (both as wide as the weights), and the input of each matrix after it: one each if it is cast,
    else one for all. Of attention: queries, keys, values, output, and the output in its place. Of the MLP: gate, its activation, up and
    the product (without a gate: the activation's input and output).
    """
    h, c, m = shape.hidden, load.compute, load.master
    norms = 4 * m * h + (5 * c * h if c < m else 2 * m * h)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = 3 * c * queries + 4 * shape.heads + 2 * c * keys * gathered(load)
    return int(norms + attention + (4 if shape.gated else 2) * c * shape.intermediate)


def gathered(load: Load) -> float:
    """Keys that packed attention gathers for each token: a block sees all tokens before it, half the path in the mean."""
    block = min(load.block, QUERY_BLOCK, load.path)
    return (load.path + block) / (2 * block)


@dataclass(frozen=True)
class Estimate:
    """Bytes. `pieces`: what there is to hold, by name; `phases`: the most that each phase holds; `capacity`: paths that the engine
    can decode at once."""

    pieces: dict[str, int]
    phases: dict[str, int]
    capacity: int

    @property
    def peak(self) -> int:
        return max(self.phases.values())


def update_bytes(shape: ModelShape, load: Load) -> dict[str, int]:
    """Pieces of an update beside weights, gradients and moments, which it holds from its second pack on, and its `peak` among them."""
    mixed = load.compute < load.master
    layer = load.pack * layer_bytes(shape, load)
    kept = load.pack * shape.layers * load.master * shape.hidden if load.checkpointing else shape.layers * layer
    ends = 5 * load.master * load.pack * shape.hidden  # after the layers: the last norm, the hidden states and their gradient
    one_cast = load.compute * shape.layer_weights if mixed else 0
    casts = one_cast * (1 if load.checkpointing else shape.layers)
    table = load.master * shape.table
    wide = max(4, load.compute)
    chunk = min(load.chunk, load.pack * shape.vocab * wide)
    logits = chunk + (chunk * load.compute // wide if mixed else chunk)
    products = (2 if mixed else 1) * load.compute * shape.table  # the head's cast and one chunk's gradient
    # Either the head's backward pass, when all that the layers kept is there, or the last layer's (the first to go back), which
    # is first computed again under checkpointing; a tied head's gradient waits for the embedding's to the end.
    at_head = kept + (0 if load.checkpointing else casts) + ends + table + products + logits
    work = 3 * load.compute * load.pack * shape.intermediate + 2 * load.master * load.pack * shape.hidden
    in_layer = kept + casts + (layer if load.checkpointing else 0) + work + (table if shape.tied else 0)
    at_embedding = (3 if shape.tied else 1) * table
    return {
        "activations": kept + ends,
        "one layer computed again": layer if load.checkpointing else 0,
        "cast copies of weights": casts,
        "head: logits of a chunk": logits,
        "head: gradient and cast": table + products,
        "peak": max(at_head, in_layer, at_embedding),
    }


def estimate(shape: ModelShape, load: Load, gpu_bytes: int | None = None) -> Estimate:
    """All pieces and phases. With `gpu_bytes`, the capacity is halved until the cache fits, as the engine does."""
    weights, moments = load.master * shape.weights, 2 * load.master * shape.weights
    reference = weights if load.reference else 0
    own = int(load.engine_share * (gpu_bytes or 0))
    engine = own or load.engine * shape.weights
    update = update_bytes(shape, load)
    resident = weights + moments + reference
    room = None if gpu_bytes is None else gpu_bytes - resident - engine
    if own:
        room = own - load.engine * shape.weights
    capacity, cache = _cache(shape, load, load.path, room)
    if own:
        cache = 0  # within its share
    decoding = 0 if own else PREFIX_BYTES + 3 * 8 * min(1 << 24, capacity * shape.vocab) + load.engine * capacity * shape.vocab
    _, eval_cache = _cache(shape, replace(load, capacity=capacity), load.eval_path, None)
    probes = PROBE_TOKENS * shape.vocab * 8
    asleep = 0 if load.sleeps and own else engine
    phases = {
        "sampling": resident + engine + cache + decoding,
        "update": resident + weights + asleep + update["peak"],
        "sync": resident + engine + probes,
        "evaluation": weights + engine + (0 if own else eval_cache) + decoding,
    }
    pieces = {
        "trainer: weights": weights,
        "trainer: gradients": weights,
        "trainer: moments of AdamW": moments,
        **{f"update: {name}": value for name, value in update.items() if name != "peak"},
        "reference": reference,
        "engine: share of the GPU" if own else "engine: weights": engine,
        "engine: keys and values": cache,
        "engine: prefixes, logits": decoding,
    }
    return Estimate(pieces, phases, capacity)


def _cache(shape: ModelShape, load: Load, path: int, room: int | None) -> tuple[int, int]:
    """Paths at once, and bytes of their keys and values, rows being as long as the longest path."""
    capacity, row = load.capacity, (path + 8) * shape.cache_bytes(load.engine)
    while room is not None and capacity > 1 and capacity * row > KV_SHARE * room:
        capacity //= 2
    return capacity, capacity * row

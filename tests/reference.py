"""A naive reference for the update, and random trees to try it on.

Nothing here comes from rlzoo's losses or training: one transformers row per response, a loop over every (row, token) term,
textbook min and clip, weights per row. Only the data types Tree and Credit are shared.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from rlzoo.credit.base import Credit
from rlzoo.tree import Segment, Tree

VOCAB = 23  # of the tokenizer; the models' heads have a few ids more


def tiny_model(*, seed=0, dtype=torch.float64, tied=True, family="qwen2", vocab=VOCAB + 4, **changes):
    sizes = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "attn_implementation": "sdpa",
        "initializer_range": 0.2,  # far from uniform, so that mistakes show
    }
    torch.manual_seed(seed)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).to(dtype)
    else:
        model = Qwen2ForCausalLM(Qwen2Config(**{**sizes, **changes})).to(dtype)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm, module)
    return model


def _norm(module, hidden):
    """RMSNorm in the precision of its input: transformers' goes through float32, which would hide errors below 1e-7."""
    return module.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)


@dataclass(frozen=True)
class Options:
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    aggregation: str = "token_mean"
    constant_tokens: int | None = None
    temperature: float = 1.0


def reference_loss(model, trees, credits, o: Options) -> torch.Tensor:
    """The loss of a mini-batch, term by term."""
    terms, rows = [], 0
    for tree, credit in zip(trees, credits, strict=True):
        row_terms = [[] for _ in credit.row_leaf]
        for row, node, start, stop, advantage in zip(credit.row, credit.node, credit.start, credit.stop, credit.advantage, strict=True):
            logp = path_distributions(model, tree, int(node), o.temperature)
            for k in range(int(start), int(stop)):
                token = int(tree.offsets[node]) + k
                if credit.token_mask is not None and not credit.token_mask[token]:
                    continue
                if not np.isfinite(tree.logprobs[token]):
                    continue
                row_terms[row].append(occurrence(logp[token], tree, token, float(advantage), o))
        for row, members in enumerate(row_terms):
            rows += len(members) > 0
            terms.append((float(credit.row_weight[row]), members))
    count = sum(len(members) for _, members in terms)
    total = torch.zeros((), dtype=next(model.parameters()).dtype)
    for weight, members in terms:
        for term in members:
            denominator = {"token_mean": count, "sequence_mean": rows * len(members), "constant": rows * (o.constant_tokens or 0)}
            total = total + weight * term / denominator[o.aggregation]
    return total


def path_logprobs(model, tree, node, temperature) -> dict[int, torch.Tensor]:
    """Log-prob of every response token on the path to the end of `node`; keyed by index into tree.tokens."""
    return {k: row[int(tree.tokens[k])] for k, row in path_distributions(model, tree, node, temperature).items()}


def path_distributions(model, tree, node, temperature) -> dict[int, torch.Tensor]:
    """Log-probs [VOCAB] that every response token on the path to the end of `node` is drawn with, from a row of its own."""
    ids, where = [int(t) for t in tree.prompt], []
    for n in tree.path(node):
        for k in range(int(tree.offsets[n]), int(tree.offsets[n + 1])):
            ids.append(int(tree.tokens[k]))
            where.append((k, len(ids) - 1))
    logits = model(input_ids=torch.tensor([ids])).logits[0, :, :VOCAB] / temperature
    out = {}
    for k, place in where:
        row = logits[place - 1]
        out[k] = row - torch.logsumexp(row, 0)
    return out


def occurrence(distribution, tree, token, advantage, o: Options) -> torch.Tensor:
    """One token of one row: PPO's clipped objective as printed, to be minimised."""
    logp = distribution[int(tree.tokens[token])]
    ratio = torch.exp(logp - float(tree.logprobs[token]))
    clipped = torch.clip(ratio, 1 - o.clip_low, 1 + o.clip_high)
    objective = torch.min(ratio * advantage, clipped * advantage)
    if o.dual_clip is not None and advantage < 0:
        objective = torch.max(objective, torch.tensor(o.dual_clip * advantage, dtype=logp.dtype))
    loss = -objective
    if o.kl_coef > 0:
        gap = float(tree.ref_logprobs[token]) - logp
        loss = loss + o.kl_coef * (torch.exp(gap) - gap - 1)
    if o.entropy_coef > 0:
        loss = loss + o.entropy_coef * sum(torch.exp(x) * x for x in distribution)
    return loss


def reference_gradients(model, trees, credits, options: Options) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = reference_loss(model, trees, credits, options)
    if loss.requires_grad:
        loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), found


def random_tree(rng, model=None, *, nodes=9, longest=6, spread=0.3, empty=0.15, unknown=0.0, temperature=1.0) -> Tree:
    """A random tree; its log-probs are the model's plus noise of `spread`, so that ratios fall on both sides of a clip."""
    segments = []
    for i in range(nodes):
        length = 0 if rng.random() < empty else int(rng.integers(1, longest + 1))
        segments.append(Segment(int(rng.integers(0, i + 1)), rng.integers(0, VOCAB, length).tolist()))
    tree = Tree.from_segments(rng.integers(0, VOCAB, int(rng.integers(1, 5))).tolist(), segments)
    logprobs, ref = np.full(len(tree.tokens), np.nan), np.full(len(tree.tokens), np.nan)
    if model is None:
        logprobs[len(tree.prompt) :] = -rng.random(len(tree.tokens) - len(tree.prompt))
    else:
        with torch.no_grad():
            for leaf in tree.leaves:
                for k, value in path_logprobs(model, tree, int(leaf), temperature).items():
                    logprobs[k] = float(value)
    ref[:] = logprobs + spread * rng.standard_normal(len(logprobs))
    logprobs += spread * rng.standard_normal(len(logprobs))
    logprobs[rng.random(len(logprobs)) < unknown] = np.nan
    parts = [logprobs[tree.offsets[n] : tree.offsets[n + 1]].tolist() for n in range(1, tree.nodes)]
    tree = Tree.from_segments(tree.prompt, [Segment(s.parent, s.tokens, p) for s, p in zip(segments, parts, strict=True)])
    object.__setattr__(tree, "ref_logprobs", ref.astype(np.float32))
    return tree


def random_credit(rng, tree: Tree, *, mask=0.3, whole=0.4, node_rows=0.3) -> Credit:
    """Rows of both kinds (a path, one node), some leaves left out, advantages of both signs and zero, parts of nodes, weights."""
    row, node, start, stop, advantage, row_leaf, row_weight = [], [], [], [], [], [], []
    index = {int(leaf): i for i, leaf in enumerate(tree.leaves)}

    def add(nodes, leaf):
        r = len(row_leaf)
        row_leaf.append(leaf)
        row_weight.append(float(rng.choice([0.5, 1.0, 1.0, 2.0])))
        a = float(rng.choice([0.0, rng.normal(), rng.normal(), rng.normal()]))
        for n in nodes:
            length = int(tree.lengths[n])
            lo, hi = (0, length) if rng.random() < whole else sorted(rng.integers(0, length + 1, 2).tolist())
            if rng.random() < 0.9:
                row.append(r), node.append(n), start.append(lo), stop.append(hi), advantage.append(a)

    for i, leaf in enumerate(tree.leaves):
        if rng.random() < 0.75:
            add(tree.path(int(leaf)), i)
    for n in range(1, tree.nodes):
        if rng.random() < node_rows:
            add([n], index[int(tree.leaves_below(n)[0])])
    return Credit(
        np.array(row, np.int32),
        np.array(node, np.int32),
        np.array(start, np.int32),
        np.array(stop, np.int32),
        np.array(advantage, np.float64),
        np.array(row_leaf, np.int32),
        np.array(row_weight, np.float64),
        (len(tree.leaves), tree.nodes),
        rng.random(len(tree.tokens)) < 0.8 if rng.random() < mask else None,
    )

"""Corrected and packed = corrected and unrolled, in float64: the reference loops over responses and takes each token's ratio anew."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlzoo.losses.aggregate import TokenWeights, aggregate
from rlzoo.losses.correction import CorrectionOptions, correct, log_ratios
from rlzoo.losses.policy import PolicyLoss
from rlzoo.training.update import ForwardOptions, gradients, update
from tests.reference import VOCAB, Options, occurrence, path_distributions, path_logprobs, random_credit, random_tree, tiny_model


@dataclass(frozen=True)
class Old:
    """A tree seen with other old log-probs, as `occurrence` takes it."""

    logprobs: np.ndarray
    ref_logprobs: np.ndarray
    tokens: np.ndarray


def rows_of(tree, credit):
    """Per row, its weight and (node, token, advantage) of each of its terms; plain loops."""
    rows = [[] for _ in credit.row_leaf]
    for row, node, start, stop, advantage in zip(credit.row, credit.node, credit.start, credit.stop, credit.advantage, strict=True):
        for token in range(int(tree.offsets[node]) + int(start), int(tree.offsets[node]) + int(stop)):
            if credit.token_mask is None or credit.token_mask[token]:
                rows[row].append((int(node), token, float(advantage)))
    return zip(credit.row_weight.tolist(), rows, strict=True)


def unrolled_loss(model, before, trees, credits, o: Options, c: CorrectionOptions):
    """The corrected loss of a mini-batch, response by response; and how many were masked. `before` are the trainer's weights
    before the step, whose log-probs are the old ones (or the sampler's are)."""
    kept, masked = [], 0
    for tree, credit in zip(trees, credits, strict=True):
        for weight, members in rows_of(tree, credit):
            with torch.no_grad():
                trainer = {t: float(np.float32(path_logprobs(before, tree, n, o.temperature)[t])) for n, t, _ in members}
            ratio = {t: np.exp(trainer[t] - float(tree.logprobs[t])) for t in trainer if np.isfinite(tree.logprobs[t])}
            members = [m for m in members if m[1] in ratio]
            if c.sequence == "mask" and members:
                mean = np.prod([ratio[t] for _, t, _ in members]) ** (1 / len(members))
                if not (c.low <= mean <= c.high and all(c.token_low <= ratio[t] <= c.token_high for _, t, _ in members)):
                    masked += 1
                    continue
            old = Old(trainer, tree.ref_logprobs, tree.tokens) if c.old_logprobs == "recomputed" else tree
            terms = []
            for n, t, advantage in members:
                value = occurrence(path_distributions(model, tree, n, o.temperature)[t], old, t, advantage, o)
                terms.append(value * min(ratio[t], c.cap) if c.importance == "truncated" else value)
            kept.append((weight, terms))
    count, rows = sum(len(t) for _, t in kept), sum(len(t) > 0 for _, t in kept)
    total = torch.zeros((), dtype=torch.float64)
    for weight, terms in kept:
        denominator = {"token_mean": count, "sequence_mean": rows * len(terms), "constant": rows * (o.constant_tokens or 0)}[o.aggregation]
        for term in terms:
            total = total + weight * term / denominator
    return total, masked


def packed_gradients(model, before, trees, credits, o: Options, c: CorrectionOptions, **layout):
    """Loss, gradients and masked rows of the code under test; the old log-probs are the reference's, in float32 as `score` gives them."""
    scores = []
    for tree in trees:
        values = np.full(len(tree.tokens), np.nan, np.float32)
        with torch.no_grad():
            for leaf in tree.leaves:
                for token, value in path_logprobs(before, tree, int(leaf), o.temperature).items():
                    values[token] = float(value)
        scores.append(values)
    log_ratio = log_ratios(trees, scores)
    corrected = correct(trees, credits, log_ratio, c)
    old = scores if c.old_logprobs == "recomputed" else [t.logprobs for t in trees]
    old = [np.where(np.isnan(x), np.float32(np.nan), v) for x, v in zip(log_ratio, old, strict=True)]
    loss = PolicyLoss(o.clip_low, o.clip_high, o.dual_clip, o.kl_coef, o.entropy_coef, o.aggregation, o.constant_tokens)
    weights, _ = aggregate(trees, corrected.credits, o.aggregation, constant_tokens=o.constant_tokens, old_logprobs=old)
    if corrected.importance is not None:
        weights = [TokenWeights.scaled(w, f) for w, f in zip(weights, corrected.importance, strict=True)]
    model.zero_grad(set_to_none=True)
    result = gradients(model, trees, weights, old, loss, ForwardOptions(temperature=o.temperature, vocab_size=VOCAB, **layout))
    return result.loss, grads(model), corrected.masked_rows


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def a_step_apart(seed):
    """The trainer's weights before the step and after an update or two."""
    before, model = tiny_model(seed=seed), tiny_model(seed=seed)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for p in model.parameters():
            p += 0.01 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return before, model


CORRECTIONS = [
    CorrectionOptions("recomputed", "truncated", cap=1.2),
    CorrectionOptions("recomputed", sequence="mask", low=0.85, high=1.15),
    CorrectionOptions("recomputed", "truncated", 1.1, "mask", low=0.8, high=1.2, token_low=0.5, token_high=1.9),
    CorrectionOptions("sampler", sequence="mask", low=0.9, high=1.1, token_low=0.4, token_high=2.5),
]
LOSSES = [
    Options(clip_low=0.1, clip_high=0.28, dual_clip=1.5),
    Options(kl_coef=0.3, aggregation="sequence_mean", temperature=0.7),
    Options(kl_coef=0.05, aggregation="constant", constant_tokens=17, temperature=1.3),
]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from(CORRECTIONS), st.sampled_from(LOSSES))
def test_packed_equals_unrolled_on_random_trees(seed, correction, o):
    before, model = a_step_apart(seed % 7)
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, before, nodes=int(rng.integers(1, 9)), unknown=0.03, temperature=o.temperature) for _ in range(2)]
    credits = [random_credit(rng, t) for t in trees]
    model.zero_grad(set_to_none=True)
    value, masked = unrolled_loss(model, before, trees, credits, o, correction)
    if value.requires_grad:
        value.backward()
    expected = grads(model)
    for layout in ({"layout": "packed"}, {"layout": "packed", "token_budget": 20}, {"layout": "unrolled"}):
        loss, found, masked_rows = packed_gradients(model, before, trees, credits, o, correction, **layout)
        assert masked_rows == masked
        assert loss == pytest.approx(float(value.detach()), abs=1e-9), layout
        assert found.keys() == expected.keys()
        for name, g in expected.items():
            assert float((found[name] - g).abs().max()) <= 1e-9 * max(1.0, float(g.abs().max())), (layout, name)


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_the_examples_have_something_to_correct(correction):
    """The comparison means something: rows go and stay, weights are cut and are not."""
    before, _ = a_step_apart(1)
    rng = np.random.default_rng(1)
    trees = [random_tree(rng, before, nodes=9) for _ in range(4)]
    credits = [random_credit(rng, t) for t in trees]
    metrics = update(
        before, torch.optim.SGD(before.parameters(), lr=0.0), trees, credits, PolicyLoss(), vocab_size=VOCAB, correction=correction
    )
    assert (0 < metrics["mismatch/masked_rows"] < sum(len(c.row_leaf) for c in credits)) == (correction.sequence == "mask")
    assert (0 < metrics["mismatch/truncated_tokens"] < metrics["trained"]) == (correction.importance == "truncated")


@pytest.mark.parametrize("layout", ["packed", "unrolled"])
@pytest.mark.parametrize("correction", CORRECTIONS)
def test_update_makes_the_corrected_step(correction, layout):
    o = LOSSES[1]
    model = tiny_model(seed=2)
    rng = np.random.default_rng(2)
    trees = [random_tree(rng, model, nodes=8, temperature=o.temperature, unknown=0.03) for _ in range(3)]
    credits = [random_credit(rng, t) for t in trees]
    value, masked = unrolled_loss(model, tiny_model(seed=2), trees, credits, o, correction)
    value.backward()
    expected = grads(model)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    loss = PolicyLoss(o.clip_low, o.clip_high, o.dual_clip, o.kl_coef, o.entropy_coef, o.aggregation, o.constant_tokens)
    metrics = update(
        model, torch.optim.SGD(model.parameters(), lr=1.0), trees, credits, loss, vocab_size=VOCAB, max_grad_norm=None,
        temperature=o.temperature, layout=layout, correction=correction,
    )  # fmt: skip
    assert metrics["mismatch/masked_rows"] == masked and metrics["loss"] == pytest.approx(float(value.detach()), abs=1e-6)
    for name, p in model.named_parameters():
        assert torch.allclose(start[name] - p.detach(), expected[name], rtol=1e-5, atol=1e-6), name  # old log-probs are float32

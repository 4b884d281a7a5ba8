"""Packed = unrolled = one row per response: loss and every gradient, and five seeded bugs that must show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import rlzoo.losses.aggregate as aggregate_module
import rlzoo.training.packing as packing
import rlzoo.training.rows as rows_module
from rlzoo.losses.aggregate import aggregate
from rlzoo.losses.policy import PolicyLoss
from rlzoo.training.update import ForwardOptions, gradients
from tests.reference import VOCAB, Options, random_credit, random_tree, reference_gradients, tiny_model


def ours(model, trees, credits, o: Options, **options):
    loss = PolicyLoss(o.clip_low, o.clip_high, o.dual_clip, o.kl_coef, o.entropy_coef, o.aggregation, o.constant_tokens)
    weights, _ = aggregate(trees, credits, loss.aggregation, constant_tokens=loss.constant_tokens)
    model.zero_grad(set_to_none=True)
    forward_options = ForwardOptions(temperature=o.temperature, vocab_size=VOCAB, entropy="entropy" in loss.needs, **options)
    result = gradients(model, trees, weights, [t.logprobs for t in trees], loss, forward_options)
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return result, found


def distance(found, expected) -> float:
    """Largest deviation over all parameters, each relative to its largest |gradient|."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - g).abs().max() / g.abs().max().clamp(min=1e-30)) for n, g in expected.items() if g.abs().max() > 0)


def batch(seed, model, trees=3, **changes):
    rng = np.random.default_rng(seed)
    grown = [random_tree(rng, model, nodes=int(rng.integers(1, 12)), **changes) for _ in range(trees)]
    return grown, [random_credit(rng, t) for t in grown]


LOSSES = [
    Options(),
    Options(clip_low=0.1, clip_high=0.28, dual_clip=1.5),
    Options(kl_coef=0.3, aggregation="sequence_mean", temperature=0.7),
    Options(dual_clip=3.0, kl_coef=0.05, aggregation="constant", constant_tokens=17, temperature=1.3),
    Options(kl_coef=0.05, entropy_coef=0.2, temperature=0.6),
    Options(entropy_coef=0.1, aggregation="sequence_mean"),
]
LAYOUTS = [
    {"layout": "packed"},
    {"layout": "packed", "token_budget": 40},
    {"layout": "packed", "token_budget": 20},
    {"layout": "packed", "token_budget": 1},
    {"layout": "unrolled"},
    {"layout": "unrolled", "token_budget": 24},
]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("o", LOSSES)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_packed_equals_unrolled_equals_reference_in_float64(seed, o, tied):
    model = tiny_model(seed=seed, tied=tied)
    trees, credits = batch(seed, model, temperature=o.temperature, unknown=0.05)
    value, expected = reference_gradients(model, trees, credits, o)
    for layout in LAYOUTS:
        result, found = ours(model, trees, credits, o, **layout)
        assert abs(result.loss - value) <= 1e-9, layout
        assert distance(found, expected) <= 1e-9, layout


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_model_families_and_attention(family, attention):
    tolerance = 1e-9 if attention == "sdpa" else 1e-5  # transformers' eager attention takes its softmax in float32
    model = tiny_model(family=family, attn_implementation=attention)
    trees, credits = batch(11, model)
    value, expected = reference_gradients(model, trees, credits, LOSSES[2])
    for layout in LAYOUTS:
        result, found = ours(model, trees, credits, LOSSES[2], **layout)
        assert abs(result.loss - value) <= tolerance
        assert distance(found, expected) <= tolerance


@pytest.mark.parametrize("seed", [1, 2])
def test_float32(seed):
    model = tiny_model(seed=seed, dtype=torch.float32)
    trees, credits = batch(seed, model)
    for o in LOSSES:
        value, expected = reference_gradients(model, trees, credits, o)
        for layout in LAYOUTS:
            result, found = ours(model, trees, credits, o, **layout)
            assert abs(result.loss - value) <= 1e-5 * max(1.0, abs(value))
            assert distance(found, expected) <= 1e-5


def test_ratios_lie_on_both_sides_of_both_clips():
    """The comparison means something: every branch of the loss is taken."""
    model = tiny_model(seed=1)
    trees, credits = batch(1, model)
    result, _ = ours(model, trees, credits, LOSSES[1])
    ratio = np.exp(result.log_ratio)
    for signs in (result.helped, result.hurt):
        assert (ratio[signs] > 1.28).any() and (ratio[signs] < 0.9).any() and ((ratio[signs] > 0.9) & (ratio[signs] < 1.28)).any()
    assert (ratio[result.hurt] > 1.5).any()


def _shifted_target(monkeypatch):
    """Each target is predicted by the slot to its left in the pack, parent or not."""
    original = packing.make_rows

    def shifted(tree, *args, **kwargs):
        made = original(tree, *args, **kwargs)
        for row in made:
            slot = {int(t): i for i, t in enumerate(row.token)}
            row.source[:] = [max(0, slot[int(t)] - 1) if int(t) in slot else s for t, s in zip(row.target, row.source, strict=True)]
        return made

    monkeypatch.setattr(packing, "make_rows", shifted)


def _lost_sibling(monkeypatch):
    """The last tip of a row is forgotten where it has company."""
    original = rows_module._row

    def lost(tree, plan, trained, a, b, layout):
        return original(tree, plan, trained, a, b - 1 if b - a > 1 else b, layout)

    monkeypatch.setattr(rows_module, "_row", lost)


def _wrong_position(monkeypatch):
    """Positions count slots of the pack instead of tokens of the path."""
    original = packing._finish

    def counted(rows, trees, base, ids, positions, starts, attention):
        return original(rows, trees, base, ids, np.broadcast_to(np.arange(ids.shape[1]), ids.shape).copy(), starts, attention)

    monkeypatch.setattr(packing, "_finish", counted)


def _wrong_denominator(monkeypatch):
    """Denominators count unique tokens instead of (row, token) terms."""
    original = aggregate_module._count

    def unique(terms):
        return replace(original(terms), terms=len(np.unique(terms.token)))

    monkeypatch.setattr(aggregate_module, "_count", unique)


def _doubled_prefix(monkeypatch):
    """Where a tree is cut, the prefix is trained in every row that repeats it."""
    original = rows_module._row

    def doubled(tree, plan, trained, a, b, layout):
        first = np.where((plan.first < a) & (plan.last >= a), a, plan.first)
        return original(tree, replace(plan, first=first), trained, a, b, layout)

    monkeypatch.setattr(rows_module, "_row", doubled)


def _leaking_siblings(monkeypatch):
    """Every token sees what stands before it in the pack."""
    original = rows_module._spans

    def leaking(tree, plan, slot, a, b):
        return [replace(s, path=np.arange(s.start + s.size)) for s in original(tree, plan, slot, a, b)]

    monkeypatch.setattr(rows_module, "_spans", leaking)


BUGS = [_shifted_target, _lost_sibling, _wrong_position, _wrong_denominator, _doubled_prefix, _leaking_siblings]


@pytest.mark.parametrize("bug", BUGS)
def test_seeded_bugs_turn_the_comparison_red(bug, monkeypatch):
    model = tiny_model(seed=5)
    trees, credits = batch(5, model)
    value, expected = reference_gradients(model, trees, credits, LOSSES[0])
    layout = {"layout": "packed", "token_budget": 10 if bug is _doubled_prefix else 1000}
    _, sound = ours(model, trees, credits, LOSSES[0], **layout)
    assert distance(sound, expected) <= 1e-9
    bug(monkeypatch)
    result, found = ours(model, trees, credits, LOSSES[0], **layout)
    assert distance(found, expected) > 1e-3
    assert abs(result.loss - value) > 1e-6


@pytest.mark.parametrize("block", [1, 3, 256])
def test_long_spans_in_blocks(block, monkeypatch):
    monkeypatch.setattr(packing, "QUERY_BLOCK", block)
    model = tiny_model()
    trees, credits = batch(8, model, longest=12)
    value, expected = reference_gradients(model, trees, credits, LOSSES[1])
    result, found = ours(model, trees, credits, LOSSES[1])
    assert abs(result.loss - value) <= 1e-9
    assert distance(found, expected) <= 1e-9


def test_gradient_checkpointing_and_train_mode():
    model = tiny_model().train()
    trees, credits = batch(9, model)
    value, expected = reference_gradients(model, trees, credits, LOSSES[1])
    model.gradient_checkpointing_enable()
    result, found = ours(model, trees, credits, LOSSES[1])
    assert abs(result.loss - value) <= 1e-9
    assert distance(found, expected) <= 1e-9

"""The policy loss, its weights, and the chunked log-probs below it."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlzoo.credit.base import Credit, path_rows
from rlzoo.losses.aggregate import aggregate, count_terms
from rlzoo.losses.logprobs import token_logprobs
from rlzoo.losses.policy import PolicyLoss, TokenBatch, k3
from rlzoo.tree import Segment, Tree


def batch_of(log_ratio, a_pos=0.0, a_neg=0.0, weight=1.0, ref=None):
    logprobs = torch.tensor([log_ratio], dtype=torch.float64, requires_grad=True)

    def one(value):
        return torch.tensor([value], dtype=torch.float64)

    return TokenBatch(logprobs, one(0.0), one(a_pos), one(a_neg), one(weight), None if ref is None else one(ref))


def value_and_slope(loss, batch):
    value = loss(batch)
    value.backward()
    return value.item(), batch.logprobs.grad.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # clipped above: 1.2 · 2
        (0.5, 2.0, -1.0, -1.0),  # a good token grown rare is pulled back
        (1.5, -2.0, 3.0, 3.0),  # a bad token grown likely is pushed down
        (0.5, -2.0, 1.6, 0.0),  # clipped below: 0.8 · -2
        (5.0, -2.0, 6.0, 0.0),  # dual clip: 3 · -2
    ],
)
def test_the_clipped_surrogate(ratio, advantage, value, slope):
    batch = batch_of(np.log(ratio), max(advantage, 0), min(advantage, 0))
    assert value_and_slope(PolicyLoss(dual_clip=3.0), batch) == pytest.approx((value, slope))


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_the_gradient_is_whole_where_the_clip_ties(advantage):
    """On policy with no room at all, min(r·A, clip(r)·A) ties; torch.minimum would halve the gradient."""
    batch = batch_of(0.0, max(advantage, 0), min(advantage, 0))
    assert value_and_slope(PolicyLoss(clip_low=0.0, clip_high=0.0), batch) == (-advantage, -advantage)


def test_extreme_log_ratios_stay_finite():
    for log_ratio in (1e4, -1e4):
        value, slope = value_and_slope(PolicyLoss(kl_coef=1.0), batch_of(log_ratio, 1.0, -1.0, 1.0, ref=0.0))
        assert np.isfinite(value) and np.isfinite(slope)


def test_kl_to_the_reference():
    """β·w·(e^d - d - 1) with d = ref - logp; its slope is β·w·(1 - e^d)."""
    value, slope = value_and_slope(PolicyLoss(kl_coef=0.5), batch_of(-1.0, weight=3.0, ref=-1.4))
    assert value == pytest.approx(0.5 * 3 * (np.exp(-0.4) + 0.4 - 1))
    assert slope == pytest.approx(0.5 * 3 * (1 - np.exp(-0.4)))
    assert (k3(torch.linspace(-5, 5, 101, dtype=torch.float64)) >= 0).all()


def test_kl_without_reference_is_refused():
    with pytest.raises(ValueError, match="no reference log-probs"):
        PolicyLoss(kl_coef=0.1)(batch_of(0.0, 1.0))
    assert PolicyLoss(kl_coef=0.1).needs == {"ref_logprobs"} and not PolicyLoss().needs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_low": -0.1}, "loss.clip_low is -0.1; allowed: a number from 0 to 1"),
        ({"clip_low": 1.5}, "clip_low is 1.5"),
        ({"clip_high": -1.0}, "loss.clip_high is -1.0; allowed: a number of at least 0"),
        ({"clip_high": float("nan")}, "clip_high is nan"),
        ({"dual_clip": 1.0}, "loss.dual_clip is 1.0; allowed: a number above 1 or none"),
        ({"kl_coef": float("inf")}, "kl_coef is inf"),
        ({"aggregation": "sum"}, "loss.aggregation is 'sum'; allowed: token_mean, sequence_mean, constant"),
        ({"aggregation": "constant"}, "needs loss.constant_tokens"),
        ({"constant_tokens": 5}, "only used by loss.aggregation 'constant'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        PolicyLoss(**options)


TREE = Tree.from_segments(
    [1, 2],
    [Segment(0, [3, 4], [-1.0, -1.0]), Segment(1, [5], [-1.0]), Segment(1, [6, 7, 8], [-1.0, -1.0, -1.0])],
    {2: 1.0, 3: 0.0},
)  # rows: 3 tokens (A = 2) and 5 tokens (A = -1); tokens 2, 3 are shared
CREDIT = path_rows(TREE, [0, 1], [2.0, -1.0])


@pytest.mark.parametrize(
    ("aggregation", "constant", "first", "second"),
    [("token_mean", None, 1 / 8, 1 / 8), ("sequence_mean", None, 1 / 6, 1 / 10), ("constant", 10, 1 / 20, 1 / 20)],
)
def test_aggregations(aggregation, constant, first, second):
    (w,), counts = aggregate([TREE], [CREDIT], aggregation, constant_tokens=constant)
    assert (counts.rows, counts.terms, counts.dropped) == (2, 8, 0)
    np.testing.assert_allclose(w.a_pos, [0, 0, 2 * first, 2 * first, 2 * first, 0, 0, 0])
    np.testing.assert_allclose(w.a_neg, [0, 0, -second, -second, 0, -second, -second, -second])
    np.testing.assert_allclose(w.weight, [0, 0, first + second, first + second, first, second, second, second])


def test_denominators_span_the_mini_batch_and_add_up_over_its_parts():
    whole, counts = aggregate([TREE, TREE], [CREDIT, CREDIT], "sequence_mean")
    assert counts == count_terms([TREE], [CREDIT]) + count_terms([TREE], [CREDIT])
    (part,), _ = aggregate([TREE], [CREDIT], "sequence_mean", counts=counts)
    np.testing.assert_array_equal(whole[0].a_pos, part.a_pos)
    (alone,), _ = aggregate([TREE], [CREDIT], "sequence_mean")
    np.testing.assert_allclose(alone.a_pos, 2 * part.a_pos)


def test_row_weights_scale_the_sum_and_not_the_denominator():
    (w,), counts = aggregate([TREE], [replace(CREDIT, row_weight=np.array([0.0, 3.0]))], "token_mean")
    assert counts.terms == 8
    np.testing.assert_allclose(w.weight, [0, 0, 3 / 8, 3 / 8, 0, 3 / 8, 3 / 8, 3 / 8])


def test_token_mask_and_parts_of_nodes_count_nowhere():
    mask = np.array([True, True, False, True, True, True, True, True])
    stop = CREDIT.stop.copy()
    stop[-1] = 1  # row 1 has node 3 only up to its first token
    (w,), counts = aggregate([TREE], [replace(CREDIT, stop=stop, token_mask=mask)], "sequence_mean")
    assert counts.terms == 4
    np.testing.assert_allclose(w.weight, [0, 0, 0, 1 / 4 + 1 / 4, 1 / 4, 1 / 4, 0, 0])


def test_tokens_without_a_finite_old_logprob_are_dropped_and_counted():
    old = np.array([np.nan, np.nan, -1, -np.inf, -1, -1, np.nan, -1], np.float32)
    (w,), counts = aggregate([TREE], [CREDIT], "token_mean", old_logprobs=[old])
    assert (counts.terms, counts.dropped) == (5, 3)
    np.testing.assert_allclose(w.weight, np.array([0, 0, 2, 0, 1, 1, 0, 1]) / 5)


def test_advantage_zero_counts_and_no_term_does_not():
    (w,), counts = aggregate([TREE], [path_rows(TREE, [1], [0.0])], "token_mean")
    assert counts.terms == 5 and not w.a_pos.any() and not w.a_neg.any()
    np.testing.assert_allclose(w.weight, np.array([0, 0, 1, 1, 0, 1, 1, 1]) / 5)
    (w,), counts = aggregate([TREE], [Credit.empty(TREE)], "token_mean")
    assert counts.terms == 0 and not w.weight.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"node": np.zeros(4, np.int32)}, "the prompt, node 0, is never trained"),
        ({"node": np.full(4, 9, np.int32)}, r"a node outside 1\.\.3"),
        ({"row": np.full(4, 2, np.int32)}, r"a row outside 0\.\.1"),
        ({"stop": np.full(4, 9, np.int32)}, "does not lie within its node"),
        ({"advantage": np.full(4, np.nan)}, "an advantage is not finite"),
        ({"row_weight": np.array([1.0, -1.0])}, "row weights must be finite, 0 or more"),
        ({"shape": (5, 5)}, "made for"),
        ({"token_mask": np.ones(3, bool)}, "token_mask has 3 values for 8 tokens"),
    ],
)
def test_credits_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        aggregate([TREE], [replace(CREDIT, **change)], "token_mean")


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("vocab_size", [None, 11])
def test_chunked_logprobs_and_gradients_equal_plain_ones(vocab_size, with_bias):
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    hidden, weight, bias = leaf(17, 6), leaf(13, 6), leaf(13) if with_bias else None
    targets = torch.randint(0, vocab_size or 13, (17,), generator=generator)
    pull = torch.randn(17, generator=generator, dtype=torch.float64)
    leaves = [x for x in (hidden, weight, bias) if x is not None]

    logits = (hidden @ weight.T + (0 if bias is None else bias)) / 0.7
    if vocab_size is not None:
        logits = logits.masked_fill(torch.arange(13) >= vocab_size, float("-inf"))
    expected = logits.log_softmax(-1)
    spread = torch.distributions.Categorical(logits=logits).entropy()
    grads = torch.autograd.grad(expected[range(17), targets] @ pull, leaves, retain_graph=True)
    finite = expected if vocab_size is None else expected[:, :vocab_size]  # the entropy written out, over the ids that there are
    entropy_grads = torch.autograd.grad(-(finite.exp() * finite).sum(-1) @ pull, leaves)
    for chunk in (1, 13 * 4 * 8, 13 * 16 * 8, 10**6):
        options = {"bias": bias, "temperature": 0.7, "vocab_size": vocab_size, "chunk_bytes": chunk, "entropy": True}
        logprobs, entropy = token_logprobs(hidden, weight, targets, **options)
        torch.testing.assert_close(logprobs, expected[range(17), targets], rtol=0, atol=1e-12)
        torch.testing.assert_close(entropy, spread, rtol=0, atol=1e-12)
        for ours, theirs in zip(torch.autograd.grad(logprobs @ pull, leaves, retain_graph=True), grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        for ours, theirs in zip(torch.autograd.grad(entropy @ pull, leaves, retain_graph=True), entropy_grads, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
        both = torch.autograd.grad(logprobs @ pull - 0.3 * (entropy @ pull), leaves)
        for ours, policy, bonus in zip(both, grads, entropy_grads, strict=True):
            torch.testing.assert_close(ours, policy - 0.3 * bonus, rtol=0, atol=1e-12)


def test_chunked_logprobs_under_autocast_equal_unchunked_ones():
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 32, requires_grad=True), torch.randn(50, 32, requires_grad=True)
    targets, found = torch.randint(0, 50, (64,)), []
    for chunk in (400, 10**6):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logprobs, _ = token_logprobs(hidden, weight, targets, chunk_bytes=chunk)
        assert logprobs.dtype == torch.float32
        found.append((logprobs, *torch.autograd.grad(logprobs.sum(), [hidden, weight])))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max()))


@pytest.mark.parametrize(("options", "message"), [({"temperature": 0.0}, "temperature is 0.0"), ({"vocab_size": 14}, "vocab_size is 14")])
def test_logprobs_refuse_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        token_logprobs(torch.zeros(2, 3), torch.zeros(13, 3), torch.zeros(2, dtype=torch.long), **options)


def test_options_of_loss_and_optimiser_load_no_torch():
    code = "import sys, rlzoo.losses.policy, rlzoo.losses.aggregate, rlzoo.training.optim; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Mismatch of sampler and trainer: closed forms, masks by hand, and what reaches the update."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlzoo.cli import parse_run
from rlzoo.credit.base import node_rows, path_rows
from rlzoo.losses.correction import CorrectionOptions, MismatchError, correct, importance_weights, log_ratios, mismatch, refuse_drift
from rlzoo.losses.policy import PolicyLoss
from rlzoo.sampling.grow import grow
from rlzoo.training.update import score, update
from rlzoo.tree import Segment, Tree
from tests.engines import SAMPLER_IDS, SAMPLERS, Engine, prompts_of, with_ends
from tests.reference import VOCAB, random_credit, random_tree, tiny_model

RECOMPUTED = CorrectionOptions(old_logprobs="recomputed")
TRUNCATED = CorrectionOptions(old_logprobs="recomputed", importance="truncated")
MASK = CorrectionOptions(sequence="mask")


def test_measures_in_closed_form():
    found = mismatch(np.log([2.0, 0.5, 1.0]))
    assert found["kl"] == pytest.approx(0, abs=1e-15)
    assert found["kl_k3"] == pytest.approx(1 / 6)  # ((2 - 1 - ln 2) + (1/2 - 1 + ln 2)) / 3
    assert found["ratio_mean"] == pytest.approx(7 / 6) and found["ratio_p99"] == pytest.approx(1.98)
    assert mismatch(np.zeros(0)) == {}


def test_both_estimators_have_the_kl_as_their_mean():
    sampler, trainer = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.1, 0.4])
    found = mismatch(np.repeat(np.log(trainer / sampler), [7, 2, 1]))  # ten tokens, exactly as the sampler would draw them
    exact = float((sampler * np.log(sampler / trainer)).sum())
    assert found["kl"] == pytest.approx(exact) and found["kl_k3"] == pytest.approx(exact)
    assert found["ratio_mean"] == pytest.approx(1)


def test_a_huge_ratio_stays_finite():
    assert all(math.isfinite(v) for v in mismatch(np.array([-900.0, 900.0])).values())
    assert importance_weights(np.array([-900.0, 900.0]), 2.0).tolist() == [0, 2]


def test_weights_are_truncated_ratios():
    found = importance_weights(np.array([math.log(0.5), 0.0, math.log(1.5), math.log(3.0), np.nan]), 2.0)
    assert found == pytest.approx([0.5, 1, 1.5, 2, 1])


def a_tree() -> Tree:
    """Prompt of 2; a shared segment of 2 tokens, below it responses of 2, 1 and 3 tokens. Tokens 2-3, 4-5, 6, 7-9."""
    segments = [Segment(0, [1, 2], [-1, -1]), Segment(1, [3, 4], [-1, -1]), Segment(1, [5], [-1]), Segment(1, [6, 7, 8], [-1, -1, -1])]
    return Tree.from_segments([9, 9], segments, {2: 1.0, 3: 0.0, 4: 0.0})


def ratios(**of_token: float) -> list[np.ndarray]:
    x = np.zeros(10)
    x[:2] = np.nan
    for token, ratio in of_token.items():
        x[int(token[1:])] = np.log(ratio) if ratio else np.nan
    return [x]


@pytest.mark.parametrize(
    ("found", "options", "left"),
    [
        (ratios(), {}, [0, 1, 2]),
        (ratios(t6=1.4), {"high": 1.1}, [0, 2]),  # 1.4 ** (1/3) = 1.119
        (ratios(t6=1.3), {"high": 1.1}, [0, 1, 2]),  # 1.3 ** (1/3) = 1.091
        (ratios(t4=0.5), {"low": 0.85}, [1, 2]),  # 0.5 ** (1/4) = 0.841, though 5 tokens would give 0.871
        (ratios(t4=0.5), {"low": 0.84}, [0, 1, 2]),
        (ratios(t2=2.0), {"high": 1.15}, [2]),  # shared by all: 2 ** (1/4), (1/3), (1/5) = 1.189, 1.260, 1.149
        (ratios(t7=3.0, t8=1 / 3), {}, [0, 1, 2]),  # a mean of 1
        (ratios(t7=3.0, t8=1 / 3), {"token_high": 2.9}, [0, 1]),
        (ratios(t7=3.0, t8=1 / 3), {"token_low": 0.34}, [0, 1]),
        (ratios(t6=1e-5), {"low": 0, "token_low": 0}, [0, 1, 2]),  # 0 is no bound
        (ratios(t6=1e-5), {"low": 0}, [0, 2]),
        (ratios(t6=0), {"low": 1, "high": 1}, [0, 1, 2]),  # unknown: does not decide
        (ratios(t6=0, t2=1.3), {"high": 1.12}, [0, 2]),  # nor counts: 1.3 ** (1/2) = 1.140, where 3 tokens would give 1.091
    ],
)
def test_responses_outside_the_bounds_are_left_out(found, options, left):
    tree = a_tree()
    credit = path_rows(tree, [0, 1, 2], [1.0, -1.0, 0.5])
    corrected = correct([tree], [credit], found, CorrectionOptions(sequence="mask", **options))
    (kept,) = corrected.credits
    assert kept.row_leaf.tolist() == left and corrected.masked_rows == 3 - len(left)
    expected = path_rows(tree, left, [[1.0, -1.0, 0.5][i] for i in left])
    for name in ("row", "node", "start", "stop", "advantage", "row_weight"):
        assert np.array_equal(getattr(kept, name), getattr(expected, name)), name


def test_a_row_of_one_node_is_judged_by_that_node():
    tree = a_tree()
    credit = node_rows(tree, [1, 3, 4], [1.0, -1.0, 0.5])
    corrected = correct([tree], [credit], ratios(t2=1.3), MASK)
    assert corrected.credits[0].node.tolist() == [3, 4] and corrected.masked_rows == 1


def test_truncated_tokens_are_those_still_trained_and_counted_once():
    tree, both = a_tree(), CorrectionOptions(old_logprobs="recomputed", importance="truncated", sequence="mask", token_high=9.0, high=99.0)
    credit = path_rows(tree, [0, 1, 2], [1.0, -1.0, 0.5])
    assert correct([tree], [credit], ratios(t2=3.0, t6=4.0, t8=2.0), both).truncated_tokens == 2  # 2 is not above the cap
    assert correct([tree], [credit], ratios(t2=3.0, t6=10.0), both).truncated_tokens == 1  # token 6 goes with its row


def test_a_ratio_is_known_where_both_log_probs_are():
    tree = Tree.from_segments([1], [Segment(0, [2, 3, 4], [-1.0, np.nan, -2.0])])
    (found,) = log_ratios([tree], [np.array([np.nan, -0.5, -1.0, -np.inf], np.float32)])
    assert found[1] == 0.5 and np.isnan(found[[0, 2, 3]]).all()


@pytest.mark.parametrize(
    ("options", "fine", "rough"),
    [
        ({}, ("sampler", "none"), ("recomputed", "truncated")),
        ({"old_logprobs": "sampler"}, ("sampler", "none"), ("sampler", "none")),
        ({"old_logprobs": "recomputed"}, ("recomputed", "none"), ("recomputed", "truncated")),
        ({"importance": "none"}, ("sampler", "none"), ("sampler", "none")),
        ({"importance": "truncated"}, ("recomputed", "truncated"), ("recomputed", "truncated")),
        ({"old_logprobs": "recomputed", "importance": "none"}, ("recomputed", "none"), ("recomputed", "none")),
    ],
)
def test_the_correction_is_chosen_by_the_precision_and_what_is_given_stays(options, fine, rough):
    for is_rough, wanted in ((False, fine), (True, rough)):
        chosen = CorrectionOptions(**options, sequence="mask", cap=3.0).chosen(rough=is_rough)
        assert (chosen.old_logprobs, chosen.importance) == wanted and (chosen.sequence, chosen.cap) == ("mask", 3.0)
        assert chosen.chosen(rough=not is_rough) == chosen and chosen.scored


def test_the_limit():
    found = mismatch(np.full(8, 0.5))  # e^0.5 - 1.5 = 0.1487
    refuse_drift(found, 0.0)
    refuse_drift(found, 0.149)
    with pytest.raises(MismatchError, match=r"^KL\(sampler \|\| trainer\) is 0.149 and max_mismatch_kl allows 0.148; no update was made$"):
        refuse_drift(found, 0.148)
    refuse_drift({}, 0.0)
    with pytest.raises(MismatchError, match="no trained token has a log-prob of the sampler's"):
        refuse_drift({}, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"old_logprobs": "sampler", "importance": "truncated"}, "correction.importance = truncated would correct twice"),
        ({"old_logprobs": "guessed"}, "correction.old_logprobs is 'guessed'; allowed: auto, sampler, recomputed"),
        ({"sequence": "drop"}, "correction.sequence is 'drop'; allowed: none, mask"),
        ({"cap": 0.5}, "correction.cap is 0.5; allowed: a number of at least 1"),
        ({"high": math.inf}, "correction.high is inf; allowed: a number of at least 1"),
        ({"low": 1.2}, "correction.low is 1.2; allowed: a number from 0 to 1"),
        ({"token_low": math.nan}, "correction.token_low is nan; allowed: a number from 0 to 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        CorrectionOptions(**options)
    assert "\n" not in str(caught.value)


def test_flags_reach_the_config_and_round_trip(tmp_path):
    from rlzoo.store.toml import dump_toml

    flags = ["--correction.old-logprobs", "recomputed", "--correction.importance", "truncated", "--correction.cap", "3"]
    config, _, _ = parse_run(["--algo", "grpo", *flags, "--correction.sequence", "mask", "--max-mismatch-kl", "0.01"])
    assert config.correction == CorrectionOptions("recomputed", "truncated", 3.0, "mask") and config.max_mismatch_kl == 0.01
    (tmp_path / "config.toml").write_text(dump_toml(config.to_dict()))
    assert parse_run(["--config", str(tmp_path / "config.toml")])[0] == config


# --- in the update ---


def drifted(model, seed=3, trees=4, by=0.3):
    """Trees whose sampler's log-probs are the model's plus noise, and the noise."""
    rng = np.random.default_rng(seed)
    grown = [random_tree(rng, model, nodes=8, spread=0.0) for _ in range(trees)]
    noise = [by * rng.standard_normal(len(t.tokens)) for t in grown]
    for tree, n in zip(grown, noise, strict=True):
        object.__setattr__(tree, "logprobs", (tree.logprobs + n).astype(np.float32))
    return grown, [random_credit(rng, t) for t in grown], noise


def trained(trees, credits):
    """Tokens (tree, index) with a term, each once; plain loops."""
    found = set()
    for i, (tree, c) in enumerate(zip(trees, credits, strict=True)):
        for row, node, start, stop in zip(c.row, c.node, c.start, c.stop, strict=True):
            for k in range(int(tree.offsets[node]) + int(start), int(tree.offsets[node]) + int(stop)):
                if (c.token_mask is None or c.token_mask[k]) and c.row_weight[row] > 0:
                    found.add((i, k))
    return sorted(found)


def stepped(trees, credits, **options):
    model = tiny_model()
    metrics = update(model, torch.optim.SGD(model.parameters(), lr=0.1), trees, credits, PolicyLoss(), vocab_size=VOCAB, **options)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), metrics


@pytest.mark.parametrize("correction", [CorrectionOptions(), RECOMPUTED, MASK])
@pytest.mark.parametrize("layout", ["packed", "unrolled"])
def test_a_drift_is_measured_as_what_it_is(correction, layout):
    trees, credits, noise = drifted(tiny_model())
    x = np.array([-noise[i][k] for i, k in trained(trees, credits)])
    _, metrics = stepped(trees, credits, correction=correction, layout=layout, epochs=2)  # only the first pass is measured
    assert metrics["mismatch/kl_k3"] == pytest.approx(float((np.exp(x) - 1 - x).mean()), abs=1e-6)
    assert metrics["mismatch/kl"] == pytest.approx(float(-x.mean()), abs=1e-6)
    assert metrics["mismatch/ratio_mean"] == pytest.approx(float(np.exp(x).mean()), abs=1e-6)
    assert metrics["mismatch/ratio_p99"] == pytest.approx(float(np.quantile(np.exp(x), 0.99)), abs=1e-6)


def test_kl_grows_with_the_drift():
    found = [stepped(*drifted(tiny_model(), by=by)[:2])[1]["mismatch/kl_k3"] for by in (0.0, 0.1, 0.3)]
    assert found[0] < 1e-9 and found[1] == pytest.approx(0.1**2 / 2, rel=0.3) and found[2] == pytest.approx(0.3**2 / 2, rel=0.3)


def test_the_sampler_is_measured_on_the_first_mini_batch_and_recomputed_on_all():
    trees, credits, noise = drifted(tiny_model())
    _, metrics = stepped(trees, credits, mini_batches=2)
    x = np.array([-noise[i][k] for i, k in trained(trees, credits) if i < 2])
    assert metrics["mismatch/kl"] == pytest.approx(float(-x.mean()), abs=1e-6)
    x = np.array([-noise[i][k] for i, k in trained(trees, credits)])
    _, metrics = stepped(trees, credits, mini_batches=2, correction=RECOMPUTED)
    assert metrics["mismatch/kl"] == pytest.approx(float(-x.mean()), abs=1e-6)


@pytest.mark.parametrize("correction", [CorrectionOptions(), TRUNCATED])
def test_a_drift_beyond_the_limit_leaves_the_weights_alone(correction):
    trees, credits, _ = drifted(tiny_model())
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(MismatchError, match=r"max_mismatch_kl allows 0\.01; no update was made"):
        update(model, optimizer, trees, credits, PolicyLoss(), vocab_size=VOCAB, correction=correction, max_mismatch_kl=0.01)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    _, metrics = stepped(trees, credits, correction=correction, max_mismatch_kl=0.2)
    assert metrics["updates"] == 1


def test_without_a_mismatch_a_correction_changes_nothing_bit_for_bit():
    model = tiny_model()
    trees, credits, _ = drifted(model)
    for tree, scores in zip(trees, score(model, trees, vocab_size=VOCAB), strict=True):
        object.__setattr__(tree, "logprobs", scores)
    plain, _ = stepped(trees, credits)
    for correction in (RECOMPUTED, TRUNCATED, MASK, CorrectionOptions("recomputed", "truncated", sequence="mask", low=1, high=1)):
        weights, metrics = stepped(trees, credits, correction=correction)
        assert torch.equal(weights, plain), correction
        assert metrics["mismatch/kl_k3"] == metrics["mismatch/masked_rows"] == metrics["mismatch/truncated_tokens"] == 0


def test_an_unknown_token_is_dropped_only_where_it_would_have_to_be_corrected():
    tree = a_tree()
    object.__setattr__(tree, "logprobs", np.where(np.arange(10) == 6, np.float32(np.nan), tree.logprobs))
    credit = path_rows(tree, [0, 1, 2], [1.0, -1.0, 0.5])
    assert stepped([tree], [credit], correction=RECOMPUTED)[1]["dropped_terms"] == 0
    for correction in (CorrectionOptions(), TRUNCATED, CorrectionOptions("recomputed", sequence="mask", low=0, high=1e9, token_high=1e9)):
        assert stepped([tree], [credit], correction=correction)[1]["dropped_terms"] == 1


def test_a_step_whose_rows_are_all_masked_takes_no_update():
    trees, credits, _ = drifted(tiny_model())
    start = torch.cat([p.detach().flatten() for p in tiny_model().parameters()])
    weights, metrics = stepped(trees, credits, correction=CorrectionOptions(sequence="mask", low=1, high=1))
    assert metrics["updates"] == 0 and torch.equal(weights, start)
    assert metrics["mismatch/masked_rows"] > 0 and metrics["mismatch/kl_k3"] > 0


@pytest.mark.parametrize("temperature", [0.6, 1.3])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=SAMPLER_IDS)
def test_sampler_and_trainer_agree_at_any_temperature(sampler, temperature, tiny_model, tiny_tokenizer):
    from dataclasses import replace

    from rlzoo.backends.torch import TorchBackend

    model = with_ends(tiny_model(torch.float64))
    engine = Engine(lambda: TorchBackend(model, tiny_tokenizer, capacity=8), model, 1e-9, True)
    trees = grow(replace(sampler, temperature=temperature), engine.make(), prompts_of(tiny_tokenizer, 2), seed=1)
    found = {}
    for ours in (temperature, 1.0):
        x = np.concatenate(log_ratios(trees, score(model, trees, temperature=ours, vocab_size=len(tiny_tokenizer))))
        found[ours] = mismatch(x[np.isfinite(x)])
    assert abs(found[temperature]["kl"]) < 1e-6 and found[temperature]["kl_k3"] < 1e-12
    assert found[1.0]["kl_k3"] > 1e-3  # a trainer that forgets the temperature shows

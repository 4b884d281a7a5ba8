"""One update of the policy, scoring, the optimiser, and when packing is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, MambaConfig, MambaForCausalLM

import rlzoo.training.update as update_module
from rlzoo.credit.base import Credit, path_rows
from rlzoo.losses.aggregate import aggregate
from rlzoo.losses.correction import CorrectionOptions
from rlzoo.losses.policy import PolicyLoss
from rlzoo.training.exactness import exactness
from rlzoo.training.forward import Head
from rlzoo.training.optim import Optim, make_optimizer
from rlzoo.training.update import ForwardOptions, NonFiniteError, gradients, score, update
from rlzoo.tree import Segment, Tree
from tests.reference import VOCAB, Options, path_logprobs, random_credit, random_tree, reference_gradients, tiny_model

RECOMPUTED = CorrectionOptions(old_logprobs="recomputed")


def a_batch(model, seed=0, trees=4, **changes):
    rng = np.random.default_rng(seed)
    grown = [random_tree(rng, model, nodes=8, **changes) for _ in range(trees)]
    return grown, [random_credit(rng, t) for t in grown]


def weights_of(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def run(trees, credits, *, loss=None, seed=0, **options):
    model = tiny_model(seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = update(model, optimizer, trees, credits, loss or PolicyLoss(), vocab_size=VOCAB, **options)
    return weights_of(model), metrics


@pytest.fixture(scope="module")
def batch():
    return a_batch(tiny_model())


def test_good_answers_grow_likelier_and_bad_ones_rarer():
    model = tiny_model()
    tree = Tree.from_segments([1, 2], [Segment(0, [3]), Segment(1, [4, 5]), Segment(1, [6, 7])], {2: 1.0, 3: 0.0})
    (before,) = score(model, [tree], vocab_size=VOCAB)
    optim = Optim(lr=1e-3)
    for _ in range(3):
        update(
            model,
            make_optimizer(model, optim),
            [tree],
            [path_rows(tree, [0, 1], [1.0, -1.0])],
            PolicyLoss(),
            vocab_size=VOCAB,
            correction=RECOMPUTED,
        )
    (after,) = score(model, [tree], vocab_size=VOCAB)
    assert (after - before)[3:5].sum() > 0.05
    assert (after - before)[5:7].sum() < -0.05


def test_steps_metrics_and_restored_mode(batch):
    model = tiny_model().eval()
    optimizer = make_optimizer(model, Optim(lr=1e-3))
    options = {"mini_batches": 2, "epochs": 3, "correction": RECOMPUTED, "entropy": True}
    metrics = update(model, optimizer, *batch, PolicyLoss(kl_coef=0.1), vocab_size=VOCAB, **options)
    assert metrics["updates"] == 6
    assert not model.training
    assert metrics["trees"] == 3 * 4
    assert 0 < metrics["entropy"] <= np.log(VOCAB)
    assert metrics["kl_ref"] >= 0 and metrics["grad_norm"] > 0
    assert metrics["forwarded"] == metrics["unique"] < metrics["unrolled"]
    assert all(np.isfinite(v) for v in metrics.values())


def test_recomputed_old_logprobs_make_the_first_step_on_policy(batch):
    _, metrics = run(*batch, correction=RECOMPUTED)
    assert metrics["ratio_mean"] == pytest.approx(1, abs=1e-6) and metrics["log_ratio_max"] < 1e-6
    assert metrics["clip_low_fraction"] == metrics["clip_high_fraction"] == 0
    _, sampler = run(*batch)
    assert sampler["log_ratio_max"] > 0.1 and sampler["clip_high_fraction"] > 0 and sampler["kl_old_k3"] > 0


def test_metrics_do_not_depend_on_the_layout(batch):
    packed, a = run(*batch, loss=PolicyLoss(kl_coef=0.1))
    unrolled, b = run(*batch, loss=PolicyLoss(kl_coef=0.1), layout="unrolled")
    assert torch.allclose(packed, unrolled, rtol=0, atol=1e-9)
    for key in ("loss", "grad_norm", "ratio_mean", "log_ratio_max", "clip_low_fraction", "clip_high_fraction", "kl_old", "kl_ref"):
        assert a[key] == pytest.approx(b[key], abs=1e-9), key
    assert b["forwarded"] == b["unrolled"] == a["unrolled"] > a["forwarded"]


@pytest.mark.parametrize("token_budget", [1, 20, 40])
def test_the_token_budget_changes_nothing(batch, token_budget):
    whole, _ = run(*batch, mini_batches=2)
    cut, metrics = run(*batch, mini_batches=2, token_budget=token_budget)
    assert metrics["packs"] > 2
    assert torch.allclose(whole, cut, rtol=0, atol=1e-9)


def test_the_gradient_norm_is_clipped(batch):
    start = weights_of(tiny_model())
    free, metrics = run(*batch, max_grad_norm=None)
    clipped, _ = run(*batch, max_grad_norm=metrics["grad_norm"] / 4)
    assert float((free - start).norm()) == pytest.approx(0.1 * metrics["grad_norm"], rel=1e-6)
    assert float((clipped - start).norm()) == pytest.approx(0.1 * metrics["grad_norm"] / 4, rel=1e-4)


def test_nothing_to_train_takes_no_step(batch):
    trees, _ = batch
    weights, metrics = run(trees, [Credit.empty(t) for t in trees])
    assert metrics["updates"] == 0
    assert torch.equal(weights, weights_of(tiny_model()))


def test_trees_without_logprobs_are_refused_instead_of_ignored():
    tree = Tree.from_segments([1], [Segment(0, [2, 3])], {1: 1.0})
    with pytest.raises(ValueError, match="none of the 2 credited tokens has a finite old log-prob"):
        run([tree], [path_rows(tree, [0], [1.0])])


def test_a_non_finite_loss_stops_before_the_step(batch):
    _, credits = batch
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = weights_of(model)
    broken = a_batch(model)[0]
    object.__setattr__(broken[0], "ref_logprobs", np.full(len(broken[0].tokens), np.nan, np.float32))
    with pytest.raises(NonFiniteError, match=r"loss nan .* in mini-batch 1 of 1, epoch 1 of 1"):
        update(model, optimizer, broken, credits, PolicyLoss(kl_coef=0.1), vocab_size=VOCAB)
    assert torch.equal(weights_of(model), before)
    assert all(p.grad is None for p in model.parameters())


def test_broken_weights_are_named_and_not_trained_on(batch):
    model = tiny_model()
    with torch.no_grad():
        next(model.parameters())[0, 0] = torch.nan
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for correction in (CorrectionOptions(), RECOMPUTED):
        with pytest.raises(NonFiniteError):
            update(model, optimizer, *batch, PolicyLoss(), vocab_size=VOCAB, correction=correction, max_mismatch_kl=1e-3)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough memory")])
def test_out_of_memory_halves_the_budget_and_changes_nothing_else(error, monkeypatch):
    trees, credits = a_batch(tiny_model(), trees=48)
    expected, _ = run(trees, credits)
    original, said = update_module.pack_logprobs, []

    def limited(model, p, *args, **kwargs):
        if p.ids.size > 600:
            raise error
        return original(model, p, *args, **kwargs)

    monkeypatch.setattr(update_module, "pack_logprobs", limited)
    found, metrics = run(trees, credits, token_budget=2048, message=said.append)
    assert said == [f"out of memory at a token budget of {n}; continuing with {n // 2}" for n in (2048, 1024)]
    assert metrics["token_budget"] == 512 and metrics["packs"] > 1
    assert torch.allclose(found, expected, rtol=0, atol=1e-9)
    said.clear()
    assert len(score(tiny_model(), trees, token_budget=2048, message=said.append)) == 48 and len(said) == 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("shapes cannot be multiplied")])
def test_errors_that_a_smaller_budget_cannot_cure_go_up(batch, error, monkeypatch):
    def failing(*args, **kwargs):
        raise error

    monkeypatch.setattr(update_module, "pack_logprobs", failing)
    with pytest.raises(type(error), match=str(error)):
        run(*batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mini_batches": 0}, "mini_batches is 0"),
        ({"temperature": 0.0}, "temperature is 0"),
    ],
)
def test_bad_options(batch, options, message):
    with pytest.raises(ValueError, match=message):
        run(*batch, **options)


def test_missing_reference_logprobs_are_counted(batch):
    trees, credits = a_batch(tiny_model())
    object.__setattr__(trees[1], "ref_logprobs", None)
    with pytest.raises(ValueError, match="1 of 4 trees carry no reference log-probs"):
        run(trees, credits, loss=PolicyLoss(kl_coef=0.1))


@pytest.mark.parametrize("layout", ["packed", "unrolled"])
def test_scores_are_teacher_forced_logprobs(layout):
    model = tiny_model().train()
    trees, _ = a_batch(model, seed=4)
    scores = score(model, trees, temperature=0.8, vocab_size=VOCAB, layout=layout, token_budget=64)
    assert model.training
    for tree, found in zip(trees, scores, strict=True):
        assert found.dtype == np.float32 and np.isnan(found[: len(tree.prompt)]).all()
        for leaf in tree.leaves:
            for token, value in path_logprobs(model, tree, int(leaf), 0.8).items():
                assert found[token] == pytest.approx(value.item(), abs=1e-6)


def gemma(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "initializer_range": 0.2, "attn_implementation": "eager"}
    return Gemma2ForCausalLM(Gemma2Config(**{**sizes, **changes})).double()


@pytest.mark.parametrize("make", [tiny_model, lambda: tiny_model(family="llama", tied=False), lambda: tiny_model(dtype=torch.float32)])
def test_packing_is_exact_for(make):
    assert exactness(make()) is None


def test_packing_is_refused_with_a_reason():
    assert "dropout is 0.1" in exactness(tiny_model(attention_dropout=0.1))
    gpt2 = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    assert "dropout is 0.1" in exactness(GPT2LMHeadModel(gpt2))
    mamba = MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, state_size=4)
    assert exactness(MambaForCausalLM(mamba)) is not None
    windowed = {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}
    assert "sliding attention window of 16 tokens" in exactness(tiny_model(**windowed))
    assert "16 tokens is shorter than the longest path (17)" in exactness(tiny_model(**windowed), longest_path=17)
    assert exactness(tiny_model(**windowed), longest_path=16) is None
    assert "cannot be replaced" in exactness(gemma(), longest_path=64)  # soft-capped attention scores


def test_a_head_that_is_more_than_one_matrix_is_not_chunked():
    assert Head.of(tiny_model()).plain and Head.of(tiny_model(tied=False)).plain
    assert Head.of(gemma(final_logit_softcapping=1.0)).reason == "it changes its logits after the head"


def test_soft_capped_logits_are_trained_on_as_they_are():
    model = gemma(final_logit_softcapping=1.0)
    trees, credits = a_batch(model)
    weights, _ = aggregate(trees, credits, "token_mean")
    value, expected = reference_gradients(model, trees, credits, Options())
    options = ForwardOptions(vocab_size=VOCAB, layout="unrolled")
    result = gradients(model, trees, weights, [t.logprobs for t in trees], PolicyLoss(), options)
    assert result.loss == pytest.approx(value, abs=1e-5)
    for name, p in model.named_parameters():
        if name in expected:
            assert float((p.grad - expected[name]).abs().max()) <= 1e-4 * float(expected[name].abs().max())


def test_warm_up_and_schedules():
    warm = Optim(warmup_steps=4)
    assert [warm.factor(s, 10) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    linear = Optim(warmup_steps=2, schedule="linear")
    assert [linear.factor(s, 6) for s in range(2, 7)] == [1, 0.75, 0.5, 0.25, 0]
    cosine = Optim(schedule="cosine")
    assert [round(cosine.factor(s, 4), 6) for s in (0, 2, 4)] == [1, 0.5, 0]
    assert [Optim(lr=0.4, warmup_steps=4).rate(s, 10) for s in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])


def test_the_rate_goes_by_place_and_a_skipped_update_keeps_its_place(batch):
    trees, credits = batch
    model = tiny_model()
    optimizer, used, asked = torch.optim.SGD(model.parameters(), lr=9.0), [], []
    optimizer.register_step_pre_hook(lambda *_: used.append(optimizer.param_groups[0]["lr"]))

    def rate(number):
        asked.append(number)
        return 0.1 * (number + 1)

    options = {"vocab_size": VOCAB, "mini_batches": 3, "epochs": 2, "rate": rate}
    metrics = update(model, optimizer, trees[:2], credits[:2], PolicyLoss(), **options)  # two trees, so the third mini-batch is empty
    assert metrics["updates"] == 4 and sorted(set(asked)) == [0, 1, 3, 4]
    assert used == pytest.approx([0.1, 0.2, 0.4, 0.5])


def test_norms_and_biases_are_not_decayed():
    model = tiny_model()
    groups = make_optimizer(model, Optim(weight_decay=0.1)).param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    assert all(p.ndim == 1 for p in groups[1]["params"]) and all(p.ndim > 1 for p in groups[0]["params"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr is 0.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"beta2": 1.0}, "optim.beta2 is 1.0; allowed: a number from 0 to below 1"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0"),
        ({"schedule": "step"}, "optim.schedule is 'step'; allowed: constant, linear, cosine"),
    ],
)
def test_bad_optimiser_options(options, message):
    with pytest.raises(ValueError, match=message):
        Optim(**options)

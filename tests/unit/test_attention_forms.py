"""Every form of packed attention gives what the plain mask gives, forward and backward; which one runs is the device's choice."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rlzoo.benchmarks.perf import attention as script

from rlzoo.losses.aggregate import aggregate
from rlzoo.losses.policy import PolicyLoss
from rlzoo.training import attention_forms, packing, tree_attention
from rlzoo.training.attention_forms import FORMS, Form, aligned, form_on
from rlzoo.training.forward import recompute_layers
from rlzoo.training.packing import Attention, pack
from rlzoo.training.tree_attention import AttentionTensors
from rlzoo.training.update import ForwardOptions, Head, gradients
from tests.reference import VOCAB, random_credit, random_tree, tiny_model

CPU = torch.device("cpu")


def a_plan(seed: int, trees: int, nodes: int, longest: int, block: int) -> Attention:
    """The attention of a pack of random trees, with blocks of at most `block` queries."""
    rng = np.random.default_rng(seed)
    grown = [random_tree(rng, nodes=nodes, longest=longest) for _ in range(trees)]
    masks = [np.arange(len(t.tokens)) >= t.lengths[0] for t in grown]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "QUERY_BLOCK", block)
        patch.setattr(packing, "PAIR_COST", 1e-6 if seed % 2 else packing.PAIR_COST)  # or groups of very different rows
        packs, _ = pack(grown, masks, 1 << 20)
    assert packs[0].attention is not None
    return packs[0].attention


def attended(form: Form, plan: Attention, heads: int, key_heads: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Output and the gradients of queries, keys and values."""
    generator = torch.Generator().manual_seed(1)
    slots = len(plan.place)
    q, k, v = (torch.randn(1, n, slots, 8, generator=generator).to(dtype).requires_grad_() for n in (heads, key_heads, key_heads))
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why no kernel of a GPU serves a CPU
        patch.setattr(tree_attention, "form_on", lambda *_: form)
        out, _ = tree_attention.tree_attention(torch.nn.Identity(), q, k, v, None, rlzoo_tree=AttentionTensors(plan, CPU))
        pull = torch.randn(out.shape, generator=generator).to(dtype)
        return [out, *torch.autograd.grad((out * pull).sum(), (q, k, v))]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(1, 14),
    st.integers(1, 9),
    st.sampled_from([(4, 1), (4, 2), (2, 2)]),
)
def test_every_form_equals_the_mask(seed: int, trees: int, nodes: int, longest: int, block: int, heads: tuple[int, int]) -> None:
    try:
        plan = a_plan(seed, trees, nodes, longest, block)
    except IndexError:  # trees of empty segments only: nothing to pack
        return
    expected = attended("masked", plan, *heads)
    for form in FORMS[1:]:
        for ours, theirs in zip(attended(form, plan, *heads), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_aligned_groups_have_one_offset_and_lose_no_query() -> None:
    shifted = split = 0
    for seed in range(30):
        plan = a_plan(seed, 4, 1 + seed % 10, 14, 20)
        even = aligned(plan)
        assert sorted(even.place) == sorted(set(even.place)) and (even.place >= 0).all() and len(even.place) == len(plan.place)
        for group in even.groups:
            assert (group.offset == group.keys.shape[1] - group.queries.shape[1]).all()
        before, after = (sum(g.queries.size for g in p.groups) for p in (plan, even))
        shifted += after > before  # queries that stand for nothing
        split += len(even.groups) > len(plan.groups)
    assert shifted > 0 and split > 0  # both happened


@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_gradients_of_a_model_are_the_same_in_every_form(monkeypatch: pytest.MonkeyPatch, form: Form, family: str) -> None:
    rng, model = np.random.default_rng(3), tiny_model(family=family)
    trees = [random_tree(rng, model, nodes=9) for _ in range(5)]
    weights, _ = aggregate(trees, [random_credit(rng, t) for t in trees], "token_mean")
    found = []
    for each in ("masked", form):
        monkeypatch.setattr(tree_attention, "form_on", lambda *_, each=each: each)
        model.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gradients(
                model, trees, weights, [t.logprobs for t in trees], PolicyLoss(), ForwardOptions(vocab_size=VOCAB), head=Head.of(model)
            )
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-9)


def test_a_cpu_takes_the_mask() -> None:
    assert form_on(CPU, torch.float32, 12, 2, 128) == "masked"


@pytest.mark.parametrize(
    ("served", "agreeing", "chosen"),
    [
        ({"grouped", "expanded"}, {"grouped", "expanded"}, "grouped"),
        ({"expanded"}, {"grouped", "expanded"}, "expanded"),
        ({"grouped", "expanded"}, {"expanded"}, "expanded"),
        (set(), {"grouped", "expanded"}, "masked"),
        ({"grouped", "expanded"}, set(), "masked"),
    ],
)
def test_a_gpu_takes_what_its_kernels_serve_and_compute_rightly(
    monkeypatch: pytest.MonkeyPatch, served: set[str], agreeing: set[str], chosen: str
) -> None:
    monkeypatch.setattr(attention_forms, "_served", lambda form, *_: form in served)
    monkeypatch.setattr(attention_forms, "_agrees", lambda form, *_: form in agreeing)
    form_on.cache_clear()
    assert form_on(torch.device("cuda"), torch.bfloat16, 12, 2, 128) == chosen
    form_on.cache_clear()


@pytest.mark.parametrize("form", FORMS[1:])
def test_the_check_that_runs_on_the_device_tells_right_from_wrong(monkeypatch: pytest.MonkeyPatch, form: Form) -> None:
    arguments = (form, CPU, torch.float32, 4, 2, 16)
    assert attention_forms._agrees(*arguments)
    original = attention_forms.causal_lower_right
    monkeypatch.setattr(attention_forms, "causal_lower_right", lambda q, k: torch.nn.attention.bias.causal_upper_left(q, k))
    assert not attention_forms._agrees(*arguments)
    monkeypatch.setattr(attention_forms, "causal_lower_right", original)


def test_autocast_gathers_in_its_own_precision() -> None:
    plan = a_plan(1, 3, 8, 9, 4)
    seen: list[torch.dtype] = []

    def watching(form: Form, q: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(q.dtype)
        return attention_forms.attend(form, q, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
        patch.setattr(tree_attention, "attend", watching)
        attended("masked", plan, 4, 2, torch.float32)
    assert set(seen) == {torch.bfloat16}


def test_the_script_names_the_kernel_that_each_form_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script.main(["--device", "cpu", "--repeats", "1", "--heads", "4", "--key-heads", "2", "--size", "16", "--path", "64", "--rows", "2"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(r["what"], r["form"]) for r in rows} >= {("update", form) for form in FORMS} | {("decoding", "grouped rows")}
    assert all(r["kernel"] and r["ms"] > 0 for r in rows)


def test_the_check_leaves_no_trace_in_a_layer_that_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in the first forward pass, inside a checkpointed layer, and not again when that layer is recomputed."""
    checked: list[bool] = []

    def first_time(device: torch.device, *_: Any) -> Form:
        if not checked:
            checked.append(attention_forms._agrees("expanded", device, torch.float32, 4, 2, 16))
        return "expanded"

    monkeypatch.setattr(tree_attention, "form_on", first_time)
    rng, model = np.random.default_rng(3), tiny_model().train()
    trees = [random_tree(rng, model, nodes=9) for _ in range(3)]
    weights, _ = aggregate(trees, [random_credit(rng, t) for t in trees], "token_mean")
    recompute_layers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gradients(model, trees, weights, [t.logprobs for t in trees], PolicyLoss(), ForwardOptions(vocab_size=VOCAB), head=Head(True))
    assert checked == [True]

"""The torch engine's own promises: how much work it does, in what order, and for which models."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from rlzoo.backends.protocol import SamplingParams, SegmentRequest
from rlzoo.backends.torch import TorchBackend
from rlzoo.sampling.chains import Chains
from rlzoo.sampling.grow import grow
from rlzoo.sampling.nary import Nary
from rlzoo.training.sync import prove, sync
from tests.engines import (
    SAMPLER_IDS,
    SAMPLERS,
    Counter,
    Engine,
    drain,
    expected_forwards,
    holds_anything,
    ids,
    perturbed,
    probes,
    prompts_of,
    shape_of,
    teacher,
)

# -- work -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [3, 64])
@pytest.mark.parametrize("sampler", SAMPLERS, ids=SAMPLER_IDS)
def test_a_token_is_forwarded_once(torch64: Engine, tiny_tokenizer: Any, sampler: Any, capacity: int) -> None:
    backend = torch64.make(capacity)
    counter = Counter(backend.model, 0)
    trees = grow(sampler, backend, prompts_of(tiny_tokenizer), seed=4)
    stats = backend.stats()
    cuts = sum(t.nodes - 1 - len(t.leaves) for t in trees) if getattr(sampler, "continuation", False) else 0
    assert counter.tokens == expected_forwards(trees) + cuts == stats.forwarded_tokens
    assert stats.recomputed_tokens == cuts  # a fork inside an answer needs the logits of the token before it once more
    assert stats.sampled_tokens == sum(t.sampled_tokens for t in trees)


def test_children_that_come_at_once_continue_in_their_parents_row(torch64: Engine, tiny_tokenizer: Any) -> None:
    """With room for all, nothing passes through the store: without any memory for it nothing is computed twice."""
    backend = torch64.make(64, cache_bytes=0)
    trees = grow(Nary(branching=2, segment_tokens=(4, 5, 7)), backend, prompts_of(tiny_tokenizer, 3), seed=4)
    assert backend.stats().recomputed_tokens == 0
    assert backend.stats().forwarded_tokens == expected_forwards(trees)


def test_evicted_prefixes_are_computed_again(torch64: Engine, tiny_tokenizer: Any) -> None:
    prompts, sampler = prompts_of(tiny_tokenizer), Nary(branching=4, segment_tokens=(4, 5, 7))
    reference = grow(sampler, torch64.make(3), prompts, seed=4)
    for budget in (0, 20_000):
        backend = torch64.make(3, cache_bytes=budget)
        counter = Counter(backend.model, 0)
        trees = grow(sampler, backend, prompts, seed=4)
        stats = backend.stats()
        assert [shape_of(t) for t in trees] == [shape_of(t) for t in reference]
        assert stats.recomputed_tokens > 0
        assert counter.tokens == stats.forwarded_tokens == expected_forwards(trees) + stats.recomputed_tokens


def test_a_cut_path_is_continued_from_its_cache(torch64: Engine, tiny_tokenizer: Any) -> None:
    """A parent whose path is longer than the context: only the context's last token is forwarded again."""
    backend, prompt = torch64.make(8), prompts_of(tiny_tokenizer, 1)[0]
    first = SegmentRequest(next(ids), next(ids), prompt.ids, 12, 8)
    tokens = drain(backend, [first])[first.id].tokens.tolist()
    assert len(tokens) == 12
    context = [*prompt.ids, *tokens[:5]]
    before = backend.stats()
    cut = [SegmentRequest(next(ids), first.id, context, 4, seed) for seed in range(3)]
    results = drain(backend, cut)
    after = backend.stats()
    sampled = after.sampled_tokens - before.sampled_tokens
    assert after.forwarded_tokens - before.forwarded_tokens == 1 + sampled - len(cut)
    assert after.recomputed_tokens - before.recomputed_tokens == 1
    fresh = [SegmentRequest(next(ids), 77, context, 4, seed) for seed in range(3)]
    again = drain(torch64.make(8), fresh)
    for a, b in zip(cut, fresh, strict=True):
        assert results[a.id].tokens.tolist() == again[b.id].tokens.tolist()


def test_refill_is_continuous(torch64: Engine, tiny_tokenizer: Any) -> None:
    """The batch is full as long as anything waits, and deeper segments start while others of their parent's level still run."""
    backend = torch64.make(8, trace=True)
    level: dict[int, int] = {}
    submit = backend.submit
    starts = {tuple(p.ids): p for p in prompts_of(tiny_tokenizer)}

    def spy(requests: Any) -> None:
        requests = list(requests)
        level.update((r.id, level.get(r.parent, 0) + 1) for r in requests)
        submit(requests)

    backend.submit = spy
    grow(Nary(branching=3, segment_tokens=(4, 9, 5)), backend, list(starts.values()), seed=4)
    waiting, running, overlaps = set(level), set(), 0
    ends_left = {i for row in backend.trace for i in row.finished}
    assert ends_left == set(level)
    for row in backend.trace:
        running |= set(row.admitted)
        waiting -= set(row.admitted)
        assert row.active == len(running) <= 8
        overlaps += any(level[a] > level[b] for a in row.admitted for b in running)
        running -= set(row.finished)
    assert overlaps >= 10
    full = [row for row in backend.trace[2:] if row.step <= 0.8 * len(backend.trace)]
    assert sum(row.active for row in full) >= 0.9 * 8 * len(full)


# -- the torch engine's own -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_other_architectures(tiny_model: Any, tiny_tokenizer: Any, kind: str) -> None:
    model = tiny_model(torch.float64, kind)
    backend = TorchBackend(model, tiny_tokenizer, capacity=5)
    trees = grow(Nary(branching=3, segment_tokens=(3, 4, 5)), backend, prompts_of(tiny_tokenizer, 3), seed=0)
    for tree in trees:
        for leaf in tree.leaves:
            got = np.concatenate([tree.node_logprobs(n) for n in tree.path(leaf)])
            expected = teacher(model, tree.prompt.tolist(), tree.path_tokens(leaf).tolist(), SamplingParams())
            np.testing.assert_allclose(got, expected, atol=1e-6, rtol=0)  # trees hold float32


def test_the_trainers_module_is_left_alone(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model().train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    attention = model.config._attn_implementation
    backend = TorchBackend(model, tiny_tokenizer)
    grow(Chains(group_size=2, max_response_tokens=5), backend, prompts_of(tiny_tokenizer, 2), seed=0)
    prove(backend, model, probes(tiny_tokenizer), tolerance=1e-4, seed=0)
    assert model.training and model.config._attn_implementation == attention
    assert all(p.requires_grad and torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_shared_module_is_used_as_it_is(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model()
    backend = TorchBackend(model, tiny_tokenizer, share=True)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.2)
    assert sync(backend, model, 1).tensors == 0
    prove(backend, model, probes(tiny_tokenizer), tolerance=1e-4, seed=0)


def test_tied_weights_may_come_under_both_names(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model()
    backend, later = TorchBackend(model, tiny_tokenizer), perturbed(model)
    backend.load_weights(later.named_parameters(remove_duplicate=False), 1)
    prove(backend, later, probes(tiny_tokenizer), tolerance=1e-4, seed=0)
    untied = [(n, p.clone() + (n == "lm_head.weight")) for n, p in later.named_parameters(remove_duplicate=False)]
    with pytest.raises(ValueError, match="ties them"):
        backend.load_weights(untied, 2)


def test_broken_weights_stop_with_one_sentence_and_good_ones_heal(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model()
    backend, broken = TorchBackend(model, tiny_tokenizer, capacity=4), copy.deepcopy(model)
    sampler, prompts = Chains(group_size=3, max_response_tokens=6), prompts_of(tiny_tokenizer, 3)
    reference = grow(sampler, backend, prompts, seed=0)
    with torch.no_grad():
        broken.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    sync(backend, broken, 1)
    with pytest.raises(RuntimeError, match="not finite"):
        grow(sampler, backend, prompts, seed=0)
    sync(backend, model, 2)
    assert [shape_of(t) for t in grow(sampler, backend, prompts, seed=0)] == [shape_of(t) for t in reference]


def test_models_it_cannot_serve_are_refused(tiny_model: Any, tiny_tokenizer: Any) -> None:
    sliding = tiny_model(use_sliding_window=True, sliding_window=64, max_window_layers=1)
    with pytest.raises(ValueError, match="64"):
        TorchBackend(sliding, tiny_tokenizer)
    TorchBackend(sliding, tiny_tokenizer, max_context=64)
    with pytest.raises(ValueError, match="257"):
        TorchBackend(tiny_model(vocab_size=200), tiny_tokenizer)
    with pytest.raises(ValueError, match="max_context"):
        TorchBackend(tiny_model(), tiny_tokenizer, max_context=513)
    with pytest.raises(ValueError, match="capacity"):
        TorchBackend(tiny_model(), tiny_tokenizer, capacity=0)


def test_a_prompt_of_one_token_and_a_full_context(torch64: Engine) -> None:
    backend = torch64.make(3, max_context=9)
    requests = [SegmentRequest(next(ids), 5, [33], 8, seed) for seed in range(4)]
    for r, result in drain(backend, requests).items():
        expected = teacher(torch64.model, [33], result.tokens.tolist(), SamplingParams())
        np.testing.assert_allclose(result.logprobs, expected, atol=1e-9, rtol=0)
        assert r


def test_nothing_is_held_after_growing(torch64: Engine, tiny_tokenizer: Any) -> None:
    backend = torch64.make(5)
    grow(Nary(branching=3, segment_tokens=(4, 5, 7)), backend, prompts_of(tiny_tokenizer), seed=4)
    assert not holds_anything(backend)

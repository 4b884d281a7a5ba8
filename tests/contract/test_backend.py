"""One contract, every backend: what a request gives back, whatever the engine."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch

from rlzoo.backends.protocol import SamplingParams, SegmentRequest, SegmentResult
from rlzoo.backends.torch import TorchBackend
from rlzoo.sampling.chains import Chains
from rlzoo.sampling.grow import grow
from rlzoo.sampling.nary import Nary
from rlzoo.training.sync import prove, sync
from rlzoo.tree import ROOT, Stop
from tests.engines import (
    EOS,
    KNOWN_IDS,
    PARAMS,
    SAMPLER_IDS,
    SAMPLERS,
    Engine,
    drain,
    holds_anything,
    ids,
    perturbed,
    probes,
    prompts_of,
    requests_of,
    shape_of,
    teacher,
)

# -- what is sampled ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_logprobs_are_those_of_the_distribution_sampled(engine: Engine, tiny_tokenizer: Any, params: SamplingParams) -> None:
    requests = requests_of(prompts_of(tiny_tokenizer), 3, 12, params)
    for request in requests:
        assert set(request.context) <= set(range(KNOWN_IDS))
    results = drain(engine.make(), requests)
    for request in requests:
        result = results[request.id]
        assert np.isfinite(result.logprobs).all()
        expected = teacher(engine.model, request.context, result.tokens.tolist(), params)
        np.testing.assert_allclose(result.logprobs, expected, atol=engine.tolerance, rtol=0)


@pytest.mark.parametrize("params", [PARAMS[0], PARAMS[4]], ids=str)
def test_score_is_the_teacher_forced_pass(engine: Engine, tiny_tokenizer: Any, params: SamplingParams) -> None:
    backend = engine.make()
    sampler = Nary(branching=2, segment_tokens=(4, 5, 6), temperature=params.temperature, top_p=params.top_p, top_k=params.top_k)
    for tree, scores in zip(
        trees := grow(sampler, backend, prompts_of(tiny_tokenizer, 3), seed=1), backend.score(trees, params), strict=True
    ):
        assert np.isnan(scores[: len(tree.prompt)]).all()
        np.testing.assert_allclose(scores[len(tree.prompt) :], tree.logprobs[len(tree.prompt) :], atol=max(engine.tolerance, 1e-6), rtol=0)
        for leaf in tree.leaves:
            whole = np.concatenate([scores[tree.offsets[n] : tree.offsets[n + 1]] for n in tree.path(leaf)])
            expected = teacher(engine.model, tree.prompt.tolist(), tree.path_tokens(leaf).tolist(), params)
            np.testing.assert_allclose(whole, expected, atol=engine.tolerance, rtol=0)


def test_a_segment_continues_the_ids_of_its_parent(engine: Engine, tiny_tokenizer: Any) -> None:
    backend = engine.make()
    submitted: dict[int, SegmentRequest] = {}
    finished: dict[int, SegmentResult] = {}
    submit, step = backend.submit, backend.step

    def spy_submit(requests: Any) -> None:
        requests = list(requests)
        submitted.update((r.id, r) for r in requests)
        submit(requests)

    def spy_step() -> list[SegmentResult]:
        results = step()
        finished.update((r.id, r) for r in results)
        return results

    backend.submit, backend.step = spy_submit, spy_step
    grow(Nary(branching=3, segment_tokens=(3, 4, 5)), backend, prompts_of(tiny_tokenizer), seed=0)
    children = [r for r in submitted.values() if r.parent in finished]
    assert children
    for r in children:
        above = submitted[r.parent]
        assert list(r.context) == [*above.context, *finished[r.parent].tokens.tolist()]


def test_sampling_follows_the_distribution(torch64: Engine, tiny_tokenizer: Any) -> None:
    """Chi-square-like check of 4,000 first tokens against the teacher's distribution."""
    prompt = prompts_of(tiny_tokenizer, 1)[0]
    params = SamplingParams(temperature=0.7, top_k=6)
    results = drain(torch64.make(256), requests_of([prompt], 4000, 1, params))
    counts = np.bincount([int(r.tokens[0]) for r in results.values()], minlength=KNOWN_IDS)
    tokens = np.flatnonzero(counts)
    assert len(tokens) <= 6
    p = np.array([np.exp(teacher(torch64.model, prompt.ids, [int(t)], params)[0]) for t in tokens])
    assert p.sum() == pytest.approx(1, abs=0.01)
    assert (np.abs(counts[tokens] - 4000 * p) < 5 * np.sqrt(4000 * p * (1 - p)) + 1).all()


def test_stop_reasons_and_ends(engine: Engine, tiny_tokenizer: Any) -> None:
    """EOS wherever it falls, position 0 included, under any id of the list; otherwise the segment is full."""
    backend = engine.make()
    assert backend.eos_ids == frozenset(EOS)
    results = drain(backend, requests_of(prompts_of(tiny_tokenizer), 20, 7, SamplingParams(temperature=1.5)))
    at_once, which = 0, set()
    for r in results.values():
        ends = [int(t) in EOS for t in r.tokens]
        assert not any(ends[:-1])
        assert r.stop == (Stop.EOS if ends[-1] else Stop.OPEN)
        assert r.stop == Stop.EOS or len(r.tokens) == 7
        assert 1 <= len(r.tokens) <= 7 and r.tokens.dtype == np.int32
        at_once += r.stop == Stop.EOS and len(r.tokens) == 1
        which |= {int(t) for t in r.tokens} & set(EOS)
    assert at_once >= 5
    assert len(which) >= 3


def test_ids_outside_the_tokenizer_are_never_sampled(engine: Engine, tiny_tokenizer: Any) -> None:
    results = drain(engine.make(16), requests_of(prompts_of(tiny_tokenizer), 40, 8, SamplingParams(temperature=engine.hottest)))
    tokens = np.concatenate([r.tokens for r in results.values()])
    assert len(tokens) > 700  # 5 % of the rows are forbidden: luck has a chance of 1e-15
    assert tokens.max() < KNOWN_IDS


# -- seeds and order ----------------------------------------------------------------------------------------------------


def test_seeds_decide(engine: Engine, tiny_tokenizer: Any) -> None:
    """Same seeds: the same, bit for bit, at equal capacity. Siblings differ. Another run seed or step: other trees."""
    prompts, sampler = prompts_of(tiny_tokenizer), Nary(branching=3, segment_tokens=(4, 4, 6))
    first, again = (grow(sampler, engine.make(), prompts, seed=5) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert shape_of(a) == shape_of(b)
        assert a.logprobs.tobytes() == b.logprobs.tobytes()
    for tree in first:
        siblings = [tree.node_tokens(c).tolist() for c in tree.children(ROOT)]
        assert len({tuple(s) for s in siblings}) > 1
    for other in (grow(sampler, engine.make(), prompts, seed=6), grow(sampler, engine.make(), prompts, seed=5, step=1)):
        assert all(shape_of(a) != shape_of(b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("sampler", SAMPLERS, ids=SAMPLER_IDS)
def test_trees_do_not_depend_on_capacity_or_order(engine: Engine, tiny_tokenizer: Any, sampler: Any) -> None:
    if not engine.exact:
        pytest.skip("promised for float64 only")
    prompts = prompts_of(tiny_tokenizer, 7)
    reference = {t.meta["problem"]: shape_of(t) for t in grow(sampler, engine.make(64), prompts, seed=2)}
    assert len({len(r[0]) for r in reference.values()}) > 1 or isinstance(sampler, Chains)  # some segments end early
    for capacity, order in itertools.product((3, 8, 64), (1, -1)):
        trees = grow(sampler, engine.make(capacity), prompts[::order], seed=2)
        assert [t.meta["problem"] for t in trees] == [p.id for p in prompts[::order]]
        assert {t.meta["problem"]: shape_of(t) for t in trees} == reference


def test_float32_is_the_same_up_to_rounding(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model(initializer_range=0.1)  # the other tests' weights are larger than life, and so is their rounding
    sampler, prompts = Nary(branching=3, segment_tokens=(4, 5, 7)), prompts_of(tiny_tokenizer)
    one, other = (grow(sampler, TorchBackend(model, tiny_tokenizer, capacity=c), prompts, seed=2) for c in (3, 64))
    same = [(a, b) for a, b in zip(one, other, strict=True) if shape_of(a) == shape_of(b)]
    assert len(same) >= 5
    for a, b in same:
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5, rtol=0)


# -- life cycle -----------------------------------------------------------------------------------------------------------


def test_release_forgets_and_abandons(engine: Engine, tiny_tokenizer: Any) -> None:
    backend = engine.make(4)
    requests = requests_of(prompts_of(tiny_tokenizer, 3), 3, 50, SamplingParams())
    backend.submit(requests)
    results = [r.id for r in backend.step()]
    runs = next(r.id for r in requests if r.id not in results)
    dropped = {runs, requests[8].id}  # one runs, one waits
    backend.release([*dropped, 31337])
    for _ in range(400):
        results += [r.id for r in backend.step()]
    assert set(results) == {r.id for r in requests} - dropped
    backend.release([r.id for r in requests] + [r.parent for r in requests])
    sync(backend, engine.model, 1)  # nothing is in flight
    if isinstance(backend, TorchBackend):
        assert not holds_anything(backend)


def test_bad_requests_are_refused(engine: Engine, tiny_tokenizer: Any) -> None:
    backend, prompt = engine.make(), prompts_of(tiny_tokenizer, 1)[0]
    good = SegmentRequest(next(ids), next(ids), prompt.ids, 3, 0)
    backend.submit([good])
    for bad, match in (
        (SegmentRequest(next(ids), next(ids), prompt.ids, 0, 0), "max_tokens"),
        (SegmentRequest(next(ids), next(ids), [], 3, 0), "context"),
        (SegmentRequest(next(ids), next(ids), prompt.ids, 512, 0), "exceeds"),
        (SegmentRequest(good.id, good.parent, prompt.ids, 3, 0), "in use"),
    ):
        with pytest.raises(ValueError, match=match):
            backend.submit([bad])
    while not backend.step():
        pass


def test_weights_arrive(engine: Engine, tiny_tokenizer: Any) -> None:
    backend, later = engine.make(), perturbed(engine.model)
    requests = requests_of(prompts_of(tiny_tokenizer), 2, 10, SamplingParams())
    drain(backend, requests)
    receipt = sync(backend, later, 3)
    assert (receipt.version, receipt.tensors) == (3, len(list(later.parameters())))
    assert receipt.bytes == sum(p.nbytes for p in later.parameters())
    requests = requests_of(prompts_of(tiny_tokenizer), 2, 10, SamplingParams())
    results = drain(backend, requests)
    with torch.no_grad():
        for p in later.parameters():  # the engine has its own copy: training on must not leak into it
            p.add_(0)
    for r in requests:
        expected = teacher(later, r.context, results[r.id].tokens.tolist(), SamplingParams())
        np.testing.assert_allclose(results[r.id].logprobs, expected, atol=engine.tolerance, rtol=0)


def test_the_engine_has_its_own_weights(engine: Engine, tiny_tokenizer: Any) -> None:
    backend = engine.make()
    sync(backend, engine.model, 1)
    before = copy.deepcopy(engine.model)
    with torch.no_grad():
        for p in engine.model.parameters():
            p.mul_(1.5)
    requests = requests_of(prompts_of(tiny_tokenizer, 2), 2, 6, SamplingParams())
    for r, result in ((r, drain(backend, [r])[r.id]) for r in requests):
        expected = teacher(before, r.context, result.tokens.tolist(), SamplingParams())
        np.testing.assert_allclose(result.logprobs, expected, atol=engine.tolerance, rtol=0)


def test_weights_are_refused_while_requests_run_or_where_they_do_not_fit(engine: Engine, tiny_tokenizer: Any) -> None:
    backend = engine.make()
    requests = requests_of(prompts_of(tiny_tokenizer, 1), 2, 5, SamplingParams())
    backend.submit(requests)
    with pytest.raises(RuntimeError, match="2 requests are in flight"):
        sync(backend, engine.model, 1)
    backend.release([r.id for r in requests])
    named = list(engine.model.named_parameters())
    for bad in (named[:-1], [*named, ("extra", named[0][1])], [(named[0][0], named[0][1][:1]), *named[1:]]):
        with pytest.raises(ValueError):
            backend.load_weights(bad, 1)
    backend.load_weights(named, 1)


# -- the proof of a sync --------------------------------------------------------------------------------------------------


def test_a_sync_is_proved_again_and_again(engine: Engine, tiny_tokenizer: Any) -> None:
    backend, model = engine.make(), engine.model
    for version in range(3):
        sync(backend, model, version)
        for _ in range(2):
            proof = prove(backend, model, probes(tiny_tokenizer), tolerance=engine.tolerance, seed=version)
            assert proof.tokens >= 6 and proof.largest <= engine.tolerance
        model = perturbed(model)


def test_a_skipped_sync_is_found(engine: Engine, tiny_tokenizer: Any) -> None:
    backend = engine.make()
    with pytest.raises(RuntimeError, match=r"does not sample with the trainer's weights.*up to"):
        prove(backend, perturbed(engine.model), probes(tiny_tokenizer), tolerance=1e-3, seed=0)


@pytest.mark.parametrize("tells", [True, False])
def test_a_stale_head_is_found(tiny_model: Any, tiny_tokenizer: Any, tells: bool) -> None:
    model = tiny_model(kind="llama")
    backend, later = TorchBackend(model, tiny_tokenizer), perturbed(model)
    old_head = ("lm_head.weight", model.lm_head.weight)
    backend.load_weights([old_head if n == old_head[0] else (n, p) for n, p in later.named_parameters()], 1)
    if not tells:
        backend.stale_weights = None
    with pytest.raises(RuntimeError, match="lm_head" if tells else "differ by up to"):
        prove(backend, later, probes(tiny_tokenizer), tolerance=1e-3, seed=0)
    sync(backend, later, 2)
    prove(backend, later, probes(tiny_tokenizer), tolerance=1e-4, seed=0)


def test_a_stale_prefix_cache_is_found(tiny_model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    backend, later = TorchBackend(model, tiny_tokenizer), perturbed(model)
    prove(backend, model, probes(tiny_tokenizer), tolerance=1e-4, seed=0)
    monkeypatch.setattr(backend, "_reset", lambda: None)
    sync(backend, later, 1)
    with pytest.raises(RuntimeError, match="prefix cache"):
        prove(backend, later, probes(tiny_tokenizer), tolerance=1e-3, seed=0)

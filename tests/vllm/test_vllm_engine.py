"""What only the real vLLM can show: the sync's proof against seeded faults, its cache, its ends, and that it never drains."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from rlzoo.backends.calls import EngineError
from rlzoo.backends.protocol import SamplingParams, SegmentRequest
from rlzoo.sampling.grow import grow
from rlzoo.sampling.nary import Nary
from rlzoo.training.sync import Sync, prove, sync
from tests.engines import KNOWN_IDS, VLLM_SHAPE, drain, ids, nudged, perturbed, probes, prompts_of, requests_of, teacher, with_ends

pytestmark = pytest.mark.vllm

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def model(tiny_model: Any) -> Any:
    return with_ends(tiny_model(**VLLM_SHAPE))


@pytest.fixture(scope="module")
def made(model: Any, tiny_tokenizer: Any) -> Iterator[Any]:
    from rlzoo.backends.vllm import VllmBackend

    backend = VllmBackend(model, tiny_tokenizer, capacity=32, trace=True)
    yield backend
    backend.close()


@pytest.fixture
def backend(made: Any, model: Any) -> Iterator[Any]:
    """The module's engine, idle and with the model's weights."""
    sync(made, model, 0)
    yield made


# -- the proof of a sync ------------------------------------------------------------------------------------------------


def test_a_skipped_sync_names_what_is_stale(backend: Any, model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    later = perturbed(model)
    monkeypatch.setattr(backend._engine, "load", lambda named, asleep: None)
    sync(backend, later, 1)  # the counter goes up, and nothing else
    assert backend.version == 1
    every = len(list(later.parameters())) + 1  # the head is tied: a name of its own
    with pytest.raises(RuntimeError, match=f"stale are {every} weights: model.embed_tokens.weight"):
        prove(backend, later, probes(tiny_tokenizer), tolerance=TOLERANCE, seed=0)


def test_a_kept_prefix_cache_is_found(backend: Any, model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prove(backend, model, probes(tiny_tokenizer), tolerance=TOLERANCE, seed=0)
    monkeypatch.setattr(backend._engine.llm, "reset_prefix_cache", lambda: True)
    later = perturbed(model)
    sync(backend, later, 1)
    with pytest.raises(RuntimeError, match="its weights are the trainer's, so a prefix cache was kept"):
        prove(backend, later, probes(tiny_tokenizer), tolerance=TOLERANCE, seed=0)


def test_a_stale_tied_head_is_found(backend: Any, model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM's own reload leaves on CPU, without the adapter's repair."""
    from rlzoo.backends import vllm_engine

    monkeypatch.setattr(vllm_engine, "_repack_tied_heads", lambda model: None)
    later = perturbed(model)
    sync(backend, later, 1)
    with pytest.raises(RuntimeError, match=r"stale are 1 weights: lm_head\.weight"):
        prove(backend, later, probes(tiny_tokenizer), tolerance=TOLERANCE, seed=0)


@pytest.mark.parametrize(
    "group", ["embed_tokens", "layers.0.self_attn.k_proj", "layers.1.mlp.up_proj", "layers.1.input_layernorm", "model.norm"]
)
def test_the_stale_group_is_named(backend: Any, model: Any, tiny_tokenizer: Any, group: str) -> None:
    """The engine has all weights but those of one layer, which the trainer changed since."""
    later = perturbed(model, only=group)
    names = [name for name, _ in later.named_parameters() if group in name]
    stale = backend.stale_weights(later.named_parameters())
    assert set(names) <= set(stale) <= {*names, "lm_head.weight"}
    with pytest.raises(RuntimeError, match=rf"stale are \d weights: {names[0]}"):
        prove(backend, later, probes(tiny_tokenizer), tolerance=1e9, seed=0)


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_models_and_types_sync_too(tiny_model: Any, tiny_tokenizer: Any, kind: str, dtype: torch.dtype) -> None:
    from rlzoo.backends.vllm import VllmBackend

    model = tiny_model(dtype, kind=kind, **VLLM_SHAPE, initializer_range=0.05)
    engine = VllmBackend(model, tiny_tokenizer, capacity=8)
    for version in range(3):
        model = perturbed(model)
        receipt = sync(engine, model, version)
        assert receipt.tensors == len(list(model.parameters()))
        proof = prove(engine, model, probes(tiny_tokenizer), tolerance=1e-4 if dtype == torch.float32 else 0.1, seed=version)
        assert proof.tokens >= 6
    engine.close()


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_an_engine_in_bfloat16_takes_over_float32_weights(
    tiny_model: Any, tiny_tokenizer: Any, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cast at each sync, proved without false alarms, and a skipped sync and a kept cache are found however small the update."""
    from rlzoo.backends.vllm import VllmBackend

    model = tiny_model(kind=kind, **VLLM_SHAPE, initializer_range=0.05)
    engine = VllmBackend(model, tiny_tokenizer, capacity=8, dtype="bfloat16")
    prove_all = Sync(engine, probes(tiny_tokenizer), "bfloat16", seed=0)
    for version in range(6):
        model = nudged(model)
        assert prove_all(model, version).mean < 0.05
    assert engine.stale_weights(model.named_parameters()) == []
    later = nudged(model)
    with monkeypatch.context() as skipped, pytest.raises(RuntimeError, match=r"stale are \d+ weights"):
        skipped.setattr(engine._engine, "load", lambda named, asleep: None)
        prove_all(later, 7)
    monkeypatch.setattr(engine._engine.llm, "reset_prefix_cache", lambda: True)
    with pytest.raises(RuntimeError, match=r"it computed \d+ tokens where the contexts have \d+, so a prefix cache was kept"):
        prove_all(later, 8)
    engine.close()


def test_training_goes_on_beside_the_engine(backend: Any, model: Any, tiny_tokenizer: Any) -> None:
    """Optimiser steps in the same process, a sync and its proof after each; the number of threads can still be set."""
    import copy

    policy = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    for version in range(3):
        policy(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        sync(backend, policy, version)
        prove(backend, policy, probes(tiny_tokenizer), tolerance=TOLERANCE, seed=version)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    assert torch.get_num_threads() == before + 1
    torch.set_num_threads(before)


# -- sampling -----------------------------------------------------------------------------------------------------------


def test_sampling_follows_the_distribution(backend: Any, model: Any, tiny_tokenizer: Any) -> None:
    """4,000 first tokens, each of its own seed, against the teacher's distribution."""
    prompt = prompts_of(tiny_tokenizer, 1)[0]
    params = SamplingParams(temperature=0.7, top_k=6)
    results = drain(backend, requests_of([prompt], 4000, 1, params))
    counts = np.bincount([int(r.tokens[0]) for r in results.values()], minlength=KNOWN_IDS)
    tokens = np.flatnonzero(counts)
    p = np.array([np.exp(teacher(model, prompt.ids, [int(t)], params)[0]) for t in tokens])
    assert p.sum() == pytest.approx(1, abs=0.01)
    assert (np.abs(counts[tokens] - 4000 * p) < 5 * np.sqrt(4000 * p * (1 - p)) + 1).all()


def test_what_vllm_would_change_silently_is_refused(backend: Any, tiny_tokenizer: Any) -> None:
    for heat in (2.01, 3.0):
        with pytest.raises(ValueError, match=r"vLLM allows 0 \(greedy\) and 0.01 to 2"):
            backend.submit(requests_of(prompts_of(tiny_tokenizer, 1), 1, 3, SamplingParams(temperature=heat)))
    assert backend.in_flight == 0


def test_children_hit_the_prefix_cache(backend: Any, model: Any, tiny_tokenizer: Any) -> None:
    """Whole blocks of what came before are found: the prompt's among siblings, the path's among children."""
    prompt = (prompts_of(tiny_tokenizer, 1)[0].ids * 20)[:70]
    first = SegmentRequest(next(ids), next(ids), prompt, 40, 1, SamplingParams(temperature=0.01))
    before = backend.stats()
    result = drain(backend, [first])[first.id]
    between = backend.stats()
    assert between.cached_tokens == before.cached_tokens
    assert between.forwarded_tokens - before.forwarded_tokens == 70 + len(result.tokens) - 1
    path = [*prompt, *result.tokens.tolist()]
    children = [SegmentRequest(next(ids), first.id, path, 5, 10 + k) for k in range(4)]
    results = drain(backend, children)
    after = backend.stats()
    whole = (len(path) - 1) // backend.block * backend.block
    assert after.cached_tokens - between.cached_tokens == 4 * whole
    tails = sum(len(path) - whole + len(r.tokens) - 1 for r in results.values())
    assert after.forwarded_tokens - between.forwarded_tokens == tails
    for child in children:
        expected = teacher(model, path, results[child.id].tokens.tolist(), SamplingParams())
        np.testing.assert_allclose(results[child.id].logprobs, expected, atol=TOLERANCE, rtol=0)


def test_it_never_drains_between_levels(backend: Any, tiny_tokenizer: Any) -> None:
    """All rows are busy at every step as long as any prompt waits, and several levels of trees run in one batch."""
    prompts = prompts_of(tiny_tokenizer, 24)
    depth: dict[int, int] = {}
    submit = backend.submit

    def spy(requests: Any) -> None:
        requests = list(requests)
        depth.update((r.id, 1 + depth.get(r.parent, 0)) for r in requests)
        submit(requests)

    backend.trace.clear()
    backend.submit = spy
    try:
        trees = grow(Nary(branching=3, segment_tokens=(5, 6, 7)), backend, prompts, seed=3)
    finally:
        del backend.submit
    running: set[int] = set()
    levels, left = [], set(depth)
    for row in backend.trace:
        running |= set(row.admitted)
        left -= set(row.admitted)
        levels.append({depth[r] for r in running})
        assert row.active == min(backend.capacity, len(running))
        if left & {r for r, level in depth.items() if level == 1}:  # prompts wait to be begun
            assert row.active == backend.capacity
        running -= set(row.finished)
    assert not running and not left
    assert sum(len(level) > 1 for level in levels) > len(levels) / 4  # the first step and the last ones have one level only
    assert sum(t.sampled_tokens for t in trees) > backend.capacity * 7 * 3  # enough for rows to have been refilled


# -- ends ---------------------------------------------------------------------------------------------------------------


def one(tokenizer: Any) -> list[SegmentRequest]:
    return requests_of(prompts_of(tokenizer, 1), 2, 4, SamplingParams())


def fresh(model: Any, tokenizer: Any, timeout_s: float = 45.0) -> Any:
    from rlzoo.backends.vllm import VllmBackend

    return VllmBackend(model, tokenizer, capacity=4, timeout_s=timeout_s)


def test_an_engine_that_dies_hangs_or_speaks_nonsense_ends_clearly(
    model: Any, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside vLLM: its model's forward raises, or never returns; its sampler returns an id that no tokenizer knows."""

    def fault_in_forward(engine: Any, fault: Any) -> None:
        engine._engine.llm.apply_model(lambda m: m.register_forward_pre_hook(fault))

    def dies(*_: Any) -> None:
        raise MemoryError("no room for the keys")

    engine = fresh(model, tiny_tokenizer)
    fault_in_forward(engine, dies)
    engine.submit(one(tiny_tokenizer))
    with pytest.raises(EngineError, match="the vLLM engine died while sampling: no room for the keys"):
        engine.step()
    with pytest.raises(EngineError, match="no room"):  # and stays dead
        engine.submit(one(tiny_tokenizer))
    engine.close()

    engine, woken = fresh(model, tiny_tokenizer, timeout_s=3), threading.Event()
    fault_in_forward(engine, lambda *_: woken.wait() and None)
    engine.submit(one(tiny_tokenizer))
    begun = time.monotonic()
    with pytest.raises(EngineError, match="the vLLM engine hangs: no answer within 3 s while sampling"):
        engine.step()
    engine.close()
    assert time.monotonic() - begun < 6
    woken.set()

    engine = fresh(model, tiny_tokenizer)
    real = engine._engine.step

    def nonsense() -> list[Any]:
        outputs = real()
        for output in outputs:
            output.outputs[0].token_ids = [KNOWN_IDS, *list(output.outputs[0].token_ids)[1:]]
        return outputs

    monkeypatch.setattr(engine._engine, "step", nonsense)
    engine.submit(one(tiny_tokenizer))
    with pytest.raises(EngineError, match=f"token id {KNOWN_IDS}, which the tokenizer does not know"):
        while engine.in_flight:
            engine.step()
    engine.close()


def test_broken_weights_are_told_from_the_logprobs(model: Any, tiny_tokenizer: Any) -> None:
    engine, broken = fresh(model, tiny_tokenizer), perturbed(model)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    sync(engine, broken, 1)
    engine.submit(one(tiny_tokenizer))
    with pytest.raises(EngineError):
        while engine.in_flight:
            engine.step()
    engine.close()


def test_closing_leaves_nothing(model: Any, tiny_tokenizer: Any) -> None:
    import os

    engine = fresh(model, tiny_tokenizer)
    drain(engine, one(tiny_tokenizer))
    thread, folder = engine._thread._thread, engine._folder
    assert os.path.isdir(folder)
    engine.close()
    engine.close()
    thread.join(5)
    assert not thread.is_alive() and not os.path.exists(folder)


# -- a run --------------------------------------------------------------------------------------------------------------


def test_a_run_whose_engine_dies_goes_on_where_it_was(tmp_path: Any, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    import json

    from rlzoo.backends.vllm import VllmBackend
    from rlzoo.cli import main

    out = tmp_path / "run"
    command = ["run", "--algo", "treerpo", "--backend", "vllm", "--out", str(out), "--schedule.steps", "2", "--checkpoints.every", "1"]
    command += ["--schedule.problems-per-step", "2", "--evaluation.suite", "none", "--evaluation.every", "0", "--backend.capacity", "32"]
    real, count = VllmBackend.load_weights, [0]

    def load(self: Any, named: Any, version: int) -> Any:
        receipt = real(self, named, version)
        count[0] += 1
        if count[0] == 2:  # the first update's: what is sampled next, dies

            def gone() -> list[Any]:
                raise OSError("device lost")

            self._engine.step = gone if version else self._engine.step
        return receipt

    monkeypatch.setattr(VllmBackend, "load_weights", load)
    assert main(command) == 1
    said = capsys.readouterr().err
    assert "the vLLM engine died while sampling: device lost; once that is mended, go on with rlzoo run --resume" in said
    monkeypatch.undo()
    assert main(["run", "--resume", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["sync/probe_gap"] < 1e-3 for row in rows if row["trained_trees"])

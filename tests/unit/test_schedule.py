"""What a step's place in the run decides, and what is trained of it: learning rate by step, whitening after every mask."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rlzoo.training.loop as loop
from rlzoo.cli import main
from rlzoo.credit.ancestors import Ancestors
from rlzoo.credit.base import path_rows
from rlzoo.credit.group import Group
from rlzoo.credit.whitening import unwhitened, whiten, whiten_trained
from rlzoo.losses.aggregate import write_out
from rlzoo.store.trees import read_trees
from rlzoo.tree import Segment, Stop, Tree

FLAGS = "--schedule.problems-per-step 4 --evaluation.suite none --evaluation.every 0 --trackers none"
FLAGS += " --backend.threads 1 --reward schedule_rewards:mixed --schedule.mini-batches 2"
REWARDS = "def mixed(items):\n    return [len(text) % 2 == 0 for _, text in items]\n"


@pytest.fixture
def rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "schedule_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)


def test_steps_that_train_nothing_stretch_neither_warm_up_nor_decay(rewards: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used, dead = [], {1, 2}
    collect = loop.Collector.collect

    def collected(self: Any, step: int) -> Any:
        batch = collect(self, step)
        if step in dead:
            batch.dropped, batch.kept = [*batch.dropped, *batch.kept], []
        return batch

    count = loop.Trainer._count_update

    def counted(self: Any, optimizer: Any, *rest: Any) -> None:
        used.append((self.step, optimizer.param_groups[0]["lr"]))
        count(self, optimizer, *rest)

    monkeypatch.setattr(loop.Collector, "collect", collected)
    monkeypatch.setattr(loop.Trainer, "_count_update", counted)
    optim = "--sampler.max-response-tokens 24 --sampler.group-size 6 --schedule.steps 6"
    optim += " --optim.lr 0.001 --optim.warmup-steps 3 --optim.schedule linear"
    assert main(["run", "--algo", "grpo", *FLAGS.split(), *optim.split(), "--filter.no-drop-dead", "--out", str(tmp_path / "run")]) == 0
    planned = [0.001 * min((n + 1) / 3, 1 - (n - 3) / 9 if n >= 3 else 1) for n in range(12)]  # 6 steps of two updates
    assert len(used) == 8 and {step for step, _ in used} == {0, 3, 4, 5}
    wanted = [planned[2 * step + k] for step in (0, 3, 4, 5) for k in (0, 1)]
    assert [lr for _, lr in used] == pytest.approx(wanted)


def trained_advantages(trees: Any, credits: Any) -> np.ndarray:
    """Per (row, token) term that is trained; plain."""
    return np.concatenate([terms.advantage for terms in write_out(trees, credits, None)])


def batch_of(seed: int) -> list[Tree]:
    """Random trees with random stops and rewards; now and then a token without a log-prob."""
    rng = np.random.default_rng(seed)
    trees = []
    for _ in range(int(rng.integers(1, 5))):
        segments = []
        for node in range(int(rng.integers(1, 9))):
            length = int(rng.integers(1, 6))
            values = np.where(rng.random(length) < 0.1, np.nan, -rng.random(length))
            stop = Stop.LENGTH if rng.random() < 0.4 else Stop.EOS
            segments.append(Segment(int(rng.integers(0, node + 1)), [3] * length, values.tolist(), stop))
        tree = Tree.from_segments([1, 2], segments)
        trees.append(tree.with_rewards({int(leaf): float(rng.normal()) for leaf in tree.leaves}))
    return trees


@given(st.integers(0, 10_000), st.booleans(), st.booleans())
def test_whitening_is_over_what_is_trained(seed: int, rows: bool, tokens: bool) -> None:
    trees, rng = batch_of(seed), np.random.default_rng(seed)
    left = unwhitened(Ancestors())(trees)
    if rows:
        left = [c.without_rows(rng.random(len(c.row_leaf)) < 0.4) for c in left]
    if tokens:
        left = [replace(c, token_mask=rng.random(len(t.tokens)) < 0.6) for t, c in zip(trees, left, strict=True)]
    found = trained_advantages(trees, whiten_trained(trees, left, [t.logprobs for t in trees]))
    raw = trained_advantages(trees, left)
    if len(raw) > 1 and raw.std() > 1e-3:
        assert found.mean() == pytest.approx(0, abs=1e-9) and found.var(ddof=1) == pytest.approx(1, abs=1e-4)
        np.testing.assert_allclose(found, (raw - raw.mean()) / np.sqrt(raw.var(ddof=1) + 1e-8), atol=1e-9)


@given(st.integers(0, 10_000))
def test_without_masks_it_is_the_credits_own_whitening_to_the_bit(seed: int) -> None:
    trees = [replace(t, logprobs=np.zeros_like(t.logprobs)) for t in batch_of(seed)]
    late = whiten_trained(trees, unwhitened(Ancestors())(trees), [t.logprobs for t in trees])
    for a, b in zip(late, Ancestors()(trees), strict=True):
        assert np.array_equal(a.advantage, b.advantage)


def test_a_credit_without_whitening_is_left_alone() -> None:
    for credit in (Group(), Ancestors(whitening="none")):
        assert unwhitened(credit) is credit
    tree = Tree.from_segments([1], [Segment(0, [2]), Segment(0, [3, 3])])
    one = path_rows(tree, [0, 1], [1.0, -1.0])
    np.testing.assert_array_equal(whiten([one])[0].advantage, whiten_trained([tree], [one], [np.zeros(4)])[0].advantage)


MASKS = [
    ["--filter.mask-truncated"],
    ["--backend.dtype", "bfloat16", "--correction.sequence", "mask", "--correction.low", "0.9995", "--correction.high", "1.0005"],
    ["--filter.mask-truncated", "--backend.dtype", "bfloat16", "--correction.sequence", "mask", "--correction.high", "1.001"],
]


@pytest.mark.parametrize("mask", MASKS, ids=" ".join)
def test_what_a_run_trains_on_and_stores_is_whitened_after_its_masks(mask: list[str], rewards: None, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = "--sampler.max-response-tokens 96 --schedule.steps 1 --credit ancestors --sampler.group-size 8 --shaping.overlong-tokens 8"
    assert main(["run", "--algo", "grpo", *FLAGS.split(), *flags.split(), *mask, "--out", str(out)]) == 0
    (row,) = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    stored = [(s.tree, s.credit) for s in read_trees(out / "trees" / "step-1.parquet") if s.credit is not None]
    trees, credits = [tree for tree, _ in stored], [credit for _, credit in stored]
    found, rows = trained_advantages(trees, credits), sum(len(c.row_leaf) for c in credits)
    assert 1 < rows < sum(len(t.leaves) for t in trees)  # something was masked
    assert row["update/dropped_terms"] == 0
    assert found.mean() == pytest.approx(0, abs=1e-6) and found.var(ddof=1) == pytest.approx(1, abs=1e-3)

"""One step's trees: sampled, graded, shaped, filtered, refilled. Grading runs beside the sampling."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..algorithm import Algorithm
from ..backends.protocol import Backend
from ..data.problems import Problem
from ..data.stream import ProblemStream
from ..data.templates import render
from ..rewards.reward import Grade, Reward
from ..sampling.grow import Prompt, grow_iter
from ..store.cost import Ledger
from ..store.trees import TreeRecord
from ..tree import Stop, Tree

MAX_FAILED = 0.01  # share of leaves whose grading may fail before a run stops


@dataclass(frozen=True, slots=True, eq=False)
class GradedTree:
    """A tree with rewards, its problem, and per leaf (in order of `tree.leaves`) the response text and the kind of verdict."""

    tree: Tree
    problem: Problem
    texts: tuple[str, ...]
    kinds: tuple[str, ...]

    def record(self) -> TreeRecord:
        """What is stored beside the tree."""
        return TreeRecord(self.problem.id, self.problem.problem, self.problem.answer, self.kinds, self.texts)


@dataclass(slots=True)
class Batch:
    """What a step sampled: `kept` goes into training (in problem order), `dropped` was dead or ungraded; `engine`: tokens that the
    engine forwarded for it, and tokens of contexts that it found in its cache instead."""

    kept: list[GradedTree] = field(default_factory=list)
    dropped: list[GradedTree] = field(default_factory=list)
    engine: dict[str, int] = field(default_factory=dict)

    @property
    def all(self) -> list[GradedTree]:
        return [*self.kept, *self.dropped]


class Collector:
    """Fills batches. Everything is a function of (seed, step, cursor): arrival order never decides what is trained on."""

    def __init__(
        self, algorithm: Algorithm, backend: Backend, reward: Reward, stream: ProblemStream, *, template: str, seed: int, ledger: Ledger
    ) -> None:
        self._algorithm, self._backend, self._reward, self._stream = algorithm, backend, reward, stream
        self._template, self._seed, self._ledger = template, seed, ledger

    def collect(self, step: int) -> Batch:
        """Sample, grade and filter until the step's number of trees is there or the refill rounds are used up.

        Raises:
            RuntimeError: grading itself failed for more than 1 % of the leaves.
        """
        batch, before = Batch(), self._backend.stats()
        wanted = self._algorithm.schedule.problems_per_step
        for _ in range(1 + self._algorithm.filter.refill_rounds):
            for graded in self._sample(wanted - len(batch.kept), step):
                (batch.kept if self._algorithm.filter.keeps(graded.tree) else batch.dropped).append(graded)
            if len(batch.kept) == wanted:
                break
        _refuse_failures(batch)
        after = self._backend.stats()
        batch.engine = {name: getattr(after, name) - getattr(before, name) for name in ("forwarded_tokens", "cached_tokens")}
        return batch

    def probes(self) -> list[list[int]]:
        """A few prompts as token ids, the same each time: what a proof of a sync samples from."""
        problems = [problem for _, problem in ProblemStream(self._stream.problems, seed=0).take(4)]
        return [render(self._template, problem, self._backend.tokenizer) for problem in problems]

    def _sample(self, count: int, step: int) -> list[GradedTree]:
        taken = self._stream.take(count)
        prompts = [Prompt(key, render(self._template, problem, self._backend.tokenizer)) for key, problem in taken]
        waiting = []
        with self._ledger.phase("sampling"):
            progress = step / max(1, self._algorithm.schedule.steps)
            for index, tree in grow_iter(self._algorithm.sampler, self._backend, prompts, seed=self._seed, step=step, progress=progress):
                texts = decode_leaves(tree, self._backend.tokenizer)
                waiting.append((index, tree, texts, self._reward.submit([(taken[index][1], text) for text in texts])))
        with self._ledger.phase("grading"):
            graded = [
                (index, shape(tree, taken[index][1], texts, self._reward.collect(ticket), self._algorithm))
                for index, tree, texts, ticket in waiting
            ]
        return [tree for _, tree in sorted(graded, key=lambda pair: pair[0])]


def decode_leaves(tree: Tree, tokenizer: Any) -> tuple[str, ...]:
    """Response text of every leaf, special tokens left out."""
    return tuple(tokenizer.batch_decode([tree.path_tokens(int(leaf)) for leaf in tree.leaves], skip_special_tokens=True))


def shape(tree: Tree, problem: Problem, texts: Sequence[str], grades: Sequence[Grade], algorithm: Algorithm) -> GradedTree:
    """`tree` with right/wrong and rewards from its leaves' grades."""
    shaped = algorithm.shaping(tree, [g.correct for g in grades], algorithm.sampler.max_response_tokens)
    if any(g.reward is not None for g in grades):  # the plug-in's numbers are the rewards
        given = [g.correct if g.reward is None else g.reward for g in grades]
        leaves = [int(leaf) for leaf in tree.leaves]
        shaped = tree.with_rewards(dict(zip(leaves, given, strict=True)), dict(zip(leaves, [g.correct for g in grades], strict=True)))
    return GradedTree(shaped, problem, tuple(texts), tuple(g.kind for g in grades))


def describe(batch: Batch) -> dict[str, float]:
    """Metrics of everything sampled in a step, kept or not; shares are over leaves unless named otherwise; sampler/... are sums."""
    trees = [g.tree for g in batch.all]
    reward = np.concatenate([t.reward for t in trees])
    lengths = np.concatenate([t.response_lengths() for t in trees])
    stops = np.concatenate([t.stop[t.leaves] for t in trees])
    kinds = Counter(kind for g in batch.all for kind in g.kinds)
    counts: Counter[str] = Counter()
    for tree in trees:
        counts.update(tree.meta.get("sampler", {}))
    cut = (int(Stop.LENGTH), int(Stop.DEPTH), int(Stop.REPETITION))
    return {
        "reward": float(np.nanmean(reward)) if not np.isnan(reward).all() else float("nan"),
        "pass_at_1": float(np.mean([float(np.nanmean(t.correct)) for t in trees if not np.isnan(t.correct).all()] or [float("nan")])),
        "length": float(lengths.mean()),
        "truncated": float(np.isin(stops, cut).mean()),
        "dead_groups": len(batch.dropped) / len(trees),
        "trees": len(batch.kept),
        "leaves": len(lengths),
        "sampled_tokens": sum(t.sampled_tokens for t in trees),
        "unrolled_tokens": sum(t.unrolled_tokens for t in trees),
        **{f"verdict/{kind}": kinds[kind] for kind in sorted(kinds)},
        **{f"sampler/{name}": count for name, count in sorted(counts.items())},
        **{f"engine/{name}": count for name, count in batch.engine.items()},
    }


def _refuse_failures(batch: Batch) -> None:
    kinds = [kind for g in batch.all for kind in g.kinds]
    failed = kinds.count("failed")
    if failed > MAX_FAILED * len(kinds):
        raise RuntimeError(f"grading itself failed for {failed} of {len(kinds)} responses (allowed: {MAX_FAILED:.0%}); see `rlzoo doctor`")

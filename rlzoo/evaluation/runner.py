"""Evaluate a model on problem sets: sample, grade, count. Every sample goes to the sink as soon as it is graded."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..backends.protocol import Backend
from ..data.problems import Problem
from ..data.templates import render
from ..sampling.chains import Chains
from ..sampling.grow import Prompt, grow_iter
from ..tree import Float64, Int32, Stop, Tree
from .metrics import length_summary, pass_at_k
from .stats import Estimate, clustered_mean, proportion

CUT = (Stop.LENGTH, Stop.DEPTH, Stop.REPETITION)
"""Stops that count as truncation: the model did not end the response itself."""

PENDING = 64  # problems whose grading may be under way while sampling goes on

Suite = Mapping[str, Sequence[Problem]]
Sink = Callable[[Mapping[str, Any]], None]
Grading = Callable[[list[tuple[str, str]]], Sequence[Any]]
"""[(gold, response text)] in, as many verdicts (`correct`: bool, or None where grading failed; `kind`) out."""


class Grades(Protocol):
    """Grades in the background (a `rlzoo.rewards.reward.Reward`): problems and response texts in, grades with `correct`
    (1, 0 or NaN) and `kind` out."""

    def submit(self, items: Sequence[tuple[Problem, str]]) -> Any: ...

    def collect(self, ticket: Any) -> Sequence[Any]: ...


@dataclass(frozen=True, slots=True, eq=False)
class SetResult:
    """What a model did on one problem set.

    `correct` float64 [problems, k]: 1 right, 0 wrong, NaN where grading failed (left out of every mean, and counted in
    `failed`); `lengths` int32 [problems, k] response tokens; `truncated` bool [problems, k]; `kinds` counts verdicts;
    `sampled_tokens` of these k samples. `greedy` is the same set decoded greedily (k = 1), where asked for.
    """

    name: str
    ids: tuple[str, ...]
    temperature: float
    correct: Float64
    lengths: Int32
    truncated: NDArray[np.bool_]
    kinds: Mapping[str, int]
    sampled_tokens: int
    greedy: SetResult | None = None

    @property
    def n(self) -> int:
        """Problems."""
        return len(self.ids)

    @property
    def k(self) -> int:
        """Samples per problem."""
        return int(self.correct.shape[1])

    @property
    def failed(self) -> int:
        """Samples whose grading itself failed."""
        return int(np.isnan(self.correct).sum())

    @property
    def graded(self) -> Int32:
        """Graded samples per problem, int32 [problems]."""
        return np.asarray((~np.isnan(self.correct)).sum(axis=1), np.int32)

    @property
    def right(self) -> Int32:
        """Right samples per problem, int32 [problems]."""
        return np.asarray(np.nansum(self.correct, axis=1), np.int32)

    @property
    def means(self) -> Float64:
        """Share of right among graded samples per problem, float64 [problems]; NaN where none was graded."""
        graded = self.graded
        return np.where(graded > 0, self.right / np.maximum(graded, 1), np.nan)

    @property
    def pass_at_1(self) -> Estimate:
        """Mean over problems of the share of right samples, with its interval: Wilson for k = 1, clustered t otherwise."""
        return proportion(self.means, self.k)

    def pass_at(self, k: int) -> Estimate:
        """Unbiased pass@k, mean over the problems with at least k graded samples, with a clustered t interval.

        Raises:
            ValueError: no problem has k graded samples.
        """
        enough = self.graded >= k
        if not enough.any():
            raise ValueError(f"pass@{k} on {self.name}: no problem has {k} graded samples")
        return clustered_mean(np.asarray(pass_at_k(self.graded[enough], self.right[enough], k)))

    @property
    def length(self) -> dict[str, float]:
        """Mean, median and 95th percentile of the response length, tokens."""
        return length_summary(self.lengths.ravel())

    @property
    def truncated_rate(self) -> float:
        """Share of responses cut off by a limit or for repeating themselves."""
        return float(self.truncated.mean())

    def as_dict(self) -> dict[str, Any]:
        """Plain data for a result row: the metrics with their intervals and the counts per problem that they come from."""
        row: dict[str, Any] = {
            "n": self.n,
            "k": self.k,
            "temperature": self.temperature,
            "pass_at_1": self.pass_at_1.as_dict(),
            "length": self.length,
            "truncated": self.truncated_rate,
            "verdicts": dict(sorted(self.kinds.items())),
            "failed": self.failed,
            "sampled_tokens": self.sampled_tokens,
            "problems": list(self.ids),
            "right": self.right.tolist(),
            "graded": self.graded.tolist(),
        }
        if self.k > 1:
            row[f"pass_at_{self.k}"] = self.pass_at(self.k).as_dict() if (self.graded >= self.k).any() else None
        if self.greedy is not None:
            row["greedy"] = self.greedy.as_dict()
        return row


def evaluate(
    backend: Backend,
    tokenizer: Any,
    suite: Suite,
    *,
    k: int,
    temperature: float = 1.0,
    greedy: bool = False,
    max_response_tokens: int,
    template: str,
    grade: Grading | Grades,
    seed: int,
    sink: Sink | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, SetResult]:
    """Sample k responses per problem of every set and grade them; with `greedy` also one greedy response per problem.

    All sets are sampled together, without a pause between them. `sink` gets one row per sample; `progress(done, all)` counts
    responses. The outcome is a function of the model, the problems and the seed, not of the order in which samples finish.

    Raises:
        ValueError: k < 1, temperature <= 0, an empty set, or a problem too long for the model's context.
    """
    if k < 1:
        raise ValueError(f"k = {k}: at least one response per problem is needed")
    if temperature <= 0:
        raise ValueError(f"temperature = {temperature}: {k} samples need one above 0; for greedy decoding ask for greedy")
    for name, problems in suite.items():
        if not problems:
            raise ValueError(f"problem set {name!r} is empty")
    sampled = Chains(group_size=k, max_response_tokens=max_response_tokens, temperature=temperature)
    runs = [sampled, *([replace(sampled, group_size=1, temperature=0.0)] if greedy else [])]
    total = sum(len(problems) for problems in suite.values()) * sum(run.group_size for run in runs)
    count = _Count(total, progress)
    grader: Grades = grade if hasattr(grade, "collect") else _Pairs(grade)  # type: ignore[assignment]
    results = [_evaluate(run, backend, tokenizer, suite, template, grader, seed, sink, count) for run in runs]
    if not greedy:
        return results[0]
    return {name: replace(result, greedy=results[1][name]) for name, result in results[0].items()}


class _Pairs:
    """A plain grading function behind the interface of a background grader."""

    def __init__(self, grade: Grading) -> None:
        self._grade = grade

    def submit(self, items: Sequence[tuple[Problem, str]]) -> Sequence[Any]:
        verdicts = self._grade([(problem.answer, text) for problem, text in items])
        if len(verdicts) != len(items):
            raise RuntimeError(f"the grader returned {len(verdicts)} verdicts for {len(items)} responses")
        return verdicts

    def collect(self, ticket: Any) -> Sequence[Any]:
        verdicts: Sequence[Any] = ticket
        return verdicts


@dataclass(slots=True)
class _Count:
    total: int
    report: Callable[[int, int], None] | None
    done: int = 0

    def add(self, responses: int) -> None:
        self.done += responses
        if self.report is not None:
            self.report(self.done, self.total)


@dataclass(slots=True)
class _Tally:
    """One set while its samples come in; arrays [problems, k]."""

    problems: Sequence[Problem]
    correct: Float64
    lengths: Int32
    truncated: NDArray[np.bool_]
    kinds: Counter[str] = field(default_factory=Counter)
    sampled_tokens: int = 0

    @classmethod
    def of(cls, problems: Sequence[Problem], k: int) -> _Tally:
        shape = (len(problems), k)
        return cls(problems, np.full(shape, np.nan), np.zeros(shape, np.int32), np.zeros(shape, np.bool_))


@dataclass(frozen=True, slots=True)
class _Graded:
    """A finished tree of independent responses with its problem's place in the suite."""

    name: str
    index: int
    tree: Tree
    texts: Sequence[str]
    grades: Sequence[Any]


def _evaluate(
    sampler: Chains,
    backend: Backend,
    tokenizer: Any,
    suite: Suite,
    template: str,
    grader: Grades,
    seed: int,
    sink: Sink | None,
    count: _Count,
) -> dict[str, SetResult]:
    tallies = {name: _Tally.of(problems, sampler.group_size) for name, problems in suite.items()}
    for graded in _graded(sampler, backend, tokenizer, suite, template, grader, seed):
        tally = tallies[graded.name]
        tree, problem = graded.tree, tally.problems[graded.index]
        lengths, stops = tree.response_lengths(), tree.stop[tree.leaves]
        tally.lengths[graded.index] = lengths
        tally.truncated[graded.index] = np.isin(stops, [int(stop) for stop in CUT])
        tally.sampled_tokens += tree.sampled_tokens
        for i, (text, grade) in enumerate(zip(graded.texts, graded.grades, strict=True)):
            correct = float("nan") if grade.correct is None else float(grade.correct)
            tally.correct[graded.index, i] = correct
            tally.kinds[str(grade.kind)] += 1
            if sink is not None:
                sink(
                    {
                        "set": graded.name,
                        "id": problem.id,
                        "sample": i,
                        "temperature": sampler.temperature,
                        "correct": None if np.isnan(correct) else bool(correct),
                        "kind": str(grade.kind),
                        "tokens": int(lengths[i]),
                        "stop": Stop(int(stops[i])).name,
                        "gold": problem.answer,
                        "response": text,
                    }
                )
        count.add(len(graded.texts))
    return {
        name: SetResult(
            name=name,
            ids=tuple(p.id for p in tally.problems),
            temperature=sampler.temperature,
            correct=tally.correct,
            lengths=tally.lengths,
            truncated=tally.truncated,
            kinds=dict(tally.kinds),
            sampled_tokens=tally.sampled_tokens,
        )
        for name, tally in tallies.items()
    }


def _graded(sampler: Chains, backend: Backend, tokenizer: Any, suite: Suite, template: str, grader: Grades, seed: int) -> Iterator[_Graded]:
    """Trees as they are graded: while some are being graded, others are sampled."""
    places = [(name, index) for name, problems in suite.items() for index in range(len(problems))]
    prompts = [Prompt(f"{name}/{suite[name][index].id}", render(template, suite[name][index], tokenizer)) for name, index in places]
    pending: deque[tuple[str, int, Tree, Sequence[str], Any]] = deque()

    def oldest() -> _Graded:
        name, index, tree, texts, ticket = pending.popleft()
        return _Graded(name, index, tree, texts, grader.collect(ticket))

    for place, tree in grow_iter(sampler, backend, prompts, seed=seed):
        name, index = places[place]
        texts = tokenizer.batch_decode([tree.path_tokens(int(leaf)) for leaf in tree.leaves], skip_special_tokens=True)
        pending.append((name, index, tree, texts, grader.submit([(suite[name][index], text) for text in texts])))
        if len(pending) > PENDING:
            yield oldest()
    while pending:
        yield oldest()

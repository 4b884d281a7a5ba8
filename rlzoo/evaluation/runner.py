"""Evaluate a model on problem sets: sample, grade, count. Every sample goes to the sink as soon as it is graded."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from ..backends.protocol import Backend
from ..data.problems import Problem
from ..data.templates import render
from ..rewards.extract import last_boxed
from ..sampling.base import Sampler
from ..sampling.chains import Chains
from ..sampling.grow import Prompt, grow_iter
from ..tree import Float64, Int32, Stop, Tree
from .metrics import length_summary, pass_at_k
from .stats import Estimate, clustered_mean

CUT = (Stop.LENGTH, Stop.DEPTH, Stop.REPETITION)
"""Stops that count as truncation: the model did not end the response itself."""

PENDING = 64  # problems whose grading may be under way while sampling goes on

Suite = Mapping[str, Sequence[Problem]]
Row = Mapping[str, Any]
"""One sample as it goes to the sink: set, id, sample, temperature, correct, kind, tokens, tree_tokens (sampled for all samples of
the problem together), stop, answer (in the last box), gold, response."""
Sink = Callable[[Mapping[str, Any]], None]
Grading = Callable[[list[tuple[str, str]]], Sequence[Any]]
"""[(gold, response text)] in, as many verdicts (`correct`: bool, or None where grading failed; `kind`) out."""


class Grades(Protocol):
    """Grades in the background (a `rlzoo.rewards.reward.Reward`): problems and response texts in, grades with `correct`
    (1, 0 or NaN) and `kind` out. A ticket may have `done`, whether `collect` would return at once."""

    def submit(self, items: Sequence[tuple[Problem, str]]) -> Any: ...

    def collect(self, ticket: Any) -> Sequence[Any]: ...


@dataclass(frozen=True, slots=True, eq=False)
class SetResult:
    """What a model did on one problem set.

    `correct` float64 [problems, k]: 1 right, 0 wrong, NaN where grading failed (left out of every mean, and counted in
    `failed`); `lengths` int32 [problems, k] response tokens; `truncated` bool [problems, k]; `kinds` counts verdicts;
    `sampled_tokens` of these k samples. `votes` float64 [problems], where they were counted: the chance that the majority vote of
    a problem's samples is right. `greedy` is the same set decoded greedily (k = 1), where asked for.
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
    votes: Float64 | None = None

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
        """Mean over problems of the share of right samples, with its interval (`clustered_mean`)."""
        return clustered_mean(self.means)

    def pass_at(self, k: int) -> Estimate:
        """Unbiased pass@k, mean over the problems with at least k graded samples, with a clustered t interval.

        Raises:
            ValueError: no problem has k graded samples.
        """
        values = self.pass_values(k)
        if not len(values):
            raise ValueError(f"pass@{k} on {self.name}: no problem has {k} graded samples")
        return clustered_mean(values)

    def pass_values(self, k: int) -> Float64:
        """Unbiased pass@k of each problem with at least k graded samples."""
        enough = self.graded >= k
        return np.asarray(pass_at_k(self.graded[enough], self.right[enough], k), np.float64)

    @property
    def maj_at_k(self) -> Estimate | None:
        """Mean over problems of `votes`, with a clustered t interval; None where no votes were counted."""
        return None if self.votes is None else clustered_mean(self.votes)

    def rate(self, kind: str) -> float:
        """Share of samples with this kind of verdict."""
        return self.kinds.get(kind, 0) / self.correct.size

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
        return {
            "n": self.n,
            "k": self.k,
            "temperature": self.temperature,
            "pass_at_1": self.pass_at_1.as_dict(),
            "pass_at": {str(k): self.pass_at(k).as_dict() if len(self.pass_values(k)) else None for k in some_k(self.k)},
            "maj_at_k": None if self.maj_at_k is None else self.maj_at_k.as_dict(),
            "greedy": None if self.greedy is None else self.greedy.as_dict(),
            "length": self.length,
            "truncated": self.truncated_rate,
            "unparsable": self.rate("unparsable"),
            "timed_out": self.rate("timed_out"),
            "verdicts": dict(sorted(self.kinds.items())),
            "failed": self.failed,
            "sampled_tokens": self.sampled_tokens,
            "problems": list(self.ids),
            "right": self.right.tolist(),
            "graded": self.graded.tolist(),
            "lengths": self.lengths.mean(axis=1).tolist(),
        }


def some_k(k: int) -> list[int]:
    """The values of k that pass@k is told for: 2, 4, 8, ... below k, and k; none for k = 1."""
    return [2**i for i in range(1, k.bit_length()) if 2**i < k] + ([k] if k > 1 else [])


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
    sampler: Sampler | None = None,
    known: Sequence[Row] = (),
    sink: Sink | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, SetResult]:
    """Sample k responses per problem of every set and grade them; with `greedy` also one greedy response per problem.

    Responses are independent, unless a `sampler` of k leaves per tree is given (test-time tree sampling; its temperature and
    limits then hold). All sets are sampled together, without a pause between them. `sink` gets one row per sample; `known` are
    rows that an interrupted evaluation wrote: problems with all their samples in it are not sampled again (`complete` says
    which rows may be kept). `progress(done, all)` counts responses. The outcome is a function of the model, the problems and
    the seed, not of the order in which samples finish.

    Raises:
        ValueError: k < 1, a temperature of 0 with k > 1 or with `greedy`, an empty set, or a problem too long for the model's context.
        RuntimeError: a tree of `sampler` has not k leaves.
    """
    if k < 1:
        raise ValueError(f"k = {k}: at least one response per problem is needed")
    if temperature == 0 and (k > 1 or greedy):
        raise ValueError(
            f"temperature = 0 is greedy decoding, where {k + greedy} samples would all be the same: use k = 1, or ask for greedy"
        )
    for name, problems in suite.items():
        if not problems:
            raise ValueError(f"problem set {name!r} is empty")
    chains = Chains(group_size=k, max_response_tokens=max_response_tokens, temperature=temperature)
    runs = [sampler or chains, *([replace(chains, group_size=1, temperature=0.0)] if greedy else [])]
    total = sum(len(problems) for problems in suite.values()) * sum(run.leaves_per_tree for run in runs)
    count = _Count(total, progress)
    grader: Grades = grade if hasattr(grade, "collect") else _Pairs(grade)  # type: ignore[assignment]
    done = _by_problem(known)
    results = [_evaluate(run, backend, tokenizer, suite, template, grader, seed, done, sink, count) for run in runs]
    if not greedy:
        return results[0]
    return {name: replace(result, greedy=results[1][name]) for name, result in results[0].items()}


@dataclass(frozen=True, slots=True)
class _Verdicts:
    verdicts: Sequence[Any]
    done: ClassVar[bool] = True


class _Pairs:
    """A plain grading function behind the interface of a background grader."""

    def __init__(self, grade: Grading) -> None:
        self._grade = grade

    def submit(self, items: Sequence[tuple[Problem, str]]) -> _Verdicts:
        verdicts = self._grade([(problem.answer, text) for problem, text in items])
        if len(verdicts) != len(items):
            raise RuntimeError(f"the grader returned {len(verdicts)} verdicts for {len(items)} responses")
        return _Verdicts(verdicts)

    def collect(self, ticket: Any) -> Sequence[Any]:
        verdicts: Sequence[Any] = ticket.verdicts
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

    def add(self, index: int, rows: Sequence[Row]) -> None:
        """Take in all samples of one problem."""
        for row in rows:
            at = index, row["sample"]
            self.correct[at] = float("nan") if row["correct"] is None else float(row["correct"])
            self.lengths[at] = row["tokens"]
            self.truncated[at] = Stop[row["stop"]] in CUT
            self.kinds[row["kind"]] += 1
        self.sampled_tokens += rows[0]["tree_tokens"]

    def result(self, name: str, temperature: float) -> SetResult:
        return SetResult(
            name=name,
            ids=tuple(p.id for p in self.problems),
            temperature=temperature,
            correct=self.correct,
            lengths=self.lengths,
            truncated=self.truncated,
            kinds=dict(self.kinds),
            sampled_tokens=self.sampled_tokens,
        )


@dataclass(frozen=True, slots=True)
class _Graded:
    """A finished tree of independent responses with its problem's place in the suite."""

    name: str
    index: int
    tree: Tree
    texts: Sequence[str]
    grades: Sequence[Any]


Place = tuple[str, str, float]  # set, problem id, temperature


def _by_problem(rows: Sequence[Row]) -> dict[Place, list[Row]]:
    places: dict[Place, list[Row]] = {}
    for row in rows:
        places.setdefault((row["set"], row["id"], float(row["temperature"])), []).append(row)
    return places


def complete(rows: Sequence[Row], k: Mapping[str, int]) -> list[Row]:
    """Those rows of an interrupted evaluation that belong to problems with all samples: k by set, of a greedy problem its one."""
    whole = [group for (name, _, temperature), group in _by_problem(rows).items() if len(group) == (k[name] if temperature > 0 else 1)]
    return [row for group in whole for row in group]


def _evaluate(
    sampler: Sampler,
    backend: Backend,
    tokenizer: Any,
    suite: Suite,
    template: str,
    grader: Grades,
    seed: int,
    known: Mapping[Place, Sequence[Row]],
    sink: Sink | None,
    count: _Count,
) -> dict[str, SetResult]:
    k, temperature = sampler.leaves_per_tree, sampler.sampling.temperature
    tallies = {name: _Tally.of(problems, k) for name, problems in suite.items()}
    missing: list[tuple[str, int]] = []
    for name, problems in suite.items():
        for index, problem in enumerate(problems):
            rows = known.get((name, problem.id, temperature))
            if rows is None:
                missing.append((name, index))
            else:
                tallies[name].add(index, rows)
                count.add(len(rows))
    for graded in _graded(sampler, backend, tokenizer, suite, missing, template, grader, seed):
        rows = _rows(graded, suite[graded.name][graded.index], temperature)
        if len(rows) != k:
            raise RuntimeError(f"problem {rows[0]['id']} got {len(rows)} responses from sampler {sampler.name}, not {k}")
        tallies[graded.name].add(graded.index, rows)
        if sink is not None:
            for row in rows:
                sink(row)
        count.add(k)
    return {name: tally.result(name, temperature) for name, tally in tallies.items()}


def _rows(graded: _Graded, problem: Problem, temperature: float) -> list[Row]:
    tree = graded.tree
    lengths, stops = tree.response_lengths().tolist(), tree.stop[tree.leaves].tolist()
    return [
        {
            "set": graded.name,
            "id": problem.id,
            "sample": i,
            "temperature": temperature,
            "correct": None if grade.correct is None or grade.correct != grade.correct else bool(grade.correct),
            "kind": str(grade.kind),
            "tokens": lengths[i],
            "tree_tokens": tree.sampled_tokens,
            "stop": Stop(stops[i]).name,
            "answer": last_boxed(text),
            "gold": problem.answer,
            "response": text,
        }
        for i, (text, grade) in enumerate(zip(graded.texts, graded.grades, strict=True))
    ]


def _graded(
    sampler: Sampler,
    backend: Backend,
    tokenizer: Any,
    suite: Suite,
    places: Sequence[tuple[str, int]],
    template: str,
    grader: Grades,
    seed: int,
) -> Iterator[_Graded]:
    """Trees of the problems at `places` as they are graded: while some are being graded, others are sampled."""
    prompts = [Prompt(f"{name}/{suite[name][index].id}", render(template, suite[name][index], tokenizer)) for name, index in places]
    pending: deque[tuple[str, int, Tree, Sequence[str], Any]] = deque()

    def oldest() -> _Graded:
        name, index, tree, texts, ticket = pending.popleft()
        return _Graded(name, index, tree, texts, grader.collect(ticket))

    for place, tree in grow_iter(sampler, backend, prompts, seed=seed):
        name, index = places[place]
        texts = tokenizer.batch_decode([tree.path_tokens(int(leaf)) for leaf in tree.leaves], skip_special_tokens=True)
        pending.append((name, index, tree, texts, grader.submit([(suite[name][index], text) for text in texts])))
        while pending and (len(pending) > PENDING or getattr(pending[0][-1], "done", False)):
            yield oldest()
    while pending:
        yield oldest()

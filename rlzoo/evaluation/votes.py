"""The majority vote over a problem's samples: which answers are the same candidate, and how often the vote is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..data.problems import Problem
from ..rewards.extract import MAX_ANSWER_CHARS, gold_answer
from .metrics import answer_classes, maj_at_k
from .runner import Grades, Row, SetResult

UNREADABLE = ("unparsable", "timed_out")


@dataclass(frozen=True, slots=True)
class _Answers:
    """One problem's samples, in order: the boxed answer (None: no vote) and the verdict (1, 0, NaN)."""

    answers: Sequence[str | None]
    correct: Sequence[float]
    right: frozenset[str]
    readable: frozenset[str]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> _Answers:
        ordered = sorted(rows, key=lambda row: int(row["sample"]))
        answers = [row["answer"] or None for row in ordered]
        correct = [float("nan") if row["correct"] is None else float(row["correct"]) for row in ordered]
        right = frozenset(a for a, c in zip(answers, correct, strict=True) if a is not None and c == 1)
        unread = {row["answer"] for row in ordered if row["kind"] in UNREADABLE}
        readable = frozenset(a for a in answers if a is not None and a not in unread and 0 < len(gold_answer(a)) <= MAX_ANSWER_CHARS)
        return cls(answers, correct, right, readable)

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Pairs of different answers whose equality only the grader knows: right answers are all equal to the gold answer, and
        so to no wrong one; what could not be read equals nothing but itself."""
        open_ones = [a for a in dict.fromkeys(self.answers) if a in self.readable and a not in self.right]
        for j, second in enumerate(open_ones):
            for first in open_ones[:j]:
                yield first, second

    def vote(self, same: Mapping[tuple[str, str], bool] | None) -> float:
        if all(np.isnan(self.correct)):
            return float("nan")

        def equivalent(a: str, b: str) -> bool:
            return (a in self.right and b in self.right) or (same is not None and same.get((a, b), False))

        return maj_at_k(answer_classes(self.answers, None if same is None else equivalent), self.correct)


def with_votes(results: Mapping[str, SetResult], rows: Sequence[Row], vote: str, grades: Grades) -> dict[str, SetResult]:
    """The results of sampling with their majority votes, counted over `rows` (see `rlzoo.evaluation.runner.Row`) where k > 1.

    `vote` "equivalent": answers that the grader takes for the same are one candidate; all pairs that need it are graded in one
    batch. "string": equal strings only, as in the papers.

    Raises:
        RuntimeError: the grader failed on a pair of answers.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        result = results[row["set"]]
        if result.k > 1 and float(row["temperature"]) == result.temperature:
            groups.setdefault((row["set"], row["id"]), []).append(row)
    problems = {place: _Answers.of(group) for place, group in groups.items()}
    same = _grade(list(dict.fromkeys(pair for p in problems.values() for pair in p.pairs())), grades) if vote == "equivalent" else None
    return {
        name: replace(result, votes=np.array([problems[name, problem].vote(same) for problem in result.ids])) if result.k > 1 else result
        for name, result in results.items()
    }


def _grade(pairs: Sequence[tuple[str, str]], grades: Grades) -> dict[tuple[str, str], bool]:
    made: list[tuple[Problem, str]] = [(Problem("vote", "", first), rf"\boxed{{{second}}}") for first, second in pairs]
    verdicts: Sequence[Any] = grades.collect(grades.submit(made)) if made else []
    failed = [pair for pair, v in zip(pairs, verdicts, strict=True) if v.correct is None or v.correct != v.correct]
    if failed:
        raise RuntimeError(f"grading failed on {len(failed)} of {len(pairs)} pairs of answers for the vote, first {failed[0]!r:.80}")
    return {pair: bool(v.correct) for pair, v in zip(pairs, verdicts, strict=True)}

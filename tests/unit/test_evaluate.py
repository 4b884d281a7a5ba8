"""The evaluation runner, over a fake engine that answers from a table."""

import json
import zlib
from dataclasses import dataclass

import numpy as np
import pytest

from rlzoo.backends.protocol import SegmentResult
from rlzoo.data.problems import Problem
from rlzoo.evaluation.runner import evaluate
from rlzoo.evaluation.stats import wilson
from rlzoo.tree import Stop

END = 0


class Characters:
    """One token per character; END ends the text and is special."""

    bos_token_id = None

    def encode(self, text, add_special_tokens=True):
        return [ord(c) for c in text]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(int(i)) for i in ids if int(i) != END)

    def batch_decode(self, many, skip_special_tokens=False):
        return [self.decode(ids) for ids in many]


class Engine:
    """Says what `says(problem, seed, greedy)` says; finishes requests in an order of its own, newest first."""

    tokenizer, max_context, capacity = Characters(), 200, 4

    def __init__(self, says):
        self.says, self.waiting, self.seen = says, [], []

    def submit(self, requests):
        self.waiting += list(requests)

    def step(self):
        request = self.waiting.pop()
        self.seen.append(request)
        problem = self.tokenizer.decode(request.context).strip()
        ids = [ord(c) for c in self.says(problem, request.seed, request.params.temperature == 0)] + [END]
        stop = Stop.EOS if len(ids) <= request.max_tokens else Stop.OPEN
        ids = np.array(ids[: request.max_tokens], np.int32)
        return [SegmentResult(request.id, ids, np.zeros(len(ids), np.float32), stop)]

    def release(self, ids):
        pass


@dataclass
class Verdict:
    correct: bool | None
    kind: str


def grade(pairs):
    return [Verdict(None, "failed") if "?" in text else Verdict(gold in text, "right" if gold in text else "wrong") for gold, text in pairs]


def says(problem, seed, greedy):
    """Right in about half of the samples; the greedy answer is right on even problems only."""
    number = int(problem[1:])
    lucky = number % 2 == 0 if greedy else zlib.crc32(str(seed).encode()) % 2
    return f"is {number}" if lucky else "no idea at all"


def problems(n, start=0):
    return [Problem(f"p{i}", f"q{i}", str(i)) for i in range(start, start + n)]


SUITE = {"first": problems(7), "second": problems(5)}  # the same ids in both: seeds must differ all the same
SETTINGS = {"k": 8, "max_response_tokens": 50, "template": "plain", "grade": grade, "seed": 3}


def run(engine=None, suite=SUITE, **changes):
    engine = engine or Engine(says)
    return evaluate(engine, engine.tokenizer, suite, **(SETTINGS | changes))


def test_counts_lengths_and_rows():
    rows, told = [], []
    results = run(greedy=True, sink=rows.append, progress=lambda done, total: told.append((done, total)))
    assert list(results) == ["first", "second"]
    first = results["first"]
    assert (first.n, first.k, first.failed, first.ids) == (7, 8, 0, tuple(f"p{i}" for i in range(7)))
    mine = [r for r in rows if r["set"] == "first" and r["temperature"] == 1]
    assert len(mine) == 56 and {(r["id"], r["sample"]) for r in mine} == {(f"p{i}", j) for i in range(7) for j in range(8)}
    for i in range(7):  # every figure follows from the rows that went to disk
        own = [r for r in mine if r["id"] == f"p{i}"]
        assert first.right[i] == sum(r["correct"] for r in own) == sum(r["response"] == f"is {i}" for r in own)
        assert sorted(first.lengths[i].tolist()) == sorted(r["tokens"] for r in own) == sorted(len(r["response"]) + 1 for r in own)
    assert 0 < first.right.sum() < 56 and len(set(first.right.tolist())) > 1  # seeds differ between samples and problems
    assert results["second"].right.tolist() != first.right[:5].tolist()  # and between sets
    assert first.kinds == {"right": int(first.right.sum()), "wrong": 56 - int(first.right.sum())}
    assert first.sampled_tokens == first.lengths.sum() and first.truncated_rate == 0
    assert json.dumps(rows) and told[-1] == (12 * 9, 12 * 9) and [d for d, _ in told] == sorted(d for d, _ in told)
    assert first.greedy is not None and first.greedy.right.tolist() == [1, 0, 1, 0, 1, 0, 1]
    assert (first.greedy.k, first.greedy.temperature, first.greedy.pass_at_1) == (1, 0, wilson(4, 7))


def test_pass_at_1_and_pass_at_k():
    first = run()["first"]
    assert first.greedy is None
    assert first.pass_at_1.mean == pytest.approx((first.right / 8).mean())
    assert first.pass_at_1.method == "clustered logit t"
    assert first.pass_at(8).mean == pytest.approx((first.right > 0).mean())
    row = first.as_dict()
    assert (
        json.loads(json.dumps(row)) == row
        and row["pass_at"]["8"]["mean"] == first.pass_at(8).mean
        and list(row["pass_at"]) == ["2", "4", "8"]
    )
    with pytest.raises(ValueError, match="pass@9 on first: no problem has 9 graded samples"):
        first.pass_at(9)


def test_the_outcome_does_not_depend_on_the_order_of_finishing():
    class Forwards(Engine):
        capacity = 64

        def step(self):
            self.waiting.reverse()
            result = super().step()
            self.waiting.reverse()
            return result

    one, other = run()["second"], run(Forwards(says))["second"]
    assert np.array_equal(one.correct, other.correct) and np.array_equal(one.lengths, other.lengths)
    assert not np.array_equal(one.correct, run(seed=4)["second"].correct)


def test_a_problems_samples_do_not_depend_on_its_company():
    whole = run()["first"]
    fewer = run(suite={"first": [SUITE["first"][5], SUITE["first"][2]]})["first"]
    assert np.array_equal(fewer.correct, whole.correct[[5, 2]])


def test_failed_gradings_are_left_out_and_counted():
    def sometimes(problem, seed, greedy):
        return "?" if problem == "q0" or (problem == "q1" and zlib.crc32(str(seed).encode()) % 4 == 0) else f"is {problem[1:]}"

    result = run(Engine(sometimes), {"s": problems(4)}, k=16)["s"]
    lost = 16 - int(result.graded[1])
    assert 0 < lost < 16 and result.failed == 16 + lost == result.kinds["failed"]
    assert np.isnan(result.means[0]) and result.means[1:].tolist() == [1, 1, 1]
    assert (result.pass_at_1.mean, result.pass_at_1.n) == (1, 3)
    assert result.pass_at(16).n == 2  # pass@16 needs 16 graded samples


def test_truncation_is_seen():
    result = run(max_response_tokens=6)["first"]
    assert result.truncated_rate == pytest.approx(1 - result.right.sum() / 56)
    assert result.lengths.max() == 6


def test_requests_carry_the_temperature():
    engine = Engine(says)
    run(engine, temperature=0.7, greedy=True)
    assert {r.params.temperature for r in engine.seen} == {0.7, 0.0}


def test_a_background_grader_is_fed_while_sampling_goes_on():
    class Background:
        def __init__(self):
            self.log = []

        def submit(self, items):
            self.log.append("submit")
            return [(p.answer, text) for p, text in items]

        def collect(self, ticket):
            self.log.append("collect")
            return grade(ticket)

    many, grader = {"many": problems(200)}, Background()
    result = run(suite=many, grade=grader, k=2)["many"]
    assert np.array_equal(result.correct, run(suite=many, k=2)["many"].correct)
    assert grader.log.index("collect") > 50 and "submit" in grader.log[grader.log.index("collect") :]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 0}, "k = 0"),
        ({"temperature": 0.0}, "where 8 samples would all be the same: use k = 1, or ask for greedy"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"suite": {"empty": []}}, "problem set 'empty' is empty"),
        ({"template": "fancy"}, "unknown template"),
        ({"max_response_tokens": 500}, "exceeds the model's context"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)


def test_a_grader_that_loses_answers_is_caught():
    with pytest.raises(RuntimeError, match="returned 1 verdicts for 8 responses"):
        run(grade=lambda pairs: grade(pairs[:1]))

"""`rlzoo eval` without a model: a scripted engine, a fake clock, votes by hand."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from rlzoo import registry
from rlzoo.backends.scripted import ScriptedBackend, respond
from rlzoo.config import build
from rlzoo.data.problems import Problem, checksum
from rlzoo.evaluation import job
from rlzoo.evaluation.job import Plan, evaluate_into
from rlzoo.evaluation.options import EvalConfig, SegmentOptions
from rlzoo.evaluation.rows import validate
from rlzoo.evaluation.runner import SetResult
from rlzoo.evaluation.suites import Suite
from rlzoo.evaluation.testsets import Hub, SetSpec, answers_checksum
from rlzoo.evaluation.votes import with_votes
from rlzoo.report.evaluated import evaluation_grid
from rlzoo.rewards.math import GraderConfig
from rlzoo.rewards.reward import Grade
from rlzoo.store.cost import Ledger
from rlzoo.store.files import write_aside
from rlzoo.store.runs import RunFolder, read_rows
from rlzoo.training.measure import final_suite

PROBLEMS = {
    "easy": [Problem(f"e{i}", f"easy {i}", str(i)) for i in range(4)],
    "hard": [Problem(f"h{i}", f"hard {i}", str(i)) for i in range(3)],
}


def spec(name, k):
    return SetSpec(name, len(PROBLEMS[name]), "0", "0", "none", "plain", k, GraderConfig(), generator="some:thing")


def plan(ks=(4, 4), weights=(1.0, 3.0), **options):
    config = EvalConfig("scripted", suite="both", max_response_tokens=32, **options)
    sets = tuple(spec(name, k) for name, k in zip(PROBLEMS, ks, strict=True))
    suite = Suite("both", sets, weights, ks)
    return Plan(config, suite, PROBLEMS, dict(zip(PROBLEMS, ks, strict=True)), "plain", GraderConfig())


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Slow(ScriptedBackend):
    """Each step takes 2 s, and the n-th one may fail."""

    def __init__(self, tokenizer, clock, fails_at=0):
        said = {
            f"{p.problem}\n": [rf"so \boxed{{{p.answer}}}", rf"hm \boxed{{{int(p.answer) + 7}}}"] for ps in PROBLEMS.values() for p in ps
        }
        super().__init__(tokenizer, respond(tokenizer, said), capacity=3)
        self.clock, self.fails_at, self.calls = clock, fails_at, 0

    def step(self):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("the engine broke")
        self.clock.now += 2.0
        return super().step()


class Ticket(list):
    done = True


class Grader:
    """By equality of the boxed text; waiting for a batch takes 5 s."""

    def __init__(self, clock):
        self.clock, self.batches, self.pairs = clock, 0, []

    @property
    def cpu_s(self):
        return 2.0 * self.batches  # in workers, while the engine samples

    def submit(self, items):
        return Ticket(items)

    def collect(self, ticket):
        self.clock.now += 5.0
        self.batches += 1
        self.pairs += [(p.answer, text) for p, text in ticket]
        return [Grade(float(f"boxed{{{p.answer}}}" in text), "right" if f"boxed{{{p.answer}}}" in text else "wrong") for p, text in ticket]

    def close(self):
        pass


def measured(tmp_path, tokenizer, the_plan, name="eval", fails_at=0, devices=4):
    clock = Clock()
    ledger = Ledger(devices, "some core", clock=clock)
    clock.now += 3.0  # loading
    backend, grader = Slow(tokenizer, clock, fails_at), Grader(clock)
    (tmp_path / name).mkdir(exist_ok=True)
    folder = RunFolder(tmp_path / name)
    try:
        return folder, evaluate_into(folder, the_plan, backend, grader, ledger), backend, grader, clock
    except RuntimeError:
        return folder, None, backend, grader, clock


@pytest.mark.parametrize("greedy", [False, True])
def test_phases_sum_to_the_wall_time_and_device_hours_are_devices_times_time(tmp_path, tiny_tokenizer, greedy):
    _, row, backend, grader, clock = measured(tmp_path, tiny_tokenizer, plan(greedy=greedy))
    ledger = row["ledger"]
    assert ledger["wall_s"] == clock.now == sum(ledger["seconds"].values())
    spent = {name: s for name, s in ledger["seconds"].items() if s}
    assert spent == {"sampling": 2.0 * backend.calls, "grading": 5.0 * grader.batches, "other": 3.0}
    assert ledger["device_hours"] == pytest.approx(4 * clock.now / 3600)
    assert {name: s * 4 for name, s in ledger["seconds"].items()} == ledger["device_seconds"]
    assert ledger["overlapped"] == {"grading_cpu_s": 2.0 * grader.batches}
    assert f"beside it {2 * grader.batches} s of CPU time in grading workers" in evaluation_grid(row).text()
    validate(row)


def test_the_row_follows_from_the_samples(tmp_path, tiny_tokenizer):
    folder, row, *_ = measured(tmp_path, tiny_tokenizer, plan(greedy=True))
    assert json.loads((folder.path / "summary.json").read_text()) == row
    rows = read_rows(folder.path / "samples.jsonl")
    assert len(rows) == 7 * 5 and sorted(p.name for p in folder.path.iterdir()) == ["samples.jsonl", "summary.json"]
    shares = {}
    for name, problems in PROBLEMS.items():
        mine = [r for r in rows if r["set"] == name and r["temperature"] == 1]
        per_problem = [[r["correct"] for r in mine if r["id"] == p.id] for p in problems]
        assert [(r["id"], r["sample"]) for r in mine] == [(p.id, i) for p in problems for i in range(4)]
        found = row["results"]["model"][name]
        assert found["right"] == [sum(right) for right in per_problem]
        shares[name] = np.mean([np.mean(right) for right in per_problem])
        assert found["pass_at_1"]["mean"] == pytest.approx(shares[name])
        assert found["pass_at"]["4"]["mean"] == pytest.approx(np.mean([any(right) for right in per_problem]))
        lengths = [r["tokens"] for r in mine]
        assert found["length"] == pytest.approx({"mean": np.mean(lengths), "median": np.median(lengths), "p95": np.percentile(lengths, 95)})
        assert found["sampled_tokens"] == sum(lengths)
        votes = [0.5 if sum(right) == 2 else float(sum(right) > 2) for right in per_problem]  # a right candidate and a wrong one
        assert found["maj_at_k"]["mean"] == pytest.approx(np.mean(votes))
        assert found["greedy"]["pass_at_1"]["mean"] in (0.0, 0.25, 1 / 3, 0.5, 2 / 3, 0.75, 1.0)
    whole = row["overall"]["model"]
    assert whole["weights"] == {"easy": 0.25, "hard": 0.75}
    assert whole["pass_at_1"]["mean"] == pytest.approx(shares["easy"] / 4 + 3 * shares["hard"] / 4)
    assert 0 < whole["pass_at_1"]["mean"] < 1 and whole["maj_at_k"] is not None
    assert len({r["response"] for r in rows}) > 7
    text = evaluation_grid(row).text()
    assert f"{100 * whole['pass_at_1']['mean']:.1f} [" in text and "mean weighted easy 0.250, hard 0.750" in text


def test_sets_with_different_k(tmp_path, tiny_tokenizer, capsys):
    _, row, *_ = measured(tmp_path, tiny_tokenizer, plan(ks=(1, 6)))
    easy, hard = (row["results"]["model"][name] for name in ("easy", "hard"))
    assert (easy["k"], easy["pass_at"], easy["maj_at_k"], hard["k"], list(hard["pass_at"])) == (1, {}, None, 6, ["2", "4", "6"])
    assert row["protocol"]["k"] == {"easy": 1, "hard": 6}
    assert "responses 22/22" in capsys.readouterr().err
    assert row["overall"]["model"]["maj_at_k"] is None and row["overall"]["model"]["pass_at"] == {}
    validate(row)


def timeless(row):
    return {name: value for name, value in row.items() if name not in ("ledger", "environment")}


def test_a_row_without_newer_fields_is_still_a_row(tmp_path, tiny_tokenizer):
    _, row, *_ = measured(tmp_path, tiny_tokenizer, plan())
    assert row.pop("weights_sha256") == {"model": None}, "a scripted engine has no weights"
    del row["ledger"]["overlapped"]
    assert validate(row).ledger.overlapped is None
    evaluation_grid(row)


@pytest.mark.parametrize("fails_at", [1, 25, 60, 90])
def test_an_evaluation_that_broke_off_ends_as_the_whole_one_and_its_time_counts(tmp_path, tiny_tokenizer, fails_at):
    options = plan(greedy=True)
    whole, row, backend, *_ = measured(tmp_path, tiny_tokenizer, options, "whole")
    assert backend.calls > 90
    cut, nothing, _, _, before = measured(tmp_path, tiny_tokenizer, options, "cut", fails_at)
    assert nothing is None and not (cut.path / "summary.json").exists()
    kept = read_rows(cut.path / "samples.jsonl")
    with (cut.path / "samples.jsonl").open("w") as file:
        for each in reversed(kept[1:]):  # problems came in in another order, and one of them not whole
            file.write(json.dumps(each) + "\n")
        file.write('{"set": "easy", "id": "e0", "sam')  # cut off in the middle of a line
    graded = json.loads((cut.path / "ledger.json").read_text())["overlapped"]["grading_cpu_s"]
    _, resumed, again, grader, after = measured(tmp_path, tiny_tokenizer, options, "cut")
    assert timeless(resumed) == timeless(row)
    assert (cut.path / "samples.jsonl").read_bytes() == (whole.path / "samples.jsonl").read_bytes()
    assert again.calls < backend.calls or not kept
    assert resumed["ledger"]["wall_s"] == before.now + after.now  # both sessions
    assert resumed["ledger"]["overlapped"]["grading_cpu_s"] == graded + 2.0 * grader.batches
    assert not (cut.path / "ledger.json").exists()


def test_the_ledger_is_kept_while_sampling_goes_on(tmp_path, tiny_tokenizer, monkeypatch):
    saved = []

    def spy(path, text):
        if path.name == "ledger.json":
            saved.append(json.loads(text)["wall_s"])
        write_aside(path, text)

    monkeypatch.setattr(job, "write_aside", spy)
    *_, clock = measured(tmp_path, tiny_tokenizer, plan())
    assert saved[-1] == clock.now and len(saved) > 3
    longest = max(b - a for a, b in zip([0.0, *saved[:-1]], saved, strict=True))
    assert longest < 70  # the first problem takes 60 s of the 268


def test_too_many_failed_gradings_stop_it_and_get_another_try(tmp_path, tiny_tokenizer, monkeypatch):
    class Failing(Grader):
        def collect(self, ticket):
            return [
                Grade(float("nan"), "failed") if "easy 1" in p.problem else g
                for (p, _), g in zip(ticket, super().collect(ticket), strict=True)
            ]

    monkeypatch.setitem(globals(), "Grader", Failing)
    folder, row, *_ = measured(tmp_path, tiny_tokenizer, plan())
    assert row is None and sum(r["correct"] is None for r in read_rows(folder.path / "samples.jsonl")) == 4
    monkeypatch.undo()
    _, row, backend, *_ = measured(tmp_path, tiny_tokenizer, plan())
    assert row is not None and row["results"]["model"]["easy"]["failed"] == 0 and backend.calls < 60


# Votes.


def sample(i, answer, correct, kind="", problem="p"):
    kind = kind or ("right" if correct else "wrong")
    return {"set": "s", "id": problem, "sample": i, "temperature": 1.0, "answer": answer, "correct": correct, "kind": kind}


def result(problems, k):
    shape = (len(problems), k)
    return {"s": SetResult("s", tuple(problems), 1.0, np.zeros(shape), np.zeros(shape, np.int32), np.zeros(shape, bool), {}, 0)}


class Halves:
    """Takes 0.5 and 1/2 for the same, and nothing else that differs."""

    def __init__(self):
        self.pairs = []

    def submit(self, items):
        return items

    def collect(self, items):
        self.pairs += [(p.answer, text.removeprefix(r"\boxed{").removesuffix("}")) for p, text in items]
        same = [{a, b} <= {"0.5", "1/2", r"\frac12"} for a, b in self.pairs[-len(items) :]]
        return [Grade(float(s), "right" if s else "wrong") for s in same]


def test_equivalent_answers_vote_together():
    rows = [
        sample(i, a, c)
        for i, (a, c) in enumerate([("3", True), ("3", True), ("0.5", False), ("1/2", False), (r"\frac12", False), (None, False)])
    ]
    grader = Halves()
    assert with_votes(result(["p"], 6), rows, "equivalent", grader)["s"].votes.tolist() == [0.0]  # three halves beat two threes
    assert sorted(grader.pairs) == sorted([("0.5", "1/2"), ("0.5", r"\frac12"), ("1/2", r"\frac12")])  # no pair with a right one
    grader = Halves()
    assert with_votes(result(["p"], 6), rows, "string", grader)["s"].votes.tolist() == [1.0] and not grader.pairs


def test_right_answers_are_one_candidate_and_unreadable_ones_equal_nothing():
    rows = [sample(i, a, c) for i, (a, c) in enumerate([("2/4", True), ("4/8", True), ("9", False), ("9", False), ("8", False)])]
    grader = Halves()
    assert with_votes(result(["p"], 5), rows, "equivalent", grader)["s"].votes.tolist() == [0.5]  # two against two
    assert with_votes(result(["p"], 5), rows, "string", grader)["s"].votes.tolist() == [0.0]
    assert grader.pairs == [("9", "8")]
    unread = [sample(0, "0.5", False, "unparsable"), sample(1, "1/2", False, "timed_out"), sample(2, "1", True)]
    grader = Halves()
    assert with_votes(result(["p"], 3), unread, "equivalent", grader)["s"].votes.tolist() == pytest.approx([1 / 3]) and not grader.pairs


def test_votes_of_several_problems_are_graded_in_one_batch_each_pair_once():
    rows = [sample(i, a, False, problem=p) for p in "pqr" for i, a in enumerate(["0.5", "1/2"])]
    rows += [dict(sample(0, "7", True, problem="p"), temperature=0.0)]  # a greedy one does not vote
    grader = Halves()
    votes = with_votes(result(["p", "q", "r"], 2), rows, "equivalent", grader)["s"].votes
    assert votes.tolist() == [0, 0, 0] and grader.pairs == [("0.5", "1/2")]


def test_a_pair_that_cannot_be_graded_is_an_error():
    class Broken(Halves):
        def collect(self, items):
            return [Grade(float("nan"), "failed") for _ in items]

    rows = [sample(0, "1", False), sample(1, "2", False)]
    with pytest.raises(RuntimeError, match="failed on 1 of 1 pairs of answers"):
        with_votes(result(["p"], 2), rows, "equivalent", Broken())


# Options.


def test_segments_fill_the_responses():
    config = EvalConfig("tiny", k=8, sampler="segments", max_response_tokens=60, segments=SegmentOptions(depth=5, initial=(2,)))
    tree = config.sampler_of(8)
    assert (tree.name, tree.leaves_per_tree, tree.segment_tokens, tree.max_response_tokens) == ("segments", 8, 12, 60)
    assert EvalConfig.from_dict(config.to_dict(), "x") == config
    assert replace(config, sampler="chains").sampler_of(3).leaves_per_tree == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "^k is 0; allowed: a whole number from 1 to 65536 or none"),
        ({"k": 2, "temperature": 0.0}, "temperature 0 is greedy decoding"),
        ({"k": 1, "temperature": 0.0, "greedy": True}, "temperature 0 is greedy decoding"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"max_response_tokens": 0}, "^max_response_tokens is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"sampler": "segments", "max_response_tokens": 100}, "^segments.depth is 8, which does not divide max_response_tokens = 100"),
        ({"sampler": "segments", "segments": SegmentOptions(depth=7)}, "^segments.depth is 7, which does not divide"),
        ({"sampler": "segments", "k": 4}, r"^segments.initial is \(2, 8\).* to k = 4"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig("tiny", **options)


def test_segments_have_levels():
    with pytest.raises(ValueError, match=r"^segments.depth is 0; allowed: a whole number from 1 to 4096$"):
        SegmentOptions(depth=0)


def test_a_suite_without_one_template_wants_one(monkeypatch):
    sets = (spec("easy", 2), replace(spec("hard", 2), template="chat"))
    suite = Suite("both", sets, (1.0, 1.0), (2, 2))
    monkeypatch.setattr(Suite, "load", lambda self, data_dir=None: PROBLEMS)
    monkeypatch.setattr(job, "find_suite", lambda name: suite)
    with pytest.raises(ValueError, match="the sets of suite both have different templates: chat, plain; choose one"):
        Plan.of(EvalConfig("tiny"))
    assert Plan.of(EvalConfig("tiny", template="plain")).k == Counter(easy=2, hard=2)


def test_the_final_suite_of_a_run_comes_from_local_files(tmp_path, monkeypatch):
    """As that of `rlzoo eval`, under the option's own name."""
    problems = [Problem(f"p{i}", f"What is {i} + 1?", str(i + 1)) for i in range(3)]
    made = SetSpec(
        "mine", 3, checksum(problems), answers_checksum(problems), "none", "plain", 4, GraderConfig(), hub=Hub("o/n", "test", {})
    )
    monkeypatch.setattr("rlzoo.evaluation.suites.find_suite", lambda name: Suite(name, (made,), (1.0,), (4,)))
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps({"id": p.id, "problem": p.problem, "answer": p.answer}) + "\n" for p in problems)
    )
    config = build([("test", {"algo": registry.names("algorithm")[0], "evaluation": {"suite": "some", "data_dir": str(tmp_path)}})])
    assert final_suite(config) == {"mine": problems}
    without = build([("", config.to_dict()), ("", {"evaluation": {"data_dir": ""}})])
    with pytest.raises(ValueError, match=r"mine: no hub revision .* give --evaluation\.data-dir, a folder with mine\.jsonl"):
        final_suite(without)
    (tmp_path / "mine.jsonl").write_text("")
    with pytest.raises(ValueError, match="test set mine"):
        final_suite(config)
    assert final_suite(build([("", config.to_dict()), ("", {"evaluation": {"suite": "none"}})])) == {}

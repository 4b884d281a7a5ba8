"""`rlzoo compare` on fabricated run folders: arms, refusals, the table against sums done by hand, and what ends a run at a budget."""

import json

import numpy as np
import pytest

from rlzoo.algorithm import Schedule
from rlzoo.cli import main
from rlzoo.config import build
from rlzoo.evaluation.arms import parse_arms
from rlzoo.evaluation.plan import Plan, run_plan
from rlzoo.evaluation.rows import Protocol, describe_sets, result_row
from rlzoo.evaluation.runner import SetResult
from rlzoo.evaluation.suites import find_suite
from rlzoo.store.cost import Ledger, spent, totals
from rlzoo.store.environment import environment
from rlzoo.store.runs import RunFolder

SUITE = find_suite("mini")
SETS = SUITE.load()
K = 4


def make_run(path, algo, seed, right, *, done=True, **protocol):
    """A finished run; of every problem's K responses, a share of `right` is right on average."""
    config = build([("test", {"algo": algo, "seed": seed})]).to_dict()
    folder = RunFolder.create(path, config)
    folder.log({"step": 0, "dev/pass_at_1": 0.2, "dev/length": 50.0})
    folder.log({"step": 1, "sampled_tokens": 100, "update/trained": 60, "device_hours": 0.5, "total_sampled_tokens": 100})
    end = {"device_hours": 1.0, "total_sampled_tokens": 250, "dev/pass_at_1": 0.6, "dev/length": 60.0}
    folder.log({"step": 2, "sampled_tokens": 150, "update/trained": 40, **end})
    draws = np.random.default_rng([seed, len(algo)])
    results = {}
    for name, problems in SETS.items():
        correct = (draws.random((len(problems), K)) < right).astype(float)
        lengths = np.full(correct.shape, 20, np.int32)
        kinds = {"right": int(correct.sum()), "wrong": int((1 - correct).sum())}
        ids = tuple(p.id for p in problems)
        results[name] = SetResult(name, ids, 1.0, correct, lengths, lengths > 30, kinds, int(lengths.sum()), None, correct.mean(axis=1))
    told = {"template": "plain", "grader": "g", "k": dict.fromkeys(SETS, K), "greedy": False, "temperature": 1.0, "max_response_tokens": 9}
    told |= {"sampler": {"name": "chains"}, "engine": "torch float32", "vote": None, "seed": 0}
    summary = result_row(
        kind="run",
        arm=algo,
        config=config,
        suite="mini",
        testsets=describe_sets(SUITE, SETS),
        protocol=Protocol(**(told | protocol)),
        results={"trained": results},
        weights=SUITE.weights_by_set,
        ledger=Ledger().as_dict(),
        environment=environment(),
    )
    if done:
        folder.write_summary(summary | {"algo": algo, "steps": 2, "sampled_tokens": 250})
    return str(path)


def complaint(capsys, *argv):
    """The one line that a refusal prints."""
    assert main(["compare", *argv]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("rlzoo: ") and "\n" not in said
    return said


def runs(tmp_path, rates=(("grpo", 0.3), ("treerpo", 0.6)), seeds=(0, 1, 2), **changes):
    return [make_run(tmp_path / f"{algo}-s{seed}", algo, seed, right, **changes) for algo, right in rates for seed in seeds]


def test_finished_runs_are_grouped_compared_and_written(tmp_path, capsys):
    paths = runs(tmp_path)
    out = tmp_path / "out"
    assert main(["compare", *paths, "--out", str(out), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((out / "compare.json").read_text())
    assert set(printed["arms"]) == {"grpo", "treerpo"} and printed["arms"]["grpo"]["seeds"] == [0, 1, 2]
    plain = [json.loads((tmp_path / f"grpo-s{seed}" / "summary.json").read_text()) for seed in range(3)]
    sets = [[np.mean(np.array(m["right"]) / np.array(m["graded"])) for m in row["results"]["trained"].values()] for row in plain]
    assert printed["arms"]["grpo"]["pass_at_1"]["overall"]["mean"] == pytest.approx(np.mean(sets))
    costs = {kind: e["mean"] for kind, e in printed["arms"]["grpo"]["costs"].items()}
    assert costs == {"tokens": 250, "trained-tokens": 100, "device-hours": 1.0}
    (pair,) = printed["pairs"]
    assert pair["winner"] == "treerpo" and 0.25 < pair["overall"]["mean"] < 0.35
    assert "cannot be seen with 3 seeds" in pair["verdict"] and set(pair["sets"]) == set(SETS)
    page = (out / "compare.md").read_text()
    assert pair["verdict"] in page and "detectable" in page and "dev Pass@1 of 60.0 % reached at 250 sampled tokens" in page
    curve = printed["arms"]["grpo"]["curves"]["dev"]["pass_at_1"]["sampled tokens"]
    assert curve["seeds"] == 3 and curve["lines"][0] == {"x": [0, 250], "y": [0.2, 0.6]}
    ends = {"steps": 2, "sampled tokens": 250, "trained tokens": 100, "device-hours": 1.0}
    for measures in printed["arms"]["grpo"]["curves"].values():
        assert all(set(axes) == set(ends) for axes in measures.values())
    assert {cost: r["costs"] for cost, r in printed["arms"]["grpo"]["reach"].items()} == {cost: [end] * 3 for cost, end in ends.items()}
    for cost, end in ends.items():
        assert printed["arms"]["grpo"]["frontier"][cost] == {"x": [0, end], "y": [0.2, 0.6]}
        assert printed["frontier"][cost] == [{"from": 0, "pass_at_1": 0.2, "arm": "grpo"}]
    assert "most for its trained tokens: grpo from 0" in page


def test_the_frontier_says_which_arm_gives_most_for_a_cost(tmp_path, capsys):
    """One arm is at .4 after 100 tokens and falls, the other at .3 after 100 and at .5 after 200: they meet at 150."""

    def measured(name, algo, *rows):
        path = tmp_path / name
        make_run(path, algo, 0, 0.5)
        lines = [{"step": i, "sampled_tokens": tokens, "device_hours": i, "dev/pass_at_1": p} for i, (tokens, p) in enumerate(rows)]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    first = measured("a", "grpo", (0, 0.2), (100, 0.4), (100, 0.3), (100, 0.35))
    second = measured("b", "treerpo", (0, 0.2), (100, 0.3), (100, 0.5))
    assert main(["compare", first, second, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["arms"]["grpo"]["frontier"]["sampled tokens"] == {"x": [0, 100, 300], "y": [0.2, 0.4, 0.4]}
    (a, b) = told["frontier"]["sampled tokens"]
    assert a == {"from": 0, "pass_at_1": 0.2, "arm": "grpo"} and b["arm"] == "treerpo"
    assert (b["from"], b["pass_at_1"]) == (pytest.approx(150), pytest.approx(0.4))
    assert told["frontier"]["trained tokens"] == [], "nothing was trained on"
    assert main(["compare", first, second]) == 0
    said = capsys.readouterr().out
    assert "most for its sampled tokens: grpo from 0, treerpo from 150" in said
    cells = [line.split()[2:] for line in said.splitlines() if line.startswith("sampled tokens ")]
    assert cells == [["50", "30.0", "25.0"], ["100", "40.0", "30.0"], ["150", "40.0", "40.0"], ["200", "40.0", "50.0"]]


def test_equal_arms_have_no_winner_and_a_table_is_printed(tmp_path, capsys):
    assert main(["compare", *runs(tmp_path, (("grpo", 0.5), ("treerpo", 0.5)))]) == 0
    said = capsys.readouterr().out
    assert "no difference shown between grpo and treerpo" in said and "device-hours" in said


@pytest.mark.parametrize(
    ("field", "value"),
    [("template", "chat"), ("grader", "h"), ("k", dict.fromkeys(SETS, 8)), ("max_response_tokens", 7), ("engine", "other")],
)
def test_another_protocol_is_refused_unless_allowed(field, value, tmp_path, capsys):
    paths = [*runs(tmp_path, seeds=(0, 1)), make_run(tmp_path / "other", "treerpo", 2, 0.5, **{field: value})]
    assert f"differ in {field}:" in complaint(capsys, *paths)
    assert main(["compare", *paths, "--allow", field]) == 0
    assert f"allowed: {paths[0]} and {paths[-1]} differ in {field}" in capsys.readouterr().out


def test_what_cannot_be_compared_is_refused_in_a_sentence(tmp_path, capsys):
    first, second = runs(tmp_path, seeds=(0,))
    assert "one of the three" in complaint(capsys)
    assert "one of the three" in complaint(capsys, first, "--arms", "grpo,treerpo")
    assert "a comparison needs two" in complaint(capsys, first)
    assert "no run folder" in complaint(capsys, first, str(tmp_path / "none"))
    assert "no such field" in complaint(capsys, first, second, "--allow", "colour")
    unfinished = make_run(tmp_path / "open", "treerpo", 1, 0.5, done=False)
    assert "has not finished" in complaint(capsys, first, unfinished)
    twice = make_run(tmp_path / "twice", "grpo", 0, 0.5)
    assert "a seed twice" in complaint(capsys, first, second, twice)
    (tmp_path / "twice" / "summary.json").write_text('{"schema_version": 1')
    assert "is not JSON" in complaint(capsys, first, second, twice)


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ("grpo", "needs two arms"),
        ("grpo,grpo", "given twice"),
        ("grpo,nothing", "nothing"),
        ("grpo,treerpo@colour=red", "unknown option 'colour'"),
        ("grpo,treerpo@adv_norm=red", "red"),
        ("grpo,treerpo@adv_norm", "OPTION=VALUE"),
        ("grpo,missing.toml", "missing.toml"),
    ],
)
def test_bad_arms_are_refused(arms, said, tmp_path, capsys):
    assert said in complaint(capsys, "--arms", arms, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_arms_take_overrides_files_and_what_is_common(tmp_path):
    (tmp_path / "mine.toml").write_text('algo = "grpo"\n[schedule]\nsteps = 7\n')
    text = f"grpo,treerpo@adv_norm=group_std@optim.lr=1e-3,{tmp_path / 'mine.toml'}"
    found = parse_arms(text, [("common", {"schedule": {"steps": 3}})])
    assert list(found) == ["grpo", "treerpo@adv_norm=group_std@optim.lr=1e-3", "mine"]
    steps = [c.algorithm.schedule.steps for c in found.values()]
    changed = list(found.values())[1]
    assert steps == [3, 3, 7] and changed.algorithm.credit.adv_norm == "group_std" and changed.algorithm.optim.lr == 1e-3


def test_a_budget_needs_a_kind_and_a_plan_what_it_can_do(tmp_path):
    for bad in ({"limit": "tokens"}, {"budget": 5.0}):
        with pytest.raises(ValueError, match="a limit needs a budget above 0"):
            Schedule(**bad)
    with pytest.raises(ValueError, match=r"schedule.budget is -1.0; allowed: a number of at least 0"):
        Schedule(limit="tokens", budget=-1.0)
    arms = parse_arms("grpo,treerpo")
    for bad in ({"seeds": 0}, {"jobs": 0}, {"budget": 0.0}, {"budget": 1.5}):
        with pytest.raises(ValueError, match="must be"):
            Plan(**({"arms": arms, "seeds": 1, "out": tmp_path} | bad))
    with pytest.raises(ValueError, match="nothing to compare"):
        Plan(parse_arms("grpo,treerpo", [("", {"evaluation": {"suite": "none"}})]), 1, tmp_path)


def test_costs_are_summed_over_steps():
    rows = [
        {"step": 0, "dev/length": 1.0},
        {"step": 1, "sampled_tokens": 3, "update/trained": 2.0, "device_hours": 0.1},
        {"step": 2, "sampled_tokens": 4, "device_hours": 0.3},
    ]
    assert spent(rows) == {"steps": 2, "tokens": 7, "trained-tokens": 2, "device-hours": 0.3}
    assert [total["tokens"] for total in totals(rows)] == [0, 3, 7] and [total["trained-tokens"] for total in totals(rows)] == [0, 2, 2]
    assert spent([]) == dict.fromkeys(("steps", "tokens", "trained-tokens", "device-hours"), 0)


def test_without_a_budget_the_cheapest_arm_sets_it(tmp_path, monkeypatch):
    """A step costs one arm 10 tokens + its seed, the other 25; both have 4 steps."""
    ran = []

    def fake(place, config):
        folder = RunFolder.create(place, config.to_dict())
        schedule, tokens = config.algorithm.schedule, 25 if config.algo == "grpo" else 10 + config.seed
        total = 0
        for step in range(1, schedule.steps + 1):
            folder.log({"step": step, "sampled_tokens": tokens})
            total += tokens
            if schedule.limit == "tokens" and total >= schedule.budget:
                break
        ran.append((place.parent.name, config.algo, config.seed, schedule.limit, schedule.budget))

    monkeypatch.setattr("rlzoo.evaluation.plan._run_cell", fake)
    arms = parse_arms("grpo,treerpo", [("", {"schedule": {"steps": 4}})])
    done, budget = run_plan(Plan(arms, 2, tmp_path, "tokens"))
    assert budget == 40 and list(done) == ["grpo", "treerpo"] and [p.name for p in done["grpo"]] == ["grpo-s0", "grpo-s1"]
    pilots = [("pilots", "grpo", 0, "none", 0.0), ("pilots", "treerpo", 0, "none", 0.0)]
    whole = [("runs", "treerpo", seed, "none", 0.0) for seed in (0, 1)]
    assert ran == [*pilots, *whole, *(("runs", "grpo", seed, "tokens", 40.0) for seed in (0, 1))]
    assert [len(RunFolder.open(p).metrics()) for p in done["grpo"]] == [2, 2]


def test_matching_steps_takes_the_fewest(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr("rlzoo.evaluation.plan._run_cell", lambda place, config: steps.append(config.algorithm.schedule.steps))
    arms = parse_arms("grpo@steps=5,treerpo@steps=3")
    assert run_plan(Plan(arms, 1, tmp_path))[1] == 3 and run_plan(Plan(arms, 1, tmp_path, budget=9))[1] == 9
    assert steps == [3, 3, 9, 9]


def test_failed_runs_are_told_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr("rlzoo.evaluation.plan._run_cell", lambda place, config: f"{place}: broke" if config.seed else None)
    with pytest.raises(RuntimeError, match=r"2 of 4 runs failed.*grpo-s1: broke"):
        run_plan(Plan(parse_arms("grpo,treerpo"), 2, tmp_path))

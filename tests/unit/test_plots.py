"""The data behind the report's plots: arms, curves with bands, frontiers, lengths, ledgers."""

import numpy as np
import pytest

from rlzoo import registry
from rlzoo.report.plots import MOST_POINTS, RunData, arms, curves, frontiers, ledger, lengths, points, seed_band
from rlzoo.store.runs import RunFolder
from rlzoo.store.trees import read_trees
from tests.summaries import make_run

ALGORITHMS = registry.names("algorithm")


def run_data(path, **options):
    folder = RunFolder.open(make_run(path, **options))
    return RunData(folder.name, folder, folder.config(), folder.metrics(), folder.summary())


def test_arms_are_runs_that_differ_in_the_seed_alone(tmp_path):
    runs = [
        run_data(tmp_path / "a"),
        run_data(tmp_path / "b", seed=1, trackers=["none"], evaluation={"data_dir": "elsewhere"}),
        run_data(tmp_path / "c", optim={"lr": 0.5}),
        run_data(tmp_path / "d", algo=ALGORITHMS[1]),
    ]
    first, second = ALGORITHMS[:2]
    labels = {arm: [run.label for run in members] for arm, members in arms(runs).items()}
    assert labels == {f"{first} (a)": ["a", "b"], f"{first} (c)": ["c"], second: ["d"]}


def test_curves_and_bands(tmp_path):
    a, b = run_data(tmp_path / "a"), run_data(tmp_path / "b", seed=1, steps=(1, 2))
    alone = curves([a])["dev"]["pass_at_1"]["sampled tokens"][ALGORITHMS[0]]
    assert alone["lines"] == [{"x": [0, 100, 200, 300], "y": pytest.approx([0.4, 0.5, 0.6, 0.7])}]
    assert alone["band"]["low"] == pytest.approx([0.3, 0.4, 0.5, 0.6]) and alone["seeds"] == 1
    both = curves([a, b])
    assert both["dev"]["length"]["steps"][ALGORITHMS[0]]["band"]["x"] == [0, 1, 2]
    assert both["training"]["pass_at_1"]["device-hours"][ALGORITHMS[0]]["lines"][0]["x"] == [0.5, 1.0, 1.5]


def test_trained_tokens_and_the_frontier_of_the_mean_over_seeds(tmp_path):
    a, b = run_data(tmp_path / "a"), run_data(tmp_path / "b", seed=1)
    (line,) = curves([a])["dev"]["pass_at_1"]["trained tokens"][ALGORITHMS[0]]["lines"]
    assert line == {"x": [0, 30, 60], "y": pytest.approx([0.5, 0.6, 0.7])}, "the first step trained on nothing: its value is the last at 0"
    low = [row | ({"dev/pass_at_1": 0.0} if row["step"] == 2 else {}) for row in b.rows]
    found = frontiers([a, RunData("b", b.folder, b.config, low, None)])
    assert found["sampled tokens"] == {ALGORITHMS[0]: {"x": pytest.approx([0, 100, 250, 300]), "y": pytest.approx([0.4, 0.5, 0.5, 0.7])}}
    assert found["steps"][ALGORITHMS[0]]["x"] == [0, 1, 2.5, 3] and found["device-hours"][ALGORITHMS[0]]["x"][-1] == 1.5
    never = RunData("n", a.folder, a.config, [{"step": 1, "pass_at_1": 0.5}], None)
    assert frontiers([never]) == {axis: {} for axis in found}


def test_band_over_seeds_by_hand():
    first, second = (np.array([0.0, 10.0]), np.array([0.0, 10.0])), (np.array([2.0, 4.0, 12.0]), np.array([8.0, 4.0, 4.0]))
    x, low, mean, high = seed_band([first, second])
    assert x.tolist() == [2, 4, 10] and low.tolist() == [2, 4, 4] and high.tolist() == [8, 4, 10] and mean.tolist() == [5, 4, 7]
    apart = seed_band([(np.array([0.0, 1.0]), np.array([0.0, 1.0])), (np.array([2.0, 3.0]), np.array([0.0, 1.0]))])
    assert [len(v) for v in apart] == [0, 0, 0, 0]


def test_long_runs_are_thinned_but_keep_both_ends(tmp_path):
    run = run_data(tmp_path / "a", steps=(1,))
    many = RunData("a", run.folder, run.config, [{"step": s, "pass_at_1": 0.5, "length": float(s)} for s in range(1, 2001)], None)
    line = curves([many])["training"]["length"]["steps"][ALGORITHMS[0]]["lines"][0]
    assert len(line["x"]) <= MOST_POINTS and (line["x"][0], line["x"][-1]) == (1, 2000) and line["x"] == line["y"]
    assert points([{"step": 1, "pass_at_1": None}], "pass_at_1", "steps")[0].tolist() == []


def test_lengths(tmp_path):
    run = run_data(tmp_path / "a")
    stored = {step: read_trees(run.folder.trees_path(step)) for step in (3, 1)}
    found = lengths([run], {"a": stored})
    assert [h["what"] for h in found] == ["step 1", "step 3"]
    assert found[0]["n"] == sum(found[0]["counts"]) == 6 and found[0]["mean"] == pytest.approx((3 + 5 + 1) / 3)
    assert found[0]["counts"][1] == found[0]["counts"][3] == found[0]["counts"][5] == 2
    for model, tokens in (("base", 4), ("trained", 9)):
        with run.folder.eval_sink(model) as sink:
            sink({"temperature": 1.0, "tokens": tokens})
            sink({"temperature": 0.0, "tokens": 99})
    measured = lengths([run], {"a": stored})
    assert [(h["what"], h["n"], h["mean"]) for h in measured] == [("base", 1, 4), ("trained", 1, 9)]


def test_ledger(tmp_path):
    run = run_data(tmp_path / "a")
    done = ledger(run)
    run.summary["ledger"]["overlapped"] = {"grading_cpu_s": 12.345}
    assert done["beside"] == [] and ledger(run)["beside"][0].startswith("beside it 12.3 s of CPU time")
    assert done["hours"]["sampling"] == 1 and done["hours"]["update"] == 0.5 and sum(done["hours"].values()) == 1.5 and done["finished"]
    running = ledger(run_data(tmp_path / "b", done=False))
    assert running["hours"]["sampling"] == 1.5 and running["devices"] == 2 and not running["finished"]

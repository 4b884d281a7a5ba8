import io
import json

import numpy as np
import pytest
from rich.console import Console

from rlzoo.evaluation.runner import SetResult
from rlzoo.evaluation.stats import clustered_mean, paired_difference
from rlzoo.report.tables import OVERALL, Cost, final_table, markdown_table, plain_table, print_table, render_table
from rlzoo.report.text import count, percent, points


def result(name, right, k, *, greedy=None, length=50, failed=0):
    correct = np.zeros((len(right), k))
    for i, r in enumerate(right):
        correct[i, :r] = 1
    correct.ravel()[:failed] = np.nan
    lengths = np.full(correct.shape, length, np.int32)
    low = None if greedy is None else result(name, greedy, 1, length=length)
    ids = tuple(f"p{i}" for i in range(len(right)))
    return SetResult(name, ids, 1.0, correct, lengths, correct < -1, {}, int(lengths.sum()), low)


BASE = {"a": result("a", [1, 2, 0, 4], 4, greedy=[1, 0, 0, 1]), "b": result("b", [0, 1], 4, greedy=[0, 1])}
TRAINED = {"a": result("a", [3, 4, 2, 4], 4, greedy=[1, 1, 0, 1], length=25), "b": result("b", [2, 3], 4, greedy=[1, 1], length=25)}
COST = Cost(1_234_567, 0.0815)


def table():
    return final_table(BASE, TRAINED, COST, device="cpu core", notes=["a note"])


def test_lines_and_gains_are_the_statistics_of_the_results():
    made = table()
    assert [(line.set, line.model) for line in made.lines] == [(s, m) for s in ("a", "b", OVERALL) for m in ("base", "trained")]
    by = {(line.set, line.model): line for line in made.lines}
    assert by["a", "base"].pass_at_1 == clustered_mean([0.25, 0.5, 0, 1])
    assert by["a", "trained"].greedy == TRAINED["a"].greedy.pass_at_1
    assert by["a", "base"].pass_at_k.mean == 0.75
    assert by[OVERALL, "base"].pass_at_1.mean == pytest.approx((1.75 / 4 + 0.25 / 2) / 2)  # a mean over sets, not over problems
    assert by[OVERALL, "trained"].length == 25
    assert (by[OVERALL, "base"].cost, by[OVERALL, "trained"].cost, by["a", "trained"].cost) == (Cost(0, 0), COST, None)
    gain = {g.set: g for g in made.gains}
    assert gain["a"].pass_at_1 == paired_difference([0.25, 0.5, 0, 1], [0.75, 1, 0.5, 1])
    assert gain["a"].over_base_greedy == paired_difference([1, 0, 0, 1], [0.75, 1, 0.5, 1])
    assert gain["a"].greedy == paired_difference([1, 0, 0, 1], [1, 1, 0, 1])
    assert gain[OVERALL].pass_at_1.mean == pytest.approx((gain["a"].pass_at_1.mean + gain["b"].pass_at_1.mean) / 2)
    assert gain[OVERALL].length_ratio == 0.5


def test_overall_is_weighted_as_the_suite_says():
    made = final_table(BASE, TRAINED, COST, weights={"a": 3.0, "b": 1.0})
    by = {(line.set, line.model): line for line in made.lines}
    assert by[OVERALL, "base"].pass_at_1.mean == pytest.approx(0.75 * 1.75 / 4 + 0.25 * 0.25 / 2)
    gain = {g.set: g for g in made.gains}
    assert gain[OVERALL].pass_at_1.mean == pytest.approx(0.75 * gain["a"].pass_at_1.mean + 0.25 * gain["b"].pass_at_1.mean)
    assert "overall is the mean weighted a 0.750, b 0.250 over sets" in plain_table(made)
    assert "overall is the plain mean over sets" in plain_table(table())


def test_every_way_of_writing_holds_every_figure():
    made = table()
    wide = Console(file=io.StringIO(), width=300)
    wide.print(render_table(made))
    for text in (plain_table(made), markdown_table(made, "Title"), wide.file.getvalue()):
        for line in made.lines:
            for estimate in (line.pass_at_1, line.greedy, line.pass_at_k):
                assert percent(estimate) in text
        for gain in made.gains:
            assert points(gain.pass_at_1) in text and points(gain.over_base_greedy) in text
        for expected in ("1.23M", "0.082", "cpu core-hours", "pass@4", "a note", "trained at T=1 - base greedy"):
            assert expected in text
    assert json.loads(json.dumps(made.as_dict())) == made.as_dict()


def test_markdown_tables_are_rectangular():
    lines = [line for line in markdown_table(table()).splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {10, 6}


def test_plain_text_where_there_is_no_terminal():
    out = io.StringIO()
    print_table(table(), Console(file=out))
    assert out.getvalue() == plain_table(table())
    assert "\x1b" not in out.getvalue()
    terminal = io.StringIO()
    print_table(table(), Console(file=terminal, force_terminal=True, width=200))
    assert "\x1b" in terminal.getvalue()


def test_one_set_greedy_left_out_and_failures_told():
    made = final_table({"a": result("a", [1, 2], 4, failed=1)}, {"a": result("a", [3, 4], 4)}, COST)
    assert [line.cost for line in made.lines] == [Cost(0, 0), COST]
    assert (made.lines[0].greedy, made.gains[0].over_base_greedy, made.lines[0].pass_at_k.n) == (None, None, 1)
    assert "1 gradings failed and are left out" in plain_table(made)
    assert " -  " in plain_table(made)


def test_different_measurements_are_not_set_side_by_side():
    with pytest.raises(ValueError, match="different sets: a, b and a"):
        final_table(BASE, {"a": TRAINED["a"]}, COST)
    with pytest.raises(ValueError, match="different problems, or with different k, on a"):
        final_table({"a": BASE["a"]}, {"a": result("a", [1, 2, 0, 4], 5)}, COST)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (950, "950"),
        (12_345, "12.3k"),
        (4_560_000, "4.56M"),
        (7e9, "7G"),
        (123_456, "123k"),
        (999_999, "1M"),
        (999_400, "999k"),
        (999.6, "1k"),
    ],
)
def test_count(value, text):
    assert count(value) == text


def test_intervals_without_end():
    assert points(paired_difference([0.0], [0.5])) == "+50.0 [-∞, ∞]"
    assert percent(None) == points(None) == "-"

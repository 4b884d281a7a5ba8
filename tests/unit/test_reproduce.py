"""`rlzoo reproduce`: what counts as ours, statuses, claims against other computations, and bad input."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from rlzoo.cli import main, recipe_config
from rlzoo.evaluation.papers import Claim, Paper, Published, Result, check_claim, matches, measured, papers, read_rows, rows_of
from rlzoo.evaluation.rows import config_hash, validate
from rlzoo.report.reproduce import miniature, reproduction

ROOT = Path(__file__).parents[2]
MINI = ROOT / "results" / "mini"
RECIPE = "run --algo grpo"


def plain(name="grpo-s0"):
    return json.loads((MINI / f"{name}.json").read_text())


def as_row(table):
    table["arm"]["config_sha256"] = config_hash(table["config"])
    return validate(table)


def changed(table, path, value):
    table = copy.deepcopy(table)
    *sections, key = path.split(".")
    inner = table
    for section in sections:
        inner = inner[section]
    inner[key] = value
    return table


def leaves(table, path=""):
    for key, value in table.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


@pytest.fixture(scope="module")
def rows():
    return read_rows(MINI)


@pytest.mark.parametrize("name", ["grpo", "treerpo", "treepo"])
def test_rows_of_the_embedded_job_are_found_by_their_recipe(rows, name):
    found = rows_of(rows, recipe_config(f"run --algo {name}"), "run")
    assert [(row.arm.name, row.seed) for row in found] == [(name, 0), (name, 1), (name, 2)]
    assert rows_of(rows, recipe_config(f"run --algo {name}"), "eval") == []


def test_a_config_matches_only_with_every_option_the_same():
    config = json.loads(json.dumps(recipe_config(RECIPE)))
    assert matches(config, recipe_config(RECIPE))
    lent = {"backend.threads": 3, "backend.memory": 0.9, "backend.sleep": True, "backend.timeout_s": 9.0}
    free = {"seed": 7, "trackers": ["none"], "evaluation.data_dir": "/sets"} | lent
    for path, value in leaves(config):
        other = free.get(path, f"{value} or so")
        assert matches(changed(config, path, other), recipe_config(RECIPE)) is (path in free), path


def test_a_config_with_an_option_more_or_less_does_not_match():
    config = json.loads(json.dumps(recipe_config(RECIPE)))
    assert not matches(changed(config, "sampler.invented", 0), recipe_config(RECIPE))
    assert not matches(changed(config, "sampler.invented", None), recipe_config(RECIPE))
    del config["optim"]["lr"]
    assert not matches(config, recipe_config(RECIPE))


def test_null_is_the_old_spelling_of_none():
    config = json.loads(json.dumps(recipe_config(RECIPE)))
    assert config["loss"]["dual_clip"] == "none"
    assert matches(changed(config, "loss.dual_clip", None), recipe_config(RECIPE))


def test_a_young_option_that_is_not_at_its_old_value_does_not_match():
    assert not matches(plain()["config"], recipe_config(f"{RECIPE} --max-prompt-tokens 5"))
    assert not matches(plain()["config"], recipe_config(f"{RECIPE} --shaping.overlong-tokens 4"))


def test_a_seed_counts_once(rows):
    assert len(rows_of([*rows, *rows], recipe_config(RECIPE), "run")) == 3


def test_ours_is_over_problems_for_one_seed_and_over_seeds_for_several(rows):
    own = rows_of(rows, recipe_config(RECIPE), "run")
    one = measured(own[:1], "trained", "pass_at_1")
    whole = own[0].overall["trained"].pass_at_1
    assert (one.mean, one.low, one.high) == (whole.mean, whole.low, whole.high)
    means = [row.overall["trained"].pass_at_1.mean for row in own]
    interval = scipy_stats.ttest_1samp(means, 0).confidence_interval()
    three = measured(own, "trained", "pass_at_1")
    assert (three.low, three.high) == pytest.approx((interval.low, interval.high))
    assert measured(own, "trained", "maj_at_k") is None  # no votes were counted then
    assert measured(own, "model", "pass_at_1") is None


def paper(*results, **others):
    protocol = Published("Pass@1", "pass_at_1", "so", 16, "plain mean", "a model", "one device", ("much",))
    return Paper("A title", "0000.00000", "none", protocol, results, **{"arms": {}, "claims": ()} | others)


@pytest.mark.parametrize(("published", "status"), [(54.3, "reproduced within interval"), (57.5, "differs"), (51.0, "differs")])
def test_status_says_whether_the_published_figure_lies_in_our_interval(rows, published, status):
    result = Result("Table 1", "an arm", "chains", published, {"mini_chains": 90.0}, recipe=RECIPE)
    grids = reproduction(paper(result), rows, recipe_config)
    by_set, overall = grids[0].rows
    assert overall[-1] == status and overall[3] == "overall" and overall[4] == f"{published:.1f}"
    ours = float(overall[5].split()[0])
    assert float(overall[6]) == pytest.approx(ours - published, abs=0.11)
    assert by_set[3:5] == ["mini_chains", "90.0"] and by_set[-1] in ("differs", "reproduced within interval")
    assert "Not run" not in [grid.title for grid in grids]


def test_a_row_of_another_config_is_never_ours(rows):
    result = Result("Table 1", "an arm", "chains", 54.3, recipe=f"{RECIPE} --optim.lr 1e-6", cost="3: a guess")
    grids = reproduction(paper(result), rows, recipe_config)
    assert grids[0].rows[0][5] == "-" and grids[0].rows[0][-1] == "not run"
    assert grids[1].rows == [["an arm", "chains", f"`rlzoo {RECIPE} --optim.lr 1e-6`", "one device", "3: a guess"]]


def test_a_derived_figure_says_so_and_one_without_recipe_too(rows):
    results = (Result("T", "a", "s", 32.6, derived="35.5 - 2.9"), Result("T", "b", "s", 37.5, gpu_hours=5.0))
    first, second = reproduction(paper(*results), rows, recipe_config)[0].rows
    assert first[4] == "32.6 (derived: 35.5 - 2.9)" and first[-1] == "not run: no recipe here"
    assert second[4] == "37.5" and second[7] == "5.00"


ARMS = {"A": RECIPE, "B": "run --algo treepo", "C": "run --algo treepo --credit.no-include-root"}


def claim(measure, a="A", b="B", expected="below", **others):
    return Claim("b is less", "x 0.5", measure, a, b, expected, **others)


@pytest.fixture(scope="module")
def arms(rows):
    return {name: rows_of(rows, recipe_config(recipe), "run") for name, recipe in ARMS.items()}


@pytest.mark.parametrize("measure", ["length", "sampled_tokens", "device_hours"])
def test_ratios_are_geometric_means_with_welch_intervals(measure, arms):
    def values(name):
        tables = [plain(f"{name}-s{seed}") for seed in range(3)]
        keys = {
            "length": ("overall", "trained", "length", "mean"),
            "sampled_tokens": ("sampled_tokens",),
            "device_hours": ("training", "device_hours"),
        }
        for key in keys[measure]:
            tables = [table[key] for table in tables]
        return np.log(tables)

    welch = scipy_stats.ttest_ind(values("treepo"), values("grpo"), equal_var=False).confidence_interval()
    found = check_claim(claim(measure), arms).estimate
    assert (found.low, found.high) == pytest.approx((np.exp(welch.low), np.exp(welch.high)))
    assert found.mean == pytest.approx(np.exp(values("treepo").mean() - values("grpo").mean()))


def test_the_share_of_unrolled_tokens_is_of_one_arm(arms):
    tables = [plain(f"treepo-s{seed}") for seed in range(3)]
    logs = [np.log(table["sampled_tokens"] / table["unrolled_tokens"]) for table in tables]
    expected = scipy_stats.ttest_1samp(logs, 0).confidence_interval()
    found = check_claim(claim("unrolled_share", a="B"), arms)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((np.exp(expected.low), np.exp(expected.high)))
    assert found.verdict == "holds"
    assert check_claim(claim("unrolled_share", a="A", b="A"), arms).verdict == "cannot be told: the rows do not hold it"


def test_the_difference_is_that_of_the_mean_pass_at_1(arms):
    means = {
        name: np.mean([plain(f"{name}-s{seed}")["overall"]["trained"]["pass_at_1"]["mean"] for seed in range(3)])
        for name in ("grpo", "treepo")
    }
    found = check_claim(claim("pass_at_1"), arms)
    assert found.estimate.mean == pytest.approx(means["treepo"] - means["grpo"])
    back = check_claim(claim("pass_at_1", a="B", b="A"), arms)
    assert (back.estimate.low, back.estimate.high) == pytest.approx((-found.estimate.high, -found.estimate.low))


def shifted(rows, right):
    """Rows with so many of 16 samples right everywhere, one fewer on a problem that is another per seed."""
    made = []
    for row in rows:
        sets = {
            name: replace(m, right=[right - (i == row.seed) for i in range(m.n)], graded=[16] * m.n)
            for name, m in row.results["trained"].items()
        }
        made.append(replace(row, results={**row.results, "trained": sets}))
    return made


@pytest.mark.parametrize(
    ("expected", "margin", "right", "verdict"),
    [
        ("above", 0.0, 14, "holds"), ("above", 0.0, 6, "does not hold"), ("above", 0.0, 10, "cannot be told"),
        ("below", 0.0, 14, "does not hold"), ("below", 0.0, 6, "holds"), ("below", 0.0, 10, "cannot be told"),
        ("no loss", 0.02, 14, "holds"), ("no loss", 0.02, 6, "does not hold"), ("no loss", 0.02, 10, "holds"),
        ("no loss", 0.0, 10, "cannot be told"),
    ],
)  # fmt: skip
def test_a_verdict_goes_by_the_side_on_which_the_interval_lies(arms, expected, margin, right, verdict):
    both = {"A": shifted(arms["A"], 10), "B": shifted(arms["B"], right)}
    assert check_claim(claim("pass_at_1", expected=expected, margin=margin), both).verdict == verdict


def test_ratios_are_judged_against_one(arms):
    def tokens(factor):
        return {"A": arms["A"], "B": [replace(row, sampled_tokens=int(factor * row.sampled_tokens)) for row in arms["A"]]}

    for factor, below, above in (
        (0.5, "holds", "does not hold"),
        (2.0, "does not hold", "holds"),
        (1.0, "cannot be told", "cannot be told"),
    ):
        assert check_claim(claim("sampled_tokens"), tokens(factor)).verdict == below
        assert check_claim(claim("sampled_tokens", expected="above"), tokens(factor)).verdict == above


def test_one_seed_and_unequal_arms_decide_nothing(arms):
    assert check_claim(claim("sampled_tokens"), {**arms, "B": arms["B"][:1]}).verdict == "cannot be told: one seed"
    assert check_claim(claim("sampled_tokens", unfair="apples and pears"), arms).verdict == "cannot be told: apples and pears"


def test_rows_that_were_not_measured_alike_are_refused(arms):
    other = [replace(row, protocol=replace(row.protocol, template="chat")) for row in arms["B"]]
    with pytest.raises(ValueError, match=r"A \(seed 0\) and B \(seed 0\) differ in template: "):
        check_claim(claim("length"), {**arms, "B": other})
    other = [replace(row, testsets={}) for row in arms["B"]]
    with pytest.raises(ValueError, match="were measured on different problems"):
        check_claim(claim("pass_at_1"), {**arms, "B": other})


def test_a_claim_without_rows_says_what_to_run(rows):
    made = paper(arms=ARMS, claims=(claim("length", b="C"), claim("length")), untested=("something else",))
    claims, todo = miniature(made, rows, recipe_config)
    assert claims.rows[0][5:] == ["-", "-", "not run", "cannot be told: no row of C"]
    assert claims.rows[1][-2] == "miniature" and claims.rows[1][6] == "3, 3"
    assert todo.rows == [["C", f"`rlzoo {ARMS['C']} --seed {seed}`"] for seed in range(3)]
    assert any("something else" in note for note in claims.notes)


@pytest.mark.parametrize("name", papers())
@pytest.mark.parametrize("scale", ["paper", "mini"])
def test_the_verb_prints_full_tables_and_writes_them_the_same_twice(name, scale, tmp_path, capsys):
    out = tmp_path / "made.md"
    told = []
    for _ in range(2):
        assert main(["reproduce", name, "--scale", scale, "--results", str(MINI), "--out", str(out)]) == 0
        told.append((capsys.readouterr().out, out.read_bytes()))
    assert told[0] == told[1]
    text = out.read_text()
    if scale == "paper":
        assert "35.5" in told[0][0] if name == "treerpo" else "58.21" in told[0][0]
        assert "not run" in text
    else:
        assert "35.5" not in told[0][0] and "| miniature |" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such-paper"], "unknown paper 'no-such-paper'; known: treepo, treerpo"),
        (["treepo", "--results", "{}/nowhere"], "no folder"),
        (["treepo", "--results", "{}/broken"], "half.json is not JSON"),
        (["treepo", "--scale", "mini", "--results", "{}/wrong"], "row.json is not a result row"),
        (["treepo", "--scale", "large"], "--scale"),
    ],
)
def test_bad_input_is_one_sentence(arguments, said, tmp_path, capsys):
    for folder in ("broken", "wrong"):
        (tmp_path / folder).mkdir()
    (tmp_path / "broken" / "half.json").write_text((MINI / "grpo-s0.json").read_text()[:5000])
    (tmp_path / "wrong" / "row.json").write_text(json.dumps(plain() | {"seed": 9}))
    assert main(["reproduce", *(argument.format(tmp_path) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and said in captured.err and len(captured.err.strip().splitlines()) == 1


def test_an_evaluation_row_is_matched_by_its_own_config():
    table = plain()
    recipe = "eval tiny --suite mini --k 16"
    table |= {"kind": "eval", "config": json.loads(json.dumps(recipe_config(recipe)))}
    table["results"] = {"model": table["results"]["base"]}
    table["overall"] = {"model": table["overall"]["base"]}
    row = as_row(table)
    result = Result("Table 2", "the base", "chains", 35.6, recipe=recipe, model="model")
    assert reproduction(paper(result), [row], recipe_config)[0].rows[0][-1] == "reproduced within interval"
    other = replace(result, recipe=f"{recipe} --temperature 0.6")
    assert reproduction(paper(other), [row], recipe_config)[0].rows[0][-1] == "not run"

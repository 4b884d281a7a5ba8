"""The leaderboard's arms over training seeds."""

import json

import pytest

from rlzoo.cli import main
from rlzoo.evaluation.rows import config_hash, validate
from rlzoo.report.leaderboard import BEGIN, END, leaderboard
from rlzoo.report.seeds import arms_grid, seed_arms
from tests.rows import row, store


def trained(
    seed, share, *, algo="some", greedy=0.5, length=10.0, tokens=1000, hours=1.0, device="cpu core", engine="torch float32", **config
):
    """A run's row whose trained model has these figures; `config` by section."""
    plain = row(seed=seed, engine=engine)
    own = plain["overall"].pop("model")
    made = json.loads(json.dumps(own)) | {"length": own["length"] | {"mean": length}}
    made["pass_at_1"] |= {"mean": share, "low": share - 0.1, "high": share + 0.1}
    made["greedy"] = None if greedy is None else own["pass_at_1"] | {"mean": greedy, "low": greedy - 0.1, "high": greedy + 0.1}
    plain["overall"] = {"base": own, "trained": made}
    plain["results"] = dict.fromkeys(("base", "trained"), plain["results"].pop("model"))
    plain["config"] |= {"algo": algo} | config
    plain["arm"] = {"name": algo, "config_sha256": config_hash(plain["config"])}
    spent = {"device": device, "wall_s": 3600 * hours, "device_hours": hours, "devices": 1}
    seconds = {"update": 3600 * hours}
    plain["training"] = plain["ledger"] | spent | {"seconds": seconds, "device_seconds": seconds}
    return plain | {"kind": "run", "algo": algo, "sampled_tokens": tokens}


def cells(*plain):
    """The table of arms as a list of dicts by column."""
    grid = arms_grid("title", [validate(p) for p in plain], ["how"])
    return [] if grid is None else [dict(zip(grid.head, line, strict=True)) for line in grid.rows]


def test_the_mean_and_its_t_interval_by_hand():
    """0.5, 0.6, 0.7: mean 0.6, standard deviation 0.1; Student's t of 2 degrees of freedom at 97.5 % is 4.30265, so the half width is
    4.30265 x 0.1 / sqrt(3) = 0.24841."""
    rows = [
        trained(2, 0.7, greedy=0.25, length=30, tokens=4000, hours=0.5),
        trained(0, 0.5, greedy=0.5, length=10, tokens=1000, hours=1.5),
        trained(1, 0.6, greedy=0.9, length=14, tokens=1000, hours=1.0),
    ]
    (line,) = cells(*rows)
    assert (line["arm"], line["seeds"], line["runs"], line["Pass@1, % [95 %]"]) == ("some", "3", "3", "60.0 [35.2, 84.8]")
    assert (line["greedy, %"], line["length"], line["config"]) == ("55.0", "18", rows[0]["arm"]["config_sha256"][:8])
    assert (line["training: sampled tokens"], line["training: device-hours"]) == ("2k", "1.000 (cpu core)")


def test_two_seeds_are_an_arm_one_is_none_and_a_share_stays_one():
    """0.2, 0.9: the half width is 12.706 x 0.35 = 4.4, beyond both ends of a share."""
    (line,) = cells(trained(0, 0.2), trained(1, 0.9), trained(0, 0.8, algo="alone"))
    assert (line["arm"], line["Pass@1, % [95 %]"]) == ("some", "55.0 [0.0, 100.0]")
    assert cells(trained(0, 0.2)) == [] == cells(trained(0, 0.2), trained(0, 0.9)) == cells()


def test_a_seed_that_was_run_twice_counts_once():
    (line,) = cells(trained(0, 0.4, tokens=1000), trained(0, 0.6, tokens=3000), trained(1, 0.6), trained(2, 0.7, tokens=0))
    assert (line["seeds"], line["runs"], line["Pass@1, % [95 %]"]) == ("3", "4", "60.0 [35.2, 84.8]")
    assert line["training: sampled tokens"] == "1k"  # (2000 + 1000 + 0) / 3


def test_arms_of_one_algorithm_show_the_options_in_which_they_differ():
    budget = {"schedule": {"steps": 40, "limit": "tokens", "budget": 1101890.0}, "optim": {"lr": 0.1}}
    full = {"schedule": {"steps": 40}, "optim": {"lr": 0.1}}
    rows = [trained(seed, share, **config) for seed in (0, 1) for share, config in ((0.5, budget), (0.7, full))]
    rows += [trained(seed, 0.6, algo="other", optim={"lr": 0.2}) for seed in (0, 1)]
    assert [line["arm"] for line in cells(*rows)] == [
        "some (schedule.budget 0, schedule.limit none)",
        "other",
        "some (schedule.budget 1101890, schedule.limit tokens)",
    ]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"trackers": ["none"]}, True),
        ({"backend": {"dtype": "float32", "threads": 3, "kind": "other"}}, True),
        ({"evaluation": {"data_dir": "/sets"}}, True),
        ({"schedule": {"limit": "none", "budget": 0.0}, "max_mismatch_kl": 0.0}, True),  # younger options, at what was done before
        ({"loss": {"dual_clip": "none"}}, True),  # once written null
        ({"update": {"dtype": "auto"}, "correction": {"old_logprobs": "auto", "importance": "auto"}}, True),
        ({"update": {"autocast": False}, "correction": {"old_logprobs": "sampler", "importance": "none"}}, True),
        ({"update": {"dtype": "bfloat16"}}, False),
        ({"update": {"dtype": "bfloat16"}, "correction": {"importance": "auto"}}, False),
        ({"schedule": {"limit": "tokens", "budget": 5.0}}, False),
        ({"backend": {"dtype": "bfloat16"}}, False),
        ({"loss": {"dual_clip": 3.0}}, False),
        ({"invented": 1}, False),
        ({"algo": "other"}, False),
    ],
)
def test_an_arm_is_the_seed_and_what_learning_does_not_see(change, same):
    first = trained(0, 0.5, backend={"dtype": "float32"}, evaluation={}, loss={"dual_clip": None}, schedule={})
    second = trained(1, 0.5, **({"backend": {"dtype": "float32"}, "evaluation": {}, "loss": {"dual_clip": None}, "schedule": {}} | change))
    assert len(seed_arms([validate(first), validate(second)])) == (1 if same else 2)


def test_what_a_row_lacks_or_unlike_devices_make_no_mean():
    (line,) = cells(trained(0, 0.5, greedy=None, tokens=None), trained(1, 0.5, device="some GPU"))
    assert (line["greedy, %"], line["training: sampled tokens"]) == ("-", "-")
    assert line["training: device-hours"] == "- (cpu core, some GPU)"


def test_another_engine_is_another_table_and_a_page_has_the_arms_alone(tmp_path):
    rows = [trained(seed, 0.5 + seed / 10, engine=engine) for engine in ("torch", "fast") for seed in (0, 1)]
    base = rows[1]["results"]["base"]
    rows[1]["results"] = rows[1]["results"] | {"base": base | {"one": base["one"] | {"maj_at_k": None}}}  # measured before votes were kept
    results, page = store(tmp_path / "results", *rows, row(2, seed=9, template="chat")), tmp_path / "docs" / "page.md"
    titles = [own.arms.title if own.arms else None for own in leaderboard(results)]
    told = [f"Arms, over training seeds: suite both, {engine}" for engine in ("fast", "torch")]
    assert titles == [None, *told]  # the first was measured with another template, and is of no run
    page.parent.mkdir()
    page.write_text(f"{BEGIN}\n{END}\n")
    assert main(["leaderboard", "--results", str(results), "--page", str(page)]) == 0
    block, everything, html = page.read_text(), (results / "leaderboard.md").read_text(), (results / "leaderboard.html").read_text()
    assert [line for line in block.splitlines() if line.startswith("#")] == [f"### {title}" for title in told]
    assert "row3.json" not in block and "(../results/leaderboard.md)" in block
    assert block.count("- before training: some/model") == 2 and block.count(", fast;") == block.count(", torch;") == 1
    headings = [line for line in everything.splitlines() if line.startswith("## ")]
    assert headings == [f"## {title}" for title in ("Suite both", told[0], "Suite both", told[1], "Suite both")]
    for text in (everything, html):
        assert all(text.count(title) == 1 for title in told) and text.count("row3.json") == 1


def test_an_arm_of_a_registered_algorithm_shows_how_it_differs_from_the_defaults(monkeypatch):
    usual = {"schedule": {"steps": 40}, "credit": {"name": "group", "levels": "all"}}
    changes = [
        {},
        {"credit": {"name": "group", "levels": "root"}},
        {"schedule": {"steps": 40, "limit": "tokens", "budget": 5.0}},
        {"credit": {"name": "other", "weight": 2}},
    ]
    monkeypatch.setattr("rlzoo.report.seeds._defaults", lambda name: seed_arms([validate(trained(0, 0.5, **usual))]))
    rows = [trained(seed, 0.5, **(usual | change)) for change in changes for seed in (0, 1)]
    assert {line["arm"] for line in cells(*rows)} == {
        "some",
        "some (credit.levels root)",
        "some (schedule.budget 5, schedule.limit tokens)",
        "some (credit.name other, credit.weight 2)",  # the options of its own part, and none of the one that it took the place of
    }

"""The published numbers agree with themselves, and what they name exists."""

import pytest

from rlzoo.cli import recipe_config
from rlzoo.evaluation.papers import find_paper, papers
from rlzoo.evaluation.suites import find_suite


def test_treepo_overalls_are_the_size_weighted_means_of_their_sets():
    published = find_paper("treepo")
    sizes = published.protocol.sizes
    assert sum(sizes.values()) == 1560
    for result in published.results:
        overall = sum(sizes[name] * value for name, value in result.values.items()) / sum(sizes.values())
        assert overall == pytest.approx(result.overall, abs=0.0101), result  # given to two decimals
    assert [r.overall for r in published.results if r.table == "Table 1"] == [46.63, 54.61, 56.88, 58.21]
    assert [r.overall for r in published.results if r.table == "Table 2"] == [56.88, 56.03, 57.50, 56.60, 58.21, 54.67, 57.26, 58.06]


def test_treepo_sets_are_those_of_its_suite():
    published, suite = find_paper("treepo"), find_suite("treepo")
    assert published.protocol.sizes == {spec.name: spec.rows for spec in suite.sets}
    assert all(set(result.values) == set(published.protocol.sizes) for result in published.results)


def test_treepo_saves_what_its_headline_says():
    published = find_paper("treepo")
    printed = next(f.values for f in published.figures if f.what == "GPU-hours saved by tree sampling")
    for kind in ("fixed", "more"):
        hours = {r.sampling: r.gpu_hours for r in published.results if r.table == "Table 2" and kind in r.arm}
        for b in (2, 4, 8):
            saved = 100 * (1 - hours[f"segments 8 x 2048, b = {b}"] / hours["sequential"])
            off = 1 if (kind, b) == ("more", 8) else 0  # the paper prints 22, its hours give 21
            assert round(saved) + off == printed[f"{kind}, b = {b}"]


def test_treepo_prints_a_sequential_line_twice():
    sequential = [r for r in find_paper("treepo").results if r.sampling == "sequential" and r.arm.startswith("TreePO,")]
    assert len(sequential) == 4
    for first, second in zip(sequential[:2], sequential[2:], strict=True):
        assert (first.arm, first.values, first.overall) == (second.arm, second.values, second.overall)


def test_treerpo_overalls_are_the_plain_means_of_their_sets():
    tables = [result for result in find_paper("treerpo").results if result.values]
    assert [(r.table, r.arm) for r in tables] == [(f"Table 1, {size}", arm) for size in ("1.5B", "7B") for arm in ("GRPO", "TreeRPO")]
    for result in tables:
        assert set(result.values) == {spec.name for spec in find_suite("treerpo").sets}
        assert sum(result.values.values()) / 4 == pytest.approx(result.overall, abs=0.0501), result  # given to one decimal
    grpo, treerpo = tables[:2]
    figures = {figure.what: figure.values for figure in find_paper("treerpo").figures}
    assert treerpo.overall - grpo.overall == pytest.approx(figures["Pass@1, TreeRPO - GRPO"]["four sets"], abs=0.05)
    lengths = figures["mean response length, TreeRPO against GRPO"]
    assert sum(lengths[name] for name in treerpo.values) / 4 == pytest.approx(lengths["four sets"], abs=0.1)


def test_treerpo_recipes_share_all_but_algorithm_and_sampler():
    grpo, treerpo = (recipe_config(f"run --preset {name}") for name in ("treerpo-grpo-paper", "treerpo-paper"))
    assert {key for key in grpo if grpo[key] != treerpo[key]} == {"algo", "sampler", "credit"}
    assert treerpo["sampler"]["temperature"] == grpo["sampler"]["temperature"] == treerpo["evaluation"]["temperature"] == 0.6
    assert (treerpo["loss"]["kl_coef"], treerpo["loss"]["entropy_coef"]) == (0.001, 0.001)
    assert sum(treerpo["sampler"]["segment_tokens"]) == grpo["sampler"]["max_response_tokens"] == 1152
    schedule = treerpo["schedule"]
    assert (schedule["steps"], schedule["problems_per_step"], schedule["mini_batches"], treerpo["optim"]["lr"]) == (300, 128, 2, 1e-6)
    assert find_paper("treerpo").protocol.matched.startswith("optimiser steps (300), problems per step (128), updates per step (2)")


@pytest.mark.parametrize("name", papers())
def test_every_recipe_is_a_command_line_that_parses(name):
    published = find_paper(name)
    for result in published.results:
        if result.recipe:
            config = recipe_config(result.recipe)
            assert config.get("evaluation", config)["suite"] == name
            assert result.model == {"run": "trained", "eval": "model"}[result.recipe.split()[0]]
    for recipe in published.arms.values():
        assert recipe_config(recipe)["model"] == "tiny"
    for claim in published.claims:
        assert {claim.a, claim.b} <= set(published.arms), claim.what


def test_treepo_recipes_respond_at_its_length():
    for result in find_paper("treepo").results:
        config = recipe_config(result.recipe)
        if result.model == "trained":
            sampler = config["sampler"]
            longest = sampler.get("max_response_tokens") or sampler["depth"] * sampler["segment_tokens"]
            assert longest == 7168 and sampler.get("width", sampler.get("group_size")) == 16
            assert config["evaluation"]["suite"] == "treepo"
        else:
            assert config["max_response_tokens"] == 16384 and config["vote"] == "string"


def test_no_two_arms_have_one_recipe():
    for name in papers():
        configs = [recipe_config(recipe) for recipe in find_paper(name).arms.values()]
        assert all(a != b for i, a in enumerate(configs) for b in configs[:i]), name

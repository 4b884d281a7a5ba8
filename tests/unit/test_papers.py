"""The published numbers agree with themselves."""

import tomllib
from importlib.resources import files

import pytest

from rlzoo.cli import parse_run


def paper(name):
    return tomllib.loads(files("rlzoo.benchmarks").joinpath("papers", f"{name}.toml").read_text(encoding="utf-8"))


def test_treepo_overalls_are_the_size_weighted_means_of_their_sets():
    published = paper("treepo")
    sizes = published["protocol"]["sizes"]
    assert sum(sizes.values()) == 1560
    for result in published["results"]:
        overall = sum(sizes[name] * value for name, value in result["values"].items()) / sum(sizes.values())
        assert overall == pytest.approx(result["overall"], abs=0.0101), result  # given to two decimals
    assert [r["overall"] for r in published["results"] if r["table"] == "Table 1"] == [46.63, 54.61, 56.88, 58.21]


def test_treepo_saves_what_its_headline_says():
    more = {r["sampling"]: r["gpu_hours"] for r in paper("treepo")["results"] if r["table"] == "Table 2" and "more" in r["arm"]}
    saved = [round(100 * (1 - more[f"segments 8 x 2048, b = {b}"] / more["sequential"])) for b in (2, 4, 8)]
    assert saved == [43, 29, 21]  # the paper prints 22 for the last


def test_every_recipe_is_a_command_line_that_parses():
    for result in paper("treepo")["results"]:
        if "recipe" in result:
            config, _, _ = parse_run(result["recipe"].split())
            assert config.algorithm.sampler.max_response_tokens == 7168

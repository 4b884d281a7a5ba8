"""Discovery: files = entry points = what the command line lists; overrides; combinations that cannot work."""

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rlzoo import registry
from rlzoo.algorithm import PARTS, Algorithm, load, options
from rlzoo.cli import main

ROOT = Path(__file__).parents[2]
ALGORITHMS = registry.names("algorithm")


def test_files_are_entry_points_are_listed(capsys):
    files = {p.stem for p in (ROOT / "algorithms").glob("*.py")} - {"__init__"}
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["rlzoo.algorithms"]
    assert files == set(declared) == set(ALGORITHMS)
    assert main(["algos"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ALGORITHMS)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_a_card_and_fits_together(name, capsys):
    algorithm = load(name)
    assert algorithm.name == name
    for heading in ("Paper", "Objective", "Denominator", "Differs", "Uncertain"):
        assert f"\n{heading}" in algorithm.card, heading
    lines = (ROOT / "algorithms" / f"{name}.py").read_text().splitlines()
    assert len(lines) <= 150
    assert main(["algos", name]) == 0
    printed = capsys.readouterr().out
    assert algorithm.title in printed and "--optim.lr" in printed


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_has_a_page_with_its_card(name):
    page = (ROOT / "docs" / "algorithms" / f"{name}.md").read_text()
    assert load(name).card.strip().split("\n", 1)[1].strip() in page


@pytest.mark.parametrize("kind", registry.KINDS)
def test_registered_parts_carry_the_name_they_are_registered_under(kind):
    for name in registry.names(kind):
        assert registry.find(kind, name).name == name


def test_overrides_find_their_part():
    algorithm = load("treerpo", prune_tau=0.2, **{"optim.lr": 3e-4})
    assert algorithm.credit.prune_tau == 0.2 and algorithm.optim.lr == 3e-4
    assert load("treerpo").credit.prune_tau == 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load("nosuch"), r"unknown algorithm 'nosuch'; known: grpo, treepo, treerpo"),
        (lambda: load("grpo", nosuch=1), r"unknown option 'nosuch' of grpo; allowed: .*sampler\.group_size.*optim\.lr"),
        (lambda: load("treerpo", adv_norm="other"), r"credit.adv_norm is 'other'; allowed: bernoulli_std"),
        (lambda: load("grpo", top_p=0.9), r"sampler chains draws from a cut distribution \(top_p = 0.9.*loss policy does not correct"),
        (lambda: load("grpo", temperature=0.0), r"temperature"),
        (lambda: registry.plugin("nosuch", "reward"), r"reward 'nosuch' is neither a known name nor of the form"),
        (lambda: registry.plugin("no.such:fn", "reward"), r"reward 'no.such:fn' cannot be loaded"),
    ],
)
def test_mistakes_are_one_sentence(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_ambiguous_options_name_their_parts():
    shared = [o for o in options(load("grpo").optim) if o in options(load("grpo").loss)]
    assert not shared  # option names are unique among the parts, so that arms can be written without a prefix
    every = [o for part in PARTS for o in options(getattr(load("treerpo"), part))]
    assert len(every) == len(set(every))


def test_works_from_another_folder_and_loads_no_file_twice(tmp_path):
    code = (
        "import sys, rlzoo.registry as r; [r.find('algorithm', n) for n in r.names('algorithm')];"
        "twice = [m for m in sys.modules if m == 'algorithms' or m.startswith('algorithms.')]; assert not twice, twice;"
        "print(*r.names('algorithm'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ALGORITHMS


def test_algorithm_objects_are_frozen():
    algorithm = load("grpo")
    assert isinstance(algorithm, Algorithm)
    with pytest.raises(AttributeError):
        algorithm.name = "other"

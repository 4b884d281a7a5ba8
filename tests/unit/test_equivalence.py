"""Two one-sided tests against scipy, and the verdicts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from rlzoo.benchmarks.equivalence import Group as Runs
from rlzoo.benchmarks.equivalence import difference, document, equivalence
from scipy import stats


@pytest.mark.parametrize("seed", range(3))
def test_it_is_welch(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = rng.normal(16, 2, 3), rng.normal(17, 3, 5)
    found = difference([(list(one), list(other))], 5)
    welch = stats.ttest_ind(other, one, equal_var=False).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((welch.low, welch.high))
    below = stats.ttest_ind(other - 5, one, equal_var=False, alternative="less").pvalue
    above = stats.ttest_ind(other + 5, one, equal_var=False, alternative="greater").pvalue
    assert found.p_value == pytest.approx(max(below, above))
    assert (found.p_value < 0.05) == (found.verdict(5) == "equivalent within ± 5")


def test_the_mean_over_algorithms_has_the_variance_of_a_mean() -> None:
    pair = ([10.0, 12.0, 14.0], [11.0, 13.0, 15.0])
    one, four = difference([pair], 5), difference([pair] * 4, 5)
    assert four.mean == one.mean == 1
    width = stats.t.ppf(0.95, 16) * np.sqrt(2 * 4 / 3 / 4)  # 4 x 2 groups of 3, equal variances 4
    assert four.high - four.mean == pytest.approx(width)


def test_errors_stay_below_their_rate() -> None:
    """Engines that differ by just the margin are called equivalent in at most 5 % of 2,000 experiments of three seeds."""
    rng = np.random.default_rng(0)
    verdicts = [difference([(list(rng.normal(0, 1.5, 3)), list(rng.normal(5, 2.5, 3)))], 5).verdict(5) for _ in range(2000)]
    assert verdicts.count("equivalent within ± 5") <= 0.063 * 2000


def row(algo: str, seed: int, gain: float, engine: str) -> dict[str, object]:
    gains = [{"set": "mini_long", "pass_at_1": {"mean": 9.0}}, {"set": "overall", "pass_at_1": {"mean": gain / 100}}]
    return {"algo": algo, "seed": seed, "protocol": {"engine": engine}, "table": {"gains": gains}}


def test_the_page_and_its_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files: dict[str, list[Path]] = {"torch float32": [], "vllm float32": []}
    for engine, shift in (("torch float32", 0.0), ("vllm float32", 1.0)):
        for algo, gains in (("a", (16, 17, 18)), ("b", (3, 10, 30))):
            for seed, gain in enumerate(gains):
                path = tmp_path / f"{algo}{seed}{engine[:2]}.json"
                path.write_text(json.dumps(row(algo, seed, gain + shift, engine)))
                files[engine].append(path)
    one, other = (tuple(reversed(paths)) for paths in files.values())
    equivalence(one, other, out=tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert text in capsys.readouterr().out
    assert "| a | +16.0, +17.0, +18.0 | +17.0, +18.0, +19.0 | +1.0 [-0.7, +2.7] |" in text
    assert text.count("equivalent within ± 5") == 1 and text.count("inconclusive") == 2
    with pytest.raises(ValueError, match="one side has a, b, the other a; both need the same algorithms"):
        equivalence(one, tuple(p for p in other if p.name.startswith("a")))
    with pytest.raises(ValueError, match="several engines: torch float32, vllm float32"):
        equivalence((*one, *other), other)
    with pytest.raises(ValueError, match="at least two runs"):
        document({"a": Runs("x", (1.0,))}, {"a": Runs("y", (1.0, 2.0))}, 5)
    (tmp_path / "unfinished.json").write_text("{}")
    with pytest.raises(ValueError, match="no final measurement"):
        equivalence((tmp_path / "unfinished.json",), other)

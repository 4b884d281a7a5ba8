import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlzoo.evaluation.recorded import grade_outputs, read_outputs
from rlzoo.rewards.math import Grader, GraderConfig

DATA = Path(os.environ.get("RLZOO_DATA", Path(__file__).parents[2].parent / "shared" / "data"))


@dataclass
class Fake:
    correct: bool | None
    kind: str = "x"


def by_text(pairs):
    return [Fake({"right": True, "wrong": False, "broken": None}[text]) for _, text in pairs]


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_pass_at_1_is_a_mean_over_problems_beside_the_recorded_one(tmp_path):
    rows = [
        {"model": "m", "problem_id": "a", "gold": "1", "prediction": "right", "correct": True},
        {"model": "m", "problem_id": "a", "gold": "1", "prediction": "wrong", "correct": True},
        {"model": "m", "problem_id": "b", "gold": "1", "prediction": "wrong", "correct": False},
        {"model": "m", "problem_id": "c", "gold": "1", "prediction": "right", "correct": True},
        {"model": "m", "problem_id": "c", "gold": "1", "prediction": "broken", "correct": False},
        {"gold": "1", "prediction": "right"},
    ]
    m, unnamed = grade_outputs(write(tmp_path / "o.jsonl", rows), by_text)
    assert (m.problems, m.samples, m.rows) == (3, 2, 5)
    assert m.ours.mean == pytest.approx((0.5 + 0 + 1) / 3) and m.recorded.mean == pytest.approx((1 + 0 + 0.5) / 3)
    assert m.difference.mean == pytest.approx(0) and m.agree == pytest.approx(3 / 5)
    assert (unnamed.model, unnamed.problems, unnamed.recorded) == ("not named", 1, None)
    assert json.dumps(m.as_dict())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no output"),
        ('{"gold": "1", "prediction": "x"}\n{"gold"', "line 2 of .* is not JSON"),
        ('{"gold": "1"}\n', "line 1 of .* has no text in 'prediction'; needed are gold and prediction"),
        ('{"gold": 1, "prediction": "x"}\n', "no text in 'gold'"),
        ("[1]\n", "no text in 'gold'"),
    ],
)
def test_broken_outputs_are_one_sentence(text, message, tmp_path):
    (tmp_path / "o.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_outputs(tmp_path / "o.jsonl")
    with pytest.raises(ValueError, match=r"cannot read .*nosuch.jsonl"):
        read_outputs(tmp_path / "nosuch.jsonl")


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason="no data folder beside the checkout")
def test_recorded_models_come_out_as_recorded():
    """Four models on GSM8K: our Pass@1 within a point of the recorded labels'."""
    with Grader(GraderConfig(require_box=False)) as grader:
        results = grade_outputs(DATA / "verifier" / "outputs_openai_gsm8k.jsonl", grader.grade)
    assert len(results) == 4 and all(r.problems == r.rows == 656 and r.samples == 1 for r in results)
    for result in results:
        assert abs(result.difference.mean) < 0.01 and result.ours.method.lower().startswith("wilson")

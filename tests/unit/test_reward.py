import math

import numpy as np
import pytest

from rlzoo.algorithm import load
from rlzoo.data.problems import Problem
from rlzoo.rewards.reward import PluginReward, grade_of, open_reward
from rlzoo.training.collect import shape
from rlzoo.tree import Segment, Tree

ITEMS = [(Problem("a", "1 + 1", "2"), r"\boxed{2}"), (Problem("b", "1 + 2", "3"), r"\boxed{4}")]


def test_the_maths_grader_behind_the_interface():
    reward = open_reward("math")
    try:
        grades = reward.collect(reward.submit(ITEMS))
    finally:
        reward.close()
    assert [(g.correct, g.kind, g.reward) for g in grades] == [(1.0, "right", None), (0.0, "wrong", None)]


def test_numbers_bypass_shaping_and_verdicts_do_not():
    tree = Tree.from_segments([1], [Segment(0, [2]), Segment(0, [3])])
    algorithm = load("grpo", right=2.0)
    assert shape(tree, ITEMS[0][0], ("", ""), [grade_of(True), grade_of(False)], algorithm).tree.reward.tolist() == [2.0, 0.0]
    shaped = shape(tree, ITEMS[0][0], ("", ""), [grade_of(0.25), grade_of(-1.0)], algorithm).tree
    assert shaped.reward.tolist() == [0.25, -1.0] and shaped.correct.tolist() == [1.0, 0.0]


def test_a_failed_grading_is_nan_not_zero():
    grade = grade_of(float("nan"))
    assert math.isnan(grade.correct) and grade.kind == "failed"
    tree = Tree.from_segments([1], [Segment(0, [2]), Segment(0, [3])])
    shaped = shape(tree, ITEMS[0][0], ("", ""), [grade, grade_of(True)], load("grpo")).tree
    assert np.isnan(shaped.reward[0]) and np.isnan(shaped.correct[0]) and shaped.correct[1] == 1


def test_a_plugin_is_named_by_module_and_function(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text("def score(items):\n    return [len(text) / 100 for _, text in items]\n")
    monkeypatch.syspath_prepend(tmp_path)
    reward = open_reward("my_reward:score")
    assert [g.reward for g in reward.collect(reward.submit(ITEMS))] == [0.09, 0.09]
    with pytest.raises(ValueError, match="reward 'nosuch' is neither"):
        open_reward("nosuch")


def test_a_plugin_that_loses_responses_is_caught():
    reward = PluginReward(lambda items: [1.0], "short")
    with pytest.raises(RuntimeError, match="reward short returned 1 values for 2 responses"):
        reward.collect(reward.submit(ITEMS))


@pytest.mark.parametrize("broken", [lambda items: items[0].extra_info, lambda items: 1 / 0], ids=["missing field", "error"])
def test_b12_a_reward_that_breaks_is_an_error_not_a_wrong_answer(broken):
    """In TreePO's released code such a reward turned every score into the default of a wrong answer."""
    reward = PluginReward(broken, "broken")
    with pytest.raises(Exception, match=r"extra_info|division by zero"):
        reward.collect(reward.submit(ITEMS))

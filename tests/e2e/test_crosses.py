"""Parts of one algorithm under another by flags, and the paper's arms, through the command line in miniature."""

import numpy as np
import pytest

from rlzoo.cli import main
from rlzoo.store.runs import RunFolder
from rlzoo.store.trees import read_trees

SMALL = [
    "--schedule.steps", "1", "--schedule.problems-per-step", "6", "--evaluation.suite", "none", "--evaluation.every", "0",
    "--backend.capacity", "64", "--backend.threads", "1", "--trackers", "none",
]  # fmt: skip
SHORT = ["--sampler.depth", "4", "--sampler.segment-tokens", "24", "--sampler.width", "6", "--sampler.initial", "2"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--algo", "grpo", "--sampler", "segments", *SHORT],
        ["--algo", "treerpo", "--sampler", "segments", *SHORT],
        ["--algo", "treepo", "--sampler", "nary", "--sampler.segment-tokens", "20", "--sampler.depth", "2", "--sampler.branching", "3"],
        ["--algo", "treepo", "--sampler", "chains", "--sampler.group-size", "6", "--sampler.max-response-tokens", "96"],
        ["--algo", "treepo", "--credit", "group", *SHORT],
        ["--algo", "treepo", "--credit.levels", "root", *SHORT],  # the paper's GRPO with TreePO sampling
        ["--algo", "treepo", "--credit.level", "segment", *SHORT],
        ["--algo", "treepo", "--credit.level", "siblings", "--credit.whitening", "none", *SHORT],
        ["--algo", "treepo", "--credit.weighting", "group_size", "--credit.reject-zero-std", *SHORT],
        ["--algo", "treepo", "--credit.no-include-root", "--credit.repeat-groups", *SHORT],
    ],
    ids=lambda flags: " ".join(flags[1:6]),
)
def test_parts_of_different_algorithms_work_together(flags, tmp_path):
    assert main(["run", *flags, *SMALL, "--out", str(tmp_path / "run")]) == 0
    folder = RunFolder.open(tmp_path / "run")
    (row,) = folder.metrics()
    assert row["update/updates"] > 0 and row["update/grad_norm"] > 0
    stored = [s for s in read_trees(folder.trees_path(1)) if s.credit is not None]
    assert stored and all(np.isfinite(s.credit.advantage).all() for s in stored)


def test_a_credit_that_needs_shares_refuses_signed_rewards_and_names_both(tmp_path, capsys):
    assert main(["run", "--algo", "treepo", "--credit", "siblings", *SMALL, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "rewards in [0,1]" in error and "Siblings" in error and "Outcome" in error
    assert not (tmp_path / "run").exists()

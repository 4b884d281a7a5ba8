"""Result rows for tests: a suite of two sets, measured by rule."""

import json

import numpy as np

from rlzoo.data.problems import Problem
from rlzoo.evaluation.rows import Protocol, describe_sets, result_row
from rlzoo.evaluation.runner import SetResult
from rlzoo.evaluation.suites import Suite
from rlzoo.evaluation.testsets import Hub, SetSpec
from rlzoo.rewards.math import GraderConfig
from rlzoo.store.cost import Ledger
from rlzoo.store.environment import environment
from rlzoo.store.runs import to_json

PROBLEMS = {name: [Problem(f"{name}{i}", f"{name} {i}?", str(i)) for i in range(n)] for name, n in (("one", 3), ("two", 5))}
HUB = Hub("owner/two", "test", {}, revision="abc")
SETS = (
    SetSpec("one", 3, "0", "0", "none", "plain", 4, GraderConfig(), generator="some:thing", seed=7),
    SetSpec("two", 5, "0", "0", "none", "plain", 4, GraderConfig(), hub=HUB),
)
SUITE = Suite("both", SETS, (3.0, 5.0), (4, 4))


def result(name, right, k=4, votes=True):
    n = len(PROBLEMS[name])
    correct = (np.arange(n * k).reshape(n, k) % 7 < right).astype(float)
    lengths = np.arange(n * k, dtype=np.int32).reshape(n, k) + 5
    kinds = {"right": int(correct.sum()), "unparsable": 2, "wrong": int(n * k - correct.sum() - 2)}
    ids = tuple(p.id for p in PROBLEMS[name])
    return SetResult(
        name, ids, 1.0, correct, lengths, lengths > 20, kinds, int(lengths.sum()), None, correct.mean(axis=1) if votes else None
    )


def protocol(**changes):
    given = {"template": "plain", "grader": "g 1", "k": {"one": 4, "two": 4}, "greedy": False, "temperature": 1.0, "vote": None, "seed": 0}
    given |= {"max_response_tokens": 64, "sampler": {"name": "chains", "top_p": 1.0}, "engine": "torch float32"}
    return Protocol(**(given | changes))


def row(right=3, seed=0, model="some/model", **changes):
    config = {"model": model, "seed": seed, "suite": "both", "nested": {"a": [1, 2.5], "é": None}}
    made = result_row(
        kind="eval",
        arm="model",
        config=config,
        suite="both",
        testsets=describe_sets(SUITE, PROBLEMS),
        protocol=protocol(**changes),
        results={"model": {name: result(name, right) for name in PROBLEMS}},
        weights=SUITE.weights_by_set,
        ledger=Ledger(2, "cpu core").as_dict(),
        environment=environment(),
    )
    return json.loads(to_json(made))


def store(folder, *rows):
    folder.mkdir(exist_ok=True)
    for i, each in enumerate(rows):
        (folder / f"row{i}.json").write_text(json.dumps(each))
    return folder

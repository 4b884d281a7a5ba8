"""Measuring inside a run: the dev split while training, base and trained model on the suite at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..backends.protocol import Backend
from ..backends.weights import copy_weights
from ..config import RunConfig
from ..data.problems import Problem
from ..evaluation.rows import Protocol, describe_sets, engine_name
from ..evaluation.runner import SetResult, evaluate
from ..evaluation.suites import find_suite, load_suite
from ..evaluation.votes import with_votes
from ..report.progress import Progress, counting
from ..rewards.math import GraderConfig, grader_name
from ..rewards.reward import Reward
from ..store.cost import Ledger
from ..store.runs import RunFolder, read_rows
from .models import load_model
from .sync import Sync

NONE = "none"
SEED = 20_000  # evaluation draws its own numbers, the same ones for every run, so that runs are compared on equal terms


Problems = Mapping[str, Sequence[Problem]]
"""By test set."""


def final_suite(config: RunConfig) -> dict[str, list[Problem]]:
    """The problems of the final measurement by test set; {} where there is none.

    Raises:
        ValueError: unknown suite, or a set that cannot be read or is not the pinned one.
    """
    if config.evaluation.suite == NONE:
        return {}
    try:
        return load_suite(config.evaluation.suite, config.evaluation.data_dir or None)
    except ValueError as error:  # told with the name that the option has here
        raise ValueError(str(error).replace("--data-dir", "--evaluation.data-dir")) from error


class Measurer:
    """Evaluates through the run's own backend and grader; the time goes to the ledger's `evaluation`."""

    def __init__(
        self,
        config: RunConfig,
        suite: Problems,
        backend: Backend,
        sync: Sync,
        reward: Reward,
        ledger: Ledger,
        folder: RunFolder,
        progress: Progress,
    ) -> None:
        self._config, self._backend, self._sync, self._reward = config, backend, sync, reward
        self._ledger, self._folder, self._progress = ledger, folder, progress
        self.suite = suite

    def described(self) -> dict[str, Any]:
        """What a result row says of the final measurement: suite, testsets, weights and protocol."""
        config, options = self._config, self._config.evaluation
        suite = find_suite(options.suite) if self.suite else None
        return {
            "suite": options.suite,
            "testsets": describe_sets(suite, self.suite) if suite else {},
            "weights": suite.weights_by_set if suite else {},
            "protocol": Protocol(
                template=config.template,
                grader=grader_name(GraderConfig()) if config.reward == "math" else config.reward,
                k=dict.fromkeys(self.suite, options.k),
                greedy=True,
                temperature=options.temperature,
                max_response_tokens=options.max_response_tokens,
                sampler={"name": "chains", "top_p": 1.0},
                engine=engine_name(self._backend, config.backend.dtype),
                vote=self._vote,
                seed=SEED,
            ),
        }

    @property
    def _vote(self) -> str | None:
        """How votes are counted; not at all with a plug-in reward, which need not know which answers are the same."""
        return "equivalent" if self._config.reward == "math" else None

    def dev(self, problems: Sequence[Problem], *, step: int) -> dict[str, float]:
        """Pass@1 and mean response length on dev problems, with the interval's half width."""
        result = self._evaluate({"dev": problems}, k=self._config.evaluation.dev_k, greedy=False, name=None)["dev"]
        estimate = result.pass_at_1
        return {
            "pass_at_1": estimate.mean,
            "half_width": (estimate.high - estimate.low) / 2,
            "length": result.length["mean"],
            "truncated": result.truncated_rate,
        }

    def final(self, model: Any) -> dict[str, dict[str, SetResult]]:
        """{"base": ..., "trained": ...}: both models on the suite, k samples and greedy; {} without a suite.

        `model` and the engine hold the base's weights afterwards: its module is used for both, so that a device never holds two.
        """
        if not self.suite:
            return {}
        self._progress.note(f"measuring the trained model on {self._config.evaluation.suite} (k = {self._config.evaluation.k})")
        self._take_over(model, -1)
        trained = self._evaluate(self.suite, k=self._config.evaluation.k, greedy=True, name="trained")
        self._progress.note("measuring the base model")
        copy_weights(model, load_model(self._config.model, dtype=self._config.master_dtype, device="cpu").model.named_parameters())
        self._take_over(model, -2)
        base = self._evaluate(self.suite, k=self._config.evaluation.k, greedy=True, name="base")
        return {"base": base, "trained": trained}

    def _take_over(self, model: Any, version: int) -> None:
        with self._ledger.phase("sync"):
            self._sync(model, version)

    def _evaluate(self, suite: Mapping[str, Sequence[Problem]], *, k: int, greedy: bool, name: str | None) -> dict[str, SetResult]:
        settings: dict[str, Any] = {
            "k": k,
            "greedy": greedy,
            "temperature": self._config.evaluation.temperature,
            "max_response_tokens": self._config.evaluation.max_response_tokens,
            "template": self._config.template,
            "grade": self._reward,
            "seed": SEED,
        }
        with self._ledger.phase("evaluation"):
            if name is None:
                return evaluate(self._backend, self._backend.tokenizer, suite, **settings)
            with self._folder.eval_sink(name) as sink, counting(f"{name}: responses") as progress:
                results = evaluate(self._backend, self._backend.tokenizer, suite, sink=sink, progress=progress, **settings)
            return with_votes(results, read_rows(self._folder.eval_path(name)), self._vote, self._reward) if self._vote else results

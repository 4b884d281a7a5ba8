"""What every registered algorithm would have made of a tree that one of them sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .. import registry
from ..algorithm import Algorithm
from ..config import build
from ..credit.base import Credit
from ..credit.whitening import unwhitened
from ..tree import Tree


@dataclass(frozen=True, slots=True, eq=False)
class Counterfactual:
    """An algorithm's credit of a tree, unwhitened; `credit` is None where it refuses the tree, and `note` says why. With a credit
    `note` holds what is worth knowing beside it, often nothing."""

    algorithm: str
    credit: Credit | None
    note: str = ""


class Judges:
    """Every registered algorithm, each with its own reward shaping, row filter and credit, set to trees of one run.

    The run's own algorithm stands there as the run configured it, the others with their defaults. All of them look at trees of
    the run's sampler, so that a credit which needs what this sampler does not give refuses by the rule that refuses such a run.
    """

    def __init__(self, config: Mapping[str, Any], origin: str) -> None:
        """`config`: the run's (from config.toml in the folder `origin`). One that this installation cannot read makes every
        algorithm refuse, with that reason."""
        self._own: Algorithm | None = None
        self._reason = ""
        try:
            self._own = build([(origin, config)]).algorithm
        except ValueError as error:
            self._reason = f"the run's config is not one of this installation: {error}"
        self._algorithms = {name: registry.find("algorithm", name) for name in registry.names("algorithm")}
        if self._own is not None:
            self._algorithms[str(config["algo"])] = self._own

    def __call__(self, tree: Tree) -> list[Counterfactual]:
        """One per algorithm, in order of their names."""
        if self._own is None:
            return [Counterfactual(name, None, self._reason) for name in self._algorithms]
        verdicts = _from_verdicts(tree, self._own)
        return [self._judge(name, algorithm, tree, verdicts) for name, algorithm in self._algorithms.items()]

    def _judge(self, name: str, algorithm: Algorithm, tree: Tree, verdicts: bool) -> Counterfactual:
        assert self._own is not None
        try:
            local = replace(algorithm, sampler=self._own.sampler, credit=unwhitened(algorithm.credit))
            judged = local.shaping(tree, tree.correct.tolist(), local.sampler.max_response_tokens) if verdicts else tree
            made = local.filter.mask([judged], local.credit([judged]))[0]
        except ValueError as error:
            return Counterfactual(name, None, str(error))
        dropped = not local.filter.keeps(judged)
        return Counterfactual(name, made, "its filter would drop this tree: no difference between its responses" if dropped else "")


def _from_verdicts(tree: Tree, own: Algorithm) -> bool:
    """Whether the tree's rewards are the run's own shaping of right and wrong. Else a plug-in gave them as numbers, and every
    algorithm sees those numbers."""
    shaped = own.shaping(tree, tree.correct.tolist(), own.sampler.max_response_tokens)
    return bool(np.allclose(shaped.reward, tree.reward, equal_nan=True))

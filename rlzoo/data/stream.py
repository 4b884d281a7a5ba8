"""The order in which training problems are used: a function of the seed and a cursor, nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .problems import Problem


class ProblemStream:
    """Endless passes over a problem set, each in its own order. `cursor` counts problems handed out; setting it resumes.

    Raises:
        ValueError: the set is empty.
    """

    def __init__(self, problems: Sequence[Problem], *, seed: int) -> None:
        if not problems:
            raise ValueError("the problem set is empty")
        self.problems = problems
        self._seed = seed
        self._order: tuple[int, np.ndarray] | None = None
        self.cursor = 0

    def take(self, count: int) -> list[tuple[str, Problem]]:
        """The next `count` problems, each with a key that is unique over all passes (it enters every sampling seed)."""
        taken = []
        for position in range(self.cursor, self.cursor + count):
            epoch, index = divmod(position, len(self.problems))
            problem = self.problems[int(self._epoch(epoch)[index])]
            taken.append((f"{epoch}/{problem.id}", problem))
        self.cursor += count
        return taken

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self._seed, epoch]).permutation(len(self.problems)))
        return self._order[1]

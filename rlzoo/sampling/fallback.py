"""Where a tree that ran out of open paths goes on: which finished path to return to, and where to cut it.

Policies and their names are those of TreePO's released sampler (arXiv 2508.17445; its repository at f055523).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..tree import Float64, Stop
from .shares import softmax

Cut = Literal["none", "random", "min_logprob_token", "block", "inverse_block", "from_start"]
Candidates = Literal["soft_boxed_and_eos", "random_all", "finished_first", "finished_first_strict", "longer_first", "boxed_ge_window"]

PRIORITY = {Stop.ANSWER: 7.0, Stop.EOS: 5.0, Stop.DEPTH: 4.0, Stop.LENGTH: 3.0, Stop.REPETITION: 2.0}


@dataclass(frozen=True, slots=True)
class Finished:
    """A finished path: its leaf (a builder id), why it ended, and the log-probs of its response, float64 [tokens]."""

    leaf: int
    stop: Stop
    logprobs: Float64

    @property
    def tokens(self) -> int:
        return len(self.logprobs)


def ordered(paths: Sequence[Finished], policy: Candidates, least_tokens: int, rng: np.random.Generator) -> list[Finished]:
    """The paths that may be returned to, in the order in which they are.

    soft_boxed_and_eos: those that ended with an answer or end of text, shuffled; random_all: all, shuffled; finished_first: all,
    drawn without replacement with weight by stop reason (answer 7, end of text 5, depth 4, length 3, repetition 2);
    finished_first_strict: sorted by it, best first; longer_first: drawn with weight by length; boxed_ge_window: answers of
    at least `least_tokens` tokens, shuffled.
    """
    if policy == "soft_boxed_and_eos":
        paths = [p for p in paths if p.stop in (Stop.ANSWER, Stop.EOS)]
    elif policy == "boxed_ge_window":
        paths = [p for p in paths if p.stop == Stop.ANSWER and p.tokens >= least_tokens]
    if policy == "finished_first_strict":
        return sorted(paths, key=lambda p: -PRIORITY[p.stop])
    weight = np.ones(len(paths))
    if policy == "finished_first":
        weight = np.array([PRIORITY[p.stop] for p in paths])
    elif policy == "longer_first":
        weight = np.array([float(p.tokens) for p in paths])
    keys = np.log(weight) + rng.gumbel(size=len(paths))  # the largest first: drawing without replacement in proportion to weight
    return [paths[i] for i in np.argsort(-keys)]


def cut_at(path: Finished, policy: Cut, *, window: int, max_windows: int, block: int, rng: np.random.Generator) -> int:
    """Response tokens kept of a path, fewer than it has; 0 is a restart from the prompt.

    random: a multiple of `window`, uniform over the last `max_windows` of them (0: over all), so that at least the last
    (partial) window goes; min_logprob_token: just before the least probable token; block, inverse_block: at the start of a
    block of `block` tokens, drawn by softmax of minus (block) or plus (inverse_block) its mean log-prob; from_start: 0. A
    path shorter than `window` is restarted whatever the policy.
    """
    tokens = path.tokens
    if policy == "from_start" or tokens < window:
        return 0
    windows = -(-tokens // window)
    if policy == "random":
        back = int(rng.integers(1, (min(max_windows, windows) if max_windows else windows) + 1))
        return (windows - back) * window
    earliest = max(0, windows - max_windows) * window if max_windows else 0
    if policy == "min_logprob_token":
        return earliest + int(np.argmin(path.logprobs[earliest:]))
    starts = list(range(earliest, tokens, block))
    means = np.array([path.logprobs[s : s + block].mean() for s in starts])
    return int(rng.choice(starts, p=softmax(-means if policy == "block" else means, 1.0)))

"""A tree of short segments per problem, grown under a budget of paths: segment decoding with branching and fallback."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from ..backends.protocol import Temperature
from ..builder import TreeBuilder
from ..options import Count, CountOrOff
from ..tree import ROOT, Stop
from .base import Extend, Growth, Leaves, Levels, SamplerOptions, Tokens
from .fallback import Candidates, Cut, Finished, cut_at, ordered
from .shares import scheduled, softmax, uniform_shares, weighted_shares


@dataclass(frozen=True, kw_only=True)
class Segments(SamplerOptions):
    """TreePO's sampler (arXiv 2508.17445, algorithm 1, and its released code).

    A problem starts with `initial` copies of its prompt. At each boundary, when all its segments in flight are back, the a open
    paths share min(width - finished, branching * (a + ended just now)) continuations, at least one each: what an ended path
    would have used is transferred to the others. When no path is open and fewer than `width` have finished, fallback cuts
    finished ones and goes on from there. Active + finished paths are never more than `width`.

    Raises:
        ValueError: a value is outside its range.
    """

    name: ClassVar[str] = "segments"
    provides: ClassVar[frozenset[str]] = frozenset({"siblings"})

    width: Leaves = 16
    """Finished paths per problem (w)."""
    depth: Levels = 7
    """Most segments on a path (d)."""
    segment_tokens: Tokens = 24
    """Longest segment, tokens (l); the response limit is d * l."""
    branching: tuple[Leaves, ...] = (2,)
    """Continuations of a path at a boundary (b): one number, or the least and the most of a fresh draw at each boundary."""
    initial: tuple[Leaves, ...] = (2, 8)
    """Copies of the prompt at the start: one number, or the least and the most of a draw per problem."""
    max_tree_tokens: CountOrOff = 0
    """Budget in tokens instead of paths, each finished path counted whole: `width` then only bounds what is estimated to fit, an open
    path having another segment to go, and one more path being as long as the finished ones are in the mean; 0 switches it off."""
    min_width: Leaves = 1
    """Fewest paths under a budget of tokens."""
    split: Literal["uniform", "response_sum", "response_mean", "segment_mean"] = "uniform"
    """How open paths share the continuations: evenly, or by log-prob: summed or averaged over the response, or averaged over
    its last `segment_tokens` tokens."""
    split_favours: Literal["low", "high"] = "low"
    """Whether paths of low or of high log-prob get more."""
    split_temperature: tuple[Temperature, ...] = (2.0,)
    """Temperature of the log-prob weights: one number, or from the first to the second along half a sine over the run."""
    remainder: Literal["random", "last"] = "random"
    """Who gets what an even split leaves over: paths drawn at random, or the last path (as released)."""
    fallback: Cut = "random"
    """Where a finished path is cut: a random window boundary, the least probable token, a block drawn by low (block) or high
    (inverse_block) log-prob, the prompt; or no fallback."""
    fallback_from: Candidates = "soft_boxed_and_eos"
    """Which finished paths are returned to, and in what order."""
    fallback_window: CountOrOff = 0
    """Tokens between possible cuts; 0 is the segment length."""
    fallback_max_windows: CountOrOff = 0
    """How far back a cut may go, in windows; 0 is all the way."""
    fallback_block_tokens: Count = 128
    """Block length of the block policies, tokens."""
    fallback_min_windows: Count = 1
    """Shortest path, in windows, that boxed_ge_window returns to."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("branching", "initial"):
            _check_range(f"sampler.{name}", getattr(self, name), self.width)
        if self.width > 1 and self.fallback == "none" and self.initial[-1] == self.branching[-1] == 1:
            raise ValueError("sampler.initial = 1 with sampler.branching = 1 and sampler.fallback = none grows one path, not sampler.width")
        if len(self.split_temperature) not in (1, 2):
            raise ValueError(f"sampler.split_temperature is {self.split_temperature}; it needs one or two numbers")
        if self.min_width > self.width:
            raise ValueError(f"sampler.min_width is {self.min_width}; it must not be larger than sampler.width = {self.width}")

    @property
    def max_response_tokens(self) -> int:
        return self.depth * self.segment_tokens

    @property
    def max_depth(self) -> int:
        return self.depth

    @property
    def leaves_per_tree(self) -> int:
        return self.width

    @property
    def full_tree_tokens(self) -> int:
        """Without falling back; a cut path is continued for as many more tokens as it lost, at most `width` paths at a time."""
        paths = [min(self.width, self.initial[-1] * int(self.branching[-1] ** level)) for level in range(self.depth)]
        return sum(paths) * self.segment_tokens

    @property
    def window(self) -> int:
        """Tokens between possible cuts."""
        return self.fallback_window or self.segment_tokens

    def plant(self, builder: TreeBuilder, rng: np.random.Generator, progress: float) -> _Boundaries:
        return _Boundaries(self, builder, rng, scheduled(self.split_temperature, progress))


def _check_range(name: str, values: tuple[int, ...], width: int) -> None:
    if len(values) not in (1, 2) or not 1 <= values[0] <= values[-1] <= width:
        raise ValueError(f"{name} is {values}; it needs one number, or the least and the most, from 1 to sampler.width = {width}")


@dataclass(slots=True)
class _Boundaries(Growth):
    """One problem's tree: all its segments in flight meet at a boundary, then the next ones are decided."""

    options: Segments
    builder: TreeBuilder
    rng: np.random.Generator
    temperature: float
    finished: list[int] = field(default_factory=list)  # leaves
    back: list[int] = field(default_factory=list)  # segments that have come back since the last boundary
    met: list[int] = field(default_factory=list)  # at the last boundary
    awaited: int = 0
    depth: dict[int, int] = field(default_factory=lambda: {ROOT: 0})  # sampled segments on the path down to a node
    counts: Counter[str] = field(default_factory=Counter)

    def start(self) -> list[Extend]:
        width = self._width([])
        return self._ask([(ROOT, min(self._draw(self.options.initial), width))])

    def grown(self, node: int) -> list[Extend]:
        self.depth[node] = self.depth[self.builder.parent(node)] + 1
        if self.counts["fallback_rounds"]:
            self.counts["fallback_tokens"] += len(self.builder.tokens(node))
        self.back.append(node)
        return self._boundary() if len(self.back) == self.awaited else []

    def settled(self, node: int) -> Sequence[int]:
        """After a boundary, what met there: fallback returns to few of them. The prompt, which it often returns to, is kept."""
        if node == ROOT or self.back:
            return ()
        return self.met

    def report(self) -> dict[str, float]:
        """Counts of one tree: boundaries; fallback rounds, the paths they started, those among them from the bare prompt, tokens
        kept of and tokens in the paths they returned to, and tokens sampled from the first fallback on."""
        names = ("boundaries", "fallback_rounds", "fallback_paths", "restarts", "fallback_kept_tokens", "fallback_path_tokens")
        return {name: float(self.counts[name]) for name in (*names, "fallback_tokens")}

    def _ask(self, continuations: Sequence[tuple[int, int]]) -> list[Extend]:
        self.awaited = sum(count for _, count in continuations)
        return [Extend(node, count, self.options.segment_tokens) for node, count in continuations]

    def _draw(self, values: tuple[int, ...]) -> int:
        return values[0] if len(values) == 1 else int(self.rng.integers(values[0], values[1] + 1))

    def _boundary(self) -> list[Extend]:
        self.met, self.back = sorted(self.back), []
        back = self.met
        active = [node for node in back if self.builder.stop(node) == Stop.OPEN]
        self.finished += [node for node in back if self.builder.stop(node) != Stop.OPEN]
        self.counts["boundaries"] += 1
        budget = max(0, self._width(active) - len(self.finished))
        if active:
            total = max(len(active), min(budget, self._draw(self.options.branching) * len(back)))
            return self._ask(list(zip(active, self._shares(active, total), strict=True)))
        if budget and self.options.fallback != "none":
            return self._ask(self._fall_back(budget))
        return []

    def _width(self, active: Sequence[int]) -> int:
        """Paths wanted: `width`, or what a budget of tokens is estimated to leave room for."""
        options = self.options
        if not options.max_tree_tokens:
            return options.width
        ended = [len(self._logprobs(leaf)) for leaf in self.finished]
        under_way = [len(self._logprobs(node)) + options.segment_tokens for node in active]
        lengths = under_way or ended or [options.segment_tokens]  # in fallback, and at the start, nothing is under way
        room = (options.max_tree_tokens - sum(ended)) / (sum(lengths) / len(lengths))
        return min(options.width, max(options.min_width, int(max(0.0, room)) + len(self.finished)))

    def _logprobs(self, node: int) -> list[float]:
        """Log-probs of the response down to the end of `node`."""
        return [x for n in self.builder.path(node) for x in self.builder.logprobs(n)]

    def _shares(self, active: Sequence[int], total: int) -> list[int]:
        options = self.options
        if options.split == "uniform" or total == len(active):
            return uniform_shares(total, len(active), options.remainder, self.rng)
        last = options.segment_tokens if options.split == "segment_mean" else 0
        means = options.split != "response_sum"
        scores = []
        for node in active:
            logprobs = self._logprobs(node)[-last:]
            scores.append(sum(logprobs) / (len(logprobs) if means else 1))
        sign = -1 if options.split_favours == "low" else 1
        return weighted_shares(total, softmax([sign * s for s in scores], self.temperature))

    def _fall_back(self, budget: int) -> list[tuple[int, int]]:
        """Places to go on from and how often, `budget` paths in all at most."""
        options = self.options
        self.counts["fallback_rounds"] += 1
        paths = [Finished(leaf, self.builder.stop(leaf), np.array(self._logprobs(leaf))) for leaf in self.finished]
        places = []
        for path in ordered(paths, options.fallback_from, options.fallback_min_windows * options.window, self.rng):
            cut = cut_at(
                path,
                options.fallback,
                window=options.window,
                max_windows=options.fallback_max_windows,
                block=options.fallback_block_tokens,
                rng=self.rng,
            )
            place, kept = self._place(path.leaf, cut)
            count = min(self._draw(options.branching), budget)
            places.append((place, count))
            self._count_fallback(count, kept, path.tokens)
            budget -= count
            if budget == 0 or options.fallback == "from_start":
                break
        if not places:  # nothing to return to: one new path from the prompt
            places = [(ROOT, 1)]
            self._count_fallback(1, 0, 0)
        return places

    def _count_fallback(self, paths: int, kept: int, tokens: int) -> None:
        self.counts["fallback_paths"] += paths
        self.counts["restarts"] += paths * (kept == 0)
        self.counts["fallback_kept_tokens"] += paths * kept
        self.counts["fallback_path_tokens"] += paths * tokens

    def _place(self, leaf: int, cut: int) -> tuple[int, int]:
        """The node that ends after the first `cut` tokens of the path to `leaf`, cut out if need be, and the tokens up to its
        end; higher up where a path from there could not have another segment."""
        position, above = 0, ROOT
        for node in self.builder.path(leaf):
            length = len(self.builder.tokens(node))
            if position == cut or self.depth[node] >= self.options.depth:
                break
            if cut < position + length:
                upper = self.builder.split(node, cut - position)
                self.depth[upper] = self.depth[node]
                return upper, cut
            position, above = position + length, node
        return above, position

"""Is the answer right? Grading of mathematical answers, for any caller, however hostile the text.

    from rlzoo.rewards.math import grade
    grade([("\\\\frac12", "... so the answer is \\\\boxed{0.5}.")])  # [Verdict(kind=<Kind.RIGHT>, detail='')]

The last boxed answer counts (where a list is asked for: the last boxes, if only separators stand between them). Plain numbers
are compared here, exactly; everything else goes to math-verify in killable worker processes (`rlzoo.rewards.pool`).
See docs/grader.md for what is measured and what is known to differ from other graders.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from importlib import metadata
from types import TracebackType

from rlzoo.rewards.extract import MAX_ANSWER_CHARS, TAIL_CHARS, gold_answer, is_list, last_boxes, tidy
from rlzoo.rewards.numbers import compare_plain
from rlzoo.rewards.pool import Job, Pool, Task
from rlzoo.rewards.worker import Limits

REVISION = 2  # raise it whenever a verdict can change


class Kind(StrEnum):
    """The five verdicts."""

    RIGHT = "right"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"  # no complete box, too long, or not mathematics; counts as wrong
    TIMED_OUT = "timed_out"  # the answer went over its CPU or memory limit; counts as wrong
    FAILED = "failed"  # the grader itself failed: neither right nor wrong


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the grader says of one response. `detail` says why, where that is not obvious."""

    kind: Kind
    detail: str = ""

    @property
    def correct(self) -> bool | None:
        """True for right; False for wrong, unparsable and timed out; None where the grader itself failed."""
        return None if self.kind is Kind.FAILED else self.kind is Kind.RIGHT


@dataclass(frozen=True, slots=True)
class GraderConfig:
    """How to grade.

    `deadline_s` is CPU time per pair; `wall_s` is the wall-clock backstop for a starved worker (such a pair is `failed`, not
    wrong); `memory_mb` is address space; a worker process is replaced after `recycle` pairs. Without `require_box`, a response
    without a box is searched for its final answer by math-verify; for training leave it on.
    """

    workers: int = 2
    deadline_s: float = 3.0
    wall_s: float = 60.0
    memory_mb: int = 2048
    recycle: int = 2000
    require_box: bool = True
    cache_size: int = 100_000
    fast_path: bool = True
    start_timeout_s: float = 60.0
    max_starts: int = 3

    def __post_init__(self) -> None:
        for name in ("workers", "deadline_s", "wall_s", "memory_mb", "recycle", "start_timeout_s", "max_starts"):
            if getattr(self, name) <= 0:
                raise ValueError(f"grader: {name} is {getattr(self, name)}; it must be positive")
        if self.cache_size < 0:
            raise ValueError(f"grader: cache_size is {self.cache_size}; it must not be negative")


@lru_cache(maxsize=1)
def grader_version() -> str:
    """Everything a verdict depends on beside the pair; part of the cache's key and of result rows."""
    packages = ("math-verify", "latex2sympy2-extended", "sympy", "antlr4-python3-runtime")
    return " ".join([f"rlzoo-grader {REVISION}", *(f"{name} {metadata.version(name)}" for name in packages)])


def grader_name(config: GraderConfig) -> str:
    """For result rows: the versions, and the settings that decide verdicts."""
    return f"{grader_version()}, require_box {config.require_box}, {config.deadline_s:g} s, {config.memory_mb} MB"


_Key = tuple[str, str, bool, str]  # gold answer, answer, was it boxed, grader version


@dataclass(eq=False)
class Handle:
    """A batch under way; give it to `Grader.collect`."""

    verdicts: list[Verdict | None]
    _job: Job | None = None
    _keys: list[_Key] = field(default_factory=list)  # of the job's tasks
    _places: dict[_Key, list[int]] = field(default_factory=dict)  # key -> positions in the batch

    @property
    def done(self) -> bool:
        """Whether `collect` would return at once."""
        return self._job is None or self._job.done.is_set()


class Grader:
    """Grades batches of (gold, response text), in order, in worker processes that start on first need.

    A context manager; `close` ends the workers. `submit` returns at once, so that finished responses are graded while others are
    still being sampled; `collect` waits. `counts` holds verdicts per kind, `restarts` the grading processes that had to be replaced.
    """

    def __init__(self, config: GraderConfig | None = None, *, command: Sequence[str] | None = None) -> None:
        self.config = config or GraderConfig()
        limits = Limits(self.config.deadline_s, self.config.wall_s, self.config.memory_mb, self.config.recycle)
        self._pool = Pool(
            self.config.workers, limits, start_timeout_s=self.config.start_timeout_s, max_starts=self.config.max_starts, command=command
        )
        self._cache: OrderedDict[_Key, Verdict] = OrderedDict()
        self._lock = threading.Lock()
        self.counts: Counter[Kind] = Counter()
        self.cache_hits = 0
        self.fast = 0

    @property
    def restarts(self) -> int:
        return self._pool.restarts

    @property
    def cpu_s(self) -> float:
        """CPU seconds that the workers have used, their start included."""
        return self._pool.cpu_s

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def warm(self) -> None:
        """Start the workers now (0.5-1 s of CPU each), without waiting for them."""
        self._pool.warm()

    def worker_pids(self) -> list[int]:
        """Process ids of the running workers."""
        return self._pool.pids()

    def close(self) -> None:
        """End the workers and wait until they are gone; batches not yet collected become `failed`. Safe to call twice."""
        self._pool.close()

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
        """One verdict per (gold, response text), in order.

        Raises:
            ValueError: a pair is not two strings, or its gold answer is empty or too long.
        """
        return self.collect(self.submit(pairs))

    def submit(self, pairs: Sequence[tuple[str, str]]) -> Handle:
        """Start grading a batch and return at once.

        Raises:
            ValueError: as `grade`.
            RuntimeError: the grader is closed.
        """
        handle = Handle([None] * len(pairs))
        tasks: list[Task] = []
        for place, pair in enumerate(pairs):
            gold, response = _check(place, pair)
            decided, answer, boxed = self._extract(gold, response)
            if decided is None and boxed and self.config.fast_path:
                equal = compare_plain(gold, answer)
                if equal is not None:
                    decided = Verdict(Kind.RIGHT if equal else Kind.WRONG)
                    self.fast += 1
            key = (gold, answer, boxed, grader_version())
            if decided is None:
                decided = self._recall(key)
            handle.verdicts[place] = decided
            if decided is None:
                if key not in handle._places:
                    tasks.append(Task(gold, answer, boxed))
                    handle._keys.append(key)
                handle._places.setdefault(key, []).append(place)
        if tasks:
            handle._job = self._pool.submit(tasks)
        return handle

    def collect(self, handle: Handle, timeout_s: float | None = None) -> list[Verdict]:
        """Wait for a batch.

        Raises:
            TimeoutError: not done within `timeout_s`; it may be collected again.
        """
        if handle._job is not None:
            for key, outcome in zip(handle._keys, handle._job.wait(timeout_s), strict=True):
                verdict = Verdict(Kind(outcome.kind), outcome.detail)
                self._remember(key, verdict)
                for place in handle._places[key]:
                    handle.verdicts[place] = verdict
            handle._job = None
        verdicts = [v for v in handle.verdicts if v is not None]
        with self._lock:
            self.counts.update(v.kind for v in verdicts)
        return verdicts

    def _extract(self, gold: str, response: str) -> tuple[Verdict | None, str, bool]:
        """(verdict if decided already, answer, whether it was boxed)."""
        boxes = last_boxes(response)
        if not boxes:
            if self.config.require_box:
                return Verdict(Kind.UNPARSABLE, "no complete box"), "", True
            return None, response[-TAIL_CHARS:], False
        answer = ", ".join(boxes) if len(boxes) > 1 and is_list(gold) and not is_list(boxes[-1]) else boxes[-1]
        if len(answer) > MAX_ANSWER_CHARS:
            return Verdict(Kind.UNPARSABLE, f"answer longer than {MAX_ANSWER_CHARS} characters"), "", True
        answer = tidy(answer)
        return (None if answer else Verdict(Kind.UNPARSABLE, "empty box")), answer, True

    def _recall(self, key: _Key) -> Verdict | None:
        with self._lock:
            verdict = self._cache.get(key)
            if verdict is not None:
                self._cache.move_to_end(key)
                self.cache_hits += 1
            return verdict

    def _remember(self, key: _Key, verdict: Verdict) -> None:
        if verdict.kind is Kind.FAILED:  # says nothing about the pair
            return
        with self._lock:
            self._cache[key] = verdict
            while len(self._cache) > self.config.cache_size:
                self._cache.popitem(last=False)


def _check(place: int, pair: object) -> tuple[str, str]:
    if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
        raise ValueError(f"pair {place}: expected (gold answer, response text), two strings; got {_brief(pair)}")
    gold = gold_answer(pair[0])
    if not gold or len(gold) > MAX_ANSWER_CHARS:
        raise ValueError(f"pair {place}: the gold answer has {len(gold)} characters; 1 to {MAX_ANSWER_CHARS} are allowed")
    return gold, pair[1]


def _brief(pair: object) -> str:
    if isinstance(pair, tuple | list):
        return f"{type(pair).__name__} of ({', '.join(type(x).__name__ for x in pair[:4])})"
    return type(pair).__name__


_default: tuple[int, Grader] | None = None
_default_lock = threading.Lock()


def grade(pairs: Sequence[tuple[str, str]]) -> list[Verdict]:
    """Grade with a shared default `Grader`, made on first use and closed at exit. See `Grader.grade`."""
    global _default
    with _default_lock:
        if _default is None or _default[0] != os.getpid():  # a forked child has no dispatcher thread: it makes its own
            _default = (os.getpid(), Grader())
            atexit.register(_close_default, os.getpid())
        grader = _default[1]
    return grader.grade(pairs)


def _close_default(pid: int) -> None:
    if _default is not None and _default[0] == pid == os.getpid():
        _default[1].close()

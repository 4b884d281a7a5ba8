"""Live progress: a bar with one line of figures on a terminal, plain timed lines elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

from ..escape import visible
from .text import count


@dataclass(frozen=True, slots=True)
class Shown:
    """A figure of the live line: the first of `keys` that a row has, under `label`, as `form` writes it."""

    label: str
    keys: tuple[str, ...]
    form: Callable[[float], str]


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


TRAINING: tuple[Shown, ...] = (
    Shown("reward", ("reward",), lambda v: f"{v:.3f}"),
    Shown("Pass@1", ("pass_at_1",), _percent),
    Shown("dev", ("dev/pass_at_1",), _percent),
    Shown("length", ("length",), lambda v: f"{v:.0f}"),
    Shown("cut off", ("truncated",), _percent),
    Shown("dead groups", ("dead_groups",), _percent),
    Shown("tokens/s", ("tokens_per_s",), count),
    Shown("unique/s", ("unique_tokens_per_s",), count),
    Shown("ratio", ("update/ratio_mean", "ratio_mean"), lambda v: f"{v:.3f}"),
    Shown("KL", ("update/kl_ref", "update/kl_old", "kl"), lambda v: f"{v:.1e}"),
    Shown("device-hours", ("device_hours",), lambda v: f"{v:.4f}"),
)
"""Figures of a training step. tokens/s count every response in full, unique/s every sampled token once."""


class Progress:
    """Shows how far `total` steps are. On a terminal a live bar; elsewhere at most one line per `every_s` seconds, and always
    the first and the last. A context manager; `close` is idempotent.

    Raises:
        ValueError: total < 1.
    """

    def __init__(
        self,
        total: int,
        label: str = "step",
        *,
        shown: Sequence[Shown] = TRAINING,
        console: Console | None = None,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if total < 1:
            raise ValueError(f"progress over {total} steps; must be at least 1")
        self.total, self.label = total, label
        self._shown, self._console = shown, console or Console(stderr=True)
        self._every_s, self._clock = every_s, clock
        self._started = clock()
        self._printed_at = -math.inf
        self._unprinted: tuple[int, str] | None = None
        self._bar, self._live = None, None
        self._closed = False
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()
            )
            self._task = self._bar.add_task(label, total=total)
            self._live = Live(self._bar, console=self._console, refresh_per_second=4)
            self._live.start()

    def update(self, row: Mapping[str, Any], step: int | None = None) -> None:
        """Show a row of metrics; `step` is taken from the row where not given. Figures that are missing or NaN are left out."""
        if self._closed:
            return
        at = int(row.get("step", 0)) if step is None else step
        line = figures(row, self._shown)
        if self._bar is not None and self._live is not None:
            self._bar.update(self._task, completed=at)
            self._live.update(Group(self._bar, Text(line)))
            return
        self._unprinted = (at, line)
        if self._clock() - self._printed_at >= self._every_s:
            self._print()

    def note(self, text: str) -> None:
        """A message that stays, above the bar or as a line of its own."""
        if self._bar is not None:
            self._console.print(Text(visible(text)))
        else:
            self._plain(text)

    def close(self) -> None:
        """End the display; a plain one prints the last row if it has not yet."""
        if self._closed:
            return
        self._closed = True
        if self._live is not None:
            self._live.stop()
        elif self._unprinted is not None:
            self._print()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _print(self) -> None:
        if self._unprinted is None:
            return
        step, line = self._unprinted
        self._plain(f"{self.label} {step}/{self.total}" + (f" · {line}" if line else ""))
        self._unprinted, self._printed_at = None, self._clock()

    def _plain(self, text: str) -> None:
        # straight to the stream: a console that is no terminal would break lines at 80 columns
        print(f"[{self._clock() - self._started:8.1f} s] {visible(text)}", file=self._console.file, flush=True)


@contextmanager
def counting(label: str, *, console: Console | None = None, every_s: float = 10.0) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, all) that shows how far something is, e.g. the `progress` of `rlzoo.evaluation.runner.evaluate`."""
    shown: list[Progress] = []

    def count_up(done: int, total: int) -> None:
        if not shown:
            shown.append(Progress(total, label, shown=(), console=console, every_s=every_s))
        shown[0].update({}, step=done)

    try:
        yield count_up
    finally:
        for progress in shown:
            progress.close()


def figures(row: Mapping[str, Any], shown: Sequence[Shown] = TRAINING) -> str:
    """One line out of a row of metrics."""
    parts = []
    for item in shown:
        value = next((row[key] for key in item.keys if row.get(key) is not None), None)
        if value is not None and math.isfinite(float(value)):
            parts.append(f"{item.label} {item.form(float(value))}")
    return " · ".join(parts)

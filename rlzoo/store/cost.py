"""The ledger: where a run's device time went."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

PHASES = ("sampling", "grading", "credit", "scoring", "update", "sync", "evaluation", "checkpoint", "other")
"""`other` is the time that no phase claimed."""


def totals(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """What training has cost up to and including each row of metrics.jsonl: "steps", sampled "tokens", "trained-tokens" (of the updates'
    rows, each pass counts), and "device-hours", dev evaluations before it included."""
    found: list[dict[str, float]] = []
    cost = dict.fromkeys(("steps", "tokens", "trained-tokens", "device-hours"), 0.0)
    for row in rows:
        cost = {
            "steps": max(cost["steps"], float(row.get("step") or 0)),
            "tokens": cost["tokens"] + float(row.get("sampled_tokens") or 0),
            "trained-tokens": cost["trained-tokens"] + float(row.get("update/trained") or 0),
            "device-hours": max(cost["device-hours"], float(row.get("device_hours") or 0)),
        }
        found.append(cost)
    return found


def spent(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The last of `totals`; 0 each without a row."""
    return totals([{}, *rows])[-1]


def open_ledger(device: str) -> Ledger:
    """A ledger for work on a torch device: on a CPU a device is a core, as many as torch has threads."""
    import torch

    if device == "cpu":
        return Ledger(torch.get_num_threads(), "cpu core")
    return Ledger(1, torch.cuda.get_device_name(device))


class Ledger:
    """Seconds per phase. Phases are exclusive main-thread time: while an inner phase runs, the outer one stands still, and what
    no phase claims goes to `other`, so that the phases always sum to the wall time since the ledger was made.

    devices: how many of them the run holds for its whole life, used or idle; `device` says what one is ("cpu core", a GPU's
    name). Device-seconds are devices x wall seconds, added up session by session when a run is resumed.

    Raises:
        ValueError: devices < 1.
    """

    def __init__(self, devices: int = 1, device: str = "cpu core", *, clock: Callable[[], float] = time.perf_counter) -> None:
        if devices < 1:
            raise ValueError(f"devices = {devices}; a run holds at least 1")
        self.devices, self.device = devices, device
        self._clock = clock
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._device_seconds = dict.fromkeys(PHASES, 0.0)
        self._stack: list[str] = []
        self._beside: dict[str, Callable[[], float]] = {}
        self._beside_before: dict[str, float] = {}
        self._thread = threading.get_ident()
        self._mark = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time inside the block to `name`.

        Raises:
            ValueError: no such phase.
            RuntimeError: called from another thread than the one that made the ledger (overlapped work has no place here).
        """
        if name not in self._seconds:
            raise ValueError(f"unknown phase {name!r}; allowed are {', '.join(PHASES)}")
        if threading.get_ident() != self._thread:
            raise RuntimeError(f"phase {name!r} entered from another thread; the ledger counts main-thread time only")
        self._charge()
        self._stack.append(name)
        try:
            yield
        finally:
            self._charge()
            self._stack.pop()

    def beside(self, name: str, spent: Callable[[], float]) -> None:
        """Also tell, under `name`, of work that overlaps with the phases in other processes: `spent` gives its amount in this session.
        It is part of no phase and of no sum."""
        self._beside[name] = spent

    def overlapped(self) -> dict[str, float]:
        """The work beside the phases, all sessions together."""
        before = self._beside_before
        return before | {name: before.get(name, 0.0) + spent() for name, spent in self._beside.items()}

    def _charge(self) -> None:
        now = self._clock()
        current = self._stack[-1] if self._stack else "other"
        self._seconds[current] += now - self._mark
        self._device_seconds[current] += self.devices * (now - self._mark)
        self._mark = now

    def seconds(self) -> dict[str, float]:
        """Seconds per phase up to now, every phase named; they sum to `wall_s`."""
        self._charge()
        return dict(self._seconds)

    @property
    def wall_s(self) -> float:
        """Seconds that the run has lasted, all sessions together."""
        return sum(self.seconds().values())

    @property
    def device_hours(self) -> float:
        """devices x wall / 3600."""
        self._charge()
        return sum(self._device_seconds.values()) / 3600

    def as_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON and for `resume`."""
        self._charge()
        return {
            "device": self.device,
            "devices": self.devices,
            "wall_s": sum(self._seconds.values()),
            "device_hours": sum(self._device_seconds.values()) / 3600,
            "seconds": dict(self._seconds),
            "device_seconds": dict(self._device_seconds),
            "overlapped": self.overlapped(),
        }

    def resume(self, saved: Mapping[str, Any]) -> None:
        """Add what an earlier session spent (its `as_dict`). The pause between the two is counted nowhere; the devices of this
        session may differ from those.

        Raises:
            ValueError: `saved` is no ledger.
        """
        for own, key in ((self._seconds, "seconds"), (self._device_seconds, "device_seconds")):
            if not isinstance(saved.get(key), Mapping):
                raise ValueError(f"the saved ledger is incomplete: no {key}")
            unknown = set(saved[key]) - set(PHASES)
            if unknown:
                raise ValueError(f"the saved ledger has unknown phases: {', '.join(sorted(unknown))}")
            for name, value in saved[key].items():
                own[name] += float(value)
        for name, value in saved.get("overlapped", {}).items():
            self._beside_before[name] = self._beside_before.get(name, 0.0) + float(value)

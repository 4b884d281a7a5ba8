"""Experiment trackers, through accelerate's."""

from __future__ import annotations

import math
import numbers
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
"""Tracker names and the package each needs."""

PROJECT = "rlzoo"


class Trackers:
    """Open trackers; `log` sends one step's numbers to each of them."""

    def __init__(self, trackers: Sequence[Any], folder: Path | None = None) -> None:
        self._trackers, self._folder = list(trackers), folder or Path()

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Send numbers, texts left out. Nested tables become `outer/inner`; NaN and infinities are not sent.

        Raises:
            OSError: what was sent up to now cannot be written.
        """
        sent = {name: value for name, value in _flat(values) if not isinstance(value, str)}
        with _writing(self._folder):
            for tracker in self._trackers:
                tracker.log(sent, step=step)

    def close(self) -> None:
        """Finish every tracker; idempotent.

        Raises:
            OSError: what was sent last cannot be written.
        """
        with _writing(self._folder):
            while self._trackers:
                self._trackers.pop().finish()


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # TensorBoard's does not say which file it was
        raise OSError(error.errno, error.strerror or str(error), str(error.filename or folder)) from error


@cache
def _leave_to_caller() -> None:
    """What happens in TensorBoard's writer thread is raised by the next `log` or `close`; no need to print it there as well."""
    report = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            report(args)

    threading.excepthook = hook


def open_trackers(names: Sequence[str], folder: str | Path, config: Mapping[str, Any], *, after: int | None = None) -> Trackers:
    """Open trackers by name, with the config stored in each. TensorBoard's events go to `folder`/tensorboard; the others name the
    run after the folder. "none" or no name: nothing is opened, nothing imported.

    after: the step that a resumed run goes on from; TensorBoard forgets what an earlier process sent for later ones. None for a
    run from its start, which forgets everything. (The other trackers get a resumed run as another one of the same name.)

    Raises:
        ValueError: unknown name, "none" beside another, or a tracker whose package is not installed.
    """
    wanted = list(dict.fromkeys(names))
    check_trackers(wanted)
    if not wanted or wanted == ["none"]:
        return Trackers([])
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    _leave_to_caller()
    run, folder = Path(folder).resolve().name, Path(folder)
    made = []
    with _writing(folder / "tensorboard"):
        for name in wanted:
            kind = LOGGER_TYPE_TO_CLASS[name]
            if name == "tensorboard":
                if after is None:
                    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
                tracker = kind("tensorboard", logging_dir=str(folder), purge_step=None if after is None else after + 1)
            elif name == "mlflow":
                tracker = kind(experiment_name=PROJECT, run_name=run)
            else:
                tracker = kind(PROJECT, name=run)
            tracker.start()
            if name != "tensorboard" or after is None:  # TensorBoard has it in the events of the run's first process
                _store_config(name, tracker, config)
            made.append(tracker)
    return Trackers(made, folder / "tensorboard")


def check_trackers(names: Sequence[str]) -> None:
    """For start-up, before any model is loaded.

    Raises:
        ValueError: as `open_trackers`.
    """
    for name in names:
        if name != "none" and name not in PACKAGES:
            raise ValueError(f"unknown tracker {name!r}; allowed are {', '.join(PACKAGES)} or none")
        if name == "none" and len(names) > 1:
            raise ValueError(f"tracker 'none' beside {', '.join(n for n in names if n != 'none')}; give one or the other")
        if name != "none" and find_spec(PACKAGES[name]) is None:
            raise ValueError(f"tracker {name!r} needs the package {PACKAGES[name]}, which is not installed: pip install {PACKAGES[name]}")


def _store_config(name: str, tracker: Any, config: Mapping[str, Any]) -> None:
    flat = {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in _flat(config)}
    if name == "tensorboard":
        # accelerate's own way writes a second event folder per run, named after the clock; as text it stays in the run's one.
        rows = "\n".join(f"| {key} | {value} |" for key, value in flat.items())
        tracker.writer.add_text("config", f"| option | value |\n| --- | --- |\n{rows}", global_step=0)
        tracker.writer.flush()
    else:
        tracker.store_init_configuration(flat)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat += _flat(value, f"{prefix}{key}/")
        elif isinstance(value, bool | str):
            flat.append((f"{prefix}{key}", value))
        elif isinstance(value, numbers.Real):  # numpy's scalars too
            number = int(value) if isinstance(value, numbers.Integral) else float(value)
            if math.isfinite(number):
                flat.append((f"{prefix}{key}", number))
        elif value is not None:
            flat.append((f"{prefix}{key}", str(value)))
    return flat

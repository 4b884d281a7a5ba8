"""Ctrl-C and SIGTERM: the first one lets a step end and be saved, the second one does not wait."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """A context manager that turns both signals into KeyboardInterrupt: at once, but within `held` at the end of the block.

    Outside of the main thread Python cannot catch signals, and they do what they always do.
    """

    def __init__(self) -> None:
        self.asked = False
        self._held = ""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self, what: str) -> Iterator[None]:
        """Let the block end before the first signal counts; `asked` tells inside whether there was one. The second one ends it.

        Raises:
            KeyboardInterrupt: there was a signal.
        """
        self._held = what
        try:
            yield
        finally:
            self._held = ""
        if self.asked:
            raise KeyboardInterrupt

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._held or self.asked:
            raise KeyboardInterrupt
        self.asked = True
        # not print: the signal may have come in the middle of one
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"{signal.Signals(number).name}: {self._held} is finished and saved first; once more stops at once\n".encode())

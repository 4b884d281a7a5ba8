"""Calls into an engine that may die or hang: all of them in one thread of its own, each with a limit on the wait."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class EngineError(RuntimeError):
    """The engine failed, or did not answer in time; nothing more is asked of it."""


class EngineThread:
    """Runs calls one after another in a daemon thread, which cannot keep the process alive if one of them never returns."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.broken: str | None = None  # why nothing more is asked
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"{name} engine", daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], T], *, timeout_s: float, what: str) -> T:
        """What `function` returns; `what` names the call in errors.

        Raises:
            EngineError: it raised anything but a ValueError, did not return within `timeout_s`, or an earlier call did so.
            ValueError: by `function`, passed on.
        """
        if self.broken is not None:
            raise EngineError(self.broken)
        future: Future[T] = Future()
        self._calls.put((future, function))
        try:
            return future.result(timeout_s)
        except TimeoutError as error:
            if future.done():  # its own error, of the same type
                raise self._break(f"the {self.name} engine failed while {what}: {error}") from error
            raise self._break(f"the {self.name} engine hangs: no answer within {timeout_s:g} s while {what}") from None
        except (ValueError, EngineError):
            raise
        except Exception as error:
            said = str(error).strip().splitlines()
            raise self._break(f"the {self.name} engine died while {what}: {said[0] if said else type(error).__name__}") from error

    def end(self) -> None:
        """Let the thread end after what it does now; idempotent."""
        self.broken = self.broken or f"the {self.name} engine is closed"
        self._calls.put(None)

    def _break(self, why: str) -> EngineError:
        self.broken = why
        return EngineError(why)

    def _run(self) -> None:
        while (entry := self._calls.get()) is not None:
            future, function = entry
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            del entry, future, function  # or the last call's objects would live on until the next one

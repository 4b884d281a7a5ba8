"""One door for everybody: parts and algorithms are found through entry points, the built-in ones included."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

KINDS = {
    "algorithm": "rlzoo.algorithms",
    "sampler": "rlzoo.samplers",
    "credit": "rlzoo.credits",
    "loss": "rlzoo.losses",
}


@cache
def _entries(kind: str) -> dict[str, EntryPoint]:
    return {e.name: e for e in sorted(entry_points(group=KINDS[kind]), key=lambda e: e.name)}


def names(kind: str) -> list[str]:
    """Registered names of a kind ("algorithm", "sampler", "credit", "loss"), sorted."""
    return list(_entries(kind))


def find(kind: str, name: str) -> Any:
    """The registered object.

    Raises:
        ValueError: no such name; the message lists those that exist.
    """
    entries = _entries(kind)
    if name not in entries:
        raise ValueError(f"unknown {kind} {name!r}; known: {', '.join(entries) or 'none (reinstall the package: pip install -e .)'}")
    return entries[name].load()


@contextmanager
def staying_put() -> Iterator[None]:
    """Run somebody else's code; the working folder is afterwards what it was before."""
    here = None
    with suppress(OSError):  # the folder was removed
        here = os.getcwd()
    try:
        yield
    finally:
        if here is not None:
            with suppress(OSError):
                os.chdir(here)


def plugin(reference: str, what: str) -> Any:
    """The object named by "package.module:attribute".

    Raises:
        ValueError: it is not of that form, or cannot be imported.
    """
    module, _, attribute = reference.partition(":")
    entry = EntryPoint(name=reference, value=reference, group="")
    if not module or not attribute:
        raise ValueError(f"{what} {reference!r} is neither a known name nor of the form package.module:function")
    try:
        with staying_put():
            return entry.load()
    except Exception as error:  # importing runs the user's module, which may raise anything
        raise ValueError(f"{what} {reference!r} cannot be loaded: {type(error).__name__}: {error}") from error

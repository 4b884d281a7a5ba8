"""A problem: one question with one checkable answer. Sets of them are read by `rlzoo.data.loading`."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem with one checkable answer. `id` is unique within its set and enters every sampling seed."""

    id: str
    problem: str
    answer: str
    level: int | None = None
    subject: str | None = None
    solution: str | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)


def normalise(text: str) -> str:
    """Lower case, single spaces: what checksums and overlap checks compare."""
    return " ".join(text.lower().split())


def checksum(problems: Sequence[Problem]) -> str:
    """SHA-256 of the normalised problems, one per line in order: what a test set's TOML pins."""
    return hashlib.sha256("\n".join(normalise(p.problem) for p in problems).encode()).hexdigest()

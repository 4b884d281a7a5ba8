"""A problem: one question with one checkable answer. Sets of them are read by `rlzoo.data.loading`."""

from __future__ import annotations

from collections.abc import Mapping
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

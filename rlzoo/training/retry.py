"""Out of memory in a forward or backward pass: smaller packs, and the work once more."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from ..backends.memory import free, out_of_memory

log = logging.getLogger(__name__)

MIN_TOKEN_BUDGET = 256

T = TypeVar("T")


class TokenBudget:
    """How many tokens are forwarded at once. Whoever runs out of memory halves it for everybody who holds the same budget, and says
    so through `message`."""

    def __init__(self, tokens: int, message: Callable[[str], None] = log.warning) -> None:
        self.tokens, self._message = tokens, message

    def run(self, work: Callable[[int], T]) -> T:
        """`work(tokens)`, from the start with half the tokens whenever memory runs out.

        Raises:
            torch.OutOfMemoryError or RuntimeError: out of memory at MIN_TOKEN_BUDGET; and whatever else `work` raises.
        """
        while True:
            try:
                return work(self.tokens)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or self.tokens // 2 < MIN_TOKEN_BUDGET:
                    raise
            self._message(f"out of memory at a token budget of {self.tokens}; continuing with {self.tokens // 2}")
            self.tokens //= 2
            free()  # outside the handler: the traceback held the pack's tensors

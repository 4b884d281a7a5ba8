"""When a path ends, and why: one pure function for every sampler."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from ..options import BIG, Count, Options, Within
from ..rewards.extract import last_boxed
from ..tree import Stop


@dataclass(frozen=True)
class StopRules(Options):
    """Rules beyond the end-of-text token and the limits of length and depth.

    Raises:
        ValueError: a count is not positive, or an unknown choice.
    """

    section: ClassVar[str] = "sampler.stopping"

    boxed: Literal["ended", "alone", "off"] = "ended"
    """A complete boxed answer anywhere in the response: with an end-of-text token it is an ANSWER (`ended`), or it ends the
    path by itself (`alone`), or it is not looked for (`off`)."""
    repetition: Literal["off", "first", "last"] = "off"
    """Whether a segment that repeats itself ends its path, and whether this is asked before or after all other rules."""
    repetition_chars: Count = 32
    """Length in characters of the substring looked for."""
    repetition_times: Annotated[int, Within(2, BIG)] = 8
    """How often it must occur in the segment's text; occurrences may overlap."""

    def needs_response_text(self, ended: bool) -> bool:
        """Whether `classify` will look at the text of the whole response."""
        return self.boxed == "alone" or (self.boxed == "ended" and ended)

    @property
    def needs_segment_text(self) -> bool:
        """Whether `classify` will look at the text of the newest segment."""
        return self.repetition != "off"


def classify(
    rules: StopRules,
    *,
    ended: bool,
    response_tokens: int,
    max_response_tokens: int,
    depth: int,
    max_depth: int,
    segment_text: str = "",
    response_text: str = "",
) -> Stop:
    """Why the path that ends with this segment ends here, or OPEN.

    `ended` says that the last token ends the text; `response_text` is the whole response (a boxed answer may cross a
    segment boundary), `segment_text` its newest segment. Order: repetition if first, ANSWER, EOS, LENGTH, DEPTH, repetition
    if last (the order of TreePO's released sampler).
    """
    repeated = rules.repetition != "off" and repeats(segment_text, rules.repetition_chars, rules.repetition_times)
    if repeated and rules.repetition == "first":
        return Stop.REPETITION
    if rules.needs_response_text(ended) and has_boxed(response_text):
        return Stop.ANSWER
    if ended:
        return Stop.EOS
    if response_tokens >= max_response_tokens:
        return Stop.LENGTH
    if depth >= max_depth:
        return Stop.DEPTH
    return Stop.REPETITION if repeated else Stop.OPEN


def repeats(text: str, chars: int, times: int) -> bool:
    """Whether some substring of `chars` characters occurs at least `times` times in `text` (overlaps count)."""
    windows = len(text) - chars + 1
    if windows < times:
        return False
    return max(Counter(text[i : i + chars] for i in range(windows)).values()) >= times


def has_boxed(text: str) -> bool:
    r"""Whether `text` holds a complete \boxed{...} with balanced braces (escaped braces do not count): what the grader would read."""
    return last_boxed(text) is not None

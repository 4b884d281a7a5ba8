"""The fast path: plain numbers compared exactly, without a computer algebra system.

It answers only where the slow path (math-verify) is known to give the same verdict, and is silent elsewhere.
"""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER = re.compile(r"([+-]?)(\d+)(\.\d+)?|(-?)([1-9]\d{0,2}(?:,\d{3})+)(\.\d+)?", re.ASCII)
_RATIO = re.compile(r"(-?)(?:(\d+)/(\d+)|\\[dt]?frac\{(-?\d+)\}\{(\d+)\})", re.ASCII)
MAX_DIGITS = 15  # what a float of the slow path holds
_APART = Fraction(1, 100_000)  # the slow path rounds floats to 6 decimals: nearer pairs are left to it


def plain_number(text: str) -> Fraction | None:
    """The exact value of `-12`, `007`, `3.50`, `1,234.5`, `-3/4` or `\\frac{3}{4}`; None for anything else."""
    match = _NUMBER.fullmatch(text)
    if match:
        sign, digits = match[1] or match[4] or "", (match[2] or match[5]).replace(",", "")
        digits, decimals = digits.lstrip("0"), match[3] or match[6] or ""
        if len(digits) + len(decimals) > MAX_DIGITS:
            return None
        return Fraction(f"{'-' if sign == '-' else ''}{digits or '0'}{decimals}")
    match = _RATIO.fullmatch(text)
    if match is None:
        return None
    numerator, denominator = match[2] or match[4], match[3] or match[5]
    if len(numerator) > MAX_DIGITS or len(denominator) > MAX_DIGITS or int(denominator) == 0:
        return None
    value = Fraction(int(numerator), int(denominator))
    return -value if match[1] else value


def compare_plain(gold: str, answer: str) -> bool | None:
    """Whether two plain numbers are equal; None where either is none, or where they differ by so little that rounding decides."""
    right, given = plain_number(gold), plain_number(answer)
    if right is None or given is None:
        return None
    if right == given:
        return True
    return None if abs(right - given) < _APART else False

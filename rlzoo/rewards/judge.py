"""One verdict, by math-verify. Imported only inside a grading worker: it may hang, crash or exhaust memory there.

math-verify's own time-outs (whole-second SIGALRM, an exception derived from BaseException) are switched off: the worker's
CPU timer is the deadline.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import sympy
from antlr4.atn.PredictionMode import PredictionMode
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
from math_verify import LatexExtractionConfig, parse, verify
from sympy.parsing import sympy_parser

from rlzoo.rewards.extract import TAIL_CHARS

logging.getLogger("math_verify").setLevel(logging.CRITICAL)

# A boxed answer is LaTeX and nothing else: math-verify's plain-expression fallback would pick a number out of any text that
# fails to parse, and goes through Python's eval.
_BOXED = (LatexExtractionConfig(boxed_match_priority=0),)
_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\begin|\\boxed")
_HARMLESS = re.compile(r"[\d\s+\-*/^().,]{0,4000}|[A-Za-z]{1,40}", re.ASCII)
_PERCENT = re.compile(r"\s*\\?%\s*$")
_SMALL = sympy.Float("1e-3")  # below it, numbers must also agree to three digits
_NOISE = sympy.Float("1e-60")


def guard_eval() -> None:
    """Refuse every string that sympy would evaluate as Python, unless it is bare arithmetic or one plain word.

    `parse_expr` and `sympify(str)` end in Python's eval. math-verify only hands them arithmetic; this holds it to that.
    """
    original: Callable[..., str] = sympy_parser.stringify_expr

    def checked(text: str, *args: Any) -> str:
        if not _HARMLESS.fullmatch(text):
            raise ValueError("refused to evaluate a string that is not plain arithmetic")
        return original(text, *args)

    sympy_parser.stringify_expr = checked


def parse_in_two_stages() -> None:
    """Parse LaTeX with ANTLR's fast prediction (SLL) first, and with the full one (LL) only where that finds a syntax error.

    Where SLL finds no error, it gives the tree that LL gives; about five times faster on answers in practice.
    """
    create = _Latex2Sympy.create_parser
    convert = _Latex2Sympy.parse
    mode = PredictionMode.SLL

    def create_parser(self: Any, text: str) -> Any:
        parser = create(self, text)
        parser._interp.predictionMode = mode
        return parser

    def parse_text(self: Any, text: str) -> Any:
        nonlocal mode
        try:
            mode = PredictionMode.SLL
            return convert(self, text)
        except Exception:
            mode = PredictionMode.LL
            return convert(self, text)

    _Latex2Sympy.create_parser, _Latex2Sympy.parse = create_parser, parse_text


@lru_cache(maxsize=256)
def _parse_gold(gold: str) -> list[Any]:
    return list(parse(f"\\boxed{{{gold}}}", _BOXED, parsing_timeout=0))


def _parse_response(answer: str, boxed: bool) -> list[Any]:
    if boxed:
        return list(parse(f"\\boxed{{{answer}}}", _BOXED, parsing_timeout=0))
    tail = answer[-TAIL_CHARS:]
    if "\\" in tail and "\n" not in tail and not _DELIMITED.search(tail):
        return list(parse(f"\\boxed{{{tail}}}", _BOXED, parsing_timeout=0))
    return list(parse(tail, parsing_timeout=0))


def judge(gold: str, answer: str, boxed: bool) -> str:
    """Compare an answer with the gold answer.

    Args:
        gold: the bare gold answer, see `extract.gold_answer`.
        answer: the content of the last box if `boxed`, else the end of a response without a box.

    Returns:
        "right", "wrong" or "unparsable".
    """
    expected, given = _parse_gold(gold), _parse_response(answer, boxed)
    if verify(expected, given, timeout_seconds=0):
        return "right" if _same_size(expected, given) else "wrong"
    if boxed and _PERCENT.search(gold) is None and _PERCENT.search(answer):
        # math-verify takes "25%" for 25 as well as for 1/4, but only integers; 25.0% and 12.5% are treated alike here
        bare = _PERCENT.sub("", answer)
        if bare:
            return judge(gold, bare, True)
    parsed = any(isinstance(x, sympy.Basic | sympy.MatrixBase) for x in given)
    return "wrong" if parsed else "unparsable"


def _same_size(expected: list[Any], given: list[Any]) -> bool:
    """False where only rounding to six decimals made two numbers equal: math-verify takes 2.9e-19 for 3.1e-19."""
    gold, answer = expected[0], given[0]
    if not (isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr) and gold.is_number and answer.is_number):
        return True
    try:
        a, b = gold.evalf(15), answer.evalf(15)
        if abs(a) >= _SMALL:
            return True  # six decimals are at least three digits here
        return bool(abs(a - b) <= max(_SMALL * abs(a), _NOISE))
    except (TypeError, ValueError, ArithmeticError):  # infinities and the like do not compare; math-verify found them equal
        return True

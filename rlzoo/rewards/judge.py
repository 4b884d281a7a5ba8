"""One verdict, by math-verify. Imported only inside a grading worker: it may hang, crash or exhaust memory there.

math-verify's own time-outs (whole-second SIGALRM, an exception derived from BaseException) are switched off: the worker's
CPU timer is the deadline.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import sympy
from antlr4.atn.PredictionMode import PredictionMode
from latex2sympy2_extended.latex2sympy2 import _Latex2Sympy
from math_verify import LatexExtractionConfig, parse, verify
from sympy.parsing import sympy_parser

from rlzoo.rewards.extract import TAIL_CHARS
from rlzoo.rewards.notation import as_interval, based, is_interval, upright, without_percent, without_unit

logging.getLogger("math_verify").setLevel(logging.CRITICAL)

# A boxed answer is LaTeX and nothing else: math-verify's plain-expression fallback would pick a number out of any text that
# fails to parse, and goes through Python's eval.
_BOXED = (LatexExtractionConfig(boxed_match_priority=0),)
_DELIMITED = re.compile(r"\$|\\\(|\\\[|\\begin|\\boxed")
_HARMLESS = re.compile(r"[\d\s+\-*/^().,]{0,4000}|[A-Za-z]{1,40}", re.ASCII)
_DECIMAL = re.compile(r"\d\s?\.\s?\d|\.\d")
_SMALL = sympy.Float("1e-3")  # below it, numbers must also agree to three digits
_DIGITS = 40  # to which exact numbers are compared
_EXACT = sympy.Float("1e-25")  # relative; what evaluation to _DIGITS digits can leave
_MAX_FLOAT = sympy.Float("1e-6")  # math-verify rounds to six decimals


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
    tail = upright(answer[-TAIL_CHARS:])
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
    if not boxed:
        return _compare(gold, answer, boxed=False)
    bases = based(gold), based(answer)
    if bases[0] and bases[1]:  # math-verify drops the base
        return "right" if bases[0] == bases[1] else "wrong"
    (gold_number, gold_unit), (number, unit) = without_unit(gold), without_unit(answer)
    if gold_unit and unit and gold_unit != unit:
        return "wrong"
    percents = without_percent(gold), without_percent(answer)
    if percents != (None, None):
        return _compare_percent(percents[0] or gold_number, percents[1] or number, percents)
    verdict = _compare(*_as_intervals(gold, answer))
    if verdict != "right" and (gold_unit or unit):
        verdict = _better(verdict, _compare(gold_number, number))
    return verdict


def _better(first: str, second: str) -> str:
    return min(first, second, key=("right", "wrong", "unparsable").index)


def _compare_percent(gold: str, answer: str, percents: tuple[str | None, str | None]) -> str:
    """A number in percent is that number, or a hundredth of it: where one side has no percent sign, both are right."""
    verdict = _compare(gold, answer)
    if verdict == "right" or None not in percents:
        return verdict
    if percents[1] is None:
        return _better(verdict, _compare(_hundredth(gold), answer))
    return _better(verdict, _compare(gold, _hundredth(answer)))


def _hundredth(number: str) -> str:
    return f"\\frac{{{number}}}{{100}}"


def _as_intervals(gold: str, answer: str) -> tuple[str, str]:
    """Both sides, an inequality as an interval where the other side is one."""
    if is_interval(gold) != is_interval(answer):
        if is_interval(gold):
            return gold, as_interval(answer) or answer
        return as_interval(gold) or gold, answer
    return gold, answer


def _compare(gold: str, answer: str, boxed: bool = True) -> str:
    expected, given = _parse_gold(gold), _parse_response(answer, boxed)
    exact = boxed and not (_DECIMAL.search(gold) or _DECIMAL.search(answer))
    if verify(expected, given, timeout_seconds=0):
        return "right" if _agree(expected[0], given[0], exact) else "wrong"
    if expected and given and not exact and _complex_near(expected[0], given[0]):
        return "right"
    parsed = any(isinstance(x, sympy.Basic | sympy.MatrixBase) for x in given)
    return "wrong" if parsed else "unparsable"


def _both_numbers(*values: Any) -> bool:
    return all(isinstance(v, sympy.Expr) and v.is_number for v in values)


def _complex_near(gold: Any, answer: Any) -> bool:
    """Whether two complex numbers with decimals are equal, which math-verify, for whom i is a variable, does not round."""
    values = []
    for value in (gold, answer):
        if not isinstance(value, sympy.Expr) or {symbol.name for symbol in value.free_symbols} != {"i"}:
            return False
        values.append(value.subs(dict.fromkeys(value.free_symbols, sympy.I)))
    return _both_numbers(*values) and _near(values[0], values[1], exact=False, undecided=False)


def _agree(gold: Any, answer: Any, exact: bool) -> bool:
    """False where only rounding to six decimals made two values equal: math-verify takes 2.9e-19 for 3.1e-19, and 1/2004! for 1/2006!.

    Looks into tuples, sets, intervals and matrices; expressions with variables are tried at two points.
    """
    if _both_numbers(gold, answer):
        return _near(gold, answer, exact)
    if isinstance(gold, sympy.FiniteSet) and isinstance(answer, sympy.FiniteSet):
        return all(any(_agree(a, b, exact) for b in answer) for a in gold)
    if type(gold) is type(answer) and isinstance(gold, sympy.Tuple | sympy.Interval | sympy.Union | sympy.MatrixBase):
        parts = [tuple(x) if isinstance(x, sympy.MatrixBase) else x.args for x in (gold, answer)]
        return all(_agree(a, b, exact) for a, b in zip(*parts, strict=False))
    if exact and isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr) and gold.free_symbols == answer.free_symbols:
        return all(_near(gold.subs(point), answer.subs(point), True) for point in _points(gold.free_symbols))
    return True


def _points(symbols: Iterable[Any]) -> list[dict[Any, Any]]:
    """Two places to try, the same each time."""
    draw = random.Random(0)
    ordered = sorted(symbols, key=str)
    return [{symbol: sympy.Rational(draw.randint(101, 997), 499) for symbol in ordered} for _ in range(2)]


def _near(gold: Any, answer: Any, exact: bool, undecided: bool = True) -> bool:
    """Whether two numbers are equal: to 25 digits where both were written without decimals, else to six decimals, and below 0.001 to
    three digits; `undecided` where one does not evaluate to a finite number."""
    try:
        if exact and gold.is_Rational and answer.is_Rational:
            return bool(gold == answer)
        a, b = gold.evalf(_DIGITS), answer.evalf(_DIGITS)
        size, gap = max(abs(a), abs(b)), abs(a - b)
        if not (size.is_finite and gap.is_finite):
            return undecided
        if exact:
            return bool(gap <= _EXACT * size) or bool(size < _EXACT and (gold - answer).equals(0))
        return bool(gap <= (_MAX_FLOAT if size >= _SMALL else _SMALL * abs(a)))
    except (TypeError, ValueError, ArithmeticError, AttributeError):  # infinities and the like do not compare
        return undecided

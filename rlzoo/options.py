"""What tables of options check about themselves: types, choices and bounds come from the type hints of their fields.

A file, a flag and a Python caller go through the same check, and what is wrong is always told in one form:
"section.key is X; allowed: Y". Imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

NONE = "none"  # how a file says that an optional option has no value: TOML has no word for it
SMALLEST, LARGEST = 1e-30, 1e30  # sizes of numbers that float32 holds, and their products with ordinary ones
_NAMES: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    str: ("a text", "texts"),
    NoneType: (NONE, NONE),
}


@dataclass(frozen=True, slots=True)
class Within:
    """Bounds of a number, as `Annotated[int, Within(1)]`: from `low` to `high`, both allowed unless `above` and `below` say
    otherwise; `off` is one more value that is allowed."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False
    off: float | None = None

    def holds(self, value: float) -> bool:
        inside = (value > self.low if self.above else value >= self.low) and (value < self.high if self.below else value <= self.high)
        return inside or value == self.off

    def __str__(self) -> str:
        low, high = _number(self.low), _number(self.high)
        if self.high == math.inf:
            text = f"above {low}" if self.above else f"of at least {low}"
        elif self.above:
            text = f"above {low}, {'below' if self.below else 'at most'} {high}"
        else:
            text = f"from {low} to {'below ' if self.below else ''}{high}"
        return text if self.off is None else f"{text}, or {_number(self.off)}"


BIG = 2**31 - 1  # what an int32 holds
Count = Annotated[int, Within(1, BIG)]
CountOrOff = Annotated[int, Within(0, BIG)]  # 0 switches something off, or says "as it comes"
Seed = Annotated[int, Within(0, 2**63 - 1)]
Share = Annotated[float, Within(0, 1)]
Positive = Annotated[float, Within(0, above=True)]
NotNegative = Annotated[float, Within(0)]


class Options:
    """Base of a frozen dataclass of options; `section` is its table in a config.

    Raises:
        ValueError: a value is not of its field's type, or outside its bounds.
    """

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check(self, self.section)


def check(options: Any, section: str) -> None:
    """Every field of a dataclass instance against its type hint; anything else passes.

    Raises:
        ValueError: the first value that is not allowed.
    """
    if dataclasses.is_dataclass(options):
        for name, hint in hints(type(options)).items():
            allow(getattr(options, name), hint, f"{section}.{name}" if section else name)


def hints(kind: Any) -> dict[str, Any]:
    """Type hints, with their bounds, of the fields of a dataclass that can be given."""
    return _hints(kind)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    found = get_type_hints(kind, include_extras=True)
    return {f.name: found[f.name] for f in dataclasses.fields(kind) if f.init}


def allow(value: Any, hint: Any, where: str) -> None:
    """Compare a value with a type hint.

    Raises:
        ValueError: it is of another type, or outside the bounds; begins with `where`.
    """
    if not _fits(value, hint):
        sized = float in _alternatives(hint) and _is_number(value) and not _finite(value)
        sizes = f" (other than 0: of size {SMALLEST:g} to {LARGEST:g})" if sized else ""
        raise ValueError(f"{where} is {short(value)}; allowed: {_describe(hint)}{sizes}")


def converted(value: Any, hint: Any) -> Any:
    """Plain data as TOML has it brought to the form of `hint`, where nothing is lost by that: `NONE`, arrays for tuples, whole
    numbers where fractions are allowed too. `allow` judges what comes out."""
    kinds = [get_origin(kind) or kind for kind in _alternatives(hint)]
    if isinstance(value, str) and value == NONE and NoneType in kinds:
        return None
    if isinstance(value, list) and tuple in kinds:
        return tuple(converted(item, get_args(next(k for k in _alternatives(hint) if get_origin(k) is tuple))[0]) for item in value)
    to_float = float in kinds and int not in kinds and _is_number(value) and _finite(value)
    return float(value) if to_float else value


def _alternatives(hint: Any) -> list[Any]:
    """The types of a union, without their bounds."""
    if get_origin(hint) is Annotated:
        return _alternatives(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [kind for part in get_args(hint) for kind in _alternatives(part)]
    return [hint]


def _bounds(hint: Any) -> Within | None:
    return next((extra for extra in hint.__metadata__ if isinstance(extra, Within)), None)


def _fits(value: Any, hint: Any, bounds: Within | None = None) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, args[0], _bounds(hint) or bounds)
    if origin in (Union, UnionType):
        return any(_fits(value, kind, bounds) for kind in args)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in args)
    if hint in (int, float):
        right = _is_number(value) and (isinstance(value, int) if hint is int else _finite(value))
        return right and (bounds is None or bounds.holds(value))
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, args[0], bounds) for item in value)
    kind = origin or hint
    return not isinstance(kind, type) or getattr(kind, "_is_protocol", False) or isinstance(value, kind)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _finite(value: float) -> bool:
    return value == 0 or SMALLEST <= abs(value) <= LARGEST


def _describe(hint: Any, many: bool = False) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        bounds = _bounds(hint)
        return _describe(args[0], many) + (f" {bounds}" if bounds else "")
    if origin in (Union, UnionType):
        return " or ".join(_describe(kind, many) for kind in args)
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin is tuple:
        return f"a list of {_describe(args[0], many=True)}"
    one, several = _NAMES.get(hint, (getattr(hint, "__name__", str(hint)),) * 2)
    return str(several if many else one)


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def short(value: Any) -> str:
    """A value as a message shows it, whatever it is."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of more digits than Python writes
        return "a number of thousands of digits"
    except Exception:
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"

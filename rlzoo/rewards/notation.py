r"""Notation: an answer rewritten as LaTeX that the parser reads as it was meant, and answers that are not plain LaTeX values taken
apart: units, percent signs, bases, inequalities.

Standard library only: the training process and the grading workers both import this module. Every function is linear in its text,
which `extract` bounds beforehand, and raises nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": r"\div ", "±": r"\pm ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∞": r"\infty ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "°": r"^\circ ", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "ω": r"\omega ",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅛": r"\frac{1}{8}",
    "\u2009": r"\,", "\u202f": r"\,", "\u2008": r"\,", "、": ",", "。": ".", "，": ",", "\u200b": "", "\ufeff": "", "’": "'",
}  # fmt: skip
_FULL_WIDTH = {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}
_TRANSLATION = str.maketrans(_FULL_WIDTH | _SYMBOLS)
_SUPERSCRIPTS, _SUBSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-"), str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_RAISED, _LOWERED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+"), re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|[A-Za-z]))")
_UPRIGHT = re.compile(r"\\(?:mathrm|operatorname|text)\s*\{\s*([ei])\s*\}(?=\s*(?:$|[\^+\-*/)}=\\]))")
_EMPTY_SET = re.compile(r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}")
_GROUPED = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\\[,!;: ]|~)\s?\d{3})+(?!\d)")
_SPACED = re.compile(r"\d{1,3}(?: \d{3})+")
_END = re.compile(r"(?:\\[,;: ]|[.,;:~\s])$")
_END_OF_TEXT = re.compile(r"(?<=[^\s.,;:])[\s.,;:]+\}$")
_DANGLING_POINT = re.compile(r"(?<=\d)\.(?= ?(?:[/})\]]|$))")
_SCIENTIFIC = re.compile(r"([+-]?(?:\d+(?:\.\d*)?|\.\d+))[eE]([+-]?)0*(\d{1,4})")
_REPEATING = re.compile(r"(?<![\d.])(\d{0,15})\.(\d{0,15})\\(?:overline|bar|dot)\s*(?:\{(\d{1,15})\}|(\d))")
_BRACKETED = re.compile(r"([+-]?)(\d{1,15})\.(\d{0,15})\((\d{1,15})\)")
_MIXED = re.compile(
    r"([+-]?)\s?(\d{1,9})(?:\s|\\[ ,;!]|~|(?=\\))*(?:\\[dt]?frac\s?\{(\d{1,9})\}\s?\{(\d{1,9})\}|\\[dt]?frac\s?(\d)\s?(\d)"
    r"|(?<=[\s~,;!])(\d{1,9})/(\d{1,9}))(?=\s*(?:$|\\?%|\^|\\(?:text|mathrm)|[A-Za-z]{2}))"
)
_CURRENCIES = {r"\textdollar": r"\$", r"\pounds": "£", r"\texteuro": "€", r"\euro": "€", r"\yen": "¥", r"\textsterling": "£"}
_CURRENCY = re.compile(r"\\(?:textdollar|pounds|texteuro|textsterling|euro|yen)(?![A-Za-z])\s*")
_CURRENCY_TEXT = re.compile(r"\\(?:text|mathrm)\s*\{\s*([€£¥]|\\\$)\s*\}")


def rewrite(answer: str) -> str:
    r"""An answer with the notations rewritten that the LaTeX parser misreads or refuses; the value stays the same.

    Symbols of Unicode become LaTeX, full-width characters plain ones; points and commas at the end go; thin spaces between digits
    go; `4.5e33` becomes `4.5 \times 10^{33}`; `0.1\overline{6}` and `11 5/6` become fractions; upright e and i become plain.
    """
    text = answer.translate(_TRANSLATION)
    text = _RAISED.sub(lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}", text)
    text = _LOWERED.sub(lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}", text)
    text = _ROOT.sub(lambda m: f"\\sqrt{{{m[1] or m[2] or m[3]}}}", text).replace("√", r"\sqrt ")
    text = _CURRENCY.sub(lambda m: _CURRENCIES[m[0].strip()], text)
    text = _CURRENCY_TEXT.sub(lambda m: m[1], text)
    text = upright(text)
    text = _EMPTY_SET.sub(r"\\emptyset ", text)
    text = _GROUPED.sub(lambda m: re.sub(r"\D", "", m[0]), text)
    text = _without_end(" ".join(text.split()))
    if _SPACED.fullmatch(text):
        text = text.replace(" ", "")
    text = _REPEATING.sub(lambda m: _repeating(m[1], m[2], m[3] or m[4]), text)
    if bracketed := _BRACKETED.fullmatch(text):
        text = bracketed[1] + _repeating(bracketed[2], bracketed[3], bracketed[4])
    text = _DANGLING_POINT.sub("", text)
    text = _MIXED.sub(_improper, text, count=1) if _MIXED.match(text) else text
    if match := _SCIENTIFIC.fullmatch(text):
        return f"{match[1]} \\times 10^{{{'-' if match[2] == '-' else ''}{match[3]}}}"
    return text


def upright(text: str) -> str:
    r"""Upright e and i, `\mathrm{e}`, as plain letters: the parser takes them for variables."""
    return _UPRIGHT.sub(lambda m: m[1], text)


def _without_end(text: str) -> str:
    """Without the points, commas and spaces that end a sentence, not the answer; also inside a last \\text{...}."""
    stripped = text
    while match := _END.search(stripped, max(0, len(stripped) - 2)):
        stripped = stripped[: match.start()]
    if stripped.endswith("}"):
        stripped = _END_OF_TEXT.sub("}", stripped, count=1) if "\\text" in stripped else stripped
    return stripped or text


def _repeating(whole: str, fixed: str, period: str) -> str:
    numerator = int(whole + fixed + period) - int((whole + fixed) or "0")
    return f"\\frac{{{numerator}}}{{{10 ** len(fixed) * (10 ** len(period) - 1)}}}"


def _improper(match: re.Match[str]) -> str:
    """11 5/6 as 71/6; what is no proper fraction stays (2 3/2 is no mixed number)."""
    whole, numerator, denominator = int(match[2]), int(match[3] or match[5] or match[7]), int(match[4] or match[6] or match[8])
    if not 0 < numerator < denominator or whole == 0:
        return match[0]
    return f"{match[1]}\\frac{{{whole * denominator + numerator}}}{{{denominator}}}"


# -- percent, bases, units ----------------------------------------------------------------------------------------------

_PERCENT = re.compile(r"\s*(?:\\?%|\\(?:text|mathrm)\s*\{\s*(?:percent|per cent|\\?%)\s*\}|(?:\\ )?\bper ?cent)$")


def without_percent(text: str) -> str | None:
    """The number before a percent sign or word; None where there is none."""
    match = _PERCENT.search(text, max(0, len(text) - 40))
    return text[: match.start()].strip() or None if match else None


_DIGIT_WORDS = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
                "eleven": "11", "twelve": "12", "sixteen": "16"}  # fmt: skip
_BASE = re.compile(r"\(?([0-9A-Za-z]{1,60})\)?_\s?(?:\{?\s?(?:\\text\s?\{)?\s?(?:base\s)?(\d{1,2}|[a-z]{3,8})\s?\}{0,2}|(\d))")


def based(text: str) -> tuple[str, str] | None:
    """(digits, base) of a number with its base as an index, `2516_8` or `2516_{\\text{eight}}`; None for anything else."""
    match = _BASE.fullmatch(text.replace(r"\,", "").replace(" ", ""))
    if match is None or not any(c.isdigit() for c in match[1]):
        return None
    base = match[2] or match[3]
    base = _DIGIT_WORDS.get(base, base)
    if not base.isdecimal() or not 2 <= int(base) <= 36 or not match[1].isalnum():
        return None
    try:
        int(match[1], int(base))
    except ValueError:
        return None
    return match[1].upper().lstrip("0") or "0", base


def _names(canonical: str, *others: str) -> dict[str, str]:
    return dict.fromkeys((canonical, *others), canonical)


_UNITS: dict[str, str] = {
    **_names("$", r"\$", "dollar", "dollars", "usd", "us$"),
    **_names("€", "euro", "euros", "eur"),
    **_names("£", "pound", "pounds", "gbp"),
    **_names("¥", "yen", "yuan"),
    **_names("cent", "cents", "¢"),
    **_names("m", "meter", "meters", "metre", "metres"),
    **_names("cm", "centimeter", "centimeters", "centimetre", "centimetres"),
    **_names("mm", "millimeter", "millimeters", "millimetre", "millimetres"),
    **_names("km", "kilometer", "kilometers", "kilometre", "kilometres"),
    **_names("ft", "foot", "feet"),
    **_names("inch", "inches"),
    **_names("yd", "yard", "yards"),
    **_names("mile", "miles", "mi"),
    **_names("g", "gram", "grams"),
    **_names("kg", "kilogram", "kilograms"),
    **_names("mg", "milligram", "milligrams"),
    **_names("ounce", "ounces", "oz"),
    **_names("l", "liter", "liters", "litre", "litres"),
    **_names("ml", "milliliter", "milliliters"),
    **_names("gallon", "gallons"),
    **_names("s", "sec", "second", "seconds"),
    **_names("min", "minute", "minutes"),
    **_names("h", "hr", "hrs", "hour", "hours"),
    **_names("day", "days"),
    **_names("week", "weeks"),
    **_names("month", "months"),
    **_names("year", "years"),
    **_names("deg", "degree", "degrees"),
    **_names("unit", "units"),
    **_names("mph"),
    **_names("km/h", "kmh", "kph"),
    **_names("m/s"),
}
_SQUARES = {"square": 2, "sq": 2, "sq.": 2, "cubic": 3}
_WORD = r"[A-Za-z/$€£¥¢]{1,12}"
_UNIT = re.compile(
    rf"(?:\s|\\[ ,;!]|~)*(?:\\(?:text|mathrm|mbox|textrm)\s?\{{\s?((?:(?:square|sq\.?|cubic) )?{_WORD})\s?\.?\}}"
    rf"|((?:(?:square|sq|cubic) )?(?:[A-Za-z]{{2,12}}|(?<=\d\s)[mglsh]|[€£¥¢]|\\\$)))(?:\s?\^\s?\{{?([23])\}}?)?$"
)
_LEADING = re.compile(r"([+-]?)\s?(?:([€£¥])|(\\?\$)|\b(USD|EUR|GBP)\b)\s?")


def without_unit(text: str) -> tuple[str, str | None]:
    """(the number, its unit or currency): `18 cm`, `18 \\text{ square meters}`, `€18`; the unit is None where there is none that is known,
    and the text is then as given."""
    match = _LEADING.match(text)
    if match and text[match.end() :][:1].isdigit():
        return match[1] + text[match.end() :], _UNITS.get((match[2] or match[3] or match[4]).lower())
    match = _UNIT.search(text, max(0, len(text) - 60))
    if match is None or match.start() == 0 or not (text[match.start() - 1].isdigit() or text[match.start() - 1] in "})"):
        return text, None
    *squares, name = (match[1] or match[2]).lower().split()
    power = _SQUARES.get(squares[0], 1) if squares else int(match[3] or 1)
    unit = _UNITS.get(name)
    return (text, None) if unit is None else (text[: match.start()], unit if power == 1 else f"{unit}^{power}")


# -- inequalities -------------------------------------------------------------------------------------------------------

_RELATION = re.compile(r"(\\(?:leqslant|geqslant|leq|geq|le|ge|lt|gt)(?![A-Za-z])|<=|>=|<|>)")
_VARIABLE = re.compile(r"[A-Za-z]|\\(?:theta|alpha|beta|lambda|omega)")
_OR = re.compile(r"\s*(?:,?\s*\\(?:text|mathrm)\s?\{\s?,?\s?or\s?\}|\bor\b|\\cup|\\lor|\\vee)\s*")
_INTERVAL = re.compile(r"(?:\\left)?\s?[\[(].*[\])]\s?")


def is_interval(text: str) -> bool:
    """Whether a text is written with the brackets of an interval or a union of such."""
    return bool(_INTERVAL.fullmatch(text)) and "," in text


def as_interval(text: str) -> str | None:
    """An inequality in one variable as an interval, several joined by "or" as their union: `2 \\le x < 5` as `[2, 5)`. None for
    anything else."""
    parts = [_one_interval(part.strip()) for part in _OR.split(text)]
    return None if None in parts else r" \cup ".join(_sorted(p for p in parts if p is not None))


def _one_interval(text: str) -> str | None:
    pieces = [piece.strip() for piece in _RELATION.split(text)]
    sides, relations = pieces[::2], pieces[1::2]
    if not 1 <= len(relations) <= 2 or not all(sides):
        return None
    rising = ["l" in r or "<" in r for r in (r.replace(r"\leqslant", r"\le").replace(r"\geqslant", r"\ge") for r in relations)]
    closed = ["=" in r or "e" in r for r in relations]
    if len(set(rising)) > 1:
        return None
    if not rising[0]:
        sides, closed = sides[::-1], closed[::-1]
    places = [i for i, side in enumerate(sides) if _VARIABLE.fullmatch(side)]
    if len(places) != 1 or (len(sides) == 3 and places != [1]):
        return None
    at = places[0]
    low = ("[" if closed[at - 1] else "(", sides[at - 1]) if at > 0 else ("(", r"-\infty")
    high = (sides[at + 1], "]" if closed[at] else ")") if at + 1 < len(sides) else (r"\infty", ")")
    return f"{low[0]}{low[1]}, {high[0]}{high[1]}"


def _sorted(intervals: Iterable[str]) -> list[str]:
    """Those without a lower end first: the parser keeps the order of a union's parts."""
    return sorted(intervals, key=lambda interval: not interval.startswith(r"(-\infty"))

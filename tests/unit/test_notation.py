"""Notations that graders of public reports got wrong: each kind both ways, right answers and near misses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlzoo.rewards.extract import MAX_ANSWER_CHARS, gold_answer, last_boxed, tidy
from rlzoo.rewards.math import Grader, GraderConfig, Kind
from rlzoo.rewards.notation import as_interval, based, rewrite, without_percent, without_unit
from rlzoo.sampling.stopping import has_boxed


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(GraderConfig(workers=1)) as grader:
        yield grader


RIGHT = [
    ("\\sqrt{2}", "\\sqrt{2}."),
    ("D", "\\text{D}."),
    ("D", "\\text{D.}"),
    ("5", "5 ."),
    ("5", "5,"),
    ("5", "5;"),
    ("\\frac{1}{2}", "\\frac{1}{2}\\,"),
    ("x+1", "x+1."),
    ("11 5/6", "\\frac{71}{6}"),
    ("\\frac{71}{6}", "11 5/6"),
    ("11\\frac{5}{6}", "\\frac{71}{6}"),
    ("-2 1/2", "-2.5"),
    ("2\\tfrac{1}{2}\\%", "2.5\\%"),
    ("3 \\frac{3}{4}", "3.75"),
    ("50\\%", "0.5"),
    ("50\\%", "50"),
    ("0.5", "50\\%"),
    ("12.5\\%", "0.125"),
    ("12.5\\%", "12.5\\%"),
    ("\\frac{1}{4}", "25\\%"),
    ("25", "25\\%"),
    ("25", "25%"),
    ("25", "25\\text{ percent}"),
    ("33\\frac{1}{3}\\%", "\\frac{1}{3}"),
    ("(0, 12.5)", "0 < x < 12.5"),
    ("[2,5)", "2 \\le x < 5"),
    ("2 \\le x < 5", "[2,5)"),
    ("x > 3", "(3, \\infty)"),
    ("(3,\\infty)", "x>3"),
    ("(-\\infty, 2]", "x \\leq 2"),
    ("x\\geq 2", "[2,\\infty)"),
    ("(-\\infty,2]\\cup(5,\\infty)", "x \\le 2 \\text{ or } x > 5"),
    ("(-\\infty,-1)\\cup(1,\\infty)", "x<-1 \\text{ or } x>1"),
    ("\\left(0,\\frac{1}{2}\\right)", "0<x<\\frac{1}{2}"),
    ("3 < x", "(3,\\infty)"),
    ("5 > x > 2", "(2,5)"),
    ("[2,5)", "x \\in [2,5)"),
    ("14 - i", "14.0 - 1.0i"),
    ("14.0-1.0i", "14-i"),
    ("\\frac{1}{2}+\\frac{3}{4}i", "0.5+0.75i"),
    ("\\frac{1}{3}", "0.\\overline{3}"),
    ("0.\\overline{3}", "\\frac13"),
    ("0.1\\overline{6}", "\\frac16"),
    ("1.\\overline{142857}", "\\frac{8}{7}"),
    ("0.\\bar{3}", "\\frac13"),
    ("0.\\dot{3}", "\\frac13"),
    ("1234567", "1\\,234\\,567"),
    ("1234567", "1\u2009234\u2009567"),
    ("1234567", "1 234 567"),
    ("1234567", "1,234,567"),
    ("1234567", "1{,}234{,}567"),
    ("3,5", "3，5"),
    ("(1,2)", "（1，2）"),
    ("12.5", "１２．５"),
    ("18", "€18"),
    ("18", "£18"),
    ("18", "¥18"),
    ("18", "\\$18"),
    ("18", "18 dollars"),
    ("18", "18\\text{ dollars}"),
    ("18", "18 \\text{ cm}"),
    ("18", "18\\ \\mathrm{cm}^2"),
    ("18", "18 cm"),
    ("18", "18€"),
    ("18", "\\text{€}18"),
    ("18", "18 euros"),
    ("18 \\text{ cm}", "18 cm"),
    ("90^\\circ", "90°"),
    ("90", "90°"),
    ("90", "90 degrees"),
    ("18", "\\textdollar 18"),
    ("18", "\\pounds 18"),
    ("18", "USD 18"),
    ("18", "18 square units"),
    ("2\\sqrt{3}", "2√3"),
    ("\\sqrt{13}", "√13"),
    ("\\sqrt{x+1}", "√(x+1)"),
    ("-3", "−3"),
    ("-3", "–3"),
    ("\\frac{1}{2}", "½"),
    ("2\\pi", "2π"),
    ("\\infty", "∞"),
    ("x^2", "x²"),
    ("3\\times 4", "3×4"),
    ("x\\le 3", "x≤3"),
    ("e^2", "\\mathrm{e}^2"),
    ("3+4i", "3+4\\mathrm{i}"),
    ("e", "\\mathrm{e}"),
    ("\\emptyset", "∅"),
    ("\\emptyset", "\\varnothing"),
    ("\\varnothing", "\\emptyset"),
    ("\\emptyset", "\\{\\}"),
    ("\\frac{1}{2004!}", "\\frac{1}{2004!}"),
    ("2516_8", "2516_8"),
    ("2516_8", "2516_{8}"),
    ("2516_8", "2516"),
    ("2516_8", "2516_{\\text{8}}"),
    ("2516_8", "2516_{\\text{eight}}"),
    ("1/3", "0.333333"),
    ("2^{10}", "1024"),
    ("x=5", "5"),
    ("5", "x=5"),
    ("\\frac{\\sqrt2}{2}", "0.70710678"),
    ("\\text{even}", "even"),
    ("\\text{Evelyn}", "Evelyn"),
    ("\\text{(C)}", "C"),
    ("C", "(C)"),
]
WRONG = [
    ("\\frac{1}{2004!}", "\\frac{1}{2006!}"),
    ("\\frac{2^{2005}+1}{3\\cdot 2^{2006}}", "\\frac{1}{3\\cdot 2^{2006}}"),
    ("\\frac{1}{3\\cdot 2^{2006}}", "\\frac{2^{2005}+1}{3\\cdot 2^{2006}}"),
    ("2516_8", "2516_9"),
    ("2516_{8}", "2516_{9}"),
    ("(\\frac{1}{2004!},1)", "(\\frac{1}{2006!},1)"),
    ("\\{\\frac{1}{2004!},1\\}", "\\{\\frac{1}{2006!},1\\}"),
    ("\\frac{x}{2004!}", "\\frac{x}{2006!}"),
    ("\\frac{10000000}{10000001}", "1"),
    ("\\frac{10000000}{10000001}", "\\frac{10000001}{10000002}"),
    ("x+\\frac{1}{10^{9}}", "x"),
    ("10^{20}+1", "10^{20}"),
    ("\\sqrt{2}", "\\frac{14142135624}{10000000000}"),
    ("x=\\frac{1}{10^{8}}", "x=\\frac{1}{10^{9}}"),
    ("[0,\\frac{1}{10^8}]", "[0,\\frac{1}{10^{9}}]"),
    ("2\\frac{1}{2}", "1"),
    ("50\\%", "5"),
    ("50\\%", "0.05"),
    ("50\\%", "5000"),
    ("(0, 12.5)", "0 \\le x < 12.5"),
    ("[2,5)", "2 < x < 5"),
    ("x>3", "[3,\\infty)"),
    ("(3,\\infty)", "x<3"),
    ("(-\\infty,2]\\cup(5,\\infty)", "x \\le 2 \\text{ or } x \\ge 5"),
    ("14-i", "14+i"),
    ("14-i", "14.1-i"),
    ("\\frac13", "0.\\overline{6}"),
    ("1234567", "1\\,234\\,568"),
    ("3,5", "35"),
    ("18", "€19"),
    ("18 \\text{ cm}", "18 \\text{ m}"),
    ("18 \\text{ cm}", "18 m"),
    ("\\$18", "€18"),
    ("18", "1.8"),
    ("\\sqrt{13}", "√12"),
    ("x^2", "x2"),
    ("\\emptyset", "0"),
    ("\\emptyset", "\\{0\\}"),
    ("11 5/6", "115/6"),
    ("12 3/4", "123/4"),
    ("\\text{D}", "B."),
    ("10_2", "2_3"),
    ("3", "3!"),
]


def test_right_answers_are_right_in_every_notation(grader: Grader) -> None:
    verdicts = grader.grade([(gold, f"so \\boxed{{{answer}}}") for gold, answer in RIGHT])
    assert [pair for pair, verdict in zip(RIGHT, verdicts, strict=True) if verdict.kind is not Kind.RIGHT] == []


def test_near_misses_are_wrong(grader: Grader) -> None:
    verdicts = grader.grade([(gold, f"so \\boxed{{{answer}}}") for gold, answer in WRONG])
    assert [pair for pair, verdict in zip(WRONG, verdicts, strict=True) if verdict.correct is not False] == []


@pytest.mark.parametrize(
    "response",
    [
        r"The roots are $x=\boxed{3}$, $x=\boxed{5}$ and $x=\boxed{7}$.",
        r"x_1=\boxed{3}, x_2=\boxed{5}, x_3=\boxed{7}",
        r"\boxed{3}, \boxed{5} and \boxed{7}",
    ],
)
def test_several_boxes_answer_one_list(grader: Grader, response: str) -> None:
    assert [v.correct for v in grader.grade([("3, 5, 7", response), ("3, 5, 8", response), ("7", response)])] == [True, False, True]


numbers = st.integers(1, 10**6)


@settings(max_examples=40, deadline=None)
@given(a=numbers, b=numbers, scale=st.integers(9, 400))
def test_exact_numbers_that_differ_by_little_are_wrong(grader: Grader, a: int, b: int, scale: int) -> None:
    """A fraction against the same plus a tiny one, alone, in a tuple and as a coefficient; against itself it is right."""
    gold, near = f"\\frac{{{a}}}{{{b}}}", f"\\frac{{{a * 10**scale + b}}}{{{b}\\cdot 10^{{{scale}}}}}"
    forms = ["{}", "({}, 1)", "\\{{{}, 0\\}}", "{} x"]
    wrong = grader.grade([(form.format(gold), f"\\boxed{{{form.format(near)}}}") for form in forms])
    right = grader.grade([(form.format(gold), f"\\boxed{{{form.format(gold)}}}") for form in forms])
    assert [v.correct for v in wrong] == [False] * 4 and [v.correct for v in right] == [True] * 4


@settings(max_examples=40, deadline=None)
@given(whole=st.integers(1, 50), a=st.integers(1, 11), b=st.integers(2, 12))
def test_mixed_numbers_are_sums(grader: Grader, whole: int, a: int, b: int) -> None:
    if a >= b:
        return
    total = whole + Fraction(a, b)
    forms = [f"{whole} {a}/{b}", f"{whole}\\frac{{{a}}}{{{b}}}", f"{whole} \\tfrac{{{a}}}{{{b}}}"]
    pairs = [(form, f"\\boxed{{\\frac{{{total.numerator}}}{{{total.denominator}}}}}") for form in forms]
    off = [(form, f"\\boxed{{\\frac{{{total.numerator + 1}}}{{{total.denominator}}}}}") for form in forms]
    percents = [(f"{form}\\%", f"\\boxed{{\\frac{{{total.numerator}}}{{{100 * total.denominator}}}}}") for form in forms]
    assert {v.correct for v in grader.grade(pairs + percents)} == {True} and {v.correct for v in grader.grade(off)} == {False}


@settings(max_examples=40, deadline=None)
@given(low=st.integers(-20, 20), width=st.integers(1, 9), closed=st.tuples(st.booleans(), st.booleans()), falling=st.booleans())
def test_inequalities_are_intervals(grader: Grader, low: int, width: int, closed: tuple[bool, bool], falling: bool) -> None:
    high, signs = low + width, [r"\le" if c else "<" for c in closed]
    interval = f"{'[' if closed[0] else '('}{low}, {high}{']' if closed[1] else ')'}"
    chain = f"{low} {signs[0]} x {signs[1]} {high}"
    if falling:
        back = {"<": ">", r"\le": r"\geq"}
        chain = f"{high} {back[signs[1]]} x {back[signs[0]]} {low}"
    other = f"{low} {signs[0]} x {'<' if signs[1] != '<' else chr(92) + 'le'} {high}"
    verdicts = grader.grade([(interval, f"\\boxed{{{chain}}}"), (chain, f"\\boxed{{{interval}}}"), (interval, f"\\boxed{{{other}}}")])
    assert [v.correct for v in verdicts] == [True, True, False]


@settings(max_examples=40, deadline=None)
@given(whole=st.integers(0, 99), fixed=st.text("0123456789", max_size=3), period=st.text("0123456789", min_size=1, max_size=4))
def test_repeating_decimals_are_fractions(grader: Grader, whole: int, fixed: str, period: str) -> None:
    value = Fraction(int(f"{whole}{fixed}{period}") - int(f"{whole}{fixed}"), 10 ** len(fixed) * (10 ** len(period) - 1))
    text = f"{whole}.{fixed}\\overline{{{period}}}"
    pairs = [(text, f"\\boxed{{\\frac{{{value.numerator}}}{{{value.denominator}}}}}")]
    pairs.append((text, f"\\boxed{{\\frac{{{value.numerator + 1}}}{{{value.denominator}}}}}"))
    assert [v.correct for v in grader.grade(pairs)] == [True, False]


@given(st.text(st.characters(codec="utf-8"), max_size=200) | st.text("0123456789.,/\\frac{}%()[]<> x_√²½€°textoverline", max_size=120))
def test_rewriting_never_raises(text: str) -> None:
    tidy(text), gold_answer(text), without_percent(text), without_unit(text), based(text), as_interval(text)


def test_plain_answers_stay_as_they_are() -> None:
    for text in ("12", "-3.50", r"\frac{3}{4}", "x^2+1", r"\text{Evelyn}", "(1, 2]", r"3\sqrt{13}", "3!", "1,234", r"\{1, 2\}", "2 3/2"):
        assert rewrite(text) == text


tokens = st.lists(st.sampled_from([r"\boxed{", r"\boxed {", r"\fbox{", "{", "}", r"\{", r"\}", "\\", " ", "x", r"\boxed"]), max_size=14)


@given(tokens)
def test_a_box_for_the_sampler_is_a_box_for_the_grader(parts: list[str]) -> None:
    text = "".join(parts)
    assert has_boxed(text) == (last_boxed(text) is not None)


@pytest.mark.parametrize("unit", ["\\boxed{", "{", "\\boxed", "9", " ", "1e", ". ", "\\,", "√(", "\\text{", "<x"])
def test_work_on_long_texts_is_linear(unit: str) -> None:
    """Eight times the text takes about eight times as long, not sixty-four; what is longer than an answer can be is not worked on."""

    def seconds(count: int) -> float:
        text, best = unit * count, float("inf")
        for _ in range(3):
            begun = time.process_time()
            has_boxed(text)
            tidy(text)
            best = min(best, time.process_time() - begun)
        return best

    assert seconds(80_000) < 30 * seconds(10_000) + 0.02
    assert tidy("9" * (MAX_ANSWER_CHARS + 1)) == "9" * (MAX_ANSWER_CHARS + 1)

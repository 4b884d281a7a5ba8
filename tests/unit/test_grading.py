"""Verdicts: what is right, wrong, unparsable; extraction; the fast path; the cache."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from rlzoo.rewards.extract import MAX_ANSWER_CHARS, gold_answer, last_boxed, tidy
from rlzoo.rewards.math import Grader, GraderConfig, Kind, Verdict
from rlzoo.rewards.numbers import compare_plain, plain_number


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(GraderConfig(workers=1)) as grader:
        yield grader


@pytest.fixture(scope="module")
def slow_grader() -> Iterator[Grader]:
    with Grader(GraderConfig(workers=2, fast_path=False)) as grader:
        yield grader


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5}", "5"),
        (r"first \boxed{5}, no: \boxed{6}.", "6"),
        (r"\boxed{\frac{1}{2}} and then {a stray brace", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"a \} stray \boxed {x_{1}}", "x_{1}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{7} then cut off: \boxed{8", "7"),
        (r"\fbox{4}", "4"),
        (r"\boxed{\left\{x \mid x>0\right\}}", r"\left\{x \mid x>0\right\}"),
        (r"\boxed{}", ""),
        (r"} } \boxed{9} { {", "9"),
        ("no box", None),
        (r"\boxed 5", None),
        (r"\boxed{unclosed", None),
    ],
)
def test_the_last_complete_box_is_the_answer(text: str, answer: str | None) -> None:
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    "text", ["\\boxed{" + "{" * 500_000 + "}" * 500_000 + "}", "\\boxed{" * 150_000, "\\boxed{}" * 120_000, "\\boxed{" + "{" * 10**6]
)
def test_extraction_is_linear(text: str) -> None:
    started = time.process_time()
    last_boxed(text)
    assert time.process_time() - started < 5.0


@pytest.mark.parametrize(
    ("gold", "bare"),
    [
        ("4.5e33", r"4.5 \times 10^{33}"),
        ("1e-5", r"1 \times 10^{-5}"),
        ("-1./3", "-1/3"),
        ("5.", "5"),
        ("$m_{\\max }=n^{2}-n-1$", "m_{\\max }=n^{2}-n-1"),
        ("$221,$8$", "$221,$8$"),
        (r"\$36", r"\$36"),
        ("I(0) e^{-t}\n", "I(0) e^{-t}"),
        (r"so \boxed{3\sqrt{13}}", r"3\sqrt{13}"),
        ("−3", "-3"),
        ("2e", "2e"),
    ],
)
def test_golds_are_made_readable(gold: str, bare: str) -> None:
    assert gold_answer(gold) == bare


RIGHT = [
    ("5", "5"),
    ("025", "25"),
    ("1234", "1,234"),
    (r"\frac12", "0.5"),
    ("0.5", r"\dfrac{1}{2}"),
    (r"3\sqrt{13}", r"\sqrt{117}"),
    ("7.0", "7"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3, \pi/2)"),
    ("1,-2", "-2, 1"),
    ("p - q", "-q+p"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\$18.90", "18.9"),
    (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix} -\frac13 \\ \frac23 \end{pmatrix}"),
    ("(3,4]", r"\left(3,4\right]"),
    (r"\frac{270}7\text{ degrees}", r"\frac{270}{7}^\circ"),
    ("10,\\!080", "10080"),
    (r"137 \frac{1}{2}", "137.5"),
    ("y = 2x + 3", "y=3+2x"),
    ("4.5e33", r"4.50 \times 10^{33}"),
    ("-1./3", r"-\frac{1}{3}"),
    ("2.88e-19", r"2.88 \cdot 10^{-19}"),
    ("x^2+2x+1", "(x+1)^2"),
    ("5", "x = 5"),
    (r"\sqrt{51}", "\n\\sqrt{51}\n"),
    ("25", r"25.0\%"),
    ("12.5", r"12.5\%"),
    ("50", r"50\%"),
    (r"(-\infty, 2) \cup (3, \infty)", r"(-\infty,2)\cup(3,+\infty)"),
    ("$221,$8$", "221, 8"),
    ("8", "8."),
    ("-3", "−3"),
]
WRONG = [
    ("5", "6"),
    ("5", "-5"),
    ("1728", "1331 and 1728"),
    ("3", "5,3"),
    ("2.88e-19", "3.1e-19"),
    ("0.0000002", "0.0000003"),
    ("x+1", "x-1"),
    ("(1,2)", "(2,1)"),
    ("(3,4]", "(3,4)"),
    (r"3\sqrt{13}", "3"),
    ("1,3,5", "1.3"),
    ("4.5e33", r"4.6\times 10^{33}"),
    ("0", "0.0000001"),
    ("7", r"70\%"),
]


def test_adjacent_boxes_are_one_answer_only_where_a_list_is_asked_for(grader: Grader) -> None:
    pairs = [
        ("1,2,3", r"\boxed{1},\boxed{2} and \boxed{3}"),
        ("(2, 2), (6, 2)", r"$$\boxed{(2, 2)} \quad \text{and} \quad \boxed{(6, 2)}$$"),
        ("k = 45, n = 2", r"$\boxed{k = 45}$ and $\boxed{n = 2}$."),
        ("1,2", r"\boxed{1}, so all in all \boxed{1, 2}"),
        ("1,2", r"\boxed{1}, \boxed{1, 2}"),
        ("6", r"\boxed{5}, \boxed{6}"),
        ("1,728", r"\boxed{12}, \boxed{1728}"),
        ("(1,6)", r"\boxed{(2,5)} or \boxed{(1,6)}"),
    ]
    assert [v.kind for v in grader.grade(pairs)] == [Kind.RIGHT] * len(pairs)
    hedged = [
        ("5", r"\boxed{5}, \boxed{6}"),
        ("1,2", r"\boxed{1}, \boxed{2}, \boxed{3}"),
        ("1,2", r"\boxed{1} is one, the other is \boxed{2}"),
    ]
    assert [v.kind for v in grader.grade(hedged)] == [Kind.WRONG] * len(hedged)


def test_right_answers_are_right(grader: Grader) -> None:
    verdicts = grader.grade([(gold, f"thus \\boxed{{{answer}}}.") for gold, answer in RIGHT])
    assert [pair for pair, v in zip(RIGHT, verdicts, strict=True) if v != Verdict(Kind.RIGHT)] == []


def test_wrong_answers_are_wrong(grader: Grader) -> None:
    verdicts = grader.grade([(gold, f"thus \\boxed{{{answer}}}.") for gold, answer in WRONG])
    assert [(pair, v) for pair, v in zip(WRONG, verdicts, strict=True) if v != Verdict(Kind.WRONG)] == []


@pytest.mark.parametrize(
    "response",
    ["", "no box: 5", r"\boxed{}", r"\boxed{5", "\\boxed{" + "5" * (MAX_ANSWER_CHARS + 1) + "}", r"\boxed{((((}", r"\boxed{@#&}"],
)
def test_unparsable_counts_as_wrong_and_apart(grader: Grader, response: str) -> None:
    before = grader.counts[Kind.UNPARSABLE]
    (verdict,) = grader.grade([("5", response)])
    assert verdict.kind is Kind.UNPARSABLE
    assert verdict.correct is False
    assert grader.counts[Kind.UNPARSABLE] == before + 1


def test_gold_comes_first(grader: Grader) -> None:
    assert grader.grade([("5", r"\boxed{6} \boxed{5}"), (r"\boxed{6} \boxed{5}", r"\boxed{5}")])[0].kind is Kind.RIGHT
    assert [v.kind for v in grader.grade([("no box needed here, 5", r"\boxed{5}"), ("5", "5")])] == [Kind.WRONG, Kind.UNPARSABLE]


def test_correct_is_none_only_for_a_failed_grading() -> None:
    assert {kind: Verdict(kind).correct for kind in Kind} == {
        Kind.RIGHT: True,
        Kind.WRONG: False,
        Kind.UNPARSABLE: False,
        Kind.TIMED_OUT: False,
        Kind.FAILED: None,
    }


def test_bad_pairs_are_refused(grader: Grader) -> None:
    with pytest.raises(ValueError, match=r"pair 1: expected \(gold answer, response text\)"):
        grader.grade([("5", "a"), ("5", None)])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"pair 0: the gold answer has 0 characters"):
        grader.grade([("  ", r"\boxed{5}")])
    with pytest.raises(ValueError, match="workers is 0"):
        GraderConfig(workers=0)
    assert grader.grade([]) == []


def test_without_a_box_the_stated_answer_counts_if_allowed() -> None:
    with Grader(GraderConfig(workers=1, require_box=False)) as grader:
        verdicts = grader.grade([("37.5", "so\n#### 37.5"), ("3", "A: 3"), ("4", "the answer is 5"), ("5", r"\boxed{5} or 6")])
    assert [v.kind for v in verdicts] == [Kind.RIGHT, Kind.RIGHT, Kind.WRONG, Kind.RIGHT]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", Fraction(12)),
        ("-3.50", Fraction(-7, 2)),
        ("007", Fraction(7)),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("3/4", Fraction(3, 4)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        ("+2", Fraction(2)),
        ("000", Fraction(0)),
        ("1,23", None),
        ("0,500", None),
        ("1/0", None),
        ("1e3", None),
        ("5%", None),
        ("1 2", None),
        ("٣", None),
        ("1" * 16, None),
        ("", None),
        ("--1", None),
    ],
)
def test_plain_numbers(text: str, value: Fraction | None) -> None:
    assert plain_number(text) == value


def number_pairs(n: int, seed: int) -> list[tuple[str, str]]:
    """Plain numbers in every notation of the fast path: equal values written differently, near misses, and unrelated ones."""
    rng = random.Random(seed)

    def written(value: Fraction) -> str:
        sign, size = ("-" if value < 0 else ""), abs(value)
        forms = []
        if size.denominator == 1:
            whole = str(size.numerator)
            forms += [
                sign + whole,
                sign + whole + ".0",
                sign + f"{size.numerator:,}",
                sign + "0" + whole,
                whole + "/1" if not sign else sign + whole,
            ]
        if 10**6 % size.denominator == 0:
            forms.append(sign + f"{float(size):.6f}")
            forms.append(sign + f"{float(size):,.6f}" if size >= 1000 else sign + f"{float(size):.6f}".rstrip("0").rstrip("."))
        k = rng.choice((1, 1, 2, 3, 10))
        top, bottom = size.numerator * k, size.denominator * k
        forms += [f"{sign}{top}/{bottom}", f"{sign}\\frac{{{top}}}{{{bottom}}}", f"\\dfrac{{{sign}{top}}}{{{bottom}}}"]
        if sign == "" and rng.random() < 0.2:
            forms = ["+" + f if f[0].isdigit() and "," not in f and "/" not in f else f for f in forms]
        return rng.choice(forms)

    pairs = []
    for _ in range(n):
        top = rng.choice((rng.randrange(-20, 20), rng.randrange(-(10**4), 10**4), rng.randrange(-(10**8), 10**8)))
        value = Fraction(top, rng.choice((1, 1, 1, 2, 3, 4, 7, 10, 100, 1000)))
        other = rng.choice(
            (value, value, -value, value + 1, value + Fraction(1, 1000), value / 10, value * 100, Fraction(rng.randrange(-50, 50)))
        )
        pairs.append((written(value), written(other)))
    return pairs


def disagreements(pairs: list[tuple[str, str]], slow: Grader) -> tuple[int, list[tuple[str, str, bool]]]:
    fast = [compare_plain(gold, answer) for gold, answer in pairs]
    verdicts = slow.grade([(gold, f"\\boxed{{{answer}}}") for gold, answer in pairs])
    assert slow.fast == 0
    decided = sum(f is not None for f in fast)
    return decided, [(*p, f) for p, f, v in zip(pairs, fast, verdicts, strict=True) if f is not None and f is not v.correct]


def test_fast_path_agrees_with_slow_path(slow_grader: Grader) -> None:
    decided, different = disagreements(number_pairs(1_200, seed=1), slow_grader)
    assert decided > 1_000
    assert different == []


@pytest.mark.slow
def test_fast_path_agrees_with_slow_path_on_10k(slow_grader: Grader) -> None:
    decided, different = disagreements(number_pairs(12_000, seed=2), slow_grader)
    assert decided > 10_000
    assert different == []


def test_fast_path_is_silent_where_rounding_decides() -> None:
    assert compare_plain("1/3", "0.333333") is None
    assert compare_plain("0.0000002", "0.0000003") is None
    assert compare_plain("0.333", "1/3") is False
    assert compare_plain("x", "5") is None


def test_cache_and_duplicates() -> None:
    with Grader(GraderConfig(workers=1, cache_size=3)) as grader:
        pair = ("x+1", r"\boxed{1+x}")
        assert grader.grade([pair] * 5) == [Verdict(Kind.RIGHT)] * 5
        assert grader.cache_hits == 0
        assert grader.grade([pair, ("x+1", r"other words, same answer \boxed{1+x}")]) == [Verdict(Kind.RIGHT)] * 2
        assert grader.cache_hits == 2
        grader.grade([("x+1", f"\\boxed{{x+{i}}}") for i in range(2, 8)])
        assert len(grader._cache) == 3
        assert sum(grader.counts.values()) == 13


def test_grading_overlaps_with_the_caller() -> None:
    with Grader(GraderConfig(workers=1)) as grader:
        grader.warm()
        first = grader.submit([("x+1", r"\boxed{1+x}")])
        second = grader.submit([("5", r"\boxed{5}")])
        assert second.done  # nothing to wait for on the fast path
        assert grader.collect(second) == [Verdict(Kind.RIGHT)]
        assert grader.collect(first, timeout_s=60) == [Verdict(Kind.RIGHT)]
        assert first.done


UNGUARDED = """
from rlzoo.rewards.math import grade
print([v.kind.value for v in grade([("x+1", r"\\boxed{1+x}"), ("5", r"\\boxed{6}")])])
import sys
print("torch" in sys.modules)
"""


def test_an_unguarded_script_works(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    (tmp_path / "sympy.py").write_text("raise RuntimeError('the working directory must not shadow the grader')")
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-P", str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert done.stderr == ""
    assert done.stdout.split("\n")[:2] == ["['right', 'wrong']", "False"]


def test_the_worker_imports_only_the_grader() -> None:
    code = "import rlzoo.rewards.worker as w, sys; w._warm_up()\n"
    code += "print(sorted({'torch','transformers','pandas','datasets'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_tidy_survives_broken_unicode() -> None:
    assert tidy("\ud8005\x00") == "?5\x00"

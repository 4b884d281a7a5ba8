"""Demonstrations of the embedded task: step-by-step responses, imperfect and partly verbose on purpose.

Each step is one line in one of three styles, recognisable by its first word:

    hasty    So 47+18=55.
    careful  Work 47+18: ones=15 tens=6 total=65.
    verbose  Let me think about 47+18. The ones give 15 and the tens give 6, total 65. I check: 65-18=47.

A hasty step slips often, and always in the same way: it forgets the carry, the borrow or the rest. So the likeliest response of a
model that has learned these demonstrations is wrong wherever a carry occurs, while the careful and the verbose style are right:
reinforcement learning has something to find that sharpening does not give, step by step.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from .problems import Problem

STYLES = ("hasty", "careful", "verbose")
OPERATIONS = ("+", "-", "*", "/", "mod")


@dataclass(frozen=True, slots=True)
class Step:
    """`left op right`; an operand is a number, or "rK" for the result of step K."""

    left: int | str
    op: str
    right: int | str

    def resolve(self, results: Sequence[int]) -> tuple[int, int]:
        """Both operands as numbers, given the results of the steps before."""
        left, right = (results[int(x[1:])] if isinstance(x, str) else x for x in (self.left, self.right))
        return left, right

    def as_tuple(self) -> tuple[int | str, str, int | str]:
        return (self.left, self.op, self.right)


@dataclass(frozen=True, slots=True)
class Mix:
    """How demonstrations mix the styles; all are probabilities.

    hasty, careful, verbose: a step's style (they sum to 1). slip: that a hasty step slips where it can. uniform: that a response
    keeps one style (drawn as above) instead of drawing one per step. preamble: that it opens with a line that says nothing.
    """

    hasty: float = 0.56
    careful: float = 0.22
    verbose: float = 0.22
    slip: float = 0.85
    uniform: float = 0.5
    preamble: float = 0.3

    def __post_init__(self) -> None:
        if abs(self.hasty + self.careful + self.verbose - 1) > 1e-9:
            raise ValueError(f"styles of a mix sum to {self.hasty + self.careful + self.verbose:g}: they must sum to 1")


DEFAULT_MIX = Mix()


def _result(left: int, op: str, right: int) -> int:
    if op == "+":
        return left + right
    if op == "-":
        return left - right
    if op == "*":
        return left * right
    if op == "/":
        return left // right
    if op == "mod":
        return left % right
    raise ValueError(f"operation {op!r}: allowed are {', '.join(OPERATIONS)}")


def execute(steps: Sequence[Step]) -> list[int]:
    """The result of each step; the last one is the answer. `/` is the integer quotient."""
    results: list[int] = []
    for step in steps:
        left, right = step.resolve(results)
        results.append(_result(left, step.op, right) if right or step.op not in ("/", "mod") else -1)
    return results


def slipped(left: int, op: str, right: int) -> int:
    """The result with the hasty style's mistake; the right one where the mistake makes no difference.

    `+` and `*` forget the carry, `-` the borrow, `/` the rest of the tens, `mod` looks at the ones digit only.
    """
    if op == "+":
        return left + right - (10 if left % 10 + right % 10 >= 10 else 0)
    if op == "-":
        return left - right + (10 if left % 10 < right % 10 else 0)
    if op == "*":
        return left // 10 * right * 10 + left % 10 * right % 10
    if op == "/":
        return left // 10 // right * 10 + left % 10 // right
    return left % 10 % right


def _parts(left: int, op: str, right: int, link: str) -> tuple[str, str]:
    """The two intermediate results of a step, worked in tens and ones, as the careful and the verbose style name them."""
    tens, ones = divmod(left, 10)
    if op == "+":
        carry = (ones + right % 10) // 10
        return f"ones{link}{ones + right % 10}", f"tens{link}{tens + right // 10 + carry}"
    if op == "-":
        borrow = ones < right % 10
        low = f"ones{link}{ones + 10 * borrow - right % 10}" + (" borrow" if borrow else "")
        return low, f"tens{link}{tens - right // 10 - borrow}"
    if op == "*":
        return f"ones{link}{ones * right}", f"tens{link}{tens * right + ones * right // 10}"
    if op == "/":
        rest = tens % right
        return f"tens{link}{tens // right} rest{link}{rest}", f"ones{link}{(10 * rest + ones) // right}"
    return f"multiple{link}{left // right * right}", f"rest{link}{left % right}"


def _check(left: int, op: str, right: int, value: int) -> str:
    if op == "+":
        return f"{value}-{right}={left}"
    if op == "-":
        return f"{value}+{right}={left}"
    return f"{_term(left, op, right)} gives {value}"


def _term(left: int, op: str, right: int) -> str:
    return f"{left} mod {right}" if op == "mod" else f"{left}{op}{right}"


def line(style: str, left: int, op: str, right: int, value: int) -> str:
    """One step of a response as text, ending in a newline. `value` differs from the true result in slipped hasty steps only."""
    term = _term(left, op, right)
    if style == "hasty":
        return f"So {term}={value}.\n"
    if style == "careful":
        first, second = _parts(left, op, right, "=")
        return f"Work {term}: {first} {second} total={value}.\n"
    first, second = _parts(left, op, right, " give ")
    return f"Let me think about {term}. The {first} and the {second}, total {value}. I check: {_check(left, op, right, value)}.\n"


_PREAMBLES = (
    "Okay, I have to be careful here and go through it one step after the other.\n",
    "Hmm, this looks easy but I will write it all down and look at it again.\n",
)
_CLOSINGS = ("", "After all of this the answer must be ")


def _goes_on(steps: Sequence[Step], results: Sequence[int]) -> bool:
    """Whether the steps after a slip can still be taken with numbers in 0..199."""
    values = list(results)
    for step in steps[len(values) :]:
        left, right = step.resolve(values)
        if right == 0 and step.op in ("/", "mod"):
            return False
        values.append(_result(left, step.op, right))
    return all(0 <= v <= 199 for v in values)


def respond(steps: Sequence[Step], rng: random.Random, mix: Mix = DEFAULT_MIX, style: str | None = None) -> str:
    """A demonstration for `steps`; `style` forces one style for every step (without preamble, closing words or slips)."""
    if style is not None and style not in STYLES:
        raise ValueError(f"style {style!r}: allowed are {', '.join(STYLES)}")
    weights = (mix.hasty, mix.careful, mix.verbose)
    whole = rng.choices(STYLES, weights)[0] if rng.random() < mix.uniform else None
    text = rng.choice(_PREAMBLES) if style is None and rng.random() < mix.preamble else ""
    results: list[int] = []
    for step in steps:
        left, right = step.resolve(results)
        chosen = style or whole or rng.choices(STYLES, weights)[0]
        value = _result(left, step.op, right)
        if style is None and chosen == "hasty" and rng.random() < mix.slip:
            wrong = slipped(left, step.op, right)
            if wrong != value and _goes_on(steps, [*results, wrong]):
                value = wrong
        results.append(value)
        text += line(chosen, left, step.op, right, value)
    closing = _CLOSINGS[1] if style is None and rng.random() < mix.preamble else _CLOSINGS[0]
    return f"{text}{closing}\\boxed{{{results[-1]}}}"


def careful_solution(steps: Sequence[Step]) -> str:
    """The right response in the careful style."""
    return respond(steps, random.Random(0), style="careful")


def steps_of(problem: Problem) -> tuple[Step, ...]:
    """The steps that a generated problem carries. ValueError: a problem of another origin."""
    steps = problem.meta.get("steps")
    if not steps:
        raise ValueError(f"problem {problem.id!r} has no steps: only problems of rlzoo.data.arithmetic can be demonstrated")
    return tuple(Step(left, op, right) for left, op, right in steps)


def demonstrate(problem: Problem, rng: random.Random, *, mix: Mix = DEFAULT_MIX, style: str | None = None) -> str:
    """A response to a generated problem, ending in `\\boxed{...}` (the end-of-sequence token is added by the tokenising side)."""
    return respond(steps_of(problem), rng, mix, style)

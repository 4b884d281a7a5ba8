"""The embedded task: MATH-style arithmetic problems with five subjects, levels 1 to 5 and one integer answer each.

A problem is made from its *steps*, a straight-line program of two-operand operations; the text, the answer, the solution and the
demonstrations (`arithmetic_demos`) all follow from them. Every value on the way to the answer lies in 0..199, and operands of
one problem are distinct.

Splits are disjoint by construction: `split_of` hashes the problem's canonical key (subject and operands with their operations, not
the wording), so that two wordings of the same computation always fall in the same split. 80 % of keys are train, 10 % dev, 10 % test.

The unseen combination `mixed` (brackets and a remainder in one problem) exists for test sets only: asking for it in train or dev is
refused.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .arithmetic_demos import DEFAULT_MIX, Mix, Step, careful_solution, demonstrate, execute
from .problems import Problem

SPLITS = ("train", "dev", "test")
SUBJECTS = ("chains", "brackets", "modular", "equations", "puzzles")
HELD_OUT_SUBJECT = "mixed"
LEVELS = (1, 2, 3, 4, 5)
MINI_SEED = 2026
MINI_ROWS = 100
LONGEST_DEMONSTRATED_CHAIN = 4
LONGEST_TRAINED_CHAIN = 5
LONGEST_TEST_CHAIN = 6

# Subjects by their share of training problems; levels that demonstrations show, by subject.
_SHARES: Mapping[str, float] = MappingProxyType({"chains": 0.32, "brackets": 0.2, "modular": 0.2, "equations": 0.08, "puzzles": 0.2})
_DEMONSTRATED_LEVELS: Mapping[str, Sequence[int]] = MappingProxyType(
    {"chains": (1, 2, 3, 4), "brackets": LEVELS, "modular": LEVELS, "equations": LEVELS, "puzzles": (1, 2, 3, 4)}
)
_MODULI = (3, 4, 5, 6)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A candidate problem: its canonical key (what the split hangs on), wording and steps."""

    key: str
    text: str
    steps: tuple[Step, ...]


_Maker = Callable[[random.Random, int], "_Draft | None"]


def split_of(key: str) -> str:
    """The split of a canonical key: a stable hash, 80 % train, 10 % dev, 10 % test."""
    bucket = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % 10
    return "test" if bucket == 9 else "dev" if bucket == 8 else "train"


def _distinct(rng: random.Random, count: int, high: int = 99) -> list[int]:
    """`count` numbers from 10 to `high` that share neither a tens nor a ones digit, so that a digit tells which number it is of."""
    tens, ones = rng.sample(range(1, high // 10 + 1), count), rng.sample(range(10), count)
    return [10 * t + o for t, o in zip(tens, ones, strict=True)]


def _wording(rng: random.Random, *texts: str) -> str:
    return rng.choice(texts)


def _expression(rng: random.Random, body: str) -> str:
    return _wording(rng, f"Compute {body}.", f"What is {body}?", f"Evaluate {body}.", f"Find the value of {body}.")


def chain(rng: random.Random, operations: int) -> _Draft | None:
    """`operations` additions and subtractions in a row."""
    first, *rest = _distinct(rng, operations + 1)
    signs = [rng.choice("+-") for _ in rest]
    body = str(first) + "".join(f"{sign}{n}" for sign, n in zip(signs, rest, strict=True))
    steps = tuple(Step(first if i == 0 else f"r{i - 1}", sign, n) for i, (sign, n) in enumerate(zip(signs, rest, strict=True)))
    return _Draft(f"chains:{body}", _expression(rng, body), steps)


def _brackets(rng: random.Random, level: int) -> _Draft | None:
    a, b, c, e = _distinct(rng, 4)
    d = rng.randint(2, 9)
    s, t, u = (rng.choice("+-") for _ in range(3))
    forms: dict[int, list[tuple[str, tuple[Step, ...]]]] = {
        1: [(f"({a}{s}{b}){t}{c}", (Step(a, s, b), Step("r0", t, c)))],
        2: [
            (f"({a}{s}{b})*{d}", (Step(a, s, b), Step("r0", "*", d))),
            (f"{a}{s}({b}{t}{c})", (Step(b, t, c), Step(a, s, "r0"))),
        ],
        3: [
            (f"({a}{s}{b})*{d}{t}{c}", (Step(a, s, b), Step("r0", "*", d), Step("r1", t, c))),
            (f"{a}{s}({b}{t}{c}){u}{e}", (Step(b, t, c), Step(a, s, "r0"), Step("r1", u, e))),
        ],
        4: [
            (f"({a}{s}{b}){t}({c}{u}{e})", (Step(a, s, b), Step(c, u, e), Step("r0", t, "r1"))),
            (f"({a}{s}{b}){t}{c}{u}{e}", (Step(a, s, b), Step("r0", t, c), Step("r1", u, e))),
        ],
        5: [
            (f"({a}{s}{b})*{d}{t}{c}{u}{e}", (Step(a, s, b), Step("r0", "*", d), Step("r1", t, c), Step("r2", u, e))),
            (f"({a}{s}{b})*{d}{t}({c}{u}{e})", (Step(a, s, b), Step("r0", "*", d), Step(c, u, e), Step("r1", t, "r2"))),
        ],
    }
    body, steps = rng.choice(forms[level])
    return _Draft(f"brackets:{body}", _expression(rng, body), steps)


def _modulo(rng: random.Random, body: str, m: int) -> str:
    return _wording(rng, f"Reduce {body} mod {m}.", f"What is the remainder of {body} mod {m}?")


def _modular(rng: random.Random, level: int) -> _Draft | None:
    """A chain of `level` - 1 operations, and the remainder of its value."""
    first, *rest = _distinct(rng, level)
    signs = [rng.choice("+-") for _ in rest]
    m = rng.choice(_MODULI)
    body = str(first) + "".join(f"{sign}{n}" for sign, n in zip(signs, rest, strict=True))
    steps = [Step(first if i == 0 else f"r{i - 1}", sign, n) for i, (sign, n) in enumerate(zip(signs, rest, strict=True))]
    steps.append(Step(f"r{level - 2}" if rest else first, "mod", m))
    return _Draft(f"modular:{body}%{m}", _modulo(rng, body, m), tuple(steps))


_INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}


def _undo(result: int, applied: Sequence[tuple[str, int]]) -> tuple[Step, ...]:
    """Steps back from `result` to the number that the operations `applied` were performed on."""
    return tuple(Step(result if i == 0 else f"r{i - 1}", _INVERSE[op], n) for i, (op, n) in enumerate(reversed(applied)))


def _apply(x: int, applied: Sequence[tuple[str, int]]) -> int | None:
    for op, n in applied:
        if op == "/" and x % n:
            return None
        x = {"+": x + n, "-": x - n, "*": x * n, "/": x // n}[op]
        if not 0 <= x <= 199:
            return None
    return x


def _equation(rng: random.Random, level: int) -> _Draft | None:
    x, b, e = _distinct(rng, 3, 69)
    d = rng.randint(2, 9)
    s, t = (rng.choice("+-") for _ in range(2))
    forms: dict[int, list[tuple[str, list[tuple[str, int]]]]] = {
        1: [(f"x{s}{b}", [(s, b)])],
        2: [(f"{d}x", [("*", d)]), (f"x/{d}", [("/", d)])],
        3: [(f"{d}x{s}{b}", [("*", d), (s, b)])],
        4: [(f"{d}(x{s}{b})", [(s, b), ("*", d)]), (f"{d}x{s}{b}{t}{e}", [("*", d), (s, b), (t, e)])],
        5: [(f"{d}(x{s}{b}){t}{e}", [(s, b), ("*", d), (t, e)])],
    }
    left, applied = rng.choice(forms[level])
    right = _apply(x, applied)
    if right is None:
        return None
    text = _wording(rng, f"Solve {left}={right} for x.", f"Find x if {left}={right}.")
    return _Draft(f"equations:{left}={right}", text, _undo(right, applied))


def puzzle(rng: random.Random, operations: int) -> _Draft | None:
    """A number is thought of, changed `operations` times, and to be found from the outcome."""
    x = rng.randint(2, 99)
    applied: list[tuple[str, int]] = []
    for n in _distinct(rng, operations, 69):
        op = rng.choice("++--*/")
        applied.append((op, rng.randint(2, 9) if op in "*/" else n))
    result = _apply(x, applied)
    if result is None or len({n for _, n in applied}) < operations:
        return None
    words = {"+": "add", "-": "subtract", "*": "multiply by", "/": "divide by"}
    told = ", ".join(f"{words[op]} {n}" for op, n in applied)
    outcome = _wording(rng, f"I get {result}", f"The result is {result}")
    body = f"I think of a number, {told}. {outcome}. What is my number?"
    return _Draft(f"puzzles:{''.join(f'{op}{n}' for op, n in applied)}={result}", body, _undo(result, applied))


def _mixed(rng: random.Random, level: int) -> _Draft | None:
    """Brackets and a remainder in one problem; demonstrations and training show them apart only."""
    a, b, c = _distinct(rng, 3)
    m = rng.choice(_MODULI)
    s, t = (rng.choice("+-") for _ in range(2))
    forms: list[tuple[str, tuple[Step, ...]]] = [(f"({a}{s}{b})", (Step(a, s, b), Step("r0", "mod", m)))]
    if level > 2:
        forms = [
            (f"({a}{s}{b}){t}{c}", (Step(a, s, b), Step("r0", t, c), Step("r1", "mod", m))),
            (f"{a}{s}({b}{t}{c})", (Step(b, t, c), Step(a, s, "r0"), Step("r1", "mod", m))),
        ]
    body, steps = rng.choice(forms)
    return _Draft(f"mixed:{body}%{m}", _modulo(rng, body, m), steps)


_MAKERS: Mapping[str, _Maker] = MappingProxyType(
    {"chains": chain, "brackets": _brackets, "modular": _modular, "equations": _equation, "puzzles": puzzle, "mixed": _mixed}
)


def _problem(subject: str, level: int, draft: _Draft) -> Problem | None:
    """The draft as a problem, or None where a value leaves 0..199, a division is inexact or a remainder's operand is above 99."""
    values = execute(draft.steps)
    for step, value in zip(draft.steps, values, strict=True):
        left, right = step.resolve(values)
        if not 0 <= value <= 199 or (step.op == "mod" and left > 99) or (step.op == "/" and (right == 0 or left % right)):
            return None
        if step.op == "*" and left > 99:
            return None
    meta: dict[str, Any] = {"key": draft.key, "steps": [list(s.as_tuple()) for s in draft.steps]}
    return Problem(
        id=hashlib.sha256(draft.key.encode()).hexdigest()[:12],
        problem=draft.text,
        answer=str(values[-1]),
        level=level,
        subject=subject,
        solution=careful_solution(draft.steps),
        meta=meta,
    )


def _new_problem(split: str, rng: random.Random, cell: tuple[str, int, _Maker, int], seen: set[str]) -> Problem | None:
    """A problem whose key is not in `seen`; None where 20,000 attempts find none."""
    subject, level, maker, size = cell
    for _ in range(20_000):
        draft = maker(rng, size)
        if draft is not None and draft.key not in seen and split_of(draft.key) == split:
            problem = _problem(subject, level, draft)
            if problem is not None:
                return problem
    return None


def _stream(split: str, rng: random.Random, plan: Callable[[random.Random], tuple[str, int, _Maker, int]]) -> Iterator[Problem]:
    """Endless problems of `split`, no key twice; `plan` draws (subject, level, maker, the maker's size), anew where that is used up."""
    seen: set[str] = set()
    used_up: set[tuple[str, int]] = set()
    misses = 0
    while True:
        cell = plan(rng)
        problem = None if (cell[0], cell[3]) in used_up else _new_problem(split, rng, cell, seen)
        if problem is None:
            used_up.add((cell[0], cell[3]))
            misses += 1
            if misses > 1000:
                raise ValueError(f"no new problem of subject {cell[0]!r} and level {cell[1]} is left in split {split!r}: ask for fewer")
            continue
        misses = 0
        seen.add(problem.meta["key"])
        yield problem


def _take(stream: Iterator[Problem], n: int) -> list[Problem]:
    return [next(stream) for _ in range(n)]


def _checked(name: str, chosen: Sequence[Any] | None, allowed: Sequence[Any], default: Sequence[Any]) -> Sequence[Any]:
    if chosen is None:
        return default
    unknown = [c for c in chosen if c not in allowed]
    if unknown or not chosen:
        raise ValueError(f"{name} = {list(chosen)!r}: allowed are {', '.join(map(str, allowed))}")
    return chosen


def generate(split: str, n: int, *, seed: int, subjects: Sequence[str] | None = None, levels: Sequence[int] | None = None) -> list[Problem]:
    """`n` different problems of a split, a function of the arguments alone.

    `subjects` defaults to all of SUBJECTS in their training shares, `levels` to 1..5 with equal chances (where a subject's level is
    used up, the others take its place); the level of a chain or a puzzle is its number of operations. ValueError: an unknown split,
    subject or level; the held-out subject outside test; more problems than exist.
    """
    if split not in SPLITS:
        raise ValueError(f"split = {split!r}: allowed are {', '.join(SPLITS)}")
    if n < 0:
        raise ValueError(f"n = {n}: allowed are 0 and more")
    allowed = (*SUBJECTS, HELD_OUT_SUBJECT) if split == "test" else SUBJECTS
    names = list(_checked(f"subjects of split {split!r}", subjects, allowed, SUBJECTS))
    sizes = list(_checked("levels", levels, LEVELS, LEVELS))
    weights = [_SHARES.get(name, 1.0) for name in names]

    def plan(rng: random.Random) -> tuple[str, int, _Maker, int]:
        name, level = rng.choices(names, weights)[0], rng.choice(sizes)
        return name, level, _MAKERS[name], level

    return _take(_stream(split, random.Random(f"generate:{split}:{seed}"), plan), n)


def demonstration_problems(seed: int) -> Iterator[Problem]:
    """Endless train problems for demonstrations: all levels, except that chains and puzzles have at most four operations."""
    names, weights = list(_SHARES), list(_SHARES.values())

    def plan(rng: random.Random) -> tuple[str, int, _Maker, int]:
        name = rng.choices(names, weights)[0]
        level = rng.choice(_DEMONSTRATED_LEVELS[name])
        return name, level, _MAKERS[name], level

    rng = random.Random(f"demonstrations:{seed}")
    while True:  # a fresh stream now and then, since small problems run out and may well be demonstrated twice
        yield from _take(_stream("train", rng, plan), 500)


def train_problems(n: int, seed: int) -> list[Problem]:
    """Problems for reinforcement learning: all levels, so longer chains (5) than demonstrated (4), never the held-out combination."""
    return generate("train", n, seed=seed)


def dev_problems(n: int, seed: int) -> list[Problem]:
    """Problems like `train_problems`, from the dev split: for choosing defaults and for evaluation during training."""
    return generate("dev", n, seed=seed)


def _mini(name: str, subject: str, sizes: Sequence[int], rows: int, seed: int) -> list[Problem]:
    def plan(rng: random.Random) -> tuple[str, int, _Maker, int]:
        size = rng.choice(sizes)
        return subject, min(size, 5), _MAKERS[subject], size

    return _take(_stream("test", random.Random(f"{name}:{seed}"), plan), rows)


_MINI: Mapping[str, tuple[str, tuple[int, ...]]] = MappingProxyType(
    {
        "mini_chains": ("chains", (2, 3, 4)),
        "mini_long": ("chains", (LONGEST_TRAINED_CHAIN, LONGEST_TEST_CHAIN)),
        "mini_mixed": (HELD_OUT_SUBJECT, (2, 3)),
        "mini_puzzle": ("puzzles", (2, 3)),
    }
)


def mini_set(name: str, *, rows: int = MINI_ROWS, seed: int = MINI_SEED) -> list[Problem]:
    """One test set of the mini suite. ValueError: an unknown name."""
    if name not in _MINI:
        raise ValueError(f"mini set {name!r}: allowed are {', '.join(_MINI)}")
    subject, sizes = _MINI[name]
    return _mini(name, subject, sizes, rows, seed)


def mini_suite(*, rows: int = MINI_ROWS, seed: int = MINI_SEED) -> dict[str, list[Problem]]:
    """The four test sets: chains as demonstrated, longer chains (5 and 6), brackets with a remainder (never trained), puzzles."""
    return {name: mini_set(name, rows=rows, seed=seed) for name in _MINI}


__all__ = [
    "DEFAULT_MIX",
    "HELD_OUT_SUBJECT",
    "LEVELS",
    "SPLITS",
    "SUBJECTS",
    "Mix",
    "Step",
    "demonstrate",
    "demonstration_problems",
    "dev_problems",
    "generate",
    "mini_set",
    "mini_suite",
    "split_of",
    "train_problems",
]

"""The embedded task: splits, answers, demonstrations, test sets."""

from __future__ import annotations

import random
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice
from pathlib import Path

import pytest

from rlzoo.data import arithmetic as task
from rlzoo.data.arithmetic_demos import STYLES, Mix, execute, slipped, steps_of
from rlzoo.data.problems import Problem, checksum, normalise

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def evaluate(expression: str) -> Fraction:
    """An independent evaluator: Python's own parser over digits, brackets and operators only."""
    assert re.fullmatch(r"[\d+\-*/%() ]+", expression), expression
    return Fraction(eval(re.sub(r"(\d+)", r"Fraction(\1)", expression), {"Fraction": Fraction}))


def holds(problem: Problem) -> bool:
    """Whether the answer is right, read off the wording alone (never off the steps)."""
    text, answer = problem.problem, int(problem.answer)
    if m := re.match(r"I think of a number, (.*)\. (?:I get|The result is) (\d+)\. What", text):
        told = Fraction(answer)
        for part in m[1].split(", "):
            verb, n = part.rsplit(" ", 1)
            told = {"add": told + int(n), "subtract": told - int(n), "multiply by": told * int(n), "divide by": told / int(n)}[verb]
        return told == int(m[2])
    if m := re.match(r"(?:Solve (.*) for x|Find x if (.*))\.$", text):
        left, right = (m[1] or m[2]).split("=")
        left = re.sub(r"(\d)(x|\()", r"\1 * \2", left).replace("x", f"{answer}")
        return evaluate(left) == int(right)
    if m := re.match(r"(?:Reduce|What is the remainder of) (.*) mod (\d+)[.?]$", text):
        return answer == evaluate(m[1]) % int(m[2])
    m = re.match(r"(?:Compute|What is|Evaluate|Find the value of) (.*?)[.?]$", text)
    assert m, text
    return evaluate(m[1]) == answer


def everything() -> Iterator[Problem]:
    for split in task.SPLITS:
        yield from task.generate(split, 1500, seed=3)
    yield from task.train_problems(500, 4)
    for problems in task.mini_suite().values():
        yield from problems


def test_answers_are_right_by_an_independent_reading_of_the_wording() -> None:
    wrong = [(p.problem, p.answer) for p in everything() if not holds(p)]
    assert wrong == []


def test_the_independent_reading_notices_a_wrong_answer() -> None:
    for p in task.generate("train", 300, seed=1):
        assert not holds(Problem(p.id, p.problem, str(int(p.answer) + 1), subject=p.subject))


def test_every_subject_and_level_exists() -> None:
    seen = {(p.subject, p.level) for p in task.generate("train", 3000, seed=0)}
    assert seen == {(s, n) for s in task.SUBJECTS for n in task.LEVELS}


def test_splits_share_no_computation_and_no_wording() -> None:
    keys: dict[str, set[str]] = {}
    texts: dict[str, set[str]] = {}
    for split in task.SPLITS:
        problems = task.generate(split, 3000, seed=11)
        keys[split] = {p.meta["key"] for p in problems}
        texts[split] = {normalise(p.problem) for p in problems}
        assert all(task.split_of(p.meta["key"]) == split for p in problems)
    texts["demonstrations"] = {normalise(p.problem) for p in islice(task.demonstration_problems(0), 5000)}
    for name, problems in task.mini_suite().items():
        keys[name] = {p.meta["key"] for p in problems}
        assert all(task.split_of(k) == "test" for k in keys[name])
        test_texts = {normalise(p.problem) for p in problems}
        for other in ("train", "dev", "demonstrations"):
            assert not test_texts & texts[other], (name, other)
    assert not keys["train"] & keys["dev"] and not keys["train"] & keys["test"] and not keys["dev"] & keys["test"]
    assert not texts["train"] & texts["dev"] and not texts["train"] & texts["test"] and not texts["dev"] & texts["test"]


def test_generation_is_a_function_of_its_arguments() -> None:
    imports = "from rlzoo.data.arithmetic import *; from rlzoo.data.problems import checksum"
    code = f"{imports}; print(checksum(generate('train', 200, seed=5) + train_problems(50, 1)))"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "77"})
    here = checksum(task.generate("train", 200, seed=5) + task.train_problems(50, 1))
    assert other.stdout.strip() == here
    assert here != checksum(task.generate("train", 200, seed=6) + task.train_problems(50, 1))


def test_ids_are_unique_within_a_set() -> None:
    for problems in (task.generate("train", 2000, seed=2), *task.mini_suite().values()):
        assert len({p.id for p in problems}) == len(problems)


def test_subjects_and_levels_choose() -> None:
    chosen = task.generate("dev", 40, seed=0, subjects=["puzzles"], levels=[3])
    assert {(p.subject, p.level) for p in chosen} == {("puzzles", 3)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"split": "tset"}, "train, dev, test"),
        ({"subjects": ["algebra"]}, "algebra"),
        ({"subjects": ["mixed"]}, "mixed"),
        ({"subjects": []}, "chains"),
        ({"levels": [6]}, "1, 2, 3, 4, 5"),
        ({"n": -1}, "n = -1"),
        ({"n": 10_000, "subjects": ["modular"], "levels": [1]}, "ask for fewer"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments: dict[str, object], said: str) -> None:
    arguments = {"split": "train", "n": 1, **arguments}
    with pytest.raises(ValueError, match=re.escape(said)):
        task.generate(seed=0, **arguments)  # type: ignore[arg-type]


def operations(problem: Problem) -> list[str]:
    return re.findall(r"[+*-]", problem.problem)


def test_what_the_mini_sets_ask_is_what_they_say() -> None:
    suite = task.mini_suite()
    assert [len(operations(p)) for p in task.generate("test", 1, seed=0, subjects=["chains"], levels=[4])] == [4]
    assert {len(operations(p)) for p in suite["mini_chains"]} == {2, 3, 4}
    assert {len(operations(p)) for p in suite["mini_long"]} == {5, 6}
    assert all("(" in p.problem and " mod " in p.problem for p in suite["mini_mixed"])
    assert all("think of a number" in p.problem for p in suite["mini_puzzle"])
    assert [len(v) for v in suite.values()] == [100] * 4
    trained = task.train_problems(3000, 0)
    demonstrated = list(islice(task.demonstration_problems(0), 3000))
    assert max(len(operations(p)) for p in demonstrated if p.subject == "chains") == task.LONGEST_DEMONSTRATED_CHAIN == 4
    assert max(len(operations(p)) for p in trained if p.subject == "chains") == task.LONGEST_TRAINED_CHAIN == 5
    for p in (*trained, *demonstrated):
        assert not ("(" in p.problem and "mod" in p.problem), p.problem


def test_careful_and_verbose_demonstrations_are_right_and_end_in_a_box() -> None:
    rng = random.Random(0)
    for p in everything():
        for style in ("careful", "verbose"):
            assert task.demonstrate(p, rng, style=style).endswith(f"\\boxed{{{p.answer}}}")
        assert p.solution is not None and p.solution.endswith(f"\\boxed{{{p.answer}}}")


def intermediate_work_is_right(line: str) -> bool:
    m = re.match(r"Work (\d+)(\+|-|\*|/| mod )(\d+): (.*) total=(\d+)\.$", line)
    assert m, line
    a, op, b, work, total = int(m[1]), m[2].strip(), int(m[3]), m[4], int(m[5])
    n = [int(x) for x in re.findall(r"\d+", work)]
    if op == "mod":
        return n[0] % b == 0 and n[0] + n[1] == a and n[1] == total < b
    if op == "/":
        return n[0] * 10 + n[2] == total == a / b and n[1] == a // 10 - n[0] * b
    return n[1] * 10 + n[0] % 10 == total == {"+": a + b, "-": a - b, "*": a * b}[op] and ("borrow" in work) == (
        op == "-" and a % 10 < b % 10
    )


def test_the_work_in_careful_lines_is_right() -> None:
    lines = [line for p in everything() for line in (p.solution or "").splitlines()[:-1]]
    assert {op for line in lines for op in ("+", "-", "*", "/", " mod ") if op in line} == {"+", "-", "*", "/", " mod "}
    assert all(intermediate_work_is_right(line) for line in lines)


def test_the_mixture_is_what_it_says() -> None:
    rng = random.Random(1)
    problems = [p for p in task.generate("train", 3000, seed=9) if p.subject != "equations"]
    mix = Mix()
    steps = dict.fromkeys(STYLES, 0)
    slips = chances = 0
    for p in problems:
        lines = [x for x in task.demonstrate(p, rng, mix=mix).splitlines() if x.split(" ")[0] in ("So", "Work", "Let")]
        assert len(lines) == len(steps_of(p))
        for line in lines:
            steps[{"So": "hasty", "Work": "careful", "Let": "verbose"}[line.split(" ")[0]]] += 1
            if m := re.match(r"So (\d+)(\+|-|\*|/| mod )(\d+)=(\d+)\.$", line):
                a, op, b = int(m[1]), m[2].strip(), int(m[3])
                right = execute([task.Step(a, op, b)])[0]
                chances += slipped(a, op, b) != right
                slips += int(m[4]) != right
    total = sum(steps.values())
    for style in STYLES:
        assert abs(steps[style] / total - getattr(mix, style)) < 0.03, style
    assert 0.5 < slips / chances < mix.slip + 0.03


def test_slips_are_the_named_mistakes() -> None:
    assert [slipped(47, "+", 18), slipped(65, "-", 18), slipped(23, "*", 4), slipped(92, "/", 4), slipped(57, "mod", 8)] == [
        55,
        57,
        82,
        20,
        7,
    ]
    assert [slipped(41, "+", 18), slipped(68, "-", 15), slipped(21, "*", 4), slipped(84, "/", 4)] == [59, 53, 84, 21]


def test_a_mixture_that_does_not_sum_to_one_is_refused() -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        Mix(hasty=0.9)


def test_a_foreign_problem_cannot_be_demonstrated() -> None:
    with pytest.raises(ValueError, match="no steps"):
        task.demonstrate(Problem("a", "1 + 1", "2"), random.Random(0))


def test_test_set_files_pin_what_the_generator_gives() -> None:
    suite = tomllib.loads((BENCHMARKS / "suites" / "mini.toml").read_text())
    assert suite["testsets"] == list(task.mini_suite())
    for name in suite["testsets"]:
        told = tomllib.loads((BENCHMARKS / "testsets" / f"{name}.toml").read_text())
        assert told["name"] == name
        problems = task.mini_set(name, rows=told["rows"], seed=told["seed"])
        assert checksum(problems) == told["sha256"]


def test_the_task_needs_no_torch() -> None:
    code = "import sys, rlzoo.data.arithmetic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

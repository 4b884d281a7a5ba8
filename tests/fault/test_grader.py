"""The grader against hostile answers and dying workers: bounded verdicts, no effects, nothing left behind."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from rlzoo.rewards.math import Grader, GraderConfig, Kind, Verdict
from rlzoo.rewards.worker import Limits

HANG = ("2", r"\boxed{9^{9^{9^{9}}}}")

# A worker whose judge misbehaves on command: everything around the judge (timers, limits, supervisor, pool) is the real one.
FAULTY = """
import os, signal, time
import rlzoo.rewards.judge as judge_module
import rlzoo.rewards.worker as worker
honest = judge_module.judge
def judge(gold, answer, boxed):
    word, _, argument = answer.partition(":")
    if word == "memory": bytearray(1 << 40)
    if word == "creep":
        hoard = []
        while True: hoard.append(bytearray(1 << 24))
    if word == "sleep": time.sleep(1000)
    if word == "burn":
        while time.process_time() < 0.2 * int(argument): pass
    if word == "segv": signal.raise_signal(signal.SIGSEGV)
    if word == "kill": signal.raise_signal(signal.SIGKILL)
    if word == "exit": os._exit(3)
    if word == "bug": raise ZeroDivisionError
    if word == "write": open(argument, "w").write("x")
    if word == "creat": os.open(argument, os.O_CREAT | os.O_WRONLY)
    if word == "system": os.system("touch " + argument)
    if word == "fork": os.fork()
    if word == "socket": import socket; socket.create_connection(("localhost", 9))
    if word == "print": print("noise", flush=True); os.write(1, b"noise")
    if word == "once":
        if not os.path.exists(argument): signal.raise_signal(signal.SIGKILL)
    return honest(gold, answer if ":" not in answer else gold, boxed)
judge_module.judge = judge
worker.main()
"""


def faulty(workers: int = 1, **config: float) -> Grader:
    settings = GraderConfig(workers=workers, **({"deadline_s": 1.0, "memory_mb": 1024} | config))  # type: ignore[arg-type]
    limits = Limits(settings.deadline_s, settings.wall_s, settings.memory_mb, settings.recycle)
    return Grader(settings, command=[sys.executable, "-c", FAULTY, limits.to_json()])


def boxed(answer: str) -> tuple[str, str]:
    return ("x+1", f"\\boxed{{{answer}}}")


def until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.05)
    return False


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(GraderConfig(workers=2, deadline_s=0.5)) as grader:
        grader.grade([boxed("start"), boxed("the"), boxed("workers")])
        yield grader


def nested(opening: str, depth: int, closing: str) -> str:
    return opening * depth + "2" + closing * depth


HOSTILE = {
    "power tower": "9^{9^{9^{9}}}",
    "tall tower": "2^{2^{2^{2^{2^{2}}}}}",
    "nested logs": nested(r"\log_{2}{(", 60, ")}"),
    "factorial": "100000000!",
    "binomial": r"\binom{1000000000}{500000000}",
    "10k digits": "7" * 10_000,
    "digits to digits": "7" * 900 + "^{" + "8" * 900 + "}",
    "1 MB of braces": "{" * 500_000 + "}" * 500_000,
    "1 MB of open braces": "{" * 1_000_000,
    "deep brackets": nested("(", 900, ")"),
    "deep roots": nested(r"\sqrt{", 250, "}"),
    "integral": r"\int_0^1 \int_0^x e^{x^{y^{x}}} dy dx",
    "long sum": r"\sum_{k=1}^{1000000000000} \frac{1}{k^k}",
    "matrix power": r"\begin{pmatrix} 1&2\\3&4 \end{pmatrix}^{1000000000}",
    "broken unicode": "\ud800\u202e\x00",
    "floor": r"\lfloor 10^{10^{10}} \rfloor",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_get_a_bounded_verdict(grader: Grader, name: str) -> None:
    started = time.monotonic()
    (verdict,) = grader.grade([("2", f"so \\boxed{{{HOSTILE[name]}}}")])
    assert verdict.correct is False
    assert time.monotonic() - started < 30.0  # half a second of CPU, on a very busy machine


def test_a_hang_is_timed_out_and_counted_apart(grader: Grader) -> None:
    before = grader.counts[Kind.TIMED_OUT]
    verdicts = grader.grade([("x+1", r"\boxed{1+x}"), ("2", r"\boxed{8^{9^{9^{9}}}}"), ("x+1", r"\boxed{x+2}")])
    assert [v.kind for v in verdicts] == [Kind.RIGHT, Kind.TIMED_OUT, Kind.WRONG]
    assert grader.counts[Kind.TIMED_OUT] == before + 1


@pytest.mark.parametrize("require_box", [True, False])
def test_no_text_executes_code(tmp_path: Path, require_box: bool) -> None:
    target = tmp_path / "made"
    code = f"__import__('os').system('touch {target}')"
    texts = [
        code,
        f"\\text{{{code}}}",
        f"\\operatorname{{{code}}}",
        f"open('{target}','w')",
        f"1 + {code}",
        f"x = {code}",
        f"${code}$",
        f"(lambda: {code})()",
        f"\\sin({code})",
        f'eval("{code}")',
        f"[{code} for _ in range(1)]",
        f"5 {code}",
        f"\\input{{|touch {target}}}",
        f"\\write18{{touch {target}}}",
    ]
    with Grader(GraderConfig(workers=1, require_box=require_box)) as grader:
        verdicts = grader.grade([("5", f"\\boxed{{{text}}}") for text in texts] + [("5", f"The final answer is {text}") for text in texts])
        grader.grade([(f"\\text{{{code}}}", "\\boxed{5}"), (code, "\\boxed{5}")])  # nor a gold answer
    assert not target.exists()
    assert all(v.kind is not Kind.FAILED for v in verdicts)


def test_sympy_cannot_be_made_to_evaluate_text(tmp_path: Path) -> None:
    code = """
import rlzoo.rewards.judge as judge, sympy, sys
judge.guard_eval()
for text in ("().__class__", "__import__('os')", "open('x')", "f(1)", "1;2"):
    try: sympy.sympify(text)
    except Exception: continue
    sys.exit("evaluated " + text)
assert sympy.sympify("3*(1+2)/4") == sympy.Rational(9, 4)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("deed", ["write", "creat", "system", "fork", "socket"])
def test_a_worker_has_no_rights_even_if_code_ran(tmp_path: Path, deed: str) -> None:
    target = tmp_path / "made"
    with faulty() as grader:
        verdict, after = grader.grade([boxed(f"{deed}:{target}"), boxed("1+x")])
    assert verdict == Verdict(Kind.FAILED, "PermissionError in the grader")
    assert after.kind is Kind.RIGHT
    assert not target.exists()


def test_prints_do_not_break_the_protocol() -> None:
    with faulty() as grader:
        assert [v.kind for v in grader.grade([boxed("print:it"), boxed("1+x")])] == [Kind.RIGHT, Kind.RIGHT]


@pytest.mark.parametrize("bomb", ["memory:", "creep:"])
def test_a_memory_bomb_is_stopped_at_its_limit(bomb: str) -> None:
    with faulty(deadline_s=20.0, memory_mb=600) as grader:
        verdicts = grader.grade([boxed("1+x"), boxed(bomb), boxed("x+1+0")])
    assert verdicts == [Verdict(Kind.RIGHT), Verdict(Kind.TIMED_OUT, "memory limit"), Verdict(Kind.RIGHT)]


def test_a_crashing_answer_is_tried_twice_and_charged() -> None:
    with faulty() as grader:
        verdicts = grader.grade([boxed("1+x"), boxed("segv:"), boxed("x+2")])
        assert grader.restarts >= 2
    assert [v.kind for v in verdicts] == [Kind.RIGHT, Kind.TIMED_OUT, Kind.WRONG]
    assert "crashed" in verdicts[1].detail


@pytest.mark.parametrize("death", ["kill:", "exit:"])
def test_a_worker_that_dies_for_no_fault_of_the_answer_is_failed_never_wrong(death: str) -> None:
    with faulty() as grader:
        verdicts = grader.grade([boxed("1+x"), boxed(death), boxed("x+2")])
        assert [v.kind for v in verdicts] == [Kind.RIGHT, Kind.FAILED, Kind.WRONG]
        assert verdicts[1].correct is None
        assert grader.counts[Kind.FAILED] == 1
        assert [v.kind for v in grader.grade([boxed(death)])] == [Kind.FAILED]  # and it is not remembered as a verdict


def test_a_worker_killed_once_is_replaced_and_the_pair_graded(tmp_path: Path) -> None:
    with faulty() as grader:
        assert grader.grade([boxed(f"once:{tmp_path / 'x'}")])[0].kind is Kind.FAILED  # kills as long as the file is missing
        handle = grader.submit([boxed(f"once:{tmp_path}")])  # the folder exists: an honest verdict
        assert grader.collect(handle, timeout_s=60) == [Verdict(Kind.RIGHT)]
        (pid,) = grader.worker_pids()
        os.kill(pid, signal.SIGKILL)
        assert grader.grade([boxed("1+x")])[0].kind is Kind.RIGHT


def test_a_starved_worker_is_failed_not_wrong() -> None:
    with faulty(wall_s=0.5) as grader:
        verdicts = grader.grade([boxed("sleep:"), boxed("1+x")])
    assert [v.kind for v in verdicts] == [Kind.FAILED, Kind.RIGHT]
    assert "wall-clock" in verdicts[0].detail


def test_a_bug_in_the_grader_is_failed() -> None:
    with faulty() as grader:
        assert grader.grade([boxed("bug:")]) == [Verdict(Kind.FAILED, "ZeroDivisionError in the grader")]


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ([sys.executable, "-c", "import sys; sys.exit('no sympy here')"], "no sympy here"),
        (["/nonexistent/python"], "No such file"),
        ([sys.executable, "-c", "print('this is no frame, it is far too chatty')"], "do not start"),
    ],
)
def test_workers_that_never_start_fail_every_pair_soon(command: list[str], why: str) -> None:
    with Grader(GraderConfig(workers=2), command=command) as grader:
        started = time.monotonic()
        for _ in range(2):  # the second batch tries afresh
            verdicts = grader.grade([("5", r"\boxed{5}"), *(boxed(f"x+{i}") for i in range(20))])
            assert verdicts[0].kind is Kind.RIGHT  # the fast path needs no worker
            assert {v.kind for v in verdicts[1:]} == {Kind.FAILED}
            assert {v.correct for v in verdicts[1:]} == {None}
            assert why in verdicts[1].detail
        assert time.monotonic() - started < 30.0


def test_a_worker_that_never_gets_ready_is_given_up() -> None:
    with Grader(
        GraderConfig(workers=1, start_timeout_s=0.3, max_starts=2), command=[sys.executable, "-c", "import time; time.sleep(60)"]
    ) as grader:
        assert [v.kind for v in grader.grade([boxed("1+x")])] == [Kind.FAILED]


def test_one_hang_delays_a_batch_by_at_most_its_deadline_and_a_second() -> None:
    pairs = [(f"{i}.5", f"\\boxed{{{i}.{i % 7}}}") for i in range(1000)]

    def seconds(batch: list[tuple[str, str]]) -> tuple[float, list[Verdict]]:
        with Grader(GraderConfig(workers=2, deadline_s=1.0, fast_path=False)) as grader:
            grader.grade([boxed("a"), boxed("b"), boxed("c"), boxed("d")])
            started = time.monotonic()
            verdicts = grader.grade(batch)
            return time.monotonic() - started, verdicts

    for _ in range(3):  # the times depend on what else the machine does
        deadline_s = max(1.0, seconds([HANG])[0])  # CPU time, so longer on a busy machine
        quiet_s, expected = seconds(pairs)
        hung_s, verdicts = seconds([*pairs[:500], HANG, *pairs[500:]])
        assert verdicts[500].kind is Kind.TIMED_OUT
        assert verdicts[:500] + verdicts[501:] == expected  # only the pair in flight is charged
        assert {v.kind for v in expected} == {Kind.RIGHT, Kind.WRONG}
        if hung_s <= quiet_s + deadline_s + 1.0:
            return
    pytest.fail(f"{quiet_s:.2f} s without, {hung_s:.2f} s with one hanging answer, which takes {deadline_s:.2f} s alone")


def test_children_are_recycled() -> None:
    with Grader(GraderConfig(workers=1, recycle=5)) as grader:
        seen: set[int] = set()
        for i in range(3):
            assert {v.kind for v in grader.grade([boxed(f"x+1+0*{i}*{j}") for j in range(5)])} == {Kind.RIGHT}
            supervisor = psutil.Process(grader.worker_pids()[0])
            assert until(lambda: {child.pid for child in supervisor.children()} - seen != set())  # noqa: B023
            seen |= {child.pid for child in supervisor.children()}
        assert grader.restarts == 0


def family(pids: list[int]) -> list[psutil.Process]:
    processes = [psutil.Process(pid) for pid in pids]
    return processes + [child for p in processes for child in p.children(recursive=True)]


def gone(processes: list[psutil.Process]) -> bool:
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes)


def test_nothing_is_left_after_close() -> None:
    before = psutil.Process().num_fds()
    grader = Grader(GraderConfig(workers=2, deadline_s=30.0))
    grader.grade([boxed("a"), boxed("b"), boxed("c")])
    handle = grader.submit([HANG])
    time.sleep(0.3)
    processes = family(grader.worker_pids())
    assert len(processes) >= 2
    grader.close()
    grader.close()
    assert until(lambda: gone(processes))
    assert grader.collect(handle)[0].kind is Kind.FAILED
    assert psutil.Process().num_fds() <= before
    with pytest.raises(RuntimeError, match="closed"):
        grader.grade([boxed("d")])


PARENT = """
import time
from rlzoo.rewards.math import Grader, GraderConfig
grader = Grader(GraderConfig(workers=2, deadline_s=300.0))
grader.grade([("x+1", r"\\boxed{a}"), ("x+1", r"\\boxed{b}"), ("x+1", r"\\boxed{c}")])
grader.submit([("2", r"\\boxed{9^{9^{9^{9}}}}")])
time.sleep(0.3)
print(*grader.worker_pids(), flush=True)
time.sleep(300)
"""


def test_workers_die_with_their_parent() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    try:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        processes = family(pids)
        assert len(processes) >= 2
    finally:
        parent.kill()  # SIGKILL: no clean-up of its own
        parent.wait()
    assert until(lambda: gone(processes))


def test_the_cpu_time_of_workers_is_counted() -> None:
    """Against what the kernel says of the children that were waited for: those still at work when the grader closes are missing there."""

    def children_s() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = children_s()
    with faulty(recycle=3) as grader:
        assert grader.cpu_s == 0
        grader.grade([boxed(f"burn:{1 + i % 3}") for i in range(7)])  # .2 s each; two children end, of the third one pair is told
        honest = grader.cpu_s
        assert [v.kind for v in grader.grade([("2", r"\boxed{7^{9^{9^{9}}}}")])] == [Kind.TIMED_OUT]
        assert grader.cpu_s - honest > 0.9, "the pair that ran into its deadline of 1 s counts"
        counted = grader.cpu_s
    known = children_s() - before
    assert counted == pytest.approx(known, rel=0.1, abs=0.1)

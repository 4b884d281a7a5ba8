"""A grading worker: `python -m rlzoo.rewards.worker CONFIG`, frames of JSON over stdin and stdout.

Two processes. The supervisor imports math-verify once and forks; it never sees an answer. The child grades, one pair at a time,
under a CPU timer that the kernel enforces (SIGPROF with its default action ends the process even inside C code), a memory limit
and without write rights. When a child dies the supervisor reports why and forks the next one within milliseconds.

Frames: 4 bytes of length (big-endian), then JSON. To the worker: {"id", "gold", "answer", "boxed"}. From it: {"ready": pid of the
supervisor, "cpu_s": what its start took}, {"id", "kind", "detail", "cpu_s": since the child's last answer} per pair, and of a child that
has ended {"ended_cpu_s": of its whole life}, with "died": "cpu" | "memory" | "wall" | "signal N" | "exit N" when the pair at the head of
the line ended it. Only JSON: nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import select
import signal
import struct
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

_OUT_OF_MEMORY = 86
_BAD_FRAME = 87
_MAX_FRAME = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What one pair may use. `deadline_s` is CPU time, `wall_s` the backstop, `memory_mb` address space, `recycle` pairs per child."""

    deadline_s: float = 3.0
    wall_s: float = 60.0
    memory_mb: int = 2048
    recycle: int = 2000

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def pack(message: dict[str, Any]) -> bytes:
    """A message as one frame."""
    body = json.dumps(message, ensure_ascii=False).encode("utf-8", "replace")
    return struct.pack(">I", len(body)) + body


def read_exactly(fd: int, size: int) -> bytes | None:
    """`size` bytes, or None at the end of the stream."""
    parts = b""
    while len(parts) < size:
        chunk = os.read(fd, size - len(parts))
        if not chunk:
            return None
        parts += chunk
    return parts


def _read_frame(fd: int) -> dict[str, Any] | None:
    head = read_exactly(fd, 4)
    if head is None:
        return None
    (size,) = struct.unpack(">I", head)
    if size > _MAX_FRAME:
        os._exit(_BAD_FRAME)
    body = read_exactly(fd, size)
    return None if body is None else json.loads(body)


# --- the child: the only process that touches answers --------------------------------------------------------------------------

_DENIED = (
    "os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "signal.", "mmap.", "fcntl.", "resource.", "sqlite3.", "urllib.",
    "http.", "ftplib.", "smtplib.", "webbrowser.", "tempfile.", "glob.", "pathlib.", "syslog.", "pickle.", "gc.", "sys.addaudithook",
)  # fmt: skip
_ALLOWED = frozenset({"os.listdir", "os.scandir"})  # the import system looks into package folders
_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _forbid_effects() -> None:
    """From here on, no code of this process can write, run, connect or kill: the interpreter itself refuses.

    A second line of defence: nothing in an answer reaches Python's eval in the first place.
    """

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            mode, flags = args[1], args[2]
            if (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & _WRITE):
                raise PermissionError("a grading worker may not write files")
        elif event.startswith(_DENIED) and event not in _ALLOWED:
            raise PermissionError(f"a grading worker may not do {event}")

    sys.dont_write_bytecode = True
    sys.addaudithook(hook)


def _limit(name: str, value: int) -> None:
    with contextlib.suppress(ValueError, OSError):  # a platform without it, or a lower limit already in force
        number = getattr(resource, name)
        hard = resource.getrlimit(number)[1]
        resource.setrlimit(number, (value if hard == resource.RLIM_INFINITY else min(value, hard),) * 2)


def _child(limits: Limits, notify: int, answers: int) -> NoReturn:
    from rlzoo.rewards.judge import guard_eval, judge

    _limit("RLIMIT_AS", limits.memory_mb << 20)
    for name in ("RLIMIT_FSIZE", "RLIMIT_CORE", "RLIMIT_NPROC"):
        _limit(name, 0)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (1, 2):
        os.dup2(null, fd)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    arm = signal.setitimer
    guard_eval()
    _forbid_effects()
    told_s = 0.0
    for _ in range(limits.recycle):
        request = _read_frame(0)
        if request is None:
            break
        detail = ""
        os.write(notify, b"s")
        arm(signal.ITIMER_PROF, limits.deadline_s)
        try:
            kind = judge(request["gold"], request["answer"], request["boxed"])
        except MemoryError:
            os._exit(_OUT_OF_MEMORY)
        except RecursionError:
            kind = "unparsable"  # nested deeper than the parser goes
        except Exception as error:
            kind, detail = "failed", f"{type(error).__name__} in the grader"
        arm(signal.ITIMER_PROF, 0)
        os.write(notify, b"e")
        used_s = time.process_time()
        os.write(answers, pack({"id": request["id"], "kind": kind, "detail": detail, "cpu_s": used_s - told_s}))
        told_s = used_s
    os._exit(0)


# --- the supervisor: forks, watches the wall clock, reports ---------------------------------------------------------------------


def _fork(limits: Limits, answers: int) -> tuple[int, int]:
    watch, notify = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(watch)
            _child(limits, notify, answers)
        except BaseException as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
        finally:
            os._exit(1)
    os.close(notify)
    return pid, watch


def _reason(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "cpu" if number in (signal.SIGPROF, signal.SIGXCPU) else f"signal {number}"
    code = os.WEXITSTATUS(status)
    return "memory" if code == _OUT_OF_MEMORY else f"exit {code}"


def _watch(pid: int, watch: int, wall_s: float) -> tuple[str | None, float]:
    """Wait for the child's end; why it died, None when its end was a clean one, and the CPU seconds of its life. Ends this process when
    the caller is gone."""
    parent, started, killed = os.getppid(), None, False
    poll = select.poll()
    poll.register(0, 0)  # only the hang-up: the child reads the requests
    poll.register(watch, select.POLLIN)
    while True:
        left_s = 1.0 if started is None else min(1.0, max(0.0, started + wall_s - time.monotonic()))
        events = dict(poll.poll(left_s * 1000))
        data = os.read(watch, 4096) if watch in events else b"-"
        if not data:  # the child is gone
            _, status, usage = os.wait4(pid, 0)
            os.close(watch)
            return "wall" if killed else None if status == 0 else _reason(status), usage.ru_utime + usage.ru_stime
        if data[-1:] in (b"s", b"e"):
            started = time.monotonic() if data.endswith(b"s") else None
        if events.get(0, 0) & (select.POLLHUP | select.POLLERR) or os.getppid() != parent:
            os.kill(pid, signal.SIGKILL)
            os._exit(0)
        if started is not None and time.monotonic() >= started + wall_s:
            os.kill(pid, signal.SIGKILL)
            killed = True


def _warm_up() -> None:
    """Fill the parser's and sympy's caches once, so that every child starts with them."""
    from rlzoo.rewards.judge import judge, parse_in_two_stages

    parse_in_two_stages()
    for gold, answer in (
        (r"\frac{3\sqrt{3}}{4}", r"\frac{\sqrt{27}}{4}"), ("x^2+2x+1", "(x+1)^2"), ("3,5,7", "7,5,3"), (r"(-\infty,2)", r"(-\infty, 2)"),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}"),
        ("y = 2x + 3", "y=3+2x"), (r"\text{east}", "west"),
        (r"\frac{\pi}{6}", r"\arcsin\frac12"), ("1+2i", "2i+1"), (r"50\%", "0.5"), (r"1 \pm \sqrt{19}", r"1+\sqrt{19}"), ("2k+2", "2(k+1)"),
    ):  # fmt: skip
        judge(gold, answer, True)


def main() -> None:
    """Serve until stdin is closed."""
    limits = Limits(**json.loads(sys.argv[1])) if len(sys.argv) > 1 else Limits()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's to handle
    answers = os.dup(1)
    os.dup2(2, 1)  # a stray print must not break the protocol
    _warm_up()
    gc.collect()
    gc.freeze()  # keep the shared pages shared
    os.write(answers, pack({"ready": os.getpid(), "cpu_s": time.process_time()}))
    while True:
        reason, used_s = _watch(*_fork(limits, answers), limits.wall_s)
        os.write(answers, pack({"ended_cpu_s": used_s} | ({} if reason is None else {"died": reason})))


if __name__ == "__main__":
    main()

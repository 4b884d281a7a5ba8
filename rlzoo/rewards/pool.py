"""The caller's side of the grading workers: a queue, a dispatcher thread, and the rules for what a death means.

A pair is charged for its own fault only. Its deadline or the memory limit: `timed_out`. A crash (SIGSEGV and its like): once more in
a fresh process, and if it crashes that too, `timed_out`. A death by any other signal comes from outside and says nothing of the pair: it
is graded again, and `failed` only after MAX_KILLS of them. A worker that cannot start, answers nonsense or is starved past the wall-clock
backstop: once more, then `failed`. The other pairs of a dead worker go back to the queue.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import struct
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

from rlzoo.rewards.worker import Limits, pack
from rlzoo.store.processes import PACKAGE_ROOT, own_program

_WINDOW = 4  # pairs sent ahead to a worker, so that it never waits for the caller
_WINDOW_BYTES = 48_000  # below a pipe's buffer: the dispatcher must never block on a write
_MAX_TRIES = 2
MAX_KILLS = 16  # deaths by signals from outside, of one pair's graders or of workers in a row
_CRASHES = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP, signal.SIGSYS})
_GRACE_S = 10.0  # over the worker's own wall-clock backstop
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a worker found: a verdict's kind by name, and why where that is not obvious."""

    kind: str
    detail: str = ""


@dataclass(slots=True)
class Task:
    """One pair on its way through the pool."""

    gold: str
    answer: str
    boxed: bool
    tries: int = 0
    kills: int = 0
    size: int = 0
    outcome: Outcome | None = None
    job: Job | None = None


@dataclass(eq=False)
class Job:
    """A batch of tasks; `wait` returns when the last one has its outcome."""

    tasks: list[Task]
    left: int = 0
    done: threading.Event = field(default_factory=threading.Event)

    def wait(self, timeout_s: float | None = None) -> list[Outcome]:
        """The outcomes, in the order of the tasks.

        Raises:
            TimeoutError: not done within `timeout_s`.
        """
        if not self.done.wait(timeout_s):
            raise TimeoutError(f"grading: {self.left} of {len(self.tasks)} pairs are not done after {timeout_s} s")
        return [task.outcome for task in self.tasks if task.outcome is not None]


class _Worker:
    """One worker process and the tasks that were sent to it, oldest first."""

    def __init__(self, command: Sequence[str]) -> None:
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        environment = {k: v for k, v in os.environ.items() if k in _ENVIRONMENT}
        environment |= {"PYTHONPATH": PACKAGE_ROOT, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        try:
            self.process = subprocess.Popen(
                command, bufsize=0, env=environment, start_new_session=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
            )  # fmt: skip
        except BaseException:
            self.errors.close()
            raise
        assert self.process.stdin and self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.in_flight: deque[Task] = deque()
        self.bytes_out = 0
        self.child_cpu_s = 0.0  # what the child at work has told of
        self.ready = False
        self.progress = time.monotonic()
        self.buffer = b""

    def send(self, task: Task) -> None:
        frame = pack({"id": id(task), "gold": task.gold, "answer": task.answer, "boxed": task.boxed})
        if not self.in_flight:
            self.progress = time.monotonic()
        task.size = len(frame)
        self.in_flight.append(task)
        self.bytes_out += task.size
        with contextlib.suppress(BrokenPipeError):  # its end shows on stdout
            self.stdin.write(frame)

    def pop(self) -> Task:
        task = self.in_flight.popleft()
        self.bytes_out -= task.size
        self.progress = time.monotonic()
        return task

    def frames(self) -> list[dict[str, Any]] | None:
        """What has arrived; None at the end of the stream."""
        data = os.read(self.stdout.fileno(), 1 << 16)
        if not data:
            return None
        self.buffer += data
        found = []
        while len(self.buffer) >= 4 and len(self.buffer) >= 4 + (size := struct.unpack(">I", self.buffer[:4])[0]):
            found.append(json.loads(self.buffer[4 : 4 + size]))
            self.buffer = self.buffer[4 + size :]
        return found

    def killed(self) -> bool:
        """Whether a signal has ended the worker, whose output has ended: from outside, for it never sees an answer."""
        try:
            return self.process.wait(0.2) < 0  # its end may come a moment after its output's
        except subprocess.TimeoutExpired:
            return False

    def stop(self) -> str:
        """Kill the worker with all its children; its last words."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.stdin.close()
        self.stdout.close()
        self.errors.seek(0, os.SEEK_END)
        self.errors.seek(max(0, self.errors.tell() - 500))
        words = self.errors.read().decode("utf-8", "replace").strip().splitlines()
        self.errors.close()
        return words[-1] if words else f"exit status {self.process.returncode}"


class Pool:
    """Grading workers. Threads may call `submit` and `close`; the processes are started by the first `submit` or `warm`."""

    def __init__(
        self, workers: int, limits: Limits, *, start_timeout_s: float = 60.0, max_starts: int = 3, command: Sequence[str] | None = None
    ) -> None:
        self.size, self.limits, self.start_timeout_s, self.max_starts = workers, limits, start_timeout_s, max_starts
        self.command = tuple(command) if command else (*own_program("rlzoo.rewards.worker"), limits.to_json())
        self.restarts = 0
        self.cpu_s = 0.0  # of all workers so far, in their own processes
        self._queue: deque[Task] = deque()
        self._workers: list[_Worker] = []
        self._lock = threading.Lock()
        self._closing = False
        self._want = 0  # workers to keep running even without work
        self._strikes = 0  # worker failures since the last sign of life
        self._kills = 0  # workers killed from outside since then
        self._thread: threading.Thread | None = None
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)

    def warm(self) -> None:
        """Start the workers now, without waiting for them."""
        with self._lock:
            self._want = self.size
        self._start_thread()

    def submit(self, tasks: Sequence[Task]) -> Job:
        """Queue tasks. Returns at once.

        Raises:
            RuntimeError: the pool is closed.
        """
        job = Job(list(tasks), left=len(tasks))
        if not job.tasks:
            job.done.set()
            return job
        for task in job.tasks:
            task.job = job
        with self._lock:
            if self._closing:
                raise RuntimeError("the grader is closed")
            self._queue.extend(job.tasks)
        self._start_thread()
        return job

    def pids(self) -> list[int]:
        """Process ids of the running workers (their supervisors)."""
        return [w.process.pid for w in list(self._workers) if w.process.poll() is None]

    def close(self) -> None:
        """End the workers and wait until they are gone. Unfinished pairs become `failed`."""
        with self._lock:
            if self._wake_write < 0:
                return
            self._closing = True
            thread = self._thread
            self._wake()
        if thread is not None:
            thread.join()
        with self._lock:
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_read = self._wake_write = -1

    def _start_thread(self) -> None:
        with self._lock:
            if self._thread is None and not self._closing:
                self._thread = threading.Thread(target=self._run, name="rlzoo-grader", daemon=True)
                self._thread.start()
            self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full of wake-ups already
            os.write(self._wake_write, b".")

    # --- the dispatcher thread ---

    def _run(self) -> None:
        try:
            while not self._closing:
                self._hire()
                self._dispatch()
                self._listen()
                self._police()
        finally:
            for worker in list(self._workers):
                self._dismiss(worker)
            with self._lock:
                self._closing = True  # a dispatcher that died of a bug must not leave callers waiting
                left = list(self._queue)
                self._queue.clear()
            for task in left:
                self._settle(task, Outcome("failed", "the grader was closed"))

    def _hire(self) -> None:
        while len(self._workers) < self._wanted() and not self._give_up():
            try:
                self._workers.append(_Worker(self.command))
            except OSError as error:
                self._strike(str(error))

    def _wanted(self) -> int:
        with self._lock:
            return max(min(self.size, len(self._queue) + sum(len(w.in_flight) for w in self._workers)), self._want)

    def _give_up(self) -> bool:
        return self._strikes >= self.max_starts or self._kills > MAX_KILLS

    def _strike(self, why: str, *, killed: bool = False) -> None:
        """Count a worker failure. After `max_starts` in a row, or MAX_KILLS from outside, whatever waits is `failed`; the next submit tries
        afresh."""
        self._kills += killed
        self._strikes += not killed
        if not self._give_up() or any(w.ready for w in self._workers):
            return
        with self._lock:
            left = list(self._queue)
            self._queue.clear()
            self._want = 0
            self._strikes = self._kills = 0
        for task in left:
            self._settle(task, Outcome("failed", f"grading workers do not start: {why}"))

    def _dispatch(self) -> None:
        for slot in range(_WINDOW):  # breadth first, so that a short queue is spread over the workers
            for worker in self._workers:
                if worker.ready and len(worker.in_flight) <= slot:
                    self._feed(worker)

    def _feed(self, worker: _Worker) -> None:
        with self._lock:
            if not self._queue:
                return
            head = self._queue[0]
            if worker.in_flight and worker.bytes_out + 4 * (len(head.gold) + len(head.answer)) + 200 > _WINDOW_BYTES:
                return
            self._queue.popleft()
        worker.send(head)

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake_read, selectors.EVENT_READ, None)
            for worker in self._workers:
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
            events = selector.select(self._patience_s())
        for key, _ in events:
            if key.data is None:
                os.read(self._wake_read, 4096)
            else:
                self._hear(key.data)

    def _patience_s(self) -> float | None:
        """Until the next deadline of the policing; None when nothing is under way."""
        deadlines = [self._deadline(w) for w in self._workers if not w.ready or w.in_flight]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _deadline(self, worker: _Worker) -> float:
        return worker.progress + (self.limits.wall_s + _GRACE_S if worker.ready else self.start_timeout_s)

    def _hear(self, worker: _Worker) -> None:
        try:
            frames = worker.frames()
        except ValueError:
            frames = None
        if frames is None:
            self._dismiss(worker, strike=True)
            return
        for frame in frames:
            self._count(worker, frame)
            if "ready" in frame:
                worker.ready = True
                worker.progress = time.monotonic()
            elif frame.keys() == {"ended_cpu_s"}:
                continue
            elif "died" in frame:
                if not self._bury(worker, str(frame["died"])):
                    self._dismiss(worker, strike=True)
                    return
            elif worker.in_flight and frame.get("id") == id(worker.in_flight[0]):
                self._strikes = self._kills = 0
                self._settle(worker.pop(), Outcome(str(frame["kind"]), str(frame.get("detail", ""))))
            else:
                self._dismiss(worker, strike=True)
                return

    def _count(self, worker: _Worker, frame: Mapping[str, Any]) -> None:
        """Add what a frame tells of CPU seconds; the end of a child tells what it used after its last answer, too."""
        if "ended_cpu_s" in frame:
            self.cpu_s += max(0.0, float(frame["ended_cpu_s"]) - worker.child_cpu_s)
            worker.child_cpu_s = 0.0
            return
        used_s = float(frame.get("cpu_s", 0.0))
        self.cpu_s += used_s
        if "ready" not in frame:
            worker.child_cpu_s += used_s

    def _bury(self, worker: _Worker, reason: str) -> bool:
        """A child died with the pair at the head of the line. False when the worker can no longer be trusted."""
        if not worker.in_flight:
            return False
        self.restarts += 1
        if reason in ("cpu", "memory"):
            self._strikes = 0
            self._settle(worker.pop(), Outcome("timed_out", f"{reason} limit"))
            return True
        if reason == "wall":
            self._again(worker.pop(), Outcome("failed", "starved: over the wall-clock limit"))
            return True
        if not reason.startswith("signal"):
            return False
        if int(reason.removeprefix("signal ")) in _CRASHES:
            self._again(worker.pop(), Outcome("timed_out", f"crashed with {reason}"))
        else:
            self._again(worker.pop(), Outcome("failed", f"its grader was killed from outside ({reason})"), killed=True)
        return True

    def _again(self, task: Task, otherwise: Outcome, *, killed: bool = False) -> None:
        task.kills += killed
        task.tries += not killed
        if task.tries >= _MAX_TRIES or task.kills > MAX_KILLS:
            self._settle(task, otherwise)
            return
        with self._lock:
            self._queue.appendleft(task)

    def _dismiss(self, worker: _Worker, *, strike: bool = False) -> None:
        """Kill a worker; the pair that it was grading has one more try, the others go back to the queue."""
        self._workers.remove(worker)
        self.restarts += strike
        killed = strike and worker.killed()
        why = worker.stop()
        waiting = list(worker.in_flight)
        with self._lock:
            self._queue.extendleft(reversed(waiting[1:]))
        if waiting:
            self._again(waiting[0], Outcome("failed", f"the worker died: {why}"), killed=killed)
        if strike:
            self._strike(why, killed=killed)

    def _police(self) -> None:
        now = time.monotonic()
        for worker in [w for w in self._workers if (not w.ready or w.in_flight) and self._deadline(w) <= now]:
            self._dismiss(worker, strike=True)

    def _settle(self, task: Task, outcome: Outcome) -> None:
        task.outcome = outcome
        job = task.job
        assert job is not None
        job.left -= 1
        if job.left == 0:
            job.done.set()

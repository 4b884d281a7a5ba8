"""`rlzoo eval`: a folder with `config.toml`, `samples.jsonl` (every sample) and `summary.json` (the result row)."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..backends.protocol import Backend, SamplingParams
from ..backends.select import choose, open_backend, open_server
from ..data.problems import Problem
from ..data.templates import render, turn_ends
from ..errors import one_line
from ..escape import visible
from ..report.evaluated import print_evaluation
from ..report.progress import Progress, Shown
from ..rewards.math import GraderConfig, grader_name
from ..rewards.reward import MathReward, Reward
from ..store.cost import Ledger, open_ledger
from ..store.environment import environment
from ..store.files import locked, remove_partials, taken_back
from ..store.runs import RunFolder, read_rows, to_json, write_aside
from ..training.interrupts import Interrupts
from ..training.models import describe_model, load_model, pick_device, weights_sha256
from ..training.opening import prove_opening
from .options import EvalConfig
from .rows import Protocol, describe_sets, engine_name, result_row
from .runner import Grades, Row, SetResult, Sink, complete, evaluate
from .stats import clustered_mean
from .suites import Suite, find_suite
from .votes import with_votes

T = TypeVar("T")

MODEL = "model"  # the one model of the row
LEDGER_EVERY_S = 10.0  # a kill loses of the ledger what was spent since the last problem that ended so long after the one before
MOST_FAILED = 0.01  # share of gradings that may fail

SHOWN = tuple(
    Shown(label, (key,), lambda v: f"{100 * v:.1f} %") for label, key in (("Pass@1 so far", "mean"), ("from", "low"), ("to", "high"))
)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A finished evaluation: its folder and its result row (also in summary.json)."""

    folder: Path
    row: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """A config with what its suite says: the sets' problems and k by name, one template and one grader for all."""

    config: EvalConfig
    suite: Suite
    problems: Mapping[str, Sequence[Problem]]
    k: dict[str, int]
    template: str
    grader: GraderConfig

    @classmethod
    def of(cls, config: EvalConfig) -> Plan:
        """Read the suite.

        Raises:
            ValueError: unknown suite, a set that cannot be read, or sets that are not measured in the same way.
        """
        suite = find_suite(config.suite)
        k = {s.name: of_suite if config.k is None else config.k for s, of_suite in zip(suite.sets, suite.k, strict=True)}
        for each in set(k.values()):
            config.sampler_of(each)
        template = config.template or _common(suite, "templates", [s.template for s in suite.sets])
        grader = _common(suite, "graders", [s.grader for s in suite.sets])
        return cls(config, suite, suite.load(config.data_dir or None), k, template, grader)

    @property
    def responses(self) -> int:
        """In all."""
        return self.responses_of(self.problems)

    def responses_of(self, names: Iterable[str]) -> int:
        """Responses to the problems of some sets."""
        return sum(len(self.problems[name]) * (self.k[name] + self.config.greedy) for name in names)

    def in_order(self, rows: Sequence[Row]) -> list[Row]:
        """Sampled before greedy ones, then by set, problem and sample: the same file however the samples came in."""
        places = {(name, p.id): i for i, (name, p) in enumerate((name, p) for name, ps in self.problems.items() for p in ps)}
        return sorted(rows, key=lambda r: (r["temperature"] != self.config.temperature, places[r["set"], r["id"]], r["sample"]))


def _common(suite: Suite, what: str, values: Sequence[T]) -> T:
    if any(value != values[0] for value in values):
        raise ValueError(f"the sets of suite {suite.name} have different {what}: {', '.join(sorted({str(v) for v in values}))}; choose one")
    return values[0]


def run_eval(config: EvalConfig, *, out: Path | None = None, resume: bool = False) -> Evaluation:
    """Measure a model on a suite, and leave a folder; or go on with the one in `out` as if it had never been interrupted.

    Raises:
        ValueError: bad input, found before anything is sampled; another process works in the folder; or an evaluation is to be
            resumed with another config than its own.
        RuntimeError: it could not go on (grading failed, disk full, ...); what was sampled is kept.
        KeyboardInterrupt: by Ctrl-C or SIGTERM; says how to go on.
    """
    if not config.model:
        raise ValueError("no model given; rlzoo eval MODEL, which is tiny (the embedded one), a local folder or a hub id")
    name = f"eval-{Path(config.model).name or 'model'}-{config.suite}"
    path = RunFolder.place(out, name, config.to_dict(), resume=resume, whole=lambda *kept: EvalConfig.from_dict(*kept).to_dict())
    folder = RunFolder(path)
    if resume and (row := folder.summary()) is not None:
        return _ended(path, row, ", finished already: nothing is left to do")
    if not config.backend_url:
        choose(config.backend, pick_device(config.backend.device))
    plan = Plan.of(config)
    again = f"rlzoo eval --resume --out {shlex.quote(str(path))}"
    with Interrupts(), locked(path) as made, taken_back(path, made) as stays:
        if resume:
            stays()
            remove_partials(path)
        else:
            folder.refuse_taken(path)
            folder.write_config(config.to_dict())
        try:
            torch.set_num_threads(config.backend.threads or os.cpu_count() or 1)
            backend, ledger = _open_engine(config, plan.template)
            with closing(backend), closing(MathReward(plan.grader)) as reward:
                _check_lengths(plan, backend)
                stays()  # until here nothing has happened, and what is there would block the corrected command
                try:
                    row = evaluate_into(folder, plan, backend, reward, ledger)
                except (OSError, ValueError, RuntimeError) as error:
                    raise RuntimeError(f"{one_line(error)}; once that is mended, go on with {again}") from error
        except KeyboardInterrupt as error:
            raise KeyboardInterrupt(f"interrupted; to go on: {again}") from error
    return _ended(path, row, "")


def _open_engine(config: EvalConfig, template: str) -> tuple[Backend, Ledger]:
    """What samples, and the ledger of its device. A server's devices are unknown: it counts as one device of that name."""
    if not config.backend_url:
        ledger = open_ledger(pick_device(config.backend.device))
        loaded = load_model(config.model, dtype=config.backend.dtype, device=config.backend.device)
        turns = turn_ends(template, loaded.tokenizer)
        backend = open_backend(config.backend, loaded.model, loaded.tokenizer, loaded.device, turns)
        try:
            prove_opening(backend, loaded.model, config.backend.dtype)
        except BaseException:
            backend.close()
            raise
        return backend, ledger
    ledger = Ledger(1, "server")
    described = describe_model(config.model)
    backend = open_server(
        config.backend_url,
        described,
        model=config.served_model,
        planned=[SamplingParams(config.temperature, config.top_p), *[SamplingParams(0)] * config.greedy],
        options=config.backend,
        turns=turn_ends(template, described.tokenizer),
    )
    return backend, ledger


def _ended(path: Path, row: dict[str, Any], how: str) -> Evaluation:
    print_evaluation(row)
    print(visible(f"evaluation folder: {path}{how}"))
    return Evaluation(path, row)


def _check_lengths(plan: Plan, backend: Backend) -> None:
    room = plan.config.max_response_tokens
    for name, problems in plan.problems.items():
        longest = max(len(render(plan.template, p, backend.tokenizer)) for p in problems)
        if longest + room > backend.max_context:
            raise ValueError(
                f"the longest prompt of {name} has {longest} tokens, which with max_response_tokens = {room} "
                f"exceeds the context of {backend.max_context}; allow shorter responses"
            )


def evaluate_into(folder: RunFolder, plan: Plan, backend: Backend, reward: Reward, ledger: Ledger) -> dict[str, Any]:
    """Sample what `folder` does not hold yet, count, and write and return the result row.

    Main-thread time goes to `sampling`, to `grading` (waiting for the grader, and the vote), to `checkpoint` (the ledger on disk)
    and, outside of this function, to `other`; grading that overlaps with sampling costs no phase.

    Raises:
        ValueError: `samples.jsonl` is broken, or see `rlzoo.evaluation.runner.evaluate`.
        RuntimeError: grading failed too often, or for the vote.
    """
    samples = folder.path / "samples.jsonl"
    known = _without_failures(complete(read_rows(samples), plan.k))
    write_aside(samples, _lines(known))
    ledger.beside("grading_cpu_s", lambda: reward.cpu_s)
    kept = _KeptLedger(ledger, folder.path / "ledger.json")
    running = _Running(plan.config.temperature, known)
    timed = _Timed(reward, ledger)
    with kept, samples.open("a", encoding="utf-8") as file, Progress(plan.responses, "responses", shown=SHOWN) as progress:

        def sink(row: Row) -> None:
            file.write(to_json(row) + "\n")
            file.flush()
            running.add(row)

        def told(responses: int) -> None:
            progress.update(running.estimate(), step=responses)
            kept.save_now_and_then()

        with ledger.phase("sampling"):
            results = _sample(plan, backend, timed, known, sink, told)
        rows = plan.in_order(read_rows(samples))
        _check_failures(rows)
        results = with_votes(results, rows, plan.config.vote, timed)
        write_aside(samples, _lines(rows))
        row = _row(plan, results, backend, ledger)
        folder.write_summary(row)
    kept.path.unlink()
    return row


def _sample(
    plan: Plan, backend: Backend, grades: Grades, known: Sequence[Row], sink: Sink, told: Callable[[int], None]
) -> dict[str, SetResult]:
    """The sets by name; those with the same k are sampled together. `told` gets the number of responses so far."""
    config, done = plan.config, 0
    results: dict[str, SetResult] = {}
    for k in dict.fromkeys(plan.k.values()):
        sets = {name: problems for name, problems in plan.problems.items() if plan.k[name] == k}

        def so_far(responses: int, _: int, before: int = done) -> None:
            told(before + responses)

        results |= evaluate(
            backend,
            backend.tokenizer,
            sets,
            k=k,
            temperature=config.temperature,
            greedy=config.greedy,
            max_response_tokens=config.max_response_tokens,
            template=plan.template,
            grade=grades,
            seed=config.seed,
            sampler=config.sampler_of(k),
            known=known,
            sink=sink,
            progress=so_far,
        )
        done += plan.responses_of(sets)
    return {name: results[name] for name in plan.problems}


def _row(plan: Plan, results: Mapping[str, SetResult], backend: Backend, ledger: Ledger) -> dict[str, Any]:
    config = plan.config
    tree = {} if config.sampler == "chains" else config.to_dict()["segments"]
    protocol = Protocol(
        template=plan.template,
        grader=grader_name(plan.grader),
        k=plan.k,
        greedy=config.greedy,
        temperature=config.temperature,
        max_response_tokens=config.max_response_tokens,
        sampler={"name": config.sampler, "top_p": config.top_p} | tree,
        engine=engine_name(backend, config.backend.dtype),
        vote=config.vote,
        seed=config.seed,
    )
    made = result_row(
        kind="eval",
        arm=Path(config.model).name,
        config=config.to_dict(),
        suite=config.suite,
        testsets=describe_sets(plan.suite, plan.problems),
        protocol=protocol,
        results={MODEL: results},
        weights=plan.suite.weights_by_set,
        ledger=ledger.as_dict(),
        environment=environment(),
    ) | {"weights_sha256": {MODEL: None if config.backend_url else weights_sha256(config.model)}}  # a server's cannot be read
    plain: dict[str, Any] = json.loads(to_json(made))  # as a reader of the file has it: no tuples, no infinities
    return plain


def _lines(rows: Sequence[Row]) -> str:
    return "".join(to_json(row) + "\n" for row in rows)


def _without_failures(rows: Sequence[Row]) -> list[Row]:
    """Without the problems of which a grading failed: they get another try."""
    failed = {(row["set"], row["id"], row["temperature"]) for row in rows if row["correct"] is None}
    return [row for row in rows if (row["set"], row["id"], row["temperature"]) not in failed]


def _check_failures(rows: Sequence[Row]) -> None:
    failed = sum(row["correct"] is None for row in rows)
    if failed > MOST_FAILED * len(rows):
        raise RuntimeError(f"grading failed on {failed} of {len(rows)} responses; allowed are {100 * MOST_FAILED:.0f} %")


class _Timed:
    """A grader whose main-thread time goes to the ledger's `grading`."""

    def __init__(self, reward: Reward, ledger: Ledger) -> None:
        self._reward, self._ledger = reward, ledger

    def submit(self, items: Sequence[tuple[Problem, str]]) -> Any:
        with self._ledger.phase("grading"):
            return self._reward.submit(items)

    def collect(self, ticket: Any) -> Sequence[Any]:
        with self._ledger.phase("grading"):
            return self._reward.collect(ticket)


class _KeptLedger:
    """A ledger that survives a kill, but for the last seconds, and goes on from what earlier sessions spent."""

    def __init__(self, ledger: Ledger, path: Path) -> None:
        self.ledger, self.path = ledger, path
        if path.is_file():
            ledger.resume(json.loads(path.read_text(encoding="utf-8")))
        self._saved = ledger.wall_s

    def __enter__(self) -> _KeptLedger:
        return self

    def __exit__(self, *error: object) -> None:
        self.save()

    def save_now_and_then(self) -> None:
        if self.ledger.wall_s - self._saved >= LEDGER_EVERY_S:
            self.save()

    def save(self) -> None:
        with self.ledger.phase("checkpoint"):
            write_aside(self.path, to_json(self.ledger.as_dict()) + "\n")
        self._saved = self.ledger.wall_s


class _Running:
    """Pass@1 of the problems that are finished."""

    def __init__(self, temperature: float, known: Sequence[Row]) -> None:
        self._temperature = temperature
        self._right: dict[tuple[str, str], list[float]] = {}
        for row in known:
            self.add(row)

    def add(self, row: Row) -> None:
        if row["temperature"] == self._temperature and row["correct"] is not None:
            self._right.setdefault((row["set"], row["id"]), []).append(float(row["correct"]))

    def estimate(self) -> dict[str, Any]:
        means = [sum(right) / len(right) for right in self._right.values()]
        return dict(clustered_mean(means).as_dict()) if means else {}

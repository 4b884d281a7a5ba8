"""A result row: what was measured, how, on what, with which outcome and at what cost. `results/` accepts nothing else.

Rows are written by `rlzoo eval` and `rlzoo run` as `summary.json`. The dataclasses below are the schema: every key is known, and a
key without a default is needed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cattrs

from ..data.problems import Problem, checksum
from ..store.files import read_json
from .runner import SetResult, some_k
from .stats import Estimate, stratified_mean
from .suites import Suite
from .testsets import SetSpec, answers_checksum

SCHEMA_VERSION = 1
TOLERANCE = 0.01  # phases of a ledger sum to its wall time within this share


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its interval (`rlzoo.evaluation.stats.Estimate`); null where a bound is infinite."""

    mean: float | None
    low: float | None
    high: float | None
    n: int
    level: float
    method: str
    p_value: float | None = None


@dataclass(frozen=True, slots=True)
class Length:
    """Of responses, in tokens."""

    mean: float
    median: float
    p95: float


@dataclass(frozen=True, slots=True)
class Metrics:
    """One model on one set. Per problem, in the order of `problems` (ids): samples that were `right` and `graded`, and their mean
    `lengths`. `pass_at` by k; shares lie in [0, 1]; `maj_at_k` is null where no votes were counted."""

    n: int
    k: int
    temperature: float
    pass_at_1: Interval
    pass_at: dict[str, Interval | None]
    maj_at_k: Interval | None
    greedy: Metrics | None
    length: Length
    truncated: float
    unparsable: float
    timed_out: float
    verdicts: dict[str, int]
    failed: int
    sampled_tokens: int
    problems: list[str]
    right: list[int]
    graded: list[int]
    lengths: list[float] | None


@dataclass(frozen=True, slots=True)
class Overall:
    """One model on a suite: every figure is the mean over its sets by `weights` (which sum to 1), problems and tokens are their sum.
    `pass_at` up to the smallest k of a set, `maj_at_k` where all have the same."""

    weights: dict[str, float]
    n: int
    pass_at_1: Interval
    pass_at: dict[str, Interval | None]
    maj_at_k: Interval | None
    greedy: Interval | None
    length: Length
    truncated: float
    unparsable: float
    timed_out: float
    sampled_tokens: int


@dataclass(frozen=True, slots=True)
class Arm:
    """What is compared: the algorithm, or for an evaluated model its name. The hash is `config_hash` of the row's config."""

    name: str
    config_sha256: str


@dataclass(frozen=True, slots=True)
class Testset:
    """Problems in a set, the checksums of their texts and answers (see `rlzoo.evaluation.testsets`), and where they come from: a
    data set of the hub and its commit, or a generator and its seed."""

    n: int
    sha256: str
    answers_sha256: str
    source: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, spec: SetSpec, problems: Sequence[Problem]) -> Testset:
        """What a row says of a set and its problems."""
        origin = (spec.generator, f"seed {spec.seed}") if spec.hub is None else (spec.hub.source, spec.hub.revision)
        return cls(len(problems), checksum(problems), answers_checksum(problems), *origin)


@dataclass(frozen=True, slots=True)
class Protocol:
    """How was measured; rows that differ in it are not compared. `grader`: its versions and settings; `k` by set; `sampler`: its
    name and what it adds to k, temperature and limit."""

    template: str
    grader: str
    k: dict[str, int]
    greedy: bool
    temperature: float
    max_response_tokens: int
    sampler: dict[str, Any]
    engine: str
    vote: str | None
    seed: int


@dataclass(frozen=True, slots=True)
class LedgerRow:
    """`rlzoo.store.cost.Ledger.as_dict`: device-hours are devices x wall, the phases sum to the wall time. `overlapped`, which older rows
    lack, is work in other processes meanwhile: "grading_cpu_s"."""

    device: str
    devices: int
    wall_s: float
    device_hours: float
    seconds: dict[str, float]
    device_seconds: dict[str, float]
    overlapped: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Environment:
    """`rlzoo.store.environment.environment`."""

    python: str
    system: str
    versions: dict[str, str | None]
    cpu: str
    cores: int
    gpus: list[str]
    commit: str | None
    dirty: bool | None


@dataclass(frozen=True, slots=True)
class ResultRow:
    """The row. `results` and `overall` are by model: "model" of `rlzoo eval`, "base" and "trained" of `rlzoo run`, which also has
    the keys from `algo` on: `training` is the ledger without the final measurement, `table` what was printed. `weights_sha256` is by
    model, see `rlzoo.training.models.weights_sha256`; older rows lack it."""

    schema_version: int
    kind: Literal["eval", "run"]
    arm: Arm
    model: str
    seed: int
    suite: str
    testsets: dict[str, Testset]
    protocol: Protocol
    results: dict[str, dict[str, Metrics]]
    overall: dict[str, Overall]
    ledger: LedgerRow
    environment: Environment
    config: dict[str, Any]
    weights_sha256: dict[str, str | None] | None = None
    algo: str | None = None
    steps: int | None = None
    sampled_tokens: int | None = None
    unrolled_tokens: int | None = None
    best: dict[str, float] | None = None
    training: LedgerRow | None = None
    table: dict[str, Any] | None = None


def config_hash(config: Mapping[str, Any]) -> str:
    """SHA-256 of a config as compact JSON with sorted keys. `seed` is left out: runs of an arm that differ in it alone share the hash."""
    arm = {key: value for key, value in config.items() if key != "seed"}
    return hashlib.sha256(json.dumps(arm, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def result_row(
    *,
    kind: Literal["eval", "run"],
    arm: str,
    config: Mapping[str, Any],
    suite: str,
    testsets: Mapping[str, Testset],
    protocol: Protocol,
    results: Mapping[str, Mapping[str, SetResult]],
    weights: Mapping[str, float],
    ledger: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """A row as plain data; `config` names the model and the seed, `results` are by model and set, `weights` by set."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "arm": {"name": arm, "config_sha256": config_hash(config)},
        "model": config["model"],
        "seed": config["seed"],
        "suite": suite,
        "testsets": cattrs.unstructure(testsets),
        "protocol": cattrs.unstructure(protocol),
        "results": {model: {name: r.as_dict() for name, r in sets.items()} for model, sets in results.items()},
        "overall": {model: overall(sets, weights) for model, sets in results.items()},
        "ledger": ledger,
        "environment": environment,
        "config": config,
    }


def engine_name(backend: Any, dtype: str) -> str:
    """What sampled: the engine's module and its precision; of a server what it says of itself, as its precision is its own."""
    return getattr(backend, "engine", None) or f"{type(backend).__module__.rpartition('.')[2]} {dtype}"


def describe_sets(suite: Suite, problems: Mapping[str, Sequence[Problem]]) -> dict[str, Testset]:
    """What a row says of a suite's sets and their problems."""
    return {spec.name: Testset.of(spec, problems[spec.name]) for spec in suite.sets}


def overall(results: Mapping[str, SetResult], weights: Mapping[str, float]) -> dict[str, Any]:
    """One model on all its sets as plain data (see `Overall`); intervals are over problems within sets."""
    share = [weights[name] / sum(weights[name] for name in results) for name in results]
    sets = list(results.values())
    ks = {r.k for r in sets}

    def mean(values: Sequence[float]) -> float:
        return sum(w * v for w, v in zip(share, values, strict=True))

    def estimate(values: Sequence[Any]) -> dict[str, Any] | None:
        if any(v is None or len(v) == 0 for v in values):
            return None
        found: Estimate = stratified_mean(values, share)
        return dict(found.as_dict())

    return {
        "weights": dict(zip(results, share, strict=True)),
        "n": sum(r.n for r in sets),
        "pass_at_1": estimate([r.means for r in sets]),
        "pass_at": {str(at): estimate([r.pass_values(at) for r in sets]) for at in some_k(min(ks))},
        "maj_at_k": estimate([r.votes for r in sets]) if len(ks) == 1 else None,
        "greedy": estimate([None if r.greedy is None else r.greedy.means for r in sets]),
        "length": {name: mean([r.length[name] for r in sets]) for name in ("mean", "median", "p95")},
        "truncated": mean([r.truncated_rate for r in sets]),
        "unparsable": mean([r.rate("unparsable") for r in sets]),
        "timed_out": mean([r.rate("timed_out") for r in sets]),
        "sampled_tokens": sum(r.sampled_tokens for r in sets),
    }


def read_row(path: Path) -> tuple[ResultRow, dict[str, Any]]:
    """A row out of a JSON file: checked, and as it stands there.

    Raises:
        ValueError: the file is unreadable, half-written or not a row; it names the file and the field.
    """
    plain = read_json(path)
    try:
        return validate(plain), plain
    except ValueError as error:
        raise ValueError(f"{path} is not a result row: {error}") from error


def validate(plain: Any) -> ResultRow:
    """Check plain data against the schema.

    Raises:
        ValueError: it does not fit; names the first field that does not.
    """
    if not isinstance(plain, Mapping) or "schema_version" not in plain:
        raise ValueError("there is no schema_version")
    if plain["schema_version"] != SCHEMA_VERSION:
        raise ValueError(f"schema_version is {plain['schema_version']!r}; known is {SCHEMA_VERSION}")
    try:
        row = _converter.structure(plain, ResultRow)
    except Exception as error:  # cattrs raises groups of many kinds; all of them mean the same here
        problem, _, path = cattrs.transform_error(error)[0].partition(" @ ")
        problem = "expected a table of fields" if "has no attribute" in problem else problem
        raise ValueError(f"{path.replace('$.', '').replace('$', 'the row')}: {problem}") from error
    _check_figures(row)
    _check_config(row)
    for model, sets in row.results.items():
        _check_results(row, model, sets)
    for name, ledger in (("ledger", row.ledger), ("training", row.training)):
        if ledger is not None:
            _check_ledger(name, ledger)
    return row


SHARES = frozenset({"pass_at_1", "pass_at", "maj_at_k", "greedy", "truncated", "unparsable", "timed_out", "weights", "level"})
"""Fields whose figures are shares, within [0, 1]."""
COUNTS = frozenset({"n", "k", "sampled_tokens", "unrolled_tokens", "steps", "right", "graded", "lengths", "length", "failed", "verdicts"})
COUNTS |= {"ledger", "training"}
"""Fields whose figures are never negative: counts, lengths, times."""


def _check_figures(row: ResultRow) -> None:
    """Every figure is finite, shares are shares, counts and times are not negative, and an interval holds its mean."""
    for field in dataclasses.fields(row):
        if field.name not in ("config", "protocol", "table"):  # these hold no measurement; the config has its own check
            _check_value(field.name, getattr(row, field.name), share=False, count=field.name in COUNTS)
    for model, sets in row.results.items():
        for name, metrics in sets.items():
            where = f"results.{model}.{name}"
            if metrics.n < 1 or metrics.k < 1:
                raise ValueError(f"{where}: n is {metrics.n} and k is {metrics.k}; both must be at least 1")
            for problem, right, graded in zip(metrics.problems, metrics.right, metrics.graded, strict=False):
                if not 0 <= right <= graded <= metrics.k:
                    raise ValueError(f"{where}: of problem {problem} {right} are right of {graded} graded, at most {metrics.k}")


def _check_value(where: str, value: Any, *, share: bool, count: bool) -> None:
    if isinstance(value, Mapping):
        for name, each in value.items():
            _check_value(f"{where}.{name}", each, share=share or (name in SHARES and not count), count=count or name in COUNTS)
    elif isinstance(value, list | tuple):
        for i, each in enumerate(value):
            _check_value(f"{where}.{i}", each, share=share, count=count)
    elif isinstance(value, Interval):
        bounds = [bound for bound in (value.low, value.mean, value.high) if bound is not None]
        outside = share and value.mean is not None and not 0 <= value.mean <= 1  # a t interval may reach beyond
        if outside or not all(map(math.isfinite, bounds)) or bounds != sorted(bounds) or value.n < 0:
            raise ValueError(f"{where}: {value.mean} [{value.low}, {value.high}] is no share with its interval")
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            each = getattr(value, field.name)
            _check_value(f"{where}.{field.name}", each, share=field.name in SHARES, count=count or field.name in COUNTS)
    elif isinstance(value, float | int) and not isinstance(value, bool) and not _allowed(value, share, count):
        allowed = "a share from 0 to 1" if share else "a finite number, 0 or more" if count else "a finite number"
        raise ValueError(f"{where}: it is {value}; it must be {allowed}")


def _allowed(value: float, share: bool, count: bool) -> bool:
    return math.isfinite(value) and (not share or 0 <= value <= 1 + 1e-9) and (not count or value >= 0)


def _check_config(row: ResultRow) -> None:
    if config_hash(row.config) != row.arm.config_sha256:
        raise ValueError("arm.config_sha256: it is not the hash of config")
    for name in ("model", "seed"):
        if row.config.get(name) != getattr(row, name):
            raise ValueError(f"{name}: it is {getattr(row, name)!r}, but in config {row.config.get(name)!r}")


def _check_results(row: ResultRow, model: str, sets: Mapping[str, Metrics]) -> None:
    if model not in row.overall or set(sets) != set(row.overall[model].weights):
        raise ValueError(f"overall.{model}: it is not over the sets of results.{model}")
    if set(sets) != set(row.testsets):
        raise ValueError(f"results.{model}: its sets are not those of testsets")
    for name, metrics in sets.items():
        for each in ("problems", "right", "graded", "lengths"):
            values = getattr(metrics, each)
            if values is not None and len(values) != metrics.n:
                raise ValueError(f"results.{model}.{name}.{each}: {len(values)} values for {metrics.n} problems")
        if metrics.n != row.testsets[name].n:
            raise ValueError(f"results.{model}.{name}.n: {metrics.n} problems, but {row.testsets[name].n} in testsets")


def _check_ledger(name: str, ledger: LedgerRow) -> None:
    sums = {"wall_s": sum(ledger.seconds.values()), "device_hours": sum(ledger.device_seconds.values()) / 3600}
    for field, total in sums.items():
        if not math.isclose(getattr(ledger, field), total, rel_tol=TOLERANCE, abs_tol=1e-9):
            raise ValueError(f"{name}.{field}: it is {getattr(ledger, field)}, but the phases sum to {total}")


def _strict(kind: type, described: str, *also: type) -> None:
    def structure(value: Any, _: Any) -> Any:
        if isinstance(value, bool) is not (kind is bool) or not isinstance(value, (kind, *also)):
            raise ValueError(f"{value!r:.40} is not {described}")
        return value

    _converter.register_structure_hook(kind, structure)


_converter = cattrs.Converter(forbid_extra_keys=True)
for _kind, _described, *_also in ((int, "a whole number"), (float, "a number", int), (bool, "true or false"), (str, "a text")):
    _strict(_kind, _described, *_also)

"""What papers printed (`benchmarks/papers/*.toml`): figures with protocol and recipe, and claims that a small job can test."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ..losses.correction import CorrectionOptions, Importance, OldLogprobs
from .arms import as_arm, check_alike
from .comparison import compare
from .rows import Overall, ResultRow, read_row
from .stats import Estimate, satterthwaite, t_mean, t_quantile
from .testsets import read_shipped, shipped

ConfigOf = Callable[[str], Mapping[str, Any]]
"""The config of a recipe: a command line without `rlzoo`."""
APART = ("seed", "trackers", "data_dir", "evaluation.data_dir", *(f"backend.{n}" for n in ("threads", "memory", "sleep", "timeout_s")))
"""All that may differ between a row's config and its recipe's: the draw, what was written beside, where on the disk test sets lie (whose
checksums are the row's), and what the engine was lent."""
INDIFFERENT = ("greedy", "vote", "seed")
"""Of the protocol, what a claim's measures do not depend on but by chance."""
ABSENT = {
    "backend_url": "",
    "correction.cap": 2.0,
    "correction.high": 1.1,
    "correction.importance": "none",
    "correction.low": 0.9,
    "correction.old_logprobs": "sampler",
    "correction.sequence": "none",
    "correction.token_high": 100.0,
    "correction.token_low": 0.0001,
    "credit.unit_weights": "none",
    "evaluation.temperature": 1.0,
    "loss.entropy_coef": 0.0,
    "max_mismatch_kl": 0.0,
    "max_prompt_tokens": 0,
    "schedule.limit": "none",
    "schedule.budget": 0.0,
    "sampler.continuation": False,
    "served_model": "",
    "shaping.overlong_tokens": 0,
    "shaping.overlong_factor": 1.0,
    "update.autocast": False,
    "update.dtype": "float32",
    "update.gradient_checkpointing": "auto",
}
"""Options younger than some rows (or gone since), with the value that does what was done before they were there."""


@dataclass(frozen=True, slots=True)
class Published:
    """How the paper measured. `measure` is the field of a row that holds its metric; `vote` how it counted votes; `sizes` the
    problems per set where `overall` is weighted by them; `decimals` those of its figures; `matched` what its comparison holds equal
    between the arms, and what not."""

    metric: str
    measure: Literal["pass_at_1", "maj_at_k"]
    how: str
    k: int
    overall: str
    model: str
    hardware: str
    unknown: tuple[str, ...]
    decimals: int = 1
    vote: str | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    matched: str | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """A line of a table, percent. `values` by set where published. `derived` is how the overall follows where it was not printed,
    `recipe` what would make it (none: not in this library), `model` whose results of the row are meant, `cost` GPU-hours of the
    recipe as far as known, with the basis; `gpu_hours` were published."""

    table: str
    arm: str
    sampling: str
    overall: float
    values: dict[str, float] = field(default_factory=dict)
    derived: str | None = None
    gpu_hours: float | None = None
    recipe: str | None = None
    model: str = "trained"
    cost: str = "not known"


@dataclass(frozen=True, slots=True)
class Figure:
    """Other published figures, `values` by name in `unit`; approximate where read from a plot."""

    table: str
    what: str
    unit: str
    values: dict[str, float]
    approximate: bool = False
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim on a miniature. Of `measure`, b against a: a difference in Pass@1 where that is the measure, else a ratio of means, of
    sampled to unrolled tokens of b alone for `unrolled_share`. It holds where the interval lies on the side of `expected`: above or below
    0 (ratio: 1), or not below -`margin`. `unfair` says why no verdict is due whatever the figures say."""

    what: str
    published: str
    measure: Literal["pass_at_1", "length", "sampled_tokens", "unrolled_share", "device_hours"]
    a: str
    b: str
    expected: Literal["above", "below", "no loss"]
    margin: float = 0.0
    note: str | None = None
    unfair: str | None = None


@dataclass(frozen=True, slots=True)
class Paper:
    """One file. `arms` are the recipes of the miniature by the names that the claims use; `untested` are claims with direction that
    no arm here tests."""

    title: str
    arxiv: str
    code: str
    protocol: Published
    results: tuple[Result, ...]
    arms: dict[str, str]
    claims: tuple[Claim, ...]
    figures: tuple[Figure, ...] = ()
    untested: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """A claim beside what rows say: `estimate` (shares of points for differences, a ratio otherwise), None where an arm of `missing`
    was not run; `seeds` per arm."""

    claim: Claim
    estimate: Estimate | None
    verdict: str
    missing: tuple[str, ...] = ()
    seeds: tuple[int, int] = (0, 0)


def papers() -> list[str]:
    """Names of the papers that are shipped."""
    return shipped("papers")


def find_paper(name: str) -> Paper:
    """The paper called `name`.

    Raises:
        ValueError: no such paper, or its file is not of this form.
    """
    return read_shipped("papers", name, "paper", Paper)


def read_rows(results: Path) -> list[ResultRow]:
    """Every row below a folder, in the order of the files' names.

    Raises:
        ValueError: no such folder, or a file that is not a row (named with the field).
    """
    if not results.is_dir():
        raise ValueError(f"no folder {results}")
    return [read_row(path)[0] for path in sorted(results.rglob("*.json"))]


def matches(config: Mapping[str, Any], recipe: Mapping[str, Any]) -> bool:
    """Whether a row's config is the recipe's: every option the same but those of APART, and none on one side only but those of
    ABSENT. null and "none" are two spellings of one value."""
    return settings(config) == settings(recipe)


def settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's options by dotted name, but those of APART and those that do what was done before they were there (ABSENT)."""
    return {name: value for name, value in _decided(_flat(config)).items() if name not in ABSENT or value != ABSENT[name]}


def _decided(flat: dict[str, Any]) -> dict[str, Any]:
    """The same with what auto means beside the config's engine (`RunConfig.trainer_dtype` and `.corrections`)."""
    engine, old, importance = flat.get("backend.dtype"), "correction.old_logprobs", "correction.importance"
    if flat.get("update.dtype") == "auto":
        flat["update.dtype"] = engine
    given = flat.get(old, "auto"), flat.get(importance, "auto")
    if "auto" in (flat.get(old), flat.get(importance)) and given[0] in get_args(OldLogprobs) and given[1] in get_args(Importance):
        options = CorrectionOptions(*given)
        chosen = options.chosen(rough="bfloat16" in (engine, flat.get("update.dtype")))
        flat |= {old: chosen.old_logprobs, importance: chosen.importance}
    return flat


def _flat(config: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in json.loads(json.dumps(config)).items():  # tuples as the lists that a row has
        name = f"{path}{key}"
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{name}.")
        elif name not in APART:
            flat[name] = "none" if value is None else value
    return flat


def rows_of(rows: Sequence[ResultRow], recipe: Mapping[str, Any], kind: str) -> list[ResultRow]:
    """The rows of one recipe, one per seed in their order (of a seed that was run twice the first)."""
    found: dict[int, ResultRow] = {}
    for row in rows:
        if row.kind == kind and matches(row.config, recipe):
            found.setdefault(row.seed, row)
    return [found[seed] for seed in sorted(found)]


def measured(rows: Sequence[ResultRow], model: str, measure: str, name: str | None = None) -> Estimate | None:
    """A paper's metric on set `name`, or overall: of one row with its interval over problems, of several the mean with a t interval
    over seeds, for the problems are the paper's. None where no row has it."""
    plain = [getattr(row.overall[model] if name is None else row.results[model][name], measure) for row in rows if _has(row, model, name)]
    known = [p for p in plain if p is not None and p.mean is not None]
    if not known:
        return None
    if len(known) > 1:
        return t_mean([p.mean for p in known])
    p = known[0]
    return Estimate(p.mean, -math.inf if p.low is None else p.low, math.inf if p.high is None else p.high, p.n, p.level, p.method)


def _has(row: ResultRow, model: str, name: str | None) -> bool:
    return model in row.overall and (name is None or name in row.results[model])


def check_claim(claim: Claim, arms: Mapping[str, Sequence[ResultRow]], model: str = "trained") -> Found:
    """Test a claim on the rows of its arms.

    Raises:
        ValueError: rows that were not measured in the same way on the same problems.
    """
    missing = tuple(dict.fromkeys(name for name in (claim.a, claim.b) if not arms[name]))
    if missing:
        return Found(claim, None, "not run", missing)
    a, b = arms[claim.a], arms[claim.b]
    seeds = len(a), len(b)
    check_alike([*a, *b], [f"{name} (seed {row.seed})" for name, rows in ((claim.a, a), (claim.b, b)) for row in rows], allow=INDIFFERENT)
    if claim.measure == "pass_at_1":
        both = as_arm(claim.a, a, model), as_arm(claim.b, b, model)
        estimate: Estimate | None = compare(*both, weights=a[0].overall[model].weights).overall.estimate()
    else:
        estimate = _ratio(claim, a, b, model)
    if estimate is None:
        return Found(claim, None, "cannot be told: the rows do not hold it", seeds=seeds)
    if claim.unfair:
        return Found(claim, estimate, f"cannot be told: {claim.unfair}", seeds=seeds)
    if min(seeds) < 2:
        return Found(claim, estimate, "cannot be told: one seed", seeds=seeds)
    return Found(claim, estimate, _verdict(claim, estimate), seeds=seeds)


def _verdict(claim: Claim, estimate: Estimate) -> str:
    same = 0.0 if claim.measure == "pass_at_1" else 1.0
    low, high = estimate.low, estimate.high
    if claim.expected == "below":
        holds, fails = high < same, low > same
    elif claim.expected == "above":
        holds, fails = low > same, high < same
    else:
        holds, fails = low > same - claim.margin, high < same
    return "does not hold" if fails else "holds" if holds else "cannot be told"


def _ratio(claim: Claim, a: Sequence[ResultRow], b: Sequence[ResultRow], model: str) -> Estimate | None:
    """exp of the mean log of b - that of a, with a Welch t interval over seeds; of one arm's own share a t interval."""
    if claim.measure == "unrolled_share":
        pairs = [(row.sampled_tokens, row.unrolled_tokens) for row in b]
        logs = [math.log(sampled / unrolled) for sampled, unrolled in pairs if sampled and unrolled]
        if not logs:
            return None
        share = t_mean(logs)
        return Estimate(_exp(share.mean), _exp(share.low), _exp(share.high), len(logs), share.level, f"{share.method} of logs over seeds")
    sides = [[_quantity(row, claim.measure, model) for row in rows] for rows in (a, b)]
    if any(value is None for side in sides for value in side):
        return None
    x, y = (np.log([value for value in side if value is not None]) for side in sides)
    mean = float(y.mean() - x.mean())
    half = math.inf
    if min(len(x), len(y)) > 1:
        variances = [float(v.var(ddof=1)) / len(v) for v in (x, y)]
        half = 0.0
        if sum(variances):
            half = t_quantile(0.95, satterthwaite(variances, [len(x) - 1, len(y) - 1])) * math.sqrt(sum(variances))
    return Estimate(math.exp(mean), _exp(mean - half), _exp(mean + half), len(x) + len(y), 0.95, "Welch t of logs over seeds")


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


def _quantity(row: ResultRow, measure: str, model: str) -> float | None:
    if measure == "length":
        own: Overall = row.overall[model]
        return own.length.mean
    if measure == "sampled_tokens":
        return row.sampled_tokens
    return None if row.training is None else row.training.device_hours

"""The schema of a run and how it is put together: defaults < preset < TOML < flags. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_type_hints

import cattrs

from . import registry
from .algorithm import PARTS, Algorithm
from .losses.correction import CorrectionOptions

PLUGGABLE = ("sampler", "credit", "loss")  # parts that can be exchanged for another by name
NONE = "none"  # how a file says that an optional option has no value: TOML has no word for it


@dataclass(frozen=True)
class BackendOptions:
    """The engine that samples."""

    kind: str = "auto"
    """torch, vllm, or auto: vllm on a GPU where it is installed and fits, else torch."""
    capacity: int = 256
    """Paths decoded at once, at most: the torch engine halves it when memory runs out, or would for the longest paths asked for."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Precision of the engine, which samples with its own copy of the weights."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    threads: int = 0
    """CPU threads; 0 uses all cores."""
    max_context: int = 0
    """Longest prompt + response in tokens; 0 takes the model's own limit."""
    memory: float = 0.4
    """Share of the GPU's memory for vLLM."""
    sleep: bool = False
    """vLLM gives that memory back during updates."""
    timeout_s: float = 45.0
    """Longest wait for an answer of vLLM or a server, seconds; what is under way then ends, and can be resumed."""

    def __post_init__(self) -> None:
        _at_least("backend", self, capacity=1, threads=0, max_context=0)
        if not 0 < self.memory <= 1:
            raise ValueError(f"backend.memory is {self.memory}; allowed is 0 < memory <= 1")
        if not 0 < self.timeout_s < float("inf"):
            raise ValueError(f"backend.timeout_s is {self.timeout_s}; it must be a positive number of seconds")


@dataclass(frozen=True)
class UpdateOptions:
    """How an update is computed. But for the rounding of `dtype`, none of it changes what is computed."""

    token_budget: int = 8192
    """Tokens forwarded at once; halved with a message when memory runs out."""
    layout: Literal["packed", "unrolled"] = "packed"
    """packed computes shared prefixes once per row; unrolled gives every response its own row."""
    dtype: Literal["auto", "float32", "float64", "bfloat16"] = "auto"
    """Precision of the trainer. bfloat16: float32 weights, gradients and moments, and bfloat16 autocast in every forward pass;
    float32 and float64: everything in it. auto: the engine's own (backend.dtype), so that both compute alike."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """on keeps only the input of each layer and computes the rest again in the backward pass; auto does so where the GPU's memory would
    not hold the update otherwise."""

    def __post_init__(self) -> None:
        _at_least("update", self, token_budget=1)


@dataclass(frozen=True)
class EvaluationOptions:
    """What is measured, and when."""

    suite: str = "mini"
    """Suite for the final table; "none" skips it."""
    data_dir: str = ""
    """Folder with its test sets as local files; without it they are made or downloaded."""
    k: int = 16
    """Sampled responses per problem."""
    temperature: float = 1.0
    """Temperature of those and of the dev responses; the greedy response beside them does not go by it."""
    dev: str = "arithmetic:dev"
    """Problem set watched during training (and the only one to choose defaults on)."""
    dev_problems: int = 96
    """Problems of it that are used."""
    dev_k: int = 4
    """Responses per dev problem."""
    every: int = 10
    """Steps between dev evaluations; 0 never."""
    max_response_tokens: int = 256
    """Longest response when measuring, the same for every algorithm."""

    def __post_init__(self) -> None:
        _at_least("evaluation", self, k=1, dev_problems=1, dev_k=1, every=0, max_response_tokens=1)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"evaluation.temperature is {self.temperature}; it must be a finite number above 0")


@dataclass(frozen=True)
class CheckpointOptions:
    every: int = 20
    """Steps between checkpoints; 0 only the best and the last."""
    last: int = 2
    """How many of the newest to keep beside the best."""

    def __post_init__(self) -> None:
        _at_least("checkpoints", self, every=0, last=1)


def _at_least(section: str, options: Any, **least: int) -> None:
    for name, bound in least.items():
        if (value := getattr(options, name)) < bound:
            raise ValueError(f"{section}.{name} is {value}; it must be at least {bound}")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides what a run does."""

    algo: str
    algorithm: Algorithm
    model: str = "tiny"
    """The embedded model, a local folder, or a hub id."""
    problems: str = "arithmetic:train"
    """The embedded task, a JSONL or Parquet file, or a hub data set."""
    max_prompt_tokens: int = 0
    """Training and dev problems with longer prompts are left out, with a line that says how many; 0 leaves none out, and one whose
    prompt does not fit the model's context refuses the run."""
    template: str = "plain"
    """Prompt template: plain, qwen-boxed, chat, or package.module:function."""
    reward: str = "math"
    """math, or package.module:function taking [(problem, response text)] and returning verdicts or numbers."""
    seed: int = 0
    max_mismatch_kl: float = 0.0
    """The run stops before the update of a step in which KL(sampler || trainer) is larger; 0 allows any."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """tensorboard, wandb, trackio, mlflow; none for none."""
    backend: BackendOptions = field(default_factory=BackendOptions)
    update: UpdateOptions = field(default_factory=UpdateOptions)
    correction: CorrectionOptions = field(default_factory=CorrectionOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    checkpoints: CheckpointOptions = field(default_factory=CheckpointOptions)
    given: frozenset[str] = field(default=frozenset(), compare=False, repr=False)
    """Dotted names of the options that a preset, file, table or flag gave; the others have their defaults. Not an option itself."""

    def __post_init__(self) -> None:
        for name in ("seed", "max_prompt_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if not 0 <= self.max_mismatch_kl < math.inf:
            raise ValueError(f"max_mismatch_kl is {self.max_mismatch_kl}; it must be finite, at least 0 (0 allows any)")

    @property
    def trainer_dtype(self) -> str:
        """update.dtype, of auto what it means beside this engine: float32, float64 or bfloat16."""
        return self.backend.dtype if self.update.dtype == "auto" else self.update.dtype

    @property
    def master_dtype(self) -> str:
        """What the trainer keeps weights, gradients and moments in: float32 or float64. Never bfloat16, which rounds small updates away."""
        return "float64" if self.trainer_dtype == "float64" else "float32"

    @property
    def corrections(self) -> CorrectionOptions:
        """The correction with every auto decided: on where sampler or trainer computes in bfloat16."""
        return self.correction.chosen(rough="bfloat16" in (self.backend.dtype, self.trainer_dtype))

    def sections(self) -> dict[str, Any]:
        """Every option by section, the algorithm's parts beside the others: what flags and TOML see."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("algo", "algorithm", "given")}
        return own | {part: getattr(self.algorithm, part) for part in PARTS}

    def with_sections(self, sections: Mapping[str, Any]) -> RunConfig:
        """A copy with sections replaced.

        Raises:
            ValueError: parts that do not fit together.
        """
        parts = {name: value for name, value in sections.items() if name in PARTS}
        own = {name: value for name, value in sections.items() if name not in PARTS}
        return replace(self, algorithm=replace(self.algorithm, **parts), **own)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for config.toml; `build` reads it back."""
        plain: dict[str, Any] = {"algo": self.algo}
        for name, value in self.sections().items():
            plain[name] = ({"name": value.name} | to_plain(value)) if name in PLUGGABLE else to_plain(value)
        return plain


def build(layers: Sequence[tuple[str, Mapping[str, Any]]], choice: Mapping[str, str] | None = None) -> RunConfig:
    """A config out of layers (origin, tables), later ones winning; `choice` (algo, sampler, credit, loss) wins over all.

    Raises:
        ValueError: unknown section or key, a value of the wrong type or out of range, or parts that do not fit.
    """
    named = chosen_names(layers) | dict(choice or {})
    if "algo" not in named:
        raise ValueError(f"no algorithm chosen; --algo NAME with one of: {', '.join(registry.names('algorithm'))}")
    algorithm: Algorithm = registry.find("algorithm", named["algo"])
    exchanged = {}
    for part in PLUGGABLE:
        if part in named and named[part] != getattr(algorithm, part).name:
            exchanged[part] = registry.find(part, named[part])()
    sections = RunConfig(named["algo"], algorithm).sections() | exchanged
    for origin, tables in layers:
        for key, value in tables.items():
            if key != "algo":
                sections[key] = _merge(sections, key, value, origin, owner=RunConfig)
    given = frozenset(name for _, tables in layers for name in dotted(tables))
    return replace(RunConfig(named["algo"], algorithm).with_sections(sections), given=given)


def dotted(tables: Mapping[str, Any]) -> list[str]:
    """Names of the options in `tables`: "seed", "optim.lr"."""
    return [f"{name}.{key}" if key else name for name, value in tables.items() for key in (value if isinstance(value, Mapping) else ("",))]


def flagged(flags: Sequence[str]) -> frozenset[str]:
    """Names of the options that a command line's `flags` set, as in `dotted`."""
    return frozenset(flag[2:].partition("=")[0].replace("-", "_") for flag in flags if flag.startswith("--"))


def read_toml(path: str | Path) -> dict[str, Any]:
    """A TOML file as tables.

    Raises:
        ValueError: missing or broken file.
    """
    try:
        return tomllib.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"cannot read config {path}: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error


def presets() -> list[str]:
    """Names usable with --preset."""
    folder = files("rlzoo.benchmarks").joinpath("recipes")
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def read_preset(name: str) -> dict[str, Any]:
    """A shipped recipe.

    Raises:
        ValueError: no such recipe.
    """
    if name not in presets():
        raise ValueError(f"unknown preset {name!r}; known: {', '.join(presets()) or 'none'}")
    return tomllib.loads(files("rlzoo.benchmarks").joinpath("recipes", f"{name}.toml").read_text())


def chosen_names(layers: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
    """Names of the algorithm and its exchangeable parts that the layers choose, later ones winning."""
    chosen: dict[str, str] = {}
    for _, tables in layers:
        if "algo" in tables:
            chosen["algo"] = tables["algo"]
        for part in PLUGGABLE:
            if isinstance(tables.get(part), Mapping) and "name" in tables[part]:
                chosen[part] = tables[part]["name"]
    return chosen


def to_plain(value: Any) -> Any:
    """A dataclass of options as plain data, NONE for what has no value; `overlay` reads it back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
    return NONE if value is None else value


def _merge(values: Mapping[str, Any], key: str, value: Any, origin: str, owner: type) -> Any:
    """`values[key]` with `value` (plain data) laid over it."""
    if key not in values:
        raise ValueError(f"{origin}: unknown key {key!r}; allowed: {', '.join(values)}")
    old = values[key]
    if not dataclasses.is_dataclass(old):
        return _convert(value, get_type_hints(owner)[key], f"{origin}: {key}")
    if isinstance(value, Mapping) and key in PLUGGABLE:
        value = {k: v for k, v in value.items() if k != "name"}
    return overlay(old, value, origin, key)


def overlay(old: Any, value: Any, origin: str, path: str = "") -> Any:
    """The dataclass instance `old` with the options of the table `value`, which stands at `path` of `origin`.

    Raises:
        ValueError: unknown key, or a value of the wrong type or out of range.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{origin}: {path} = {value!r} must be a table of options")
    hints = get_type_hints(type(old))
    known = [f.name for f in dataclasses.fields(old) if f.init]
    changes = {}
    for option, new in value.items():
        where = f"{path}.{option}" if path else option
        if option not in known:
            raise ValueError(f"{origin}: unknown key {where}; allowed: {', '.join(known)}")
        nested = dataclasses.is_dataclass(getattr(old, option))
        changes[option] = (
            overlay(getattr(old, option), new, origin, where) if nested else _convert(new, hints[option], f"{origin}: {where}")
        )
    try:
        return replace(old, **changes)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def _convert(value: Any, kind: Any, where: str) -> Any:
    """`value` as `kind`, strictly: no text for numbers, no fractions for integers."""
    if value == NONE and NoneType in get_args(kind):
        return None
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    loose = (kind is int and not (numeric and float(value).is_integer())) or (kind is float and not numeric)
    loose = loose or (kind is bool and not isinstance(value, bool)) or (kind is str and not isinstance(value, str))
    try:
        if not loose:
            return cattrs.structure(value, kind)
    except Exception as error:  # cattrs raises groups of many kinds; all of them mean the same here
        raise ValueError(f"{where} = {value!r} is not {_describe(kind)}") from error
    raise ValueError(f"{where} = {value!r} is not {_describe(kind)}")


def _describe(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return names.get(kind) or "allowed; expected " + str(kind).replace("typing.", "").replace("NoneType", "none")

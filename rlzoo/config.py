"""The schema of a run and how it is put together: defaults < preset < TOML < flags. Imports no torch."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from . import registry
from .algorithm import PARTS, Algorithm
from .backends.protocol import Temperature
from .losses.correction import CorrectionOptions
from .options import NONE, Count, CountOrOff, NotNegative, Options, Seed, Within, allow, converted, hints, short
from .sampling.base import MOST_LEAVES
from .store.files import read_text
from .store.toml import parse_toml

PLUGGABLE = ("sampler", "credit", "loss")  # parts that can be exchanged for another by name


@dataclass(frozen=True)
class BackendOptions(Options):
    """The engine that samples."""

    section: ClassVar[str] = "backend"

    kind: str = "auto"
    """torch, vllm, or auto: vllm on a GPU where it is installed and fits, else torch."""
    capacity: Count = 256
    """Paths decoded at once, at most: the torch engine halves it when memory runs out, or would for the longest paths asked for."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Precision of the engine, which samples with its own copy of the weights."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    threads: CountOrOff = 0
    """CPU threads; 0 uses all cores."""
    max_context: CountOrOff = 0
    """Longest prompt + response in tokens; 0 takes the model's own limit."""
    memory: Annotated[float, Within(0, 1, above=True)] = 0.4
    """Share of the GPU's memory for vLLM."""
    sleep: bool = False
    """vLLM gives that memory back during updates."""
    timeout_s: Annotated[float, Within(0, 1e6, above=True)] = 45.0
    """Longest wait for an answer of vLLM or a server, seconds; what is under way then ends, and can be resumed."""


@dataclass(frozen=True)
class UpdateOptions(Options):
    """How an update is computed. But for the rounding of `dtype`, none of it changes what is computed."""

    section: ClassVar[str] = "update"

    token_budget: Count = 8192
    """Tokens forwarded at once; halved with a message when memory runs out."""
    layout: Literal["packed", "unrolled"] = "packed"
    """packed computes shared prefixes once per row; unrolled gives every response its own row."""
    dtype: Literal["auto", "float32", "float64", "bfloat16"] = "auto"
    """Precision of the trainer. bfloat16: float32 weights, gradients and moments, and bfloat16 autocast in every forward pass;
    float32 and float64: everything in it. auto: the engine's own (backend.dtype), so that both compute alike."""
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"
    """on keeps only the input of each layer and computes the rest again in the backward pass; auto does so where the GPU's memory would
    not hold the update otherwise."""


@dataclass(frozen=True)
class EvaluationOptions(Options):
    """What is measured, and when."""

    section: ClassVar[str] = "evaluation"

    suite: str = "mini"
    """Suite for the final table; "none" skips it."""
    data_dir: str = ""
    """Folder with its test sets as local files; without it they are made or downloaded."""
    k: Annotated[int, Within(1, MOST_LEAVES)] = 16
    """Sampled responses per problem."""
    temperature: Temperature = 1.0
    """Temperature of those and of the dev responses; the greedy response beside them does not go by it."""
    dev: str = "arithmetic:dev"
    """Problem set watched during training (and the only one to choose defaults on)."""
    dev_problems: Count = 96
    """Problems of it that are used."""
    dev_k: Annotated[int, Within(1, MOST_LEAVES)] = 4
    """Responses per dev problem."""
    every: CountOrOff = 10
    """Steps between dev evaluations; 0 never."""
    max_response_tokens: Count = 256
    """Longest response when measuring, the same for every algorithm."""


@dataclass(frozen=True)
class CheckpointOptions(Options):
    """What is kept of a model while it trains."""

    section: ClassVar[str] = "checkpoints"

    every: CountOrOff = 20
    """Steps between checkpoints; 0 only the best and the last."""
    last: Count = 2
    """How many of the newest to keep beside the best."""


@dataclass(frozen=True)
class RunConfig(Options):
    """Everything that decides what a run does."""

    algo: str
    algorithm: Algorithm
    model: str = "tiny"
    """The embedded model, a local folder, or a hub id."""
    problems: str = "arithmetic:train"
    """The embedded task, a JSONL or Parquet file, or a hub data set."""
    max_prompt_tokens: CountOrOff = 0
    """Training and dev problems with longer prompts are left out, with a line that says how many; 0 leaves none out, and one whose
    prompt does not fit the model's context refuses the run."""
    template: str = "plain"
    """Prompt template: plain, qwen-boxed, chat, or package.module:function."""
    reward: str = "math"
    """math, or package.module:function taking [(problem, response text)] and returning verdicts or numbers."""
    seed: Seed = 0
    max_mismatch_kl: NotNegative = 0.0
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
        ValueError: the file is missing, or not TOML.
    """
    return parse_toml(read_text(Path(path)), str(path))


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
    """Names of the algorithm and its exchangeable parts that the layers choose, later ones winning.

    Raises:
        ValueError: a value is not a name.
    """
    chosen: dict[str, str] = {}
    for origin, tables in layers:
        if "algo" in tables:
            chosen["algo"] = _name(tables["algo"], f"{origin}: algo")
        for part in PLUGGABLE:
            if isinstance(tables.get(part), Mapping) and "name" in tables[part]:
                chosen[part] = _name(tables[part]["name"], f"{origin}: {part}.name")
    return chosen


def _name(value: Any, where: str) -> str:
    allow(value, str, where)
    return str(value)


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
        return _converted(value, hints(owner)[key], f"{origin}: {key}")
    if isinstance(value, Mapping) and key in PLUGGABLE:
        value = {k: v for k, v in value.items() if k != "name"}
    return overlay(old, value, origin, key)


def overlay(old: Any, value: Any, origin: str, path: str = "") -> Any:
    """The dataclass instance `old` with the options of the table `value`, which stands at `path` of `origin`.

    Raises:
        ValueError: unknown key, or a value of the wrong type or out of range.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f"{origin}: {path} is {short(value)}; allowed: a table of options")
    known = hints(type(old))
    changes = {}
    for option, new in value.items():
        where = f"{path}.{option}" if path else option
        if option not in known:
            raise ValueError(f"{origin}: unknown key {where}; allowed: {', '.join(known)}")
        inner = getattr(old, option)
        nested = dataclasses.is_dataclass(inner)
        changes[option] = overlay(inner, new, origin, where) if nested else _converted(new, known[option], f"{origin}: {where}")
    try:
        return replace(old, **changes)
    except ValueError as error:
        raise ValueError(f"{origin}: {error}") from error


def _converted(value: Any, hint: Any, where: str) -> Any:
    value = converted(value, hint)
    allow(value, hint, where)
    return value

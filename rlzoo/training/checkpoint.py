"""Checkpoints: model as `save_pretrained`, optimizer as safetensors, the rest as JSON. Nothing is ever unpickled.

A checkpoint is written beside its place and renamed, so that a death never leaves half of one; and it knows the SHA-256 of its
files, so that one that was damaged later is found out before anything of it is used.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..store.files import aside

STATE = "state.json"


class BrokenError(ValueError):
    """A checkpoint that is not whole."""


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """A checkpoint in memory, checked. `weights`: the model's state dict; `state`: what was given to `save`, and the `step`."""

    step: int
    state: dict[str, Any]
    weights: Mapping[str, torch.Tensor]
    optimizer: dict[str, Any]

    def apply(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        """Load weights and optimizer in place."""
        optimizer.load_state_dict(self.optimizer)
        model.load_state_dict(self.weights)


def save(folder: Path, step: int, model: Any, tokenizer: Any, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Path:
    """Write `folder`/step-N and return it.

    Raises:
        OSError: the disk refuses; nothing half-written is left behind.
    """
    final = folder / f"step-{step}"
    with aside(final) as partial:
        _write_model(partial, model, tokenizer)
        tensors, plain = _split(optimizer.state_dict())
        with _plain_errors():
            save_file(tensors, partial / "optimizer.safetensors")
        sums = {str(p.relative_to(partial)): _sha256(p) for p in sorted(partial.rglob("*")) if p.is_file()}
        (partial / STATE).write_text(json.dumps({**state, "step": step, "optimizer": plain, "sha256": sums}, indent=1))
    return final


def save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Model and tokenizer as any transformers program reads them; the folder is there whole or not at all."""
    with aside(folder) as partial:
        _write_model(partial, model, tokenizer)


def _write_model(folder: Path, model: Any, tokenizer: Any) -> None:
    folder.mkdir()
    with _plain_errors():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """A disk that refuses is an OSError, also where Rust code finds it out."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write a checkpoint: {error}") from error


def newest(folder: Path, model: Any, message: Callable[[str], None]) -> Saved | None:
    """The newest whole checkpoint in `folder`, None if there is none. Broken ones are passed over, each with a message.

    Raises:
        ValueError: it is of another model than `model`.
    """
    for step in reversed(steps(folder)):
        try:
            return read(folder / f"step-{step}", model)
        except BrokenError as error:
            message(f"{error}; it is passed over")
    return None


def read(checkpoint: Path, model: Any) -> Saved:
    """Everything that is in a checkpoint of `model`, which stays as it is.

    Raises:
        BrokenError: a file is missing or is not what was written.
        ValueError: the checkpoint is whole, but of another model.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / STATE).read_text())
        for name, expected in state.pop("sha256").items():
            if _sha256(checkpoint / name) != expected:
                raise BrokenError(f"checkpoint {checkpoint} is broken: {name} is not what was written")
        tensors = load_file(checkpoint / "optimizer.safetensors")
        step, optimizer = int(state.pop("step")), _join(tensors, state.pop("optimizer"))
    except BrokenError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise BrokenError(f"checkpoint {checkpoint} is broken: {error}") from error
    weights = type(model).from_pretrained(checkpoint, dtype=model.dtype, trust_remote_code=False, use_safetensors=True).state_dict()
    own = model.state_dict()
    other = [name for name in {**own, **weights} if name not in own or name not in weights or own[name].shape != weights[name].shape]
    if other:
        raise ValueError(f"checkpoint {checkpoint} is of another model: {other[0]} differs")
    return Saved(step, state, weights, optimizer)


def steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in `folder`, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(n) for p in folder.glob("step-*") if p.is_dir() and (n := p.name.removeprefix("step-")).isdecimal())


def prune(folder: Path, *, last: int, keep: Collection[int], upto: int) -> None:
    """Remove all checkpoints up to step `upto` but the newest `last` and those of `keep`. Later ones are broken ones that were
    passed over; the run replaces them when it gets there again."""
    for step in [s for s in steps(folder) if s <= upto][: -last or None]:
        if step not in keep:
            shutil.rmtree(folder / f"step-{step}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split(state: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors, plain = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu().contiguous()
            else:
                plain[f"{index}.{name}"] = value
    return tensors, {"values": plain, "param_groups": state["param_groups"]}


def _join(tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **plain["values"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": plain["param_groups"]}

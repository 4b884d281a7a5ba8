"""Checkpoints: model as `save_pretrained`, optimizer and RNG as safetensors, the rest as JSON. Nothing is ever unpickled.

A checkpoint is written beside its place and renamed, so that a folder named step-N is always whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

PARTIAL = ".partial-"


def save(folder: Path, step: int, model: Any, tokenizer: Any, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> Path:
    """Write `folder`/step-N and return it.

    Raises:
        OSError: the disk refuses; nothing named step-N is left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partial, final = folder / f"{PARTIAL}step-{step}", folder / f"step-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    save_model(partial, model, tokenizer)
    tensors, plain = _split(optimizer.state_dict())
    tensors["rng"] = torch.get_rng_state()
    save_file(tensors, partial / "optimizer.safetensors")
    (partial / "state.json").write_text(json.dumps({**state, "step": step, "optimizer": plain}, indent=1))
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    return final


def save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    """Model and tokenizer as any transformers program reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def restore(checkpoint: Path, model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load weights, optimizer and RNG in place; returns the state saved beside them.

    Raises:
        ValueError: the checkpoint is incomplete or of another model.
    """
    try:
        state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
        tensors = load_file(checkpoint / "optimizer.safetensors")
        saved = type(model).from_pretrained(checkpoint, dtype=model.dtype)
        model.load_state_dict(saved.state_dict())
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"checkpoint {checkpoint} cannot be read: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"checkpoint {checkpoint} is of another model: {str(error).splitlines()[0]}") from error
    torch.set_rng_state(tensors.pop("rng"))
    optimizer.load_state_dict(_join(tensors, state.pop("optimizer")))
    return state


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint."""
    found = steps(folder)
    return folder / f"step-{found[-1]}" if found else None


def steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in `folder`, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*") if p.is_dir())


def prune(folder: Path, *, last: int, keep: Collection[int]) -> None:
    """Remove all but the newest `last` checkpoints and those of `keep`, and what an interrupted write left behind."""
    for step in steps(folder)[: -last or None]:
        if step not in keep:
            shutil.rmtree(folder / f"step-{step}")
    for partial in folder.glob(f"{PARTIAL}*"):
        shutil.rmtree(partial)


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

"""Rows of speed benchmarks: printed, appended to a file, and named after the hardware they were measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rlzoo.store.environment import environment


def provenance(device: str = "cpu") -> dict[str, Any]:
    """What every row says of its run: hardware, threads, versions of torch and transformers, commit and dirty flag."""
    found = environment()
    return {
        "hardware": found["cpu"] if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device),
        "cores": found["cores"],
        "threads": torch.get_num_threads(),
        "torch": found["versions"]["torch"],
        "transformers": found["versions"]["transformers"],
        "commit": found["commit"],
        "dirty": found["dirty"],
    }


def record(row: dict[str, Any], out: Path | None) -> None:
    """Print one row as JSON, and append it to `out`.

    Raises:
        OSError: the file cannot be written.
    """
    line = json.dumps(row)
    print(line, flush=True)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

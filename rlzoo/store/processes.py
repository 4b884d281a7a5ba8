"""Starting a program of this package in a process of its own, from the same files and blind to the caller's working folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])


def own_program(module: str) -> list[str]:
    """The command that runs `module` of this package. -P: what lies in the working folder (a `json.py`, a folder called `rlzoo`) is not
    imported in place of what is meant."""
    return [sys.executable, "-P", "-m", module]


def own_environment() -> dict[str, str]:
    """This process's environment for `own_program`: the package that runs here comes first, then PYTHONPATH as the caller set it."""
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return os.environ | {"PYTHONPATH": os.pathsep.join([PACKAGE_ROOT, *inherited])}

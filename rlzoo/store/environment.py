"""What a run ran on: versions, hardware and commit, for the result row."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("rlzoo", "torch", "transformers", "accelerate", "datasets", "math-verify", "numpy", "scipy", "pyarrow", "vllm")


def environment() -> dict[str, Any]:
    """Plain data: python, versions by package (None: not installed), cpu, cores, gpus, commit and dirty (None: no checkout)."""
    commit, dirty = checkout()
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": {name: _version(name) for name in PACKAGES},
        "cpu": cpu_name(),
        "cores": cores(),
        "gpus": _gpus(),
        "commit": commit,
        "dirty": dirty,
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's marketing name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def checkout(folder: Path | None = None) -> tuple[str | None, bool | None]:
    """Commit and dirty flag of the checkout that the package is imported from (or of `folder`).

    (None, None) for an installed wheel, even where its environment happens to lie inside some other repository.
    """
    root = (folder or Path(__file__).parents[2]).resolve()
    top = _git(root, "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != root:
        return None, None
    status = _git(root, "status", "--porcelain")
    return _git(root, "rev-parse", "--verify", "HEAD"), None if status is None else bool(status)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a hanging file system: then there is no commit to tell
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []

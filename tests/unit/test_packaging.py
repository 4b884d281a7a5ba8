"""The package as others get it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_installation_is_repeated_when_algorithms_or_metadata_change():
    """A new entry point is invisible until reinstallation, so the Makefile's stamp depends on what declares them."""
    rule = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("$(STAMP):"))
    assert "pyproject.toml" in rule and "algorithms/*.py" in rule and "constraints.txt" in rule


def test_stale_metadata_is_ignored_and_cleaned():
    assert "*.egg-info/" in (ROOT / ".gitignore").read_text().splitlines()
    assert "*.egg-info" in (ROOT / "Makefile").read_text().split("clean:")[-1]


def test_a_wheel_works_from_another_folder(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("rlzoo", "algorithms", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(source)],
        check=True,
        cwd=tmp_path,
        timeout=120,
    )
    (wheel,) = tmp_path.glob("rlzoo-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(tmp_path / "site"), str(wheel)], check=True, cwd=tmp_path, timeout=120)
    code = """
import rlzoo, rlzoo.registry as registry
from importlib.resources import files
assert rlzoo.__file__.startswith({site!r}), rlzoo.__file__
for kind in registry.KINDS:
    assert registry.names(kind) and all(registry.find(kind, name) for name in registry.names(kind))
assert files("rlzoo").joinpath("assets/tiny/model.safetensors").is_file()
from rlzoo.report.html import ASSETS
for name in ASSETS:
    assert files("rlzoo.report").joinpath("assets", name).is_file(), name
from rlzoo.evaluation.suites import load_suite
assert len(load_suite("mini")) == 4
""".format(site=str(tmp_path / "site"))
    away = tmp_path / "away"
    away.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=away, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    )
    assert done.returncode == 0, done.stderr

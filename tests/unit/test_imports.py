"""The dependency rules of the house, read from the source."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlzoo import registry

ROOT = Path(__file__).parents[2]
PURE = {"tree.py", "builder.py"}
ALLOWED = {  # package -> what of rlzoo it may import (first component below rlzoo)
    "credit": {"tree", "credit", "options"},
    "sampling": {"tree", "builder", "sampling", "backends", "rewards", "options"},
    "losses": {"tree", "credit", "losses", "options"},
}
ALGORITHM_MAY = ("rlzoo.algorithm", "rlzoo.sampling", "rlzoo.credit", "rlzoo.losses", "rlzoo.rewards.shaping")
BLIND = ("backends", "store", "evaluation", "report", "training", "losses", "credit", "sampling", "data", "rewards")
TORCH_FREE = ("credit", "sampling", "store", "data/problems.py", "data/arithmetic.py", "config.py", "cli.py", "algorithm.py", "options.py")


def sources(*parts: str) -> list[Path]:
    return sorted(p for part in parts for p in ([ROOT / part] if part.endswith(".py") else (ROOT / part).rglob("*.py")))


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Absolute names of everything `path` imports (only at run time, and only at module level on request)."""
    package = ["rlzoo", *path.relative_to(ROOT / "rlzoo").parts[:-1]] if path.is_relative_to(ROOT / "rlzoo") else ["rlzoo", "algorithms"]
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else [n for n in ast.walk(tree) if not _type_checking(n)]
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} if node.module else {f"{module}.{alias.name}" for alias in node.names}
    return found


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


@pytest.mark.parametrize("package", ALLOWED)
def test_parts_import_only_what_they_may(package):
    for path in sources(f"rlzoo/{package}"):
        for name in imports(path, top_level=True):
            if name.startswith("rlzoo"):
                assert name.split(".")[1] in ALLOWED[package], f"{path.relative_to(ROOT)} imports {name}"


def test_algorithms_import_only_the_parts():
    for path in sources("algorithms"):
        for name in imports(path):
            if name.startswith("rlzoo.") and not name.startswith("rlzoo.algorithms"):
                assert name.startswith(ALGORITHM_MAY), f"{path.name} imports {name}"
            assert name.split(".")[0] in {"rlzoo", "__future__", "dataclasses", "typing", "collections", "math", "numpy"}, path.name


def test_machinery_names_no_algorithm():
    known = set(registry.names("algorithm"))
    for path in sources("rlzoo"):
        tree = ast.parse(path.read_text())
        docstrings = {
            id(n.body[0].value)
            for n in ast.walk(tree)
            if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef) and n.body and isinstance(n.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                name = node.value
            assert name is None or name.lower() not in known, f"{path.relative_to(ROOT)}:{node.lineno} names {name}"


def test_machinery_imports_no_algorithm():
    for path in sources("rlzoo"):
        assert not any(name.startswith("rlzoo.algorithms") for name in imports(path)), path


def test_vllm_is_imported_in_one_place():
    for path in sources("rlzoo", "algorithms"):
        if path != ROOT / "rlzoo/backends/vllm_engine.py":
            assert not any(name.split(".")[0] == "vllm" for name in imports(path)), path
        assert not any(name.startswith("rlzoo.backends.vllm_engine") for name in imports(path, top_level=True)), path


@pytest.mark.parametrize(
    "code", ["import rlzoo", "from rlzoo.cli import main; main(['--help'])", "from rlzoo.cli import main; main(['algos'])"]
)
def test_no_torch_until_it_is_needed(code):
    check = "import sys; heavy = {'torch', 'transformers', 'vllm', 'datasets'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{check}"], capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr


def test_files_are_small():
    for path in sources("rlzoo", "algorithms"):
        assert len(path.read_text().splitlines()) <= 420, path

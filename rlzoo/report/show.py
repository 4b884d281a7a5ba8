"""`rlzoo show`: a stored tree of a run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from ..escape import visible
from ..store.runs import RunFolder
from ..store.trees import read_trees
from .treeview import header, list_trees, render_tree

PIPED_WIDTH = 160  # columns where there is no terminal to ask


def show_tree(run: Path, *, tree: int | None = None, step: int | None = None, console: Console | None = None) -> None:
    """Print tree number `tree` of a step (by default the last one stored), or without a number the list of that step's trees.

    Raises:
        ValueError: no run there, no trees stored, or no such step or tree.
    """
    folder = RunFolder.open(run)
    steps = folder.tree_steps()
    if not steps:
        raise ValueError(f"{run} holds no stored trees")
    if step is not None and step not in steps:
        raise ValueError(f"no trees of step {step} in {run}; stored are {steps[0]} to {steps[-1]}")
    chosen = steps[-1] if step is None else step
    stored = read_trees(folder.trees_path(chosen))
    console = console or Console(width=None if sys.stdout.isatty() else PIPED_WIDTH)
    if tree is None:
        console.print(visible(f"step {chosen} of {run}; show one with --tree K"), markup=False, highlight=False)
        console.print(list_trees(stored))
        return
    if not 0 <= tree < len(stored):
        raise ValueError(f"no tree {tree} in step {chosen} of {run}; there are 0 to {len(stored) - 1}")
    console.print(header(stored[tree]))
    console.print(render_tree(stored[tree], _decoder(folder)))


def _decoder(folder: RunFolder) -> Callable[[Sequence[int]], str]:
    from ..training.models import load_tokenizer

    tokenizer = load_tokenizer(str(folder.final) if folder.final.is_dir() else str(folder.config()["model"]))
    return lambda ids: str(tokenizer.decode(ids))

"""`rlzoo algos`: what is registered, and one algorithm's card with its defaults."""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.table import Table

from .. import registry
from ..algorithm import PARTS, Algorithm, options


def print_algorithms(console: Console | None = None) -> None:
    """One line per registered algorithm: name, parts, title."""
    table = Table(box=None, pad_edge=False)
    for column in ("name", "sampler", "credit", "loss", "what"):
        table.add_column(column, overflow="fold")
    for name in registry.names("algorithm"):
        algorithm: Algorithm = registry.find("algorithm", name)
        table.add_row(name, algorithm.sampler.name, algorithm.credit.name, algorithm.loss.name, algorithm.title)
    (console or Console()).print(table)


def print_card(name: str, console: Console | None = None) -> None:
    """The card and every option with its default.

    Raises:
        ValueError: unknown algorithm.
    """
    algorithm: Algorithm = registry.find("algorithm", name)
    console = console or Console()
    console.print(algorithm.card.strip(), markup=False, highlight=False)
    table = Table(box=None, pad_edge=False, title="Defaults", title_justify="left")
    table.add_column("flag")
    table.add_column("value")
    for part in PARTS:
        value = getattr(algorithm, part)
        for option in options(value):
            table.add_row(f"--{part}.{option.replace('_', '-')}", _plain(getattr(value, option)))
    console.print(table)


def _plain(value: object) -> str:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ", ".join(f"{f.name} = {getattr(value, f.name)}" for f in dataclasses.fields(value))
    return str(value)

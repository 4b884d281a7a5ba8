"""One table in every form: rich on a terminal, columns in a log, Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..escape import markdown, visible


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns of whatever width they need, a rule below the head."""
    head, rows = [visible(cell) for cell in head], [[visible(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def pipes(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(markdown, row))} |" for row in lines)


@dataclass(frozen=True, slots=True)
class Grid:
    """Cells under a head, the first `names` columns being words; `notes` are lines below, rows named in `strong` stand out."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    names: int = 1
    strong: Sequence[str] = ()

    def rich(self) -> RenderableType:
        """For a terminal."""
        shown = Table(title=Text(visible(self.title)), box=SIMPLE_HEAD, title_justify="left")
        for i, name in enumerate(self.head):
            shown.add_column(Text(visible(name)), justify="left" if i < self.names else "right")
        for row in self.rows:
            shown.add_row(*[Text(visible(cell)) for cell in row], style="bold" if row[0] in self.strong else "")
        return Group(shown, *[Text(visible(line), style="dim") for line in self.notes])

    def text(self) -> str:
        """In columns of whatever width they need, for logs and pipes."""
        return "\n".join([columns(self.head, self.rows), *map(visible, self.notes)]) + "\n"

    def markdown(self, level: int = 2) -> str:
        """For `results/`, under a heading of that level."""
        notes = ["", *(f"- {markdown(line)}" for line in self.notes)] if self.notes else []
        return "\n".join([f"{'#' * level} {markdown(self.title)}\n", pipes(self.head, self.rows), *notes]) + "\n"

    def print(self, console: Console | None = None) -> None:
        """With rich on a terminal, as text elsewhere."""
        console = console or Console()
        if console.is_terminal:
            console.print(self.rich())
        else:
            print(self.text(), file=console.file, end="", flush=True)

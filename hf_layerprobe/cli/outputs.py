"""What a command prints on stdout: rich tables for people, or JSON for programs, never both."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .. import PruningPlan


def show_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], note: str | None = None) -> None:
    """Prints a table: the first column is text, the others are numbers."""
    table = Table(title=title, caption=note, title_justify="left", caption_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    terminal = Console()
    # Rich takes 80 columns where there is no terminal to ask; files and logs have room for unbroken rows.
    (terminal if terminal.is_terminal else Console(width=max(terminal.width, 120))).print(table)


def show_json(content: Any) -> None:
    """Prints strict JSON: what is not a finite number becomes null."""
    typer.echo(json.dumps(strict(content), indent=2, allow_nan=False))


def strict(content: Any) -> Any:
    """The same content with null for NaN and infinities, which JSON does not have."""
    if isinstance(content, dict):
        return {key: strict(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [strict(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def ranges(layers: Iterable[int]) -> str:
    """Ascending layer numbers in short: 0, 1, 2, 5 → `0-2, 5`."""
    runs = groupby(enumerate(layers), key=lambda pair: pair[1] - pair[0])
    parts = [[layer for _, layer in run] for _, run in runs]
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def removed(plan: PruningPlan) -> str:
    """The removed layers of every stack, in words."""
    return " and ".join(f"{ranges(part.remove)} of {part.stack}" for part in plan.parts)


def stacks(plan: PruningPlan) -> list[dict[str, Any]]:
    """The removed and kept layers of every stack, for JSON."""
    return [{"stack": part.stack, "remove": part.remove, "keep": part.keep} for part in plan.parts]


def number(value: float) -> str:
    """A number of any size in few characters."""
    if value and not 0.01 <= abs(value) < 1e5:
        return f"{value:.1e}"
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"

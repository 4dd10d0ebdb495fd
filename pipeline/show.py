"""How tables reach people: as wide as the terminal, and wide enough for every table where there is none."""

from __future__ import annotations

import statistics

from rich.console import Console
from rich.table import Table

PLAIN_WIDTH = 160
"""Columns where the output is a file or a pipe, which nothing has to fit."""


def console() -> Console:
    """The console that tables and summaries are printed on."""
    found = Console(highlight=False, soft_wrap=True)
    return found if found.is_terminal else Console(highlight=False, soft_wrap=True, width=PLAIN_WIDTH)


def spread(values: list[float]) -> str:
    """`median (least-largest)`."""
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def table(*heads: str) -> Table:
    """A table without lines."""
    return Table(*heads, box=None, pad_edge=False)

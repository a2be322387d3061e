"""Text on a terminal. What a model, a record or a path says is only text: it styles and steers nothing."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import click


def printable(text: str) -> str:
    """A text with what a terminal would obey spelled as Python does."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def say(text: str, *, nl: bool = True, err: bool = False, **style: Any) -> None:
    """Print a line, or with `nl` False the beginning of one; `style` is as click has it."""
    click.secho(printable(text), nl=nl, err=err, **style)


def show(table: Any, rows: Iterable[Iterable[str]], width: int = 160) -> None:
    """Print a table of rich's with some rows, so wide where stdout is no terminal."""
    from rich.console import Console

    for row in rows:
        table.add_row(*map(printable, row))
    Console(width=None if sys.stdout.isatty() else width, markup=False, emoji=False, highlight=False).print(table)

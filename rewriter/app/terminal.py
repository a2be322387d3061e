"""Text on a terminal. Text from a model, a record or a path is made harmless: no markup, no control characters."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import click


def printable(text: str) -> str:
    """Return a text with control characters escaped as in a Python literal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def say(text: str, *, nl: bool = True, err: bool = False, **style: Any) -> None:
    """Print a line, or with `nl` False the beginning of one; `style` holds the style arguments of click."""
    click.secho(printable(text), nl=nl, err=err, **style)


def show(table: Any, rows: Iterable[Iterable[str]], width: int = 160) -> None:
    """Add rows to a rich table and print it; `width` applies if stdout is no terminal."""
    from rich.console import Console

    for row in rows:
        table.add_row(*map(printable, row))
    Console(width=None if sys.stdout.isatty() else width, markup=False, emoji=False, highlight=False).print(table)

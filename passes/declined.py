"""The error with which a pass leaves one batch norm and goes on with the next."""

from __future__ import annotations

from rewriter.ir import Error


class DeclinedError(Error):
    """A batch norm has to stay as it is; the message says why."""

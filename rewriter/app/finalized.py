"""Finalised models, as the log tells them that `finalize` leaves in them."""

from __future__ import annotations

from pathlib import Path

from rewriter.diff.log import LOG, read_log
from rewriter.savedmodel.write import EXTRA


def is_finalized(model: str | Path) -> bool:
    """Return true if `finalize` wrote the model in a directory, and nothing has saved it again since."""
    return bool(read_log(Path(model) / EXTRA / LOG).baked)

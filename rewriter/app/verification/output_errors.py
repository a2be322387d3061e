"""The errors that quantisers make in a model's float outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rewriter.app.verification.rounding import ROUNDING
from rewriter.app.verification.running import Ran
from rewriter.app.verification.serving import Served, floats


@dataclass(frozen=True)
class OutputError:
    """What quantisers change in one float output.

    Attributes:
        largest: the largest difference to the source's output.
        rms: the root of the mean squared difference.
        relative_rms: the same, relative to the source's output; None where that is zero.
        agreement: the share of rows with the largest element at the same place; None where rows are no classes.
    """

    signature: str
    output: str
    largest: float
    rms: float
    relative_rms: float | None
    agreement: float | None


def errors_with_quantisers(runs: Mapping[str, Served]) -> tuple[list[str], list[OutputError], list[str]]:
    """Return, as sentences, the outputs that are wrong; the errors of those that are compared; and those that are not.

    Outputs of the source that are not finite are not compared, nor those that it draws at random.
    """
    wrong, table, random = [], [], []
    for signature, served in runs.items():
        if not isinstance(served.on, Ran):
            wrong.append(f"signature {signature}: {served.on}")
            continue
        quantised = floats(served.on.outputs)
        for key, value in floats(served.source.outputs).items():
            if served.rerun.get(key, 0.0) > ROUNDING:
                random.append(f"output {key} of {signature} is not compared, as the source draws it at random")
                continue
            other = quantised.get(key, np.full_like(value, np.nan))
            finite = np.isfinite(value)
            if other.shape != value.shape or not np.isfinite(other[finite]).all():
                where = f"signature {signature}, output {key}"
                wrong.append(f"{where}: not finite, or of another shape, with quantisers on")
            else:
                table.append(_error(signature, key, value, other))
    return wrong, table, random


def _error(signature: str, output: str, wanted: np.ndarray, found: np.ndarray) -> OutputError:
    finite = np.isfinite(wanted)
    missed = (found - wanted)[finite]
    rms = float(np.sqrt(np.mean(missed**2))) if missed.size else 0.0
    norm = float(np.sqrt(np.mean(wanted[finite] ** 2))) if missed.size else 0.0
    agreement = None
    if wanted.ndim == 2 and wanted.shape[1] > 1 and wanted.size:  # noqa: PLR2004  rows of classes
        agreement = float(np.mean(wanted.argmax(1) == found.argmax(1)))
    largest = float(np.abs(missed).max(initial=0.0))
    return OutputError(signature, output, largest, rms, rms / norm if norm else None, agreement)

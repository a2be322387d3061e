"""Errors that quantisers make in a model's float outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rewriter.app.verification.rounding import ROUNDING
from rewriter.app.verification.running import Ran
from rewriter.app.verification.serving import Served, floats


@dataclass(frozen=True)
class OutputError:
    """Error that quantisers make in one float output.

    Attributes:
        largest: the largest difference to the source's output.
        rms: the root of the mean squared difference.
        relative_rms: `rms` relative to that of the source's output; None if that is zero.
        agreement: the share of rows whose largest element is at the same place; None if rows are no classes.
    """

    signature: str
    output: str
    largest: float
    rms: float
    relative_rms: float | None
    agreement: float | None


def errors_with_quantisers(runs: Mapping[str, Served]) -> tuple[list[str], list[OutputError], list[str]]:
    """Return sentences on wrong outputs, the errors of compared outputs, and sentences on outputs not compared.

    Values that are not finite in the source are not compared, nor are outputs that it draws at random.
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
            quantised_value = quantised.get(key, np.full_like(value, np.nan))
            finite = np.isfinite(value)
            if quantised_value.shape != value.shape or not np.isfinite(quantised_value[finite]).all():
                where = f"signature {signature}, output {key}"
                wrong.append(f"{where}: not finite, or of another shape, with quantisers on")
            else:
                table.append(_error(signature, key, value, quantised_value))
    return wrong, table, random


def _error(signature: str, output: str, expected: np.ndarray, actual: np.ndarray) -> OutputError:
    finite = np.isfinite(expected)
    error = (actual - expected)[finite]
    rms = float(np.sqrt(np.mean(error**2))) if error.size else 0.0
    norm = float(np.sqrt(np.mean(expected[finite] ** 2))) if error.size else 0.0
    agreement = None
    if expected.ndim == 2 and expected.shape[1] > 1 and expected.size:  # noqa: PLR2004  rows of classes
        agreement = float(np.mean(expected.argmax(1) == actual.argmax(1)))
    largest = float(np.abs(error).max(initial=0.0))
    return OutputError(signature, output, largest, rms, rms / norm if norm else None, agreement)

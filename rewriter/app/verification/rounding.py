"""Bounds of the difference between two models that rounding explains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

ROUNDING = 1e-5
"""Largest change by fusing, relative to the largest element."""
CONDITIONING = 4
"""Largest change by rounding if that is more, in multiples of the change by other last bits; 0.1 to 0.8 was seen."""
CHAOS = 1e-3
"""Change by other last bits above which nothing is compared, as errors would be as large."""
HALF_ROUNDING = 2e-2
"""Largest change by fusing if activations are half or bfloat16, relative to the largest element."""


class ErrorBound(NamedTuple):
    """Share of the largest element that rounding may change, None if it is unknown; and the reason."""

    allowed: float | None
    why: str


@dataclass
class RoundingCheck:
    """Values of two models, compared within the bounds of rounding.

    Attributes:
        wrong: values that differ by more than the bound, each with its difference.
        skipped: values without a bound, each with the reason.
        same: the number of values within the bound.
        largest: the largest difference of these, relative to the largest element.
    """

    wrong: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    same: int = 0
    largest: float = 0.0

    def add(self, what: str, share: float, bound: ErrorBound) -> None:
        """Record a value's difference."""
        if not share or (bound.allowed is not None and share <= bound.allowed):
            self.same += 1
            self.largest = max(self.largest, share)
        elif bound.allowed is None:
            self.skipped.append(f"{what}: not compared, as {bound.why}")
        else:
            difference = "is another" if np.isinf(share) else f"differs by {share:.2g} of its largest element"
            self.wrong.append(f"{what}: {difference}, {bound.allowed:.2g} is allowed{bound.why}")


def rounding(floor: float, rerun: float, perturbed: float) -> ErrorBound:
    """Return the difference to the source that rounding explains.

    A network amplifies the rounding errors of its ops. The source itself shows by how much: its outputs are compared
    under other last bits in its inputs and variables. Each such change is smaller than the rounding of one op.

    Args:
        floor: the difference that is allowed in any case; zero if nothing should round in another place.
        rerun: the difference of the source from itself when it runs again, as threads may add in another order.
        perturbed: the difference of the source from itself with other last bits.
    """
    if rerun > ROUNDING:
        return ErrorBound(None, "the source draws it at random, or is another from run to run")
    if not floor and not rerun:
        return ErrorBound(0.0, "")
    if perturbed > CHAOS:
        return ErrorBound(
            None,
            f"other last bits in the source's inputs and variables change it by {perturbed:.2g}; give it inputs as in "
            "its training",
        )
    conditioned = CONDITIONING * max(rerun, perturbed)
    if conditioned <= floor:
        return ErrorBound(floor, "")
    return ErrorBound(
        conditioned, f", {CONDITIONING} times what the source changes by other last bits in inputs and variables"
    )

"""The part of a difference between two models that rounding explains."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

ROUNDING = 1e-5
"""Largest change by fusing, relative to the largest element."""
CONDITIONING = 4
"""Largest change by rounding where that is more, in multiples of what other last bits change. 0.1 to 0.8 seen."""
CHAOS = 1e-3
"""From what change by other last bits on nothing is compared, as errors would be as large."""
HALF_ROUNDING = 2e-2
"""The same where activations are half or bfloat16."""


class Bound(NamedTuple):
    """A share of the largest element that rounding may change; None where nothing can be said. And why it is so."""

    allowed: float | None
    why: str


@dataclass
class Comparison:
    """Values of two models that were held against what rounding explains.

    Attributes:
        wrong: values that differ by more, each with its difference.
        skipped: values of which nothing can be said, each with the reason.
        same: how many differ by no more.
        largest: the largest difference of these, relative to the largest element.
    """

    wrong: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    same: int = 0
    largest: float = 0.0

    def add(self, what: str, share: float, bound: Bound) -> None:
        """Take note of a value's difference."""
        if not share or (bound.allowed is not None and share <= bound.allowed):
            self.same += 1
            self.largest = max(self.largest, share)
        elif bound.allowed is None:
            self.skipped.append(f"{what}: not compared, as {bound.why}")
        else:
            how = "is another" if np.isinf(share) else f"differs by {share:.2g} of its largest element"
            self.wrong.append(f"{what}: {how}, {bound.allowed:.2g} is allowed{bound.why}")


def rounding(floor: float, rerun: float, perturbed: float) -> Bound:
    """The difference to the source that rounding explains.

    A network multiplies what its ops round. By how much, the source shows by itself: by its answer to other last bits
    in its inputs and variables, each of which is less than what one op rounds.

    Args:
        floor: what is allowed in any case; zero where nothing should round in another place.
        rerun: how far the source is from itself when it runs again, as threads may add in another order.
        perturbed: how far it is with other last bits.
    """
    if rerun > ROUNDING:
        return Bound(None, "the source draws it at random, or is another from run to run")
    if not floor and not rerun:
        return Bound(0.0, "")
    if perturbed > CHAOS:
        return Bound(
            None,
            f"other last bits in the source's inputs and variables change it by {perturbed:.2g}; give it inputs as in "
            "its training",
        )
    conditioned = CONDITIONING * max(rerun, perturbed)
    if conditioned <= floor:
        return Bound(floor, "")
    return Bound(
        conditioned, f", {CONDITIONING} times what the source changes by other last bits in inputs and variables"
    )

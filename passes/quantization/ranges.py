"""Ranges: the limits between which a quantiser's levels lie.

Limits are in the scheme's own coordinate: v itself, or log(v + epsilon) for `Log`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from rewriter.ir import Error


@dataclass(frozen=True)
class Dynamic:
    """The least and the greatest of the values that are quantised, computed at every call. Nothing is clipped."""

    name: ClassVar[str] = "dynamic"


@dataclass(frozen=True)
class Fixed:
    """Given limits, in the units of the values. Values beyond them are clipped, and get no gradient.

    Attributes:
        low, high: the limits.

    Raises:
        Error: they are not finite, or `low` is not less than `high`.
    """

    low: float
    high: float
    name: ClassVar[str] = "fixed"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise Error(f"range {self.low:g} to {self.high:g}: the first limit is less than the second, both finite")


@dataclass(frozen=True)
class Ema:
    """Exponential moving averages of the least and the greatest value seen in training, kept in variables.

    limit <- limit momentum + seen (1 - momentum), at every training step, also before quantisers act; the new
    limits are used at once. They start with those of the checkpoint's values. Values beyond them are clipped, and
    get no gradient. Source: moving-average quantisation in Jacob et al. 2018, arXiv:1712.05877, section 3.1.

    Attributes:
        momentum: at least 0 and less than 1.

    Raises:
        Error: `momentum` is out of range.
    """

    momentum: float = 0.99
    name: ClassVar[str] = "ema"

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise Error(f"momentum {self.momentum:g} of a range: it is at least 0 and less than 1")


@dataclass(frozen=True)
class Learned:
    """The scale is a trainable variable, with the gradient of learned step size quantisation.

    For code q at position x = v / s: dv'/ds = q - x where q is not clipped and q where it is, times
    1 / sqrt(C top), with C channels and the greatest code `top`. Source: Esser et al. 2020, arXiv:1902.08153.

    `Affine` and `Log`, which have no fixed code for zero, have a trainable low limit besides, with dv'/dlow = 1
    where the value is clipped, else 0 (Bhalgat et al. 2020, arXiv:2004.09576). Scale and low limit start with the
    limits of the checkpoint's values. The scale is the variable's absolute value.
    """

    name: ClassVar[str] = "learned"


@dataclass(frozen=True)
class Mse:
    """The limits whose quantised values have the least squared error, of `CANDIDATES` fractions of the values' range.

    They are found at the rewrite, for the width and the scheme given there, and kept in a variable; `bnqat.find_ranges`
    finds them again for the weights as they are then. Values beyond them are clipped, and get no gradient. Source:
    Banner et al. 2019, arXiv:1810.05723, section 3, with a search in place of a distribution.
    """

    name: ClassVar[str] = "mse"


CANDIDATES = 40
"""The number of limits that a search for the least squared error tries: k / 40 of the values' own, for k = 40 to 1."""

Range = Dynamic | Fixed | Ema | Learned | Mse

DYNAMIC = Dynamic()

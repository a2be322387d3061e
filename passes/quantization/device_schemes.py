"""Schemes as an integer device computes them: for weights.

A batch norm's vectors are quantised by the schemes of `passes.quantization.schemes`. A weight's codes are those of a
converted model, whose arithmetic differs in two points (docs/numerics.md):

- a position is a product with the inverse scale, not a quotient, as in ``FakeQuantWithMinMaxVarsPerChannel``;
- values are not looked at one by one: a weight is finite. NaN stays NaN; a channel with an infinity becomes NaN.

The divisors come from tables by the width, which is a variable. A constant divisor would become a product. Positions
are rounded by ``Round``, half to even. TensorFlow's fake quantisers round half up, by ``floor(x + 1/2)``, but XLA
computes ``v i + 1/2`` with one rounding where the CPU has such an instruction: of weights half-way between two levels,
24 % had another code at 2 bits, and 4 % at 4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import ClassVar

from passes.quantization.node_marks import SCALE, ZERO_POINT, marked
from passes.quantization.ranges import Dynamic
from passes.quantization.schemes import (
    FLOAT,
    TINY,
    Affine,
    Grid,
    Limits,
    PowerOfTwo,
    Scheme,
    Symmetric,
    by_width,
    reduced,
)
from rewriter.expr import Expr, Shape, constant, op, select


class DeviceArithmetic(Scheme):
    """The parts of a scheme that all schemes of a device have in common."""

    device: ClassVar[bool] = True

    def defined(self, value: Expr) -> None:  # noqa: ARG002  all values are quantised
        """Return None: all values are quantised."""
        return

    def step_gradient_factor(self, bits: Expr, channels: int) -> Expr:
        """Return the factor of a learned limit's gradient, t^2 / sqrt(C t), float32, for C values that share it.

        A step's is 1 / sqrt(C t) (Esser et al. 2020, arXiv:1902.08153, section 2.2), and the limit is t steps: for the
        same relative change, its gradient is to be t^2 times as large.
        """
        return by_width(bits, lambda n: self.codes(n)[1] ** 1.5 / math.sqrt(channels), FLOAT)


@dataclass(frozen=True)
class DeviceSymmetric(DeviceArithmetic, Symmetric):
    """`Symmetric` with n bits and t = 2^(n-1) - 1: s = m / t; q = clip(round(v (t / m)), -t, t); v' = q s.

    m is the largest magnitude, or the given limit. Without the narrow range, codes begin at b = -2^(n-1),
    s = max(hi / t, lo / b), and positions are v (t / hi) or v (b / lo), as the one or the other has the greater scale.
    Where s is zero or subnormal, it counts as 1, and so does its inverse.
    """

    @property
    def clips(self) -> bool:
        """False if the range follows the values and no code can lie beyond the last one."""
        return not (isinstance(self.range, Dynamic) and self.narrow and self.rounding == "nearest")

    def extremes(self, value: Expr, defined: Expr | None, shape: Shape, axes: tuple[int, ...]) -> Limits:
        """Return the extremes of float32 values over some axes; with a narrow range, of their magnitudes."""
        if not self.narrow:
            return super().extremes(value, defined, shape, axes)
        high = reduced("Max", op("Abs", value), axes)
        return Limits(-high, high)

    def grid(self, limits: Limits, bits: Expr) -> Grid:
        """Return the levels for float32 limits and int32 bits [..., 1]."""
        top, bottom = self.top(bits), self.bottom(bits)
        if self.narrow:
            size = op("Maximum", limits.high, -limits.low)
            scale, inverse = size / top, top / size
        else:
            above, below = limits.high / top, limits.low / bottom
            scale = op("Maximum", above, below)
            # Not 1 / s, as XLA turns a product with that into a quotient.
            inverse = select(above >= below, top / limits.high, bottom / limits.low)
        scale, inverse = _or_ones(scale, inverse)
        reciprocal = self._by_width(bits, lambda n: 1 / self.codes(n)[1])
        return Grid(scale, None, None, bottom, top, reciprocal, inverse)


@dataclass(frozen=True)
class DeviceAffine(DeviceArithmetic, Affine):
    """`Affine` with n bits and t = 2^n - 1: s = (hi - lo) / t; i = t / (hi - lo); z = round(-lo i).

    q = clip(round(v i) + z, 0, t); v' = (q - z) s. Where s is zero or subnormal, s and i count as 1.
    """

    def grid(self, limits: Limits, bits: Expr) -> Grid:
        """Return the levels for float32 limits and int32 bits [..., 1]."""
        top = self.top(bits)
        span = limits.high - limits.low
        scale, inverse = _or_ones(span / top, top / span)
        zero = marked(ZERO_POINT, op("Round", -limits.low * inverse))
        reciprocal = self._by_width(bits, lambda n: 1 / self.codes(n)[1])
        return Grid(scale, zero, None, None, top, reciprocal, inverse)


@dataclass(frozen=True)
class DevicePowerOfTwo(DeviceArithmetic, PowerOfTwo):
    """`PowerOfTwo`; its scale is a power of two, so its quotients are exact."""


DEVICE: dict[type[Scheme], type[Scheme]] = {
    Affine: DeviceAffine,
    Symmetric: DeviceSymmetric,
    PowerOfTwo: DevicePowerOfTwo,
}
"""The scheme of a device by that of the same name for vectors."""


def on_device(scheme: Scheme) -> Scheme:
    """Return a scheme with the arithmetic of an integer device.

    Raises:
        AssertionError: it has none.
    """
    if type(scheme) not in DEVICE:
        raise AssertionError(f"{scheme.name} has no codes on a device")
    return DEVICE[type(scheme)](**{f.name: getattr(scheme, f.name) for f in fields(Scheme)})


def _or_ones(scale: Expr, inverse: Expr) -> tuple[Expr, Expr]:
    """Return the scale and its inverse, or 1 where the scale is zero or subnormal: then every code is that of zero."""
    usable, one = scale >= TINY, constant(1.0, scale.dtype)
    return marked(SCALE, select(usable, scale, one)), select(usable, inverse, one)

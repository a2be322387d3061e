"""Quantisers: how one role's values are rounded to few levels.

A quantiser is a frozen dataclass; called with a float32 vector, it gives the quantised vector and where
that is defined. Ranges are over the last axis and follow the values (dynamic). Arithmetic is float32, if
not said otherwise, without a division by a constant, which Grappler and XLA would change into a product.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import numpy as np

from passes.roles import MAX_BITS, MIN_BITS
from rewriter.expr import Expr, Function, constant, op, parameter, select, stop_gradient
from rewriter.ir import Error
from rewriter.ops import Dtype

FLOAT = "float32"
TINY = float(np.finfo(np.float32).tiny)
DOUBLE = "float64"


class Quantized(NamedTuple):
    """A quantised vector; where `defined` is false, the value itself is to be kept."""

    value: Expr
    defined: Expr


class Quantizer(Protocol):
    """Rounds a vector of one role's values."""

    @property
    def bits(self) -> int:
        """Width of a code, 2 to 16."""
        ...

    @property
    def scheme(self) -> str:
        """Name of the scheme."""
        ...

    def __call__(self, value: Expr, epsilon: float) -> Quantized:
        """Quantise a float32 vector [..., C]; `epsilon` is that of the batch norm."""
        ...


def _check_bits(bits: int) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise Error(f"{bits} bits: a width is from {MIN_BITS} to {MAX_BITS}")


def _reduce(name: str, value: Expr) -> Expr:
    return op(name, value, constant(-1, "int32"), keep_dims=True)


def _or_one(scale: Expr) -> Expr:
    """The scale, or 1 where it is zero or subnormal: then every code is zero."""
    return select(scale >= TINY, scale, constant(1.0, FLOAT))


def _clip(code: Expr, top: int) -> Expr:
    return op("Minimum", op("Maximum", code, 0.0), float(top))


@dataclass(frozen=True)
class Affine:
    """Equally spaced levels from min(v, 0) to max(v, 0), with zero among them.

    r = float32(1 / (2^bits - 1)); s = (hi - lo) r; z = round(-lo / s); q = clip(round(v / s) + z, 0, 2^bits - 1);
    v' = (q - z) s. Rounding is half to even. NaN and infinities are kept and do not count for the range.

    Raises:
        Error: `bits` is not from 2 to 16.
    """

    bits: int = 8
    scheme: ClassVar[str] = "affine"

    def __post_init__(self) -> None:
        _check_bits(self.bits)

    def __call__(self, value: Expr, epsilon: float) -> Quantized:  # noqa: ARG002  it has no influence here
        """Quantise a float32 vector [..., C]."""
        top = 2**self.bits - 1
        finite = op("IsFinite", value)
        known = select(finite, value, constant(0.0, FLOAT))
        low = op("Minimum", _reduce("Min", known), 0.0)
        high = op("Maximum", _reduce("Max", known), 0.0)
        scale = _or_one((high - low) * constant(np.float32(1 / top), FLOAT))
        zero = op("Round", -low / scale)
        code = _clip(op("Round", value / scale) + zero, top)
        return Quantized((code - zero) * scale, finite)


@dataclass(frozen=True)
class Log:
    """Levels equally spaced in log(v + epsilon), for variances: what matters is 1 / sqrt(v + epsilon).

    l = log(v + epsilon); s = (max l - min l) (1 / (2^bits - 1)); q = clip(round((l - min l) / s), 0, 2^bits - 1);
    v' = max(exp(q s + min l) - epsilon, 0). NaN, infinities and negative values are kept and do not count for
    the range. Logarithms are float64, rounded to float32 at the end: in float32 two libraries' logarithms
    differ by enough to move a result by 11 units in the last place. So the least and the greatest value are
    kept, and zero stays exactly zero.

    Raises:
        Error: `bits` is not from 2 to 16.
    """

    bits: int = 8
    scheme: ClassVar[str] = "log"

    def __post_init__(self) -> None:
        _check_bits(self.bits)

    def __call__(self, value: Expr, epsilon: float) -> Quantized:
        """Quantise a float32 vector [..., C] of variances."""
        top = 2**self.bits - 1
        defined = (value >= 0.0) & (value < float("inf"))
        shifted = value + epsilon
        known = op("Log", op("Cast", select(defined, shifted, constant(1.0, FLOAT)), DstT=Dtype(DOUBLE)))
        low = _reduce("Min", select(defined, known, constant(float("inf"), DOUBLE)))
        high = _reduce("Max", select(defined, known, constant(float("-inf"), DOUBLE)))
        span = high - low
        scale = select(span >= TINY, span * constant(1 / top, DOUBLE), constant(1.0, DOUBLE))
        code = _clip(op("Round", (known - low) / scale), top)
        level = op("Cast", op("Exp", code * scale + low), DstT=Dtype(FLOAT))
        return Quantized(op("Maximum", level - epsilon, 0.0), defined)


def switched(quantizer: Quantizer, epsilon: float, size: int | None, dtype: str = FLOAT, rows: int = 0) -> Function:
    """A function (active, value) -> value, quantised while `active`, with the gradient of the value itself.

    ``sg(q) + (v - sg(v))`` is q exactly, with gradient 1. What is selected is the result, so that switched
    off the value itself passes, bit for bit. Values of another dtype are quantised in float32.

    Args:
        quantizer: how values are rounded.
        epsilon: that of the batch norm.
        size: the number of channels, where it is known.
        dtype: the value's dtype.
        rows: how many vectors the value holds, each in a row of its own; 0 for a single vector.
    """
    active, value = parameter("active", "bool"), parameter("value", dtype)
    quantized = quantizer(_cast(value, FLOAT), epsilon)
    through = stop_gradient(_cast(quantized.value, dtype)) + (value - stop_gradient(value))
    result = select(op("LogicalAnd", active, quantized.defined), through, value)
    suffix = ("" if size is None else f"_{size}_channels") + ("" if dtype == FLOAT else f"_{dtype}")
    suffix += f"_{rows}_rows" if rows else ""
    name = f"bnqat_{quantizer.scheme}_{quantizer.bits}_bits_epsilon_{epsilon:.9g}{suffix}"
    shape = None if size is None else (rows, size) if rows else (size,)
    return Function(re.sub(r"\W", "_", name), (active, value), ((), shape), result)


def row(size: int, dtype: str) -> Function:
    """A function (quantised, value) -> quantised: which vector a row of quantised ones stands for."""
    quantized, value = parameter("quantized", dtype), parameter("value", dtype)
    name = f"bnqat_row_{size}_channels" + ("" if dtype == FLOAT else f"_{dtype}")
    return Function(name, (quantized, value), ((size,), (size,)), op("Identity", quantized))


def _cast(value: Expr, dtype: str) -> Expr:
    return value if value.dtype == dtype else op("Cast", value, DstT=Dtype(dtype))

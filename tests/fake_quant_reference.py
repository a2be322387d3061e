"""TensorFlow's fake-quantisation ops in NumPy, as their kernels for CPU compute.

Source: tensorflow/core/kernels/fake_quant_ops_functor.h. The limits are first moved ("nudged") so that zero is a
level: a range that lies on one side of zero is shifted, and keeps its width. A position counts from the lower limit
and is rounded half up. `...Vars` divides by the scale; `...PerChannel` and `...Args` multiply by its inverse.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

F = np.float32


class Nudged(NamedTuple):
    """Limits of which zero is a level, the scale and its inverse, float32."""

    low: np.ndarray
    high: np.ndarray
    scale: np.ndarray
    inverse: np.ndarray


class FakeQuantized(NamedTuple):
    """An op's result, float32, and true where a value is within the nudged limits: there its gradient is 1, else 0."""

    value: np.ndarray
    inside: np.ndarray


def nudged(low: np.ndarray, high: np.ndarray, bits: int, narrow: bool = False) -> Nudged:
    """Return the nudged limits of float32 limits, of any shape."""
    bottom, top = F(int(narrow)), F(2**bits - 1)
    low, high = np.asarray(low, F), np.asarray(high, F)
    scale, inverse = (high - low) / (top - bottom), (top - bottom) / (high - low)
    zero = np.clip(bottom - low / scale, bottom, top)
    below = np.floor(zero)
    zero = below + (zero - below >= F(0.5)).astype(F)  # std::round, which rounds half away from zero, of zero >= 0
    return Nudged((bottom - zero) * scale, (top - zero) * scale, scale, inverse)


def _fake_quant(
    v: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int, narrow: bool, *, divide: bool
) -> FakeQuantized:
    empty = (low == 0) & (high == 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        grid = nudged(low, high, bits, narrow)
        zero = np.floor(-grid.low * grid.inverse + F(0.5))
        shifted = np.maximum(np.minimum(v, grid.high), grid.low) - grid.low
        position = shifted / grid.scale if divide else shifted * grid.inverse
        value = np.floor(position - zero + F(0.5)) * grid.scale
    inside = (v >= grid.low) & (v <= grid.high)
    return FakeQuantized(np.where(empty, F(0), value), inside | empty)


def fake_quant_vars(v: np.ndarray, low: float, high: float, bits: int, narrow: bool = False) -> FakeQuantized:
    """`FakeQuantWithMinMaxVars`: divides. float32 of any shape, scalar limits."""
    return _fake_quant(v, np.asarray(low, F), np.asarray(high, F), bits, narrow, divide=True)


def fake_quant_per_channel(
    v: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int, narrow: bool = False
) -> FakeQuantized:
    """`FakeQuantWithMinMaxVarsPerChannel`: multiplies by the inverse. float32 [..., C], limits [C]."""
    return _fake_quant(v, np.asarray(low, F), np.asarray(high, F), bits, narrow, divide=False)


def fake_quant_args(v: np.ndarray, low: float, high: float, bits: int, narrow: bool = False) -> FakeQuantized:
    """`FakeQuantWithMinMaxArgs`: multiplies by the inverse. float32 of any shape; low < high are attributes."""
    return _fake_quant(v, np.asarray(low, F), np.asarray(high, F), bits, narrow, divide=False)

"""The limits whose quantised values have the least squared error, found with NumPy."""

from __future__ import annotations

import math

import numpy as np

from passes.quantization.ranges import CANDIDATES
from passes.quantization.schemes import TINY, Affine, PowerOfTwo, Scheme, Symmetric

F = np.float32


def by_channel(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Return the values of each index of some axes, counted from the end, as a row: [channels, n]."""
    kept = [axis % values.ndim for axis in axes]
    first = np.transpose(values, (*kept, *(axis for axis in range(values.ndim) if axis not in kept)))
    return first.reshape(math.prod(first.shape[: len(kept)]), -1)


def own_limits(scheme: Scheme, values: np.ndarray) -> np.ndarray:
    """Return the limits [channels, 2] of float32 values [channels, n]: those of a dynamic range."""
    low, high = values.min(1, initial=0), values.max(1, initial=0)
    if isinstance(scheme, Symmetric):
        high = np.maximum(high, -low)
        low = -high
    return np.stack([low, high], 1).astype(F)


def least_error_limits(scheme: Scheme, values: np.ndarray) -> np.ndarray:
    """Return the limits [channels, 2] with the least squared error, of `CANDIDATES` fractions of the values' own.

    Of equal errors, the larger limits count.

    Args:
        scheme: a scheme of a device; its width counts.
        values: float32 [channels, n].
    """
    own = own_limits(scheme, values)
    best = own
    least = np.full(len(values), np.inf)
    for k in range(CANDIDATES, 0, -1):
        limits = own * F(k / CANDIDATES)
        error = np.square(levels(scheme, values, limits) - values, dtype=np.float64).sum(1)
        best = np.where((error < least)[:, None], limits, best)
        least = np.minimum(error, least)
    return best


def levels(scheme: Scheme, values: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Return float32 values [channels, n] as a device scheme quantises them within limits [channels, 2]."""
    bottom, top = (F(code) for code in scheme.codes(scheme.bits))
    low, high = limits[:, :1], limits[:, 1:]
    zero = np.zeros_like(low)
    with np.errstate(all="ignore"):
        if isinstance(scheme, Affine):
            scale, inverse = (high - low) / top, top / (high - low)
        elif isinstance(scheme, PowerOfTwo):
            scale = _power_of_two(high, low, float(bottom), float(top))
            inverse = F(1) / scale
        elif scheme.narrow:
            size = np.maximum(high, -low)
            scale, inverse = size / top, top / size
        else:
            scale = np.maximum(high / top, low / bottom)
            inverse = np.where(high / top >= low / bottom, top / high, bottom / low)
        usable = scale >= TINY
        scale, inverse = np.where(usable, scale, F(1)), np.where(usable, inverse, F(1))
        if isinstance(scheme, Affine):
            zero = np.round(-low * inverse)
        code = np.clip(np.round(values * inverse) + zero, bottom, top)
        result: np.ndarray = (code - zero) * scale
    return result


def _power_of_two(high: np.ndarray, low: np.ndarray, bottom: float, top: float) -> np.ndarray:
    """Return the least powers of two whose levels reach the limits, float32."""
    needed = np.maximum(high.astype(np.float64) / top, low.astype(np.float64) / bottom)
    exponents = np.ceil(np.log2(np.maximum(needed, TINY)))
    powers = np.exp2(exponents)
    return np.where(powers / 2 >= needed, powers / 2, powers).astype(F)

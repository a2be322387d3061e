"""Fake-quantised weights in NumPy: the canonical arithmetic of an integer device, and that of TensorFlow's own ops.

Everything is float32, with one rounding for each operation. Nothing is shared with the product. Subnormal numbers
are not flushed to zero, as some kernels do it, so neither weights nor limits should be subnormal. Weights are finite,
as the product takes them to be: it looks for no NaN and no infinities.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

F = np.float32
TINY = np.finfo(F).tiny
"""The least normal number, 2^-126: a scale below counts as 1."""


class Limits(NamedTuple):
    """The limits of ranges, low <= 0 <= high, float32: of the shape of the axes kept, or a scalar."""

    low: np.ndarray
    high: np.ndarray


class QuantizedWeight(NamedTuple):
    """A fake-quantised weight and what belongs to it.

    Attributes:
        value: the quantised weight, float32, of the weight's shape.
        codes: the integer codes, int32, of the weight's shape.
        scale: the scales, float32, of the shape of the axes kept.
        zero_point: the code of zero, int32, of the same shape.
        inside: true where the code is not clipped: there the gradient for the weight is 1, else 0. A range that
            follows the values clips only by stochastic rounding, or where affine rounds a code and the zero point up.
        of_high: the gradient for the upper limit, of the weight's shape: (code - zero point - x) factor inside, and
            (code - zero point) factor where clipped. For symmetric, that limit is m.
    """

    value: np.ndarray
    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    inside: np.ndarray
    of_high: np.ndarray


class _Grid(NamedTuple):
    """Scales, their inverses and zero points, float32, with axes of size 1 where a range covers an axis."""

    scale: np.ndarray
    inverse: np.ndarray
    zero_point: np.ndarray


def lowest_and_highest_code(scheme: str, bits: int, narrow: bool | None = None) -> tuple[int, int]:
    """Return the ends of the codes. Symmetric and power_of_two are narrow unless told otherwise; affine is not."""
    if scheme == "affine":
        return 0, 2**bits - 1 - int(bool(narrow))
    if scheme not in ("symmetric", "power_of_two"):
        raise ValueError(scheme)
    return -(2 ** (bits - 1)) + int(narrow is not False), 2 ** (bits - 1) - 1


def _reduced_axes(v: np.ndarray, axes_kept: tuple[int, ...]) -> tuple[int, ...]:
    kept = {axis % v.ndim for axis in axes_kept}
    return tuple(axis for axis in range(v.ndim) if axis not in kept)


def _aligned(limit: np.ndarray, v: np.ndarray, axes_kept: tuple[int, ...]) -> np.ndarray:
    """Return limits of the shape of the axes kept, in order, with axes of size 1 for all others."""
    reduced = _reduced_axes(v, axes_kept)
    shape = [1 if axis in reduced else size for axis, size in enumerate(v.shape)]
    sizes = [size for axis, size in enumerate(v.shape) if axis not in reduced]
    return np.broadcast_to(np.asarray(limit, F), sizes).reshape(shape)


def weight_limits(v: np.ndarray, axes_kept: tuple[int, ...]) -> Limits:
    """Return the extremes of a weight's values and zero, by index of the axes kept."""
    reduced = _reduced_axes(v, axes_kept)
    return Limits(v.min(reduced, initial=F(0)), v.max(reduced, initial=F(0)))


def _power_of_two_scale(low: np.ndarray, high: np.ndarray, bottom: int, top: int) -> np.ndarray:
    """Return the least powers of two whose levels reach the limits; products of the test are exact in float64."""
    scale = np.full(high.shape, 2.0**-126)
    for exponent in range(-126, 128):
        short = (scale * top < high.astype(np.float64)) | (scale * bottom > low.astype(np.float64))
        if not short.any():
            break
        scale = np.where(short, 2.0 ** (exponent + 1), scale)
    # A scale that may have to be less than 2^-126 counts as 1.
    least = (scale == 2.0**-126) & (high <= top * 2.0**-127) & (-low <= -bottom * 2.0**-127)
    return np.where(least, 1.0, scale).astype(F)


def _grid(scheme: str, low: np.ndarray, high: np.ndarray, bits: int, narrow: bool | None) -> _Grid:
    bottom, top = lowest_and_highest_code(scheme, bits, narrow)
    if scheme == "affine":
        span = high - low
        scale, inverse = span / F(top), F(top) / span
    elif scheme == "power_of_two":
        scale = _power_of_two_scale(low, high, bottom, top)
        inverse = F(1) / scale
    elif -bottom == top:
        largest = np.maximum(high, -low)
        scale, inverse = largest / F(top), F(top) / largest
    else:
        above, below = high / F(top), low / F(bottom)
        scale, inverse = np.maximum(above, below), np.where(above >= below, F(top) / high, F(bottom) / low)
    usable = scale >= TINY
    scale, inverse = np.where(usable, scale, F(1)), np.where(usable, inverse, F(1))
    zero_point = np.round(-low * inverse) if scheme == "affine" else np.zeros_like(scale)
    return _Grid(scale, inverse, np.clip(zero_point, F(bottom), F(top)))


def _rounded(x: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
    """Round half to even; with noise, up where the noise is below the fraction."""
    if noise is None:
        nearest: np.ndarray = np.round(x)
        return nearest
    below = np.floor(x)
    up: np.ndarray = below + (noise.astype(F) < x - below).astype(F)
    return up


def quantize_weight(
    scheme: str,
    v: np.ndarray,
    bits: int,
    axes_kept: tuple[int, ...],
    *,
    narrow: bool | None = None,
    limits: Limits | np.ndarray | None = None,
    noise: np.ndarray | None = None,
    factor: float = 1.0,
) -> QuantizedWeight:
    """Fake-quantise a float32 weight within its own limits or given ones.

    Args:
        scheme: "symmetric", "affine" or "power_of_two".
        v: the weight, in the layout in which its op takes it.
        bits: the width, 2 to 16.
        axes_kept: the axes each index of which has a range of its own; () is one range for the whole tensor.
        narrow: true for the narrow range, false without; None is the scheme's default.
        limits: the limits; an array m stands for -m and m; None for those of the values.
        noise: for stochastic rounding, numbers of [0, 1) of the weight's shape: up where one is below the fraction.
        factor: the factor of a learned limit's gradient.

    Raises:
        TypeError: the weight is not float32.
        ValueError: a value is not finite.
    """
    if v.dtype != F:
        raise TypeError(v.dtype)
    if not np.isfinite(v).all():
        raise ValueError("a weight is finite")
    if limits is None:
        limits = weight_limits(v, axes_kept)
    elif not isinstance(limits, Limits):
        limits = Limits(-np.asarray(limits, F), np.asarray(limits, F))
    low, high = (_aligned(limit, v, axes_kept) for limit in limits)
    bottom, top = (F(code) for code in lowest_and_highest_code(scheme, bits, narrow))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        grid = _grid(scheme, low, high, bits, narrow)
    x = v * grid.inverse
    raw = _rounded(x, noise) + grid.zero_point
    code = np.clip(raw, bottom, top)
    steps = code - grid.zero_point
    inside = code == raw
    missed = (steps - x * inside.astype(F)) * F(factor)
    reduced = _reduced_axes(v, axes_kept)
    return QuantizedWeight(
        value=steps * grid.scale,
        codes=code.astype(np.int32),
        scale=grid.scale.squeeze(reduced),
        zero_point=grid.zero_point.squeeze(reduced).astype(np.int32),
        inside=inside,
        of_high=missed,
    )


def mse_limits(
    scheme: str,
    v: np.ndarray,
    bits: int,
    axes_kept: tuple[int, ...],
    candidates: int = 40,
    *,
    narrow: bool | None = None,
) -> Limits:
    """Return the limits with the least sum of squared errors, by index of the axes kept.

    The candidates are the weight's own limits by k / candidates, from k = candidates to 1; the first, which is the
    largest, wins ties. Symmetric and power_of_two have the limits -m and m, with m the largest magnitude. Errors and
    their squares and sums are float64.
    """
    own = weight_limits(v, axes_kept)
    if scheme != "affine":
        largest = np.maximum(own.high, -own.low)
        own = Limits(-largest, largest)
    best, least = own, np.full(own.high.shape, np.inf)
    for k in range(candidates, 0, -1):
        fraction = F(k / candidates)
        limits = Limits(own.low * fraction, own.high * fraction)
        value = quantize_weight(scheme, v, bits, axes_kept, narrow=narrow, limits=limits).value
        error = np.square(value.astype(np.float64) - v).sum(_reduced_axes(v, axes_kept))
        better = error < least
        best = Limits(*(np.where(better, new, old) for new, old in zip(limits, best, strict=True)))
        least = np.where(better, error, least)
    return best


def mse_limit(
    scheme: str,
    v: np.ndarray,
    bits: int,
    axes_kept: tuple[int, ...],
    candidates: int = 40,
    *,
    narrow: bool | None = None,
) -> np.ndarray:
    """Return the upper limits of `mse_limits`: for symmetric and power_of_two, m."""
    return mse_limits(scheme, v, bits, axes_kept, candidates, narrow=narrow).high

"""The quantisers in NumPy: the same operations in the same order."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

F = np.float32
TINY = np.finfo(F).tiny


class Quantized(NamedTuple):
    """A fake-quantised vector [C] and the gradients of its elements.

    Attributes:
        value: the quantised vector, float32 [C].
        inside: true where a code is not clipped, [C]: there the gradient for v is 1, else 0.
        of_high, of_low: the gradient of a learned range's limits, [C], before the factor.
    """

    value: np.ndarray
    inside: np.ndarray
    of_high: np.ndarray
    of_low: np.ndarray


def codes(scheme: str, bits: int, narrow: bool) -> tuple[int, int]:
    """The lowest and the highest code."""
    if scheme in ("symmetric", "power_of_two"):
        return -(2 ** (bits - 1)) + int(narrow), 2 ** (bits - 1) - 1
    return 0, 2**bits - 1 - int(narrow)


def rounded(position: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
    """Round half to even; with noise, round up where the noise is less than the fraction."""
    if noise is None:
        nearest: np.ndarray = np.round(position)
        return nearest
    below: np.ndarray = np.floor(position)
    rounded_up: np.ndarray = below + (noise.astype(position.dtype) < position - below)
    return rounded_up.astype(position.dtype)


def counted(scheme: str, v: np.ndarray) -> np.ndarray:
    """Mask of the values that are quantised."""
    with np.errstate(invalid="ignore"):
        mask: np.ndarray = (v >= 0) & (v < np.inf) if scheme == "log" else np.isfinite(v)
    return mask


def seen(scheme: str, v: np.ndarray, epsilon: float) -> tuple[np.floating, np.floating]:
    """The limits of a vector, in the scheme's coordinate."""
    values = v[counted(scheme, v)]
    if scheme == "log":
        logs = np.log((values + F(epsilon)).astype(np.float64))
        return logs.min(initial=np.inf), logs.max(initial=-np.inf)
    return values.min(initial=F(0)), values.max(initial=F(0))


def quantize(
    scheme: str,
    v: np.ndarray,
    bits: int,
    epsilon: float = 0.0,
    *,
    narrow: bool = False,
    limits: np.ndarray | None = None,
    noise: np.ndarray | None = None,
) -> Quantized:
    """Fake-quantise a float32 vector with its own range, or with given limits.

    Limits are float32 [2], in the scheme's coordinate.
    """
    bottom, top = codes(scheme, bits, narrow)
    defined = counted(scheme, v)
    low, high = seen(scheme, v, epsilon) if limits is None else (limits[0], limits[1])
    step: np.floating
    reciprocal: float | np.floating
    with np.errstate(all="ignore"):
        if scheme == "log":
            logs = np.log(np.where(defined, v + F(epsilon), F(1)).astype(np.float64))
            low, high = np.float64(low), np.float64(high)
            step = (high - low) * (1 / top) if high - low >= TINY else np.float64(1)
            position = (logs - low) / step
            raw = rounded(position, noise)
            code = np.clip(raw, 0, top)
            level = np.maximum(np.exp(code * step + low).astype(F) - F(epsilon), F(0))
            inside, rest = code == raw, code
            slope, reciprocal = level + F(epsilon), 1 / top
        else:
            step, zero, reciprocal = linear(scheme, F(low), F(high), bits, narrow)
            position = v / step
            raw = rounded(position, noise) + zero
            code = np.clip(raw, F(bottom), F(top))
            level = (code - zero) * step
            inside, rest = code == raw, code - zero
            slope = np.ones_like(v)
        # Straight-through, d level / d step is `rest` less the position inside, and `rest` outside; `reciprocal` is
        # d step / d high. For log, `slope` is the derivative of the exponential.
        missed = (rest - np.where(inside, position, 0)) * reciprocal
        of_high = missed.astype(F) * slope
        of_low = ((~inside).astype(F) - missed).astype(F) * slope
    return Quantized(
        np.where(defined, level, v).astype(F),
        inside | ~defined,
        np.where(defined, of_high, F(0)),
        np.where(defined, of_low, F(0)) * F(scheme in ("affine", "log")),
    )


def linear(scheme: str, low: np.float32, high: np.float32, bits: int, narrow: bool) -> tuple[np.float32, ...]:
    """Return the scale, the zero point, and the derivative of the scale for the upper limit."""
    bottom, top = codes(scheme, bits, narrow)
    reciprocal, zero = F(1 / top), F(0)
    if scheme == "affine":
        step = F(F(high - low) * reciprocal)
    elif scheme == "symmetric":
        step = F(max(high, -low) * reciprocal) if narrow else max(F(high * reciprocal), F(-low * F(-1 / bottom)))
    else:
        greatest = max(high, -low)
        step = F(0)
        if greatest >= TINY:
            mantissa, exponent = np.frexp(np.float64(greatest))
            step = F(2.0 ** (float(exponent) - float(mantissa == 0.5) - bits + 1))
            step = step if step >= TINY else F(0)  # kernels take subnormal numbers for zero
            if not (step * F(top) >= high and step * F(bottom) <= low):
                step = F(step * F(2))
    step = step if step >= TINY else F(1)
    if scheme == "affine":
        zero = np.round(-low / step)
    return step, zero, reciprocal


def ema(scheme: str, v: np.ndarray, limits: np.ndarray, momentum: float, epsilon: float = 0.0) -> np.ndarray:
    """Moving average of the limits [2] after one step with a vector; unchanged if no value is counted."""
    if not counted(scheme, v).any():
        return limits
    now = np.array(seen(scheme, v, epsilon)).astype(F)
    return limits * F(momentum) + now * (F(1) - F(momentum))


def reference(scheme: str) -> Callable[[np.ndarray, int, float], np.ndarray]:
    """Return a scheme's function with a dynamic range: (vector, bits, epsilon) -> vector."""
    return lambda v, bits, epsilon: quantize(scheme, v, bits, epsilon).value


def affine(v: np.ndarray, bits: int, _epsilon: float = 0.0) -> np.ndarray:
    """`Affine` of a dynamic range. float32 [C] -> float32 [C]."""
    return quantize("affine", v, bits).value


def log(v: np.ndarray, bits: int, epsilon: float) -> np.ndarray:
    """`Log` of a dynamic range. float32 [C] -> float32 [C]."""
    return quantize("log", v, bits, epsilon).value

"""The quantisers in NumPy: the same operations in the same order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

F = np.float32
TINY = np.finfo(F).tiny


def affine(v: np.ndarray, bits: int, _epsilon: float = 0.0) -> np.ndarray:
    """Equally spaced levels from min(v, 0) to max(v, 0). float32 [C] -> float32 [C]."""
    top = 2**bits - 1
    finite = np.isfinite(v)
    known = np.where(finite, v, F(0))
    low, high = np.minimum(known.min(), F(0)), np.maximum(known.max(), F(0))
    scale = F(F(high - low) * F(1 / top))
    scale = scale if scale >= TINY else F(1)
    zero = np.round(-low / scale)
    with np.errstate(invalid="ignore"):
        code = np.clip(np.round(v / scale) + zero, F(0), F(top))
    return np.where(finite, (code - zero) * scale, v).astype(F)


def log(v: np.ndarray, bits: int, epsilon: float) -> np.ndarray:
    """Levels equally spaced in log(v + epsilon). float32 [C] -> float32 [C]."""
    top = 2**bits - 1
    with np.errstate(all="ignore"):
        defined = (v >= 0) & (v < np.inf)
        if not defined.any():
            return v
        shifted = v + F(epsilon)
        known = np.log(np.where(defined, shifted, F(1)).astype(np.float64))
        low, high = known[defined].min(), known[defined].max()
        scale = (high - low) * (1 / top) if high - low >= TINY else 1.0
        code = np.clip(np.round((known - low) / scale), 0, top)
        level = np.exp(code * scale + low).astype(F)
        return np.where(defined, np.maximum(level - F(epsilon), F(0)), v).astype(F)


def reference(scheme: str) -> Callable[[np.ndarray, int, float], np.ndarray]:
    """The reference of a scheme: (vector, bits, epsilon) -> vector."""
    return affine if scheme == "affine" else log

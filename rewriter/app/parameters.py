"""The parameter table of a finalised model: integer codes, and what turns them into values."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from passes.parts import CODE, EPSILON, ORIGIN, SCALE, ZERO_POINT
from passes.quantized_values import Quantized
from rewriter.ir import Error

FORMAT = 1


@dataclass(frozen=True)
class Parameter:
    """What one variable holds.

    ``value = (codes - zero_point) * scale`` in float32; for the scheme log,
    ``value = max(float32(exp(codes * scale + origin)) - epsilon, 0)`` with the exponent in float64. What `exceptions`
    lists has the value given there: NaN, infinities and negative variances are never quantised.

    Attributes:
        variable: the variable's name in the finalised model.
        batch_norm: the layer's name.
        scheme: ``affine``, ``symmetric``, ``power_of_two``, ``log``, or what the user's own function is called.
        bits: the width in force; 0: it was off.
        narrow_range: whether there is one code fewer.
        codes: int32 [C]; None where there are none: the role was off, or a function of the user's quantised it.
        scale: float32, for log float64.
        zero_point: the code of zero.
        origin, epsilon: of the scheme log; else None.
        exceptions: values by position.
        value: the values themselves, [C].
        error: the norm of what rounding changed, to that of the values before.
    """

    variable: str
    batch_norm: str
    role: str
    scheme: str
    bits: int
    narrow_range: bool
    codes: np.ndarray | None
    scale: float | None
    zero_point: int | None
    origin: float | None
    epsilon: float | None
    exceptions: dict[int, float]
    value: np.ndarray
    error: float


def parameter(variable: str, quantized: Quantized) -> Parameter:
    """What a quantiser made of a variable's values."""
    tag, parts, value = quantized.tag, quantized.parts, quantized.value.ravel()
    coded = quantized.bits > 0 and CODE in parts
    scale = parts[SCALE].item() if coded else None
    codes = np.rint(parts[CODE]).astype(np.int32).ravel() if coded else None
    zero = round(parts[ZERO_POINT].item()) if ZERO_POINT in parts else 0
    origin = parts[ORIGIN].item() if coded and ORIGIN in parts else None
    epsilon = parts[EPSILON].item() if coded and EPSILON in parts else None
    made = value if codes is None or scale is None else _dequantized(codes, scale, zero, origin, epsilon)
    differ = np.flatnonzero(~((made.astype(value.dtype) == value) & np.isfinite(value)))
    before = quantized.raw.ravel().astype(np.float64)
    known = np.isfinite(before)
    norm = float(np.linalg.norm(before[known]))
    changed = float(np.linalg.norm((value.astype(np.float64) - before)[known]))
    return Parameter(
        variable=variable,
        batch_norm=tag["batch_norm"],
        role=tag["role"],
        scheme=tag["scheme"],
        bits=quantized.bits,
        narrow_range=bool(tag["narrow_range"]),
        codes=codes,
        scale=scale,
        zero_point=zero if coded else None,
        origin=origin,
        epsilon=epsilon,
        exceptions={int(i): float(value[i]) for i in differ} if coded else {},
        value=value,
        error=changed / norm if norm else 0.0,
    )


def _dequantized(codes: np.ndarray, scale: float, zero: int, origin: float | None, epsilon: float | None) -> np.ndarray:
    """The values of codes, as `Parameter` says."""
    if origin is None or epsilon is None:
        linear: np.ndarray = (codes - zero).astype(np.float32) * np.float32(scale)
        return linear
    shifted = np.exp(codes * np.float64(scale) + np.float64(origin)).astype(np.float32)
    logarithmic: np.ndarray = np.maximum(shifted - np.float32(epsilon), np.float32(0))
    return logarithmic


def write_parameters(file: Path, table: Sequence[Parameter], done: str) -> None:
    """Write parameters to a file: JSON, or arrays by ``VARIABLE.FIELD`` with the variables' names in ``variables``.

    Raises:
        Error: it cannot be written; the message says what was `done` before.
    """
    try:
        file.write_bytes(_json(table) if file.suffix == ".json" else _arrays(table))
    except OSError as e:
        raise Error(f"{done} was written, but the parameters {file} were not: {e.strerror}") from e


def _json(table: Sequence[Parameter]) -> bytes:
    """An object for each variable, on a line of its own."""
    lines = ",\n".join(json.dumps({k: _plain(v) for k, v in asdict(p).items()}) for p in table)
    return f'{{"format": {FORMAT}, "variables": [\n{lines}\n]}}\n'.encode()


def _plain(value: Any) -> Any:
    """As JSON has it, which knows no NaN and no infinity: these become strings."""
    match value:
        case np.ndarray():
            return [_plain(v) for v in value.tolist()]
        case dict():
            return {str(k): _plain(v) for k, v in value.items()}
        case float() if not math.isfinite(value):
            return str(value)
    return value


def _arrays(table: Sequence[Parameter]) -> bytes:
    arrays: dict[str, np.ndarray] = {
        "format": np.array(FORMAT),
        "variables": np.array([p.variable for p in table]),
    }
    for each in table:
        for name, value in asdict(each).items():
            if name == "exceptions":
                arrays[f"{each.variable}.exception_positions"] = np.array(list(value), np.int64)
                arrays[f"{each.variable}.exception_values"] = np.array(list(value.values()), np.float32)
            elif name != "variable" and value is not None:
                narrow = name in ("scale", "origin", "epsilon") and each.origin is None
                arrays[f"{each.variable}.{name}"] = np.asarray(value, np.float32 if narrow else None)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:  # np.savez would note the time
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())
    return written.getvalue()

"""Parameter table of a finalised model: integer codes, scales and zero points."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from passes.deploy.quantized_values import Quantized
from passes.quantization.node_marks import CODE, EPSILON, ORIGIN, SCALE, ZERO_POINT
from rewriter.ir import Error
from rewriter.savedmodel.staging import write_whole

FORMAT = 2

Numbers: TypeAlias = "float | int | np.ndarray"
"""One number, or one for each vector."""


@dataclass(frozen=True)
class Parameter:
    """Quantised values of one variable.

    ``value = (codes - zero_point) * scale`` in float32; for the scheme log,
    ``value = max(float32(exp(codes * scale + origin)) - epsilon, 0)`` with the exponent in float64. Positions in
    `exceptions` have the value given there: NaN, infinities and negative variances are never quantised.

    Codes have the shape of the values; scale, zero point and origin are numbers, or arrays of one for each range, whose
    shape can be broadcast to that of the codes.

    Attributes:
        variable: the variable's name in the finalised model; if several have that name, the layer's name and the role.
        checkpoint_key: the variable's key in the finalised model's checkpoint.
        layer_name: the layer's name.
        scheme: ``affine``, ``symmetric``, ``power_of_two``, ``log``, or the name of the user's own function.
        bits: the width in force; 0: the quantiser was off.
        narrow_range: true if there is one code fewer than 2^bits.
        axis: the axis, or axes, of the channels that have ranges of their own, counted from the end, where the kernel
            takes the values; None for one range.
        codes: int32, those of weights of the least sufficient dtype, such as int8; None if there are none: the role was
            off, or a user's function quantised it.
        scale: float32, for log float64.
        zero_point: the code of zero.
        origin, epsilon: constants of the scheme log; None for other schemes.
        exceptions: values by position.
        value: the values themselves.
        error: the norm of the change by rounding, relative to the norm of the values before.
    """

    variable: str
    checkpoint_key: str
    layer_name: str
    role: str
    scheme: str
    bits: int
    narrow_range: bool
    axis: int | list[int] | None
    codes: np.ndarray | None
    scale: Numbers | None
    zero_point: Numbers | None
    origin: Numbers | None
    epsilon: float | None
    exceptions: dict[int, float]
    value: np.ndarray
    error: float


def parameter(variable: str, key: str, quantized: Quantized) -> Parameter:
    """Return the parameters of a variable, from its values before and after quantisation."""
    tag, value = quantized.tag, quantized.value
    parts = quantized.parts if quantized.bits else {}
    codes = np.rint(np.nan_to_num(parts[CODE])).astype(np.int32) if CODE in parts else None  # NaN has no code
    zero_point = np.rint(parts[ZERO_POINT]).astype(np.int32) if ZERO_POINT in parts else np.array(0, np.int32)
    dequantized = value if codes is None else _dequantized(codes, zero_point, parts)
    exception_positions = np.flatnonzero(~((dequantized.astype(value.dtype) == value) & np.isfinite(value)))
    before = quantized.raw.astype(np.float64)
    finite = np.isfinite(before)
    norm = float(np.linalg.norm(before[finite]))
    change = float(np.linalg.norm(value.astype(np.float64)[finite] - before[finite]))
    return Parameter(
        variable=variable,
        checkpoint_key=key,
        layer_name=tag["layer_name"],
        role=tag["role"],
        scheme=tag["scheme"],
        bits=quantized.bits,
        narrow_range=bool(tag["narrow_range"]),
        axis=tag["axis"],
        codes=codes if codes is None or codes.ndim == 1 else _least_dtype(codes),
        scale=_number_or_array(parts.get(SCALE)),
        zero_point=None if codes is None else _number_or_array(zero_point),
        origin=_number_or_array(parts.get(ORIGIN)),
        epsilon=None if EPSILON not in parts else float(parts[EPSILON]),
        exceptions={} if codes is None else {int(i): float(value.flat[i]) for i in exception_positions},
        value=value,
        error=change / norm if norm else 0.0,
    )


def _least_dtype(codes: np.ndarray) -> np.ndarray:
    """Return codes in the smallest signed or unsigned dtype that holds them."""
    low, high = (int(extreme) for extreme in (codes.min(initial=0), codes.max(initial=0)))
    kinds = ("int8", "uint8", "int16", "uint16", "int32")
    return codes.astype(next(k for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max))


def _number_or_array(array: np.ndarray | None) -> Numbers | None:
    """Return an array, or its element if there is only one."""
    return array if array is None or array.size > 1 else array.item()


def _dequantized(codes: np.ndarray, zero_point: np.ndarray, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return the values of codes, as `Parameter` says."""
    if ORIGIN not in parts:
        linear: np.ndarray = (codes - zero_point).astype(np.float32) * parts[SCALE]
        return linear
    shifted = np.exp(codes * parts[SCALE] + parts[ORIGIN]).astype(np.float32)
    logarithmic: np.ndarray = np.maximum(shifted - parts[EPSILON], np.float32(0))
    return logarithmic


def write_parameters(file: Path, table: Sequence[Parameter], done: str) -> None:
    """Write parameters to a file: JSON, or arrays by ``VARIABLE.FIELD`` with the variables' names in ``variables``.

    Raises:
        Error: the file cannot be written; the message names what was `done` before.
    """
    try:
        write_whole(file, _json(table) if file.suffix == ".json" else _arrays(table))
    except OSError as e:
        raise Error(f"{done} was written, but the parameters {file} were not: {e.strerror}") from e


def _json(table: Sequence[Parameter]) -> bytes:
    """Return the table as JSON: an object for each variable, on a line of its own."""
    lines = ",\n".join(json.dumps({k: _json_value(v) for k, v in asdict(p).items()}) for p in table)
    return f'{{"format": {FORMAT}, "variables": [\n{lines}\n]}}\n'.encode()


def _json_value(value: Any) -> Any:
    """Return a value as JSON can hold it: NaN and infinities become strings."""
    match value:
        case np.ndarray():
            return [_json_value(v) for v in value.tolist()]
        case dict():
            return {str(k): _json_value(v) for k, v in value.items()}
        case float() if not math.isfinite(value):
            return str(value)
    return value


def _arrays(table: Sequence[Parameter]) -> bytes:
    """Return the table as an .npz file."""
    arrays: dict[str, np.ndarray] = {
        "format": np.array(FORMAT),
        "variables": np.array([p.variable for p in table]),
    }
    for row in table:
        for name, value in asdict(row).items():
            if name == "exceptions":
                arrays[f"{row.variable}.exception_positions"] = np.array(list(value), np.int64)
                arrays[f"{row.variable}.exception_values"] = np.array(list(value.values()), np.float32)
            elif name != "variable" and value is not None:
                single_precision = name in ("scale", "origin", "epsilon") and row.origin is None
                arrays[f"{row.variable}.{name}"] = np.asarray(value, np.float32 if single_precision else None)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:  # np.savez would store the current time in the file
        for name, array in arrays.items():
            member = io.BytesIO()
            np.lib.format.write_array(member, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), member.getvalue())
    return buffer.getvalue()

"""Arrays that a user supplies: read from a file, fitted to what a function takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np

from rewriter.ir import Error

Arrays = Mapping[str, np.ndarray]

NPY = b"\x93NUMPY"
"""How a file of one array without a name begins. What begins otherwise NumPy takes for a pickle, and says so."""


def arrays(file: Path) -> dict[str, np.ndarray]:
    """The arrays in an .npz file, by name.

    Raises:
        Error: it is no such file, or holds something else.
    """
    try:
        with file.open("rb") as opened:
            first = opened.read(len(NPY))
        if first != NPY and not is_zipfile(file):
            raise Error(f"{file} is no .npz file of arrays; write one with numpy.savez")
        held = np.load(file)
        if isinstance(held, np.ndarray):
            raise Error(f"{file} holds one array without a name; write it with numpy.savez")
        with held:
            found = {name: held[name] for name in held.files}
    except Error:
        raise
    except Exception as e:  # of damaged files NumPy, zipfile and zlib raise a dozen kinds
        raise Error(f"{file} is no .npz file of arrays: {e}") from e
    for name, value in found.items():
        if not isinstance(value, np.ndarray):
            raise Error(f"{file} is no .npz file of arrays: {name!r} in it is none")
    return found


def fitted(inputs: Arrays, specs: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """Given arrays as what tensors by name are fed with; None where the names are others.

    Raises:
        Error: an array has another shape, is empty, or cannot have the dtype.
    """
    import tensorflow as tf

    given = dict(zip(specs, inputs.values(), strict=True)) if len(specs) == len(inputs) == 1 else dict(inputs)
    if set(given) != set(specs):
        return None
    for name, spec in specs.items():
        value, dtype = np.asarray(given[name]), tf.as_dtype(spec.dtype)
        if not spec.shape.is_compatible_with(value.shape):
            raise Error(f"the input {name} is to have the shape {spec.shape}, not {value.shape}")
        if not value.size and spec.shape.num_elements() != 0:
            raise Error(f"the input {name} holds no values: its shape is {value.shape}")
        if value.dtype.kind not in _kinds(dtype):
            raise Error(f"the input {name} is to have the dtype {dtype.name}, not {value.dtype}")
        given[name] = value.astype(dtype.as_numpy_dtype)
    return given


def odd_values(inputs: Arrays) -> Iterator[str]:
    """Sentences on arrays that may make a sound model look broken: not finite, or of one value."""
    for name, value in inputs.items():
        array = np.asarray(value)
        if array.dtype.kind != "f" or array.size <= 1:
            continue
        if not np.isfinite(array).all():
            yield f"the input {name} is not finite in places, which may spread to outputs, statistics and gradients"
        elif array.min() == array.max():
            yield f"the input {name} holds one value only, with which statistics and gradients may stay as they are"


def _kinds(dtype: Any) -> str:
    """The kinds of NumPy's dtypes that are taken for one of TensorFlow's."""
    if dtype.name == "string":
        return "OSU"
    return "biufc" if dtype.is_complex else "biuf"

"""Arrays that a user supplies: read from a file, and fitted to a function's inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np

from rewriter.ir import Error

Arrays = Mapping[str, np.ndarray]

NPY = b"\x93NUMPY"
"""First bytes of an .npy file, one array without a name. NumPy takes other files for pickles, and says so."""


def arrays(file: Path) -> dict[str, np.ndarray]:
    """Return the arrays in an .npz file, by name.

    Raises:
        Error: the file is no .npz file, or holds something other than arrays.
    """
    try:
        with file.open("rb") as opened:
            first = opened.read(len(NPY))
        if first != NPY and not is_zipfile(file):
            raise Error(f"{file} is no .npz file of arrays; write one with numpy.savez")
        archive = np.load(file)
        if isinstance(archive, np.ndarray):
            raise Error(f"{file} holds one array without a name; write it with numpy.savez")
        with archive:
            contents = {name: archive[name] for name in archive.files}
    except Error:
        raise
    except Exception as e:  # NumPy, zipfile and zlib raise a dozen kinds for damaged files
        raise Error(f"{file} is no .npz file of arrays: {e}") from e
    for name, value in contents.items():
        if not isinstance(value, np.ndarray):
            raise Error(f"{file} is no .npz file of arrays: {name!r} in it is none")
    return contents


def fitted(inputs: Arrays, specs: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
    """Return the arrays as feeds of named tensors, in their dtypes; None if the names differ.

    Raises:
        Error: an array has another shape, is empty, or cannot have the dtype.
    """
    import tensorflow as tf

    feeds = dict(zip(specs, inputs.values(), strict=True)) if len(specs) == len(inputs) == 1 else dict(inputs)
    if set(feeds) != set(specs):
        return None
    for name, spec in specs.items():
        value, dtype = np.asarray(feeds[name]), tf.as_dtype(spec.dtype)
        if not spec.shape.is_compatible_with(value.shape):
            raise Error(f"the input {name} is to have the shape {spec.shape}, not {value.shape}")
        if not value.size and spec.shape.num_elements() != 0:
            raise Error(f"the input {name} holds no values: its shape is {value.shape}")
        if value.dtype.kind not in _kinds(dtype):
            raise Error(f"the input {name} is to have the dtype {dtype.name}, not {value.dtype}")
        feeds[name] = value.astype(dtype.as_numpy_dtype)
    return feeds


def unfit(inputs: Arrays, specs: Mapping[str, Any]) -> str:
    """Return the reason for which arrays are not a function's inputs by name: what is missing, or what it takes."""
    takes = f"takes {', '.join(specs) or 'nothing'}"
    missing = [name for name in specs if name not in inputs]
    if missing and inputs.keys() <= specs.keys() and inputs:
        return f"{takes}; {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    return f"{takes}, not {', '.join(inputs) or 'nothing'}"


def refuse_not_finite(inputs: Arrays) -> None:
    """Refuse arrays of which NaN or infinity would spread to outputs, statistics and gradients.

    Raises:
        Error: there is one.
    """
    for name, value in inputs.items():
        array = np.asarray(value)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise Error(f"the input {name} is not finite in places, which would spread to all that is compared")


def uniform_values(inputs: Arrays) -> Iterator[str]:
    """Yield sentences on arrays that may make a sound model look broken, as they hold one value only."""
    for name, value in inputs.items():
        array = np.asarray(value)
        if array.dtype.kind == "f" and array.size > 1 and array.min() == array.max():
            yield f"the input {name} holds one value only, with which statistics and gradients may stay as they are"


def _kinds(dtype: Any) -> str:
    """Return the kinds of NumPy dtypes that are accepted for a TensorFlow dtype."""
    if dtype.name == "string":
        return "OSU"
    return "biufc" if dtype.is_complex else "biuf"

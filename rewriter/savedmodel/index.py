"""The index of a checkpoint, looked at before TensorFlow reads it: on some values it ends the process.

Source: ``tensorflow/core/util/tensor_bundle`` and ``tensorflow/core/lib/io/table_format.txt``. An index is a table of
sorted strings: the empty key holds a ``BundleHeaderProto``, each other one a ``BundleEntryProto``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import tensor_bundle_pb2
from tensorflow.python.framework import dtypes

from rewriter.ir import Error

FOOTER = 48
"""Bytes at the end: where the blocks of meta data and of the index are, and the magic number."""

REFERENCES = 100
"""What the numbers of dtypes of references are above."""

MAGIC = 0xDB4775248B80FB57


def refuse_index(file: Path, available: int) -> None:
    """Refuse an index with dtypes that do not exist, or tensors that are larger than the data.

    Args:
        file: the index.
        available: bytes of all data files.

    Raises:
        Error: names the tensor and what is wrong with it.
    """
    try:
        known = [(key, tensor_bundle_pb2.BundleEntryProto.FromString(value)) for key, value in entries(file) if key]
    except (IndexError, ValueError, struct.error, DecodeError) as e:
        raise Error(f"the checkpoint's index {file} is damaged") from e
    for key, entry in known:
        why = _wrong(entry, available)
        if why:
            tensor = key.decode(errors="replace")
            raise Error(f"the checkpoint's index {file} is damaged, or its data: the tensor {tensor!r} has {why}")


def _wrong(entry: Any, available: int) -> str:
    try:
        dtype = dtypes.as_dtype(entry.dtype)
    except TypeError:
        return f"the dtype {entry.dtype}, which does not exist"
    if entry.dtype > REFERENCES or dtype == dtypes.resource:
        return f"the dtype {dtype.name}, of which no value is stored"
    sizes = [dim.size for dim in entry.shape.dim]
    if entry.shape.unknown_rank or any(size < 0 for size in sizes):
        return "a shape that is none"
    least = math.prod(sizes) * (dtype.size or 1)  # of a string, its length takes a byte
    if least > available or (least > entry.size and not entry.slices):
        return f"the shape {sizes}, and less data"
    return ""


def entries(file: Path) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a table, in order.

    Raises:
        IndexError, ValueError, struct.error: it is damaged.
    """
    data = file.read_bytes()
    if len(data) < FOOTER or struct.unpack("<Q", data[-8:]) != (MAGIC,):
        raise ValueError("no table")
    footer = data[-FOOTER:]
    _, position = _handle(footer, 0)
    (start, size), _ = _handle(footer, position)
    for _, place in _block(data, start, size):
        (start, size), _ = _handle(place, 0)
        yield from _block(data, start, size)


def _block(data: bytes, start: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a block; what a key has in common with the one before is not written again."""
    block = data[start : start + size]
    if len(block) != size or data[start + size]:
        raise ValueError("a block that is cut off, or compressed, as none is that TensorFlow writes")
    (restarts,) = struct.unpack("<I", block[-4:])
    end, position, key = size - 4 * (restarts + 1), 0, b""
    while position < end:
        shared, position = _varint(block, position)
        own, position = _varint(block, position)
        length, position = _varint(block, position)
        key = key[:shared] + block[position : position + own]
        position += own
        yield key, block[position : position + length]
        position += length


def _handle(data: bytes, position: int) -> tuple[tuple[int, int], int]:
    start, position = _varint(data, position)
    size, position = _varint(data, position)
    return (start, size), position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004  the highest bit says that there is more
            return value, position
        shift += 7
        if shift > 63:  # noqa: PLR2004  bits of the largest number
            raise ValueError("no number")

"""Checks of a checkpoint's index before TensorFlow reads it: some damaged values make TensorFlow end the process.

Source: ``tensorflow/core/util/tensor_bundle`` and ``tensorflow/core/lib/io/table_format.txt``. An index is a table of
sorted strings: the empty key holds a ``BundleHeaderProto``, every other key a ``BundleEntryProto``.
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
"""Size in bytes of the footer: the handles of the metaindex and index blocks, and the magic number."""

REFERENCES = 100
"""Lower bound of the numbers of reference dtypes (``DT_FLOAT_REF`` is 101)."""

MAGIC = 0xDB4775248B80FB57


def refuse_index(file: Path, available: int) -> None:
    """Refuse an index with dtypes that do not exist, or tensors that are larger than the data.

    Args:
        file: the index.
        available: total size of all data files in bytes.

    Raises:
        Error: the index is damaged; the message names the tensor and what is wrong with it.
    """
    try:
        tensors = [(key, tensor_bundle_pb2.BundleEntryProto.FromString(value)) for key, value in entries(file) if key]
    except (IndexError, ValueError, struct.error, DecodeError) as e:
        raise Error(f"the checkpoint's index {file} is damaged") from e
    for key, entry in tensors:
        fault = _fault(entry, available)
        if fault:
            tensor = key.decode(errors="replace")
            raise Error(f"the checkpoint's index {file} is damaged, or its data: the tensor {tensor!r} has {fault}")


def _fault(entry: Any, available: int) -> str:
    try:
        dtype = dtypes.as_dtype(entry.dtype)
    except TypeError:
        return f"the dtype {entry.dtype}, which does not exist"
    if entry.dtype > REFERENCES or dtype == dtypes.resource:
        return f"the dtype {dtype.name}, of which no value is stored"
    sizes = [dim.size for dim in entry.shape.dim]
    if entry.shape.unknown_rank or any(size < 0 for size in sizes):
        return "a shape that is none"
    min_bytes = math.prod(sizes) * (dtype.size or 1)  # dtype.size of a string is None; its length alone takes a byte
    # An entry with slices describes a whole tensor; its data belongs to the slices, which have entries of their own.
    if min_bytes > available or (min_bytes > entry.size and not entry.slices):
        return f"the shape {sizes}, and less data"
    return ""


def entries(file: Path) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a table, in order.

    Raises:
        IndexError, ValueError, struct.error: the table is damaged.
    """
    data = file.read_bytes()
    if len(data) < FOOTER or struct.unpack("<Q", data[-8:]) != (MAGIC,):
        raise ValueError("no table")
    footer = data[-FOOTER:]
    _, position = _handle(footer, 0)
    (start, size), _ = _handle(footer, position)
    for _, handle in _block(data, start, size):
        (start, size), _ = _handle(handle, 0)
        yield from _block(data, start, size)


def _block(data: bytes, start: int, size: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a block.

    Keys are prefix-compressed: an entry holds the length of the prefix shared with the previous key, and the rest. The
    block ends with the array of its restart points.
    """
    block = data[start : start + size]
    if len(block) != size or data[start + size]:  # the byte after a block is its compression type; 0 is none
        raise ValueError("a block that is cut off, or compressed, as none is that TensorFlow writes")
    (restarts,) = struct.unpack("<I", block[-4:])
    end, position, key = size - 4 * (restarts + 1), 0, b""
    while position < end:
        shared, position = _varint(block, position)
        unshared, position = _varint(block, position)
        length, position = _varint(block, position)
        key = key[:shared] + block[position : position + unshared]
        position += unshared
        yield key, block[position : position + length]
        position += length


def _handle(data: bytes, position: int) -> tuple[tuple[int, int], int]:
    start, position = _varint(data, position)
    size, position = _varint(data, position)
    return (start, size), position


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """Return a varint (seven bits per byte, the lowest first), and the position after it."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004  the highest bit says that another byte follows
            return value, position
        shift += 7
        if shift > 63:  # noqa: PLR2004  the highest shift within 64 bits
            raise ValueError("no number")

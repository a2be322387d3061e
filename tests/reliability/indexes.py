"""Edited indexes of checkpoints, with correct checksums."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorflow.core.protobuf import tensor_bundle_pb2

from rewriter.savedmodel import index


def _crc(data: bytes) -> int:
    """Masked CRC-32C (RFC 3720), as LevelDB's table format stores it."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    value ^= 0xFFFFFFFF
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(number: int) -> bytes:
    encoded = b""
    while number > 0x7F:
        encoded += bytes([number & 0x7F | 0x80])
        number >>= 7
    return encoded + bytes([number])


def _written(entries: list[tuple[bytes, bytes]], kind: int = 0) -> bytes:
    """Return a table with one block of entries and correct checksums."""
    data = b""

    def placed(block_entries: list[tuple[bytes, bytes]]) -> bytes:
        nonlocal data
        offsets, block = [], b""
        for key, value in block_entries:
            offsets.append(len(block))
            block += _varint(0) + _varint(len(key)) + _varint(len(value)) + key + value
        offsets = offsets or [0]
        block += struct.pack(f"<{len(offsets)}I", *offsets) + struct.pack("<I", len(offsets))
        handle = _varint(len(data)) + _varint(len(block))
        block += bytes([kind])
        data += block + struct.pack("<I", _crc(block))
        return handle

    place = placed(entries)
    footer = placed([]) + placed([(entries[-1][0] + b"\xff", place)])
    return data + footer.ljust(40, b"\0") + struct.pack("<Q", index.MAGIC)


def edited(source: Path, target: Path, edit: Callable[[bytes, Any], None], kind: int = 0) -> Path:
    """Copy a model and change entries of its checkpoint's index."""
    shutil.copytree(source, target)
    edit_index(target / "variables" / "variables.index", edit, kind)
    return target


def edit_index(file: Path, edit: Callable[[bytes, Any], None], kind: int = 0) -> None:
    """Change entries of an index; the entry with the empty key is its header."""
    entries = []
    for key, value in index.entries(file):
        kinds = tensor_bundle_pb2.BundleEntryProto if key else tensor_bundle_pb2.BundleHeaderProto
        entry = kinds.FromString(value)
        edit(key, entry)
        entries.append((key, entry.SerializeToString()))
    file.write_bytes(_written(entries, kind))

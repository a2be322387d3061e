"""Indexes of checkpoints that TensorFlow would not survive, or that send it elsewhere."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorflow.core.protobuf import tensor_bundle_pb2

from rewriter.ir import Error
from rewriter.savedmodel import index
from tests.mutate import with_value
from tests.reliability.forks import Server
from tests.reliability.trials import judged

Paths = Callable[[str], Path]
KEY = b"variables/2/.ATTRIBUTES/VARIABLE_VALUE"
OBJECTS = b"_CHECKPOINTABLE_OBJECT_GRAPH"


def _crc(data: bytes) -> int:
    """The masked CRC-32C of RFC 3720, as a table of sorted strings has it."""
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    value ^= 0xFFFFFFFF
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _varint(number: int) -> bytes:
    found = b""
    while number > 0x7F:
        found += bytes([number & 0x7F | 0x80])
        number >>= 7
    return found + bytes([number])


def _written(entries: list[tuple[bytes, bytes]], kind: int = 0) -> bytes:
    """A table with one block of entries; its checksums are right."""
    data = b""

    def placed(held: list[tuple[bytes, bytes]]) -> bytes:
        nonlocal data
        offsets, block = [], b""
        for key, value in held:
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


def _edited(source: Path, target: Path, edit: Callable[[bytes, Any], None], kind: int = 0) -> Path:
    """A copy of a model with entries of its checkpoint's index changed."""
    shutil.copytree(source, target)
    file = target / "variables" / "variables.index"
    entries = []
    for key, value in index._entries(file):
        entry = tensor_bundle_pb2.BundleEntryProto.FromString(value)
        if key:
            edit(key, entry)
        entries.append((key, entry.SerializeToString() if key else value))
    file.write_bytes(_written(entries, kind))
    return target


def _shape(entry: Any, *sizes: int) -> None:
    entry.shape.Clear()
    for size in sizes:
        entry.shape.dim.add().size = size


DAMAGE: dict[str, Callable[[bytes, Any], None]] = {
    "has the dtype 0, which does not exist": lambda k, e: setattr(e, "dtype", 0) if k == KEY else None,
    "has the dtype 999": lambda k, e: setattr(e, "dtype", 999) if k == KEY else None,
    "has a shape that is none": lambda k, e: _shape(e, -5) if k == KEY else None,
    "has the shape [1099511627776, 1099511627776]": lambda k, e: _shape(e, 1 << 40, 1 << 40) if k == KEY else None,
    "has the shape [268435456], and less data": lambda k, e: _shape(e, 1 << 28) if k == OBJECTS else None,
}


@pytest.mark.parametrize("why", sorted(DAMAGE))
def test_what_would_end_tensorflow(forks: Server, model: Paths, tmp_path: Path, why: str) -> None:
    source = _edited(model("keras_export"), tmp_path / "source", DAMAGE[why])
    for arguments in (("inspect", source), ("rewrite", source, tmp_path / "target"), ("diff", source, source)):
        outcome = forks.cli(*arguments, limit=10, mib=1500)
        assert judged(outcome, str(arguments)) == "refused"
        assert why in outcome.err


def test_an_index_written_by_hand_is_read(forks: Server, model: Paths, tmp_path: Path) -> None:
    """What the other tests rest on: it is their damage that is refused."""
    source = _edited(model("keras_export"), tmp_path / "source", lambda _key, _entry: None)
    assert judged(forks.cli("rewrite", source, tmp_path / "target"), "rewrite") == "done"


def test_compressed_blocks(forks: Server, model: Paths, tmp_path: Path) -> None:
    source = _edited(model("keras_export"), tmp_path / "source", lambda _key, _entry: None, kind=1)
    outcome = forks.cli("inspect", source)
    assert judged(outcome, "inspect") == "refused"
    assert "variables.index is damaged" in outcome.err


def test_damaged_bytes(model: Paths, tmp_path: Path) -> None:
    whole = (model("module_train") / "variables" / "variables.index").read_bytes()
    file = tmp_path / "variables.index"
    for size in range(0, len(whole), 7):
        file.write_bytes(whole[:size])
        with pytest.raises(Error, match="is damaged"):
            index.refuse_index(file, 1 << 20)
        file.write_bytes(whole[:size] + b"\x80" * 20 + whole[size + 20 :])
        with suppress(Error):  # some damage is to padding, or what is not looked at
            index.refuse_index(file, 1 << 20)


def test_another_checkpoint_is_not_followed(forks: Server, model: Paths, tmp_path: Path) -> None:
    """A directory of the checkpoint's name may hold a file that names another one, which TensorFlow reads then."""
    key = "variables/0/.ATTRIBUTES/VARIABLE_VALUE"
    outside = with_value(model("keras_export"), tmp_path / "outside", key, lambda v: np.full_like(v, 1234.5))
    source = tmp_path / "source"
    shutil.copytree(model("keras_export"), source)
    (source / "variables" / "variables").mkdir()
    prefix = outside / "variables" / "variables"
    (source / "variables" / "variables" / "checkpoint").write_text(f'model_checkpoint_path: "{prefix}"\n')
    for arguments in (("inspect", source), ("rewrite", source, tmp_path / "target")):
        outcome = forks.cli(*arguments)
        assert judged(outcome, str(arguments)) == "refused"
        assert "is a directory, where TensorFlow looks for another checkpoint" in outcome.err

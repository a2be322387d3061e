"""The files of a SavedModel: that they are its own, and that they stay the same while it is read."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import meta_graph_pb2

from rewriter.ir import Error

V1_ASSETS = "saved_model_assets"
"""The collection in which TensorFlow 1 keeps what an ``AssetFileDef`` of the meta graph says now."""

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What a terminal obeys, or what turns text around."""

Stamps: TypeAlias = Mapping[str, tuple[int, int, int]]
"""Each file's path in the model, with its number, size in bytes and time of change in nanoseconds."""


def stamps(model: Path) -> Stamps:
    """What identifies the content of each file in a directory.

    Raises:
        Error: one is neither file nor directory, a link that leads out of the directory or to another one, or cannot
            be looked at, or its name holds what cannot be printed.
    """
    root = model.resolve()
    found = {}
    try:
        for folder, folders, files in os.walk(root):
            for name in (*folders, *files):
                path = Path(folder) / name
                held = _own(root, path)
                if stat.S_ISREG(held.st_mode):
                    found[str(path.relative_to(root))] = (held.st_ino, held.st_size, held.st_mtime_ns)
    except OSError as e:
        raise Error(f"{model} cannot be read: {e.filename}: {e.strerror}") from e
    except RecursionError:
        raise Error(f"{model} holds directories that are nested too deep") from None
    return found


def _own(root: Path, path: Path) -> os.stat_result:
    """What the system says of a file or directory of a model.

    Raises:
        Error: it is not of the model alone.
        OSError: it cannot be looked at.
    """
    if CONTROL.search(path.name):
        raise Error(f"{root} holds a file with unprintable characters in its name, {path.name!r}; rename it")
    if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(root)):
        raise Error(
            f"{path} is a link to {os.readlink(path)!r}, which is no file of the model; copy the model with what its "
            "links lead to (cp -rL), if you trust it"
        )
    held = path.stat()
    if not stat.S_ISREG(held.st_mode) and not stat.S_ISDIR(held.st_mode):
        raise Error(f"{path} is neither a file nor a directory; remove it from the model")
    return held


def refuse_names(model: Path, meta: Any) -> None:
    """Refuse names in a meta graph that cannot be printed, and assets that are no files of the model.

    Raises:
        Error: there is one.
    """
    for name in _names(meta):
        if CONTROL.search(name):
            raise Error(f"{model} holds a name with unprintable characters, {name!r}, which a terminal would obey")
    for name in _assets(meta):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or CONTROL.search(name):
            raise Error(f"{model} has a file outside of itself as an asset, {name!r}; it is not safe to load")


def _names(meta: Any) -> Iterator[str]:
    """Whatever a report may print."""
    yield from meta.meta_info_def.tags
    for graph in (meta.graph_def.node, *(f.node_def for f in meta.graph_def.library.function)):
        for node in graph:
            yield node.name
            yield node.op
    for function in meta.graph_def.library.function:
        yield function.signature.name
        yield from (a.name for a in (*function.signature.input_arg, *function.signature.output_arg))
    for name, signature in meta.signature_def.items():
        yield from (name, *signature.inputs, *signature.outputs)
    for held in meta.object_graph_def.nodes:
        yield from (c.local_name for c in held.children)
        yield held.variable.name


def _assets(meta: Any) -> Iterator[str]:
    yield from (asset.filename for asset in meta.asset_file_def)
    for held in meta.collection_def[V1_ASSETS].any_list.value if V1_ASSETS in meta.collection_def else ():
        asset = meta_graph_pb2.AssetFileDef()
        try:
            held.Unpack(asset)
        except DecodeError as e:
            raise Error(f"the collection {V1_ASSETS!r} holds something other than assets") from e
        yield asset.filename

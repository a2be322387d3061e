"""Checks of a SavedModel's files: all lie in its directory, and none changes while the model is read."""

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
"""Collection of TensorFlow 1 with the assets; newer models list them in the meta graph's ``asset_file_def``."""

CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters, which a terminal obeys, and marks that change the direction of text."""

Stamps: TypeAlias = Mapping[str, tuple[int, int, int]]
"""Path of each file in the model -> inode number, size in bytes, modification time in nanoseconds."""


def stamps(model: Path) -> Stamps:
    """Return the stamps of all files below a directory; if a file's content changes, so does its stamp.

    Raises:
        Error: an entry is neither file nor directory, cannot be read, has unprintable characters in its name, or is
            a link that leads out of the directory or to a directory.
    """
    root = model.resolve()
    by_path = {}
    try:
        for folder, folders, files in os.walk(root):
            # os.walk lists links to directories among the folders, and does not follow them.
            for name in (*folders, *files):
                path = Path(folder) / name
                status = _checked_status(root, path)
                if stat.S_ISREG(status.st_mode):
                    by_path[str(path.relative_to(root))] = (status.st_ino, status.st_size, status.st_mtime_ns)
    except OSError as e:
        raise Error(f"{model} cannot be read: {e.filename}: {e.strerror}") from e
    except RecursionError:
        raise Error(f"{model} holds directories that are nested too deep") from None
    return by_path


def _checked_status(root: Path, path: Path) -> os.stat_result:
    """Return the `os.stat` result of a file or directory of a model.

    Raises:
        Error: its name is unprintable, it is a link that leads elsewhere, or it is neither file nor directory.
        OSError: the system cannot read it.
    """
    if CONTROL.search(path.name):
        raise Error(f"{root} holds a file with unprintable characters in its name, {path.name!r}; rename it")
    if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(root)):
        raise Error(
            f"{path} is a link to {os.readlink(path)!r}, which is no file of the model; copy the model with what its "
            "links lead to (cp -rL), if you trust it"
        )
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise Error(f"{path} is neither a file nor a directory; remove it from the model")
    return status


def refuse_names(model: Path, meta: Any) -> None:
    """Refuse unprintable names in a meta graph, and assets whose paths lead out of the model.

    Raises:
        Error: there is one; the message holds the name.
    """
    for name in _names(meta):
        if CONTROL.search(name):
            raise Error(f"{model} holds a name with unprintable characters, {name!r}, which a terminal would obey")
    for name in _assets(meta):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or CONTROL.search(name):
            raise Error(f"{model} has a file outside of itself as an asset, {name!r}; it is not safe to load")


def _names(meta: Any) -> Iterator[str]:
    """Yield every name of a meta graph that a report may print."""
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
    for saved_object in meta.object_graph_def.nodes:
        yield from (c.local_name for c in saved_object.children)
        yield saved_object.variable.name


def _assets(meta: Any) -> Iterator[str]:
    yield from (asset.filename for asset in meta.asset_file_def)
    for packed in meta.collection_def[V1_ASSETS].any_list.value if V1_ASSETS in meta.collection_def else ():
        asset = meta_graph_pb2.AssetFileDef()
        try:
            packed.Unpack(asset)
        except DecodeError as e:
            raise Error(f"the collection {V1_ASSETS!r} holds something other than assets") from e
        yield asset.filename

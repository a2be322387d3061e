"""Copying a checkpoint with some tensors replaced or added, a bounded piece at a time.

Source: ``tensorflow/core/util/tensor_bundle``. Shards of bounded size are written with SaveV2 and joined
with MergeV2Checkpoints, which moves data files and writes one index.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rewriter.ir import Error
from rewriter.savedmodel.index import refuse_index

SHARD_BYTES = 32 << 20
"""Tensors are copied in groups of at most this size; a larger tensor is a group of its own."""

_SHARD = re.compile(r"\.data-(\d{5})-of-(\d{5})$")


class Checkpoint:
    """A checkpoint to read, by prefix.

    Attributes:
        shapes: each tensor's shape.
        dtypes: each tensor's TensorFlow dtype.
    """

    def __init__(self, prefix: Path) -> None:
        import tensorflow as tf

        self.prefix = prefix
        refuse_index(prefix.with_name(f"{prefix.name}.index"), _require_shards(prefix))
        try:
            # Not tf.train.load_checkpoint, which follows the names in a file beside it.
            self._reader: Any = tf.compat.v1.train.NewCheckpointReader(str(prefix))
            self.shapes: Mapping[str, list[int]] = self._reader.get_variable_to_shape_map()
            self.dtypes: Mapping[str, Any] = self._reader.get_variable_to_dtype_map()
        except (ValueError, IndexError, RuntimeError, tf.errors.OpError) as e:
            raise Error(f"cannot read the checkpoint {prefix}: {_first_line(e)}") from e

    def bytes_of(self, key: str) -> bytes:
        """A scalar string tensor.

        Raises:
            Error: it cannot be read.
        """
        value: bytes = self.tensor(key)
        return value

    def tensor(self, key: str) -> Any:
        """A tensor, as a NumPy array.

        Raises:
            Error: it cannot be read.
        """
        import tensorflow as tf

        try:
            value: Any = self._reader.get_tensor(key)
        except (ValueError, IndexError, RuntimeError, tf.errors.OpError) as e:
            raise Error(f"cannot read {key} from the checkpoint {self.prefix}: {_first_line(e)}") from e
        return value

    def groups(self, skip: set[str]) -> Iterator[list[str]]:
        """The tensors' names, sorted, in groups of bounded size."""
        group: list[str] = []
        size = 0
        for key in sorted(set(self.shapes) - skip):
            itemsize = max(1, self.dtypes[key].size or 8)
            count = int(np.prod(self.shapes[key], dtype=np.int64)) * itemsize
            if group and size + count > SHARD_BYTES:
                yield group
                group, size = [], 0
            group.append(key)
            size += count
        if group:
            yield group


def _first_line(e: Exception) -> str:
    return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__


def _require_shards(prefix: Path) -> int:
    """The bytes of all data files.

    Raises:
        Error: one is missing, or TensorFlow would take something else for the checkpoint.
    """
    if prefix.is_dir():
        raise Error(f"{prefix} is a directory, where TensorFlow looks for another checkpoint; remove it")
    if not prefix.with_name(prefix.name + ".index").is_file():
        raise Error(f"there is no checkpoint {prefix} (its .index file is missing)")
    found: dict[int, set[int]] = {}
    size = 0
    for path in prefix.parent.glob(f"{prefix.name}.data-*"):
        match = _SHARD.search(path.name)
        if match:
            found.setdefault(int(match[2]), set()).add(int(match[1]))
            size += path.stat().st_size
    if not any(have == set(range(count)) for count, have in found.items()):
        raise Error(f"the checkpoint {prefix} lacks at least one of its .data files")
    return size


def copy(
    source: Checkpoint | None, target: Path, changed: Mapping[str, Any], keys: Collection[str] | None = None
) -> None:
    """Write `source` to the prefix `target` with the tensors of `changed` replaced or added.

    Where there is no source, these are all. With `keys`, only they are taken from the source.

    Raises:
        Error: a tensor cannot be read, or the files cannot be written.
    """
    import tensorflow as tf

    parts: list[str] = []

    def save(tensors: Mapping[str, Any]) -> None:
        prefix = str(target.parent / f"part-{len(parts):05d}" / "part")
        tf.raw_ops.SaveV2(
            prefix=prefix,
            tensor_names=list(tensors),
            shape_and_slices=[""] * len(tensors),
            tensors=list(tensors.values()),
        )
        parts.append(prefix)

    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tf.device("cpu:0"):
            if source is not None:
                skip = set() if keys is None else set(source.shapes) - set(keys)
                for group in source.groups(skip | set(changed)):
                    save(dict(zip(group, _read(source, group), strict=True)))
            if changed:
                save({k: tf.constant(v) for k, v in sorted(changed.items())})
            tf.raw_ops.MergeV2Checkpoints(
                checkpoint_prefixes=parts, destination_prefix=str(target), delete_old_dirs=True
            )
    except (OSError, tf.errors.OpError) as e:
        raise Error(f"cannot copy the checkpoint {source.prefix if source else target}: {_first_line(e)}") from e


def _read(source: Checkpoint, keys: list[str]) -> list[Any]:
    import tensorflow as tf

    tensors: list[Any] = tf.raw_ops.RestoreV2(
        prefix=str(source.prefix),
        tensor_names=keys,
        shape_and_slices=[""] * len(keys),
        dtypes=[source.dtypes[k] for k in keys],
    )
    return tensors

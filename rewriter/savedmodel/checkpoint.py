"""Reading a checkpoint, and copying it in bounded groups with some tensors replaced or added.

Source: ``tensorflow/core/util/tensor_bundle``. SaveV2 writes each group as a checkpoint of its own. MergeV2Checkpoints
joins them: it moves the data files and writes one index.
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
"""Largest size in bytes of a group of tensors that is copied at once; a larger tensor is a group of its own."""

_SHARD = re.compile(r"\.data-(\d{5})-of-(\d{5})$")


class Checkpoint:
    """A checkpoint to read.

    Attributes:
        prefix: the path of its files up to ``.index`` and ``.data-…``.
        shapes: each tensor's shape, by key.
        dtypes: each tensor's TensorFlow dtype, by key.
    """

    def __init__(self, prefix: Path) -> None:
        import tensorflow as tf

        self.prefix = prefix
        refuse_index(prefix.with_name(f"{prefix.name}.index"), _require_shards(prefix))
        try:
            # Not tf.train.load_checkpoint: if the prefix is also a directory, it follows the file "checkpoint" there.
            self._reader: Any = tf.compat.v1.train.NewCheckpointReader(str(prefix))
            self.shapes: Mapping[str, list[int]] = self._reader.get_variable_to_shape_map()
            self.dtypes: Mapping[str, Any] = self._reader.get_variable_to_dtype_map()
        except (ValueError, IndexError, RuntimeError, tf.errors.OpError) as e:
            raise Error(f"cannot read the checkpoint {prefix}: {_first_line(e)}") from e

    def bytes_of(self, key: str) -> bytes:
        """Return the bytes of a scalar string tensor.

        Raises:
            Error: it cannot be read.
        """
        value: bytes = self.tensor(key)
        return value

    def tensor(self, key: str) -> Any:
        """Return a tensor as a NumPy array.

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
        """Yield the sorted keys of all tensors but those to skip, in groups of at most `SHARD_BYTES`."""
        group: list[str] = []
        size = 0
        for key in sorted(set(self.shapes) - skip):
            # Strings have no size.
            itemsize = max(1, self.dtypes[key].size or 8)
            nbytes = int(np.prod(self.shapes[key], dtype=np.int64)) * itemsize
            if group and size + nbytes > SHARD_BYTES:
                yield group
                group, size = [], 0
            group.append(key)
            size += nbytes
        if group:
            yield group


def _first_line(e: Exception) -> str:
    return str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__


def _require_shards(prefix: Path) -> int:
    """Return the total size of all data files in bytes.

    Raises:
        Error: a file is missing, or TensorFlow would take something else for the checkpoint.
    """
    if prefix.is_dir():
        raise Error(f"{prefix} is a directory, where TensorFlow looks for another checkpoint; remove it")
    if not prefix.with_name(prefix.name + ".index").is_file():
        raise Error(f"there is no checkpoint {prefix} (its .index file is missing)")
    shards: dict[int, set[int]] = {}
    size = 0
    for path in prefix.parent.glob(f"{prefix.name}.data-*"):
        match = _SHARD.search(path.name)
        if match:
            shards.setdefault(int(match[2]), set()).add(int(match[1]))
            size += path.stat().st_size
    # Shards of another checkpoint, of another number, may have been left beside them.
    if not any(present == set(range(count)) for count, present in shards.items()):
        raise Error(f"the checkpoint {prefix} lacks at least one of its .data files")
    return size


def copy(
    source: Checkpoint | None, target: Path, changed: Mapping[str, Any], keys: Collection[str] | None = None
) -> None:
    """Write a copy of a checkpoint with some tensors replaced or added.

    Args:
        source: the checkpoint to copy; without one, only the changed tensors are written.
        target: the prefix of the copy.
        changed: the tensors to replace or add, by key.
        keys: the tensors to take from the source; None stands for all.

    Raises:
        Error: a tensor cannot be read, or the files cannot be written.
    """
    import tensorflow as tf

    parts: list[str] = []

    def save(tensors: Mapping[str, Any]) -> None:
        # A directory for each part, as MergeV2Checkpoints removes the directories that hold the parts.
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

"""Destination paths: a destination is written whole or not at all, and never over what is no SavedModel."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rewriter.ir import Error
from rewriter.savedmodel.beside import ASIDE_SUFFIX, beside
from rewriter.savedmodel.source import MODEL_FILES, refuse_name

# AT_FDCWD of <fcntl.h>, RENAME_EXCHANGE of <linux/fs.h>.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def staged(target: Path, overwrite: bool) -> Iterator[Path]:
    """Yield a new directory beside `target`, which becomes `target` when the block ends without an exception.

    With `overwrite`, it is exchanged for an existing `target` in one step if the system can do so (Linux).

    Raises:
        Error: `target` exists and is not to be overwritten, or its parent cannot be written to.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with beside(target) as temporary:
            # Only now: `beside` puts back a destination that a killed run left aside, and this one counts as existing.
            refuse_existing(target, overwrite)
            temporary.mkdir()
            yield temporary
            # Before the rename: after a power failure, the name might otherwise lead to files without their content.
            _sync(temporary)
            # After an exchange, the old model is at `temporary`, which `beside` removes.
            _move(temporary, target, overwrite)
    except OSError as e:
        raise Error(f"cannot write {target}: {reason(e)}") from e


def write_whole(file: Path, content: bytes) -> None:
    """Write a file, whole or not at all; a pipe or device is written to directly.

    Raises:
        OSError: the file cannot be written.
    """
    if (file.exists() and not file.is_file()) or file.absolute().is_relative_to("/dev"):
        # Appended: /dev/stdout may be a file that holds output already, and opening it for writing would empty it.
        with file.open("ab") as opened:
            opened.write(content)
        return
    file = real(file)
    with beside(file) as temporary:
        temporary.write_bytes(content)
        if file.exists():
            shutil.copymode(file, temporary)
        _sync_file(temporary)
        temporary.replace(file)


def real(path: Path) -> Path:
    """Return a path without links; if links form a circle, the first of them.

    `Path.resolve` would raise a RuntimeError then, which callers that catch OSError miss.
    """
    return Path(os.path.realpath(path))


def reason(error: OSError) -> str:
    """Return the system's reason for an error, preceded by the file that it is about."""
    if isinstance(error, shutil.Error):  # holds (source, target, why) of each file that was not copied
        return "; ".join(f"{source}: {why}" for source, _, why in error.args[0][:1])
    why = error.strerror or str(error)
    return f"{error.filename}: {why}" if error.filename else why


def refuse_overlap(source: Path, target: Path) -> None:
    """Refuse a destination that is the source, contains it, or lies in it: the source is never changed.

    Raises:
        Error: the two overlap.
    """
    a, b = real(source), real(target)
    if b.is_relative_to(a) or a.is_relative_to(b):
        raise Error(f"{target} and the model {source} overlap; the input is never changed, choose another destination")


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Refuse a destination that exists, unless it is a SavedModel to overwrite.

    Raises:
        Error: it exists and is not to be overwritten, is no directory, or holds something other than a SavedModel;
            or TensorFlow cannot read a path with this name.
    """
    refuse_name(target)
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise Error(f"{target} exists; choose another destination or pass --overwrite")
    if target.is_symlink() or not target.is_dir():
        raise Error(f"{target} is not a directory, so it is not overwritten")
    if any(target.iterdir()) and not any((target / name).exists() for name in MODEL_FILES):
        raise Error(f"{target} holds something other than a SavedModel, so it is not overwritten")


def _sync(directory: Path) -> None:
    """Flush all files and directories below a directory to the disk."""
    for folder, _, files in os.walk(directory):
        for name in [*files, "."]:
            _sync_file(Path(folder) / name)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(temporary: Path, target: Path, overwrite: bool) -> None:
    try:
        if not (overwrite and target.exists()):
            temporary.rename(target)
        elif not _exchange(temporary, target):
            # Without an atomic exchange, there is no target between the two renames. If the process is killed there,
            # the next one puts the old directory back (`beside._remove`).
            target.rename(temporary.with_name(temporary.name + ASIDE_SUFFIX))
            temporary.rename(target)
    except OSError as e:
        if e.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise Error(f"{target} was written by another process meanwhile, and is left as it is") from e
        raise
    with suppress(PermissionError):  # a directory may allow writing, but not reading
        _sync_file(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two directories in one step (renameat2); return false if the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    failed = renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    return not failed

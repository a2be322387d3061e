"""Working paths beside a destination.

A lock file marks a working path while its process runs. If the process is killed, the next one for the same destination
removes the working path.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK_NAME = re.compile(r"\.(?P<target>.+)\.bnqat-[0-9a-f]{8}\.lock")
ASIDE_SUFFIX = "-old"
"""Suffix of the old destination's name while it is put aside for the new one."""


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """Yield an unused path in the target's directory, and remove it when the block ends.

    Working paths of the same target whose processes no longer run are removed first.

    Raises:
        OSError: the directory cannot be written to.
    """
    target = target.absolute()  # "." has no name
    _remove_abandoned(target)
    lock, descriptor = _new_lock(target)
    try:
        yield lock.with_suffix("")
    finally:
        # Locked until the lock file is gone: until then, no other run takes the path for abandoned.
        _remove(lock, target)
        os.close(descriptor)


def _remove_abandoned(target: Path) -> None:
    """Remove the working paths of killed processes."""
    with suppress(OSError):  # a directory may allow writing, but not listing
        for lock in sorted(target.parent.iterdir()):
            match = LOCK_NAME.fullmatch(lock.name)
            if match and match["target"] == target.name:
                _remove_if_abandoned(lock, target)


def _remove_if_abandoned(lock: Path, target: Path) -> None:
    with suppress(OSError):  # the lock is another user's, or its process still runs
        # A lock file is never a link, so a link of this name is somebody else's.
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock, target)
        finally:
            os.close(descriptor)


def _remove(lock: Path, target: Path) -> None:
    """Remove a working path and the old destination put aside, and last the lock file.

    If there is no destination, the old one is put back instead: its process was killed between two renames.
    """
    path, aside = lock.with_suffix(""), lock.with_name(lock.stem + ASIDE_SUFFIX)
    if aside.exists() and not os.path.lexists(target):
        aside.rename(target)
    for leftover in (path, aside):
        if leftover.is_dir() and not leftover.is_symlink():
            _remove_directory(leftover)
        else:
            leftover.unlink(missing_ok=True)
    if not os.path.lexists(path) and not os.path.lexists(aside):  # else the next run tries again
        lock.unlink(missing_ok=True)


def _remove_directory(path: Path) -> None:
    """Remove as much of a directory as possible, read-only subdirectories included."""
    with suppress(OSError):
        path.chmod(stat.S_IRWXU)
    for folder, names, _ in os.walk(path):  # top-down: a directory's mode is changed before os.walk lists it
        for subfolder in (Path(folder) / name for name in names):
            if not subfolder.is_symlink():
                with suppress(OSError):
                    subfolder.chmod(stat.S_IRWXU)
    shutil.rmtree(path, ignore_errors=True)


def _new_lock(target: Path) -> tuple[Path, int]:
    """Create a lock file and lock it; return its path and descriptor. The lock ends with the process."""
    while True:
        lock = target.with_name(f".{target.name}.bnqat-{secrets.token_hex(4)}.lock")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # another process took the new file for abandoned before it was locked, and will remove it
        except OSError:
            return lock, descriptor  # this file system has no locks, so no process takes the file for abandoned
        else:
            if lock.exists():  # else another process removed it before it was locked
                return lock, descriptor
        os.close(descriptor)

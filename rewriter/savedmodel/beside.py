"""Working paths beside a destination: locked while a process works there, removed by the next if it was killed."""

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

OWN = re.compile(r"\.(?P<target>.+)\.bnqat-[0-9a-f]{8}\.lock")
OLD = "-old"
"""How the name of a directory ends that waits beside the working path while the new one takes its place."""


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A path in the target's directory where nothing is yet; what is there when the block ends is removed.

    What earlier processes left there for the same target is removed, if they no longer run.

    Raises:
        OSError: nothing can be written there.
    """
    target = target.absolute()  # "." has no name
    _tidy(target)
    lock, descriptor = _locked(target)
    try:
        yield lock.with_suffix("")
    finally:
        _remove(lock, target)
        os.close(descriptor)


def _tidy(target: Path) -> None:
    """Remove what processes left that were killed."""
    with suppress(OSError):  # a directory may be one to write to, but not to look into
        for lock in sorted(target.parent.iterdir()):
            found = OWN.fullmatch(lock.name)
            if found and found["target"] == target.name:
                _take_over(lock, target)


def _take_over(lock: Path, target: Path) -> None:
    with suppress(OSError):  # it is another's, or still at work
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock, target)
        finally:
            os.close(descriptor)


def _remove(lock: Path, target: Path) -> None:
    """Remove a working path and what was put aside, and at last the file that says whose they are.

    Where nothing took the place of what was put aside, it is put back.
    """
    path, aside = lock.with_suffix(""), lock.with_name(lock.stem + OLD)
    if aside.exists() and not os.path.lexists(target):
        aside.rename(target)
    for left in (path, aside):
        if left.is_dir() and not left.is_symlink():
            _remove_directory(left)
        else:
            left.unlink(missing_ok=True)
    if not os.path.lexists(path) and not os.path.lexists(aside):  # else the next run tries again
        lock.unlink(missing_ok=True)


def _remove_directory(path: Path) -> None:
    """Remove what can be removed, directories that are not to be written to included."""
    with suppress(OSError):
        path.chmod(stat.S_IRWXU)
    for folder, names, _ in os.walk(path):  # a directory is looked into after its mode was changed
        for each in (Path(folder) / name for name in names):
            if not each.is_symlink():
                with suppress(OSError):
                    each.chmod(stat.S_IRWXU)
    shutil.rmtree(path, ignore_errors=True)


def _locked(target: Path) -> tuple[Path, int]:
    """A new file that this process holds a lock on, which ends with the process."""
    while True:
        lock = target.with_name(f".{target.name}.bnqat-{secrets.token_hex(4)}.lock")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pass  # another process takes it for abandoned
        except OSError:
            return lock, descriptor  # there are no locks here, so that nobody takes it for abandoned either
        else:
            if lock.exists():
                return lock, descriptor
        os.close(descriptor)

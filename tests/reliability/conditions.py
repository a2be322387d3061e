"""Conditions of a process: a small disk, no permission, a signal or a change of files at a certain moment.

The functions are called in the process itself, before the command.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewriter.savedmodel import staging

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_REC, MS_PRIVATE = 0x4000, 1 << 18
CAPABILITIES_V3 = 0x20080522
FILES = (
    "open",
    "os.mkdir",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.listdir",
    "os.scandir",
    "shutil.",
    "ctypes.dlsym",
)
"""Audit events that are about files, and looking up ``renameat2``."""


def small_disk(folder: str, kib: int) -> None:
    """Put an empty disk of so many KiB in place of a folder, for this process alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNS | (CLONE_NEWUSER if uid else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    if uid:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    options = f"size={kib}k".encode()
    if libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None) or libc.mount(
        b"tmpfs", folder.encode(), b"tmpfs", 0, options
    ):
        raise OSError(ctypes.get_errno(), "mount")


def small_files(kib: int) -> None:
    """Let the system refuse to make a file larger than so many KiB."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kib * 1024, kib * 1024))


def no_privileges() -> None:
    """Drop root's privileges, so that the modes of files are obeyed."""
    if os.getuid():
        return
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_V3, 0)
    if ctypes.CDLL(None).capset(ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)())):
        raise OSError("capset")


def without_exchange() -> None:
    """Act as a system that cannot exchange two directories."""
    staging._exchange = lambda _a, _b: False  # type: ignore[assignment]


def at_fault() -> None:
    """Let reading a model raise an unforeseen exception."""
    from rewriter.app import api

    del os.environ["BNQAT_TRACEBACK"]

    def load(*_: object) -> None:
        raise KeyError("unforeseen")

    vars(api)["load"] = load


def full(descriptor: int) -> None:
    """Let stdout or stderr be a full disk."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), descriptor)


def ascii_only() -> None:
    """Let stdout take nothing but ASCII, as with PYTHONIOENCODING=ascii."""
    assert isinstance(sys.stdout, io.TextIOWrapper)
    sys.stdout.reconfigure(encoding="ascii", errors="strict")


def listed(folder: str, arguments: list[str]) -> None:
    """Run the command line, and print the contents of a folder at its end."""
    from rewriter.app.cli import main

    try:
        main(arguments)
    finally:
        sys.stdout.write("\nleft: " + " ".join(sorted(os.listdir(folder))) + "\n")


def print_set() -> None:
    """Print a set of strings in this process's order."""
    sys.stdout.write(" ".join({f"name{i}" for i in range(20)}))


def _on_files(folder: str, act: Callable[[int, str, str], None]) -> None:
    """Call `act` with number, name and path of every audit event about files in a folder, but for those of `act`."""
    count, acting = 0, False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count, acting
        if event.startswith(FILES) and arguments and not acting:
            paths = [str(a) for a in arguments if isinstance(a, str | os.PathLike) and str(a).startswith(folder)]
            if paths or arguments[-1] == "renameat2":
                number, count, acting = count, count + 1, True
                act(number, event, paths[0] if paths else "")
                acting = False

    sys.addaudithook(hook)


def counting(folder: str) -> None:
    """Print at exit the number of events about files in a folder."""
    count_seen = [0]

    def count(number: int, _event: str, _path: str) -> None:
        count_seen[0] = number + 1

    _on_files(folder, count)
    leave = os._exit

    def say(code: int) -> None:
        sys.stdout.write(f"\nevents: {count_seen[0]}\n")
        sys.stdout.flush()
        leave(code)

    os._exit = say  # type: ignore[assignment]


def killed_at(folder: str, moment: int) -> None:
    """Die at the n-th event about files in a folder."""
    _on_files(folder, lambda number, _event, _path: os.kill(os.getpid(), signal.SIGKILL) if number == moment else None)


def copied(folder: str, states: str) -> None:
    """Copy a folder at each event about files in it, to folders of the events' numbers."""

    def copy(number: int, _event: str, _path: str) -> None:
        shutil.copytree(folder, Path(states) / str(number))

    _on_files(folder, copy)


def once_there(folder: str, event: str, what: str, path: str) -> None:
    """Change a path at the first event of a kind about files in a folder."""
    done: list[str] = []

    def act(_number: int, name: str, _path: str) -> None:
        if name == event and not done:
            done.append(name)
            DEEDS[what](Path(path))

    _on_files(folder, act)


def _touch(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0")


def _vanish(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(path)


def _take(path: Path) -> None:
    path.mkdir()
    (path / "other").touch()


DEEDS: dict[str, Callable[[Path], None]] = {
    "closed": lambda path: path.chmod(0o555),
    "changed": _touch,
    "gone": _vanish,
    "taken": _take,
}

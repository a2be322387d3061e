"""`bnqat` as a command on the PATH of other programs, run by a server that has imported what it needs."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.reliability.forks import Call, Server

CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    server.sendall(json.dumps([os.getcwd(), *sys.argv[1:]]).encode() + b"\\n")
    code, out, err = json.loads(server.makefile().read())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


@contextmanager
def command(server: Server, folder: Path) -> Iterator[None]:
    """Write the command `bnqat` to a folder; while the block runs, a server runs what is called."""
    address = f"\0bnqat-{os.getpid()}-{id(folder)}"  # a name, not a path, which might be too long
    folder.mkdir()
    (folder / "bnqat").write_text(CLIENT.format(python=sys.executable, address=address), encoding="utf-8")
    (folder / "bnqat").chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        thread = threading.Thread(target=_answer, args=(listening, server), daemon=True)
        thread.start()
        try:
            yield
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def _answer(listening: socket.socket, server: Server) -> None:
    """Run a command for each connection, until the socket is shut down."""
    while True:
        try:
            connection, _ = listening.accept()
        except OSError:
            return
        with connection:
            folder, *arguments = json.loads(connection.makefile().readline())
            done = server.cli(*arguments, before=[Call("os:chdir", [folder])])
            connection.sendall(json.dumps([done.code, done.out, done.err]).encode())

"""`python FILE` and `python -m MODULE` as a command, forked from a process that has imported TensorFlow and Keras.

The command is a client, which starts at once. Its server forks a process with the client's directory, environment,
input and output. It runs the program and ends as an interpreter does, so that workers of a cluster wait for each other.
The client's exit code is that of the process. If the client is killed, so is the process. The server runs no op.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Request = tuple[list[int], list[Any]]
"""A client's standard files, and its directory, environment and arguments."""
MODULES = ("tensorflow", "keras", "tf_keras", "sklearn.datasets")
TICK = 0.01
CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([os.getcwd(), dict(os.environ), sys.argv[1:]]).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(request)
    code = int(server.makefile().read())
sys.exit(code if code >= 0 else 128 - code)
"""


@contextmanager
def python_command(folder: Path) -> Iterator[Path]:
    """Write the command `python` to a folder, and run its server while the block runs."""
    address = f"\0python-{os.getpid()}-{id(folder)}"  # a name, not a path, which might be too long
    folder.mkdir()
    target = folder / "python"
    target.write_text(CLIENT.format(python=sys.executable, address=address), encoding="utf-8")
    target.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        number = str(listening.fileno())
        command = [sys.executable, "-m", "tests.python_command", number]
        root = Path(__file__).parents[1]
        server = subprocess.Popen(command, cwd=root, pass_fds=[int(number)], stdin=subprocess.PIPE)
    try:
        yield target
    finally:
        server.communicate()


def _serve(listening: socket.socket) -> Request | None:
    """Fork a process for each client, in which this returns the client's request; end with the standard input."""
    clients: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listening, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select(TICK if clients else None)]
            if sys.stdin in ready:
                return None
            if listening in ready:
                client, _ = listening.accept()
                length, files, _, _ = socket.recv_fds(client, 4, 3)
                request = client.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL)
                child = os.fork()
                if not child:
                    for held in (listening, client, *clients.values()):
                        held.close()
                    return files, json.loads(request)
                clients[child] = client
                for file in files:
                    os.close(file)
            for child, client in list(clients.items()):
                if _ended(child, client):
                    del clients[child]


def _ended(child: int, client: socket.socket) -> bool:
    """Give the client the code of a process that has ended; kill the process if its client has gone."""
    ended, status = os.waitpid(child, os.WNOHANG)
    if not ended:
        with contextlib.suppress(BlockingIOError):  # the client waits
            client.recv(1, socket.MSG_DONTWAIT)
            os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, 0)
    if ended:
        with client, contextlib.suppress(OSError):
            client.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    return bool(ended)


def _run(files: list[int], request: list[Any]) -> None:
    """Run a program in this process, as the interpreter would."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    folder, environment, arguments = request
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = folder
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    for name in MODULES:
        importlib.import_module(name)
    requested = _serve(socket.socket(fileno=int(sys.argv[1])))
    if requested is not None:
        _run(*requested)

"""`python FILE` and `python -m MODULE` as a command, forked from a process that has imported TensorFlow and Keras.

The command is a client, which starts at once. Its server, which tests/reliability/forks.py forks, forks a process with
the client's directory, environment, input and output. It runs the program and ends as an interpreter does, so that
workers of a cluster wait for each other. The client's exit code is that of the process. If the client is killed, so is
the process. The server runs no op.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from pathlib import Path
from typing import Any

Request = tuple[list[int], list[Any]]
"""A client's standard files, and its directory, environment and arguments."""
TICK = 0.01
CLIENT = r"""#!{python} -IS
import json, os, socket, sys, time
with socket.socket(socket.AF_UNIX) as server:
    for attempt in range(600):
        try:
            server.connect("\0" + {address!r})
            break
        except ConnectionRefusedError:  # the server is still importing
            time.sleep(0.1)
    request = json.dumps([os.getcwd(), dict(os.environ), sys.argv[1:]]).encode()
    socket.send_fds(server, [len(request).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(request)
    code = int(server.makefile().read())
sys.exit(code if code >= 0 else 128 - code)
"""


def write_command(target: Path, address: str) -> Path:
    """Write the command, a client of the server at an address."""
    target.parent.mkdir()
    target.write_text(CLIENT.format(python=sys.executable, address=address), encoding="utf-8")
    target.chmod(0o755)
    return target


def forked(address: str) -> bool:
    """Fork a server, which ends with this process.

    Returns:
        False here; True in each of the other processes, when it has done what it is for and may end.
    """
    read, write = os.pipe()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"\0{address}")
        listening.listen()
        if child := os.fork():
            os.close(read)
            atexit.register(_stop, child, write)
            return False
        os.close(write)
        devnull = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1):  # those of the process that this one was forked from
            os.dup2(devnull, number)
        request = _serve(listening, read)
    if request is not None:
        _run(*request)
    return True


def _stop(server: int, pipe: int) -> None:
    os.close(pipe)
    os.waitpid(server, 0)


def _serve(listening: socket.socket, end: int) -> Request | None:
    """Fork a process for each client, in which this returns the client's request; end with a pipe."""
    clients: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listening, selectors.EVENT_READ)
        selector.register(end, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in selector.select(TICK if clients else None)]
            if end in ready:
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
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    finally:  # what is printed would be lost where TensorFlow's threads end the process
        sys.stdout.flush()
        sys.stderr.flush()

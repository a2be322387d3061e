"""Commands and programs in processes of their own, watched; forked from one with TensorFlow, so as to start at once.

The server reads a request a line and answers with what became of it. Nothing in it runs an op: TensorFlow's threads,
which do not survive a fork, are not started yet.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any

from tests import python_command

CLI = "rewriter.app.cli:main"
COMMANDS = (
    *("tensorflow", "rewriter.app.api", "rewriter.app.cli", "rewriter.app.diff", "rewriter.app.finalize"),
    *("rewriter.app.sensitivity", "rewriter.app.verification.claims"),
)
"""Modules of the command line; the passes come with them."""
PLAIN = ("tensorflow", "keras")
"""Modules of a user without bnqat."""
HASH_SEED = 0
"""Hash seed of the tests' own server; `test_determinism.py` compares it with others."""
REPOSITORY = Path(__file__).parents[2]
PAGE = os.sysconf("SC_PAGE_SIZE")
TICK = 0.002


@dataclass(frozen=True)
class Call:
    """A function by ``module:name``, and its arguments."""

    function: str
    arguments: Sequence[Any]


@dataclass(frozen=True)
class Outcome:
    """Result of a process.

    Attributes:
        code: its exit code; that of `died` is negative.
        seconds: its duration.
        peak: its peak memory in MiB.
        out: its text on stdout.
        err: its text on stderr.
        stopped: reason for which it was stopped from outside, "signal", "time" or "memory"; "" if it was not.
    """

    code: int
    seconds: float
    peak: float
    out: str
    err: str
    stopped: str


class Server:
    """A process that imports some modules, then forks others. Its hash seed orders their sets of strings.

    With an address, another one forked from it serves the command `python` there (see tests/python_command.py).
    """

    def __init__(
        self, hash_seed: int | None = None, modules: Sequence[str] = COMMANDS, python: str | None = None
    ) -> None:
        seed = {} if hash_seed is None else {"PYTHONHASHSEED": str(hash_seed)}
        environment = {
            **os.environ,
            **seed,
            "PYTHONPATH": str(REPOSITORY),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "BNQAT_TRACEBACK": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.forks", python or "", *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "CUDA_VISIBLE_DEVICES": "-1"},
        )

    def run(
        self, *calls: Call, after: float | None = None, by: int = signal.SIGKILL, limit: float = 60, mib: float = 8192
    ) -> Outcome:
        """Make some calls, one after the other until one exits, in a new process.

        Args:
            calls: what to do.
            after: seconds until the process is sent a signal.
            by: which.
            limit: seconds after which it is stopped.
            mib: MiB above which it is stopped.
        """
        request = {"calls": [asdict(c) for c in calls], "after": after, "by": int(by), "limit": limit, "mib": mib}
        (outcome,) = self._answer(request)
        return outcome

    def run_twice(self, *calls: Call, limit: float = 60, mib: float = 8192) -> list[Outcome]:
        """Make the same calls in two new processes at once."""
        return self._answer({"calls": [asdict(c) for c in calls], "limit": limit, "mib": mib, "copies": 2})

    def _answer(self, request: Mapping[str, Any]) -> list[Outcome]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return [Outcome(**fields) for fields in json.loads(self._process.stdout.readline())]

    def cli(self, *arguments: str | Path, before: Sequence[Call] = (), **options: Any) -> Outcome:
        """Run the command line, after some calls that change the process."""
        return self.run(*before, Call(CLI, [[str(a) for a in arguments]]), **options)

    def python(self, code: str, *arguments: str | Path, cwd: Path | None = None, limit: float = 300) -> Outcome:
        """Run a program with its arguments, as ``python -c`` does."""
        before = [] if cwd is None else [Call("os:chdir", [str(cwd)])]
        program = Call("tests.reliability.forks:run_program", [code, [str(a) for a in arguments]])
        return self.run(*before, program, limit=limit)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@contextlib.contextmanager
def server(
    hash_seed: int | None = None, modules: Sequence[str] = COMMANDS, python: str | None = None
) -> Iterator[Server]:
    """Start a server, and close it at the end of the block."""
    started = Server(hash_seed, modules, python)
    try:
        yield started
    finally:
        started.close()


def run_program(code: str, arguments: Sequence[str]) -> None:
    """Run a program in this process, as ``python -c`` does."""
    main = ModuleType("__main__")
    sys.modules["__main__"], sys.argv, sys.path[0] = main, ["-c", *arguments], ""
    exec(compile(code, "<string>", "exec"), vars(main))  # noqa: S102  the tests' own programs


def _serve() -> None:
    _, python, *modules = sys.argv
    for name in modules:
        importlib.import_module(name)
    if python and python_command.forked(python):
        return
    if "passes" in sys.modules:
        for target in sys.modules["passes"].PASSES.values():
            importlib.import_module(target.partition(":")[0])
    # Else each child's garbage collector would pass over all modules, and so copy the pages that it shares.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        sys.stdout.write(json.dumps([asdict(outcome) for outcome in _made(**json.loads(line))]) + "\n")
        sys.stdout.flush()


def _made(
    *,
    calls: Sequence[dict[str, Any]],
    limit: float,
    mib: float,
    after: float | None = None,
    by: int = signal.SIGKILL,
    copies: int = 1,
) -> list[Outcome]:
    """Start processes that make the calls, and watch one after the other until it ends."""
    with contextlib.ExitStack() as stack:
        started = []
        for _ in range(copies):
            out, err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(2))
            started.append((time.monotonic(), _started(calls, out.fileno(), err.fileno()), out, err))
        return [_watched(*process, after=after, by=by, limit=limit, mib=mib) for process in started]


def _started(calls: Sequence[dict[str, Any]], out: int, err: int) -> int:
    """Start a process that makes the calls, and return its number."""
    # An interrupt waits until the child ignores it: before that, the code of this module would be what it stops.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    child = os.fork()
    if not child:
        _child(calls, out, err)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    return child


def _watched(
    start: float, child: int, out: IO[bytes], err: IO[bytes], *, after: float | None, by: int, limit: float, mib: float
) -> Outcome:
    """Wait for a process; send it a signal after some seconds, and stop it if it takes too much time or memory."""
    stopped, peak = "", 0.0
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - start
        if ended:
            break
        with contextlib.suppress(OSError, IndexError):
            peak = max(peak, int(Path(f"/proc/{child}/statm").read_text().split()[1]) * PAGE / 2**20)
        if after is not None and seconds >= after and not stopped:
            stopped = "signal"
            os.kill(child, by)
        if seconds > limit or peak > mib:
            stopped = "memory" if peak > mib else "time"
            os.kill(child, signal.SIGKILL)
        time.sleep(TICK)
    texts = []
    for file in (out, err):
        file.seek(0)
        texts.append(file.read().decode(errors="replace"))
    return Outcome(os.waitstatus_to_exitcode(status), seconds, peak, texts[0], texts[1], stopped)


def _child(calls: Sequence[dict[str, Any]], out: int, err: int) -> None:
    """Make the calls; does not return."""
    code = 0
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # until the command line has its own handler
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  as long as the process
        for call in calls:
            module, _, name = call["function"].partition(":")
            getattr(importlib.import_module(module), name)(*call["arguments"])
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:  # noqa: BLE001  a traceback is what is looked for
        traceback.print_exc()
        code = 1
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
    os._exit(0)  # at once: taking TensorFlow's modules apart would take most of a second

"""Runs of the commands on a model that may be damaged, checked against bnqat's promises."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from tests.harness import digest
from tests.reliability.forks import Call, Outcome, Server

LIMIT = 10.0
"""Seconds that a command may take for a model of the size of those here."""
MIB = 3000
PROGRESS = re.compile(r"executing .*")
PYTHONS = re.compile(
    r"a fault of bnqat|Traceback|object has no|Error: |KeyError|NoneType|<class|<_|0x[0-9a-f]{8}|assert"
)


class BrokenPromiseError(AssertionError):
    """A command did what it should never do."""


def judged(outcome: Outcome, what: str) -> str:
    """Return "done" or "refused", or raise an error for any other outcome.

    Raises:
        BrokenPromiseError: a hang, too much memory, a crash, a traceback, or an error that is not one line.
    """
    description = (
        f"{what}: exit code {outcome.code} after {outcome.seconds:.1f} s, {outcome.peak:.0f} MiB\n{outcome.err}"
    )
    if outcome.stopped in ("time", "memory"):
        raise BrokenPromiseError(f"too much {outcome.stopped}: {description}")
    lines = [line for line in outcome.err.splitlines() if not PROGRESS.fullmatch(line)]
    if outcome.code == 0:
        if lines:
            raise BrokenPromiseError(f"done, with noise: {description}")
        return "done"
    if outcome.code != 2:
        raise BrokenPromiseError(description)
    if len(lines) != 1 or not lines[0].startswith("bnqat: error: ") or not lines[0].isprintable():
        raise BrokenPromiseError(f"not one line: {description}")
    if PYTHONS.search(lines[0].removeprefix("bnqat: error: ")):
        raise BrokenPromiseError(f"no sentence for a user: {description}")
    return "refused"


def trial(server: Server, model: Path, folder: Path, limit: float = LIMIT) -> Iterator[str]:
    """Run inspect and rewrite on a model, and diff and finalize on the result.

    Args:
        server: runs the commands.
        model: may be damaged.
        folder: an empty folder for the results.
        limit: seconds that each command may take.

    Yields:
        For each command its name and "done" or "refused".

    Raises:
        BrokenPromiseError: a command did what it should never do.
    """
    before = digest(model)
    target, final = folder / "target", folder / "final"
    yield f"inspect {judged(server.cli('inspect', model, limit=limit, mib=MIB), 'inspect')}"
    for command, source, written in (("rewrite", model, target), ("finalize", target, final)):
        outcome = judged(server.cli(command, source, written, limit=limit, mib=MIB), command)
        yield f"{command} {outcome}"
        if sorted(folder.iterdir()) != sorted(p for p in (target, final) if p.exists()):
            raise BrokenPromiseError(f"{command} left {sorted(folder.iterdir())}")
        if (outcome == "done") != written.exists():
            raise BrokenPromiseError(f"{command} {outcome}, and {written} is {'there' if written.exists() else 'not'}")
        if outcome == "refused":
            break
        yield loads(server, source, written, command)
        if command == "rewrite":
            yield f"diff {judged(server.cli('diff', model, target, limit=limit, mib=MIB), 'diff')}"
    if digest(model) != before:
        raise BrokenPromiseError("the source was changed")


def loads(server: Server, source: Path, written: Path, command: str) -> str:
    """Load a written model in TensorFlow, and return the outcome as text.

    Raises:
        BrokenPromiseError: TensorFlow loads the source, but not the written model.
    """
    load = "tests.reliability.trials:load"
    after = server.run(Call(load, [str(written)]))
    if after.code == 0:
        return f"{command} loads"
    before = server.run(Call(load, [str(source)]))
    if before.code == 0:
        raise BrokenPromiseError(f"{command}: {written} does not load\n{after.err[-2000:]}")
    return f"{command} of what does not load"


def load(model: str) -> None:
    """Load a model with `tf.saved_model.load`, which takes TensorFlow 1's format, too."""
    import tensorflow as tf

    tf.saved_model.load(model)


def fresh(folder: Path) -> Path:
    """Empty a folder, or create it, and return it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder

"""What surrounds a command's work: TensorFlow, imported late and quietly, and errors as one line."""

from __future__ import annotations

import importlib
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rewriter.app.names import PARAMETER_FILES
from rewriter.app.terminal import say
from rewriter.app.waiting import waiting
from rewriter.ir import Error
from rewriter.savedmodel.staging import real, reason, write_whole

if TYPE_CHECKING:
    from rewriter.pipeline import Step

EXIT_FAILED = 2


@contextmanager
def report_errors(*checks: Callable[[], object], tensorflow: bool = True) -> Iterator[None]:
    """Make the checks, which must not need TensorFlow, and import it quietly where it is needed.

    What a user can mend becomes one line and exit code 2.
    """
    try:
        for check in checks:
            check()
        if tensorflow:
            with waiting("importing TensorFlow"), _quiet():
                importlib.import_module("rewriter.app.api")
        yield
    except Error as e:
        fail(str(e))
    except (BrokenPipeError, click.ClickException, click.exceptions.Exit):
        raise  # the reader has had enough, or it is click's own, which click knows how to end
    except OSError as e:
        fail(_of_stream(e))
    except MemoryError:
        fail("there is not enough memory")
    except Exception as e:
        if TRACEBACK in os.environ:
            raise
        last = traceback.extract_tb(e.__traceback__)[-1]
        fail(
            f"a fault of bnqat's, {type(e).__name__} at line {last.lineno} of {last.filename}; report it with what "
            f"{TRACEBACK}=1 shows"
        )


def _of_stream(e: OSError) -> str:
    """Why the system refused; what is about no file, is about a stream."""
    return reason(e) if e.filename else f"stdout cannot be written to: {reason(e)}"


@contextmanager
def report_done(done: str) -> Iterator[None]:
    """Print what was done; where that fails, say at least that it was."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as e:
        raise Error(f"{done} was written, but {_of_stream(e)}") from e


TRACEBACK = "BNQAT_TRACEBACK"
"""Environment variable that lets exceptions nobody foresaw through, with their traceback."""


class Commands(click.Group):
    """Commands that end with one line and exit code 2 where they are interrupted, too."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line."""
        _open_standard()
        terminal = os.dup(2)  # while TensorFlow is imported, what is written to stderr's own is thrown away
        for number in SIGNALS:
            signal.signal(number, partial(_interrupt, terminal))
        try:
            return super().main(*args, **options)
        except OSError as e:
            fail(_of_stream(e))
        finally:
            for number in SIGNALS:  # all is done; while Python ends, a signal would only spoil the exit code
                signal.signal(number, signal.SIG_IGN)
            if INTERRUPTED.is_set():
                sys.exit(EXIT_FAILED)


def _open_standard() -> None:
    """Let nothing that is opened later take the place of a closed stdout or stderr; escape what cannot be encoded."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest that is free
    sys.stdout = sys.stdout or io.StringIO()
    sys.stderr = sys.stderr or io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


SIGNALS = (signal.SIGINT, signal.SIGTERM)


INTERRUPTED = threading.Event()
"""Whether it was said that the command is interrupted."""


def _interrupt(terminal: int, number: int, _frame: object) -> None:
    # What is to be tidied up takes moments, and is not to be interrupted again. Not by click: it may be at work.
    signal.signal(number, signal.SIG_IGN)
    INTERRUPTED.set()
    os.write(terminal, b"bnqat: error: interrupted; nothing is left half-written\n")
    # Where the exception arrives in a library, that may end it, or take it for an error of its own.
    sys.unraisablehook = lambda _: None
    sys.exit(EXIT_FAILED)


def progress(step: Step) -> None:
    """Say on stderr what a pass did."""
    say(f"{step.name}: {len(step.edits)} edits in {step.seconds:.2f} s", err=True)


def fail(message: str) -> None:
    """Say what is wrong in one line, and exit with code 2."""
    if not INTERRUPTED.is_set():
        with suppress(OSError):  # nothing can be said where stderr cannot be written to
            say(f"bnqat: error: {' '.join(message.split())}", err=True)
    sys.exit(EXIT_FAILED)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what TensorFlow's libraries print while they are loaded off stderr."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Rewriting has no work for an accelerator, and should not take its memory from a training run.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    saved = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        importlib.import_module("tensorflow")

        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nothing)


def refuse_files(files: Mapping[str, Path | None], *models: Path) -> None:
    """Refuse files to write to, by what is to be in them, that would lie in a model, in no directory, or be one file.

    Raises:
        Error: one would, or two would, or one cannot be looked at, as links that lead round in a circle.
    """
    taken: dict[Path, str] = {}
    for what, file in files.items():
        if file is None:
            continue
        if not file.absolute().parent.is_dir():
            raise Error(f"there is no directory {file.parent} to write the {what} to")
        try:
            file.stat()
        except FileNotFoundError:
            pass
        except OSError as e:
            raise Error(f"the {what} cannot be written to {reason(e)}") from e
        place = real(file)
        for model in models:
            if place.is_relative_to(real(model)):
                raise Error(f"the {what} {file} would lie in the model {model}; choose another file")
        if place in taken and not place.is_relative_to("/dev"):
            raise Error(f"the {taken[place]} and the {what} would both be written to {file}; choose two files")
        taken[place] = what


def check_parameters(file: Path, fold: bool) -> None:
    """Refuse a file for parameters.

    Raises:
        Error: its name does not say its format, or there is nothing to describe.
    """
    if file.suffix not in PARAMETER_FILES:
        raise Error(f"{file}: parameters are written to a file that ends with {' or '.join(PARAMETER_FILES)}")
    if fold:
        raise Error(
            "with --fold no variable holds what --params would describe; finalize once with each, to two destinations"
        )


def write_file(file: Path, text: str, what: str, done: str = "") -> None:
    """Write a text to a file.

    Raises:
        Error: it cannot be written; the message says what was `done` before.
    """
    try:
        write_whole(file, text.encode())
    except OSError as e:
        before = f"{done} was written, but " if done else ""
        raise Error(f"{before}the {what} {file} was not written: {e.strerror}") from e

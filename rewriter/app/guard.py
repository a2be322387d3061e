"""Frame of a command: TensorFlow is imported late and quietly, and errors become one line."""

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
    """Run the checks, then import TensorFlow quietly if it is needed.

    The checks must not need TensorFlow. An error that a user can mend becomes one line and exit code 2.
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
        raise  # the reader closed the pipe, or click itself handles it
    except OSError as e:
        fail(_os_reason(e))
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


def _os_reason(e: OSError) -> str:
    """Return why the system refused; an error that names no file is about stdout."""
    return reason(e) if e.filename else f"stdout cannot be written to: {reason(e)}"


@contextmanager
def report_done(done: str) -> Iterator[None]:
    """Let the block print what was done; if printing fails, the error says at least that it was."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as e:
        raise Error(f"{done} was written, but {_os_reason(e)}") from e


TRACEBACK = "BNQAT_TRACEBACK"
"""Environment variable that lets unforeseen exceptions through, with their traceback."""


class Commands(click.Group):
    """Command group that ends with one line and exit code 2 if it is interrupted, too."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line."""
        _open_standard_streams()
        terminal = os.dup(2)  # `_quiet` discards what is written to descriptor 2 itself
        for number in SIGNALS:
            signal.signal(number, partial(_interrupt, terminal))
        try:
            return super().main(*args, **options)
        except OSError as e:
            fail(_os_reason(e))
        finally:
            for number in SIGNALS:  # all is done; a signal while Python ends would only spoil the exit code
                signal.signal(number, signal.SIG_IGN)
            if INTERRUPTED.is_set():
                sys.exit(EXIT_FAILED)


def _open_standard_streams() -> None:
    """Fill closed standard descriptors, so that no later file takes their place; escape what cannot be encoded."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor
    sys.stdout = sys.stdout or io.StringIO()
    sys.stderr = sys.stderr or io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


SIGNALS = (signal.SIGINT, signal.SIGTERM)


INTERRUPTED = threading.Event()
"""Set once the user was told that the command is interrupted."""


def _interrupt(terminal: int, number: int, _frame: object) -> None:
    # Tidying up takes moments, and a second signal must not interrupt it.
    signal.signal(number, signal.SIG_IGN)
    INTERRUPTED.set()
    # click does not write this: the signal may have interrupted it in the middle of a write.
    os.write(terminal, b"bnqat: error: interrupted; nothing is left half-written\n")
    # A library in which SystemExit arrives may swallow it or take it for its own error; `main` then sets the exit code.
    sys.unraisablehook = lambda _: None
    sys.exit(EXIT_FAILED)


def progress(step: Step) -> None:
    """Print the edits and the time of a pass to stderr."""
    say(f"{step.name}: {len(step.edits)} edits in {step.seconds:.2f} s", err=True)


def fail(message: str) -> None:
    """Print an error in one line to stderr, and exit with code 2."""
    if not INTERRUPTED.is_set():
        with suppress(OSError):  # nothing can be said where stderr cannot be written to
            say(f"bnqat: error: {' '.join(message.split())}", err=True)
    sys.exit(EXIT_FAILED)


@contextmanager
def _quiet() -> Iterator[None]:
    """Discard what TensorFlow's libraries print to stderr while they are loaded."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Rewriting has no work for an accelerator, and should not take its memory from a training run.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    stderr_copy = os.dup(2)
    devnull = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(devnull, 2)
        importlib.import_module("tensorflow")

        yield
    finally:
        os.dup2(stderr_copy, 2)
        os.close(stderr_copy)
        os.close(devnull)


def refuse_files(files: Mapping[str, Path | None], *models: Path) -> None:
    """Refuse output files that would lie in a model or in no directory, or two that would be the same file.

    Args:
        files: the files by their content, as messages call it.
        models: directories of models.

    Raises:
        Error: a file is refused, or cannot be looked at, such as links that form a circle.
    """
    content_at: dict[Path, str] = {}
    for content, file in files.items():
        if file is None:
            continue
        if not file.absolute().parent.is_dir():
            raise Error(f"there is no directory {file.parent} to write the {content} to")
        try:
            file.stat()
        except FileNotFoundError:
            pass
        except OSError as e:
            raise Error(f"the {content} cannot be written to {reason(e)}") from e
        real_path = real(file)
        for model in models:
            if real_path.is_relative_to(real(model)):
                raise Error(f"the {content} {file} would lie in the model {model}; choose another file")
        if real_path in content_at and not real_path.is_relative_to("/dev"):
            raise Error(
                f"the {content_at[real_path]} and the {content} would both be written to {file}; choose two files"
            )
        content_at[real_path] = content


def check_parameters(file: Path, fold: bool) -> None:
    """Refuse a file for parameters.

    Raises:
        Error: its name does not say its format, or `fold` leaves nothing to describe.
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
        Error: the file cannot be written; the message names what was `done` before.
    """
    try:
        write_whole(file, text.encode())
    except OSError as e:
        before = f"{done} was written, but " if done else ""
        raise Error(f"{before}the {what} {file} was not written: {e.strerror}") from e

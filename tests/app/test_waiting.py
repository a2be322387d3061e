"""Tests of the progress bar, in a process whose stderr is a terminal of its own."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

CODE = """
import sys, time
from rewriter.app.waiting import waiting
with waiting("reading a model", delay=0.2):
    time.sleep(float(sys.argv[1]))
    print("one line", file=sys.stderr)
print("a result")
"""


def at_a_terminal(*arguments: str) -> tuple[int, str, str]:
    """Run a command; return its exit code, its stdout, and the stderr that a terminal received."""
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=theirs, text=True) as process:
        os.close(theirs)
        sent = b""
        while True:
            try:
                some = os.read(ours, 4096)
            except OSError:  # how Linux says that nobody holds the other end any more
                break
            if not some:
                break
            sent += some
        output = process.communicate()[0]
    os.close(ours)
    return process.returncode, output, sent.decode()


def test_a_bar_shows_what_takes_long_and_goes() -> None:
    code, output, sent = at_a_terminal("-c", CODE, "0.8")
    assert (code, output) == (0, "a result\n")
    assert "reading a model" in sent
    assert "one line" in sent
    assert sent.index("reading a model") < sent.index("one line")
    assert sent.rstrip("\r\n").endswith("\x1b[2K")  # the bar's line is cleared


def test_none_for_what_is_done_in_a_moment_or_where_nobody_looks() -> None:
    assert at_a_terminal("-c", CODE, "0") == (0, "a result\n", "one line\r\n")
    done = subprocess.run([sys.executable, "-c", CODE, "0.5"], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("a result\n", "one line\n")


def test_an_error_is_one_line_also_at_a_terminal(tmp_path: Path) -> None:
    code, output, sent = at_a_terminal("-m", "rewriter.app.cli", "inspect", str(tmp_path))
    assert (code, output) == (2, "")
    assert sent.count("\n") == 1
    assert sent.startswith("bnqat: error:")

"""Chromium for the tests of pages, the pictures and the benchmark: the browser of this machine, or a new one.

    python -m tools.chromium

The command makes sure of a browser before `make test` starts pytest. It takes the first of these:

1. the path in `BNQAT_CHROMIUM`;
2. a Chromium or Chrome on `PATH`;
3. the browser that an earlier run put below `.venv`;
4. Debian's package `chromium`, which it installs if it may: as root, or by `sudo` without a password;
5. Playwright's own build, which it puts below `.venv`.

Otherwise it says in one line what to do, and exits with code 2. Tests and tools install nothing: they take 1 to 3.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Playwright

VENV = Path(__file__).parents[1] / ".venv"
COMMANDS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BUILDS = ("chrome-headless-shell", "headless_shell")
"""Names of the executable in Playwright's builds, by release and processor."""
PLAYWRIGHT = (sys.executable, "-m", "playwright")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TO_DO = "install Debian's package chromium, or set BNQAT_CHROMIUM to the path of a Chromium"


class NoChromiumError(Exception):
    """No browser is here; the message is one line that says what to do."""


def starts(path: str) -> bool:
    """Tell if the executable runs. The snap package's stand-in does not, nor a build whose libraries are absent."""
    try:
        return not subprocess.run([path, "--version"], capture_output=True, timeout=60, check=False).returncode
    except (OSError, subprocess.TimeoutExpired):
        return False


def executable() -> str:
    """Return the path of the browser: the user's, or the one that is installed.

    Raises:
        NoChromiumError: There is none that starts.
    """
    given = os.environ.get("BNQAT_CHROMIUM")
    if given and not starts(given):
        raise NoChromiumError(f"BNQAT_CHROMIUM is {given}, which does not start; set it to the path of a Chromium")
    path = given or installed()
    if path is None:
        raise NoChromiumError("the tests of pages need Chromium: run `make test`, which installs it, or " + TO_DO)
    return path


def installed() -> str | None:
    """Return the path of a browser that starts, on PATH or below `.venv`, or None."""
    on_path = [path for command in COMMANDS if (path := shutil.which(command))]
    return next((path for path in (*on_path, *downloaded_builds()) if starts(path)), None)


def downloaded_builds() -> list[str]:
    """Return the paths of Playwright's builds below `.venv`, without those whose download broke off."""
    folders = [marker.parent for marker in sorted((VENV / "browsers").glob("chromium*/INSTALLATION_COMPLETE"))]
    return [str(path) for folder in folders for name in BUILDS for path in folder.glob(f"*/{name}")]


def launch(playwright: Playwright) -> Browser:
    """Start the browser.

    Raises:
        SystemExit: There is none; the message says what to do.
    """
    try:
        return playwright.chromium.launch(executable_path=executable(), args=ARGUMENTS)
    except NoChromiumError as error:
        raise SystemExit(str(error)) from None


def run(command: Sequence[str], **variables: str) -> bool:
    """Run a command, whose output goes to the log, and tell if it succeeded."""
    VENV.mkdir(exist_ok=True)
    with (VENV / "chromium.log").open("a", encoding="utf-8") as log:
        print("$", *command, file=log, flush=True)
        environment = os.environ | variables
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, check=False
            )
        except OSError as error:
            print(error, file=log)
            return False
    return not done.returncode


def install_package() -> None:
    """Install Debian's package, if there is apt-get and the user may."""
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
    if not shutil.which("apt-get") or (prefix and not (shutil.which("sudo") and run([*prefix, "true"]))):
        return
    print("installing Debian's package chromium, for the tests of pages (about a minute)", flush=True)
    # The Makefile's TMPDIR lies in the checkout, which apt-get's own user may not be able to read.
    apt_get = [*prefix, "env", "-u", "TMPDIR", "DEBIAN_FRONTEND=noninteractive", "apt-get"]
    run([*apt_get, "update"])  # without it a new machine knows no package; if it fails, the lists may do
    run([*apt_get, "install", "-y", "chromium"])


def install_build() -> None:
    """Put Playwright's build of the browser below `.venv`."""
    print("downloading Playwright's Chromium into .venv, for the tests of pages (about a minute)", flush=True)
    run([*PLAYWRIGHT, "install", "chromium-headless-shell"], PLAYWRIGHT_BROWSERS_PATH=str(VENV / "browsers"))
    for path in downloaded_builds():
        run([path, "--version"])  # if it lacks a library of the system, the log says which


def ensure() -> None:
    """Install the browser if there is none.

    Raises:
        NoChromiumError: It cannot be installed either, or BNQAT_CHROMIUM is wrong.
    """
    if os.environ.get("BNQAT_CHROMIUM"):
        executable()
        return
    (VENV / "chromium.log").unlink(missing_ok=True)
    for install in (install_package, install_build):
        if installed():
            return
        install()
    if not installed():
        reason = "could not be installed (.venv/chromium.log says why)"
        raise NoChromiumError(f"the tests of pages need Chromium, which {reason}: {TO_DO}")


def main() -> int:
    """Make sure of a browser; return the exit code."""
    try:
        ensure()
    except NoChromiumError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

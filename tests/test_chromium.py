"""The order in which a browser is found or installed, with commands that only record how they were called."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tools import chromium

INSTALL = "apt-get install -y chromium"
FAILS = "exit 1"


@dataclass
class Machine:
    """A machine with no command but those that a test gives it."""

    folder: Path

    def __post_init__(self) -> None:
        self.playwright(FAILS)
        self.commands.mkdir()
        env = shutil.which("env")
        assert env is not None
        (self.commands / "env").symlink_to(env)

    @property
    def commands(self) -> Path:
        return self.folder / "bin"

    @property
    def calls(self) -> list[str]:
        """The recorded calls, in order."""
        log = self.folder / "calls"
        return log.read_text().splitlines() if log.exists() else []

    def script(self, path: Path, then: str = "") -> Path:
        """Write an executable that records its name and arguments."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'#!/bin/sh\necho "${{0##*/}} $*" >> {self.folder}/calls\n{then}\n')
        path.chmod(0o755)
        return path

    def command(self, name: str, then: str = "") -> str:
        """Put a command on PATH, and return its path."""
        return str(self.script(self.commands / name, then))

    def brings(self, path: Path) -> str:
        """Shell that makes an executable, as an installation does."""
        return f'/bin/mkdir -p {path.parent}; printf "#!/bin/sh\\n" > {path}; /bin/chmod +x {path}'

    def package(self) -> str:
        """Shell of an apt-get that installs Chromium."""
        return f'[ "$1" = install ] || exit 0\n{self.brings(self.commands / "chromium")}'

    def build(self) -> str:
        """Shell of a Playwright that downloads Chromium."""
        target = self.folder / ".venv" / "browsers" / "chromium_headless_shell-1"
        executable = target / "chrome-headless-shell-linux64" / "chrome-headless-shell"
        browsers = f'[ "$PLAYWRIGHT_BROWSERS_PATH" = {target.parent} ] || exit 1'
        return f"{browsers}\n{self.brings(executable)}; : > {target}/INSTALLATION_COMPLETE"

    def playwright(self, then: str) -> None:
        """Replace Playwright's command."""
        self.script(self.folder / "playwright", then)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine of a user who is not root, with no browser, and no way to install one."""
    bare = Machine(tmp_path)
    monkeypatch.setattr(chromium, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(chromium, "PLAYWRIGHT", (str(tmp_path / "playwright"),))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", str(bare.commands))
    monkeypatch.delenv("BNQAT_CHROMIUM", raising=False)
    return bare


def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def test_users_browser_comes_first(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.command("chromium")
    own = str(machine.script(machine.folder / "own"))
    monkeypatch.setenv("BNQAT_CHROMIUM", own)
    assert chromium.main() == 0
    assert chromium.executable() == own
    assert set(machine.calls) == {"own --version"}


def test_users_browser_that_does_not_start_is_named(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.command("chromium")
    machine.command("apt-get", machine.package())
    root(monkeypatch)
    monkeypatch.setenv("BNQAT_CHROMIUM", "/nowhere/chromium")
    assert chromium.main() == 2
    line = "BNQAT_CHROMIUM is /nowhere/chromium, which does not start; set it to the path of a Chromium\n"
    assert capsys.readouterr() == ("", line)
    assert machine.calls == []


@pytest.mark.parametrize("name", chromium.COMMANDS)
def test_browser_on_path_is_taken_silently(machine: Machine, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = machine.command(name)
    assert chromium.main() == 0
    assert chromium.executable() == path
    assert capsys.readouterr() == ("", "")


def test_command_that_does_not_start_is_passed_over(machine: Machine) -> None:
    machine.command("chromium-browser", FAILS)  # as Ubuntu's stand-in for the snap package
    path = machine.command("google-chrome")
    assert chromium.executable() == path


def test_root_installs_the_package(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root(monkeypatch)
    machine.command("apt-get", f'[ "$DEBIAN_FRONTEND$TMPDIR" = noninteractive ] || exit 1\n{machine.package()}')
    monkeypatch.setenv("TMPDIR", "/only/for/this/user")
    assert chromium.main() == 0
    assert chromium.executable() == str(machine.commands / "chromium")
    assert machine.calls == ["apt-get update", INSTALL]
    line = "installing Debian's package chromium, for the tests of pages (about a minute)\n"
    assert capsys.readouterr() == (line, "")


def test_sudo_installs_the_package_if_it_asks_for_no_password(machine: Machine) -> None:
    machine.command("true")
    machine.command("apt-get", machine.package())
    machine.command("sudo", '[ "$1" = -n ] || exit 1\nshift\nexec "$@"')
    assert chromium.main() == 0
    apt_get = "sudo -n env -u TMPDIR DEBIAN_FRONTEND=noninteractive"
    update, install = f"{apt_get} apt-get update", f"{apt_get} {INSTALL}"
    assert machine.calls == ["sudo -n true", "true ", update, "apt-get update", install, INSTALL]


@pytest.mark.parametrize("sudo", [None, FAILS])
def test_without_rights_the_build_is_downloaded(
    machine: Machine, sudo: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.command("apt-get", machine.package())
    if sudo:
        machine.command("sudo", sudo)
    machine.playwright(machine.build())
    assert chromium.main() == 0
    assert not [call for call in machine.calls if call.startswith("apt-get")]
    assert "playwright install chromium-headless-shell" in machine.calls
    line = "downloading Playwright's Chromium into .venv, for the tests of pages (about a minute)\n"
    assert capsys.readouterr() == (line, "")


def test_where_the_package_fails_the_build_is_downloaded_once(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    root(monkeypatch)
    machine.command("apt-get", FAILS)
    machine.playwright(machine.build())
    assert chromium.main() == 0
    assert machine.calls == ["apt-get update", INSTALL, "playwright install chromium-headless-shell"]
    assert chromium.executable().startswith(str(machine.folder / ".venv" / "browsers"))
    assert chromium.main() == 0
    assert len(machine.calls) == 3


def test_download_that_broke_off_is_not_taken(machine: Machine) -> None:
    machine.playwright(machine.build() + "\n/bin/rm $PLAYWRIGHT_BROWSERS_PATH/*/INSTALLATION_COMPLETE")
    assert chromium.main() == 2
    assert machine.calls == ["playwright install chromium-headless-shell"]


def test_without_any_way_one_line_says_what_to_do(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root(monkeypatch)
    machine.command("apt-get", "echo no such package >&2; exit 100")
    machine.playwright("echo no network >&2; exit 1")
    assert chromium.main() == 2
    assert capsys.readouterr().err == (
        "the tests of pages need Chromium, which could not be installed (.venv/chromium.log says why): "
        "install Debian's package chromium, or set BNQAT_CHROMIUM to the path of a Chromium\n"
    )
    log = (machine.folder / ".venv" / "chromium.log").read_text()
    assert "no such package" in log
    assert "no network" in log


def test_tests_and_tools_install_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    root(monkeypatch)
    machine.command("apt-get", machine.package())
    machine.playwright(machine.build())
    with pytest.raises(chromium.NoChromiumError, match="run `make test`, which installs it"):
        chromium.executable()
    assert machine.calls == []


@pytest.mark.parametrize("processes", ["0", "2"])
def test_run_of_pytest_ends_before_its_tests(tmp_path: Path, processes: str) -> None:
    (tmp_path / "pytest.ini").touch()
    (tmp_path / "test_page.py").write_text("def test_plain(): pass\ndef test_page(browser): pass\n")
    scratch = f"--basetemp={tmp_path}/scratch"
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-n", processes, scratch, str(tmp_path)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "BNQAT_CHROMIUM": "/nowhere/chromium"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, check=False)

    stopped = run()
    assert stopped.returncode in {pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERRUPTED}
    assert stopped.stdout.count("BNQAT_CHROMIUM is /nowhere/chromium, which does not start") == 1
    assert "no tests ran" in stopped.stdout
    assert "rror" not in stopped.stdout + stopped.stderr
    others = run("-k", "plain")
    assert others.returncode == 0
    assert "1 passed" in others.stdout

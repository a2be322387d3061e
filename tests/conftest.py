"""Fixtures: real models, made once per session, and those that BNQAT_CORPUS and BNQAT_MLPERF_TINY point to."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
# On some CPUs only, TensorFlow takes oneDNN's kernels, which have other names and round in other ways. Tests that tell
# kernels by name, or compare the bits of two functions, are to see the same kernels on every machine.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")

import pytest
from filelock import FileLock
from playwright.sync_api import Browser, sync_playwright

import bnqat
from tests.python_command import write_command
from tests.reliability.forks import HASH_SEED, PLAIN, Server, server
from tools import chromium

CORPUS = os.environ.get("BNQAT_CORPUS", "")
PUBLIC = sorted(p.parent.name for p in Path(CORPUS).glob("*/saved_model.pb")) if CORPUS else []
TINY = os.environ.get("BNQAT_MLPERF_TINY", "")
MLPERF_TINY = {p.parent.name: p.parent for p in sorted(Path(TINY).glob("*/saved_model.pb"))} if TINY else {}
if MLPERF_TINY and "mlcommons+tiny+1" in PUBLIC:  # the fourth of them, keyword spotting, is among the public models
    MLPERF_TINY["kws"] = Path(CORPUS) / "mlcommons+tiny+1"
PYTHON = f"python-{os.getpid()}"
"""Address of the server behind the command `python`: a name, not a path, which might be too long."""


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all processes of one run share."""
    base = tmp_path_factory.getbasetemp()
    return base if worker_id == "master" else base.parent


def once(target: Path, make: Callable[[Path], Any]) -> Path:
    """Make a directory in the first process that asks for it; the others wait until it is whole."""
    target.parent.mkdir(exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            make(target)
    return target


@pytest.fixture(scope="session")
def corpus(shared: Path) -> Path:
    """Folder of the public models; models without weights get random ones."""

    def fill(folder: Path) -> None:
        command = [sys.executable, str(Path(CORPUS) / "fill_weights.py"), str(folder)]
        subprocess.run(command, check=True, capture_output=True)

    return once(shared / "corpus", fill)


@pytest.fixture(params=PUBLIC or ["absent"])
def corpus_model(request: pytest.FixtureRequest) -> Path:
    """A public model. The test is skipped if the corpus is absent, and the summary reports that."""
    if not PUBLIC:
        pytest.skip("corpus absent: BNQAT_CORPUS is not set")
    name: str = request.param
    request.node.user_properties.append(("corpus", name))
    folder: Path = request.getfixturevalue("corpus")
    return folder / name


@pytest.fixture(params=MLPERF_TINY or ["absent"])
def mlperf_tiny(request: pytest.FixtureRequest) -> Path:
    """A model of MLPerf Tiny. The test is skipped if the models are absent, and the summary reports that."""
    if not MLPERF_TINY:
        pytest.skip("mlperf_tiny absent: BNQAT_MLPERF_TINY is not set")
    name: str = request.param
    request.node.user_properties.append(("mlperf_tiny", name))
    return MLPERF_TINY[name]


@pytest.fixture(scope="session")
def model(shared: Path) -> Callable[[str], Path]:
    """Path of a model by name, written when first asked for."""
    from tests.models.all import ALL  # TensorFlow, which the process that only hands out tests does not need

    return lambda name: once(shared / "models" / name, ALL[name])


@pytest.fixture(scope="session")
def weight_model(shared: Path) -> Callable[[str], Path]:
    """Path of a model with weights by name, written when first asked for."""
    from tests.models.weights import WEIGHT_MODELS

    return lambda name: once(shared / "weights" / name, WEIGHT_MODELS[name].make)


@pytest.fixture(scope="session")
def rewritten(model: Callable[[str], Path], shared: Path) -> Callable[..., Path]:
    """Path of a rewritten model by name and options, written when first asked for."""

    def path(name: str, **options: Any) -> Path:
        key = sha256(repr(sorted(options.items())).encode()).hexdigest()[:12]
        return once(
            shared / "rewritten" / f"{name}-{key}", lambda target: bnqat.rewrite(model(name), target, **options)
        )

    return path


@pytest.fixture(scope="session")
def forks() -> Iterator[Server]:
    """Server that runs each command in a process of its own."""
    with server(HASH_SEED) as started:
        yield started


@pytest.fixture(scope="session")
def plain_forks() -> Iterator[Server]:
    """Server that runs each program in a process that has imported TensorFlow and Keras 3, but nothing of bnqat."""
    with server(modules=PLAIN, python=PYTHON) as started:
        yield started


@pytest.fixture(scope="session")
def python(plain_forks: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: ARG001  it serves the command
    """Path of a command `python` that runs programs as `plain_forks` does, several at a time."""
    return write_command(tmp_path_factory.mktemp("command") / "bin" / "python", PYTHON)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium, one for each process."""
    with sync_playwright() as playwright:
        started = chromium.launch(playwright)
        yield started
        started.close()


def pytest_collection_finish(session: pytest.Session) -> None:
    """End the run if its tests need a browser and there is none; then prepare the garbage collector."""
    if not session.config.option.collectonly and any(
        "browser" in getattr(i, "fixturenames", ()) for i in session.items
    ):
        try:
            chromium.executable()
        except chromium.NoChromiumError as error:
            if hasattr(session.config, "workerinput"):  # a process of pytest-xdist, whose main process prints this
                session.shouldstop = str(error)
            pytest.exit(str(error), pytest.ExitCode.USAGE_ERROR)
    # The collector is to pass over what lives as long as the process: TensorFlow's modules, and the tests'.
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report the tests of models from elsewhere: run and passed, or not; `.ci/run` reads these lines."""
    properties = {p for report in terminalreporter.getreports("passed") for p in report.user_properties}
    for collection, exist in (("corpus", PUBLIC), ("mlperf_tiny", MLPERF_TINY)):
        ran = sum(name == collection for name, _ in properties)
        state = f"{ran} of {len(exist)} models ran" if exist else "absent, its tests were skipped"
        terminalreporter.write_line(f"{collection}: {state}")

"""Fixtures: real models, made once per session, and the public ones that BNQAT_CORPUS points to."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import pytest

import bnqat
from tests.models.all import ALL

CORPUS = os.environ.get("BNQAT_CORPUS", "")
PUBLIC = sorted(p.parent.name for p in Path(CORPUS).glob("*/saved_model.pb")) if CORPUS else []
ran: set[str] = set()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The public models, those without weights filled with random ones."""
    folder = tmp_path_factory.mktemp("corpus")
    command = [sys.executable, str(Path(CORPUS) / "fill_weights.py"), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(params=PUBLIC or ["absent"])
def corpus_model(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A public model; skipped, and the summary says so, where the corpus is absent."""
    if not PUBLIC:
        pytest.skip("corpus absent: BNQAT_CORPUS is not set")
    yield request.getfixturevalue("corpus") / request.param
    ran.add(request.param)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a model by name, written when first asked for."""
    folder = tmp_path_factory.mktemp("models")

    def path(name: str) -> Path:
        target = folder / name
        return target if target.exists() else ALL[name](target)

    return path


@pytest.fixture(scope="session")
def rewritten(model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Path of a rewritten model by name and options, written when first asked for."""
    folder = tmp_path_factory.mktemp("rewritten")
    done: dict[str, Path] = {}

    def path(name: str, **options: Any) -> Path:
        key = repr((name, sorted(options.items())))
        if key not in done:
            target = folder / f"{name}-{len(done)}"
            bnqat.rewrite(model(name), target, **options)
            done[key] = target
        return done[key]

    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say whether the public models were used; `.ci/run` reads this line."""
    state = f"{len(ran)} of {len(PUBLIC)} models ran" if CORPUS else "absent, its tests were skipped"
    terminalreporter.write_line(f"corpus: {state}")

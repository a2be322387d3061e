"""Fixtures: real models, made once per session, and the public ones that BNQAT_CORPUS points to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import pytest

import bnqat
from tests.models import MODELS

CORPUS = os.environ.get("BNQAT_CORPUS", "")
IN_SCOPE = (
    "mlcommons+tiny+1",
    "spotify+basic-pitch+1",
    "ArmDeveloperEcosystem+ml-image-classification-example-for-openmv+1",
)
"""The public models in TensorFlow 2's format whose batch norms are FusedBatchNormV3 fed by variables."""

ran: set[str] = set()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a model by name, written when first asked for."""
    folder = tmp_path_factory.mktemp("models")

    def path(name: str) -> Path:
        target = folder / name
        return target if target.exists() else MODELS[name](target)

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


@pytest.fixture(params=IN_SCOPE)
def corpus_model(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A public model; the test is skipped, and the summary says so, where the corpus is absent."""
    if not CORPUS:
        pytest.skip("corpus absent: BNQAT_CORPUS is not set")
    path = Path(CORPUS) / request.param
    assert path.is_dir(), f"BNQAT_CORPUS is set, but {path} is not there"
    yield path
    ran.add(request.param)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say whether the public models were used; `.ci/run` reads this line."""
    state = f"{len(ran)} of {len(IN_SCOPE)} models ran" if CORPUS else "absent, its tests were skipped"
    terminalreporter.write_line(f"corpus: {state}")

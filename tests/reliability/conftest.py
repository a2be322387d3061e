"""Where commands run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.reliability.forks import Server, server


@pytest.fixture(scope="session")
def forks() -> Iterator[Server]:
    """Where commands run, one for each process of the tests."""
    with server() as started:
        yield started

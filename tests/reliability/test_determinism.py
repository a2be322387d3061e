"""Equal input gives equal bytes: in other processes, with other hash seeds, for every command that writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness import digest
from tests.reliability.forks import HASH_SEED, Call, Server, server
from tests.reliability.trials import judged

OTHER_HASH_SEED = 1


@pytest.fixture(scope="module")
def servers(forks: Server) -> Iterator[list[Server]]:
    """Two processes, which order sets of strings in different ways."""
    assert HASH_SEED != OTHER_HASH_SEED
    with server(OTHER_HASH_SEED) as other:
        yield [forks, other]


def test_seeds_order_sets_in_different_ways(servers: list[Server]) -> None:
    """The other tests rely on different orders."""
    orders = {s.run(Call("tests.reliability.conditions:print_set", [])).out for s in servers}
    assert len(orders) == len(servers)


REWRITES = {
    "page": ("--html", "page.html"),
    "options": ("--report", "report.json", "--bits", "gamma=4,beta=6", "--range", "ema", "--ramp-steps", "100"),
    "dry run": ("--report", "report.json", "--dry-run"),
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(((name, options)) for name in ("keras_save", "nested", "v1_by_hand") for options in ("page", "options")),
        ("nested", "dry run"),  # its report is made as that of a rewrite
    ],
)
def test_rewrite(servers: list[Server], model: Callable[[str], Path], tmp_path: Path, name: str, options: str) -> None:
    written = []
    for number, process in enumerate(servers):
        folder = tmp_path / str(number)
        folder.mkdir()
        option, file, *others = REWRITES[options]
        outcome = process.cli("rewrite", model(name), folder / "target", option, folder / file, *others)
        assert judged(outcome, "rewrite") == "done", outcome
        written.append(digest(folder))
    assert written[0]
    assert written[0] == written[1]


@pytest.mark.parametrize("name", ["keras_save", "nested"])
@pytest.mark.parametrize("option", ["--params", "--fold", "json"])
def test_finalize(
    servers: list[Server], rewritten: Callable[..., Path], tmp_path: Path, name: str, option: str
) -> None:
    written = []
    for number, process in enumerate(servers):
        folder = tmp_path / str(number)
        folder.mkdir()
        file = folder / f"parameters.{'json' if option == 'json' else 'npz'}"
        options = ("--fold",) if option == "--fold" else ("--params", file)
        outcome = process.cli("finalize", rewritten(name), folder / "target", *options)
        assert judged(outcome, "finalize") == "done", outcome
        written.append(digest(folder))
    assert written[0] == written[1]


@pytest.mark.parametrize("form", ["json", "html", "txt"])
def test_diff(
    servers: list[Server], model: Callable[[str], Path], rewritten: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    written = []
    for number, process in enumerate(servers):
        file = tmp_path / f"{number}.{form}"
        formats = ("--format", "text") if form == "txt" else ()
        outcome = process.cli("diff", model("nested"), rewritten("nested"), "--output", file, *formats)
        assert judged(outcome, "diff") == "done", outcome
        written.append(file.read_bytes())
    assert written[0] == written[1]

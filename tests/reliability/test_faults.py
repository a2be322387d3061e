"""After any fault: the source as it was, the destination absent or whole, nothing left that the next run keeps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.harness import digest
from tests.reliability.conditions import small_disk
from tests.reliability.faults import HERE, Writing
from tests.reliability.forks import Call, Outcome, Server
from tests.reliability.trials import judged

MOMENTS = np.random.default_rng(0).uniform(0, 1.1, 8).tolist()
"""As shares of the time that a command takes; `make soak` takes others for an hour."""


@pytest.fixture(scope="module", params=["rewrite", "finalize", "rewrite over", "finalize over"])
def writing(
    request: pytest.FixtureRequest,
    forks: Server,
    model: Callable[[str], Path],
    rewritten: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Writing:
    """A command that writes a model."""
    command, _, over = request.param.partition(" ")
    source = model("keras_export") if command == "rewrite" else rewritten("keras_export")
    return Writing(forks, command, source, tmp_path_factory.mktemp("faults") / "folder", overwrite=bool(over))


@pytest.fixture
def rewriting(forks: Server, model: Callable[[str], Path], tmp_path: Path) -> Writing:
    """A rewrite to a new destination."""
    return Writing(forks, "rewrite", model("keras_export"), tmp_path / "folder")


def test_what_is_written_without_a_fault_loads(writing: Writing) -> None:
    assert judged(writing.run(), "run") == "done"
    tf.saved_model.load(str(writing.target))


def test_killed_at_random_moments(writing: Writing) -> None:
    results = {writing.killed(share) for share in MOMENTS}
    assert any(f.startswith("before") for f in results)


@pytest.mark.parametrize("writing", ["finalize over"], indirect=True)
def test_killed_at_every_step_of_writing(writing: Writing) -> None:
    results = [writing.checked(None, moment) for moment in writing.killed_everywhere()]
    assert "before, something left" in results, results
    assert any(f.startswith("after") for f in results), results


def test_killed_where_directories_cannot_be_exchanged(
    forks: Server, model: Callable[[str], Path], tmp_path: Path
) -> None:
    writing = Writing(forks, "rewrite", model("keras_export"), tmp_path / "folder", overwrite=True)
    aside = 0
    for moment in writing.killed_everywhere(Call(f"{HERE}:without_exchange", [])):
        if not writing.target.exists():
            aside += 1
            writing.earlier = None  # between two renames; the next run puts it back, and then overwrites it
        writing.checked(None, moment)
        writing.earlier = digest(writing.source)
    assert aside


def test_interrupted(writing: Writing) -> None:
    results = {writing.interrupted(share) for share in MOMENTS}
    assert any(f.endswith("refused") for f in results)


def test_full_disk(rewriting: Writing) -> None:
    """Sizes range from a disk on which not even a directory fits to one that holds all."""
    needed = sum(p.stat().st_size for p in rewriting.target.rglob("*") if p.is_file()) // 1024
    sizes = [8, needed // 4, needed // 2, needed, 2 * needed, 4 * needed]
    outcomes = [_on_disk(rewriting, kib) for kib in sizes]
    assert [judged(o, "full disk") for o in outcomes[:2]] == ["refused"] * 2
    assert judged(outcomes[-1], "large disk") == "done"
    for outcome in outcomes:
        leftovers = outcome.out.rpartition("left: ")[2].split()
        assert leftovers == (["target"] if outcome.code == 0 else []), outcome
        if outcome.code:
            assert "No space left on device" in outcome.err, outcome


def _on_disk(writing: Writing, kib: int) -> Outcome:
    writing.reset()
    arguments = ["rewrite", str(writing.source), str(writing.target)]
    return writing.server.run(
        Call(f"{HERE}:{small_disk.__name__}", [str(writing.folder), kib]),
        Call(f"{HERE}:listed", [str(writing.folder), arguments]),
    )


def test_files_may_not_grow(rewriting: Writing) -> None:
    for kib in (1, 4, 16):
        outcome = rewriting.run(Call(f"{HERE}:small_files", [kib]))
        assert judged(outcome, f"{kib} KiB") == "refused"
        assert "File too large" in outcome.err, outcome
        rewriting.checked(outcome, f"{kib} KiB")


def test_destination_that_cannot_be_written_to(rewriting: Writing) -> None:
    rewriting.reset()
    rewriting.folder.chmod(0o555)
    outcome = rewriting.server.cli(
        "rewrite", rewriting.source, rewriting.target, before=[Call(f"{HERE}:no_privileges", [])]
    )
    rewriting.folder.chmod(0o755)
    assert judged(outcome, "read-only") == "refused"
    assert "Permission denied" in outcome.err
    assert not list(rewriting.folder.iterdir())
    rewriting.checked(outcome, "read-only")


def test_permission_denied_half_way(rewriting: Writing) -> None:
    """The folder is closed when the new directory is there, so that it can neither move nor go."""
    closed = Call(f"{HERE}:once_there", [str(rewriting.folder), "os.rename", "closed", str(rewriting.folder)])
    outcome = rewriting.run(Call(f"{HERE}:no_privileges", []), closed)
    rewriting.folder.chmod(0o755)
    assert judged(outcome, "closed") == "refused"
    assert "Permission denied" in outcome.err
    rewriting.checked(outcome, "closed")


@pytest.mark.parametrize(("deed", "file"), [("changed", "saved_model.pb"), ("changed", "variables/variables.index")])
def test_source_changes(forks: Server, model: Callable[[str], Path], tmp_path: Path, deed: str, file: str) -> None:
    outcome, target = _meddled(forks, model("keras_export"), tmp_path, deed, file)
    assert judged(outcome, "changed") == "refused"
    assert "changed while it was read" in outcome.err
    assert not target.exists()


def test_source_vanishes(forks: Server, model: Callable[[str], Path], tmp_path: Path) -> None:
    outcome, target = _meddled(forks, model("keras_export"), tmp_path, "gone", "")
    assert judged(outcome, "gone") == "refused"
    assert not target.exists()


def _meddled(forks: Server, model: Path, folder: Path, deed: str, file: str) -> tuple[Outcome, Path]:
    """Change a source at the moment when writing the destination begins."""
    source, target = folder / "source", folder / "out" / "target"
    shutil.copytree(model, source)
    target.parent.mkdir()
    meddling = Call(f"{HERE}:once_there", [str(target.parent), "os.mkdir", deed, str(source / file)])
    outcome = forks.cli("rewrite", source, target, before=[meddling])
    assert not list(target.parent.iterdir())
    return outcome, target


def test_destination_appears_meanwhile(rewriting: Writing) -> None:
    appearing = Call(f"{HERE}:once_there", [str(rewriting.folder), "os.rename", "taken", str(rewriting.target)])
    outcome = rewriting.run(appearing)
    assert judged(outcome, "taken") == "refused"
    assert "written by another process" in outcome.err
    assert [p.name for p in rewriting.target.iterdir()] == ["other"]
    assert [p.name for p in rewriting.folder.iterdir()] == ["target"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_at_once(forks: Server, model: Callable[[str], Path], tmp_path: Path, overwrite: bool) -> None:
    writing = Writing(forks, "rewrite", model("keras_export"), tmp_path / "folder", overwrite=overwrite)
    for _ in range(3):
        outcomes = writing.run_twice()
        assert sorted(judged(o, "two") for o in outcomes) == (["done"] * 2 if overwrite else ["done", "refused"])
        assert sorted(p.name for p in writing.folder.iterdir()) == ["target"]
        assert digest(writing.target) == writing.expected


def test_reports_are_whole_or_absent(rewriting: Writing, tmp_path: Path) -> None:
    """Their folder is copied at each event about its files, which is the folder that a kill would leave there."""
    folder = tmp_path / "reports"
    report, page = folder / "report.json", folder / "page.html"
    folder.mkdir()
    rewriting.reset()
    written = rewriting.server.cli(
        *("rewrite", rewriting.source, rewriting.target, "--report", report, "--html", page),
        before=[Call(f"{HERE}:copied", [str(folder), str(tmp_path / "states")])],
    )
    assert judged(written, "reports") == "done"
    for name in (report.name, page.name):
        files = [state / name for state in (tmp_path / "states").iterdir()]
        assert len(files) > 8
        assert not all(file.exists() for file in files)
        assert all(_whole(file) for file in (*files, folder / name) if file.exists())
    assert _whole(report)
    assert _whole(page)


def _whole(file: Path) -> bool:
    text = file.read_text()
    return bool(json.loads(text)) if file.suffix == ".json" else text.rstrip().endswith("</html>")

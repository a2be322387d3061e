from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rewriter.ir import Error
from rewriter.savedmodel.staging import staged, write_whole


def write(folder: Path, text: str) -> None:
    for name in ("saved_model.pb", "b"):
        (folder / name).write_text(text)


def test_a_directory_appears_whole(tmp_path: Path) -> None:
    with staged(tmp_path / "out", overwrite=False) as folder:
        write(folder, "new")
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "b").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with staged(tmp_path / "out", overwrite=False) as folder:
            write(folder, "new")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_overwriting_needs_leave_and_a_saved_model(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write(out, "old")
    with pytest.raises(Error, match="--overwrite"), staged(out, overwrite=False):
        pass
    with staged(out, overwrite=True) as folder:
        write(folder, "new")
    assert (out / "b").read_text() == "new"
    (out / "saved_model.pb").unlink()
    with pytest.raises(Error, match="something other than a SavedModel"), staged(out, overwrite=True):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_parent_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Error, match="cannot write"), staged(tmp_path / "file" / "out", overwrite=False):
        pass


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor() as threads:
        read = threads.submit(pipe.read_bytes)
        write_whole(pipe, b"report")
        assert read.result() == b"report"
    assert pipe.is_fifo()


def test_a_link_to_a_file_stays(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    write_whole(tmp_path / "link", b"report")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"report"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link"]


def test_what_was_put_aside_is_put_back(tmp_path: Path) -> None:
    """A run was killed between two renames, where directories cannot be exchanged."""
    aside = tmp_path / ".out.bnqat-0123abcd-old"
    aside.mkdir()
    write(aside, "old")
    (tmp_path / ".out.bnqat-0123abcd").mkdir()
    (tmp_path / ".out.bnqat-0123abcd.lock").touch()
    with pytest.raises(Error, match="--overwrite"), staged(tmp_path / "out", overwrite=False):
        pass
    assert (tmp_path / "out" / "b").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_another_works_on_stays(tmp_path: Path) -> None:
    with staged(tmp_path / "out", overwrite=False) as first:
        write(first, "first")
        with staged(tmp_path / "out", overwrite=False) as second:
            write(second, "second")
        assert (first / "b").read_text() == "first"
        first_left = sorted(p.name for p in tmp_path.iterdir())
        (tmp_path / "out" / "b").unlink()
        (tmp_path / "out" / "saved_model.pb").unlink()
        (tmp_path / "out").rmdir()
    assert first_left == [first.name, f"{first.name}.lock", "out"]
    assert (tmp_path / "out" / "b").read_text() == "first"


def test_other_targets_files_stay(tmp_path: Path) -> None:
    lock = tmp_path / ".out2.bnqat-0123abcd.lock"
    lock.touch()
    with staged(tmp_path / "out", overwrite=False) as folder:
        write(folder, "new")
    assert lock.exists()

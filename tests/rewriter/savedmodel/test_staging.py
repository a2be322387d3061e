from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rewriter.ir import Error
from rewriter.savedmodel.staging import staged
from tests import harness


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


STAGE = """
import sys, time
from pathlib import Path
from rewriter.savedmodel.staging import staged
target = Path(sys.argv[1])
print("ready", flush=True)
for round in range(1000):
    with staged(target, overwrite=True) as folder:
        for name in ("saved_model.pb", *"abcdefgh"):
            (folder / name).write_text(str(round) * 5000)
"""


def test_killed_at_any_moment_the_destination_is_whole_or_absent(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for i in range(25):
        target = tmp_path / f"out{i}"
        with subprocess.Popen([sys.executable, "-c", STAGE, str(target)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
        if target.exists():
            contents = {p.read_text() for p in target.iterdir()}
            assert len(contents) == 1
            assert len(list(target.iterdir())) == 9
            seen.add("whole")
        else:
            seen.add("absent")
    assert "whole" in seen


REWRITE = """
import sys
import bnqat
bnqat.rewrite
import tensorflow as tf
tf.constant(0)
print("ready", flush=True)
bnqat.rewrite(sys.argv[1], sys.argv[2], overwrite=True)
print("done", flush=True)
"""


def test_a_rewrite_killed_leaves_the_old_model_or_a_new_one(
    model: Callable[[str], Path], rewritten: Callable[..., Path], tmp_path: Path
) -> None:
    source = model("keras_save")
    new = harness.digest(rewritten("keras_save"))
    for i, delay in enumerate((0.0, 0.05, 0.15, 0.4)):
        target = tmp_path / f"out{i}"
        if i % 2:
            target.mkdir()
            (target / "saved_model.pb").write_text("old")
        command = [sys.executable, "-c", REWRITE, str(source), str(target)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        if i % 2 and (target / "saved_model.pb").read_bytes() == b"old":
            continue
        assert not target.exists() or harness.digest(target) == new

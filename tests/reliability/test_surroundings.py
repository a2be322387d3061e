"""Surroundings of a command: its streams, its paths and files, and signals just after its start."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.reliability.forks import Call, Server
from tests.reliability.trials import judged

Paths = Callable[..., Path]
HERE = "tests.reliability.conditions"
BNQAT = (sys.executable, "-m", "rewriter.app.cli")
NPZ = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)


def test_closed_streams(model: Paths, tmp_path: Path) -> None:
    """An opened file must not get the descriptor of stdout, or printed text goes into it."""
    command = [*BNQAT, "rewrite", str(model("keras_export")), str(tmp_path / "target")]
    done = subprocess.run(["/bin/sh", "-c", '"$@" >&- 2>&-', "sh", *command], check=False)
    assert done.returncode == 0
    assert (tmp_path / "target" / "saved_model.pb").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["target"]


def test_full_streams(forks: Server, model: Paths, tmp_path: Path) -> None:
    outcome = forks.cli("inspect", model("keras_export"), before=[Call(f"{HERE}:full", [1])])
    assert judged(outcome, "stdout") == "refused"
    assert "No space left" in outcome.err
    outcome = forks.cli("--help", before=[Call(f"{HERE}:full", [1])])
    assert judged(outcome, "--help") == "refused"
    written = tmp_path / "written"
    outcome = forks.cli("rewrite", model("keras_export"), written, before=[Call(f"{HERE}:full", [1])])
    assert judged(outcome, "written") == "refused"
    assert f"{written} was written, but stdout cannot be written to" in outcome.err
    shutil.rmtree(written)
    rewrite = ("rewrite", model("keras_export"), tmp_path / "target")
    outcome = forks.cli(*rewrite, "-v", before=[Call(f"{HERE}:full", [2])])
    assert (outcome.code, outcome.out) == (2, "")
    assert not list(tmp_path.iterdir())
    assert forks.cli(*rewrite, before=[Call(f"{HERE}:full", [2])]).code == 0  # nothing is said there without -v


def test_streams_of_other_encodings(forks: Server, model: Paths) -> None:
    outcome = forks.cli("inspect", model("keras_export"), before=[Call(f"{HERE}:ascii_only", [])])
    assert judged(outcome, "ascii") == "done"
    assert "\\u2588" in outcome.out


def test_a_fault_of_our_own_is_one_line(forks: Server, model: Paths) -> None:
    outcome = forks.cli("inspect", model("keras_export"), before=[Call(f"{HERE}:at_fault", [])])
    assert outcome.code == 2
    assert re.fullmatch(
        r"bnqat: error: a fault of bnqat's, KeyError at line \d+ of .*conditions.py; .*BNQAT_TRACEBACK=1 .*\n",
        outcome.err,
    )


@pytest.mark.parametrize("moment", [0.4, 1.5, 3.0])
def test_interrupted_while_it_starts(model: Paths, tmp_path: Path, moment: float) -> None:
    """The signal comes while Python, TensorFlow or the model is loaded, or after the end."""
    command = [*BNQAT, "rewrite", str(model("keras_export")), str(tmp_path / "target")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(moment)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()
    lines = err.splitlines()
    leftovers = [p.name for p in tmp_path.iterdir()]
    if process.returncode == 0:
        assert (lines, leftovers) == ([], ["target"])
    else:
        assert process.returncode == 2
        assert lines == ["bnqat: error: interrupted; nothing is left half-written"]
        assert leftovers in ([], ["target"])


@pytest.mark.parametrize("option", ["DST", "--report", "--html"])
def test_links_in_a_circle(forks: Server, model: Paths, tmp_path: Path, option: str) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    arguments = [loop] if option == "DST" else [tmp_path / "target", option, loop]
    outcome = forks.cli("rewrite", model("keras_export"), *arguments)
    assert judged(outcome, option) == "refused"
    assert "loop" in outcome.err
    assert [p.name for p in tmp_path.iterdir()] == ["loop"]


def test_names_that_are_no_text(forks: Server, model: Paths, tmp_path: Path) -> None:
    name = os.fsdecode(b"t\xff")
    outcome = forks.cli("rewrite", model("keras_export"), tmp_path / name)
    assert judged(outcome, "DST") == "refused"
    assert "is not UTF-8" in outcome.err
    outcome = forks.cli("inspect", tmp_path / name)
    assert judged(outcome, "SRC") == "refused"
    outcome = forks.cli("rewrite", model("keras_export"), tmp_path / "out[1]")
    assert judged(outcome, "DST") == "refused"
    assert "out[1] holds [" in outcome.err
    assert not list(tmp_path.iterdir())


def test_the_current_directory(forks: Server, model: Paths, tmp_path: Path) -> None:
    here = Call("os:chdir", [str(tmp_path)])
    outcome = forks.cli("rewrite", model("keras_export"), ".", "--overwrite", before=[here])
    assert judged(outcome, "DST") == "refused"
    assert "cannot write ." in outcome.err
    assert not list(tmp_path.iterdir())


def test_directories_nested_deep(forks: Server, model: Paths, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model("keras_export"), source)
    here = os.open(source, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        inner = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = inner
    os.close(here)
    outcome = forks.cli("rewrite", source, tmp_path / "target")
    subprocess.run(["/bin/rm", "-r", str(source)], check=True)  # Python cannot either
    assert judged(outcome, "nested") == "refused"
    assert "source" in outcome.err
    assert not list(tmp_path.iterdir())


def test_one_file_for_two_things(forks: Server, model: Paths, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("file")
    outcome = forks.cli(
        *("rewrite", model("keras_export"), tmp_path / "target", "--report", tmp_path / "file"),
        *("--html", tmp_path / "link"),
    )
    assert judged(outcome, "--report") == "refused"
    assert "the report and the page would both be written to" in outcome.err
    assert [p.name for p in tmp_path.iterdir()] == ["link"]


def test_report_to_stdout(forks: Server, model: Paths, tmp_path: Path) -> None:
    outcome = forks.cli("rewrite", model("keras_export"), tmp_path / "target", "--report", "/dev/stdout")
    assert judged(outcome, "--report") == "done"
    assert json.loads(outcome.out[outcome.out.index("{") :])["sites_rewritten"]


def test_a_replaced_report_keeps_its_mode(forks: Server, model: Paths, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.touch()
    report.chmod(0o640)
    outcome = forks.cli("rewrite", model("keras_export"), tmp_path / "target", "--dry-run", "--report", report)
    assert judged(outcome, "--report") == "done"
    assert json.loads(report.read_text())["sites_rewritten"]
    assert stat.S_IMODE(report.stat().st_mode) == 0o640


def test_rules_nested_too_deep(forks: Server, tmp_path: Path) -> None:
    file = tmp_path / "bnqat.toml"
    file.write_text(f"[[rules]]\nmatch = '{'(' * 3000}'\n")
    outcome = forks.cli("rewrite", "--config", file, "--print-config")
    assert judged(outcome, "--config") == "refused"
    assert "rules.0.match" in outcome.err
    assert len(outcome.err) < 400


def test_rules_that_take_for_ever(forks: Server, model: Paths, tmp_path: Path) -> None:
    file = tmp_path / "bnqat.toml"
    file.write_text("[[rules]]\nmatch = '^(?:[a-z_]|[a-z]|[b-z_]|.)*(?=9|8)'\nbits = 4\n")
    outcome = forks.cli("rewrite", "--config", file, model("keras_export"), tmp_path / "target", limit=20)
    assert judged(outcome, "--config") == "refused"
    assert "takes longer than" in outcome.err


def _saved(**arrays: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=True, **arrays)
    return file.getvalue()


def _zipped(name: str, content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def _npy(header: str) -> bytes:
    """Return a .npy file whose header does not match its array."""
    file = io.BytesIO()
    np.save(file, NPZ)
    return file.getvalue().replace(str(NPZ.shape).encode(), header.encode())


def _patched(**fields: int) -> bytes:
    """An archive whose only member has other fields, in its own header and in the directory's."""
    data = bytearray(_saved(x=NPZ))
    places = {"flags": (6, 8), "method": (8, 10)}
    for field, value in fields.items():
        for start, offset in zip((b"PK\x03\x04", b"PK\x01\x02"), places[field], strict=True):
            data[data.index(start) + offset] = value
    return bytes(data)


def _damaged() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, x=NPZ)
    return file.getvalue().replace(file.getvalue()[200:260], b"\xff" * 60)


ARRAYS = {
    "no .npz": b"",
    "no .npz file": _saved(x=NPZ)[:2000],
    "no .npz file of": _damaged(),
    "compression method": _patched(method=99),
    "is encrypted": _patched(flags=1),
    "reading array data": _zipped("x.npy", _npy("(999999999,)")),
    "of arrays": _zipped("x.npy", _npy("((((((((((((")),
    "'x.txt' in it is none": _zipped("x.txt", b"text"),
    "one array without a name": _npy(str(NPZ.shape)),
    "Object arrays cannot": _saved(x=np.array([{}], dtype=object)),
    "holds no values": _saved(x=NPZ[:0]),
    "is to have the shape": _saved(x=NPZ[:, :3]),
    "takes input_1, not a, b": _saved(a=NPZ, b=NPZ),
    "takes input_1, not nothing": _saved(),
    "not complex64": _saved(x=NPZ.astype(np.complex64)),
    "not datetime64": _saved(x=np.zeros(NPZ.shape, "datetime64[s]")),
}


@pytest.mark.parametrize("why", sorted(ARRAYS))
def test_inputs_that_are_none(forks: Server, model: Paths, rewritten: Paths, tmp_path: Path, why: str) -> None:
    file = tmp_path / "inputs.npz"
    file.write_bytes(ARRAYS[why])
    for arguments in (("verify", model("keras_export")), ("sensitivity", "--bits", "4")):
        outcome = forks.cli(*arguments, rewritten("keras_export"), "--inputs", file, limit=10, mib=1500)
        assert judged(outcome, arguments[0]) == "refused"
        assert why in outcome.err, outcome.err


def test_read_only_below(forks: Server, model: Paths, tmp_path: Path) -> None:
    """The source is read-only, and so is the model to be overwritten."""
    source, target = tmp_path / "source", tmp_path / "folder" / "target"
    shutil.copytree(model("as_text"), source)
    (source / "assets.extra" / "deep").mkdir(parents=True)
    (source / "assets.extra" / "deep" / "file").write_text("text")
    for path in sorted(source.rglob("*"), reverse=True):
        path.chmod(0o555 if path.is_dir() else 0o444)
    target.parent.mkdir()
    before = [Call(f"{HERE}:no_privileges", [])]
    for options in ((), ("--overwrite",)):
        outcome = forks.cli("rewrite", source, target, *options, before=before)
        assert outcome.code == 0, outcome.err
        assert os.listdir(target.parent) == ["target"]
        assert all(path.stat().st_mode & stat.S_IWUSR for path in target.rglob("*"))
        for path in target.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)


def test_a_directory_to_write_to_alone(forks: Server, model: Paths, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o333)
    before = [Call(f"{HERE}:no_privileges", [])]
    outcome = forks.cli("rewrite", model("module"), folder / "target", before=before)
    folder.chmod(0o755)
    assert outcome.code == 0, outcome.err
    assert os.listdir(folder) == ["target"]

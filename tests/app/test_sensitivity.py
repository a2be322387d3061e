from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from tests import harness
from tests.reliability.forks import Server

Paths = Callable[..., Path]
X = harness.images((None, 8, 8, 3), batch=8)
ROLES = ("gamma", "beta", "moving_mean", "moving_variance")


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    np.savez(tmp_path / "data.npz", anything=X.numpy())
    return tmp_path / "data.npz"


def test_each_error_is_that_of_one_quantizer_at_one_width(model: Paths, rewritten: Paths) -> None:
    path = rewritten("module", start_step=50, ramp_steps=7)
    before = harness.digest(path)
    report = bnqat.sensitivity(path, {"x": X.numpy()}, bits=(4, 2))
    assert report.inputs == 8
    assert [(row.layer, row.role) for row in report.rows] == [(layer, role) for layer in (0, 1) for role in ROLES]
    source = tf.saved_model.load(str(model("module")))
    reference = source.serve(X).numpy()
    alone = tf.saved_model.load(str(path))
    alone.quantization.start_step.assign(0)
    alone.quantization.ramp_steps.assign(0)
    for role in ROLES:
        getattr(alone.quantization.bits, role).assign(0)
    for row in report.rows:
        for bits in (4, 2):
            for role in ROLES:
                getattr(alone.quantization.layer_bits, role).assign([-1, -1])
            widths = [-1, -1]
            widths[row.layer] = bits
            getattr(alone.quantization.layer_bits, row.role).assign(widths)
            error = np.linalg.norm(alone.serve(X) - reference) / np.linalg.norm(reference)
            assert error > 0
            np.testing.assert_allclose(row.error[bits], error, rtol=1e-4)
        assert row.error[2] > row.error[4]
    assert harness.digest(path) == before


def test_the_table_the_plot_and_json(forks: Server, rewritten: Paths, inputs: Path, tmp_path: Path) -> None:
    path = rewritten("module")
    done = forks.cli("sensitivity", path, "--inputs", inputs, "--bits", "8,2", "--plot", tmp_path / "plot.svg")
    assert done.code == 0, done.err
    assert f"executing {path}" in done.err
    lines = [line for line in done.out.splitlines() if "gamma" in line or "moving_variance" in line]
    assert len(lines) == 4
    assert "8 bits" in done.out
    text = (tmp_path / "plot.svg").read_text()
    assert text.startswith("<?xml")
    done = forks.cli("sensitivity", path, "--inputs", inputs, "--bits", "8,2", "--json")
    rows = json.loads(done.out)["rows"]
    assert len(rows) == 8
    assert set(rows[0]["error"]) == {"8", "2"}


def test_after_training_and_saving_again(rewritten: Paths, inputs: Path, tmp_path: Path) -> None:
    loaded = tf.saved_model.load(str(rewritten("keras_save")))
    loaded.quantization.train(X)
    signatures = {"serving_default": loaded.signatures["serving_default"]}
    tf.saved_model.save(loaded, str(tmp_path / "again"), signatures=signatures)
    assert len(bnqat.sensitivity(tmp_path / "again", dict(np.load(inputs)), bits=[3]).rows) == 8


def test_the_first_format_too(rewritten: Paths) -> None:
    rows = bnqat.sensitivity(rewritten("v1_two_fused_serving"), {"x": X.numpy()}, bits=[3]).rows
    assert {row.role for row in rows} == set(ROLES)
    assert all(row.error[3] > 0 for row in rows)


def test_mistakes_are_one_line(forks: Server, model: Paths, rewritten: Paths, inputs: Path, tmp_path: Path) -> None:
    path = rewritten("module")
    np.savez(tmp_path / "small.npz", x=X.numpy()[:, :4])
    (tmp_path / "text.npz").write_text("no arrays")
    np.savez(tmp_path / "two.npz", x=X.numpy(), y=X.numpy())
    for arguments, message in (
        ((model("module"), "--inputs", inputs), "has no quantisers"),
        ((path, "--inputs", tmp_path / "none.npz"), "there is no file"),
        ((path, "--inputs", tmp_path / "text.npz"), "is no .npz file of arrays; write one with numpy.savez"),
        ((path, "--inputs", tmp_path / "small.npz"), "is to have the shape"),
        ((path, "--inputs", tmp_path / "two.npz"), "takes x, not x, y"),
        ((path, "--inputs", inputs, "--bits", "1"), "widths are numbers from 2 to 16"),
        ((path, "--inputs", inputs, "--plot", tmp_path / "plot.xyz"), "cannot be written"),
        ((tmp_path / "nowhere", "--inputs", inputs), "does not exist"),
    ):
        done = forks.cli("sensitivity", *arguments)
        assert done.code == 2, (arguments, done.err)
        assert message in done.err
        assert "Traceback" not in done.err

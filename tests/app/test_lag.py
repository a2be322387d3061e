"""Tests of the notes on moving statistics that are far from a batch's: they appear only where that is so."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

import bnqat
from rewriter.app.cli import main
from rewriter.app.lag import statistics_errors
from tests import harness
from tests.mutate import with_value

Paths = Callable[..., Path]
X = harness.images((None, 8, 8, 3), 96)
GIVEN = {"x": X.numpy()}
PHASES: dict[str, Any] = {"bits": 4, "momentum": 0.99, "freeze_step": 2**40}


def saved(path: Path, target: Path, *, steps: int = 0, reestimate: bool = False, **controls: int) -> Path:
    """Save a rewritten model after some training calls, with the given control variables."""
    loaded = tf.saved_model.load(str(path))
    for _ in range(steps):
        loaded.quantization.train(X)
    for name, value in controls.items():
        getattr(loaded.quantization, name).assign(value)
    if reestimate:
        bnqat.reestimate_statistics(loaded, [X], 1)
    signatures = {k: v for k, v in loaded.signatures.items() if k != "train"}
    tf.saved_model.save(loaded, str(target), signatures=signatures)
    return target


@pytest.fixture(scope="module")
def untrained(rewritten: Paths, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was saved again without training."""
    return saved(rewritten("module", **PHASES), tmp_path_factory.mktemp("lag") / "untrained")


def notes(path: Path, **options: Any) -> list[str]:
    all_notes = bnqat.finalize(path, path.parent / "final", dry_run=True, **options).notes
    return [note for note in all_notes if "moving statistics" in note]


def test_measured_on_a_batch(rewritten: Paths, tmp_path: Path) -> None:
    """The model's statistics are random; those of the batch are not far from themselves."""
    path = rewritten("module", bits=8)
    (far,) = notes(saved(path, tmp_path / "far"), inputs=GIVEN)
    assert far.startswith("the moving statistics of 2 of 2 batch norms are far from those of the given inputs: ")
    assert "bnqat.reestimate_statistics" in far
    near = saved(path, tmp_path / "near", reestimate=True)
    assert notes(near, inputs=GIVEN) == []
    assert bnqat.verify(path, tmp_path / "far", inputs=GIVEN).notes == [far]
    assert bnqat.verify(path, tmp_path / "far").notes == []  # random inputs say nothing


def test_the_error_is_that_of_normalised_values(rewritten: Paths, tmp_path: Path) -> None:
    """With statistics that are not quantised, on the first batch norm's own input."""
    path = saved(rewritten("module", bits=8, quantize_average="none"), tmp_path / "model")
    loaded = tf.saved_model.load(str(path))
    norm = loaded.norms[0]
    y = tf.nn.conv2d(X, loaded.kernels[0], 1, "SAME").numpy().reshape(-1, norm.gamma.shape[0])
    by_batch = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-3)
    by_average = (y - norm.moving_mean.numpy()) / np.sqrt(norm.moving_variance.numpy() + 1e-3)
    errors = np.sqrt(np.mean((by_batch - by_average) ** 2, 0))
    first = next(iter(statistics_errors(path, GIVEN).values()))
    np.testing.assert_allclose(first, np.median(errors), rtol=1e-3)  # the kernel's variance is Bessel-corrected


@pytest.mark.parametrize(
    ("given", "noted"),
    [
        ({"steps": 3}, True),
        ({"step": 298}, True),
        ({"step": 299}, False),  # 0.99 ** 299 is less than 0.05
        ({}, False),  # not trained
        ({"steps": 3, "reestimate": True}, False),
        ({"step": 10, "freeze_step": 3}, False),  # the weights are trained for them
        ({"step": 10, "freeze_step": 10}, True),
    ],
)
def test_told_from_the_number_of_steps(
    given: dict[str, Any], noted: bool, untrained: Path, rewritten: Paths, tmp_path: Path
) -> None:
    if "steps" in given:
        path = saved(rewritten("module", **PHASES), tmp_path / "model", **given)
    else:
        path = untrained
        for name, value in given.items():
            key = f"quantization/{name}/.ATTRIBUTES/VARIABLE_VALUE"
            path = with_value(path, tmp_path / name / "model", key, partial(np.full_like, fill_value=value))
    lag_notes = notes(path)
    assert bool(lag_notes) is noted
    if given == {"steps": 3}:
        assert bnqat.verify(rewritten("module", **PHASES), path).notes == lag_notes
        assert lag_notes[0].startswith("97% of the moving statistics of ")
        assert "which made 3 steps at momentum 0.99" in lag_notes[0]


def test_an_export_for_inference_holds_no_momentum(rewritten: Paths, tmp_path: Path) -> None:
    layer = bnqat.KerasLayer(rewritten("module", bits=4))
    layer(X, training=True)
    inputs = keras.Input((8, 8, 3))
    keras.Model(inputs, layer(inputs)).export(str(tmp_path / "served"), verbose=False)
    assert notes(tmp_path / "served") == []
    with pytest.raises(bnqat.Error, match="served holds no training function"):
        notes(tmp_path / "served", inputs=GIVEN)


def test_inputs_that_cannot_be_compared(rewritten: Paths, tmp_path: Path) -> None:
    source = rewritten("module", bits=4)
    path = saved(source, tmp_path / "model")
    few = {"x": GIVEN["x"][:8]}
    for inputs, message in (
        (few, "the inputs have 8 rows; a batch of at least 64"),
        ({"a": X.numpy(), "b": X.numpy()}, "the training function takes x, not a, b"),
        ({"x": X.numpy()[..., 0]}, "the input x is to have the shape"),
    ):
        with pytest.raises(bnqat.Error, match=message):
            notes(path, inputs=inputs)
    assert bnqat.verify(source, path, inputs=few).notes == []


def test_the_command_line(rewritten: Paths, tmp_path: Path) -> None:
    path = saved(rewritten("module", bits=4), tmp_path / "model")
    np.savez(tmp_path / "data.npz", **GIVEN)
    command = ["finalize", str(path), str(tmp_path / "final"), "--inputs", str(tmp_path / "data.npz")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.stderr
    assert "note: the moving statistics of 2 of 2 batch norms are far" in done.stdout
    assert "executing" in done.stderr
    shown = CliRunner().invoke(main, ["verify", str(rewritten("module", bits=4)), str(path), *command[3:]])
    assert "note: the moving statistics of 2 of 2 batch norms are far" in shown.stdout
    absent = CliRunner().invoke(main, [*command[:2], str(tmp_path / "other"), "--inputs", str(tmp_path / "none.npz")])
    assert absent.exit_code == 2
    assert "there is no file" in absent.stderr
    assert not (tmp_path / "other").exists()


def test_quantisers_that_never_acted_in_training(rewritten: Paths, tmp_path: Path) -> None:
    def note_of(path: Path) -> list[str]:
        all_notes = bnqat.finalize(path, tmp_path / "final", dry_run=True).notes
        return [n for n in all_notes if "no step of training has seen a quantised value" in n]

    path = rewritten("module", bits=4, start_step=2)
    assert note_of(path) == [
        "the model was trained for 0 steps, and its quantisers start at step 2: no step of training has seen a "
        "quantised value"
    ]
    model = tf.saved_model.load(path)
    for steps, noted in ((2, True), (1, False)):
        for _ in range(steps):
            model.train(tf.zeros([4, 8, 8, 3]))
        saved = tmp_path / f"after_{int(model.quantization.step)}"
        tf.saved_model.save(model, saved, signatures=model.signatures["serving_default"])
        assert bool(note_of(saved)) is noted
    assert note_of(rewritten("module", bits=4)) == []

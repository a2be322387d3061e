from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

import bnqat
from passes.training.cut_gradients import CutGradients
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from tests import harness
from tests.models import Net, save_module
from tests.models.detectors import v1_detector


class Augmented(Net):
    """An op without a gradient before all variables."""

    def call(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        return super().call(tf.image.adjust_contrast(x, 1.5), training)


class Between(Net):
    """An op without a gradient between a variable and the others."""

    def call(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        return super().call(tf.image.adjust_contrast(x * self.kernels[0][0, 0, 0, 0], 1.5), training)


def gradients(path: Path) -> list[Any]:
    loaded = tf.saved_model.load(str(path))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(loaded.train(harness.images((None, 8, 8, 3))) ** 2)
    values: list[Any] = tape.gradient(loss, [*loaded.kernels, loaded.norms[0].gamma])
    return values


def test_variables_after_it_get_their_gradients(tmp_path: Path) -> None:
    report = bnqat.rewrite(save_module(Augmented(), tmp_path / "m"), tmp_path / "out")
    assert any("AdjustContrastv2" in note for note in report.notes)
    assert all(np.abs(g).max() > 0 for g in gradients(tmp_path / "out"))


def test_variables_before_it_get_what_comes_by_other_ways(tmp_path: Path) -> None:
    report = bnqat.rewrite(save_module(Between(), tmp_path / "m"), tmp_path / "out", start_step=10**6)
    (note,) = [note for note in report.notes if "the gradient of train stops at" in note]
    assert "AdjustContrastv2" in note
    kernel, *others = gradients(tmp_path / "out")
    assert all(np.abs(g).max() > 0 for g in (kernel, *others))
    net = Between()
    stopped = net.kernels[0][0, 0, 0, 0].numpy()
    with tf.GradientTape() as tape:
        x = tf.image.adjust_contrast(harness.images((None, 8, 8, 3)) * stopped, 1.5)
        loss = tf.reduce_sum(Net.call(net, x, training=True) ** 2)
    np.testing.assert_allclose(kernel, tape.gradient(loss, net.kernels[0]), rtol=1e-5, atol=1e-5)


class InLoop(Net):
    """An op without a gradient in a loop's body."""

    def call(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        y = super().call(x, training)
        return (
            tf.while_loop(
                lambda i, _: i < 2, lambda i, v: (i + 1, tf.image.adjust_contrast(v, 1.5)), (0, y[:, None, None, :3])
            )[1][:, 0, 0]
            + y[:, :3]
        )


def test_an_op_in_a_loop(tmp_path: Path) -> None:
    report = bnqat.rewrite(save_module(InLoop(), tmp_path / "m"), tmp_path / "out")
    assert any("stops at AdjustContrastv2" in note for note in report.notes)
    assert all(np.abs(g).max() > 0 for g in gradients(tmp_path / "out"))


def test_in_tensorflow_1_format(tmp_path: Path) -> None:
    report = bnqat.rewrite(v1_detector(tmp_path / "m"), tmp_path / "out")
    assert any("stops at CombinedNonMaxSuppression" in note for note in report.notes)
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    variables = [v for v in loaded.variables if v.trainable]
    with tf.GradientTape() as tape:
        outputs = loaded.signatures["train"](x=harness.images((None, 8, 8, 3)))
        loss = tf.reduce_sum(outputs["raw_scores"] ** 2)
    assert all(g is not None and np.abs(g).max() > 0 for g in tape.gradient(loss, variables))


def test_without_such_ops_nothing_changes(tmp_path: Path) -> None:
    before = load(save_module(Net(), tmp_path / "m"))
    after, (step,) = Pipeline([CutGradients()]).run(before)
    assert after is before
    assert step.edits == ()

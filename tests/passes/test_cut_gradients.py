from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from passes.cut_gradients import CutGradients
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from tests import harness
from tests.models import Net, save_module


class Augmented(Net):
    """An op without a gradient before all variables."""

    def call(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        return super().call(tf.image.adjust_contrast(x, 1.5), training)


class Between(Net):
    """An op without a gradient after variables: training through it is the source's mistake."""

    def call(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        return super().call(tf.image.adjust_contrast(x * self.kernels[0][0, 0, 0, 0], 1.5), training)


def gradients(path: Path) -> list[Any]:
    loaded = tf.saved_model.load(str(path))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(loaded.train(harness.images((None, 8, 8, 3))) ** 2)
    found: list[Any] = tape.gradient(loss, [*loaded.kernels, loaded.norms[0].gamma])
    return found


def test_variables_after_it_get_their_gradients(tmp_path: Path) -> None:
    report = bnqat.rewrite(save_module(Augmented(), tmp_path / "m"), tmp_path / "out")
    assert any("AdjustContrastv2" in note for note in report.notes)
    assert all(np.abs(g).max() > 0 for g in gradients(tmp_path / "out"))


def test_nothing_is_cut_that_trains(tmp_path: Path) -> None:
    report = bnqat.rewrite(save_module(Between(), tmp_path / "m"), tmp_path / "out")
    assert not any("AdjustContrastv2" in note for note in report.notes)
    with pytest.raises(LookupError, match="AdjustContrastv2"):
        gradients(tmp_path / "out")


def test_without_such_ops_nothing_changes(tmp_path: Path) -> None:
    before = load(save_module(Net(), tmp_path / "m"))
    after, (step,) = Pipeline([CutGradients()]).run(before)
    assert after is before
    assert step.edits == ()

"""Exports of Keras 3, which has no fused batch norm: all are fused, and train as in Keras."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from sklearn.datasets import load_digits

import bnqat
from passes.batch_norm.sites import sites
from rewriter.savedmodel.read import load
from tests.models import perturb
from tests.test_fused import FUSING, TOLERANCE, difference

NETS = {
    "MobileNetV2": "out_relu",
    "ResNet50": "conv2_block2_out",
    "EfficientNetB0": "block3a_activation",
    "DenseNet121": "conv3_block2_concat",
}
"""Nets, and the layer up to which they are taken; what follows repeats the same blocks. MobileNetV2 is whole."""


def export(model: Any, path: Path) -> Path:
    with contextlib.redirect_stdout(io.StringIO()):
        model.export(str(path), verbose=False)
    return path


def served(path: Path, x: np.ndarray) -> np.ndarray:
    """Return the default signature's only output, from a V1 session, which loads fast."""
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session:
        signature = v1.saved_model.load(session, ["serve"], str(path)).signature_def["serving_default"]
        ((_, x_info),) = signature.inputs.items()
        ((_, output),) = signature.outputs.items()
        return session.run(output.name, {x_info.name: x})  # type: ignore[no-any-return]


@pytest.mark.parametrize("net", NETS)
def test_nets_are_raised_completely_and_serve_the_same(net: str, tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    whole = getattr(keras.applications, net)(weights=None, include_top=False, input_shape=(64, 64, 3))
    features = whole.get_layer(NETS[net]).output
    outputs = keras.layers.Dense(10, "softmax")(keras.layers.GlobalAveragePooling2D()(features))
    model = keras.Model(whole.input, outputs)
    perturb(model.weights)
    count = sum(isinstance(layer, keras.layers.BatchNormalization) for layer in model.layers)
    source = export(model, tmp_path / "m")
    report = bnqat.rewrite(source, tmp_path / "f", passes=FUSING)
    assert (report.sites_found, report.sites_fused, report.declined, report.skipped) == (count, count, [], [])
    assert {s.kind for s in load(tmp_path / "f").analysis(sites)} == {"fused"}
    x = np.random.default_rng(0).normal(0.3, 1.5, (3, 64, 64, 3)).astype("float32")
    assert difference([served(tmp_path / "f", x)], [served(source, x)]) < TOLERANCE


def small_net() -> Any:
    """A net for digits with batch norm of rank 4, 3 and 2, with and without scale and centre."""
    keras.utils.set_random_seed(0)
    layers = keras.layers
    stack = [layers.Input((8, 8, 1)), layers.Conv2D(12, 3), layers.BatchNormalization(momentum=0.9), layers.ReLU()]
    stack += [layers.Conv2D(16, 3, use_bias=False), layers.BatchNormalization(momentum=0.9, scale=False), layers.ReLU()]
    stack += [layers.Reshape((16, 16)), layers.Conv1D(16, 3), layers.BatchNormalization(momentum=0.9, center=False)]
    stack += [layers.ReLU(), layers.Flatten(), layers.Dense(32), layers.BatchNormalization(momentum=0.9), layers.ReLU()]
    return keras.Sequential([*stack, layers.Dense(10)])


def test_fine_tuning_follows_keras_own_loss_curve(tmp_path: Path) -> None:
    """40 steps of SGD on digits, Keras' own model beside the derived training of its fused export."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype("float32")
    model = small_net()
    source = export(model, tmp_path / "m")
    report = bnqat.rewrite(source, tmp_path / "q", start_step=2**40, momentum=0.9)
    assert (report.sites_found, report.sites_fused) == (4, 4)
    loaded = tf.saved_model.load(str(tmp_path / "q"))
    runs = (
        (lambda x: model(x, training=True), [v.value for v in model.trainable_variables]),
        (loaded.train, list(loaded.quantization.trainable_variables)),
    )
    curves = []
    for call, variables in runs:
        losses = []
        for step in range(40):
            picked = np.random.default_rng(step).choice(len(images), 32, replace=False)
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(
                    tf.nn.sparse_softmax_cross_entropy_with_logits(labels[picked], call(tf.constant(images[picked])))
                )
            for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
                variable.assign_sub(0.1 * gradient)
            losses.append(loss.numpy())
        curves.append(np.array(losses))
    assert curves[0][-1] < 0.3 * curves[0][0]
    np.testing.assert_allclose(curves[1], curves[0], rtol=2e-4)
    expected = [v.numpy() for v in model.non_trainable_variables]
    moving = {v.name: v.numpy() for v in loaded.quantization.variables if not v.trainable}
    actual = [moving[v.path + ":0"] for v in model.non_trainable_variables]
    assert difference(actual, expected) < 1e-4

"""Models without batch norms, in each format; most with dropout, which their serving functions leave out."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tests.models import perturb, save_keras
from tests.models.v1 import Options, settings, v1, write

INPUTS = 6
RATE = 0.5


def _draw(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.5, shape).astype(np.float32)


class Plain(tf.Module):
    """Two matrices with biases; `serve`."""

    def __init__(self) -> None:
        super().__init__(name="plain")
        self.kernels = [tf.Variable(_draw(INPUTS, 8, seed=1), name="kernel_0")]
        self.kernels += [tf.Variable(_draw(8, 3, seed=2), name="kernel_1")]
        self.biases = [tf.Variable(_draw(8, seed=3), name="bias_0"), tf.Variable(_draw(3, seed=4), name="bias_1")]

    def call(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        hidden = tf.nn.elu(tf.nn.bias_add(x @ self.kernels[0], self.biases[0]))
        if training:
            hidden = tf.nn.dropout(hidden, RATE)
        return tf.nn.bias_add(hidden @ self.kernels[1], self.biases[1])

    @tf.function(input_signature=[tf.TensorSpec((None, INPUTS), name="x")])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        return self.call(x, training=False)


class Called(Plain):
    """A `Plain` whose layers are functions that serving and training share, one of them in a conditional."""

    def __init__(self) -> None:
        super().__init__()
        first, second = zip(self.kernels, self.biases, strict=True)
        self.first = tf.function(lambda x: tf.nn.elu(tf.nn.bias_add(x @ first[0], first[1])))
        self.second = tf.function(lambda x: tf.nn.bias_add(x @ second[0], second[1]))

    def call(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        del training
        hidden = self.first(x)
        return tf.cond(tf.reduce_sum(x) > -1e6, lambda: self.second(hidden), lambda: self.second(-hidden))


def keras2() -> Any:
    """Two dense layers of Keras 2, with dropout between them."""
    import tf_keras

    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(0)
    layers = tf_keras.layers
    model = tf_keras.Sequential(
        [layers.Input((INPUTS,)), layers.Dense(8, "elu"), layers.Dropout(RATE), layers.Dense(3)]
    )
    perturb(model.weights)
    return model


def export_keras3(path: Path) -> Path:
    """Keras 3's export of two dense layers with dropout between them."""
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = keras.Sequential([layers.Input((INPUTS,)), layers.Dense(8, "elu"), layers.Dropout(RATE), layers.Dense(3)])
    perturb(model.weights)
    with contextlib.redirect_stdout(io.StringIO()):
        model.export(str(path), verbose=False)
    return path


def save_plain_v1(path: Path, mode: str = "", **options: Any) -> Path:
    """Write the net in TensorFlow 1's format.

    Args:
        path: where to write.
        mode: "" for a graph without dropout; "placeholder" or "default" for one that chooses it by a boolean
            placeholder, the second with a default.
        options: `Options` of the graph.
    """
    with settings(Options(**options)):
        x = v1.placeholder(tf.float32, [None, INPUTS], name="x")
        module = [_draw(INPUTS, 8, seed=1), _draw(8, seed=3), _draw(8, 3, seed=2), _draw(3, seed=4)]
        names = ("kernel_0", "offset_0", "kernel_1", "offset_1")
        held = [v1.get_variable(name, initializer=value) for name, value in zip(names, module, strict=True)]
        hidden = tf.nn.elu(tf.nn.bias_add(tf.matmul(x, held[0]), held[1]))
        inputs = {"x": x}
        if mode:
            is_training = (
                v1.placeholder(tf.bool, [], name="is_training")
                if mode == "placeholder"
                else v1.placeholder_with_default(False, [], name="is_training")
            )
            inputs |= {"is_training": is_training} if mode == "placeholder" else {}
            kept = hidden
            hidden = v1.cond(is_training, lambda: tf.nn.dropout(kept, RATE), lambda: tf.identity(kept))
        logits = tf.identity(tf.nn.bias_add(tf.matmul(hidden, held[2]), held[3]), name="logits")
        write(path, inputs, {"logits": logits})
    return path


def _save(module: Plain, path: Path) -> Path:
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve})
    return path


PLAIN_MODELS: dict[str, Callable[[Path], Path]] = {
    "module": lambda p: _save(Plain(), p),
    "called": lambda p: _save(Called(), p),
    "keras2": lambda p: save_keras(keras2(), p),
    "keras3": export_keras3,
    "v1": save_plain_v1,
    "v1_references": lambda p: save_plain_v1(p, references=True),
    "v1_default": lambda p: save_plain_v1(p, "default"),
    "v1_placeholder": lambda p: save_plain_v1(p, "placeholder", control_flow_v2=True),
}
"""Makers by name; each writes one SavedModel."""

"""Real SavedModels for tests and benchmarks.

Weights are random; statistics and scales are drawn so that nothing is 0 or 1. `python -m tests.models DIR`
writes all of them below DIR.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf

SHAPE = (None, 8, 8, 3)


def perturb(variables: Iterable[Any], seed: int = 0) -> None:
    """Give batch-norm variables and biases values as training might have left them."""
    rng = np.random.default_rng(seed)
    for variable in variables:
        name = getattr(variable, "path", variable.name)
        size = tuple(variable.shape)
        if "variance" in name:
            variable.assign(rng.uniform(0.3, 2.0, size))
        elif "gamma" in name:
            variable.assign(rng.uniform(0.5, 1.5, size) * rng.choice([-1, 1], size, p=[0.1, 0.9]))
        elif len(size) == 1:
            variable.assign(rng.normal(0, 0.2, size))


class FusedBatchNorm(tf.Module):
    """A batch norm on the fused kernel, as a library would write it. `factor` is 1 - momentum."""

    def __init__(self, channels: int, factor: float = 0.1, scale: bool = True, center: bool = True) -> None:
        super().__init__()
        self.gamma = tf.Variable(tf.ones([channels]), name="gamma") if scale else None
        self.beta = tf.Variable(tf.zeros([channels]), name="beta") if center else None
        self.moving_mean = tf.Variable(tf.zeros([channels]), trainable=False, name="moving_mean")
        self.moving_variance = tf.Variable(tf.ones([channels]), trainable=False, name="moving_variance")
        self.factor = factor
        self.channels = channels

    def __call__(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=tf.ones([self.channels]) if self.gamma is None else self.gamma,
            offset=tf.zeros([self.channels]) if self.beta is None else self.beta,
            mean=self.moving_mean,
            variance=self.moving_variance,
            epsilon=1e-3,
            is_training=training,
            exponential_avg_factor=self.factor if training else 1.0,
        )
        if training:
            self.moving_mean.assign(mean)
            self.moving_variance.assign(variance)
        return y


class Net(tf.Module):
    """Two convolutions with batch norm; `serve` and, with `Trainable`, the source's own `train`."""

    activation: Callable[[tf.Tensor], tf.Tensor] = staticmethod(tf.nn.relu)

    def __init__(self, scale: bool = True, center: bool = True, factor: float = 0.1) -> None:
        super().__init__(name="net")
        rng = np.random.default_rng(1)
        self.kernels = [
            tf.Variable(rng.normal(0, 0.4, (3, 3, 3, 8)).astype("float32"), name="kernel_0"),
            tf.Variable(rng.normal(0, 0.2, (3, 3, 8, 16)).astype("float32"), name="kernel_1"),
        ]
        self.norms = [FusedBatchNorm(8, factor, scale, center), FusedBatchNorm(16, factor, scale, center)]
        perturb(v for norm in self.norms for v in norm.variables)

    def call(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        for kernel, norm in zip(self.kernels, self.norms, strict=True):
            x = self.activation(norm(tf.nn.conv2d(x, kernel, 1, "SAME"), training))
        return tf.reduce_mean(x, [1, 2])

    @tf.function(input_signature=[tf.TensorSpec(SHAPE, name="x")])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        return self.call(x, training=False)


class Trainable(Net):
    """A `Net` with the source's own training function."""

    @tf.function(input_signature=[tf.TensorSpec(SHAPE, name="x")])
    def train(self, x: tf.Tensor) -> tf.Tensor:
        return self.call(x, training=True)


class Activated(Net):
    """A `Net` with another activation, which may have a custom gradient."""

    def __init__(self, activation: Callable[[tf.Tensor], tf.Tensor]) -> None:
        super().__init__()
        self.activation = activation


class Shared(Net):
    """A `Net` in which one function computes both batch norms, called with different variables."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = [FusedBatchNorm(8), FusedBatchNorm(8)]
        perturb(v for norm in self.norms for v in norm.variables)

        def norm(x: tf.Tensor, gamma: Any, beta: Any, mean: Any, variance: Any) -> tf.Tensor:
            return tf.raw_ops.FusedBatchNormV3(
                x=x, scale=gamma, offset=beta, mean=mean, variance=variance, epsilon=1e-3, is_training=False
            )[0]

        self.norm = tf.function(norm)

    def call(self, x: tf.Tensor, training: bool) -> tf.Tensor:
        if training:
            raise NotImplementedError
        x = tf.nn.conv2d(x, self.kernels[0], 1, "SAME")
        for bn in self.norms:
            x = tf.nn.relu(self.norm(x, bn.gamma, bn.beta, bn.moving_mean, bn.moving_variance))
        return tf.reduce_mean(x, [1, 2])


def save_module(module: tf.Module, path: Path) -> Path:
    """Save a module with `serve` as its default signature."""
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve})
    return path


def small_keras(dropout: float = 0.0) -> Any:
    """A small convolutional net of Keras 2."""
    import tf_keras

    tf_keras.backend.clear_session()  # so that names are the same every time
    tf_keras.utils.set_random_seed(0)
    layers = tf_keras.layers
    model = tf_keras.Sequential(
        [
            layers.Input((8, 8, 3)),
            layers.Conv2D(8, 3),
            layers.BatchNormalization(momentum=0.9),
            layers.ReLU(),
            layers.DepthwiseConv2D(3),
            layers.BatchNormalization(momentum=0.9, epsilon=1e-2),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            *([layers.Dropout(dropout)] if dropout else []),
            layers.Dense(10),
        ]
    )
    perturb(model.weights)
    return model


def keras_application(name: str) -> Any:
    """`MobileNetV2` or `ResNet50` of Keras 2 at 96 x 96 with ten classes."""
    import tf_keras

    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(0)
    model = getattr(tf_keras.applications, name)(weights=None, input_shape=(96, 96, 3), classes=10)
    perturb(model.weights)
    return model


def mobilenet_short() -> Any:
    """`MobileNetV2` at 32 x 32 up to its first addition, with ten classes; what follows repeats the same blocks."""
    import tf_keras

    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(0)
    whole = tf_keras.applications.MobileNetV2(weights=None, include_top=False, input_shape=(32, 32, 3))
    features = tf_keras.layers.GlobalAveragePooling2D()(whole.get_layer("block_2_add").output)
    model = tf_keras.Model(whole.input, tf_keras.layers.Dense(10, "softmax")(features))
    perturb(model.weights)
    return model


def save_keras(model: Any, path: Path) -> Path:
    """Keras 2's `save` in the SavedModel format: every layer's functions, in both modes."""
    import absl.logging

    absl.logging.set_verbosity(absl.logging.ERROR)
    model.save(str(path), save_format="tf")
    return path


def export_keras(model: Any, path: Path) -> Path:
    """Keras 2's `export`: inference only."""
    import contextlib
    import io

    with contextlib.redirect_stdout(io.StringIO()):
        model.export(str(path))
    return path


MODELS: dict[str, Callable[[Path], Path]] = {
    "module": lambda p: save_module(Net(), p),
    "module_train": lambda p: save_module(Trainable(), p),
    "module_silu": lambda p: save_module(Activated(tf.nn.silu), p),
    "module_shared": lambda p: save_module(Shared(), p),
    "keras_save": lambda p: save_keras(small_keras(), p),
    "keras_dropout": lambda p: save_keras(small_keras(0.5), p),
    "keras_export": lambda p: export_keras(small_keras(), p),
    "mobilenet_save": lambda p: save_keras(keras_application("MobileNetV2"), p),
    "mobilenet_export": lambda p: export_keras(keras_application("MobileNetV2"), p),
    "mobilenet_short_save": lambda p: save_keras(mobilenet_short(), p),
    "mobilenet_short_export": lambda p: export_keras(mobilenet_short(), p),
}
"""Makers by name; each writes one SavedModel."""

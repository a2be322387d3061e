"""Batch norm whose mode is a boolean tensor, chosen by `tf.cond` in every place where people choose it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tests.models.forms import EPSILON, IMAGE, Variables, assign_sub

Norm = Callable[[tf.Tensor, Variables, tf.Tensor], tf.Tensor]


def _apply(x: tf.Tensor, v: Variables, mean: tf.Tensor, variance: tf.Tensor) -> tf.Tensor:
    """Apply a batch norm as engineers write it by hand."""
    inv = tf.math.rsqrt(variance + EPSILON) * v.gamma
    return (x * inv) - (mean * inv) + v.beta


def _update(v: Variables, mean: tf.Tensor, variance: tf.Tensor) -> tf.Tensor:
    assign_sub(v, mean, variance)
    return tf.constant(0)


def _moments(x: tf.Tensor) -> Any:
    return tf.nn.moments(x, list(range(x.shape.rank - 1)))


def _moving(v: Variables) -> Any:
    return tf.identity(v.moving_mean), tf.identity(v.moving_variance)


def moments_inside(x: tf.Tensor, v: Variables, training: tf.Tensor) -> tf.Tensor:
    """The batch's statistics are computed in the branch that needs them; the chosen ones are averaged."""
    mean, variance = tf.cond(training, lambda: _moments(x), lambda: _moving(v))
    tf.cond(training, lambda: _update(v, mean, variance), lambda: tf.constant(0))
    return _apply(x, v, mean, variance)


def moments_outside(x: tf.Tensor, v: Variables, training: tf.Tensor) -> tf.Tensor:
    """The batch's statistics are computed in either mode, and averaged in one."""
    batch = _moments(x)
    mean, variance = tf.cond(training, lambda: batch, lambda: _moving(v))
    tf.cond(training, lambda: _update(v, *batch), lambda: tf.constant(0))
    return _apply(x, v, mean, variance)


def updates_inside(x: tf.Tensor, v: Variables, training: tf.Tensor) -> tf.Tensor:
    """The branch for training keeps the averages too."""

    def train() -> Any:
        mean, variance = _moments(x)
        assign_sub(v, mean, variance)
        return mean, variance

    return _apply(x, v, *tf.cond(training, train, lambda: _moving(v)))


def updates_always(x: tf.Tensor, v: Variables, training: tf.Tensor) -> tf.Tensor:
    """The averages take the chosen statistics in either mode, which in inference leaves them."""
    mean, variance = tf.cond(training, lambda: _moments(x), lambda: _moving(v))
    assign_sub(v, mean, variance)
    return _apply(x, v, mean, variance)


def inverted(x: tf.Tensor, v: Variables, training: tf.Tensor) -> tf.Tensor:
    """The condition is inverted: the branch for inference comes first."""
    serving = tf.logical_not(training)
    mean, variance = tf.cond(serving, lambda: _moving(v), lambda: _moments(x))
    tf.cond(serving, lambda: tf.constant(0), lambda: _update(v, mean, variance))
    return _apply(x, v, mean, variance)


def _kernel(x: tf.Tensor, v: Variables, training: bool) -> Any:
    nothing = tf.constant([], tf.float32)
    mean, variance = (nothing, nothing) if training else (v.moving_mean, v.moving_variance)
    return tf.raw_ops.FusedBatchNormV3(
        x=x, scale=v.gamma, offset=v.beta, mean=mean, variance=variance, epsilon=EPSILON, is_training=training
    )[:3]


def two_kernels(x: tf.Tensor, v: Variables, training: tf.Tensor) -> tf.Tensor:
    """One kernel for each mode, and a choice between their outputs."""
    trained, mean, variance = _kernel(x, v, training=True)
    inferred = _kernel(x, v, training=False)[0]
    y = tf.cond(training, lambda: trained, lambda: inferred)
    tf.cond(training, lambda: _update(v, mean, variance), lambda: tf.constant(0))
    return y


def two_kernels_updated(x: tf.Tensor, v: Variables, training: tf.Tensor) -> tf.Tensor:
    """The branch that takes the trained one keeps the averages."""
    trained, mean, variance = _kernel(x, v, training=True)
    inferred = _kernel(x, v, training=False)[0]

    def train() -> tf.Tensor:
        assign_sub(v, mean, variance)
        return trained

    return tf.cond(training, train, lambda: inferred)


def two_kernels_always(x: tf.Tensor, v: Variables, training: tf.Tensor) -> tf.Tensor:
    """The averages are updated in inference too; so the kernel for training has to run."""
    trained, mean, variance = _kernel(x, v, training=True)
    inferred = _kernel(x, v, training=False)[0]
    assign_sub(v, mean, variance)
    return tf.cond(training, lambda: trained, lambda: inferred)


def two_by_hand(x: tf.Tensor, v: Variables, training: tf.Tensor) -> tf.Tensor:
    """Single ops for each mode."""
    mean, variance = _moments(x)
    trained, inferred = _apply(x, v, mean, variance), _apply(x, v, *_moving(v))
    y = tf.cond(training, lambda: trained, lambda: inferred)
    tf.cond(training, lambda: _update(v, mean, variance), lambda: tf.constant(0))
    return y


def selected(x: tf.Tensor, v: Variables, training: tf.Tensor) -> tf.Tensor:
    """The statistics are chosen by `tf.where`, which computes both."""
    batch = _moments(x)
    mean, variance = (tf.where(training, b, m) for b, m in zip(batch, _moving(v), strict=True))
    tf.cond(training, lambda: _update(v, *batch), lambda: tf.constant(0))
    return _apply(x, v, mean, variance)


class Chosen(tf.Module):
    """Two layers with a product between them; the mode is an input."""

    def __init__(self, norm: Norm, shape: tuple[int, ...] = IMAGE) -> None:
        super().__init__(name="chosen")
        rng = np.random.default_rng(5)
        self.norm = norm
        self.layers = [Variables(shape[-1]), Variables(shape[-1])]
        self.mix = tf.Variable(rng.normal(0, 0.6, (shape[-1], shape[-1])).astype("float32"), name="mix")
        specs = [tf.TensorSpec((None, *shape), name="x"), tf.TensorSpec([], tf.bool, name="training")]
        self.serve = tf.function(self.call, input_signature=specs)

    def call(self, x: tf.Tensor, training: tf.Tensor) -> tf.Tensor:
        """Apply the layers, each after a mix of channels."""
        for layer in self.layers:
            x = tf.nn.relu(self.norm(tf.ensure_shape(tf.tensordot(x, self.mix, 1), x.shape), layer, training))
        return x


NORMS: dict[str, Norm] = {
    "chosen_moments_inside": moments_inside,
    "chosen_moments_outside": moments_outside,
    "chosen_updates_inside": updates_inside,
    "chosen_updates_always": updates_always,
    "chosen_inverted": inverted,
    "chosen_two_kernels": two_kernels,
    "chosen_two_kernels_updated": two_kernels_updated,
    "chosen_two_kernels_always": two_kernels_always,
    "chosen_two_by_hand": two_by_hand,
    "chosen_selected": selected,
}


def _maker(norm: Norm) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        module = Chosen(norm)
        tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve})
        return path

    return make


CHOSEN_MODELS: dict[str, Callable[[Path], Path]] = {name: _maker(norm) for name, norm in NORMS.items()}

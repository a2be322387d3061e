"""A model with a batch norm and two weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tensorflow as tf

from tests.models import FusedBatchNorm, save_module


class Normalized(tf.Module):
    """Convolution, batch norm, and a product with a matrix."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(5)
        self.kernel = tf.Variable(rng.normal(0, 0.3, (3, 3, 3, 8)).astype(np.float32), name="kernel")
        self.norm = FusedBatchNorm(8)
        self.matrix = tf.Variable(rng.normal(0, 1, (8, 5)).astype(np.float32), name="matrix")

    @tf.function(input_signature=[tf.TensorSpec((None, 6, 6, 3), name="x")])
    def serve(self, x: tf.Tensor) -> tf.Tensor:
        hidden = tf.nn.relu(self.norm(tf.nn.conv2d(x, self.kernel, 1, "SAME"), training=False))
        return tf.reduce_mean(hidden, [1, 2]) @ self.matrix


def save_normalized(path: Path) -> Path:
    return save_module(Normalized(), path)

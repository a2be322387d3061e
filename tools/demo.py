"""The whole job on real data: train, rewrite, fine-tune from the rewritten SavedModel alone.

A small convolutional net learns scikit-learn's handwritten digits in float. `bnqat` rewrites its SavedModel at
4 bits. The rewritten model is fine-tuned by a plain TensorFlow loop that knows nothing of bnqat; its
quantisers start after one epoch.

    python tools/demo.py [--bits 4] [--epochs 4]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import numpy as np
import tensorflow as tf
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import bnqat

BATCH = 32
CHANNELS = (16, 32, 32)


class Digits(tf.Module):
    """Three convolutions with fused batch norm, for 8 x 8 grey images."""

    def __init__(self) -> None:
        super().__init__(name="digits")
        sizes = zip((1, *CHANNELS), CHANNELS, strict=False)
        self.kernels = [self._glorot((3, 3, a, b), f"conv_{i}/kernel") for i, (a, b) in enumerate(sizes)]
        self.gamma = [tf.Variable(tf.ones([c]), name=f"norm_{i}/gamma") for i, c in enumerate(CHANNELS)]
        self.beta = [tf.Variable(tf.zeros([c]), name=f"norm_{i}/beta") for i, c in enumerate(CHANNELS)]
        self.mean = [self._moving(tf.zeros([c]), f"norm_{i}/moving_mean") for i, c in enumerate(CHANNELS)]
        self.variance = [self._moving(tf.ones([c]), f"norm_{i}/moving_variance") for i, c in enumerate(CHANNELS)]
        self.dense = self._glorot((CHANNELS[-1], 10), "dense/kernel")
        self.bias = tf.Variable(tf.zeros([10]), name="dense/bias")

    @staticmethod
    def _glorot(shape: tuple[int, ...], name: str) -> Any:
        return tf.Variable(tf.keras.initializers.GlorotUniform(seed=len(name))(shape), name=name)

    @staticmethod
    def _moving(value: Any, name: str) -> Any:
        return tf.Variable(value, trainable=False, name=name)

    def call(self, x: Any, training: bool) -> Any:
        """Logits [N, 10] of images [N, 8, 8, 1]."""
        for i, kernel in enumerate(self.kernels):
            x = tf.nn.conv2d(x, kernel, 1 if i == 0 else 2, "SAME")
            x, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
                x=x,
                scale=self.gamma[i],
                offset=self.beta[i],
                mean=self.mean[i],
                variance=self.variance[i],
                epsilon=1e-3,
                is_training=training,
                exponential_avg_factor=0.05 if training else 1.0,
            )
            if training:
                self.mean[i].assign(mean)
                self.variance[i].assign(variance)
            x = tf.nn.relu(x)
        return tf.reduce_mean(x, [1, 2]) @ self.dense + self.bias

    @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 1), name="image")])
    def serve(self, image: Any) -> Any:
        """Logits, for inference."""
        return self.call(image, training=False)

    @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 1), name="image")])
    def learn(self, image: Any) -> Any:
        """Logits, for training; updates the moving statistics."""
        return self.call(image, training=True)


def fit(train: Any, variables: Any, data: tuple[Any, Any], *, epochs: int, rate: float) -> None:
    """Train with Adam on shuffled batches; the order is the same on every run."""
    images, labels = data
    optimizer = tf.keras.optimizers.Adam(rate)
    rng = np.random.default_rng(0)

    @tf.function
    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, train(x))
        optimizer.apply_gradients(zip(tape.gradient(losses, variables), variables, strict=True))

    for _ in range(epochs):
        order = rng.permutation(len(images))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            chosen = order[start : start + BATCH]
            step(tf.constant(images[chosen]), tf.constant(labels[chosen]))


def accuracy(serve: Any, images: Any, labels: Any) -> float:
    """Share of right answers, in percent."""
    return float(100 * np.mean(np.argmax(serve(tf.constant(images)), -1) == labels))


def run(bits: int, epochs: int, folder: Path) -> list[tuple[str, str, float]]:
    """Rows of the table: model, what batch norm computes with, accuracy on unseen digits in percent."""
    data = load_digits()
    images = (data.images[..., None] / 16).astype("float32")
    x, x_test, y, y_test = train_test_split(images, data.target, test_size=0.3, random_state=0, stratify=data.target)
    module = Digits()
    fit(module.learn, module.trainable_variables, (x, y), epochs=8, rate=3e-3)
    tf.saved_model.save(module, str(folder / "float"), signatures={"serving_default": module.serve})
    rows = [("float", "float32", accuracy(module.serve, x_test, y_test))]
    del module

    bnqat.rewrite(folder / "float", folder / "rewritten", bits=bits, start_step=len(x) // BATCH)
    model = tf.saved_model.load(str(folder / "rewritten"))
    start = model.quantization.start_step.numpy()
    model.quantization.start_step.assign(0)
    rows.append(("rewritten", f"{bits} bits", accuracy(model.serve, x_test, y_test)))
    model.quantization.start_step.assign(start)
    fit(model.train, list(model.quantization.trainable_variables), (x, y), epochs=epochs, rate=1e-3)
    rows.append(("fine-tuned", f"{bits} bits", accuracy(model.serve, x_test, y_test)))
    print(f"{model.quantization.step.numpy()} steps, quantised from step {start} on")
    return rows


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--bits", type=int, default=4, help="width of the codes")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of fine-tuning")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(options.bits, options.epochs, Path(folder))
    table = Table(title="Handwritten digits, unseen in training", box=box.SIMPLE_HEAD)
    table.add_column("model")
    table.add_column("batch-norm variables")
    table.add_column("accuracy", justify="right")
    for name, kind, value in rows:
        table.add_row(name, kind, f"{value:.2f} %")
    Console().print(table)


if __name__ == "__main__":
    main()

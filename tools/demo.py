"""The whole way on real data: train in float, rewrite, fine-tune on two replicas, resume, finalise, run on LiteRT.

A small convolutional net learns scikit-learn's handwritten digits with Keras. `bnqat` rewrites its SavedModel at
4 bits. The rewritten model is fine-tuned by Keras' `fit` under a `MirroredStrategy` of two logical devices: first with
float batch norms, then with quantised ones, then with frozen statistics. In the middle the run is given up, and another
one resumes it. What comes out is finalised and run by the LiteRT interpreter, in float and in integers.

    python -m tools.demo [--bits 4] [--epochs 6]
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

import keras
import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import bnqat

BATCH = 32
CHANNELS = (16, 32, 32)


class Data(NamedTuple):
    """Images [N, 8, 8, 1] from 0 to 1 and labels, to train with and to test with."""

    x: np.ndarray
    y: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @property
    def steps(self) -> int:
        """Steps in an epoch; a last smaller batch is dropped."""
        return len(self.x) // BATCH

    @property
    def batches(self) -> Any:
        """Training data in an order that differs between epochs and repeats in each run."""
        # `fit` is told not to shuffle: it cannot shuffle a dataset, and would warn that it does not.
        data = tf.data.Dataset.from_tensor_slices((self.x, self.y)).shuffle(len(self.x), seed=0)
        return data.batch(BATCH, drop_remainder=True)

    def accuracy(self, outputs: Any) -> float:
        """Share of right answers for the test images, in percent."""
        return float(100 * np.mean(np.argmax(outputs, -1) == self.y_test))


def say(line: str) -> None:
    """Print a line at once, also into a pipe."""
    print(line, flush=True)


def digits() -> Data:
    """Scikit-learn's handwritten digits, which come with its package."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 16).astype("float32")
    x, x_test, y, y_test = train_test_split(images, labels, test_size=0.3, random_state=0, stratify=labels)
    return Data(x, y, x_test, y_test)


def compiled(model: Any, rate: float) -> Any:
    """Compile a model for training."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(rate), loss, metrics=["accuracy"])
    return model


def float_net() -> Any:
    """Three convolutions with batch norm."""
    stack: list[Any] = [keras.Input((8, 8, 1), name="image")]
    for number, channels in enumerate(CHANNELS):
        stack += [
            keras.layers.Conv2D(channels, 3, 1 + (number > 0), "same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.95),
            keras.layers.ReLU(),
        ]
    return keras.Sequential([*stack, keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(10)])


class GiveUp(keras.callbacks.Callback):
    """Ends a run at the end of an epoch, as a machine that goes down would."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002  Keras calls it so
        """Raise, after the backup of this epoch is made."""
        if epoch == self.epoch:
            raise InterruptedError


def tuned(path: Path, data: Data, epochs: int, backup: Path, give_up: int | None = None) -> tuple[Any, Any]:
    """Fine-tune on two replicas for `epochs` epochs, and return the model and its layer.

    With `give_up`, the run ends earlier with an InterruptedError.
    """
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        layer = bnqat.KerasLayer(str(path))
        image = keras.Input((8, 8, 1), name="image")
        model = compiled(keras.Model(image, layer(image)), 1e-3)
    callbacks: list[Any] = [keras.callbacks.BackupAndRestore(str(backup), delete_checkpoint=False)]
    callbacks += [] if give_up is None else [GiveUp(give_up)]
    model.fit(data.batches, epochs=epochs, callbacks=callbacks, shuffle=False, verbose=0)
    return model, layer


def lite(final: Path, data: Data, integers: bool) -> Any:
    """Return LiteRT's outputs of a finalised model for the test images."""
    converter = tf.lite.TFLiteConverter.from_saved_model(str(final), signature_keys=["serving_default"])
    if integers:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ({"image": image[None]} for image in data.x[:100])
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    signature = Interpreter(model_content=converter.convert()).get_signature_runner("serving_default")
    return np.concatenate([next(iter(signature(image=image[None]).values())) for image in data.x_test])


Row = tuple[str, str, float]
"""Stage, what batch norm computes with, accuracy on unseen digits in percent."""


def run(bits: int, epochs: int, folder: Path) -> tuple[list[Row], list[Any]]:
    """Run the whole way, and return the rows of both tables."""
    data = digits()
    keras.utils.set_random_seed(0)
    say(f"training a float net on {len(data.x)} handwritten digits")
    net = compiled(float_net(), 3e-3)
    net.fit(data.batches, epochs=8, shuffle=False, verbose=0)
    net.export(folder / "float", verbose=False)
    rows: list[Row] = [("float", "float32", data.accuracy(net.predict(data.x_test, verbose=0)))]

    say(f"rewriting it: batch norms of {bits} bits")
    start, freeze = data.steps, (epochs - 2) * data.steps
    bnqat.rewrite(
        folder / "float", folder / "rewritten", bits=bits, momentum=0.95, start_step=start, freeze_step=freeze
    )
    model = tf.saved_model.load(str(folder / "rewritten"))
    model.quantization.start_step.assign(0)
    rows.append(("rewritten", f"{bits} bits", data.accuracy(model.serve(data.x_test))))

    say("fine-tuning it on two replicas")
    try:
        tuned(folder / "rewritten", data, epochs, folder / "backup", give_up=epochs - 3)
    except InterruptedError:
        say("a run was given up; another one resumes it")
    first, layer = tuned(folder / "rewritten", data, epochs - 2, folder / "backup")
    steps = [layer.quantization.step.numpy()]
    rows.append(("fine-tuned, batch statistics", f"{bits} bits", data.accuracy(first.predict(data.x_test, verbose=0))))
    second, layer = tuned(folder / "rewritten", data, epochs, folder / "backup")
    steps.append(layer.quantization.step.numpy())
    rows.append(
        ("fine-tuned, frozen statistics", f"{bits} bits", data.accuracy(second.predict(data.x_test, verbose=0)))
    )
    say(
        f"quantised from step {start} on; statistics frozen at step {steps[0]} (freeze step {freeze}); {steps[1]} steps"
    )

    second.export(folder / "tuned", verbose=False)
    say("finalising it, and running it on LiteRT\n")
    report = bnqat.finalize(folder / "tuned", folder / "final", params=folder / "parameters.npz")
    final = tf.saved_model.load(str(folder / "final"))
    rows.append(("finalised", f"{bits} bits", data.accuracy(final.serve(data.x_test))))
    for kind, integers in (("float", False), ("integers", True)):
        rows.append((f"LiteRT, {kind}", "folded", data.accuracy(lite(folder / "final", data, integers))))
    return rows, parameters(folder / "parameters.npz", [b.variable for b in report.baked])


def parameters(file: Path, names: list[str]) -> list[Any]:
    """Rows of the parameter table: variable, scheme, width, scale, zero point, the first codes."""
    table = np.load(file)
    rows = []
    for name in names:
        scheme, bits, scale, zero, codes = (
            table[f"{name}.{field}"] for field in ("scheme", "bits", "scale", "zero_point", "codes")
        )
        first = " ".join(str(code) for code in codes[:8])
        rows.append([name.removeprefix("sequential/"), str(scheme), str(bits), f"{scale:.5g}", str(zero), first])
    return rows


def main() -> None:
    """Print two tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--bits", type=int, default=4, help="width of the codes")
    parser.add_argument("--epochs", type=int, default=6, help="epochs of fine-tuning, at least 4; two are frozen")
    options = parser.parse_args()
    if options.epochs < 4:  # noqa: PLR2004  as the help says
        parser.error("--epochs: one in float, one or more quantised, two frozen")
    device = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(device, [tf.config.LogicalDeviceConfiguration()] * 2)
    with tempfile.TemporaryDirectory() as folder:
        warnings.filterwarnings("ignore", ".*tf.lite.Interpreter is deprecated")  # the converter's own use of it
        rows, baked = run(options.bits, options.epochs, Path(folder))
    codes = Table(title="Batch-norm variables of the finalised model", box=box.SIMPLE_HEAD, show_edge=False)
    for column in ("variable", "scheme", "bits", "scale", "zero point", "first codes"):
        codes.add_column(column, no_wrap=True)
    for row in baked:
        codes.add_row(*row)
    Console(width=120).print(codes)
    say("")
    table = Table(title="Handwritten digits, unseen in training", box=box.SIMPLE_HEAD, show_edge=False)
    table.add_column("model")
    table.add_column("batch norm")
    table.add_column("accuracy", justify="right")
    for name, kind, value in rows:
        table.add_row(name, kind, f"{value:.2f} %")
    Console().print(table)


if __name__ == "__main__":
    main()

"""One row for each model of `keras.applications`: the documented way from a float model to LiteRT, in both Keras.

    python -m tools.sweep_keras [--only MobileNetV2 ResNet50] [--json FILE]

Each model is made with random weights and ten classes, at a small size, and saved by Keras 3 (`model.export`) and by
Keras 2 (`tf_keras`' `model.save`); each of these is rewritten without and with `--freeze-step`, and takes the way of
docs/keras.md or of docs/loops.md. The columns: batch norms rewritten and sites that became the fused kernel; claims of
`bnqat verify` that do not hold; loss of the first and the last of ten training steps, between which the statistics are
frozen, if they are; the largest difference, to the largest output, of the finalised model to the tuned one, and of
LiteRT to it. Each model runs in a process of its own. Exit code 1 if a row fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from ai_edge_litert.interpreter import Interpreter
from rich.console import Console
from rich.table import Table

import bnqat
from rewriter.app.verification.claims import FAILS, verify
from tests.models import perturb

SIZES = {
    "MobileNetV2": 64,
    "MobileNetV3Small": 64,
    "EfficientNetB0": 64,
    "EfficientNetV2B0": 64,
    "ResNet50": 64,
    "ResNet50V2": 64,
    "DenseNet121": 64,
    "NASNetMobile": 64,
    "Xception": 96,
}
"""Models, and the sizes of their images."""
PRODUCERS = ("keras", "tf_keras")
STEPS, FREEZE_STEP, BATCH, CLASSES = 10, 5, 8, 10
LITE = 1e-4
"""LiteRT folds batch norm into convolutions; the network multiplies what that rounds. Largest difference, relative."""
SIGNATURE = "serving_default"


@dataclass
class Row:
    """Observations of one rewrite.

    Attributes:
        producer: the package of Keras that wrote the model.
        failing: claims that do not hold, with details.
        losses: of the first and the last training step.
        finalised: the largest difference of the finalised model to the tuned one, relative to the largest output.
        lite: that of LiteRT to the finalised model.
        error: description of the failure that ended the row, if any.
        seconds: duration of the whole row.
    """

    model: str
    producer: str
    freeze: bool
    rewritten: int = 0
    fused: int = 0
    failing: dict[str, str] = field(default_factory=dict)
    losses: tuple[float, float] | None = None
    finalised: float | None = None
    lite: float | None = None
    error: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """True if anything went wrong."""
        return bool(self.error or self.failing) or self.finalised != 0 or self.lite is None or self.lite > LITE


def application(model: str, producer: str) -> Any:
    """A model of `keras.applications` with random weights, made by one of the two packages."""
    package = import_module(producer)
    package.utils.set_random_seed(0)
    shape = (SIZES[model], SIZES[model], 3)
    return getattr(package.applications, model)(weights=None, input_shape=shape, classes=CLASSES)


def saved(net: Any, producer: str, path: Path) -> Path:
    """A net as the package that made it saves it, with batch norms as training might have left them."""
    perturb(v for layer in net.layers if "BatchNormalization" in type(layer).__name__ for v in layer.weights)
    if producer == "keras":
        net.export(str(path), verbose=False)
    else:
        net.save(str(path), save_format="tf")
    return path


def images(side: int, seed: int = 0) -> np.ndarray:
    """A batch of noise between 0 and 255, smooth enough to have an average that a network sees."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 255, (BATCH, side, side, 3)).astype("float32")


def trained_by_keras(path: Path, side: int) -> tuple[Any, tuple[float, float]]:
    """Train for ten steps as a layer of Keras 3, and return the model with the first and the last loss."""
    import keras

    layer = bnqat.KerasLayer(path)
    inputs = keras.Input((side, side, 3))
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(1e-3, clipnorm=1.0), keras.losses.SparseCategoricalCrossentropy())
    x, y = images(side), np.arange(BATCH) % CLASSES
    history = model.fit(x, y, batch_size=BATCH, epochs=STEPS, shuffle=False, verbose=0).history["loss"]
    return layer.model, (history[0], history[-1])


def trained_in_a_loop(path: Path, side: int) -> tuple[Any, tuple[float, float]]:
    """Train for ten steps in a custom loop, and return the model with the first and the last loss."""
    import keras

    model = tf.saved_model.load(str(path))
    variables = list(model.quantization.trainable_variables)
    optimizer = keras.optimizers.SGD(1e-3, clipnorm=1.0)
    optimizer.build(variables)

    @tf.function
    def step(x: tf.Tensor, y: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(y, model.train(x)))
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    x, y = tf.constant(images(side)), tf.constant(np.arange(BATCH) % CLASSES)
    losses = [float(step(x, y)) for _ in range(STEPS)]
    return model, (losses[0], losses[-1])


def lite_outputs(path: Path, x: np.ndarray) -> np.ndarray:
    """The outputs of a finalised model by LiteRT, image by image."""
    converter = tf.lite.TFLiteConverter.from_saved_model(str(path), signature_keys=[SIGNATURE])
    runner = Interpreter(model_content=converter.convert()).get_signature_runner(SIGNATURE)
    (name,) = runner.get_input_details()
    return np.concatenate([next(iter(runner(**{name: image[None]}).values())) for image in x])


def served(model: Any, x: np.ndarray) -> np.ndarray:
    """The only output of the default signature."""
    signature = model.signatures[SIGNATURE]
    (name,) = signature.structured_input_signature[1]
    (output,) = signature(**{name: tf.constant(x)}).values()
    return np.asarray(output)


def difference(values: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest element; infinite where one is not finite."""
    return float(np.abs(values - expected).max() / np.abs(expected).max()) if np.isfinite(values).all() else np.inf


def take(row: Row, source: Path, folder: Path, side: int) -> None:
    """Take a saved model all the way, and record the observations in the row."""
    report = bnqat.rewrite(source, folder / "qat", freeze_step=FREEZE_STEP if row.freeze else None)
    row.rewritten, row.fused = report.sites_rewritten, report.sites_fused
    row.failing = {c.name: c.detail for c in verify(source, folder / "qat").claims if c.status == FAILS}
    train = trained_by_keras if row.producer == "keras" else trained_in_a_loop
    tuned, row.losses = train(folder / "qat", side)
    if not np.isfinite(row.losses).all() or tuned.quantization.step.numpy() != STEPS:
        row.error = f"{tuned.quantization.step.numpy()} steps are counted, the losses are {row.losses}"
        return
    x = images(side, seed=1)
    outputs = served(tuned, x)
    tf.saved_model.save(tuned, str(folder / "tuned"), signatures={SIGNATURE: tuned.signatures[SIGNATURE]})
    bnqat.finalize(folder / "tuned", folder / "final")
    final = served(tf.saved_model.load(str(folder / "final")), x)
    row.finalised = difference(final, outputs)
    row.lite = difference(lite_outputs(folder / "final", x), final)


def swept(model: str, producer: str) -> list[Row]:
    """The rows of a model that one of the packages saves."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        source = saved(application(model, producer), producer, Path(scratch) / "source")
        for freeze in (False, True):
            row, start = Row(model, producer, freeze), time.perf_counter()
            folder = Path(scratch) / ("frozen" if freeze else "plain")
            folder.mkdir()
            try:
                take(row, source, folder, SIZES[model])
            except Exception as e:  # noqa: BLE001  a row says what went wrong, and the sweep goes on
                row.error = f"{type(e).__name__}: {str(e).strip()[:500]}"
            row.seconds = time.perf_counter() - start
            rows.append(row)
    return rows


def sweep(models: list[str]) -> Iterator[Row]:
    """The rows of some models, each of which runs in a process of its own, as TensorFlow keeps what it has loaded."""
    for model in models:
        for producer in PRODUCERS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rows = pool.submit(swept, model, producer).result()
            yield from rows
            state = "failed" if any(row.failed for row in rows) else "done"
            print(f"{model} of {producer}: {state}, {sum(r.seconds for r in rows):.0f} s", flush=True)


def show(rows: list[Row]) -> None:
    """Print the table and the errors."""
    table = Table()
    for column in ("model", "saved by", "frozen", "rewritten", "fused", "verify", "loss", "finalised", "LiteRT"):
        table.add_column(column)
    for row in rows:
        losses = "-" if row.losses is None else f"{row.losses[0]:.3f} to {row.losses[1]:.3f}"
        differences = ["-" if d is None else f"{d:.1g}" for d in (row.finalised, row.lite)]
        counts = (f"step {FREEZE_STEP}" if row.freeze else "never", str(row.rewritten), str(row.fused))
        table.add_row(row.model, row.producer, *counts, ", ".join(row.failing) or "holds", losses, *differences)
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    for row in rows:
        where = f"{row.model} of {row.producer}{', frozen' if row.freeze else ''}"
        for name, detail in row.failing.items():
            print(f"{where}: {name}: {detail}")
        if row.error:
            print(f"{where}: {row.error}")


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", default=list(SIZES), choices=SIZES, metavar="MODEL", help="of these models"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    arguments = parser.parse_args()
    rows = []
    for row in sweep(arguments.only):
        rows.append(row)
        if arguments.json:  # it takes hours: what there is can be looked at
            arguments.json.write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n", encoding="utf-8")
    show(rows)
    return 1 if any(r.failed for r in rows) else 0


if __name__ == "__main__":
    sys.exit(main())

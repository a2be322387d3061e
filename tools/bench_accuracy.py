"""Accuracy against bits: float, right after rewriting, and after equal fine-tuning; ours beside QKeras.

    python -m tools.bench_accuracy [--weights] [--task digits clutter] [--seeds 3] [--bits 8 6 4 3 2]

Needs the extra `bench`. For each seed a float net is trained. Every other row starts from its weights: quantised, and
then fine-tuned with the same batches in the same order, for the same number of epochs, with the same optimizer. Half
way the moving statistics are frozen: in ours by `freeze_step`, in QKeras' layer by calling it in inference mode.

Tasks:

- `digits`: scikit-learn's 8 x 8 digits, 1257 to train and 540 to test.
- `clutter`, made here to be harder: two of those digits, each of random contrast, at random places of the left and
  the right of a 12 x 16 canvas, where they may overlap, under noise of standard deviation 0.1; the class is the digit
  on the left. 4000 to train, of the digits that train, and 4000 to test, of the others.

Batch norm, ours: the scheme named, for gamma, beta and moving mean, and `log` for the moving variance, with dynamic
ranges; `learned`: affine with learned scales of gamma and beta. QKeras: `po2`, powers of two as in its layer's
defaults, with the number of bits; `fixed`: fixed point with as many integer bits as each of the float net's vectors
needs.

With `--weights`, all kernels are quantised in place of batch norm. Ours: symmetric, a range of the kind named for each
channel. QKeras: `quantized_bits`; `auto`: a scale for each channel that follows the greatest weight; `auto_po2`, its
default: a power of two for each channel that follows the least squared error; `fixed`: fixed point, as for batch norm.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ["TF_USE_LEGACY_KERAS"] = "1"  # QKeras is made for Keras 2

import numpy as np
import tensorflow as tf
import tf_keras as keras
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import bnqat

BATCH = 32
ROLES = ("gamma", "beta", "moving_mean", "moving_variance")


Call = Callable[[Any], Any]


class Task(NamedTuple):
    """Data, and the shape of the net that is trained on it.

    Attributes:
        train: images [N, H, W, 1] and labels [N].
        channels: of the convolutions; all but the first have stride 2.
        epochs: of float training, and of fine-tuning.
    """

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    classes: int
    channels: tuple[int, ...]
    epochs: tuple[int, int]


def digits(seed: int) -> Task:
    """Handwritten digits."""
    x, x_test, y, y_test = _split(seed)
    return Task((x, y), (x_test, y_test), 10, (16, 32, 32), (10, 5))


def clutter(seed: int) -> Task:
    """Two digits in noise; the class is the left one."""
    x, x_test, y, y_test = _split(seed)
    rng = np.random.default_rng([seed, 1])
    return Task(_pairs(x, y, 4000, rng), _pairs(x_test, y_test, 4000, rng), 10, (16, 32, 48), (10, 5))


def _split(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    data = load_digits()
    images = (data.images[..., None] / 16).astype("float32")
    x, x_test, y, y_test = train_test_split(images, data.target, test_size=0.3, random_state=seed, stratify=data.target)
    return x, x_test, y, y_test


def _pairs(x: np.ndarray, y: np.ndarray, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    canvas = rng.normal(0, 0.1, (count, 12, 16, 1)).astype("float32")
    chosen = rng.integers(len(x), size=(count, 2))
    for index, pair in enumerate(chosen):
        for side, digit in enumerate(pair):
            top, left = rng.integers(5), 7 * side + rng.integers(2)
            canvas[index, top : top + 8, left : left + 8] += rng.uniform(0.5, 1) * x[digit]
    return canvas, y[chosen[:, 0]]


TASKS = {"digits": digits, "clutter": clutter}


def net(
    task: Task,
    normalization: Callable[[int], Any],
    convolution: Callable[..., Any] = keras.layers.Conv2D,
    dense: Callable[..., Any] = keras.layers.Dense,
) -> Any:
    """Convolutions with batch norm; `normalization` makes the layer for a convolution's number."""
    x = inputs = keras.Input(task.train[0].shape[1:])
    for number, channels in enumerate(task.channels):
        x = convolution(channels, 3, 2 if number else 1, "same", use_bias=False)(x)
        x = keras.layers.ReLU()(normalization(number)(x))
    x = keras.layers.Flatten()(x)
    return keras.Model(inputs, dense(task.classes)(x))


def float_layer(_: int, momentum: float = 0.95) -> Any:
    """Keras' own batch norm."""
    return keras.layers.BatchNormalization(momentum=momentum, epsilon=1e-3)


def fit(
    phases: Sequence[Callable[[Any], Any]], variables: Any, task: Task, *, epochs: int, rate: float, seed: int
) -> None:
    """Train with Adam, its rate falling to 0, on shuffled batches, an equal number of steps in each phase."""
    images, labels = task.train
    starts = range(0, len(images) - BATCH + 1, BATCH)
    total = epochs * len(starts)
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, total))
    rng = np.random.default_rng(seed)
    optimizer.build(variables)

    def step_of(call: Callable[[Any], Any]) -> Any:
        @tf.function
        def step(x: Any, y: Any) -> None:
            with tf.GradientTape() as tape:
                losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, call(x))
            optimizer.apply_gradients(zip(tape.gradient(losses, variables), variables, strict=True))

        return step

    steps = [step_of(phase) for phase in phases]
    for epoch in range(epochs):
        order = rng.permutation(len(images))
        for number, start in enumerate(starts):
            chosen = order[start : start + BATCH]
            phase = (epoch * len(starts) + number) * len(phases) // total
            steps[phase](tf.constant(images[chosen]), tf.constant(labels[chosen]))


def accuracy(serve: Callable[[Any], Any], task: Task) -> float:
    """Share of right answers, in percent."""
    images, labels = task.test
    return float(100 * np.mean(np.argmax(serve(tf.constant(images)), -1) == labels))


class Start(NamedTuple):
    """A trained float net of a seed."""

    task: Task
    seed: int
    net: Any
    saved: Path

    @property
    def total(self) -> int:
        """Steps of fine-tuning."""
        return self.task.epochs[1] * (len(self.task.train[0]) // BATCH)


Run = Callable[[Start, int], tuple[float, float]]
"""Measures accuracy in percent at a width: right after quantising, and after fine-tuning."""


def ours(options: dict[str, Any], role: str | None = None) -> Run:
    """Return a measurement of bnqat with options; the width is that of one role, or of batch norm's."""

    def run(start: Start, bits: int) -> tuple[float, float]:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "qat"
            widths = bits if role is None else {role: bits}
            bnqat.rewrite(start.saved, target, bits=widths, freeze_step=start.total // 2, **options)
            model = tf.saved_model.load(str(target))
            before = accuracy(model.serve, start.task)
            train, variables = model.quantization.train, list(model.quantization.trainable_variables)
            fit([train], variables, start.task, epochs=start.task.epochs[1], rate=1e-3, seed=start.seed)
            return before, accuracy(model.serve, start.task)

    return run


def qkeras(kind: str) -> Run:
    """Return a measurement of QKeras' batch norm."""

    def run(start: Start, bits: int) -> tuple[float, float]:
        from qkeras import QBatchNormalization

        norms = [layer for layer in start.net.layers if "batch_normalization" in layer.name]

        def layer(number: int) -> Any:
            quantizers = _qkeras_quantizers(kind, bits, [w.numpy() for w in norms[number].weights])
            return QBatchNormalization(momentum=0.95, epsilon=1e-3, **quantizers)

        return _tuned(net(start.task, layer), start)

    return run


def qkeras_weights(kind: str) -> Run:
    """Return a measurement of QKeras' `quantized_bits` for kernels."""

    def run(start: Start, bits: int) -> tuple[float, float]:
        from qkeras import QConv2D, QDense

        kernels = [w.numpy() for w in start.net.trainable_weights if "kernel" in w.name]
        quantizers = iter([_qkeras_kernel_quantizer(kind, bits, kernel) for kernel in kernels])

        def layer(of: Callable[..., Any]) -> Callable[..., Any]:
            return lambda *sizes, **options: of(*sizes, kernel_quantizer=next(quantizers), **options)

        return _tuned(net(start.task, float_layer, layer(QConv2D), layer(QDense)), start)

    return run


def _tuned(model: Any, start: Start) -> tuple[float, float]:
    """Return accuracies with the float net's weights, and after fine-tuning."""
    model.set_weights(start.net.get_weights())
    serve = tf.function(partial(model, training=False))
    before = accuracy(serve, start.task)
    phases = [partial(model, training=True), partial(model, training=False)]
    fit(phases, model.trainable_variables, start.task, epochs=start.task.epochs[1], rate=1e-3, seed=start.seed)
    return before, accuracy(serve, start.task)


def _qkeras_quantizers(kind: str, bits: int, weights: list[np.ndarray]) -> dict[str, str]:
    names = ("gamma_quantizer", "beta_quantizer", "mean_quantizer", "variance_quantizer")
    if kind == "po2":
        signed, positive = f"quantized_po2({bits})", f"quantized_relu_po2({bits})"
        variance = f"quantized_relu_po2({bits}, quadratic_approximation=True)"
        return dict(zip(names, (positive, signed, signed, variance), strict=True))
    integers = [_integer_bits(w) for w in weights]
    linear = [f"quantized_bits({bits}, {n}, alpha=1)" for n in integers[:3]]
    return dict(zip(names, (*linear, f"quantized_relu({bits}, {integers[3]})"), strict=True))


def _qkeras_kernel_quantizer(kind: str, bits: int, kernel: np.ndarray) -> str:
    if kind == "fixed":
        return f"quantized_bits({bits}, {_integer_bits(kernel)}, alpha=1)"
    return f"quantized_bits({bits}, 0, alpha='{kind}')"


def _integer_bits(values: np.ndarray) -> int:
    return max(0, int(np.ceil(np.log2(np.abs(values).max()))))


LINEAR = ("gamma", "beta", "moving_mean")
BATCH_NORM: dict[str, Run] = {
    "affine": ours({}),
    "symmetric": ours({"scheme": dict.fromkeys(LINEAR, "symmetric")}),
    "power_of_two": ours({"scheme": dict.fromkeys(LINEAR, "power_of_two")}),
    "learned": ours({"range": {"gamma": "learned", "beta": "learned"}}),
    "QKeras po2": qkeras("po2"),
    "QKeras fixed": qkeras("fixed"),
}
FLOAT_BATCH_NORM = dict.fromkeys(ROLES, "none")
WEIGHTS: dict[str, Run] = {
    **{
        kind: ours({"scheme": FLOAT_BATCH_NORM, "range": {"weight": kind}}, "weight")
        for kind in ("dynamic", "mse", "learned")
    },
    **{f"QKeras {kind}": qkeras_weights(kind) for kind in ("auto", "auto_po2", "fixed")},
}


def starts(
    make: Callable[[int], Task], seeds: int, folder: Path, layer: Callable[[int], Any] = float_layer
) -> Iterator[Start]:
    """Trained float nets, with batch norms as `layer` makes them."""
    for seed in range(seeds):
        keras.utils.set_random_seed(seed)
        task = make(seed)
        model = net(task, layer)
        fit(
            [partial(model, training=True)],
            model.trainable_variables,
            task,
            epochs=task.epochs[0],
            rate=3e-3,
            seed=seed,
        )
        target = folder / f"{make.__name__}-{seed}"
        model.save(str(target), save_format="tf")
        yield Start(task, seed, model, target)


def main() -> None:
    """Print a table for each task: mean and standard deviation over the seeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 6, 4, 3, 2])
    parser.add_argument("--json", type=Path, help="write means and standard deviations to this file")
    parser.add_argument("--weights", action="store_true", help="quantise kernels in place of batch norm")
    parser.add_argument("--system", nargs="+", help="columns; all, if not given")
    options = parser.parse_args()
    systems = WEIGHTS if options.weights else BATCH_NORM
    for system in options.system or ():
        if system not in systems:
            parser.error(f"there is no system {system!r}; there are {', '.join(systems)}")
    if options.system:
        systems = {system: systems[system] for system in options.system}
    results = {name: measured(TASKS[name], systems, options.seeds, options.bits) for name in options.task}
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def measured(make: Callable[[int], Task], systems: Mapping[str, Run], seeds: int, widths: list[int]) -> dict[str, Any]:
    """Print a task's table, and return its moments."""
    accuracies: dict[tuple[int, str], list[tuple[float, float]]] = {}
    floats = []
    with tempfile.TemporaryDirectory() as folder:
        for start in starts(make, seeds, Path(folder)):
            floats.append(accuracy(partial(start.net, training=False), start.task))
            runs = [(bits, system) for bits in widths for system in systems]
            for bits, system in track(runs, f"{make.__name__}, seed {start.seed}", transient=True):
                accuracies.setdefault((bits, system), []).append(systems[system](start, bits))
                gc.collect()  # models and their functions refer to each other
    table = Table(title=f"{make.__name__}: float {_spread(floats)} %; right after -> fine-tuned, {seeds} seeds")
    table.add_column("bits", justify="right")
    for system in systems:
        table.add_column(system, justify="right")
    for bits in widths:
        cells = [[_spread([run[i] for run in accuracies[bits, s]]) for i in (0, 1)] for s in systems]
        table.add_row(str(bits), *(f"{before} -> {after}" for before, after in cells))
    Console(width=180).print(table)
    return {"float": _moments(floats), "systems": {s: _cells(accuracies, s, widths) for s in systems}}


def _cells(
    accuracies: dict[tuple[int, str], list[tuple[float, float]]], system: str, widths: list[int]
) -> dict[str, Any]:
    phases = ("after rewriting", "after fine-tuning")
    return {
        str(bits): {phase: _moments([run[i] for run in accuracies[bits, system]]) for i, phase in enumerate(phases)}
        for bits in widths
    }


def _moments(values: list[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    return round(float(np.mean(values)), 3), round(float(np.std(values, ddof=1)), 3) if len(values) > 1 else 0.0


def _spread(values: list[float]) -> str:
    mean, deviation = _moments(values)
    return f"{mean:.1f} ± {deviation:.1f}" if len(values) > 1 else f"{mean:.1f}"


if __name__ == "__main__":
    main()

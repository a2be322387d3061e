"""Cost of a training and an inference step: ours and others', each in pairs with the float model with fused kernels.

    python -m tools.bench_step [--net MobileNetV2 --batch 1 8 32] [--seconds 120] [--only fused on off]

Needs the extra `bench`. All steps of a net and a batch size run in one process, one after the other in a new random
order in each round, for so many seconds; what is shown is the median of the rounds' ratios to the step of the float
model with fused kernels (below 1 is faster), the interval in which that median lies with 95 % (from resampling), and
the quartiles of the ratios. A step is forward, backward and the moving averages, without an optimizer, on 96 x 96
images with 10 classes. Rows:

- fused again: the same float model from another directory, which shows what a difference is worth
- hand-written: single ops, statistics chosen by tf.cond; two subgraphs: a fused kernel for each mode and a tf.cond
  afterwards; Keras 3: its own layers
- QKeras: its QBatchNormalization with its defaults; TFMOT: quantize_model, which quantises weights and activations too
- off, on: rewritten by bnqat, 8 bits, before and after `start_step`; frozen: with frozen moving statistics; stateful
  ranges: moving averages of the limits; changing widths: 8 and 4 bits in turn; a role off: the width of gamma is 0
- "..., rewritten": what bnqat makes of these models, on
- weights off, weights on: rewritten by bnqat, weights alone, 8 bits, a range for each channel, before and after
  `start_step`; weights, TFMOT: the same net by TFMOT, with its own 8-bit quantisers of kernels and nothing else

`--net v1-resource` and `v1-reference` are a net in TensorFlow 1's format, with resource or reference variables, run in
a V1 session and by `tf.saved_model.load`. Its base is the library's layer, `tf.compat.v1.layers.batch_normalization`
with fused kernels; rows are the two functions of `tools.bench_v1`, written by hand, before and after the rewrite.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ["TF_USE_LEGACY_KERAS"] = "1"  # QKeras and TFMOT are made for Keras 2

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import Progress

import bnqat
from tools import bench_v1
from tools.bench_nets import NETS

BASE = "fused"
KINDS = ("training", "inference")
WARM_UP = 3
SHORT = 0.1
"""Seconds up to which a step runs once before it is timed, so that none pays for what the one before left in caches."""


LEAST = 2
"""The fewest rounds."""


class Variant(NamedTuple):
    """A row of the table.

    Attributes:
        source: name of the net, the source of the rewrite if there is one.
        options: options of the rewrite; None for the source as it is.
        turn: called with the loaded model and n before the n-th step.
    """

    source: str
    options: Mapping[str, Any] | None = None
    turn: Callable[[Any, int], None] = lambda _model, _number: None


def _widths(model: Any, number: int) -> None:
    for role in ("gamma", "beta", "moving_mean", "moving_variance"):
        getattr(model.quantization.bits, role).assign(4 if number % 2 else 8)


def _without_gamma(model: Any, number: int) -> None:
    if number == 0:
        model.quantization.bits.gamma.assign(0)


WEIGHTS = {
    "bits": {"weight": 8},
    "scheme": dict.fromkeys(("gamma", "beta", "moving_mean", "moving_variance"), "none"),
}

VARIANTS: Mapping[str, Variant] = {
    BASE: Variant("fused"),
    "fused again": Variant("fused"),
    "hand-written": Variant("by_hand"),
    "two subgraphs": Variant("two_kernels"),
    "Keras 3": Variant("keras3"),
    "QKeras": Variant("qkeras"),
    "TFMOT": Variant("tfmot"),
    "off": Variant("fused", {"start_step": 2**62}),
    "on": Variant("fused", {}),
    "frozen": Variant("fused", {"freeze_step": 0}),
    "stateful ranges": Variant("fused", {"range": "ema"}),
    "changing widths": Variant("fused", {}, _widths),
    "a role off": Variant("fused", {}, _without_gamma),
    "hand-written, rewritten": Variant("by_hand", {}),
    "two subgraphs, rewritten": Variant("two_kernels", {}),
    "Keras 3, rewritten": Variant("keras3", {}),
    "weights off": Variant("fused", {**WEIGHTS, "start_step": 2**62}),
    "weights on": Variant("fused", WEIGHTS),
    "weights, TFMOT": Variant("tfmot_weights"),
}


class Steps(Protocol):
    """The steps of a model by kind; a call runs one and returns its seconds."""

    steps: dict[str, Callable[[], object]]

    def __call__(self, kind: str, /) -> float:
        """Seconds of one step."""


class Runner:
    """The compiled steps of a saved model."""

    def __init__(self, path: Path, variant: Variant, x: Any) -> None:
        self.model = tf.saved_model.load(str(path))
        self.turn = variant.turn
        self.number = 0
        mode = len(self.model.serve.concrete_functions[0].structured_input_signature[0]) > 1
        quantization = getattr(self.model, "quantization", None)
        source_training = self.model.serve if mode else self.model.train
        call = getattr(quantization, "train", source_training)
        variables = [v for v in call.concrete_functions[0].graph.variables if v.trainable]

        @tf.function
        def training() -> Any:
            with tf.GradientTape() as tape:
                y = call(x, tf.constant(True)) if mode else call(x)
                loss = tf.reduce_sum(y**2)
            return tape.gradient(loss, variables)

        @tf.function
        def inference() -> Any:
            return self.model.serve(x, tf.constant(False)) if mode else self.model.serve(x)

        self.steps: dict[str, Callable[[], object]] = {"training": training, "inference": inference}

    def __call__(self, kind: str) -> float:
        """Seconds of one step."""
        self.turn(self.model, self.number)
        self.number += 1
        start = time.perf_counter()
        self.steps[kind]()
        return time.perf_counter() - start


def timed(runners: Mapping[str, Steps], kind: str, limit: float) -> dict[str, list[float]]:
    """Time each step in each round, in seconds."""
    first = {name: min(runner(kind) for _ in range(WARM_UP)) for name, runner in runners.items()}
    durations: dict[str, list[float]] = {name: [] for name in runners}
    end = time.perf_counter() + limit
    while time.perf_counter() < end or len(next(iter(durations.values()))) < LEAST:
        for name in random.sample(list(runners), len(runners)):
            if first[name] < SHORT:
                runners[name](kind)
            durations[name].append(runners[name](kind))
    return durations


def compared(seconds: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Summarise the rounds' ratios: the median, its 95 % confidence interval, and the quartiles."""
    ratios = np.array(seconds) / np.array(base)
    again = np.median(np.random.default_rng(0).choice(ratios, (2000, len(ratios))), axis=1)
    names = ("median", "from", "to", "lower quartile", "upper quartile")
    values = (np.median(ratios), *np.quantile(again, (0.025, 0.975)), *np.quantile(ratios, (0.25, 0.75)))
    return {name: round(float(value), 4) for name, value in zip(names, values, strict=True)}


def prepared(net: str, names: Sequence[str], folder: Path) -> dict[str, Path]:
    """Write the models, each to a directory of its own."""
    paths = {}
    for name in names:
        variant, path = VARIANTS[name], folder / f"{net} {name}"
        source = folder / f"{net} {variant.source}" if variant.options is not None else path
        if not source.exists():
            NETS[variant.source](net, source)
        if variant.options is not None:
            bnqat.rewrite(source, path, **variant.options)
        paths[name] = path
    return paths


def measured(runners: Mapping[str, Steps], limit: float) -> dict[str, Any]:
    """Measure the runners, the base first.

    Returns:
        By kind of step: the base's milliseconds, the number of rounds, and each row's ratios.
    """
    by_kind = {}
    for kind in (kind for kind in KINDS if kind in next(iter(runners.values())).steps):
        seconds = timed({name: runner for name, runner in runners.items() if kind in runner.steps}, kind, limit)
        base = next(iter(seconds.values()))
        rows = {name: compared(durations, base) for name, durations in seconds.items()}
        milliseconds = round(1000 * float(np.median(base)), 1)
        by_kind[kind] = {"milliseconds": milliseconds, "rounds": len(base), "rows": rows}
    return by_kind


def table(by_kind: Mapping[str, Any]) -> str:
    """Format the rows as a table in Markdown."""
    heads = [f"{kind}, {cell['milliseconds']:g} ms, {cell['rounds']} rounds" for kind, cell in by_kind.items()]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    names = dict.fromkeys(name for cell in by_kind.values() for name in list(cell["rows"])[1:])
    for name in names:
        cells = (_cell(cell["rows"][name]) if name in cell["rows"] else "" for cell in by_kind.values())
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, float]) -> str:
    median, low, high, first, third = row.values()
    return f"**{median:.3f}** ({low:.3f} to {high:.3f}; {first:.2f}, {third:.2f})"


PEERS = {
    "QKeras": "qkeras",
    "TFMOT": "tensorflow_model_optimization",
    "weights, TFMOT": "tensorflow_model_optimization",
}
"""Packages that rows need, from the extra `bench`."""


def seconds(text: str) -> float:
    """Parse a duration; raise a ValueError if it is none."""
    if not 0 < float(text) < math.inf:
        raise ValueError(text)
    return float(text)


class Nets(NamedTuple):
    """Nets that are compared with each other.

    Attributes:
        rows: names, the base's first.
        prepared: writes the models of some rows to a folder.
        ways: ways of running them, by name; each makes the steps of a row's model for a batch of images.
    """

    rows: Sequence[str]
    prepared: Callable[[Sequence[str], Path], dict[str, Path]]
    ways: Mapping[str, Callable[[str, Path, Any], Steps]]


def _keras(net: str) -> Nets:
    def runner(name: str, path: Path, images: Any) -> Steps:
        return Runner(path, VARIANTS[name], tf.constant(images))

    return Nets(list(VARIANTS), partial(prepared, net), {"": runner})


def _v1(references: bool) -> Nets:
    def way(run: Callable[[Path, Any], Steps]) -> Callable[[str, Path, Any], Steps]:
        return lambda _, path, images: run(path, images)

    ways = {name: way(run) for name, run in bench_v1.WAYS.items()}
    return Nets(list(bench_v1.ROWS), partial(bench_v1.prepared, references), ways)


COMPARED: Mapping[str, Nets] = {
    "MobileNetV2": _keras("MobileNetV2"),
    "ResNet50": _keras("ResNet50"),
    "v1-resource": _v1(references=False),
    "v1-reference": _v1(references=True),
}


def main() -> None:
    """Print a table for each batch size and way of running."""
    options = _options()
    nets = COMPARED[options.net]
    console, results = Console(stderr=True), dict[str, Any]()
    names = [nets.rows[0], *(name for name in options.only or nets.rows if name != nets.rows[0])]
    runs = list(itertools.product(options.batch, nets.ways.items()))
    with tempfile.TemporaryDirectory() as folder, Progress(console=console, transient=True) as progress:
        task = progress.add_task("making the models", total=1 + len(runs))
        paths = nets.prepared(names, Path(folder))
        for batch, (way, make) in runs:
            title = f"{options.net}, batch {batch}{f', {way}' if way else ''}"
            progress.update(task, advance=1, description=title)
            images = np.random.default_rng(0).normal(size=(batch, 96, 96, 3)).astype("float32")
            runners = {name: make(name, path, images) for name, path in paths.items()}
            results[title] = measured(runners, options.seconds)
            print(f"{title}:\n\n{table(results[title])}\n", flush=True)
            del runners
            gc.collect()
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=list(COMPARED), default="MobileNetV2")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=seconds, default=120, help="for all rows of one batch size and kind of step")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="rows beside the base; all, if not given")
    parser.add_argument("--json", type=Path, help="write all figures to this file too")
    options = parser.parse_args()
    rows = COMPARED[options.net].rows
    for row in options.only or rows:
        if row not in rows:
            parser.error(f"{options.net} has no row {row!r}; there are {', '.join(rows)}")
        if row in PEERS and find_spec(PEERS[row]) is None:
            parser.error(f"the row {row} needs {PEERS[row]}: pip install '.[bench]', or leave it out of --only")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"there is no directory {options.json.parent} to write figures to")
    if min(options.batch) < 1:
        parser.error("there is at least 1 image in a batch")
    return options


if __name__ == "__main__":
    main()

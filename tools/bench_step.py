"""Cost of a training and an inference step: the source, its batch norms fused, and fused and quantised.

    python -m tools.bench_step [--form keras3 by_hand two_kernels] [--net MobileNetV2] [--batch 8 32] [--pairs 30]

Forms: `keras3`, single ops; `by_hand`, single ops with statistics chosen by tf.cond; `two_kernels`, one fused kernel
for each mode and a tf.cond afterwards; `fused`, Keras 2's layers. Every step runs once in each round, in one process;
a row shows the median of the rounds' ratios to the source's step (below 1 is faster) with the quartiles, and the same
to the step of the net that Keras 2 writes with one fused kernel. A step is forward, backward and the moving averages,
without an optimizer. Quantisers are on, 8 bits.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
from rich.console import Console
from rich.table import Table

import bnqat
from rewriter.app.lineup import FUSING
from tools.bench_nets import NETS

Step = Callable[[], Any]
WARM_UP = 2


def steps(path: Path, x: Any) -> dict[str, Step]:
    """The compiled training and inference step of a saved model."""
    model = tf.saved_model.load(str(path))
    mode = len(model.serve.concrete_functions[0].structured_input_signature[0]) > 1
    quantization = getattr(model, "quantization", None)
    call = model.train if quantization is None and not mode else getattr(quantization, "train", model.serve)
    variables = [v for v in call.concrete_functions[0].graph.variables if v.trainable]

    @tf.function
    def train() -> Any:
        with tf.GradientTape() as tape:
            y = call(x, tf.constant(True)) if mode else call(x)
            loss = tf.reduce_sum(y**2)
        return tape.gradient(loss, variables)

    @tf.function
    def serve() -> Any:
        return model.serve(x, tf.constant(False)) if mode else model.serve(x)

    return {"training": train, "inference": serve}


def timed(run: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round; the order turns from round to round, the first rounds are not counted."""
    found: dict[str, list[float]] = {name: [] for name in run}
    names = list(run)
    for index in range(WARM_UP + rounds):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            start = time.perf_counter()
            run[name]()
            if index >= WARM_UP:
                found[name].append(time.perf_counter() - start)
    return found


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> str:
    """Median and quartiles of one step's time over another's, round by round."""
    pairs = [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]
    low, middle, high = statistics.quantiles(pairs, n=4)
    return f"{middle:.2f} ({low:.2f}, {high:.2f})"


def measure(form: str, net: str, folder: Path, batches: list[int], rounds: int) -> Iterator[list[str]]:
    """The rows of one form of one net, as they are measured."""
    paths = {name: folder / f"{net}_{form}_{name}" for name in ("source", "fused", "quantised")}
    NETS[form](net, paths["source"])
    bnqat.rewrite(paths["source"], paths["quantised"])
    if form == "fused":
        del paths["fused"]
    else:
        bnqat.rewrite(paths["source"], paths["fused"], passes=FUSING)
        paths["single"] = folder / f"{net}_single"
        if not paths["single"].exists():
            NETS["fused"](net, paths["single"])
    for batch in batches:
        x = tf.random.normal([batch, 96, 96, 3])
        made = {name: steps(path, x) for name, path in paths.items()}
        for kind in ("training", "inference"):
            seconds = timed({name: both[kind] for name, both in made.items()}, rounds)
            base = "single" if "single" in paths else "source"
            for name in paths:
                if name not in ("source", "single"):
                    ratios = [ratio(seconds, name, "source"), ratio(seconds, name, base)]
                    milliseconds = f"{1000 * statistics.median(seconds['source']):.0f} ms"
                    yield [net, form, str(batch), kind, milliseconds, name, *ratios]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", nargs="+", choices=list(NETS), default=["keras3", "by_hand", "two_kernels"])
    parser.add_argument("--net", nargs="+", choices=["MobileNetV2", "ResNet50"], default=["MobileNetV2"])
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--pairs", type=int, default=30, help="rounds, 2 or more (default 30)")
    options = parser.parse_args()
    if options.pairs < WARM_UP or min(options.batch) < 1:
        parser.error("there are at least 2 rounds, and at least 1 image in a batch")
    table = Table("net", "form", "batch", "step", "source", "result", "to the source", "to a single fused kernel")
    with tempfile.TemporaryDirectory() as folder:
        for net in options.net:
            for form in options.form:
                for row in measure(form, net, Path(folder), options.batch, options.pairs):
                    table.add_row(*row)
                    print(*row, sep="  ", file=sys.stderr)
    Console(width=None if os.isatty(1) else 160).print(table)


if __name__ == "__main__":
    main()

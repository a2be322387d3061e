"""Cost of a training and an inference step of a rewritten model, pair by pair against its float source.

    python -m tools.bench_step SOURCE REWRITTEN [--batch 8 1] [--pairs 40]

SOURCE is a Keras 2 save: its call with training=True is the float training step. Prints the median ratio and the
quartiles; both steps of a pair run one after the other in one process.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf


def training_step(train: Callable[[Any], Any], variables: list[Any], x: Any) -> Callable[[], Any]:
    """A compiled step: forward, backward, no optimizer."""

    @tf.function
    def step() -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(train(x) ** 2)
        return tape.gradient(loss, variables)

    return step  # type: ignore[no-any-return]


def ratios(base: Callable[[], Any], other: Callable[[], Any], pairs: int) -> list[float]:
    """Time of `other` over time of `base`, for each pair; the first two of each are not counted."""
    for step in (base, other, base, other):
        step()
    found = []
    for _ in range(pairs):
        times = [time.perf_counter()]
        for step in (base, other):
            step()
            times.append(time.perf_counter())
        found.append((times[2] - times[1]) / (times[1] - times[0]))
    return found


def main() -> None:
    """Print two lines for each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("rewritten")
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--pairs", type=int, default=40)
    options = parser.parse_args()
    source, result = tf.saved_model.load(options.source), tf.saved_model.load(options.rewritten)
    signature = source.signatures["serving_default"]
    (spec,) = signature.structured_input_signature[1].values()
    for batch in options.batch:
        x = tf.random.normal([batch, *spec.shape[1:]])
        train = [
            training_step(lambda v: source(v, training=True), list(source.trainable_variables), x),
            training_step(result.train, list(result.quantization.trainable_variables), x),
        ]
        serve = [tf.function(lambda x=x: source(x, training=False)), tf.function(lambda x=x: result.serve(x))]
        for name, (base, other) in (("training", train), ("inference", serve)):
            low, middle, high = statistics.quantiles(ratios(base, other, options.pairs), n=4)
            print(f"batch {batch}, {name}: {middle:.2f} (quartiles {low:.2f} and {high:.2f})")


if __name__ == "__main__":
    main()

"""Accuracy after a short fine-tuning, with the moving averages and with re-estimated statistics.

    python -m tools.bench_statistics [--seeds 3] [--epochs 2]

Needs the extra `bench`. Nets and data are those of `tools.bench_accuracy`'s task `digits`. Each is fine-tuned at a rate
that falls to 0, and evaluated before and after `bnqat.reestimate_statistics` with all training batches. The columns:
quantisers off, and of 8 and 4 bits; *old*: the share of the moving averages that is from before fine-tuning; *error*:
how far normalised values are from those of the test images' own statistics at 4 bits, in standard deviations, for the
batch norm where it is largest (`rewriter.app.lag`, as `verify --inputs` and `finalize --inputs` compute it).
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import track

import bnqat
from rewriter.app.lag import statistics_errors
from tools.bench_accuracy import BATCH, Start, accuracy, digits, fit, float_layer, starts

MOMENTA = (0.9, 0.99, 0.999)
RATES = (1e-3, 1e-2)
QUANTISERS: dict[str, dict[str, Any]] = {"off": {"start_step": 2**62}, "8 bits": {"bits": 8}, "4 bits": {"bits": 4}}


def fine_tuned(start: Start, options: dict[str, Any], rate: float, epochs: int) -> tuple[float, float, float]:
    """Accuracy with the moving averages and with re-estimated statistics, and the largest error of the former."""
    images = start.task.train[0]
    with tempfile.TemporaryDirectory() as folder:
        bnqat.rewrite(start.saved, Path(folder) / "qat", **options)
        model = tf.saved_model.load(f"{folder}/qat")
        train, variables = model.quantization.train, list(model.quantization.trainable_variables)
        fit([train], variables, start.task, epochs=epochs, rate=rate, seed=start.seed)
        tf.saved_model.save(model, f"{folder}/tuned")
        errors = statistics_errors(f"{folder}/tuned", {"x": start.task.test[0]})
        before = accuracy(model.serve, start.task)
        batches = tf.data.Dataset.from_tensor_slices(images).batch(BATCH, drop_remainder=True)
        bnqat.reestimate_statistics(model, batches, len(batches))
        return before, accuracy(model.serve, start.task), max(errors.values())


def main() -> None:
    """Print a table in Markdown: means over the seeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    console = Console(stderr=True)
    accuracies: dict[tuple[float, float, str], list[tuple[float, float, float]]] = {}
    steps = 0
    with tempfile.TemporaryDirectory() as folder:
        for momentum in MOMENTA:
            nets = starts(digits, options.seeds, Path(folder), partial(float_layer, momentum=momentum))
            for start in nets:
                steps = options.epochs * (len(start.task.train[0]) // BATCH)
                runs = list(itertools.product(RATES, QUANTISERS))
                for rate, name in track(runs, f"{momentum}, seed {start.seed}", console=console, transient=True):
                    cell = accuracies.setdefault((momentum, rate, name), [])
                    cell.append(fine_tuned(start, QUANTISERS[name], rate, options.epochs))
    print(f"{steps} steps, {options.seeds} seeds\n")
    print(f"| momentum | rate | old | error | {' | '.join(QUANTISERS)} |")
    print("|---|---|---|---|" + "---|" * len(QUANTISERS))
    for momentum, rate in itertools.product(MOMENTA, RATES):
        cells = {name: np.mean(accuracies[momentum, rate, name], 0) for name in QUANTISERS}
        shown = " | ".join(f"{before:.1f} → {after:.1f}" for before, after, _ in cells.values())
        print(f"| {momentum} | {rate} | {momentum**steps:.0%} | {cells['4 bits'][2]:.2f} | {shown} |")


if __name__ == "__main__":
    main()

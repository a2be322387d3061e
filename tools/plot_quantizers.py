"""The plots of docs/quantisation.md.

    python -m tools.plot_quantizers

Quantised against float values, from the NumPy reference that the tests hold the graphs against; and accuracy against
bits, from docs/accuracy.json, which `tools.bench_accuracy --json docs/accuracy.json` writes. Needs the extra `plot`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from tests.reference import quantize

DOCS = Path(__file__).resolve().parent.parent / "docs"
BITS = 3
EPSILON = 1e-3
LINEAR = {"affine": False, "symmetric": True, "power_of_two": True}
"""Schemes, and whether their range is usually narrow."""


def values() -> Figure:
    """Quantised values of a vector from -0.6 to 1.3, and of variances over six decades."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    linear, log = figure.subplots(1, 2)
    v = np.linspace(-0.6, 1.3, 1001, dtype=np.float32)
    linear.plot(v, v, color="0.8")
    for scheme, narrow in LINEAR.items():
        linear.plot(v, quantize(scheme, v, BITS, narrow=narrow).value, label=scheme)
    linear.set(xlabel="float value", ylabel="quantised value", title=f"{BITS} bits, gamma, beta, moving mean")
    linear.legend()
    variances = np.geomspace(1e-5, 10, 1001).astype(np.float32)
    log.semilogx(variances, 1 / np.sqrt(variances + EPSILON), label="float", color="0.8")
    for scheme in ("log", "affine"):
        quantized = quantize(scheme, variances, BITS, EPSILON).value
        log.semilogx(variances, 1 / np.sqrt(quantized + EPSILON), label=scheme)
    log.set(xlabel="moving variance", ylabel="1 / sqrt(v + epsilon)", title=f"{BITS} bits, moving variance")
    log.legend()
    return figure


def accuracies(measured: dict[str, Any]) -> Figure:
    """Accuracy right after rewriting and after fine-tuning, against bits."""
    figure = Figure(figsize=(9, 3.5 * len(measured)), layout="constrained")
    for row, (task, results) in zip(figure.subplots(len(measured), 2, squeeze=False), measured.items(), strict=True):
        for axes, phase in zip(row, ("after rewriting", "after fine-tuning"), strict=True):
            for system, cells in results["systems"].items():
                bits = sorted(map(int, cells))
                means, spreads = zip(*(cells[str(n)][phase] for n in bits), strict=True)
                style = "--" if system.startswith("QKeras") else "-"
                axes.errorbar(bits, means, spreads, label=system, linestyle=style, capsize=2)
            axes.axhline(results["float"][0], color="0.7")
            axes.set(title=f"{task}, {phase}", xlabel="bits", ylabel="accuracy, %")
        row[1].legend(fontsize=8)
    return figure


def main() -> None:
    """Write the images."""
    mpl.rcParams["svg.hashsalt"] = "bnqat"  # the same bytes on every run
    plots = {"quantised_values": values(), "accuracy": accuracies(json.loads((DOCS / "accuracy.json").read_text()))}
    for name, figure in plots.items():
        figure.savefig(DOCS / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()

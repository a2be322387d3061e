"""Weights of a model, and the error that the default quantiser would make on them.

Nothing of a model is executed but the ops between a variable and the op that takes it, such as a cast or a reshape.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from passes.quantization.least_error import levels, own_limits
from passes.quantization.schemes import SCHEMES
from passes.weights.layers import WeightLayer, weight_layers
from passes.weights.roles import WEIGHT
from passes.weights.uses import ALREADY_QUANTIZED, WeightUse, weight_uses
from rewriter.app.by_layer import LayerReason
from rewriter.app.report_schema import WeightReport
from rewriter.app.values import WIDTHS
from rewriter.ir import Error, Model


def weights_of(model: Model) -> list[WeightReport]:
    """Return the weights that are not quantised, in the order of the model's variables; constants come last."""
    uses, _ = model.analysis(weight_uses)
    layers, numbers = model.analysis(weight_layers)
    by_layer: dict[int, list[WeightUse]] = {}
    for use in uses:
        by_layer.setdefault(numbers[use.edges[0]], []).append(use)
    return [report for i, layer in enumerate(layers) for report in _reports(model, layer, by_layer[i])]


def skipped_weights(model: Model) -> Iterator[LayerReason]:
    """Yield the ops whose weights cannot be quantised, by their names, with the reasons."""
    _, skips = model.analysis(weight_uses)
    return (LayerReason(skip.node, skip.reason) for skip in skips if skip.reason != ALREADY_QUANTIZED)


def _reports(model: Model, layer: WeightLayer, uses: list[WeightUse]) -> Iterator[WeightReport]:
    """Yield the report of each weight of a layer."""
    places = [(edge.graph, use.node) for use in uses for edge in use.edges[:1]]
    ops = list(dict.fromkeys(model.graphs[graph].nodes[node].op for graph, node in places))
    values: list[np.ndarray | None]
    try:
        values = [*layer.values(model)]
    except (Error, ValueError):  # a variable that is in no checkpoint, or ops that are not known to be harmless
        values = [None] * len(layer.members)
    shape = uses[0].whole_shape
    sizes = None if -1 in shape else shape
    for member, value in zip(layer.members, values, strict=True):
        yield WeightReport(
            name=member.name,
            ops=ops,
            shape=[None if size < 0 else size for size in shape],
            axes=list(layer.axes),
            channels=math.prod(sizes[axis] for axis in layer.axes) if sizes else None,
            parameters=math.prod(sizes) if sizes else None,
            places=list(dict.fromkeys(places)),
            not_finite=0 if value is None else int(value.size - np.isfinite(value).sum()),
            expected_error={} if value is None else expected_errors(value),
        )


def expected_errors(values: np.ndarray) -> dict[int, float]:
    """Return the error of the default quantiser of weights, by width: its norm, to that of the values.

    Args:
        values: float32 [channels, n]; channels that are not finite do not count.
    """
    finite = np.isfinite(values).all(1)
    kept = values if finite.all() else values[finite]
    norm = math.sqrt(_squares(kept))
    limits = own_limits(SCHEMES[WEIGHT.scheme](), kept)
    errors: dict[int, float] = {}
    for bits in WIDTHS:
        error = levels(SCHEMES[WEIGHT.scheme](bits=bits), kept, limits)
        np.subtract(error, kept, out=error)
        errors[bits] = math.sqrt(_squares(error)) / norm if norm else 0.0
    return errors


def _squares(values: np.ndarray) -> float:
    """Return the sum of squares, float64; a sum in float32 would lose digits."""
    return float(np.einsum("ij,ij->i", values, values).sum(dtype=np.float64))

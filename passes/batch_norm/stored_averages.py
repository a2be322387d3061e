"""Moving averages that are quantised before they are stored."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from passes.batch_norm.batch_norms import DEFAULT_MOMENTUM
from passes.batch_norm.layers import Layer
from passes.batch_norm.sites import STATISTICS
from passes.quantization.custom import Quantizer
from passes.quantization.schemes import Log, Scheme
from rewriter import op_defs, protos
from rewriter.dataflow import origins
from rewriter.edit import Edit, Note, Replace, Rewire
from rewriter.expr import Expr, Use, op, ordered
from rewriter.ir import Edge, Model, Value

ASSIGN = "AssignVariableOp"
BY_DIFFERENCE = {"AssignSubVariableOp": "Sub", "AssignAddVariableOp": "AddV2"}


def assigning(model: Model, updates: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return those of `updates` that assign the moving average: the last, and others to the same variable.

    Args:
        model: the model.
        updates: (graph, node) of the ops that update averages.
    """

    def target(graph: str, node: str) -> object:
        return origins(model, graph, model.graphs[graph].nodes[node].inputs[0])

    # A layer that is used twice assigns its average twice; a biased average is another variable.
    return [update for update in updates if target(*update) == target(*updates[-1])]


def stored(model: Model, graph: str, node: str) -> tuple[Expr, Callable[[Expr], Iterator[Edit]]]:
    """Return the value that an op assigns to a variable, and the edits that let it assign another."""
    assign = model.graphs[graph].nodes[node]
    resource, assigned = assign.inputs
    value = Use(op_defs.output_dtype(model, model.graphs[graph], assigned), assigned)
    if assign.op == ASSIGN:
        return value, lambda quantized: iter([Rewire(Edge(graph, node, 1), quantized, node)])
    variable = Use("resource", resource)
    # The read has to wait for all that the assignment waits for, such as another assignment to the same variable.
    before = [Use("", Value(name)) for name in assign.after]
    old = ordered(op("ReadVariableOp", variable, dtype=protos.Dtype(value.dtype)), before)
    new = op(BY_DIFFERENCE[assign.op], old, value)
    return new, lambda quantized: iter([Replace(graph, node, op(ASSIGN, variable, quantized))])


def storable(model: Model, graph: str, node: str) -> bool:
    """Return true if the value that an op assigns can be quantised."""
    return model.graphs[graph].nodes[node].op in (ASSIGN, *BY_DIFFERENCE)


def dead_zone(
    layers: Sequence[Layer], quantizers: Mapping[str, Sequence[Quantizer | None]], limits: Mapping[str, np.ndarray]
) -> Iterator[Note]:
    """Yield notes on the dead zone of averages that are stored and rounded to nearest.

    A batch's statistic within this distance of the average does not move it: half a step / (1 - momentum), at first.
    For a scheme whose steps grow with the value, the step is that at the greatest value.
    """
    for role in STATISTICS:
        zones: dict[str, float] = {}
        for layer, quantizer in zip(layers, quantizers[role], strict=True):
            if isinstance(quantizer, Scheme) and quantizer.rounding == "nearest":
                weight = layer.batch_norms[0].weight or 1 - DEFAULT_MOMENTUM
                zones[layer.name] = _widest_step(quantizer, *limits[role][layer.number]) / 2 / weight
        if zones:
            name = max(zones, key=zones.__getitem__)
            yield Note(
                f"a stored {role} stands still while a batch's is nearer to it than half a step / (1 - momentum), "
                f"which is up to {zones[name]:.3g} (in {name}); with stochastic rounding it moves on average"
            )


def _widest_step(scheme: Scheme, low: float, high: float) -> float:
    """Return the greatest distance between neighbouring levels of a range."""
    bottom, top = scheme.codes(scheme.bits)
    if isinstance(scheme, Log):
        return math.exp(high) - math.exp(high - (high - low) / top)
    if scheme.has_low:
        return (high - low) / top
    return max(high / top, low / bottom)

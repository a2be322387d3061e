"""Shapes that are known without running anything: those that TensorFlow wrote beside the nodes."""

from __future__ import annotations

from typing import Any

from rewriter import op_defs, ops
from rewriter.dataflow import VariableKey, origins
from rewriter.ir import ARG, Graph, Model, Node, Value

Shape = tuple[int, ...]
"""A shape of known rank; -1 is an unknown size."""


def shape_of(model: Model, graph: Graph, value: Value) -> Shape | None:
    """The shape of a value; None where even its rank is not known.

    TensorFlow writes shapes into the attribute ``_output_shapes`` of nodes and ``_input_shapes`` of functions.
    Nodes that passes added have none; of them, those that keep a shape, or read a variable, are looked through.
    """
    while True:
        node = graph.nodes[value.node]
        written = _written(node, value.port) or _of_argument(graph, node)
        if written is not None:
            return None if written.unknown_rank else tuple(d.size for d in written.dim)
        if node.op == "Const":
            return tuple(d.size for d in op_defs.attribute(node, "value").tensor.tensor_shape.dim)
        if node.op == "ReadVariableOp":
            held = [o.key for o in origins(model, graph.name, value) if isinstance(o, VariableKey)]
            return model.variables[held[0]].shape if held else None
        fused = node.op.startswith("FusedBatchNorm") and value.port < 3  # noqa: PLR2004  the others have their own
        passed = node.inputs[min(value.port, 1)] if fused else ops.forwarded(node, value.port)
        if passed is None:
            return None
        value = passed


def _written(node: Node, port: int) -> Any:
    shapes = node.attrs.get("_output_shapes")
    return shapes.list.shape[port] if shapes is not None and len(shapes.list.shape) > port else None


def _of_argument(graph: Graph, node: Node) -> Any:
    shapes = graph.attrs.get("_input_shapes")
    if node.op != ARG or shapes is None:
        return None
    position = graph.arguments.index(node.name)
    return shapes.list.shape[position] if len(shapes.list.shape) > position else None

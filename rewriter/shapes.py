"""Shapes that are known without running anything, from what TensorFlow stored in attributes."""

from __future__ import annotations

from typing import Any

from rewriter import op_defs, ops
from rewriter.dataflow import VariableKey, origins
from rewriter.ir import ARG, Graph, Model, Node, Value

Shape = tuple[int, ...]
"""A shape of known rank; -1 is an unknown size."""


def shape_of(model: Model, graph: Graph, value: Value) -> Shape | None:
    """Return the shape of a value; None if even its rank is unknown.

    TensorFlow writes shapes into the attribute ``_output_shapes`` of nodes and ``_input_shapes`` of functions. Nodes
    that passes added have none. If such a node keeps its input's shape, the input's shape is returned; if it reads a
    variable, the variable's.
    """
    while True:
        node = graph.nodes[value.node]
        recorded = _recorded_shape(node, value.port) or _argument_shape(graph, node)
        if recorded is not None:
            return None if recorded.unknown_rank else tuple(d.size for d in recorded.dim)
        if node.op == "Const":
            return tuple(d.size for d in op_defs.attribute(node, "value").tensor.tensor_shape.dim)
        if node.op == "ReadVariableOp":
            keys = [o.key for o in origins(model, graph.name, value) if isinstance(o, VariableKey)]
            return model.variables[keys[0]].shape if keys else None
        like = ops.SHAPED_LIKE.get(node.op, ())
        source = node.inputs[like[value.port]] if value.port < len(like) else ops.forwarded(node, value.port)
        if source is None:
            return None
        value = source


def _recorded_shape(node: Node, port: int) -> Any:
    shapes = node.attrs.get("_output_shapes")
    return shapes.list.shape[port] if shapes is not None and len(shapes.list.shape) > port else None


def _argument_shape(graph: Graph, node: Node) -> Any:
    shapes = graph.attrs.get("_input_shapes")
    if node.op != ARG or shapes is None:
        return None
    position = graph.arguments.index(node.name)
    return shapes.list.shape[position] if len(shapes.list.shape) > position else None

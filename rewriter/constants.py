"""Constants, and ops that give their input in another shape."""

from __future__ import annotations

import math

import numpy as np
from tensorflow.python.framework import tensor_util

from rewriter import op_defs
from rewriter.ir import Graph, Node, Value

VIEWS = frozenset({"ExpandDims", "Reshape", "Squeeze"})
"""Ops whose output is their first input in another shape, as that of some StridedSlice is: `viewed` knows."""


def viewed(graph: Graph, node: Node) -> Value | None:
    """What a node gives in another shape; None where it does anything else."""
    return node.inputs[0] if node.op in VIEWS or _adds_axes(graph, node) else None


def _adds_axes(graph: Graph, node: Node) -> bool:
    """Whether a node is ``v[None, :, None]`` or the like: a StridedSlice that takes all and adds axes of size 1.

    Source: op ``StridedSlice``: bit i of a mask is about the i-th part of the slice.
    """
    strides = constant_of(graph, node.inputs[3]) if node.op == "StridedSlice" else None
    if strides is None or (strides != 1).any():
        return False
    masks = {name: op_defs.attribute(node, name).i for name in MASKS}
    whole = masks["begin_mask"] & masks["end_mask"] | masks["new_axis_mask"]
    return not masks["shrink_axis_mask"] and whole | masks["ellipsis_mask"] == (1 << strides.size) - 1


MASKS = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")


def constant_of(graph: Graph, value: Value) -> np.ndarray | None:
    """What a constant holds; None where the value is no constant, or one of more than `LARGEST` elements.

    A constant may say its size and hold one element only, so that a small file makes a large array.
    """
    node = graph.nodes[value.node]
    if node.op != "Const":
        return None
    tensor = op_defs.attribute(node, "value").tensor
    if math.prod(d.size for d in tensor.tensor_shape.dim) > LARGEST:
        return None
    found: np.ndarray = tensor_util.MakeNdarray(tensor)
    # Strings that are left out are empty ones, of another type than those that are there.
    return np.array([s or b"" for s in found.ravel()], object).reshape(found.shape) if found.dtype == object else found


LARGEST = 2**24
"""The most elements of constants that are looked into, and of the values that a quantiser computes."""

"""Constants, and ops that change only the shape of their input."""

from __future__ import annotations

import math

import numpy as np
from tensorflow.python.framework import tensor_util

from rewriter import op_defs
from rewriter.ir import Graph, Node, Value

VIEWS = frozenset({"ExpandDims", "Reshape", "Squeeze"})
"""Ops whose output is their first input in another shape. Some StridedSlice do the same; `viewed` covers both."""


def viewed(graph: Graph, node: Node) -> Value | None:
    """Return the value of which a node only changes the shape; None for any other node."""
    return node.inputs[0] if node.op in VIEWS or _adds_axes(graph, node) else None


def _adds_axes(graph: Graph, node: Node) -> bool:
    """Return true if a node is like ``v[None, :, None]``: a StridedSlice that takes all and adds axes of size 1.

    Source: op ``StridedSlice``: bit i of a mask is about the i-th part of the slice.
    """
    strides = constant_of(graph, node.inputs[3]) if node.op == "StridedSlice" else None
    if strides is None or (strides != 1).any():
        return False
    masks = {name: op_defs.attribute(node, name).i for name in MASKS}
    full_axes = masks["begin_mask"] & masks["end_mask"] | masks["new_axis_mask"]
    return not masks["shrink_axis_mask"] and full_axes | masks["ellipsis_mask"] == (1 << strides.size) - 1


MASKS = ("begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask", "shrink_axis_mask")
"""Attributes of StridedSlice that are bit masks over the parts of the slice."""


def constant_of(graph: Graph, value: Value) -> np.ndarray | None:
    """Return the array of a constant; None if the value is no constant, or has more than `LARGEST` elements.

    A constant may state a large shape and store one element only, so a small file can make a large array.
    """
    node = graph.nodes[value.node]
    if node.op != "Const":
        return None
    tensor = op_defs.attribute(node, "value").tensor
    if math.prod(d.size for d in tensor.tensor_shape.dim) > LARGEST:
        return None
    array: np.ndarray = tensor_util.MakeNdarray(tensor)
    # MakeNdarray fills omitted strings with empty ones that are no bytes, unlike the stored ones.
    return np.array([s or b"" for s in array.ravel()], object).reshape(array.shape) if array.dtype == object else array


LARGEST = 2**24
"""Largest number of elements of a constant that is looked into, and of a value that a quantiser computes."""

"""Ops that take a weight: the inputs that may be one, and the axes that are its channels.

A channel is an index of the weight that all products of one output channel share. Ranges by channel are then scales by
output channel, which an integer kernel multiplies its sums by. Source: the op definitions of TensorFlow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

from rewriter import op_defs, protos
from rewriter.ir import Node

Axes = tuple[int, ...]
"""Axes of a value, counted from its end."""


class WeightInput(NamedTuple):
    """An input of an op that may be a weight.

    Attributes:
        position: the input's index.
        axes: the axes that are channels.
        summed: true if these are the axes that are summed over instead, and all others are channels.
    """

    position: int
    axes: Axes
    summed: bool = False

    def channels(self, rank: int) -> Axes:
        """Return the axes that are channels, for a weight of this rank."""
        return tuple(axis for axis in range(-rank, 0) if (axis in self.axes) != self.summed)


Inputs = Callable[[Node], tuple[WeightInput, ...]]
"""The inputs of a node that may be weights."""


def _fixed(position: int, *axes: int) -> Inputs:
    inputs = (WeightInput(position, axes),)
    return lambda _: inputs


def _product(first: str, second: str) -> Inputs:
    """Return the operands of a matrix product, given the names of the attributes that transpose them.

    A batch of matrices has channels along its other axes, too.
    """

    def inputs(node: Node) -> tuple[WeightInput, ...]:
        left, right = (op_defs.attribute(node, name).b for name in (first, second))
        return WeightInput(0, (-2,) if left else (-1,), summed=True), WeightInput(1, (-1,) if right else (-2,), True)

    return inputs


def _einsum(node: Node) -> tuple[WeightInput, ...]:
    """Return the operands of an Einsum of two values: the channels of one are its labels that the result has, too.

    A label that both operands have in common with the result numbers products that are independent, so it is a channel.
    """
    equation = protos.text(op_defs.attribute(node, "equation").s)
    match = re.fullmatch(r"([a-zA-Z.]*),([a-zA-Z.]*)->([a-zA-Z.]*)", equation.replace(" ", ""))
    if match is None:
        return ()
    *operands, result = match.groups()
    return tuple(
        WeightInput(i, tuple(j - len(labels) for j, label in enumerate(labels) if label in result))
        for i, labels in enumerate(operands)
        if "." not in labels and len(set(labels)) == len(labels)
    )


KERNELS: Mapping[str, Inputs] = {
    **dict.fromkeys(("Conv", "Conv2D", "Conv3D"), _fixed(1, -1)),
    # Multiplier m of input channel c is output channel c M + m, so both axes count.
    "DepthwiseConv2dNative": _fixed(1, -2, -1),
    # Transposed convolutions: the gradient of a convolution for its input, whose channels they give.
    **dict.fromkeys(("Conv2DBackpropInput", "Conv3DBackpropInput", "Conv3DBackpropInputV2"), _fixed(1, -2)),
    "DepthwiseConv2dNativeBackpropInput": _fixed(1, -2),
    **dict.fromkeys(("MatMul", "SparseMatMul"), _product("transpose_a", "transpose_b")),
    **dict.fromkeys(("BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"), _product("adj_x", "adj_y")),
    "SparseTensorDenseMatMul": lambda node: (
        WeightInput(3, (-2,) if op_defs.attribute(node, "adjoint_b").b else (-1,)),
    ),
    "Einsum": _einsum,
    **dict.fromkeys(("BlockLSTM", "BlockLSTMV2"), _fixed(4, -1)),
    "LSTMBlockCell": _fixed(3, -1),
    "GRUBlockCell": lambda _: (WeightInput(2, (-1,)), WeightInput(3, (-1,))),
}
"""By op: its inputs that may be weights."""

CONVOLUTIONS = frozenset(name for name in KERNELS if "Conv" in name)
"""Ops whose filter is expected to be a weight."""

GATHERS: Mapping[str, int] = {"Gather": 0, "GatherV2": 0, "ResourceGather": 0}
"""Ops that look up rows of a table, and the table's input. Each row, along the last axis, has a range of its own."""

OPAQUE: Mapping[str, str] = {
    **dict.fromkeys(
        ("CudnnRNN", "CudnnRNNV2", "CudnnRNNV3"), "its weights are one buffer whose layout only cuDNN knows"
    ),
    **dict.fromkeys(("XlaDot", "XlaDotV2", "XlaConv", "XlaConvV2"), "it is an op of XLA's own"),
    **dict.fromkeys(("XlaCallModule", "TPUPartitionedCall"), "it calls a compiled program"),
}
"""Ops that may hold weights which cannot be quantised here, with the reason."""

"""Batch norm as the fused kernel computes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from passes.roles import BETA, GAMMA, MEAN, ROLES, VARIANCE
from rewriter import protos
from rewriter.expr import Apply, Expr, Port, array, constant, op
from rewriter.shapes import Shape

DTYPES = ("float32", "half", "float16", "bfloat16")
"""Of x. Parameters and statistics are float32."""

WIDE = frozenset({"float32", "float64"})
"""Dtypes that hold what the kernel computes with."""

POPULATION = "_population_variance"
"""Attribute of a fused node whose moving variance is to average the population's variance: its number of channels."""


@dataclass(frozen=True)
class Layout:
    """How x is seen in a format that the kernel knows.

    Attributes:
        data_format: as the kernel's attribute.
        view: "same": x as it is; "rows": all but the last axis in one; "column": one more axis at the end.
        channels: the number of channels.
    """

    data_format: str
    view: Literal["same", "rows", "column"]
    channels: int

    def seen(self, x: Expr) -> Expr:
        """What the kernel is given for x."""
        if self.view == "rows":
            return op("Reshape", x, array(np.array([-1, 1, 1, self.channels], dtype=np.int32)))
        return op("ExpandDims", x, constant(-1, "int32")) if self.view == "column" else x

    def back(self, y: Apply, x: Expr) -> Apply:
        """The kernel's output in the shape of x."""
        return y if self.view == "same" else op("Reshape", y, op("Shape", x))

    def moments(self, x: Expr) -> tuple[Expr, Expr]:
        """Mean and population variance of each channel of x in single ops: float32 vectors."""
        seen = self.seen(x)
        wide = seen if seen.dtype == "float32" else op("Cast", seen, DstT=protos.Dtype("float32"))
        axes = array(np.array([i for i, axis in enumerate(self.data_format) if axis != "C"], dtype=np.int32))
        mean = op("Mean", wide, axes, keep_dims=True)
        variance = op("Mean", op("SquaredDifference", wide, mean), axes)
        return op("Reshape", mean, array(np.array([self.channels], dtype=np.int32))), variance


def layout_of(shape: Shape, channel: int) -> Layout | None:
    """The layout for x of this shape with its channels on this axis; None where the kernel has none.

    Source: ``FusedBatchNormV3``'s attribute `data_format`: NHWC, NCHW, NDHWC or NCDHW.
    """
    rank, channels = len(shape), shape[channel]
    same = {(4, 3): "NHWC", (4, 1): "NCHW", (5, 4): "NDHWC", (5, 1): "NCDHW"}
    if (rank, channel) in same:
        return Layout(same[rank, channel], "same", channels)
    if channel == rank - 1:
        return Layout("NHWC", "rows", channels)
    return Layout("NCHW", "column", channels) if (rank, channel) == (3, 1) else None


@dataclass(frozen=True)
class Normalised:
    """What the kernel gives: y in the shape of x and, of training, the batch's mean and population variance."""

    y: Apply
    mean: Expr
    variance: Expr


def normalised(x: Expr, vectors: Mapping[str, Expr], layout: Layout, epsilon: float, *, training: bool) -> Normalised:
    """Normalise x with the fused kernel.

    Args:
        x: of one of `DTYPES`.
        vectors: float32 vectors by role; ones for gamma and zeros for beta where absent. Training uses no
            mean and variance.
        layout: how the kernel is to see x.
        epsilon: added to the variance.
        training: whether it normalises with the batch's statistics.
    """
    size = layout.channels
    nothing = array(np.zeros([0], np.float32))
    known = {GAMMA: array(np.ones([size], np.float32)), BETA: array(np.zeros([size], np.float32))} | dict(vectors)
    if training:
        known |= {MEAN: nothing, VARIANCE: nothing}
    fused = op(
        "FusedBatchNormV3",
        layout.seen(x),
        *(known[role] for role in ROLES),
        epsilon=float(epsilon),
        is_training=training,
        data_format=layout.data_format,
        **{POPULATION: size},
    )
    variance = population(Port("float32", fused, 2), x, size)
    return Normalised(layout.back(fused, x), Port("float32", fused, 1), variance)


def sample(variance: Expr, x: Expr, channels: int) -> Expr:
    """The batch's variance with the correction that the kernel makes: the inverse of `population`."""
    elements = op("Cast", op("Size", x, out_type=protos.Dtype("int64")), DstT=protos.Dtype("float32"))
    count = elements / constant(float(channels), "float32")
    return variance * (count / op("Maximum", count - 1.0, 1.0))


def population(corrected: Expr, x: Expr, channels: int) -> Expr:
    """The batch's variance without the correction that the kernel makes.

    The kernel's output is the population's variance times n / (n - 1), where a channel has n elements of x.
    """
    elements = op("Cast", op("Size", x, out_type=protos.Dtype("int64")), DstT=protos.Dtype("float32"))
    rest = constant(1.0, "float32") - constant(float(channels), "float32") / elements
    product = op("Mul", corrected, rest)
    return replace(product, attrs={**product.attrs, "_output_shapes": protos.shapes_attr([(channels,)])})

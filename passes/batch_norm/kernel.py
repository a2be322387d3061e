"""Batch norm by the fused kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from passes.batch_norm.roles import BETA, GAMMA, MEAN, ROLES, VARIANCE
from rewriter import protos
from rewriter.expr import Apply, Expr, Port, array, constant, op
from rewriter.shapes import Shape

DTYPES = ("float32", "half", "float16", "bfloat16")
"""Dtypes of x that the kernel takes. Parameters and statistics are float32."""

WIDE = frozenset({"float32", "float64"})
"""Dtypes that hold the kernel's arithmetic without a loss of digits."""

POPULATION = "_population_variance"
"""Attribute of a fused node whose moving variance is to average the population's variance: its number of channels."""


@dataclass(frozen=True)
class Layout:
    """A format of the kernel, and the view of x in it.

    Attributes:
        data_format: the kernel's attribute.
        view: "same": x as it is; "rows": all but the last axis in one; "column": one more axis at the end.
        channels: the number of channels.
    """

    data_format: str
    view: Literal["same", "rows", "column"]
    channels: int

    def viewed(self, x: Expr) -> Expr:
        """Return the kernel's input for x."""
        if self.view == "rows":
            return op("Reshape", x, array(np.array([-1, 1, 1, self.channels], dtype=np.int32)))
        return op("ExpandDims", x, constant(-1, "int32")) if self.view == "column" else x

    def back(self, y: Apply, x: Expr) -> Apply:
        """Return the kernel's output in the shape of x."""
        return y if self.view == "same" else op("Reshape", y, op("Shape", x))

    def moments(self, x: Expr) -> tuple[Expr, Expr]:
        """Return mean and population variance of each channel of x, computed in single ops: float32 vectors."""
        viewed = self.viewed(x)
        wide = viewed if viewed.dtype == "float32" else op("Cast", viewed, DstT=protos.Dtype("float32"))
        axes = array(np.array([i for i, axis in enumerate(self.data_format) if axis != "C"], dtype=np.int32))
        mean = op("Mean", wide, axes, keep_dims=True)
        variance = op("Mean", op("SquaredDifference", wide, mean), axes)
        return op("Reshape", mean, array(np.array([self.channels], dtype=np.int32))), variance


def layout_of(shape: Shape, channel: int) -> Layout | None:
    """Return the layout for x of a shape with its channels on an axis; None where the kernel has none.

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
    """The kernel's outputs: y in the shape of x and, in training, the batch's mean and population variance."""

    y: Apply
    mean: Expr
    variance: Expr


def normalised(x: Expr, vectors: Mapping[str, Expr], layout: Layout, epsilon: float, *, training: bool) -> Normalised:
    """Normalise x with the fused kernel.

    Args:
        x: of one of `DTYPES`.
        vectors: float32 vectors by role; ones for gamma and zeros for beta where absent. Training uses no
            mean and variance.
        layout: the kernel's view of x.
        epsilon: added to the variance.
        training: true to normalise with the batch's statistics.
    """
    size = layout.channels
    empty = array(np.zeros([0], np.float32))
    inputs = {GAMMA: array(np.ones([size], np.float32)), BETA: array(np.zeros([size], np.float32))} | dict(vectors)
    if training:
        inputs |= {MEAN: empty, VARIANCE: empty}
    fused = op(
        "FusedBatchNormV3",
        layout.viewed(x),
        *(inputs[role] for role in ROLES),
        epsilon=float(epsilon),
        is_training=training,
        data_format=layout.data_format,
        **{POPULATION: size},
    )
    # In inference nothing uses it, and what nothing uses is not placed.
    variance = population(Port("float32", fused, 2), x, size)
    return Normalised(layout.back(fused, x), Port("float32", fused, 1), variance)


def sample(variance: Expr, x: Expr, channels: int) -> Expr:
    """Return the batch's variance with the correction that the kernel makes: the inverse of `population`."""
    elements = op("Cast", op("Size", x, out_type=protos.Dtype("int64")), DstT=protos.Dtype("float32"))
    count = elements / constant(float(channels), "float32")
    # A single element has the variance 0; without the lower bound, it would be 0 times infinity.
    return variance * (count / op("Maximum", count - 1.0, 1.0))


def population(corrected: Expr, x: Expr, channels: int) -> Expr:
    """Return the batch's variance without the correction that the kernel makes.

    The kernel's output is the population's variance times n / (n - 1), where a channel has n elements of x.
    """
    elements = op("Cast", op("Size", x, out_type=protos.Dtype("int64")), DstT=protos.Dtype("float32"))
    rest = constant(1.0, "float32") - constant(float(channels), "float32") / elements
    product = op("Mul", corrected, rest)
    # Later passes ask for its shape, which an added op does not record by itself.
    return replace(product, attrs={**product.attrs, "_output_shapes": protos.shapes_attr([(channels,)])})

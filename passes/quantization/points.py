"""Quantisation points: which values are fake-quantised. Providers yield them; `insertion` says how it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from passes.quantization.custom import Quantizer
from passes.quantization.roles import Role
from rewriter import op_defs
from rewriter.edit import Edit, Rewire
from rewriter.expr import Expr, Use
from rewriter.ir import Edge, Error, Model
from rewriter.shapes import Shape

Usage = Literal["parameter", "statistic", "average"]
"""Use of a quantised value: a parameter that is read; a batch's statistic; or an average that is stored."""


Replacement = Callable[[Expr], Iterable[Edit]]
"""Function from a quantised value to the edits that let it be used."""


class Member(Protocol):
    """A layer as a user thinks of it, such as a batch norm."""

    @property
    def name(self) -> str:
        """Its name, which rules match."""
        ...

    @property
    def variables(self) -> Mapping[str, str]:
        """The checkpoint keys of its variables by role."""
        ...


class QuantizedLayer(NamedTuple):
    """The identity of quantisers: values of one layer and role share widths and ranges.

    Attributes:
        name: its name in reports.
        members: the one layer that it is, or several that share a function and with it their quantisers.
        epsilon: of a batch norm, the number that it adds to variances; else None.
        channels: the number of its channels, where each may have a range of its own that is kept; else None.
        values: returns the values with which its ranges begin, of each member, float32 [channels, n]; None for those
            of its variables.
        normalized: true if a batch norm follows, so that the values' magnitude has no effect.
    """

    name: str
    members: tuple[Member, ...]
    epsilon: float | None = None
    channels: int | None = None
    values: Callable[[], Sequence[np.ndarray]] | None = None
    normalized: bool = False


Quantizers = Mapping[str, Sequence[Quantizer | None]]
"""The quantisers of each role, one for each layer; None where a layer has none for the role."""


@dataclass(frozen=True)
class QuantizationPoint:
    """A use of a value that is fake-quantised.

    Attributes:
        edge: where the value is used.
        role: the name of its role.
        layer: the number of its layer among the provider's.
        name: the name of the layer, in reports.
        shape: its shape; -1 is an unknown size.
        axis: the axis of the channels, -1 for the last, where each channel has a range of its own; several axes that
            are channels together; None for one range.
        value: the value, where it is computed for this purpose; by default, it is that of the edge.
        epsilon: of a batch norm's values, the number that it adds to variances; else None.
        use: its use.
        trained: true if it is used in training alone: then its range may follow it, and rounding may be stochastic.
        run: in the main graph, the node that runs at every training step, so that moved ranges are stored with it; ""
            elsewhere, or where there is none.
        scope: the name scope of the nodes that quantise it; by default, that of the node that uses it.
        replacement: from the quantised value to the edits that let it be used; by default, the edge takes it.
        device: true if its codes are those of an integer device (`passes.quantization.device_schemes`).
        lookup: of rows that are looked up in a table, the use of their indices; else None.
    """

    edge: Edge
    role: str
    layer: int
    name: str
    shape: Shape
    axis: int | tuple[int, ...] | None = None
    value: Expr | None = None
    epsilon: float | None = None
    use: Usage = "parameter"
    trained: bool = False
    run: str = ""
    scope: str = ""
    replacement: Replacement | None = None
    device: bool = False
    lookup: Edge | None = None

    def __post_init__(self) -> None:
        if any(not -len(self.shape) <= axis < 0 for axis in self.channel_axes):
            raise Error(f"axis {self.axis} of {self.role} of {self.name}: it is counted from the end, -1 for the last")

    @property
    def channel_axes(self) -> tuple[int, ...]:
        """The axes of the channels that have ranges of their own."""
        return () if self.axis is None else (self.axis,) if isinstance(self.axis, int) else self.axis

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes, counted from the end, over which values share a range."""
        return tuple(axis for axis in range(-len(self.shape), 0) if axis not in self.channel_axes)

    def edits(self, quantized: Expr) -> Iterable[Edit]:
        """Return the edits that let the quantised value be used."""
        if self.replacement is not None:
            return self.replacement(quantized)
        return [Rewire(self.edge, quantized, self.scope or self.edge.node or self.role)]


def value_at(model: Model, edge: Edge) -> Use:
    """Return the value that is used at an edge."""
    graph = model.graphs[edge.graph]
    value = graph.used_at(edge)
    return Use(op_defs.output_dtype(model, graph, value), value)


class Provider(Protocol):
    """A source of quantisation points: one kind of thing in a model that has values to quantise.

    It is best written as a frozen dataclass whose fields are its options.
    """

    @property
    def roles(self) -> Sequence[Role]:
        """The roles of its values, in the order of the control variables' rows."""
        ...

    def layers(self, model: Model) -> Sequence[QuantizedLayer]:
        """Return the layers, in the order of their numbers."""
        ...

    def points(self, model: Model, quantizers: Quantizers, /) -> Iterator[QuantizationPoint | Edit]:
        """Yield the points to quantise, and a `Skip` for what cannot be; other edits are made after the points'.

        A point whose layer has no quantiser for its role is left out by the caller.

        Raises:
            Error: the options do not go together.
        """
        ...

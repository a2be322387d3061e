"""A quantiser of the user's own in place of a scheme."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from passes.quantization.ranges import DYNAMIC, Range
from passes.quantization.schemes import Scheme
from rewriter.ir import Gradient, Graph


class Context(NamedTuple):
    """Facts about a vector, for the function that quantises it.

    Attributes:
        role: "gamma", "beta", "moving_mean" or "moving_variance".
        layer: the batch norm's name; several that share a function are joined with "+".
        epsilon: that of the batch norm.
    """

    role: str
    layer: str
    epsilon: float


QuantizeFunction = Callable[[Any, Context], Any]
"""(vector, context) -> vector, each float32 [C]."""


class TraceRequest(NamedTuple):
    """A function to be traced for vectors of a size, float32 [size]."""

    function: QuantizeFunction
    context: Context
    size: int


class Traced(NamedTuple):
    """Traced functions as graphs.

    Attributes:
        names: the name of each requested function's graph.
        graphs: these graphs, and those that they call.
        gradients: the gradient function of each op type that has one of its own.
    """

    names: Mapping[TraceRequest, str]
    graphs: Mapping[str, Graph]
    gradients: Mapping[str, Gradient]


@dataclass(frozen=True)
class CustomQuantizer:
    """A user's function (vector, context) -> vector of float32 [C], which becomes part of the graph.

    It is traced once for each size and context. Its gradient is that of its ops, custom gradients included. It may
    hold no variables and no ops with effects.

    Attributes:
        function: the function.
        trace: traces functions and returns their graphs.
        label: its name in reports.
        bits: the initial value of its `quantization.bits`; 0 switches it off, any other number on.
    """

    function: QuantizeFunction = field(repr=False)
    trace: Callable[[Sequence[TraceRequest]], Traced] = field(compare=False, repr=False)
    label: str
    bits: int = 8
    range: ClassVar[Range] = DYNAMIC
    rounding: ClassVar[str] = "nearest"
    name: ClassVar[str] = "pipeline"
    narrow: ClassVar[bool] = False


Quantizer = Scheme | CustomQuantizer

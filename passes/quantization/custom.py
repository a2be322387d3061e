"""A pipeline of the user's own in place of a scheme."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from passes.quantization.ranges import DYNAMIC, Range
from passes.quantization.schemes import Scheme
from rewriter.ir import Gradient, Graph


class Context(NamedTuple):
    """What a pipeline is told about the vector that it is given.

    Attributes:
        role: "gamma", "beta", "moving_mean" or "moving_variance".
        layer: the batch norm's name; several that share a function are joined with "+".
        epsilon: that of the batch norm.
    """

    role: str
    layer: str
    epsilon: float


QuantizeFunction = Callable[[Any, Context], Any]


class TraceRequest(NamedTuple):
    """A function to be traced for vectors of a size, float32 [size]."""

    function: QuantizeFunction
    context: Context
    size: int


class Traced(NamedTuple):
    """Functions as graphs.

    Attributes:
        names: the graph of each function that was wanted.
        graphs: these, and those that they call.
        gradients: the gradient function of each kind of op that has one of its own.
    """

    names: Mapping[TraceRequest, str]
    graphs: Mapping[str, Graph]
    gradients: Mapping[str, Gradient]


@dataclass(frozen=True)
class CustomQuantizer:
    """A function (vector, context) -> vector of float32 [C], which becomes part of the graph.

    It is traced once for each size and context. Its gradient is that of its ops, custom gradients included. It may
    hold no variables and no ops with effects.

    Attributes:
        function: the function.
        trace: makes graphs of functions.
        label: what it is called in reports.
        bits: what `quantization.bits` holds for it at first; 0 switches it off, any other number on.
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

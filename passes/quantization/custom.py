"""A quantiser of the user's own in place of a scheme."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from passes.quantization.ranges import DYNAMIC, Range
from passes.quantization.schemes import Scheme
from rewriter.ir import Gradient, Graph


class Context(NamedTuple):
    """Facts about a value, for the function that quantises it.

    Attributes:
        role: such as "gamma", "beta", "moving_mean" or "moving_variance".
        layer: the layer's name; several that share a function are joined with "+".
        epsilon: of a batch norm's values, the number that it adds to variances; else None.
    """

    role: str
    layer: str
    epsilon: float | None


QuantizeFunction = Callable[[Any, Context], Any]
"""(value, context) -> value, each float32 and of one shape."""


class TraceRequest(NamedTuple):
    """A function to be traced for float32 values of a shape."""

    function: QuantizeFunction
    context: Context
    shape: tuple[int, ...]


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
    """A user's function (value, context) -> value of the same shape, float32, which becomes part of the graph.

    It is traced once for each shape and context. Its gradient is that of its ops, custom gradients included. It may
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

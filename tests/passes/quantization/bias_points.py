"""A provider of quantisation points that is no part of bnqat: the biases that ``BiasAdd`` adds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from passes.quantization.points import Layer, QuantizationPoint, Quantizers
from passes.quantization.roles import Role
from rewriter.dataflow import VariableKey, origins
from rewriter.edit import Edit, Skip
from rewriter.ir import Edge, Model

BIAS = Role("bias")


class Bias(NamedTuple):
    """A variable of biases, under the name that rules match."""

    name: str
    variables: Mapping[str, str]


@dataclass(frozen=True)
class BiasPoints:
    """Every ``BiasAdd`` whose bias is a variable; one range for each."""

    roles: ClassVar[Sequence[Role]] = (BIAS,)

    def layers(self, model: Model) -> Sequence[Layer]:
        """Return a layer for each variable."""
        biases = [
            Bias(model.variables[key].name, {"bias": key}) for key in sorted(set().union(*_edges(model).values()))
        ]
        return [Layer(bias.name, (bias,)) for bias in biases]

    def points(self, model: Model, _: Quantizers) -> Iterator[QuantizationPoint | Edit]:
        """Yield a point for each ``BiasAdd``, or a `Skip` where a function adds one of several biases."""
        number = {layer.members[0].variables["bias"]: i for i, layer in enumerate(self.layers(model))}
        for edge, keys in _edges(model).items():
            if len(keys) > 1:
                yield Skip(edge.graph, edge.node, "its function adds several biases")
            for key in keys if len(keys) == 1 else ():
                variable = model.variables[key]
                yield QuantizationPoint(edge, "bias", number[key], variable.name, variable.shape or (-1,), trained=True)


def _edges(model: Model) -> dict[Edge, set[str]]:
    """Return the edges at which biases are added, and the keys of the variables that hold them."""
    edges = {}
    for graph in model.graphs.values():
        for node in graph.nodes.values():
            found = origins(model, graph.name, node.inputs[1]) if node.op == "BiasAdd" else ()
            keys = {origin.key for origin in found if isinstance(origin, VariableKey)}
            if keys:
                edges[Edge(graph.name, node.name, 1)] = keys
    return edges

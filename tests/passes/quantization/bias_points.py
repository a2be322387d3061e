"""A provider of quantisation points that is no part of bnqat: the biases that ``BiasAdd`` adds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from passes.entries.training import only_training
from passes.quantization.points import QuantizationPoint, QuantizedLayer, Quantizers
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

    def layers(self, model: Model) -> Sequence[QuantizedLayer]:
        """Return a layer for each variable."""
        biases = [
            Bias(model.variables[key].name, {"bias": key}) for key in sorted(set().union(*_edges(model).values()))
        ]
        return [QuantizedLayer(bias.name, (bias,)) for bias in biases]

    def points(self, model: Model, _: Quantizers) -> Iterator[QuantizationPoint | Edit]:
        """Yield a point for each ``BiasAdd``, or a `Skip` where a function adds one of several biases."""
        number = {layer.members[0].variables["bias"]: i for i, layer in enumerate(self.layers(model))}
        for edge, keys in _edges(model).items():
            if len(keys) > 1:
                yield Skip(edge.graph, edge.node, "its function adds several biases")
                continue
            (key,) = keys
            name, shape = model.variables[key].name, model.variables[key].shape or (-1,)
            trained = edge.graph in model.analysis(only_training)
            yield QuantizationPoint(edge, "bias", number[key], name, shape, trained=trained)


def _edges(model: Model) -> dict[Edge, set[str]]:
    """Return the edges at which biases are added, and the keys of the variables that hold them."""
    adds = [(g.name, node) for g in model.graphs.values() for node in g.nodes.values() if node.op == "BiasAdd"]
    sources = {Edge(graph, node.name, 1): origins(model, graph, node.inputs[1]) for graph, node in adds}
    keys = {edge: {o.key for o in known if isinstance(o, VariableKey)} for edge, known in sources.items()}
    return {edge: keys_here for edge, keys_here in keys.items() if keys_here}

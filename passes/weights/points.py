"""The quantisation points of weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from passes.entries.training import only_training
from passes.quantization.points import QuantizationPoint, QuantizedLayer, Quantizers
from passes.quantization.roles import Role
from passes.weights.layers import weight_layers
from passes.weights.roles import WEIGHT
from passes.weights.uses import weight_uses
from rewriter.edit import Edit
from rewriter.ir import Model


@dataclass(frozen=True)
class WeightPoints:
    """Every weight of a convolution, a matrix product or an embedding, where its op takes it."""

    roles: ClassVar[Sequence[Role]] = (WEIGHT,)

    def layers(self, model: Model) -> Sequence[QuantizedLayer]:
        """Return a layer for each weight, or for several that share a function."""
        return [
            QuantizedLayer(
                layer.name,
                layer.members,
                channels=layer.channels,
                values=partial(layer.values, model),
                normalized=layer.normalized,
            )
            for layer in model.analysis(weight_layers).layers
        ]

    def points(self, model: Model, quantizers: Quantizers) -> Iterator[QuantizationPoint | Edit]:
        """Yield a point for each use; a `Skip` for what cannot be quantised, unless no weight is to be."""
        if not any(quantizers[WEIGHT.name]):
            return
        uses, skips = model.analysis(weight_uses)
        yield from skips
        training = model.analysis(only_training)
        layers, numbers = model.analysis(weight_layers)
        for use in uses:
            number = numbers[use.edges[0]]
            for edge in use.edges:
                yield QuantizationPoint(
                    edge,
                    WEIGHT.name,
                    number,
                    layers[number].name,
                    use.shape,
                    use.axes,
                    trained=edge.graph in training,
                    scope=use.node,
                    device=True,
                    lookup=use.indices,
                )

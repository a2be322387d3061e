"""The quantisation points of batch norms: their variables, and the statistics that enter their moving averages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from passes.batch_norm.batch_norms import channels, moving_average, names_of_sites
from passes.batch_norm.layers import Layer, layers, layers_of_sites
from passes.batch_norm.options import Average, AverageOptions
from passes.batch_norm.roles import BETA, GAMMA, QUANTIZED, ROLES, VARIANCE
from passes.batch_norm.site import Site
from passes.batch_norm.sites import STATISTICS, sites
from passes.batch_norm.stored_averages import assigning, dead_zone, storable, stored
from passes.quantization.custom import CustomQuantizer, Quantizer
from passes.quantization.insertion import starting_limits
from passes.quantization.points import QuantizationPoint, QuantizedLayer, Quantizers, Replacement, Usage, value_at
from passes.quantization.ranges import Dynamic, Ema, Learned
from passes.quantization.roles import Role
from passes.quantization.training_functions import frozen
from rewriter.dataflow import call_graph
from rewriter.edit import Edit, Rewire, SetAttr, Skip
from rewriter.expr import Expr, Use
from rewriter.ir import MAIN, Edge, Error, Model


@dataclass(frozen=True)
class BatchNormPoints(AverageOptions):
    """Every batch norm's variables and moving-average updates.

    Raises:
        Error: an option is out of range.
    """

    roles: ClassVar[Sequence[Role]] = QUANTIZED

    def layers(self, model: Model) -> Sequence[QuantizedLayer]:
        """Return the layers: batch norms, or several that share a function."""
        return [QuantizedLayer(layer.name, layer.batch_norms, _epsilon(layer)) for layer in model.analysis(layers)]

    def points(self, model: Model, quantizers: Quantizers) -> Iterator[QuantizationPoint | Edit]:
        """Yield the points of every site that has no quantisers and can have them; a `Skip` for the others.

        Raises:
            Error: the range of an average that is to be stored follows its values.
        """
        stores = self.quantize_average == "stored"
        for role, quantizer in ((r, q) for r in STATISTICS for q in quantizers[r] if stores and q is not None):
            if isinstance(quantizer.range, Dynamic):
                raise Error(
                    f"{role}: a stored average needs a range that does not follow its values; choose ema or fixed"
                )
        of_model = _Points(model, quantizers, self.quantize_average)
        for site in model.analysis(sites):
            reason = "already quantised" if site.binding.quantized else site.reason or of_model.reason(site)
            if reason:
                yield Skip(site.graph, site.node, reason)
                continue
            yield from of_model.parameters(site)
            yield from of_model.statistics(site)
            if site.kernel_average and self.quantize_average == "statistic":
                yield from of_model.averages_beside(site)
        if stores:
            limits = starting_limits(model, self.layers(model), quantizers)
            yield from dead_zone(model.analysis(layers), quantizers, limits)


def _epsilon(layer: Layer) -> float:
    """Return the epsilon that the layer's moving variance is used with."""
    with_variance = [bn for bn in layer.batch_norms if VARIANCE in bn.variables]
    return (with_variance or layer.batch_norms)[0].sites[0].epsilon


class _Points:
    """The points of a model's sites."""

    def __init__(self, model: Model, quantizers: Quantizers, quantize_average: Average) -> None:
        self.model = model
        self.quantizers = quantizers
        self.quantize_average = quantize_average

    def reason(self, site: Site) -> str:
        """Return the reason why a site cannot have its quantisers; empty if it can."""
        layer = self._layer(site)
        quantizers = [
            q
            for role in (*site.binding.parameters, *site.binding.statistics)
            if (q := self.quantizers[role][layer.number])
        ]
        if not quantizers:
            return "the scheme none leaves it as it is"
        if site.mode == "both" and (_observes(quantizers) or any(q.rounding == "stochastic" for q in quantizers)):
            return (
                "it chooses its mode while it runs; ema ranges and stochastic rounding need fusing, without --no-fuse"
            )
        if (
            any(isinstance(q.range, Learned) or isinstance(q, CustomQuantizer) for q in quantizers)
            and self._size(site) is None
        ):
            return "the number of its channels is not known, which learned ranges and pipelines need"
        if any(isinstance(q, CustomQuantizer) for q in quantizers) and not self.model.object_based:
            return "a pipeline needs a model in TensorFlow 2's format"
        if _observes(quantizers) and any(self._repeated(s) for bn in layer.batch_norms for s in bn.sites if s.training):
            return "its function is trained several times in a step; an ema range cannot follow it"
        # In the main graph nothing runs but what a signature needs, so ranges move when an update of an average runs.
        unknown_update = site.graph == MAIN and not any(graph == MAIN for graph, _ in site.binding.runs)
        if _observes(quantizers) and site.training and unknown_update:
            return "what updates its averages is not known, and an ema range is to be moved with them"
        assigned = [a for assigns in site.binding.assigns.values() for a in assigning(self.model, assigns)]
        stores = self.quantize_average == "stored" and site.training
        if stores and not all(storable(self.model, *a) for a in assigned):
            return "what assigns its moving averages keeps them in no resource, so they cannot be stored quantised"
        return ""

    def _repeated(self, site: Site) -> bool:
        """Return true if a graph meets a layer's training more than once."""
        layer = self._layer(site)
        twins = [s for bn in layer.batch_norms for s in bn.sites if s.training and s.graph == site.graph]
        calls = [call.graph for call in self.model.analysis(call_graph).callers.get(site.graph, ())]
        with_variables = [bn for bn in layer.batch_norms if bn.variables]
        places = {(s.graph, s.node) for s in twins}
        # A main graph may hold the source's training and a copy for the signature `train`; one of them runs at a time.
        return len(with_variables) > 1 or len(calls) > len(set(calls)) or (len(places) > 1 and site.graph != MAIN)

    def parameters(self, site: Site) -> Iterator[QuantizationPoint]:
        """Yield the points at which a site uses its variables; the base of its moving average is none of them."""
        for role, edges in site.binding.parameters.items():
            # In TensorFlow 1's format a quantiser is no call but many nodes, which get a scope of their own.
            scope = site.node if self.model.object_based else f"{site.node}/{role}"
            for edge in edges:
                yield self._point(site, role, edge, scope=scope)

    def statistics(self, site: Site) -> Iterator[QuantizationPoint]:
        """Yield the points at which the batch's statistics enter averages, or averages are stored in variables.

        The kernel's outputs hold averages where its factor is not 1; with factor 1 they are the batch's own.
        """
        stores = self.quantize_average == "stored"
        for role, edges in site.binding.statistics.items():
            for graph, node in assigning(self.model, site.binding.assigns[role]) if stores else ():
                value, put = stored(self.model, graph, node)
                yield self._point(site, role, Edge(graph, node, 1), "average", value=value, replacement=put)
            for edge in () if stores else edges:
                average = partial(self._averaged, site, role, edge)
                yield self._point(site, role, edge, "statistic", replacement=average)

    def averages_beside(self, site: Site) -> Iterator[Edit]:
        """Let a kernel that computes averages give the batch's statistics, where one of them is quantised.

        An average whose statistic is not quantised is then computed beside the kernel, too.
        """
        number = self._layer(site).number
        float_roles = [role for role in site.binding.statistics if self.quantizers[role][number] is None]
        if len(float_roles) == len(site.binding.statistics):
            return
        yield SetAttr(site.graph, site.node, "exponential_avg_factor", None)
        for role in float_roles:
            for edge in site.binding.statistics[role]:
                yield from self._averaged(site, role, edge, value_at(self.model, edge))

    def _averaged(self, site: Site, role: str, edge: Edge, batch: Expr) -> Iterator[Edit]:
        """Let an average take a quantised statistic. An average of the kernel's own is then computed beside it."""
        if self.quantize_average == "none":
            return
        if site.kernel_average:
            base = self.model.graphs[site.graph].nodes[site.node].inputs[1 + ROLES.index(role)]
            batch = moving_average(Use(batch.dtype, base), batch, site.kernel_factor)
        yield Rewire(edge, batch, f"{site.node}/{role}")

    def _point(
        self,
        site: Site,
        role: str,
        edge: Edge,
        use: Usage = "parameter",
        *,
        value: Expr | None = None,
        scope: str = "",
        replacement: Replacement | None = None,
    ) -> QuantizationPoint:
        # The second phase normalises with the moving statistics, and still trains gamma and beta.
        second_phase = site.graph in self.model.analysis(frozen) and role in (GAMMA, BETA)
        size = self._size(site)
        return QuantizationPoint(
            edge=edge,
            role=role,
            layer=self._layer(site).number,
            name=self.model.analysis(names_of_sites)[site.graph, site.node],
            shape=(-1 if size is None else size,),
            value=value,
            epsilon=site.epsilon,
            use=use,
            trained=site.mode == "training" or use != "parameter" or second_phase,
            run=next((node for place, node in site.binding.runs if place == MAIN), ""),
            scope=scope,
            replacement=replacement,
        )

    def _layer(self, site: Site) -> Layer:
        return self.model.analysis(layers_of_sites)[site.graph, site.node]

    def _size(self, site: Site) -> int | None:
        return self.model.analysis(channels)[site.graph, site.node]


def _observes(quantizers: Iterable[Quantizer]) -> bool:
    """Return true if a quantiser's range is a moving average."""
    return any(isinstance(q.range, Ema) for q in quantizers)

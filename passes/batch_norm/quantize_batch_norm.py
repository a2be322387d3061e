"""Quantisers on the batch norms' variables and on the statistics that enter their moving averages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from passes.batch_norm.batch_norms import channels, moving_average, names_of_sites
from passes.batch_norm.choice import Rule, quantizer_for, unmatched
from passes.batch_norm.entries import frozen
from passes.batch_norm.layers import Layer, layers, layers_of_sites
from passes.batch_norm.site import Site
from passes.batch_norm.sites import STATISTICS, sites
from passes.batch_norm.stored_averages import assigning, dead_zone, storable, stored
from passes.quantization.controls import Controls, Initial, counters
from passes.quantization.custom import Context, CustomQuantizer, Quantizer, Traced, TraceRequest
from passes.quantization.emission import QuantizerEmitter
from passes.quantization.grouping import CustomSpec, QuantizationPoint, Vector, groups
from passes.quantization.quantizers import QuantizerSpec
from passes.quantization.ranges import Dynamic, Ema, Fixed, Learned
from passes.quantization.schemes import Affine, Log, Scheme
from passes.roles import BETA, GAMMA, ROLES, VARIANCE
from rewriter import op_defs
from rewriter.dataflow import call_graph
from rewriter.edit import AddVariable, Define, Edit, Import, Rewire, RunAfter, SetAttr, Skip
from rewriter.expr import Expr, Use, read
from rewriter.ir import MAIN, Edge, Error, Model, Value

Average = Literal["statistic", "none", "stored"]


@dataclass(frozen=True)
class QuantizeBatchNorm:
    """Pass every batch norm's variables and moving-average updates through switchable quantisers.

    Quantisers act from the step on that `quantization.start_step` holds, in training and inference alike;
    before it, every value passes unchanged, bit for bit.

    Attributes:
        gamma, beta, moving_mean, moving_variance: the quantiser of each role; None leaves it float.
        rules: other options for some layers; a later rule overrides an earlier one.
        average: what happens to a batch's statistics on their way into the moving averages: "statistic" quantises
            them, and the average stays float and is quantised where it is read; "none" leaves them; "stored"
            quantises the average itself before it is written back, which can make it stand still.
        start_step: the first step at which quantisers act; the variable's initial value.
        ramp_steps: the number of steps from there on in which float and quantised value are blended; likewise.

    Raises:
        Error: an option is out of range, or options do not go together.
    """

    name: ClassVar[str] = "quantize-batch-norm"

    gamma: Quantizer | None = field(default_factory=Affine)
    beta: Quantizer | None = field(default_factory=Affine)
    moving_mean: Quantizer | None = field(default_factory=Affine)
    moving_variance: Quantizer | None = field(default_factory=Log)
    rules: tuple[Rule, ...] = ()
    average: Average = "statistic"
    start_step: int = 0
    ramp_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("start_step", "ramp_steps"):
            if not 0 <= getattr(self, name) < 2**63:
                raise Error(f"{name} {getattr(self, name)}: it is a number of steps, 0 or more, that fits in an int64")
        if self.average not in ("statistic", "none", "stored"):
            raise Error(f"average {self.average!r}: it is 'statistic', 'none' or 'stored'")

    def edits(self, model: Model) -> Iterable[Edit]:
        """Yield quantisers for every site that has none and can have them; a `Skip` with the reason for the others.

        Raises:
            Error: options or rules do not fit the model, or it was rewritten when it had other batch norms.
        """
        insertion = _Insertion(self, model)
        todo: list[Site] = []
        for site in model.analysis(sites):
            reason = "already quantised" if site.binding.quantized else site.reason or insertion.reason(site)
            if reason:
                yield Skip(site.graph, site.node, reason)
            else:
                todo.append(site)
        if todo and any(v.name.startswith("quantization/bits/") for v in model.variables.values()):
            raise Error("the model is quantised already, but for some sites; rewrite the float model to quantise more")
        if todo:
            yield from insertion.edits(todo)


class _Insertion:
    """A run of the pass on a model.

    Attributes:
        quantizers: each role's quantisers, one for each layer; None where a layer is to have none.
        values: the expression for each value that a graph has.
    """

    def __init__(self, options: QuantizeBatchNorm, model: Model) -> None:
        self.options = options
        self.model = model
        self.layers = model.analysis(layers)
        defaults = {role: getattr(options, role) for role in ROLES}
        self.quantizers: Mapping[str, list[Quantizer | None]] = {
            role: [quantizer_for(model, defaults[role], options.rules, role, layer) for layer in self.layers]
            for role in ROLES
        }
        self._check()
        self.values: dict[tuple[str, Value], Use] = {}

    def _check(self) -> None:
        """Refuse options that do not go together.

        Raises:
            Error: they do not; the message says why.
        """
        rule = unmatched(self.model, self.options.rules, self.layers)
        if rule is not None:
            raise Error(
                f"the rule {rule.match!r} matches no layer and no variable; there is {self.layers[0].name}, say"
            )
        for role, quantizer in ((r, q) for r in ROLES for q in self.quantizers[r] if q is not None):
            if isinstance(quantizer, Log) and role != VARIANCE:
                raise Error(f"{role}: the scheme log is for moving_variance, as {role} has values below zero")
            if isinstance(quantizer.range, Learned) and role in STATISTICS:
                raise Error(
                    f"{role}: no gradient reaches moving statistics, so a learned range would stay; choose ema or fixed"
                )
            if isinstance(quantizer.range, Dynamic) and role in STATISTICS and self.options.average == "stored":
                raise Error(
                    f"{role}: a stored average needs a range that does not follow its values; choose ema or fixed"
                )

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
        if site.mode == "both" and (self._observes(quantizers) or any(q.rounding == "stochastic" for q in quantizers)):
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
        if self._observes(quantizers) and any(
            self._repeated(s) for bn in layer.batch_norms for s in bn.sites if s.training
        ):
            return "its function is trained several times in a step; an ema range cannot follow it"
        unknown_update = site.graph == MAIN and not any(graph == MAIN for graph, _ in site.binding.runs)
        if self._observes(quantizers) and site.training and unknown_update:
            return "what updates its averages is not known, and an ema range is to be moved with them"
        assigned = [a for assigns in site.binding.assigns.values() for a in assigning(self.model, assigns)]
        if self.options.average == "stored" and site.training and not all(storable(self.model, *a) for a in assigned):
            return "what assigns its moving averages keeps them in no resource, so they cannot be stored quantised"
        return ""

    def _repeated(self, site: Site) -> bool:
        """Return true if a graph meets a layer's training more than once."""
        layer = self._layer(site)
        twins = [s for bn in layer.batch_norms for s in bn.sites if s.training and s.graph == site.graph]
        calls = [call.graph for call in self.model.analysis(call_graph).callers.get(site.graph, ())]
        with_variables = [bn for bn in layer.batch_norms if bn.variables]
        places = {(s.graph, s.node) for s in twins}
        return len(with_variables) > 1 or len(calls) > len(set(calls)) or (len(places) > 1 and site.graph != MAIN)

    @staticmethod
    def _observes(quantizers: Iterable[Quantizer]) -> bool:
        """Return true if a quantiser's range is a moving average."""
        return any(isinstance(q.range, Ema) for q in quantizers)

    def edits(self, todo: list[Site]) -> Iterator[Edit]:
        """Quantise the values that the sites use."""
        limits = {role: np.array([self._limits(role, layer) for layer in self.layers], np.float32) for role in ROLES}
        widths = {r: q.bits if (q := getattr(self.options, r)) is not None else 0 for r in ROLES}
        initial = Initial(self.options.start_step, self.options.ramp_steps, widths, limits)
        controls = Controls(self.model, self.quantizers, initial)
        yield from (AddVariable(v) for v in controls.variables.values() if v.key not in self.model.variables)
        # A run counts its step only after it has read the step that it compares.
        count = controls.variables["step"]
        yield from (RunAfter(MAIN, name, (read(count),), "quantization/step") for name in counters(self.model))
        points = [q for site in todo for q in (*self._parameters(site), *self._statistics(site))]
        traced = self._trace(points)
        if traced.graphs:
            yield Import(tuple(traced.graphs.values()), traced.gradients)
        emitter = QuantizerEmitter(self.model, controls, traced)
        for group in groups(self.model, points):
            yield from emitter.place(group)
        for vector, _, put in points:
            yield from put(emitter.quantized[vector])
        for site in todo:
            if site.kernel_average and self.options.average == "statistic":
                yield SetAttr(site.graph, site.node, "exponential_avg_factor", None)
        if self.options.average == "stored":
            yield from dead_zone(self.layers, self.quantizers, limits)
        if self.model.object_based:
            yield from (Define(function) for function in emitter.functions.values())

    def _layer(self, site: Site) -> Layer:
        return self.model.analysis(layers_of_sites)[site.graph, site.node]

    def _size(self, site: Site) -> int | None:
        return self.model.analysis(channels)[site.graph, site.node]

    def _limits(self, role: str, layer: Layer) -> tuple[float, float]:
        """Return the limits that a range begins with."""
        quantizer = self.quantizers[role][layer.number]
        batch_norms = [bn for bn in layer.batch_norms if role in bn.variables]
        if not isinstance(quantizer, Scheme) or isinstance(quantizer.range, Dynamic) or not batch_norms:
            return 0.0, 0.0
        epsilon = batch_norms[0].sites[0].epsilon
        if isinstance(quantizer.range, Fixed):
            return quantizer.fixed(quantizer.range, epsilon)
        values = [np.asarray(self.model.value_of(bn.variables[role]), np.float32).ravel() for bn in batch_norms]
        return quantizer.limits_of(np.concatenate(values), epsilon)

    def _parameters(self, site: Site) -> Iterator[QuantizationPoint]:
        """Yield the points at which a site uses its variables; the base of its moving average is none of them."""
        for role, edges in site.binding.parameters.items():
            for edge in edges:
                vector = self._vector(site, role, edge.graph, self._used(edge), statistic=False)
                if vector is not None:
                    scope = site.node if self.model.object_based else f"{site.node}/{role}"
                    yield QuantizationPoint(vector, edge.node, partial(_rewired, edge, scope))

    def _statistics(self, site: Site) -> Iterator[QuantizationPoint]:
        """Yield the points at which the batch's statistics enter averages, or averages are stored in variables.

        The kernel's outputs hold averages where its factor is not 1; with factor 1 they are the batch's own.
        """
        quantizes_averages = self.options.average == "stored"
        for role, edges in site.binding.statistics.items():
            for graph, node in assigning(self.model, site.binding.assigns[role]) if quantizes_averages else ():
                value, put = stored(self.model, graph, node)
                vector = self._vector(site, role, graph, value, statistic=True)
                if vector is not None:
                    yield QuantizationPoint(vector, node, put)
            for edge in () if quantizes_averages else edges:
                vector = self._vector(site, role, edge.graph, self._used(edge), statistic=True)
                if vector is not None:
                    yield QuantizationPoint(vector, edge.node, partial(self._averaged, site, role, edge))

    def _averaged(self, site: Site, role: str, edge: Edge, batch: Expr) -> Iterator[Edit]:
        """Let an average take a quantised statistic. An average of the kernel's own is then computed beside it."""
        if self.options.average == "none":
            return
        if site.kernel_average:
            base = self.model.graphs[site.graph].nodes[site.node].inputs[1 + ROLES.index(role)]
            batch = moving_average(Use(batch.dtype, base), batch, site.kernel_factor)
        yield Rewire(edge, batch, f"{site.node}/{role}")

    def _used(self, edge: Edge) -> Use:
        """Return the value that is used at an edge."""
        graph = self.model.graphs[edge.graph]
        value = graph.nodes[edge.node].inputs[edge.position] if edge.node else graph.results[edge.position].value
        if (edge.graph, value) not in self.values:
            self.values[edge.graph, value] = Use(op_defs.output_dtype(self.model, graph, value), value)
        return self.values[edge.graph, value]

    def _vector(self, site: Site, role: str, graph: str, value: Expr, *, statistic: bool) -> Vector | None:
        """Return the vector of a role's value in a graph; None where its layer has no quantiser for the role."""
        number, name, _ = self._layer(site)
        quantizer = self.quantizers[role][number]
        if quantizer is None:
            return None
        second_phase = site.graph in self.model.analysis(frozen) and role in (GAMMA, BETA)
        training = site.mode == "training" or statistic or second_phase
        size = self._size(site)
        spec: QuantizerSpec | CustomSpec
        if isinstance(quantizer, Scheme):
            spec = QuantizerSpec(quantizer, site.epsilon, size, value.dtype, training).group_key
        else:
            spec = CustomSpec(
                TraceRequest(quantizer.function, Context(role, name, site.epsilon), size or 0), value.dtype
            )
        tag = {
            "role": role,
            "scheme": quantizer.name if isinstance(quantizer, Scheme) else f"{quantizer.name} {quantizer.label}",
            "bits": quantizer.bits,
            "range": quantizer.range.name,
            "rounding": quantizer.rounding,
            "narrow_range": quantizer.narrow,
            "batch_norm": self.model.analysis(names_of_sites)[site.graph, site.node],
            "layer": number,
            "use": ("average" if self.options.average == "stored" else "statistic") if statistic else "parameter",
        }
        run = next((node for place, node in site.binding.runs if place == MAIN), "")
        return Vector(graph, value, spec, role, number, json.dumps(tag, sort_keys=True), statistic, run)

    def _trace(self, points: Iterable[QuantizationPoint]) -> Traced:
        """Trace the functions of custom quantisers, all at once."""
        requests = list(dict.fromkeys(v.spec.request for v, _, _ in points if isinstance(v.spec, CustomSpec)))
        tracers = [
            q.trace for quantizers in self.quantizers.values() for q in quantizers if isinstance(q, CustomQuantizer)
        ]
        return tracers[0](requests) if requests else Traced({}, {}, {})


def _rewired(edge: Edge, scope: str, quantized: Expr) -> Iterator[Edit]:
    yield Rewire(edge, quantized, scope)

"""Quantisers on the batch norms' variables and on the statistics that enter their moving averages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from passes.batch_norm import channels, moving_average, names_of_sites
from passes.choice import Rule, chosen, unmatched
from passes.controls import Controls, Initial, counters
from passes.layers import Layer, layers, layers_of_sites
from passes.pipelines import Context, Pipeline, Quantizer, Traced, Wanted
from passes.quantizers import Kind, observing, piped, quantizing, row
from passes.ranges import Dynamic, Ema, Fixed, Learned
from passes.roles import ROLES, VARIANCE
from passes.schemes import FLOAT, Affine, Log, Scheme
from passes.sites import STATISTICS, TAG, Site, sites
from passes.stored_averages import assigning, dead_zone, storable, stored
from passes.uses import Piped, Quantity, Vector, groups
from rewriter import ops
from rewriter.edit import AddVariable, Define, Edit, Import, Rewire, Run, RunAfter, SetAttr, Skip
from rewriter.expr import Apply, Expr, Function, Port, Use, array, constant, handle, op, read
from rewriter.ir import MAIN, Edge, Error, Model, Value, unused
from rewriter.ops import Dtype

Average = Literal["statistic", "none", "stored"]


@dataclass(frozen=True)
class QuantizeBatchNorm:
    """Pass every batch norm's variables and moving-average updates through switchable quantisers.

    Quantisers act from the step on that `quantization.start_step` holds, in training and inference alike;
    before it, every value passes unchanged, bit for bit.

    Attributes:
        gamma, beta, moving_mean, moving_variance: the quantiser of each role; None leaves it float.
        rules: other options for some layers; what a later rule says counts.
        average: what happens to a batch's statistics on their way into the moving averages: "statistic" quantises
            them, and the average stays float and is quantised where it is read; "none" leaves them; "stored"
            quantises the average itself before it is written back, which can make it stand still.
        start_step: the first step at which quantisers act; the variable's initial value.
        ramp_steps: for how many steps from there on float and quantised value are blended; likewise.

    Raises:
        Error: an option is out of range, or options do not go together.
    """

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
        """Quantisers for every site that has none and can have them; a `Skip` with the reason for the others.

        Raises:
            Error: rules ask for what cannot be, or the model was rewritten when it had other batch norms.
        """
        work = _Work(self, model)
        todo: list[Site] = []
        for site in model.analysis(sites):
            reason = "already quantised" if site.quantized else site.reason or work.reason(site)
            if reason:
                yield Skip(site.graph, site.node, reason)
            else:
                todo.append(site)
        if todo:
            yield from work.edits(todo)


class _Work:
    """One run of the pass.

    Attributes:
        quantizers: each role's quantisers, one for each layer; None where a layer is to have none.
        functions: what quantises; sites with equal quantisers share a function.
        values: what stands for each value that a graph has.
        made: what stands for each vector, quantised.
        updates: the layers' nodes that update averages, where those are in the main graph.
    """

    def __init__(self, options: QuantizeBatchNorm, model: Model) -> None:
        self.options = options
        self.model = model
        self.layers = model.analysis(layers)
        defaults = {role: getattr(options, role) for role in ROLES}
        self.quantizers: Mapping[str, list[Quantizer | None]] = {
            role: [chosen(model, defaults[role], options.rules, role, layer) for layer in self.layers] for role in ROLES
        }
        self._check()
        self.functions: dict[tuple[Any, ...], Function] = {}
        self.values: dict[tuple[str, Value], Use] = {}
        self.made: dict[Vector, Expr] = {}
        self.traced = Traced({}, {}, {})

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
        """Why a site cannot have what it is to have; empty where it can."""
        layer = self._layer(site)
        used = [q for role in (*site.parameters, *site.statistics) if (q := self.quantizers[role][layer.number])]
        if not used:
            return "a rule leaves it as it is"
        if site.mode == "both" and any(isinstance(q.range, Ema) or q.rounding == "stochastic" for q in used):
            return (
                "it chooses its mode while it runs; ema ranges and stochastic rounding need fusing, without --no-fuse"
            )
        if any(isinstance(q.range, Learned) or isinstance(q, Pipeline) for q in used) and self._size(site) is None:
            return "the number of its channels is not known, which learned ranges and pipelines need"
        if any(isinstance(q, Pipeline) for q in used) and not self.model.object_based:
            return "a pipeline needs a model in TensorFlow 2's format"
        assigned = [a for found in site.assigns.values() for a in assigning(self.model, found)]
        if self.options.average == "stored" and site.training and not all(storable(self.model, *a) for a in assigned):
            return "what assigns its moving averages keeps them in no resource, so they cannot be stored quantised"
        return ""

    def edits(self, todo: list[Site]) -> Iterator[Edit]:
        """Quantise what the sites use."""
        limits = {role: np.array([self._limits(role, layer) for layer in self.layers], np.float32) for role in ROLES}
        widths = {r: q.bits if (q := getattr(self.options, r)) is not None else 0 for r in ROLES}
        initial = Initial(self.options.start_step, self.options.ramp_steps, widths, limits)
        self.controls = Controls(self.model, self.quantizers, initial)
        yield from (AddVariable(v) for v in self.controls.variables.values() if v.key not in self.model.variables)
        # What one run counts comes after that run's comparison.
        count = self.controls.variables["step"]
        yield from (RunAfter(MAIN, name, (read(count),), "quantization/step") for name in counters(self.model))
        runs = ((self._layer(site).number, run) for site in todo if site.training for run in site.runs)
        self.updates = {layer: node for layer, (graph, node) in runs if graph == MAIN}
        quantities = [q for site in todo for q in (*self._parameters(site), *self._statistics(site))]
        yield from self._trace(quantities)
        for group in groups(self.model, quantities):
            yield from self._place(group)
        for vector, _, put in quantities:
            yield from put(self.made[vector])
        for site in todo:
            if site.kernel_average and self.options.average == "statistic":
                yield SetAttr(site.graph, site.node, "exponential_avg_factor", None)
        if self.options.average == "stored":
            yield from dead_zone(self.layers, self.quantizers, limits)
        if self.model.object_based:
            yield from (Define(function) for function in self.functions.values())

    def _layer(self, site: Site) -> Layer:
        return self.model.analysis(layers_of_sites)[site.graph, site.node]

    def _size(self, site: Site) -> int | None:
        return self.model.analysis(channels)[site.graph, site.node]

    def _limits(self, role: str, layer: Layer) -> tuple[float, float]:
        """The limits that a range begins with."""
        quantizer = self.quantizers[role][layer.number]
        found = [bn for bn in layer.batch_norms if role in bn.variables]
        if quantizer is None or isinstance(quantizer.range, Dynamic) or not found:
            return 0.0, 0.0
        if isinstance(quantizer, Pipeline):
            return 0.0, 0.0
        epsilon = found[0].sites[0].epsilon
        if isinstance(quantizer.range, Fixed):
            return quantizer.fixed(quantizer.range, epsilon)
        values = [np.asarray(self.model.value_of(bn.variables[role]), np.float32).ravel() for bn in found]
        return quantizer.limits_of(np.concatenate(values), epsilon)

    def _parameters(self, site: Site) -> Iterator[Quantity]:
        """What a site normalises with; never the base of its moving average."""
        for role, edges in site.parameters.items():
            for edge in edges:
                vector = self._vector(site, role, edge.graph, self._used(edge), statistic=False)
                if vector is not None:
                    scope = site.node if self.model.object_based else f"{site.node}/{role}"
                    yield Quantity(vector, edge.node, partial(_rewired, edge, scope))

    def _statistics(self, site: Site) -> Iterator[Quantity]:
        """The batch's statistics on their way to the averages, or the averages on their way to the variables.

        The kernel's outputs hold averages where its factor is not 1; with factor 1 they are the batch's own.
        """
        stores = self.options.average == "stored"
        for role, edges in site.statistics.items():
            for graph, node in assigning(self.model, site.assigns[role]) if stores else ():
                value, put = stored(self.model, graph, node)
                vector = self._vector(site, role, graph, value, statistic=True)
                if vector is not None:
                    yield Quantity(vector, node, put)
            for edge in () if stores else edges:
                vector = self._vector(site, role, edge.graph, self._used(edge), statistic=True)
                if vector is not None:
                    yield Quantity(vector, edge.node, partial(self._averaged, site, role, edge))

    def _averaged(self, site: Site, role: str, edge: Edge, batch: Expr) -> Iterator[Edit]:
        """Let an average take a quantised statistic; the kernel's own average is computed beside it then."""
        if self.options.average == "none":
            return
        if site.kernel_average:
            base = self.model.graphs[site.graph].nodes[site.node].inputs[1 + ROLES.index(role)]
            batch = moving_average(Use(batch.dtype, base), batch, site.factor)
        yield Rewire(edge, batch, f"{site.node}/{role}")

    def _used(self, edge: Edge) -> Use:
        graph = self.model.graphs[edge.graph]
        value = graph.nodes[edge.node].inputs[edge.position] if edge.node else graph.results[edge.position].value
        if (edge.graph, value) not in self.values:
            self.values[edge.graph, value] = Use(ops.output_dtype(self.model, graph, value), value)
        return self.values[edge.graph, value]

    def _vector(self, site: Site, role: str, graph: str, value: Expr, *, statistic: bool) -> Vector | None:
        number, name, _ = self._layer(site)
        quantizer = self.quantizers[role][number]
        if quantizer is None:
            return None
        training = site.mode == "training" or statistic
        size = self._size(site)
        kind: Kind | Piped
        if isinstance(quantizer, Scheme):
            kind = Kind(quantizer, site.epsilon, size, value.dtype, training).usual
        else:
            kind = Piped(Wanted(quantizer.function, Context(role, name, site.epsilon), size or 0), value.dtype)
        tag = {
            "role": role,
            "scheme": quantizer.name,
            "bits": quantizer.bits,
            "range": quantizer.range.name,
            "rounding": quantizer.rounding,
            "narrow_range": quantizer.narrow,
            "batch_norm": self.model.analysis(names_of_sites)[site.graph, site.node],
            "layer": number,
            "use": ("average" if self.options.average == "stored" else "statistic") if statistic else "parameter",
        }
        return Vector(graph, value, kind, role, number, json.dumps(tag, sort_keys=True), statistic)

    def _place(self, group: tuple[Vector, ...]) -> Iterator[Edit]:
        """Make what stands for each vector, tagged, so that inspection needs no log.

        Nothing differentiates through a call in TensorFlow 1's format, so there it is placed without one.
        """
        first, kind = group[0], group[0].kind
        count = len(group) if len(group) > 1 else 0
        rows = [self.controls.row(v.role, v.layer) for v in group]
        value = _stacked(group, kind) if count else first.value
        told: list[Expr] = [self.controls.amount, _taken(self.controls.bits, np.reshape(rows, (-1, 1) if count else 1))]
        if isinstance(kind, Piped):
            function = self._function(piped, self.traced.names[kind.wanted], kind.wanted.size, kind.dtype)
            self.made[first] = function(*told, value, name=first.role, **{TAG: first.tag})
            return
        if self.controls.limits is not None and not isinstance(kind.scheme.range, Dynamic):
            limits = _taken(self.controls.limits, np.array(rows if count else rows[0]))
            if kind.observed:
                limits = self._function(observing, kind, count)(value, limits, name="observed")
                yield from self._keep(group, limits)
            told.append(limits)
        if kind.stochastic:
            told.append(self._noise(value, rows[0], first.statistic))
        function = self._function(quantizing, kind.plain, count)
        if not count:
            place, name = (function, first.role) if self.model.object_based else (function.inlined, "quantized")
            self.made[first] = place(*told, value, name=name, **{TAG: first.tag})
            return
        quantized = function(*told, value, name="quantized")
        dtype, size = kind.dtype, kind.size or 0
        attrs = {
            "num": ops.attr(count),
            "T": ops.dtype_attr(dtype),
            "_output_shapes": ops.shapes_attr([(size,)] * count),
        }
        rows_of = Apply(dtype, "Unpack", (quantized,), attrs)
        for port, vector in enumerate(group):
            stands = self._function(row, size, dtype)
            self.made[vector] = stands(Port(dtype, rows_of, port), vector.value, name=vector.role, **{TAG: vector.tag})

    def _trace(self, quantities: Iterable[Quantity]) -> Iterator[Edit]:
        """Make functions of pipelines, all at once."""
        wanted = list(dict.fromkeys(v.kind.wanted for v, _, _ in quantities if isinstance(v.kind, Piped)))
        tracers = [q.trace for found in self.quantizers.values() for q in found if isinstance(q, Pipeline)]
        if wanted:
            self.traced = tracers[0](wanted)
            yield Import(tuple(self.traced.graphs.values()), self.traced.gradients)

    def _keep(self, group: tuple[Vector, ...], limits: Expr) -> Iterator[Edit]:
        """Store moved limits, when all that a call does is done."""
        for role in dict.fromkeys(v.role for v in group):
            own = [i for i, v in enumerate(group) if v.role == role]
            layers_of_role = array(np.array([group[i].layer for i in own], np.int32))
            moved = limits if len(own) == len(group) else _taken(limits, np.array(own))
            if len(group) == 1:
                moved = op("Reshape", moved, array(np.array([1, 2], np.int32)))
            update = op("ResourceScatterUpdate", handle(self.controls.ranges(role)), layers_of_role, moved)
            if self.model.object_based:
                yield Run(group[0].graph, update, f"quantization/range/{role}", last=True)
            else:
                # In the main graph nothing runs but what a signature needs, such as the update of an average.
                yield RunAfter(MAIN, self.updates[group[0].layer], (update,), f"quantization/range/{role}")

    def _noise(self, value: Expr, row_: int, statistic: bool) -> Expr:
        """Random numbers that follow from the step and from what they are for."""
        counter = array(np.array([row_, statistic], np.uint64))
        shape = op("Shape", value)
        return op(
            "StatelessRandomUniformV2", shape, self.controls.key, counter, constant(1, "int32"), dtype=Dtype(FLOAT)
        )

    def _function(self, make: Callable[..., Function], *arguments: Any) -> Function:
        if (make, arguments) not in self.functions:
            function = make(*arguments)
            self.functions[make, arguments] = replace(function, name=unused(function.name, self.model.graphs))
        return self.functions[make, arguments]


def _stacked(group: tuple[Vector, ...], kind: Kind | Piped) -> Expr:
    """The vectors as rows."""
    attrs = {"N": ops.attr(len(group)), "T": ops.dtype_attr(kind.dtype)}
    if isinstance(kind, Kind):
        attrs["_output_shapes"] = ops.shapes_attr([(len(group), kind.size or 0)])
    return Apply(kind.dtype, "Pack", tuple(v.value for v in group), attrs, "stacked")


def _rewired(edge: Edge, scope: str, quantized: Expr) -> Iterator[Edit]:
    yield Rewire(edge, quantized, scope)


def _taken(values: Expr, index: np.ndarray) -> Expr:
    """Elements along the first axis, in the index's shape."""
    attrs = {
        "Tparams": ops.dtype_attr(values.dtype),
        "Tindices": ops.dtype_attr("int32"),
        "Taxis": ops.dtype_attr("int32"),
    }
    return Apply(values.dtype, "GatherV2", (values, array(index.astype(np.int32)), constant(0, "int32")), attrs)

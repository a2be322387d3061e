"""Quantisers on the batch norms' variables and on the statistics that enter their moving averages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from passes.batch_norm import channels, moving_average, names_of_sites
from passes.controls import control, counters, step
from passes.predicates import reached
from passes.quantizers import Affine, Log, Quantizer, row, switched
from passes.roles import ROLES, VARIANCE
from passes.sites import TAG, Site, sites
from rewriter import ops
from rewriter.edit import AddVariable, Define, Edit, Rewire, RunAfter, SetAttr, Skip
from rewriter.expr import Apply, Expr, Function, Port, Use, per_call, read
from rewriter.ir import MAIN, Edge, Error, Graph, Model, Value
from rewriter.shapes import shape_of

CONDITIONAL = ("Enter", "Merge", "Switch")
"""Ops of graphs in which some values may not be computed."""


@dataclass(frozen=True)
class QuantizeBatchNorm:
    """Pass every batch norm's variables and moving-average updates through switchable quantisers.

    Quantisers act from the step on that `quantization.start_step` holds, in training and inference alike;
    before it, every value passes unchanged, bit for bit.

    Attributes:
        gamma, beta, moving_mean, moving_variance: the quantiser of each role.
        average: what happens to a batch's statistics before they enter the moving averages: "statistic"
            quantises them, "none" leaves them. The average itself stays float and is quantised where it is
            read.
        start_step: the first step at which quantisers act; the variable's initial value.

    Raises:
        Error: `start_step` is negative or beyond int64, or `average` is neither of the two.
    """

    gamma: Quantizer = field(default_factory=Affine)
    beta: Quantizer = field(default_factory=Affine)
    moving_mean: Quantizer = field(default_factory=Affine)
    moving_variance: Quantizer = field(default_factory=Log)
    average: Literal["statistic", "none"] = "statistic"
    start_step: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.start_step < 2**63:
            raise Error(f"start step {self.start_step}: it is a number of steps, 0 or more, that fits in an int64")
        if self.average not in ("statistic", "none"):
            raise Error(f"average {self.average!r}: it is 'statistic' or 'none'")

    def edits(self, model: Model) -> Iterable[Edit]:
        """Quantisers for every site that has none and can have them; a `Skip` with the reason for the others."""
        todo: list[Site] = []
        for site in model.analysis(sites):
            if site.quantized:
                yield Skip(site.graph, site.node, "already quantised")
            elif site.reason:
                yield Skip(site.graph, site.node, site.reason)
            else:
                todo.append(site)
        if not todo:
            return
        start = control(model, "start_step", self.start_step)
        count = step(model)
        yield from (AddVariable(v) for v in (start, count) if v.key not in model.variables)
        # What one run counts comes after that run's comparison.
        yield from (RunAfter(MAIN, name, (read(count),), "quantization/step") for name in counters(model))
        work = _Work(self, model, per_call("quantizers_active", read(count) >= read(start)))
        if model.object_based:
            work.stack(todo)
        for site in todo:
            yield from work.parameters(site)
            yield from work.statistics(site)
        if model.object_based:
            yield from (Define(function) for function in work.functions.values())


class _Work:
    """One run of the pass.

    Attributes:
        functions: the quantisers in use; sites with equal ones share a function.
        made: what was made already; a value that several edges use is quantised once.
        rows: what was quantised together with others of its kind.
    """

    def __init__(self, options: QuantizeBatchNorm, model: Model, active: Expr) -> None:
        self.options = options
        self.model = model
        self.active = active
        self.functions: dict[tuple[Callable[..., Function], tuple[Any, ...]], Function] = {}
        self.made: dict[tuple[str, Value, _Kind], Expr] = {}
        self.rows: dict[tuple[str, Value, _Kind], Expr] = {}

    def parameters(self, site: Site) -> Iterator[Edit]:
        """Quantise what a site normalises with; never the base of its moving average."""
        for role, edges in site.parameters.items():
            for edge in edges:
                yield Rewire(edge, self._quantized(site, role, edge.graph, self._used(edge)), self._scope(site, role))

    def statistics(self, site: Site) -> Iterator[Edit]:
        """Quantise the batch's statistics on their way to the averages, and take the average out of the kernel.

        The kernel's outputs hold averages where its factor is not 1; with factor 1 they are the batch's own.
        """
        if self.options.average == "none":
            return
        if site.kernel_average:
            yield SetAttr(site.graph, site.node, "exponential_avg_factor", None)
        for role, edges in site.statistics.items():
            for edge in edges:
                batch = self._quantized(site, role, edge.graph, self._used(edge))
                if site.kernel_average:
                    base = self.model.graphs[site.graph].nodes[site.node].inputs[1 + ROLES.index(role)]
                    batch = moving_average(Use(batch.dtype, base), batch, site.factor)
                yield Rewire(edge, batch, f"{site.node}/{role}")

    def _scope(self, site: Site, role: str) -> str:
        """Where the nodes of a quantiser go: a single call beside the site, many nodes in a scope of their own."""
        return site.node if self.model.object_based else f"{site.node}/{role}"

    def _used(self, edge: Edge) -> Value:
        graph = self.model.graphs[edge.graph]
        return graph.nodes[edge.node].inputs[edge.position] if edge.node else graph.results[edge.position].value

    def _quantized(self, site: Site, role: str, graph: str, value: Value) -> Expr:
        """The value, quantised while the switch is on; tagged, so that inspection needs no log.

        Nothing differentiates through a call in TensorFlow 1's format, so there it is placed without one.
        """
        kind = self._kind(site, role, graph, value)
        quantizer, dtype = kind.quantizer, kind.dtype
        if (graph, value, kind) not in self.made:
            quantised = self.rows.get((graph, value, kind))
            function = self._function(switched, *kind) if quantised is None else self._function(row, kind.size, dtype)
            tag: Mapping[str, str | int] = {
                "role": role,
                "scheme": quantizer.scheme,
                "bits": quantizer.bits,
                "range": "dynamic",
                "batch_norm": self.model.analysis(names_of_sites)[site.graph, site.node],
            }
            place, name = (function, role) if self.model.object_based else (function.inlined, "quantized")
            first = self.active if quantised is None else quantised
            made = place(first, Use(dtype, value), name=name, **{TAG: json.dumps(tag, sort_keys=True)})
            self.made[graph, value, kind] = made
        return self.made[graph, value, kind]

    def _kind(self, site: Site, role: str, graph: str, value: Value) -> _Kind:
        dtype = ops.output_dtype(self.model, self.model.graphs[graph], value)
        size = self.model.analysis(channels)[site.graph, site.node]
        return _Kind(getattr(self.options, role), site.epsilon, size, dtype)

    def _function(self, make: Callable[..., Function], *arguments: Any) -> Function:
        if (make, arguments) not in self.functions:
            self.functions[make, arguments] = make(*arguments)
        return self.functions[make, arguments]

    def stack(self, found: Iterable[Site]) -> None:
        """Quantise vectors of one kind and graph together: a set of ops for all, in place of one for each.

        Parameters that are read before any is used are together, and so are statistics that no average precedes.
        """
        edges: dict[str, tuple[list[_Used], list[_Used]]] = {}
        for site in found:
            averaged = site.statistics if self.options.average != "none" else {}
            for late, by_role in enumerate((site.parameters, averaged)):
                for role, edge in ((role, edge) for role, used in by_role.items() for edge in used):
                    used = _Used(edge, self._used(edge), self._kind(site, role, edge.graph, self._used(edge)))
                    edges.setdefault(edge.graph, ([], []))[late].append(used)
        for name, (parameters, statistics) in edges.items():
            graph = self.model.graphs[name]
            if any(node.op in CONDITIONAL for node in graph.nodes.values()):
                continue
            after = set(reached(self.model, graph, [u.edge.node for u in statistics]))
            self._group(graph, statistics, after)
            self._group(graph, parameters, after | set(reached(self.model, graph, [u.edge.node for u in parameters])))

    def _group(self, graph: Graph, found: list[_Used], after: set[str]) -> None:
        """Stack what has one kind, but for what is computed after others are used."""
        groups: dict[_Kind, dict[Value, None]] = {}
        for used in found:
            whole = used.kind.size is not None and shape_of(self.model, graph, used.value) == (used.kind.size,)
            if whole and used.value.node not in after:
                groups.setdefault(used.kind, {})[used.value] = None
        for kind, values in groups.items():
            if len(values) > 1:
                self._stacked(graph.name, kind, list(values))

    def _stacked(self, graph: str, kind: _Kind, values: list[Value]) -> None:
        count, dtype = len(values), ops.dtype_attr(kind.dtype)
        attrs = {"N": ops.attr(count), "T": dtype, "_output_shapes": ops.shapes_attr([(count, kind.size or 0)])}
        stacked = Apply(kind.dtype, "Pack", tuple(Use(kind.dtype, v) for v in values), attrs, "stacked")
        quantised = self._function(switched, *kind, count)(self.active, stacked, name="quantized")
        shapes = ops.shapes_attr([(kind.size or 0,)] * count)
        rows = Apply(kind.dtype, "Unpack", (quantised,), {"num": ops.attr(count), "T": dtype, "_output_shapes": shapes})
        self.rows |= {(graph, v, kind): Port(kind.dtype, rows, port) for port, v in enumerate(values)}


class _Kind(NamedTuple):
    """What tells one quantising function from another."""

    quantizer: Quantizer
    epsilon: float
    size: int | None
    dtype: str


class _Used(NamedTuple):
    """A value that is to be quantised where it is used at an edge."""

    edge: Edge
    value: Value
    kind: _Kind


def with_bits(bits: Mapping[str, int]) -> dict[str, Quantizer]:
    """The default quantisers with these widths, by role.

    Raises:
        Error: a role that does not exist, or a width out of range.
    """
    unknown = set(bits) - set(ROLES)
    if unknown:
        raise Error(f"{sorted(unknown)[0]!r} is no variable of a batch norm; there are {', '.join(ROLES)}")
    return {role: Log(n) if role == VARIANCE else Affine(n) for role, n in bits.items()}

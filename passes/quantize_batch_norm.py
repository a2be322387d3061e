"""Quantisers on the batch norms' variables and on the statistics that enter their moving averages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from passes.batch_norm import channels, moving_average, names_of_sites
from passes.controls import control, counters, step
from passes.quantizers import Affine, Log, Quantizer, switched
from passes.roles import ROLES, VARIANCE
from passes.sites import TAG, Site, sites
from rewriter import ops
from rewriter.edit import AddVariable, Define, Edit, Rewire, RunAfter, SetAttr, Skip
from rewriter.expr import Expr, Function, Use, per_call, read
from rewriter.ir import MAIN, Edge, Error, Model, Value


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
    """

    def __init__(self, options: QuantizeBatchNorm, model: Model, active: Expr) -> None:
        self.options = options
        self.model = model
        self.active = active
        self.functions: dict[_Kind, Function] = {}
        self.made: dict[tuple[str, Value, _Kind], Expr] = {}

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
        quantizer: Quantizer = getattr(self.options, role)
        dtype = ops.output_dtype(self.model, self.model.graphs[graph], value)
        kind = _Kind(quantizer, site.epsilon, self.model.analysis(channels)[site.graph, site.node], dtype)
        if (graph, value, kind) not in self.made:
            if kind not in self.functions:
                self.functions[kind] = switched(*kind)
            function = self.functions[kind]
            tag: Mapping[str, str | int] = {
                "role": role,
                "scheme": quantizer.scheme,
                "bits": quantizer.bits,
                "range": "dynamic",
                "batch_norm": self.model.analysis(names_of_sites)[site.graph, site.node],
            }
            place, name = (function, role) if self.model.object_based else (function.inlined, "quantized")
            made = place(self.active, Use(dtype, value), name=name, **{TAG: json.dumps(tag, sort_keys=True)})
            self.made[graph, value, kind] = made
        return self.made[graph, value, kind]


class _Kind(NamedTuple):
    """What tells one quantising function from another."""

    quantizer: Quantizer
    epsilon: float
    size: int | None
    dtype: str


def with_bits(bits: Mapping[str, int]) -> dict[str, Quantizer]:
    """The default quantisers with these widths, by role.

    Raises:
        Error: a role that does not exist, or a width out of range.
    """
    unknown = set(bits) - set(ROLES)
    if unknown:
        raise Error(f"{sorted(unknown)[0]!r} is no variable of a batch norm; there are {', '.join(ROLES)}")
    return {role: Log(n) if role == VARIANCE else Affine(n) for role, n in bits.items()}

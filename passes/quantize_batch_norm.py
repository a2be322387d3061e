"""Quantisers on the batch norms' variables and on the statistics that enter their moving averages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from passes.batch_norm import (
    STATISTICS,
    TAG,
    Site,
    channels,
    moving_average,
    names_of_sites,
    sites,
)
from passes.derive_training import STEP, control
from passes.quantizers import FLOAT, Affine, Log, Quantizer, switched
from passes.roles import GAMMA, ROLES, VARIANCE
from rewriter.edit import AddVariable, Define, Edit, Rewire, SetAttr, Skip
from rewriter.expr import Expr, Function, Use, per_call, read
from rewriter.ir import Error, Model, Value


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
        start = control("start_step", self.start_step)
        yield AddVariable(start)
        if STEP.key not in model.variables:
            yield AddVariable(STEP)
        work = _Work(self, model, per_call("quantizers_active", read(STEP) >= read(start)))
        for site in todo:
            yield from work.parameters(site)
            yield from work.statistics(site)
        for function in work.functions.values():
            yield Define(function)


class _Work:
    """One run of the pass.

    Attributes:
        functions: the quantisers in use; sites with equal ones share a function.
    """

    def __init__(self, options: QuantizeBatchNorm, model: Model, active: Expr) -> None:
        self.options = options
        self.model = model
        self.active = active
        self.functions: dict[tuple[Quantizer, float, int | None], Function] = {}

    def parameters(self, site: Site) -> Iterator[Edit]:
        """Quantise what the kernel normalises with; never the base of its moving average."""
        node = self.model.graphs[site.graph].nodes[site.node]
        for role, edge in site.parameters.items():
            value = self._quantized(site, role, Use(FLOAT, node.inputs[edge.position]))
            yield Rewire(edge, value, site.node)
            if role == GAMMA:
                for gradient in site.gradients:
                    yield Rewire(gradient, value, site.node)

    def statistics(self, site: Site) -> Iterator[Edit]:
        """Quantise the batch's statistics where they are used, and take the average out of the kernel.

        The kernel's outputs hold averages where its factor is not 1; with factor 1 they are the batch's own.
        """
        if self.options.average == "none":
            return
        if site.kernel_average:
            yield SetAttr(site.graph, site.node, "exponential_avg_factor", None)
        for role, edges in site.statistics.items():
            batch = self._quantized(site, role, Use(FLOAT, Value(site.node, STATISTICS[role])))
            if site.kernel_average:
                base = self.model.graphs[site.graph].nodes[site.node].inputs[1 + ROLES.index(role)]
                batch = moving_average(Use(FLOAT, base), batch, site.factor)
            for edge in edges:
                yield Rewire(edge, batch, f"{site.node}/{role}")

    def _quantized(self, site: Site, role: str, value: Expr) -> Expr:
        """The value, quantised while the switch is on; tagged, so that inspection needs no log."""
        quantizer: Quantizer = getattr(self.options, role)
        key = (quantizer, site.epsilon, self.model.analysis(channels)[site.graph, site.node])
        if key not in self.functions:
            self.functions[key] = switched(*key)
        tag: Mapping[str, str | int] = {
            "role": role,
            "scheme": quantizer.scheme,
            "bits": quantizer.bits,
            "range": "dynamic",
            "batch_norm": self.model.analysis(names_of_sites)[site.graph, site.node],
        }
        return self.functions[key](value, self.active, name=role, **{TAG: json.dumps(tag, sort_keys=True)})


def with_bits(bits: Mapping[str, int]) -> dict[str, Quantizer]:
    """The default quantisers with these widths, by role.

    Raises:
        Error: a role that does not exist, or a width out of range.
    """
    unknown = set(bits) - set(ROLES)
    if unknown:
        raise Error(f"{sorted(unknown)[0]!r} is no variable of a batch norm; there are {', '.join(ROLES)}")
    return {role: Log(n) if role == VARIANCE else Affine(n) for role, n in bits.items()}

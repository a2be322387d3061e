"""A site: one place that computes a batch norm, and the variables and updates that it is bound to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from rewriter.dataflow import Origin
from rewriter.ir import Edge

Mode = Literal["training", "inference", "both"]


@dataclass(frozen=True)
class Binding:
    """The variables of a site, and the updates of its moving averages.

    A way to call the site is a chain of calls from a function of the model. There are several where batch norms share
    one function.

    Attributes:
        origins: for each way to call the site, the origins of gamma, beta, moving mean and moving variance;
            None for a role that it does not use.
        variables: for each way to call the site, the checkpoint keys of gamma, beta, moving mean and moving
            variance; None where it has no such variable. Those of the latter two also follow from their updates.
        weight: weight of the batch's statistics in the moving average, whoever keeps it; None where there is
            none or the weight is not constant.
        parameters: the edges that bring variables to the site, by role: inside the branch that chooses them, before
            a change of shape or dtype, and in the gradients that the same graph holds.
        statistics: the uses of the batch's statistics on their way to the moving averages, by role.
        assigns: (graph, node) of the ops that update the moving averages, by role; a biased average comes first.
        runs: (graph, node) of the updates of moving averages, or of the outermost calls that run them.
        quantized: the tags of quantisers found on its parameters and statistics.
    """

    origins: frozenset[tuple[Origin | None, ...]]
    variables: frozenset[tuple[str | None, ...]]
    weight: float | None
    parameters: Mapping[str, tuple[Edge, ...]] = field(default_factory=dict)
    statistics: Mapping[str, tuple[Edge, ...]] = field(default_factory=dict)
    assigns: Mapping[str, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    runs: tuple[tuple[str, str], ...] = ()
    quantized: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Site:
    """One place that computes a batch norm: a fused node, or the last of a group of single ops.

    Attributes:
        mode: "training" normalises with the batch's statistics, "inference" with the moving ones, "both" with
            those that the graph chooses while it runs.
        inputs: the uses of x and of each role's value, by "x" and role.
        interior: of single ops, all nodes but the last, and the nodes between them, which pass values on.
        kernel_factor: weight of the batch's statistics in the moving average that the kernel itself computes; 1 where
            it computes none. Source: ``exponential_avg_factor`` of the op ``FusedBatchNormV3``.
        reason: the reason why it cannot be rewritten; empty where it can.
    """

    graph: str
    node: str
    kind: Literal["fused", "decomposed"]
    mode: Mode
    epsilon: float
    inputs: Mapping[str, tuple[Edge, ...]]
    binding: Binding
    interior: tuple[str, ...] = ()
    kernel_factor: float = 1.0
    reason: str = ""

    @property
    def status(self) -> str:
        """One of ``float``, ``quantised`` and ``skipped``."""
        if self.binding.quantized:
            return "quantised"
        return "skipped" if self.reason else "float"

    @property
    def training(self) -> bool:
        """True if it can normalise with the batch's statistics."""
        return self.mode != "inference"

    @property
    def inference(self) -> bool:
        """True if it can normalise with the moving statistics."""
        return self.mode != "training"

    @property
    def kernel_average(self) -> bool:
        """True if the kernel itself computes the moving average."""
        return self.training and self.kernel_factor != 1.0

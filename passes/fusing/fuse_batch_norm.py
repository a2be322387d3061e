"""The fused kernel in place of batch norm in single ops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from passes.batch_norm.kernel import normalised
from passes.batch_norm.roles import MEAN, VARIANCE
from passes.batch_norm.sites import sites
from passes.control_flow.branches import claim_conditionals
from passes.declined import DeclinedError
from passes.fusing.batch_statistics import averages_of, rewired
from passes.fusing.fusable import Fusable, fusable, replaced
from passes.fusing.fuse_chosen import fuse_both_modes
from rewriter.edit import Edit, Skip, Sweep
from rewriter.ir import Model


@dataclass(frozen=True)
class FuseBatchNorm:
    """Let ``FusedBatchNormV3`` compute every batch norm that a model computes in single ops.

    Outputs and gradients are those of the single ops but for rounding. So are the moving statistics: the
    kernel's variance, which is corrected for a sample, is brought back to that of the population. Where a
    graph chooses between a batch's and the moving statistics while it runs, only one kernel runs.
    """

    name: ClassVar[str] = "fuse-batch-norm"

    def edits(self, model: Model) -> Iterable[Edit]:
        """Replace each site in single ops by a kernel, or yield a `Skip` with the obstacle."""
        sweeps: list[Edit] = []
        extended: set[tuple[str, str]] = set()
        fed: dict[str, dict[str, list[str]]] = {}
        for site in model.analysis(sites):
            if site.kind != "decomposed" or site.binding.quantized:
                continue
            try:
                edits = claim_conditionals(list(_fused(fusable(model, site, fed.setdefault(site.graph, {})))), extended)
            except DeclinedError as e:
                yield Skip(site.graph, site.node, str(e))
                continue
            yield from (e for e in edits if not isinstance(e, Sweep))
            sweeps += [e for e in edits if isinstance(e, Sweep)]
        yield from sweeps  # one group of ops may use what another computes


def _fused(candidate: Fusable) -> Iterator[Edit]:
    if candidate.site.mode == "both":
        yield from fuse_both_modes(candidate)
    else:
        yield from (_training if candidate.site.mode == "training" else _inference)(candidate)


def _inference(candidate: Fusable) -> Iterator[Edit]:
    site = candidate.site
    candidate.require_own()
    moving = {role: candidate.used(role) for role in (MEAN, VARIANCE)}
    vectors = candidate.parameters() | candidate.moving_statistics(candidate.graph, moving)
    y = normalised(candidate.x_in(), vectors, candidate.layout, site.epsilon, training=False).y
    yield replaced(candidate, candidate.waiting(y, candidate.graph, (), site.interior))
    yield Sweep(site.graph, site.interior)


def _training(candidate: Fusable) -> Iterator[Edit]:
    site, graph = candidate.site, candidate.graph
    mean, variance = (candidate.computed(graph, candidate.used(role)) for role in (MEAN, VARIANCE))
    moments = candidate.moments_of_x(graph, mean, variance)
    candidate.require_own(moments.nodes)
    kernel = normalised(candidate.x_in(), candidate.parameters(), candidate.layout, site.epsilon, training=True)
    statistics = [candidate.used(role) for role in (MEAN, VARIANCE)]
    yield replaced(
        candidate, candidate.waiting(kernel.y, graph, statistics, (*site.interior, site.node, *moments.nodes))
    )
    replaced_nodes = {*site.interior, site.node, *moments.nodes}
    uses = {role: list(averages_of(candidate, v, replaced_nodes)) for role, v in ((MEAN, mean), (VARIANCE, variance))}
    nodes = [edge.node for role_uses in uses.values() for edge, _ in role_uses]
    # Otherwise the averages keep the moments in single ops, beside a kernel that computes its own.
    if candidate.runs_with(mean) and not candidate.before_kernel(nodes):
        candidate.feeds(nodes)
        for role, statistic in ((MEAN, kernel.mean), (VARIANCE, kernel.variance)):
            for edge, used in uses[role]:
                yield from rewired(candidate.model, graph, edge, used, statistic)
    yield Sweep(site.graph, site.interior)

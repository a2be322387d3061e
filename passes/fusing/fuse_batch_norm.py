"""The fused kernel in place of batch norm in single ops."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from passes.batch_norm.kernel import normalised
from passes.batch_norm.sites import sites
from passes.control_flow.branches import claim_conditionals
from passes.declined import DeclinedError
from passes.fusing.batch_statistics import averages_of, rewired
from passes.fusing.fusable import Fusable, fusable, replaced
from passes.fusing.fuse_chosen import chosen
from passes.roles import MEAN, VARIANCE
from rewriter.edit import Edit, Skip, Sweep
from rewriter.ir import Model


@dataclass(frozen=True)
class FuseBatchNorm:
    """Let ``FusedBatchNormV3`` compute every batch norm that a model computes in single ops.

    Outputs and gradients are those of the single ops but for rounding; so are moving statistics, as the
    kernel's variance, which is corrected for a sample, is brought back to that of the population. Where a
    graph chooses between a batch's and the moving statistics while it runs, only one kernel runs.
    """

    name: ClassVar[str] = "fuse-batch-norm"

    def edits(self, model: Model) -> Iterable[Edit]:
        """A kernel for each site in single ops, or a `Skip` with what stands in the way."""
        sweeps: list[Edit] = []
        extended: set[tuple[str, str]] = set()
        fed: dict[str, dict[str, list[str]]] = {}
        for site in model.analysis(sites):
            if site.kind != "decomposed" or site.quantized:
                continue
            try:
                edits = claim_conditionals(list(_fused(fusable(model, site, fed.setdefault(site.graph, {})))), extended)
            except DeclinedError as e:
                yield Skip(site.graph, site.node, str(e))
                continue
            yield from (e for e in edits if not isinstance(e, Sweep))
            sweeps += [e for e in edits if isinstance(e, Sweep)]
        yield from sweeps  # one group of ops may use what another computes


def _fused(found: Fusable) -> Iterator[Edit]:
    if found.site.mode == "both":
        yield from chosen(found)
    else:
        yield from (_training if found.site.mode == "training" else _inference)(found)


def _inference(found: Fusable) -> Iterator[Edit]:
    site = found.site
    found.require_own()
    held = {role: found.used(role) for role in (MEAN, VARIANCE)}
    vectors = found.parameters() | found.held(found.graph, held)
    y = normalised(found.given(), vectors, found.layout, site.epsilon, training=False).y
    yield replaced(found, found.waiting(y, found.graph, (), site.interior))
    yield Sweep(site.graph, site.interior)


def _training(found: Fusable) -> Iterator[Edit]:
    site, graph = found.site, found.graph
    mean, variance = (found.computed(graph, found.used(role)) for role in (MEAN, VARIANCE))
    moments = found.moments_of_x(graph, mean, variance)
    found.require_own(moments.nodes)
    kernel = normalised(found.given(), found.parameters(), found.layout, site.epsilon, training=True)
    met = [found.used(role) for role in (MEAN, VARIANCE)]
    yield replaced(found, found.waiting(kernel.y, graph, met, (*site.interior, site.node, *moments.nodes)))
    own = {*site.interior, site.node, *moments.nodes}
    uses = {role: list(averages_of(found, v, own)) for role, v in ((MEAN, mean), (VARIANCE, variance))}
    nodes = [edge.node for each in uses.values() for edge, _ in each]
    if found.runs_with(mean) and not found.before_kernel(nodes):
        found.feeds(nodes)
        for role, statistic in ((MEAN, kernel.mean), (VARIANCE, kernel.variance)):
            for edge, used in uses[role]:
                yield from rewired(found.model, graph, edge, used, statistic)
    yield Sweep(site.graph, site.interior)

"""Calls of functions, replaced by the functions' nodes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from passes.batch_norm.sites import sites
from rewriter.dataflow import call_graph
from rewriter.edit import Edit, Inline, Keep
from rewriter.ir import MAIN, Model

CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})


@dataclass(frozen=True)
class InlineCalls:
    """Inline each call of a function that holds a batch norm, or computes what one normalises.

    A layer and the ops before it are then in one graph, and a function that several layers share is there for each.
    Calls within the function are left, so the pass has to run until it has no edits; functions do not call themselves.
    """

    name: ClassVar[str] = "inline-calls"

    def edits(self, model: Model) -> Iterable[Edit]:
        """Inline every call in a function that holds a batch norm, or that leads to one."""
        calls = model.analysis(call_graph)
        site_graphs = {site.graph for site in model.analysis(sites)}
        leading = site_graphs.union(*(calls.reaching(name) for name in site_graphs))
        within = [call for name in sorted(leading - {MAIN}) for call in calls.calls.get(name, ())]
        inlined = [c for c in within if model.graphs[c.graph].nodes[c.node].op in CALLS]
        yield from (Inline(call.graph, call.node, call.callee) for call in inlined)
        if inlined:
            yield Keep(tuple(model.entries))

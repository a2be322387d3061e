"""What functions compute, in place of their calls."""

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
    """Put what a function computes in place of each call of it, where a batch norm is in it or before it.

    So a layer and what precedes it are in one graph, and a function that several layers share is there for each. Calls
    within the function are left, so the pass is to be run until it has no edits; functions do not call themselves.
    """

    name: ClassVar[str] = "inline-calls"

    def edits(self, model: Model) -> Iterable[Edit]:
        """Every call in what can run that leads to a batch norm, or returns what one normalises."""
        calls = model.analysis(call_graph)
        found = {site.graph for site in model.analysis(sites)}
        leading = found.union(*(calls.reaching(name) for name in found))
        within = [call for name in sorted(leading - {MAIN}) for call in calls.calls.get(name, ())]
        inlined = [c for c in within if model.graphs[c.graph].nodes[c.node].op in CALLS]
        yield from (Inline(call.graph, call.node, call.callee) for call in inlined)
        if inlined:
            yield Keep(tuple(model.entries))

"""Calls that pass a constant mode, replaced by the functions' nodes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from passes.batch_norm.sites import sites
from rewriter import op_defs
from rewriter.dataflow import call_graph
from rewriter.edit import Edit, Inline, Keep
from rewriter.ir import MAIN, Model
from rewriter.liveness import Assumption

CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})


@dataclass(frozen=True)
class InlineDecidedCalls:
    """Inline each call that passes a known boolean to a function which may train a batch norm.

    A caller that fixes ``is_training=False`` decides a choice that lies in another graph. After inlining, the constant
    and the choice are in one graph, where `settle-choices` finds them. Calls within the function are left, so the pass
    has to run until it has no edits.
    """

    name: ClassVar[str] = "inline-decided-calls"

    def edits(self, model: Model) -> Iterable[Edit]:
        """Inline the calls that decide a mode; leave those of the main graph, whose placeholders can be fed."""
        calls = model.analysis(call_graph)
        training = {site.graph for site in model.analysis(sites) if site.training}
        choosing = training.union(*(calls.reaching(name) for name in training))
        inlined: list[Inline] = []
        for name in sorted(calls.calls.keys() - {MAIN}):
            graph = model.graphs[name]
            assumed = Assumption(model, graph, {})
            for call in calls.calls[name]:
                node = graph.nodes[call.node]
                booleans = [v for v in node.inputs if op_defs.output_dtype(model, graph, v) == "bool"]
                decided = any(assumed.known(value) is not None for value in booleans)
                if decided and node.op in CALLS and call.callee in choosing:
                    inlined.append(Inline(name, call.node, call.callee))
        if inlined:
            yield from inlined
            yield Keep(tuple(model.entries))

"""Choices whose outcome the graph itself fixes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from rewriter import op_defs
from rewriter.dataflow import consumers
from rewriter.edit import Edit, Inline, Keep, Note, Rewire
from rewriter.expr import Use
from rewriter.ir import MAIN, Graph, Model, Value
from rewriter.liveness import BRANCHES, SWITCHES, Assumption


@dataclass(frozen=True)
class SettleChoices:
    """Replace each choice that a constant decides by the chosen value, and drop what nothing needs then.

    A function that TensorFlow made of a TensorFlow 1 graph has the mode as a placeholder that nobody can feed. Its
    default decides, and nodes that only training needs have no use.
    """

    name: ClassVar[str] = "settle-choices"

    def edits(self, model: Model) -> Iterable[Edit]:
        """Settle merges, selections and conditionals of functions; leave the main graph, which can be fed."""
        if not model.object_based:
            return
        edits = [e for name, graph in model.graphs.items() if name != MAIN for e in _settled(model, graph)]
        if edits:
            yield from edits
            yield Note(
                "its functions choose their mode by a constant; what it chooses stays, and kernels that could not be "
                "merged may be, so that outputs may differ in the last bit"
            )
            # All functions stay; `Keep` removes what they no longer need.
            yield Keep(tuple(model.entries))


def _settled(model: Model, graph: Graph) -> Iterator[Edit]:
    """Yield the edits that put what constants choose in the place of the choices of a graph."""
    assumed = Assumption(model, graph, {})
    for node in graph.nodes.values():
        for port in range(2 if node.op in SWITCHES else 1):
            value = assumed.settled(Value(node.name, port))
            if value.node != node.name:
                chosen = Use(op_defs.output_dtype(model, graph, value), value)
                for edge in model.analysis_of(graph, consumers).get(Value(node.name, port), ()):
                    yield Rewire(edge, chosen, node.name)
    # After all rewiring, as an inlined conditional is no longer there to be rewired to.
    for node in graph.nodes.values():
        if node.op in BRANCHES and assumed.known(node.inputs[0]) is not None:
            yield Inline(graph.name, node.name, assumed.taken(node)[0])

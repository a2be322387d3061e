"""The branches of an ``If``, which take more values and give more results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from passes.control_flow.predicates import decided_by, leads_to
from passes.declined import DeclinedError
from rewriter import op_defs, ops, protos
from rewriter.dataflow import call_graph, consumers
from rewriter.edit import AddResult, Edit, SetAttr
from rewriter.effects import effects_before
from rewriter.expr import Expr, Passed, Use
from rewriter.frames import loop_frames
from rewriter.ir import ARG, Edge, Graph, Model, Node, Value
from rewriter.liveness import BRANCHES
from rewriter.shapes import Shape, shape_of

FIRST = 1
"""The input of ``If`` that is the branches' first argument; before it comes the predicate."""


@dataclass(frozen=True)
class Branches:
    """An ``If`` of a graph, whose branches nothing else calls."""

    model: Model
    graph: Graph
    node: Node

    @property
    def predicate(self) -> Value:
        """The boolean that it chooses by."""
        return self.node.inputs[0]

    def taken(self, value: bool) -> Graph:
        """The branch that is taken where the predicate has this value."""
        then, otherwise = ops.callees(self.model, self.node)
        return self.model.graphs[then if value else otherwise]

    @property
    def own(self) -> bool:
        """Whether nothing else calls the branches, so that they can be changed."""
        callers = self.model.analysis(call_graph).callers
        names = ops.callees(self.model, self.node)
        return len(set(names)) == len(names) and all(len(callers[name]) == 1 for name in names)

    def uses(self, on: bool, edge: Edge) -> bool:
        """Whether the branch for this value of the predicate uses what comes in at an edge."""
        branch = self.taken(on)
        return Value(branch.arguments[edge.position - FIRST]) in self.model.analysis_of(branch, consumers)

    def chooses_alike(self, edge: Edge, on: bool) -> bool:
        """Whether a value is used only where an ``If`` makes the same choice: this one, or one that comes after it."""
        node = self.graph.nodes.get(edge.node)
        if node is None or node.op not in BRANCHES or edge.position < FIRST:
            return False
        other = Branches(self.model, self.graph, node)
        same = decided_by(self.graph, other.predicate) == decided_by(self.graph, self.predicate)
        if not same or other.uses(not on, edge):
            return False
        return node == self.node or not leads_to(self.model, self.graph, [node.name], {self.node.name})

    def serves(self, edge: Edge, before: Mapping[str, Iterable[str]] = MappingProxyType({})) -> bool:
        """Return whether the user of a value at an edge can wait for the ``If`` without running anything else.

        `before` has more of what runs after a node, as for `leads_to`.
        """
        frame_of = self.model.analysis_of(self.graph, loop_frames)
        if frame_of.get(edge.node) != frame_of.get(self.node.name):
            return False
        if leads_to(self.model, self.graph, [edge.node], {self.node.name}, before):
            return False
        own, needed = (effects_before(self.model, self.graph, name) for name in (edge.node, self.node.name))
        return needed <= own

    def bring(self, branch: Graph, dtype: str, value: Value) -> Expr:
        """A value of the graph in a branch: an argument, or one more."""
        if value in self.node.inputs[FIRST:]:
            return Use(dtype, Value(branch.arguments[self.node.inputs[FIRST:].index(value)]))
        return Passed(dtype, self.graph.name, value, shape_of(self.model, self.graph, value))

    def outer(self, branch: Graph, value: Value) -> Value:
        """What a branch's argument is in the graph; other values as they are."""
        if branch.nodes[value.node].op != ARG:
            return value
        return self.node.inputs[FIRST + branch.arguments.index(value.node)]

    def results(
        self, added: Mapping[str, tuple[Expr, Expr]], shapes: Sequence[Shape | None], scope: str
    ) -> Iterator[Edit]:
        """More results, by name: what they are where the predicate is True, and where it is False.

        The first of them is the output ``len(branch.results)`` of the ``If``.
        """
        for name, (then, otherwise) in added.items():
            yield AddResult(self.taken(True).name, name, then, scope)
            yield AddResult(self.taken(False).name, name, otherwise, scope)
        dtypes = [then.dtype for then, _ in added.values()]
        yield SetAttr(
            self.graph.name,
            self.node.name,
            "Tout",
            protos.more_dtypes(op_defs.attribute(self.node, "Tout"), dtypes),
        )
        for name, known in sorted(self.node.attrs.items()):
            if name in ("output_shapes", "_output_shapes") and known.list.shape:
                yield SetAttr(self.graph.name, self.node.name, name, protos.more_shapes(known, shapes))


def only_one(edits: list[Edit], extended: set[tuple[str, str]]) -> list[Edit]:
    """The edits for one batch norm, which may extend an ``If`` that no other one extends.

    Raises:
        DeclinedError: it is among those that were.
    """
    own = {(edit.graph, edit.node) for edit in edits if isinstance(edit, SetAttr)}
    for _, name in own & extended:
        raise DeclinedError(f"{name} chooses for another batch norm too")
    extended |= own
    return edits

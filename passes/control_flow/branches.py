"""The branches of an ``If``, which passes give further arguments and results."""

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
"""Index of the input of ``If`` that is the branches' first argument. Input 0 is the predicate."""


@dataclass(frozen=True)
class Branches:
    """An ``If`` of a graph, with its two branches."""

    model: Model
    graph: Graph
    node: Node

    @property
    def predicate(self) -> Value:
        """The boolean that chooses the branch."""
        return self.node.inputs[0]

    def taken(self, value: bool) -> Graph:
        """The branch that runs where the predicate has this value."""
        then, otherwise = ops.callees(self.model, self.node)
        return self.model.graphs[then if value else otherwise]

    @property
    def exclusive(self) -> bool:
        """True if nothing else calls the branches, so that they can be changed."""
        callers = self.model.analysis(call_graph).callers
        names = ops.callees(self.model, self.node)
        return len(set(names)) == len(names) and all(len(callers[name]) == 1 for name in names)

    def uses(self, on: bool, edge: Edge) -> bool:
        """Return true if the branch for this value of the predicate uses the argument that an edge feeds."""
        branch = self.taken(on)
        return Value(branch.arguments[edge.position - FIRST]) in self.model.analysis_of(branch, consumers)

    def chooses_alike(self, edge: Edge, on: bool) -> bool:
        """Return true if an edge feeds an ``If`` of the same choice, which uses the value in the branch for `on` alone.

        That is this ``If``, or one that does not run before it.
        """
        node = self.graph.nodes.get(edge.node)
        if node is None or node.op not in BRANCHES or edge.position < FIRST:
            return False
        user_branches = Branches(self.model, self.graph, node)
        same_choice = decided_by(self.graph, user_branches.predicate) == decided_by(self.graph, self.predicate)
        if not same_choice or user_branches.uses(not on, edge):
            return False
        # An ``If`` that runs before this one cannot take a result of it: each would wait for the other.
        return node == self.node or not leads_to(self.model, self.graph, [node.name], {self.node.name})

    def serves(self, edge: Edge, before: Mapping[str, Iterable[str]] = MappingProxyType({})) -> bool:
        """Return true if the user of a value at an edge can wait for the ``If`` without running anything else.

        `before` maps a node to further nodes that run after it, as in `leads_to`.
        """
        # All inputs of an op lie in one loop, or in none.
        frame_of = self.model.analysis_of(self.graph, loop_frames)
        if frame_of.get(edge.node) != frame_of.get(self.node.name):
            return False
        if leads_to(self.model, self.graph, [edge.node], {self.node.name}, before):
            return False
        # What waits for the ``If`` also runs the effects before it; the user has to run those already.
        user_effects, if_effects = (
            effects_before(self.model, self.graph, name) for name in (edge.node, self.node.name)
        )
        return if_effects <= user_effects

    def bring(self, branch: Graph, dtype: str, value: Value) -> Expr:
        """Return a value of the graph as a branch sees it: an argument that it has, or a further one."""
        if value in self.node.inputs[FIRST:]:
            return Use(dtype, Value(branch.arguments[self.node.inputs[FIRST:].index(value)]))
        return Passed(dtype, self.graph.name, value, shape_of(self.model, self.graph, value))

    def outer(self, branch: Graph, value: Value) -> Value:
        """Return the graph's value behind a branch's argument; return any other value as it is."""
        if branch.nodes[value.node].op != ARG:
            return value
        return self.node.inputs[FIRST + branch.arguments.index(value.node)]

    def results(
        self, added: Mapping[str, tuple[Expr, Expr]], shapes: Sequence[Shape | None], scope: str
    ) -> Iterator[Edit]:
        """Add results by name; each is a pair of expressions, for the predicate True and for False.

        The first of them becomes the output ``len(branch.results)`` of the ``If``.
        """
        for name, (then, otherwise) in added.items():
            yield AddResult(self.taken(True).name, name, then, scope)
            yield AddResult(self.taken(False).name, name, otherwise, scope)
        # The op declares its outputs itself, apart from the branches.
        dtypes = [then.dtype for then, _ in added.values()]
        yield SetAttr(
            self.graph.name,
            self.node.name,
            "Tout",
            protos.more_dtypes(op_defs.attribute(self.node, "Tout"), dtypes),
        )
        # TensorFlow refuses a list of shapes that is shorter than the outputs; an empty `output_shapes` says nothing.
        for name, attr in sorted(self.node.attrs.items()):
            if name in ("output_shapes", "_output_shapes") and attr.list.shape:
                yield SetAttr(self.graph.name, self.node.name, name, protos.more_shapes(attr, shapes))


def claim_conditionals(edits: list[Edit], extended: set[tuple[str, str]]) -> list[Edit]:
    """Return the edits for one batch norm, and add each ``If`` that they extend to `extended`.

    Raises:
        DeclinedError: another batch norm has extended one of them already.
    """
    # Only `Branches.results` sets attributes here. It counts an ``If``'s outputs as they are before the pass, so two
    # batch norms would take the same output, and the second ``Tout`` would overwrite the first.
    claimed = {(edit.graph, edit.node) for edit in edits if isinstance(edit, SetAttr)}
    for _, name in claimed & extended:
        raise DeclinedError(f"{name} chooses for another batch norm too")
    extended |= claimed
    return edits

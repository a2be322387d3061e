"""What follows a node, up to where a graph chooses."""

from __future__ import annotations

from dataclasses import dataclass

from passes.branches import FIRST
from passes.predicates import SWITCHES
from passes.updates import consumers
from rewriter import ops
from rewriter.ir import Edge, Graph, Model, Node, Value
from rewriter.liveness import BRANCHES

LONGEST = 16
"""Nodes that may lie between a batch norm and a choice."""


@dataclass(frozen=True)
class Cone:
    """A node and all that follows it, up to choices.

    Attributes:
        nodes: their names.
        ends: what is used where a choice begins (a Switch, or an ``If``), and where.
    """

    nodes: tuple[str, ...]
    ends: tuple[tuple[Edge, Value], ...]


def cone(model: Model, graph: Graph, start: Value) -> Cone | None:
    """What follows one output of a node; None where it leads elsewhere than to choices."""
    uses = model.analysis_of(graph, consumers)
    found: dict[str, None] = {}
    ends: dict[tuple[Edge, Value], None] = {}
    waiting = [start]
    while waiting:
        value = waiting.pop(0)
        for edge in uses.get(value, ()):
            user = graph.nodes.get(edge.node)
            if user is not None and _chooses(user, edge):
                ends[edge, value] = None
            elif user is None or not _moveable(user) or len(found) > LONGEST:
                return None
            elif user.name not in found:
                found[user.name] = None
                waiting += [Value(user.name, port) for port in range(ops.output_count(model, user))]
    return Cone((start.node, *found), tuple(ends))


def _chooses(node: Node, edge: Edge) -> bool:
    return (node.op in SWITCHES and edge.position == 0) or (node.op in BRANCHES and edge.position >= FIRST)


def _moveable(node: Node) -> bool:
    """Whether it makes no difference when a node runs."""
    definition = ops.registered(node.op)
    if definition is None or definition.is_stateful or node.op in ops.CALLS or node.op in (*ops.CHOICES, *SWITCHES):
        return False
    return not any(arg.is_ref for arg in definition.input_arg)

"""The nodes that follow a node, up to where a graph chooses."""

from __future__ import annotations

from dataclasses import dataclass

from passes.control_flow.branches import FIRST
from rewriter import op_defs, ops
from rewriter.dataflow import consumers, following
from rewriter.ir import MAIN, Edge, Graph, Model, Node, Value
from rewriter.liveness import BRANCHES, SWITCHES
from rewriter.sweep import held

LONGEST = 16
"""Largest number of nodes that may lie between a batch norm and a choice."""


@dataclass(frozen=True)
class Cone:
    """A node and all nodes that follow it, up to choices.

    Attributes:
        nodes: the names of the nodes.
        ends: the inputs at which a choice begins (a Switch, or an ``If``), and the values used there.
        others: users and waiting nodes whatever is chosen: a node that cannot move, a node of the cone that a
            signature or a collection names, or the function's caller ("").
    """

    nodes: tuple[str, ...]
    ends: tuple[tuple[Edge, Value], ...]
    others: tuple[str, ...]


def cone(model: Model, graph: Graph, start: Value) -> Cone:
    """Return the cone of one output of a node."""
    uses, followers = model.analysis_of(graph, consumers), model.analysis_of(graph, following)
    inner: dict[str, None] = {}
    ends: dict[tuple[Edge, Value], None] = {}
    others: dict[str, None] = {}
    named = model.analysis(held) if graph.name == MAIN else frozenset()
    waiting = [start]
    while waiting:
        value = waiting.pop(0)
        if value.node in named:
            others[value.node] = None
        others |= dict.fromkeys(user.name for user in followers.get(value.node, ()))
        for edge in uses.get(value, ()):
            user = graph.nodes.get(edge.node)
            if user is not None and _chooses(user, edge):
                ends[edge, value] = None
            elif user is None or not moveable(user) or len(inner) > LONGEST:
                others[edge.node] = None
            elif user.name not in inner:
                inner[user.name] = None
                waiting += [Value(user.name, port) for port in range(op_defs.output_count(model, user))]
    return Cone((start.node, *inner), tuple(ends), tuple(others))


def _chooses(node: Node, edge: Edge) -> bool:
    return (node.op in SWITCHES and edge.position == 0) or (node.op in BRANCHES and edge.position >= FIRST)


def moveable(node: Node) -> bool:
    """Return true if it makes no difference when a node runs."""
    definition = op_defs.registered(node.op)
    if definition is None or definition.is_stateful or node.op in ops.CALLS or node.op in (*ops.CHOICES, *SWITCHES):
        return False
    # ``Assign`` and other ops on references change a variable, but their definitions do not call them stateful.
    return not any(arg.is_ref for arg in definition.input_arg)

"""Ops with side effects: assignments, random draws, prints, files."""

from __future__ import annotations

from rewriter import op_defs, ops
from rewriter.ir import Graph, Model, Node

HANDLES = frozenset({"VarHandleOp"}) | ops.READS
"""Stateful ops that change nothing."""


def stateful(node: Node) -> bool:
    """Return true if an op has an effect by its definition. For a call, ask `has_effect`."""
    definition = op_defs.registered(node.op)
    return definition is not None and definition.is_stateful and node.op not in HANDLES


def has_effect(model: Model, node: Node) -> bool:
    """Return true if a node, or an op of a function that it calls, has an effect."""
    callees = ops.callees(model, node)
    if callees:
        return any(has_effect(model, inner) for name in callees for inner in model.graphs[name].nodes.values())
    return stateful(node)


def effects_before(model: Model, graph: Graph, name: str) -> frozenset[str]:
    """Return the nodes with an effect that run whenever a node does, the node itself included."""
    waiting, before = [name], set[str]()
    while waiting:
        node = graph.nodes[waiting.pop()]
        if node.name not in before:
            before.add(node.name)
            waiting += [*(v.node for v in node.inputs), *node.after]
    return frozenset(n for n in before if has_effect(model, graph.nodes[n]))

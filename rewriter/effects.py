"""Ops that do more than give their outputs: assignments, random draws, prints, files."""

from __future__ import annotations

from rewriter import op_defs, ops
from rewriter.ir import Graph, Model, Node

HANDLES = ("VarHandleOp", "ReadVariableOp")
"""Stateful ops that change nothing."""


def stateful(node: Node) -> bool:
    """Return whether an op has an effect, by its definition; a call's is that of the function's ops."""
    definition = op_defs.registered(node.op)
    return definition is not None and definition.is_stateful and node.op not in HANDLES


def has_effect(model: Model, node: Node) -> bool:
    """Return whether running a node, or what it calls, does more than give its outputs."""
    called = ops.callees(model, node)
    if called:
        return any(has_effect(model, inner) for name in called for inner in model.graphs[name].nodes.values())
    return stateful(node)


def effects_before(model: Model, graph: Graph, name: str) -> frozenset[str]:
    """The nodes with an effect that run whenever a node does, itself among them."""
    waiting, seen = [name], set[str]()
    while waiting:
        node = graph.nodes[waiting.pop()]
        if node.name not in seen:
            seen.add(node.name)
            waiting += [*(v.node for v in node.inputs), *node.after]
    return frozenset(n for n in seen if has_effect(model, graph.nodes[n]))

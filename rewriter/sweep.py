"""Removal of nodes that nothing uses any more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from rewriter import op_defs, ops, protos
from rewriter.edit import Sweep
from rewriter.ir import ARG, MAIN, Graph, Model, Node

FED = frozenset({"Placeholder", "PlaceholderWithDefault", ARG})
"""Ops that a caller gives a value."""


def sweep(model: Model, edits: Iterable[Sweep]) -> Model:
    """The model without the nodes named, as far as nothing uses them, and without what only they needed."""
    named: dict[str, dict[str, bool]] = {}
    for edit in sorted(edits, key=lambda edit: edit.moved):
        named.setdefault(edit.graph, {}).update(dict.fromkeys(edit.nodes, edit.moved))
    swept = {name: _swept(model, model.graphs[name], nodes) for name, nodes in named.items()}
    return replace(model, graphs={**model.graphs, **swept}) if swept else model


def _swept(model: Model, graph: Graph, named: Mapping[str, bool]) -> Graph:
    moved = frozenset(name for name, is_moved in named.items() if is_moved)
    nodes = {name: _waiting_without(node, moved) for name, node in graph.nodes.items()}
    uses = Counter(name for node in nodes.values() for name in needed_by(node))
    uses.update(r.value.node for r in graph.results)
    uses.update(e.node for e in graph.effects if e.node not in moved)
    if graph.name == MAIN:
        uses.update(model.analysis(held))
    waiting = list(named)
    while waiting:
        name = waiting.pop()
        if name in nodes and not uses[name] and (name in moved or _removable(model, nodes[name])):
            node = nodes.pop(name)
            uses.subtract(needed_by(node))
            waiting += (v.node for v in node.inputs)  # what others only wait for is a conditional's pivot, or an effect
    if len(nodes) == len(graph.nodes):
        return graph
    return replace(graph, nodes=nodes, effects=tuple(e for e in graph.effects if e.node in nodes))


def _waiting_without(node: Node, moved: Collection[str]) -> Node:
    after = tuple(name for name in node.after if name not in moved)
    return node if after == node.after else replace(node, after=after)


def needed_by(node: Node) -> Iterator[str]:
    """The nodes that a node names: inputs, control inputs, and those that it is placed beside."""
    yield from (v.node for v in node.inputs)
    yield from node.after
    if "_class" in node.attrs:
        yield from (protos.text(s).removeprefix("loc:@") for s in node.attrs["_class"].list.s)


def held(model: Model) -> frozenset[str]:
    """The nodes of the main graph that something outside of it names."""
    found = {*model.constants.values(), *(name for names in model.collections.values() for name in names)}
    for signature in (*model.signatures.values(), *model.main_signatures.values()):
        found.update(v.node for v in (*signature.feeds, *signature.fetches))
    return frozenset(found)


def _removable(model: Model, node: Node) -> bool:
    called = ops.callees(model, node)
    if called:
        inside = [inner for name in called for inner in model.graphs[name].nodes.values()]
        return all(inner.op == ARG or _removable(model, inner) for inner in inside)
    definition = op_defs.registered(node.op)
    if node.op == "ReadVariableOp":
        return True  # stateful, but changes nothing
    return definition is not None and not definition.is_stateful and node.op not in FED

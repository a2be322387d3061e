"""Removal of nodes that nothing uses any more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

from rewriter import op_defs, ops, protos
from rewriter.edit import Sweep
from rewriter.ir import ARG, MAIN, Graph, Model, Node

FED = frozenset({"Placeholder", "PlaceholderWithDefault", ARG})
"""Ops whose values a caller supplies."""


def sweep(model: Model, edits: Iterable[Sweep]) -> Model:
    """Return the model without the named nodes that nothing uses, and without the nodes that only they needed."""
    named: dict[str, dict[str, bool]] = {}
    # Moved nodes come last: a node that any edit moves counts as moved.
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
            waiting += (v.node for v in node.inputs)  # not `after`: control inputs are conditionals' pivots, or effects
    if len(nodes) == len(graph.nodes):
        return graph
    return replace(graph, nodes=nodes, effects=tuple(e for e in graph.effects if e.node in nodes))


def _waiting_without(node: Node, moved: Collection[str]) -> Node:
    after = tuple(name for name in node.after if name not in moved)
    return node if after == node.after else replace(node, after=after)


def needed_by(node: Node) -> Iterator[str]:
    """Yield the nodes that a node refers to: inputs, control inputs, and nodes that it is colocated with."""
    yield from (v.node for v in node.inputs)
    yield from node.after
    if "_class" in node.attrs:
        yield from (protos.text(s).removeprefix("loc:@") for s in node.attrs["_class"].list.s)


def held(model: Model) -> frozenset[str]:
    """Return the nodes of the main graph that constants, collections or signatures refer to."""
    node_names = {*model.constants.values(), *(name for names in model.collections.values() for name in names)}
    for signature in (*model.signatures.values(), *model.main_signatures.values()):
        node_names.update(v.node for v in (*signature.feeds, *signature.fetches))
    return frozenset(node_names)


def _removable(model: Model, node: Node) -> bool:
    """Return true if a node, and all nodes of a function that it calls, have no effect and no value from a caller."""
    callees = ops.callees(model, node)
    if callees:
        inner_nodes = [inner for name in callees for inner in model.graphs[name].nodes.values()]
        return all(inner.op == ARG or _removable(model, inner) for inner in inner_nodes)
    definition = op_defs.registered(node.op)
    if node.op in ops.READS:
        return True  # stateful, but changes nothing
    return definition is not None and not definition.is_stateful and node.op not in FED

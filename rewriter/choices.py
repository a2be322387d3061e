"""Alternatives for a value, between which a graph chooses while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rewriter import constants, ops
from rewriter.dataflow import call_graph
from rewriter.ir import ARG, Edge, Graph, Model, Node, Value


class Leaf(NamedTuple):
    """One alternative for a value.

    Attributes:
        edge: a use of `value`, in its own shape and dtype, that belongs to this alternative.
        graph: the graph that contains `value`.
        value: the alternative itself; in place of a function's argument, the value that its caller passes.
        proxies: (graph, node) of nodes on the way that stand for their input in another precision.
        calls: (graph, node) of the calls that lead to `graph`.
    """

    edge: Edge
    graph: str
    value: Value
    proxies: tuple[tuple[str, str], ...] = ()
    calls: tuple[tuple[str, str], ...] = ()


def leaves(model: Model, edge: Edge, value: Value) -> tuple[Leaf, ...]:
    """Return the alternatives for the value used at an edge; a single one if nothing chooses.

    The search follows Merge, Select and the branches of If and Case. It passes through ops that forward a value or
    change its shape or dtype.
    """
    return tuple(dict.fromkeys(_leaves(model, model.graphs[edge.graph], edge, value)))


Nodes = tuple[tuple[str, str], ...]


def _leaves(
    model: Model,
    graph: Graph,
    edge: Edge,
    value: Value,
    *,
    visited: frozenset[Value] = frozenset(),
    proxies: Nodes = (),
) -> Iterator[Leaf]:
    while value not in visited:
        node = graph.nodes[value.node]
        source = ops.forwarded(node, value.port)
        if node.op == "Cast" or constants.viewed(graph, node) is not None:
            edge = Edge(graph.name, node.name, 0)
            value = node.inputs[0]
        elif source is not None:
            if ops.STAND_IN in node.attrs:
                proxies = (*proxies, (graph.name, node.name))
            value = source
        elif node.op in ops.CHOICES and value.port == 0:
            visited |= {value}  # only a choice can lead back to itself, in a loop
            for position in range(ops.CHOICES[node.op], len(node.inputs)):
                branch = Edge(graph.name, node.name, position)
                yield from _leaves(model, graph, branch, node.inputs[position], visited=visited, proxies=proxies)
            return
        else:
            yield from _branch_leaves(model, graph, Leaf(edge, graph.name, value, proxies), node, visited)
            return


def _branch_leaves(model: Model, graph: Graph, leaf: Leaf, node: Node, visited: frozenset[Value]) -> Iterator[Leaf]:
    """Yield the alternatives for a call's output: those of each branch. A call of one function chooses nothing."""
    form = ops.call_form(model, node)
    callees = ops.callees(model, node) if form is not None and not form.carried else ()
    if form is None or len(callees) < 2:  # noqa: PLR2004  one is no choice
        yield leaf
        return
    port = leaf.value.port
    for name in callees:
        callee = model.graphs[name]
        for inner in _leaves(model, callee, Edge(name, "", port), callee.results[port].value, proxies=leaf.proxies):
            if inner.graph == name and callee.nodes[inner.value.node].op == ARG:
                argument = node.inputs[form.first + callee.arguments.index(inner.value.node)]
                yield from _leaves(model, graph, inner.edge, argument, visited=visited, proxies=inner.proxies)
            else:
                yield inner._replace(calls=((graph.name, node.name), *inner.calls))


def outside(model: Model, leaf: Leaf) -> Leaf:
    """Return an alternative that is an argument as its graph's only caller computes it; any other unchanged."""
    graph, callers = model.graphs[leaf.graph], model.analysis(call_graph).callers.get(leaf.graph, ())
    if leaf.calls or graph.nodes[leaf.value.node].op != ARG or len(callers) != 1:
        return leaf
    (call,) = callers
    outer = model.graphs[call.graph]
    form = ops.call_form_of(model, outer.nodes[call.node])
    if form.carried:
        return leaf
    value = outer.nodes[call.node].inputs[form.first + graph.arguments.index(leaf.value.node)]
    source: Value | None = value
    while source is not None:
        value, node = source, outer.nodes[source.node]
        source = constants.viewed(outer, node) or ops.forwarded(node, value.port)
    return outside(model, leaf._replace(graph=outer.name, value=value))

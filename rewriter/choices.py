"""What a value may be: the alternatives between which a graph chooses while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rewriter import constants, ops
from rewriter.dataflow import call_graph
from rewriter.ir import ARG, Edge, Graph, Model, Node, Value


class Leaf(NamedTuple):
    """One alternative.

    Attributes:
        edge: a use of `value`, in its own shape and dtype, that belongs to this alternative.
        graph: the graph that `value` lies in.
        value: what is chosen; where a function's argument is, what its caller passes.
        proxies: (graph, node) of nodes on the way that stand for their input in another precision.
        calls: (graph, node) of the calls that lead to `graph`.
    """

    edge: Edge
    graph: str
    value: Value
    proxies: tuple[tuple[str, str], ...] = ()
    calls: tuple[tuple[str, str], ...] = ()


def leaves(model: Model, edge: Edge, value: Value) -> tuple[Leaf, ...]:
    """The alternatives for the value used at an edge; one where nothing chooses.

    Follows Merge, Select and the branches of If and Case, through ops that forward a value or change its shape
    or dtype.
    """
    return tuple(dict.fromkeys(_leaves(model, model.graphs[edge.graph], edge, value)))


Nodes = tuple[tuple[str, str], ...]


def _leaves(
    model: Model,
    graph: Graph,
    edge: Edge,
    value: Value,
    *,
    seen: frozenset[Value] = frozenset(),
    proxies: Nodes = (),
) -> Iterator[Leaf]:
    while value not in seen:
        node = graph.nodes[value.node]
        passed = ops.forwarded(node, value.port)
        if node.op == "Cast" or constants.viewed(graph, node) is not None:
            edge = Edge(graph.name, node.name, 0)
            value = node.inputs[0]
        elif passed is not None:
            if ops.QUANTIZER_MARK in node.attrs:
                proxies = (*proxies, (graph.name, node.name))
            value = passed
        elif node.op in ops.CHOICES and value.port == 0:
            seen |= {value}  # only a choice can lead back to itself, in a loop
            for position in range(ops.CHOICES[node.op], len(node.inputs)):
                branch = Edge(graph.name, node.name, position)
                yield from _leaves(model, graph, branch, node.inputs[position], seen=seen, proxies=proxies)
            return
        else:
            yield from _called(model, graph, Leaf(edge, graph.name, value, proxies), node, seen)
            return


def _called(model: Model, graph: Graph, leaf: Leaf, node: Node, seen: frozenset[Value]) -> Iterator[Leaf]:
    """The alternatives of what a call gives: those of each branch. A call of one function chooses nothing."""
    form = ops.call_form(model, node)
    called = ops.callees(model, node) if form is not None and not form.carried else ()
    if form is None or len(called) < 2:  # noqa: PLR2004  one is no choice
        yield leaf
        return
    port = leaf.value.port
    for name in called:
        callee = model.graphs[name]
        for inner in _leaves(model, callee, Edge(name, "", port), callee.results[port].value, proxies=leaf.proxies):
            if inner.graph == name and callee.nodes[inner.value.node].op == ARG:
                passed = node.inputs[form.first + callee.arguments.index(inner.value.node)]
                yield from _leaves(model, graph, inner.edge, passed, seen=seen, proxies=inner.proxies)
            else:
                yield inner._replace(calls=((graph.name, node.name), *inner.calls))


def outside(model: Model, leaf: Leaf) -> Leaf:
    """The same alternative where the only caller of its graph passes it in: as that caller computes it."""
    graph, callers = model.graphs[leaf.graph], model.analysis(call_graph).callers.get(leaf.graph, ())
    if leaf.calls or graph.nodes[leaf.value.node].op != ARG or len(callers) != 1:
        return leaf
    (call,) = callers
    outer = model.graphs[call.graph]
    form = ops.call_form_of(model, outer.nodes[call.node])
    if form.carried:
        return leaf
    value = outer.nodes[call.node].inputs[form.first + graph.arguments.index(leaf.value.node)]
    passed: Value | None = value
    while passed is not None:
        value, node = passed, outer.nodes[passed.node]
        passed = constants.viewed(outer, node) or ops.forwarded(node, value.port)
    return outside(model, leaf._replace(graph=outer.name, value=value))

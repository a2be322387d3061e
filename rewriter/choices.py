"""What a value may be: the alternatives between which a graph chooses while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from rewriter import ops
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
    return tuple(dict.fromkeys(_leaves(model, model.graphs[edge.graph], _Way(edge), value)))


@dataclass(frozen=True)
class _Way:
    """The way to a value: the last edge on it that belongs to one alternative, and what was passed."""

    edge: Edge
    seen: frozenset[Value] = frozenset()
    proxies: tuple[tuple[str, str], ...] = ()


def _leaves(model: Model, graph: Graph, way: _Way, value: Value) -> Iterator[Leaf]:
    while value not in way.seen:
        way = replace(way, seen=way.seen | {value})
        node = graph.nodes[value.node]
        passed = ops.forwarded(node, value.port)
        if node.op in ops.VIEWS or node.op == "Cast":
            way = replace(way, edge=Edge(graph.name, node.name, 0))
            value = node.inputs[0]
        elif passed is not None:
            if ops.PROXY in node.attrs:
                way = replace(way, proxies=(*way.proxies, (graph.name, node.name)))
            value = passed
        elif node.op in ops.CHOICES and value.port == 0:
            for position in range(ops.CHOICES[node.op], len(node.inputs)):
                branch = replace(way, edge=Edge(graph.name, node.name, position))
                yield from _leaves(model, graph, branch, node.inputs[position])
            return
        else:
            yield from _called(model, graph, way, value, node)
            return


def _called(model: Model, graph: Graph, way: _Way, value: Value, node: Node) -> Iterator[Leaf]:
    """The alternatives of what a call gives: those of each branch. A call of one function chooses nothing."""
    form = ops.call_form(model, node)
    called = ops.callees(model, node)
    if form is None or form.carried or len(called) < 2:  # noqa: PLR2004  one is no choice
        yield Leaf(way.edge, graph.name, value, way.proxies)
        return
    for name in called:
        callee = model.graphs[name]
        inner = _Way(Edge(name, "", value.port), proxies=way.proxies)
        for leaf in _leaves(model, callee, inner, callee.results[value.port].value):
            inside = callee.nodes[leaf.value.node]
            if leaf.graph == name and inside.op == ARG:
                outside = node.inputs[form.first + callee.arguments.index(inside.name)]
                yield from _leaves(model, graph, _Way(leaf.edge, way.seen, leaf.proxies), outside)
            else:
                yield leaf._replace(calls=((graph.name, node.name), *leaf.calls))

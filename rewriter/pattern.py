"""Patterns of nodes as values, with named captures.

A pattern describes how a value is computed. Ops that forward a value (Identity, Switch, Cast and the like)
may stand between any two nodes of it, as may ops that only change its shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from rewriter import ops
from rewriter.ir import Edge, Graph, Value

COMMUTATIVE = frozenset({"Add", "AddV2", "Mul"})


@dataclass(frozen=True)
class Pattern:
    """A value computed by one of `ops` from values that match `inputs`; any value where there are no ops.

    Attributes:
        name: what the value is captured as. Two parts of a pattern with one name match the same value.
    """

    ops: frozenset[str] = frozenset()
    inputs: tuple[Pattern, ...] = ()
    name: str = ""

    def named(self, name: str) -> Pattern:
        """The same pattern, captured as `name`."""
        return replace(self, name=name)


@dataclass(frozen=True)
class Capture:
    """What a part of a pattern matched: the value, as it was computed, and the uses of it in the match."""

    value: Value
    edges: tuple[Edge, ...]


Match = Mapping[str, Capture]


def any_value(name: str) -> Pattern:
    """Any value."""
    return Pattern(name=name)


def node(names: str, *inputs: Pattern) -> Pattern:
    """A node of one of the ops, which are separated by a bar, with these inputs; Add and Mul commute."""
    return Pattern(frozenset(names.split("|")), inputs)


def origin(graph: Graph, value: Value) -> Value:
    """The value as it was computed: before ops that forward it or change its shape or dtype."""
    while True:
        found = graph.nodes[value.node]
        passed = found.inputs[0] if found.op in ops.VIEWS else ops.forwarded(found, value.port)
        if passed is None:
            return value
        value = passed


def matches(graph: Graph, root: str, pattern: Pattern) -> Iterator[Match]:
    """All ways in which the first output of a node matches a pattern."""
    for captured in _node_matches(graph, Value(root), pattern, {}):
        yield {name: capture for name, capture in captured.items() if name}


def _value_matches(
    graph: Graph, edge: Edge, value: Value, pattern: Pattern, captured: dict[str, Capture]
) -> Iterator[dict[str, Capture]]:
    found = origin(graph, value)
    if pattern.name in captured and pattern.name:
        known = captured[pattern.name]
        if known.value == found:
            yield {**captured, pattern.name: Capture(found, (*known.edges, edge))}
        return
    with_this = {**captured, pattern.name: Capture(found, (edge,))} if pattern.name else captured
    if pattern.ops:
        yield from _node_matches(graph, found, pattern, with_this)
    else:
        yield with_this


def _node_matches(
    graph: Graph, value: Value, pattern: Pattern, captured: dict[str, Capture]
) -> Iterator[dict[str, Capture]]:
    found = graph.nodes[value.node]
    if found.op not in pattern.ops or value.port or len(found.inputs) != len(pattern.inputs):
        return
    orders = [tuple(range(len(found.inputs)))]
    if found.op in COMMUTATIVE:
        orders.append(orders[0][::-1])
    for order in orders:
        states = [captured]
        for position, part in zip(order, pattern.inputs, strict=True):
            edge = Edge(graph.name, found.name, position)
            states = [
                after
                for before in states
                for after in _value_matches(graph, edge, found.inputs[position], part, before)
            ]
        yield from states

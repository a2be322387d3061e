"""Patterns of nodes as values, with named captures.

A pattern describes how a value is computed. Ops that forward a value (Identity, Switch, Cast and the like)
may stand between any two nodes of it, as may ops that only change its shape where the pattern allows it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from rewriter import constants, ops
from rewriter.ir import Edge, Graph, Value

COMMUTATIVE = frozenset({"Add", "AddV2", "Mul", "SquaredDifference"})


@dataclass(frozen=True)
class Pattern:
    """A value computed by one of `ops` from values that match `inputs`; any value where there are no ops.

    Attributes:
        name: what the value is captured as. Two parts of a pattern with one name match the same value.
        shaped: whether the value has to be used in the shape in which it is computed.
    """

    ops: frozenset[str] = frozenset()
    inputs: tuple[Pattern, ...] = ()
    name: str = ""
    shaped: bool = False

    def named(self, name: str) -> Pattern:
        """The same pattern, captured as `name`."""
        return replace(self, name=name)

    @property
    def parts(self) -> Iterator[Pattern]:
        """The pattern and all that it is made of."""
        yield self
        for part in self.inputs:
            yield from part.parts

    @property
    def depth(self) -> int:
        """The number of ops on the longest way through it."""
        return bool(self.ops) + max((part.depth for part in self.inputs), default=0)

    @cached_property
    def captures(self) -> frozenset[str]:
        """The names in it."""
        return frozenset({self.name} - {""}).union(*(part.captures for part in self.inputs))


@dataclass(frozen=True)
class Capture:
    """What a part of a pattern matched: the value, as it was computed, and the uses of it in the match."""

    value: Value
    edges: tuple[Edge, ...]


@dataclass(frozen=True)
class Match:
    """One way in which a graph matches a pattern.

    Attributes:
        captures: by name.
        nodes: the nodes that compute the value, and those between them, which pass values on.
    """

    captures: Mapping[str, Capture]
    nodes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Capture:
        return self.captures[name]

    def __contains__(self, name: str) -> bool:
        return name in self.captures

    def _with(self, name: str, value: Value, edge: Edge) -> Match | None:
        """With one more use of a captured value; None if that name stands for another value."""
        known = self.captures.get(name)
        if known is not None and known.value != value:
            return None
        edges = (*known.edges, edge) if known is not None else (edge,)
        return replace(self, captures={**self.captures, name: Capture(value, edges)}) if name else self


@dataclass(frozen=True)
class Mismatch:
    """How far a pattern matches, and what stops it.

    Attributes:
        matched: the number of ops that are as they should be.
        node: the one that is not, or that passes on what is not.
        expected: the ops of which it should be one.
    """

    matched: int
    node: str = ""
    expected: frozenset[str] = frozenset()


def any_value(name: str) -> Pattern:
    """Any value."""
    return Pattern(name=name)


def node(names: str, *inputs: Pattern) -> Pattern:
    """A node of one of the ops, which are separated by a bar, with these inputs; Add and Mul commute."""
    return Pattern(frozenset(names.split("|")), inputs)


def origin(graph: Graph, value: Value, *, shaped: bool = False, stop: Collection[str] = ()) -> Value:
    """The value as it was computed: before ops that forward it or change its shape or dtype.

    With `shaped`, no op that changes the shape is looked through; nor is one in `stop`.
    """
    *_, found = way(graph, value, shaped=shaped, stop=stop)
    return found


def way(graph: Graph, value: Value, *, shaped: bool = False, stop: Collection[str] = ()) -> Iterator[Value]:
    """A value, and what it was before each op that passes it on."""
    passed: Value | None = value
    while passed is not None:
        yield passed
        found = graph.nodes[passed.node]
        view = constants.viewed(graph, found)
        if found.op in stop or (shaped and view is not None):
            return
        passed = view or ops.forwarded(found, passed.port)


def matches(graph: Graph, root: str, pattern: Pattern, stop: Collection[str] = ()) -> Iterator[Match]:
    """All ways in which the first output of a node matches a pattern; no op in `stop` passes a value on."""
    yield from _Matcher(graph, stop).computed(Value(root), pattern, Match({}))


def closest(graph: Graph, roots: Iterable[str], patterns: Iterable[Pattern]) -> Mismatch:
    """The pattern that matches furthest from one of these nodes, and what stops it there."""
    matcher = _Matcher(graph, ())
    tried = [matcher.mismatch(Value(root), pattern) for pattern in patterns for root in roots]
    return max((m for m in tried if m.node), key=lambda m: m.matched, default=Mismatch(0))


@dataclass(frozen=True)
class _Matcher:
    graph: Graph
    stop: Collection[str]

    def _origin(self, value: Value, pattern: Pattern) -> tuple[Value, tuple[str, ...]]:
        """A value as it was computed, and the nodes that pass it on."""
        *passing, found = way(self.graph, value, shaped=pattern.shaped, stop=self.stop)
        return found, tuple(v.node for v in passing)

    def used(self, edge: Edge, value: Value, pattern: Pattern, before: Match) -> Iterator[Match]:
        """Matches of a value that is used at an edge."""
        found, way = self._origin(value, pattern)
        captured = before._with(pattern.name, found, edge)
        if captured is not None and pattern.ops:
            yield from self.computed(found, pattern, replace(captured, nodes=captured.nodes + way))
        elif captured is not None:
            yield captured

    def computed(self, value: Value, pattern: Pattern, before: Match) -> Iterator[Match]:
        """Matches of a value as it is computed."""
        found = self.graph.nodes[value.node]
        if found.op not in pattern.ops or value.port or len(found.inputs) != len(pattern.inputs):
            return
        for order in self._orders(found.op, len(found.inputs)):
            states = [replace(before, nodes=(*before.nodes, found.name))]
            for position, part in zip(order, pattern.inputs, strict=True):
                edge = Edge(self.graph.name, found.name, position)
                states = [m for state in states for m in self.used(edge, found.inputs[position], part, state)]
            yield from states

    @staticmethod
    def _orders(op: str, count: int) -> list[tuple[int, ...]]:
        straight = tuple(range(count))
        return [straight, straight[::-1]] if op in COMMUTATIVE else [straight]

    def mismatch(self, value: Value, pattern: Pattern) -> Mismatch:
        """How far a value matches; captures are not compared."""
        found, _ = self._origin(value, pattern)
        node = self.graph.nodes[found.node]
        if not pattern.ops:
            return Mismatch(0)
        if node.op not in pattern.ops or len(node.inputs) != len(pattern.inputs):
            return Mismatch(0, value.node, pattern.ops)
        best = Mismatch(-1)
        for order in self._orders(node.op, len(node.inputs)):
            parts = [
                self.mismatch(node.inputs[position], part) for position, part in zip(order, pattern.inputs, strict=True)
            ]
            failed = next((p for p in parts if p.node), Mismatch(0))
            here = replace(failed, matched=1 + sum(p.matched for p in parts))
            if (not here.node, here.matched) > (not best.node, best.matched) or best.matched < 0:
                best = here
        return best

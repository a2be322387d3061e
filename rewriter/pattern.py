"""Patterns of nodes as values, with named captures.

A pattern describes the computation of a value. Ops that forward a value (Identity, Switch, Cast and the like) may stand
between any two of its nodes. If the pattern allows it, ops that only change the shape may too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from rewriter import constants, ops
from rewriter.ir import Edge, Graph, Value

COMMUTATIVE = frozenset({"Add", "AddV2", "Mul", "SquaredDifference"})
"""Ops whose two inputs may be swapped."""


@dataclass(frozen=True)
class Pattern:
    """A value computed by one of `ops` from values that match `inputs`; any value if `ops` is empty.

    Attributes:
        name: the name of the capture. Two parts of a pattern with one name match the same value.
        shaped: true if the value must be used in the shape in which it is computed.
    """

    ops: frozenset[str] = frozenset()
    inputs: tuple[Pattern, ...] = ()
    name: str = ""
    shaped: bool = False

    def named(self, name: str) -> Pattern:
        """Return the pattern, captured as `name`."""
        return replace(self, name=name)

    @property
    def parts(self) -> Iterator[Pattern]:
        """The pattern and all its parts."""
        yield self
        for part in self.inputs:
            yield from part.parts

    @property
    def depth(self) -> int:
        """The number of ops on the longest path through the pattern."""
        return bool(self.ops) + max((part.depth for part in self.inputs), default=0)

    @cached_property
    def captures(self) -> frozenset[str]:
        """The names of all captures in the pattern."""
        return frozenset({self.name} - {""}).union(*(part.captures for part in self.inputs))


@dataclass(frozen=True)
class Capture:
    """The match of one part of a pattern: the value as it was computed, and its uses in the match."""

    value: Value
    edges: tuple[Edge, ...]


@dataclass(frozen=True)
class Match:
    """One match of a pattern in a graph.

    Attributes:
        captures: captures by name.
        nodes: the nodes that compute the value, and the nodes between them, which pass values on.
    """

    captures: Mapping[str, Capture]
    nodes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Capture:
        return self.captures[name]

    def __contains__(self, name: str) -> bool:
        return name in self.captures

    def _with_use(self, name: str, value: Value, edge: Edge) -> Match | None:
        """Return the match with one more use of a captured value; None if the name stands for another value."""
        capture = self.captures.get(name)
        if capture is not None and capture.value != value:
            return None
        edges = (*capture.edges, edge) if capture is not None else (edge,)
        return replace(self, captures={**self.captures, name: Capture(value, edges)}) if name else self


@dataclass(frozen=True)
class Mismatch:
    """The extent to which a pattern matches, and the node that stops it.

    Attributes:
        matched: the number of ops that match.
        node: the node that does not match, or that passes on a value that does not; "" if all match.
        expected: the ops that would match there.
    """

    matched: int
    node: str = ""
    expected: frozenset[str] = frozenset()


def any_value(name: str) -> Pattern:
    """Return a pattern that matches any value."""
    return Pattern(name=name)


def node(names: str, *inputs: Pattern) -> Pattern:
    """Return the pattern of a node of one of the ops, separated by bars, with these inputs.

    The inputs of an op in `COMMUTATIVE` match in either order.
    """
    return Pattern(frozenset(names.split("|")), inputs)


def origin(graph: Graph, value: Value, *, shaped: bool = False, stop: Collection[str] = ()) -> Value:
    """Return the value as it was computed: before ops that forward it or change its shape or dtype.

    The search stops at ops in `stop` and, with `shaped`, at ops that change the shape.
    """
    *_, computed = way(graph, value, shaped=shaped, stop=stop)
    return computed


def way(graph: Graph, value: Value, *, shaped: bool = False, stop: Collection[str] = ()) -> Iterator[Value]:
    """Yield a value, then the value before each op that passes it on."""
    passed: Value | None = value
    while passed is not None:
        yield passed
        node_of_value = graph.nodes[passed.node]
        view = constants.viewed(graph, node_of_value)
        if node_of_value.op in stop or (shaped and view is not None):
            return
        passed = view or ops.forwarded(node_of_value, passed.port)


def matches(graph: Graph, root: str, pattern: Pattern, stop: Collection[str] = ()) -> Iterator[Match]:
    """Yield all matches of a pattern with the first output of a node; no op in `stop` passes a value on."""
    yield from _Matcher(graph, stop).computed(Value(root), pattern, Match({}))


def closest(graph: Graph, roots: Iterable[str], patterns: Iterable[Pattern]) -> Mismatch:
    """Return the mismatch of the pattern that matches furthest, from one of these nodes."""
    matcher = _Matcher(graph, ())
    mismatches = [matcher.mismatch(Value(root), pattern) for pattern in patterns for root in roots]
    # A pattern that matches wholly is no near miss.
    return max((m for m in mismatches if m.node), key=lambda m: m.matched, default=Mismatch(0))


@dataclass(frozen=True)
class _Matcher:
    """A matcher of patterns in one graph, in which ops in `stop` do not pass values on."""

    graph: Graph
    stop: Collection[str]

    def _origin(self, value: Value, pattern: Pattern) -> tuple[Value, tuple[str, ...]]:
        """Return a value as it was computed, and the nodes that pass it on."""
        *passing, computed = way(self.graph, value, shaped=pattern.shaped, stop=self.stop)
        return computed, tuple(v.node for v in passing)

    def used(self, edge: Edge, value: Value, pattern: Pattern, before: Match) -> Iterator[Match]:
        """Yield the matches of a value that is used at an edge."""
        computed, passing = self._origin(value, pattern)
        captured = before._with_use(pattern.name, computed, edge)
        if captured is not None and pattern.ops:
            yield from self.computed(computed, pattern, replace(captured, nodes=captured.nodes + passing))
        elif captured is not None:
            yield captured

    def computed(self, value: Value, pattern: Pattern, before: Match) -> Iterator[Match]:
        """Yield the matches of a value as it is computed."""
        candidate = self.graph.nodes[value.node]
        if candidate.op not in pattern.ops or value.port or len(candidate.inputs) != len(pattern.inputs):
            return
        for order in self._orders(candidate.op, len(candidate.inputs)):
            partial_matches = [replace(before, nodes=(*before.nodes, candidate.name))]
            for position, part in zip(order, pattern.inputs, strict=True):
                edge = Edge(self.graph.name, candidate.name, position)
                partial_matches = [
                    m for partial in partial_matches for m in self.used(edge, candidate.inputs[position], part, partial)
                ]
            yield from partial_matches

    @staticmethod
    def _orders(op: str, count: int) -> list[tuple[int, ...]]:
        """Return the orders in which an op's inputs may match."""
        in_order = tuple(range(count))
        return [in_order, in_order[::-1]] if op in COMMUTATIVE else [in_order]

    def mismatch(self, value: Value, pattern: Pattern) -> Mismatch:
        """Return the furthest mismatch of a value; captures are not compared."""
        computed, _ = self._origin(value, pattern)
        node = self.graph.nodes[computed.node]
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
            current = replace(failed, matched=1 + sum(p.matched for p in parts))
            if (not current.node, current.matched) > (not best.node, best.matched) or best.matched < 0:
                best = current
        return best

"""Values as terms: what they are computed from, through all calls, up to variables and constants.

A value of a function stands for another term on each way to call it. Equal terms are one object, so that functions
which compute the same from the same variables give the same term.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rewriter import constants, ops
from rewriter.dataflow import VARIABLES, VariableKey, call_graph, origins
from rewriter.ir import ARG, MAIN, Attrs, Error, Graph, Model, Node, Value
from rewriter.liveness import Assumption

VARIABLE = "variable"
"""Op of a term that is a variable's resource; `of` is its key."""

UNKNOWN = "unknown"
"""Op of a term that a caller of the model, or a loop, supplies; `of` says which."""

SAME = frozenset({"Enter", "EnsureShape", "Identity", "PreventGradient", "Snapshot", "StopGradient", "Switch"})
"""Ops whose outputs, where they are computed, are the first input."""

PORT = "port"
"""Op of a term that is another output of its input than the first: `port` says which."""

DEEP = 100
"""Calls that are nested deeper than this are not followed."""

WAYS = 16
"""The most ways to call functions, for each node of a model: where each function calls the next twice they double."""


@dataclass(frozen=True, eq=False)
class Term:
    """The first output of an op on other terms; or another output of it, with the op `PORT` and the op's term as input.

    Attributes:
        of: the key of a variable, or what is unknown.
        attrs: the op's attributes, as in the graph.
        node: (graph, node) of where it was first met.
    """

    op: str
    inputs: tuple[Term, ...] = ()
    port: int = 0
    of: str = ""
    attrs: Attrs = field(default_factory=dict)
    node: tuple[str, str] = ("", "")

    @property
    def variable(self) -> str:
        """The key of the variable whose values these are, in this shape or another; "" where it is none's."""
        term = self
        while term.op in constants.VIEWS:
            term = term.inputs[0]
        return term.inputs[0].of if term.op == "ReadVariableOp" and term.inputs[0].op == VARIABLE else ""


def cone(terms: Iterable[Term]) -> Iterator[Term]:
    """Some terms and all that they are computed from, each once, the nearest first."""
    waiting = list(dict.fromkeys(terms))
    seen = set(waiting)
    for term in waiting:
        yield term
        for inner in term.inputs:
            if inner not in seen:
                seen.add(inner)
                waiting.append(inner)


@dataclass(frozen=True, eq=False)
class Bound:
    """What some arguments of a function are, by position. Of equal ones there is one object."""

    terms: Mapping[int, Term]


class _Call(NamedTuple):
    """A function that a node calls, one of its results, and the positions of the arguments that this depends on."""

    callee: Graph
    result: Value
    first: int
    arguments: frozenset[int]


class Terms:
    """The terms of a model's values."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.calls = model.analysis(call_graph)
        self._made: dict[tuple[Any, ...], Term] = {}
        self._bound: dict[tuple[tuple[int, Term], ...], Bound] = {}
        self._passing: dict[tuple[str, str, frozenset[int], Bound], Bound] = {}
        self._known: dict[tuple[str, Bound], dict[Value, Term]] = {}
        self._dependencies: dict[str, dict[str, frozenset[int]]] = {}
        self._assumptions: dict[str, Assumption] = {}
        self._most = 1000 + WAYS * sum(len(g.nodes) for g in model.graphs.values())
        self._ways: dict[tuple[str, frozenset[int]], tuple[Bound, ...]] = {}

    def ways(self, graph: str, values: Collection[Value]) -> tuple[Bound, ...]:
        """What the arguments that some values of a function depend on are, for each way to call it."""
        return self._bounds(graph, self._arguments(self.model.graphs[graph], values))

    def on(self, graph: str, value: Value, way: Bound) -> Term:
        """The term of a value, where the function's arguments are these.

        Raises:
            Error: it is nested too deep.
        """
        return self._term(self.model.graphs[graph], value, way, 0)

    def _bounds(self, name: str, wanted: frozenset[int]) -> tuple[Bound, ...]:
        if not wanted:
            return (self._way({}),)
        if (name, wanted) in self._ways:
            return self._ways[name, wanted]
        found: dict[Bound, None] = {}
        entry = self.model.entries.get(name)
        if entry is not None:
            first = len(entry.inputs)
            captures = [None] * first + list(entry.captures)
            found[self._way({p: self._captured(name, p, captures[p]) for p in sorted(wanted)})] = None
        for call in self.calls.callers.get(name, ()):
            if call.graph == MAIN:
                continue  # what it binds, a concrete function binds; the others save and restore
            outer = self.model.graphs[call.graph]
            node = outer.nodes[call.node]
            inputs = {p: node.inputs[call.first + p] for p in sorted(wanted)}
            changed = self._changed(node)
            for way in self.ways(call.graph, list(inputs.values())):
                terms = {
                    p: self._unknown(f"what a loop changes in {name}") if p in changed else self.on(call.graph, v, way)
                    for p, v in inputs.items()
                }
                found[self._way(terms)] = None
        self._ways[name, wanted] = tuple(found)
        return self._ways[name, wanted]

    def _way(self, terms: dict[int, Term]) -> Bound:
        """Terms by position, in order."""
        if len(self._bound) > self._most:
            raise Error("functions call each other with too many different values to follow")
        return self._bound.setdefault(tuple(terms.items()), Bound(terms))

    def _changed(self, node: Node) -> set[int]:
        """The arguments of a loop's functions that the loop changes."""
        if not ops.call_form_of(self.model, node).carried:
            return set()
        body = self.model.graphs[ops.callees(self.model, node)[-1]]
        return {p for p, r in enumerate(body.results) if r.value != Value(body.arguments[p])}

    def _captured(self, function: str, position: int, capture: str | int | None) -> Term:
        if isinstance(capture, str):
            return self._make(Term(VARIABLE, of=capture))
        constant = None if capture is None else self.model.constants.get(capture)
        if constant is None:
            return self._unknown(f"argument {position} of {function}")
        node = self.model.graphs[MAIN].nodes[constant]
        return self._make(Term(node.op, attrs=node.attrs, node=(MAIN, constant)))

    def _unknown(self, what: str) -> Term:
        return self._make(Term(UNKNOWN, of=what))

    def _make(self, term: Term) -> Term:
        own = (
            (k, v.SerializeToString(deterministic=True)) for k, v in term.attrs.items() if k[0] != "_" or k == ops.PART
        )
        key = (term.op, term.inputs, term.port, term.of, tuple(sorted(own)))
        return self._made.setdefault(key, term)

    def _term(self, graph: Graph, value: Value, way: Bound, depth: int) -> Term:
        if depth > DEEP:
            raise Error(f"what {value.node} in {graph.name} is computed from is nested too deep to be followed")
        known = self._known.setdefault((graph.name, way), {})
        waiting, begun = [value], set[Value]()
        while waiting:
            each = waiting[-1]
            missing = [] if each in known else self._missing(graph, each, way, known)
            if each in known:
                waiting.pop()
            elif not missing:
                known[each] = self._new(graph, each, way, depth)
            elif each in begun:
                known[each] = self._unknown(f"what a loop changes in {graph.name}")
            else:
                begun.add(each)
                waiting += missing
        return known[value]

    def _missing(self, graph: Graph, value: Value, way: Bound, known: Mapping[Value, Term]) -> list[Value]:
        """The values from which a value's term is made, of which there is none yet."""
        called = self._call(graph.nodes[value.node], value.port)
        if called is not None and (graph.name, value.node, called.arguments, way) in self._passing:
            return []
        return [v for v in self._needed(graph, value) if v not in known]

    def _needed(self, graph: Graph, value: Value) -> tuple[Value, ...]:
        """The values of the same graph from which a value's term is made."""
        node = graph.nodes[value.node]
        if node.op in SAME:
            return node.inputs[:1]
        chosen = self._assumed(graph).chosen(node)
        if chosen is not None and not value.port:
            return (chosen,)
        return () if node.op in VARIABLES else tuple(node.inputs[p] for p in self._passed(node, value.port))

    def _passed(self, node: Node, port: int) -> tuple[int, ...]:
        """The inputs of a node on which an output depends: of a call, those that the result is computed from."""
        called = self._call(node, port)
        if called is None:
            return tuple(range(len(node.inputs)))
        return tuple(called.first + p for p in sorted(called.arguments))

    def _call(self, node: Node, port: int) -> _Call | None:
        """What computes an output of a node, where that is a function."""
        form, called = ops.call_form(self.model, node), self._called(node)
        if form is None or len(called) != 1:
            return None
        callee = self.model.graphs[called[0]]
        result = callee.results[port].value
        return _Call(callee, result, form.first, self._arguments(callee, [result]))

    def _called(self, node: Node) -> tuple[str, ...]:
        """The functions that a node may call; of some that compute the same, the one that always does."""
        called = ops.callees(self.model, node)
        general = node.attrs.get(ops.GENERAL_BRANCH) if node.op in ("Case", "StatelessCase") else None
        if general is None or general.WhichOneof("value") != "i" or not 0 <= general.i < len(called):
            return called
        return (called[general.i],)

    def _new(self, graph: Graph, value: Value, way: Bound, depth: int) -> Term:
        node, known = graph.nodes[value.node], self._known[graph.name, way]
        if node.op == ARG:
            (position,) = self._arguments(graph, [value])
            return way.terms.get(position) or self._unknown(f"{node.name} of {graph.name}")
        if node.op in SAME:
            return known[node.inputs[0]]
        if node.op in VARIABLES:
            keys = [o.key for o in origins(self.model, graph.name, value) if isinstance(o, VariableKey)]
            return self._make(Term(VARIABLE, of=keys[0])) if keys else self._unknown(node.name)
        chosen = self._assumed(graph).chosen(node)
        if chosen is not None and not value.port:
            return known[chosen]
        called = self._call(node, value.port)
        if called is not None:
            passing = (graph.name, node.name, called.arguments, way)
            if passing not in self._passing:
                inputs = {p: known[node.inputs[called.first + p]] for p in sorted(called.arguments)}
                self._passing[passing] = self._way(inputs)
            return self._term(called.callee, called.result, self._passing[passing], depth + 1)
        operands = tuple(known[v] for v in node.inputs)
        made = self._make(Term(node.op, operands, attrs=node.attrs, node=(graph.name, node.name)))
        return self._make(Term(PORT, (made,), value.port, node=made.node)) if value.port else made

    def _assumed(self, graph: Graph) -> Assumption:
        if graph.name not in self._assumptions:
            self._assumptions[graph.name] = Assumption(self.model, graph, {})
        return self._assumptions[graph.name]

    def _arguments(self, graph: Graph, values: Collection[Value]) -> frozenset[int]:
        """The positions of the arguments that some values of a graph depend on."""
        if graph.name not in self._dependencies:
            self._dependencies[graph.name] = {a: frozenset([p]) for p, a in enumerate(graph.arguments)}
        known = self._dependencies[graph.name]
        begun: set[str] = set()
        waiting = [v.node for v in values]
        while waiting:
            name = waiting[-1]
            inputs = {v.node for v in graph.nodes[name].inputs}
            missing = [n for n in inputs if n not in known and n not in begun]  # a loop comes back to what is begun
            if name in known or not missing:
                waiting.pop()
                if name not in known:
                    known[name] = _union([known.get(n, frozenset()) for n in inputs])
            else:
                begun.add(name)
                waiting += missing
        return _union([known[v.node] for v in values])


def _union(sets: Sequence[frozenset[int]]) -> frozenset[int]:
    """The union; the largest set itself where it holds the others, as it is in most places where it is large."""
    largest = max(sets, key=len, default=frozenset[int]())
    return largest if all(s is largest or s <= largest for s in sets) else largest.union(*sets)

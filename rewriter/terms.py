"""Values as terms: their symbolic computation, through all calls, up to variables and constants.

A value of a function has a different term for each way to call the function. Equal terms are one object. So functions
that compute the same from the same variables give the same term.
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
"""Op of a term whose value a caller of the model, or a loop, supplies; `of` describes it."""

SAME = frozenset({"Enter", "EnsureShape", "Identity", "PreventGradient", "Snapshot", "StopGradient", "Switch"})
"""Ops whose outputs, if they are computed, are the first input."""

PORT = "port"
"""Op of a term that is output `port` of its input's op, where `port` is not 0."""

DEEP = 100
"""Limit on the nesting of calls; deeper calls are not followed."""

WAYS = 16
"""Limit on ways to call functions, per node of a model: they double where each function calls the next one twice."""


@dataclass(frozen=True, eq=False)
class Term:
    """The first output of an op on other terms; for another output, `op` is `PORT` and the input is the op's term.

    Attributes:
        of: the key of a variable, or a description of an unknown value.
        attrs: the op's attributes, as in the graph.
        node: (graph, node) of its first occurrence.
    """

    op: str
    inputs: tuple[Term, ...] = ()
    port: int = 0
    of: str = ""
    attrs: Attrs = field(default_factory=dict)
    node: tuple[str, str] = ("", "")

    @property
    def variable(self) -> str:
        """Key of the variable whose values these are, perhaps in another shape; "" if there is no such variable."""
        term = self
        while term.op in constants.VIEWS:
            term = term.inputs[0]
        return term.inputs[0].of if term.op == "ReadVariableOp" and term.inputs[0].op == VARIABLE else ""


def cone(terms: Iterable[Term]) -> Iterator[Term]:
    """Yield some terms and all terms that they are computed from, each once, the nearest first."""
    waiting = list(dict.fromkeys(terms))
    visited = set(waiting)
    for term in waiting:
        yield term
        for inner in term.inputs:
            if inner not in visited:
                visited.add(inner)
                waiting.append(inner)


@dataclass(frozen=True, eq=False)
class Bound:
    """Terms of some arguments of a function, by position. Equal ones are one object."""

    terms: Mapping[int, Term]


class _Call(NamedTuple):
    """A call of a function by a node, for one of the function's results.

    Attributes:
        callee: the function.
        result: the value that it returns.
        first: index of the node's first input that is passed on.
        arguments: positions of the arguments that the result depends on.
    """

    callee: Graph
    result: Value
    first: int
    arguments: frozenset[int]


class Terms:
    """The terms of a model's values, computed on demand."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.calls = model.analysis(call_graph)
        self._interned_terms: dict[tuple[Any, ...], Term] = {}
        self._interned_bounds: dict[tuple[tuple[int, Term], ...], Bound] = {}
        self._call_bounds: dict[tuple[str, str, frozenset[int], Bound], Bound] = {}
        self._terms_of: dict[tuple[str, Bound], dict[Value, Term]] = {}
        self._dependencies: dict[str, dict[str, frozenset[int]]] = {}
        self._assumptions: dict[str, Assumption] = {}
        self._max_bounds = 1000 + WAYS * sum(len(g.nodes) for g in model.graphs.values())
        self._bounds_of: dict[tuple[str, frozenset[int]], tuple[Bound, ...]] = {}

    def ways(self, graph: str, values: Collection[Value]) -> tuple[Bound, ...]:
        """Return the terms of the arguments that some values of a function depend on, for each way to call it."""
        return self._bounds(graph, self._arguments(self.model.graphs[graph], values))

    def on(self, graph: str, value: Value, bound: Bound) -> Term:
        """Return the term of a value for given terms of the function's arguments.

        Raises:
            Error: calls are nested too deep.
        """
        return self._term(self.model.graphs[graph], value, bound, 0)

    def _bounds(self, name: str, positions: frozenset[int]) -> tuple[Bound, ...]:
        if not positions:
            return (self._intern_bound({}),)
        if (name, positions) in self._bounds_of:
            return self._bounds_of[name, positions]
        bounds: dict[Bound, None] = {}
        entry = self.model.entries.get(name)
        if entry is not None:
            first = len(entry.inputs)
            captures = [None] * first + list(entry.captures)
            bounds[self._intern_bound({p: self._captured(name, p, captures[p]) for p in sorted(positions)})] = None
        for call in self.calls.callers.get(name, ()):
            if call.graph == MAIN and self.model.object_based:
                continue  # concrete functions cover its calls: their captures; its other calls save and restore
            caller = self.model.graphs[call.graph]
            node = caller.nodes[call.node]
            inputs = {p: node.inputs[call.first + p] for p in sorted(positions)}
            changed = self._changed_by_loop(node)
            for bound in self.ways(call.graph, list(inputs.values())):
                terms = {
                    p: self._unknown(f"what a loop changes in {name}")
                    if p in changed
                    else self.on(call.graph, v, bound)
                    for p, v in inputs.items()
                }
                bounds[self._intern_bound(terms)] = None
        self._bounds_of[name, positions] = tuple(bounds)
        return self._bounds_of[name, positions]

    def _intern_bound(self, terms: dict[int, Term]) -> Bound:
        """Return the one `Bound` object of these terms, whose positions are in order.

        Raises:
            Error: there are too many.
        """
        if len(self._interned_bounds) > self._max_bounds:
            raise Error("functions call each other with too many different values to follow")
        return self._interned_bounds.setdefault(tuple(terms.items()), Bound(terms))

    def _changed_by_loop(self, node: Node) -> set[int]:
        """Return the positions of the loop variables that a loop changes; empty for other calls."""
        if not ops.call_form_of(self.model, node).carried:
            return set()
        body = self.model.graphs[ops.callees(self.model, node)[-1]]
        return {p for p, r in enumerate(body.results) if r.value != Value(body.arguments[p])}

    def _captured(self, function: str, position: int, capture: str | int | None) -> Term:
        """Return the term of a concrete function's argument: of a variable or a constant, if it captures one."""
        if isinstance(capture, str):
            return self._intern(Term(VARIABLE, of=capture))
        constant = None if capture is None else self.model.constants.get(capture)
        if constant is None:
            return self._unknown(f"argument {position} of {function}")
        node = self.model.graphs[MAIN].nodes[constant]
        return self._intern(Term(node.op, attrs=node.attrs, node=(MAIN, constant)))

    def _unknown(self, what: str) -> Term:
        return self._intern(Term(UNKNOWN, of=what))

    def _intern(self, term: Term) -> Term:
        """Return the one object of terms equal to this one; internal attributes other than `ops.LABEL` do not count."""
        attrs = (
            (k, v.SerializeToString(deterministic=True)) for k, v in term.attrs.items() if k[0] != "_" or k == ops.LABEL
        )
        key = (term.op, term.inputs, term.port, term.of, tuple(sorted(attrs)))
        return self._interned_terms.setdefault(key, term)

    def _term(self, graph: Graph, value: Value, bound: Bound, depth: int) -> Term:
        """Return the term of a value inside `depth` nested calls.

        Raises:
            Error: calls are nested too deep.
        """
        if depth > DEEP:
            raise Error(f"what {value.node} in {graph.name} is computed from is nested too deep to be followed")
        terms = self._terms_of.setdefault((graph.name, bound), {})
        # A chain within a graph may be longer than Python's recursion limit, so it is followed by a stack. Calls are
        # followed by recursion, as `DEEP` limits their nesting.
        waiting, started = [value], set[Value]()
        while waiting:
            current = waiting[-1]
            missing = [] if current in terms else self._missing(graph, current, bound, terms)
            if current in terms:
                waiting.pop()
            elif not missing:
                terms[current] = self._build(graph, current, bound, depth)
            elif current in started:
                # It asked for its sources before, and they are still missing: it depends on itself.
                terms[current] = self._unknown(f"what a loop changes in {graph.name}")
            else:
                started.add(current)
                waiting += missing
        return terms[value]

    def _missing(self, graph: Graph, value: Value, bound: Bound, terms: Mapping[Value, Term]) -> list[Value]:
        """Return the values whose terms are still needed for a value's term."""
        call = self._call(graph.nodes[value.node], value.port)
        # Another result of the call depends on the same arguments, whose terms are bound already.
        if call is not None and (graph.name, value.node, call.arguments, bound) in self._call_bounds:
            return []
        return [v for v in self._sources(graph, value) if v not in terms]

    def _sources(self, graph: Graph, value: Value) -> tuple[Value, ...]:
        """Return the values of the same graph from which a value's term is built."""
        node = graph.nodes[value.node]
        if node.op in SAME:
            return node.inputs[:1]
        chosen = self._assumption(graph).chosen(node)
        if chosen is not None and not value.port:
            return (chosen,)
        return () if node.op in VARIABLES else tuple(node.inputs[p] for p in self._used_inputs(node, value.port))

    def _used_inputs(self, node: Node, port: int) -> tuple[int, ...]:
        """Return the positions of a node's inputs that an output depends on; for a call, those that its result uses."""
        call = self._call(node, port)
        if call is None:
            return tuple(range(len(node.inputs)))
        return tuple(call.first + p for p in sorted(call.arguments))

    def _call(self, node: Node, port: int) -> _Call | None:
        """Return the call that computes an output of a node; None if the node does not call exactly one function."""
        form, callees = ops.call_form(self.model, node), self._possible_callees(node)
        if form is None or len(callees) != 1:
            return None
        callee = self.model.graphs[callees[0]]
        result = callee.results[port].value
        return _Call(callee, result, form.first, self._arguments(callee, [result]))

    def _possible_callees(self, node: Node) -> tuple[str, ...]:
        """Return the functions that a node may call; if they compute the same, only the one that is always right."""
        callees = ops.callees(self.model, node)
        general = node.attrs.get(ops.GENERAL_BRANCH) if node.op in ("Case", "StatelessCase") else None
        # The attribute comes from a file: it may be of any kind, or name a branch that does not exist.
        if general is None or general.WhichOneof("value") != "i" or not 0 <= general.i < len(callees):
            return callees
        return (callees[general.i],)

    def _build(self, graph: Graph, value: Value, bound: Bound, depth: int) -> Term:
        """Build the term of a value from the terms of its sources, which exist already."""
        node, terms = graph.nodes[value.node], self._terms_of[graph.name, bound]
        if node.op == ARG:
            (position,) = self._arguments(graph, [value])
            return bound.terms.get(position) or self._unknown(f"{node.name} of {graph.name}")
        if node.op in SAME:
            return terms[node.inputs[0]]
        if node.op in VARIABLES:
            keys = [o.key for o in origins(self.model, graph.name, value) if isinstance(o, VariableKey)]
            return self._intern(Term(VARIABLE, of=keys[0])) if keys else self._unknown(node.name)
        chosen = self._assumption(graph).chosen(node)
        if chosen is not None and not value.port:
            return terms[chosen]
        call = self._call(node, value.port)
        if call is not None:
            passing = (graph.name, node.name, call.arguments, bound)
            if passing not in self._call_bounds:
                inputs = {p: terms[node.inputs[call.first + p]] for p in sorted(call.arguments)}
                self._call_bounds[passing] = self._intern_bound(inputs)
            return self._term(call.callee, call.result, self._call_bounds[passing], depth + 1)
        operands = tuple(terms[v] for v in node.inputs)
        term = self._intern(Term(node.op, operands, attrs=node.attrs, node=(graph.name, node.name)))
        return self._intern(Term(PORT, (term,), value.port, node=term.node)) if value.port else term

    def _assumption(self, graph: Graph) -> Assumption:
        if graph.name not in self._assumptions:
            self._assumptions[graph.name] = Assumption(self.model, graph, {})
        return self._assumptions[graph.name]

    def _arguments(self, graph: Graph, values: Collection[Value]) -> frozenset[int]:
        """Return the positions of the arguments that some values of a graph depend on."""
        if graph.name not in self._dependencies:
            self._dependencies[graph.name] = {a: frozenset([p]) for p, a in enumerate(graph.arguments)}
        dependencies = self._dependencies[graph.name]
        started: set[str] = set()
        waiting = [v.node for v in values]
        while waiting:
            name = waiting[-1]
            inputs = {v.node for v in graph.nodes[name].inputs}
            # A loop leads back to a node that is started already.
            missing = [n for n in inputs if n not in dependencies and n not in started]
            if name in dependencies or not missing:
                waiting.pop()
                if name not in dependencies:
                    dependencies[name] = _union([dependencies.get(n, frozenset()) for n in inputs])
            else:
                started.add(name)
                waiting += missing
        return _union([dependencies[v.node] for v in values])


def _union(sets: Sequence[frozenset[int]]) -> frozenset[int]:
    """Return the union; the largest set itself if it contains the others, as is usual where it is large."""
    largest = max(sets, key=len, default=frozenset[int]())
    return largest if all(s is largest or s <= largest for s in sets) else largest.union(*sets)

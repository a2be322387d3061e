"""Who calls whom, and where a value comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import networkx as nx

from rewriter import op_defs, ops, protos
from rewriter.ir import ARG, MAIN, Edge, Entry, Error, Graph, Model, Node, Value

REFERENCES = ("VariableV2", "Variable")
"""Ops that make a variable as TensorFlow 1 had it: a tensor that others refer to."""

VARIABLES = ("VarHandleOp", *REFERENCES)
"""Ops that make a variable: a resource or a reference."""


class Call(NamedTuple):
    """One node that calls one function. A node with several callees gives several calls."""

    graph: str
    node: str
    callee: str
    first: int


class Constant(NamedTuple):
    """Origin: a constant in the graph, by its node."""

    graph: str
    node: str


class Argument(NamedTuple):
    """Origin: an argument of a graph; as a final origin, one that a caller of the model supplies."""

    graph: str
    position: int


class Computed(NamedTuple):
    """Origin: the output of an op that computes something."""

    graph: str
    node: str
    op: str


class Captured(NamedTuple):
    """Origin: a captured object other than a variable, by its number in the object graph."""

    number: int


class VariableKey(NamedTuple):
    """Origin: a variable, by its checkpoint key."""

    key: str


Origin = VariableKey | Constant | Argument | Computed | Captured


@dataclass(frozen=True)
class CallGraph:
    """All calls of a model.

    Attributes:
        callers: calls by callee.
        calls: calls by calling graph.
        opaque: functions that an op other than a call refers to (a dataset's map function, say): they
            cannot be given further arguments.
        digraph: calling graph -> callee.
    """

    callers: Mapping[str, list[Call]]
    calls: Mapping[str, list[Call]]
    opaque: frozenset[str]
    digraph: nx.DiGraph[str]

    def reached(self, graph: str) -> set[str]:
        """This graph and all that it calls, directly or not."""
        return {graph, *nx.descendants(self.digraph, graph)}

    def reaching(self, graph: str) -> set[str]:
        """All graphs that call this one, directly or not."""
        return set(nx.ancestors(self.digraph, graph))


def consumers(_: Model, graph: Graph) -> Mapping[Value, list[Edge]]:
    """All uses of each value of a graph (to be memoised)."""
    return graph.consumers()


def following(_: Model, graph: Graph) -> Mapping[str, list[Node]]:
    """The nodes that run after each node, by control inputs."""
    found: dict[str, list[Node]] = {}
    for node in graph.nodes.values():
        for name in node.after:
            found.setdefault(name, []).append(node)
    return found


def call_graph(model: Model) -> CallGraph:
    """The call graph of a model.

    Raises:
        Error: a function calls itself, directly or not.
    """
    digraph: nx.DiGraph[str] = nx.DiGraph()
    digraph.add_nodes_from(model.graphs)
    callers: dict[str, list[Call]] = {}
    calls: dict[str, list[Call]] = {}
    opaque: set[str] = set()
    for graph in model.graphs.values():
        found, referred = model.analysis_of(graph, _calls_in)
        opaque |= referred
        if found:
            calls[graph.name] = found
        for call in found:
            if call.callee not in model.graphs:
                raise Error(f"node {call.node} calls the function {call.callee}, which the model does not hold")
            callers.setdefault(call.callee, []).append(call)
            digraph.add_edge(graph.name, call.callee)
    if not nx.is_directed_acyclic_graph(digraph):
        cycle = nx.find_cycle(digraph)
        raise Error(f"the function {cycle[0][0]} calls itself; recursive functions are not supported")
    for name in list(opaque & set(digraph)):
        opaque |= nx.descendants(digraph, name)
    return CallGraph(callers, calls, frozenset(opaque), digraph)


def running(model: Model) -> frozenset[str]:
    """The graphs that can run: the main graph, the concrete functions, and what they call."""
    calls = model.analysis(call_graph)
    return frozenset().union(*(calls.reached(name) for name in (MAIN, *model.entries))) | calls.opaque


def _calls_in(model: Model, graph: Graph) -> tuple[list[Call], set[str]]:
    """The calls of a graph, and the functions to which ops other than calls refer."""
    found: list[Call] = []
    referred: set[str] = set()
    for node in graph.nodes.values():
        if op_defs.refers_to_functions(node.op):
            form = ops.call_form(model, node)
            if form is None:
                referred.update(f for a in node.attrs.values() for f in protos.functions_in(a))
            else:
                found += [Call(graph.name, node.name, callee, form.first) for callee in ops.callees(model, node)]
    return found, referred


def gradient_kinds(graph: Graph) -> list[str]:
    """The kinds of the nodes that have gradients of their own, in the order of the nodes."""
    return [protos.text(node.attrs[ops.GRADIENT].s) for node in graph.nodes.values() if ops.GRADIENT in node.attrs]


def captures(model: Model, graph: Graph) -> bool:
    """Whether a graph holds an op with a gradient of its own that captures tensors, which are those of this graph."""
    entries = (model.entries.get(model.gradients[k].function) for k in gradient_kinds(graph) if k in model.gradients)
    return any(isinstance(c, int) for entry in entries if entry is not None for c in entry.captures)


def referred(model: Model, graph: Graph) -> frozenset[str]:
    """The functions of a model that a graph calls or refers to otherwise."""
    found, others = model.analysis_of(graph, _calls_in)
    return frozenset(call.callee for call in found) | (others & model.graphs.keys())


def follow(model: Model, graph: Graph, value: Value) -> Origin:
    """Where a value comes from within its graph; through forwarding ops, and through calls and back."""
    while True:
        node = graph.nodes[value.node]
        if node.op == ARG:
            return Argument(graph.name, model.analysis_of(graph, _positions)[node.name])
        passed = ops.forwarded(node, value.port)
        if passed is not None:
            value = passed
            continue
        if node.op == "Const":
            return Constant(graph.name, node.name)
        if node.op in VARIABLES:
            return _handle_origin(model, graph, node)
        form = ops.call_form(model, node)
        called = ops.callees(model, node)
        if form is None or (len(called) != 1 and not form.carried):
            return Computed(graph.name, node.name, node.op)
        callee = model.graphs[called[-1]]
        inside = follow(model, callee, callee.results[value.port].value)
        if form.carried and inside != Argument(callee.name, value.port):
            return Computed(graph.name, node.name, node.op)  # what a loop's body returns is not what it was given
        if not isinstance(inside, Argument):
            return inside
        value = node.inputs[form.first + inside.position]


def _positions(_: Model, graph: Graph) -> Mapping[str, int]:
    return {name: position for position, name in enumerate(graph.arguments)}


def _handle_origin(model: Model, graph: Graph, node: Node) -> Origin:
    """A node that makes a variable is the one that concrete functions bind where the main graph passes it."""
    found = model.analysis(_variables_of_handles).get(node.name)
    return VariableKey(found) if found and graph.name == MAIN else Computed(graph.name, node.name, node.op)


def _variables_of_handles(model: Model) -> Mapping[str, str]:
    found = {v.node: key for key, v in model.variables.items() if v.node}
    main = model.graphs[MAIN]
    for node in main.nodes.values():
        shared = protos.text(op_defs.attribute(node, "shared_name").s) if node.op == "VarHandleOp" else ""
        if shared in model.variables:
            found[node.name] = shared  # as new variables are made
    for call in model.analysis(call_graph).calls.get(MAIN, []):
        entry = model.entries.get(call.callee)
        if entry is not None:
            bound = main.nodes[call.node].inputs[call.first + len(entry.inputs) :]
            for value, capture in zip(bound, entry.captures, strict=True):
                if isinstance(capture, str):
                    found[value.node] = capture
    return found


def bindings(model: Model, graph: str, values: tuple[Value, ...]) -> frozenset[tuple[Origin, ...]]:
    """Where several values of one graph come from, together: one tuple for each way to get there.

    A function that is called with different variables has as many tuples; each keeps the variables of one
    call together, which the sets of `origins` would mix.
    """
    return _resolve(model, graph, tuple(follow(model, model.graphs[graph], v) for v in values))


Origins = tuple[Origin, ...]


def _resolved(_: Model) -> dict[tuple[str, Origins], frozenset[Origins]]:
    """What was resolved already."""
    return {}


def _resolve(model: Model, graph: str, local: Origins) -> frozenset[Origins]:
    if not any(isinstance(o, Argument) for o in local):
        return frozenset([local])
    memo = model.analysis(_resolved)
    key = (graph, local)
    if key in memo:
        return memo[key]
    found: set[Origins] = set()
    entry = model.entries.get(graph)
    if entry is not None:
        found.add(tuple(_bound(entry, o) if isinstance(o, Argument) else o for o in local))
    for call in model.analysis(call_graph).callers.get(graph, []):
        if entry is not None and call.graph == MAIN:
            continue  # the main graph binds what the concrete function binds
        outer = model.graphs[call.graph]
        node = outer.nodes[call.node]
        if _changed_by_loop(model, node, local):
            found.add(local)
            continue
        found |= _resolve(
            model,
            call.graph,
            tuple(
                follow(model, outer, node.inputs[call.first + o.position]) if isinstance(o, Argument) else o
                for o in local
            ),
        )
    memo[key] = frozenset(found or {local})
    return memo[key]


def _changed_by_loop(model: Model, node: Node, local: Origins) -> bool:
    """Whether a loop's body returns another value than it was given for one of these arguments."""
    if not ops.call_form_of(model, node).carried:
        return False
    body = model.graphs[ops.callees(model, node)[-1]]
    positions = [o.position for o in local if isinstance(o, Argument)]
    return any(follow(model, body, body.results[p].value) != Argument(body.name, p) for p in positions)


def _bound(entry: Entry, argument: Argument) -> Origin:
    if argument.position < len(entry.inputs):
        return argument
    capture = entry.captures[argument.position - len(entry.inputs)]
    return VariableKey(capture) if isinstance(capture, str) else Captured(capture)


def origins(model: Model, graph: str, value: Value) -> frozenset[Origin]:
    """Where one value may come from."""
    memo = model.analysis(_origins)
    if (graph, value) not in memo:
        memo[graph, value] = frozenset(o for (o,) in bindings(model, graph, (value,)))
    return memo[graph, value]


def _origins(_: Model) -> dict[tuple[str, Value], frozenset[Origin]]:
    """What is known already."""
    return {}

"""The call graph of a model, and the origins of its values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import networkx as nx

from rewriter import op_defs, ops, protos
from rewriter.ir import ARG, MAIN, Edge, Entry, Error, Graph, Model, Node, Value

REFERENCES = ("VariableV2", "Variable")
"""Ops that make a reference variable of TensorFlow 1: a tensor that other ops refer to."""

VARIABLES = ("VarHandleOp", *REFERENCES)
"""Ops that make a variable, as a resource or a reference."""


class Call(NamedTuple):
    """One call of one function by one node. A node with several callees makes several calls.

    Attributes:
        graph: the calling graph.
        node: the calling node.
        callee: the function that it calls.
        first: index of the node's first input that is passed to the function.
    """

    graph: str
    node: str
    callee: str
    first: int


class Constant(NamedTuple):
    """Origin: a constant in the graph, by its node."""

    graph: str
    node: str


class Argument(NamedTuple):
    """Origin: an argument of a graph; as a final origin, an argument that a caller of the model supplies."""

    graph: str
    position: int


class Computed(NamedTuple):
    """Origin: an output of an op that computes something."""

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
        opaque: functions that an op other than a call refers to, such as a dataset's map function. They cannot be
            given further arguments.
        digraph: calling graph -> callee.
    """

    callers: Mapping[str, list[Call]]
    calls: Mapping[str, list[Call]]
    opaque: frozenset[str]
    digraph: nx.DiGraph[str]

    def reached(self, graph: str) -> set[str]:
        """Return a graph and all graphs that it calls, directly or not."""
        return {graph, *nx.descendants(self.digraph, graph)}

    def reaching(self, graph: str) -> set[str]:
        """Return all graphs that call a graph, directly or not."""
        return set(nx.ancestors(self.digraph, graph))


def consumers(_: Model, graph: Graph) -> Mapping[Value, list[Edge]]:
    """Return all uses of each value of a graph, in the form that `Model.analysis_of` takes."""
    return graph.consumers()


def following(_: Model, graph: Graph) -> Mapping[str, list[Node]]:
    """Return the nodes that each node precedes by a control input."""
    followers: dict[str, list[Node]] = {}
    for node in graph.nodes.values():
        for name in node.after:
            followers.setdefault(name, []).append(node)
    return followers


def call_graph(model: Model) -> CallGraph:
    """Return the call graph of a model.

    Raises:
        Error: a function calls itself, directly or not, or a call's function is not in the model.
    """
    digraph: nx.DiGraph[str] = nx.DiGraph()
    digraph.add_nodes_from(model.graphs)
    callers: dict[str, list[Call]] = {}
    calls: dict[str, list[Call]] = {}
    opaque: set[str] = set()
    for graph in model.graphs.values():
        graph_calls, references = model.analysis_of(graph, _calls_in)
        opaque |= references
        if graph_calls:
            calls[graph.name] = graph_calls
        for call in graph_calls:
            if call.callee not in model.graphs:
                raise Error(f"node {call.node} calls the function {call.callee}, which the model does not hold")
            callers.setdefault(call.callee, []).append(call)
            digraph.add_edge(graph.name, call.callee)
    if not nx.is_directed_acyclic_graph(digraph):
        cycle = nx.find_cycle(digraph)
        raise Error(f"the function {cycle[0][0]} calls itself; recursive functions are not supported")
    # An opaque function cannot take further arguments to pass on, so its callees cannot be given any either.
    for name in list(opaque & set(digraph)):
        opaque |= nx.descendants(digraph, name)
    return CallGraph(callers, calls, frozenset(opaque), digraph)


def running(model: Model) -> frozenset[str]:
    """Return the graphs that can run: main graph, concrete functions, all their callees, opaque functions."""
    calls = model.analysis(call_graph)
    return frozenset().union(*(calls.reached(name) for name in (MAIN, *model.entries))) | calls.opaque


def _calls_in(model: Model, graph: Graph) -> tuple[list[Call], set[str]]:
    """Return the calls in a graph, and the functions to which its other ops refer."""
    calls: list[Call] = []
    references: set[str] = set()
    for node in graph.nodes.values():
        if op_defs.refers_to_functions(node.op):
            form = ops.call_form(model, node)
            if form is None:
                references.update(f for a in node.attrs.values() for f in protos.functions_in(a))
            else:
                calls += [Call(graph.name, node.name, callee, form.first) for callee in ops.callees(model, node)]
    return calls, references


def gradient_kinds(graph: Graph) -> list[str]:
    """Return the kinds of the nodes that have custom gradients, in the order of the nodes."""
    return [protos.text(node.attrs[ops.GRADIENT].s) for node in graph.nodes.values() if ops.GRADIENT in node.attrs]


def captures(model: Model, graph: Graph) -> bool:
    """Return true if a graph has an op whose custom gradient captures tensors; these are tensors of this graph."""
    entries = (model.entries.get(model.gradients[k].function) for k in gradient_kinds(graph) if k in model.gradients)
    return any(isinstance(c, int) for entry in entries if entry is not None for c in entry.captures)


def referred(model: Model, graph: Graph) -> frozenset[str]:
    """Return the functions of a model that a graph calls or otherwise refers to."""
    calls, references = model.analysis_of(graph, _calls_in)
    return frozenset(call.callee for call in calls) | (references & model.graphs.keys())


def follow(model: Model, graph: Graph, value: Value) -> Origin:
    """Return the origin of a value within its graph, through forwarding ops, and through calls and back."""
    while True:
        node = graph.nodes[value.node]
        if node.op == ARG:
            return Argument(graph.name, model.analysis_of(graph, _positions)[node.name])
        source = ops.forwarded(node, value.port)
        if source is not None:
            value = source
            continue
        if node.op == "Const":
            return Constant(graph.name, node.name)
        if node.op in VARIABLES:
            return _handle_origin(model, graph, node)
        form = ops.call_form(model, node)
        called_names = ops.callees(model, node)
        if form is None or (len(called_names) != 1 and not form.carried):
            return Computed(graph.name, node.name, node.op)
        # The last callee of a loop is its body.
        callee = model.graphs[called_names[-1]]
        inner_origin = follow(model, callee, callee.results[value.port].value)
        if form.carried and inner_origin != Argument(callee.name, value.port):
            return Computed(graph.name, node.name, node.op)  # the loop's body returns another value than it takes
        if not isinstance(inner_origin, Argument):
            return inner_origin
        value = node.inputs[form.first + inner_origin.position]


def _positions(_: Model, graph: Graph) -> Mapping[str, int]:
    return {name: position for position, name in enumerate(graph.arguments)}


def _handle_origin(model: Model, graph: Graph, node: Node) -> Origin:
    """Return the variable that a node of the main graph makes, if it is known; else the node as a computation."""
    key = model.analysis(_variables_of_handles).get(node.name)
    return VariableKey(key) if key and graph.name == MAIN else Computed(graph.name, node.name, node.op)


def _variables_of_handles(model: Model) -> Mapping[str, str]:
    """Return the keys of variables by the nodes of the main graph that make them.

    A node makes the variable that a concrete function captures where the main graph passes this node's output.
    """
    keys = {v.node: key for key, v in model.variables.items() if v.node}
    main = model.graphs[MAIN]
    for node in main.nodes.values():
        shared_name = protos.text(op_defs.attribute(node, "shared_name").s) if node.op == "VarHandleOp" else ""
        if shared_name in model.variables:
            keys[node.name] = shared_name  # `draft.var_handle` makes variables like this
    for call in model.analysis(call_graph).calls.get(MAIN, []):
        entry = model.entries.get(call.callee)
        if entry is not None:
            bound_values = main.nodes[call.node].inputs[call.first + len(entry.inputs) :]
            for value, capture in zip(bound_values, entry.captures, strict=True):
                if isinstance(capture, str):
                    keys[value.node] = capture
    return keys


def bindings(model: Model, graph: str, values: tuple[Value, ...]) -> frozenset[tuple[Origin, ...]]:
    """Return the joint origins of several values of one graph: one tuple for each chain of calls with other origins.

    A function that is called with different variables has several tuples. Each keeps the variables of one call
    together; the sets of `origins` would mix them.
    """
    return _resolve(model, graph, tuple(follow(model, model.graphs[graph], v) for v in values))


Origins = tuple[Origin, ...]


def _bindings_memo(_: Model) -> dict[tuple[str, Origins], frozenset[Origins]]:
    """Return an empty memo of `_resolve`, which fills it."""
    return {}


def _resolve(model: Model, graph: str, local: Origins) -> frozenset[Origins]:
    """Return local origins with the arguments among them replaced by the origins that callers pass, for each call."""
    if not any(isinstance(o, Argument) for o in local):
        return frozenset([local])
    memo = model.analysis(_bindings_memo)
    key = (graph, local)
    if key in memo:
        return memo[key]
    resolved: set[Origins] = set()
    entry = model.entries.get(graph)
    if entry is not None:
        resolved.add(tuple(_bound(entry, o) if isinstance(o, Argument) else o for o in local))
    for call in model.analysis(call_graph).callers.get(graph, []):
        if entry is not None and call.graph == MAIN:
            continue  # the main graph passes the variables that the concrete function captures
        caller = model.graphs[call.graph]
        node = caller.nodes[call.node]
        # Such a value differs between iterations, so the argument itself is the origin.
        if _changed_by_loop(model, node, local):
            resolved.add(local)
            continue
        resolved |= _resolve(
            model,
            call.graph,
            tuple(
                follow(model, caller, node.inputs[call.first + o.position]) if isinstance(o, Argument) else o
                for o in local
            ),
        )
    # If nothing calls the function, its arguments are the origins.
    memo[key] = frozenset(resolved or {local})
    return memo[key]


def _changed_by_loop(model: Model, node: Node, local: Origins) -> bool:
    """Return true if a call is a loop whose body returns another value than it takes for one of these arguments."""
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
    """Return the possible origins of one value."""
    memo = model.analysis(_origins_memo)
    if (graph, value) not in memo:
        memo[graph, value] = frozenset(o for (o,) in bindings(model, graph, (value,)))
    return memo[graph, value]


def _origins_memo(_: Model) -> dict[tuple[str, Value], frozenset[Origin]]:
    """Return an empty memo of `origins`, which fills it."""
    return {}

"""Updates of moving averages by a batch's statistics, in every form that TensorFlow's libraries write.

- the kernel's own: its output is assigned;
- ``AssignSub(m, (m - b) * (1 - d))``, ``Assign(m, d * m + (1 - d) * b)``, and what is equal to them, on
  resources and on references, inside branches of If and behind Switch and Merge;
- zero-debiased: a biased average is kept so, read again, and the moving average assigned from it.

In all of them a statistic passes through elementwise ops into an assignment, beside the batch norm that it normalises.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from rewriter import constants, op_defs, ops
from rewriter.dataflow import VariableKey, call_graph, consumers, following, origins
from rewriter.ir import ARG, MAIN, Edge, Graph, Model, Node, Value
from rewriter.pattern import origin
from rewriter.sweep import FED, held

ARITHMETIC = frozenset({"Add", "AddV2", "Div", "Mul", "Neg", "Pow", "RealDiv", "Sub"})
READS = frozenset({"Identity", "ReadVariableOp"})
ASSIGNING = ("Assign", "ResourceScatter", "ResourceApply")
"""Beginnings of the names of ops that change the variable that is their first input."""


@dataclass(frozen=True)
class Update:
    """The updates that one statistic enters.

    Attributes:
        edges: the edges at which it enters the arithmetic of an average, or an assignment.
        runs: (graph, node) of the assignments, or of calls that run them, in the outermost graph that was met.
        targets: the assigned variables, as (graph, resource or reference), the moving average last.
        assigns: (graph, node) of the assignments, in the order of the targets.
        weight: the constant with which the statistic enters; None where it is not one.
        proxies: (graph, node) of the quantisers on the way.
    """

    edges: tuple[Edge, ...] = ()
    runs: tuple[tuple[str, str], ...] = ()
    targets: tuple[tuple[str, Value], ...] = ()
    assigns: tuple[tuple[str, str], ...] = ()
    weight: float | None = None
    proxies: tuple[tuple[str, str], ...] = ()


class _Reached(NamedTuple):
    """An assignment that a statistic reaches: its edge of entry, its run, its variable, and the assigning node."""

    entered: Edge
    run: tuple[str, str]
    target: tuple[str, Value]
    assign: tuple[str, str]


Calls = tuple[tuple[str, str], ...]
"""The calls, as (graph, node), that lead from the statistic's graph to where the walk is."""


def update(
    model: Model, graph: Graph, statistic: Value, calls: Calls = (), normalising: frozenset[Edge] = frozenset()
) -> Update:
    """Return the updates that a statistic of a graph enters, when the graph is called by `calls`.

    The edges in `normalising` are those by which it enters the batch norm itself.
    """
    walk = _Walk(model, normalising)
    reached = tuple(dict.fromkeys(walk.from_value(graph, statistic, None, calls)))
    edges = tuple(dict.fromkeys(r.entered for r in reached))
    weights = [w for w in (_weight(model, e) for e in edges) if w is not None]
    return Update(
        edges,
        tuple(dict.fromkeys(r.run for r in reached)),
        tuple(dict.fromkeys(r.target for r in reached)),
        tuple(dict.fromkeys(r.assign for r in reached)),
        weights[0] if weights else None,
        tuple(walk.proxies),
    )


def averaged(model: Model, graph: Graph, value: Value) -> bool:
    """Return true if a value is computed from a moving average by arithmetic alone."""
    waiting, visited = [value], set[Value]()
    while waiting:
        source = origin(graph, waiting.pop())
        if source in visited:
            continue
        visited.add(source)
        node = graph.nodes[source.node]
        if node.op in ARITHMETIC or node.op in ("Maximum", "Minimum"):
            waiting += node.inputs
        elif any(isinstance(o, VariableKey) for o in origins(model, graph.name, source)):
            return True
    return False


def assigned(model: Model, graph: Graph, edge: Edge) -> bool:
    """Return true if the value used at an edge enters an average there."""
    user = graph.nodes[edge.node]
    if user.op.startswith("Assign"):
        return True
    return user.op in ARITHMETIC and any(_Walk(model).from_value(graph, Value(user.name), edge, ()))


def updates_of(model: Model, key: str) -> Iterator[tuple[str, str]]:
    """Yield (graph, node) of the assignments of a variable from inputs or variables.

    Assignments of initial and restored values are none of them.
    """
    for graph in model.graphs.values():
        for node in graph.nodes.values():
            assigns = node.op.startswith(ASSIGNING) and VariableKey(key) in origins(model, graph.name, node.inputs[0])
            if assigns and any(_from_data(graph, value.node) for value in node.inputs[1:]):
                yield graph.name, node.name


def _from_data(graph: Graph, start: str) -> bool:
    """Return true if a value is computed from what is fed or from a variable, and not read from a file."""
    waiting, visited, from_data = [start], set[str](), False
    while waiting:
        node = graph.nodes[waiting.pop()]
        if node.name not in visited:
            visited.add(node.name)
            if node.op.startswith("Restore"):
                return False
            from_data |= node.op in FED or node.op == "ReadVariableOp"
            waiting += [v.node for v in node.inputs]
    return from_data


def shown(graph: Graph, user: Node, position: int) -> bool:
    """Return true if a node's outputs are the value that comes in here, perhaps in another shape or dtype."""
    return position == 0 and (user.op in ("Cast", "Identity", "Switch") or constants.viewed(graph, user) is not None)


def only_assigned(model: Model, graph: Graph, edge: Edge, unused: Collection[int] = ()) -> bool:
    """Return true if the value used at an edge enters averages there, and nothing else.

    Results of the graph at the positions `unused` do not count.
    """
    user = graph.nodes.get(edge.node)
    if user is None:
        return edge.position in unused or _callers_only_assign(model, graph, edge.position)
    if user.op.startswith("Assign"):
        return True
    uses = model.analysis_of(graph, consumers)
    outputs = [Value(user.name, port) for port in range(op_defs.output_count(model, user))]
    is_choice = user.op in ops.CHOICES and edge.position >= ops.CHOICES[user.op]
    # OptionalFromValue wraps what a branch returns for the gradient of its conditional alone.
    if is_choice or user.op in (*ARITHMETIC, "OptionalFromValue") or shown(graph, user, edge.position):
        following_uses = [e for value in outputs for e in uses.get(value, ())]
        # A value that leads nowhere enters no average.
        return bool(following_uses) and all(only_assigned(model, graph, e, unused) for e in following_uses)
    form = ops.call_form(model, user)
    if form is None or form.carried or edge.position < form.first:
        return False
    inner = []
    for name in ops.callees(model, user):
        callee = model.graphs[name]
        argument = Value(callee.arguments[edge.position - form.first])
        inner += [(callee, e) for e in model.analysis_of(callee, consumers).get(argument, ())]
    ignored = [
        value.port
        for value in outputs
        if _nothing_uses(model, graph, value)
        or (value in uses and all(only_assigned(model, graph, e, unused) for e in uses[value]))
    ]
    return bool(inner) and all(only_assigned(model, callee, e, ignored) for callee, e in inner)


def _callers_only_assign(model: Model, graph: Graph, position: int) -> bool:
    """Return true if a result of a function enters averages wherever it is called, and nothing else."""
    callers = model.analysis(call_graph).callers.get(graph.name, ())
    edges = [
        (outer, edge)
        for outer, value in ((model.graphs[call.graph], Value(call.node, position)) for call in callers)
        for edge in model.analysis_of(outer, consumers).get(value, ())
    ]
    is_entry = graph.name in model.entries or graph.name == MAIN
    return bool(edges) and not is_entry and all(only_assigned(model, outer, edge) for outer, edge in edges)


def _nothing_uses(model: Model, graph: Graph, value: Value) -> bool:
    """Return true if a value is only passed on, and no one uses it.

    TensorFlow does so with intermediate results that it keeps for gradients.
    """
    if graph.name == MAIN and value.node in model.analysis(held):
        return False
    users = model.analysis_of(graph, consumers).get(value, ())
    return all(
        e.node and graph.nodes[e.node].op == "Identity" and _nothing_uses(model, graph, Value(e.node)) for e in users
    )


@dataclass
class _Walk:
    """A walk forward from a statistic to assignments."""

    model: Model
    normalising: frozenset[Edge] = frozenset()
    proxies: dict[tuple[str, str], None] = field(default_factory=dict)
    visited: set[tuple[str, Value, Edge | None, Calls]] = field(default_factory=set)

    def from_value(self, graph: Graph, value: Value, entered: Edge | None, calls: Calls) -> Iterator[_Reached]:
        if (graph.name, value, entered, calls) in self.visited:
            return
        self.visited.add((graph.name, value, entered, calls))
        for edge in self.model.analysis_of(graph, consumers).get(value, ()):
            user = graph.nodes.get(edge.node)
            if edge in self.normalising:
                continue
            if user is None:
                yield from self._returned(graph, edge, entered, calls)
            elif user.op.startswith("Assign"):
                run = calls[0] if calls else (graph.name, user.name)
                target = self._outside(graph, user.inputs[0], calls)
                yield _Reached(entered or edge, run, target, (graph.name, user.name))
                yield from self._read_again(graph, user, entered or edge, calls)
            elif ops.STAND_IN in user.attrs:
                # A quantiser stands for its last input; the others are its controls.
                if edge.position == len(user.inputs) - 1:
                    self.proxies[graph.name, user.name] = None
                    yield from self.from_value(graph, Value(user.name), entered or edge, calls)
            elif user.op in ARITHMETIC:
                yield from self.from_value(graph, Value(user.name), entered or edge, calls)
            elif self._passes(graph, user, edge.position):
                for port in range(2 if user.op in ("Switch", "RefSwitch") else 1):
                    yield from self.from_value(graph, Value(user.name, port), entered, calls)
            else:
                yield from self._into(graph, user, edge.position, entered, calls)

    def _outside(self, graph: Graph, value: Value, calls: Calls) -> tuple[str, Value]:
        """Return what a value is in the outermost graph that passes it into the calls, as (graph, value).

        A function may update several variables, which only its calls tell apart.
        """
        for outer_name, call in reversed(calls):
            argument = origin(graph, value)
            if graph.nodes[argument.node].op != ARG:
                break
            outer = self.model.graphs[outer_name]
            node = outer.nodes[call]
            position = ops.call_form_of(self.model, node).first + graph.arguments.index(argument.node)
            graph, value = outer, node.inputs[position]
        return graph.name, value

    @staticmethod
    def _passes(graph: Graph, node: Node, position: int) -> bool:
        """Return true if a node's first output is the value that comes in here, perhaps in another shape or dtype."""
        if node.op in ops.FORWARDS or constants.viewed(graph, node) is not None:
            return position == 0
        return node.op in ops.CHOICES and position >= ops.CHOICES[node.op]

    def _returned(self, graph: Graph, edge: Edge, entered: Edge | None, calls: Calls) -> Iterator[_Reached]:
        """Yield the assignments that a result reaches: where the function was called, or wherever it is called."""
        callers = self.model.analysis(call_graph).callers.get(graph.name, ())
        calling = [calls[-1]] if calls else [(c.graph, c.node) for c in callers]
        for outer, call in calling:
            yield from self.from_value(self.model.graphs[outer], Value(call, edge.position), entered, calls[:-1])

    def _into(self, graph: Graph, call: Node, position: int, entered: Edge | None, calls: Calls) -> Iterator[_Reached]:
        """Yield the assignments that an argument of a call reaches in the functions called."""
        form = ops.call_form(self.model, call)
        if form is not None and not form.carried and position >= form.first:
            for name in ops.callees(self.model, call):
                callee = self.model.graphs[name]
                argument = Value(callee.arguments[position - form.first])
                yield from self.from_value(callee, argument, entered, (*calls, (graph.name, call.name)))

    def _read_again(self, graph: Graph, assign: Node, entered: Edge, calls: Calls) -> Iterator[_Reached]:
        """Yield further assignments from the value that the variable holds after this one."""
        holder = origin(graph, assign.inputs[0])
        yield from self.from_value(graph, Value(assign.name), entered, calls)
        for node in self.model.analysis_of(graph, following).get(assign.name, ()):
            if node.op in READS and origin(graph, node.inputs[0]) == holder:
                yield from self.from_value(graph, Value(node.name), entered, calls)


def _weight(model: Model, entered: Edge) -> float | None:
    """Return the constant factor that a statistic gets on the way to an assignment; None if there is none."""
    graph = model.graphs[entered.graph]
    edge = entered
    for _ in range(5):  # quantised, (m - b), times a correction, times the weight: no form is longer
        user = graph.nodes.get(edge.node)
        passes_on = user is not None and (ops.STAND_IN in user.attrs or user.op in ops.FORWARDS)
        if user is None or not (passes_on or user.op in ARITHMETIC):
            return None
        if user.op == "Mul":
            constant = scalar(graph, user.inputs[1 - edge.position])
            if constant is not None:
                return constant
        uses = model.analysis_of(graph, consumers).get(Value(user.name), ())
        if not uses:
            return None
        edge = uses[0]
    return None


def scalar(graph: Graph, value: Value) -> float | None:
    """Return the number that a graph computes from constants; None where it does not, or not a single one."""
    source = origin(graph, value)
    node = graph.nodes[source.node]
    array = constants.constant_of(graph, source)
    if array is not None:
        real = array.dtype.kind == "f" or array.dtype.name == "bfloat16"  # which NumPy knows as raw bytes
        return float(array.reshape(())) if array.size == 1 and real else None
    if node.op == "Sub":
        left, right = (scalar(graph, v) for v in node.inputs)
        # TensorFlow's libraries write 1 - decay in float32.
        return None if left is None or right is None else float(np.float32(left) - np.float32(right))
    return None

"""Predicates by which a graph chooses while it runs, and the choices that are left once they are known."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from rewriter import constants, op_defs
from rewriter.dataflow import consumers, following
from rewriter.ir import Graph, Model, Node, Value
from rewriter.liveness import SWITCHES, Assumption
from rewriter.pattern import way


class Choice(NamedTuple):
    """A Merge, the boolean that decides what it passes on, and its inputs for True and for False."""

    predicate: Value
    then: Value
    otherwise: Value


def assumption(model: Model, graph: Graph, predicate: Value, value: bool) -> Assumption:
    """Return the graph with a boolean that is assumed to have a value."""
    memo = model.analysis(_assumptions)
    key = (graph.name, predicate, value)
    if key not in memo:
        memo[key] = Assumption(model, graph, {predicate: value})
    return memo[key]


def _assumptions(_: Model) -> dict[tuple[str, Value, bool], Assumption]:
    """The memo of `assumption`, one for each model."""
    return {}


def choice(model: Model, graph: Graph, merge: Node) -> Choice | None:
    """Return the choice that a Merge passes on; None where no single boolean decides it."""
    for predicate in dict.fromkeys(_predicates(graph, merge)):
        then, otherwise = (assumption(model, graph, predicate, v).chosen(merge) for v in (True, False))
        # The nearest Switch may be that of a conditional inside of a branch, which does not decide this Merge.
        if then is not None and otherwise is not None and then != otherwise:
            return Choice(predicate, then, otherwise)
    return None


def _predicates(graph: Graph, merge: Node) -> Iterator[Value]:
    """The booleans of the Switches before a Merge, the nearest first."""
    waiting, visited = [v.node for v in merge.inputs], set[str]()
    while waiting:
        name = waiting.pop(0)
        if name in visited:
            continue
        visited.add(name)
        node = graph.nodes[name]
        if node.op in SWITCHES:
            yield decided_by(graph, node.inputs[1])
        else:
            # An op of a branch without inputs, such as a constant, depends on the Switch by a control input alone.
            waiting += [*(v.node for v in node.inputs), *node.after]


def decided_by(graph: Graph, predicate: Value) -> Value:
    """Return the boolean that a predicate passes on. Reads are not looked through: two of one variable may differ."""
    while graph.nodes[predicate.node].op == "Identity":
        predicate = graph.nodes[predicate.node].inputs[0]
    return predicate


def switches(_: Model, graph: Graph) -> Mapping[Value, frozenset[str]]:
    """Return the Switches of a graph, by the boolean that decides them (to be memoised)."""
    by_predicate: dict[Value, set[str]] = {}
    for node in graph.nodes.values():
        if node.op == "Switch":
            by_predicate.setdefault(decided_by(graph, node.inputs[1]), set()).add(node.name)
    return {predicate: frozenset(names) for predicate, names in by_predicate.items()}


def gates(graph: Graph, value: Value) -> frozenset[tuple[Value, bool]]:
    """Return the Switches that a value passes on its way: the boolean that decides, and its value that lets it pass.

    A constant decides nothing while the graph runs.
    """
    passed_switches = [v for v in way(graph, value) if graph.nodes[v.node].op in SWITCHES]
    pairs = {(decided_by(graph, graph.nodes[v.node].inputs[1]), bool(v.port)) for v in passed_switches}
    return frozenset(gate for gate in pairs if constants.constant_of(graph, gate[0]) is None)


def gated(model: Model, graph: Graph, gate: tuple[Value, bool], values: Iterable[Value]) -> bool:
    """Return true if one of some values is computed only where a gate's boolean has the gate's value."""
    predicate, on = gate
    return not assumption(model, graph, predicate, not on).dead.isdisjoint(values)


def leads_to(
    model: Model,
    graph: Graph,
    starts: Iterable[str],
    ends: Container[str],
    before: Mapping[str, Iterable[str]] = MappingProxyType({}),
) -> bool:
    """Return true if one of `starts` has to run before one of `ends`.

    `before` maps a node to further nodes that run after it.
    """
    return any(name in ends for name in reached(model, graph, starts, before))


def reached(
    model: Model, graph: Graph, starts: Iterable[str], before: Mapping[str, Iterable[str]] = MappingProxyType({})
) -> Iterator[str]:
    """Yield some nodes, and all that have to run after one of them.

    `before` maps a node to further nodes that run after it.
    """
    uses, followers = model.analysis_of(graph, consumers), model.analysis_of(graph, following)
    waiting, visited = list(starts), set[str]()
    while waiting:
        name = waiting.pop()
        if name not in visited and name:
            visited.add(name)
            yield name
            count = op_defs.output_count(model, graph.nodes[name])
            waiting += [edge.node for port in range(count) for edge in uses.get(Value(name, port), ())]
            waiting += [*(node.name for node in followers.get(name, ())), *before.get(name, ())]

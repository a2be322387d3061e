"""Stopped gradients at ops that have none, so that training functions can be differentiated.

A loaded function is differentiated with respect to all its inputs, and from all its float outputs. Data augmentation
in the graph (Keras' RandomContrast, say), or a detector's non-maximum suppression, then raises ``LookupError: No
gradient defined``, whatever the loss takes of the outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
from tensorflow.python.framework import ops as registry

from passes.quantization.training_functions import TRAIN, TRAIN_SIGNATURE
from rewriter import op_defs, ops
from rewriter.dataflow import CallGraph, call_graph
from rewriter.edit import Edit, Note, Rewire
from rewriter.expr import Use, stop_gradient
from rewriter.ir import ARG, MAIN, Graph, Model, Node, Value
from rewriter.liveness import Assumption

LOOPS = ("While", "StatelessWhile")
FLOATS = ("half", "float16", "bfloat16", "float32", "float64")
PASSING = (*FLOATS, "complex64", "complex128", "resource", "variant")
"""Dtypes that TensorFlow passes gradients through: numbers, and handles that hold lists of numbers."""


@dataclass(frozen=True)
class CutGradients:
    """Stop the gradient after ops that have none.

    Where no trainable variable precedes such an op, no variable's gradient is affected. Where some do, they get no
    gradient through the op, as nothing could give them one. The rest of the function can be differentiated.
    """

    name: ClassVar[str] = "cut-gradients"

    def edits(self, model: Model) -> Iterable[Edit]:
        """Stop gradients in the training functions and in what they call, and yield a note that names the ops."""
        calls = model.analysis(call_graph)
        trained = _trained(model, calls)
        tainted = _trainable(model, calls, set(trained))
        before, after = set[str](), set[str]()
        for name, nodes in sorted(trained.items()):
            graph = model.graphs[name]
            passing = _passing(model, graph, nodes)
            lacking = [node for node in graph.nodes.values() if node.name in passing and _lacks_gradient(node)]
            for node in lacking:
                edits = list(_stops(model, graph, node, nodes))
                (after if node.name in tainted[name] else before).update([node.op] if edits else [])
                yield from edits
        if before:
            names = ", ".join(sorted(before))
            yield Note(
                f"train does not differentiate through {names}, which have no gradient and precede all variables",
                "detail",
            )
        if after:
            names = ", ".join(sorted(after))
            yield Note(
                f"the gradient of train stops at {names}, which TensorFlow cannot differentiate: a variable whose only "
                "way to the outputs is through them gets none; --train-output returns tensors before them"
            )


def _trained(model: Model, calls: CallGraph) -> Mapping[str, frozenset[str]]:
    """Return the graphs that run in training, and the nodes of each that run."""
    if "train" in model.main_signatures:
        fetches = model.main_signatures["train"].fetches
        needed = Assumption(model, model.graphs[MAIN], {}).needed(v.node for v in fetches)
        called = Assumption(model, model.graphs[MAIN], {}).called(needed)
        return {MAIN: frozenset(needed), **{name: frozenset(model.graphs[name].nodes) for name in called}}
    reached = set().union(*(calls.reached(top) for top in (TRAIN, TRAIN_SIGNATURE) if top in model.graphs))
    return {name: frozenset(model.graphs[name].nodes) for name in reached}


def _passing(model: Model, graph: Graph, nodes: frozenset[str]) -> set[str]:
    """Return those of some nodes of a graph that a gradient of the graph's results may reach."""
    fetched = [s.fetches for s in model.main_signatures.values()] if graph.name == MAIN else []
    waiting = [*(r.value for r in graph.results), *(v for values in fetched for v in values)]
    passing: set[str] = set()
    while waiting:
        value = waiting.pop()
        if value.node in nodes and value.node not in passing and op_defs.output_dtype(model, graph, value) in PASSING:
            passing.add(value.node)
            waiting += graph.nodes[value.node].inputs
    return passing


def _stops(model: Model, graph: Graph, node: Node, users: frozenset[str]) -> Iterator[Edit]:
    """Stop the gradient at every use of a node's float outputs by the graph's results or by nodes in `users`."""
    stopped = {}
    for port in range(op_defs.output_count(model, node)):
        dtype = op_defs.output_dtype(model, graph, Value(node.name, port))
        if dtype in FLOATS:
            stopped[Value(node.name, port)] = stop_gradient(Use(dtype, Value(node.name, port)))
    # The main graph also holds nodes that `train` does not run, which keep their gradients.
    for value, edge in graph.edges() if stopped else ():
        if value in stopped and (not edge.node or edge.node in users):
            yield Rewire(edge, stopped[value], node.name)


def _lacks_gradient(node: Node) -> bool:
    """Return true if TensorFlow fails to differentiate this op; it passes over ops registered as not differentiable."""
    if node.op == ARG or node.op in ops.CALLS or not node.inputs or op_defs.registered(node.op) is None:
        return False
    try:
        registry.gradient_registry.lookup(node.op)
    except LookupError:
        return True
    return False


def _trainable(model: Model, calls: CallGraph, graphs: set[str]) -> dict[str, set[str]]:
    """Return the nodes of each graph that depend on a trainable variable."""
    tainted: dict[str, set[str]] = {name: set() for name in graphs}
    if MAIN in graphs:
        tainted[MAIN] |= {v.node for v in model.variables.values() if v.trainable and v.node}
    # Callers come first, so that what they pass is known.
    for name in nx.topological_sort(calls.digraph.subgraph(graphs)):
        graph = model.graphs[name]
        entry = model.entries.get(name)
        if entry is not None:
            bound = zip(graph.arguments[len(entry.inputs) :], entry.captures, strict=True)
            tainted[name] |= {a for a, c in bound if isinstance(c, str) and model.variables[c].trainable}
        if entry is None:
            # A loop's body sees what it returned before. That is not followed, so all its arguments count as dependent.
            looped = any(model.graphs[c.graph].nodes[c.node].op in LOOPS for c in calls.callers.get(name, []))
            tainted[name] |= set(graph.arguments) if looped else set()
        _spread(graph, tainted[name])
        for call in (c for c in calls.calls.get(name, []) if c.callee in tainted):
            passed = graph.nodes[call.node].inputs[call.first :]
            arguments = model.graphs[call.callee].arguments
            tainted[call.callee] |= {a for a, v in zip(arguments, passed, strict=True) if v.node in tainted[name]}
    return tainted


def _spread(graph: Graph, tainted: set[str]) -> None:
    users: dict[str, list[str]] = {}
    for value, edge in graph.edges():
        users.setdefault(value.node, []).append(edge.node)
    waiting = list(tainted)
    while waiting:
        for user in users.get(waiting.pop(), ()):
            if user and user not in tainted:
                tainted.add(user)
                waiting.append(user)

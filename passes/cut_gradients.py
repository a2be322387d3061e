"""Let training functions be differentiated whose input passes through ops that have no gradient.

A loaded function is differentiated with respect to its inputs too. Data augmentation in the graph (Keras'
RandomContrast, say) then raises ``LookupError: No gradient defined``, though no trainable variable comes
before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import networkx as nx
from tensorflow.python.framework import ops as registry

from passes.derive_training import TRAIN, TRAIN_SIGNATURE
from rewriter import ops
from rewriter.dataflow import CallGraph, call_graph
from rewriter.edit import Edit, Note, Rewire
from rewriter.expr import Use, stop_gradient
from rewriter.ir import ARG, Graph, Model, Node, Value

LOOPS = ("While", "StatelessWhile")
FLOATS = ("half", "float16", "bfloat16", "float32", "float64")


@dataclass(frozen=True)
class CutGradients:
    """Stop the gradient after ops that have none and that no trainable variable precedes.

    Gradients of trainable variables are not affected; those of the inputs end there instead of failing.
    """

    def edits(self, model: Model) -> Iterable[Edit]:
        """Stops in the training functions and in what they call."""
        calls = model.analysis(call_graph)
        reached: set[str] = set()
        for top in {TRAIN, TRAIN_SIGNATURE} & set(model.graphs):
            reached |= calls.reached(top)
        tainted = _trainable(model, calls, reached)
        cut = set()
        for name in sorted(reached):
            graph = model.graphs[name]
            for node in graph.nodes.values():
                if node.name not in tainted[name] and _lacks_gradient(node):
                    edits = list(_stop(model, graph, node))
                    cut |= {node.op} if edits else set()
                    yield from edits
        if cut:
            names = ", ".join(sorted(cut))
            yield Note(
                f"train does not differentiate through {names}, which have no gradient and precede all variables"
            )


def _stop(model: Model, graph: Graph, node: Node) -> Iterator[Edit]:
    """Rewire every use of a node's first output if it is a float."""
    definition = ops.op_def(model, node.op)
    if not definition.output_arg:
        return
    arg = definition.output_arg[0]
    dtype = ops.get(model, node, arg.type_attr) if arg.type_attr else ops.dtype_name(arg.type)
    if dtype in FLOATS:
        stopped = stop_gradient(Use(dtype, Value(node.name)))
        for value, edge in graph.edges():
            if value == Value(node.name):
                yield Rewire(edge, stopped, node.name)


def _lacks_gradient(node: Node) -> bool:
    """Whether TensorFlow fails to differentiate this op, rather than knowing that it has no gradient."""
    if node.op == ARG or node.op in ops.CALLS or not node.inputs or ops.registered(node.op) is None:
        return False
    try:
        registry.gradient_registry.lookup(node.op)
    except LookupError:
        return True
    return False


def _trainable(model: Model, calls: CallGraph, graphs: set[str]) -> dict[str, set[str]]:
    """The nodes of each graph that depend on a trainable variable."""
    tainted: dict[str, set[str]] = {name: set() for name in graphs}
    for name in nx.topological_sort(calls.digraph.subgraph(graphs)):
        graph = model.graphs[name]
        entry = model.entries.get(name)
        if entry is not None:
            bound = zip(graph.arguments[len(entry.inputs) :], entry.captures, strict=True)
            tainted[name] |= {a for a, c in bound if isinstance(c, str) and model.variables[c].trainable}
        if entry is None:
            # A loop's body sees what it returned before; what comes back is not followed, so nothing is cut there.
            looped = any(model.graphs[c.graph].nodes[c.node].op in LOOPS for c in calls.callers.get(name, []))
            tainted[name] |= set(graph.arguments) if looped else set()
        _spread(graph, tainted[name])
        for call in calls.calls.get(name, []):
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

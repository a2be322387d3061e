"""Well-formedness of a model: every reference leads to something, and every call fits its callee."""

from __future__ import annotations

from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter

from rewriter import op_defs, ops
from rewriter.ir import Error, Graph, Model, Node


def check(model: Model, before: Model | None = None) -> None:
    """Check the graphs of a model; with `before`, only graphs that are not the same objects in it.

    Raises:
        Error: the model is malformed; the message names the graph, the node and the problem.
    """
    for graph in model.graphs.values():
        if before is None or before.graphs.get(graph.name) is not graph:
            for problem in problems(model, graph):
                raise Error(f"in {graph.name or 'the main graph'}: {problem}")
    check_entries(model)


def check_entries(model: Model) -> None:
    """Check that concrete functions fit their graphs.

    Raises:
        Error: one does not; the message names the function and the problem.
    """
    for entry in model.entries.values():
        if entry.function not in model.graphs:
            raise Error(f"the concrete function {entry.function} has no graph")
        count = len(model.graphs[entry.function].arguments)
        if count != len(entry.inputs) + len(entry.captures):
            expected = f"{len(entry.inputs)} inputs and {len(entry.captures)} captures"
            raise Error(f"the concrete function {entry.function} has {count} arguments for {expected}")


def problems(model: Model, graph: Graph) -> Iterator[str]:
    """Yield the problems of a graph, one sentence each."""
    for node in graph.nodes.values():
        yield from _input_problems(model, graph, node)
        yield from _call_problems(model, node)
    for kind, name, node_name in (
        *(("result", r.name, r.value.node) for r in graph.results),
        *(("effect", e.name, e.node) for e in graph.effects),
        *(("argument", a, a) for a in graph.arguments),
    ):
        if node_name not in graph.nodes:
            yield f"the {kind} {name} is {node_name}, which does not exist"
    yield from _cycles(graph)


def _input_problems(model: Model, graph: Graph, node: Node) -> Iterator[str]:
    for value in node.inputs:
        source = graph.nodes.get(value.node)
        if source is None:
            yield f"{node.name} uses {value.node}, which does not exist"
        elif value.port and value.port >= op_defs.output_count(model, source):
            yield f"{node.name} uses output {value.port} of {value.node} ({source.op}), which has fewer"
    for name in node.after:
        if name not in graph.nodes:
            yield f"{node.name} runs after {name}, which does not exist"


def _call_problems(model: Model, node: Node) -> Iterator[str]:
    form = ops.call_form(model, node)
    if form is None:
        return
    passed = len(node.inputs) - form.first
    listed = passed if form.types is None else len(op_defs.attribute(node, form.types).list.type)
    if listed != passed:
        yield f"{node.name} passes {passed} inputs but {form.types} lists {listed}"
    for callee in ops.callees(model, node):
        if callee not in model.graphs:
            yield f"{node.name} calls {callee}, which does not exist"
        elif len(model.graphs[callee].arguments) != passed:
            yield f"{node.name} passes {passed} inputs to {callee}, which has {len(model.graphs[callee].arguments)}"


def _cycles(graph: Graph) -> Iterator[str]:
    if _in_topological_order(graph):
        return
    # TensorFlow 1's while loops are cycles on purpose; each of them passes a NextIteration.
    nodes = [n for n in graph.nodes.values() if n.op not in ("NextIteration", "RefNextIteration")]
    sources = {n.name: {v.node for v in n.inputs} | set(n.after) for n in nodes}
    try:
        TopologicalSorter(sources).prepare()
    except CycleError as e:
        yield f"{e.args[1][0]} depends on itself"


def _in_topological_order(graph: Graph) -> bool:
    """Return true if every node stands after the nodes that it needs, as TensorFlow writes them.

    Such a graph has no cycle, and this is cheaper to check.
    """
    earlier: set[str] = set()
    for node in graph.nodes.values():
        if any(v.node not in earlier for v in node.inputs) or any(name not in earlier for name in node.after):
            return False
        earlier.add(node.name)
    return True

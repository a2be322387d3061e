"""Functions that take their mode as an argument, split into one function for each mode."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from passes.batch_norm.roles import MEAN, VARIANCE
from passes.batch_norm.sites import sites
from rewriter import op_defs, ops
from rewriter.dataflow import call_graph, consumers, running
from rewriter.edit import Clone, Dispatch, Edit, Inline, Rewire, Sweep
from rewriter.expr import Use, constant
from rewriter.ir import MAIN, Graph, Model, Value
from rewriter.liveness import BRANCHES, MERGES, SELECTS, Assumption
from rewriter.op_defs import argument_dtype
from rewriter.pattern import origin
from rewriter.shapes import shape_of

BODIES = tuple(name for name in ops.CALLS if not name.endswith("PartitionedCall"))
"""Control-flow ops that run functions."""


@dataclass(frozen=True)
class SplitModes:
    """Let a function that chooses between training and inference by an argument choose once, at its beginning.

    Each of the two functions that it then calls computes one mode only, without a conditional at every batch
    norm. Neither mode pays for the other, and TensorFlow fuses a convolution with the batch norm after it. Where a
    constant decides a conditional, the branch that it chooses takes the conditional's place.
    """

    name: ClassVar[str] = "split-modes"

    def edits(self, model: Model) -> Iterable[Edit]:
        """Copy every function in which an argument decides how batch norms are computed, once for each mode."""
        calls = model.analysis(call_graph)
        if not model.object_based:
            yield from _constants_settled(model, model.graphs[MAIN])
        for name in sorted(model.analysis(running) - calls.opaque - {MAIN}):
            graph = model.graphs[name]
            argument = _deciding(model, graph)
            yield from _constants_settled(model, graph) if argument is None else _split(model, graph, argument)


def _constants_settled(model: Model, graph: Graph) -> Iterator[Edit]:
    """Settle the conditionals that constants decide, in a graph where one of them concerns a batch norm."""
    assumed = Assumption(model, graph, {})
    if any(_chooses(model, graph, conditional) for conditional in _decided(graph, assumed)):
        yield from _settled(model, graph, graph.name, assumed)


def _deciding(model: Model, graph: Graph) -> str | None:
    """Return the boolean argument that decides the most conditionals of batch norms.

    None if no argument decides one, or if the graph consists of a single node besides its arguments.
    """
    # What this pass has split is a single ``If``, which is not split again.
    if len(graph.nodes) - len(graph.arguments) == 1:
        return None
    # What a constant decides is settled without a split.
    always = set(_decided(graph, Assumption(model, graph, {})))
    counts = {
        name: sum(
            _chooses(model, graph, conditional)
            for conditional in _decided(graph, Assumption(model, graph, {Value(name): True}))
            if conditional not in always
        )
        for name in graph.arguments
        if argument_dtype(graph.nodes[name]) == "bool" and shape_of(model, graph, Value(name)) == ()
    }
    return max((name for name, count in counts.items() if count), key=lambda name: counts[name], default=None)


def _decided(graph: Graph, assumed: Assumption) -> list[str]:
    """Return the conditionals whose choice is known."""
    return [
        node.name
        for node in graph.nodes.values()
        if (node.op in BRANCHES and assumed.known(node.inputs[0]) is not None)
        or (node.op in (*SELECTS, *MERGES) and assumed.chosen(node) is not None)
    ]


def _chooses(model: Model, graph: Graph, name: str) -> bool:
    """Return true if a conditional concerns a batch norm: in a branch, among its inputs or its outputs."""
    nodes_of = model.analysis(_batch_norm_nodes)
    node = graph.nodes[name]
    reached = set().union(*(model.analysis(call_graph).reached(f) for f in ops.callees(model, node)))
    near = {origin(graph, v).node for v in node.inputs} | {name}
    return not reached.isdisjoint(nodes_of) or not near.isdisjoint(nodes_of.get(graph.name, ()))


def _batch_norm_nodes(model: Model) -> Mapping[str, set[str]]:
    """Return graph -> the nodes that end its batch norms, and those that compute their statistics."""
    nodes_of: dict[str, set[str]] = {}
    for site in model.analysis(sites):
        if not site.binding.quantized:
            graph = model.graphs[site.graph]
            edges = [site.inputs[r][0] for r in (MEAN, VARIANCE) if r in site.inputs]
            ends = {origin(graph, graph.nodes[e.node].inputs[e.position]).node for e in edges}
            nodes_of.setdefault(site.graph, set()).update(ends, (site.node,))
    return nodes_of


def _split(model: Model, graph: Graph, argument: str) -> Iterator[Edit]:
    names = {True: f"{graph.name}_when_{argument}", False: f"{graph.name}_unless_{argument}"}
    for value, name in names.items():
        assumed = Assumption(model, graph, {Value(argument): value})
        body_names = bodies(model, graph, _decided(graph, assumed))
        copies = {body: f"{body}_{name.removeprefix(graph.name + '_')}" for body in body_names}
        for original, copy in {graph.name: name, **copies}.items():
            yield Clone(original, copy, copies)
        for edge in model.analysis_of(graph, consumers).get(Value(argument), ()):
            yield Rewire(edge._replace(graph=name), constant(value, "bool"), argument)
        yield from _settled(model, graph, name, assumed)
    yield Dispatch(graph.name, Use("bool", Value(argument)), names[True], names[False])


def bodies(model: Model, graph: Graph, settled: Collection[str] = ()) -> dict[str, None]:
    """Return the functions that conditionals and loops of a graph run, except for those of nodes in `settled`.

    TensorFlow cannot differentiate two functions of one process that both run one of them, so a copy needs its own.
    """
    functions: dict[str, None] = {}
    waiting = [node for node in graph.nodes.values() if node.name not in settled]
    while waiting:
        node = waiting.pop()
        if node.op in BODIES:
            new = [name for name in ops.callees(model, node) if name not in functions]
            functions |= dict.fromkeys(new)
            waiting += [inner for name in new for inner in model.graphs[name].nodes.values()]
    return functions


def _settled(model: Model, graph: Graph, name: str, assumed: Assumption) -> Iterator[Edit]:
    """Replace each conditional whose choice is known by what it chooses, in a graph or its copy of this name."""
    uses, decided = model.analysis_of(graph, consumers), _decided(graph, assumed)
    for conditional in decided:
        node = graph.nodes[conditional]
        if node.op not in BRANCHES:
            chosen = assumed.settled(Value(conditional))
            dtype = op_defs.output_dtype(model, graph, chosen)
            shapes = {shape_of(model, graph, v) for v in (chosen, Value(conditional))}
            same_shape = len(shapes) == 1 and None not in shapes  # else it is broadcast
            for edge in uses.get(Value(conditional), ()) if same_shape else ():
                yield Rewire(edge._replace(graph=name), Use(dtype, chosen), conditional)
    # `Inline` removes a conditional's node, so edits that use its outputs come before.
    for conditional in decided:
        node = graph.nodes[conditional]
        if node.op in BRANCHES:
            then, otherwise = ops.callees(model, node)
            yield Inline(name, conditional, then if assumed.known(node.inputs[0]) else otherwise)
    # The user of a main graph may ask for any other node by name, so only the conditionals are swept there.
    yield Sweep(name, tuple(decided if name == MAIN else graph.nodes))

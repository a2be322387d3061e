"""One function for each mode, where a function takes its mode as an argument."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from passes.batch_norm.sites import sites
from passes.roles import MEAN, VARIANCE
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
"""Ops of control flow that run functions."""


@dataclass(frozen=True)
class SplitModes:
    """Let a function that chooses between training and inference by an argument choose once, at its beginning.

    Each of the two functions that it then calls computes one mode only, without a conditional at every batch
    norm: neither mode pays for the other, and TensorFlow fuses a convolution with the batch norm after it. Where a
    constant decides, what it decides takes the conditional's place.
    """

    name: ClassVar[str] = "split-modes"

    def edits(self, model: Model) -> Iterable[Edit]:
        """Two copies of every function in which an argument decides how batch norms are computed; no other choices."""
        calls = model.analysis(call_graph)
        if not model.object_based:
            yield from _constants_settled(model, model.graphs[MAIN])
        for name in sorted(model.analysis(running) - calls.opaque - {MAIN}):
            graph = model.graphs[name]
            argument = _deciding(model, graph)
            yield from _constants_settled(model, graph) if argument is None else _split(model, graph, argument)


def _constants_settled(model: Model, graph: Graph) -> Iterator[Edit]:
    """In a graph where constants decide conditionals of batch norms, what they decide."""
    free = Assumption(model, graph, {})
    if any(_chooses(model, graph, each) for each in _decided(graph, free)):
        yield from _settled(model, graph, graph.name, free)


def _deciding(model: Model, graph: Graph) -> str | None:
    """The boolean argument that decides the most conditionals of batch norms; none where that is all there is."""
    if len(graph.nodes) - len(graph.arguments) == 1:
        return None
    always = set(_decided(graph, Assumption(model, graph, {})))
    counts = {
        name: sum(
            _chooses(model, graph, each)
            for each in _decided(graph, Assumption(model, graph, {Value(name): True}))
            if each not in always
        )
        for name in graph.arguments
        if argument_dtype(graph.nodes[name]) == "bool" and shape_of(model, graph, Value(name)) == ()
    }
    return max((name for name, count in counts.items() if count), key=lambda name: counts[name], default=None)


def _decided(graph: Graph, known: Assumption) -> list[str]:
    """The conditionals whose choice is known."""
    return [
        node.name
        for node in graph.nodes.values()
        if (node.op in BRANCHES and known.known(node.inputs[0]) is not None)
        or (node.op in (*SELECTS, *MERGES) and known.chosen(node) is not None)
    ]


def _chooses(model: Model, graph: Graph, name: str) -> bool:
    """Whether a conditional has to do with a batch norm: in a branch, among its inputs or its outputs."""
    held = model.analysis(_held)
    node = graph.nodes[name]
    reached = set().union(*(model.analysis(call_graph).reached(f) for f in ops.callees(model, node)))
    near = {origin(graph, v).node for v in node.inputs} | {name}
    return not reached.isdisjoint(held) or not near.isdisjoint(held.get(graph.name, ()))


def _held(model: Model) -> Mapping[str, set[str]]:
    """Graph -> the nodes that end its batch norms, and those that compute their statistics."""
    found: dict[str, set[str]] = {}
    for site in model.analysis(sites):
        if not site.quantized:
            graph = model.graphs[site.graph]
            edges = [site.inputs[r][0] for r in (MEAN, VARIANCE) if r in site.inputs]
            ends = {origin(graph, graph.nodes[e.node].inputs[e.position]).node for e in edges}
            found.setdefault(site.graph, set()).update(ends, (site.node,))
    return found


def _split(model: Model, graph: Graph, argument: str) -> Iterator[Edit]:
    names = {True: f"{graph.name}_when_{argument}", False: f"{graph.name}_unless_{argument}"}
    for value, name in names.items():
        known = Assumption(model, graph, {Value(argument): value})
        own = bodies(model, graph, _decided(graph, known))
        copies = {body: f"{body}_{name.removeprefix(graph.name + '_')}" for body in own}
        for each, copy in {graph.name: name, **copies}.items():
            yield Clone(each, copy, copies)
        for edge in model.analysis_of(graph, consumers).get(Value(argument), ()):
            yield Rewire(edge._replace(graph=name), constant(value, "bool"), argument)
        yield from _settled(model, graph, name, known)
    yield Dispatch(graph.name, Use("bool", Value(argument)), names[True], names[False])


def bodies(model: Model, graph: Graph, settled: Collection[str] = ()) -> dict[str, None]:
    """The functions that conditionals and loops of a graph run, but for those of nodes that are settled.

    TensorFlow cannot differentiate two functions in one process that run one of them, so a copy needs its own.
    """
    found: dict[str, None] = {}
    waiting = [node for node in graph.nodes.values() if node.name not in settled]
    while waiting:
        node = waiting.pop()
        if node.op in BODIES:
            new = [name for name in ops.callees(model, node) if name not in found]
            found |= dict.fromkeys(new)
            waiting += [inner for name in new for inner in model.graphs[name].nodes.values()]
    return found


def _settled(model: Model, graph: Graph, name: str, known: Assumption) -> Iterator[Edit]:
    """In a graph, or its copy of this name, what is taken in place of each conditional whose choice is known."""
    uses, decided = model.analysis_of(graph, consumers), _decided(graph, known)
    for each in decided:
        node = graph.nodes[each]
        if node.op not in BRANCHES:
            taken = known.settled(Value(each))
            dtype = op_defs.output_dtype(model, graph, taken)
            shapes = {shape_of(model, graph, v) for v in (taken, Value(each))}
            same = len(shapes) == 1 and None not in shapes  # else it is broadcast
            for edge in uses.get(Value(each), ()) if same else ():
                yield Rewire(edge._replace(graph=name), Use(dtype, taken), each)
    for each in decided:
        node = graph.nodes[each]
        if node.op in BRANCHES:
            then, otherwise = ops.callees(model, node)
            yield Inline(name, each, then if known.known(node.inputs[0]) else otherwise)
    # What else a main graph holds, its user may ask for by name.
    yield Sweep(name, tuple(decided if name == MAIN else graph.nodes))

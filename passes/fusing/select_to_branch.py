"""Conditionals in place of `tf.where`, where it chooses between the modes of a batch norm."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from passes.batch_norm.decomposed import INPUT
from passes.batch_norm.roles import MEAN, VARIANCE
from passes.batch_norm.site import Site
from passes.batch_norm.sites import sites
from passes.control_flow.cones import cone
from passes.fusing.fusable import origin_of_x
from rewriter import op_defs, protos
from rewriter.edit import Define, Edit, Replace
from rewriter.expr import Apply, Function, Use, cond, merge, op, parameter, switch
from rewriter.frames import loop_frames
from rewriter.ir import MAIN, Graph, Model, Node, Value
from rewriter.liveness import SELECTS
from rewriter.pattern import origin
from rewriter.shapes import Shape, shape_of


@dataclass(frozen=True)
class SelectToBranch:
    """Let a conditional choose mean and variance, or the output, of a batch norm where ``Select`` does.

    ``Select`` needs both of its choices computed. The passes that follow move the batch norm to where it is
    chosen, so that one mode runs. In a main graph the conditional is Switch and Merge, which a TensorFlow 1 session
    can differentiate; in a function it is ``If``.
    """

    name: ClassVar[str] = "select-to-branch"

    def edits(self, model: Model) -> Iterable[Edit]:
        """Replace each ``Select`` on a single boolean, whose choices are of one shape, by a conditional."""
        for name, nodes in _selects(model).items():
            graph = model.graphs[name]
            for node in nodes.values():
                yield from (_merged if name == MAIN else _branched)(model, graph, node)


def _selects(model: Model) -> dict[str, dict[str, Node]]:
    """Return graph -> the nodes that choose between modes of batch norms."""
    nodes_of: dict[str, dict[str, Node]] = {}
    for site in model.analysis(sites):
        graph = model.graphs[site.graph]
        if (
            not site.binding.quantized
            and INPUT in site.inputs
            # In a loop of TensorFlow 1, `tf.gradients` would take a further Switch for one of the loop's own.
            and site.node not in model.analysis_of(graph, loop_frames)
        ):
            for node in _choosing(model, graph, site):
                if _convertible(model, graph, node):
                    nodes_of.setdefault(site.graph, {})[node.name] = node
    return nodes_of


def _choosing(model: Model, graph: Graph, site: Site) -> Iterator[Node]:
    """Yield the nodes that choose a site's statistics or, where the site has one mode, its output."""
    if site.mode == "both":
        names = [origin(graph, graph.used_at(site.inputs[role][0])).node for role in (MEAN, VARIANCE)]
    else:
        names = [name for name in cone(model, graph, Value(site.node)).others if name]
    yield from (graph.nodes[name] for name in names if graph.nodes[name].op in SELECTS)


def _convertible(model: Model, graph: Graph, node: Node) -> bool:
    """Return true if a node chooses one of two whole values: ``Select`` may also broadcast, or choose by element."""
    predicate, then, otherwise = node.inputs
    shapes = [shape_of(model, graph, value) for value in (then, otherwise)]
    if shape_of(model, graph, predicate) != () or shapes[0] is None or shapes[0] != shapes[1]:
        return False
    # Unknown sizes may differ, so that ``Select`` broadcasts. Those of batch norms of one x are the same.
    return -1 not in shapes[0] or len({_normalised(model, graph, value) for value in (then, otherwise)}) == 1


def _normalised(model: Model, graph: Graph, value: Value) -> Value | None:
    """Return the input of the batch norm before a value, which has the shape of the value."""
    ends = {s.node: s for s in model.analysis(sites) if s.graph == graph.name and INPUT in s.inputs}
    site = ends.get(origin(graph, value, shaped=True).node)
    return None if site is None else origin_of_x(graph, graph.used_at(site.inputs[INPUT][0]))


def _merged(model: Model, graph: Graph, node: Node) -> Iterator[Edit]:
    predicate, then, otherwise = _operands(model, graph, node)
    chosen = merge(switch(otherwise, predicate)[0], switch(then, predicate)[1])
    shape = shape_of(model, graph, node.inputs[1])
    # The second output of Merge is the index of the input that it passes on.
    yield _replaced(graph, node, chosen, [shape, ()])


def _branched(model: Model, graph: Graph, node: Node) -> Iterator[Edit]:
    predicate, *choices = _operands(model, graph, node)
    shape = shape_of(model, graph, node.inputs[1])
    parameters = tuple(
        parameter(name, choice.dtype) for name, choice in zip(("then", "otherwise"), choices, strict=True)
    )
    name = re.sub(r"\W", "_", f"{graph.name}_{node.name}")
    branches = [
        Function(f"{name}_{operand.value.node}", parameters, (shape, shape), (op("Identity", operand),))
        for operand in parameters
    ]
    yield from (Define(branch) for branch in branches)
    yield _replaced(graph, node, cond(predicate, branches[0], branches[1], choices), [shape])


def _operands(model: Model, graph: Graph, node: Node) -> tuple[Use, ...]:
    return tuple(Use(op_defs.output_dtype(model, graph, value), value) for value in node.inputs)


def _replaced(graph: Graph, node: Node, chosen: Apply, shapes: list[Shape | None]) -> Replace:
    """Return the conditional under the node's name, with the shapes of its outputs, which later passes read."""
    attrs = {**chosen.attrs, "_output_shapes": protos.shapes_attr(shapes)}
    return Replace(graph.name, node.name, replace(chosen, attrs=attrs))

"""Sites put into training mode, and the updates of their moving averages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from passes.batch_norm.batch_norms import moving_average
from passes.batch_norm.decomposed import INPUT
from passes.batch_norm.kernel import POPULATION, population
from passes.batch_norm.roles import MEAN, VARIANCE
from passes.batch_norm.site import Site
from passes.batch_norm.sites import STATISTICS
from passes.training.layer_options import MOMENTUM, TrainingOptions
from rewriter import constants, op_defs, ops, protos
from rewriter.dataflow import REFERENCES
from rewriter.edit import Edit, Rewire, SetAttr
from rewriter.expr import Apply, Expr, Use, array, concat, constant, op, ordered, stop_gradient
from rewriter.frames import loop_frames
from rewriter.ir import Edge, Graph, Model, Value
from rewriter.pattern import origin
from rewriter.shapes import shape_of

RESOURCE_ASSIGNS = ("AssignVariableOp", "AssignAddVariableOp", "AssignSubVariableOp")


class Average(NamedTuple):
    """A moving average as a graph reads it: its holder (a resource or a reference), and the value that is read."""

    holder: Value
    old: Value


def averages(model: Model, site: Site) -> Mapping[str, Average]:
    """Return the moving averages of a site by role; none if one of them is read in another graph."""
    graph = model.graphs[site.graph]
    by_role = {}
    for role in STATISTICS:
        edge = site.inputs[role][0]
        average = _average(graph, graph.used_at(edge))
        if average is None:
            return {}
        by_role[role] = average
    return by_role


def serving_updates(graph: Graph, holders: Iterable[Value], nodes: Iterable[str]) -> Iterator[str]:
    """Yield those of some nodes by which serving itself updates averages; derived training has its own updates."""
    variables = {origin(graph, holder) for holder in holders}
    for name in nodes:
        node = graph.nodes[name]
        if node.op in RESOURCE_ASSIGNS and origin(graph, node.inputs[0]) in variables:
            yield name


def _average(graph: Graph, value: Value) -> Average | None:
    old = value
    while True:
        node = graph.nodes[value.node]
        if node.op == "ReadVariableOp":
            return Average(node.inputs[0], value)
        # No op reads a reference: the graph uses what the first op after it passes on.
        if node.op in REFERENCES:
            return Average(value, old)
        passed = constants.viewed(graph, node) or ops.forwarded(node, value.port)
        if passed is None:
            return None
        old, value = value, passed


@dataclass
class Training:
    """Sites of one graph in training mode, in that graph or in a copy.

    Attributes:
        graph: the graph that holds the copy.
        copied: a node's name -> its name in the copy.
        options: the options of training, with the momentum where no training site says it.
        resolved: a value -> the value that stands for it in the copy, where choices are decided.
        updates: the new value of each average, by its holder.
        after: the site that each update follows, by the holder.
    """

    model: Model
    graph: str
    copied: Callable[[str], str]
    options: TrainingOptions
    resolved: Callable[[Value], Value] = field(default=lambda value: value)
    updates: dict[Value, Expr] = field(default_factory=dict)
    after: dict[Value, Site] = field(default_factory=dict)

    def edits(self, site: Site) -> Iterator[Edit]:
        """Let a site normalise with the batch's statistics, and record the new values of its averages.

        Where several sites share their variables, one update follows the other.
        """
        if site.kind == "fused":
            node = self.copied(site.node)
            yield SetAttr(self.graph, node, "is_training", None)  # the op's default is true
            batch: Mapping[str, Expr] = self._kernels(site, node)
        else:
            batch = self._moments(site)
            for role, statistic in batch.items():
                for edge in site.binding.parameters[role]:
                    yield Rewire(self._edge(edge), statistic, self.copied(site.node))
        momentum = self.options.momentum_of(self.model, site)
        yield SetAttr(self.graph, self.copied(site.node), MOMENTUM, protos.attr(momentum.whose))
        for role, (holder, old) in averages(self.model, site).items():
            dtype = op_defs.output_dtype(self.model, self.model.graphs[site.graph], old)
            statistic = batch[role] if batch[role].dtype == dtype else op("Cast", batch[role], DstT=protos.Dtype(dtype))
            before = self.updates.get(holder) or self._old(site, holder, old, statistic)
            self.after[holder] = site
            self.updates[holder] = moving_average(before, statistic, momentum.weight)

    def _kernels(self, site: Site, node: str) -> Mapping[str, Expr]:
        """Return the kernel's statistics; where the kernel stands for single ops, the variance is the population's."""
        mean, variance = (Use("float32", Value(node, port)) for port in STATISTICS.values())
        source = self.model.graphs[site.graph].nodes[site.node]
        if POPULATION not in source.attrs:
            return {MEAN: mean, VARIANCE: variance}
        x = source.inputs[0]
        dtype = op_defs.output_dtype(self.model, self.model.graphs[site.graph], x)
        channels = source.attrs[POPULATION].i
        return {MEAN: mean, VARIANCE: population(variance, Use(dtype, self._value(x)), channels)}

    def _old(self, site: Site, holder: Value, old: Value, batch: Expr) -> Expr:
        """Return the average so far; in a loop, each round reads what the round before assigned."""
        frame_of = self.model.analysis_of(self.model.graphs[site.graph], loop_frames)
        if frame_of.get(old.node) == frame_of.get(site.node):
            return Use(batch.dtype, self._value(old))
        read = op("ReadVariableOp", Use("resource", self._value(holder)), dtype=protos.Dtype(batch.dtype))
        # The resource comes from outside of the loop; the control input lets the read run in each round.
        return ordered(read, [batch])

    def _edge(self, edge: Edge) -> Edge:
        return Edge(self.graph, self.copied(edge.node), edge.position)

    def _value(self, value: Value) -> Value:
        value = self.resolved(value)
        return Value(self.copied(value.node), value.port)

    def _moments(self, site: Site) -> Mapping[str, Expr]:
        """Return mean and population variance over all axes but that of the channels, as ``tf.nn.moments`` does."""
        graph = self.model.graphs[site.graph]
        value = self._entering(site)
        x: Expr = Use(op_defs.output_dtype(self.model, graph, value), self._value(value))
        mean_edge = site.binding.parameters[MEAN][0]
        dtype = op_defs.output_dtype(self.model, graph, graph.used_at(mean_edge))
        if x.dtype != dtype:
            x = op("Cast", x, DstT=protos.Dtype(dtype))
        shaped = self._shaped(graph, site, mean_edge)
        axes = self._axes(site, mean_edge, shaped, x)
        mean = op("Mean", x, axes, keep_dims=True)
        variance = op("Mean", op("SquaredDifference", x, stop_gradient(mean)), axes, keep_dims=True)
        mean_shape = op("Shape", Use(dtype, self._value(self._used(graph, mean_edge))))
        return {MEAN: op("Reshape", mean, mean_shape), VARIANCE: op("Reshape", variance, mean_shape)}

    def _entering(self, site: Site) -> Value:
        """Return the value that a site normalises, in its own graph."""
        return self._used(self.model.graphs[site.graph], site.inputs[INPUT][0])

    def _axes(self, site: Site, mean_edge: Edge, shaped: Expr, x: Expr) -> Expr:
        """Return the axes to reduce: those over which `shaped` is broadcast, the mean in its shape where x meets it."""
        keys = {key[2] for key in site.binding.variables}
        vectors = all(k is not None and len(self.model.variables[k].shape or ()) == 1 for k in keys)
        # A vector that x meets as it is read lies along the last axis.
        if vectors and mean_edge == site.inputs[MEAN][0]:
            shape = shape_of(self.model, self.model.graphs[site.graph], self._entering(site))
            if shape is not None:
                return array(np.arange(len(shape) - 1, dtype=np.int32))
            return op("Range", constant(0, "int32"), op("Rank", x) - 1, constant(1, "int32"))
        missing = op("Reshape", op("Rank", x) - op("Rank", shaped), array(np.array([1], dtype=np.int32)))
        ones = op("Fill", missing, constant(1, "int32"))
        sizes = concat((ones, op("Shape", shaped)))
        broadcast = op("Where", op("Equal", sizes, constant(1, "int32")))
        return op("Cast", op("Reshape", broadcast, array(np.array([-1], dtype=np.int32))), DstT=protos.Dtype("int32"))

    @staticmethod
    def _used(graph: Graph, edge: Edge) -> Value:
        return graph.used_at(edge)

    def _shaped(self, graph: Graph, site: Site, mean_edge: Edge) -> Expr:
        """Return the moving mean in the shape in which x meets it.

        It is computed again from its own value, as the graph's is rewired to the batch's.
        """
        path = []
        edge = site.inputs[MEAN][0]
        while edge != mean_edge:
            node = graph.nodes[self._used(graph, edge).node]
            edge = Edge(graph.name, node.name, 0)
            path.append(node)
        start = self._used(graph, mean_edge)
        value: Expr = Use(op_defs.output_dtype(self.model, graph, start), self._value(start))
        for node in reversed(path):
            if constants.viewed(graph, node) is not None:
                rest = tuple(Use(op_defs.output_dtype(self.model, graph, v), self._value(v)) for v in node.inputs[1:])
                attrs = {k: v for k, v in node.attrs.items() if not k.startswith("_")}
                value = Apply(value.dtype, node.op, (value, *rest), attrs)
        return value

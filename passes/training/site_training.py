"""How a site is put into training mode, and what its moving averages become."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from passes.batch_norm.batch_norms import moving_average
from passes.batch_norm.decomposed import INPUT
from passes.batch_norm.kernel import POPULATION, population
from passes.batch_norm.sites import STATISTICS, Site
from passes.roles import MEAN, VARIANCE
from passes.training.options import MOMENTUM, TrainingOptions
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
    """A moving average as a graph reads it: what holds it (a resource or a reference), and the value read."""

    holder: Value
    old: Value


def averages(model: Model, site: Site) -> Mapping[str, Average]:
    """The moving averages of a site by role; none where one of them is read in another graph."""
    graph = model.graphs[site.graph]
    found = {}
    for role in STATISTICS:
        edge = site.inputs[role][0]
        average = _average(graph, graph.nodes[edge.node].inputs[edge.position])
        if average is None:
            return {}
        found[role] = average
    return found


def own_updates(graph: Graph, holders: Iterable[Value], nodes: Iterable[str]) -> Iterator[str]:
    """Of some nodes, those by which serving itself updates averages; derived training does so in its own way."""
    held = {origin(graph, holder) for holder in holders}
    for name in nodes:
        node = graph.nodes[name]
        if node.op in RESOURCE_ASSIGNS and origin(graph, node.inputs[0]) in held:
            yield name


def _average(graph: Graph, value: Value) -> Average | None:
    old = value
    while True:
        node = graph.nodes[value.node]
        if node.op == "ReadVariableOp":
            return Average(node.inputs[0], value)
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
        graph: where the copy is.
        copied: a node's name -> its name in the copy.
        options: those of training; they have the momentum where no training site says it.
        resolved: a value -> the value that stands for it in the copy, where that chooses nothing any longer.
        updates: what each average, by what holds it, is to become.
        after: the site that each update follows.
    """

    model: Model
    graph: str
    copied: Callable[[str], str]
    options: TrainingOptions
    resolved: Callable[[Value], Value] = field(default=lambda value: value)
    updates: dict[Value, Expr] = field(default_factory=dict)
    after: dict[Value, Site] = field(default_factory=dict)

    def edits(self, site: Site) -> Iterator[Edit]:
        """Let a site normalise with the batch's statistics, and note what its averages become.

        Where several sites share their variables, one update follows the other.
        """
        if site.kind == "fused":
            node = self.copied(site.node)
            yield SetAttr(self.graph, node, "is_training", None)
            batch: Mapping[str, Expr] = self._kernels(site, node)
        else:
            batch = self._moments(site)
            for role, statistic in batch.items():
                for edge in site.parameters[role]:
                    yield Rewire(self._edge(edge), statistic, self.copied(site.node))
        momentum = self.options.momentum_of(self.model, site)
        yield SetAttr(self.graph, self.copied(site.node), MOMENTUM, protos.attr(momentum.whose))
        for role, (holder, old) in averages(self.model, site).items():
            dtype = op_defs.output_dtype(self.model, self.model.graphs[site.graph], old)
            statistic = batch[role] if batch[role].dtype == dtype else op("Cast", batch[role], DstT=protos.Dtype(dtype))
            before = self.updates.get(holder) or self._old(site, holder, old, statistic)
            self.after[holder] = site
            self.updates[holder] = moving_average(before, statistic, momentum.factor)

    def _kernels(self, site: Site, node: str) -> Mapping[str, Expr]:
        """The kernel's statistics; where it stands for single ops, the variance is the population's."""
        mean, variance = (Use("float32", Value(node, port)) for port in STATISTICS.values())
        source = self.model.graphs[site.graph].nodes[site.node]
        if POPULATION not in source.attrs:
            return {MEAN: mean, VARIANCE: variance}
        x = source.inputs[0]
        dtype = op_defs.output_dtype(self.model, self.model.graphs[site.graph], x)
        channels = source.attrs[POPULATION].i
        return {MEAN: mean, VARIANCE: population(variance, Use(dtype, self._value(x)), channels)}

    def _old(self, site: Site, holder: Value, old: Value, batch: Expr) -> Expr:
        """The average so far; in a loop, each round reads what the one before left."""
        frame_of = self.model.analysis_of(self.model.graphs[site.graph], loop_frames)
        if frame_of.get(old.node) == frame_of.get(site.node):
            return Use(batch.dtype, self._value(old))
        read = op("ReadVariableOp", Use("resource", self._value(holder)), dtype=protos.Dtype(batch.dtype))
        return ordered(read, [batch])

    def _edge(self, edge: Edge) -> Edge:
        return Edge(self.graph, self.copied(edge.node), edge.position)

    def _value(self, value: Value) -> Value:
        value = self.resolved(value)
        return Value(self.copied(value.node), value.port)

    def _moments(self, site: Site) -> Mapping[str, Expr]:
        """Mean and (population) variance over all axes but that of the channels, as ``tf.nn.moments`` has them."""
        graph = self.model.graphs[site.graph]
        value = self._entering(site)
        x: Expr = Use(op_defs.output_dtype(self.model, graph, value), self._value(value))
        held = site.parameters[MEAN][0]
        dtype = op_defs.output_dtype(self.model, graph, graph.nodes[held.node].inputs[held.position])
        if x.dtype != dtype:
            x = op("Cast", x, DstT=protos.Dtype(dtype))
        shaped = self._shaped(graph, site, held)
        axes = self._axes(site, held, shaped, x)
        mean = op("Mean", x, axes, keep_dims=True)
        variance = op("Mean", op("SquaredDifference", x, stop_gradient(mean)), axes, keep_dims=True)
        own = op("Shape", Use(dtype, self._value(self._used(graph, held))))
        return {MEAN: op("Reshape", mean, own), VARIANCE: op("Reshape", variance, own)}

    def _entering(self, site: Site) -> Value:
        """What a site normalises, in its own graph."""
        return self._used(self.model.graphs[site.graph], site.inputs[INPUT][0])

    def _axes(self, site: Site, held: Edge, shaped: Expr, x: Expr) -> Expr:
        """The axes to reduce: all that the mean is broadcast over, where it has the shape in which x meets it."""
        keys = {key[2] for key in site.variables}
        vectors = all(k is not None and len(self.model.variables[k].shape or ()) == 1 for k in keys)
        if vectors and held == site.inputs[MEAN][0]:
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
        return graph.nodes[edge.node].inputs[edge.position]

    def _shaped(self, graph: Graph, site: Site, held: Edge) -> Expr:
        """The moving mean as x meets it, made again from its own value: the graph's is rewired to the batch's."""
        way = []
        edge = site.inputs[MEAN][0]
        while edge != held:
            node = graph.nodes[self._used(graph, edge).node]
            edge = Edge(graph.name, node.name, 0)
            way.append(node)
        start = self._used(graph, held)
        value: Expr = Use(op_defs.output_dtype(self.model, graph, start), self._value(start))
        for node in reversed(way):
            if constants.viewed(graph, node) is not None:
                rest = tuple(Use(op_defs.output_dtype(self.model, graph, v), self._value(v)) for v in node.inputs[1:])
                attrs = {k: v for k, v in node.attrs.items() if not k.startswith("_")}
                value = Apply(value.dtype, node.op, (value, *rest), attrs)
        return value

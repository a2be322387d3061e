"""How a site is put into training mode, and what its moving averages become."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from passes.batch_norm import batch_norms, moving_average
from passes.decomposed import INPUT
from passes.roles import MEAN, VARIANCE
from passes.sites import STATISTICS, Site
from rewriter import ops
from rewriter.dataflow import REFERENCES
from rewriter.edit import Edit, Rewire, SetAttr
from rewriter.expr import Expr, Use, array, constant, op, ordered, stop_gradient
from rewriter.frames import Frame, frames
from rewriter.ir import Edge, Graph, Model, Value
from rewriter.pattern import origin

DEFAULT_MOMENTUM = 0.99


def loop_frames(_: Model, graph: Graph) -> Mapping[str, Frame]:
    """The frames of a graph's nodes (to be memoised)."""
    return frames(graph)


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


def _average(graph: Graph, value: Value) -> Average | None:
    old = value
    while True:
        node = graph.nodes[value.node]
        if node.op == "ReadVariableOp":
            return Average(node.inputs[0], value)
        if node.op in REFERENCES:
            return Average(value, old)
        passed = node.inputs[0] if node.op in ops.VIEWS else ops.forwarded(node, value.port)
        if passed is None:
            return None
        old, value = value, passed


def factors(model: Model, site: Site) -> list[float]:
    """The weights of a batch's statistics that the model's training sites give the batch norms of a site."""
    found = [bn.factor for bn in model.analysis(batch_norms) if site in bn.sites]
    return list(dict.fromkeys(f for f in found if f is not None))


@dataclass
class Training:
    """Sites of one graph in training mode, in that graph or in a copy.

    Attributes:
        graph: where the copy is.
        copied: a node's name -> its name in the copy.
        momentum: where no training site says it; None stands for 0.99.
        updates: what each average, by what holds it, is to become.
        after: the site that each update follows.
    """

    model: Model
    graph: str
    copied: Callable[[str], str]
    momentum: float | None
    updates: dict[Value, Expr] = field(default_factory=dict)
    after: dict[Value, Site] = field(default_factory=dict)

    def edits(self, site: Site) -> Iterator[Edit]:
        """Let a site normalise with the batch's statistics, and note what its averages become.

        Where several sites share their variables, one update follows the other.
        """
        if site.kind == "fused":
            node = self.copied(site.node)
            yield SetAttr(self.graph, node, "is_training", None)
            batch: Mapping[str, Expr] = {r: Use("float32", Value(node, port)) for r, port in STATISTICS.items()}
        else:
            batch = self._moments(site)
            for role, statistic in batch.items():
                for edge in site.parameters[role]:
                    yield Rewire(self._edge(edge), statistic, self.copied(site.node))
        given = None if self.momentum is None else 1 - self.momentum
        factor = next(iter(factors(self.model, site)), given)
        for role, (holder, old) in averages(self.model, site).items():
            before = self.updates.get(holder) or self._old(site, holder, old, batch[role])
            self.after[holder] = site
            self.updates[holder] = moving_average(
                before, batch[role], 1 - DEFAULT_MOMENTUM if factor is None else factor
            )

    def _old(self, site: Site, holder: Value, old: Value, batch: Expr) -> Expr:
        """The average so far; in a loop, each round reads what the one before left."""
        frame_of = self.model.analysis_of(self.model.graphs[site.graph], loop_frames)
        if frame_of.get(old.node) == frame_of.get(site.node):
            return Use(batch.dtype, self._value(old))
        read = op("ReadVariableOp", Use("resource", self._value(holder)), dtype=ops.Dtype(batch.dtype))
        return ordered(read, [batch])

    def _edge(self, edge: Edge) -> Edge:
        return Edge(self.graph, self.copied(edge.node), edge.position)

    def _value(self, value: Value) -> Value:
        return Value(self.copied(value.node), value.port)

    def _moments(self, site: Site) -> Mapping[str, Expr]:
        """Mean and (population) variance over all axes but that of the channels, as ``tf.nn.moments`` has them."""
        graph = self.model.graphs[site.graph]
        (edge, *_) = site.inputs[INPUT]
        value = graph.nodes[edge.node].inputs[edge.position]
        x: Expr = Use(ops.output_dtype(self.model, graph, value), self._value(value))
        held = site.parameters[MEAN][0]
        dtype = ops.output_dtype(self.model, graph, graph.nodes[held.node].inputs[held.position])
        if x.dtype != dtype:
            x = op("Cast", x, DstT=ops.Dtype(dtype))
        axes = self._axes(graph, site, x)
        mean = op("Mean", x, axes, keep_dims=True)
        variance = op("Mean", op("SquaredDifference", x, stop_gradient(mean)), axes, keep_dims=True)
        vector = array(np.array([-1], dtype=np.int32))
        return {MEAN: op("Reshape", mean, vector), VARIANCE: op("Reshape", variance, vector)}

    def _axes(self, graph: Graph, site: Site, x: Expr) -> Expr:
        """The axes to reduce: the shape that the mean is given says where the channels are, else they are last."""
        edge = site.inputs[MEAN][0]
        node = graph.nodes[graph.nodes[edge.node].inputs[edge.position].node]
        while node.op in ops.FORWARDS and node.op != "ReadVariableOp":
            node = graph.nodes[node.inputs[0].node]
        if node.op == "Reshape":
            shape = ops.constant_of(graph, origin(graph, node.inputs[1]))
            if shape is not None:
                channel = int(np.argmax(shape != 1))
                return array(np.array([i for i in range(shape.size) if i != channel], dtype=np.int32))
        last = op("Rank", x) - 1
        return op("Range", constant(0, "int32"), last, constant(1, "int32"))

"""Batch norms in single ops that the fused kernel can compute, and the kernel's operands."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from passes.batch_norm.decomposed import INPUT, OPS
from passes.batch_norm.kernel import DTYPES, WIDE, Layout, layout_of
from passes.batch_norm.moments import NO_GRADIENT, Moments, moments
from passes.batch_norm.roles import BETA, GAMMA, MEAN, VARIANCE
from passes.batch_norm.site import Site
from passes.batch_norm.sites import sites
from passes.control_flow.predicates import gated, gates, leads_to
from passes.declined import DeclinedError
from rewriter import constants, op_defs, protos
from rewriter.dataflow import Argument, Computed, VariableKey, consumers, origins
from rewriter.edit import Replace
from rewriter.expr import Apply, Expr, Use, array, op, ordered
from rewriter.frames import loop_frames
from rewriter.ir import Edge, Graph, Model, Value
from rewriter.pattern import origin, way
from rewriter.shapes import Shape, shape_of

INSIDE = OPS | {"Cast", "EnsureShape", "ExpandDims", "Identity", "IdentityN", "Reshape", "Snapshot", "Squeeze"}
INSIDE |= {"StridedSlice"}
"""Ops that the kernel may replace. Others between them, such as Switch or StopGradient, have an effect of their own."""


Bring = Callable[[str, Value], Expr]
"""Maps the dtype of a graph's value, and the value, to an expression where the value is needed."""

Outer = Callable[[Value], Value]
"""Maps a value of a branch to the value of the site's graph that it stands for."""


def here(dtype: str, value: Value) -> Expr:
    """Return a value in its own graph."""
    return Use(dtype, value)


@dataclass(frozen=True)
class Fusable:
    """A site that can be fused.

    Attributes:
        x: the value that is normalised, before ops that only let it wait.
        layout: the layout in which the kernel takes x.
        channel: the axis of the channels of x.
        fed: nodes that will take the statistics of kernels of the same graph, by the nodes that those kernels need.
    """

    model: Model
    site: Site
    x: Value
    layout: Layout
    channel: int
    fed: dict[str, list[str]]

    @property
    def graph(self) -> Graph:
        """The graph that the site lies in."""
        return self.model.graphs[self.site.graph]

    def x_in(self, bring: Bring = here) -> Expr:
        """Return x as an expression where it is needed."""
        return bring(self.dtype(self.graph, self.x), self.x)

    def used(self, role: str) -> Value:
        """Return the value that x meets in this role."""
        return self.graph.used_at(self.site.inputs[role][0])

    @property
    def precise(self) -> frozenset[str]:
        """Dtypes that values may be cast to on the way: the kernel computes in float32, and rounds to that of x."""
        return WIDE | {self.dtype(self.graph, self.x)}

    def computed(self, graph: Graph, value: Value) -> Value:
        """Return a statistic as it was computed, before changes of its shape and dtype.

        Raises:
            DeclinedError: it is rounded to fewer digits on the way.
        """
        passing = [v.node for v in way(graph, value, stop=NO_GRADIENT)]
        require_precise(graph, passing, self.precise)
        return origin(graph, value, stop=NO_GRADIENT)

    def parameters(self, bring: Bring = here) -> dict[str, Expr]:
        """Return gamma and beta, where there are any, as the kernel takes them."""
        roles = [r for r in (GAMMA, BETA) if r in self.site.inputs]
        return {role: self.vector(self.graph, self.used(role), bring) for role in roles}

    def moving_statistics(self, graph: Graph, values: Mapping[str, Value]) -> dict[str, Expr]:
        """Return moving statistics, by role, as the kernel takes them.

        Raises:
            DeclinedError: one is computed, or may be trained, for which the kernel has no gradient.
        """
        for role, value in values.items():
            name = role.replace("_", " ")
            for source in origins(self.model, graph.name, origin(graph, value)):
                if isinstance(source, Computed):
                    raise DeclinedError(f"its {name} is computed by {source.node} ({source.op})")
                if isinstance(source, Argument):
                    raise DeclinedError(
                        f"its {name} may come from a caller, to whom the fused kernel gives no gradient"
                    )
                # Some Keras versions mark every variable as trainable; what is averaged is not trained.
                if isinstance(source, VariableKey) and source.key not in self.model.analysis(_averaged):
                    raise DeclinedError(f"its {name} is trained, for which the fused kernel has no gradient")
        return {role: self.vector(graph, value) for role, value in values.items()}

    def vector(self, graph: Graph, value: Value, bring: Bring = here) -> Expr:
        """Return the numbers that a value holds for each channel, as a float32 vector.

        The value is followed back through changes of its shape and dtype.

        Raises:
            DeclinedError: it does not hold one number for each channel.
        """
        node = graph.nodes[value.node]
        while node.op == "Cast" or constants.viewed(graph, node) is not None:
            require_precise(graph, [node.name], self.precise)
            value = node.inputs[0]
            node = graph.nodes[value.node]
        dtype = self.dtype(graph, value)
        vector = bring(dtype, value)
        shape = shape_of(self.model, graph, value)
        if shape is None or np.prod(shape) != self.layout.channels:
            described = "unknown shape" if shape is None else f"the shape {_text(shape)}"
            raise DeclinedError(f"{value.node} has {described}, and x has {self.layout.channels} channels")
        if len(shape) != 1:
            vector = op("Reshape", vector, array(np.array([self.layout.channels], dtype=np.int32)))
        return vector if dtype == "float32" else op("Cast", vector, DstT=protos.Dtype("float32"))

    def dtype(self, graph: Graph, value: Value) -> str:
        """Return the dtype of a value."""
        return op_defs.output_dtype(self.model, graph, value)

    def moments_of_x(self, graph: Graph, mean: Value, variance: Value, outer: Outer = lambda value: value) -> Moments:
        """Return the moments that two values of a graph are; `outer` maps a value to that of the site's graph.

        Raises:
            DeclinedError: they are no moments, or not those of x over all axes but that of the channels.
        """
        statistics = moments(self.model, graph, mean, variance)
        if isinstance(statistics, str):
            raise DeclinedError(statistics)
        if origin_of_x(self.graph, outer(statistics.x)) != origin_of_x(self.graph, self.x):
            raise DeclinedError(
                f"its statistics are those of {statistics.x.node}, and what they normalise is {self.x.node}"
            )
        require_precise(graph, sorted(statistics.nodes), self.precise)
        self._require_same_x(graph, statistics, outer)
        shape = shape_of(self.model, self.graph, self.x) or ()
        if statistics.axes != frozenset(range(len(shape))) - {self.channel}:
            axes = ", ".join(str(a) for a in sorted(statistics.axes))
            raise DeclinedError(
                f"its statistics are taken over the axes {axes} of {len(shape)}, and applied along axis {self.channel}"
            )
        if statistics.subtracted is not None and _channel(shape, [statistics.subtracted]) != self.channel:
            raise DeclinedError(
                f"its variance is that of differences from the mean along another axis than {self.channel}"
            )
        return statistics

    def _require_same_x(self, graph: Graph, statistics: Moments, outer: Outer) -> None:
        """Refuse statistics of x in another precision than that of the x which is normalised."""
        normalised = _casts(self.graph, self.x)
        for edge in statistics.uses:
            averaged = _casts(graph, graph.used_at(edge)) | _casts(self.graph, outer(statistics.x))
            for holder, name in sorted(averaged ^ normalised):
                node = self.model.graphs[holder].nodes[name]
                before = self.dtype(self.model.graphs[holder], node.inputs[0])
                after = self.dtype(self.model.graphs[holder], Value(name))
                if before not in DTYPES or after not in WIDE:  # to fewer digits
                    raise DeclinedError(
                        f"{name} casts x to {after}, but not both for its statistics and to normalise it"
                    )

    def waiting(self, y: Apply, graph: Graph, values: Iterable[Value], nodes: Iterable[str]) -> Apply:
        """Return `y` after the control inputs of all nodes that it replaces: `nodes`, and those that pass `values` on.

        In TensorFlow 1's graphs an update may run only because what is normalised waits for it.
        """
        passing = {v.node for value in values for v in (*way(graph, value, stop=NO_GRADIENT),)[:-1]}
        if graph is self.graph:
            passing.update(_waits(graph, self.used(INPUT)))
        replaced = {*nodes, *passing}
        # A constant such as epsilon has no input that could wait, so it has the control inputs itself.
        replaced |= {v.node for n in replaced for v in graph.nodes[n].inputs if graph.nodes[v.node].op == "Const"}
        before = {name for node in replaced for name in graph.nodes[node].after} - replaced
        # The Identity waits, and not the kernel: an update among these nodes may take the kernel's statistics.
        return ordered(op("Identity", y), [Use("", Value(name)) for name in sorted(before)]) if before else y

    @property
    def kernel_inputs(self) -> tuple[Value, ...]:
        """The inputs of a kernel in training mode: x and, where there are any, gamma and beta."""
        return (self.x, *(self.used(role) for role in (GAMMA, BETA) if role in self.site.inputs))

    def before_kernel(self, nodes: Iterable[str], more: Collection[str] = ()) -> bool:
        """Return true if one of some nodes runs before an input of the kernel, and so cannot use its outputs.

        The kernel needs the nodes in `more` besides x and the parameters.
        """
        # Each of two batch norms may wait for the other's averages. If both fed their averages, there would be a cycle.
        return leads_to(self.model, self.graph, nodes, {*(v.node for v in self.kernel_inputs), *more}, self.fed)

    def feeds(self, nodes: Sequence[str], more: Collection[str] = ()) -> None:
        """Record in `fed` that some nodes will use the kernel's outputs."""
        for name in {*(v.node for v in self.kernel_inputs), *more}:
            self.fed.setdefault(name, []).extend(nodes)

    def runs_with(self, statistic: Value) -> bool:
        """Return true if the kernel runs wherever a batch's statistic is computed.

        Raises:
            DeclinedError: it would run where the single ops do not.
        """
        statistics = [self.used(role) for role in (MEAN, VARIANCE)]
        for gate in frozenset().union(*(gates(self.graph, v) for v in statistics)):
            if not gated(self.model, self.graph, gate, self.kernel_inputs):
                raise DeclinedError(f"its statistics are there only if {gate[0].node} is {gate[1]}, and x always")
        # A loop may normalise with statistics that are averaged outside of it, where its kernel's cannot be used.
        frame_of = self.model.analysis_of(self.graph, loop_frames)
        if frame_of.get(statistic.node) != frame_of.get(self.site.node):
            return False
        needed = frozenset().union(*(gates(self.graph, v) for v in self.kernel_inputs))
        return all(gated(self.model, self.graph, gate, [statistic]) for gate in needed)

    def require_own(self, more: frozenset[str] = frozenset()) -> None:
        """Refuse single ops if something else uses one of their intermediate values.

        Args:
            more: further nodes that the kernel replaces, such as those of the moments.

        Raises:
            DeclinedError: something does; the message names it.
        """
        uses = self.model.analysis_of(self.graph, consumers)
        inside = self.model.analysis(_single_ops)[self.site.graph] | more
        for name in self.site.interior:
            for edge in uses.get(Value(name), ()):
                if edge.node not in inside:
                    user = f"{edge.node} ({self.graph.nodes[edge.node].op})" if edge.node else "the function's caller"
                    raise DeclinedError(f"{user} uses {name}, which is computed on the way, so nothing would be saved")


def require_precise(graph: Graph, names: Iterable[str], precise: Collection[str]) -> None:
    """Refuse casts to other dtypes than these.

    Raises:
        DeclinedError: there is one; the message names it.
    """
    for name in names:
        node = graph.nodes[name]
        rounded = protos.dtype_name(op_defs.attribute(node, "DstT").type) if node.op == "Cast" else ""
        if rounded and rounded not in precise:
            raise DeclinedError(f"{name} rounds to {rounded}, which the kernel does not")


def _casts(graph: Graph, value: Value) -> frozenset[tuple[str, str]]:
    """Return (graph, node) of the casts between x in its own shape and its use."""
    passing = (v.node for v in way(graph, value, shaped=True, stop=NO_GRADIENT))
    return frozenset((graph.name, name) for name in passing if graph.nodes[name].op == "Cast")


def origin_of_x(graph: Graph, value: Value) -> Value:
    """Return the value that two uses of x have in common: x in its own shape."""
    return origin(graph, value, shaped=True, stop=NO_GRADIENT)


def replaced(candidate: Fusable, y: Apply) -> Replace:
    """Return the edit that lets the last of the single ops compute y."""
    node = candidate.graph.nodes[candidate.site.node]
    dtype = candidate.dtype(candidate.graph, Value(node.name))
    if y.dtype != dtype:
        y = op("Cast", y, DstT=protos.Dtype(dtype))
    # The kernel has six outputs, and TensorFlow refuses a list of shapes that is shorter.
    if "_output_shapes" in node.attrs and not y.op.startswith("FusedBatchNorm"):
        y = replace(y, attrs={**y.attrs, "_output_shapes": node.attrs["_output_shapes"]})
    return Replace(candidate.site.graph, node.name, y)


def fusable(model: Model, site: Site, fed: dict[str, list[str]]) -> Fusable:
    """Return a site as one that can be fused; `fed` is what `Fusable.feeds` recorded of others of its graph.

    Raises:
        DeclinedError: the site cannot be fused.
    """
    if INPUT not in site.inputs:
        raise DeclinedError(site.reason)
    graph = model.graphs[site.graph]
    (edge, *_) = site.inputs[INPUT]
    x = graph.used_at(edge)
    for name in _waits(graph, x):
        x = graph.nodes[name].inputs[0]
    dtype = op_defs.output_dtype(model, graph, x)
    if dtype not in DTYPES:
        raise DeclinedError(f"it computes in {dtype}, which the fused kernel does not have")
    for name in site.interior:
        if graph.nodes[name].op not in INSIDE:
            raise DeclinedError(f"{name} ({graph.nodes[name].op}) lies inside of it, which has an effect of its own")
    require_precise(graph, site.interior, WIDE | {dtype})
    shape = shape_of(model, graph, x)
    if shape is None:
        raise DeclinedError(f"the shape of what enters, {x.node}, is not known before it runs")
    channel = _channel(shape, list(_operand_shapes(model, site, edge)))
    layout = layout_of(shape, channel)
    if layout is None:
        raise DeclinedError(f"its channels are axis {channel} of {len(shape)}, for which the kernel has no layout")
    return Fusable(model, site, x, layout, channel, fed)


def _waits(graph: Graph, value: Value) -> Iterator[str]:
    """Yield the nodes that only let a value wait for others. A kernel takes it before them, and its y waits."""
    node = graph.nodes[value.node]
    while node.op == "Identity" and node.after:
        yield node.name
        node = graph.nodes[node.inputs[0].node]


def _operand_shapes(model: Model, site: Site, edge: Edge) -> Iterator[Shape]:
    """Yield the shapes of the operands that x meets, one op after the other, on its way to the end."""
    graph = model.graphs[site.graph]
    inside = {*site.interior, site.node}
    while True:
        user = graph.nodes[edge.node]
        for position, value in enumerate(user.inputs):
            if position != edge.position:
                shape = shape_of(model, graph, value)
                if shape is None:
                    raise DeclinedError(f"the shape of {value.node} is not known before it runs")
                yield shape
        if user.name == site.node:
            return
        uses = model.analysis_of(graph, consumers)[Value(user.name)]
        edge = next(e for e in uses if e.node in inside)


def _channel(shape: Shape, operands: list[Shape]) -> int:
    """Return the axis along which all operands that x meets are applied."""
    sizes = {size for operand in operands for size in operand if size != 1}
    if any(len(operand) > len(shape) for operand in operands) or len(sizes) > 1:
        raise DeclinedError(f"what it applies to x of shape {_text(shape)} has the shapes {_texts(operands)}")
    if not sizes:
        # With a single channel every axis of size 1 gives the same result; axis 0 is the batch's.
        unit_axes = [axis for axis, size in enumerate(shape) if size == 1 and axis]
        if not unit_axes:
            raise DeclinedError("its parameters are single numbers, applied to several channels")
        return unit_axes[-1]
    axes = {len(shape) - len(operand) + axis for operand in operands for axis, size in enumerate(operand) if size != 1}
    (channel, *others) = sorted(axes)
    if others or any(all(size == 1 for size in operand) for operand in operands):
        raise DeclinedError(f"what it applies to x of shape {_text(shape)} has the shapes {_texts(operands)}")
    if shape[channel] not in sizes or shape[channel] < 0:
        raise DeclinedError(f"its parameters have {sizes.pop()} elements, and x has the shape {_text(shape)}")
    return channel


def _text(shape: Shape) -> str:
    return "[" + ", ".join("?" if size < 0 else str(size) for size in shape) + "]"


def _texts(shapes: list[Shape]) -> str:
    return " and ".join(dict.fromkeys(_text(shape) for shape in shapes))


def _averaged(model: Model) -> frozenset[str]:
    """Return the keys of variables that hold moving averages, or that are not marked trainable."""
    averages = {
        key
        for s in model.analysis(sites)
        if any(s.binding.statistics.values())
        for v in s.binding.variables
        for key in v[2:4]
        if key
    }
    return frozenset(averages | {key for key, variable in model.variables.items() if not variable.trainable})


def _single_ops(model: Model) -> Mapping[str, frozenset[str]]:
    """Return graph -> the nodes of all groups of single ops."""
    nodes_of: dict[str, set[str]] = {}
    for site in model.analysis(sites):
        nodes_of.setdefault(site.graph, set()).update(site.interior, (site.node,))
    return {graph: frozenset(nodes) for graph, nodes in nodes_of.items()}

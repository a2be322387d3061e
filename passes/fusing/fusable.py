"""Whether batch norm in single ops can be the fused kernel, and on which operands."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from passes.batch_norm.decomposed import INPUT, OPS
from passes.batch_norm.kernel import DTYPES, WIDE, Layout, layout_of
from passes.batch_norm.moments import NO_GRADIENT, Moments, moments
from passes.batch_norm.sites import Site, sites
from passes.control_flow.predicates import gated, gates, leads_to
from passes.declined import DeclinedError
from passes.roles import BETA, GAMMA, MEAN, VARIANCE
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
"""Ops that the kernel may stand for. Others between them, as Switch or StopGradient, mean something of their own."""


Bring = Callable[[str, Value], Expr]
"""How a value of a graph, of this dtype, comes to where it is needed."""


Outer = Callable[[Value], Value]


def here(dtype: str, value: Value) -> Expr:
    """A value in its own graph."""
    return Use(dtype, value)


@dataclass(frozen=True)
class Fusable:
    """A site that can be fused.

    Attributes:
        x: what enters, before ops that only let it wait.
        layout: how the kernel is to see it.
        channel: the axis of its channels.
        fed: what will take the statistics of kernels of the same graph, by the nodes that those kernels need.
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

    def given(self, bring: Bring = here) -> Expr:
        """What is normalised, where it is needed."""
        return bring(self.dtype(self.graph, self.x), self.x)

    def used(self, role: str) -> Value:
        """What x meets as this role."""
        return used(self.graph, self.site.inputs[role][0])

    @property
    def precise(self) -> frozenset[str]:
        """The dtypes that values may be cast to on the way: the kernel computes in float32, and rounds to that of x."""
        return WIDE | {self.dtype(self.graph, self.x)}

    def computed(self, graph: Graph, value: Value) -> Value:
        """A statistic as it was computed, before changes of its shape and dtype.

        Raises:
            DeclinedError: it is rounded to fewer digits on the way.
        """
        passing = [v.node for v in way(graph, value, stop=NO_GRADIENT)]
        require_precise(graph, passing, self.precise)
        return origin(graph, value, stop=NO_GRADIENT)

    def parameters(self, bring: Bring = here) -> dict[str, Expr]:
        """Gamma and beta, where there are any, as the kernel takes them."""
        roles = [r for r in (GAMMA, BETA) if r in self.site.inputs]
        return {role: self.vector(self.graph, self.used(role), bring) for role in roles}

    def held(self, graph: Graph, values: Mapping[str, Value]) -> dict[str, Expr]:
        """Moving statistics, by role, as the kernel takes them.

        Raises:
            DeclinedError: one is computed, or is trained, as the kernel has no gradient for it.
        """
        for role, value in values.items():
            name = role.replace("_", " ")
            for found in origins(self.model, graph.name, origin(graph, value)):
                if isinstance(found, Computed):
                    raise DeclinedError(f"its {name} is computed by {found.node} ({found.op})")
                if isinstance(found, Argument):
                    raise DeclinedError(
                        f"its {name} may come from a caller, to whom the fused kernel gives no gradient"
                    )
                # Some Keras versions mark every variable as trainable; what is averaged is not trained.
                if isinstance(found, VariableKey) and found.key not in self.model.analysis(_averaged):
                    raise DeclinedError(f"its {name} is trained, for which the fused kernel has no gradient")
        return {role: self.vector(graph, value) for role, value in values.items()}

    def vector(self, graph: Graph, value: Value, bring: Bring = here) -> Expr:
        """A float32 vector of what a value holds for each channel, before changes of its shape and dtype.

        Raises:
            DeclinedError: it does not hold one number for each channel.
        """
        node = graph.nodes[value.node]
        while node.op == "Cast" or constants.viewed(graph, node) is not None:
            require_precise(graph, [node.name], self.precise)
            value = node.inputs[0]
            node = graph.nodes[value.node]
        dtype = self.dtype(graph, value)
        found = bring(dtype, value)
        shape = shape_of(self.model, graph, value)
        if shape is None or np.prod(shape) != self.layout.channels:
            known = "unknown shape" if shape is None else f"the shape {_text(shape)}"
            raise DeclinedError(f"{value.node} has {known}, and x has {self.layout.channels} channels")
        if len(shape) != 1:
            found = op("Reshape", found, array(np.array([self.layout.channels], dtype=np.int32)))
        return found if dtype == "float32" else op("Cast", found, DstT=protos.Dtype("float32"))

    def dtype(self, graph: Graph, value: Value) -> str:
        """A value's dtype."""
        return op_defs.output_dtype(self.model, graph, value)

    def moments_of_x(self, graph: Graph, mean: Value, variance: Value, outer: Outer = lambda value: value) -> Moments:
        """The batch's statistics that two values of a graph are; `outer` says what a value is in the site's graph.

        Raises:
            DeclinedError: they are none, or not those of x over all axes but that of the channels.
        """
        found = moments(self.model, graph, mean, variance)
        if isinstance(found, str):
            raise DeclinedError(found)
        if origin_of_x(self.graph, outer(found.x)) != origin_of_x(self.graph, self.x):
            raise DeclinedError(f"its statistics are those of {found.x.node}, and what they normalise is {self.x.node}")
        require_precise(graph, sorted(found.nodes), self.precise)
        self._require_same_x(graph, found, outer)
        shape = shape_of(self.model, self.graph, self.x) or ()
        if found.axes != frozenset(range(len(shape))) - {self.channel}:
            axes = ", ".join(str(a) for a in sorted(found.axes))
            raise DeclinedError(
                f"its statistics are taken over the axes {axes} of {len(shape)}, and applied along axis {self.channel}"
            )
        if found.subtracted is not None and _channel(shape, [found.subtracted]) != self.channel:
            raise DeclinedError(
                f"its variance is that of differences from the mean along another axis than {self.channel}"
            )
        return found

    def _require_same_x(self, graph: Graph, found: Moments, outer: Outer) -> None:
        """Refuse statistics of x in other digits than those that are normalised."""
        normalised = _casts(self.graph, self.x)
        for edge in found.uses:
            averaged = _casts(graph, used(graph, edge)) | _casts(self.graph, outer(found.x))
            for holder, name in sorted(averaged ^ normalised):
                node = self.model.graphs[holder].nodes[name]
                before = self.dtype(self.model.graphs[holder], node.inputs[0])
                after = self.dtype(self.model.graphs[holder], Value(name))
                if before not in DTYPES or after not in WIDE:  # to fewer digits
                    raise DeclinedError(
                        f"{name} casts x to {after}, but not both for its statistics and to normalise it"
                    )

    def waiting(self, y: Apply, graph: Graph, values: Iterable[Value], nodes: Iterable[str]) -> Apply:
        """Y, after all that waits before the nodes that it stands for: these, and those that pass these values on.

        In TensorFlow 1's graphs an update may run only because what is normalised waits for it.
        """
        passing = {v.node for value in values for v in (*way(graph, value, stop=NO_GRADIENT),)[:-1]}
        if graph is self.graph:
            passing.update(_waits(graph, self.used(INPUT)))
        replaced = {*nodes, *passing}
        # A constant has no input that could wait, so it is what waits, as epsilon does.
        replaced |= {v.node for n in replaced for v in graph.nodes[n].inputs if graph.nodes[v.node].op == "Const"}
        before = {name for node in replaced for name in graph.nodes[node].after} - replaced
        return ordered(op("Identity", y), [Use("", Value(name)) for name in sorted(before)]) if before else y

    @property
    def taken(self) -> tuple[Value, ...]:
        """What a kernel in training mode takes: x and, where there are any, gamma and beta."""
        return (self.x, *(self.used(role) for role in (GAMMA, BETA) if role in self.site.inputs))

    def before_kernel(self, nodes: Iterable[str], more: Collection[str] = ()) -> bool:
        """Whether one of some nodes runs before what the kernel takes; then they cannot take what it gives.

        What the kernel needs besides x and the parameters are the nodes in `more`.
        """
        return leads_to(self.model, self.graph, nodes, {*(v.node for v in self.taken), *more}, self.fed)

    def feeds(self, nodes: Sequence[str], more: Collection[str] = ()) -> None:
        """Keep in mind that some nodes will take what the kernel gives."""
        for name in {*(v.node for v in self.taken), *more}:
            self.fed.setdefault(name, []).extend(nodes)

    def runs_with(self, statistic: Value) -> bool:
        """Whether the kernel runs wherever a batch's statistic is computed.

        Raises:
            DeclinedError: it would run where the single ops do not.
        """
        met = [self.used(role) for role in (MEAN, VARIANCE)]
        for gate in frozenset().union(*(gates(self.graph, v) for v in met)):
            if not gated(self.model, self.graph, gate, self.taken):
                raise DeclinedError(f"its statistics are there only if {gate[0].node} is {gate[1]}, and x always")
        frame_of = self.model.analysis_of(self.graph, loop_frames)
        if frame_of.get(statistic.node) != frame_of.get(self.site.node):
            return False
        needed = frozenset().union(*(gates(self.graph, v) for v in self.taken))
        return all(gated(self.model, self.graph, gate, [statistic]) for gate in needed)

    def require_own(self, more: frozenset[str] = frozenset()) -> None:
        """Refuse single ops of which something else uses what they compute on the way.

        Args:
            more: nodes that go with them, as those of the moments.

        Raises:
            DeclinedError: naming the use.
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
        DeclinedError: naming the cast.
    """
    for name in names:
        node = graph.nodes[name]
        rounded = protos.dtype_name(op_defs.attribute(node, "DstT").type) if node.op == "Cast" else ""
        if rounded and rounded not in precise:
            raise DeclinedError(f"{name} rounds to {rounded}, which the kernel does not")


def used(graph: Graph, edge: Edge) -> Value:
    """The value used at an edge of a graph."""
    return graph.nodes[edge.node].inputs[edge.position]


def _casts(graph: Graph, value: Value) -> frozenset[tuple[str, str]]:
    """(graph, node) of the casts between x in its own shape and its use."""
    passing = (v.node for v in way(graph, value, shaped=True, stop=NO_GRADIENT))
    return frozenset((graph.name, name) for name in passing if graph.nodes[name].op == "Cast")


def origin_of_x(graph: Graph, value: Value) -> Value:
    """What two uses of x have in common: the value in its own shape."""
    return origin(graph, value, shaped=True, stop=NO_GRADIENT)


def replaced(found: Fusable, y: Apply) -> Replace:
    """Let the last of the single ops be what computes y."""
    node = found.graph.nodes[found.site.node]
    dtype = found.dtype(found.graph, Value(node.name))
    if y.dtype != dtype:
        y = op("Cast", y, DstT=protos.Dtype(dtype))
    if "_output_shapes" in node.attrs and not y.op.startswith("FusedBatchNorm"):
        y = replace(y, attrs={**y.attrs, "_output_shapes": node.attrs["_output_shapes"]})
    return Replace(found.site.graph, node.name, y)


def fusable(model: Model, site: Site, fed: dict[str, list[str]]) -> Fusable:
    """How a site can be fused; `fed` is what `Fusable.feeds` kept in mind of others of its graph.

    Raises:
        DeclinedError: it cannot.
    """
    if INPUT not in site.inputs:
        raise DeclinedError(site.reason)
    graph = model.graphs[site.graph]
    (edge, *_) = site.inputs[INPUT]
    x = used(graph, edge)
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
    channel = _channel(shape, list(_met(model, site, edge)))
    layout = layout_of(shape, channel)
    if layout is None:
        raise DeclinedError(f"its channels are axis {channel} of {len(shape)}, for which the kernel has no layout")
    return Fusable(model, site, x, layout, channel, fed)


def _waits(graph: Graph, value: Value) -> Iterator[str]:
    """The nodes that give a value as it is after others have run. A kernel takes it before, and its y waits."""
    node = graph.nodes[value.node]
    while node.op == "Identity" and node.after:
        yield node.name
        node = graph.nodes[node.inputs[0].node]


def _met(model: Model, site: Site, edge: Edge) -> Iterator[Shape]:
    """The shapes of what x meets, one op after the other, on its way to the end."""
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


def _channel(shape: Shape, met: list[Shape]) -> int:
    """The axis along which all that x meets is applied."""
    sizes = {size for other in met for size in other if size != 1}
    if any(len(other) > len(shape) for other in met) or len(sizes) > 1:
        raise DeclinedError(f"what it applies to x of shape {_text(shape)} has the shapes {_texts(met)}")
    if not sizes:
        found = [axis for axis, size in enumerate(shape) if size == 1 and axis]
        if not found:
            raise DeclinedError("its parameters are single numbers, applied to several channels")
        return found[-1]
    axes = {len(shape) - len(other) + axis for other in met for axis, size in enumerate(other) if size != 1}
    (channel, *others) = sorted(axes)
    if others or any(all(size == 1 for size in other) for other in met):
        raise DeclinedError(f"what it applies to x of shape {_text(shape)} has the shapes {_texts(met)}")
    if shape[channel] not in sizes or shape[channel] < 0:
        raise DeclinedError(f"its parameters have {sizes.pop()} elements, and x has the shape {_text(shape)}")
    return channel


def _text(shape: Shape) -> str:
    return "[" + ", ".join("?" if size < 0 else str(size) for size in shape) + "]"


def _texts(shapes: list[Shape]) -> str:
    return " and ".join(dict.fromkeys(_text(shape) for shape in shapes))


def _averaged(model: Model) -> frozenset[str]:
    """The variables that moving averages are kept in, and those that are not marked trainable."""
    kept = {
        key for s in model.analysis(sites) if any(s.statistics.values()) for v in s.variables for key in v[2:4] if key
    }
    return frozenset(kept | {key for key, variable in model.variables.items() if not variable.trainable})


def _single_ops(model: Model) -> Mapping[str, frozenset[str]]:
    """Graph -> the nodes of all groups of single ops."""
    found: dict[str, set[str]] = {}
    for site in model.analysis(sites):
        found.setdefault(site.graph, set()).update(site.interior, (site.node,))
    return {graph: frozenset(nodes) for graph, nodes in found.items()}

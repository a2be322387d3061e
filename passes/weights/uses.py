"""The uses of weights in a model: inputs of kernels, and rows of tables, whose values no caller supplies."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from passes.quantization.quantizer_marks import TAG
from passes.weights.kernels import CONVOLUTIONS, GATHERS, KERNELS, OPAQUE, Axes
from rewriter import constants, op_defs, ops, protos
from rewriter.dataflow import call_graph, consumers, running
from rewriter.edit import Skip
from rewriter.ir import Edge, Error, Graph, Model, Node, Value
from rewriter.shapes import Shape, shape_of
from rewriter.terms import VARIABLE, Term, Terms, cone

MOVES = frozenset({*constants.VIEWS, "Cast", "StridedSlice", "Transpose"})
"""Ops between a variable and its use that leave it the same weight, in another form."""

SOURCE_QUANTIZERS = re.compile("FakeQuant|QuantizeAndDequantize|Dequantize|UniformDequantize")
"""Ops by which a source that was quantised already gives a weight."""

ALREADY_QUANTIZED = "already quantised"
"""The reason why a weight with a quantiser is left as it is."""

GRADIENT_SCOPE = re.compile(r"(^|/)(gradient_tape|gradients(_\d+)?|[^/]*_grad)(/|$)")
"""Name scopes in which TensorFlow places the nodes of gradients."""


MATRIX = 2
"""The rank of a matrix."""


class WeightUse(NamedTuple):
    """A use of a weight.

    Attributes:
        edges: the uses of the value in its graph: the input of one kernel, or all uses of looked-up rows.
        node: the kernel, or the op that looks up rows.
        shape: the shape of the value; -1 is an unknown size.
        axes: the axes that are its channels.
        weights: the weight on each way to call the graph's function.
        table: of rows that are looked up, the shape of the table; else None.
        indices: the use of the rows' indices; None for another weight.
    """

    edges: tuple[Edge, ...]
    node: str
    shape: Shape
    axes: Axes
    weights: tuple[Weight, ...]
    table: Shape | None = None
    indices: Edge | None = None

    @property
    def whole_shape(self) -> Shape:
        """The shape of the whole weight."""
        return self.shape if self.table is None else self.table

    @property
    def whole_axes(self) -> Axes:
        """The axes of the whole weight that are its channels: of a table, its rows."""
        return self.axes if self.table is None else (-2,)


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight as a kernel takes it.

    Attributes:
        term: its value.
        base: the variable, the constant, or the computed value that it is, but for moves.
        variable: the key of the variable that it is, or is mostly computed from; "" for a constant.
        moved: true if only moves lie between the variable or the constant and the kernel.
    """

    term: Term
    base: Term
    variable: str
    moved: bool


def weight_uses(model: Model) -> tuple[tuple[WeightUse, ...], tuple[Skip, ...]]:
    """Return all uses of weights in graphs that can run, and a `Skip` for each that cannot be quantised."""
    found = _Uses(model)
    items = [item for name in sorted(model.analysis(running)) for item in found.of(model.graphs[name])]
    uses = [item for item in items if isinstance(item, WeightUse)]
    return tuple(_with_forward_axes(uses)), tuple(item for item in items if isinstance(item, Skip))


def _with_forward_axes(uses: list[WeightUse]) -> Iterator[WeightUse]:
    """Yield uses; a gradient takes its weight with the channels that the forward op has."""
    forward = {weight.term: use.axes for use in uses if not GRADIENT_SCOPE.search(use.node) for weight in use.weights}
    for use in uses:
        axes = forward.get(use.weights[0].term) if GRADIENT_SCOPE.search(use.node) else None
        yield use if axes is None else use._replace(axes=axes)


@dataclass
class _Uses:
    """The uses of weights, graph by graph."""

    model: Model
    terms: Terms = field(init=False)
    data: dict[Term, bool] = field(default_factory=dict)
    weights: dict[Term, Weight] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.terms = Terms(self.model)

    def of(self, graph: Graph) -> Iterator[WeightUse | Skip]:
        """Yield the uses of a graph."""
        for node in graph.nodes.values():
            if node.op in OPAQUE:
                yield Skip(graph.name, node.name, OPAQUE[node.op])
            elif node.op in GATHERS:
                yield from self._rows(graph, node)
            elif node.op in KERNELS:
                yield from self._inputs(graph, node)

    def _inputs(self, graph: Graph, node: Node) -> Iterator[WeightUse | Skip]:
        """Yield the use of a kernel's weight."""
        candidates = [i for i in KERNELS[node.op](node) if i.position < len(node.inputs)]
        try:
            found = [(i, self._weights(graph, node.inputs[i.position])) for i in candidates]
        except Error as e:
            yield Skip(graph.name, node.name, str(e))
            return
        used = [(i, w) for i, w in found if w]
        if not used and node.op in CONVOLUTIONS and not GRADIENT_SCOPE.search(node.name) and self._runs(graph, node):
            yield Skip(graph.name, node.name, "its filter is computed from what the model is given")
        # A product of weights alone computes a weight, which is quantised where a kernel takes it.
        if len(used) < len(node.inputs):
            for i, weights in used:
                edge = Edge(graph.name, node.name, i.position)
                reason = _quantized(graph, node.inputs[i.position])
                if reason:
                    yield Skip(graph.name, node.name, reason)
                    continue
                shape = self._shape(graph, node.inputs[i.position], weights)
                if shape is None or len(shape) < len(i.axes):
                    yield Skip(graph.name, node.name, "the rank of its weight is not known")
                    continue
                yield WeightUse((edge,), node.name, shape, i.channels(len(shape)), weights)

    def _runs(self, graph: Graph, node: Node) -> bool:
        """Return true if something calls the function of a node, other than the object that holds it as its helper."""
        entry = self.model.entries.get(graph.name)
        held = entry is not None and all("." in path for path in entry.paths)
        called = self.model.analysis(call_graph).callers.get(graph.name)
        return bool(self.terms.ways(graph.name, node.inputs)) and not (held and not called)

    def _rows(self, graph: Graph, node: Node) -> Iterator[WeightUse | Skip]:
        """Yield the use of the rows that are looked up in a table, a matrix."""
        position = GATHERS[node.op]
        try:
            constant_rows = self._weights(graph, node.inputs[1], floats=False)
            weights = () if constant_rows else self._weights(graph, node.inputs[position])
        except Error as e:
            yield Skip(graph.name, node.name, str(e))
            return
        edges = tuple(self.model.analysis_of(graph, consumers).get(Value(node.name), ()))
        if not weights or not edges or not self._by_rows(graph, node):
            return
        if any(_marked(graph, edge) for edge in edges):
            yield Skip(graph.name, node.name, ALREADY_QUANTIZED)
            return
        shape = shape_of(self.model, graph, Value(node.name))
        table = self._shape(graph, node.inputs[position], weights)
        if table is not None and len(table) == MATRIX:
            rows = shape or (-1, -1)
            shape = (*rows[:-1], table[-1])
            axes, indices = tuple(range(-len(shape), -1)), Edge(graph.name, node.name, 1)
            yield WeightUse(edges, node.name, shape, axes, tuple(self._read(w) for w in weights), table, indices)

    def _read(self, weight: Weight) -> Weight:
        """Return a weight whose term is a value: the op may take the variable itself."""
        if weight.term.op != VARIABLE:
            return weight
        dtype = protos.dtype_attr(self.model.variables[weight.variable].dtype)
        term = Term("ReadVariableOp", (weight.term,), attrs={"dtype": dtype})
        return replace(weight, term=term, base=term)

    def _by_rows(self, graph: Graph, node: Node) -> bool:
        """Return true if an op looks up along the first axis."""
        if node.op != "Gather" and op_defs.attribute(node, "batch_dims").i:
            return False
        axis = constants.constant_of(graph, node.inputs[2]) if node.op == "GatherV2" else None
        return node.op != "GatherV2" or (axis is not None and not axis.any())

    def _weights(self, graph: Graph, value: Value, *, floats: bool = True) -> tuple[Weight, ...]:
        """Return the weight that a value is on each way to call its function; none if it is none.

        Raises:
            Error: it is one in some calls only, or functions call each other in too many ways to tell.
        """
        terms = [self.terms.on(graph.name, value, way) for way in self.terms.ways(graph.name, [value])]
        data = [self._is_data(term) for term in terms]
        if floats and any(data) and not all(data):
            raise Error("its function is called with a weight, and with what the model is given")
        if not terms or any(data):
            return ()
        return tuple(self._weight(term) for term in dict.fromkeys(terms))

    def _weight(self, term: Term) -> Weight:
        if term not in self.weights:
            base = term
            while base.op in MOVES and base.inputs:
                base = base.inputs[0]
            held = base.inputs[0] if base.op == "ReadVariableOp" else base
            moved = held.op == VARIABLE or base.op == "Const"
            self.weights[term] = Weight(term, base, held.of if held.op == VARIABLE else self._largest(base), moved)
        return self.weights[term]

    def _largest(self, base: Term) -> str:
        """Return the key of the largest variable that a value is computed from; "" if there is none."""
        held = {term.of: self.model.variables[term.of] for term in cone([base]) if term.op == VARIABLE}
        return max(sorted(held), key=lambda k: (held[k].trainable, math.prod(held[k].shape or (0,))), default="")

    def _is_data(self, term: Term) -> bool:
        """Return true if a term depends on something that a caller of the model supplies."""
        waiting = [term]
        while waiting:
            current = waiting[-1]
            missing = [inner for inner in current.inputs if inner not in self.data]
            if current in self.data:
                waiting.pop()
            elif missing and not any(self.data.get(inner, False) for inner in current.inputs):
                waiting += missing
            else:
                source = not current.inputs and current.op not in ("Const", VARIABLE)
                self.data[current] = source or any(self.data[inner] for inner in current.inputs if inner in self.data)
                waiting.pop()
        return self.data[term]

    def _shape(self, graph: Graph, value: Value, weights: tuple[Weight, ...]) -> Shape | None:
        """Return the shape of a weight: that of the variable, or else as the graph records it."""
        term = weights[0].term
        held = term.inputs[0] if term.op == "ReadVariableOp" else term
        stored = self.model.variables[held.of].shape if held.op == VARIABLE else None
        return stored if stored is not None and -1 not in stored else shape_of(self.model, graph, value)


def _quantized(graph: Graph, value: Value) -> str:
    """Return the reason why a weight has a quantiser already; empty if it has none."""
    while True:
        node = graph.nodes[value.node]
        if TAG in node.attrs:
            return ALREADY_QUANTIZED
        if SOURCE_QUANTIZERS.match(node.op):
            return f"the source quantises it by {node.op}"
        passed = node.inputs[0] if node.op in MOVES and node.inputs else ops.forwarded(node, value.port)
        if passed is None:
            return ""
        value = passed


def _marked(graph: Graph, edge: Edge) -> bool:
    return bool(edge.node) and TAG in graph.nodes[edge.node].attrs

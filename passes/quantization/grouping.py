"""Values that are fake-quantised, in groups that share a call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from passes.control_flow.predicates import reached
from passes.quantization.custom import TraceRequest
from passes.quantization.quantizers import QuantizerSpec
from passes.quantization.ranges import Dynamic
from rewriter.expr import Expr, Use
from rewriter.ir import Graph, Model, Value
from rewriter.shapes import shape_of

CONDITIONAL = ("Enter", "Merge", "Switch")
"""Ops that occur only in graphs in which some values may not be computed: a stack of values would wait for these."""


class CustomSpec(NamedTuple):
    """A custom quantiser's function, to be traced, and the dtype of the values."""

    request: TraceRequest
    dtype: str


class Operand(NamedTuple):
    """A value that is fake-quantised once, however often it is used.

    Attributes:
        value: a value of the graph, or of an edit of it.
        layer: the layer's number.
        tag: the quantiser's metadata, as JSON.
        statistic: true for a batch's statistic, or for an average that is to be stored.
        run: the node of the main graph that runs in training, if there is one.
        indices: of rows that are looked up in a table, their indices.
    """

    graph: str
    value: Expr
    spec: QuantizerSpec | CustomSpec
    role: str
    layer: int
    tag: str
    statistic: bool
    run: str
    indices: Expr | None = None


class Used(NamedTuple):
    """An operand, and the node that uses it."""

    operand: Operand
    user: str


Group = tuple[Operand, ...]
"""Operands of one spec. Several of them are the rows of a stack."""


class DynamicBatch(NamedTuple):
    """Dynamic-range vectors of several layers, fake-quantised by one batched call."""

    vectors: tuple[Operand, ...]


class TensorBatch(NamedTuple):
    """Tensors of a graph, fake-quantised by one call."""

    tensors: tuple[Operand, ...]


def groups(model: Model, uses: Iterable[Used]) -> Iterator[Group | DynamicBatch | TensorBatch]:
    """Return all operands, each once, in groups that share a call.

    Vectors of a graph share a call where none precedes another. If their ranges clip, they need the same spec besides.
    Parameters that are read before any is used share a call, and so do statistics that no average precedes. One set of
    ops serves them all, in place of a set for each.
    """
    by_graph: dict[str, list[Used]] = {}
    for used in uses:
        by_graph.setdefault(used.operand.graph, []).append(used)
    for name, uses_of_graph in by_graph.items():
        graph = model.graphs[name]
        grouped: set[Operand] = set()
        conditional = any(node.op in CONDITIONAL for node in graph.nodes.values())
        if model.object_based and not conditional:
            for group in _shared(model, graph, uses_of_graph):
                grouped.update(group[0] if isinstance(group, DynamicBatch | TensorBatch) else group)
                yield group
        yield from ((v,) for v in dict.fromkeys(q.operand for q in uses_of_graph) if v not in grouped)


def _shared(model: Model, graph: Graph, uses: list[Used]) -> Iterator[Group | DynamicBatch | TensorBatch]:
    """Return the groups of a graph that share a call: those of its statistics, then those of its parameters."""
    # A statistic is known after the kernel has run, which reads the parameters: one stack of both would be a cycle.
    statistics = [q for q in uses if q.operand.statistic]
    parameters = [q for q in uses if not q.operand.statistic]
    after = set(reached(model, graph, [q.user for q in statistics]))
    yield from _joint(model, graph, statistics, after)
    after |= set(reached(model, graph, [q.user for q in parameters]))
    yield from _joint(model, graph, parameters, after)


def _joint(
    model: Model, graph: Graph, uses: list[Used], after: set[str]
) -> Iterator[Group | DynamicBatch | TensorBatch]:
    """Return the groups of some uses that share a call, without values that are computed after others are used."""
    specs: dict[QuantizerSpec, dict[Operand, None]] = {}
    tensors: dict[Operand, None] = {}
    for used in uses:
        vector = used.operand
        value = vector.value.value if isinstance(vector.value, Use) else None
        if value is None or value.node in after or isinstance(vector.spec, CustomSpec):
            continue
        if vector.spec.scheme.device:
            if vector.spec.shape is not None:
                tensors[vector] = None
        elif _is_vector(model, graph, value, vector.spec):
            specs.setdefault(vector.spec, {})[vector] = None
    # Those whose codes are not clipped can share a Case, of which XLA compiles the gradient.
    for clipped in (False, True):
        batch = tuple(t for t in tensors if isinstance(t.spec, QuantizerSpec) and t.spec.limited is clipped)
        if batch:
            yield TensorBatch(batch)
    dynamic = [v for spec, vectors in specs.items() if isinstance(spec.scheme.range, Dynamic) for v in vectors]
    # For a single layer, choosing the execution mode costs more than it saves.
    several = len({vector.layer for vector in dynamic}) > 1
    if several:
        yield DynamicBatch(tuple(dynamic))
    for spec, vectors in specs.items():
        if len(vectors) > 1 and not (several and isinstance(spec.scheme.range, Dynamic)):
            yield tuple(vectors)


def _is_vector(model: Model, graph: Graph, value: Value, spec: QuantizerSpec) -> bool:
    """Return true if a value is a vector of the spec's size, and the size is known."""
    if spec.shape is None or len(spec.shape) != 1 or not spec.per_tensor:
        return False
    return shape_of(model, graph, value) == spec.shape

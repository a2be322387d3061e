"""What is to be quantised: the uses of batch norms' variables and statistics, and which of them go together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from passes.control_flow.predicates import reached
from passes.quantization.custom import TraceRequest
from passes.quantization.quantizers import QuantizerSpec
from passes.quantization.ranges import Dynamic
from rewriter.edit import Edit
from rewriter.expr import Expr, Use
from rewriter.ir import Graph, Model, Value
from rewriter.shapes import shape_of

CONDITIONAL = ("Enter", "Merge", "Switch")
"""Ops of graphs in which some values may not be computed."""


class CustomSpec(NamedTuple):
    """A pipeline, and the dtype of what passes through it."""

    wanted: TraceRequest
    dtype: str


class Vector(NamedTuple):
    """One value that is quantised once, however often it is used.

    Attributes:
        value: as the graph has it, or as an edit of it will.
        layer: its number.
        tag: what inspection is told about it.
        statistic: whether it is a batch's statistic, or an average that is to be stored.
        run: the node of the main graph that updates the averages of its site, if there is one.
    """

    graph: str
    value: Expr
    spec: QuantizerSpec | CustomSpec
    role: str
    layer: int
    tag: str
    statistic: bool
    run: str


class QuantizationPoint(NamedTuple):
    """A vector, the node that uses it, and the edits that let it use another value instead."""

    vector: Vector
    user: str
    put: Callable[[Expr], Iterator[Edit]]


Group = tuple[Vector, ...]
"""Vectors of one spec, which are rows of a stack where they are several."""


class DynamicBatch(NamedTuple):
    """Vectors of several batch norms whose ranges follow their values; all are quantised in one place."""

    vectors: tuple[Vector, ...]


def groups(model: Model, found: Iterable[QuantizationPoint]) -> Iterator[Group | DynamicBatch]:
    """The vectors, each once: those of a graph together, where none precedes another; of one spec, if ranges clip.

    Parameters that are read before any is used are together, and so are statistics that no average precedes. A set
    of ops serves them all, in place of one for each.
    """
    by_graph: dict[str, list[QuantizationPoint]] = {}
    for quantity in found:
        by_graph.setdefault(quantity.vector.graph, []).append(quantity)
    for name, quantities in by_graph.items():
        graph = model.graphs[name]
        together: set[Vector] = set()
        conditional = any(node.op in CONDITIONAL for node in graph.nodes.values())
        if model.object_based and not conditional:
            for each in _together(model, graph, quantities):
                together.update(each.vectors if isinstance(each, DynamicBatch) else each)
                yield each
        yield from ((v,) for v in dict.fromkeys(q.vector for q in quantities) if v not in together)


def _together(model: Model, graph: Graph, found: list[QuantizationPoint]) -> Iterator[Group | DynamicBatch]:
    statistics = [q for q in found if q.vector.statistic]
    parameters = [q for q in found if not q.vector.statistic]
    after = set(reached(model, graph, [q.user for q in statistics]))
    yield from _joined(model, graph, statistics, after)
    after |= set(reached(model, graph, [q.user for q in parameters]))
    yield from _joined(model, graph, parameters, after)


def _joined(
    model: Model, graph: Graph, found: list[QuantizationPoint], after: set[str]
) -> Iterator[Group | DynamicBatch]:
    """What goes together, but for what is computed after others are used."""
    specs: dict[QuantizerSpec, dict[Vector, None]] = {}
    for quantity in found:
        vector = quantity.vector
        made = vector.value.value if isinstance(vector.value, Use) else None
        if isinstance(vector.spec, CustomSpec):
            continue
        if made and made.node not in after and _whole(model, graph, made, vector.spec.size):
            specs.setdefault(vector.spec, {})[vector] = None
    following = [v for spec, vectors in specs.items() if isinstance(spec.scheme.range, Dynamic) for v in vectors]
    # For a single batch norm, a choice costs more than what it saves.
    several = len({vector.layer for vector in following}) > 1
    if several:
        yield DynamicBatch(tuple(following))
    for spec, vectors in specs.items():
        if len(vectors) > 1 and not (several and isinstance(spec.scheme.range, Dynamic)):
            yield tuple(vectors)


def _whole(model: Model, graph: Graph, value: Value, size: int | None) -> bool:
    """Whether a value is a vector of known size."""
    return size is not None and shape_of(model, graph, value) == (size,)

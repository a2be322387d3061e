"""The uses of a batch's statistics, rewired to the statistics of the fused kernel."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from passes.batch_norm.updates import only_assigned, shown
from passes.fusing.fusable import Fusable
from rewriter import op_defs, protos
from rewriter.dataflow import consumers
from rewriter.edit import Edit, Rewire
from rewriter.expr import Expr, array, op
from rewriter.ir import Edge, Graph, Model, Node, Value
from rewriter.shapes import Shape, shape_of


def final_uses(
    model: Model, graph: Graph, value: Value, precise: Collection[str], switches: Collection[str] = ()
) -> Iterator[tuple[Edge, Value]]:
    """Yield the uses of a value after changes of its shape and dtype: the edge, and the value used there.

    A cast to a dtype that is not `precise` is a use, and so is a Switch that is not among `switches`.
    """
    waiting = [value]
    while waiting:
        used = waiting.pop()
        for edge in model.analysis_of(graph, consumers).get(used, ()):
            user = graph.nodes.get(edge.node)
            if user is None or not shown(graph, user, edge.position) or _ends(model, graph, user, precise, switches):
                yield edge, used
            else:
                waiting += [Value(user.name, port) for port in range(2 if user.op == "Switch" else 1)]


def _ends(model: Model, graph: Graph, user: Node, precise: Collection[str], switches: Collection[str]) -> bool:
    """Return true if a node that passes a value on means something of its own."""
    rounds = user.op == "Cast" and op_defs.output_dtype(model, graph, Value(user.name)) not in precise
    return rounds or (user.op == "Switch" and user.name not in switches)


def averages_of(
    candidate: Fusable, value: Value, batch_norm_nodes: Collection[str], switches: Collection[str] = ()
) -> Iterator[tuple[Edge, Value]]:
    """Yield the uses of a statistic in averages, outside of `batch_norm_nodes`, which compute it or normalise with it.

    Other uses keep the statistic in single ops: they may be differentiated, and the kernel's outputs may not.
    """
    for edge, used in final_uses(candidate.model, candidate.graph, value, candidate.precise, switches):
        if edge.node not in batch_norm_nodes and only_assigned(candidate.model, candidate.graph, edge):
            yield edge, used


def rewired(model: Model, graph: Graph, edge: Edge, used: Value, statistic: Expr) -> Iterator[Edit]:
    """Let one use of a statistic take a vector, in the shape and dtype that are used there."""
    shape = shape_of(model, graph, used)
    # Without a known shape there is nothing to reshape the vector to: this use keeps the single ops.
    if shape is not None and -1 not in shape:
        dtype = op_defs.output_dtype(model, graph, used)
        yield Rewire(edge, shaped(statistic, shape, dtype), used.node)


def shaped(vector: Expr, shape: Shape, dtype: str) -> Expr:
    """Return a vector in another shape and dtype."""
    reshaped = vector if len(shape) == 1 else op("Reshape", vector, array(np.array(shape, dtype=np.int32)))
    return reshaped if reshaped.dtype == dtype else op("Cast", reshaped, DstT=protos.Dtype(dtype))

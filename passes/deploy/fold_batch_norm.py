"""Batch norms folded into the convolutions before them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from passes.batch_norm.roles import BETA, GAMMA, MEAN, ROLES, VARIANCE
from passes.batch_norm.site import Site
from passes.batch_norm.sites import sites
from rewriter import op_defs
from rewriter.dataflow import consumers
from rewriter.edit import Assign, Edit, Keep, Rewire, Skip
from rewriter.evaluation import evaluated
from rewriter.expr import Expr, Use, op
from rewriter.ir import Edge, Error, Graph, Model, Node, Value
from rewriter.prune import needed_without
from rewriter.terms import Term, Terms

CONVOLUTIONS = frozenset({"Conv2D", "DepthwiseConv2dNative"})
FILTER, BIAS = "filter", "bias"


@dataclass(frozen=True)
class FoldBatchNorm:
    """Scale the filters of a convolution by gamma / sqrt(variance + epsilon), and add the rest as a bias.

    For y = gamma (conv(x, w) + b - mean) / sqrt(variance + epsilon) + beta and s = gamma / sqrt(variance + epsilon):
    y = conv(x, w s) + (b - mean) s + beta. Computed in float64 and stored in float32, so results differ by rounding.
    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.2.
    """

    name: ClassVar[str] = "fold-batch-norm"

    def edits(self, model: Model) -> Iterable[Edit]:
        """Fold every batch norm in inference that follows a convolution; yield a `Skip` for each other one."""
        folds, skips = model.analysis(_folds_and_skips)
        yield from skips
        yield from (Assign(key, value) for key, value in _assigned(folds).items())
        for fold in folds:
            yield from fold.edits(model)
        if folds:
            yield Keep(tuple(model.entries))


def folded(model: Model) -> list[tuple[str, str]]:
    """Return (graph, node) of the batch norms that become part of a convolution."""
    return [(fold.site.graph, fold.site.node) for fold in model.analysis(_folds_and_skips)[0]]


class _Fold(NamedTuple):
    """A batch norm that can be folded into the convolution before it.

    Attributes:
        edges: the inputs of the filters, of a bias and of the batch norm's parameters.
        sums: the node whose sum is the result: the convolution, or the op that adds its bias.
        bias: the name of the input of `site` or `sums` that the new bias replaces.
        values: the new values of the filters' and the bias's variables by key, on every way of calls to the function.
    """

    site: Site
    edges: tuple[Edge, ...]
    sums: str
    bias: str
    values: tuple[tuple[str, np.ndarray], ...]

    def edits(self, model: Model) -> Iterator[Edit]:
        """Use the sum in place of the batch norm."""
        graph = model.graphs[self.site.graph]
        node = graph.nodes[self.site.node]
        dtype = op_defs.output_dtype(model, graph, Value(self.sums))
        result: Expr = Use(dtype, Value(self.sums))
        if self.bias != BIAS:
            bias = Use(dtype, node.inputs[1 + ROLES.index(self.bias)])
            result = op("BiasAdd", result, bias, data_format=op_defs.get(model, node, "data_format"))
        for edge in model.analysis_of(graph, consumers).get(Value(self.site.node), ()):
            yield Rewire(edge, result, f"{self.site.node}/folded")


def _folds_and_skips(model: Model) -> tuple[tuple[_Fold, ...], tuple[Skip, ...]]:
    """Return the batch norms that can be folded, and a `Skip` with the reason for each other one."""
    folds: list[_Fold] = []
    skips: list[Skip] = []
    terms = Terms(model)
    for site in model.analysis(sites):
        try:
            folds.append(_fold(model, terms, site))
        except Error as e:
            skips.append(Skip(site.graph, site.node, str(e)))
    while True:
        # A variable that is used elsewhere as well has to stay as it is. A refused fold uses its variables itself,
        # so the search is repeated until no fold is refused.
        needed = needed_without(model, (edge for fold in folds for edge in fold.edges))
        refused = [f for f in folds if any(key in needed for key, _ in f.values)] or _clashing(folds)
        if not refused:
            return tuple(folds), tuple(skips)
        folds = [f for f in folds if f not in refused]
        reason = "the convolution's filters, or the variable for its bias, are used elsewhere as well"
        skips += [Skip(f.site.graph, f.site.node, reason) for f in refused]


def _assigned(folds: Iterable[_Fold]) -> Mapping[str, np.ndarray]:
    return {key: value for fold in folds for key, value in fold.values}


def _clashing(folds: list[_Fold]) -> list[_Fold]:
    """Return the folds that would store different values in one variable."""
    values = _assigned(folds)
    wrong = {key for fold in folds for key, value in fold.values if value.tobytes() != values[key].tobytes()}
    return [fold for fold in folds if any(key in wrong for key, _ in fold.values)]


def _fold(model: Model, terms: Terms, site: Site) -> _Fold:
    graph = model.graphs[site.graph]
    node = graph.nodes[site.node]
    if site.kind != "fused" or site.training:
        raise Error("it is computed in single ops, or trains")
    convolution, adding = _before(model, graph, node)
    sums = adding or convolution
    inputs = {FILTER: convolution.inputs[1], **{role: node.inputs[1 + i] for i, role in enumerate(ROLES)}}
    if adding:
        inputs[BIAS] = adding.inputs[1]
    values: list[tuple[str, np.ndarray]] = []
    bias_input = BIAS if adding else ""
    # The node is one for all ways, so the bias is the same input on each.
    for way in terms.ways(graph.name, list(inputs.values())):
        term_of = {name: terms.on(graph.name, value, way) for name, value in inputs.items()}
        # Without a bias of its own, the convolution gets one in the place of a vector of the batch norm.
        bias_input = bias_input or next((r for r in (BETA, MEAN, VARIANCE) if term_of[r].variable), "")
        for name in (FILTER, bias_input):
            if not name or not term_of[name].variable:
                raise Error("the convolution's filters, or everything a bias could be stored in, are no variables")
        values += _values(model, term_of, bias_input, site.epsilon, convolution.op)
    edges = [Edge(graph.name, convolution.name, 1), *(Edge(graph.name, node.name, 1 + i) for i in range(len(ROLES)))]
    edges += [Edge(graph.name, adding.name, 1)] if adding else []
    return _Fold(site, tuple(edges), sums.name, bias_input, tuple(values))


def _before(model: Model, graph: Graph, node: Node) -> tuple[Node, Node | None]:
    """Return the convolution before a batch norm, and the node that adds its bias."""
    producer = _producer(model, graph, node)
    adding = producer if producer.op == "BiasAdd" else None
    if adding:
        producer = _producer(model, graph, adding)
    if producer.op not in CONVOLUTIONS:
        raise Error(f"what it normalises comes from {producer.op}, and not from a convolution")
    if len({op_defs.get(model, n, "data_format") for n in (producer, node, adding) if n}) > 1:
        raise Error("its data format is not that of the convolution before it")
    if any(op_defs.output_dtype(model, graph, Value(n.name)) != "float32" for n in (producer, node)):
        raise Error("only convolutions in float32 are folded")
    return producer, adding


def _producer(model: Model, graph: Graph, node: Node) -> Node:
    """Return the node that computes the first input of a node, which nothing else may use."""
    while True:
        value = node.inputs[0]
        node = graph.nodes[value.node]
        if len(model.analysis_of(graph, consumers)[value]) > 1 and node.op in CONVOLUTIONS | {"BiasAdd", "Identity"}:
            raise Error("what the convolution before it gives is used elsewhere as well")
        if node.op != "Identity":
            return node


def _values(
    model: Model, term_of: Mapping[str, Term], bias_input: str, epsilon: float, kind: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the new values of the filters and the bias, by the keys of their variables."""
    names = list(term_of)
    values = dict(zip(names, evaluated(model, [term_of[n] for n in names], {}, trust=False), strict=True))
    wide = {name: np.asarray(value, np.float64) for name, value in values.items()}
    # What overflows or is no number is refused below.
    with np.errstate(all="ignore"):
        scale = wide[GAMMA] / np.sqrt(wide[VARIANCE] + np.float64(epsilon))
        bias = (wide.get(BIAS, np.float64(0)) - wide[MEAN]) * scale + wide[BETA]
        # A depthwise filter is [H, W, C, M]; it gives output channel c * M + m.
        filters = wide[FILTER] * (scale if kind == "Conv2D" else scale.reshape(wide[FILTER].shape[2:]))
        folded_values = {FILTER: filters.astype(np.float32), bias_input: bias.astype(np.float32)}
    if not all(np.isfinite(value).all() for value in folded_values.values()):
        raise Error("its scale is not finite")
    for name, value in folded_values.items():
        key = term_of[name].variable
        yield key, value.reshape(np.shape(model.value_of(key)))

"""Mean and variance of a batch in single ops, as written by `tf.nn.moments`, by Keras and by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from passes.batch_norm.roles import MEAN, VARIANCE
from rewriter import constants
from rewriter.ir import ARG, Edge, Graph, Model, Value
from rewriter.pattern import Capture, Match, Pattern, any_value, matches, node, origin
from rewriter.shapes import Shape, shape_of

NO_GRADIENT = ("StopGradient", "PreventGradient")
X = "x"

_X = replace(any_value(X), shaped=True)


def _over(values: Pattern, axes: str) -> Pattern:
    return node("Mean", values, any_value(axes))


MEANS = (_over(_X, "axes"),)
SUBTRACTED = "subtracted"
_INNER = tuple(inner.named(SUBTRACTED) for inner in (_over(_X, "inner"), node("StopGradient", _over(_X, "inner"))))
_CENTRED = tuple(node("Sub", _X, inner) for inner in _INNER)
VARIANCES = (
    *(_over(node("SquaredDifference", _X, inner), "axes") for inner in _INNER),
    *(_over(node("Square", centred), "axes") for centred in _CENTRED),
    *(_over(node("Mul", centred.named("c"), centred.named("c")), "axes") for centred in _CENTRED),
    node("Sub", _over(node("Square", _X), "axes"), node("Square", _over(_X, "inner"))),
    node("Sub", _over(node("Mul", _X, _X), "axes"), node("Square", _over(_X, "inner"))),
)
"""Forms of the variance. The gradient through the inner mean is zero, so it may be stopped or not."""


@dataclass(frozen=True)
class Moments:
    """A batch's mean and variance.

    Attributes:
        x: the value that they are of.
        axes: the axes over which they are taken, counted from the front.
        nodes: the nodes that compute them.
        subtracted: the shape in which the mean meets x, where the variance is that of differences.
        uses: the edges at which x enters.
    """

    x: Value
    axes: frozenset[int]
    nodes: frozenset[str]
    subtracted: Shape | None
    uses: tuple[Edge, ...]


def moments(model: Model, graph: Graph, mean: Value, variance: Value) -> Moments | str:
    """Return the moments that two values of a graph are, or a reason why they are none."""
    means = _first(graph, mean, MEANS)
    if ARG in (graph.nodes[mean.node].op, graph.nodes[variance.node].op):
        return "its mean or its variance comes from outside of the function that normalises with it"
    if means is None:
        return f"its mean is computed by {mean.node} ({graph.nodes[mean.node].op}), which is no mean over x"
    variances = _first(graph, variance, VARIANCES)
    if variances is None:
        return (
            f"its variance is computed by {variance.node} ({graph.nodes[variance.node].op}), in no form that is known"
        )
    if means[X].value != variances[X].value:
        return "its mean and its variance are those of different values"
    x = means[X].value
    shape = shape_of(model, graph, x)
    axes = [_axes(graph, m[name], shape) for m in (means, variances) for name in ("axes", "inner") if name in m]
    if shape is None or None in axes:
        return "the axes of its mean and variance are not known before it runs"
    if len(set(axes)) > 1:
        return "its mean and its variance are taken over different axes"
    subtracted = None
    if SUBTRACTED in variances:
        edge = variances[SUBTRACTED].edges[0]
        subtracted = shape_of(model, graph, graph.used_at(edge))
        if subtracted is None:
            return "the shape in which its mean is subtracted is not known before it runs"
    nodes = frozenset((*means.nodes, *variances.nodes))
    return Moments(x, axes[0] or frozenset(), nodes, subtracted, (*means[X].edges, *variances[X].edges))


def moments_of(graph: Graph, x: Value) -> Mapping[str, tuple[Value, ...]]:
    """Return the means and variances that a graph computes of a value in single ops, by role."""
    names = [node.name for node in graph.nodes.values() if node.op in ("Mean", "Sub")]
    values_by_role: dict[str, tuple[Value, ...]] = {}
    for role, patterns in ((MEAN, MEANS), (VARIANCE, VARIANCES)):
        match_of = {name: _first(graph, Value(name), patterns) for name in names}
        values_by_role[role] = tuple(
            Value(n) for n, match in match_of.items() if match and origin(graph, match[X].value) == x
        )
    return values_by_role


def _first(graph: Graph, value: Value, patterns: tuple[Pattern, ...]) -> Match | None:
    """Return the first match in which all uses of x can be differentiated."""
    if value.port:
        return None
    return next((m for p in patterns for m in matches(graph, value.node, p, stop=NO_GRADIENT)), None)


def _axes(graph: Graph, capture: Capture, shape: Shape | None) -> frozenset[int] | None:
    """Return the constant axes, counted from the front; None where they or the shape are not known."""
    axes = constants.constant_of(graph, origin(graph, capture.value))
    if axes is None or shape is None:
        return None
    return frozenset(int(axis) % len(shape) for axis in np.ravel(axes))

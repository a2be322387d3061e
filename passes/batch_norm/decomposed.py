"""Batch norm in single ops, as written by `tf.nn.batch_normalization`, by Keras and by hand.

Every form is ``x`` and a mean, scaled by ``inv = gamma / sqrt(variance + epsilon)``, with beta added. Forms with
more of gamma and beta are tried before those with fewer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from passes.batch_norm.roles import BETA, GAMMA, MEAN, VARIANCE
from passes.batch_norm.updates import ARITHMETIC, scalar, update
from rewriter import constants, ops
from rewriter.choices import leaves
from rewriter.dataflow import Captured, Constant, VariableKey, consumers, origins
from rewriter.ir import Edge, Graph, Model, Node, Value
from rewriter.pattern import Match, Pattern, any_value, closest, matches, node, origin
from rewriter.shapes import Shape, shape_of

INPUT = "x"
EPSILON = "epsilon"


def _binary(names: str, a: Pattern, b: Pattern) -> Pattern:
    """Return the pattern of an op on two values.

    A value that is computed from x keeps its shape: another layout would be another form.
    """
    return replace(node(names, a, b), shaped=INPUT in a.captures | b.captures)


_add = partial(_binary, "Add|AddV2")
_mul = partial(_binary, "Mul")
_sub = partial(_binary, "Sub")
_div = partial(_binary, "RealDiv|Div")


_X, _MEAN, _GAMMA, _BETA = (any_value(name) for name in (INPUT, MEAN, GAMMA, BETA))
_SHIFTED = _add(any_value(VARIANCE), any_value(EPSILON))
_CENTRED = _sub(_X, _MEAN)

ONE, HALF, MINUS_HALF = "one", "half", "minus_half"
NUMBERS = {ONE: 1.0, HALF: 0.5, MINUS_HALF: -0.5}
"""Captured numbers, and the values that they need to have."""

_SQRTS = (node("Sqrt", _SHIFTED), node("Pow", _SHIFTED, any_value(HALF)))
_RSQRTS = (
    node("Rsqrt", _SHIFTED),
    node("Pow", _SHIFTED, any_value(MINUS_HALF)),
    *(node("Reciprocal|Inv", sqrt) for sqrt in _SQRTS),
    *(_div(any_value(ONE), sqrt) for sqrt in _SQRTS),
)


def _with_inv(inv: Pattern) -> Iterator[Pattern]:
    """Yield the forms that scale x and the mean, or their difference, by one vector."""
    # `tf.nn.batch_normalization` writes the first and, without an offset, the third.
    yield _add(_mul(_X, inv), _sub(_BETA, _mul(_MEAN, inv)))
    yield _sub(_mul(_X, inv), _sub(_mul(_MEAN, inv), _BETA))
    yield _add(_mul(_X, inv), _mul(node("Neg", _MEAN), inv))
    yield _add(_mul(_X, inv), node("Neg", _mul(_MEAN, inv)))
    for normalised in (_sub(_mul(_X, inv), _mul(_MEAN, inv)), _mul(_CENTRED, inv)):
        yield _add(normalised, _BETA)
        yield normalised


def _forms() -> Iterator[Pattern]:
    """Yield all forms of batch norm in single ops."""
    scales = [_mul(rsqrt, _GAMMA) for rsqrt in _RSQRTS] + [_div(_GAMMA, sqrt) for sqrt in _SQRTS] + [*_RSQRTS]
    for scale in scales:
        yield from _with_inv(scale.named("inv"))
    scaled = _mul(_CENTRED, _GAMMA)
    stepwise = [_mul(_div(_CENTRED, sqrt), _GAMMA) for sqrt in _SQRTS] + [_div(scaled, sqrt) for sqrt in _SQRTS]
    stepwise += [_mul(_mul(_CENTRED, rsqrt), _GAMMA) for rsqrt in _RSQRTS] + [_mul(scaled, rsqrt) for rsqrt in _RSQRTS]
    stepwise += [_div(_CENTRED, sqrt) for sqrt in _SQRTS]
    for normalised in stepwise:
        yield _add(normalised, _BETA)
        yield normalised


FORMS = tuple(sorted(_forms(), key=lambda form: -len(form.captures & {GAMMA, BETA})))
PARTS = frozenset(part for form in FORMS for part in form.parts)
ANCHORS = frozenset(op for part in PARTS if _SHIFTED in part.inputs for op in part.ops)
"""Ops on the sum of a variance and epsilon, where the search for every form begins."""
OPS = frozenset(op for part in PARTS for op in part.ops)
_LONGEST = max(form.depth for form in FORMS) - 2
"""Number of ops after an anchor up to the end of the longest form. The 2 are the anchor and the sum that it takes."""


class DecomposedBatchNorm(NamedTuple):
    """A decomposed batch norm: its last node, and the nodes that its form matched."""

    root: str
    match: Match
    epsilon: float


def decomposed(model: Model, graph: Graph) -> tuple[DecomposedBatchNorm, ...]:
    """Return the decomposed batch norms of a graph: for each square root, the first form that fits.

    Gamma and beta are vectors that the model holds, so a sum with the output of another layer is not beta.
    """
    batch_norms = [_first(model, graph, anchor) for anchor in graph.nodes.values() if _is_anchor(graph, anchor)]
    return tuple(bn for bn in batch_norms if bn is not None)


def near_misses(model: Model, graph: Graph, batch_norms: Collection[DecomposedBatchNorm]) -> Iterator[tuple[str, str]]:
    """Yield (node, reason) for each root that no form explains, of a moving or a batch's variance plus a constant.

    The reason says why the closest form does not fit.
    """
    explained = {bn.match[VARIANCE].edges[0].node for bn in batch_norms}
    for anchor in graph.nodes.values():
        if _is_anchor(graph, anchor):
            shifted = graph.nodes[origin(graph, anchor.inputs[0]).node]
            if shifted.name not in explained and _is_variance(model, graph, shifted):
                yield anchor.name, _why(model, graph, _below(model, graph, anchor))


def _is_variance(model: Model, graph: Graph, shifted: Node) -> bool:
    """Return true if a summand may be a variable that is not trained, or may be averaged in one."""
    for position, value in enumerate(shifted.inputs):
        for leaf in leaves(model, Edge(graph.name, shifted.name, position), value):
            keys = [o.key for o in origins(model, leaf.graph, leaf.value) if isinstance(o, VariableKey)]
            if keys and not any(model.variables[k].trainable for k in keys):
                return True
            if not keys and update(model, model.graphs[leaf.graph], leaf.value, leaf.calls).targets:
                return True
    return False


def _why(model: Model, graph: Graph, below: list[str]) -> str:
    """Return how much of the closest form agrees, and where it first differs."""
    mismatch = closest(graph, below, FORMS)
    if not mismatch.node:
        return "the ops are those of a batch norm, but not on its variables, or with gamma or beta applied twice"
    node = graph.nodes[mismatch.node]
    while node.op in ("Identity", "IdentityN", "Cast"):
        node = graph.nodes[node.inputs[0].node]
    expected = " or ".join(sorted(mismatch.expected))
    keys = [o.key for o in origins(model, graph.name, Value(node.name)) if isinstance(o, VariableKey)]
    actual = f"the variable {model.variables[keys[0]].name}" if keys else f"{node.name} ({node.op})"
    return f"the closest, of which {mismatch.matched} ops agree, has {expected} in place of {actual}"


def _is_anchor(graph: Graph, node: Node) -> bool:
    if node.op not in ANCHORS:
        return False
    shifted = graph.nodes[origin(graph, node.inputs[0]).node]
    return shifted.op in ("Add", "AddV2") and any(scalar(graph, v) is not None for v in shifted.inputs)


def _first(model: Model, graph: Graph, anchor: Node) -> DecomposedBatchNorm | None:
    """Return the first form that fits at an anchor, or None."""
    below = _below(model, graph, anchor)
    for form in FORMS:
        for root in below:
            if graph.nodes[root].op in form.ops:
                for match in matches(graph, root, form):
                    epsilon = scalar(graph, match[EPSILON].value)
                    fits = _numbers(graph, match) and _parameters(model, graph, match)
                    # An op below may end the next batch norm, whose own root the form matches then.
                    if epsilon is not None and fits and anchor.name in match.nodes:
                        # What applies gamma twice has a part that is a batch norm, but is none itself.
                        return None if _twice(model, graph, root, match) else DecomposedBatchNorm(root, match, epsilon)
    return None


def _numbers(graph: Graph, match: Match) -> bool:
    """Return true if all captured numbers have the values that their form needs."""
    return all(scalar(graph, match[name].value) == number for name, number in NUMBERS.items() if name in match)


def _below(model: Model, graph: Graph, anchor: Node) -> list[str]:
    """Return the ops of forms that follow an anchor within the length of the longest form."""
    uses = model.analysis_of(graph, consumers)
    below: dict[str, None] = {}
    level = [anchor.name]
    for _ in range(_LONGEST):
        following: list[str] = []
        waiting = [Value(name, port) for name in level for port in (0, 1)]
        while waiting:
            for edge in uses.get(waiting.pop(), ()):
                user = graph.nodes.get(edge.node)
                if user is None or user.name in below:
                    continue
                if user.op in OPS:
                    below[user.name] = None
                    following.append(user.name)
                elif user.op in ops.FORWARDS or constants.viewed(graph, user) is not None:
                    waiting += [Value(user.name, 0), Value(user.name, 1)]  # a Switch has two outputs
        level = following
    return list(below)


def _parameters(model: Model, graph: Graph, match: Match) -> bool:
    """Return true if the captures for gamma and beta are held by the model, with one element for each channel."""
    values = [match[role].value for role in (GAMMA, BETA) if role in match]
    constant_values = [constants.constant_of(graph, value) for value in values]
    origins_of_values = {o for value in values for o in origins(model, graph.name, value)}
    # A number scales or shifts all channels alike: it belongs to the net around the batch norm.
    scalar_constant = any(c is not None and not c.ndim for c in constant_values)
    held_by_model = all(isinstance(o, VariableKey | Constant | Captured) for o in origins_of_values)
    edges = [match[role].edges[0] for role in (VARIANCE, GAMMA, BETA) if role in match]
    sizes = {_size(shape_of(model, graph, graph.nodes[e.node].inputs[e.position])) for e in edges} - {None}
    return held_by_model and not scalar_constant and len(sizes) <= 1


def _size(shape: Shape | None) -> int | None:
    """Return the number of elements, where it is known."""
    return None if shape is None or any(size < 0 for size in shape) else math.prod(shape)


def _twice(model: Model, graph: Graph, root: str, match: Match) -> bool:
    """Return true if the ops that follow apply gamma or beta once more, which a batch norm does not do."""
    parameters = {o for role in (GAMMA, BETA) if role in match for o in origins(model, graph.name, match[role].value)}
    uses = model.analysis_of(graph, consumers).get(Value(root), ())
    users = [graph.nodes[e.node] for e in uses if e.node and graph.nodes[e.node].op in ARITHMETIC]
    other_inputs = [v for user in users for v in user.inputs if v.node != root]
    variables = {o for v in other_inputs for o in origins(model, graph.name, v) if isinstance(o, VariableKey)}
    return bool(parameters & variables)

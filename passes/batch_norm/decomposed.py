"""Batch norm in single ops, as `tf.nn.batch_normalization`, Keras and people write it.

Every form is ``x`` and a mean, scaled by ``inv = gamma / sqrt(variance + epsilon)``, with beta added. Forms with
more of gamma and beta are tried before those with fewer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from passes.batch_norm.updates import ARITHMETIC, scalar, update
from passes.roles import BETA, GAMMA, MEAN, VARIANCE
from rewriter import constants, ops
from rewriter.choices import leaves
from rewriter.dataflow import Captured, Constant, VariableKey, consumers, origins
from rewriter.ir import Edge, Graph, Model, Node, Value
from rewriter.pattern import Match, Pattern, any_value, closest, matches, node, origin
from rewriter.shapes import Shape, shape_of

INPUT = "x"
EPSILON = "epsilon"


def _binary(names: str, a: Pattern, b: Pattern) -> Pattern:
    """An op on two values. What is computed from x keeps its shape: another layout would be another form."""
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
"""Captured numbers, and what they have to be."""

_SQRTS = (node("Sqrt", _SHIFTED), node("Pow", _SHIFTED, any_value(HALF)))
_RSQRTS = (
    node("Rsqrt", _SHIFTED),
    node("Pow", _SHIFTED, any_value(MINUS_HALF)),
    *(node("Reciprocal|Inv", sqrt) for sqrt in _SQRTS),
    *(_div(any_value(ONE), sqrt) for sqrt in _SQRTS),
)


def _with_inv(inv: Pattern) -> Iterator[Pattern]:
    """Forms that scale x and the mean, or their difference, by one vector."""
    yield _add(_mul(_X, inv), _sub(_BETA, _mul(_MEAN, inv)))
    yield _sub(_mul(_X, inv), _sub(_mul(_MEAN, inv), _BETA))
    yield _add(_mul(_X, inv), _mul(node("Neg", _MEAN), inv))
    yield _add(_mul(_X, inv), node("Neg", _mul(_MEAN, inv)))
    for normalised in (_sub(_mul(_X, inv), _mul(_MEAN, inv)), _mul(_CENTRED, inv)):
        yield _add(normalised, _BETA)
        yield normalised


def _forms() -> Iterator[Pattern]:
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
"""Ops on the sum of a variance and epsilon, with which every form begins."""
OPS = frozenset(op for part in PARTS for op in part.ops)
_LONGEST = max(form.depth for form in FORMS) - 2
"""Ops after an anchor up to the end of the longest form; the other two are the anchor and the sum that it is of."""


class Found(NamedTuple):
    """One decomposed batch norm: its last node, and what the parts of its form matched."""

    root: str
    match: Match
    epsilon: float


def decomposed(model: Model, graph: Graph) -> tuple[Found, ...]:
    """The decomposed batch norms of a graph: for each square root, the first form that fits.

    Gamma and beta are vectors that the model holds, so a sum with the output of another layer is not beta.
    """
    found = [_first(model, graph, anchor) for anchor in graph.nodes.values() if _is_anchor(graph, anchor)]
    return tuple(f for f in found if f is not None)


def near_misses(model: Model, graph: Graph, found: Collection[Found]) -> Iterator[tuple[str, str]]:
    """Roots of a moving or a batch's variance plus a constant, which no form explains, and why the closest does not."""
    explained = {match.match[VARIANCE].edges[0].node for match in found}
    for anchor in graph.nodes.values():
        if _is_anchor(graph, anchor):
            shifted = graph.nodes[origin(graph, anchor.inputs[0]).node]
            if shifted.name not in explained and _is_variance(model, graph, shifted):
                yield anchor.name, _why(model, graph, _below(model, graph, anchor))


def _is_variance(model: Model, graph: Graph, shifted: Node) -> bool:
    """Whether what a constant is added to may be a variable that is not trained, or is averaged in one."""
    for position, value in enumerate(shifted.inputs):
        for leaf in leaves(model, Edge(graph.name, shifted.name, position), value):
            held = [o.key for o in origins(model, leaf.graph, leaf.value) if isinstance(o, VariableKey)]
            if held and not any(model.variables[k].trainable for k in held):
                return True
            if not held and update(model, model.graphs[leaf.graph], leaf.value, leaf.calls).targets:
                return True
    return False


def _why(model: Model, graph: Graph, below: list[str]) -> str:
    """How close the closest form is."""
    stopped = closest(graph, below, FORMS)
    if not stopped.node:
        return "the ops are those of a batch norm, but not on its variables, or with gamma or beta applied twice"
    found = graph.nodes[stopped.node]
    while found.op in ("Identity", "IdentityN", "Cast"):
        found = graph.nodes[found.inputs[0].node]
    expected = " or ".join(sorted(stopped.expected))
    held = [o.key for o in origins(model, graph.name, Value(found.name)) if isinstance(o, VariableKey)]
    there = f"the variable {model.variables[held[0]].name}" if held else f"{found.name} ({found.op})"
    return f"the closest, of which {stopped.matched} ops agree, has {expected} in place of {there}"


def _is_anchor(graph: Graph, node: Node) -> bool:
    if node.op not in ANCHORS:
        return False
    shifted = graph.nodes[origin(graph, node.inputs[0]).node]
    return shifted.op in ("Add", "AddV2") and any(scalar(graph, v) is not None for v in shifted.inputs)


def _first(model: Model, graph: Graph, anchor: Node) -> Found | None:
    below = _below(model, graph, anchor)
    for form in FORMS:
        for root in below:
            if graph.nodes[root].op in form.ops:
                for match in matches(graph, root, form):
                    epsilon = scalar(graph, match[EPSILON].value)
                    fits = _numbers(graph, match) and _parameters(model, graph, match)
                    if epsilon is not None and fits and anchor.name in match.nodes:
                        # What applies gamma twice has a part that is a batch norm, but is none itself.
                        return None if _twice(model, graph, root, match) else Found(root, match, epsilon)
    return None


def _numbers(graph: Graph, match: Match) -> bool:
    return all(scalar(graph, match[name].value) == wanted for name, wanted in NUMBERS.items() if name in match)


def _below(model: Model, graph: Graph, anchor: Node) -> list[str]:
    """The ops of forms that follow an anchor closely."""
    uses = model.analysis_of(graph, consumers)
    found: dict[str, None] = {}
    level = [anchor.name]
    for _ in range(_LONGEST):
        following: list[str] = []
        waiting = [Value(name, port) for name in level for port in (0, 1)]
        while waiting:
            for edge in uses.get(waiting.pop(), ()):
                user = graph.nodes.get(edge.node)
                if user is None or user.name in found:
                    continue
                if user.op in OPS:
                    found[user.name] = None
                    following.append(user.name)
                elif user.op in ops.FORWARDS or constants.viewed(graph, user) is not None:
                    waiting += [Value(user.name, 0), Value(user.name, 1)]
        level = following
    return list(found)


def _parameters(model: Model, graph: Graph, match: Match) -> bool:
    """Whether what matched gamma and beta is something that the model holds, with one element for each channel."""
    values = [match[role].value for role in (GAMMA, BETA) if role in match]
    constants = [constants.constant_of(graph, value) for value in values]
    found = {o for value in values for o in origins(model, graph.name, value)}
    plain = any(c is not None and not c.ndim for c in constants)
    held = all(isinstance(o, VariableKey | Constant | Captured) for o in found)
    edges = [match[role].edges[0] for role in (VARIANCE, GAMMA, BETA) if role in match]
    sizes = {_size(shape_of(model, graph, graph.nodes[e.node].inputs[e.position])) for e in edges} - {None}
    return held and not plain and len(sizes) <= 1


def _size(shape: Shape | None) -> int | None:
    """The number of elements, where it is known."""
    return None if shape is None or any(size < 0 for size in shape) else math.prod(shape)


def _twice(model: Model, graph: Graph, root: str, match: Match) -> bool:
    """Whether what follows applies gamma or beta once more, which a batch norm does not do."""
    own = {o for role in (GAMMA, BETA) if role in match for o in origins(model, graph.name, match[role].value)}
    uses = model.analysis_of(graph, consumers).get(Value(root), ())
    users = [graph.nodes[e.node] for e in uses if e.node and graph.nodes[e.node].op in ARITHMETIC]
    others = [v for user in users for v in user.inputs if v.node != root]
    held = {o for v in others for o in origins(model, graph.name, v) if isinstance(o, VariableKey)}
    return bool(own & held)

"""Frozen models: batch norms' parameters and weights that are constants become variables again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import ClassVar

import numpy as np

from passes.batch_norm.roles import BETA, GAMMA, ROLES
from passes.batch_norm.site import Site
from passes.batch_norm.sites import sites
from passes.weights.uses import MOVES, WeightUse, weight_uses
from rewriter import constants, ops
from rewriter.choices import leaves
from rewriter.dataflow import Captured, Constant, Origin, follow
from rewriter.edit import AddVariable, Edit, Note, Rewire
from rewriter.expr import read
from rewriter.ir import ARG, MAIN, Edge, Model, Value, Variable, unused

ABSENT = {GAMMA: 1.0, BETA: 0.0}
"""Values of the gamma or the beta of a layer that was made without it."""


@dataclass(frozen=True)
class UnfreezeConstants:
    """Turn constants that a batch norm normalises with, and constant weights, into variables that hold their values.

    Constants of one name and content, as several functions hold them, become one variable. A gamma of ones and
    a beta of zeros stay constants: training leaves none exactly so, and layers without scale or centre have them.
    """

    name: ClassVar[str] = "unfreeze-constants"

    def edits(self, model: Model) -> Iterable[Edit]:
        """Add a variable for each constant, and read it wherever the constant was a parameter."""
        variables: dict[tuple[str, bytes], Variable] = {}
        for site in model.analysis(sites):
            # A constant mean or variance (b[2:]) marks a frozen site; a constant gamma or beta alone does not.
            if site.inference and any(isinstance(o, Constant | Captured) for b in site.binding.origins for o in b[2:]):
                yield from _unfrozen(model, site, variables)
        yield from _unfrozen_weights(model, variables)
        if variables:
            yield Note(
                f"{len(variables)} constants are variables again: {', '.join(v.name for v in variables.values())}",
                "detail",
            )


def _unfrozen(model: Model, site: Site, variables: dict[tuple[str, bytes], Variable]) -> Iterator[Edit]:
    for index, role in enumerate(ROLES):
        # Where each call of a function brings a constant of its own, one variable could not stand for all.
        origin, *others = {b[index] for b in site.binding.origins}
        value = None if others else _value(model, origin)
        if value is None or value.ndim != 1 or not value.size or np.all(value == ABSENT.get(role)):
            continue
        key = str(origin), value.tobytes()
        # Each trace of a layer holds the constant in a graph of its own, so the graph is no part of the key.
        if isinstance(origin, Constant):
            key = origin.node, value.tobytes()
        if key not in variables:
            variables[key] = _variable(model, site, role, value, {v.name for v in variables.values()})
            yield AddVariable(variables[key])
        for edge in site.inputs[role]:
            used = model.graphs[edge.graph].used_at(edge)
            yield from (Rewire(leaf.edge, read(variables[key]), site.node) for leaf in leaves(model, edge, used))


def _unfrozen_weights(model: Model, variables: dict[tuple[str, bytes], Variable]) -> Iterator[Edit]:
    """Yield the edits that let kernels use variables in place of constant weights."""
    uses, _ = model.analysis(weight_uses)
    rewired: set[Edge] = set()
    for use in uses:
        edge = _constant_edge(model, use)
        value = None if edge is None else _value(model, follow(model, model.graphs[edge.graph], _used(model, edge)))
        if edge is None or value is None or len(use.weights) > 1 or edge in rewired:
            continue
        rewired.add(edge)
        node = use.weights[0].base.node[1]
        key = node, value.tobytes()
        if key not in variables:
            used_names = {v.name for v in variables.values()} | {v.name for v in model.variables.values()}
            name = unused(re.sub(r"(/ReadVariableOp)?(/resource)?$", "/weight", node, count=1), used_names)
            variables[key] = _new(model, name, value, trainable=True)
            yield AddVariable(variables[key])
        yield Rewire(edge, read(variables[key]), use.node)


def _constant_edge(model: Model, use: WeightUse) -> Edge | None:
    """Return the edge at which a constant is used, to become a weight by moves alone; None if there is none."""
    edge = use.edges[0] if not use.table else Edge(use.edges[0].graph, use.node, 0)
    if use.weights[0].base.op != "Const":
        return None
    graph = model.graphs[edge.graph]
    while True:
        node = graph.nodes[graph.used_at(edge).node]
        if node.op in ("Const", ARG):
            return edge
        if node.op not in MOVES and ops.forwarded(node, 0) is None:
            return None
        edge = Edge(graph.name, node.name, 0 if node.op in MOVES else ops.FORWARDS.get(node.op, 0))


def _used(model: Model, edge: Edge) -> Value:
    return model.graphs[edge.graph].used_at(edge)


def _value(model: Model, origin: Origin | None) -> np.ndarray | None:
    match origin:
        case Constant(graph, node):
            return constants.constant_of(model.graphs[graph], Value(node))
        case Captured(number) if number in model.constants:
            return constants.constant_of(model.graphs[MAIN], Value(model.constants[number]))
        case _:
            return None


def _variable(model: Model, site: Site, role: str, value: np.ndarray, used_names: set[str]) -> Variable:
    scope = PurePosixPath(site.node).parent
    name = unused(str(scope / role), used_names | {v.name for v in model.variables.values()})
    return _new(model, name, value, trainable=role in ABSENT)


def _new(model: Model, name: str, value: np.ndarray, *, trainable: bool) -> Variable:
    return Variable(
        model.new_key(f"quantization/unfrozen/{name}") if model.object_based else name,
        name,
        value.dtype.name,
        value.shape,
        trainable=trainable,
        path="quantization.unfrozen." + re.sub(r"\W", "_", name),
        initial=value,
    )

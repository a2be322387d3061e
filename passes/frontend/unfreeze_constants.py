"""Frozen models: batch norms' parameters that are constants become variables again."""

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
from rewriter import constants
from rewriter.choices import leaves
from rewriter.dataflow import Captured, Constant, Origin
from rewriter.edit import AddVariable, Edit, Note, Rewire
from rewriter.expr import read
from rewriter.ir import MAIN, Model, Value, Variable, unused

ABSENT = {GAMMA: 1.0, BETA: 0.0}
"""Values of the gamma or the beta of a layer that was made without it."""


@dataclass(frozen=True)
class UnfreezeConstants:
    """Turn the constants that a batch norm normalises with into variables that hold the constants' values.

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
    return Variable(
        model.new_key(f"quantization/unfrozen/{name}") if model.object_based else name,
        name,
        value.dtype.name,
        value.shape,
        trainable=role in ABSENT,
        path="quantization.unfrozen." + re.sub(r"\W", "_", name),
        initial=value,
    )

"""The batch norms of a model: the variables that belong together, and the sites that compute with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath

import numpy as np

from passes.batch_norm.roles import ROLES
from passes.batch_norm.site import Site
from passes.batch_norm.sites import sites
from rewriter.expr import Expr, constant
from rewriter.ir import Model, Names

DEFAULT_MOMENTUM = 0.99
"""The momentum of moving averages if neither the source nor the user gives one. It is that of Keras."""


@dataclass(frozen=True)
class BatchNorm:
    """One logical layer: the variables' checkpoint keys by role, and the sites that compute it.

    A role is absent where the layer has no such variable (no scale, no centre).
    """

    name: str
    variables: Mapping[str, str]
    sites: tuple[Site, ...] = field(default=())

    @property
    def epsilons(self) -> tuple[float, ...]:
        """The epsilons of its sites; normally one."""
        return tuple(sorted({s.epsilon for s in self.sites}))

    @property
    def weight(self) -> float | None:
        """The weight of the batch's statistics in training, if a site gives one."""
        return next((s.binding.weight for s in self.sites if s.binding.weight is not None), None)


def batch_norms(model: Model) -> tuple[BatchNorm, ...]:
    """Return all batch norms, in the order of their variables.

    A site without variables is a batch norm of its own, at the end.
    """
    groups: dict[tuple[str | None, ...], list[Site]] = {}
    for site in model.analysis(sites):
        for key in sorted(site.binding.variables, key=str):
            groups.setdefault(key if any(key) else (None, None, None, None, site.graph, site.node), []).append(site)
    for key in [k for k in groups if any(k[:2]) and not any(k[2:])]:
        # A training site whose averages are not known belongs to the layer with its gamma and beta.
        matching = [k for k in groups if k[:2] == key[:2] and k[2] is not None]
        if matching:
            groups[matching[0]].extend(groups.pop(key))
    order = {key: position for position, key in enumerate(model.variables)}
    # The order of the functions, in which sites are met, is arbitrary in what TensorFlow saves.
    groups = dict(
        sorted(groups.items(), key=lambda item: min((order[k] for k in item[0][:4] if k), default=len(order)))
    )
    names = _names(model, list(groups))
    return tuple(
        BatchNorm(name, {r: k for r, k in zip(ROLES, key, strict=False) if k}, tuple(members))
        for name, (key, members) in zip(names, groups.items(), strict=True)
    )


def names_of_sites(model: Model) -> Mapping[tuple[str, str], str]:
    """Return (graph, node) -> the names of the batch norms computed there, joined with "+" where there are several."""
    names_by_site: dict[tuple[str, str], list[str]] = {}
    for bn in model.analysis(batch_norms):
        for site in bn.sites:
            names_by_site.setdefault((site.graph, site.node), []).append(bn.name)
    return {key: "+".join(dict.fromkeys(names)) for key, names in names_by_site.items()}


def channels(model: Model) -> Mapping[tuple[str, str], int | None]:
    """Return (graph, node) -> the number of channels of a site; None where its variables do not give it."""
    channels_by_site: dict[tuple[str, str], int | None] = {}
    for site in model.analysis(sites):
        keys = {key for keys in site.binding.variables for key in keys if key}
        shapes = {model.variables[k].shape for k in keys}
        shape = shapes.pop() if len(shapes) == 1 else None
        is_vector = shape is not None and len(shape) == 1 and shape[0] > 0
        channels_by_site[site.graph, site.node] = shape[0] if shape is not None and is_vector else None
    return channels_by_site


def moving_average(old: Expr, batch: Expr, weight: float) -> Expr:
    """Return ``old * (1 - f) + batch * f``, f in float32: the only form of update that is ever emitted."""
    f = np.float32(weight)
    return old * constant(np.float32(1) - f, old.dtype) + batch * constant(f, batch.dtype)


def _names(model: Model, keys: list[tuple[str | None, ...]]) -> list[str]:
    """Return the layers' names: the scope that the variables' names have in common, made unique."""
    layer_names: list[str] = []
    names = Names()
    for key in keys:
        variables = [model.variables[k].name for k in key[:4] if k]
        scopes = [PurePosixPath(v).parent for v in variables]
        shared = (
            [s for s in (scopes[0], *scopes[0].parents) if all(o.is_relative_to(s) for o in scopes)] if scopes else []
        )
        layer_names.append(names.new(str(shared[0]) if shared and shared[0].name else "batch_norm"))
    return layer_names

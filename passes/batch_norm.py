"""The batch norms of a model, where they are computed, and from which variables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from tensorflow.python.framework import tensor_util

from passes.roles import BETA, GAMMA, MEAN, ROLES, VARIANCE
from rewriter import ops
from rewriter.dataflow import Captured, Computed, Constant, Origin, VariableKey, bindings, call_graph
from rewriter.expr import Expr, constant
from rewriter.ir import MAIN, Edge, Graph, Model, Node, Value, unused

STATISTICS = {MEAN: 1, VARIANCE: 2}
"""The kernel's outputs that hold the batch's statistics (the variance Bessel-corrected), by role."""

FUSED = "FusedBatchNormV3"
GRADIENT, GRADIENT_SCALE, GRADIENT_RESERVE = "FusedBatchNormGradV3", 2, 3
OLDER = ("FusedBatchNorm", "FusedBatchNormV2")
TAG = "_bnqat"
"""Attribute of the node that quantises its first input: JSON with role, scheme, bits, range, batch_norm."""


@dataclass(frozen=True)
class Site:
    """One fused node that computes a batch norm.

    Attributes:
        training: whether it normalises with the batch's statistics.
        factor: weight of the batch's statistics in the kernel's own moving average; 1 where the kernel
            keeps none.
        origins: for each way to call the site, where gamma, beta, moving mean and moving variance come
            from. More than one where several batch norms share one function.
        parameters: the edges that bring variables to the kernel, by role.
        statistics: in training, the uses of the batch's statistics, by role.
        gradients: gamma's edges into the gradient kernels of this site that the same graph holds.
        quantized: the tags of quantisers found on its parameters and statistics.
        reason: why it cannot be rewritten; empty where it can.
    """

    graph: str
    node: str
    training: bool
    epsilon: float
    factor: float
    origins: frozenset[tuple[Origin, ...]]
    parameters: Mapping[str, Edge]
    statistics: Mapping[str, tuple[Edge, ...]]
    gradients: tuple[Edge, ...]
    quantized: tuple[Mapping[str, Any], ...]
    reason: str

    @property
    def status(self) -> str:
        """One of ``float``, ``quantised`` and ``skipped``."""
        if self.quantized:
            return "quantised"
        return "skipped" if self.reason else "float"

    @property
    def kernel_average(self) -> bool:
        """Whether the kernel itself computes the moving average."""
        return self.training and self.factor != 1.0


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
        """The epsilon of its sites; normally one."""
        return tuple(sorted({s.epsilon for s in self.sites}))

    @property
    def factor(self) -> float | None:
        """The weight of the batch's statistics in training, where a site's kernel says so."""
        return next((s.factor for s in self.sites if s.kernel_average), None)


def sites(model: Model) -> tuple[Site, ...]:
    """All sites, in the order of graphs and nodes."""
    return tuple(_sites(model))


def batch_norms(model: Model) -> tuple[BatchNorm, ...]:
    """All batch norms, in the order of their variables. A site without variables is one of its own, at the end."""
    groups: dict[tuple[str | None, ...], list[Site]] = {}
    for site in model.analysis(sites):
        for origin in sorted(site.origins, key=str):
            key = tuple(o.key if isinstance(o, VariableKey) else None for o in origin)
            groups.setdefault(key if any(key) else (None, None, None, None, site.graph, site.node), []).append(site)
    for key in [k for k in groups if any(k[:2]) and not any(k[2:])]:
        # A training site whose averages are kept elsewhere belongs to the layer with its gamma and beta.
        whole = [k for k in groups if k[:2] == key[:2] and k[2] is not None]
        if whole:
            groups[whole[0]].extend(groups.pop(key))
    order = {key: position for position, key in enumerate(model.variables)}
    # The order of the functions, in which sites are met, is arbitrary in what TensorFlow saves.
    groups = dict(
        sorted(groups.items(), key=lambda item: min((order[k] for k in item[0][:4] if k), default=len(order)))
    )
    names = _names(model, list(groups))
    return tuple(
        BatchNorm(name, {r: k for r, k in zip(ROLES, key, strict=False) if k}, tuple(found))
        for name, (key, found) in zip(names, groups.items(), strict=True)
    )


def names_of_sites(model: Model) -> Mapping[tuple[str, str], str]:
    """(graph, node) -> the names of the batch norms computed there, joined where there are several."""
    found: dict[tuple[str, str], list[str]] = {}
    for bn in model.analysis(batch_norms):
        for site in bn.sites:
            found.setdefault((site.graph, site.node), []).append(bn.name)
    return {key: "+".join(dict.fromkeys(names)) for key, names in found.items()}


def quantized(model: Model) -> frozenset[tuple[str, str]]:
    """(graph, node) of the sites that have a quantiser."""
    return frozenset(
        (g.name, n) for g in model.graphs.values() for n, tags in model.analysis_of(g, _tags).items() if tags
    )


def channels(model: Model) -> Mapping[tuple[str, str], int | None]:
    """(graph, node) -> the number of channels of a site, where its variables say it."""
    found: dict[tuple[str, str], int | None] = {}
    for site in model.analysis(sites):
        keys = {o.key for origin in site.origins for o in origin if isinstance(o, VariableKey)}
        shapes = {model.variables[k].shape for k in keys}
        shape = shapes.pop() if len(shapes) == 1 else None
        known = shape is not None and len(shape) == 1 and shape[0] > 0
        found[site.graph, site.node] = shape[0] if shape is not None and known else None
    return found


def moving_average(old: Expr, batch: Expr, factor: float) -> Expr:
    """The only form of update that is ever emitted: ``old * (1 - f) + batch * f``, f in float32."""
    f = np.float32(factor)
    return old * constant(np.float32(1) - f, "float32") + batch * constant(f, "float32")


def unquantized(graph: Graph, value: Value) -> tuple[Value, Mapping[str, Any] | None]:
    """The value that a quantiser was given, and the quantiser's tag; the value itself where there is none."""
    node = graph.nodes[value.node]
    if TAG not in node.attrs:
        return value, None
    return node.inputs[0], json.loads(node.attrs[TAG].s)


def _fused(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes.values() if n.op == FUSED or n.op in OLDER]


def _tags(_: Model, graph: Graph) -> Mapping[str, tuple[Mapping[str, Any], ...]]:
    """The tags of the quantisers on each site's parameters and statistics."""
    found = {}
    consumers = graph.consumers() if _fused(graph) else {}
    for node in _fused(graph):
        tags = [tag for _, tag in (unquantized(graph, v) for v in node.inputs[1:5]) if tag is not None]
        found[node.name] = (*tags, *_tags_below(graph, consumers, node))
    return found


def _sites(model: Model) -> Iterator[Site]:
    for graph in model.graphs.values():
        found = _fused(graph)
        if found:
            consumers = graph.consumers()
            for node in found:
                yield _site(model, graph, node, consumers)


def _site(model: Model, graph: Graph, node: Node, consumers: Mapping[Value, list[Edge]]) -> Site:
    get = partial(ops.get, model, node)
    training = bool(get("is_training"))
    factor = float(np.float32(get("exponential_avg_factor"))) if node.op == FUSED else 1.0
    found = bindings(model, graph.name, tuple(unquantized(graph, v)[0] for v in node.inputs[1:5]))
    variable = [any(isinstance(b[i], VariableKey) for b in found) for i in range(4)]
    statistics = {}
    if training:
        statistics = {r: tuple(consumers.get(Value(node.name, p), ())) for r, p in STATISTICS.items()}
    return Site(
        graph.name,
        node.name,
        training,
        float(np.float32(get("epsilon"))),
        factor,
        found,
        {
            r: Edge(graph.name, node.name, i + 1)
            for i, r in enumerate(ROLES)
            if variable[i] and not (training and r in STATISTICS)
        },
        statistics,
        _gradients(graph, consumers, node),
        model.analysis_of(graph, _tags)[node.name],
        _reason(model, graph, node, training, found),
    )


def _gradients(graph: Graph, consumers: Mapping[Value, list[Edge]], node: Node) -> tuple[Edge, ...]:
    """FusedBatchNormGradV3 takes the site's third output at input 3, and gamma at input 2."""
    users = consumers.get(Value(node.name, 3), ())
    found = [e.node for e in users if e.node and graph.nodes[e.node].op == GRADIENT and e.position == GRADIENT_RESERVE]
    return tuple(Edge(graph.name, name, GRADIENT_SCALE) for name in found)


def _tags_below(graph: Graph, consumers: Mapping[Value, list[Edge]], node: Node) -> list[Mapping[str, Any]]:
    """Tags of quantisers that a site's batch statistics pass through."""
    tags, seen = [], set()
    waiting = [Value(node.name, port) for port in STATISTICS.values()]
    while waiting:
        for edge in consumers.get(waiting.pop(), ()):
            user = graph.nodes.get(edge.node)
            if user is None or user.name in seen or user.op.startswith("Assign"):
                continue
            seen.add(user.name)
            if TAG in user.attrs:
                tags.append(json.loads(user.attrs[TAG].s))
            else:
                waiting.append(Value(user.name))
    return tags


def _reason(model: Model, graph: Graph, node: Node, training: bool, found: frozenset[tuple[Origin, ...]]) -> str:
    if node.op in OLDER:
        return f"the op is {node.op}; only {FUSED} is supported"
    calls = model.analysis(call_graph)
    if graph.name != MAIN and graph.name not in model.entries and graph.name not in calls.callers:
        return "nothing calls its function"
    if graph.name in calls.opaque:
        return "its function is used by an op other than a call, so the switch cannot be brought to it"
    for index, role in enumerate(ROLES):
        for origin in sorted({b[index] for b in found}, key=str):
            if isinstance(origin, VariableKey):
                continue
            if isinstance(origin, Constant) and (role in (GAMMA, BETA) or (training and _empty(model, origin))):
                continue
            return f"its {role.replace('_', ' ')} is {_described(origin)}, not a variable"
    return ""


def _described(origin: Origin) -> str:
    if isinstance(origin, Constant):
        return f"the constant {origin.node}"
    if isinstance(origin, Captured):
        return "a constant that its function captures"
    return f"computed by {origin.node} ({origin.op})" if isinstance(origin, Computed) else "an input of its function"


def _empty(model: Model, origin: Constant) -> bool:
    tensor = model.graphs[origin.graph].nodes[origin.node].attrs["value"].tensor
    return int(tensor_util.MakeNdarray(tensor).size) == 0


def _names(model: Model, keys: list[tuple[str | None, ...]]) -> list[str]:
    """Layer names: what the variables' names have in common, made unique."""
    names: list[str] = []
    for key in keys:
        variables = [model.variables[k].name for k in key[:4] if k]
        scopes = [PurePosixPath(v).parent for v in variables]
        shared = (
            [s for s in (scopes[0], *scopes[0].parents) if all(o.is_relative_to(s) for o in scopes)] if scopes else []
        )
        names.append(unused(str(shared[0]) if shared and shared[0].name else "batch_norm", names))
    return names


def moving_resource(graph: Graph, value: Value) -> Value | None:
    """The resource that a moving statistic is read from, in the same graph; None where it is read elsewhere."""
    while True:
        node = graph.nodes[value.node]
        if node.op == "ReadVariableOp":
            return node.inputs[0]
        if node.op not in ops.FORWARDS:
            return None
        value = node.inputs[ops.FORWARDS[node.op]]

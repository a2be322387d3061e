"""Layers of weights: which uses share an identity, and with it widths and ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import networkx as nx
import numpy as np

from passes.batch_norm.decomposed import INPUT
from passes.batch_norm.sites import sites
from passes.quantization.least_error import by_channel
from passes.weights.kernels import KERNELS, Axes
from passes.weights.roles import WEIGHT
from passes.weights.uses import Weight, WeightUse, weight_uses
from rewriter import ops
from rewriter.dataflow import consumers
from rewriter.evaluation import evaluated
from rewriter.ir import Edge, Error, Model, Names, Value
from rewriter.terms import Term

Identity = tuple[str, bytes]
"""A weight and the channels that it is used with: the first differs by weight, the second by channels."""


@dataclass(frozen=True)
class WeightMember:
    """A weight as rules see it: its name, and the variable that holds it, if one does."""

    name: str
    variables: Mapping[str, str] = field(default_factory=dict)


class WeightLayer(NamedTuple):
    """A weight, or several that share a function and with it their quantisers.

    Attributes:
        members: the one, or all of them.
        weights: a weight of each member, as a kernel takes it.
        axes: the axes that are its channels, there.
        channels: the number of channels; None where several weights share the layer, or it is not known.
        normalized: true if a batch norm follows every kernel that takes it, as far as functions show. A function that
            only returns what its kernel computes shows nothing: a Keras 2 save has one for each layer.
    """

    members: tuple[WeightMember, ...]
    weights: tuple[Weight, ...]
    axes: Axes
    channels: int | None
    normalized: bool

    @property
    def name(self) -> str:
        """The member's name; several are joined with "+"."""
        return "+".join(member.name for member in self.members)

    def values(self, model: Model) -> list[np.ndarray]:
        """Return the values of each member as its kernel takes them, float32 [channels, n].

        Raises:
            Error: they are computed with ops that are not known to be harmless.
        """
        terms = [weight.term for weight in self.weights]
        return [by_channel(np.asarray(v, np.float32), self.axes) for v in evaluated(model, terms, {}, trust=False)]


class WeightLayers(NamedTuple):
    """The layers of a model, in the order of its variables, and the number of each use's layer by its first edge."""

    layers: tuple[WeightLayer, ...]
    numbers: Mapping[Edge, int]


def weight_layers(model: Model) -> WeightLayers:
    """Return the layers of all weights of a model."""
    uses, _ = model.analysis(weight_uses)
    identities = _Identities(model, uses)
    shared: nx.Graph[Identity] = nx.Graph()
    by_identity: dict[Identity, tuple[Weight, WeightUse]] = {}
    of_use: dict[Edge, Identity] = {}
    for use in uses:
        all_of_use = [identities.of(use, weight) for weight in use.weights]
        of_use[use.edges[0]] = all_of_use[0]
        for identity, weight in zip(all_of_use, use.weights, strict=True):
            by_identity.setdefault(identity, (weight, use))
            shared.add_edge(all_of_use[0], identity)
    groups = [sorted(group, key=identities.order) for group in nx.connected_components(shared)]
    groups.sort(key=lambda group: identities.order(group[0]))
    names, layers = Names(), []
    before_batch_norm = model.analysis(kernels_before_batch_norms)
    for group in groups:
        members = tuple(_member(model, by_identity[identity][0], names) for identity in group)
        weight, use = by_identity[group[0]]
        sizes = [use.whole_shape[axis] for axis in use.whole_axes]
        channels = math.prod(sizes) if len(group) == 1 and -1 not in sizes else None
        weights = tuple(by_identity[i][0] for i in group)
        edges = [u.edges[0] for u in uses if of_use[u.edges[0]] in group]
        shown = [edge for edge in edges if not _only_returned(model, edge)]
        normalized = bool(shown) and all((edge.graph, edge.node) in before_batch_norm for edge in shown)
        layers.append(WeightLayer(members, weights, use.whole_axes, channels, normalized))
    number = {identity: i for i, group in enumerate(groups) for identity in group}
    return WeightLayers(tuple(layers), {edge: number[identity] for edge, identity in of_use.items()})


def kernels_before_batch_norms(model: Model) -> frozenset[tuple[str, str]]:
    """Return (graph, node) of the kernels whose results a batch norm takes, perhaps with a bias added."""
    kernels: set[tuple[str, str]] = set()
    for site in model.analysis(sites):
        graph = model.graphs[site.graph]
        edges = site.inputs.get(INPUT, ())
        value = graph.used_at(edges[0]) if edges else None
        while value is not None:
            node = graph.nodes[value.node]
            if node.op in KERNELS:
                kernels.add((graph.name, node.name))
                break
            passes_on = node.op in PASSING and node.inputs
            value = node.inputs[0] if passes_on else ops.forwarded(node, value.port)
    return frozenset(kernels)


def _only_returned(model: Model, edge: Edge) -> bool:
    """Return true if the function of a kernel returns its result, perhaps with a bias added, and uses it nowhere."""
    graph = model.graphs[edge.graph]
    uses = model.analysis_of(graph, consumers)
    values, returned = [Value(edge.node)], False
    while values:
        for use in uses.get(values.pop(), ()):
            if not use.node:
                returned = True
                continue
            node = graph.nodes[use.node]
            if use.position or not (node.op in PASSING or ops.forwarded(node, 0)):
                return False
            values.append(Value(node.name))
    return returned


PASSING = frozenset({"BatchToSpaceND", "BiasAdd", "Reshape", "Squeeze", "Transpose"})
"""Ops between a kernel and a batch norm that leave a batch norm's result independent of the weight's magnitude."""


def _member(model: Model, weight: Weight, names: Names) -> WeightMember:
    """Return a weight under the name of its variable, or of its constant's node."""
    if weight.variable:
        name = model.variables[weight.variable].name
        return WeightMember(names.new(name), {WEIGHT.name: weight.variable})
    _, node = weight.base.node
    return WeightMember(names.new(node or WEIGHT.name))


class _Identities:
    """The identities of weights.

    Two uses of a variable have the same channels if each of its elements lies in the same channel for both. That is
    looked at only where a variable is used with different axes, or through different moves.
    """

    def __init__(self, model: Model, uses: Sequence[WeightUse]) -> None:
        self.model = model
        self._order = {key: i for i, key in enumerate(model.variables)}
        self._constants: dict[Term, str] = {}
        self._forms: dict[str, set[tuple[Term, Axes]]] = {}
        for use in uses:
            for weight in use.weights:
                self._forms.setdefault(self._base(weight), set()).add((weight.term, use.whole_axes))

    def _base(self, weight: Weight) -> str:
        if weight.variable:
            return f"variable {weight.variable}"
        return self._constants.setdefault(weight.base, f"constant {len(self._constants)}")

    def of(self, use: WeightUse, weight: Weight) -> Identity:
        """Return the identity of a weight at a use."""
        base = self._base(weight)
        if len(self._forms[base]) == 1:
            return base, b""
        return base, self._partition(use, weight)

    def _partition(self, use: WeightUse, weight: Weight) -> bytes:
        """Return the channel of each element of the variable, as bytes; what tells it, where that is not known."""
        whole, channel_axes = use.whole_shape, use.whole_axes
        axes = repr([whole[axis] for axis in channel_axes]).encode()
        if not weight.moved or -1 in whole:
            return axes
        shape = self.model.variables[weight.variable].shape if weight.variable else None
        if shape is None or -1 in shape or math.prod(shape) != math.prod(whole):
            return axes
        places = np.arange(math.prod(shape), dtype=np.float64).reshape(shape)
        try:
            (moved,) = evaluated(self.model, [weight.term], {weight.base: places}, trust=False)
        except Error:
            return axes
        sizes = [size if axis - len(whole) in channel_axes else 1 for axis, size in enumerate(whole)]
        channel = np.broadcast_to(np.arange(math.prod(sizes)).reshape(sizes), whole)
        in_order = np.empty(math.prod(shape), np.int64)
        in_order[np.asarray(moved, np.int64).ravel()] = channel.ravel()
        return in_order.tobytes()

    def order(self, identity: Identity) -> tuple[int, str, bytes]:
        """Return a key that sorts identities by their variables' order; constants come last."""
        base, partition = identity
        kind, _, key = base.partition(" ")
        number = self._order[key] if kind == "variable" else len(self._order) + int(key)
        return number, base, partition

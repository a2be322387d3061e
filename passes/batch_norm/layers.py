"""Layers: batch norms that share quantisers, numbered for the variables that have a value for each layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import networkx as nx

from passes.batch_norm.batch_norms import BatchNorm, batch_norms
from rewriter.ir import Model


class Layer(NamedTuple):
    """A batch norm, or several that share a function and with it their quantisers.

    Attributes:
        number: its place in variables such as `quantization.layer_bits.gamma`.
        name: the batch norm's name; several are joined with "+".
        batch_norms: the one, or all of them.
    """

    number: int
    name: str
    batch_norms: tuple[BatchNorm, ...]


def layers(model: Model) -> tuple[Layer, ...]:
    """Return all layers, in the order of their batch norms."""
    all_batch_norms = model.analysis(batch_norms)
    shared: nx.Graph[str] = nx.Graph()
    shared.add_nodes_from(bn.name for bn in all_batch_norms)
    first_at: dict[tuple[str, str], str] = {}
    for bn in all_batch_norms:
        for site in bn.sites:
            shared.add_edge(first_at.setdefault((site.graph, site.node), bn.name), bn.name)
    component = {name: frozenset(names) for names in nx.connected_components(shared) for name in names}
    groups: dict[frozenset[str], list[BatchNorm]] = {}
    for bn in all_batch_norms:
        groups.setdefault(component[bn.name], []).append(bn)
    return tuple(
        Layer(number, "+".join(bn.name for bn in group), tuple(group)) for number, group in enumerate(groups.values())
    )


def layers_of_sites(model: Model) -> Mapping[tuple[str, str], Layer]:
    """Return (graph, node) -> the layer computed there."""
    return {
        (site.graph, site.node): layer
        for layer in model.analysis(layers)
        for bn in layer.batch_norms
        for site in bn.sites
    }

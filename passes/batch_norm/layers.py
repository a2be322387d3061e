"""Layers: what is quantised alike, and its number in the variables that hold something for each layer."""

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
        batch_norms: it, or them.
    """

    number: int
    name: str
    batch_norms: tuple[BatchNorm, ...]


def layers(model: Model) -> tuple[Layer, ...]:
    """All layers, in the order of their batch norms."""
    found = model.analysis(batch_norms)
    shared: nx.Graph[str] = nx.Graph()
    shared.add_nodes_from(bn.name for bn in found)
    first: dict[tuple[str, str], str] = {}
    for bn in found:
        for site in bn.sites:
            shared.add_edge(first.setdefault((site.graph, site.node), bn.name), bn.name)
    together = {name: frozenset(names) for names in nx.connected_components(shared) for name in names}
    groups: dict[frozenset[str], list[BatchNorm]] = {}
    for bn in found:
        groups.setdefault(together[bn.name], []).append(bn)
    return tuple(
        Layer(number, "+".join(bn.name for bn in group), tuple(group)) for number, group in enumerate(groups.values())
    )


def layers_of_sites(model: Model) -> Mapping[tuple[str, str], Layer]:
    """(graph, node) -> the layer computed there."""
    return {
        (site.graph, site.node): each for each in model.analysis(layers) for bn in each.batch_norms for site in bn.sites
    }

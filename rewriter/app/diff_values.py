"""Quantised values other than batch norms' in two models, such as weights: the layers, and the ops that take them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from passes.batch_norm.roles import ROLES
from passes.batch_norm.sites import sites
from passes.deploy.quantized_values import tagged
from passes.entries.training import only_training
from passes.quantization.quantizer_marks import tag_of
from passes.weights.kernels import GATHERS, KERNELS, OPAQUE
from passes.weights.roles import WEIGHT
from rewriter.app.by_layer import Key
from rewriter.app.diff_layers import by_importance, input_diff
from rewriter.dataflow import consumers
from rewriter.diff.compare import Comparison
from rewriter.diff.labels import users_of_node
from rewriter.diff.report import InputDiff, LayerDiff, LayerStatus, SiteDiff
from rewriter.ir import Edge, Model, Node, Value

TRAINING = frozenset({"train", "quantization.train"})
"""The signature and the functions that a rewrite adds for training."""


@dataclass
class _Layer:
    """A layer of one model: the widths of its quantisers, and the uses of their results by the op that takes them."""

    bits: set[int] = field(default_factory=set)
    uses: dict[Key, list[Edge]] = field(default_factory=dict)


Name = tuple[str, str]
"""A layer's name, and the role of its values."""


@dataclass(frozen=True)
class ValueDiffs:
    """The differences of such layers in two models.

    Attributes:
        comparison: the two models.
        users_of: graph of the model after -> what runs it.
    """

    comparison: Comparison
    users_of: Mapping[str, list[str]]

    def quantized(self, baked: Mapping[Name, set[int]]) -> Iterator[LayerDiff]:
        """Yield the layers that are quantised in one of the models, or whose values are quantised for good.

        Args:
            baked: the layers whose variables hold quantised values for good in the model after -> their widths.
        """
        before, after = self.comparison.before, self.comparison.after
        old, new = _layers(before, self.comparison.pairs), _layers(after, {})
        baked_values = {name: widths for name, widths in baked.items() if name[1] not in ROLES}
        stored_before = {v.name for v in before.variables.values()}
        stored = stored_before | {v.name for v in after.variables.values()}
        for layer, role in dict.fromkeys((*old, *new, *baked_values)):
            was, now = (layers.get((layer, role), _Layer()) for layers in (old, new))
            place = partial(self._place, was=was, now=now, role=role, variable=layer if layer in stored else "")
            places = self._sorted(place(key) for key in {**now.uses, **was.uses})
            bits = baked_values.get((layer, role), now.bits)
            known = layer in stored_before or any(site.what == "same" for site in places)
            status: LayerStatus = "as before"
            if (layer, role) in baked_values:
                status = "finalised"
            elif not now.uses:
                status = "no longer quantised"
            elif not was.uses:
                status = "quantised" if known else "new"
            yield LayerDiff(layer, places, status, sorted(bits), kind=role)

    def skipped(self, reasons: Mapping[Key, str]) -> Iterator[LayerDiff]:
        """Yield the ops of the model after whose values a rewrite left float, by their nodes' names.

        Args:
            reasons: (graph, node) that a rewrite skipped -> the reason.
        """
        after = self.comparison.after
        norms = {(s.graph, s.node) for model in (self.comparison.before, after) for s in model.analysis(sites)}
        known = norms.union(*(layer.uses for layer in _layers(after, {}).values()))
        by_name: dict[Name, list[SiteDiff]] = {}
        for (graph, node), reason in reasons.items():
            there = graph in after.graphs and node in after.graphs[graph].nodes
            if there and (graph, node) not in known:
                op = after.graphs[graph].nodes[node].op
                kind = WEIGHT.name if op in KERNELS or op in GATHERS or op in OPAQUE else "value"
                by_name.setdefault((node, kind), []).append(self._site((graph, node), "skipped", reason))
        for (node, kind), places in by_name.items():
            yield LayerDiff(node, self._sorted(places), "skipped", [], kind=kind)

    def _sorted(self, places: Iterable[SiteDiff]) -> list[SiteDiff]:
        return sorted(places, key=lambda site: by_importance(self.comparison.after, site))

    def _place(self, key: Key, *, was: _Layer, now: _Layer, role: str, variable: str) -> SiteDiff:
        """Return an op that takes a value of a layer in one of the models, or in both."""
        graph, node = key
        graphs = self.comparison.after.graphs
        nodes = graphs[graph].nodes if graph in graphs else {}
        removed = node not in nodes
        # An op that the model after has is shown with the inputs that it has there.
        edges = was.uses[key] if removed else now.uses.get(key) or _inputs_there(nodes, graph, was.uses[key])
        inputs = [input_diff(self.comparison, e, role, "input", variable, removed=removed) for e in edges if e.node]
        return self._site(key, "quantised" if removed or key in now.uses else "float", "", inputs)

    def _site(self, key: Key, status: str, reason: str, inputs: Sequence[InputDiff] = ()) -> SiteDiff:
        graph, node = key
        before, after = self.comparison.before, self.comparison.after
        graph_before = self.comparison.graph_before(graph)
        if graph_before is None and graph not in after.graphs:
            graph_before = before.graphs.get(graph)
        old = None if graph_before is None else graph_before.nodes.get(node)
        new = after.graphs[graph].nodes.get(node) if graph in after.graphs else None
        ops = [each.op for each in (new, old) if each is not None]
        users = [] if new is None else users_of_node(after, graph, node, self.users_of)
        what = "removed" if new is None else "added" if old is None else "same"
        trains = graph in after.analysis(only_training) or not TRAINING.isdisjoint(users)
        mode = "inference" if not trains else "training" if TRAINING.issuperset(users) else "both"
        return SiteDiff(graph, node, what, ops[0], mode, status, reason, users, list(inputs))


def _layers(model: Model, pairs: Mapping[str, str]) -> dict[Name, _Layer]:
    """Return the layers of a model; `pairs` maps a graph to its name in the model after."""
    layers: dict[Name, _Layer] = {}
    for graph_name, name in tagged(model):
        graph = model.graphs[graph_name]
        tag = tag_of(graph.nodes[name])
        if tag["role"] in ROLES:
            continue
        layer = layers.setdefault((tag["layer_name"], tag["role"]), _Layer())
        layer.bits.add(tag["bits"])
        raw = graph.nodes[graph.nodes[name].inputs[-1].node]
        for edge in model.analysis_of(graph, consumers).get(Value(name), ()):
            # Rows that are looked up may have many uses; the op that looks them up is the one place.
            place = raw.name if raw.op in GATHERS else edge.node
            if place:
                layer.uses.setdefault((pairs.get(graph_name, graph_name), place), []).append(edge)
    return layers


def _inputs_there(nodes: Mapping[str, Node], graph: str, uses: Iterable[Edge]) -> list[Edge]:
    """Return uses in a graph of the model before as uses in its pair, if the same inputs are there."""
    return [e._replace(graph=graph) for e in uses if e.node in nodes and e.position < len(nodes[e.node].inputs)]

"""Batch norms in two models: their sites, what enters them, and the nodes that belong to them."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

from passes.batch_norm.batch_norms import BatchNorm, batch_norms
from passes.batch_norm.site import Site
from passes.batch_norm.sites import sites
from passes.quantization.quantizer_marks import TAG, channel_axes, tag_of
from passes.quantization.schemes import SCHEMES
from passes.quantization.training_functions import frozen
from rewriter import ops
from rewriter.app.by_layer import Key
from rewriter.dataflow import consumers
from rewriter.diff.compare import Comparison, port_name, value_name
from rewriter.diff.labels import users_of_node
from rewriter.diff.report import InputDiff, LayerDiff, LayerStatus, SiteDiff
from rewriter.ir import Edge, Graph, Model, Node, Value

MAX_UPDATE = 12
"""Largest number of nodes that are shown as those that compute a moving average."""


class Outcomes(NamedTuple):
    """Outcomes of the sites of the model before, and the facts of a log.

    Attributes:
        rewritten: the sites that are quantised in the model after only, by graph and node.
        became: the sites of the model after that each became.
        reasons: the reasons for which a rewrite skipped others.
        baked: name of a batch norm whose variables hold quantised values for good -> their widths.
        users_of: graph of the model after -> what runs it.
    """

    rewritten: Collection[Key]
    became: Mapping[Key, Sequence[Site]]
    reasons: Mapping[Key, str]
    baked: Mapping[str, set[int]]
    users_of: Mapping[str, list[str]]


def layer_diffs(comparison: Comparison, outcomes: Outcomes) -> Iterator[LayerDiff]:
    """Return batch norms by name, with the sites of the model after, and those that are no longer there."""
    before, after = comparison.before, comparison.after
    old = {bn.name: bn for bn in before.analysis(batch_norms)}
    new = {bn.name: bn for bn in after.analysis(batch_norms)}
    for name in dict.fromkeys((*old, *new)):
        was = _by_place(old.get(name), comparison.pairs)
        now = _by_place(new.get(name), {})
        variables = _variables(before, old.get(name)) | _variables(after, new.get(name))
        removed = [s for key, s in was.items() if key not in now]
        site_diffs = [
            *(_site(comparison, outcomes, s, "same" if key in was else "added", variables) for key, s in now.items()),
            *(_site(comparison, outcomes, s, "removed", variables) for s in removed),
        ]
        main_first = sorted(site_diffs, key=lambda s: by_importance(after, s))
        sites_before = {(s.graph, s.node): s for s in old[name].sites} if name in old else {}
        # Constants that became variables give the layer another name, so its sites are followed, too.
        heirs = [heir for key in sites_before for heir in outcomes.became[key]]
        bits = {tag["bits"] for s in (*now.values(), *heirs) for tag in s.binding.quantized}
        status = "finalised" if name in outcomes.baked else _status(sites_before, outcomes, quantized=bool(bits))
        fused = any(_became_kernel(site, outcomes.became[key]) for key, site in sites_before.items())
        yield LayerDiff(name, main_first, status, sorted(outcomes.baked.get(name, bits)), fused)


def _became_kernel(site: Site, heirs: Sequence[Site]) -> bool:
    """Return true if single ops computed a site before, and the fused kernel computes what it became."""
    return site.kind == "decomposed" and bool(heirs) and all(heir.kind == "fused" for heir in heirs)


def by_importance(model: Model, site: SiteDiff) -> tuple[bool, int, bool]:
    """Return a sort key: sites that a signature runs come first, then those that a function of the model object runs.

    Those of inference precede those of training.
    """
    runner = 0 if not model.signatures.keys().isdisjoint(site.users) else 1 if site.users else 2
    return site.what == "removed", runner, site.mode == "training"


def _variables(model: Model, bn: BatchNorm | None) -> dict[str, str]:
    """Return the names of a batch norm's variables by role."""
    return {} if bn is None else {role: model.variables[key].name for role, key in bn.variables.items()}


def _status(sites_before: Mapping[Key, Site], outcomes: Outcomes, *, quantized: bool) -> LayerStatus:
    """Return the status of a batch norm with these sites in the model before; `quantized`: it has quantisers after."""
    if not sites_before:
        return "new"
    if not quantized:
        return "no longer quantised" if any(s.binding.quantized for s in sites_before.values()) else "skipped"
    quantized_now = [k in outcomes.rewritten for k, s in sites_before.items() if not s.binding.quantized]
    if any(quantized_now):
        return "quantised" if all(quantized_now) else "partly"
    return "skipped" if quantized_now else "as before"


def _by_place(bn: BatchNorm | None, pairs: Mapping[str, str]) -> dict[tuple[str, str], Site]:
    """Return a batch norm's sites by graph and node; `pairs` maps a graph to its name in the model after."""
    return {} if bn is None else {(pairs.get(s.graph, s.graph), s.node): s for s in bn.sites}


def _site(comparison: Comparison, outcomes: Outcomes, site: Site, what: str, variables: Mapping[str, str]) -> SiteDiff:
    reason = "" if site.binding.quantized else outcomes.reasons.get((site.graph, site.node), site.reason)
    status = "skipped" if reason else site.status
    gone = what == "removed"
    users = [] if gone else users_of_node(comparison.after, site.graph, site.node, outcomes.users_of)
    if not gone and site.graph in comparison.after.analysis(frozen):
        users = [f"{name} with frozen statistics" for name in users]
    inputs = list(_inputs(comparison, site, what, variables))
    return SiteDiff(site.graph, site.node, what, site.kind, site.mode, status, reason, users, inputs)


def _inputs(comparison: Comparison, site: Site, what: str, variables: Mapping[str, str]) -> Iterator[InputDiff]:
    """Return the inputs of a site, the edges that bring variables to it, and statistics on their way to averages."""
    model = comparison.before if what == "removed" else comparison.after
    edges: dict[Edge, tuple[str, str]] = {}
    for use, edges_by_role in (
        ("input", site.inputs),
        ("input", site.binding.parameters),
        ("statistic", site.binding.statistics),
    ):
        for role, role_edges in edges_by_role.items():
            for edge in role_edges:
                for past in _past_quantizer(model, edge):
                    edges.setdefault(past, (role, use))
    for edge, (role, use) in edges.items():
        variable = variables.get(role, "") if use == "input" else ""
        yield input_diff(comparison, edge, role, use, variable, removed=what == "removed")


def input_diff(
    comparison: Comparison, edge: Edge, role: str, use: str, variable: str, *, removed: bool = False
) -> InputDiff:
    """Return an input of the model after, or of the model before if it was removed."""
    model = comparison.before if removed else comparison.after
    graph = model.graphs[edge.graph]
    node = graph.nodes[edge.node]
    value = node.inputs[edge.position]
    graph_before = None if removed else comparison.graph_before(edge.graph)
    node_before = node if removed else None if graph_before is None else graph_before.nodes.get(edge.node)
    value_before = (
        node_before.inputs[edge.position]
        if node_before is not None and node_before.op == node.op and edge.position < len(node_before.inputs)
        else None
    )
    producer = graph.nodes[value.node]
    return InputDiff(
        role,
        use,
        edge.graph,
        edge.node,
        port_name(model, node, edge.position),
        None if value_before is None else value_name(value_before),
        None if removed else value_name(value),
        formula_of(producer),
        value_name(producer.inputs[-1]) if TAG in producer.attrs else "",
        variable,
    )


def _past_quantizer(model: Model, edge: Edge) -> Iterator[Edge]:
    """Return the edge itself or, if it enters a quantiser, the edges that use the quantised value."""
    graph = model.graphs[edge.graph]
    if not edge.node:
        return
    if TAG in graph.nodes[edge.node].attrs:
        uses = model.analysis_of(graph, consumers).get(Value(edge.node), [])
        yield from (use for use in uses if use.node)
    else:
        yield edge


def formula_of(node: Node) -> str:
    """Return a quantiser's formula in one line; "" for other nodes."""
    if TAG not in node.attrs:
        return ""
    tag = tag_of(node)
    scheme = SCHEMES.get(tag["scheme"])
    if scheme is None:
        return f"{tag['scheme']}(v)"
    axes = channel_axes(tag)
    channels = f", per channel (ax{'i' if len(axes) == 1 else 'e'}s {', '.join(map(str, axes))})" if axes else ""
    return f"{tag['scheme']}, {tag['bits']} bits: {scheme.formula}{channels}"


def label_of(node: Node) -> str:
    """Return a quantiser's role and formula, as the label of a picture's edge."""
    return f"{tag_of(node)['role']} ─ {formula_of(node)}"


def parts_of_sites(comparison: Comparison) -> Mapping[Key, list[str]]:
    """Return (graph, node) of the sites of both models -> further nodes of that graph that belong to the batch norm.

    These are the other nodes of single ops, and the nodes that compute the updates of the moving averages.
    """
    parts: dict[Key, list[str]] = {}
    for model, names in ((comparison.before, comparison.pairs), (comparison.after, {})):
        for site in model.analysis(sites):
            graph = model.graphs[site.graph]
            nodes = parts.setdefault((names.get(site.graph, site.graph), site.node), [])
            nodes += [*site.interior, *_ways_of_variables(graph, site)]
            for assigns in site.binding.assigns.values():
                for name in (node for of, node in assigns if of == site.graph):
                    nodes += _update(graph, site, name)
    return parts


def _ways_of_variables(graph: Graph, site: Site) -> Iterator[str]:
    """Yield the nodes that pass the values of a site's variables on to it, and those that read the variables."""
    for role, edges in site.inputs.items():
        for edge in edges if role != "x" else ():
            value: Value | None = graph.used_at(edge)
            while value is not None and value.node not in site.interior:
                yield value.node
                value = ops.forwarded(graph.nodes[value.node], value.port)


def _update(graph: Graph, site: Site, assign: str) -> list[str]:
    """Return the nodes that compute the new value of a moving average, from the op that assigns it back to the site."""
    nodes: dict[str, None] = {}
    waiting = deque([assign])
    while waiting and len(nodes) < MAX_UPDATE:
        name = waiting.popleft()
        node = graph.nodes[name]
        if name in nodes or name == site.node or name in site.interior or not node.inputs:
            continue
        nodes[name] = None
        # A quantiser stands for its last input; the others are its options.
        waiting += [v.node for v in (node.inputs[-1:] if TAG in node.attrs else node.inputs)]
    return list(nodes)

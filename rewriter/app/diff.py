"""``bnqat.diff``: the differences of two models, and those that a rewrite explains."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from passes.batch_norm.batch_norms import BatchNorm, batch_norms
from passes.batch_norm.site import Site
from passes.batch_norm.sites import quantized, sites
from passes.quantization.quantizer_marks import TAG, tag_of
from passes.quantization.schemes import SCHEMES
from rewriter.app.reports import became_of
from rewriter.app.work import gc_paused
from rewriter.dataflow import consumers
from rewriter.diff.compare import NODE, Comparison, all_keys, compare, port_name, value_name, with_details
from rewriter.diff.facts import SIGNATURE
from rewriter.diff.log import LOG, RECORD, explained, read_record
from rewriter.diff.page import diff_page
from rewriter.diff.pictures import around, pictures, unite
from rewriter.diff.report import Change, DiffReport, InputDiff, LayerDiff, SiteDiff, Verdict
from rewriter.diff.svg import picture_svg
from rewriter.ir import ARG, Edge, Error, Graph, Model, Node, Value
from rewriter.page.shell import frame
from rewriter.savedmodel.read import load
from rewriter.savedmodel.references import OPS_ALONE
from rewriter.savedmodel.write import EXTRA


@dataclass(frozen=True)
class Diff:
    """Differences of two models, as a report and as a page."""

    title: str
    report: DiffReport
    comparison: Comparison
    full: bool = False

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return self.report.to_json()

    def to_html(self) -> str:
        """Return a self-contained page: before and after side by side, and the report."""
        places = [(s.graph, s.node) for layer in self.report.layers for s in layer.sites]
        return diff_page(self.title, self.report, *pictures(self.comparison, places, label_of, full=self.full))

    def to_svg(self, graph: str, node: str, hops: int = 1) -> str:
        """Return a picture of a node's neighbourhood, with both models in one.

        Args:
            graph: the node's function, "" for the main graph; its name in the model after, if it is there.
            node: the node's name.
            hops: the number of edges to go from the node, 1 to 3.

        Raises:
            Error: neither model has such a node.
        """
        changed = {c.name for c in self.report.changes if c.kind == NODE and c.graph == graph}
        union = unite(self.comparison, graph, changed, label_of)
        if node not in union.states:
            raise Error(f"neither model has a node {node} in {graph or 'the main graph'}")
        return picture_svg(around(union, node), union, hops)

    def site(self, name: str) -> tuple[str, str]:
        """Return the (graph, node) that a name means: a batch norm's, a node's, or ``function:node``.

        Raises:
            Error: there is no such place.
        """
        places = [(layer.name, s.graph, s.node) for layer in self.report.layers for s in layer.sites]
        nodes = [("", c.graph, c.name) for c in self.report.changes if c.kind == NODE]
        for layer, graph, node in (*places, *nodes):
            if name in (layer, node, f"{graph}:{node}"):
                return graph, node
        graph, _, node = name.rpartition(":")
        if node in self.comparison.after.graphs.get(graph, Graph("", {})).nodes:
            return graph, node
        raise Error(f"there is no batch norm, and no node that changed, of the name {name}; bnqat diff lists them")

    def _repr_html_(self) -> str:
        return frame(self.to_html())


@gc_paused()
def diff(
    before: str | Path,
    after: str | Path,
    *,
    values: bool = False,
    full: bool = False,
    tags: Collection[str] | None = None,
) -> Diff:
    """Compare two SavedModels by name, and check the result against the record of a rewrite, if `after` has one.

    Nothing in the models is executed. Changes that the record does not explain are "other changes".

    Args:
        before: a directory with a SavedModel.
        after: another such directory.
        values: compare the values of variables, too, which reads both checkpoints.
        full: describe all added and removed nodes in full, and let the page hold every node. Without it, only other
            changes are described in full, and the page holds the changed nodes and their neighbourhood.
        tags: the tags of the meta graphs, if a model holds several; by default those of the one for serving.

    Raises:
        Error: a model cannot be read, or the record is damaged.
    """
    models = load(before, tags), load(after, tags)
    comparison = compare(*models, values=all_keys(*models) if values else (), describe=full)
    records = [read_record(Path(path) / EXTRA / RECORD) for path in (before, after)]
    record = records[1] if records[0] != records[1] else None  # a record that both have tells of an earlier rewrite
    if record is not None:
        source = models[0].source
        changes = explained(comparison.changes, record, source.path / source.file, values=values)
        detailed = [c if c.by else with_details(comparison, c) for c in sorted(changes, key=lambda c: bool(c.by))]
        comparison = replace(comparison, changes=tuple(detailed))
    reasons = {} if record is None else _skip_reasons(Path(after) / EXTRA / LOG)
    title = f"{Path(before).resolve().name} → {Path(after).resolve().name}"
    return Diff(title, _report(comparison, reasons, recorded=record is not None), comparison, full)


def _skip_reasons(file: Path) -> Mapping[tuple[str, str], str]:
    """Return the reasons for which a rewrite skipped sites, by graph and node, from its own log."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["skipped"]
        return {(s["graph"], s["node"]): str(s["reason"]) for s in entries}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def _report(comparison: Comparison, reasons: Mapping[tuple[str, str], str], *, recorded: bool) -> DiffReport:
    """Return the report of a comparison; `reasons` are those that the rewrite gives for skipped sites."""
    before, after = comparison.before, comparison.after
    sites_before = before.analysis(sites)
    quantized_now = after.analysis(quantized)
    site_at = {(s.graph, s.node): s for s in sites_before}
    became = _became(comparison)
    rewritten = {
        k
        for k, s in site_at.items()
        if not s.binding.quantized and quantized_now.issuperset(became[k]) and (became[k] or _is_known(after, s))
    }
    skipped = Counter(
        next(filter(None, (reasons.get(j, "") for j in (k, *became[k]))), s.reason or "it is not quantised")
        for k, s in site_at.items()
        if not s.binding.quantized and k not in rewritten
    )
    signatures = set(before.source.proto.meta_graphs[before.source.index].signature_def) - OPS_ALONE
    broken = {c.name for c in comparison.changes if c.kind == SIGNATURE and c.what != "added" and _changes_interface(c)}
    verdict = Verdict(
        batch_norms=len(before.analysis(batch_norms)),
        sites_found=len(site_at),
        sites_rewritten=len(rewritten),
        sites_added=len(quantized_now.difference(site_at, *became.values())),
        sites_skipped=sum(skipped.values()),
        other_changes=sum(not c.by for c in comparison.changes) if recorded else None,
        signatures_intact=len(signatures - broken),
        signatures_found=len(signatures),
    )
    return DiffReport(
        verdict=verdict,
        changes=list(comparison.changes),
        layers=list(_layers(comparison, reasons)),
        ops=_ops(before, after),
        renamed={old: new for old, new in comparison.pairs.items() if old != new},
        skipped=dict(skipped),
    )


def _became(comparison: Comparison) -> Mapping[tuple[str, str], list[tuple[str, str]]]:
    """Return the sites that each site before became: itself in its graph's pair, or those that took its place."""
    heirs_of, sites_after = became_of(comparison.before, comparison.after)
    paired = {key: (comparison.pairs.get(key[0], key[0]), key[1]) for key in heirs_of}
    return {key: [paired[key]] if paired[key] in sites_after else heirs for key, heirs in heirs_of.items()}


def _is_known(after: Model, site: Site) -> bool:
    """Return true if a site's variables are still there, though its function no longer runs."""
    return any(key in after.variables for keys in site.binding.variables for key in keys)


def _changes_interface(change: Change) -> bool:
    """Return true if a signature's inputs or outputs changed, and not only the nodes that compute them."""
    return change.what == "removed" or any(d.aspect.startswith(("input ", "output ")) for d in change.details)


def _ops(*models: Model) -> dict[str, list[int]]:
    """Return the number of nodes of each op, for each model."""
    counts = [Counter(n.op for g in m.graphs.values() for n in g.nodes.values() if n.op != ARG) for m in models]
    return {op: [count[op] for count in counts] for op in sorted(counts[0].keys() | counts[1].keys())}


def _layers(comparison: Comparison, reasons: Mapping[tuple[str, str], str]) -> Iterator[LayerDiff]:
    """Return batch norms by name, with the sites of the model after, and those that are no longer there."""
    before, after = comparison.before, comparison.after
    old = {bn.name: bn for bn in before.analysis(batch_norms)}
    new = {bn.name: bn for bn in after.analysis(batch_norms)}
    for name in dict.fromkeys((*old, *new)):
        was = _by_place(old.get(name), comparison.pairs)
        now = _by_place(new.get(name), {})
        site_diffs = [_site(comparison, s, "same" if k in was else "added", reasons) for k, s in now.items()]
        site_diffs += [_site(comparison, s, "removed", reasons) for k, s in was.items() if k not in now]
        yield LayerDiff(name, site_diffs)


def _by_place(bn: BatchNorm | None, pairs: Mapping[str, str]) -> dict[tuple[str, str], Site]:
    """Return a batch norm's sites by graph and node; `pairs` maps a graph to its name in the model after."""
    return {} if bn is None else {(pairs.get(s.graph, s.graph), s.node): s for s in bn.sites}


def _site(comparison: Comparison, site: Site, what: str, reasons: Mapping[tuple[str, str], str]) -> SiteDiff:
    reason = "" if site.binding.quantized else reasons.get((site.graph, site.node), site.reason)
    status = "skipped" if reason else site.status
    return SiteDiff(
        site.graph, site.node, what, site.kind, site.mode, status, reason, list(_inputs(comparison, site, what))
    )


def _inputs(comparison: Comparison, site: Site, what: str) -> Iterator[InputDiff]:
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
        graph = model.graphs[edge.graph]
        node = graph.nodes[edge.node]
        value = node.inputs[edge.position]
        graph_before = None if what == "removed" else comparison.graph_before(edge.graph)
        node_before = node if what == "removed" else None if graph_before is None else graph_before.nodes.get(edge.node)
        value_before = (
            node_before.inputs[edge.position]
            if node_before is not None and edge.position < len(node_before.inputs)
            else None
        )
        producer = graph.nodes[value.node]
        yield InputDiff(
            role,
            use,
            edge.graph,
            edge.node,
            port_name(model, node, edge.position),
            None if value_before is None else value_name(value_before),
            None if what == "removed" else value_name(value),
            formula_of(producer),
            value_name(producer.inputs[-1]) if TAG in producer.attrs else "",
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
    return f"{tag['scheme']}, {tag['bits']} bits: {scheme.formula}"


def label_of(node: Node) -> str:
    """Return a quantiser's role and formula, as the label of a picture's edge."""
    return f"{tag_of(node)['role']} ─ {formula_of(node)}"

"""``bnqat.diff``: two models, what differs, and what of it a rewrite explains."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from passes.batch_norm.batch_norms import BatchNorm, batch_norms
from passes.batch_norm.sites import Site, quantized, sites
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
    """What differs between two models, as a report and as a page."""

    title: str
    report: DiffReport
    comparison: Comparison
    full: bool = False

    def to_json(self) -> str:
        """The report as JSON text."""
        return self.report.to_json()

    def to_html(self) -> str:
        """A page that holds all it needs: before and after side by side, and the report."""
        sites_ = [(s.graph, s.node) for layer in self.report.layers for s in layer.sites]
        return diff_page(self.title, self.report, *pictures(self.comparison, sites_, label_of, full=self.full))

    def to_svg(self, graph: str, node: str, hops: int = 1) -> str:
        """A picture of what is around a node, both models in one.

        Args:
            graph: its function, "" for the main graph; the name in the model after, if it is there.
            node: its name.
            hops: how many edges to go from there, 1 to 3.

        Raises:
            Error: neither model has such a node.
        """
        changed = {c.name for c in self.report.changes if c.kind == NODE and c.graph == graph}
        union = unite(self.comparison, graph, changed, label_of)
        if node not in union.states:
            raise Error(f"neither model has a node {node} in {graph or 'the main graph'}")
        return picture_svg(around(union, node), union, hops)

    def site(self, name: str) -> tuple[str, str]:
        """(graph, node) of a place by the name of a batch norm or a node, or as ``function:node``.

        Raises:
            Error: there is none.
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
    """Compare two SavedModels by name, and hold the result against the record of a rewrite, if `after` has one.

    Nothing in the models is executed. What a record does not explain are "other changes".

    Args:
        before: a directory with a SavedModel.
        after: another.
        values: compare the values of variables, too, which reads both checkpoints.
        full: say all there is to say of nodes that were added or removed, and let the page hold every node. Otherwise
            of other changes only, and the page holds what changed and what is around it.
        tags: those of the meta graphs, where a model holds several; the one for serving, if not given.

    Raises:
        Error: a model cannot be read, or the record is none.
    """
    models = load(before, tags), load(after, tags)
    compared = compare(*models, values=all_keys(*models) if values else (), describe=full)
    records = [read_record(Path(path) / EXTRA / RECORD) for path in (before, after)]
    known = records[1] if records[0] != records[1] else None  # one that both have is not about this difference
    if known is not None:
        source = models[0].source
        changes = explained(compared.changes, known, source.path / source.file, values=values)
        other = [c if c.by else with_details(compared, c) for c in sorted(changes, key=lambda c: bool(c.by))]
        compared = replace(compared, changes=tuple(other))
    told = {} if known is None else _told(Path(after) / EXTRA / LOG)
    title = f"{Path(before).resolve().name} → {Path(after).resolve().name}"
    return Diff(title, _report(compared, told, recorded=known is not None), compared, full)


def _told(file: Path) -> Mapping[tuple[str, str], str]:
    """(graph, node) -> why a rewrite skipped a site, as it says itself."""
    try:
        skipped = json.loads(file.read_text(encoding="utf-8"))["skipped"]
        return {(s["graph"], s["node"]): str(s["reason"]) for s in skipped}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def _report(compared: Comparison, told: Mapping[tuple[str, str], str], *, recorded: bool) -> DiffReport:
    before, after = compared.before, compared.after
    found = before.analysis(sites)
    now = after.analysis(quantized)
    keys = {(s.graph, s.node): s for s in found}
    became = _became(compared)
    rewritten = {
        k
        for k, s in keys.items()
        if not s.quantized and now.issuperset(became[k]) and (became[k] or _is_known(after, s))
    }
    skipped = Counter(
        next(filter(None, (told.get(j, "") for j in (k, *became[k]))), s.reason or "it is not quantised")
        for k, s in keys.items()
        if not s.quantized and k not in rewritten
    )
    signatures = set(before.source.proto.meta_graphs[before.source.index].signature_def) - OPS_ALONE
    broken = {c.name for c in compared.changes if c.kind == SIGNATURE and c.what != "added" and _touches(c)}
    verdict = Verdict(
        batch_norms=len(before.analysis(batch_norms)),
        sites_found=len(keys),
        sites_rewritten=len(rewritten),
        sites_added=len(now.difference(keys, *became.values())),
        sites_skipped=sum(skipped.values()),
        other_changes=sum(not c.by for c in compared.changes) if recorded else None,
        signatures_intact=len(signatures - broken),
        signatures_found=len(signatures),
    )
    return DiffReport(
        verdict=verdict,
        changes=list(compared.changes),
        layers=list(_layers(compared, told)),
        ops=_ops(before, after),
        renamed={old: new for old, new in compared.pairs.items() if old != new},
        skipped=dict(skipped),
    )


def _became(compared: Comparison) -> Mapping[tuple[str, str], list[tuple[str, str]]]:
    """(graph, node) of a site before -> those of what it is now: in the graph's pair, or what took its place."""
    found, left = became_of(compared.before, compared.after)
    paired = {key: (compared.pairs.get(key[0], key[0]), key[1]) for key in found}
    return {key: [paired[key]] if paired[key] in left else heirs for key, heirs in found.items()}


def _is_known(after: Model, site: Site) -> bool:
    """Whether a site's variables are still there, though its function no longer runs."""
    return any(key in after.variables for keys in site.variables for key in keys)


def _touches(change: Change) -> bool:
    """Whether a signature's inputs or outputs are others, and not only computed elsewhere."""
    return change.what == "removed" or any(d.aspect.startswith(("input ", "output ")) for d in change.details)


def _ops(*models: Model) -> dict[str, list[int]]:
    counts = [Counter(n.op for g in m.graphs.values() for n in g.nodes.values() if n.op != ARG) for m in models]
    return {op: [count[op] for count in counts] for op in sorted(counts[0].keys() | counts[1].keys())}


def _layers(compared: Comparison, told: Mapping[tuple[str, str], str]) -> Iterator[LayerDiff]:
    """Batch norms by name, with the sites of the model after, and those that are no longer there."""
    before, after = compared.before, compared.after
    old = {bn.name: bn for bn in before.analysis(batch_norms)}
    new = {bn.name: bn for bn in after.analysis(batch_norms)}
    for name in dict.fromkeys((*old, *new)):
        was = _by_place(old.get(name), compared.pairs)
        now = _by_place(new.get(name), {})
        found = [_site(compared, s, "same" if k in was else "added", told) for k, s in now.items()]
        found += [_site(compared, s, "removed", told) for k, s in was.items() if k not in now]
        yield LayerDiff(name, found)


def _by_place(bn: BatchNorm | None, pairs: Mapping[str, str]) -> dict[tuple[str, str], Site]:
    return {} if bn is None else {(pairs.get(s.graph, s.graph), s.node): s for s in bn.sites}


def _site(compared: Comparison, site: Site, what: str, told: Mapping[tuple[str, str], str]) -> SiteDiff:
    reason = "" if site.quantized else told.get((site.graph, site.node), site.reason)
    status = "skipped" if reason else site.status
    return SiteDiff(
        site.graph, site.node, what, site.kind, site.mode, status, reason, list(_inputs(compared, site, what))
    )


def _inputs(compared: Comparison, site: Site, what: str) -> Iterator[InputDiff]:
    """What enters a site: its inputs, where variables are brought to it, and statistics on their way to averages."""
    model = compared.before if what == "removed" else compared.after
    edges: dict[Edge, tuple[str, str]] = {}
    for use, held in (("input", site.inputs), ("input", site.parameters), ("statistic", site.statistics)):
        for role, found in held.items():
            for edge in found:
                for taken in _past_quantizer(model, edge):
                    edges.setdefault(taken, (role, use))
    for edge, (role, use) in edges.items():
        graph = model.graphs[edge.graph]
        node = graph.nodes[edge.node]
        value = node.inputs[edge.position]
        other = None if what == "removed" else compared.graph_before(edge.graph)
        was = node if what == "removed" else None if other is None else other.nodes.get(edge.node)
        old = was.inputs[edge.position] if was is not None and edge.position < len(was.inputs) else None
        made = graph.nodes[value.node]
        yield InputDiff(
            role,
            use,
            edge.graph,
            edge.node,
            port_name(model, node, edge.position),
            None if old is None else value_name(old),
            None if what == "removed" else value_name(value),
            formula_of(made),
            value_name(made.inputs[-1]) if TAG in made.attrs else "",
        )


def _past_quantizer(model: Model, edge: Edge) -> Iterator[Edge]:
    """Where a value is used: an edge of a node, or, where that is a quantiser, what uses the quantised value."""
    graph = model.graphs[edge.graph]
    if not edge.node:
        return
    if TAG in graph.nodes[edge.node].attrs:
        uses = model.analysis_of(graph, consumers).get(Value(edge.node), [])
        yield from (use for use in uses if use.node)
    else:
        yield edge


def formula_of(node: Node) -> str:
    """What a quantiser computes, in a line; "" for other nodes."""
    if TAG not in node.attrs:
        return ""
    tag = tag_of(node)
    scheme = SCHEMES.get(tag["scheme"])
    if scheme is None:
        return f"{tag['scheme']}(v)"
    return f"{tag['scheme']}, {tag['bits']} bits: {scheme.formula}"


def label_of(node: Node) -> str:
    """A quantiser's role and formula, as a picture's edge says it."""
    return f"{tag_of(node)['role']} ─ {formula_of(node)}"

"""``bnqat.diff``: the differences of two models, and those that a rewrite explains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from passes.batch_norm.batch_norms import batch_norms
from passes.batch_norm.roles import ROLES
from passes.batch_norm.site import Site
from passes.batch_norm.sites import quantized, sites
from rewriter.app.blocks import Line, Report
from rewriter.app.by_layer import Key
from rewriter.app.diff_layers import Outcomes, label_of, layer_diffs, parts_of_sites
from rewriter.app.diff_values import ValueDiffs
from rewriter.app.headline import headline
from rewriter.app.reports import became_of
from rewriter.app.show_diff import diff_lines
from rewriter.app.work import gc_paused
from rewriter.diff.compare import Comparison, all_keys, compare, with_details
from rewriter.diff.facts import SIGNATURE
from rewriter.diff.labels import function_labels, users
from rewriter.diff.log import LOG, RECORD, Log, explained, read_log, read_record
from rewriter.diff.page import diff_page
from rewriter.diff.pictures import around, pictures, unite
from rewriter.diff.report import NODE, Change, DiffReport, Verdict
from rewriter.diff.svg import picture_svg
from rewriter.ir import ARG, Error, Graph, Model
from rewriter.page.shell import frame
from rewriter.savedmodel.read import load
from rewriter.savedmodel.references import OPS_ALONE
from rewriter.savedmodel.write import EXTRA


@dataclass(frozen=True, repr=False)
class Diff(Report):
    """Differences of two models, as a report and as a page."""

    title: str
    report: DiffReport
    comparison: Comparison
    full: bool = False

    @property
    def headline(self) -> str:
        """A sentence that says what differs."""
        return self.report.headline

    def blocks(self) -> Iterator[Line]:
        """Return the lines that `bnqat diff` prints."""
        return diff_lines(self.title, self.report)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dicts and lists."""
        return asdict(self.report)

    def to_html(self) -> str:
        """Return a self-contained page: before and after side by side, and the report."""
        parts = parts_of_sites(self.comparison)
        places = [(s.graph, s.node) for layer in self.report.layers for s in layer.sites]
        drawn = pictures(self.comparison, {k: parts.get(k, ()) for k in places}, label_of, full=self.full)
        return diff_page(self.title, self.report, self.comparison, *drawn)

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
        parts = parts_of_sites(self.comparison).get((graph, node), ())
        return picture_svg(around(union, node, parts), union, hops)

    def site(self, name: str) -> tuple[str, str]:
        """Return the (graph, node) that a name means: a layer's, a node's, or ``function:node``.

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
        raise Error(f"there is no layer, and no node that changed, of the name {name}; bnqat diff lists them")

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
    log = read_log(Path(after) / EXTRA / LOG)
    title = f"{Path(before).resolve().name} → {Path(after).resolve().name}"
    return Diff(title, _report(comparison, log, recorded=record is not None), comparison, full)


def _report(comparison: Comparison, log: Log, *, recorded: bool) -> DiffReport:
    """Return the report of a comparison.

    Args:
        comparison: the two models.
        log: the log that a rewrite, or `finalize`, left in the model after.
        recorded: true if the model after holds the record of a rewrite of the model before.
    """
    reasons = log.skipped if recorded else {}
    before, after = comparison.before, comparison.after
    sites_before = before.analysis(sites)
    quantized_now = after.analysis(quantized)
    site_at = {(s.graph, s.node): s for s in sites_before}
    became, sites_after = _became(comparison)
    rewritten = {
        k
        for k, s in site_at.items()
        if not s.binding.quantized and quantized_now.issuperset(became[k]) and (became[k] or _is_known(after, s))
    }
    skipped = Counter(
        next(filter(None, (reasons.get(j, "") for j in (k, *became[k]))), s.reason or "it is not quantised")
        for k, s in site_at.items()
        if not s.binding.quantized and k not in rewritten and not log.baked
    )
    signatures = set(before.source.proto.meta_graphs[before.source.index].signature_def) - OPS_ALONE
    broken = {c.name for c in comparison.changes if c.kind == SIGNATURE and c.what != "added" and _changes_interface(c)}
    heirs = {k: [sites_after[j] for j in keys] for k, keys in became.items()}
    users_of = users(after)
    baked_norms = _widths_of_batch_norms(log)
    layers = list(layer_diffs(comparison, Outcomes(rewritten, heirs, reasons, baked_norms, users_of)))
    values = ValueDiffs(comparison, users_of)
    others = [*values.quantized(log.baked), *values.skipped(reasons)]
    skipped_places = Counter(site.reason for layer in others for site in layer.sites if site.status == "skipped")
    verdict = Verdict(
        batch_norms=len(before.analysis(batch_norms)),
        batch_norms_quantized=sum(layer.status == "quantised" for layer in layers),
        batch_norms_skipped=sum(layer.status in ("partly", "skipped") for layer in layers),
        sites_found=len(site_at),
        sites_rewritten=len(rewritten),
        sites_added=len(quantized_now.difference(site_at, *became.values())),
        sites_skipped=sum(skipped.values()),
        other_changes=sum(not c.by for c in comparison.changes) if recorded else None,
        signatures_intact=len(signatures - broken),
        signatures_found=len(signatures),
    )
    return DiffReport(
        headline=headline(after, [*layers, *others], verdict, len(comparison.changes)),
        verdict=verdict,
        changes=list(comparison.changes),
        layers=[*layers, *others],
        ops=_ops(before, after),
        renamed={old: new for old, new in comparison.pairs.items() if old != new},
        skipped=dict(skipped + skipped_places),
        users=users_of,
        labels=function_labels([*before.graphs, *after.graphs]),
    )


def _widths_of_batch_norms(log: Log) -> Mapping[str, set[int]]:
    """Return the name of each batch norm whose variables hold quantised values for good, and their widths."""
    widths: dict[str, set[int]] = {}
    for (name, role), of_role in log.baked.items():
        if role in ROLES:
            widths.setdefault(name, set()).update(of_role)
    return widths


def _became(comparison: Comparison) -> tuple[Mapping[Key, list[Key]], Mapping[Key, Site]]:
    """Return the sites that each site before became, and all sites after.

    A site became itself in its graph's pair, or those that took its place.
    """
    heirs_of, sites_after = became_of(comparison.before, comparison.after)
    paired = {key: (comparison.pairs.get(key[0], key[0]), key[1]) for key in heirs_of}
    return {key: [paired[key]] if paired[key] in sites_after else heirs for key, heirs in heirs_of.items()}, sites_after


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

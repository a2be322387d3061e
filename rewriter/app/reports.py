"""Reports of a rewrite and of an inspection, made from the models before and after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from passes.batch_norm.batch_norms import BatchNorm
from passes.batch_norm.roles import ROLES
from passes.batch_norm.site import Site
from passes.batch_norm.sites import quantized, sites
from passes.deploy.quantized_values import tagged
from passes.quantization.quantizer_marks import tag_of
from passes.quantize import Quantize
from passes.training.layer_options import MOMENTUM
from rewriter.app.report_schema import (
    BatchNormReport,
    Changed,
    Declined,
    QuantizerReport,
    RewriteReport,
    SignatureReport,
    SiteReport,
    Skipped,
    Tensor,
)
from rewriter.dataflow import call_graph, running
from rewriter.ir import MAIN, Model, Signature
from rewriter.pipeline import Step
from rewriter.protos import text


def describe_signature(model: Model, signature: Signature) -> SignatureReport:
    """Return the report of a signature: its inputs and outputs."""
    entry = model.entries.get(signature.entry)
    specs = signature.specs if entry is None else (*entry.inputs, *entry.outputs)
    tensors = [Tensor.of(n, s) for n, s in zip((*signature.inputs, *signature.outputs), specs, strict=True)]
    return SignatureReport(tensors[: len(signature.inputs)], tensors[len(signature.inputs) :])


def describe(model: Model, bn: BatchNorm) -> BatchNormReport:
    """Return the report of a batch norm and its sites."""
    names = {role: model.variables[key].name for role, key in bn.variables.items()}
    momentum = None if bn.weight is None else round(1 - bn.weight, 9)
    site_reports = [_describe_site(s) for s in bn.sites]
    return BatchNormReport(
        bn.name, names, bn.sites[0].epsilon, momentum, site_reports, momentum_of=_momentum_source(model, bn)
    )


def _momentum_source(model: Model, bn: BatchNorm) -> str:
    """Return where the momentum of a batch norm comes from; "" if no site has one."""
    site = next((s for s in bn.sites if s.binding.weight is not None), None)
    if site is None:
        return ""
    mark = model.graphs[site.graph].nodes[site.node].attrs.get(MOMENTUM)
    return "source" if mark is None else text(mark.s)


def _describe_site(site: Site) -> SiteReport:
    reason = "" if site.binding.quantized else site.reason
    tags = [dict(tag) for tag in site.binding.quantized]
    return SiteReport(site.graph, site.node, site.kind, site.mode, site.status, reason, tags)


def why_nothing(source: str | Path, model: Model, steps: list[Step]) -> str:
    """Return a sentence that says why there is nothing to rewrite."""
    all_sites = model.analysis(sites)
    if not all_sites:
        return (
            f"{source} holds no batch norm, neither a FusedBatchNorm op nor one in single ops with moving statistics, "
            "so there is nothing to rewrite"
        )
    if all(s.binding.quantized for s in all_sites):
        return f"all {len(all_sites)} batch-norm sites of {source} are quantised already; there is nothing to add"
    skipped = [s for step in steps for s in step.skipped]
    if not skipped:
        why = ": its batch norms are the fused kernel already" if all(s.kind == "fused" for s in all_sites) else ""
        return f"the passes changed nothing in {source}{why}"
    reasons = sorted({s.reason for s in skipped})
    more = f" (other reasons: {len(reasons) - 1})" if len(reasons) > 1 else ""
    skipped_count = len({(s.graph, s.node) for s in skipped})
    sites_of = "the batch-norm site" if len(all_sites) == 1 else f"none of the {len(all_sites)} batch-norm sites"
    cannot = "cannot" if len(all_sites) == 1 else "can"
    if skipped_count < len(all_sites):  # the other sites need no change by these passes
        sites_of, cannot = f"{skipped_count} of the {len(all_sites)} batch-norm sites", "cannot"
    return f"{sites_of} of {source} {cannot} be rewritten: {reasons[0]}{more}"


def report_of(before: Model, after: Model, steps: list[Step]) -> RewriteReport:
    """Return the report of the passes of a rewrite.

    A site may have become several, such as one for each mode. It counts as one, and is quantised if all of them are.
    """
    sites_before = {(s.graph, s.node): s for s in before.analysis(sites)}
    became, sites_after = became_of(before, after)
    quantized_now = after.analysis(quantized)
    decomposed = {k for k, s in sites_before.items() if s.kind == "decomposed"}
    fused = {k for k in decomposed if all(sites_after[j].kind == "fused" for j in became[k])}
    if any(isinstance(step.by, Quantize) for step in steps):
        rewritten = {
            k for k, s in sites_before.items() if not s.binding.quantized and quantized_now.issuperset(became[k])
        }
    else:
        rewritten = fused | {k for k in sites_before if became[k] != [k] or _changed(before, after, k)}
    quantizers_before = other_quantizers(before)
    reasons = {(s.graph, s.node): s.reason for step in steps for s in step.skipped}
    reasons_after = {k: [reasons.get(j) or sites_after[j].reason for j in became[k]] for k in sites_before}
    return RewriteReport(
        sites_found=len(sites_before),
        sites_rewritten=len(rewritten),
        sites_added=len(quantized_now.difference(sites_before, *became.values())),
        sites_fused=len(fused),
        skipped=[
            *(
                Skipped(*k, next(filter(None, reasons_after[k]), "no pass changed it"))
                for k in sites_before
                if k not in rewritten
            ),
            *_skipped_beside(steps),
        ],
        declined=[
            Declined(step.name, s.graph, s.node, s.reason)
            for step in steps
            if not isinstance(step.by, Quantize)
            for s in step.skipped
        ],
        variables_added=[v.name for k, v in after.variables.items() if k not in before.variables],
        notes=[note for step in steps for note in step.notes],
        other_changes=[],
        changes=[change for step in steps for change in _changes(step)],
        options={step.name: repr(step.by) for step in steps},
        versions=versions(),
        quantizers=[report for report in other_quantizers(after) if report not in quantizers_before],
    )


def _skipped_beside(steps: Iterable[Step]) -> Iterator[Skipped]:
    """Yield what could not be quantised and is no batch norm."""
    for step in steps:
        batch_norm_places = {(s.graph, s.node) for s in step.before.analysis(sites)}
        for skip in step.skipped if isinstance(step.by, Quantize) else ():
            if (skip.graph, skip.node) not in batch_norm_places:
                yield Skipped(skip.graph, skip.node, skip.reason)


def other_quantizers(model: Model) -> list[QuantizerReport]:
    """Return the quantisers of values other than batch norms', by role and layer."""
    reports: dict[tuple[str, int], QuantizerReport] = {}
    for graph, node in tagged(model):
        tag = tag_of(model.graphs[graph].nodes[node])
        if tag["role"] not in ROLES:
            new = QuantizerReport(tag["role"], tag["layer_name"], tag["scheme"], tag["bits"], tag["range"], [])
            reports.setdefault((new.role, tag["layer"]), new).places.append((graph, node))
    return list(reports.values())


Key = tuple[str, str]
"""A site by its graph and node."""


def became_of(before: Model, after: Model) -> tuple[Mapping[Key, list[Key]], Mapping[Key, Site]]:
    """Return the sites that each site became, and all sites after, without those of functions that no longer run.

    A site became itself; or, if it is gone, the new sites of its batch norm in its graph; or else those in functions
    that are reached from entries.
    """
    sites_before = {(s.graph, s.node): s for s in before.analysis(sites)}
    orphaned = before.analysis(running) - after.analysis(running)
    sites_after = {(s.graph, s.node): s for s in after.analysis(sites) if s.graph not in orphaned}
    new_sites: dict[tuple[str | None, ...], list[Key]] = {}
    for key, site in sites_after.items():
        for variables in site.binding.variables if key not in sites_before else ():
            if any(variables):
                new_sites.setdefault(variables, []).append(key)
    calls = after.analysis(call_graph)
    reached = set().union(*(calls.reached(name) for name in before.entries if name in after.graphs), {MAIN})
    became: dict[Key, list[Key]] = {}
    for key, site in sites_before.items():
        heirs = [heir for variables in site.binding.variables for heir in new_sites.get(variables, ())]
        heirs_in_graph = [heir for heir in heirs if heir[0] == key[0]]
        became[key] = [key] if key in sites_after else heirs_in_graph or [heir for heir in heirs if heir[0] in reached]
    return became, sites_after


def _changed(before: Model, after: Model, key: Key) -> bool:
    """Return true if a site's node is gone or changed."""
    graph, node = key
    return graph not in after.graphs or after.graphs[graph].nodes.get(node) != before.graphs[graph].nodes[node]


def _changes(step: Step) -> Iterator[Changed]:
    """Return the numbers of nodes that a pass added, removed and changed, by graph."""
    for name, graph in step.after.graphs.items():
        old = step.before.graphs.get(name)
        if old is graph:
            continue
        nodes = old.nodes if old is not None else {}
        added = sum(1 for n in graph.nodes if n not in nodes)
        removed = sum(1 for n in nodes if n not in graph.nodes)
        changed = sum(1 for n, node in graph.nodes.items() if n in nodes and nodes[n] is not node and nodes[n] != node)
        if added or removed or changed:
            yield Changed(step.name, name, added, removed, changed)


def versions() -> dict[str, str]:
    """Return the versions of bnqat and TensorFlow."""
    try:
        bnqat_version = version("bnqat")
    except PackageNotFoundError:
        bnqat_version = "unknown"
    return {"bnqat": bnqat_version, "tensorflow": version("tensorflow")}

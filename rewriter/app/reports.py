"""What a rewrite and an inspection say, from the models before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from passes.batch_norm.batch_norms import BatchNorm
from passes.batch_norm.quantize_batch_norm import QuantizeBatchNorm
from passes.batch_norm.sites import Site, quantized, sites
from passes.training.options import MOMENTUM
from rewriter.dataflow import call_graph, running
from rewriter.ir import MAIN, Model, Signature
from rewriter.pipeline import Step
from rewriter.protos import text
from rewriter.report import (
    BatchNormReport,
    Changed,
    Declined,
    RewriteReport,
    SignatureReport,
    SiteReport,
    Skipped,
    Tensor,
)


def describe_signature(model: Model, signature: Signature) -> SignatureReport:
    """A signature's inputs and outputs."""
    entry = model.entries.get(signature.entry)
    specs = signature.specs if entry is None else (*entry.inputs, *entry.outputs)
    tensors = [Tensor.of(n, s) for n, s in zip((*signature.inputs, *signature.outputs), specs, strict=True)]
    return SignatureReport(tensors[: len(signature.inputs)], tensors[len(signature.inputs) :])


def describe(model: Model, bn: BatchNorm) -> BatchNormReport:
    """A batch norm and its sites."""
    names = {role: model.variables[key].name for role, key in bn.variables.items()}
    momentum = None if bn.factor is None else round(1 - bn.factor, 9)
    sites = [_describe_site(s) for s in bn.sites]
    return BatchNormReport(bn.name, names, bn.sites[0].epsilon, momentum, sites, momentum_of=_whose(model, bn))


def _whose(model: Model, bn: BatchNorm) -> str:
    """Whose the momentum of a batch norm is; empty where no site has one."""
    site = next((s for s in bn.sites if s.weight is not None), None)
    if site is None:
        return ""
    mark = model.graphs[site.graph].nodes[site.node].attrs.get(MOMENTUM)
    return "source" if mark is None else text(mark.s)


def _describe_site(site: Site) -> SiteReport:
    reason = "" if site.quantized else site.reason
    tags = [dict(tag) for tag in site.quantized]
    return SiteReport(site.graph, site.node, site.kind, site.mode, site.status, reason, tags)


def why_nothing(source: str | Path, model: Model, steps: list[Step]) -> str:
    """Why there is nothing to rewrite, in a sentence."""
    found = model.analysis(sites)
    if not found:
        return (
            f"{source} holds no batch norm, neither a FusedBatchNorm op nor one in single ops with moving statistics, "
            "so there is nothing to rewrite"
        )
    if all(s.quantized for s in found):
        return f"all {len(found)} batch-norm sites of {source} are quantised already; there is nothing to add"
    skipped = [s for step in steps for s in step.skipped]
    if not skipped:
        why = ": its batch norms are the fused kernel already" if all(s.kind == "fused" for s in found) else ""
        return f"the passes changed nothing in {source}{why}"
    reasons = sorted({s.reason for s in skipped})
    more = f" (other reasons: {len(reasons) - 1})" if len(reasons) > 1 else ""
    left = len({(s.graph, s.node) for s in skipped})
    sites_of = "the batch-norm site" if len(found) == 1 else f"none of the {len(found)} batch-norm sites"
    cannot = "cannot" if len(found) == 1 else "can"
    if left < len(found):  # the others are as these passes want them
        sites_of, cannot = f"{left} of the {len(found)} batch-norm sites", "cannot"
    return f"{sites_of} of {source} {cannot} be rewritten: {reasons[0]}{more}"


def report_of(before: Model, after: Model, steps: list[Step]) -> RewriteReport:
    """What passes did.

    A site may have become several, as one for each mode; it counts as one, and is quantised if they are.
    """
    found = {(s.graph, s.node): s for s in before.analysis(sites)}
    became, left = became_of(before, after)
    now = after.analysis(quantized)
    single = {k for k, s in found.items() if s.kind == "decomposed"}
    fused = {k for k in single if all(left[j].kind == "fused" for j in became[k])}
    if any(isinstance(step.by, QuantizeBatchNorm) for step in steps):
        rewritten = {k for k, s in found.items() if not s.quantized and now.issuperset(became[k])}
    else:
        rewritten = fused | {k for k in found if became[k] != [k] or _changed(before, after, k)}
    reasons = {(s.graph, s.node): s.reason for step in steps for s in step.skipped}
    told = {k: [reasons.get(j) or left[j].reason for j in became[k]] for k in found}
    return RewriteReport(
        sites_found=len(found),
        sites_rewritten=len(rewritten),
        sites_added=len(now.difference(found, *became.values())),
        sites_fused=len(fused),
        skipped=[Skipped(*k, next(filter(None, told[k]), "no pass changed it")) for k in found if k not in rewritten],
        declined=[
            Declined(step.name, s.graph, s.node, s.reason)
            for step in steps
            if not isinstance(step.by, QuantizeBatchNorm)
            for s in step.skipped
        ],
        variables_added=[v.name for k, v in after.variables.items() if k not in before.variables],
        notes=[note for step in steps for note in step.notes],
        other_changes=[],
        changes=[change for step in steps for change in _changes(step)],
        options={step.name: repr(step.by) for step in steps},
        versions=versions(),
    )


Key = tuple[str, str]
"""A site by its graph and node."""


def became_of(before: Model, after: Model) -> tuple[Mapping[Key, list[Key]], Mapping[Key, Site]]:
    """What each site is now, and the sites that there are now, without those of functions that no longer run.

    A site is itself, or the new ones of its batch norm in its graph, or where its callers get to.
    """
    found = {(s.graph, s.node): s for s in before.analysis(sites)}
    orphaned = before.analysis(running) - after.analysis(running)
    left = {(s.graph, s.node): s for s in after.analysis(sites) if s.graph not in orphaned}
    new: dict[tuple[str | None, ...], list[Key]] = {}
    for key, site in left.items():
        for variables in site.variables if key not in found else ():
            if any(variables):
                new.setdefault(variables, []).append(key)
    calls = after.analysis(call_graph)
    reached = set().union(*(calls.reached(name) for name in before.entries if name in after.graphs), {MAIN})
    became: dict[Key, list[Key]] = {}
    for key, site in found.items():
        heirs = [heir for variables in site.variables for heir in new.get(variables, ())]
        near = [heir for heir in heirs if heir[0] == key[0]]
        became[key] = [key] if key in left else near or [heir for heir in heirs if heir[0] in reached]
    return became, left


def _changed(before: Model, after: Model, key: Key) -> bool:
    """Whether a site's node is another one now."""
    graph, node = key
    return graph not in after.graphs or after.graphs[graph].nodes.get(node) != before.graphs[graph].nodes[node]


def _changes(step: Step) -> Iterator[Changed]:
    """What a pass changed, by comparison."""
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
    """Of bnqat and TensorFlow."""
    try:
        own = version("bnqat")
    except PackageNotFoundError:
        own = "unknown"
    return {"bnqat": own, "tensorflow": version("tensorflow")}

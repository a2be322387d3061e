"""Reports of a rewrite and of an inspection, made from the models before and after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from passes.batch_norm.batch_norms import BatchNorm, batch_norms, names_of_sites
from passes.batch_norm.roles import ROLES
from passes.batch_norm.site import Site
from passes.batch_norm.sites import quantized, sites
from passes.deploy.quantized_values import tagged
from passes.quantization.quantizer_marks import tag_of
from passes.quantize import Quantize
from passes.training.freeze_statistics import FreezeStatistics
from passes.training.layer_options import MOMENTUM
from rewriter.app.blocks import quantized_text
from rewriter.app.by_layer import Key, LayerReason, grouped, outcomes, reasons_of
from rewriter.app.report_schema import (
    BatchNormReport,
    Changed,
    Declined,
    LayerOutcome,
    QuantizerReport,
    RewriteReport,
    SignatureReport,
    SiteReport,
    Skipped,
    Tensor,
)
from rewriter.dataflow import call_graph, running
from rewriter.edit import AddSignature, AddVariable, Expose, Note
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
    layers = model.analysis(batch_norms)
    if not layers:
        return _why_nothing_else(source, model, steps)
    all_sites = model.analysis(sites)
    which = "the batch norm" if len(layers) == 1 else f"all {len(layers)} batch norms"
    if all(s.binding.quantized for s in all_sites):
        verb = "is" if len(layers) == 1 else "are"
        return f"{which} of {source} {verb} quantised already; there is nothing to add"
    reasons = [
        reason._replace(by="" if isinstance(step.by, Quantize) else reason.by)
        for step in steps
        for reason in _layer_reasons(step)
    ]
    if not reasons:
        why = ": its batch norms are the fused kernel already" if all(s.kind == "fused" for s in all_sites) else ""
        return f"the passes changed nothing in {source}{why}"
    groups = grouped((model,), reasons)
    more = f" (other reasons: {len(groups) - 1})" if len(groups) > 1 else ""
    skipped_names = {reason.layer for reason in reasons}
    names = model.analysis(names_of_sites)
    skipped_count = sum(any(names[s.graph, s.node] in skipped_names for s in bn.sites) for bn in layers)
    cannot = "cannot" if len(layers) == 1 else "can"
    if len(layers) > 1:
        which = f"none of the {len(layers)} batch norms"
    if skipped_count < len(layers):  # the others need no change by these passes
        which, cannot = f"{skipped_count} of the {len(layers)} batch norms", "cannot"
    return f"{which} of {source} {cannot} be rewritten: {groups[0].reason}{more}"


def _why_nothing_else(source: str | Path, model: Model, steps: list[Step]) -> str:
    """Return a sentence that says why there is nothing to rewrite in a model without batch norms."""
    roles = [role for step in steps if isinstance(step.by, Quantize) for role in step.by.named_roles]
    present = other_quantizers(model)
    if present and {q.role for q in present}.issuperset(roles):
        return f"{source} is quantised already ({quantized_text(present)}); there is nothing to add"
    reasons = [reason for step in steps if isinstance(step.by, Quantize) for reason in _layer_reasons(step)]
    named = " or ".join(roles)
    if reasons:
        groups = grouped((model,), reasons)
        more = f" (other reasons: {len(groups) - 1})" if len(groups) > 1 else ""
        return f"no value of the role {named} of {source} can be quantised: {groups[0].reason}{more}"
    if roles:
        return f"{source} holds no batch norm and no value of the role {named}, so there is nothing to rewrite"
    quantizing = any(isinstance(step.by, Quantize) for step in steps)
    return (
        f"{source} holds no batch norm, neither a FusedBatchNorm op nor one in single ops with moving statistics, "
        f"so there is nothing to rewrite{'; --bits weight=8 quantises weights' if quantizing else ''}"
    )


def report_of(before: Model, after: Model, steps: list[Step]) -> RewriteReport:
    """Return the report of the passes of a rewrite.

    A site may have become several, such as one for each mode. It counts as one, and is quantised if all of them are.
    """
    sites_before = {(s.graph, s.node): s for s in before.analysis(sites)}
    became, sites_after = became_of(before, after)
    quantized_now = after.analysis(quantized)
    decomposed = {k for k, s in sites_before.items() if s.kind == "decomposed"}
    fused = {k for k in decomposed if all(sites_after[j].kind == "fused" for j in became[k])}
    quantizing = any(isinstance(step.by, Quantize) for step in steps)
    if quantizing:
        rewritten = {
            k for k, s in sites_before.items() if not s.binding.quantized and quantized_now.issuperset(became[k])
        }
    else:
        rewritten = fused | {k for k in sites_before if became[k] != [k] or _changed(before, after, k)}
    quantizers_before = other_quantizers(before)
    reasons = _reasons(steps, became, sites_after)
    layers = outcomes(before, rewritten, reasons, fused)
    skipped = [*(Skipped(*k, reasons[k]) for k in sites_before if k not in rewritten), *_skipped_beside(steps)]
    other_steps = [step for step in steps if not isinstance(step.by, Quantize)]
    others = [LayerReason("", s.reason, op=s.node) for s in skipped if (s.graph, s.node) not in sites_before]
    others += [reason for step in other_steps for reason in _layer_reasons(step)]
    notes = [edit for step in steps for edit in step.edits if isinstance(edit, Note)]
    return RewriteReport(
        sites_found=len(sites_before),
        sites_rewritten=len(rewritten),
        sites_added=len(quantized_now.difference(sites_before, *became.values())),
        sites_fused=len(fused),
        skipped=skipped,
        declined=[Declined(step.name, s.graph, s.node, s.reason) for step in other_steps for s in step.skipped],
        variables_added=[v.name for k, v in after.variables.items() if k not in before.variables],
        notes=[note.text for note in notes],
        other_changes=[],
        changes=[change for step in steps for change in _changes(step)],
        options={step.name: repr(step.by) for step in steps},
        versions=versions(),
        quantizers=[report for report in other_quantizers(after) if report not in quantizers_before],
        layers=layers,
        skipped_layers=grouped((before, after), [*reasons_of(layers), *_but(layers, others)]),
        bits=_widths(after) if quantizing else [],
        schedule=_schedule(steps),
        train=_train_function(steps),
        train_note=next((note.text for note in notes if note.kind == "train"), ""),
        details=[note.text for note in notes if note.kind == "detail"],
    )


def _reasons(steps: Iterable[Step], became: Mapping[Key, list[Key]], sites_after: Mapping[Key, Site]) -> dict[Key, str]:
    """Return, for each site before, a reason for which it, or a site that it became, was left as it is."""
    skip_reasons = {(s.graph, s.node): s.reason for step in steps for s in step.skipped}
    return {
        key: next(filter(None, (skip_reasons.get(j) or sites_after[j].reason for j in heirs)), "no pass changed it")
        for key, heirs in became.items()
    }


def _but(layers: Iterable[LayerOutcome], reasons: Iterable[LayerReason]) -> Iterator[LayerReason]:
    """Yield the reasons that layers do not have already."""
    known = {(layer.name, reason) for layer in layers for reason in layer.reasons}
    return (each for each in reasons if (each.layer, each.reason) not in known)


def _layer_reasons(step: Step) -> Iterator[LayerReason]:
    """Yield the layers that a pass left as they are, with the reasons."""
    names = step.before.analysis(names_of_sites) if step.skipped else {}
    for skip in step.skipped:
        yield LayerReason(names.get((skip.graph, skip.node), ""), skip.reason, step.name)


def _widths(model: Model) -> list[int]:
    """Return the widths that batch norms' quantisers have at first."""
    tags = [tag for site in model.analysis(sites) for tag in site.binding.quantized]
    return sorted({tag["bits"] for tag in tags if tag["role"] in ROLES})


def _schedule(steps: Iterable[Step]) -> dict[str, int]:
    """Return the steps at which quantisers begin to act and statistics are frozen, as far as passes set them."""
    schedule: dict[str, int] = {}
    for step in steps:
        if isinstance(step.by, Quantize):
            schedule |= {"start_step": step.by.start_step, "ramp_steps": step.by.ramp_steps}
        elif isinstance(step.by, FreezeStatistics) and step.by.freeze_step is not None and _adds_variable(step):
            schedule["freeze_step"] = step.by.freeze_step
    return schedule


def _adds_variable(step: Step) -> bool:
    return any(isinstance(edit, AddVariable) for edit in step.edits)


def _train_function(steps: Iterable[Step]) -> str:
    """Return where the training function is that the passes add; "" if they add none."""
    edits = [edit for step in steps for edit in step.edits]
    paths = {edit.path for edit in edits if isinstance(edit, Expose)}
    paths |= {f"signature {edit.name}" for edit in edits if isinstance(edit, AddSignature)}
    return next((path for path in ("train", "quantization.train", "signature train") if path in paths), "")


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
            key = (tag["role"], tag["layer"])
            if key not in reports:
                granularity = "per_tensor" if tag["axis"] is None else "per_channel"
                facts = (tag["layer_name"], tag["scheme"], tag["bits"], tag["range"])
                reports[key] = QuantizerReport(tag["role"], *facts, [], tag["axis"], granularity)
            reports[key].places.append((graph, node))
    return list(reports.values())


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

"""``bnqat.inspect`` and ``bnqat.rewrite``."""

from __future__ import annotations

import gc
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from passes.batch_norm import BatchNorm, batch_norms
from passes.cut_gradients import CutGradients
from passes.derive_training import DeriveTraining
from passes.inline_branches import InlineBranches
from passes.quantize_batch_norm import QuantizeBatchNorm, with_bits
from passes.roles import ROLES
from passes.sites import Site, quantized, sites
from passes.unfreeze_constants import UnfreezeConstants
from passes.upgrade_references import UpgradeReferences
from rewriter.check import check
from rewriter.ir import Error, Model, Signature
from rewriter.pipeline import Observer, Pass, Pipeline, Step, load_pass
from rewriter.report import (
    BatchNormReport,
    Changed,
    Inspection,
    RewriteReport,
    SignatureReport,
    SiteReport,
    Skipped,
    Tensor,
)
from rewriter.savedmodel.read import load
from rewriter.savedmodel.staging import refuse_existing, refuse_overlap
from rewriter.savedmodel.write import save


class NothingToRewriteError(Error):
    """The model holds nothing that the passes could change."""


@contextmanager
def _no_collection() -> Iterator[None]:
    """Pause the cyclic garbage collector: what is made here lives until the end and is free of cycles."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def inspect(model: str | Path, *, tags: Collection[str] | None = None) -> Inspection:
    """The signatures and batch norms of a SavedModel. Nothing in the model is executed.

    Args:
        model: a directory with a SavedModel.
        tags: those of the meta graph, where it holds several; the one for serving, if not given.

    Raises:
        Error: the model cannot be read.
    """
    read = load(model, tags)
    check(read)
    signatures = {name: _describe_signature(read, s) for name, s in read.signatures.items()}
    return Inspection(signatures, [_describe(read, bn) for bn in read.analysis(batch_norms)])


def _describe_signature(model: Model, signature: Signature) -> SignatureReport:
    entry = model.entries.get(signature.entry)
    specs = signature.specs if entry is None else (*entry.inputs, *entry.outputs)
    tensors = [Tensor.of(n, s) for n, s in zip((*signature.inputs, *signature.outputs), specs, strict=True)]
    return SignatureReport(tensors[: len(signature.inputs)], tensors[len(signature.inputs) :])


def _describe(model: Model, bn: BatchNorm) -> BatchNormReport:
    names = {role: model.variables[key].name for role, key in bn.variables.items()}
    momentum = None if bn.factor is None else round(1 - bn.factor, 9)
    return BatchNormReport(bn.name, names, bn.sites[0].epsilon, momentum, [_describe_site(s) for s in bn.sites])


def _describe_site(site: Site) -> SiteReport:
    reason = "" if site.quantized else site.reason
    tags = [dict(tag) for tag in site.quantized]
    return SiteReport(site.graph, site.node, site.kind, site.mode, site.status, reason, tags)


@_no_collection()
def rewrite(
    source: str | Path,
    target: str | Path,
    *,
    bits: int | Mapping[str, int] = 8,
    start_step: int = 0,
    momentum: float | None = None,
    quantize_average: Literal["statistic", "none"] = "statistic",
    unfreeze_constants: bool = False,
    keep_ref: bool = False,
    tags: Collection[str] | None = None,
    passes: Sequence[Pass | str] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    observers: Sequence[Observer] = (),
) -> RewriteReport:
    """Write a fine-tunable SavedModel whose batch norms are quantised. Nothing in the model is executed.

    Args:
        source: a directory with a SavedModel; it is not changed.
        target: where to write; it must not exist, unless `overwrite` is given.
        bits: the width of every role's codes, 2 to 16, or widths by role (8 for those not named).
        start_step: the first step at which quantisers act.
        momentum: of derived training, where the source does not say it.
        quantize_average: whether a batch's statistics are quantised before they enter the moving averages.
        unfreeze_constants: make batch norms' parameters that are constants variables again.
        keep_ref: leave TensorFlow 1's reference variables as they are; then the result can be trained
            in V1 sessions only.
        tags: those of the meta graph to rewrite, where the model holds several; the one for serving, if not
            given. The others are kept as they are.
        passes: passes to run instead of the default ones, as objects or by name: ``upgrade-references``,
            ``unfreeze-constants``, ``derive-training``, ``inline-branches``, ``cut-gradients``,
            ``quantize-batch-norm``, or ``module:Class``.
        overwrite: replace `target` if it is a SavedModel.
        dry_run: run the passes and report, write nothing.
        observers: called after each pass.

    Raises:
        NothingToRewriteError: no pass changed anything; the message says why.
        Error: the model cannot be read or written, or an option is out of range.
    """
    widths = dict(bits) if isinstance(bits, Mapping) else dict.fromkeys(ROLES, operator.index(bits))
    known: dict[str, Pass] = {
        "upgrade-references": UpgradeReferences(keep=keep_ref),
        "unfreeze-constants": UnfreezeConstants(),
        "derive-training": DeriveTraining(momentum),
        "inline-branches": InlineBranches(),
        "cut-gradients": CutGradients(),
        "quantize-batch-norm": QuantizeBatchNorm(**with_bits(widths), average=quantize_average, start_step=start_step),
    }
    left = {"unfreeze-constants": not unfreeze_constants}
    default = [name for name in known if not left.get(name)]
    chosen = [_named(p, known) if isinstance(p, str) else p for p in (default if passes is None else passes)]
    target = Path(target)
    if not dry_run:
        refuse_overlap(Path(source), target)
        refuse_existing(target, overwrite)
    before = load(source, tags)
    check(before)
    after, steps = Pipeline(chosen, observers).run(before)
    report = _report(before, after, steps)
    quantizing = any(isinstance(each, QuantizeBatchNorm) for each in chosen)
    if after.graphs == before.graphs or (quantizing and not report.sites_rewritten):
        raise NothingToRewriteError(_why_nothing(source, before, steps))
    if dry_run:
        return report

    def log(changes: list[str]) -> Mapping[str, Any]:
        found = [_describe(before, bn) for bn in before.analysis(batch_norms)]
        return {**asdict(replace(report, other_changes=changes)), "batch_norms": [asdict(bn) for bn in found]}

    return replace(report, other_changes=save(after, target, overwrite, log))


def _named(name: str, known: Mapping[str, Pass]) -> Pass:
    if name in known:
        return known[name]
    if ":" not in name:
        raise Error(f"there is no pass {name!r}; there are {', '.join(known)}, and your own as module:Class")
    return load_pass(name)


def _why_nothing(source: str | Path, model: Model, steps: list[Step]) -> str:
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
        return f"the passes changed nothing in {source}"
    reasons = sorted({s.reason for s in skipped})
    more = f" (other reasons: {len(reasons) - 1})" if len(reasons) > 1 else ""
    sites_of = "the batch-norm site" if len(found) == 1 else f"none of the {len(found)} batch-norm sites"
    cannot = "cannot" if len(found) == 1 else "can"
    return f"{sites_of} of {source} {cannot} be rewritten: {reasons[0]}{more}"


def _report(before: Model, after: Model, steps: list[Step]) -> RewriteReport:
    found = {(s.graph, s.node): s for s in before.analysis(sites)}
    now = after.analysis(quantized)
    rewritten = {k for k, s in found.items() if not s.quantized and k in now}
    reasons = {(s.graph, s.node): s.reason for step in steps for s in step.skipped}
    left = [
        Skipped(*k, reasons.get(k, s.reason or "no pass changed it")) for k, s in found.items() if k not in rewritten
    ]
    return RewriteReport(
        sites_found=len(found),
        sites_rewritten=len(rewritten),
        sites_added=len(now - set(found)),
        skipped=left,
        variables_added=[v.name for k, v in after.variables.items() if k not in before.variables],
        notes=[note for step in steps for note in step.notes],
        other_changes=[],
        changes=[change for step in steps for change in _changes(step)],
        options={type(p).__name__: repr(p) for p in (step.by for step in steps)},
        versions=_versions(),
    )


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


def _versions() -> dict[str, str]:
    try:
        own = version("bnqat")
    except PackageNotFoundError:
        own = "unknown"
    return {"bnqat": own, "tensorflow": version("tensorflow")}

"""``bnqat.inspect`` and ``bnqat.rewrite``."""

from __future__ import annotations

import gc
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from passes.batch_norm import batch_norms
from passes.choose_branch import ChooseBranch
from passes.cut_gradients import CutGradients
from passes.derive_training import DeriveTraining
from passes.fuse_batch_norm import FuseBatchNorm
from passes.inline_branches import InlineBranches
from passes.merge_choices import MergeChoices
from passes.quantize_batch_norm import QuantizeBatchNorm, with_bits
from passes.roles import ROLES
from passes.split_modes import SplitModes
from passes.unfreeze_constants import UnfreezeConstants
from passes.upgrade_references import UpgradeReferences
from rewriter.app.reports import describe, describe_signature, report_of, why_nothing
from rewriter.check import check
from rewriter.ir import Error
from rewriter.pipeline import Observer, Pass, Pipeline, load_pass
from rewriter.report import Inspection, RewriteReport
from rewriter.savedmodel.read import load
from rewriter.savedmodel.staging import refuse_existing, refuse_overlap
from rewriter.savedmodel.write import save

FUSING = ("split-modes", "merge-choices", "fuse-batch-norm", "choose-branch")
"""Passes that `fuse` is for."""


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
    signatures = {name: describe_signature(read, s) for name, s in read.signatures.items()}
    return Inspection(signatures, [describe(read, bn) for bn in read.analysis(batch_norms)])


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
    fuse: bool = True,
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
        fuse: let the fused kernel compute batch norms that are in single ops, and only the mode that is chosen run.
        keep_ref: leave TensorFlow 1's reference variables as they are; then the result can be trained
            in V1 sessions only.
        tags: those of the meta graph to rewrite, where the model holds several; the one for serving, if not
            given. The others are kept as they are.
        passes: passes to run instead of the default ones, as objects or by name: ``upgrade-references``,
            ``unfreeze-constants``, ``split-modes``, ``merge-choices``, ``fuse-batch-norm``, ``choose-branch``,
            ``derive-training``, ``inline-branches``, ``cut-gradients``, ``quantize-batch-norm``, or ``module:Class``.
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
        "split-modes": SplitModes(),
        "merge-choices": MergeChoices(),
        "fuse-batch-norm": FuseBatchNorm(),
        "choose-branch": ChooseBranch(),
        "derive-training": DeriveTraining(momentum),
        "inline-branches": InlineBranches(),
        "cut-gradients": CutGradients(),
        "quantize-batch-norm": QuantizeBatchNorm(**with_bits(widths), average=quantize_average, start_step=start_step),
    }
    wanted = {"unfreeze-constants": unfreeze_constants, **dict.fromkeys(FUSING, fuse)}
    default = [name for name in known if wanted.get(name, True)]
    chosen = [_named(p, known) if isinstance(p, str) else p for p in (default if passes is None else passes)]
    target = Path(target)
    if not dry_run:
        refuse_overlap(Path(source), target)
        refuse_existing(target, overwrite)
    before = load(source, tags)
    check(before)
    after, steps = Pipeline(chosen, observers).run(before)
    report = report_of(before, after, steps)
    quantizing = any(isinstance(each, QuantizeBatchNorm) for each in chosen)
    if after.graphs == before.graphs or (quantizing and not report.sites_rewritten):
        raise NothingToRewriteError(why_nothing(source, before, steps))
    if dry_run:
        return report

    def log(changes: list[str]) -> Mapping[str, Any]:
        found = [describe(before, bn) for bn in before.analysis(batch_norms)]
        return {**asdict(replace(report, other_changes=changes)), "batch_norms": [asdict(bn) for bn in found]}

    return replace(report, other_changes=save(after, target, overwrite, log))


def _named(name: str, known: Mapping[str, Pass]) -> Pass:
    if name in known:
        return known[name]
    if ":" not in name:
        raise Error(f"there is no pass {name!r}; there are {', '.join(known)}, and your own as module:Class")
    return load_pass(name)

"""``bnqat.inspect`` and ``bnqat.rewrite``."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from passes.batch_norm.batch_norms import batch_norms
from passes.quantization.custom import QuantizeFunction
from passes.quantize import Quantize
from rewriter.app.by_layer import grouped, unchangeable
from rewriter.app.finalized import is_finalized
from rewriter.app.pass_list import pass_list
from rewriter.app.record import record_of
from rewriter.app.report_schema import Inspection, RewriteReport
from rewriter.app.reports import describe, describe_signature, other_quantizers, report_of, why_nothing
from rewriter.app.settings import OF_QUANTIZER, Settings, settings
from rewriter.app.values import values_of
from rewriter.app.weights import skipped_weights, weights_of
from rewriter.app.work import gc_paused
from rewriter.diff.log import LOG, RECORD
from rewriter.ir import Error
from rewriter.pipeline import Observer, Pass, Pipeline
from rewriter.savedmodel.read import load
from rewriter.savedmodel.staging import refuse_existing, refuse_overlap
from rewriter.savedmodel.write import Written, save

T = TypeVar("T")
ByRole: TypeAlias = T | Mapping[str, T]
"""One value for all roles, or values by role."""


FINALIZED = (
    "the source is a finalised model: its values are rounded already, and what trains was removed; to train further, "
    "take the model that was given to finalize"
)
"""Note on the rewrite of a model that needs none."""


class NothingToRewriteError(Error):
    """Error for a model that holds nothing that the passes could change."""


@gc_paused()
def inspect(model: str | Path, *, tags: Collection[str] | None = None) -> Inspection:
    """Return the signatures, batch norms and weights of a SavedModel, and the values of their variables.

    Nothing in the model is executed. bnqat's own quantisers compute the error that rounding each variable would make.

    Args:
        model: a directory with a SavedModel.
        tags: the tags of the meta graph to read, if the model holds several; by default those of the one for serving.

    Raises:
        Error: the model cannot be read.
    """
    saved_model = load(model, tags)
    signatures = {name: describe_signature(saved_model, s) for name, s in saved_model.signatures.items()}
    layers = saved_model.analysis(batch_norms)
    values = values_of(saved_model, layers)
    described = [
        replace(
            describe(saved_model, bn), values={r: values[bn.name, r] for r in bn.variables if (bn.name, r) in values}
        )
        for bn in layers
    ]
    skipped = grouped([saved_model], unchangeable(described))
    return Inspection(
        signatures,
        described,
        Path(model).resolve().name,
        other_quantizers(saved_model),
        skipped,
        weights_of(saved_model),
        grouped([saved_model], skipped_weights(saved_model)),
    )


@gc_paused()
def rewrite(
    source: str | Path,
    target: str | Path,
    *,
    bits: ByRole[int] | None = None,
    scheme: ByRole[str] | None = None,
    range: ByRole[str | Sequence[float]] | None = None,  # noqa: A002  the option's name everywhere else
    range_momentum: ByRole[float] | None = None,
    rounding: ByRole[str] | None = None,
    granularity: ByRole[str] | None = None,
    narrow_range: ByRole[bool] | None = None,
    quantizer: ByRole[QuantizeFunction | str] | None = None,
    quantize_average: Literal["statistic", "none", "stored"] | None = None,
    start_step: int | None = None,
    ramp_steps: int | None = None,
    freeze_step: int | None = None,
    momentum: float | None = None,
    train_batch_norm: Literal["as-source", "all", "none"] | None = None,
    train_outputs: Mapping[str, str] | None = None,
    unfreeze_constants: bool | None = None,
    fuse: bool | None = None,
    keep_ref: bool | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
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
        bits: the width of the codes of every role of batch norms, 2 to 16, or widths by role (8 for those not named).
            Weights are quantised if an option names them: ``bits={"weight": 8}``.
        scheme: "affine", "symmetric", "power_of_two", "log" (the moving variance only) or "none", or these by role.
        range: "dynamic", "ema", "learned", "mse" (weights only) or two limits, or these by role.
        range_momentum: the momentum of an ema range, 0.99 if not given.
        rounding: "nearest", or "stochastic" in training.
        granularity: of weights: a range "per_channel" (the default), or one "per_tensor".
        narrow_range: use one code fewer than 2^bits.
        quantizer: a function (vector, context) -> vector in place of a scheme, or its name as "module:function".
        quantize_average: the value that the update of moving averages quantises: a batch's "statistic", the average
            before it is "stored", or "none".
        start_step: the first step at which quantisers act.
        ramp_steps: the number of steps, from the start step on, that blend float and quantised values.
        freeze_step: the first step at which training uses the moving statistics and no longer updates them; if not
            given, there is no such phase.
        momentum: the momentum of derived training, if the source does not say it.
        train_batch_norm: the batch norms that train: "all", "none", or "as-source", the default: all but those that
            the source says are frozen.
        train_outputs: nodes whose values `train` also returns, by output name; then it returns a dict. A node is named
            as in the function that serves, or in the source's training function if that is used: ``boxes``,
            ``boxes:1``, or with the function it is in, ``__inference_heads_12:boxes``.
        unfreeze_constants: make batch norms' parameters and weights that are constants variables again.
        fuse: let the fused kernel compute batch norms that are in single ops, and run only the chosen mode.
        keep_ref: leave TensorFlow 1's reference variables as they are; then the result can be trained
            in V1 sessions only.
        config: a TOML file with options, or a dict of its content; options given directly override it.
        tags: the tags of the meta graph to rewrite, if the model holds several; by default those of the one for
            serving. The other meta graphs are kept as they are.
        passes: passes to run instead of the default ones, as objects, by name (those of `passes.PASSES`; the default
            ones are those of `passes.REWRITE` that no option leaves out), or as ``module:Class``.
        overwrite: replace `target` if it is a SavedModel.
        dry_run: run the passes and report, write nothing.
        observers: called after each pass.

    Raises:
        NothingToRewriteError: no pass changed anything; the message says why.
        Error: the model cannot be read or written, or an option is out of range.
    """
    # At this point, `locals()` holds the parameters only.
    direct_options = {
        name: value for name, value in locals().items() if name in (*OF_QUANTIZER, *Settings.model_fields)
    }
    options = settings(config, direct_options)
    pipeline_passes = pass_list(options, passes)
    target = Path(target)
    if not dry_run:
        refuse_overlap(Path(source), target)
        refuse_existing(target, overwrite)
    before = load(source, tags)
    after, steps = Pipeline(pipeline_passes, observers).run(before)
    report = report_of(before, after, steps)
    quantizing = any(isinstance(p, Quantize) for p in pipeline_passes)
    first_notes = [FINALIZED] if is_finalized(source) else []
    last_notes = options.notes if quantizing and "freeze_step" in report.schedule else []
    report = replace(report, notes=[*first_notes, *report.notes, *last_notes])
    unchanged = (after.graphs, after.variables) == (before.graphs, before.variables)
    if unchanged or (quantizing and not report.sites_rewritten and not report.quantizers):
        raise NothingToRewriteError(why_nothing(source, before, steps))
    given = replace(report, source=str(source))
    if dry_run:
        return given

    def log(written: Written) -> Mapping[str, str]:
        layers = [asdict(describe(before, bn)) for bn in before.analysis(batch_norms)]
        summary = {**replace(report, other_changes=written.changes).to_dict(), "batch_norms": layers}
        record = record_of(before, steps, written)
        return {
            LOG: json.dumps(summary, indent=1, sort_keys=True) + "\n",
            RECORD: json.dumps(record, separators=(",", ":"), sort_keys=True) + "\n",
        }

    return replace(given, target=str(target), other_changes=save(after, target, overwrite, log))

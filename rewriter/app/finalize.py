"""``bnqat.finalize``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from passes.batch_norm.batch_norms import names_of_sites
from passes.batch_norm.sites import sites
from passes.control_flow.settle_choices import SettleChoices
from passes.deploy.bake_quantizers import BakePlan, BakeQuantizers, quantized_stores, trusted_stores
from passes.deploy.fold_batch_norm import FoldBatchNorm, folded
from passes.deploy.inline_calls import InlineCalls
from passes.deploy.inline_decided_calls import InlineDecidedCalls
from passes.deploy.keep_serving import KeepServing, serves
from passes.deploy.quantized_values import Quantized, tagged
from passes.entries.serving import entries_of_root
from rewriter.app.api import NothingToRewriteError
from rewriter.app.by_layer import LayerReason, grouped
from rewriter.app.finalize_schema import Baked, FinalizeReport
from rewriter.app.finalized import is_finalized
from rewriter.app.guard import check_parameters, refuse_files
from rewriter.app.lag import lag_notes, untrained_notes, unused_inputs_notes
from rewriter.app.parameters import Parameter, parameter, write_parameters
from rewriter.app.report_schema import Skipped
from rewriter.app.reports import versions
from rewriter.app.work import gc_paused
from rewriter.dataflow import call_graph
from rewriter.diff.log import LOG, RECORD
from rewriter.ir import Model, unused
from rewriter.pipeline import Observer, Pass, Pipeline, Step
from rewriter.reach import refuse_reaching
from rewriter.savedmodel.read import load
from rewriter.savedmodel.staging import refuse_existing, refuse_overlap
from rewriter.savedmodel.write import Written, save

GROWTH = 4
"""Largest factor by which inlining may let a graph grow; beyond it, inlining stops."""


@gc_paused()
def finalize(
    source: str | Path,
    target: str | Path,
    *,
    params: str | Path | None = None,
    fold: bool = False,
    inputs: Mapping[str, np.ndarray] | None = None,
    trust: bool = False,
    tags: Collection[str] | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    observers: Iterable[Observer] = (),
) -> FinalizeReport:
    """Write the SavedModel to deploy: quantised values in the variables, and nothing left that trains or quantises.

    Nothing in the model is executed but its quantisers, as they act after the start step and the ramp. The outputs of
    every signature and function that is left are bit for bit those of the fine-tuned model with its quantisers on.
    There are two exceptions: rounding with `fold`, and functions that choose their mode by a constant, which the report
    notes. A note says if moving statistics are, or may be, far from those of the batches that the model meets.

    Args:
        source: a directory with a SavedModel that bnqat rewrote, fine-tuned or not; it is not changed.
        target: where to write; it must not exist, unless `overwrite` is given.
        params: a file to write codes, scales and zero points to, ``.npz`` or ``.json``; not with `fold`, which leaves
            no variable that holds the values that they describe.
        fold: let batch norms become part of the convolution before them, where there is one.
        inputs: a batch, by the names of the training function's inputs; one array may have any name. The model is
            executed on it, to compare its statistics with the moving ones.
        trust: compute quantisers whose ops are not known to be harmless, such as those of a user's own function;
            with `inputs`, also run a model that holds ops for files, the network or Python.
        tags: the tags of the meta graph, if the model holds several; by default those of the one for serving.
        overwrite: replace `target` if it is a SavedModel.
        dry_run: report, write nothing.
        observers: called after each pass.

    Raises:
        NothingToRewriteError: the model has no quantisers.
        Error: the model cannot be read or written, a variable's quantised values cannot be stored, or the training
            function does not take the inputs.
    """
    target = Path(target)
    if params is not None:
        check_parameters(Path(params), fold)
        refuse_files({"parameters": Path(params)}, Path(source), target)
    if not dry_run:
        refuse_overlap(Path(source), target)
        refuse_existing(target, overwrite)
    before = load(source, tags)
    if not tagged(before) and is_finalized(source):
        raise NothingToRewriteError(f"{source} is finalised already; there is nothing to bake in")
    if not before.signatures and not entries_of_root(before):
        raise NothingToRewriteError(
            f"{source} holds no signature and no function that could serve; save the model with "
            "tf.saved_model.save(model, path, signatures=...)"
        )
    if not tagged(before):
        raise NothingToRewriteError(
            f"no quantiser was found in {source}; finalize takes a model that bnqat rewrote, and that may have been "
            "fine-tuned and saved again since"
        )
    if inputs is not None:
        refuse_reaching(source, before, trust=trust)
    statistics_notes = [*lag_notes(source, before, inputs), *unused_inputs_notes(before, inputs)]
    decided, steps = _decided(before, tuple(observers))
    serving_model, more_steps = Pipeline([KeepServing()], tuple(observers)).run(decided)
    steps += more_steps
    plan = serving_model.analysis(trusted_stores if trust else quantized_stores)
    if not plan.values:
        raise NothingToRewriteError(f"what serves in {source} has no quantiser; there is nothing to bake in")
    after, more_steps = Pipeline([BakeQuantizers(trust)], tuple(observers)).run(serving_model)
    table = _parameters(plan, after)
    steps += more_steps
    if fold:
        after, more_steps = _folded(after, tuple(observers))
        steps += more_steps
    report = _report(before, after, steps, table)
    notes = [*untrained_notes(before), *statistics_notes, *report.notes, *_undecided_notes(serving_model)]
    report = replace(report, notes=notes, **_fold_layers(steps))
    if dry_run:
        return report

    def log(written: Written) -> Mapping[str, str]:
        return {LOG: replace(report, other_changes=written.changes).to_json() + "\n"}

    changes = save(after, target, overwrite, log, without=[LOG, RECORD])
    if params is not None:
        write_parameters(Path(params), table, str(target))
    return replace(report, other_changes=changes, params=str(params or ""), target=str(target))


def _undecided(model: Model) -> bool:
    """Return true if nothing serves but what may train: there may be a constant that decides."""
    calls = model.analysis(call_graph)
    reached = frozenset().union(*(calls.reached(e.function) for e in model.analysis(serves)))
    return not reached or any(site.training for site in model.analysis(sites) if site.graph in reached)


def _undecided_notes(model: Model) -> list[str]:
    """Return a sentence if the functions that serve still hold ops that only training needs."""
    if not _undecided(model):
        return []
    return [
        "what serves still holds ops that train batch norms: a constant keeps them from running, but they could not be "
        "removed; of a TensorFlow 1 graph, save a signature made by model.prune, without the mode among its inputs"
    ]


def _decided(model: Model, observers: Sequence[Observer]) -> tuple[Model, list[Step]]:
    """Return a model without the choices of a mode that constants decide, in functions or through calls; the steps."""
    if not model.object_based or not _undecided(model):
        return model, []
    decided, steps = _inlined(model, InlineDecidedCalls(), observers)
    decided, more_steps = Pipeline([SettleChoices()], observers).run(decided)
    return decided, [*steps, *more_steps]


def _folded(model: Model, observers: Sequence[Observer]) -> tuple[Model, list[Step]]:
    """Return a model with batch norms folded into convolutions, after inlining its layers; and the steps."""
    inlined, steps = _inlined(model, InlineCalls(), observers)
    # Functions stay as they are if nothing was folded, or a layer and its convolution are still in two graphs.
    if steps[-1].edits or not folded(inlined):
        inlined, steps = model, []
    result, more_steps = Pipeline([FoldBatchNorm()], observers).run(inlined)
    return result, [*steps, *more_steps]


def _inlined(model: Model, by: Pass, observers: Sequence[Observer]) -> tuple[Model, list[Step]]:
    """Return a model after a pass that inlines calls, run until it has no edits or the model has grown; the steps."""
    size, steps = _size(model), list[Step]()
    while not steps or (steps[-1].edits and _size(model) <= GROWTH * size):
        model, more_steps = Pipeline([by], observers).run(model)
        steps += more_steps
    return model, steps


def _size(model: Model) -> int:
    return sum(len(graph.nodes) for graph in model.graphs.values())


def _parameters(plan: BakePlan, after: Model) -> list[Parameter]:
    """Return a parameter for each variable that holds quantised values, in the order of the variables."""
    value_by_key: dict[str, Quantized] = {}
    for value in plan.values:
        value_by_key.setdefault(plan.key(value), value)
    names = Counter(v.name for v in after.variables.values())
    table: dict[str, Parameter] = {}
    for key, variable in after.variables.items():
        if key in value_by_key:
            layer = f"{value_by_key[key].tag['layer_name']}/{value_by_key[key].tag['role']}"
            name = unused(variable.name if names[variable.name] == 1 else layer, table)
            table[name] = parameter(name, key, value_by_key[key])
    return list(table.values())


def _fold_layers(steps: Iterable[Step]) -> dict[str, Any]:
    """Return the fields of a report on layers that were folded, and on those that were not."""
    folding = [step for step in steps if isinstance(step.by, FoldBatchNorm)]
    folded_names: dict[str, None] = {}
    reasons: list[LayerReason] = []
    for step in folding:
        names = step.before.analysis(names_of_sites)
        folded_names |= dict.fromkeys(names.get(place, place[1]) for place in folded(step.before))
        reasons += [LayerReason(names.get((s.graph, s.node), ""), s.reason) for s in step.skipped]
    by_layer = (reason._replace(partly=reason.layer in folded_names) for reason in reasons)
    return {"folded_layers": list(folded_names), "skipped_layers": grouped([s.before for s in folding], by_layer)}


def _report(before: Model, after: Model, steps: list[Step], table: Iterable[Parameter]) -> FinalizeReport:
    added = {key for key, v in after.variables.items() if v.initial is not None}
    names = {v.name for v in after.variables.values()}
    folding = [s for s in steps if isinstance(s.by, FoldBatchNorm)]
    return FinalizeReport(
        baked=[
            Baked(p.variable, p.layer_name, p.role, p.scheme, p.bits, p.value.size, p.error, p.checkpoint_key in added)
            for p in table
        ],
        folded=[place for s in folding for place in folded(s.before)],
        not_folded=[Skipped(e.graph, e.node, e.reason) for s in folding for e in s.skipped],
        signatures=sorted([*after.signatures, *after.new_signatures]),
        variables_removed=sorted({v.name for v in before.variables.values()} - names),
        functions_before=len(before.graphs) - 1,
        functions=len(after.graphs) - 1,
        notes=list(dict.fromkeys(n for s in steps for n in s.notes)),
        other_changes=[],
        versions=versions(),
    )

"""Claims about a rewritten model, checked by executing it and its source."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import types_pb2

from passes.batch_norm.sites import sites
from passes.quantization.controls import has_quantizers
from rewriter import op_defs
from rewriter.app.arrays import refuse_not_finite, uniform_values
from rewriter.app.blocks import Block, Report, counted, listed, noun_of
from rewriter.app.finalized import is_finalized
from rewriter.app.lag import notes_on_statistics
from rewriter.app.show_runs import verification_blocks, verification_headline
from rewriter.app.verification.kernels import placed
from rewriter.app.verification.output_errors import OutputError, errors_with_quantisers
from rewriter.app.verification.rounding import HALF_ROUNDING, ROUNDING, ErrorBound, RoundingCheck, rounding
from rewriter.app.verification.running import Ran
from rewriter.app.verification.serving import Pair, Serving, differences, serve
from rewriter.app.verification.training import Trained, train
from rewriter.diff.report import SCHEMA_VERSION
from rewriter.ir import Error, Model
from rewriter.reach import refuse_reaching
from rewriter.savedmodel.read import load

Status = Literal["holds", "fails", "does not apply"]
HOLDS: Status = "holds"
FAILS: Status = "fails"
NOT_APPLICABLE: Status = "does not apply"

FIXED = "outputs stay the same whatever the variables hold, as those of a saturated softmax; give other inputs"

HALVES = (types_pb2.DT_HALF, types_pb2.DT_BFLOAT16)


@dataclass(frozen=True)
class Claim:
    """Result of checking one claim.

    Attributes:
        status: ``holds``, ``fails`` or ``does not apply``.
        detail: the observation, in a sentence.
        table: a row for each float output, in the claim ``on`` only.
    """

    name: str
    status: Status
    detail: str
    table: list[OutputError] = field(default_factory=list)


@dataclass(frozen=True, repr=False)
class Verification(Report):
    """Results of all claims, a description of the inputs, and notes for the user."""

    claims: list[Claim]
    inputs: str
    notes: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    @property
    def ok(self) -> bool:
        """True if no claim fails, and one holds that needed a run of the models."""
        ran = any(c.status == HOLDS and c.name != "signatures" for c in self.claims)
        return ran and all(c.status != FAILS for c in self.claims)

    @property
    def headline(self) -> str:
        """The result in a few words."""
        return verification_headline(self)

    def blocks(self) -> Iterable[Block]:
        """Return what the command prints."""
        return verification_blocks(self)

    def to_json(self) -> str:
        """Return the claims and `ok` as JSON text."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=1)


def verify(
    before: str | Path,
    after: str | Path,
    *,
    inputs: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    trust: bool = False,
) -> Verification:
    """Run a model and its rewritten version, and compare them.

    Both are executed. Their directories are not changed, at least not by bnqat.

    Args:
        before: a directory with the source.
        after: a directory with the result, trained and saved again or not.
        inputs: inputs of the signatures, by name; one array may have any name. The default is random inputs.
        seed: the seed of the random inputs.
        trust: run models that hold ops for files, the network or Python.

    Raises:
        Error: a model cannot be read, or holds such ops and is not trusted; the first is the rewritten one; no
            signature takes the inputs; or the source does not run on random inputs.
    """
    if inputs is not None and not isinstance(inputs, Mapping):
        raise Error("inputs are arrays by name, a dict")
    refuse_not_finite(inputs or {})
    pair = Pair(Path(before), Path(after), load(before), load(after))
    if is_finalized(after):
        raise Error(
            f"{after} is a finalised model, whose variables hold quantised values; verify checks what rewrite wrote, "
            "also if it was fine-tuned since"
        )
    if has_quantizers(pair.source) and not has_quantizers(pair.result):
        raise Error(f"{before} is a rewritten model and {after} is none; pass the source first, then the result")
    refuse_reaching(before, pair.source, trust=trust)
    refuse_reaching(after, pair.result, trust=trust)
    serving = serve(pair, inputs, seed)
    trained = train(pair, inputs, seed)
    claims = [
        signatures_stay(serving),
        same_off(pair, serving),
        acts_on(serving),
        same_training(pair, trained),
        statistics_move(serving, trained),
        gradients_reach(trained),
        kernels_of_inference(pair, serving),
        kernels_of_training(trained),
    ]
    examples = _count(max((served.rows for served in serving.ran.values()), default=trained.rows), "example")
    used = f"random, seed {seed}" if inputs is None else f"given: {', '.join(inputs)}"
    notes = [*uniform_values(inputs or {}), *notes_on_statistics(pair.after, pair.result, inputs)]
    return Verification(claims, f"{used}, {examples}", notes=notes)


def signatures_stay(serving: Serving) -> Claim:
    """Check that every signature of the source is there, with its inputs and outputs."""
    if not serving.names:
        return Claim("signatures", NOT_APPLICABLE, "the source has no signature")
    if serving.promised:
        return Claim("signatures", FAILS, "; ".join(serving.promised))
    names = ", ".join(serving.names)
    return Claim("signatures", HOLDS, f"{names}: the same inputs and outputs, with their dtypes and shapes")


def same_off(pair: Pair, serving: Serving) -> Claim:
    """Check that outputs with quantisers off are the source's: bit for bit, or but for rounding after fusing."""
    name = "off"
    if not serving.ran or serving.lost:
        return Claim(name, NOT_APPLICABLE, serving.lost or "no signature was run in both models")
    comparison, notes = RoundingCheck(), []
    for signature, served in serving.ran.items():
        fused_sites = placed(pair.source, signature).raised(placed(pair.result, signature)).total()
        if isinstance(served.off, str):
            comparison.wrong.append(f"signature {signature}: {served.off}")
            continue
        largest_bound = ErrorBound(_floor(pair.source), "") if fused_sites else ErrorBound(0.0, "")
        floor = largest_bound.allowed or 0.0
        for key, share in differences(served.source.outputs, served.off.outputs).items():
            bound = rounding(floor, served.rerun.get(key, 0.0), served.perturbed.get(key, 0.0))
            comparison.add(f"signature {signature}, output {key}", share, bound)
            largest_bound = max(largest_bound, bound, key=lambda b: b.allowed or 0.0)
        if fused_sites:
            why = f", as {_count(fused_sites, 'site')} in single ops became the kernel{largest_bound.why}"
            notes.append(f"{signature} within {largest_bound.allowed:.2g} of the largest element{why}")
    if comparison.wrong:
        return Claim(name, FAILS, "; ".join(comparison.wrong))
    if not comparison.same:
        return Claim(name, NOT_APPLICABLE, "; ".join(comparison.skipped))
    same = "bit for bit" if not comparison.largest else f"but for {comparison.largest:.2g} of the largest element"
    compared = f"{_count(comparison.same, 'output')} the same {same}"
    return Claim(name, HOLDS, "; ".join([compared, *notes, *comparison.skipped, *_conditions(pair, serving)]))


def _floor(source: Model) -> float:
    """Return the largest change by fusing that is allowed in any case."""
    return HALF_ROUNDING if _computes_in_half(source) else ROUNDING


def _conditions(pair: Pair, serving: Serving) -> list[str]:
    """Return notes on the conditions under which signatures were run."""
    conditions = [f"not run: {why}" for why in serving.skipped.values()]
    if serving.trained:
        conditions.append(f"the source was run with {_count(serving.trained, 'value')} that the result was trained to")
    if pair.unfrozen:
        conditions.append(
            "both without constant folding, which folds what the source holds as constants into convolutions"
        )
    return conditions


def acts_on(serving: Serving) -> Claim:
    """Check that float outputs with quantisers on differ from the source's, and are finite where those are."""
    name = "on"
    if serving.lost:
        return Claim(name, NOT_APPLICABLE, serving.lost)
    runs = {signature: served for signature, served in serving.ran.items() if served.on is not None}
    if not runs:
        return Claim(name, NOT_APPLICABLE, "no signature was run with quantisers: there are none, or no signature")
    wrong, table, random = errors_with_quantisers(runs)
    if wrong:
        return Claim(name, FAILS, "; ".join(wrong), table)
    if not table:
        return Claim(name, NOT_APPLICABLE, "; ".join(random) or "no output is a float")
    if all(served.inert for served in runs.values()):
        if all(served.fixed for served in runs.values()):
            return Claim(name, NOT_APPLICABLE, FIXED, table)
        return Claim(name, FAILS, "quantisers change no output", table)
    worst = max(table, key=lambda row: row.relative_rms or 0.0)
    error = f"{worst.relative_rms or 0.0:.2g} (root mean square) in {worst.output} of {worst.signature}"
    if not any(row.largest for row in table):
        error = "none: variables hold what quantisers keep as it is, as before training; other values are changed"
    return Claim(name, HOLDS, "; ".join([f"finite; the largest relative error is {error}", *random]), table)


def same_training(pair: Pair, trained: Trained) -> Claim:
    """Check that a step with quantisers off has the outputs and variable changes of the source's own training."""
    name = "training"
    if trained.failure or trained.absent or trained.source_distances is None:
        no_training = "no function of the source is known to train and to take and return what serving does"
        if not pair.source.object_based:
            no_training = "the source is a TensorFlow 1 graph: which of its ops train, only its program knows"
        return Claim(name, NOT_APPLICABLE, trained.failure or trained.absent or trained.source_failure or no_training)
    distances, comparison = trained.source_distances, RoundingCheck()
    for number, (key, share) in enumerate(distances.found.items()):
        output = number < distances.outputs
        # The change of averages is computed beside the kernel, in another order.
        floor = 0.0 if output and not trained.raised else _floor(pair.source)
        comparison.add(
            key if output else f"the change of {key}",
            share,
            rounding(floor, distances.rerun[key], distances.perturbed[key]),
        )
    if comparison.wrong:
        return Claim(name, FAILS, "; ".join(comparison.wrong))
    if not comparison.same:
        return Claim(name, NOT_APPLICABLE, comparison.skipped[0])
    skipped_notes = [f"{comparison.skipped[0]} (and {len(comparison.skipped) - 1} more)"] if comparison.skipped else []
    compared = _count(comparison.same, "output or change of a variable is", "outputs and changes of variables are")
    precision = f"but for {comparison.largest:.2g} of the largest element" if comparison.largest else "bit for bit"
    return Claim(name, HOLDS, "; ".join([f"{compared} the source's, {precision}", *skipped_notes]))


def statistics_move(serving: Serving, trained: Trained) -> Claim:
    """Check that training moves every moving statistic and counts one step, and that signatures change nothing."""
    name = "statistics"
    wrong = []
    for signature, served in serving.ran.items():
        if served.changed:
            wrong.append(f"running the signature {signature} changes {', '.join(sorted(served.changed))}")
    if wrong:
        return Claim(name, FAILS, "; ".join(wrong))
    if trained.failure:
        return Claim(name, FAILS, trained.failure)
    if trained.absent:
        return Claim(name, NOT_APPLICABLE, trained.absent)
    if trained.batch_norms and not trained.statistics and not trained.frozen:
        return Claim(name, FAILS, "the training function trains no batch norm")
    if trained.still:
        unmoved, all_of = len(trained.still), trained.statistics
        return Claim(name, FAILS, f"{unmoved} of {all_of} do not change, {trained.still[0]} for one")
    if trained.steps != 1:
        return Claim(name, FAILS, f"a call of the training function counts {_count(trained.steps, 'step')}, not one")
    frozen_note = f"; it leaves those of {_count(trained.frozen, 'batch norm')} frozen" if trained.frozen else ""
    serving_note = f"; no run of {', '.join(serving.ran)} changes a variable" if serving.ran else ""
    moves = f"moves all {trained.statistics} and counts" if trained.statistics else "counts"
    return Claim(name, HOLDS, f"a call of the training function {moves} one step{frozen_note}{serving_note}")


def gradients_reach(trained: Trained) -> Claim:
    """Check that a finite gradient reaches every gamma and beta that is trained.

    If other values are quantised, such as weights, one has to reach every variable that it reaches with quantisers off,
    and every quantised one that it reaches in the source.
    """
    name = "gradients"
    if trained.failure or trained.absent:
        return Claim(name, FAILS if trained.failure else NOT_APPLICABLE, trained.failure or trained.absent)
    if trained.differentiated:
        if trained.alike:
            return Claim(name, NOT_APPLICABLE, f"the source cannot be differentiated either: {trained.differentiated}")
        return Claim(name, FAILS, trained.differentiated)
    wrong = _wrong_gradient(trained)
    if wrong:
        return Claim(name, FAILS, wrong)
    others = trained.others
    parts = [_count(len(trained.gradients), "gamma or beta", "gammas and betas")] if trained.gradients else []
    parts += [counted(number, noun_of(role)) for role, number in others.quantized.items()]
    parts += [counted(others.others, "other variable" if parts else "variable")] if others.others else []
    never = f"none reaches {listed(others.never)}, in the source either" if others.never else ""
    if not parts:
        frozen = "the training function leaves all batch norms frozen"
        why = never or "no output is a float, or no variable is trained"
        return Claim(name, NOT_APPLICABLE, frozen if trained.frozen and not trained.statistics else why)
    first = f"{', '.join(parts[:-1])} and " if parts[:-1] else ""
    return Claim(name, HOLDS, f"finite for {first}{parts[-1]}{'; ' if never else ''}{never}")


def _wrong_gradient(trained: Trained) -> str:
    """Return what is wrong with a gradient; empty if nothing is."""
    if trained.others.lost:
        return trained.others.lost[0]
    for variable, gradient in trained.gradients or ():
        if gradient is None:
            return f"none for {variable}"
        values = tf.convert_to_tensor(gradient).numpy()
        if not np.isfinite(values).all():
            return f"not finite for {variable}"
        # A loaded function returns zeros if no path leads from its outputs to the variable.
        if not values.any():
            return f"zero for {variable}, which has no influence then"
    return ""


def kernels_of_inference(pair: Pair, serving: Serving) -> Claim:
    """Check that a signature executes the source's batch-norm kernels, and one for each site that was fused."""
    name = "kernels in inference"
    wrong, checked = [], []
    for signature, served in serving.ran.items():
        if not isinstance(served.off, Ran):
            continue
        before, after = served.source.kernels, served.off.kernels
        single = placed(pair.source, signature)
        fused_sites = single.raised(placed(pair.result, signature))
        as_expected = after.placed == before.placed
        if fused_sites:
            # Totals and not ops, as Grappler may fuse a new kernel into another op.
            as_expected = after.placed.total() == before.placed.total() + single.kernels_for(fused_sites)
        most_kernels = before.ran + fused_sites.total()
        text = f"{signature} executes {after.reach}, the source {before.reach}"
        text += f", and {_count(fused_sites.total(), 'site')} in single ops became the kernel" if fused_sites else ""
        if not as_expected and single.both_modes:
            as_expected = after.ran >= min(most_kernels, single.trained(fused_sites))
            text += f"; {_count(single.both_modes, 'site')} compute both modes there"
        if not as_expected or after.ran > most_kernels:
            wrong.append(text)
        elif after.placed:
            checked.append(text)
    if wrong:
        return Claim(name, FAILS, "; ".join(wrong))
    if not checked:
        return Claim(name, NOT_APPLICABLE, "no signature that was run in both models executes a batch-norm kernel")
    return Claim(name, HOLDS, "; ".join(checked))


def kernels_of_training(trained: Trained) -> Claim:
    """Check that training executes the kernels of the source's training or, if derived, one for each site."""
    name = "kernels in training"
    if trained.failure or trained.source_failure:
        status = FAILS if trained.failure else NOT_APPLICABLE
        return Claim(name, status, trained.failure or f"the source's own training function: {trained.source_failure}")
    kernels, source_kernels = trained.kernels, trained.source_kernels
    if trained.absent or kernels is None:
        return Claim(name, NOT_APPLICABLE, trained.absent or "the training function's graph has no name that is known")
    if source_kernels is None:
        if not trained.sites and not kernels.training:
            why = "every batch norm is frozen" if trained.frozen else "neither serving nor training has a kernel"
            return Claim(name, NOT_APPLICABLE, why)
        as_expected = kernels.training == trained.sites
        text = f"training executes {_count(kernels.training, 'kernel')} in training mode, and serving runs"
        return Claim(name, HOLDS if as_expected else FAILS, f"{text} {_count(trained.sites, 'site')}")
    as_expected, fused_sites = kernels.placed == source_kernels.placed, trained.raised
    if fused_sites:
        gradients = source_kernels.gradients + fused_sites if kernels.gradients or source_kernels.gradients else 0
        as_expected = (kernels.forward, kernels.gradients) == (source_kernels.forward + fused_sites, gradients)
    elif not kernels.placed and not source_kernels.placed:
        return Claim(name, NOT_APPLICABLE, "no batch-norm kernel is executed in training")
    text = f"training executes {kernels}, the source's own training function {source_kernels}"
    if trained.phases:
        # Each phase has its own kernels, in a branch of the conditional at the root.
        forward, gradients = (
            source_kernels.forward + fused_sites,
            source_kernels.gradients + fused_sites if kernels.gradients else 0,
        )
        as_expected = (kernels.forward, kernels.gradients) == (2 * forward, 2 * gradients) and trained.reached in {
            None,
            forward,
        }
        text += "; it has two phases, of which one runs"
        text += "" if trained.reached is None else f": {trained.reached} are reached without gradients"
    text += "" if kernels.gradients else ", without gradients, which one of them does not have"
    if not as_expected and trained.both_modes:
        least, most_extra, phases = trained.sites, fused_sites + trained.both_modes, 2 if trained.phases else 1
        as_expected = phases * least <= kernels.forward <= phases * (source_kernels.forward + most_extra)
        as_expected = as_expected and kernels.gradients <= phases * (source_kernels.gradients + most_extra)
        as_expected = as_expected and (
            trained.reached is None or least <= trained.reached <= source_kernels.forward + most_extra
        )
        text += f", in which {_count(trained.both_modes, 'site')} compute both modes"
    text += f", and {_count(fused_sites, 'kernel')} took the place of single ops" if fused_sites else ""
    return Claim(name, HOLDS if as_expected else FAILS, text)


def _computes_in_half(model: Model) -> bool:
    """Return true if a batch norm of a model may compute in half or bfloat16."""
    nodes = (model.graphs[site.graph].nodes[site.node] for site in model.analysis(sites))
    return any(op_defs.attribute(node, "T").type in HALVES for node in nodes)


def _count(number: int, noun: str, several: str = "") -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {several or noun + 's'}"

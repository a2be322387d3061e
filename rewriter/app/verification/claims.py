"""Whether a rewritten model keeps what was promised of it, seen by executing it and its source."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import types_pb2

from passes.batch_norm.sites import sites
from rewriter import op_defs
from rewriter.app.arrays import odd_values
from rewriter.app.lag import notes_on_statistics
from rewriter.app.verification.kernels import placed
from rewriter.app.verification.output_errors import OutputError, errors_with_quantisers
from rewriter.app.verification.rounding import HALF_ROUNDING, ROUNDING, Bound, Comparison, rounding
from rewriter.app.verification.running import Ran
from rewriter.app.verification.serving import Pair, Serving, differences, serve
from rewriter.app.verification.training import Trained, train
from rewriter.ir import Error, Model
from rewriter.reach import refuse_reaching
from rewriter.report import SCHEMA_VERSION
from rewriter.savedmodel.read import load

Status = Literal["holds", "fails", "does not apply"]
HOLDS: Status = "holds"
FAILS: Status = "fails"
NOT_APPLICABLE: Status = "does not apply"

FIXED = "outputs stay the same whatever the variables hold, as those of a saturated softmax; give other inputs"

HALVES = (types_pb2.DT_HALF, types_pb2.DT_BFLOAT16)


@dataclass(frozen=True)
class Claim:
    """One promise.

    Attributes:
        status: ``holds``, ``fails`` or ``does not apply``.
        detail: what was seen, in a sentence.
        table: of the claim ``on``, a row for each float output.
    """

    name: str
    status: Status
    detail: str
    table: list[OutputError] = field(default_factory=list)


@dataclass(frozen=True)
class Verification:
    """All claims, what the models were run on, and what the user should know besides."""

    claims: list[Claim]
    inputs: str
    notes: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    @property
    def ok(self) -> bool:
        """Whether no claim fails, and one holds that took running the models."""
        ran = any(c.status == HOLDS and c.name != "signatures" for c in self.claims)
        return ran and all(c.status != FAILS for c in self.claims)

    def to_json(self) -> str:
        """The claims as JSON text, and whether all is well."""
        return json.dumps({"ok": self.ok, **asdict(self)}, indent=1)


def verify(
    before: str | Path,
    after: str | Path,
    *,
    inputs: Mapping[str, np.ndarray] | None = None,
    seed: int = 0,
    trust: bool = False,
) -> Verification:
    """Run a model and what it was rewritten to, and compare.

    Both are executed. Their directories are not changed, at least not by bnqat.

    Args:
        before: a directory with the source.
        after: a directory with the result, trained and saved again or not.
        inputs: what the signatures take, by name; one array may have any name. Random ones, if not given.
        seed: of the random inputs.
        trust: run models that hold ops for files, the network or Python.

    Raises:
        Error: a model cannot be read, is not trusted and holds such ops, no signature takes the inputs, or the source
            runs on no random ones.
    """
    if inputs is not None and not isinstance(inputs, Mapping):
        raise Error("inputs are arrays by name, a dict")
    pair = Pair(Path(before), Path(after), load(before), load(after))
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
    notes = [*odd_values(inputs or {}), *notes_on_statistics(pair.after, pair.result, inputs)]
    return Verification(claims, f"{used}, {examples}", notes=notes)


def signatures_stay(serving: Serving) -> Claim:
    """Every signature of the source is there, with its inputs and outputs."""
    if not serving.names:
        return Claim("signatures", NOT_APPLICABLE, "the source has no signature")
    if serving.promised:
        return Claim("signatures", FAILS, "; ".join(serving.promised))
    names = ", ".join(serving.names)
    return Claim("signatures", HOLDS, f"{names}: the same inputs and outputs, with their dtypes and shapes")


def same_off(pair: Pair, serving: Serving) -> Claim:
    """With quantisers off, outputs are the source's: the same bits, or but for rounding where something was fused."""
    name = "off"
    if not serving.ran or serving.lost:
        return Claim(name, NOT_APPLICABLE, serving.lost or "no signature was run in both models")
    seen, notes = Comparison(), []
    for signature, served in serving.ran.items():
        raised = placed(pair.source, signature).raised(placed(pair.result, signature)).total()
        if isinstance(served.off, str):
            seen.wrong.append(f"signature {signature}: {served.off}")
            continue
        widest = Bound(_floor(pair.source), "") if raised else Bound(0.0, "")
        floor = widest.allowed or 0.0
        for key, share in differences(served.source.outputs, served.off.outputs).items():
            bound = rounding(floor, served.rerun.get(key, 0.0), served.perturbed.get(key, 0.0))
            seen.add(f"signature {signature}, output {key}", share, bound)
            widest = max(widest, bound, key=lambda each: each.allowed or 0.0)
        if raised:
            why = f", as {_count(raised, 'site')} in single ops became the kernel{widest.why}"
            notes.append(f"{signature} within {widest.allowed:.2g} of the largest element{why}")
    if seen.wrong:
        return Claim(name, FAILS, "; ".join(seen.wrong))
    if not seen.same:
        return Claim(name, NOT_APPLICABLE, "; ".join(seen.skipped))
    same = "bit for bit" if not seen.largest else f"but for {seen.largest:.2g} of the largest element"
    compared = f"{_count(seen.same, 'output')} the same {same}"
    return Claim(name, HOLDS, "; ".join([compared, *notes, *seen.skipped, *_conditions(pair, serving)]))


def _floor(source: Model) -> float:
    """Largest change by fusing that is allowed in any case."""
    return HALF_ROUNDING if _halves(source) else ROUNDING


def _conditions(pair: Pair, serving: Serving) -> list[str]:
    """What has to be known about how signatures were run."""
    skipped = [f"not run: {why}" for why in serving.skipped.values()]
    if serving.trained:
        skipped.append(f"the source was run with {_count(serving.trained, 'value')} that the result was trained to")
    if pair.unfrozen:
        skipped.append(
            "both without constant folding, which folds what the source holds as constants into convolutions"
        )
    return skipped


def acts_on(serving: Serving) -> Claim:
    """With quantisers on, float outputs differ from the source's, and are finite where those are."""
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
    """With quantisers off, a step gives what the source's own training function gives, and moves averages as far."""
    name = "training"
    if trained.failure or trained.absent or trained.own is None:
        none = "the source has no training function of its own"
        if not pair.source.object_based:
            none = "a TensorFlow 1 graph has no training function to compare with, but ops that its program names"
        return Claim(name, NOT_APPLICABLE, trained.failure or trained.absent or trained.unwanted or none)
    own, seen = trained.own, Comparison()
    for number, (key, share) in enumerate(own.found.items()):
        output = number < own.outputs
        # What averages change by is computed beside the kernel, in another order.
        floor = 0.0 if output and not trained.raised else _floor(pair.source)
        seen.add(key if output else f"the change of {key}", share, rounding(floor, own.rerun[key], own.perturbed[key]))
    if seen.wrong:
        return Claim(name, FAILS, "; ".join(seen.wrong))
    if not seen.same:
        return Claim(name, NOT_APPLICABLE, seen.skipped[0])
    more = [f"{seen.skipped[0]} (and {len(seen.skipped) - 1} more)"] if seen.skipped else []
    same = _count(seen.same, "output or change of a variable is", "outputs and changes of variables are")
    how = f"but for {seen.largest:.2g} of the largest element" if seen.largest else "bit for bit"
    return Claim(name, HOLDS, "; ".join([f"{same} the source's, {how}", *more]))


def statistics_move(serving: Serving, trained: Trained) -> Claim:
    """Training moves every moving statistic and counts one step; nothing else does."""
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
    if not trained.statistics and not trained.frozen:
        return Claim(name, FAILS, "the training function trains no batch norm")
    if trained.still:
        still, all_of = len(trained.still), trained.statistics
        return Claim(name, FAILS, f"{still} of {all_of} do not change, {trained.still[0]} for one")
    if trained.steps != 1:
        return Claim(name, FAILS, f"a call of the training function counts {_count(trained.steps, 'step')}, not one")
    left = f"; it leaves those of {_count(trained.frozen, 'batch norm')} frozen" if trained.frozen else ""
    also = f"; no run of {', '.join(serving.ran)} changes a variable" if serving.ran else ""
    moves = f"moves all {trained.statistics} and counts" if trained.statistics else "counts"
    return Claim(name, HOLDS, f"a call of the training function {moves} one step{left}{also}")


def gradients_reach(trained: Trained) -> Claim:
    """A finite gradient reaches every gamma and beta that is trained."""
    name = "gradients"
    if trained.failure or trained.absent:
        return Claim(name, FAILS if trained.failure else NOT_APPLICABLE, trained.failure or trained.absent)
    if trained.differentiated:
        if trained.alike:
            return Claim(name, NOT_APPLICABLE, f"the source cannot be differentiated either: {trained.differentiated}")
        return Claim(name, FAILS, trained.differentiated)
    if not trained.gradients:
        frozen = "the training function leaves all batch norms frozen"
        why = "no output is a float, or there is no gamma and no beta that is trained"
        return Claim(name, NOT_APPLICABLE, frozen if trained.frozen and not trained.statistics else why)
    for variable, gradient in trained.gradients:
        if gradient is None:
            return Claim(name, FAILS, f"none for {variable}")
        values = tf.convert_to_tensor(gradient).numpy()
        if not np.isfinite(values).all():
            return Claim(name, FAILS, f"not finite for {variable}")
        # A function gives zeros where there is no way from its outputs.
        if not values.any():
            return Claim(name, FAILS, f"zero for {variable}, which has no influence then")
    return Claim(name, HOLDS, f"finite for {_count(len(trained.gradients), 'gamma or beta', 'gammas and betas')}")


def kernels_of_inference(pair: Pair, serving: Serving) -> Claim:
    """A signature executes the source's batch-norm kernels, and one for each site that was raised to it."""
    name = "kernels in inference"
    wrong, seen = [], []
    for signature, served in serving.ran.items():
        if not isinstance(served.off, Ran):
            continue
        before, after = served.source.kernels, served.off.kernels
        single = placed(pair.source, signature)
        raised = single.raised(placed(pair.result, signature))
        same = after.placed == before.placed
        if raised:
            same = after.placed.total() == before.placed.total() + single.kernels_for(raised)
        most = before.ran + raised.total()
        text = f"{signature} executes {after.reach}, the source {before.reach}"
        text += f", and {_count(raised.total(), 'site')} in single ops became the kernel" if raised else ""
        if not same and single.twice:
            same = after.ran >= min(most, single.trained(raised))
            text += f"; {_count(single.twice, 'site')} compute both modes there"
        if not same or after.ran > most:
            wrong.append(text)
        elif after.placed:
            seen.append(text)
    if wrong:
        return Claim(name, FAILS, "; ".join(wrong))
    if not seen:
        return Claim(name, NOT_APPLICABLE, "no signature that was run in both models executes a batch-norm kernel")
    return Claim(name, HOLDS, "; ".join(seen))


def kernels_of_training(trained: Trained) -> Claim:
    """Training executes what the source's training does, or, where it was derived, one kernel for each site."""
    name = "kernels in training"
    if trained.failure or trained.unwanted:
        status = FAILS if trained.failure else NOT_APPLICABLE
        return Claim(name, status, trained.failure or f"the source's own training function: {trained.unwanted}")
    kernels, wanted = trained.kernels, trained.wanted
    if trained.absent or kernels is None:
        return Claim(name, NOT_APPLICABLE, trained.absent or "the training function's graph has no name that is known")
    if wanted is None:
        if not trained.sites and not kernels.training:
            why = "every batch norm is frozen" if trained.frozen else "neither serving nor training has a kernel"
            return Claim(name, NOT_APPLICABLE, why)
        same = kernels.training == trained.sites
        text = f"derived training: {_count(kernels.training, 'kernel')} in training mode, and serving runs"
        return Claim(name, HOLDS if same else FAILS, f"{text} {_count(trained.sites, 'site')}")
    same, raised = kernels.placed == wanted.placed, trained.raised
    if raised:
        back = wanted.gradients + raised if kernels.gradients or wanted.gradients else 0
        same = (kernels.forward, kernels.gradients) == (wanted.forward + raised, back)
    elif not kernels.placed and not wanted.placed:
        return Claim(name, NOT_APPLICABLE, "no batch-norm kernel is executed in training")
    text = f"training executes {kernels}, the source's own training function {wanted}"
    if trained.phases:
        # Each phase has its own, in a branch of the conditional at the root.
        forward, back = wanted.forward + raised, wanted.gradients + raised if kernels.gradients else 0
        same = (kernels.forward, kernels.gradients) == (2 * forward, 2 * back) and trained.reached in {None, forward}
        text += "; it has two phases, of which one runs"
        text += "" if trained.reached is None else f": {trained.reached} are reached without gradients"
    text += "" if kernels.gradients else ", without gradients, which one of them does not have"
    if not same and trained.twice:
        low, more, phases = trained.sites, raised + trained.twice, 2 if trained.phases else 1
        same = phases * low <= kernels.forward <= phases * (wanted.forward + more)
        same = same and kernels.gradients <= phases * (wanted.gradients + more)
        same = same and (trained.reached is None or low <= trained.reached <= wanted.forward + more)
        text += f", in which {_count(trained.twice, 'site')} compute both modes"
    text += f", and {_count(raised, 'kernel')} took the place of single ops" if raised else ""
    return Claim(name, HOLDS if same else FAILS, text)


def _halves(model: Model) -> bool:
    """Whether a batch norm of a model may compute in less than float32."""
    found = (model.graphs[site.graph].nodes[site.node] for site in model.analysis(sites))
    return any(op_defs.attribute(node, "T").type in HALVES for node in found)


def _count(number: int, noun: str, several: str = "") -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {several or noun + 's'}"

"""Moving statistics that lag behind the trained weights: measured on data, or told from the number of steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import tensorflow as tf

from passes.batch_norm.batch_norms import batch_norms
from passes.batch_norm.roles import MEAN, VARIANCE
from passes.batch_norm.sites import STATISTICS
from passes.quantization.controls import control_values
from rewriter.app.arrays import Arrays, fitted, unfit
from rewriter.app.blocks import counted
from rewriter.app.loaded import Arguments
from rewriter.app.reestimate import NEVER, REESTIMATED, estimates, trainer_of
from rewriter.app.verification.running import attempt, loaded
from rewriter.ir import Error, Model
from rewriter.savedmodel.objects import object_paths

FAR = 0.25
"""Error of normalised values, in standard deviations, above which moving statistics are far from a batch's.

Digits at 4 bits: 0.23 costs 0.4 points of accuracy, 0.32 0.7 points, 0.85 29 points (docs/quantisation.md).
"""
ROWS = 64
"""Fewest rows of a batch that is compared. Its statistics are known to about sqrt(1.5 / rows), 0.15, at worst."""
OLD = 0.05
"""Largest share of an average from before training without a note: the share after 3 / (1 - momentum) steps."""


def lag_notes(path: str | Path, model: Model, inputs: Arrays | None = None) -> list[str]:
    """Return a sentence if moving statistics are, or may be, far from those of the batches that the model meets.

    With inputs, the model is loaded, its training function runs them, and their statistics are compared. Without
    inputs, the number of training steps says how much of an average is from before training. If training has used
    statistics as frozen ones, the weights are trained for them, so nothing is said about them; nor about a model that
    holds no batch norm.

    Args:
        path: a directory with a rewritten model, trained and saved again or not.
        model: the model in that directory.
        inputs: a batch, by the names of the training function's inputs.

    Raises:
        Error: the batch's statistics cannot be computed: the training function does not take it, it has too few rows,
            or the averages are of no known form.
    """
    if not model.analysis(batch_norms):
        return []
    controls = control_values(model, "step", "freeze_step")
    if controls.get("step", 0) > controls.get("freeze_step", NEVER):
        return []
    return _step_notes(model, controls) if inputs is None else _batch_notes(statistics_errors(path, inputs))


def untrained_notes(model: Model) -> list[str]:
    """Return a sentence if the model's quantisers have not yet acted when it was trained."""
    controls = control_values(model, "step", "start_step")
    step, start = controls.get("step", 0), controls.get("start_step", 0)
    if step > start or not start:
        return []
    return [
        f"the model was trained for {counted(step, 'step')}, and its quantisers start at step {start}: no step of "
        "training has seen a quantised value"
    ]


def unused_inputs_notes(model: Model, inputs: Arrays | None) -> list[str]:
    """Return a sentence if inputs are given for a model that has no statistics to compare."""
    if inputs is None or model.analysis(batch_norms):
        return []
    return ["the inputs have no use, as the model has no batch norm whose statistics could be compared"]


def notes_on_statistics(path: str | Path, model: Model, inputs: Arrays | None) -> list[str]:
    """Return the notes of `lag_notes`, or none if the statistics of the inputs cannot be compared."""
    try:
        return lag_notes(path, model, inputs)
    except Error:
        return []


def _batch_notes(errors: Mapping[str, float]) -> list[str]:
    """Return a sentence on batch norms whose moving statistics are far from those of a batch."""
    far = {name: error for name, error in errors.items() if error > FAR}
    if not far:
        return []
    worst = max(far, key=far.__getitem__)
    return [
        f"the moving statistics of {len(far)} of {len(errors)} batch norms are far from those of the given inputs: "
        f"normalised values of {worst} differ by {far[worst]:.2g} standard deviations; "
        "bnqat.reestimate_statistics replaces them by averages over data"
    ]


def statistics_errors(path: str | Path, inputs: Arrays) -> dict[str, float]:
    """Return the error of values normalised with the moving statistics, by batch norm.

    They are compared with values normalised with the batch's own statistics. The error is the root mean square over
    the batch, in standard deviations, and the median over the channels. The model is loaded and its training function
    executed, with quantisers on.

    Raises:
        Error: as of `lag_notes`.
    """
    root, why = attempt(lambda: loaded(Path(path)))
    if root is None:
        raise Error(f"TensorFlow does not load {path}: {why}")
    if not hasattr(getattr(root, "quantization", None), "train"):
        raise Error(
            f"{path} holds no training function to run the inputs with: a graph of TensorFlow 1 has none, and Keras' "
            "export leaves it out; leave out the inputs, or save a rewritten model of TensorFlow 2 with "
            "tf.saved_model.save"
        )
    train = trainer_of(root)
    specs = {s.name: s for s in Arguments(root.quantization.train.concrete_functions[0]).specs}
    feeds = fitted(inputs, specs)
    if feeds is None:
        raise Error(f"the training function {unfit(inputs, specs)}")
    rows = max((len(v) for v in feeds.values() if v.ndim), default=0)
    if rows < ROWS:
        raise Error(f"the inputs have {rows} rows; a batch of at least {ROWS} is needed to compare its statistics")
    batches = [{name: tf.constant(value) for name, value in feeds.items()}]
    estimated, why = attempt(lambda: estimates([root], train, batches, 1))
    if estimated is None:
        raise Error(f"the training function does not run on the inputs: {why}")
    layers: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {}
    for average, batch in estimated:
        epsilon = average.epsilon if average.role == VARIANCE else 0.0
        stored = average.variable.numpy().astype(np.float64)
        layers.setdefault(average.batch_norm, {})[average.role] = stored + epsilon, batch + epsilon
    return {
        name: _normalisation_error(*statistics[MEAN], *statistics[VARIANCE])
        for name, statistics in layers.items()
        if len(statistics) == len(STATISTICS)
    }


def _normalisation_error(
    moving_mean: np.ndarray, mean: np.ndarray, moving_variance: np.ndarray, variance: np.ndarray
) -> float:
    """Return the error of values normalised with the moving statistics, against those with the batch's.

    With x = mean + d * s: (x - M) / S - d = d * (s / S - 1) + (mean - M) / S, and d has mean 0 and variance 1.
    """
    with np.errstate(all="ignore"):
        scale = np.sqrt(variance / moving_variance) - 1
        shift = (mean - moving_mean) / np.sqrt(moving_variance)
        errors = np.sqrt(scale**2 + shift**2)
    return float(np.median(np.nan_to_num(errors, nan=np.inf)))


def _step_notes(model: Model, controls: Mapping[str, int]) -> list[str]:
    """Return a sentence on averages of which a large share is from before training."""
    steps = controls.get("step", 0)
    weights = {bn.name: bn.weight for bn in model.analysis(batch_norms) if bn.weight is not None and 0 < bn.weight < 1}
    if steps < 1 or not weights or _reestimated(model):
        return []
    slowest = min(weights, key=weights.__getitem__)
    momentum = 1 - weights[slowest]
    share = momentum**steps
    if share <= OLD:
        return []
    return [
        f"{share:.0%} of the moving statistics of {slowest} are from before training, which made {steps} steps at "
        f"momentum {momentum:.6g}, so they may lag behind the weights: bnqat.reestimate_statistics replaces them by "
        "averages over data, and --inputs compares them with those of a batch"
    ]


def _reestimated(model: Model) -> bool:
    """Return true if the model carries the mark of `bnqat.reestimate_statistics`."""
    meta = model.source.proto.meta_graphs[model.source.index]
    return f"quantization.{REESTIMATED}" in object_paths(meta.object_graph_def).values()

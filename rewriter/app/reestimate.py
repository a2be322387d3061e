"""``bnqat.reestimate_statistics``, and the estimates that other parts compare or assign."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from passes.batch_norm.batch_norms import batch_norms
from passes.batch_norm.sites import STATISTICS, sites
from rewriter.app.loaded import Arguments, assign_replicas, replicas, variables_by_key
from rewriter.dataflow import call_graph
from rewriter.ir import Error
from rewriter.savedmodel.read import load

NEVER = 2**63 - 1
REESTIMATED = "reestimated"
"""Name of the empty child of `quantization` that marks a model whose statistics were re-estimated."""


class MovingAverage(NamedTuple):
    """A moving statistic that a training function updates.

    Attributes:
        variable: the loaded model's variable; under a strategy, the one of all replicas.
        batch_norm: the layer's name.
        role: ``moving_mean`` or ``moving_variance``.
        epsilon: the layer's epsilon.
        weight: the weight of a batch's statistic in an update.
    """

    variable: Any
    batch_norm: str
    role: str
    epsilon: float
    weight: float


def reestimate_statistics(model: Any, dataset: Iterable[Any], steps: int) -> None:
    """Replace the moving statistics by the averages of the statistics of many batches, with quantisers on.

    Moving averages lag behind weights that train, and forget all but the last batches. Here every batch has the same
    weight, and nothing else changes: no weight, range or step. The variance is the average of the batches' variances,
    as in the moving average. Under a distribution strategy, the first replica runs the batches, and all
    replicas get the averages.

    Args:
        model: a rewritten model as ``tf.saved_model.load`` gives it, fine-tuned or not.
        dataset: batches, as the training function takes them: a tensor, or a tuple or dict of several inputs.
        steps: the number of batches to use, at least 1.

    Raises:
        Error: bnqat did not rewrite the model in TensorFlow 2's format, the dataset has fewer batches, or the weight
            of a batch in an average is not constant.
    """
    assign([model], estimates([model], trainer_of(model), dataset, steps))


def trainer_of(model: Any) -> Callable[[Any], object]:
    """Return a function of a batch that calls a loaded model's training function.

    The returned function raises an Error for a batch that the training function does not take.

    Raises:
        Error: bnqat did not rewrite the model, or not in TensorFlow 2's format.
    """
    quantization: Any = getattr(model, "quantization", None)
    if not hasattr(quantization, "train"):
        names = {v.name for v in getattr(model, "variables", ())}
        if quantization is None and "quantization/step:0" in names:
            raise Error(
                "the model is a graph of TensorFlow 1, which has no function train; reestimate_statistics needs one in "
                "TensorFlow 2's format"
            )
        raise Error("reestimate_statistics needs a model that bnqat rewrote and tf.saved_model.load loaded")
    arguments = Arguments(quantization.train.concrete_functions[0])

    def train(batch: Any) -> None:
        positional, keywords = arguments(batch)
        try:
            quantization.train(*positional, **keywords)
        except (TypeError, ValueError) as e:
            names = ", ".join(arguments.names)
            raise Error(f"a batch is not what the training function takes ({names}): {e}") from e

    return train


def assign(models: Sequence[Any], estimated: Iterable[tuple[MovingAverage, np.ndarray]]) -> None:
    """Give moving statistics their estimates, and mark the loaded models as re-estimated."""
    for average, value in estimated:
        assign_replicas(average.variable, value.astype(average.variable.dtype.as_numpy_dtype))
    for model in models:
        setattr(model.quantization, REESTIMATED, tf.Module(REESTIMATED))


def estimates(
    models: Sequence[Any],
    train: Callable[[Any], object],
    batches: Iterable[Any],
    steps: int,
    also_restored: Sequence[Any] = (),
) -> list[tuple[MovingAverage, np.ndarray]]:
    """Return the averages of the batches' statistics, in float64, and leave all variables as they were.

    Args:
        models: rewritten models as TensorFlow loads them.
        train: a function of a batch that makes one training step of each model, on the first replica.
        batches: batches for `train`.
        steps: the number of batches to use, at least 1.
        also_restored: other variables that `train` changes.

    Raises:
        Error: as of `reestimate_statistics`.
    """
    if steps < 1:
        raise Error(f"{steps} steps: at least one batch is needed")
    quantizations = [model.quantization for model in models]
    averages_of_models = [_averages(model) for model in models]
    averages = [average for model_averages, _ in averages_of_models for average in model_averages]
    sums = [np.zeros(a.variable.shape, np.float64) for a in averages]
    variables = [v for quantization in quantizations for v in quantization.variables]
    ranges = [v for v in variables if v.name.startswith("quantization/range/")]
    remaining = iter(batches)

    def step_from(start: float, batch: Any) -> list[np.ndarray]:
        """Return the averages after one step from averages that are all `start`; every step meets the same ranges."""
        first_replicas = [replicas(a.variable)[0] for a in averages]
        for variable in first_replicas:
            variable.assign(tf.fill(variable.shape, tf.cast(start, variable.dtype)))
        with _restored(ranges):
            train(batch)
        return [variable.numpy().astype(np.float64) for variable in first_replicas]

    with _restored([*variables, *also_restored]):
        for quantization, (_, stores_quantized) in zip(quantizations, averages_of_models, strict=True):
            _activate(quantization, stores_quantized)
        for done in range(steps):
            batch = next(remaining, None)
            if batch is None:
                raise Error(f"the dataset holds {done} batches, not {steps}")
            # From an average of zero, one step leaves the batch's statistic times its weight.
            weighted = step_from(0.0, batch)
            if done == 0:
                for quantization in quantizations:
                    replicas(quantization.step)[0].assign_sub(1)
                _check_weights(averages, weighted, step_from(1.0, batch))
            for total, average, value in zip(sums, averages, weighted, strict=True):
                np.add(total, value / average.weight, out=total)
    return [(average, total / steps) for average, total in zip(averages, sums, strict=True)]


def _check_weights(averages: list[MovingAverage], from_zero: list[np.ndarray], from_one: list[np.ndarray]) -> None:
    """Refuse averages in which a step's batch has another weight than a single update gives it.

    One update with weight w turns an average a into a * (1 - w) + w * batch. So the results from averages of one and
    of zero differ by 1 - w.

    Raises:
        Error: an average is updated several times in a step, or corrected for its start.
    """
    for average, zero, one in zip(averages, from_zero, from_one, strict=True):
        weight = 1 - float(np.mean(one - zero))
        if abs(weight - average.weight) > average.weight / 4:  # dropout changes the batch's statistics between the two
            raise Error(
                f"{average.variable.name} is updated several times in a step, or is corrected for its start "
                "(zero-debiased): its batches' statistics cannot be told apart"
            )


def _averages(model: Any) -> tuple[list[MovingAverage], bool]:
    """Return the moving statistics that training updates, and true if quantisers act on the stored averages."""
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(model, folder)
        saved = load(Path(folder))
        calls = saved.analysis(call_graph)
        variables: dict[str, Any] = {}
        reached: set[str] = set()
        for concrete in model.quantization.train.concrete_functions:
            entry = saved.entries[concrete.name.decode()]
            reached |= calls.reached(entry.function)
            variables |= variables_by_key(concrete, entry)
        averages: dict[str, MovingAverage] = {}
        for bn in saved.analysis(batch_norms):
            statistics = {role: bn.variables[role] for role in STATISTICS if role in bn.variables}
            if any(s.training and s.graph in reached for s in bn.sites) and all(
                k in variables for k in statistics.values()
            ):
                if bn.weight is None:
                    raise Error(f"the weight of a batch in the averages of {bn.name} is not constant")
                epsilon = bn.sites[0].epsilon
                averages |= {
                    k: MovingAverage(variables[k], bn.name, role, epsilon, bn.weight) for role, k in statistics.items()
                }
        stores_quantized = any(
            tag.get("use") == "average" for site in saved.analysis(sites) for tag in site.binding.quantized
        )
    if not saved.analysis(batch_norms):
        raise Error("the model holds no batch norm, so there are no moving statistics to re-estimate")
    if not averages:
        raise Error("no moving statistics that the training function updates were found")
    return list(averages.values()), stores_quantized


def _activate(quantization: Any, stores_quantized: bool) -> None:
    """Switch quantisers and the update of statistics on.

    Quantisers of stored averages are switched off: they would round an average of one batch alone to nothing.
    """
    for name, value in {"start_step": 0, "ramp_steps": 0, "freeze_step": NEVER}.items():
        if hasattr(quantization, name):
            assign_replicas(getattr(quantization, name), value)
    for role in STATISTICS if stores_quantized else ():
        for widths in (getattr(quantization.bits, role), getattr(quantization.layer_bits, role)):
            assign_replicas(widths, np.zeros(widths.shape, np.int32))


@contextmanager
def _restored(variables: Iterable[Any]) -> Iterator[None]:
    """Restore variables on leaving, on every replica, also on failure."""
    before = [(replica, replica.numpy()) for variable in variables for replica in replicas(variable)]
    try:
        yield
    finally:
        for replica, value in before:
            replica.assign(value)

"""``bnqat.reestimate_statistics``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from passes.batch_norm import batch_norms
from passes.sites import STATISTICS, sites
from rewriter.dataflow import call_graph
from rewriter.ir import Error
from rewriter.savedmodel.read import load

NEVER = 2**63 - 1


def reestimate_statistics(model: Any, dataset: Iterable[Any], steps: int) -> None:
    """Replace the moving statistics by the averages of the statistics of many batches, quantisers on.

    Moving averages lag behind weights that train, and forget all but the last batches. Here every batch counts
    alike, and nothing else changes: no weight, range or step. The variance is the average of the batches' own, as
    the moving average approximates it.

    Args:
        model: a rewritten model as ``tf.saved_model.load`` gives it, fine-tuned or not.
        dataset: batches, as the training function takes them: a tensor, or a tuple or dict of several inputs.
        steps: how many batches to use, at least 1.

    Raises:
        Error: the model is none of bnqat's in TensorFlow 2's format, the dataset has fewer batches, or the weight of
            a batch in an average is not constant.
    """
    import tensorflow as tf

    quantization: Any = getattr(model, "quantization", None)
    if not hasattr(quantization, "train"):
        raise Error("reestimate_statistics needs a model that bnqat rewrote and tf.saved_model.load loaded")
    if steps < 1:
        raise Error(f"{steps} steps: at least one batch is needed")
    averages, stored = _averages(model)
    sums = [np.zeros(v.shape, np.float64) for v, _ in averages]
    batches = iter(dataset)
    ranges = [(v, v.numpy()) for v in quantization.variables if v.name.startswith("quantization/range/")]

    def train(batch: Any, start: float) -> list[np.ndarray]:
        """The averages after one step from averages that are all alike."""
        for variable, _ in averages:
            variable.assign(tf.fill(variable.shape, tf.cast(start, variable.dtype)))
        try:
            quantization.train(**batch) if isinstance(batch, Mapping) else quantization.train(*_tuple(batch))
        except (TypeError, ValueError) as e:
            names = [spec.name for spec in quantization.train.concrete_functions[0].inputs if spec.dtype != tf.resource]
            raise Error(f"a batch is not what the training function takes ({', '.join(names)}): {e}") from e
        for variable, value in ranges:
            variable.assign(value)  # so that every batch meets the same ones
        return [variable.numpy().astype(np.float64) for variable, _ in averages]

    with _acting(quantization, [v for v, _ in averages], stored):
        for done in range(steps):
            batch = next(batches, None)
            if batch is None:
                raise Error(f"the dataset holds {done} batches, not {steps}")
            # From an average of zero, one step leaves the batch's statistic times its weight.
            found = train(batch, 0.0)
            if done == 0:
                quantization.step.assign_sub(1)
                _check_weights(averages, found, train(batch, 1.0))
            for total, (_, weight), value in zip(sums, averages, found, strict=True):
                np.add(total, value / weight, out=total)
    for total, (variable, _) in zip(sums, averages, strict=True):
        variable.assign((total / steps).astype(variable.dtype.as_numpy_dtype))


def _check_weights(averages: list[tuple[Any, float]], from_zero: list[np.ndarray], from_one: list[np.ndarray]) -> None:
    """Refuse averages in which a step's batch has another weight than a single update gives it.

    Raises:
        Error: one is updated several times in a step, or corrected for its start.
    """
    for (variable, weight), zero, one in zip(averages, from_zero, from_one, strict=True):
        found = 1 - float(np.mean(one - zero))
        if abs(found - weight) > weight / 4:  # dropout changes the batch's statistics between the two
            raise Error(
                f"{variable.name} is updated several times in a step, or is corrected for its start (zero-debiased): "
                "its batches' statistics cannot be told apart"
            )


def _tuple(batch: Any) -> tuple[Any, ...]:
    return tuple(batch) if isinstance(batch, list | tuple) else (batch,)


def _averages(model: Any) -> tuple[list[tuple[Any, float]], bool]:
    """The moving statistics that training updates with the weight of a batch in each; whether they are quantised."""
    import tensorflow as tf

    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(model, folder)
        read = load(Path(folder))
        calls = read.analysis(call_graph)
        held: dict[str, Any] = {}
        reached: set[str] = set()
        for concrete in model.quantization.train.concrete_functions:
            entry = read.entries[concrete.name.decode()]
            reached |= calls.reached(entry.function)
            variables = {id(v.handle): v for v in concrete.graph.variables}
            for key, resource in zip(entry.captures, concrete.captured_inputs, strict=True):
                if isinstance(key, str) and id(resource) in variables:
                    held[key] = variables[id(resource)]
        found: dict[str, float] = {}
        for bn in read.analysis(batch_norms):
            keys = [bn.variables[role] for role in STATISTICS if role in bn.variables]
            if any(s.training and s.graph in reached for s in bn.sites) and all(key in held for key in keys):
                if bn.factor is None:
                    raise Error(f"the weight of a batch in the averages of {bn.name} is not constant")
                found |= dict.fromkeys(keys, bn.factor)
        stored = any(tag.get("use") == "average" for site in read.analysis(sites) for tag in site.quantized)
    if not found:
        raise Error(
            "no moving statistics that the training function updates were found; load the model outside of a "
            "distribution strategy"
        )
    return [(held[key], weight) for key, weight in found.items()], stored


@contextmanager
def _acting(quantization: Any, averages: list[Any], stored: bool) -> Iterator[None]:
    """Let quantisers act and statistics be updated; afterwards all but the averages is as before, on failure all.

    A stored average of one batch alone would be rounded to nothing, so those are not quantised meanwhile.
    """
    before = [(v, v.numpy()) for v in quantization.variables]
    controls = {"start_step": 0, "ramp_steps": 0, "freeze_step": NEVER}
    try:
        for name, value in controls.items():
            if hasattr(quantization, name):
                getattr(quantization, name).assign(value)
        for role in STATISTICS if stored else ():
            for widths in (getattr(quantization.bits, role), getattr(quantization.layer_bits, role)):
                widths.assign(np.zeros(widths.shape, np.int32))
        yield
    except BaseException:
        for variable, value in before:
            variable.assign(value)
        raise
    for variable, value in before:
        if not any(variable is average for average in averages):
            variable.assign(value)

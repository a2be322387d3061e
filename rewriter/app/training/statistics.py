"""``bnqat.ReestimateStatistics``."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from rewriter.app.reestimate import assign, estimates
from rewriter.app.training.layer import KerasLayer
from rewriter.ir import Error


class ReestimateStatistics(keras.callbacks.Callback):
    """Replaces moving statistics by averages over data, before they are frozen or when training ends.

    It does what `bnqat.reestimate_statistics` does, for every trainable `KerasLayer` of the model that is trained. It
    does so just before the first step with frozen statistics if `fit` reaches the layer's freeze step, otherwise when
    `fit` ends. Statistics that were in use as frozen ones before `fit` began stay as they are, as the weights are
    trained for them. Batches pass through the whole Keras model in training mode, so that each layer sees the inputs
    that it sees in training. No weight and no other variable changes.

    Put it last among the callbacks: those before it may restore other weights when training ends. One batch is tried
    before training, so that a mistake ends the run at once and not after hours.

    Args:
        dataset: a `tf.data.Dataset`, or another iterable of batches: x, (x, y) or (x, y, weights). It is iterated over
            anew each time.
        steps: the number of batches to use, at least 1.

    Raises:
        Error: the dataset is an array or no iterable, has fewer batches, or cannot be iterated over twice. In `fit`:
            no layer can be re-estimated.
    """

    def __init__(self, dataset: Iterable[Any], steps: int) -> None:
        super().__init__()
        if steps < 1:
            raise Error(f"{steps} steps: at least one batch is needed")
        if isinstance(dataset, np.ndarray | tuple) or not isinstance(dataset, Iterable):
            kind = type(dataset).__name__
            raise Error(f"the dataset is a {kind}; give batches: tf.data.Dataset.from_tensor_slices(x).batch(32)")
        if isinstance(dataset, Sized) and (size := _size(dataset)) is not None and size < steps:
            raise Error(f"the dataset holds {size} batches, not {steps}")
        if iter(dataset) is dataset:
            raise Error("the dataset is an iterator, which is used up once; give the dataset that it iterates over")
        self.dataset = dataset
        self.steps = steps
        self._pending: list[KerasLayer] | None = None

    def on_train_begin(self, logs: Any = None) -> None:  # noqa: ARG002  Keras passes it
        """Try one batch."""
        self._pending = None
        self._estimates(self._layers(), 1)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002  Keras passes it
        """Re-estimate the statistics that this step is the first to use as frozen ones."""
        due = [layer for layer in self._pending_layers() if _frozen_steps(layer) >= 0]
        if due:
            self._reestimate(due)

    def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002  Keras passes it
        """Re-estimate the statistics that did not become frozen."""
        if self._pending_layers():
            self._reestimate(self._pending_layers())

    def _pending_layers(self) -> list[KerasLayer]:
        """Return the layers whose statistics are still to be re-estimated.

        They are found with the first batch, as another callback may restore the steps when training begins.
        """
        if self._pending is None:
            # After 0 frozen steps, the next one is the first that uses frozen statistics; after more, they are in use.
            self._pending = [layer for layer in self._layers() if _frozen_steps(layer) <= 0]
        return self._pending

    def _layers(self) -> list[KerasLayer]:
        flat_layers = self.model._flatten_layers()  # `Model.layers` leaves out those in nested models and wrappers
        bnqat_layers = [layer for layer in flat_layers if isinstance(layer, KerasLayer) and layer.trainable]
        if not bnqat_layers:
            raise Error("the model has no trainable bnqat.KerasLayer whose statistics could be re-estimated")
        return bnqat_layers

    def _reestimate(self, layers: list[KerasLayer]) -> None:
        assign([layer.model for layer in layers], self._estimates(layers, self.steps))
        self._pending = [layer for layer in self._pending_layers() if layer not in layers]

    def _estimates(self, layers: list[KerasLayer], steps: int) -> Any:
        model = self.model
        train = tf.function(lambda x: model(x, training=True), reduce_retracing=True)
        batches = (keras.utils.unpack_x_y_sample_weight(batch)[0] for batch in self.dataset)
        return estimates([layer.model for layer in layers], train, batches, steps, [v.value for v in model.variables])


def _frozen_steps(layer: KerasLayer) -> int:
    """Return the number of steps that a layer has made with frozen statistics; -1 while they move."""
    freeze_step = getattr(layer.quantization, "freeze_step", None)
    step = int(layer.quantization.step.numpy())
    return -1 if freeze_step is None else max(step - int(freeze_step.numpy()), -1)


def _size(dataset: Sized) -> int | None:
    """Return the number of batches; None for a `tf.data.Dataset` whose number is unknown or infinite."""
    try:
        return len(dataset)
    except TypeError:
        return None

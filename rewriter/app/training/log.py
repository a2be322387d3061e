"""``bnqat.QuantizationLog``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from tensorflow.core.framework import summary_pb2

from rewriter.app.training.layer import KerasLayer
from rewriter.app.training.readings import Readings


class QuantizationLog(keras.callbacks.Callback):
    """Writes the state of a layer's quantisers to a TensorBoard log, at the end of every epoch.

    The scalars are `step` (training calls so far) and `amount` (blend weight: 0 is float, 1 is quantised), and for
    each layer and role, such as `gamma` of a batch norm, or `weight`:

    - `<name>/<role>/bits`: the width in force, 0: off;
    - `/low` and `/high`: the limits between which levels lie, of all channels; for the scheme `log`, those of
      log(v + epsilon);
    - `/error`: the norm of the variable's quantisation error, relative to the norm of the variable, even if quantisers
      do not act yet. For the moving variance: the root of the mean squared relative error of 1 / sqrt(v + epsilon).

    A quantiser that is the user's own function is left out.

    If there are several workers, the chief writes. All of them need the callback, as they read variables together.

    Args:
        layer: the layer, whose SavedModel must still be where it was loaded from.
        log_dir: the log's directory, that of `keras.callbacks.TensorBoard` or another one; the scalars are in
            `quantization` below it.

    Raises:
        Error: the layer's model has no quantisers.
    """

    def __init__(self, layer: KerasLayer, log_dir: str | Path) -> None:
        super().__init__()
        self.layer = layer
        self.folder = Path(log_dir) / "quantization"
        self._readings = Readings(layer.model, layer.filepath)
        self._writer: Any = None

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002  Keras passes it
        """Read the quantisers and write their scalars."""
        scalars = {"step": float(self.layer.quantization.step.numpy()), "amount": self._readings.amount()}
        for (name, role), reading in self._readings().items():
            scalars |= {f"{name}/{role}/{what}": float(value) for what, value in reading._asdict().items()}
        # Only now, as all workers take part in the readings.
        if not self.model.distribute_strategy.extended.should_save_summary:
            return
        if self._writer is None:
            self._writer = tf.summary.create_file_writer(str(self.folder))
        # tf.summary.scalar would need the package tensorboard, which TensorFlow 2.21 does not require.
        metadata = summary_pb2.SummaryMetadata(data_class=summary_pb2.DATA_CLASS_SCALAR)
        metadata.plugin_data.plugin_name = "scalars"
        with self._writer.as_default():
            for tag, value in scalars.items():
                tf.summary.write(tag, tf.constant(value, tf.float32), step=epoch, metadata=metadata)
        self._writer.flush()

    def on_train_end(self, logs: Any = None) -> None:  # noqa: ARG002  Keras passes it
        """Close the log; another `fit` begins another file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

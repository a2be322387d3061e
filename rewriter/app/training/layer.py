"""``bnqat.KerasLayer``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf
from keras.src.saving.serialization_lib import in_safe_mode

from rewriter.app.loaded import Arguments
from rewriter.ir import Error


@keras.saving.register_keras_serializable(package="bnqat")
class KerasLayer(keras.layers.Layer):
    """A rewritten SavedModel as a layer of Keras 3: it runs `train` while Keras trains, and `serve` otherwise.

    Inputs are one tensor, a list or tuple in the order of the model's inputs, or a dict by their names. Shapes and
    dtypes are those of the SavedModel; the outputs are what it returns. A layer whose `trainable` is False runs
    `serve` in training too, as Keras' own batch norm does, and counts no step.

    Its weights are the SavedModel's variables, not copies. Moving statistics and the variables of `quantization` are
    not trainable, but scales of learned ranges are. It computes in the model's dtypes, whatever Keras' global policy
    is. Keras does not compile it with XLA, which has no fused batch norm; set `supports_jit = True` before
    `Model.compile` to compile it all the same.

    Attributes:
        model: the loaded SavedModel, to be saved with `tf.saved_model.save`.
        quantization: its control variables: `step`, `start_step`, `bits.gamma` and the others.

    Args:
        filepath: a directory with a SavedModel that bnqat rewrote, in TensorFlow 2's format.
        trainable: true to train the layer.
        name: the layer's name.

    Raises:
        Error: bnqat did not rewrite the SavedModel in TensorFlow 2's format, or Keras' backend is not TensorFlow.
        ValueError: a Keras file with such a layer is loaded in safe mode, as it names a SavedModel to execute.
    """

    def __init__(
        self, filepath: str | Path, trainable: bool = True, name: str | None = None, dtype: Any = None
    ) -> None:
        if keras.config.backend() != "tensorflow":
            raise Error(f"KerasLayer needs Keras' backend tensorflow, not {keras.config.backend()}: set KERAS_BACKEND")
        model = tf.saved_model.load(str(filepath))
        quantization: Any = getattr(model, "quantization", None)
        if not hasattr(quantization, "train") or not hasattr(model, "serve"):
            raise Error(f"{filepath} was not rewritten by bnqat in TensorFlow 2's format; use bnqat rewrite first")
        arguments = Arguments(quantization.train.concrete_functions[0])
        super().__init__(trainable=trainable, name=name, dtype=dtype or arguments.dtype)
        self.filepath = str(filepath)
        self.model = model
        self.supports_jit = False
        self._arguments = arguments
        # Keras takes over a tf.Variable as it is, and refuses names with a slash.
        self._held = [
            keras.Variable(v, trainable=v.trainable, dtype=v.dtype, name=v.name.partition(":")[0].replace("/", "_"))
            for v in _variables(model)
        ]
        self.built = True

    @property
    def quantization(self) -> Any:
        """Control variables, and the function `train`."""
        return self.model.quantization

    def call(self, inputs: Any, training: bool | None = False) -> Any:
        """Return the model's outputs for `inputs`, from `train` or from `serve`."""
        function = self.quantization.train if training and self.trainable else self.model.serve
        arguments, keywords = self._arguments(inputs)
        return function(*arguments, **keywords)

    def get_config(self) -> dict[str, Any]:
        """Return the content of a Keras file for the layer: the SavedModel's path, and no dtype policy."""
        config = super().get_config()
        return {"filepath": self.filepath, "name": config["name"], "trainable": config["trainable"]}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> KerasLayer:
        """Return the layer of a Keras file.

        Raises:
            ValueError: the file is loaded in safe mode.
        """
        # None, where no file is being loaded, is no permission either.
        if in_safe_mode() is not False:
            raise ValueError(
                f"this file of Keras executes the SavedModel {config['filepath']}; if you trust that, load it with "
                "safe_mode=False"
            )
        return cls(**config)


def _variables(model: Any) -> Iterator[Any]:
    """Return the variables of training, then those that only serving holds."""
    serving = [
        v for function in getattr(model.serve, "concrete_functions", [model.serve]) for v in function.graph.variables
    ]
    yielded: set[int] = set()
    for variable in (*model.quantization.variables, *serving):
        if id(variable) not in yielded:
            yielded.add(id(variable))
            yield variable

"""Functions of loaded models: called by keywords, and differentiated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.python.checkpoint.graph_view import ObjectGraphView

from rewriter.ir import Error, unused


class Trainer(NamedTuple):
    """A loaded function called by keywords, the specs of its inputs, and the variables that it may use."""

    call: Callable[..., Any]
    specs: dict[str, Any]
    variables: list[Any]


def trainer(model: Any) -> Trainer | None:
    """Return a loaded result's training function: `quantization.train`, or the signature `train` in TF 1's format."""
    quantization: Any = getattr(model, "quantization", None)
    if hasattr(quantization, "train"):
        (concrete,) = quantization.train.concrete_functions
        return keyworded(concrete)._replace(variables=list(quantization.variables))
    if "train" not in model.signatures:
        return None
    return keyworded(model.signatures["train"])._replace(variables=list(model.variables))


def keyworded(concrete: Any) -> Trainer:
    """Return a concrete function called by keywords; arguments that are no tensors keep their traced values."""
    structure = concrete.structured_input_signature
    leaves = tf.nest.flatten(structure)
    specs: dict[str, Any] = {}
    # A function that TensorFlow wrapped, such as a frozen graph, states no shapes; its graph has them.
    shapes = {tensor.name.partition(":")[0]: tensor.shape for tensor in concrete.inputs}
    leaves = [_shaped(leaf, shapes) if isinstance(leaf, tf.TensorSpec) else leaf for leaf in leaves]
    names_of_leaves = [_add_spec(leaf, specs) if isinstance(leaf, tf.TensorSpec) else None for leaf in leaves]

    def call(**fed: Any) -> Any:
        values = [
            leaf if name is None else tf.constant(fed[name]) for leaf, name in zip(leaves, names_of_leaves, strict=True)
        ]
        positional, keywords = tf.nest.pack_sequence_as(structure, values)
        return concrete(*positional, **keywords)

    return Trainer(call, specs, list(concrete.graph.trainable_variables))


def _shaped(spec: Any, shapes: Mapping[str, Any]) -> Any:
    """Return a spec with its graph's shape, if it states none."""
    known = spec.shape.rank is not None or spec.name not in shapes
    return spec if known else tf.TensorSpec(shapes[spec.name], spec.dtype, spec.name)


def _add_spec(spec: Any, specs: dict[str, Any]) -> str:
    """Add a spec under a name that is unused, and return the name."""
    name = unused(spec.name, specs)
    specs[name] = spec
    return name


def loss(outputs: Any) -> Any:
    """Return a weighted sum of the float outputs, as a plain sum of a softmax is constant; None without floats."""
    floats = [t for t in tf.nest.flatten(outputs) if t.dtype.is_floating]
    return tf.add_n([tf.reduce_sum(tf.cast(t, tf.float32) * _weights(t)) for t in floats]) if floats else None


def _weights(value: tf.Tensor) -> tf.Tensor:
    return tf.reshape(tf.sin(tf.cast(tf.range(tf.size(value)), tf.float32)), tf.shape(value))


def gradients(function: Trainer, parameters: list[Any], fed: dict[str, np.ndarray]) -> list[Any] | None:
    """Return the gradients of a function's float outputs; None if it has no float output."""
    with tf.GradientTape() as tape:
        value = loss(function.call(**fed))
    computed: list[Any] | None = None if value is None else tape.gradient(value, parameters)
    return computed


def variable_at(root: Any, key: str) -> Any:
    """Return a loaded model's variable by its checkpoint key, which is its path; names need not be unique.

    Raises:
        Error: the loaded model has no such variable.
    """
    node = root
    for key_part in key.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE").split("/"):
        # Keys escape a slash as ".S" and a dot as "..".
        children, name = ObjectGraphView(root).children(node), key_part.replace(".S", "/").replace("..", ".")
        if name not in children:
            raise Error(f"TensorFlow loads the model without {key}, as it does where a model holds several meta graphs")
        node = children[name]
    return node

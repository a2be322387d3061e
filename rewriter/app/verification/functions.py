"""Functions of loaded models: called by keywords, and differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf
from tensorflow.python.checkpoint.graph_view import ObjectGraphView

from rewriter.ir import Error, unused


class Trainer(NamedTuple):
    """A loaded function as one of keywords, its inputs' specs, and the variables that it may use."""

    call: Callable[..., Any]
    specs: dict[str, Any]
    variables: list[Any]


def trainer(model: Any) -> Trainer | None:
    """The training function of a loaded result: `quantization.train`, in TensorFlow 1's format the signature."""
    quantization: Any = getattr(model, "quantization", None)
    if hasattr(quantization, "train"):
        (concrete,) = quantization.train.concrete_functions
        return keyworded(concrete)._replace(variables=list(quantization.variables))
    if "train" not in model.signatures:
        return None
    return keyworded(model.signatures["train"])._replace(variables=list(model.variables))


def keyworded(concrete: Any) -> Trainer:
    """A concrete function as one of keywords; arguments that are no tensors are as it was traced with."""
    structure = concrete.structured_input_signature
    leaves = tf.nest.flatten(structure)
    specs: dict[str, Any] = {}
    named = [_added(leaf, specs) if isinstance(leaf, tf.TensorSpec) else None for leaf in leaves]

    def call(**fed: Any) -> Any:
        values = [leaf if name is None else tf.constant(fed[name]) for leaf, name in zip(leaves, named, strict=True)]
        positional, keywords = tf.nest.pack_sequence_as(structure, values)
        return concrete(*positional, **keywords)

    return Trainer(call, specs, list(concrete.graph.trainable_variables))


def _added(spec: Any, specs: dict[str, Any]) -> str:
    """A name for a spec, which is added under it."""
    name = unused(spec.name, specs)
    specs[name] = spec
    return name


def loss(outputs: Any) -> Any:
    """A sum of the float outputs, weighted, as the sum of a softmax has no gradient; None where there is none."""
    floats = [t for t in tf.nest.flatten(outputs) if t.dtype.is_floating]
    return tf.add_n([tf.reduce_sum(tf.cast(t, tf.float32) * _weights(t)) for t in floats]) if floats else None


def _weights(value: tf.Tensor) -> tf.Tensor:
    return tf.reshape(tf.sin(tf.cast(tf.range(tf.size(value)), tf.float32)), tf.shape(value))


def gradients(function: Trainer, parameters: list[Any], fed: dict[str, np.ndarray]) -> list[Any] | None:
    """The gradients of a function's float outputs; None where it has none."""
    with tf.GradientTape() as tape:
        value = loss(function.call(**fed))
    found: list[Any] | None = None if value is None else tape.gradient(value, parameters)
    return found


def held(root: Any, key: str) -> Any:
    """A loaded model's variable by its checkpoint key, which is its path; names need not be unique.

    Raises:
        Error: it holds none.
    """
    found = root
    for part in key.removesuffix("/.ATTRIBUTES/VARIABLE_VALUE").split("/"):
        children, name = ObjectGraphView(root).children(found), part.replace(".S", "/").replace("..", ".")
        if name not in children:
            raise Error(f"TensorFlow loads the model without {key}, as it does where a model holds several meta graphs")
        found = children[name]
    return found

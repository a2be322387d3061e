"""The numbers and kernels of a net, and their comparison."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import tensorflow as tf

from tests.models.handwritten.form import Form
from tests.models.handwritten.nets import batch

STEPS = 3
"""Training steps of a run."""

Arrays = Mapping[str, np.ndarray]
"""Values by name."""


@dataclass
class Behaviour:
    """The results of running a net.

    Attributes:
        start: initial moving statistics.
        served: the output in inference; None where the net only trains.
        served_averages: moving statistics after serving.
        outputs: outputs of the training steps.
        gradients: gradients by parameter, of the training steps; empty where TensorFlow gives none.
        averages: moving statistics after the steps.
        kernels: for each mode, the attribute `is_training` of every fused kernel that ran.
    """

    start: Arrays = field(default_factory=dict)
    served: np.ndarray | None = None
    served_averages: Arrays = field(default_factory=dict)
    outputs: list[np.ndarray] = field(default_factory=list)
    gradients: list[Arrays] = field(default_factory=list)
    averages: Arrays = field(default_factory=dict)
    kernels: dict[bool, list[bool]] = field(default_factory=dict)


def loss_of(y: tf.Tensor, form: Form) -> tf.Tensor:
    """Return the loss whose gradients are compared: the output with random weights, so that no gradient cancels."""
    weights = np.random.default_rng(5).normal(0, 1, batch(form, 0).shape).astype("float32")
    return tf.reduce_sum(tf.cast(y, tf.float32) * weights)


def difference(actual: Arrays, reference: Arrays) -> float:
    """Return the largest difference of any element, relative to its array's largest; infinite if names differ."""
    if actual.keys() != reference.keys():
        return float("inf")
    return max((_difference(actual[name], value) for name, value in reference.items()), default=0.0)


def _difference(actual: np.ndarray, reference: np.ndarray) -> float:
    if actual.shape != reference.shape:
        return float("inf")
    a, b = actual.astype(np.float64), reference.astype(np.float64)
    return float(np.abs(a - b).max() / (np.abs(b).max() or 1))


def differs(what: str, actual: Arrays, reference: Arrays, tolerance: float) -> Iterator[str]:
    """Yield a sentence if arrays differ by more than a tolerance, or in their names."""
    worst = difference(actual, reference)
    if not worst <= tolerance:  # true of NaN
        yield f"{what} differs by {worst:.2g}"

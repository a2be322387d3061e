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
        start: moving statistics at first.
        served: the output in inference; None where the net only trains.
        kept: moving statistics after that.
        outputs: outputs of the training steps.
        gradients: gradients by parameter, of the training steps; empty where TensorFlow gives none.
        averages: moving statistics after the steps.
        kernels: for each mode, the attribute `is_training` of every fused kernel that ran.
    """

    start: Arrays = field(default_factory=dict)
    served: np.ndarray | None = None
    kept: Arrays = field(default_factory=dict)
    outputs: list[np.ndarray] = field(default_factory=list)
    gradients: list[Arrays] = field(default_factory=list)
    averages: Arrays = field(default_factory=dict)
    kernels: dict[bool, list[bool]] = field(default_factory=dict)


def loss_of(y: tf.Tensor, form: Form) -> tf.Tensor:
    """The loss whose gradients are compared: the output with random weights, so that no gradient cancels."""
    weights = np.random.default_rng(5).normal(0, 1, batch(form, 0).shape).astype("float32")
    return tf.reduce_sum(tf.cast(y, tf.float32) * weights)


def difference(found: Arrays, wanted: Arrays) -> float:
    """The largest difference of any element, relative to the largest of its array; infinite where names differ."""
    if found.keys() != wanted.keys():
        return float("inf")
    return max((_difference(found[name], value) for name, value in wanted.items()), default=0.0)


def _difference(found: np.ndarray, wanted: np.ndarray) -> float:
    if found.shape != wanted.shape:
        return float("inf")
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    return float(np.abs(a - b).max() / (np.abs(b).max() or 1))


def differs(what: str, found: Arrays, wanted: Arrays, tolerance: float) -> Iterator[str]:
    """Say so if arrays differ by more than a tolerance, or in their names."""
    worst = difference(found, wanted)
    if not worst <= tolerance:  # true of NaN
        yield f"{what} differs by {worst:.2g}"

"""A SavedModel with weights, as plain data: its maker, its inputs, and what is expected of its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

Axes = tuple[int, ...]
"""Axes of a value, counted from its end."""

LAST: Axes = (-1,)
"""The channels of a convolution's filter, and of a matrix that is multiplied from the right."""
DEPTHWISE: Axes = (-2, -1)
"""The channels of a depthwise convolution's filter: both axes together."""
TRANSPOSED: Axes = (-2,)
"""The channels of a transposed convolution's filter, and of a matrix that is transposed."""
ROWS: Axes = (-2,)
"""The rows of a table of embeddings [rows, width]."""


class ExpectedWeight(NamedTuple):
    """A weight that is to be quantised, with one identity.

    Attributes:
        name: the variable's name in the SavedModel, without ":0"; "" for a constant.
        shape: the shape of the op's input; of an embedding, that of the whole table.
        axes: the axes of the op's input each index of which has a range of its own.
        op: the op that takes it.
        uses: the least number of ops that take it so. Keras traces a cell once more, for its shapes alone.
    """

    name: str
    shape: tuple[int, ...]
    axes: Axes
    op: str
    uses: int = 1


class DeclinedWeight(NamedTuple):
    """A weight, or an op's filter, that cannot be quantised: its variable's name or "", the op, and the cause."""

    name: str
    op: str
    cause: str


class InputSpec(NamedTuple):
    """An input of the default signature: its shape for a batch of two; integers are drawn below `high`."""

    shape: tuple[int, ...]
    high: int = 0
    dtype: str = "float32"

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return a random input."""
        if self.dtype == "bool":
            return np.ones(self.shape, np.bool_)
        if self.high:
            return rng.integers(0, self.high, self.shape).astype(self.dtype)
        return rng.normal(0.3, 1.5, self.shape).astype(self.dtype)


@dataclass(frozen=True)
class WeightModel:
    """A SavedModel with weights.

    Attributes:
        make: writes it.
        inputs: the default signature's inputs by name.
        weights: the weights that are to be quantised.
        declined: what cannot be.
        untrained: the reason why TensorFlow computes no gradient of one of the weights on a CPU, if there is one.
    """

    make: Callable[[Path], Path]
    inputs: dict[str, InputSpec]
    weights: tuple[ExpectedWeight, ...]
    declined: tuple[DeclinedWeight, ...] = ()
    untrained: str = ""

    def draw(self, seed: int = 0) -> dict[str, np.ndarray]:
        """Return random inputs by name."""
        rng = np.random.default_rng(seed)
        return {name: spec.draw(rng) for name, spec in sorted(self.inputs.items())}


def drawn(name: str, *shape: int, dtype: Any = tf.float32, trainable: bool = True) -> tf.Variable:
    """Return a variable of random values, seeded by its name, that keep the scale of activations."""
    rng = np.random.default_rng(list(name.encode()))
    fan_in = max(1, int(np.prod(shape[:-1])))
    values = rng.normal(0, fan_in**-0.5, shape).astype(np.float32)
    return tf.Variable(tf.cast(values, dtype), trainable=trainable, name=name)

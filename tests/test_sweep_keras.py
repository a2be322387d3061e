"""Steps of `tools/sweep_keras.py` on a small net with the parts of EfficientNet; the tool takes the real nets.

The guides go the other two ways: docs/keras.md freezes the statistics of an export of Keras 3, and test_mlperf_tiny.py
takes models of Keras 2 whose statistics move.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tools.sweep_keras import CLASSES, LITE, Row, saved, take

SIDE = 16


def small(producer: str) -> Any:
    """Convolutions, batch norm and swish, and a squeeze-and-excite gate."""
    package = import_module(producer)
    package.utils.set_random_seed(0)
    layers = package.layers
    x = inputs = package.Input((SIDE, SIDE, 3))
    x = layers.Rescaling(1 / 255)(x)
    for convolution in (layers.Conv2D(8, 3, 2, use_bias=False), layers.DepthwiseConv2D(3, use_bias=False)):
        x = layers.Activation("swish")(layers.BatchNormalization()(convolution(x)))
    gate = layers.Reshape((1, 1, 8))(layers.GlobalAveragePooling2D()(x))
    gate = layers.Conv2D(8, 1, activation="sigmoid")(layers.Conv2D(2, 1, activation="swish")(gate))
    x = layers.GlobalAveragePooling2D()(layers.Multiply()([x, gate]))
    return package.Model(inputs, layers.Dense(CLASSES, activation="softmax")(x))


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")  # the converter's own use of it
@pytest.mark.parametrize(("producer", "freeze"), [("keras", False), ("tf_keras", True)])
def test_a_net_with_swish_reaches_the_device(producer: str, freeze: bool, tmp_path: Path) -> None:
    row = Row("small", producer, freeze)
    take(row, saved(small(producer), producer, tmp_path / "source"), tmp_path, SIDE)
    assert (row.failing, row.error) == ({}, "")
    assert row.rewritten >= 2
    assert row.fused >= (2 if producer == "keras" else 0)
    assert row.losses is not None
    assert freeze or row.losses[1] < row.losses[0]  # the second phase begins with statistics of five steps
    assert row.finalised == 0
    assert row.lite is not None
    assert row.lite < LITE
    assert not row.failed

"""Weights in layers of Keras 3 and Keras 2: names of variables, and graphs, as their exports have them."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.models import export_keras, perturb, save_keras
from tests.models.weights.case import (
    DEPTHWISE,
    LAST,
    ROWS,
    TRANSPOSED,
    ExpectedWeight,
    InputSpec,
    WeightModel,
)

W = ExpectedWeight
ROUNDS = 5


def convolutional(layers: Any) -> list[Any]:
    """Convolutions in two dimensions, of every kind."""
    return [
        layers.Input((8, 8, 4), name="x"),
        layers.Conv2D(6, 3, padding="same", activation="relu", name="plain"),
        layers.Conv2D(6, 3, padding="same", groups=2, name="grouped"),
        layers.Conv2D(6, 3, padding="same", dilation_rate=2, name="dilated"),
        layers.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise"),
        layers.SeparableConv2D(5, 3, padding="same", name="separable"),
        layers.Conv2DTranspose(4, 3, strides=2, name="transposed"),
        layers.GlobalAveragePooling2D(),
        layers.Dense(3, name="head"),
    ]


def sequential(layers: Any) -> list[Any]:
    """Convolutions in one dimension, and Dense on a sequence."""
    return [
        layers.Input((12, 4), name="x"),
        layers.Conv1D(6, 3, padding="causal", activation="relu", name="causal"),
        layers.SeparableConv1D(5, 3, padding="same", name="separable"),
        layers.Conv1DTranspose(4, 3, strides=2, name="transposed"),
        layers.Dense(3, activation="relu", name="mix"),
        layers.Flatten(),
        layers.Dense(2, name="head"),
    ]


def volumetric(layers: Any) -> list[Any]:
    return [
        layers.Input((4, 4, 4, 2), name="x"),
        layers.Conv3D(3, 3, padding="same", activation="relu", name="plain"),
        layers.Conv3DTranspose(2, 3, strides=2, name="transposed"),
        layers.GlobalAveragePooling3D(),
    ]


def recurrent(layer: str) -> Callable[[Any], list[Any]]:
    """Return the layers of a net with a recurrent layer, whose products lie in a loop."""

    def stack(layers: Any) -> list[Any]:
        return [
            layers.Input((ROUNDS, 4), name="x"),
            getattr(layers, layer)(6, name="cell"),
            layers.Dense(3, name="head"),
        ]

    return stack


def embedded(layers: Any) -> list[Any]:
    return [
        layers.Input((6,), dtype="int32", name="x"),
        layers.Embedding(20, 8, name="table"),
        layers.GlobalAveragePooling1D(),
        layers.Dense(3, name="head"),
    ]


def _attention(keras: Any) -> Any:
    x = keras.layers.Input((5, 8), name="x")
    y = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    return keras.Model(x, keras.layers.LayerNormalization(name="norm")(x + y))


def _build(keras: Any, stack: Callable[[Any], list[Any]] | None) -> Any:
    keras.backend.clear_session()  # so that names are the same every time
    keras.utils.set_random_seed(0)
    model = _attention(keras) if stack is None else keras.Sequential(stack(keras.layers), name="net")
    perturb(model.weights)
    return model


def _of_keras_3(stack: Callable[[Any], list[Any]] | None) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        import keras

        with contextlib.redirect_stdout(io.StringIO()):
            _build(keras, stack).export(str(path), verbose=False)
        return path

    return make


def _of_keras_2(
    stack: Callable[[Any], list[Any]] | None, write: Callable[[Any, Path], Path] = save_keras
) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        import tf_keras

        return write(_build(tf_keras, stack), path)

    return make


IMAGE = {"x": InputSpec((2, 8, 8, 4))}
SEQUENCE = {"x": InputSpec((2, 12, 4))}
VOLUME = {"x": InputSpec((2, 4, 4, 4, 2))}
STEPS = {"x": InputSpec((2, ROUNDS, 4))}
TOKENS = {"x": InputSpec((2, 6), 20, "int32")}
VECTORS = {"x": InputSpec((2, 5, 8))}

CONVOLUTIONAL = (
    W("plain/kernel", (3, 3, 4, 6), LAST, "Conv2D"),
    W("grouped/kernel", (3, 3, 3, 6), LAST, "Conv2D"),
    W("dilated/kernel", (3, 3, 6, 6), LAST, "Conv2D"),
    W("depthwise/depthwise_kernel", (3, 3, 6, 2), DEPTHWISE, "DepthwiseConv2dNative"),
    W("separable/depthwise_kernel", (3, 3, 12, 1), DEPTHWISE, "DepthwiseConv2dNative"),
    W("separable/pointwise_kernel", (1, 1, 12, 5), LAST, "Conv2D"),
    W("transposed/kernel", (3, 3, 4, 5), TRANSPOSED, "Conv2DBackpropInput"),
    W("head/kernel", (4, 3), LAST, "MatMul"),
)
SEQUENTIAL = (
    W("causal/kernel", (1, 3, 4, 6), LAST, "Conv2D"),
    W("separable/depthwise_kernel", (1, 3, 6, 1), DEPTHWISE, "DepthwiseConv2dNative"),
    W("separable/pointwise_kernel", (1, 1, 6, 5), LAST, "Conv2D"),
    W("transposed/kernel", (1, 3, 4, 5), TRANSPOSED, "Conv2DBackpropInput"),
    W("mix/kernel", (4, 3), LAST, "MatMul"),
    W("head/kernel", (75, 2), LAST, "MatMul"),
)
VOLUMETRIC = (
    W("plain/kernel", (3, 3, 3, 2, 3), LAST, "Conv3D"),
    W("transposed/kernel", (3, 3, 3, 2, 3), TRANSPOSED, "Conv3DBackpropInputV2"),
)
HEAD = W("head/kernel", (8, 3), LAST, "MatMul")
EMBEDDED = (W("table/embeddings", (20, 8), ROWS, "ResourceGather"), HEAD)
GATHERED = (W("table/embeddings", (20, 8), ROWS, "GatherV2"), HEAD)
ATTENTION = (
    *(W(f"attention/{name}/kernel", (8, 2, 4), (-2, -1), "Einsum") for name in ("query", "key", "value")),
    W("attention/attention_output/kernel", (2, 4, 8), LAST, "Einsum"),
)

# Keras 3 flattens the heads, and broadcasts a product of matrices in place of an einsum.
FLATTENED = tuple(
    W(f"attention/{name}/kernel", (8, 8), LAST, "BatchMatMulV2")
    for name in ("query", "key", "value", "attention_output")
)


def _recurrent(cell: str, gates: int) -> tuple[ExpectedWeight, ...]:
    return (
        W(f"cell/{cell}/kernel", (4, gates * 6), LAST, "MatMul"),
        W(f"cell/{cell}/recurrent_kernel", (6, gates * 6), LAST, "MatMul"),
        W("head/kernel", (6, 3), LAST, "MatMul"),
    )


def _in_net(weights: tuple[ExpectedWeight, ...]) -> tuple[ExpectedWeight, ...]:
    """Return weights under the names that Keras 3 gives to the variables of a Sequential model."""
    names = {"depthwise/depthwise_kernel": "depthwise/kernel"}
    return tuple(weight._replace(name=f"net/{names.get(weight.name, weight.name)}") for weight in weights)


LSTM, GRU = _recurrent("lstm_cell", 4), _recurrent("gru_cell", 3)

KERAS: dict[str, WeightModel] = {
    "keras3_convolutions": WeightModel(_of_keras_3(convolutional), IMAGE, _in_net(CONVOLUTIONAL)),
    "keras3_sequence": WeightModel(_of_keras_3(sequential), SEQUENCE, _in_net(SEQUENTIAL)),
    "keras3_volume": WeightModel(_of_keras_3(volumetric), VOLUME, _in_net(VOLUMETRIC)),
    "keras3_lstm": WeightModel(_of_keras_3(recurrent("LSTM")), STEPS, _in_net(LSTM)),
    "keras3_gru": WeightModel(_of_keras_3(recurrent("GRU")), STEPS, _in_net(GRU)),
    "keras3_embedding": WeightModel(_of_keras_3(embedded), TOKENS, _in_net(GATHERED)),
    "keras3_attention": WeightModel(_of_keras_3(None), VECTORS, FLATTENED),
    "keras2_convolutions": WeightModel(_of_keras_2(convolutional), IMAGE, CONVOLUTIONAL),
    "keras2_convolutions_export": WeightModel(_of_keras_2(convolutional, export_keras), IMAGE, CONVOLUTIONAL),
    "keras2_sequence": WeightModel(_of_keras_2(sequential), SEQUENCE, SEQUENTIAL),
    "keras2_volume": WeightModel(_of_keras_2(volumetric), VOLUME, VOLUMETRIC),
    "keras2_lstm": WeightModel(_of_keras_2(recurrent("LSTM")), STEPS, LSTM),
    "keras2_gru": WeightModel(_of_keras_2(recurrent("GRU")), STEPS, GRU),
    "keras2_embedding": WeightModel(_of_keras_2(embedded), TOKENS, EMBEDDED),
    "keras2_attention": WeightModel(_of_keras_2(None), VECTORS, ATTENTION),
}
"""Models by name."""

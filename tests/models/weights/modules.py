"""Weights in `tf.Module`s: every op that takes one, shared ones, and ones that are computed before use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorflow as tf

from tests.models.detectors import CLASSES, combined, heads
from tests.models.weights.case import (
    DEPTHWISE,
    LAST,
    ROWS,
    TRANSPOSED,
    DeclinedWeight,
    ExpectedWeight,
    InputSpec,
    WeightModel,
    drawn,
)

Call = Callable[[dict[str, tf.Variable], tf.Tensor], Any]
IMAGE = (8, 8, 4)


class Weighted(tf.Module):
    """A function of an input `x` and of variables."""

    def __init__(self, call: Call, variables: list[tf.Variable], spec: tf.TensorSpec) -> None:
        super().__init__(name="weighted")
        self.held = {variable.name.removesuffix(":0"): variable for variable in variables}
        self.serve = tf.function(lambda x: call(self.held, x), input_signature=[spec])


def model(
    call: Call,
    shape: tuple[int, ...],
    weights: tuple[ExpectedWeight, ...],
    *others: tuple[str, tuple[int, ...]],
    stored: dict[str, tuple[int, ...]] | None = None,
    dtype: Any = tf.float32,
    high: int = 0,
    declined: tuple[DeclinedWeight, ...] = (),
    untrained: str = "",
) -> WeightModel:
    """Return a model of a function.

    Args:
        call: the function, of the variables by name and a batch.
        shape: a batch's shape without the first axis.
        weights: the expected weights; each has a variable of its shape.
        others: further variables, which are not trainable.
        stored: shapes of variables that the op takes in another shape.
        dtype: the variables' type.
        high: where the input is integers, their number.
        declined: what cannot be quantised.
        untrained: the reason why a weight has no gradient.
    """
    shapes = {w.name: w.shape for w in weights} | (stored or {})

    def make(path: Path) -> Path:
        variables = [drawn(name, *size, dtype=dtype) for name, size in shapes.items()]
        variables += [drawn(name, *size, trainable=False) for name, size in others]
        module = Weighted(call, variables, tf.TensorSpec((None, *shape), tf.int32 if high else tf.float32, name="x"))
        tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve})
        return path

    inputs = {"x": InputSpec((2, *shape), high, "int32" if high else "float32")}
    return WeightModel(make, inputs, weights, declined, untrained)


def conv1d(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """Conv2D of an expanded filter."""
    return tf.nn.conv1d(tf.nn.relu(tf.nn.conv1d(x, v["first"], 1, "SAME")), v["second"], 2, "VALID")


def separable(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    return tf.nn.separable_conv2d(x, v["depthwise"], v["pointwise"], [1, 1, 1, 1], "SAME")


def transposed(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """Filters are [height, width, outputs, inputs]."""
    batch = tf.shape(x)[0]
    return tf.nn.conv2d_transpose(x, v["kernel"], tf.stack([batch, 16, 16, 6]), 2)


def transposed_3d(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    batch = tf.shape(x)[0]
    return tf.nn.conv3d_transpose(x, v["kernel"], tf.stack([batch, 6, 8, 8, 5]), 2)


def grouped(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """Two groups: the filter has half of the input's channels."""
    return tf.nn.conv2d(x, v["kernel"], 1, "SAME")


def dilated(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """Dilated by the op's attribute, and between SpaceToBatchND and BatchToSpaceND."""
    x = tf.nn.relu(tf.nn.conv2d(x, v["first"], 1, "SAME", dilations=2))
    return tf.nn.atrous_conv2d(x, v["second"], 2, "SAME")


def conv3d(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    return tf.nn.conv3d(x, v["kernel"], [1, 1, 1, 1, 1], "SAME")


def depthwise(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """Multiplier 2: each input channel has two filters."""
    return tf.nn.depthwise_conv2d(x, v["kernel"], [1, 1, 1, 1], "SAME")


def dense(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """Products from the right, as it is stored, transposed by the op, and transposed by an op of its own."""
    x = tf.nn.relu(tf.matmul(x, v["first"]))
    x = tf.nn.relu(tf.matmul(x, v["second"], transpose_b=True))
    return tf.matmul(x, tf.transpose(v["third"]))


def dense_3d(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """`tf.tensordot`, which flattens the input, and a broadcast product."""
    return tf.matmul(tf.nn.relu(tf.tensordot(x, v["first"], 1)), v["second"])


def from_the_left(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """A weight as the first operand: its rows are output channels."""
    return tf.matmul(v["kernel"], tf.matmul(v["transposed"], x, transpose_a=True))


def experts(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """One matrix for each of three experts: both the expert and the column are channels."""
    x = tf.matmul(tf.tile(x[:, None], [1, 3, 1, 1]), v["first"])
    return tf.einsum("beti,eio->beto", tf.nn.relu(x), v["second"])


def einsum_attention(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """Attention of two heads, whose two einsums of activations have no weight."""
    q, k, value = (tf.einsum("btd,dhe->bthe", x, v[name]) for name in ("query", "key", "value"))
    scores = tf.nn.softmax(tf.einsum("bqhe,bkhe->bhqk", q, k))
    return tf.einsum("bqhe,hed->bqd", tf.einsum("bhqk,bkhe->bqhe", scores, value), v["output"])


def tied(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """One table for looking up and for the logits."""
    y = tf.nn.embedding_lookup(v["table"], x)
    y = tf.nn.relu(tf.tensordot(y, v["mix"], 1))
    return tf.matmul(tf.reduce_mean(y, 1), v["table"], transpose_b=True)


def shared_twice(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """One filter in two layers."""
    return tf.nn.conv2d(tf.nn.relu(tf.nn.conv2d(x, v["kernel"], 1, "SAME")), v["kernel"], 2, "SAME")


def shared_transposed(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """One filter for a convolution and, as in an autoencoder with tied weights, for its transpose."""
    y = tf.nn.relu(tf.nn.conv2d(x, v["kernel"], 2, "SAME"))
    return tf.nn.conv2d_transpose(y, v["kernel"], tf.shape(x), 2)


def detector(v: dict[str, tf.Variable], x: tf.Tensor) -> dict[str, tf.Tensor]:
    """Two convolutions, a head for boxes and scores, and non-maximum suppression."""
    y = tf.nn.relu(tf.nn.conv2d(x, v["first"], 1, "SAME"))
    y = tf.nn.relu(tf.nn.conv2d(y, v["second"], 1, "SAME"))
    return combined(*heads(tf.nn.conv2d(y, v["head"], 1, "SAME")))


def standardised(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """Weight standardisation: each filter has mean 0 and variance 1 before use."""
    mean, variance = tf.nn.moments(v["kernel"], [0, 1, 2], keepdims=True)
    kernel = (v["kernel"] - mean) * tf.math.rsqrt(variance * 36.0 + 1e-4)
    return tf.nn.conv2d(x, kernel, 1, "SAME")


def spectral(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """Spectral normalisation with a round of the power iteration, whose products hold weights alone."""
    matrix = tf.reshape(v["kernel"], [36, 8])
    left = tf.math.l2_normalize(tf.matmul(v["u"], matrix, transpose_b=True))
    right = tf.math.l2_normalize(tf.matmul(left, matrix))
    sigma = tf.matmul(tf.matmul(left, matrix), right, transpose_b=True)
    return tf.nn.conv2d(x, v["kernel"] / tf.reshape(sigma, []), 1, "SAME")


def half(dtype: tf.DType) -> Call:
    """Return a function in half precision with variables in half precision."""

    def call(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
        y = tf.nn.relu(tf.nn.conv2d(tf.cast(x, dtype), v["kernel"], 1, "SAME"))
        return tf.cast(tf.matmul(tf.reduce_mean(y, [1, 2]), v["head"]), tf.float32)

    return call


def mixed(dtype: tf.DType) -> Call:
    """Return a function in half precision with float32 variables, cast for use."""
    return lambda v, x: half(dtype)({name: tf.cast(variable, dtype) for name, variable in v.items()}, x)


def reshaped(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """A filter that is stored as a matrix, and a matrix that is stored transposed as a filter."""
    y = tf.nn.relu(tf.nn.conv2d(x, tf.reshape(v["flat"], [3, 3, 4, 6]), 1, "SAME"))
    return tf.matmul(tf.reduce_mean(y, [1, 2]), tf.transpose(tf.squeeze(v["pointwise"], [0, 1])))


def in_functions(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """One function with a convolution, called with two filters: the branches of a conditional call it, too."""

    @tf.function
    def layer(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        return tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME"))

    y = layer(layer(x, v["first"]), v["second"])
    up, down = (lambda: layer(y, v["up"])), (lambda: layer(y, v["down"]))
    return tf.cond(tf.reduce_mean(x) > 0.0, up, down)


def in_a_loop(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """A convolution in the body of a while loop."""
    body = lambda i, y: (i + 1, tf.nn.relu(tf.nn.conv2d(y, v["kernel"], 1, "SAME")))  # noqa: E731  as loops are written
    return tf.while_loop(lambda i, _: i < 3, body, (tf.constant(0), x), shape_invariants=(tf.TensorShape([]), x.shape))[
        1
    ]


def dynamic_filter(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """A filter that a matrix product computes from the input."""
    filters = tf.reshape(tf.matmul(tf.reduce_mean(x, [0, 1, 2])[None], v["hyper"]), [3, 3, 4, 5])
    return tf.nn.conv2d(x, filters, 1, "SAME")


def quantized_by_source(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """A filter that the source fake-quantises, and one that it does not."""
    kernel = tf.quantization.fake_quant_with_min_max_vars_per_channel(
        v["first"], -tf.ones([6]), tf.ones([6]), narrow_range=True
    )
    return tf.nn.conv2d(tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "SAME")), v["second"], 1, "SAME")


def none(v: dict[str, tf.Variable], x: tf.Tensor) -> tf.Tensor:
    """A variable that is no weight, and ops that take none."""
    return tf.nn.relu(tf.nn.avg_pool2d(x, 2, 2, "SAME") * v["scale"])


W = ExpectedWeight
HALF_WEIGHTS = (W("kernel", (3, 3, 4, 6), LAST, "Conv2D"), W("head", (6, 5), LAST, "MatMul"))

MODULES: dict[str, WeightModel] = {
    "conv1d": model(
        conv1d,
        (12, 4),
        (W("first", (1, 3, 4, 6), LAST, "Conv2D"), W("second", (1, 5, 6, 3), LAST, "Conv2D")),
        stored={"first": (3, 4, 6), "second": (5, 6, 3)},
    ),
    "separable": model(
        separable,
        IMAGE,
        (
            W("depthwise", (3, 3, 4, 1), DEPTHWISE, "DepthwiseConv2dNative"),
            W("pointwise", (1, 1, 4, 6), LAST, "Conv2D"),
        ),
    ),
    "transposed": model(transposed, IMAGE, (W("kernel", (3, 3, 6, 4), TRANSPOSED, "Conv2DBackpropInput"),)),
    "transposed_3d": model(
        transposed_3d, (3, 4, 4, 2), (W("kernel", (3, 3, 3, 5, 2), TRANSPOSED, "Conv3DBackpropInputV2"),)
    ),
    "grouped": model(
        grouped,
        IMAGE,
        (W("kernel", (3, 3, 2, 6), LAST, "Conv2D"),),
        untrained="kernels of a CPU have no gradient of grouped convolutions",
    ),
    "dilated": model(
        dilated,
        IMAGE,
        (W("first", (3, 3, 4, 6), LAST, "Conv2D"), W("second", (3, 3, 6, 5), LAST, "Conv2D")),
        untrained="kernels of a CPU have no gradient of dilated convolutions",
    ),
    "conv3d": model(conv3d, (3, 4, 4, 2), (W("kernel", (3, 3, 3, 2, 5), LAST, "Conv3D"),)),
    "depthwise": model(depthwise, IMAGE, (W("kernel", (3, 3, 4, 2), DEPTHWISE, "DepthwiseConv2dNative"),)),
    "dense": model(
        dense,
        (4,),
        (
            W("first", (4, 6), LAST, "MatMul"),
            W("second", (7, 6), TRANSPOSED, "MatMul"),
            W("third", (7, 5), LAST, "MatMul"),
        ),
        stored={"third": (5, 7)},
    ),
    "dense_3d": model(
        dense_3d, (5, 4), (W("first", (4, 6), LAST, "MatMul"), W("second", (6, 3), LAST, "BatchMatMulV2"))
    ),
    "from_the_left": model(
        from_the_left,
        (4, 7),
        (W("kernel", (5, 6), (-2,), "BatchMatMulV2"), W("transposed", (4, 6), (-1,), "BatchMatMulV2")),
    ),
    "experts": model(
        experts,
        (5, 4),
        (W("first", (3, 4, 6), (-3, -1), "BatchMatMulV2"), W("second", (3, 6, 2), (-3, -1), "Einsum")),
    ),
    "einsum_attention": model(
        einsum_attention,
        (5, 8),
        (
            *(W(name, (8, 2, 4), (-2, -1), "Einsum") for name in ("query", "key", "value")),
            W("output", (2, 4, 8), LAST, "Einsum"),
        ),
    ),
    "embedding_tied": model(
        tied,
        (6,),
        (W("table", (20, 8), ROWS, "ResourceGather", uses=2), W("mix", (8, 8), LAST, "MatMul")),
        high=20,
    ),
    "shared_twice": model(shared_twice, IMAGE, (W("kernel", (3, 3, 4, 4), LAST, "Conv2D", uses=2),)),
    "shared_transposed": model(
        shared_transposed,
        IMAGE,
        (W("kernel", (3, 3, 4, 6), LAST, "Conv2D"), W("kernel", (3, 3, 4, 6), TRANSPOSED, "Conv2DBackpropInput")),
    ),
    "weights_detector": model(
        detector,
        IMAGE,
        (
            W("first", (3, 3, 4, 8), LAST, "Conv2D"),
            W("second", (3, 3, 8, 8), LAST, "Conv2D"),
            W("head", (1, 1, 8, 4 + CLASSES), LAST, "Conv2D"),
        ),
        untrained="non-maximum suppression has no gradient",
    ),
    "standardised": model(standardised, IMAGE, (W("kernel", (3, 3, 4, 8), LAST, "Conv2D"),)),
    "spectral": model(spectral, IMAGE, (W("kernel", (3, 3, 4, 8), LAST, "Conv2D"),), ("u", (1, 8))),
    "half_float16": model(half(tf.float16), IMAGE, HALF_WEIGHTS, dtype=tf.float16),
    "half_bfloat16": model(half(tf.bfloat16), IMAGE, HALF_WEIGHTS, dtype=tf.bfloat16),
    "mixed_float16": model(mixed(tf.float16), IMAGE, HALF_WEIGHTS),
    "mixed_bfloat16": model(mixed(tf.bfloat16), IMAGE, HALF_WEIGHTS),
    "reshaped": model(
        reshaped,
        IMAGE,
        (W("flat", (3, 3, 4, 6), LAST, "Conv2D"), W("pointwise", (6, 5), LAST, "MatMul")),
        stored={"flat": (36, 6), "pointwise": (1, 1, 5, 6)},
    ),
    "in_functions": model(
        in_functions,
        IMAGE,
        tuple(W(name, (3, 3, 4, 4), LAST, "Conv2D") for name in ("first", "second", "up", "down")),
        untrained="only one branch of the conditional is taken",
    ),
    "in_a_loop": model(in_a_loop, IMAGE, (W("kernel", (3, 3, 4, 4), LAST, "Conv2D"),)),
    "dynamic_filter": model(
        dynamic_filter,
        IMAGE,
        (W("hyper", (4, 180), LAST, "MatMul"),),
        declined=(DeclinedWeight("", "Conv2D", "computed from the input"),),
    ),
    "quantized_by_source": model(
        quantized_by_source,
        IMAGE,
        (W("second", (3, 3, 6, 5), LAST, "Conv2D"),),
        ("first", (3, 3, 4, 6)),
        declined=(DeclinedWeight("first", "Conv2D", "quantised by the source"),),
    ),
    "no_weights": model(none, IMAGE, (), ("scale", (4,))),
}
"""Models by name."""

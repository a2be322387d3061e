"""Weights in graphs without objects: TensorFlow 1's format, and frozen graphs, whose weights are constants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tests.models.v1 import Options, settings, write
from tests.models.weights.case import LAST, ROWS, ExpectedWeight, InputSpec, WeightModel, drawn

v1 = tf.compat.v1
W = ExpectedWeight


def _kernel(name: str, *shape: int) -> Any:
    """Return a variable of random values, seeded by its name."""
    rng = np.random.default_rng(list(name.encode()))
    values = rng.normal(0, int(np.prod(shape[:-1])) ** -0.5, shape).astype(np.float32)
    return v1.get_variable(name, initializer=values)


def _net(x: tf.Tensor, looped: bool) -> tf.Tensor:
    """A convolution, a conditional of two, with `looped` three rounds of one more, and a product."""
    y = tf.nn.relu(tf.nn.conv2d(x, _kernel("first", 3, 3, 4, 6), 1, "SAME"))
    if looped:
        up, down = _kernel("up", 3, 3, 6, 6), _kernel("down", 1, 1, 6, 6)
        y = v1.cond(
            tf.reduce_mean(x) > 0.0,
            lambda: tf.nn.conv2d(y, up, 1, "SAME"),
            lambda: tf.nn.conv2d(y, down, 1, "SAME"),
        )
        y.set_shape([None, 8, 8, 6])
        around = _kernel("around", 3, 3, 6, 6)
        _, y = v1.while_loop(
            lambda i, _: i < 3,
            lambda i, y: (i + 1, tf.nn.relu(tf.nn.conv2d(y, around, 1, "SAME"))),
            (tf.constant(0), y),
            shape_invariants=(tf.TensorShape([]), y.shape),
        )
    return tf.matmul(tf.reduce_mean(y, [1, 2]), _kernel("head", 6, 3))


def _v1(looped: bool, references: bool = False, control_flow_v2: bool = False) -> WeightModel:
    def make(path: Path) -> Path:
        with settings(Options(references=references, control_flow_v2=control_flow_v2)):
            x = v1.placeholder(tf.float32, [None, 8, 8, 4], name="x")
            write(path, {"x": x}, {"logits": tf.identity(_net(x, looped), name="logits")})
        return path

    inner = (("up", (3, 3, 6, 6)), ("down", (1, 1, 6, 6)), ("around", (3, 3, 6, 6))) if looped else ()
    weights = (
        W("first", (3, 3, 4, 6), LAST, "Conv2D"),
        *(W(name, shape, LAST, "Conv2D") for name, shape in inner),
        W("head", (6, 3), LAST, "MatMul"),
    )
    return WeightModel(make, {"x": InputSpec((2, 8, 8, 4))}, weights)


def _frozen_v1(path: Path) -> Path:
    """A graph that TensorFlow 1's converter froze, in a SavedModel without variables."""
    with settings(Options()):
        x = v1.placeholder(tf.float32, [None, 8, 8, 4], name="x")
        tf.identity(_net(x, looped=False), name="logits")
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            graph_def = v1.graph_util.convert_variables_to_constants(session, session.graph_def, ["logits"])
    with tf.Graph().as_default() as graph:
        tf.import_graph_def(graph_def, name="")
        x, logits = (graph.get_tensor_by_name(f"{name}:0") for name in ("x", "logits"))
        return write(path, {"x": x}, {"logits": logits})


def _frozen(path: Path) -> Path:
    """A function whose variables became constants: a table of embeddings, a filter and a matrix."""
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    table, kernel, head = drawn("table", 20, 8), drawn("kernel", 3, 8, 6), drawn("head", 6, 5)

    @tf.function(input_signature=[tf.TensorSpec((None, 6), tf.int32, name="x")])
    def serve(x: tf.Tensor) -> tf.Tensor:
        y = tf.nn.relu(tf.nn.conv1d(tf.nn.embedding_lookup(table, x), kernel, 1, "SAME"))
        return tf.matmul(tf.reduce_mean(y, 1), head)

    module = tf.Module()
    module.serve = convert_variables_to_constants_v2(serve.get_concrete_function())
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve})
    return path


GRAPHS: dict[str, WeightModel] = {
    "v1_weights": _v1(looped=False),
    "v1_weights_references": _v1(looped=False, references=True),
    "v1_weights_loop": _v1(looped=True),
    "v1_weights_loop_references": _v1(looped=True, references=True),
    "v1_weights_loop_v2": _v1(looped=True, control_flow_v2=True),
    "v1_weights_frozen": WeightModel(
        _frozen_v1,
        {"x": InputSpec((2, 8, 8, 4))},
        (W("", (3, 3, 4, 6), LAST, "Conv2D"), W("", (6, 3), LAST, "MatMul")),
    ),
    "weights_frozen": WeightModel(
        _frozen,
        {"x": InputSpec((2, 6), 20, "int32")},
        (
            W("", (20, 8), ROWS, "GatherV2"),
            W("", (1, 3, 8, 6), LAST, "Conv2D"),
            W("", (6, 5), LAST, "MatMul"),
        ),
    ),
}
"""Models by name."""

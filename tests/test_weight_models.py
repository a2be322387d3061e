"""The models with weights load and run, hold the weights that they say, and name the right channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf.saved_model_pb2 import SavedModel

from tests.models.weights import WEIGHT_MODELS
from tests.models.weights.case import DEPTHWISE, LAST, ROWS, TRANSPOSED, WeightModel
from tests.models.weights.keras_models import KERAS
from tests.models.weights.modules import MODULES


def meta_graph(path: Path) -> Any:
    saved = SavedModel()
    saved.ParseFromString((path / "saved_model.pb").read_bytes())
    (only,) = saved.meta_graphs
    return only


def nodes(graph: Any) -> Iterator[Any]:
    """Yield the nodes of the main graph and of all functions."""
    yield from graph.graph_def.node
    for function in graph.graph_def.library.function:
        yield from function.node_def


def stored(path: Path, graph: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a SavedModel's variables by name."""
    shapes = {
        node.variable.name: tuple(dimension.size for dimension in node.variable.shape.dim)
        for node in graph.object_graph_def.nodes
        if node.HasField("variable")
    }
    if not shapes and (path / "variables" / "variables.index").exists():  # of TensorFlow 1
        reader = tf.train.load_checkpoint(str(path / "variables" / "variables"))
        shapes = {name: tuple(shape) for name, shape in reader.get_variable_to_shape_map().items()}
    return shapes


@pytest.mark.parametrize("name", WEIGHT_MODELS)
def test_it_runs_and_holds_the_expected_weights(name: str, weight_model: Callable[[str], Path]) -> None:
    model, path = WEIGHT_MODELS[name], weight_model(name)
    loaded = tf.saved_model.load(str(path))
    outputs = loaded.signatures["serving_default"](**{key: tf.constant(x) for key, x in model.draw().items()})
    for value in outputs.values():
        assert np.isfinite(value.numpy()).all()
        assert np.abs(value.numpy()).max() > 0
    graph = meta_graph(path)
    shapes, ops = stored(path, graph), {node.op for node in nodes(graph)}
    expected = [(w.name, w.op) for w in model.weights] + [(d.name, d.op) for d in model.declined]
    for variable, op in expected:
        assert op in ops
        assert not variable or variable in shapes
    for weight in model.weights:
        assert all(-len(weight.shape) <= axis < 0 for axis in weight.axes)
        if weight.name:
            assert np.prod(shapes[weight.name]) == np.prod(weight.shape)
    constants = [
        tuple(d.size for d in n.attr["value"].tensor.tensor_shape.dim) for n in nodes(graph) if n.op == "Const"
    ]
    for weight in model.weights:
        assert weight.name or any(np.prod(shape) == np.prod(weight.shape) and len(shape) > 1 for shape in constants)


def without_gradient(model: WeightModel, path: Path) -> set[str]:
    """Return the names of the weights that have no gradient, or a gradient of zero."""
    loaded = tf.saved_model.load(str(path))  # which keeps the variables
    serve = loaded.signatures["serving_default"]
    with tf.GradientTape() as tape:
        outputs = serve(**{name: tf.constant(x) for name, x in model.draw().items()})
        loss = sum(tf.reduce_sum(tf.square(value)) for value in outputs.values())
    gradients = zip(serve.variables, tape.gradient(loss, serve.variables), strict=True)
    moved = {v.name.removesuffix(":0") for v, g in gradients if g is not None and np.any(tf.convert_to_tensor(g))}
    return {weight.name for weight in model.weights} - moved


@pytest.mark.parametrize("name", [*MODULES, *KERAS])
def test_a_gradient_reaches_every_weight(name: str, weight_model: Callable[[str], Path]) -> None:
    model = WEIGHT_MODELS[name]
    if not model.untrained:
        assert not without_gradient(model, weight_model(name))
        return
    try:
        missing = without_gradient(model, weight_model(name))
    except (LookupError, tf.errors.OpError):  # LookupError: an op has no gradient
        return
    assert missing


@pytest.mark.parametrize(
    "name", ["conv1d", "embedding_tied", "keras3_lstm", "v1_weights", "v1_weights_loop_references"]
)
def test_writing_again_gives_the_same_weights(name: str, tmp_path: Path) -> None:
    def values(path: Path) -> list[tuple[tuple[int, ...], bytes]]:
        """Return the variables' values in an order of their own: Keras 3 numbers its variables anew each time."""
        reader = tf.train.load_checkpoint(str(WEIGHT_MODELS[name].make(path) / "variables" / "variables"))
        keys = [key for key in reader.get_variable_to_shape_map() if key != "_CHECKPOINTABLE_OBJECT_GRAPH"]
        return sorted((reader.get_tensor(key).shape, reader.get_tensor(key).tobytes()) for key in keys)

    assert values(tmp_path / "a") == values(tmp_path / "b")


# An op of a weight; the weight's shape; its channels; how scales by channel become scales of the result.
Op = Callable[[tf.Tensor], tf.Tensor]


def random(*shape: int) -> tf.Tensor:
    return tf.constant(np.random.default_rng(len(shape)).normal(0, 1, shape), tf.float32)


IDS = tf.constant([[3, 0, 3], [1, 2, 4]])
LINEAR: dict[str, tuple[Op, tuple[int, ...], tuple[int, ...], Callable[[tf.Tensor], tf.Tensor]]] = {
    "Conv2D": (lambda w: tf.nn.conv2d(random(2, 8, 8, 4), w, 1, "SAME"), (3, 3, 4, 6), LAST, tf.identity),
    "grouped": (lambda w: tf.nn.conv2d(random(2, 8, 8, 4), w, 1, "SAME"), (3, 3, 2, 6), LAST, tf.identity),
    "Conv3D": (
        lambda w: tf.nn.conv3d(random(2, 4, 4, 4, 2), w, [1] * 5, "SAME"),
        (3, 3, 3, 2, 5),
        LAST,
        tf.identity,
    ),
    "depthwise": (
        lambda w: tf.nn.depthwise_conv2d(random(2, 8, 8, 4), w, [1] * 4, "SAME"),
        (3, 3, 4, 2),
        DEPTHWISE,
        lambda s: tf.reshape(s, [-1]),
    ),
    "transposed": (
        lambda w: tf.nn.conv2d_transpose(random(2, 4, 4, 5), w, [2, 8, 8, 6], 2),
        (3, 3, 6, 5),
        TRANSPOSED,
        tf.identity,
    ),
    "transposed_3d": (
        lambda w: tf.nn.conv3d_transpose(random(2, 2, 2, 2, 3), w, [2, 4, 4, 4, 5], 2),
        (3, 3, 3, 5, 3),
        TRANSPOSED,
        tf.identity,
    ),
    "MatMul": (lambda w: tf.matmul(random(2, 4), w), (4, 6), LAST, tf.identity),
    "MatMul_transposed": (lambda w: tf.matmul(random(2, 4), w, transpose_b=True), (6, 4), TRANSPOSED, tf.identity),
    "from_the_left": (lambda w: tf.matmul(w, random(2, 4, 3)), (5, 4), (-2,), lambda s: s[:, None]),
    "from_the_left_transposed": (
        lambda w: tf.matmul(w, random(2, 4, 3), transpose_a=True),
        (4, 5),
        (-1,),
        lambda s: s[:, None],
    ),
    "BatchMatMul": (lambda w: tf.matmul(random(2, 3, 5, 4), w), (3, 4, 6), (-3, -1), lambda s: s[:, None, :]),
    "Einsum_batch": (
        lambda w: tf.einsum("beti,eio->beto", random(2, 3, 5, 4), w),
        (3, 4, 6),
        (-3, -1),
        lambda s: s[:, None, :],
    ),
    "Einsum_heads": (lambda w: tf.einsum("btd,dhe->bthe", random(2, 5, 8), w), (8, 2, 4), (-2, -1), tf.identity),
    "Einsum_output": (lambda w: tf.einsum("bqhe,hed->bqd", random(2, 5, 2, 4), w), (2, 4, 8), LAST, tf.identity),
    "Gather": (lambda w: tf.gather(w, IDS), (5, 4), ROWS, lambda s: tf.gather(s, IDS)[..., None]),
}


@pytest.mark.parametrize("case", LINEAR)
def test_channels_are_what_a_scale_can_be_taken_out_of(case: str) -> None:
    """A scale by channel of the weight is a scale of the result, which is why an integer kernel can have one."""
    op, shape, axes, spread = LINEAR[case]
    weight = random(*shape)
    kept = [size if axis - len(shape) in axes else 1 for axis, size in enumerate(shape)]
    scale = tf.constant(np.random.default_rng(1).uniform(0.5, 2, kept), tf.float32)
    by_channel = tf.reshape(
        scale, [size for size, axis in zip(shape, range(-len(shape), 0), strict=True) if axis in axes]
    )
    np.testing.assert_allclose(op(weight * scale), op(weight) * spread(by_channel), rtol=1e-4, atol=1e-5)

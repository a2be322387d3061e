"""Models that test a structure, not a form of batch norm."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from google.protobuf import text_format
from tensorflow.core.protobuf import saved_model_pb2

from tests.models import Net, export_keras, perturb, save_keras, save_module
from tests.models.forms import EPSILON, IMAGE, Form, Variables, fused, library, save
from tests.models.v1 import Options, by_hand, draw, layers, net, save_v1, settings, v1, variables, write

X = tf.TensorSpec((None, *IMAGE), name="x")


class Wrapped(tf.Module):
    """One layer inside whatever `inside` puts around it."""

    def __init__(self, inside: Callable[[Wrapped, tf.Tensor], tf.Tensor]) -> None:
        super().__init__(name="wrapped")
        self.layer = Variables(6)
        rng = np.random.default_rng(7)
        self.mix = tf.Variable(rng.normal(0, 0.6, (6, 6)).astype("float32"), name="mix")
        self.serve = tf.function(lambda x: inside(self, tf.matmul(x, self.mix)), input_signature=[X])

    def norm(self, x: tf.Tensor) -> tf.Tensor:
        return fused("FusedBatchNormV3")(x, self.layer, False)


def _nested(depth: int) -> Callable[[Wrapped, tf.Tensor], tf.Tensor]:
    def inside(m: Wrapped, x: tf.Tensor) -> tf.Tensor:
        function: Any = tf.function(m.norm)
        for _ in range(depth):
            inner = function
            function = tf.function(lambda x, inner=inner: inner(x) * 1.0)
        return function(x)

    return inside


def _if(m: Wrapped, x: tf.Tensor) -> tf.Tensor:
    return tf.cond(tf.reduce_sum(x) > -1e9, lambda: m.norm(x), lambda: m.norm(2.0 * x))


def _case(m: Wrapped, x: tf.Tensor) -> tf.Tensor:
    index = tf.cast(tf.reduce_sum(x) < -1e9, tf.int32)
    return tf.switch_case(index, [lambda: m.norm(x), lambda: m.norm(2.0 * x)])


def _while(m: Wrapped, x: tf.Tensor) -> tf.Tensor:
    return tf.while_loop(
        lambda i, _: i < 2,
        lambda i, y: (i + 1, tf.nn.relu(m.norm(y))),
        (0, x),
        shape_invariants=(tf.TensorShape([]), x.shape),
    )[1]


def _as_arguments(m: Wrapped, x: tf.Tensor) -> tf.Tensor:
    """Call a function that takes gamma and beta as tensors, which the caller reads."""

    @tf.function
    def norm(x: tf.Tensor, gamma: tf.Tensor, beta: tf.Tensor) -> tf.Tensor:
        mean, variance = m.layer.moving_mean, m.layer.moving_variance
        return tf.raw_ops.FusedBatchNormV3(
            x=x, scale=gamma, offset=beta, mean=mean, variance=variance, epsilon=EPSILON, is_training=False
        )[0]

    return norm(x, tf.identity(m.layer.gamma), tf.identity(m.layer.beta))


def _map(f: Callable[[tf.Tensor], tf.Tensor], x: tf.Tensor, dtype: Any, shape: Any) -> tf.Tensor:
    concrete = tf.function(f).get_concrete_function(tf.TensorSpec(x.shape[1:]))
    (mapped,) = tf.raw_ops.MapDefun(
        arguments=[x], captured_inputs=[], output_types=[dtype], output_shapes=[tf.TensorShape(shape)], f=concrete
    )
    return mapped


def _mapped(m: Wrapped, x: tf.Tensor) -> dict[str, tf.Tensor]:
    """An op refers to a function by an attribute, besides the batch norm."""
    y = m.norm(x)
    return {"y": y, "largest": _map(lambda v: tf.argmax(tf.reduce_sum(v, [0, 1])), y, tf.int64, [])}


def _mapped_batch_norm(m: Wrapped, x: tf.Tensor) -> dict[str, tf.Tensor]:
    """An op refers to a function that holds the batch norm."""

    def largest(v: tf.Tensor) -> tf.Tensor:
        vector = tf.constant([0.5, 0.6, 0.7, 0.8, 0.9, 1.1])
        common = {"scale": vector, "offset": vector, "mean": vector, "variance": vector}
        return tf.argmax(
            tf.reduce_sum(tf.raw_ops.FusedBatchNormV3(x=v[None], is_training=False, **common)[0], [0, 1, 2])
        )

    y = m.norm(x)
    return {"y": y, "largest": _map(largest, y, tf.int64, [])}


def _tensor_names(m: Wrapped, x: tf.Tensor) -> dict[str, tf.Tensor]:
    """Outputs with tensors' names as keys."""
    y = m.norm(x)
    return {"dense/Softmax:0": tf.nn.softmax(y), "dense/Softmax:1": y}


class Inputs(tf.Module):
    """Several inputs, in a dict, one of them text that a table looks up."""

    def __init__(self, folder: Path) -> None:
        super().__init__(name="inputs")
        self.layer = Variables(6)
        words = folder / "words.txt"
        words.write_text("0\n1\n2\n", encoding="utf-8")
        initializer = tf.lookup.TextFileInitializer(
            str(words), tf.string, tf.lookup.TextFileIndex.WHOLE_LINE, tf.int64, tf.lookup.TextFileIndex.LINE_NUMBER
        )
        self.table = tf.lookup.StaticHashTable(initializer, -1)
        self.scale = tf.Variable([0.5, 1.0, 2.0], name="scale")

    @tf.function(
        input_signature=[
            {"word": tf.TensorSpec((None,), tf.string, name="word"), "x": X},
            tf.TensorSpec((None,), tf.int32, name="count"),
        ]
    )
    def serve(self, features: dict[str, tf.Tensor], count: tf.Tensor) -> dict[str, tf.Tensor]:
        factors = tf.gather(self.scale, tf.maximum(self.table.lookup(features["word"]), 0))
        y = fused("FusedBatchNormV3")(features["x"], self.layer, False)
        return {"y": y * factors[:, None, None, None], "count": count + 1}


def _inputs(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    module = Inputs(path.parent)
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve})
    (path.parent / "words.txt").unlink()
    return path


def _no_signature(path: Path) -> Path:
    module = tf.Module()
    module.net = Net()
    module.__call__ = module.net.serve
    tf.saved_model.save(module, str(path))
    return path


def _as_text(path: Path) -> Path:
    save_module(Net(), path)
    proto = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    (path / "saved_model.pbtxt").write_text(text_format.MessageToString(proto), encoding="utf-8")
    (path / "saved_model.pb").unlink()
    return path


def _sharded(path: Path) -> Path:
    """The checkpoint in one file for each variable."""
    save_module(Net(), path)
    prefix = path / "variables" / "variables"
    reader = tf.train.load_checkpoint(str(prefix))
    parts: list[str] = []
    for key in sorted(reader.get_variable_to_shape_map()):
        parts.append(str(path / "parts" / str(len(parts)) / "part"))
        Path(parts[-1]).parent.mkdir(parents=True)
        tf.raw_ops.SaveV2(prefix=parts[-1], tensor_names=[key], shape_and_slices=[""], tensors=[reader.get_tensor(key)])
    for file in (path / "variables").iterdir():
        file.unlink()
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(prefix), delete_old_dirs=True)
    shutil.rmtree(path / "parts")
    return path


def _frozen(path: Path) -> Path:
    """Every variable a constant, as converters make it."""
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    net = Net()
    module = tf.Module()
    module.serve = convert_variables_to_constants_v2(net.serve.get_concrete_function())
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve})
    return path


def _frozen_v1(path: Path) -> Path:
    options = Options(training=False)
    with settings(options):
        _, logits = net(by_hand, training=False, options=options)
        tf.identity(logits, name="logits")
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            draw(session)
            graph_def = v1.graph_util.convert_variables_to_constants(session, session.graph_def, ["logits"])
    with tf.Graph().as_default() as graph, v1.Session() as session:
        tf.import_graph_def(graph_def, name="")
        tensors = {n: graph.get_tensor_by_name(f"{n}:0") for n in ("x", "logits")}
        signature = v1.saved_model.predict_signature_def({"x": tensors["x"]}, {"logits": tensors["logits"]})
        builder = v1.saved_model.Builder(str(path))
        builder.add_meta_graph_and_variables(session, ["serve"], {"serving_default": signature})
        builder.save()
    return path


def _meta_graphs(path: Path) -> Path:
    """One for training, one for serving, with one checkpoint."""
    builder = v1.saved_model.Builder(str(path))
    for tags, training in ((["train"], True), (["serve"], False)):
        options = Options(training=training, train_op=training)
        with settings(options):
            x, logits = net(by_hand, training, options)
            signature = v1.saved_model.predict_signature_def({"x": x}, {"logits": tf.identity(logits)})
            with v1.Session() as session:
                session.run(v1.global_variables_initializer())
                draw(session)
                if training:
                    builder.add_meta_graph_and_variables(session, tags, {"serving_default": signature})
                else:
                    builder.add_meta_graph(tags, {"serving_default": signature})
    builder.save()
    return path


def _function_op(path: Path) -> Path:
    """A function is used as an op, as TensorFlow 1's Defun does."""
    from tensorflow.python.framework import function

    @function.Defun(*[tf.float32] * 5, func_name="normalise")
    def normalise(x: Any, gamma: Any, beta: Any, mean: Any, variance: Any) -> Any:
        return tf.raw_ops.FusedBatchNormV3(
            x=x, scale=gamma, offset=beta, mean=mean, variance=variance, epsilon=EPSILON, is_training=False
        )[0]

    def norm(x: Any, _: Any) -> Any:
        gamma, beta, mean, variance = variables(x.shape[-1])
        return tf.ensure_shape(normalise(x, gamma, beta, mean, variance), x.shape)

    return save_v1(path, norm, training=False)


def _v1_tensor_names(path: Path) -> Path:
    """A signature whose keys are the tensors' names, as a recipe for Keras on TensorFlow 1 has them."""
    with settings(Options()):
        training = v1.placeholder(tf.bool, [], name="is_training")
        x, logits = net(layers(fused=True), training, Options())
        with v1.variable_scope("dense"):
            y = tf.nn.softmax(logits, name="Softmax")
        return write(path, {t.name: t for t in (x, training)}, {y.name: y})


def _keras_layer_norm(path: Path) -> Path:
    """Keras 2 writes layer normalisation with the fused op, in training mode, without moving averages."""
    import tf_keras

    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(0)
    layers = tf_keras.layers
    stack = [layers.Input((8, 8, 3)), layers.BatchNormalization(momentum=0.9), layers.LayerNormalization()]
    model = tf_keras.Sequential([*stack, layers.Dropout(0.5), layers.Flatten(), layers.Dense(4)])
    perturb(model.weights)
    return save_keras(model, path)


def _keras_two_axes(path: Path) -> Path:
    """Statistics of two axes, in variables that are no vectors."""
    import tf_keras

    tf_keras.backend.clear_session()
    tf_keras.utils.set_random_seed(0)
    layers = tf_keras.layers
    model = tf_keras.Sequential([layers.Input((4, 5, 8)), layers.BatchNormalization(axis=[1, 3]), layers.Flatten()])
    perturb(model.weights)
    return export_keras(model, path)


def _keras3(path: Path) -> Path:
    """An export of Keras 3: batch norm in single ops, inference only."""
    import contextlib
    import io

    import keras

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Input((8, 8, 3)),
            keras.layers.Conv2D(6, 3),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            keras.layers.Dense(4),
            keras.layers.BatchNormalization(),
        ]
    )
    perturb(model.weights)
    with contextlib.redirect_stdout(io.StringIO()):
        model.export(str(path), verbose=False)
    return path


STRUCTURES: dict[str, Callable[[Path], Path]] = {
    "nested": lambda p: save(Wrapped(_nested(6)), p),
    "if": lambda p: save(Wrapped(_if), p),
    "case": lambda p: save(Wrapped(_case), p),
    "while": lambda p: save(Wrapped(_while), p),
    "arguments": lambda p: save(Wrapped(_as_arguments), p),
    "mapped": lambda p: save(Wrapped(_mapped), p),
    "mapped_batch_norm": lambda p: save(Wrapped(_mapped_batch_norm), p),
    "tensor_names": lambda p: save(Wrapped(_tensor_names), p),
    "v1_tensor_names": _v1_tensor_names,
    "function_op": _function_op,
    "inputs": _inputs,
    "no_signature": _no_signature,
    "as_text": _as_text,
    "sharded": _sharded,
    "meta_graphs": _meta_graphs,
    "frozen": _frozen,
    "frozen_v1": _frozen_v1,
    "keras3": _keras3,
    "keras_layer_norm": _keras_layer_norm,
    "keras_two_axes": _keras_two_axes,
    "two_layers_of_vectors": lambda p: save(Form(library, (6,), train=True), p),
}

"""A net in TensorFlow 1's format with hand-written batch norms or the library's layer, and its steps.

The two hand-written functions are those that bnqat was begun for: mean and variance chosen by a `tf.cond` each, and two
fused kernels with a `tf.cond` on their outputs. Both move their averages by `assign` in the collection `UPDATE_OPS`.
The net is the first half of MobileNet, with 13 batch norms.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

import bnqat
from tests.models.v1 import DECAY, EPSILON, Norm, Options, draw, layers, settings, variables

v1 = tf.compat.v1

SIZE = (96, 96, 3)
CHANNELS = (64, 128, 128, 256, 256, 512)
STRIDES = (1, 2, 1, 2, 1, 2)
"""Of MobileNet's first blocks, each a depthwise and a pointwise convolution, behind a convolution of 32 channels."""
STEP = "step"
"""A signature of sources for `tf.saved_model.load`, in which the averages move; V1 code runs the collection itself."""


def two_conds(x: tf.Tensor, training: Any) -> tf.Tensor:
    """Batch norm with one `tf.cond` each for mean and variance; momentum and epsilon are tensors."""
    gamma, beta, moving_mean, moving_variance = variables(x.shape[-1])
    momentum, epsilon = tf.constant(DECAY), tf.constant(EPSILON)
    batch_mean, batch_variance = tf.nn.moments(x, [0, 1, 2])
    _move(moving_mean, batch_mean, momentum)
    _move(moving_variance, batch_variance, momentum)
    mean = v1.cond(training, lambda: batch_mean, lambda: moving_mean)
    variance = v1.cond(training, lambda: batch_variance, lambda: moving_variance)
    inv = tf.math.rsqrt(variance + epsilon) * gamma
    return x * inv - mean * inv + beta


def two_kernels(x: tf.Tensor, training: Any) -> tf.Tensor:
    """Batch norm with a fused kernel for each mode, and a `tf.cond` on their outputs."""
    gamma, beta, moving_mean, moving_variance = variables(x.shape[-1])
    fused = v1.nn.fused_batch_norm
    trained, batch_mean, batch_variance = fused(x, gamma, beta, epsilon=EPSILON, is_training=True)
    inferred, _, _ = fused(x, gamma, beta, moving_mean, moving_variance, epsilon=EPSILON, is_training=False)
    momentum = tf.constant(DECAY)
    _move(moving_mean, batch_mean, momentum)
    _move(moving_variance, batch_variance, momentum)
    return v1.cond(training, lambda: trained, lambda: inferred)


def _move(average: Any, batch: tf.Tensor, momentum: tf.Tensor) -> None:
    v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, average.assign(average * momentum + batch * (1 - momentum)))


FIXED = "training"
"""A model beside the library's, without conditionals: its mode is training for good."""

NORMS: Mapping[str, Norm] = {"two conds": two_conds, "two kernels": two_kernels, "library": layers(fused=True)}


def save(path: Path, norm: Norm, references: bool, stepping: bool = False, training: Any = None) -> None:
    """Write the net.

    Args:
        path: a directory to write to.
        norm: a batch norm of x and a mode.
        references: have reference variables, not resources.
        stepping: add the signature `STEP`.
        training: the mode, a Python bool; if not given, it is a placeholder with the default False.
    """
    with settings(Options(references=references)):
        v1.set_random_seed(0)
        x = v1.placeholder(tf.float32, [None, *SIZE], name="x")
        mode = v1.placeholder_with_default(False if training is None else training, [], name="is_training")
        logits = tf.identity(_net(x, norm, mode if training is None else training), name="logits")
        outputs = {"serving_default": logits}
        if stepping:
            with tf.control_dependencies(v1.get_collection(v1.GraphKeys.UPDATE_OPS)):
                outputs[STEP] = tf.identity(logits)
        signatures = {
            name: v1.saved_model.predict_signature_def({"x": x, "is_training": mode}, {"logits": value})
            for name, value in outputs.items()
        }
        with v1.Session() as session:
            session.run(v1.global_variables_initializer())
            draw(session)
            builder = v1.saved_model.Builder(str(path))
            builder.add_meta_graph_and_variables(session, ["serve"], signatures, clear_devices=True)
            builder.save()


def _net(x: tf.Tensor, norm: Norm, training: Any) -> tf.Tensor:
    def filters(name: str, *shape: int) -> Any:
        return v1.get_variable(name, shape, initializer=v1.glorot_uniform_initializer(seed=1))

    def normalised(y: tf.Tensor) -> tf.Tensor:
        with v1.variable_scope(None, "norm"):
            return tf.nn.relu6(norm(y, training))

    y = normalised(tf.nn.conv2d(x, filters("first", 3, 3, 3, 32), 2, "SAME"))
    for number, (channels, stride) in enumerate(zip(CHANNELS, STRIDES, strict=True)):
        depthwise = filters(f"depthwise_{number}", 3, 3, y.shape[-1], 1)
        y = normalised(tf.nn.depthwise_conv2d(y, depthwise, [1, stride, stride, 1], "SAME"))
        y = normalised(tf.nn.conv2d(y, filters(f"pointwise_{number}", 1, 1, y.shape[-1], channels), 1, "SAME"))
    return tf.matmul(tf.reduce_mean(y, [1, 2]), filters("dense", y.shape[-1], 10))


class Row(NamedTuple):
    """A row of the table: a batch norm of `NORMS`, as it is or rewritten, with quantisers on."""

    norm: str
    rewritten: bool


ROWS: Mapping[str, Row] = {
    "library": Row("library", rewritten=False),
    "library again": Row("library", rewritten=False),
    **{f"{name}{', rewritten' * made}": Row(name, bool(made)) for name in NORMS for made in (0, 1)},
}
"""Rows by name; the first is the base of the comparison."""


def prepared(references: bool, names: Iterable[str], folder: Path) -> dict[str, Path]:
    """Write the models, each to a directory of its own."""
    paths = {}
    for name in names:
        norm, rewritten = ROWS[name]
        paths[name] = folder / name
        if rewritten:
            save(folder / f"{name} from", NORMS[norm], references)
            bnqat.rewrite(folder / f"{name} from", paths[name])
        else:
            save(paths[name], NORMS[norm], references, stepping=True)
            if norm == "library":  # its conditionals cannot be differentiated once loaded: see `Loaded`
                save(paths[name] / FIXED, NORMS[norm], references, stepping=True, training=True)
    return paths


class Timed:
    """Steps by kind, ``training`` and ``inference``; one is absent where TensorFlow cannot make it."""

    steps: dict[str, Callable[[], object]]

    def __call__(self, kind: str) -> float:
        """Seconds of one step."""
        start = time.perf_counter()
        self.steps[kind]()
        return time.perf_counter() - start


class InSession(Timed):
    """A model in a V1 session: gradient descent on the loaded variables, and updates of the moving averages.

    The optimizer uses the gradients, as a session computes no gradient that nothing uses.
    """

    def __init__(self, path: Path, x: np.ndarray) -> None:
        graph = tf.Graph()
        with graph.as_default():
            self.session = v1.Session()
            meta = v1.saved_model.load(self.session, ["serve"], str(path))
            served = meta.signature_def["serving_default"]
            trained = meta.signature_def.get("train")
            signature = served if trained is None else trained
            loss = tf.reduce_sum(graph.get_tensor_by_name(signature.outputs["logits"].name) ** 2)
            weights = [v for v in v1.trainable_variables() if not v.name.startswith("quantization/")]
            # The collection is the source's; what was rewritten moves its averages in the signature `train`.
            updates = v1.get_collection(v1.GraphKeys.UPDATE_OPS) if trained is None else []
            descent = v1.train.GradientDescentOptimizer(1e-9).minimize(loss, var_list=weights)
            step = tf.group(descent, *updates)
        training = {signature.inputs["x"].name: x, signature.inputs["is_training"].name: True}
        logits, inference = served.outputs["logits"].name, {served.inputs["x"].name: x}
        self.steps = {
            "training": lambda: self.session.run(step, training),
            "inference": lambda: self.session.run(logits, inference),
        }


class Loaded(Timed):
    """A model as `tf.saved_model.load` gives it: gradients of a tape, without an optimizer.

    TensorFlow 2 neither lists nor differentiates references, and differentiates no loaded `tf.cond` of TensorFlow 1
    that reads a resource. So sources with these have no training step, but the library's, which is `FIXED`.
    """

    def __init__(self, path: Path, images: np.ndarray) -> None:
        served = tf.saved_model.load(str(path))
        trained = tf.saved_model.load(str(path / FIXED)) if (path / FIXED).exists() else served
        self.held = served, trained
        step = trained.signatures["train" if "train" in trained.signatures else STEP]
        serve, x = served.signatures["serving_default"], tf.constant(images)
        weights = [v for v in trained.variables if v.trainable and not v.name.startswith("quantization/")]

        @tf.function
        def training() -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(step(x=x, is_training=tf.constant(True))["logits"] ** 2)
            return tape.gradient(loss, weights)

        @tf.function
        def inference() -> Any:
            return serve(x=x, is_training=tf.constant(False))

        self.steps = {"inference": inference}
        with suppress(TypeError):
            if weights:
                training()
                self.steps["training"] = training


WAYS: Mapping[str, type[InSession] | type[Loaded]] = {"V1 session": InSession, "tf.saved_model.load": Loaded}
"""Ways to run a model."""

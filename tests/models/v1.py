"""Models as TensorFlow 1 wrote them: a graph with collections and a saver, no object graph."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

v1 = tf.compat.v1

EPSILON = 1e-3
DECAY = 0.9

Norm = Callable[[tf.Tensor, Any], tf.Tensor]
"""A batch norm of x in a mode: a Python bool or a boolean tensor."""


def variables(channels: int) -> tuple[Any, Any, Any, Any]:
    ones, zeros = v1.ones_initializer(), v1.zeros_initializer()
    return (
        v1.get_variable("gamma", [channels], initializer=ones),
        v1.get_variable("beta", [channels], initializer=zeros),
        v1.get_variable("moving_mean", [channels], initializer=zeros, trainable=False),
        v1.get_variable("moving_variance", [channels], initializer=ones, trainable=False),
    )


def _choose(training: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    if isinstance(training, bool):
        return then() if training else otherwise()
    return v1.cond(training, then, otherwise)


def _update(variable: Any, batch: tf.Tensor) -> None:
    update = v1.assign(variable, DECAY * variable + (1 - DECAY) * batch)
    v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, update)


def by_hand(x: tf.Tensor, training: Any) -> tf.Tensor:
    """A batch norm as engineers write it, so that any op can be put on its variables; mean and variance are chosen."""
    gamma, beta, moving_mean, moving_variance = variables(x.shape[-1])
    if training is not False:
        batch_mean, batch_variance = tf.nn.moments(x, list(range(x.shape.rank - 1)))
        _update(moving_mean, batch_mean)
        _update(moving_variance, batch_variance)
        mean, variance = _choose(
            training,
            lambda: (batch_mean, batch_variance),
            lambda: (tf.identity(moving_mean), tf.identity(moving_variance)),
        )
    else:
        mean, variance = moving_mean, moving_variance
    inv = tf.math.rsqrt(variance + EPSILON) * gamma
    return (x * inv) - (mean * inv) + beta


def two_fused(x: tf.Tensor, training: Any) -> tf.Tensor:
    """One fused op for each mode, and a choice between the outputs."""
    if training is False:
        gamma, beta, *moving = variables(x.shape[-1])
        y: tf.Tensor = v1.nn.fused_batch_norm(x, gamma, beta, *moving, epsilon=EPSILON, is_training=False)[0]
        return y
    trained, inferred = _two_fused(x)
    return _choose(training, lambda: tf.identity(trained), lambda: tf.identity(inferred))


def selected(x: tf.Tensor, training: Any) -> tf.Tensor:
    """Mean and variance are chosen by `tf.where`."""
    gamma, beta, moving_mean, moving_variance = variables(x.shape[-1])
    batch = tf.nn.moments(x, list(range(x.shape.rank - 1)))
    moving = (moving_mean, moving_variance)
    for variable, statistic in zip(moving, batch, strict=True):
        _update(variable, statistic)
    mean, variance = (tf.where(training, b, m) for b, m in zip(batch, moving, strict=True))
    inv = tf.math.rsqrt(variance + EPSILON) * gamma
    return (x * inv) - (mean * inv) + beta


def two_fused_selected(x: tf.Tensor, training: Any) -> tf.Tensor:
    """One fused op for each mode, and `tf.where` between the outputs."""
    trained, inferred = _two_fused(x)
    return tf.where(training, trained, inferred)


def _two_fused(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the outputs of a fused op for training, whose statistics are averaged, and of one for inference."""
    gamma, beta, moving_mean, moving_variance = variables(x.shape[-1])
    trained, mean, variance = v1.nn.fused_batch_norm(x, gamma, beta, epsilon=EPSILON, is_training=True)
    _update(moving_mean, mean)
    _update(moving_variance, variance)
    moving = {"mean": moving_mean, "variance": moving_variance}
    inferred, *_ = v1.nn.fused_batch_norm(x, gamma, beta, **moving, epsilon=EPSILON, is_training=False)
    return trained, inferred


def two_fused_waiting(x: tf.Tensor, training: Any) -> tf.Tensor:
    """One fused op for each mode, a choice between the outputs, and updates that the chosen one waits for."""
    gamma, beta, moving_mean, moving_variance = variables(x.shape[-1])
    trained, *batch = v1.nn.fused_batch_norm(x, gamma, beta, epsilon=EPSILON, is_training=True)
    moving = (moving_mean, moving_variance)
    inferred, *_ = v1.nn.fused_batch_norm(x, gamma, beta, *moving, epsilon=EPSILON, is_training=False)
    y = _choose(training, lambda: tf.identity(trained), lambda: tf.identity(inferred))
    updates = [v1.assign(m, DECAY * m + (1 - DECAY) * b) for m, b in zip(moving, batch, strict=True)]
    with tf.control_dependencies(updates):
        return tf.identity(y)


def updated_first(x: tf.Tensor, training: Any) -> tf.Tensor:
    """Updates as control dependencies of the output, in the branch for training."""
    gamma, beta, moving_mean, moving_variance = variables(x.shape[-1])

    def train() -> Any:
        mean, variance = tf.nn.moments(x, list(range(x.shape.rank - 1)))
        updates = [
            v1.assign_sub(moving_mean, (moving_mean - mean) * (1 - DECAY)),
            v1.assign_sub(moving_variance, (moving_variance - variance) * (1 - DECAY)),
        ]
        with tf.control_dependencies(updates):
            return tf.identity(mean), tf.identity(variance)

    mean, variance = _choose(training, train, lambda: (tf.identity(moving_mean), tf.identity(moving_variance)))
    return v1.nn.batch_normalization(x, mean, variance, beta, gamma, EPSILON)


def layers(fused: bool, scale: bool = True, center: bool = True) -> Norm:
    """``tf.compat.v1.layers.batch_normalization``, which lives in tf_keras now."""

    def norm(x: tf.Tensor, training: Any) -> tf.Tensor:
        from tf_keras.src.legacy_tf_layers import normalization

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that it is old
            return normalization.batch_normalization(
                x, momentum=DECAY, epsilon=EPSILON, training=training, fused=fused, scale=scale, center=center
            )

    return norm


@dataclass(frozen=True)
class Options:
    """Options for writing a model.

    Attributes:
        references: reference variables (``VariableV2``) in place of resources.
        control_flow_v2: ``If`` in place of Switch and Merge.
        training: the mode: a Python bool, "placeholder", or "default" for a placeholder with default False.
        train_op: true if the graph holds a loss, gradients and an optimizer.
        adam: true if the optimizer is Adam, whose slots are assigned in single ops, and not momentum.
        loop: true if the second batch norm lies in a while loop of two rounds.
    """

    references: bool = False
    control_flow_v2: bool = False
    training: bool | str = "default"
    train_op: bool = False
    adam: bool = False
    loop: bool = False


@contextlib.contextmanager
def settings(options: Options) -> Iterator[None]:
    resources, v2 = v1.resource_variables_enabled(), v1.control_flow_v2_enabled()
    (v1.disable_resource_variables if options.references else v1.enable_resource_variables)()
    (v1.enable_control_flow_v2 if options.control_flow_v2 else v1.disable_control_flow_v2)()
    try:
        with tf.Graph().as_default():
            yield
    finally:
        (v1.enable_resource_variables if resources else v1.disable_resource_variables)()
        (v1.enable_control_flow_v2 if v2 else v1.disable_control_flow_v2)()


def _mode(training: bool | str) -> Any:
    if isinstance(training, bool):
        return training
    if training == "placeholder":
        return v1.placeholder(tf.bool, [], name="is_training")
    return v1.placeholder_with_default(False, [], name="is_training")


def net(norm: Norm, training: Any, options: Options) -> tuple[tf.Tensor, tf.Tensor]:
    x = v1.placeholder(tf.float32, [None, 8, 8, 3], name="x")
    kernels = [
        v1.get_variable(f"kernel_{i}", shape, initializer=v1.glorot_uniform_initializer(seed=i))
        for i, shape in enumerate([(3, 3, 3, 8), (3, 3, 8, 8), (8, 5)])
    ]
    with v1.variable_scope("norm_0"):
        y = tf.nn.relu(norm(tf.nn.conv2d(x, kernels[0], 1, "SAME"), training))
    if options.loop:
        with v1.variable_scope("norm_1"):
            _, y = v1.while_loop(
                lambda i, _: i < 2,
                lambda i, y: (i + 1, tf.nn.relu(norm(tf.nn.conv2d(y, kernels[1], 1, "SAME"), training))),
                (tf.constant(0), y),
                shape_invariants=(tf.TensorShape([]), y.shape),
            )
    else:
        with v1.variable_scope("norm_1"):
            y = tf.nn.relu(norm(tf.nn.conv2d(y, kernels[1], 1, "SAME"), training))
    return x, tf.matmul(tf.reduce_mean(y, [1, 2]), kernels[2])


def _train_op(logits: tf.Tensor, adam: bool) -> None:
    """Add a loss and an optimizer, and put the optimizer's op into the collection of train ops."""
    labels = v1.placeholder(tf.int32, [None], name="labels")
    loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels=labels, logits=logits), name="loss")
    with tf.control_dependencies(v1.get_collection(v1.GraphKeys.UPDATE_OPS)):
        optimizer = v1.train.AdamOptimizer(0.05) if adam else v1.train.MomentumOptimizer(0.05, 0.9)
        optimizer.minimize(loss, v1.train.get_or_create_global_step())


def save_v1(path: Path, norm: Norm, **options: Any) -> Path:
    """Write a net of two batch norms; tensors are named x, logits and, with a train op, labels and loss."""
    chosen = Options(**options)
    with settings(chosen):
        training = _mode(chosen.training)
        x, logits = net(norm, training, chosen)
        logits = tf.identity(logits, name="logits")
        if chosen.train_op:
            _train_op(logits, chosen.adam)
        inputs = {"x": x} if chosen.training != "placeholder" else {"x": x, "is_training": training}
        write(path, inputs, {"logits": logits})
    return path


def write(path: Path, inputs: dict[str, Any], outputs: dict[str, Any], tags: tuple[str, ...] = ("serve",)) -> Path:
    """Save the default graph with its variables drawn at random."""
    signature = v1.saved_model.predict_signature_def(inputs, outputs)
    with v1.Session() as session:
        session.run(v1.global_variables_initializer())
        draw(session)
        builder = v1.saved_model.Builder(str(path))
        builder.add_meta_graph_and_variables(session, list(tags), {"serving_default": signature}, clear_devices=True)
        builder.save()
    return path


def draw(session: Any) -> None:
    """Give batch-norm variables values as training might have left them."""
    rng = np.random.default_rng(3)
    for variable in v1.global_variables():
        size = variable.shape.as_list()
        if "variance" in variable.name:
            variable.load(rng.uniform(0.3, 2.0, size), session)
        elif "gamma" in variable.name:
            variable.load(rng.uniform(0.5, 1.5, size) * rng.choice([-1, 1], size, p=[0.1, 0.9]), session)
        elif "beta" in variable.name or "mean" in variable.name:
            variable.load(rng.normal(0, 0.2, size), session)


V1_MODELS: dict[str, Callable[[Path], Path]] = {
    "v1_by_hand": lambda p: save_v1(p, by_hand, train_op=True),
    "v1_by_hand_references": lambda p: save_v1(p, by_hand, references=True, training="placeholder", train_op=True),
    "v1_by_hand_if": lambda p: save_v1(p, by_hand, control_flow_v2=True, train_op=True),
    "v1_by_hand_serving": lambda p: save_v1(p, by_hand, references=True, training=False),
    "v1_two_fused": lambda p: save_v1(p, two_fused, train_op=True),
    "v1_two_fused_references": lambda p: save_v1(p, two_fused, references=True, train_op=True),
    "v1_two_fused_if": lambda p: save_v1(p, two_fused, control_flow_v2=True, training="placeholder"),
    "v1_two_fused_serving": lambda p: save_v1(p, two_fused, training=False),
    "v1_two_fused_training": lambda p: save_v1(p, two_fused, training=True, train_op=True),
    "v1_updated_first": lambda p: save_v1(p, updated_first),
    "v1_updated_first_if": lambda p: save_v1(p, updated_first, control_flow_v2=True),
    "v1_layers_fused": lambda p: save_v1(p, layers(fused=True), train_op=True),
    "v1_layers_fused_references": lambda p: save_v1(p, layers(fused=True), references=True),
    "v1_layers_fused_if": lambda p: save_v1(p, layers(fused=True), control_flow_v2=True),
    "v1_layers_plain": lambda p: save_v1(p, layers(fused=False), train_op=True),
    "v1_layers_plain_references": lambda p: save_v1(p, layers(fused=False, scale=False), references=True),
    "v1_layers_plain_if": lambda p: save_v1(p, layers(fused=False), control_flow_v2=True, train_op=True, adam=True),
    "v1_layers_fused_adam": lambda p: save_v1(p, layers(fused=True), train_op=True, adam=True),
    "v1_loop_updates": lambda p: save_v1(p, updated_first, training=True, loop=True),
    "v1_loop": lambda p: save_v1(p, two_fused, training=False, loop=True),
    "v1_loop_by_hand": lambda p: save_v1(p, by_hand, training=False, loop=True, references=True),
}

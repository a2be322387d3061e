"""Nets of two batch norms of a form: TensorFlow 1 graphs, and modules with a `tf.function`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from tests.models.handwritten.form import Form
from tests.models.handwritten.norm import MOMENTUM, HandWritten, Layer, v1
from tests.models.v1 import Options, settings

CHANNELS = 4
STATISTICS = ("moving_mean", "moving_variance")
SIZES = {2: (24,), 3: (8, 3), 4: (6, 2, 3), 5: (4, 2, 2, 2)}
"""Batch and places, by rank."""


def dtypes(form: Form) -> tuple[Any, Any]:
    """The dtypes of x and of the batch norms' variables."""
    x = tf.as_dtype({"half": "float16"}.get(form.dtype, form.dtype))
    return x, tf.float64 if x == tf.float64 else tf.float32


def batch(form: Form, index: int) -> np.ndarray:
    """Return an input batch."""
    rng = np.random.default_rng([index, 11])
    values: np.ndarray = rng.normal(0.3, 1.5, (*SIZES[form.rank], CHANNELS)).astype(dtypes(form)[0].as_numpy_dtype)
    return values


def initial(role: str, layer: int) -> np.ndarray:
    """Return a variable's value as training might have left it."""
    rng = np.random.default_rng([["gamma", "beta", *STATISTICS, "mix"].index(role), layer])
    if role == "mix":
        return rng.normal(0, 0.6, (CHANNELS, CHANNELS))
    if role in ("gamma", "moving_variance"):
        return rng.uniform(0.5, 1.5, CHANNELS)
    return rng.normal(0, 0.2, CHANNELS)


def roles(form: Form) -> list[str]:
    """Return the roles of the variables that exist before the batch norm is computed."""
    parameters = [role for role, there in (("gamma", form.scale), ("beta", form.center)) if there]
    return parameters if form.updates == "ema" else [*parameters, *STATISTICS]


def net(
    form: Form, x: tf.Tensor, layers: Sequence[tuple[Any, Layer]], training: Any, momentum: Any
) -> tuple[tf.Tensor, list[Any]]:
    """Apply layers of a product and a batch norm; return the output, and the updates that the caller has to run."""
    updates: list[Any] = []
    for index, (mix, layer) in enumerate(layers):
        if index:
            x = tf.tanh(x)  # smooth, so that rounding does not change which gradients are zero
        x = tf.ensure_shape(tf.tensordot(x, tf.convert_to_tensor(mix), 1), [None, *SIZES[form.rank][1:], CHANNELS])
        with tf.name_scope(f"norm_{index}"):
            x, layer_updates = HandWritten(form, x, layer, training, momentum)()
        updates += layer_updates
    return x, updates


def assign(session: Any, values: Sequence[tuple[Any, np.ndarray]]) -> None:
    """Give variables values as their `load` does, but all in one run: each set of fetches is compiled."""
    session.run([v.initializer for v, _ in values], {v.initializer.inputs[1]: value for v, value in values})


@dataclass
class GraphNet:
    """A net in the default graph.

    Attributes:
        inputs: placeholders of the signature, by name.
        fed: placeholders beside them that training needs.
        updates: collected ops.
        averages: names of moving statistics.
        start: variables and their initial values.
    """

    form: Form
    inputs: Mapping[str, tf.Tensor]
    fed: Mapping[str, tf.Tensor]
    y: tf.Tensor
    updates: list[Any]
    averages: list[str]
    start: list[tuple[Any, np.ndarray]]

    def begin(self, session: Any) -> None:
        """Give all variables their initial values."""
        session.run(v1.global_variables_initializer())
        assign(session, [(v, value.astype(v.dtype.base_dtype.as_numpy_dtype)) for v, value in self.start])


@contextmanager
def graph_net(form: Form) -> Iterator[GraphNet]:
    """Build a net in a graph of its own."""
    with settings(Options(references=form.storage == "reference", control_flow_v2=form.control_flow == 2)):
        dtype, own_dtype = dtypes(form)
        x = v1.placeholder(dtype, [None, *SIZES[form.rank][1:], CHANNELS], name="x")
        inputs: dict[str, tf.Tensor] = {"x": x}
        fed: dict[str, tf.Tensor] = {}
        training, momentum = graph_mode(form), graph_momentum(form)
        if form.mode in ("placeholder", "default"):
            (inputs if form.mode == "placeholder" else fed)["is_training"] = training
        start: list[tuple[Any, np.ndarray]] = []

        def variable(name: str, role: str, index: int, dtype: Any) -> Any:
            shape = initial(role, index).shape
            new_variable = v1.get_variable(name, shape, dtype, v1.zeros_initializer(), trainable="moving" not in role)
            start.append((new_variable, initial(role, index)))
            return new_variable

        mixes = [variable(f"mix_{i}", "mix", i, dtype) for i in range(2)]
        layers = [
            Layer(**{role: variable(f"norm_{i}/{role}", role, i, own_dtype) for role in roles(form)})
            for i in range(1 if form.shared else 2)
        ]
        pairs = list(zip(mixes, [layers[0], layers[-1]], strict=True))
        y, updates = net(form, x, pairs, training, momentum)
        for update in updates:
            v1.add_to_collection(v1.GraphKeys.UPDATE_OPS, update)
        averages = []
        for index, layer in enumerate(layers):
            for role in STATISTICS:
                average = getattr(layer, role)
                averages.append(average.op.name)
                if form.updates == "ema":
                    start.append((average, initial(role, index)))
        if form.momentum == "placeholder":
            served = form.placement != "collection" and (form.chooser, form.mode) != ("python", "false")
            (inputs if served else fed)["momentum"] = momentum
        yield GraphNet(form, inputs, fed, tf.identity(y, name="y"), updates, averages, start)


def graph_mode(form: Form) -> Any:
    """The mode: a Python bool or a boolean tensor of the default graph."""
    if not form.dynamic:
        value = form.mode == "true"
        return value if form.chooser == "python" else tf.constant(value, name="is_training")
    if form.mode == "variable":
        mode = v1.get_variable("is_training", [], tf.bool, v1.zeros_initializer(), trainable=False)
        return tf.identity(mode)
    if form.mode == "default":
        return v1.placeholder_with_default(False, [], name="is_training")
    return v1.placeholder(tf.bool, [], name="is_training")


def graph_momentum(form: Form) -> Any:
    """The momentum: a Python number or a scalar tensor of the default graph."""
    if form.momentum == "python":
        return MOMENTUM
    if form.momentum == "tensor":
        return tf.constant(MOMENTUM, name="momentum")
    if form.momentum == "default":
        return v1.placeholder_with_default(MOMENTUM, [], name="momentum")
    return v1.placeholder(tf.float32, [], name="momentum")


def save_graph(built: GraphNet, session: Any, path: Path) -> None:
    """Write a net with its initial values."""
    builder = v1.saved_model.Builder(str(path))
    signature = v1.saved_model.predict_signature_def(dict(built.inputs), {"y": built.y})
    builder.add_meta_graph_and_variables(session, ["serve"], {"serving_default": signature}, clear_devices=True)
    builder.save()


class Module(tf.Module):
    """A net in a `tf.function`; `train` beside it where the form is a Python bool's for training."""

    def __init__(self, form: Form) -> None:
        super().__init__(name="net")
        self.form = form
        dtype, own_dtype = dtypes(form)

        def variable(role: str, index: int, dtype: Any) -> tf.Variable:
            value = tf.cast(initial(role, index), dtype)
            return tf.Variable(value, trainable="moving" not in role, name=f"{role}_{index}")

        self.mixes = [variable("mix", i, dtype) for i in range(2)]
        count = 1 if form.shared else 2
        self.variables_of = [{role: variable(role, i, own_dtype) for role in roles(form)} for i in range(count)]
        self.biased = []
        if form.updates == "debiased":
            self.biased = [
                [
                    (
                        tf.Variable(tf.zeros([CHANNELS], own_dtype), trainable=False, name=f"biased_{role}_{i}"),
                        tf.Variable(tf.zeros([], own_dtype), trainable=False, name=f"count_{role}_{i}"),
                    )
                    for role in ("mean", "variance")
                ]
                for i in range(count)
            ]
        specs = [tf.TensorSpec([None, *SIZES[form.rank][1:], CHANNELS], dtype, name="x")]
        if form.mode == "placeholder":
            specs.append(tf.TensorSpec([], tf.bool, name="is_training"))
        if form.momentum == "placeholder":
            specs.append(tf.TensorSpec([], tf.float32, name="momentum"))
        if form.mode == "variable":
            self.is_training = tf.Variable(False, trainable=False, name="is_training")
        self.serve = tf.function(self._function(False), input_signature=specs)
        if form.chooser == "python" and form.mode == "true":
            self.train = tf.function(self._function(True), input_signature=specs)

    def _function(self, training: bool) -> Callable[..., tf.Tensor]:
        """Return the net as a function of x and, if the form has them, the mode and the momentum."""

        def call(x: tf.Tensor, *rest: tf.Tensor) -> tf.Tensor:
            arguments = list(rest)
            mode: Any = training
            if self.form.mode == "placeholder":
                mode = arguments.pop(0)
            elif self.form.mode == "variable":
                mode = self.is_training.read_value()
            elif self.form.chooser != "python":
                mode = tf.constant(self.form.mode == "true")
            momentum: Any = arguments.pop(0) if self.form.momentum == "placeholder" else MOMENTUM
            if self.form.momentum == "tensor":
                momentum = tf.constant(MOMENTUM)
            layers = [Layer(**v) for v in self.variables_of]
            for layer, biased in zip(layers, self.biased, strict=False):
                layer.biased = biased
            pairs = list(zip(self.mixes, [layers[0], layers[-1]], strict=True))
            return net(self.form, x, pairs, mode, momentum)[0]

        return call


def save_module(module: Module, path: Path) -> None:
    """Write a net with `serve` as its default signature."""
    tf.saved_model.save(module, str(path), signatures={"serving_default": module.serve})

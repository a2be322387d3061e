"""The rewritten model in Keras 3, by `bnqat.KerasLayer` and by Keras' own `TFSMLayer`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import bnqat
from rewriter.app.training.readings import Readings
from tests import harness, reference, weight_reference

# Keras calls NumPy 2 with variables whose `__array__` has no `copy`, whenever it saves weights of any model.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

Paths = Callable[..., Path]
STEPS = 6
X = np.concatenate([harness.images((None, 8, 8, 3), 4, seed) for seed in range(STEPS)])
Y = np.random.default_rng(0).integers(0, 10, len(X))
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.fixture(autouse=True)
def policy() -> Iterator[None]:
    yield
    keras.config.set_dtype_policy("float32")


def wrapped(path: Path, optimizer: Any = None) -> tuple[Any, Any]:
    """The layer, and a compiled functional model of it."""
    layer = bnqat.KerasLayer(path)
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, layer(inputs))
    model.compile(optimizer or keras.optimizers.Adam(1e-2), LOSS)
    return layer, model


def fit(model: Any, **options: Any) -> Any:
    return model.fit(X, Y, batch_size=4, shuffle=False, verbose=0, **options)


def values(layer: Any) -> dict[int, np.ndarray]:
    return {i: v.numpy() for i, v in enumerate(layer.weights)}


def assert_same(first: Any, second: Any) -> None:
    for a, b in zip(first.weights, second.weights, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy(), err_msg=a.path)


@pytest.mark.parametrize("name", ["module", "keras_save"])
def test_weights_are_the_models_own_variables(name: str, rewritten: Paths) -> None:
    layer, _ = wrapped(rewritten(name, bits=4, range={"gamma": "learned"}))
    variables = list(layer.quantization.variables)
    assert {id(v.value) for v in layer.weights} == {id(v) for v in variables}
    trained = {id(v) for v in layer.quantization.trainable_variables}
    assert {id(v.value) for v in layer.trainable_weights} == trained
    assert sum(v.path.startswith("quantization_") for v in layer.trainable_weights) >= 1  # learned scales
    assert not [v.path for v in layer.weights if ":" in v.path or "/" in v.path]
    assert sorted(v.dtype for v in layer.weights) == sorted(v.dtype.name for v in variables)


@pytest.mark.parametrize("optimizer", ["Adam", "RMSprop"])
def test_fit_is_the_training_loop_that_one_would_write(optimizer: str, rewritten: Paths) -> None:
    """`fit` and the loop agree bit for bit, as both run the same ops in the same order."""
    path = rewritten("module", bits=4, start_step=2)
    layer, model = wrapped(path, getattr(keras.optimizers, optimizer)(1e-2))
    fit(model, epochs=2)
    loaded = tf.saved_model.load(str(path))
    variables = list(loaded.quantization.trainable_variables)
    loop_optimizer = getattr(keras.optimizers, optimizer)(1e-2)

    @tf.function
    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = LOSS(y, loaded.train(x))
        loop_optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))

    for _ in range(2):
        for start in range(0, len(X), 4):
            step(X[start : start + 4], Y[start : start + 4])
    assert layer.quantization.step.numpy() == loaded.quantization.step.numpy() == 2 * STEPS
    by_id = {id(v.value): v.numpy() for v in layer.weights}
    for variable, expected in zip(layer.quantization.variables, loaded.quantization.variables, strict=True):
        np.testing.assert_array_equal(by_id[id(variable)], expected, err_msg=expected.name)


def test_only_training_counts_and_moves_statistics(rewritten: Paths) -> None:
    layer, model = wrapped(rewritten("module", bits=4))
    model = keras.Sequential([model, keras.layers.Dense(10)])
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    before = values(layer)
    predicted = model.layers[0].predict(X, verbose=0)
    model.evaluate(X, Y, verbose=0)
    np.testing.assert_array_equal(predicted, layer.model.serve(X))
    assert all(np.array_equal(v, before[i]) for i, v in values(layer).items())
    layer.trainable = False
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    fit(model)
    assert layer.trainable_weights == []
    assert all(np.array_equal(v, before[i]) for i, v in values(layer).items())
    layer.trainable = True
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    fit(model)
    moved = {v.path for i, v in enumerate(layer.weights) if not np.array_equal(v.numpy(), before[i])}
    assert moved == {"quantization_step", "moving_mean", "moving_variance", "gamma", "beta", "kernel_0", "kernel_1"}


def test_two_phases_in_one_fit(rewritten: Paths) -> None:
    layer, model = wrapped(rewritten("module", bits=4, start_step=STEPS, freeze_step=2 * STEPS))
    epochs = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            moving = [v.numpy() for v in layer.weights if v.path.startswith("moving")]
            kernel = next(v.numpy() for v in layer.weights if v.path == "kernel_0")
            epochs.append((epoch, moving, kernel, logs["loss"]))

    fit(model, epochs=4, callbacks=[Watch()])
    (_, a, k, _), (_, b, _, _), (_, c, m, _), (_, d, n, _) = epochs
    assert not any(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    for x, y, z in zip(b, c, d, strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_array_equal(x, z)
    assert not np.array_equal(k, m)
    assert not np.array_equal(m, n)


def test_keras_compiles_it_only_if_told_so(rewritten: Paths) -> None:
    """On a GPU Keras compiles what it can with XLA, which has no fused kernel and fails on a freeze step's branch."""
    layer, model = wrapped(rewritten("module", bits=8))
    with pytest.warns(UserWarning, match="doesn't support `jit_compile=True`"):
        model.compile(keras.optimizers.Adam(1e-2), LOSS, jit_compile=True)
    assert not model.jit_compile
    layer.supports_jit = True
    model.compile(keras.optimizers.Adam(1e-2), LOSS, jit_compile=True)
    assert model.jit_compile


def test_a_saved_file_goes_on_where_it_was(rewritten: Paths, tmp_path: Path) -> None:
    """Resuming is exact in the middle of a ramp, with stochastic rounding, moving ranges and Adam's state."""
    options: dict[str, Any] = {"range": "ema", "rounding": "stochastic", "start_step": 2, "ramp_steps": 2 * STEPS}
    path = rewritten("module", bits=4, **options)
    whole, model = wrapped(path)
    fit(model, epochs=4)
    _, model = wrapped(path)
    fit(model, epochs=2)
    model.save(tmp_path / "half.keras")
    with pytest.raises(ValueError, match="safe_mode=False"):
        keras.models.load_model(tmp_path / "half.keras")
    again = keras.models.load_model(tmp_path / "half.keras", safe_mode=False)
    assert again.layers[-1].quantization.step.numpy() == 2 * STEPS
    fit(again, epochs=4, initial_epoch=2)
    assert again.layers[-1].quantization.step.numpy() == 4 * STEPS
    assert_same(again.layers[-1], whole)


def test_backup_and_restore_after_an_interruption(rewritten: Paths, tmp_path: Path) -> None:
    path = rewritten("module", bits=4, start_step=STEPS, range="ema")
    whole, model = wrapped(path)
    fit(model, epochs=3)

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002  Keras gives it
            if epoch == 2:
                raise KeyboardInterrupt

    backup = keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))
    _, model = wrapped(path)
    with pytest.raises(KeyboardInterrupt):
        fit(model, epochs=3, callbacks=[backup, Interrupt()])
    layer, model = wrapped(path)
    history = fit(model, epochs=3, callbacks=[keras.callbacks.BackupAndRestore(str(tmp_path / "backup"))])
    assert history.epoch == [2]
    assert layer.quantization.step.numpy() == 3 * STEPS
    assert_same(layer, whole)


def test_exports(rewritten: Paths, tmp_path: Path) -> None:
    layer, model = wrapped(rewritten("module", bits=4))
    fit(model)
    model.export(str(tmp_path / "served"), verbose=False)
    exported = tf.saved_model.load(str(tmp_path / "served"))
    served = exported.serve(X)
    np.testing.assert_array_equal(served, layer.model.serve(X))
    tf.saved_model.save(layer.model, str(tmp_path / "tuned"))
    again, model = wrapped(tmp_path / "tuned")
    assert again.quantization.step.numpy() == STEPS
    np.testing.assert_array_equal(model.predict(X, verbose=0), served)
    fit(model)
    assert again.quantization.step.numpy() == 2 * STEPS


class Two(tf.Module):
    """Two inputs by position, of which one has no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        self.held = [tf.Variable(rng.uniform(0.5, 1, 3).astype("float32"), name=n) for n in ("gamma", "beta")]
        self.moving = [tf.Variable(tf.ones(3), trainable=False, name=n) for n in ("mean", "variance")]

    @tf.function(input_signature=[tf.TensorSpec((None, 4, 4, 3), name="image"), tf.TensorSpec((None, 3), name="extra")])
    def serve(self, image: Any, extra: Any) -> Any:
        (scale, offset), (mean, variance) = self.held, self.moving
        y = tf.raw_ops.FusedBatchNormV3(
            x=image, scale=scale, offset=offset, mean=mean, variance=variance, is_training=False
        )[0]
        return {"sum": tf.reduce_mean(y, [1, 2]) + extra, "extra": extra}


def test_inputs_by_name_and_by_position(tmp_path: Path) -> None:
    tf.saved_model.save(Two(), str(tmp_path / "float"))
    bnqat.rewrite(tmp_path / "float", tmp_path / "two", bits=4)
    layer = bnqat.KerasLayer(tmp_path / "two")
    by_name = {"image": harness.images((None, 4, 4, 3)), "extra": harness.images((None, 3), seed=1)}
    expected = layer.model.serve(by_name["image"], by_name["extra"])
    for inputs in (by_name, dict(reversed(by_name.items())), list(by_name.values()), tuple(by_name.values())):
        for name, value in layer(inputs).items():
            np.testing.assert_array_equal(value, expected[name])
    layer(by_name, training=True)
    assert layer.quantization.step.numpy() == 1
    with pytest.raises(bnqat.Error, match="the inputs are image, other, but the model takes image, extra"):
        layer({"image": by_name["image"], "other": by_name["extra"]})
    with pytest.raises(bnqat.Error, match="1 inputs, but the model takes 2: image, extra"):
        layer(by_name["image"])


def test_inputs_of_a_keras_3_export(tmp_path: Path) -> None:
    image, extra = keras.Input((8, 8, 1), name="image"), keras.Input((3,), name="extra")
    hidden = keras.layers.Flatten()(keras.layers.BatchNormalization()(image))
    outputs = keras.layers.Dense(2)(keras.layers.Concatenate()([hidden, extra]))
    x, e = harness.images((None, 8, 8, 1)), harness.images((None, 3))
    for name, inputs in (("list", [image, extra]), ("dict", {"image": image, "extra": extra})):
        source = keras.Model(inputs, outputs)
        source.export(str(tmp_path / name), verbose=False)
        bnqat.rewrite(tmp_path / name, tmp_path / f"{name}_q", start_step=1)
        layer = bnqat.KerasLayer(tmp_path / f"{name}_q")
        expected = source.predict({"image": x, "extra": e}, verbose=0)
        np.testing.assert_allclose(
            layer({"extra": e, "image": x}), expected, rtol=1e-5, atol=1e-5
        )  # fused: docs/fusing
    np.testing.assert_allclose(bnqat.KerasLayer(tmp_path / "list_q")([x, e]), expected, rtol=1e-5, atol=1e-5)


def test_a_half_policy_concerns_only_what_is_around(rewritten: Paths) -> None:
    path = rewritten("module", bits=4)
    keras.config.set_dtype_policy("mixed_float16")
    inputs = keras.Input((8, 8, 3))
    hidden = keras.layers.Rescaling(1.0)(inputs)
    assert hidden.dtype == "float16"
    layer = bnqat.KerasLayer(path)
    model = keras.Model(inputs, layer(hidden))
    model.compile(keras.optimizers.Adam(1e-3), LOSS)
    assert type(model.optimizer).__name__ == "LossScaleOptimizer"
    fit(model)
    assert layer.quantization.step.numpy() == STEPS
    assert model.output.dtype == "float32"
    plain = keras.layers.TFSMLayer(str(path), call_endpoint="serve", call_training_endpoint="train")
    with pytest.raises(TypeError):
        plain(hidden)
    assert keras.layers.TFSMLayer(str(path), call_endpoint="serve", dtype="float32")(hidden).dtype == "float32"


@pytest.mark.parametrize(("optimizer", "works"), [("SGD", True), ("Adam", False)])
def test_what_keras_own_layer_can_do(optimizer: str, works: bool, rewritten: Paths) -> None:
    """Adam rejects variable names that end in `:0` for its slots, also those of a float model."""
    path = rewritten("keras_save", bits=4)
    layer = keras.layers.TFSMLayer(str(path), call_endpoint="serve", call_training_endpoint="train")
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, layer(inputs))
    model.compile(getattr(keras.optimizers, optimizer)(1e-3), LOSS)
    if works:
        fit(model)
        assert layer._reloaded_obj.quantization.step.numpy() == STEPS
    else:
        with pytest.raises(ValueError, match="is not a valid"):
            fit(model)


def test_what_is_logged(rewritten: Paths, tmp_path: Path) -> None:
    """Logged values equal the reference's, for every scheme and kind of range."""
    options: dict[str, Any] = {
        "scheme": {"gamma": "symmetric", "beta": "power_of_two"},
        "range": {"gamma": "learned", "beta": (-1, 1), "moving_mean": "ema"},
        "bits": {"gamma": 3, "moving_mean": 5},
    }
    layer, model = wrapped(rewritten("module", start_step=STEPS, ramp_steps=2 * STEPS, **options))
    layer.quantization.layer_bits.beta.assign([4, -1])
    fit(model, epochs=2, callbacks=[bnqat.QuantizationLog(layer, tmp_path), keras.callbacks.TensorBoard(tmp_path)])
    assert {p.name for p in tmp_path.iterdir()} == {"quantization", "train"}
    logged = events(tmp_path / "quantization")
    assert logged.pop("step") == {0: STEPS, 1: 2 * STEPS}
    assert logged.pop("amount") == {0: 0, 1: 0.5}
    norms = layer.model.norms
    names = [bn.name for bn in bnqat.inspect(layer.filepath).batch_norms]
    assert len(logged) == len(names) * 4 * 4
    for number, (name, norm) in enumerate(zip(names, norms, strict=True)):
        schemes = {"gamma": "symmetric", "beta": "power_of_two", "moving_mean": "affine", "moving_variance": "log"}
        for role, scheme in schemes.items():
            last = {what: logged[f"{name}/{role}/{what}"][1] for what in ("bits", "low", "high", "error")}
            bits = {"gamma": 3, "beta": (4, 8)[number], "moving_mean": 5, "moving_variance": 8}[role]
            assert last["bits"] == bits
            v = getattr(norm, role).numpy()
            limits = np.array([last["low"], last["high"]], np.float32)
            q = reference.quantize(scheme, v, bits, 1e-3, limits=limits, narrow=scheme == "symmetric").value
            if role == "moving_mean":
                np.testing.assert_array_equal(limits, layer.quantization.range.moving_mean[number])
            if role == "moving_variance":
                np.testing.assert_allclose(limits, np.log([v.min() + 1e-3, v.max() + 1e-3]), rtol=1e-6)
                expected = np.sqrt(np.mean((np.sqrt((v + 1e-3) / (q + 1e-3)) - 1) ** 2))
            else:
                expected = np.linalg.norm(q - v) / np.linalg.norm(v)
            assert last["error"] == pytest.approx(expected, rel=1e-4)
            assert last["error"] > 0


@pytest.mark.parametrize("range_", ["dynamic", "learned"])
def test_weights_are_logged_as_they_are_now(range_: str, rewritten: Paths, tmp_path: Path) -> None:
    path = rewritten("module", bits={"weight": 3}, scheme={"batch_norm": "none"}, range={"weight": range_})
    layer, model = wrapped(path, keras.optimizers.SGD(1e-2))
    layer.quantization.layer_bits.weight.assign([5, -1])
    first = [kernel.numpy() for kernel in layer.model.kernels]
    fit(model, epochs=1, callbacks=[bnqat.QuantizationLog(layer, tmp_path)])
    logged = events(tmp_path / "quantization")
    names = {tag.removesuffix("/weight/bits") for tag in logged if tag.endswith("/weight/bits")}
    assert len(logged) == 2 + 4 * len(names) == 10
    for name, before, kernel, bits in zip(sorted(names), first, layer.model.kernels, (5, 3), strict=True):
        last = {what: logged[f"{name}/weight/{what}"][0] for what in ("bits", "low", "high", "error")}
        value = kernel.numpy()
        assert not np.array_equal(value, before)
        assert last["bits"] == bits
        assert last["low"] == -last["high"] < 0
        if range_ == "dynamic":
            assert last["high"] == pytest.approx(np.abs(value).max(), rel=1e-6)
            quantized = weight_reference.quantize_weight("symmetric", value, bits, (-1,)).value
            error = np.linalg.norm(quantized - value) / np.linalg.norm(value)
            assert last["error"] == pytest.approx(error, rel=1e-5)
        assert 0 < last["error"] < 1


@pytest.mark.parametrize("name", ["keras_save", "keras3", "nested", "frozen", "form_v3_half"])
def test_models_of_every_origin(name: str, rewritten: Paths) -> None:
    """Control variables may be read by the training function or by one that it calls."""
    layer = bnqat.KerasLayer(rewritten(name, bits=4, start_step=1, unfreeze_constants=name == "frozen"))
    readings = Readings(layer.model, layer.filepath)
    assert readings.amount() == 0
    (spec,) = layer.quantization.train.concrete_functions[0].structured_input_signature[0]
    shape = (4, 8, 8, 3) if spec.shape.rank is None else (4, *spec.shape[1:])
    x = tf.cast(harness.images(shape), spec.dtype)
    np.testing.assert_array_equal(layer(x), layer.model.serve(x))
    layer(x, training=True)
    assert readings.amount() == 1
    by_layer = readings()
    assert {name for name, _ in by_layer} == {bn.name for bn in bnqat.inspect(layer.filepath).batch_norms}
    assert {reading.bits for reading in by_layer.values()} == {4}
    assert all(0 < reading.error < 0.2 and reading.low < reading.high for reading in by_layer.values())


def events(folder: Path) -> dict[str, dict[int, float]]:
    """Read the only event file in a folder: tag -> step -> value."""
    (file,) = folder.iterdir()
    scalars: dict[str, dict[int, float]] = {}
    for record in tf.data.TFRecordDataset(str(file)):
        event = tf.compat.v1.Event.FromString(record.numpy())
        for value in event.summary.value:
            assert value.metadata.plugin_data.plugin_name == "scalars"
            scalars.setdefault(value.tag, {})[event.step] = float(tf.make_ndarray(value.tensor))
    return scalars


def test_what_cannot_be_a_layer(model: Paths, tmp_path: Path) -> None:
    with pytest.raises(bnqat.Error, match="was not rewritten by bnqat in TensorFlow 2's format"):
        bnqat.KerasLayer(model("module"))
    bnqat.rewrite(model("v1_two_fused"), tmp_path / "v1")
    with pytest.raises(bnqat.Error, match="was not rewritten by bnqat in TensorFlow 2's format"):
        bnqat.KerasLayer(tmp_path / "v1")


def test_keras_is_imported_when_it_is_needed() -> None:
    code = """
import sys, bnqat
assert not {"keras", "tensorflow"} & set(sys.modules)
sys.modules["keras"] = None  # cannot be imported
try:
    bnqat.KerasLayer
except ModuleNotFoundError as e:
    assert e.name == "keras"
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

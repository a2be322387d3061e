"""`bnqat.ReestimateStatistics`: at the freeze step, at the end, and on two replicas."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import bnqat
from tests import harness
from tests.reliability.forks import Server
from tests.training.mirrored import PREAMBLE

Paths = Callable[..., Path]
STEPS = 6
X = np.concatenate([harness.images((None, 8, 8, 3), 4, seed) for seed in range(STEPS)])
Y = np.random.default_rng(0).integers(0, 16, len(X))
DATA = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Watch(keras.callbacks.Callback):
    """Callback that keeps the moving statistics after each step."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.statistics: list[list[np.ndarray]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002  Keras gives it
        self.statistics.append(moving(self.layer))


def moving(layer: Any) -> list[np.ndarray]:
    return [v.numpy() for norm in layer.model.norms for v in (norm.moving_mean, norm.moving_variance)]


def wrapped(path: Path) -> tuple[Any, Any]:
    """The layer, and a compiled model in which dropout and a batch norm of Keras' come before it."""
    layer = bnqat.KerasLayer(path)
    inputs = keras.Input((8, 8, 3))
    hidden = keras.layers.BatchNormalization()(keras.layers.Dropout(0.2, seed=1)(inputs))
    model = keras.Model(inputs, layer(hidden))
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    return layer, model


def assert_same(actual: list[np.ndarray], expected: list[np.ndarray], same: bool = True) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert np.array_equal(a, b) is same


def test_at_the_end_it_is_what_the_function_gives(rewritten: Paths) -> None:
    """Nothing but the averages differs from a run without it, in the layer and around it."""
    path = rewritten("module", bits=4, start_step=2)
    results = []
    for callbacks in ([], [bnqat.ReestimateStatistics(DATA, STEPS)]):
        keras.utils.set_random_seed(0)
        layer = bnqat.KerasLayer(path)
        model = keras.Sequential([keras.Input((8, 8, 3)), layer, keras.layers.Dense(16)])
        model.compile(keras.optimizers.SGD(0.1), LOSS)
        model.fit(DATA, shuffle=False, verbose=0, callbacks=callbacks)
        results.append((layer, model))
    (plain, without), (layer, model) = results
    assert_same(moving(layer), moving(plain), same=False)
    bnqat.reestimate_statistics(plain.model, DATA.map(lambda x, _: x), STEPS)
    for one, other in zip(model.variables, without.variables, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=one.path)


def test_what_stands_around_the_layer_is_as_it_was(rewritten: Paths) -> None:
    _, model = wrapped(rewritten("module", bits=4, range="ema"))
    callback = bnqat.ReestimateStatistics(DATA, 2)
    callback.set_model(model)
    before = [v.numpy() for v in model.variables]
    callback.on_train_begin()
    assert_same([v.numpy() for v in model.variables], before)
    callback.on_train_end()
    changed = [v.path for v, old in zip(model.variables, before, strict=True) if not np.array_equal(v, old)]
    assert sorted(changed) == ["moving_mean", "moving_mean", "moving_variance", "moving_variance"]
    around = [v.path for v in model.variables if v.path.startswith("batch_normalization")]
    assert any(path.endswith("/moving_mean") for path in around)


def test_before_the_first_frozen_step_and_not_again(rewritten: Paths) -> None:
    layer, model = wrapped(rewritten("module", bits=4, freeze_step=2 * STEPS - 2))
    watch = Watch(layer)
    callback = bnqat.ReestimateStatistics(DATA, STEPS)
    model.fit(DATA, epochs=2, shuffle=False, verbose=0, callbacks=[watch, callback])
    assert_same(watch.statistics[2 * STEPS - 4], watch.statistics[2 * STEPS - 3], same=False)
    assert_same(watch.statistics[2 * STEPS - 3], watch.statistics[2 * STEPS - 2], same=False)  # re-estimated
    assert_same(watch.statistics[2 * STEPS - 2], watch.statistics[2 * STEPS - 1])
    model.fit(DATA, shuffle=False, verbose=0, callbacks=[callback])
    assert_same(moving(layer), watch.statistics[-1])  # frozen before this `fit` began
    layer.quantization.freeze_step.assign(layer.quantization.step)
    model.fit(DATA, shuffle=False, verbose=0, callbacks=[watch, callback])
    assert_same(watch.statistics[-1], watch.statistics[-2])
    assert_same(watch.statistics[-1], watch.statistics[2 * STEPS - 1], same=False)  # frozen anew, with this step


def test_a_freeze_step_that_is_assigned_while_training(rewritten: Paths) -> None:
    layer, model = wrapped(rewritten("module", bits=4, freeze_step=2**40))
    watch = Watch(layer)

    class Freeze(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002  Keras gives it
            layer.quantization.freeze_step.assign(layer.quantization.step)

    model.fit(
        DATA, epochs=2, shuffle=False, verbose=0, callbacks=[watch, Freeze(), bnqat.ReestimateStatistics(DATA, 3)]
    )
    assert_same(watch.statistics[STEPS - 1], watch.statistics[STEPS], same=False)
    assert_same(watch.statistics[STEPS], watch.statistics[-1])


def test_mistakes_are_found_before_training(rewritten: Paths) -> None:
    layer, model = wrapped(rewritten("module", bits=4))
    with pytest.raises(bnqat.Error, match="0 steps: at least one batch"):
        bnqat.ReestimateStatistics(DATA, 0)
    with pytest.raises(bnqat.Error, match="the dataset holds 6 batches, not 7"):
        bnqat.ReestimateStatistics(DATA, 7)
    wrong: list[tuple[Any, str]] = [(np.zeros([64, 8, 8, 3]), "ndarray"), (None, "NoneType")]
    for data, kind in wrong:
        with pytest.raises(bnqat.Error, match=f"the dataset is a {kind}; give batches"):
            bnqat.ReestimateStatistics(data, 2)
    with pytest.raises(bnqat.Error, match="the dataset is an iterator, which is used up once"):
        bnqat.ReestimateStatistics(iter(DATA), 2)
    layer.trainable = False
    with pytest.raises(bnqat.Error, match=r"the model has no trainable bnqat\.KerasLayer"):
        model.fit(DATA, verbose=0, shuffle=False, callbacks=[bnqat.ReestimateStatistics(DATA, 2)])
    assert layer.quantization.step.numpy() == 0


MIRRORED = (
    PREAMBLE
    + """batches = tf.data.Dataset.from_tensor_slices((data["x"], data["y"])).batch(8)
ranges = []

class Watch(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        held = layer.quantization.range.gamma.values
        ranges[:] = [v.numpy() for v in held]

model.fit(batches, shuffle=False, verbose=0, callbacks=[Watch(), bnqat.ReestimateStatistics(batches, 3)])
for norm in layer.model.norms:
    for variable in (norm.moving_mean, norm.moving_variance):
        first, second = (v.numpy() for v in variable.values)
        np.testing.assert_array_equal(first, second)
for replica, before in zip(layer.quantization.range.gamma.values, ranges):
    np.testing.assert_array_equal(replica, before)
assert [int(v.numpy()) for v in layer.quantization.step.values] == [3, 3]
tf.saved_model.save(layer.model, out)
"""
)


def test_two_replicas_get_the_same(plain_forks: Server, rewritten: Paths, tmp_path: Path) -> None:
    """The saved model has one device's values; other variables stay as they are on each replica."""
    path = rewritten("module", bits=4, range={"gamma": "ema"})
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    done = plain_forks.python(MIRRORED, path, tmp_path / "data.npz", tmp_path / "out")
    assert done.code == 0, done.err[-3000:]
    loaded = tf.saved_model.load(str(tmp_path / "out"))
    before = [v.numpy() for v in loaded.quantization.variables]
    bnqat.reestimate_statistics(loaded, DATA.unbatch().batch(8).map(lambda x, _: x), 3)
    for variable, old in zip(loaded.quantization.variables, before, strict=True):
        np.testing.assert_allclose(variable, old, rtol=1e-6, atol=1e-6, err_msg=variable.name)

"""Two replicas in one process, and in two processes of which one is killed. The programs are the guide's own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import bnqat
from passes.quantization.controls import ON_READ
from rewriter.savedmodel.read import load
from tests import harness
from tests.reliability.forks import Server
from tests.training.mirrored import PREAMBLE

Paths = Callable[..., Path]
GUIDE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"
STEPS, HALF = 5, 4
X = np.concatenate([harness.images((None, 8, 8, 3), 2 * HALF, seed) for seed in range(STEPS)])
Y = np.random.default_rng(0).integers(0, 16, len(X))

MIRRORED = (
    PREAMBLE
    + """losses, local = [], []

class Watch(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        losses.append(logs["loss"])

def fit():
    batches = tf.data.Dataset.from_tensor_slices((data["x"], data["y"])).batch(int(data["batch"]))
    model.fit(batches, shuffle=False, verbose=0, callbacks=[Watch(), bnqat.QuantizationLog(layer, out + "_log")])

fit()
norm = layer.model.norms[0]
first, second = (v.numpy() for v in norm.moving_mean.values)
assert not np.allclose(first, second)
np.testing.assert_allclose(norm.moving_mean.numpy(), (first + second) / 2, rtol=1e-6)
tf.saved_model.save(layer.model, out + "_1")
for variable in layer.quantization.variables:
    if variable.synchronization == tf.VariableSynchronization.ON_READ:
        variable.assign(variable.read_value())
layer.quantization.freeze_step.assign(layer.quantization.step)
fit()
tf.saved_model.save(layer.model, out + "_2")
np.save(out + ".npy", losses)
"""
)


def held(path: Path) -> dict[str, np.ndarray]:
    """A SavedModel's variables by key."""
    reader = tf.train.load_checkpoint(str(path / "variables" / "variables"))
    values = {k: reader.get_tensor(k) for k in reader.get_variable_to_shape_map() if k.endswith("VARIABLE_VALUE")}
    return {key.partition("/.")[0]: value for key, value in values.items()}


def loss_of(logits: Any, labels: np.ndarray) -> Any:
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))


def alone(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], list[float]]:
    """Do on one device what two replicas do.

    Returns:
        The variables after each of the two phases, and the losses.
    """
    replicas = [tf.saved_model.load(str(path)) for _ in range(2)]
    trained = [list(m.quantization.trainable_variables) for m in replicas]
    losses = []
    after = []
    for phase in (1, 2):
        for start in range(0, len(X), 2 * HALF):
            gradients, parts = [], []
            for i, (m, variables) in enumerate(zip(replicas, trained, strict=True)):
                chosen = slice(start + i * HALF, start + (i + 1) * HALF)
                with tf.GradientTape() as tape:
                    loss = loss_of(m.quantization.train(X[chosen]), Y[chosen])
                gradients.append(tape.gradient(loss, variables))
                parts.append(float(loss))
            losses.append(sum(parts) / 2)
            for variables in trained:
                for v, a, b in zip(variables, *gradients, strict=True):
                    v.assign_sub(0.1 * (a + b) / 2)
        variable_lists = [m.quantization.variables for m in replicas]
        mean = {v.name: [] for v in variable_lists[0]}  # type: ignore[var-annotated]
        for pair in zip(*variable_lists, strict=True):
            if pair[0].dtype.is_floating and not pair[0].trainable:
                value = (pair[0] + pair[1]) / 2
                for v in pair:
                    v.assign(value)
            mean[pair[0].name].append(pair[0].numpy())
        after.append({f"{name}{i}": v for name, values in mean.items() for i, v in enumerate(values)})
        for m in replicas:
            m.quantization.freeze_step.assign(m.quantization.step if phase == 1 else 0)
    return after[0], after[1], losses


@dataclass(frozen=True)
class OneDevice:
    """A model, and what `alone` returns of it."""

    path: Path
    first: dict[str, np.ndarray]
    second: dict[str, np.ndarray]
    losses: list[float]


@pytest.fixture(scope="module")
def one_device(rewritten: Paths) -> OneDevice:
    """A model with ranges that learn and move, trained on one device as two replicas train it."""
    ranges = {"gamma": "learned", "moving_mean": "ema"}
    path = rewritten("module", bits=8, momentum=0.9, range=ranges, start_step=2, freeze_step=1000)
    return OneDevice(path, *alone(path))


def by_name(path: Path) -> dict[str, np.ndarray]:
    """A SavedModel's variables as `alone` names them."""
    loaded = tf.saved_model.load(str(path))
    by_variable: dict[str, list[np.ndarray]] = {}
    for v in loaded.quantization.variables:
        by_variable.setdefault(v.name, []).append(v.numpy())
    return {f"{name}{i}": v for name, values in by_variable.items() for i, v in enumerate(values)}


def test_two_replicas_do_what_one_device_does_for_both(
    plain_forks: Server, one_device: OneDevice, tmp_path: Path
) -> None:
    """Sums of two replicas' gradients and losses are rounded in another order; hence 1e-5 in float32.

    With frozen statistics a batch can be divided at will, and the losses are those of the whole batch, too.
    """
    np.savez(tmp_path / "data.npz", x=X, y=Y, batch=2 * HALF)
    done = plain_forks.python(MIRRORED, one_device.path, tmp_path / "data.npz", tmp_path / "out")
    assert done.code == 0, done.err[-3000:]
    assert_alike(tmp_path, one_device.first, one_device.second)
    assert not np.allclose(
        one_device.first["quantization/range/moving_mean:00"],
        by_name(one_device.path)["quantization/range/moving_mean:00"],
    )
    # Keras logs the mean of an epoch's losses so far.
    logged = np.load(tmp_path / "out.npy").reshape(2, STEPS)
    running = np.cumsum(np.reshape(one_device.losses, (2, STEPS)), 1) / np.arange(1, STEPS + 1)
    np.testing.assert_allclose(logged, running, rtol=1e-5)
    whole = tf.saved_model.load(str(tmp_path / "out_1"))
    whole.quantization.freeze_step.assign(0)
    loss = float(loss_of(whole.quantization.train(X[: 2 * HALF]), Y[: 2 * HALF]))
    np.testing.assert_allclose(loss, logged[1, 0], rtol=1e-5)


def assert_alike(folder: Path, *phases: dict[str, np.ndarray]) -> None:
    """Assert that the models saved after each phase equal those of one device up to float rounding."""
    for number, expected in enumerate(phases, 1):
        actual = by_name(folder / f"out_{number}")
        assert actual["quantization/step:00"] == number * STEPS
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            if name != "quantization/freeze_step:00":
                np.testing.assert_allclose(actual[name], value, rtol=1e-5, atol=1e-5, err_msg=f"{name} {number}")


@contextlib.contextmanager
def workers(python: Path, folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Start both workers of the guide on free ports; none of them outlives the test."""
    sockets = [socket.socket() for _ in range(2)]
    for free in sockets:
        free.bind(("localhost", 0))
    addresses = [f"localhost:{free.getsockname()[1]}" for free in sockets]
    for free in sockets:
        free.close()
    started = []
    try:
        for index in range(2):
            command = [str(python), "worker.py", str(index), *addresses]
            with (folder / f"errors_{index}").open("w") as errors:
                started.append(subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True))
        yield started
    finally:
        for process in started:
            if process.poll() is None:
                process.kill()
            process.communicate()


LOOP = """
import json, os, sys
index = int(sys.argv[1])
cluster = {"worker": sys.argv[2:]}
os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})
import tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
import keras, numpy as np
data = np.load("data.npz")
size = int(data["batch"])
with strategy.scope():
    loaded = tf.saved_model.load("qat_model")
    variables = list(loaded.quantization.trainable_variables)
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(variables)

def one(images, labels):
    with tf.GradientTape() as tape:
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, loaded.train(images))
        mine = tf.reduce_sum(losses) / size
    optimizer.apply_gradients(zip(tape.gradient(mine, variables), variables))
    return mine

@tf.function
def step(images, labels):
    return strategy.reduce("SUM", strategy.run(one, (images, labels)), axis=None)

batches = tf.data.Dataset.from_tensor_slices((data["x"], data["y"])).batch(size)
options = tf.data.Options()
options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
batches = strategy.experimental_distribute_dataset(batches.with_options(options))
for phase in (1, 2):
    for images, labels in batches:
        print(float(step(images, labels)))
    tf.saved_model.save(loaded, f"out_{phase}" if index == 0 else f"scratch_{phase}")
    for variable in loaded.quantization.variables:
        if variable.synchronization == tf.VariableSynchronization.ON_READ:
            variable.assign(variable.read_value())
    loaded.quantization.freeze_step.assign(loaded.quantization.step)
"""


def test_two_workers_in_a_loop_of_ones_own_do_what_one_device_does(
    python: Path, one_device: OneDevice, tmp_path: Path
) -> None:
    """Two workers obey the same bounds as two replicas of one process."""
    np.savez(tmp_path / "data.npz", x=X, y=Y, batch=2 * HALF)
    (tmp_path / "qat_model").symlink_to(one_device.path)
    (tmp_path / "worker.py").write_text(LOOP, encoding="utf-8")
    printed = finished(python, tmp_path)
    assert_alike(tmp_path, one_device.first, one_device.second)
    for lines in printed:
        np.testing.assert_allclose([float(line) for line in lines], one_device.losses, rtol=1e-5)


KERAS_3 = """
import json, os, sys
cluster = {"worker": sys.argv[2:]}
os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": {"type": "worker", "index": int(sys.argv[1])}})
import tensorflow as tf
strategy = tf.distribute.MultiWorkerMirroredStrategy()
import keras
data = tf.data.Dataset.from_tensor_slices((tf.ones([8, 3]), tf.ones([8, 1]))).batch(4)
with strategy.scope():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
try:
    model.fit(data, verbose=0)
except ValueError as e:
    print("PerReplica" in str(e))
"""


def test_fit_of_keras_3_takes_no_several_workers_whatever_the_model(python: Path, tmp_path: Path) -> None:
    """If this test fails, Keras supports several workers, and the guide can use its `fit`."""
    (tmp_path / "worker.py").write_text(KERAS_3, encoding="utf-8")
    assert finished(python, tmp_path) == [["True"], ["True"]]


def finished(python: Path, folder: Path) -> list[list[str]]:
    """Run both workers to their end, and return the lines that each printed."""
    with workers(python, folder) as started:
        printed = [process.communicate(timeout=120)[0].splitlines() for process in started]
        for index, process in enumerate(started):
            assert process.returncode == 0, (folder / f"errors_{index}").read_text()[-3000:]
    return printed


def test_a_killed_worker_and_both_go_on_from_the_last_whole_epoch(python: Path, tmp_path: Path) -> None:
    """The result equals an unbroken run's bit for bit, except variables that workers average.

    Each worker has its own value of these until the backup, and the mean afterwards. The mean moves alike, but its
    float32 sums are rounded at other places, at most some 1e-7 of the value at a step.
    """
    (program,) = re.findall(r"```python\n# file: worker.py\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    keras.utils.set_random_seed(0)
    layers = keras.layers
    stack = [layers.Conv2D(4, 3), layers.BatchNormalization(momentum=0.9), layers.ReLU(), layers.Flatten()]
    net = keras.Sequential([keras.Input((8, 8, 1)), *stack, layers.Dense(10)])
    net.export(str(tmp_path / "float"), verbose=False)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
        (folder / "worker.py").write_text(program, encoding="utf-8")
        bnqat.rewrite(
            tmp_path / "float", folder / "qat_model", bits=4, momentum=0.9, start_step=40, range={"gamma": "ema"}
        )
    steps = 1797 // 64
    for lines in finished(python, whole):
        assert lines[0] == "epoch 0 batch 0 step 1"
        assert lines[-1] == f"done after {3 * steps} steps"
    with workers(python, broken) as started:
        victim, survivor = started[1], started[0]
        assert victim.stdout is not None
        assert any(line.startswith("epoch 1 batch 5 ") for line in victim.stdout)
        os.kill(victim.pid, signal.SIGKILL)
        assert victim.wait(timeout=60) == -signal.SIGKILL
        assert "epoch 2" not in survivor.communicate(timeout=120)[0]
        assert survivor.returncode not in (0, None)
    assert not (broken / "tuned_model").exists()
    for lines in finished(python, broken):
        assert lines[0] == f"epoch 1 batch 0 step {steps + 1}"
        assert lines[-1] == f"done after {3 * steps} steps"
    expected, resumed = held(whole / "tuned_model"), held(broken / "tuned_model")
    assert resumed.keys() == expected.keys()
    source = load(whole / "tuned_model")
    averaged = {v.key.partition("/.")[0] for v in source.variables.values() if v.synchronization == ON_READ}
    assert len(averaged) == 3  # moving mean and variance, and gamma's range
    for key, value in expected.items():
        if key in averaged:
            np.testing.assert_allclose(resumed[key], value, rtol=1e-5, atol=1e-6, err_msg=key)
        else:
            np.testing.assert_array_equal(resumed[key], value, err_msg=key)
    assert resumed["quantization/step"] == 3 * steps

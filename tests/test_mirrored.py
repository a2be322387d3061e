"""Two replicas: control variables, stateful ranges and learned scales under ``tf.distribute``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.reliability.forks import Server

MIRRORED = """
import sys
import numpy as np
import tensorflow as tf

devices = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(devices[0], [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
path, again = sys.argv[1:]
rng = np.random.default_rng(0)
batches = [tf.constant(rng.normal(0.3, 1.5, [4, 8, 8, 3]).astype("float32")) for _ in range(2)]


def alone(x):
    m = tf.saved_model.load(path)
    m.quantization.train(x)
    return m.quantization.range.moving_mean.numpy()


limits = [alone(x) for x in batches]
with strategy.scope():
    m = tf.saved_model.load(path)
q = m.quantization
variables = list(q.trainable_variables)
assert any(v.name.startswith("quantization/scale/gamma") for v in variables)
optimizer = tf.keras.optimizers.SGD(0.01)
with strategy.scope():
    optimizer.build(variables)


@tf.function
def step(x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(q.train(x) ** 2)
    gradients = tape.gradient(loss, variables)
    return loss, gradients


values = strategy.experimental_distribute_values_from_function(lambda c: batches[c.replica_id_in_sync_group])
losses, gradients = strategy.run(step, (values,))
assert q.step.numpy() == 1, q.step
np.testing.assert_allclose(q.range.moving_mean.numpy(), np.mean(limits, 0), rtol=1e-6)
assert not np.allclose(limits[0], limits[1])
scale = next(i for i, v in enumerate(variables) if v.name.startswith("quantization/scale/gamma"))
assert all(np.any(g.numpy()) for g in strategy.experimental_local_results(gradients[scale]))
q.bits.gamma.assign(0)
off, _ = strategy.run(step, (values,))
assert q.step.numpy() == 2
local = [strategy.experimental_local_results(each) for each in (losses, off)]
assert all(not np.array_equal(a, b) for a, b in zip(*local))
held = q.range.moving_mean.numpy()
tf.saved_model.save(m, again)
n = tf.saved_model.load(again)
np.testing.assert_allclose(n.quantization.range.moving_mean.numpy(), held, rtol=1e-6)
assert n.quantization.bits.gamma.numpy() == 0
assert n.quantization.step.numpy() == 2
print("fine")
"""


def test_one_step_for_all_replicas_and_ranges_of_all_data(
    plain_forks: Server, rewritten: Callable[..., Path], tmp_path: Path
) -> None:
    """A range is the mean of the replicas' ranges; saving and loading keep it."""
    ranges = {"gamma": "learned", "beta": "learned", "moving_mean": "ema", "moving_variance": "ema"}
    path = rewritten("module_train", bits=4, range=ranges)
    done = plain_forks.python(MIRRORED, path, tmp_path / "again")
    assert done.out == "fine\n", done.err[-2000:]

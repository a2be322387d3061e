"""First lines of scripts that train under MirroredStrategy in a process of their own."""

from __future__ import annotations

PREAMBLE = """
import sys
import keras, numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
import bnqat

path, data, out = sys.argv[1:]
data = np.load(data)
with strategy.scope():
    layer = bnqat.KerasLayer(path)
    inputs = keras.Input((8, 8, 3))
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
"""
"""Two logical devices; `model` holds the rewritten model of the first argument as `layer`, `data` is the second's."""

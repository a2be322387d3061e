"""Training loops of one's own: resuming, XLA, half precision, accumulated gradients."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import bnqat
from tests import harness

Paths = Callable[..., Path]
X = [harness.images((None, 8, 8, 3), 4, seed) for seed in range(12)]
Y = tf.constant([1, 5, 9, 13])


def loss_of(logits: Any) -> Any:
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(Y, logits))


def step_of(loaded: Any, optimizer: Any, **options: Any) -> Any:
    variables = list(loaded.quantization.trainable_variables)
    optimizer.build(variables)

    @tf.function(**options)
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(loaded.quantization.train(x))
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    return step


def assert_same(first: Any, second: Any) -> None:
    for a, b in zip(first.quantization.variables, second.quantization.variables, strict=True):
        np.testing.assert_array_equal(a, b, err_msg=a.name)


def test_a_stopped_and_resumed_run_computes_the_same_bits(rewritten: Paths, tmp_path: Path) -> None:
    """Runs stop in the ramp or with frozen statistics; rounding is stochastic, and ranges move.

    The run to which they are compared saves checkpoints, and goes on.
    """
    ranges = {"gamma": "learned", "beta": "ema", "moving_mean": "ema", "moving_variance": "ema"}
    schedule = {"start_step": 3, "ramp_steps": 4, "freeze_step": 8}
    path = rewritten("module_train", bits=4, range=ranges, rounding="stochastic", **schedule)
    whole, optimizer = tf.saved_model.load(str(path)), keras.optimizers.Adam(1e-2)
    step = step_of(whole, optimizer)
    losses, saved = [], {}
    for number, x in enumerate(X):
        if number in (5, 9):
            saved[number] = tf.train.Checkpoint(model=whole, optimizer=optimizer).save(str(tmp_path / f"step_{number}"))
        losses.append(float(step(x)))
    for stop, checkpoint in saved.items():
        resumed, optimizer = tf.saved_model.load(str(path)), keras.optimizers.Adam(1e-2)
        step = step_of(resumed, optimizer)
        tf.train.Checkpoint(model=resumed, optimizer=optimizer).restore(checkpoint).assert_consumed()
        assert resumed.quantization.step.numpy() == stop
        assert [float(step(x)) for x in X[stop:]] == losses[stop:]
        assert_same(resumed, whole)


def test_widths_set_by_hand_are_resumed_too(rewritten: Paths, tmp_path: Path) -> None:
    path = rewritten("module", bits=8)
    first = tf.saved_model.load(str(path))
    first.quantization.bits.gamma.assign(2)
    saved = tf.train.Checkpoint(model=first).save(str(tmp_path / "c"))
    second = tf.saved_model.load(str(path))
    assert not np.array_equal(second.serve(X[0]), first.serve(X[0]))
    tf.train.Checkpoint(model=second).restore(saved).assert_consumed()
    np.testing.assert_array_equal(second.serve(X[0]), first.serve(X[0]))


def test_the_whole_step_compiled(rewritten: Paths) -> None:
    """XLA rounds in its own way. At 8 bits this rarely moves a value to the next level, and the levels are close.

    There are few steps, as TensorFlow compiles each anew, also that of a float model.
    """
    path = rewritten("module", bits=8)
    losses = []
    for compiled in (False, True):
        loaded = tf.saved_model.load(str(path))
        step = step_of(loaded, keras.optimizers.SGD(0.05), jit_compile=compiled)
        losses.append([float(step(x)) for x in X[:4]])
        assert loaded.quantization.step.numpy() == 4
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-4)
    assert losses[0][0] != losses[0][-1]


def test_the_second_phase_through_serve_is_the_frozen_branch(rewritten: Paths) -> None:
    """Loss and gradients agree bit for bit. `serve` counts no step, and can be compiled; the branch cannot."""
    loaded = tf.saved_model.load(str(rewritten("module", bits=4, freeze_step=0)))
    variables = list(loaded.quantization.trainable_variables)
    results = []
    for function in (loaded.quantization.train, loaded.serve):
        with tf.GradientTape() as tape:
            loss = loss_of(function(X[0]))
        results.append([loss, *tape.gradient(loss, variables)])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)
    assert all(np.any(g.numpy()) for g in results[1])
    assert loaded.quantization.step.numpy() == 1
    with pytest.raises(tf.errors.InvalidArgumentError):
        step_of(loaded, keras.optimizers.SGD(0.1), jit_compile=True)(X[0])

    @tf.function(jit_compile=True)
    def compiled(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(loaded.serve(x))
        return [loss, *tape.gradient(loss, variables)]

    for a, b in zip(compiled(X[0]), results[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_loss_scaling_by_a_power_of_two_changes_nothing(rewritten: Paths) -> None:
    path = rewritten("module", bits=4)
    plain, scaled = tf.saved_model.load(str(path)), tf.saved_model.load(str(path))
    step = step_of(plain, keras.optimizers.SGD(0.05))
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05), initial_scale=2.0**10)
    variables = list(scaled.quantization.trainable_variables)
    optimizer.build(variables)
    for x in X[:4]:
        step(x)
        with tf.GradientTape() as tape:
            loss = optimizer.scale_loss(loss_of(scaled.train(x)))
        optimizer.apply(tape.gradient(loss, variables), variables)
    for a, b in zip(plain.quantization.variables, scaled.quantization.variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7, err_msg=a.name)


def test_accumulated_gradients_count_calls(rewritten: Paths) -> None:
    loaded = tf.saved_model.load(str(rewritten("module", bits=4)))
    step = step_of(loaded, keras.optimizers.SGD(0.05, gradient_accumulation_steps=3))
    kernel, moving = loaded.kernels[0], loaded.norms[0].moving_mean
    states = []
    for x in X[:6]:
        step(x)
        states.append((kernel.numpy(), moving.numpy()))
    changed = [not np.array_equal(a[0], b[0]) for a, b in itertools.pairwise(states)]
    assert changed == [False, True, False, False, True]
    assert all(not np.array_equal(a[1], b[1]) for a, b in itertools.pairwise(states))
    assert loaded.quantization.step.numpy() == 6


HALF = """
import sys
import numpy as np
import tensorflow as tf
from tensorflow.python.eager import context

loaded = tf.saved_model.load(sys.argv[1])
variables = list(loaded.quantization.trainable_variables)
x = tf.constant(np.random.default_rng(0).normal(0.3, 1.5, [4, 8, 8, 3]).astype("float32"))
losses = []
for half in (False, True):
    tf.config.optimizer.set_experimental_options({"auto_mixed_precision_onednn_bfloat16": half})

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(loaded.train(x) ** 2)
        return loss, tape.gradient(loss, variables)

    context.enable_run_metadata()
    loss, gradients = step(x)
    graphs = context.export_run_metadata().function_graphs
    context.disable_run_metadata()
    nodes = [n for g in graphs for p in g.partition_graphs for n in p.node if "T" in n.attr]
    name = lambda n: tf.dtypes.as_dtype(n.attr["T"].type).name
    print(*sorted({name(n) for n in nodes if "FusedBatchNorm" in n.op}))
    assert all(np.isfinite(g).all() for g in gradients)
    losses.append(float(loss))
np.testing.assert_allclose(losses[1], losses[0], rtol=0.02)  # bfloat16 has 8 bits of precision
once, baked = (tf.saved_model.load(path) for path in sys.argv[2:])
np.testing.assert_array_equal(tf.function(once.serve)(x), tf.function(baked.serve)(x))
"""


def test_half_precision_by_grappler_leaves_the_quantisers_in_float32(rewritten: Paths, tmp_path: Path) -> None:
    """Quantisers give float32 results, stored in half precision. Without AVX-512 the Grappler pass changes nothing."""
    bnqat.finalize(rewritten("module", bits=4), tmp_path / "baked")
    environment = {"TF_ENABLE_ONEDNN_OPTS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "-1"}
    done = subprocess.run(
        [sys.executable, "-c", HALF, *[str(rewritten("module", bits=4))] * 2, str(tmp_path / "baked")],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    has = "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    before, after = done.stdout.splitlines()
    assert before == "float32"
    assert ("bfloat16" in after.split()) == has

"""Ops with gradients of their own, whose gradient functions take tensors of the function that they differentiate."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import bnqat
from rewriter.app.verification.claims import verify
from rewriter.liveness import BRANCHES
from rewriter.savedmodel.read import load
from tests.models import SHAPE, Activated

OFF = 2**40
X = np.random.default_rng(5).normal(size=(6, 8, 8, 3)).astype("float32")


@tf.custom_gradient
def clipped(x: tf.Tensor) -> Any:
    """ReLU with a clipped custom gradient that uses its input and its output."""
    y = tf.nn.relu(x)
    return y, lambda dy: tf.clip_by_value(dy, -0.01, 0.01) * (y + 0.5 * x)


ACTIVATIONS = {"silu": tf.nn.silu, "clipped": clipped, "recomputed": tf.recompute_grad(tf.math.tanh)}


class Chosen(Activated):
    """The mode is an argument, and the choice precedes the activation."""

    @tf.function(input_signature=[tf.TensorSpec(SHAPE, name="x"), tf.TensorSpec([], tf.bool, name="training")])
    def either(self, x: tf.Tensor, training: tf.Tensor) -> tf.Tensor:
        for kernel, norm in zip(self.kernels, self.norms, strict=True):
            y = tf.nn.conv2d(x, kernel, 1, "SAME")
            x = self.activation(tf.cond(training, lambda y=y, n=norm: n(y, True), lambda y=y, n=norm: n(y, False)))
        return tf.reduce_mean(x, [1, 2])


def gradients(function: Callable[[tf.Tensor], tf.Tensor], variables: list[Any]) -> list[np.ndarray]:
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        loss = tf.reduce_sum(function(x) ** 2)
    return [tf.convert_to_tensor(g).numpy() for g in tape.gradient(loss, [x, *variables])]


def trained(loaded: Any) -> list[np.ndarray]:
    """Return the training function's gradients: of its input, then of its variables in its own order."""
    (function,) = loaded.train.concrete_functions
    return gradients(loaded.train, [v for v in function.variables if v.trainable])


def sizes(arrays: list[np.ndarray]) -> list[float]:
    return sorted(float(np.sum(g.astype(float) ** 2)) for g in arrays)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_training_has_the_gradients_of_the_source(name: str, tmp_path: Path) -> None:
    """The source only serves, so training is derived."""
    net = Activated(ACTIVATIONS[name])
    tf.saved_model.save(net, str(tmp_path / "source"), signatures=net.serve)
    bnqat.rewrite(tmp_path / "source", tmp_path / "target", start_step=OFF)
    expected = gradients(lambda x: net.call(x, True), list(net.trainable_variables))
    derived = trained(tf.saved_model.load(str(tmp_path / "target")))
    assert len(derived) == len(expected) == 7
    np.testing.assert_allclose(derived[0], expected[0], rtol=1e-3, atol=1e-6 * np.abs(expected[0]).max())
    np.testing.assert_allclose(sizes(derived), sizes(expected), rtol=1e-3)

    if name != "silu":  # which test_survey.py asks of the model module_silu
        assert verify(tmp_path / "source", tmp_path / "target").ok
    assert bnqat.diff(tmp_path / "source", tmp_path / "target").report.verdict.other_changes == 0


@pytest.mark.parametrize("freeze_step", [None, 0])
@pytest.mark.parametrize("name", ["silu", "clipped"])  # TensorFlow cannot save the gradient of the other one's gradient
def test_saved_again_and_finalised(name: str, freeze_step: int | None, tmp_path: Path) -> None:
    net = Activated(ACTIVATIONS[name])
    tf.saved_model.save(net, str(tmp_path / "source"), signatures=net.serve)
    bnqat.rewrite(tmp_path / "source", tmp_path / "target", freeze_step=freeze_step)
    loaded = tf.saved_model.load(str(tmp_path / "target"))
    tf.saved_model.save(loaded, str(tmp_path / "again"), signatures=dict(loaded.signatures))
    again = tf.saved_model.load(str(tmp_path / "again"))

    def finalized(name: str, **options: Any) -> Any:
        bnqat.finalize(tmp_path / "again", tmp_path / name, **options)
        return tf.saved_model.load(str(tmp_path / name))

    def served(model: Any) -> tuple[np.ndarray, list[np.ndarray]]:
        def serve(x: tf.Tensor) -> tf.Tensor:
            return model.signatures["serving_default"](x=x)["output_0"]

        return serve(tf.constant(X)).numpy(), gradients(serve, [])

    outputs, expected = served(again)
    final_outputs, final_gradients = served(finalized("final"))
    np.testing.assert_array_equal(final_outputs, outputs)
    np.testing.assert_array_equal(final_gradients, expected)
    if freeze_step is None:  # folding sees only the serving function, which has no phases
        folded = served(finalized("folded", fold=True))[1]
        np.testing.assert_allclose(folded, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    assert len(trained(again)) == 7


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_both_phases_of_a_freeze_step_are_differentiated(name: str, tmp_path: Path) -> None:
    """A gradient function takes tensors from the function that a branch calls, not from the branch."""
    net = Activated(ACTIVATIONS[name])
    tf.saved_model.save(net, str(tmp_path / "source"), signatures=net.serve)
    bnqat.rewrite(tmp_path / "source", tmp_path / "target", start_step=OFF, freeze_step=1)
    variables = list(net.trainable_variables)
    by_phase = [gradients(lambda x, mode=mode: net.call(x, mode), variables) for mode in (True, False)]  # type: ignore[misc]
    loaded = tf.saved_model.load(str(tmp_path / "target"))
    trained = [v for v in loaded.quantization.variables if v.trainable]
    first = gradients(loaded.train, trained)
    assert loaded.quantization.step.numpy() == 1
    moved = [v.assign(old) for v, old in zip(statistics(loaded), statistics(net), strict=True)]
    assert len(moved) == 4
    for derived, expected in zip((first, gradients(loaded.train, trained)), by_phase, strict=True):
        assert len(derived) == len(expected) == 7
        np.testing.assert_allclose(derived[0], expected[0], rtol=1e-3, atol=1e-6 * np.abs(expected[0]).max())
        np.testing.assert_allclose(sizes(derived), sizes(expected), rtol=1e-3)

    if name == "silu":  # `verify` sees the phases; the other gradient functions it sees in the test without phases
        verified = verify(tmp_path / "source", tmp_path / "target")
        assert verified.ok, verified.claims


def statistics(model: Any) -> list[Any]:
    return [v for norm in model.norms for v in (norm.moving_mean, norm.moving_variance)]


@pytest.mark.parametrize("name", ["silu", "clipped"])
def test_after_a_choice_of_the_mode(name: str, tmp_path: Path) -> None:
    """Ops after the conditional are computed and differentiated in one function per mode."""
    net = Chosen(ACTIVATIONS[name])
    tf.saved_model.save(net, str(tmp_path / "source"), signatures=net.serve)
    bnqat.rewrite(tmp_path / "source", tmp_path / "target", start_step=OFF)
    (either,) = (load(tmp_path / "target").graphs[e.function] for e in load(tmp_path / "target").root_entries("either"))
    assert [node.op for node in either.nodes.values() if node.op in BRANCHES] == ["If"]
    before, after = (tf.saved_model.load(str(tmp_path / n)) for n in ("source", "target"))
    for mode in (False, True):
        derived, expected = (gradients(partial(m.either, training=tf.constant(mode)), []) for m in (after, before))
        np.testing.assert_allclose(derived, expected, rtol=1e-3, atol=1e-6 * np.abs(expected).max())

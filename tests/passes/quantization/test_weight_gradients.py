"""Gradients of fake-quantised weights, for the weights and for learned limits, against the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from passes.quantization.batched import GENERAL
from passes.quantization.quantizers import QuantizerSpec
from passes.quantization.ranges import Dynamic, Learned, Mse
from passes.quantization.schemes import Affine
from tests.passes.quantization.weight_runs import (
    KERNEL,
    SCHEMES,
    ZEROS,
    Drawn,
    channels_of,
    drawn,
    saved_tensors,
    spec_of,
    specs_of,
    tensor_inputs,
)
from tests.passes.quantizer_runs import function_inputs, saved

F = np.float32
ON = 1


def upstream_of(spec: QuantizerSpec) -> np.ndarray:
    return np.random.default_rng(len(spec.axes)).normal(0, 1, KERNEL).astype(F)


def gradients(specs: tuple[QuantizerSpec, ...], mode: int, inputs: list[tf.Tensor], *, jit: bool = False) -> list[Any]:
    """Return the gradients of each input for the sum of the results times `upstream_of`; None where there is none."""
    serve = saved_tensors(specs, mode)

    def of_inputs(*given: tf.Tensor) -> list[Any]:
        with tf.GradientTape() as tape:
            tape.watch(given)
            results = serve(*given)
            loss = tf.add_n([tf.reduce_sum(r * upstream_of(s)) for r, s in zip(results, specs, strict=True)])
        return list(tape.gradient(loss, given, unconnected_gradients=tf.UnconnectedGradients.ZERO))

    return [g.numpy() for g in tf.function(of_inputs, jit_compile=jit, autograph=False)(*inputs)]


def limit_gradients(t: Drawn, amount: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradients of the limits that a weight is given, float64 [ranges, 2], and the sums of their magnitudes.

    A step's gradient is that of learned step size quantisation, e / sqrt(n t) for n weights. The limit is t steps, so
    it moves t times as far, by a gradient t times as large: e (t / t) t / sqrt(n t).
    """
    reference = t.reference()
    reduced = tuple(axis for axis in range(len(KERNEL)) if axis not in channels_of(t.spec))
    top = t.spec.scheme.codes(t.bits)[1]
    weights = int(np.prod([KERNEL[axis] for axis in reduced]))
    factor = amount * top**2 / np.sqrt(weights * top)
    e = reference.of_high.astype(np.float64)
    of_high, of_low, magnitude = e / top, np.zeros_like(e), np.abs(e / top)
    if t.spec.relative:
        low, high = (np.expand_dims(limit.astype(np.float64), reduced) for limit in t.own)
        size = high - low if t.spec.scheme.has_low else np.maximum(high, -low)
        of_high, magnitude = (
            np.divide(part, size, out=np.zeros_like(e), where=size > 0) for part in (of_high, magnitude)
        )
    elif t.spec.scheme.has_low:
        of_low = 1.0 - reference.inside - of_high
    upstream = factor * upstream_of(t.spec)
    sums = [(slope * upstream).sum(reduced).ravel() for slope in (of_low, of_high)]
    return np.stack(sums, -1), ((magnitude + 1) * np.abs(upstream)).sum(reduced).reshape(-1, 1)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("mode", "amount", "jit"), [(ON, 1.0, False), (GENERAL, 0.3, False), (GENERAL, 0.3, True)])
def test_gradients_of_every_combination(name: str, mode: int, amount: float, jit: bool) -> None:
    specs = specs_of(name)
    tensors = [drawn(spec, 4) for spec in specs]
    all_gradients = gradients(specs, mode, tensor_inputs(tensors, amount), jit=jit)
    of_limits = iter(all_gradients[2:])
    for t, of_weight in zip(tensors, all_gradients[-len(specs) :], strict=True):
        inside = t.reference().inside
        slope = F(1) if isinstance(t.spec.scheme.range, Dynamic) else np.where(inside, F(1), F(1) - F(amount))
        np.testing.assert_array_equal(of_weight, upstream_of(t.spec) * slope)
        if t.given is None:
            continue
        of_limit = next(of_limits).reshape(-1, 2)
        if not isinstance(t.spec.scheme.range, Learned):
            assert not of_limit.any()
            continue
        assert np.any(of_limit)
        expected, magnitude = limit_gradients(t, amount)
        # float32 sums of up to 120 terms, each of which is rounded five times, in an order of the kernel's own.
        assert (np.abs(of_limit - expected) <= 5e-7 * magnitude).all(), (name, t.spec)


def test_a_learned_limit_moves_as_the_step_of_learned_step_size_quantization() -> None:
    """After a step of descent, both have changed by the same fraction (Esser et al., equations 3 and 5)."""
    bits, top, weights = 4, 7, 24
    specs = (spec_of("symmetric", (-1,), Learned()), spec_of("symmetric", (-2,), Learned()))
    t = drawn(specs[0], bits)
    v = np.random.default_rng(0).normal(0, 0.7, KERNEL) * t.limits.high  # no ties, which either rounds in its own way
    t = t._replace(weight=v.astype(F))
    of_limit = gradients(specs, ON, tensor_inputs([t, drawn(specs[1], bits)]))[2][:, 1]
    scale = t.limits.high / top
    x = t.weight / np.where(scale > 0, scale, 1)
    of_step = np.where(x < -top - 0.5, -top, np.where(x > top + 0.5, top, np.round(x) - x)) * upstream_of(specs[0])
    of_step = of_step.sum((0, 1, 2)) / np.sqrt(weights * top)
    others = np.arange(KERNEL[-1]) != ZEROS
    of_limit, of_step, limit, scale = (part[others] for part in (of_limit, of_step, t.limits.high, scale))
    np.testing.assert_allclose(of_limit / limit, of_step / scale, rtol=1e-4)


def test_a_channel_without_positive_weights_learns_like_others() -> None:
    """A fraction's gradient is divided by the larger side of the range, which may be the negative one."""
    for name in ("full", "power_of_two"):
        specs = (spec_of(name, (-1,), Learned(), relative=True), spec_of(name, (-2,), Learned(), relative=True))
        tensors = [drawn(spec, 3) for spec in specs]
        negative = [t._replace(weight=-np.abs(t.weight)) for t in tensors]
        for of_limit in gradients(specs, ON, tensor_inputs(negative))[2:4]:
            assert 0 < np.abs(of_limit).max() < 1e3


VECTOR = QuantizerSpec(Affine(range=Learned()), (5,), training=True).group_key


@pytest.mark.parametrize("spec", [spec_of("symmetric", (-1,), Learned()), spec_of("affine", (), Mse()), VECTOR])
def test_a_compiled_gradient_takes_nothing_for_a_constant(spec: QuantizerSpec) -> None:
    """Otherwise XLA compiles a training step anew for each value of a weight."""
    assert spec.shape is not None
    assert spec.limits_shape is not None
    v = np.random.default_rng(0).normal(0, 1, spec.shape).astype(F)
    inputs = function_inputs(spec, v, 4, limits=np.broadcast_to(np.array([-1, 1], F), spec.limits_shape))
    serve = saved(spec)

    def of_value(*given: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(given[2:])
            loss = tf.reduce_sum(serve(*given))
        return tape.gradient(loss, given[2:])

    compiled = tf.function(of_value, jit_compile=True, autograph=False)
    text = compiled.experimental_get_compiler_ir(*inputs)(stage="hlo")
    arguments = text.partition("entry_computation_layout={(")[2].partition(")->")[0]
    assert arguments.count("[") == len(inputs), arguments

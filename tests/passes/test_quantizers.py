from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from passes.quantizers import Affine, Log, Quantizer, switched
from rewriter.edit import Define, Edit, Rewire
from rewriter.expr import Use
from rewriter.ir import Edge, Error, Model, Value
from rewriter.pipeline import Pipeline
from rewriter.savedmodel.read import load
from rewriter.savedmodel.write import save
from tests.reference import affine, log

F = np.float32
EPSILON = 1e-3
SIZE = 24


@dataclass(frozen=True)
class Apply:
    """Let `serve(value, active)` return the quantised value."""

    quantizer: Quantizer
    size: int | None

    def edits(self, model: Model) -> Iterable[Edit]:
        (entry,) = model.root_entries("serve")
        value, active = (Value(name) for name in model.graphs[entry.function].arguments)
        function = switched(self.quantizer, EPSILON, self.size)
        yield Define(function)
        yield Rewire(Edge(entry.function, "", 0), function(Use("bool", active), Use("float32", value)), "test")


@cache
def run(quantizer: Affine | Log, jit: bool = False, size: int | None = None) -> Any:
    """The quantiser as a TensorFlow function (value, active) -> value, through a real SavedModel."""
    module = tf.Module()
    spec = [tf.TensorSpec([size], tf.float32), tf.TensorSpec([], tf.bool)]
    module.serve = tf.function(lambda value, active: tf.where(active, value, value), input_signature=spec)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source", Path(folder) / "target"
        tf.saved_model.save(module, str(source))
        save(Pipeline([Apply(quantizer, size)]).run(load(source))[0], target)
        loaded = tf.saved_model.load(str(target))
    return tf.function(lambda v, a: loaded.serve(v, a), jit_compile=jit)  # noqa: PLW0108  keeps `loaded` alive


def quantize(quantizer: Affine | Log, v: Any, jit: bool = False) -> np.ndarray:
    result: np.ndarray = run(quantizer, jit)(tf.constant(v, tf.float32), tf.constant(True)).numpy()
    return result


vectors = hnp.arrays(
    F,
    st.integers(1, SIZE),
    elements=st.floats(-1000, 1000, width=32, allow_subnormal=False)
    | st.sampled_from([0.0, 1.0, -1.0, 1e-30, 4e-38, float("nan"), float("inf"), float("-inf")]),
)
variances = hnp.arrays(
    F,
    st.integers(1, SIZE),
    elements=st.floats(0, 900, width=32, allow_subnormal=False) | st.sampled_from([0.0, 4e-38, 1e-4, 900.0]),
)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12, 16])
def test_affine_equals_its_reference_bit_for_bit(bits: int, jit: bool) -> None:
    rng = np.random.default_rng(bits)
    for scale in (1e-6, 1.0, 1e4):
        for shift in (0.0, 3.0, -3.0):
            v = (rng.normal(shift, 1, 96) * scale).astype(F)
            np.testing.assert_array_equal(quantize(Affine(bits), v, jit), affine(v, bits))


@settings(max_examples=150, deadline=None)
@given(vectors, st.sampled_from([2, 4, 8, 16]))
def test_affine_equals_its_reference_on_any_vector(v: np.ndarray, bits: int) -> None:
    np.testing.assert_array_equal(quantize(Affine(bits), v), affine(v, bits))


@settings(max_examples=150, deadline=None)
@given(variances, st.sampled_from([2, 4, 8, 16]))
def test_log_is_within_one_ulp_of_its_reference(v: np.ndarray, bits: int) -> None:
    assert_log_close(quantize(Log(bits), v), v, bits)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8, 12, 16])
def test_log_on_variances_of_many_magnitudes(bits: int, jit: bool) -> None:
    v = np.exp(np.random.default_rng(bits).uniform(np.log(1e-4), np.log(900), 200)).astype(F)
    assert_log_close(quantize(Log(bits), v, jit), v, bits)


def assert_log_close(got: np.ndarray, v: np.ndarray, bits: int) -> None:
    """Within one ulp of u = v + epsilon, except where a code is within 1e-9 of a rounding boundary."""
    u = (v + F(EPSILON)).astype(np.float64)
    step = np.log(u.max() / u.min()) / (2**bits - 1)
    code = np.log(u / u.min()) / step if step > 0 else np.zeros_like(u)
    clear = np.abs(code - np.floor(code) - 0.5) > 1e-9
    wanted = log(v, bits, EPSILON)
    ulp = np.spacing((wanted + F(EPSILON)).astype(F))
    assert np.all(np.abs(got - wanted)[clear] <= ulp[clear])
    assert np.all(np.abs(got - wanted) <= u * np.expm1(step) + ulp)


@pytest.mark.parametrize("quantizer", [Affine(4), Affine(8), Log(4), Log(8)])
def test_constant_vectors_survive(quantizer: Affine | Log) -> None:
    ones = np.ones(7, F)
    # log works on v + epsilon, so that its unit in the last place is that of the sum
    np.testing.assert_allclose(quantize(quantizer, ones), ones, rtol=0, atol=np.spacing(F(1 + EPSILON)))
    np.testing.assert_array_equal(quantize(quantizer, np.zeros(7, F)), np.zeros(7, F))


def test_negative_constants_survive_affine() -> None:
    v = np.full(5, -0.7, F)
    np.testing.assert_allclose(quantize(Affine(8), v), v, rtol=0, atol=np.spacing(F(0.7)))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_variance_stays_zero_and_dead_channels_do_not_cost_live_ones(bits: int) -> None:
    v = np.array([0, 4e-38, 1e-4, 0.5, 900], F)
    got = quantize(Log(bits), v)
    assert got[0] == 0
    assert got[1] == 0
    # half a level of log(v + epsilon)
    half = np.log((900 + EPSILON) / EPSILON) / (2**bits - 1) / 2
    assert np.all(np.abs(np.log((got + EPSILON) / (v + EPSILON))) <= half * 1.0001)


@pytest.mark.parametrize("quantizer", [Affine(4), Log(4)])
def test_nan_and_infinity_pass_alone(quantizer: Affine | Log) -> None:
    v = np.array([0.1, np.nan, 0.4, np.inf, 0.9], F)
    got = quantize(quantizer, v)
    np.testing.assert_array_equal(got[[1, 3]], v[[1, 3]])
    np.testing.assert_array_equal(got[[0, 2, 4]], quantize(quantizer, v[[0, 2, 4]]))


def test_negative_variances_pass_alone() -> None:
    v = np.array([-0.5, 0.1, 0.4], F)
    got = quantize(Log(4), v)
    assert got[0] == v[0]
    np.testing.assert_array_equal(got[1:], quantize(Log(4), v[1:]))


@pytest.mark.parametrize("quantizer", [Affine(2), Log(2)])
@pytest.mark.parametrize("size", [None, 6])
def test_the_gradient_is_one_and_off_is_the_identity(quantizer: Affine | Log, size: int | None) -> None:
    v = tf.constant([0.0, 0.1, 1.5, 2.0, 0.7, 3.0])
    for active in (True, False):
        with tf.GradientTape() as tape:
            tape.watch(v)
            y = run(quantizer, size=size)(v, tf.constant(active))
        weights = tf.range(1.0, 7.0)
        with tf.GradientTape() as tape:
            tape.watch(v)
            loss = tf.reduce_sum(run(quantizer, size=size)(v, tf.constant(active)) * weights)
        np.testing.assert_array_equal(tape.gradient(loss, v), weights)
        assert np.array_equal(y, v) is not active


def test_off_returns_the_bits_themselves() -> None:
    v = np.array([-0.0, np.nan, -np.inf, 1e-40, 0.3], F)
    got = run(Affine(8))(tf.constant(v), tf.constant(False)).numpy()
    np.testing.assert_array_equal(got.view(np.uint32), v.view(np.uint32))


@pytest.mark.parametrize("make", [Affine, Log])
@pytest.mark.parametrize("bits", [1, 0, 17])
def test_widths_out_of_range_are_refused(make: Any, bits: int) -> None:
    with pytest.raises(Error, match="from 2 to 16"):
        make(bits)

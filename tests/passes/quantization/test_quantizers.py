from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from passes.quantization.quantizers import QuantizerSpec
from passes.quantization.ranges import DYNAMIC, Ema, Fixed, Learned, Range
from passes.quantization.schemes import Affine, Log, PowerOfTwo, Scheme, Symmetric
from rewriter.ir import Error
from tests.passes.quantizer_runs import compiled, eager, function_inputs, saved
from tests.reference import Quantized, ema, quantize

F = np.float32
EPSILON = 1e-3
SIZE = 12

SCHEMES = [Affine, Symmetric, PowerOfTwo, Log]
RANGES: list[Range] = [DYNAMIC, Fixed(0.0, 2.0), Ema(), Learned()]
ROUNDINGS = ["nearest", "stochastic"]


def spec_of(make: Any, size: int | None = SIZE, training: bool = True, **options: Any) -> QuantizerSpec:
    shape = None if size is None else (size,)
    return QuantizerSpec(make(**options).within(EPSILON), shape, training=training).group_key


def expected(spec: QuantizerSpec, v: np.ndarray, bits: int, limits: Any, noise: Any) -> Quantized:
    scheme = spec.scheme
    return quantize(
        scheme.name,
        v,
        bits,
        EPSILON,
        narrow=scheme.narrow,
        limits=None if scheme.range.name == "dynamic" else np.asarray(limits, F),
        noise=noise if spec.stochastic else None,
    )


def limits_for(scheme: Scheme, spread: float = 0.8) -> np.ndarray:
    """Return limits, in the scheme's coordinate, that hold most but not all of `vector`."""
    low, high = (0.01, spread) if isinstance(scheme, Log) else (-0.7, spread)
    return np.array(scheme.fixed(Fixed(low, high)), F)


def vector(scheme: type[Scheme], seed: int = 0) -> np.ndarray:
    v = np.random.default_rng(seed).normal(0.1, 0.6, SIZE).astype(F)
    return np.abs(v) if scheme is Log else v


def noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, 1]).random(SIZE, F)


def assert_equal(scheme: Scheme, got: Any, reference: np.ndarray) -> None:
    """Assert equality bit for bit; log, computed by two libraries, may differ by one ulp of v + epsilon."""
    if isinstance(scheme, Log):
        with np.errstate(invalid="ignore"):
            ulp = np.where(np.isfinite(reference), np.spacing((np.abs(reference) + F(EPSILON)).astype(F)), 0)
            same = (
                (np.abs(np.asarray(got) - reference) <= ulp)
                | (got == reference)
                | (np.isnan(got) & np.isnan(reference))
            )
        assert same.all(), (got, reference)
    else:
        np.testing.assert_array_equal(got, reference)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("range_", RANGES, ids=lambda r: r.name)
@pytest.mark.parametrize("make", SCHEMES)
@pytest.mark.parametrize("narrow", [False, True])
def test_every_combination_equals_its_reference(make: Any, range_: Range, rounding: Any, narrow: bool) -> None:
    """Results are equal in a graph, under XLA and op by op; one function serves all widths."""
    spec = spec_of(make, range=range_, rounding=rounding, narrow_range=narrow)
    for bits in range(2, 17):
        v, u = vector(make, bits), noise(bits)
        limits = limits_for(spec.scheme)
        inputs = function_inputs(spec, v, bits, limits=limits, noise=u)
        reference = expected(spec, v, bits, limits, u).value
        assert_equal(spec.scheme, saved(spec)(*inputs).numpy(), reference)
        if bits in (2, 5, 8, 16):
            assert_equal(spec.scheme, eager(spec, inputs).numpy(), reference)
            assert_equal(spec.scheme, compiled(spec)(*inputs).numpy(), reference)
    assert len(np.unique(reference)) > SIZE // 2


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("range_", RANGES, ids=lambda r: r.name)
@pytest.mark.parametrize("make", SCHEMES)
@pytest.mark.parametrize("amount", [1.0, 0.25])
def test_gradients_of_every_combination(make: Any, range_: Range, rounding: Any, amount: float) -> None:
    """Gradients: 1 for values, 1 - amount for clipped codes; learned limits as in learned step size quantisation."""
    spec = spec_of(make, range=range_, rounding=rounding)
    bits, v, u, weights = 3, vector(make) * F(2), noise(), np.linspace(-1, 2, SIZE, dtype=F)
    limits = limits_for(spec.scheme)
    inputs = function_inputs(spec, v, bits, amount=amount, limits=limits, noise=u)
    learned = range_.name == "learned"
    watched = [inputs[-1], inputs[2]] if learned else [inputs[-1]]
    with tf.GradientTape() as tape:
        for tensor in watched:
            tape.watch(tensor)
        loss = tf.reduce_sum(saved(spec)(*inputs) * weights)
    grads = tape.gradient(loss, watched)
    reference = expected(spec, v, bits, limits, u)
    assert reference.inside.all() == (range_.name == "dynamic")
    np.testing.assert_allclose(grads[0], weights * np.where(reference.inside, F(1), F(1) - F(amount)), rtol=1e-6)
    if learned:
        top = spec.scheme.codes(bits)[1]
        factor = amount / np.sqrt(SIZE * top)
        of_limits = [np.sum(g.astype(np.float64) * weights) * factor for g in (reference.of_low, reference.of_high)]
        assert any(of_limits)
        np.testing.assert_allclose(grads[1], of_limits, rtol=2e-5, atol=1e-7)


def test_the_gradient_of_the_scale_is_that_of_learned_step_size_quantization() -> None:
    """The gradient follows Esser et al., equations 3 and 5; the scale moves the limits."""
    spec = spec_of(Symmetric, range=Learned())
    bits, v = 4, vector(Symmetric)
    scale = tf.constant(0.1)
    with tf.GradientTape() as tape:
        tape.watch(scale)
        limits = tf.stack([scale * -7, scale * 7])
        inputs = function_inputs(spec, v, bits, limits=[0, 0])
        inputs[2] = limits
        loss = tf.reduce_sum(saved(spec)(*inputs))
    x = v / 0.1
    of_scale = np.where(x <= -7, -7, np.where(x >= 7, 7, np.round(x) - x))
    assert (np.abs(x) >= 7).any()
    np.testing.assert_allclose(tape.gradient(loss, scale), of_scale.sum() / np.sqrt(SIZE * 7), rtol=1e-4)


def test_values_far_beyond_learned_limits() -> None:
    """A position that overflows is clipped, and the term that adds only a gradient does not become NaN."""
    spec, v = spec_of(Affine, range=Learned()), np.array([4e-38, 10, *[0] * 10], F)
    limits = np.array([-4e-38, 4e-38], F)
    got = saved(spec)(*function_inputs(spec, v, 2, limits=limits)).numpy()
    np.testing.assert_array_equal(got, expected(spec, v, 2, limits, None).value)


special = st.sampled_from([0.0, 1.0, -1.0, 1e-30, 4e-38, 0.5, float("nan"), float("inf"), float("-inf")])
numbers = st.floats(-1000, 1000, width=32, allow_subnormal=False)
positive = st.floats(0, 900, width=32, allow_subnormal=False) | st.sampled_from([0.0, 4e-38, 1e-4, 900.0])
vectors = hnp.arrays(F, SIZE, elements=numbers | special)
variances = hnp.arrays(F, SIZE, elements=positive | special)
shorter = hnp.arrays(F, st.integers(1, 24), elements=numbers | special)


@settings(max_examples=120, deadline=None)
@given(vectors, st.sampled_from([Affine, Symmetric, PowerOfTwo]), st.integers(2, 16), st.booleans(), st.booleans())
def test_linear_schemes_on_any_vector(v: np.ndarray, make: Any, bits: int, narrow: bool, learned: bool) -> None:
    range_: Range = Learned() if learned else DYNAMIC
    spec = spec_of(make, range=range_, narrow_range=narrow)
    limits = np.array([-1, 1], F) * np.abs(v[0] if np.isfinite(v[0]) else 1)
    got = saved(spec)(*function_inputs(spec, v, bits, limits=limits)).numpy()
    np.testing.assert_array_equal(got, expected(spec, v, bits, limits, None).value)


@settings(max_examples=80, deadline=None)
@given(shorter, st.sampled_from([Affine, Symmetric, PowerOfTwo]), st.integers(2, 16))
def test_linear_schemes_on_vectors_of_any_length(v: np.ndarray, make: Any, bits: int) -> None:
    spec = spec_of(make, size=None)
    got = saved(spec)(*function_inputs(spec, v, bits)).numpy()
    np.testing.assert_array_equal(got, expected(spec, v, bits, None, None).value)


@settings(max_examples=120, deadline=None)
@given(vectors, st.sampled_from([Affine, Symmetric, PowerOfTwo]), st.integers(2, 16))
def test_what_quantized_values_are(v: np.ndarray, make: Any, bits: int) -> None:
    """There are at most 2**bits values, zero among them; each is within a step of its input, and order is kept."""
    spec = spec_of(make)
    got = saved(spec)(*function_inputs(spec, v, bits)).numpy()
    finite = np.isfinite(v)
    np.testing.assert_array_equal(got[~finite], v[~finite])
    np.testing.assert_array_equal(got[v == 0], v[v == 0])
    values, levels = v[finite], got[finite]
    assert len(np.unique(levels)) <= 2**bits
    order = np.argsort(values, kind="stable")
    assert (np.diff(levels[order]) >= 0).all()
    wide = max(values.max(initial=0), 0) - min(values.min(initial=0), 0)
    step = wide / (2**bits - 2) if make is Affine else 2 * np.abs(values).max(initial=0) / (2 ** (bits - 1) - 1)
    assert (np.abs(levels - values) <= step * 1.001 + 1e-37).all()


@settings(max_examples=150, deadline=None)
@given(variances, st.integers(2, 16), st.booleans())
def test_log_on_any_vector(v: np.ndarray, bits: int, narrow: bool) -> None:
    spec = spec_of(Log, narrow_range=narrow)
    assert_log_close(spec, saved(spec)(*function_inputs(spec, v, bits)).numpy(), v, bits)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8, 12, 16])
def test_log_on_variances_of_many_magnitudes(bits: int, jit: bool) -> None:
    v = np.exp(np.random.default_rng(bits).uniform(np.log(1e-4), np.log(900), 200)).astype(F)
    spec = spec_of(Log, size=None)
    assert_log_close(spec, compiled(spec, jit)(*function_inputs(spec, v, bits)).numpy(), v, bits)


def assert_log_close(spec: QuantizerSpec, got: np.ndarray, v: np.ndarray, bits: int) -> None:
    """Assert equality within one ulp of u = v + epsilon, except if a code is within 1e-9 of a rounding boundary."""
    reference = expected(spec, v, bits, None, None).value
    with np.errstate(invalid="ignore"):
        valid = (v >= 0) & np.isfinite(v)
    np.testing.assert_array_equal(got[~valid], v[~valid])
    if not valid.any():
        return
    got, v, reference = got[valid], v[valid], reference[valid]
    u = (v + F(EPSILON)).astype(np.float64)
    step = np.log(u.max() / u.min()) / spec.scheme.codes(bits)[1]
    code = np.log(u / u.min()) / step if step > 0 else np.zeros_like(u)
    clear = np.abs(code - np.floor(code) - 0.5) > 1e-9
    ulp = np.spacing((reference + F(EPSILON)).astype(F))
    assert np.all(np.abs(got - reference)[clear] <= ulp[clear])
    assert np.all(np.abs(got - reference) <= u * np.expm1(step) + ulp)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("make", [Affine, Symmetric, PowerOfTwo])
def test_linear_schemes_on_many_magnitudes(make: Any, jit: bool) -> None:
    spec = spec_of(make, size=None)
    for bits in (2, 3, 4, 8, 12, 16):
        for scale in (1e-6, 1.0, 1e4):
            for shift in (0.0, 3.0, -3.0):
                v = (np.random.default_rng(bits).normal(shift, 1, 96) * scale).astype(F)
                reference = expected(spec, v, bits, None, None).value
                np.testing.assert_array_equal(compiled(spec, jit)(*function_inputs(spec, v, bits)), reference)


@pytest.mark.parametrize("make", SCHEMES)
@pytest.mark.parametrize("bits", [4, 8])
def test_constant_vectors_survive(make: Any, bits: int) -> None:
    """Constant vectors survive except in fixed point, whose levels do not depend on the vector."""
    spec, ones = spec_of(make), np.ones(SIZE, F)
    got = saved(spec)(*function_inputs(spec, ones, bits)).numpy()
    # log works on v + epsilon, so that its unit in the last place is that of the sum
    np.testing.assert_allclose(got, ones, rtol=0, atol=np.spacing(F(1 + EPSILON)))
    zeros = saved(spec)(*function_inputs(spec, np.zeros(SIZE, F), bits)).numpy()
    np.testing.assert_array_equal(zeros, np.zeros(SIZE, F))


def test_negative_constants_survive_affine() -> None:
    spec, v = spec_of(Affine), np.full(SIZE, -0.7, F)
    np.testing.assert_allclose(saved(spec)(*function_inputs(spec, v, 8)), v, rtol=0, atol=np.spacing(F(0.7)))


def test_fixed_points_are_multiples_of_the_least_power_of_two_that_reaches() -> None:
    spec = spec_of(PowerOfTwo, size=None)
    for greatest, step in ((7.0, 1.0), (7.001, 2.0), (3.5, 0.5), (127 / 128, 0.25)):
        v = np.array([greatest, greatest / 3, -greatest / 5], F)
        got = saved(spec)(*function_inputs(spec, v, 4)).numpy()
        np.testing.assert_array_equal(got, np.round(v / step) * step)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_variance_stays_zero_and_dead_channels_do_not_cost_live_ones(bits: int) -> None:
    v = np.array([0, 4e-38, 1e-4, 0.5, 900], F)
    spec = spec_of(Log, size=None)
    got = saved(spec)(*function_inputs(spec, v, bits)).numpy()
    assert got[0] == 0
    assert got[1] == 0
    # half a level of log(v + epsilon)
    half = np.log((900 + EPSILON) / EPSILON) / (2**bits - 1) / 2
    assert np.all(np.abs(np.log((got + EPSILON) / (v + EPSILON))) <= half * 1.0001)


@pytest.mark.parametrize("make", SCHEMES)
def test_nan_and_infinity_pass_alone(make: Any) -> None:
    v = np.array([0.1, np.nan, 0.4, np.inf, 0.9], F)
    spec = spec_of(make, size=None)
    got = saved(spec)(*function_inputs(spec, v, 4)).numpy()
    np.testing.assert_array_equal(got[[1, 3]], v[[1, 3]])
    np.testing.assert_array_equal(got[[0, 2, 4]], saved(spec)(*function_inputs(spec, v[[0, 2, 4]], 4)))


def test_negative_variances_pass_alone() -> None:
    v = np.array([-0.5, 0.1, 0.4], F)
    spec = spec_of(Log, size=None)
    got = saved(spec)(*function_inputs(spec, v, 4)).numpy()
    assert got[0] == v[0]
    np.testing.assert_array_equal(got[1:], saved(spec)(*function_inputs(spec, v[1:], 4)))


@pytest.mark.parametrize("off", [{"amount": 0.0, "bits": 4}, {"amount": 1.0, "bits": 0}])
@pytest.mark.parametrize("range_", RANGES, ids=lambda r: r.name)
@pytest.mark.parametrize("make", SCHEMES)
def test_off_returns_the_bits_themselves_with_gradient_1(make: Any, range_: Range, off: Any) -> None:
    v = np.array([-0.0, np.nan, -np.inf, 1e-40, 0.3, *range(7)], F)
    spec = spec_of(make, range=range_)
    inputs = function_inputs(spec, v, limits=limits_for(spec.scheme), **off)
    got = saved(spec)(*inputs).numpy()
    np.testing.assert_array_equal(got.view(np.uint32), v.view(np.uint32))
    watched = inputs[2:]
    with tf.GradientTape() as tape:
        for tensor in watched:
            tape.watch(tensor)
        result = saved(spec)(*inputs)
    *of_limits, grad = tape.gradient(result, watched)
    np.testing.assert_array_equal(grad, np.ones(SIZE, F))
    for tensor in of_limits:
        assert tensor is None or not np.any(tensor)


@pytest.mark.parametrize("make", SCHEMES)
def test_a_part_of_the_quantized_value(make: Any) -> None:
    spec, v = spec_of(make), vector(make)
    whole = saved(spec)(*function_inputs(spec, v, 3)).numpy()
    got = saved(spec)(*function_inputs(spec, v, 3, amount=0.25)).numpy()
    np.testing.assert_array_equal(got, whole * F(0.25) + v * F(0.75))
    assert not np.array_equal(got, v)


@pytest.mark.parametrize("make", SCHEMES)
@pytest.mark.parametrize("range_", [DYNAMIC, Learned()], ids=lambda r: r.name)
def test_rows_are_quantized_as_vectors_by_themselves(make: Any, range_: Range) -> None:
    spec = spec_of(make, range=range_)
    bits, limits = [3, 8, 0], [limits_for(spec.scheme, spread) for spread in (0.3, 0.8, 2.0)]
    rows = [vector(make, seed) * F(seed + 1) for seed in range(3)]
    limit_inputs = [] if range_ is DYNAMIC else [tf.constant(np.stack(limits))]
    inputs = [tf.constant(1.0), tf.constant(bits, shape=(3, 1)), *limit_inputs, tf.constant(np.stack(rows))]
    got = saved(spec, 3)(*inputs).numpy()
    for index in range(3):
        alone = saved(spec)(*function_inputs(spec, rows[index], bits[index], limits=limits[index]))
        np.testing.assert_array_equal(got[index], alone)


KERNEL = (2, 3, 4, 5)


@pytest.mark.parametrize("make", SCHEMES)
@pytest.mark.parametrize("axes", [(-4, -3, -2), (-4, -2, -1), (-4, -3), (-4, -3, -2, -1)], ids=str)
@pytest.mark.parametrize("range_", [DYNAMIC, Fixed(0.0, 0.9)], ids=lambda r: r.name)
def test_ranges_extend_over_the_axes_of_the_spec(make: Any, axes: tuple[int, ...], range_: Any) -> None:
    """Every part of a kernel that shares a range is quantised as a vector by itself."""
    spec = QuantizerSpec(make(range=range_).within(EPSILON), KERNEL, axes)
    v = np.random.default_rng(4).normal(0.1, 0.6, KERNEL).astype(F)
    v = np.abs(v) if make is Log else v
    limits = limits_for(spec.scheme)
    for run in (saved(spec), compiled(spec)):
        got = run(*function_inputs(spec, v, 4, limits=limits)).numpy()
        whole, parts = (np.moveaxis(a, axes, range(len(axes))) for a in (got, v))
        for index in np.ndindex(parts.shape[len(axes) :]):
            here = (..., *index)
            wanted = expected(spec, parts[here].ravel(), 4, limits, None).value
            assert_equal(spec.scheme, whole[here].ravel(), wanted)
    assert np.unique(got).size > 2


@pytest.mark.parametrize("range_", [Ema(0.9), Learned()], ids=lambda r: r.name)
def test_one_range_that_is_kept_serves_a_whole_kernel(range_: Range) -> None:
    spec = QuantizerSpec(Affine(range=range_), KERNEL, (-4, -3, -2, -1), training=True)
    flat = QuantizerSpec(Affine(range=range_), (120,), training=True)
    v = np.random.default_rng(4).normal(0.1, 0.6, KERNEL).astype(F)
    limits = np.array([-0.7, 0.8], F)
    if isinstance(range_, Ema):
        moved = saved(spec, observe=True)(tf.constant(v), tf.constant(limits))
        np.testing.assert_array_equal(moved, saved(flat, observe=True)(tf.constant(v.ravel()), tf.constant(limits)))
        assert not np.array_equal(moved, limits)
    results = []
    for of, value in ((spec, v), (flat, v.ravel())):
        inputs = function_inputs(of, value, 3, limits=limits)
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            loss = tf.reduce_sum(saved(of)(*inputs) ** 2)
        results.append([g for g in tape.gradient(loss, inputs) if g is not None])
    assert len(results[0]) == len(results[1]) >= 1
    for of_kernel, of_vector in zip(*results, strict=True):
        np.testing.assert_allclose(np.ravel(of_kernel), of_vector, rtol=1e-5)


@pytest.mark.parametrize("make", SCHEMES)
def test_half_precision_is_quantized_in_float32(make: Any) -> None:
    spec = QuantizerSpec(make().within(EPSILON), (SIZE,), dtype="half")
    v = vector(make).astype(np.float16)
    got = saved(spec)(*function_inputs(spec, v, 4)).numpy()
    reference = expected(spec, v.astype(F), 4, None, None).value
    np.testing.assert_allclose(got, reference.astype(np.float16), rtol=1e-3)
    assert len(np.unique(got)) < SIZE


@pytest.mark.parametrize("make", SCHEMES)
def test_observed_limits_move_as_the_reference_says(make: Any) -> None:
    spec = spec_of(make, range=Ema(0.9))
    observe = saved(spec, observe=True)
    limits = limits_for(spec.scheme)
    for seed in range(5):
        v = vector(make, seed)
        reference = ema(spec.scheme.name, v, limits, 0.9, EPSILON)
        got = observe(tf.constant(v), tf.constant(limits)).numpy()
        np.testing.assert_allclose(got, reference, rtol=2e-7 if make is Log else 0)
        limits = got
    nothing = np.full(SIZE, np.nan, F)
    np.testing.assert_array_equal(observe(tf.constant(nothing), tf.constant(limits)), limits)


def test_stochastic_rounding_is_right_on_average_and_keeps_what_is_on_the_grid() -> None:
    spec = spec_of(Affine, rounding="stochastic", range=Fixed(0.0, 15.0), narrow_range=False)
    v = np.linspace(0, 15, SIZE, dtype=F)
    v[:4] = [0, 7, 15, 3]
    rng = np.random.default_rng(0)
    runs = 2000
    total = np.zeros(SIZE)
    for _ in range(runs):
        got = saved(spec)(*function_inputs(spec, v, 4, limits=[0, 15], noise=rng.random(SIZE, F))).numpy()
        np.testing.assert_array_equal(got[:4], v[:4])
        total += got
    # the standard error of a mean of `runs` roundings is at most half a step / sqrt(runs); five of them
    np.testing.assert_allclose(total / runs, v, rtol=0, atol=2.5 / np.sqrt(runs))


@pytest.mark.parametrize("make", SCHEMES)
@pytest.mark.parametrize("bits", [1, 0, 17])
def test_widths_out_of_range_are_refused(make: Any, bits: int) -> None:
    with pytest.raises(Error, match="from 2 to 16"):
        make(bits)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Affine(rounding="up"), "it is 'nearest' or 'stochastic'"),  # type: ignore[arg-type]
        (lambda: Fixed(1, 1), "the first limit is less than the second"),
        (lambda: Fixed(0, float("inf")), "both finite"),
        (lambda: Ema(1.0), "at least 0 and less than 1"),
        (lambda: Log(range=Fixed(-1, 0)), "variances are not negative"),
    ],
)
def test_options_out_of_range(make: Any, match: str) -> None:
    with pytest.raises(Error, match=match):
        make()

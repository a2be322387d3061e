"""The NumPy references for weights: against values computed by hand, and against TensorFlow's own ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.fake_quant_reference import fake_quant_args, fake_quant_per_channel, fake_quant_vars, nudged
from tests.weight_reference import Limits, mse_limit, mse_limits, quantize_weight, weight_limits

F = np.float32
WIDTHS = range(2, 17)
ROWS, CHANNELS = 4096, 64


def array(*values: float) -> np.ndarray:
    return np.array(values, F)


def test_symmetric_by_hand() -> None:
    # m = 7 and L = 7: s = 1, so that positions are the values themselves; half is rounded to even.
    v = array(-7, -2.5, -0.5, 0.49, 0.5, 2.5, 6.5)
    quantized = quantize_weight("symmetric", v, 4, ())
    np.testing.assert_array_equal(quantized.codes, [-7, -2, 0, 0, 0, 2, 6])
    np.testing.assert_array_equal(quantized.value, array(-7, -2, 0, 0, 0, 2, 6))
    assert [float(quantized.scale), int(quantized.zero_point)] == [1, 0]
    assert quantized.inside.all()


def test_symmetric_without_the_narrow_range_has_one_code_more_below() -> None:
    quantized = quantize_weight("symmetric", array(-4, 1.4, 3), 3, (), narrow=False)
    np.testing.assert_array_equal(quantized.codes, [-4, 1, 3])
    assert quantized.scale == 1


def test_affine_by_hand() -> None:
    # [-1, 2] with two bits: s = 1 and z = 1.
    quantized = quantize_weight("affine", array(-1, -0.5, 0.4, 1.5, 2), 2, ())
    np.testing.assert_array_equal(quantized.codes, [0, 1, 1, 3, 3])
    np.testing.assert_array_equal(quantized.value, array(-1, 0, 0, 2, 2))
    assert [float(quantized.scale), int(quantized.zero_point)] == [1, 1]


def test_affine_clips_where_code_and_zero_point_are_rounded_up() -> None:
    # [-1.5, 1.5] with two bits: s = 1, z = round(1.5) = 2, and 1.5 is rounded to 2: the fifth code.
    quantized = quantize_weight("affine", array(-1.5, 1.5), 2, ())
    np.testing.assert_array_equal(quantized.codes, [0, 3])
    np.testing.assert_array_equal(quantized.inside, [True, False])


@pytest.mark.parametrize(
    ("v", "bits", "scale"),
    [(array(3.0, -1), 3, 1.0), (array(3.1, -1), 3, 2.0), (array(-3.0), 3, 1.0), (array(0.0), 8, 1.0)],
)
def test_power_of_two_takes_the_least_scale_that_reaches_the_limits(v: np.ndarray, bits: int, scale: float) -> None:
    assert quantize_weight("power_of_two", v, bits, ()).scale == scale


def test_power_of_two_without_the_narrow_range_reaches_further_below() -> None:
    assert quantize_weight("power_of_two", array(-4, 3), 3, (), narrow=False).scale == 1
    assert quantize_weight("power_of_two", array(-4, 3), 3, ()).scale == 2


def test_each_index_of_the_axes_kept_has_a_range_of_its_own() -> None:
    v = np.random.default_rng(0).normal(0, 1, (3, 3, 4, 2)).astype(F)
    for axes, size in (((3,), (2,)), ((2, 3), (4, 2)), ((-2,), (4,)), ((), ())):
        whole = quantize_weight("affine", v, 5, axes)
        assert whole.scale.shape == whole.zero_point.shape == size
        kept = [axis % 4 for axis in axes]
        for index in np.ndindex(*size):
            at: list[Any] = [slice(None)] * 4
            for axis, i in zip(kept, index, strict=True):
                at[axis] = i
            part = quantize_weight("affine", v[tuple(at)], 5, ())
            np.testing.assert_array_equal(whole.value[tuple(at)], part.value)
            np.testing.assert_array_equal(whole.codes[tuple(at)], part.codes)
            assert (whole.scale[index], whole.zero_point[index]) == (part.scale, part.zero_point)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_are_finite(value: float) -> None:
    with pytest.raises(ValueError, match="a weight is finite"):
        quantize_weight("symmetric", array(1, value), 8, ())


@pytest.mark.parametrize("scheme", ["symmetric", "affine", "power_of_two"])
def test_a_range_without_width_has_the_scale_one_and_keeps_zero(scheme: str) -> None:
    for v in (np.zeros(3, F), np.full(3, np.finfo(F).tiny)):
        quantized = quantize_weight(scheme, v, 8, ())
        assert quantized.scale == 1
        np.testing.assert_array_equal(quantized.value, np.zeros(3, F))


def test_given_limits_clip_and_stop_the_gradient() -> None:
    quantized = quantize_weight("symmetric", array(-9, -3.25, 7.4, 7.6), 4, (), limits=array(7)[0], factor=0.5)
    np.testing.assert_array_equal(quantized.codes, [-7, -3, 7, 7])
    np.testing.assert_array_equal(quantized.inside, [False, True, True, False])
    # d v' / d s: the code less the position inside, the code outside.
    np.testing.assert_allclose(quantized.of_high, 0.5 * array(-7, 0.25, 7 - 7.4, 7), rtol=1e-6)
    one_sided = quantize_weight("affine", array(-1, 0.6, 4), 2, (), limits=Limits(array(0)[0], array(3)[0]))
    np.testing.assert_array_equal(one_sided.codes, [0, 1, 3])
    np.testing.assert_array_equal(one_sided.inside, [False, True, False])


def test_stochastic_rounding_goes_up_where_the_noise_is_below_the_fraction() -> None:
    v, noise = array(-7, 1.25, 1.25, -1.25, 7), array(0, 0.2, 0.25, 0.7, 0.9)
    quantized = quantize_weight("symmetric", v, 4, (), noise=noise)
    np.testing.assert_array_equal(quantized.codes, [-7, 2, 1, -1, 7])


@pytest.mark.parametrize("bits", WIDTHS)
def test_no_weight_is_further_from_its_level_than_half_a_step(bits: int) -> None:
    v = np.random.default_rng(bits).normal(0, 0.3, (3, 3, 16, 8)).astype(F)
    for scheme in ("symmetric", "affine", "power_of_two"):
        quantized = quantize_weight(scheme, v, bits, (3,))
        # Affine's ends may lie up to half a step beyond the last level.
        error = np.abs(quantized.value.astype(np.float64) - v) / quantized.scale
        assert error.max() < (1.001 if scheme == "affine" else 0.501)


@pytest.mark.parametrize("scheme", ["symmetric", "affine", "power_of_two"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_limits_of_least_error_are_the_best_of_their_candidates(scheme: str, bits: int) -> None:
    v = np.random.default_rng(bits).normal(0, 0.3, (3, 3, 16, 4)).astype(F)
    chosen = mse_limits(scheme, v, bits, (3,))
    np.testing.assert_array_equal(chosen.high, mse_limit(scheme, v, bits, (3,)))

    def error(limits: Limits, channel: int) -> float:
        value = quantize_weight(scheme, v, bits, (3,), limits=limits).value[..., channel]
        return float(np.square(value.astype(np.float64) - v[..., channel]).sum())

    own = weight_limits(v, (3,))
    if scheme != "affine":
        largest = np.maximum(own.high, -own.low)
        own = Limits(-largest, largest)
    for channel in range(4):
        least = error(chosen, channel)
        rivals = [(k, Limits(own.low * F(k / 40), own.high * F(k / 40))) for k in range(1, 41)]
        best = [k for k, limits in rivals if error(limits, channel) <= least]
        assert chosen.high[channel] == own.high[channel] * F(max(best) / 40)
    assert (chosen.high < own.high).any()


def test_the_largest_of_equally_good_limits_is_taken() -> None:
    # All candidates above 0.5 have the scale 1 and the same levels.
    assert mse_limit("power_of_two", array(1.0, -1.0), 2, ()) == 1
    assert mse_limit("symmetric", np.zeros(4, F), 4, ()) == 0


def weights_and_limits(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return weights [ROWS, CHANNELS] of many magnitudes and limits [CHANNELS], of all signs, some of which clip."""
    rng = np.random.default_rng(seed)
    v = (rng.normal(0, 1, (ROWS, CHANNELS)) * np.exp(rng.normal(0, 2, CHANNELS))).astype(F)
    low, high = v.min(0), v.max(0)
    low[:8] = high[:8] * F(0.1)
    high[8:16] = low[8:16] * F(0.2)
    low[16:20] = high[20:24] = low[24] = high[24] = 0
    low[28:32] *= F(0.5)
    high[32:] = np.maximum(high[32:], -low[32:])
    low[32:] = -high[32:]
    return v, low, high


MODES: list[Callable[[Any], Any]] = [lambda f: f, tf.function]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("narrow", [False, True])
def test_ops_equal_their_reference_bit_for_bit(bits: int, narrow: bool) -> None:
    v, low, high = weights_and_limits(bits)
    expected = fake_quant_per_channel(v, low, high, bits, narrow)
    columns = [0, 9, 17, 22, 25, 29, 40]
    for mode in MODES:
        per_channel = mode(tf.quantization.fake_quant_with_min_max_vars_per_channel)
        np.testing.assert_array_equal(per_channel(v, low, high, bits, narrow).numpy(), expected.value)
        of_vars = mode(tf.quantization.fake_quant_with_min_max_vars)
        of_args = mode(tf.quantization.fake_quant_with_min_max_args)
        for c in columns:
            column, limits = v[:, c], (low[c], high[c])
            value = fake_quant_vars(column, *limits, bits, narrow).value
            np.testing.assert_array_equal(of_vars(column, *limits, bits, narrow).numpy(), value)
            value = fake_quant_args(column, *limits, bits, narrow).value
            np.testing.assert_array_equal(of_args(column, *map(float, limits), bits, narrow).numpy(), value)
    assert not expected.value[:, 24].any()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("narrow", [False, True])
def test_gradients_of_ops_equal_their_reference(bits: int, narrow: bool) -> None:
    v, low, high = (tf.constant(x) for x in weights_and_limits(bits))
    with tf.GradientTape() as tape:
        tape.watch(v)
        y = tf.quantization.fake_quant_with_min_max_vars_per_channel(v, low, high, bits, narrow)
    inside = fake_quant_per_channel(v.numpy(), low.numpy(), high.numpy(), bits, narrow).inside
    np.testing.assert_array_equal(tape.gradient(y, v).numpy(), inside.astype(F))
    assert not inside.all()


def test_a_range_on_one_side_of_zero_is_shifted_and_keeps_its_width() -> None:
    grid = nudged(array(1)[0], array(4)[0], 2)
    assert [float(grid.low), float(grid.high)] == [0, 3]
    grid = nudged(array(-4)[0], array(-1)[0], 2)
    assert [float(grid.low), float(grid.high)] == [-3, 0]
    # Between them, zero moves to the nearest level: here by 0.3.
    grid = nudged(array(-1.3)[0], array(1.7)[0], 2)
    np.testing.assert_allclose((grid.low, grid.high), (-1, 2))


def symmetric_codes(v: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the codes of the canonical form, of the op per channel and of the op that divides, for limits -m and m."""
    canonical = quantize_weight("symmetric", v, bits, (-1,))
    m = np.abs(v).max(0)
    by_channel = fake_quant_per_channel(v, -m, m, bits, narrow=True).value
    divided = np.stack([fake_quant_vars(v[:, c], -m[c], m[c], bits, True).value for c in range(v.shape[1])], -1)
    return canonical.codes, np.rint(by_channel / canonical.scale), np.rint(divided / canonical.scale)


def near_ties(bits: int, seed: int = 0) -> np.ndarray:
    """Return weights [n, 256] half-way between levels, up to float32 rounding, under a first row of magnitudes m."""
    rng = np.random.default_rng(seed)
    top = 2 ** (bits - 1) - 1
    m = rng.uniform(0.1, 2, 256).astype(F)
    halves = rng.integers(-top, top, (2048, 256)) + 0.5
    return np.concatenate([m[None], (halves * (m.astype(np.float64) / top)).astype(F)])


# Measured: of normally distributed weights, the ops give other codes for none to 2e-5 at up to 8 bits, for 1.7e-3 at
# 16 bits: their positions count from the lower limit, and lose the last places that a position from zero has.
@pytest.mark.parametrize(("bits", "least", "most"), [(4, 0, 1e-5), (8, 0, 1e-4), (12, 1e-5, 5e-4), (16, 5e-4, 5e-3)])
def test_ops_give_almost_the_codes_of_the_canonical_form(bits: int, least: float, most: float) -> None:
    v = np.random.default_rng(bits).normal(0, 0.3, (ROWS, 256)).astype(F)
    canonical, by_channel, divided = symmetric_codes(v, bits)
    for codes in (by_channel, divided):
        assert least <= (codes != canonical).mean() <= most
        assert np.abs(codes - canonical).max() <= 1


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ops_round_exact_ties_up_and_the_canonical_form_to_even(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    v = np.append(np.arange(-top, top) + 0.5, top).astype(F)[:, None] * F(2.0**-5)
    canonical, by_channel, divided = symmetric_codes(v, bits)
    below = np.arange(-top, top)
    np.testing.assert_array_equal(canonical[:-1, 0], below + below % 2)
    np.testing.assert_array_equal(by_channel[:-1, 0], below + 1)
    np.testing.assert_array_equal(divided[:-1, 0], below + 1)


# Measured: 42 and 46 % of other codes at 2 bits, 49 and 48 % at 4, 47 and 48 % at 8: the ops round half up, and each
# form has other last places.
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_ties_under_a_scale_that_was_rounded_have_other_codes(bits: int) -> None:
    canonical, by_channel, divided = symmetric_codes(near_ties(bits), bits)
    for codes in (by_channel, divided):
        assert 0.4 < (codes != canonical).mean() < 0.5
        assert np.abs(codes - canonical).max() == 1


# Measured under XLA: other values for 0 (2 bits) and 81 % (4 and 8 bits) of normally distributed weights, by up to two
# units in the last place of 2 m, and a whole step off for 4e-6; of weights half-way between levels, a whole step off
# for 22 % at 4 bits and 18 % at 8.
@pytest.mark.parametrize(("bits", "most"), [(2, 0.01), (4, 0.35), (8, 0.35)])
def test_compiled_ops_have_other_values(bits: int, most: float) -> None:
    op = tf.function(tf.quantization.fake_quant_with_min_max_vars_per_channel, jit_compile=True)
    random = np.random.default_rng(bits).normal(0, 0.3, (ROWS, 256)).astype(F)
    for v, most_whole in ((random, 1e-4), (near_ties(bits), most)):
        m = np.abs(v).max(0)
        expected = fake_quant_per_channel(v, -m, m, bits, narrow=True).value
        difference = np.abs(op(v, -m, m, bits, True).numpy() - expected)
        whole = difference > m / (2**bits - 2)
        assert bits == 2 or (difference > 0).mean() > 0.1
        assert whole.mean() <= most_whole
        assert (difference <= 2 * np.spacing(2 * m))[~whole].all()


def test_compiled_ops_move_zero_and_make_nan_of_an_empty_range() -> None:
    op = tf.function(tf.quantization.fake_quant_with_min_max_vars_per_channel, jit_compile=True)
    m = np.random.default_rng(0).uniform(0.1, 2, CHANNELS).astype(F)
    zeros = np.zeros((1, CHANNELS), F)
    assert not fake_quant_per_channel(zeros, -m, m, 8, narrow=True).value.any()
    moved = op(zeros, -m, m, 8, True).numpy()
    assert 0 < np.abs(moved / m).max() < 1e-6
    assert np.isnan(op(zeros, 0 * m, 0 * m, 8, True).numpy()).all()

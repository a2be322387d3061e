"""Weights with ties and odd channels, drawn for fake-quantise functions, and what the reference makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from passes.quantization.device_schemes import on_device
from passes.quantization.options import Rounding
from passes.quantization.quantizers import QuantizerSpec
from passes.quantization.ranges import DYNAMIC, Fixed, Learned, Mse, Range
from passes.quantization.schemes import Affine, PowerOfTwo, Scheme, Symmetric
from passes.quantization.tensors import tensor_function
from tests.passes.quantizer_runs import saved_function
from tests.weight_reference import Limits, QuantizedWeight, quantize_weight, weight_limits

F = np.float32
KERNEL = (3, 2, 4, 5)
Axes = tuple[int, ...]
CHANNEL_AXES: list[Axes] = [(-1,), (-2, -1), (-2,), ()]
SCHEMES: dict[str, Scheme] = {
    "symmetric": Symmetric(),
    "full": Symmetric(narrow_range=False),
    "affine": Affine(),
    "power_of_two": PowerOfTwo(),
}
ZEROS, POSITIVE, NEGATIVE, EXACT = range(4)
"""Channels of a sort of their own: the scale of the last is a power of two, so that its ties are exact."""


def spec_of(
    name: str, channels: Axes, range_: Range, *, relative: bool = False, rounding: Rounding = "nearest"
) -> QuantizerSpec:
    scheme = on_device(replace(SCHEMES[name], range=range_, rounding=rounding))
    axes = tuple(axis for axis in range(-len(KERNEL), 0) if axis not in channels)
    return QuantizerSpec(scheme, KERNEL, axes, training=True, relative=relative).group_key


@cache
def specs_of(name: str) -> tuple[QuantizerSpec, ...]:
    """Return the specs of a scheme: every range, with all sorts of channels where it matters."""
    return (
        *(spec_of(name, channels, DYNAMIC) for channels in CHANNEL_AXES),
        *(spec_of(name, channels, Learned()) for channels in CHANNEL_AXES),
        *(spec_of(name, channels, Learned(), relative=True) for channels in CHANNEL_AXES),
        spec_of(name, (-1,), Mse()),
        spec_of(name, (), Fixed(0.0, 1.0)),
        spec_of(name, (-1,), DYNAMIC, rounding="stochastic"),
        spec_of(name, (-1,), Learned(), rounding="stochastic"),
    )


def channels_of(spec: QuantizerSpec) -> Axes:
    """Return the axes each index of which has a range of its own, counted from the front."""
    return tuple(axis for axis in range(len(KERNEL)) if axis - len(KERNEL) not in spec.axes)


class Drawn(NamedTuple):
    """A weight, what its function is given beside it, and what the reference makes of it.

    Attributes:
        given: limits, or fractions of the weight's own, float32 [ranges, 2] or [2]; None for a dynamic range.
        own: the weight's own limits, of the shape of the ranges.
        limits: the limits within which it is quantised.
    """

    spec: QuantizerSpec
    bits: int
    weight: np.ndarray
    given: np.ndarray | None
    noise: np.ndarray | None
    own: Limits
    limits: Limits

    def reference(self, weight: np.ndarray | None = None) -> QuantizedWeight:
        return quantize_weight(
            self.spec.scheme.name,
            self.weight if weight is None else weight,
            self.bits,
            channels_of(self.spec),
            narrow=self.spec.scheme.narrow,
            limits=self.limits,
            noise=self.noise,
        )


def drawn(spec: QuantizerSpec, bits: int) -> Drawn:
    """Return a weight, half of whose values lie half-way between two levels, as near as float32 gets.

    Those with limits that are given lie beyond them, too.
    """
    rng = np.random.default_rng([bits, *(-axis for axis in spec.axes)])
    kept = channels_of(spec)
    sizes = [KERNEL[axis] for axis in kept]
    count, scheme = math.prod(sizes), spec.scheme
    low, high = _ranges(scheme, bits, count, rng)
    dynamic = scheme.range == DYNAMIC or spec.relative
    if not scheme.has_low and not dynamic and not isinstance(scheme.range, Fixed):
        high = np.maximum(high, -low) + F(0)  # no -0, which is below 0 for the generator
        low = -high
    limits = Limits(low.reshape(sizes), high.reshape(sizes))
    zeros = np.zeros(KERNEL, F)
    fraction = rng.uniform(0.3, 1, count).astype(F) if spec.relative else np.ones(count, F)
    limits = Limits(*((limit.ravel() * fraction).reshape(sizes) for limit in limits))
    scale = quantize_weight(scheme.name, zeros, bits, kept, narrow=scheme.narrow, limits=limits).scale.reshape(-1, 1)
    reach = 1 if dynamic else 1.3
    position = rng.uniform(low[:, None] * reach, high[:, None] * reach, (count, zeros.size // count)) / scale
    sort = rng.choice(3, position.shape, p=(0.5, 0.1, 0.4))
    position = np.choose(sort, [np.floor(position) + 0.5, np.floor(position), position])
    rows = (position * scale.astype(np.float64)).astype(F)
    if dynamic:
        rows = np.clip(rows, low[:, None], high[:, None])
        rows[:, 0], rows[:, 1] = low, high
    weight = _placed(rows, kept)
    own = weight_limits(weight, kept)
    if scheme.name == "symmetric" and scheme.narrow:
        largest = np.maximum(own.high, -own.low)
        own = Limits(-largest, largest)
    if spec.relative:
        limits = Limits(*((limit.ravel() * fraction).reshape(sizes) for limit in own))
    elif scheme.range == DYNAMIC:
        limits = own
    given = None if scheme.range == DYNAMIC else np.stack([np.ravel(limit) for limit in limits], -1)
    given = np.stack([fraction, fraction], -1) if spec.relative else given
    noise = rng.random(KERNEL, F) if spec.stochastic else None
    return Drawn(spec, bits, weight, None if given is None else given.reshape(spec.limits_shape), noise, own, limits)


def _ranges(scheme: Scheme, bits: int, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return the limits of each channel's values, float32."""
    bottom, top = scheme.codes(bits)
    high = np.exp(rng.normal(0, 1, count)).astype(F)
    low = -high * rng.uniform(0.2, 3, count).astype(F)
    if count > EXACT:
        low[[ZEROS, POSITIVE]] = high[[ZEROS, NEGATIVE]] = 0
        low[EXACT], high[EXACT] = bottom / 32, top / 32
    return low, high


def _placed(rows: np.ndarray, kept: Axes) -> np.ndarray:
    """Return values [channels, n] in the kernel's layout."""
    others = tuple(axis for axis in range(len(KERNEL)) if axis not in kept)
    whole = rows.reshape([KERNEL[axis] for axis in (*kept, *others)])
    return np.ascontiguousarray(np.moveaxis(whole, range(len(KERNEL)), (*kept, *others)))


@cache
def saved_tensors(specs: tuple[QuantizerSpec, ...], mode: int) -> Any:
    """Return the function of an execution mode, loaded from a real SavedModel."""
    return saved_function(tensor_function(specs, mode))


@cache
def compiled_tensors(specs: tuple[QuantizerSpec, ...], mode: int) -> Any:
    """Return the function of an execution mode, compiled by XLA."""
    serve = saved_tensors(specs, mode)
    return tf.function(lambda *inputs: serve(*inputs), jit_compile=True, autograph=False)  # noqa: PLW0108  keeps `serve` alive


def tensor_inputs(tensors: Sequence[Drawn], amount: float = 1.0, bits: Sequence[int] | None = None) -> list[tf.Tensor]:
    """Return the inputs of a function of several tensors."""
    widths = np.array([t.bits for t in tensors] if bits is None else bits, np.int64)
    limits = [t.given for t in tensors if t.given is not None]
    noise = [t.noise for t in tensors if t.noise is not None]
    return [tf.constant(i) for i in (F(amount), widths, *limits, *noise, *(t.weight for t in tensors))]

"""Schemes: the levels of a quantiser between the limits of its range.

A scheme is a frozen dataclass of a quantiser's options. The arithmetic is float32, if not said otherwise. It never
divides by a constant, because Grappler and XLA would change such a division into a product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, get_args

import numpy as np

from passes.quantization.node_marks import EPSILON, ORIGIN, SCALE, ZERO_POINT, marked
from passes.quantization.options import Granularity, QuantizerOptions, Rounding
from passes.quantization.ranges import DYNAMIC, Fixed, Range
from passes.quantization.roles import MAX_BITS, MIN_BITS
from rewriter.expr import Expr, Shape, array, constant, filled, op, select
from rewriter.ir import Error
from rewriter.protos import Dtype

FLOAT, DOUBLE = "float32", "float64"
TINY = float(np.finfo(np.float32).tiny)
"""The least normal float32."""


class Limits(NamedTuple):
    """The least and the greatest value of a range, [..., 1]."""

    low: Expr
    high: Expr


class Grid(NamedTuple):
    """Levels, for codes from `bottom` to `top`: ``(code - zero) scale + origin``.

    Attributes:
        zero: the code of the origin; None stands for 0.
        origin: None stands for 0.
        bottom: None stands for 0.
        reciprocal: the derivative of the scale for the upper limit.
        inverse: the factor that takes a value to its position; None stands for a division by the scale.
    """

    scale: Expr
    zero: Expr | None
    origin: Expr | None
    bottom: Expr | None
    top: Expr
    reciprocal: Expr
    inverse: Expr | None = None

    def mapped(self, change: Callable[[Expr], Expr]) -> Grid:
        """Return the grid with every field changed by a function."""

        def changed(part: Expr | None) -> Expr | None:
            return None if part is None else change(part)

        zero, origin, bottom, inverse = (changed(part) for part in (self.zero, self.origin, self.bottom, self.inverse))
        return Grid(change(self.scale), zero, origin, bottom, change(self.top), change(self.reciprocal), inverse)

    def position(self, value: Expr) -> Expr:
        """Return the distance of a value from the origin, in units of the scale."""
        distance = value if self.origin is None else value - self.origin
        return distance / self.scale if self.inverse is None else distance * self.inverse

    def level(self, steps: Expr) -> Expr:
        """Return the value that lies so many steps from the origin."""
        return steps * self.scale if self.origin is None else steps * self.scale + self.origin


@dataclass(frozen=True)
class Scheme:
    """A quantiser's options, and the arithmetic that is common to all schemes.

    Attributes:
        bits: the width of a code at the start, 2 to 16; `quantization.bits` changes it while a program runs.
        range: the limits between which the levels lie.
        rounding: "nearest", half to even; or "stochastic" in training: up with the probability of the fraction.
            The random numbers follow from the step, so a run that is resumed continues as if it had not stopped.
            Inference rounds to nearest.
        narrow_range: true for one code fewer than 2^bits; None stands for the scheme's usual.
        granularity: "per_tensor" for one range where each channel could have its own; None stands for "per_channel".

    Raises:
        Error: an option is out of range.
    """

    bits: int = QuantizerOptions.bits
    range: Range = DYNAMIC
    rounding: Rounding = QuantizerOptions.rounding
    narrow_range: bool | None = None
    granularity: Granularity | None = None
    name: ClassVar[str]
    formula: ClassVar[str]
    dtype: ClassVar[str] = FLOAT
    has_low: ClassVar[bool] = False
    usually_narrow: ClassVar[bool] = False
    device: ClassVar[bool] = False

    @property
    def narrow(self) -> bool:
        """True if there is one code fewer than 2^bits."""
        return self.usually_narrow if self.narrow_range is None else self.narrow_range

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not MIN_BITS <= self.bits <= MAX_BITS:
            raise Error(f"{self.bits!r} bits: a width is a whole number from {MIN_BITS} to {MAX_BITS}")
        if not isinstance(self.range, Range):
            raise Error(f"range {self.range!r}: it is a Dynamic, Fixed, Ema, Learned or Mse")
        if self.narrow_range not in (None, False, True):
            raise Error(f"narrow_range {self.narrow_range!r}: it is True, False or None")
        if self.rounding not in get_args(Rounding):
            raise Error(f"rounding {self.rounding!r}: it is 'nearest' or 'stochastic'")
        if self.granularity not in (None, *get_args(Granularity)):
            raise Error(f"granularity {self.granularity!r}: it is 'per_channel' or 'per_tensor'")

    def within(self, epsilon: float | None) -> Scheme:  # noqa: ARG002  most schemes need none
        """Return the scheme for values that are used with this epsilon, if there is one."""
        return self

    @property
    def clips(self) -> bool:
        """True if a code may lie beyond the last one, so that it has to be clipped."""
        return True

    def defined(self, value: Expr) -> Expr | None:
        """Return the mask of the values that are quantised; None for all.

        The others are kept, and do not count for the range.
        """
        return op("IsFinite", value)

    def coordinate(self, value: Expr) -> Expr:
        """Return float32 values in the coordinate in which levels are equally spaced."""
        return value

    def value(self, coordinate: Expr) -> Expr:
        """Return float32 values from their coordinates."""
        return coordinate

    def slope(self, value: Expr) -> Expr | None:  # noqa: ARG002  it is 1 everywhere
        """Return the derivative of a quantised value for its coordinate; None stands for 1."""
        return None

    def extremes(self, value: Expr, defined: Expr | None, shape: Shape, axes: tuple[int, ...]) -> Limits:
        """Return the least and the greatest of float32 values over some axes; zero counts where some values do not.

        Args:
            value: the values.
            defined: the mask of those that count; None for all.
            shape: the shape of the values, if it is known.
            axes: the axes, counted from the end; they stay, with size 1.
        """
        counted = value if defined is None else where(defined, value, 0.0, shape)
        return Limits(reduced("Min", counted, axes), reduced("Max", counted, axes))

    def range_of(self, extremes: Limits) -> Limits:
        """Return the limits, in the scheme's coordinate, of values with these extremes; zero is always between them."""
        # Zero has to be a level: padding, and channels that are switched off, are exactly zero.
        return Limits(op("Minimum", extremes.low, 0.0), op("Maximum", extremes.high, 0.0))

    def ceiling(self, grid: Grid) -> Expr | None:  # noqa: ARG002  most never have a value there
        """Return the greatest number of steps from the origin, where rounding may lead beyond it; else None."""
        return None

    def grid(self, limits: Limits, bits: Expr) -> Grid:
        """Return the levels for limits [..., 1] and int32 bits [..., 1]."""
        raise NotImplementedError

    def codes(self, bits: int) -> tuple[int, int]:
        """Return the lowest and the highest code of a width."""
        return 0, 2**bits - 1 - self.narrow

    def limits_of(self, values: np.ndarray) -> tuple[float, float]:
        """Return the limits of a checkpoint's float32 values; (0, 0) for no values."""
        counted = values[np.isfinite(values)]
        return min(float(counted.min(initial=0)), 0.0), max(float(counted.max(initial=0)), 0.0)

    def fixed(self, range_: Fixed) -> tuple[float, float]:
        """Return given limits in the scheme's coordinate; zero is always between them."""
        return min(range_.low, 0.0), max(range_.high, 0.0)

    def learnable(self, limits: tuple[float, float]) -> tuple[float, float]:
        """Return the scale and the low limit that a learned range starts with; zeros start with the range 1."""
        bottom, top = self.codes(self.bits)
        if self.has_low:
            return (limits[1] - limits[0] or 1.0) / top, limits[0]
        return (max(limits[1] / top, limits[0] / bottom) or 1.0 / top), 0.0

    def top(self, bits: Expr) -> Expr:
        """Return the highest code."""
        return self._by_width(bits, lambda n: self.codes(n)[1])

    def bottom(self, bits: Expr) -> Expr:
        """Return the lowest code."""
        return self._by_width(bits, lambda n: self.codes(n)[0])

    def step_gradient_factor(self, bits: Expr, channels: int) -> Expr:
        """Return the factor of a learned scale's gradient, 1 / sqrt(C top), float32.

        It balances that gradient with those of C values.
        """
        return by_width(bits, lambda n: 1 / math.sqrt(channels * self.codes(n)[1]), FLOAT)

    def _by_width(self, bits: Expr, entry: Callable[[int], float]) -> Expr:
        return by_width(bits, entry, self.dtype)


def by_width(bits: Expr, entry: Callable[[int], float], dtype: str) -> Expr:
    """Return a function's result for int32 widths from 0 to 16, read from a table; 0 and 1 count as 2."""
    # Computed here in float64 and rounded once. In the graph, Grappler and XLA would turn a division by a constant into
    # a product, with another last bit.
    table = array(np.array([entry(max(n, MIN_BITS)) for n in range(MAX_BITS + 1)], dtype=dtype))
    return op("GatherV2", table, bits, constant(0, "int32"))


def where(defined: Expr, value: Expr, otherwise: float, shape: Shape) -> Expr:
    """Return the values where they are defined, else a number; `shape` is that of the values, if it is known."""
    # Select needs operands of one shape, and is faster than SelectV2, which broadcasts always (docs/performance.md).
    if shape is None:
        return select(defined, value, constant(otherwise, value.dtype))
    return op("Select", defined, value, filled(otherwise, value.dtype, shape))


def reduced(name: str, value: Expr, axes: tuple[int, ...]) -> Expr:
    """Return the reduction of a value over some axes, which stay, with size 1."""
    indices = constant(axes[0], "int32") if len(axes) == 1 else array(np.array(axes, np.int32))
    return op(name, value, indices, keep_dims=True)


def _or_one(scale: Expr) -> Expr:
    """Return the scale, or 1 where it is zero or subnormal: then every code is that of zero."""
    return marked(SCALE, select(scale >= TINY, scale, constant(1.0, scale.dtype)))


@dataclass(frozen=True)
class Affine(Scheme):
    """Equally spaced levels from min(v, 0) to max(v, 0), with zero among them.

    With n bits and t = 2^n - 1 (narrow range: 2^n - 2): s = (hi - lo) float32(1 / t); z = round(-lo / s);
    q = clip(round(v / s) + z, 0, t); v' = (q - z) s. NaN and infinities are kept and do not count for the range.
    Source: Jacob et al. 2018, arXiv:1712.05877, section 2.1, with the zero point of ``tf.quantization``'s fake
    quantisation but for exact ties.
    """

    name: ClassVar[str] = "affine"
    formula: ClassVar[str] = "round(v/s)·s"
    has_low: ClassVar[bool] = True

    def grid(self, limits: Limits, bits: Expr) -> Grid:
        """Return the levels for float32 limits [..., 1] and int32 bits [..., 1]."""
        reciprocal = self._by_width(bits, lambda n: 1 / self.codes(n)[1])
        scale = _or_one((limits.high - limits.low) * reciprocal)
        zero = marked(ZERO_POINT, op("Round", -limits.low / scale))
        return Grid(scale, zero, None, None, self.top(bits), reciprocal)

    def ceiling(self, grid: Grid) -> Expr | None:
        """Return the greatest code's steps: round(hi / s) + round(-lo / s) may be one more than the greatest code."""
        return None if grid.zero is None else grid.top - grid.zero


@dataclass(frozen=True)
class Symmetric(Scheme):
    """Equally spaced levels around zero, whose code is 0.

    With n bits and t = 2^(n - 1) - 1: s = max|v| float32(1 / t); q = clip(round(v / s), -t, t); v' = q s. Without
    the narrow range, which is the default here, codes begin at -2^(n - 1), and
    s = max(hi float32(1 / t), -lo float32(1 / 2^(n - 1))). NaN and infinities are kept and do not count for the
    range. Source: Jacob et al. 2018, arXiv:1712.05877, for weights; Krishnamoorthi 2018, arXiv:1806.08342, 2.2.
    """

    name: ClassVar[str] = "symmetric"
    formula: ClassVar[str] = "round(v/s)·s"
    usually_narrow: ClassVar[bool] = True

    def codes(self, bits: int) -> tuple[int, int]:
        """Return the lowest and the highest code of a width."""
        return self.narrow - 2 ** (bits - 1), 2 ** (bits - 1) - 1

    def grid(self, limits: Limits, bits: Expr) -> Grid:
        """Return the levels for float32 limits [..., 1] and int32 bits [..., 1]."""
        reciprocal = self._by_width(bits, lambda n: 1 / self.codes(n)[1])
        if self.narrow:
            scale = op("Maximum", limits.high, -limits.low) * reciprocal
        else:
            below = self._by_width(bits, lambda n: -1 / self.codes(n)[0])
            scale = op("Maximum", limits.high * reciprocal, -limits.low * below)
        return Grid(_or_one(scale), None, None, self.bottom(bits), self.top(bits), reciprocal)


@dataclass(frozen=True)
class PowerOfTwo(Symmetric):
    """Fixed point: `Symmetric` in which s is the least power of two whose levels reach the limits.

    With codes from b to t: the least s = 2^k with s t >= hi and s b <= lo. Powers of two are exact, so v' is too.
    Source: fixed-point formats as in Jain et al. 2020, arXiv:1903.08066.
    """

    name: ClassVar[str] = "power_of_two"
    formula: ClassVar[str] = "round(v/s)·s, s = 2^k"

    def grid(self, limits: Limits, bits: Expr) -> Grid:
        """Return the levels for float32 limits [..., 1] and int32 bits [..., 1]."""
        bottom, top = self.bottom(bits), self.top(bits)
        greatest = _power_above(op("Maximum", limits.high, -limits.low))
        small = greatest * self._by_width(bits, lambda n: 2.0 ** (1 - n))
        fits = (small * top >= limits.high) & (limits.low >= small * bottom)
        scale = _or_one(select(fits, small, small * 2.0))
        return Grid(scale, None, None, bottom, top, self._by_width(bits, lambda n: 1 / self.codes(n)[1]))


def _power_above(value: Expr) -> Expr:
    """Return the least power of two that is not less than a float32 value; 0 for 0.

    The exponent is the bits from 23 on: adding 0x007FFFFF carries into it unless the mantissa is zero.
    """
    bits = op("Bitcast", value, type=Dtype("int32"))
    up = op("BitwiseAnd", bits + 0x007FFFFF, -0x00800000)
    return op("Bitcast", up, type=Dtype(FLOAT))


@dataclass(frozen=True)
class Log(Scheme):
    """Levels equally spaced in log(v + epsilon), for variances, which matter as 1 / sqrt(v + epsilon).

    With n bits, t = 2^n - 1 (narrow range: 2^n - 2) and l = log(v + epsilon): s = (max l - min l) (1 / t);
    q = clip(round((l - min l) / s), 0, t); v' = max(exp(q s + min l) - epsilon, 0). NaN, infinities and negative
    values are kept and do not count for the range. Logarithms are float64, rounded to float32 at the end: in
    float32 two libraries' logarithms differ by enough to move a result by 11 units in the last place. This way,
    the least and the greatest value are kept, and zero stays exactly zero. Source: logarithmic quantisation as in
    Miyashita et al. 2016, arXiv:1603.01025, of v + epsilon in place of v, and with a base that follows the range.

    Attributes:
        epsilon: the number that is added to a variance before its root is taken; a value's context gives it.

    Raises:
        Error: a fixed range that ends at zero or below.
    """

    epsilon: float = 0.0
    name: ClassVar[str] = "log"
    formula: ClassVar[str] = "exp(round(l/s)·s) - ε, l = log(v + ε)"
    dtype: ClassVar[str] = DOUBLE
    has_low: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.range, Fixed) and self.range.high <= 0:
            raise Error(
                f"range {self.range.low:g} to {self.range.high:g} of the scheme log: variances are not negative"
            )

    def within(self, epsilon: float | None) -> Log:
        """Return the scheme for variances that are used with this epsilon."""
        return replace(self, epsilon=epsilon or 0.0)

    def defined(self, value: Expr) -> Expr:
        """Return the mask of the values that are quantised; the others are kept, and do not count for the range."""
        return (value >= 0.0) & (value < float("inf"))

    def coordinate(self, value: Expr) -> Expr:
        """Return log(v + epsilon), float64; any number for values that do not count."""
        return op("Log", op("Cast", value + self.epsilon, DstT=Dtype(DOUBLE)))

    def value(self, coordinate: Expr) -> Expr:
        """Return float32 values from their coordinates."""
        shifted = op("Cast", op("Exp", coordinate), DstT=Dtype(FLOAT))
        return op("Maximum", shifted - marked(EPSILON, constant(self.epsilon, FLOAT)), 0.0)

    def slope(self, value: Expr) -> Expr:
        """Return dv'/dl."""
        return value + self.epsilon

    def extremes(self, value: Expr, defined: Expr | None, shape: Shape, axes: tuple[int, ...]) -> Limits:
        """Return the least and the greatest of the values that count; infinities if there is none."""
        low, high = (
            value if defined is None else where(defined, value, x, shape) for x in (float("inf"), float("-inf"))
        )
        return Limits(reduced("Min", low, axes), reduced("Max", high, axes))

    def range_of(self, extremes: Limits) -> Limits:
        """Return the logarithms of the extremes; the range need not contain zero."""
        return Limits(*(self.coordinate(limit) for limit in extremes))

    def grid(self, limits: Limits, bits: Expr) -> Grid:
        """Return the levels for float64 limits [..., 1] and int32 bits [..., 1]."""
        reciprocal = self._by_width(bits, lambda n: 1 / self.codes(n)[1])
        low = marked(ORIGIN, limits.low)
        span = limits.high - low
        scale = marked(SCALE, select(span >= TINY, span * reciprocal, constant(1.0, DOUBLE)))
        return Grid(scale, None, low, None, self.top(bits), reciprocal)

    def limits_of(self, values: np.ndarray) -> tuple[float, float]:
        """Return the limits of a checkpoint's float32 values; those of 0 for no values."""
        counted = values[(values >= 0) & (values < np.inf)]
        shifted = (counted if counted.size else np.zeros(1, np.float32)) + np.float32(self.epsilon)
        logs = np.log(shifted.astype(np.float64))
        return float(logs.min()), float(logs.max())

    def fixed(self, range_: Fixed) -> tuple[float, float]:
        """Return given limits in the scheme's coordinate; a negative low limit counts as 0."""
        return self.limits_of(np.array([max(range_.low, 0.0), range_.high], np.float32))


SCHEMES: Mapping[str, type[Scheme]] = {scheme.name: scheme for scheme in (Affine, Symmetric, PowerOfTwo, Log)}
"""All schemes by name. A new one has its name in `passes.quantization.options.SchemeName`, too, where the command line
finds it without importing TensorFlow."""


def altered(quantizer: Scheme, options: Mapping[str, Any]) -> Scheme:
    """Return a quantiser with some options changed, "scheme" among them, by name.

    Raises:
        Error: there is no such option or scheme, or a value is out of range.
    """
    current = {f.name: getattr(quantizer, f.name) for f in fields(Scheme)}
    unknown = set(options) - {"scheme", *current}
    if unknown:
        raise Error(f"a quantiser has no option {sorted(unknown)[0]!r}; it has scheme, {', '.join(current)}")
    name = options.get("scheme", quantizer.name)
    if name not in SCHEMES:
        raise Error(f"there is no scheme {name!r}; there are {', '.join(SCHEMES)}")
    return SCHEMES[name](**{**current, **{k: v for k, v in options.items() if k != "scheme"}})

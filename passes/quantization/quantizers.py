"""Quantisers: functions that fake-quantise the values of one role in TensorFlow.

A function works on a value of any shape, or on a stack of vectors [R, C], each with limits and a width of its own. Its
arguments besides the values are, in this order:

- amount: float32 scalar, blend weight: 0 gives the value itself, bit for bit; 1 gives the quantised value;
- bits: int32 [1] or [R, 1], the width in force, 0 to 16; 0 gives the value itself, bit for bit;
- limits: float32 [2] or [R, 2], unless the range is dynamic;
- noise: float32 like the values, from 0 to 1, 1 excluded, where rounding is stochastic.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from passes.quantization.node_marks import CODE, WIDTH, marked
from passes.quantization.options import Rounding
from passes.quantization.ranges import Dynamic, Ema, Fixed, Learned
from passes.quantization.schemes import FLOAT, TINY, Grid, Limits, Scheme, reduced
from rewriter.expr import (
    Apply,
    Expr,
    Function,
    Port,
    Shape,
    array,
    concat,
    constant,
    op,
    parameter,
    select,
    stop_gradient,
)
from rewriter.protos import Dtype, Func, attr, dtype_attr, shapes_attr


@dataclass(frozen=True)
class QuantizerSpec:
    """The properties by which fake-quantise functions differ.

    Attributes:
        scheme: its options; the width is no part of the function.
        shape: the shape of the values, where it is known.
        axes: the axes, counted from the end, over which values share a range; there is a range for each index of the
            others.
        dtype: the values' dtype; they are quantised in float32.
        training: true if it is used in training; matters for stochastic rounding and moving averages alone.
        context: part of the functions' names; each context has functions of its own.
        relative: true if given limits are fractions of the values' own range.
        by_row: true for rows of a table that have ranges of their own.
        count: the number of values that share a range, where the shape does not tell it; else 0.
    """

    scheme: Scheme
    shape: tuple[int, ...] | None
    axes: tuple[int, ...] = (-1,)
    dtype: str = FLOAT
    training: bool = False
    context: str = ""
    relative: bool = False
    by_row: bool = False
    count: int = 0

    @property
    def stochastic(self) -> bool:
        """True if its function takes random numbers."""
        return self.training and self.scheme.rounding == "stochastic"

    @property
    def kept(self) -> tuple[int, ...] | None:
        """The shape of the ranges of a value, with size 1 along the axes that share one; None where it is not known."""
        if self.shape is None:
            return None
        return tuple(1 if axis in self.axes else self.shape[axis] for axis in range(-len(self.shape), 0))

    @property
    def limits_shape(self) -> Shape:
        """The shape of given limits: [2], or [ranges, 2] where a value has several; fixed ones are [2].

        Those of a table's rows are [..., 2] for rows [..., C].
        """
        if isinstance(self.scheme.range, Fixed):
            return (2,)
        if self.by_row:
            return None if self.shape is None else (*self.shape[:-1], 2)
        return (2,) if self.per_tensor else (math.prod(self.kept or ()), 2)

    @property
    def sharing(self) -> int | None:
        """The number of values that share a range; None where it is not known."""
        if self.count:
            return self.count
        sizes = [None if self.shape is None else self.shape[axis] for axis in self.axes]
        return math.prod(size for size in sizes if size is not None) if None not in sizes else None

    @property
    def per_tensor(self) -> bool:
        """True if all values share one range."""
        return self.shape is None or len(self.axes) == len(self.shape)

    def stacked(self, rows: int) -> Shape:
        """Return the shape of the values for 0 rows, else that of a stack of rows; None where it is not known."""
        return None if self.shape is None else (rows, *self.shape) if rows else self.shape

    @property
    def observed(self) -> bool:
        """True if its range follows the values that it quantises, in variables."""
        return self.training and isinstance(self.scheme.range, Ema)

    @property
    def labels(self) -> list[str]:
        """The parts of a function's name that say for which values it is."""
        parts = [self.context] if self.context else []
        if self.shape is not None:
            parts.append("x".join(map(str, self.shape)) + "_channels" * (len(self.shape) == 1))
        if self.axes != (-1,):
            parts.append("over_" + "_".join(str(-axis) for axis in self.axes))
        if self.relative:
            parts.append("relative")
        if self.count:
            parts.append(f"{'rows' if self.by_row else 'table'}_of_{self.count}")
        return parts

    @property
    def group_key(self) -> QuantizerSpec:
        """Key under which specs may share one call."""
        range_ = Fixed(0, 1) if isinstance(self.scheme.range, Fixed) else self.scheme.range
        if isinstance(range_, Ema) and not self.observed:
            range_ = Ema()
        scheme = replace(self.scheme, bits=8, range=range_, narrow_range=self.scheme.narrow)
        return replace(self, scheme=scheme, training=self.stochastic or self.observed)

    @property
    def function_key(self) -> QuantizerSpec:
        """Key under which specs share one function; the origin of limits is no part of it."""
        scheme = self.group_key.scheme
        range_ = Ema() if isinstance(scheme.range, Ema) else scheme.range
        rounding: Rounding = "stochastic" if self.stochastic else "nearest"
        return replace(self, scheme=replace(scheme, range=range_, rounding=rounding), training=self.stochastic)

    @property
    def range_key(self) -> QuantizerSpec:
        """Key under which specs share one range update function."""
        scheme = replace(self.group_key.scheme, rounding="nearest", narrow_range=None)
        return replace(self, scheme=scheme, training=True)


def fake_quantize_function(spec: QuantizerSpec, rows: int = 0) -> Function:
    """Return the function of a spec: (amount, bits, limits?, noise?, value) -> value.

    For the quantised value q and the amount a, the result is q a + v (1 - a). It is computed as
    ``sg(q a + v (1 - a)) + (v - sg(v))``, where sg stops the gradient: this is exact, and its gradient is 1. Where
    codes are clipped, the gradient is 1 - a. A quantiser that is switched off selects v itself, bit for bit.

    Args:
        spec: the scheme and the values.
        rows: how many vectors the value holds, each in a row of its own; 0 for a single value of any shape.
    """
    scheme = spec.scheme
    amount, bits, value = parameter("amount", FLOAT), parameter("bits", "int32"), parameter("value", spec.dtype)
    parameters = [amount, bits]
    shapes: list[tuple[int, ...] | None] = [(), (rows, 1) if rows else (1,)]
    limits = None if isinstance(scheme.range, Dynamic) else parameter("limits", FLOAT)
    noise = parameter("noise", FLOAT) if spec.stochastic else None
    shape = spec.stacked(rows)
    if limits is not None:
        parameters.append(limits)
        shapes.append((rows, 2) if rows else spec.limits_shape)
    if noise is not None:
        parameters.append(noise)
        shapes.append(shape)
    values = Values(spec, value, shape)
    acting = (op("Greater", amount, 0.0)) & wide(bits)
    quantized = Differentiable(values, bits, limits, noise).through(amount)
    result = select(acting if values.defined is None else acting & values.defined, quantized, value)
    name = "_".join(
        [
            f"bnqat_{scheme.name}_{scheme.range.name}",
            *(["device"] if scheme.device else []),
            *(["narrow"] if scheme.narrow and not scheme.usually_narrow else []),
            *(["full"] if scheme.usually_narrow and not scheme.narrow else []),
            *(["stochastic"] if spec.stochastic else []),
            *spec.labels,
            *([] if spec.dtype == FLOAT else [spec.dtype]),
            *([f"{rows}_rows"] if rows else []),
        ]
    )
    return Function(re.sub(r"\W", "_", name), (*parameters, value), (*shapes, shape), (result,))


def custom_function(graph: str, shape: tuple[int, ...], dtype: str) -> Function:
    """Return the function around a custom quantiser's graph: (amount, bits, value) -> value, with its gradient."""
    amount, bits, value = parameter("amount", FLOAT), parameter("bits", "int32"), parameter("value", dtype)
    raw = cast(value, FLOAT)
    attrs = {"Tin": attr([Dtype(FLOAT)]), "Tout": attr([Dtype(FLOAT)]), "f": attr(Func(graph))}
    attrs["_output_shapes"] = shapes_attr([shape])
    acting = (op("Greater", amount, 0.0)) & wide(bits)
    # While it does not act, no gradient goes back through it: 0 times a gradient that is not finite would be NaN.
    guarded = select(acting, raw, stop_gradient(raw))
    quantized = Apply(FLOAT, "PartitionedCall", (guarded,), attrs, "pipeline")
    blend = quantized * amount + raw * (constant(1.0, FLOAT) - amount)
    result = select(acting, cast(blend, dtype), value)
    name = f"bnqat_quantize_by_{graph}" + ("" if dtype == FLOAT else f"_{dtype}")
    return Function(name, (amount, bits, value), ((), (1,), shape), (result,))


class Values:
    """Values of a spec, of any shape or as a stack of vectors [R, C], before the levels are known.

    Attributes:
        raw: the values as float32.
        defined: mask of the values that are quantised.
        coordinate: the values in the scheme's coordinate.
    """

    def __init__(self, spec: QuantizerSpec, value: Expr, shape: Shape) -> None:
        self.spec = spec
        self.value = value
        self.shape = shape
        self.raw = cast(value, FLOAT)
        self.defined = spec.scheme.defined(self.raw)
        self.coordinate = spec.scheme.coordinate(self.raw)

    def extremes(self) -> Limits:
        """Return the least and the greatest of the values that count for the range."""
        return self.spec.scheme.extremes(self.raw, self.defined, self.shape, self.spec.axes)


class OnGrid:
    """Values rounded to the levels of a grid; `value` is the result in float32."""

    def __init__(self, values: Values, grid: Grid, noise: Expr | None) -> None:
        scheme = values.spec.scheme
        self.values = values
        self.grid = grid
        self.position = grid.position(values.coordinate)
        code = _rounded(self.position, noise)
        if grid.zero is not None:
            code = code + grid.zero
        bottom = constant(0.0, scheme.dtype) if grid.bottom is None else grid.bottom
        clipped = marked(CODE, op("Minimum", op("Maximum", code, bottom), grid.top) if scheme.clips else code)
        self.inside = op("Equal", clipped, code)
        self.steps = clipped if grid.zero is None else clipped - grid.zero
        self.value = scheme.value(grid.level(self.steps))

    def blend(self, amount: Expr) -> Expr:
        """Return the result, blended with the raw values by `amount`, in the values' own dtype."""
        rest = constant(1.0, FLOAT) - amount
        return cast(self.value * amount + self.values.raw * rest, self.values.value.dtype)


class Differentiable(OnGrid):
    """Values on a grid of given or dynamic limits, with gradients."""

    def __init__(self, values: Values, bits: Expr, given_limits: Expr | None, noise: Expr | None) -> None:
        scheme = values.spec.scheme
        self.bits = bits
        self.given = None if given_limits is None else _split(given_limits, values.spec)
        self.own = scheme.range_of(values.extremes()) if self.given is None or values.spec.relative else None
        self.limits = self._limits()
        limits = Limits(*(cast(limit, scheme.dtype) for limit in self.limits))
        super().__init__(values, scheme.grid(limits, bits), noise)

    def _limits(self) -> Limits:
        """Return the limits: the values' own, or given ones, which may be fractions of the values' own."""
        if self.given is None or self.own is None:
            both = self.own if self.given is None else self.given
            if both is None:
                raise AssertionError("limits are given, or the values' own")
            return both
        own = Limits(*(stop_gradient(limit) for limit in self.own))
        low, high = op("Abs", self.given.low) * own.low, op("Abs", self.given.high) * own.high
        # Zero changes nothing here, but no product may meet a sum directly: XLA would round the span of both once.
        return Limits(op("Minimum", low, 0.0), op("Maximum", high, 0.0))

    def through(self, amount: Expr | None = None) -> Expr:
        """Return the result, blended with the raw values by `amount`, or wholly quantised, with its gradients."""
        value = self.values.value
        result = stop_gradient(cast(self.value, value.dtype) if amount is None else self.blend(amount))
        straight_through = value - stop_gradient(value)
        if isinstance(self.values.spec.scheme.range, Dynamic):
            return result + straight_through  # nothing is clipped
        rest = constant(0.0, FLOAT) if amount is None else constant(1.0, FLOAT) - amount
        straight_through = straight_through * cast(select(self.inside, constant(1.0, FLOAT), rest), value.dtype)
        if not isinstance(self.values.spec.scheme.range, Learned):
            return result + straight_through
        limits = self._limits_gradient(constant(1.0, FLOAT) if amount is None else amount)
        return result + straight_through + cast(limits, value.dtype)

    def _limits_gradient(self, amount: Expr) -> Expr:
        """Return zeros whose gradient for the limits is that of the quantised value."""
        spec = self.values.spec
        scheme, sharing = spec.scheme, spec.sharing
        if sharing is None:
            raise AssertionError("a learned range is for a known number of values")
        inside = cast(self.inside, scheme.dtype)
        rounded = select(self.inside, self.position, constant(0.0, scheme.dtype))  # which may be infinite elsewhere
        of_high = (self.steps - rounded) * self.grid.reciprocal
        slope = scheme.slope(self.value)
        factor = scheme.step_gradient_factor(self.bits, sharing) * amount
        factor = factor if slope is None else factor * slope
        if self.given is not None and self.own is not None:  # one fraction scales both limits
            low, high = self.own.low, self.own.high  # of one sign, a weight has a limit that is zero
            size = op("Maximum", high - low if scheme.has_low else op("Maximum", high, -low), TINY)
            return _zero(self.given.high) * self._factor(of_high / stop_gradient(size), factor)
        result = _zero(self.limits.high) * self._factor(of_high, factor)
        if scheme.has_low:
            of_low = constant(1.0, scheme.dtype) - inside - of_high
            result = result + _zero(self.limits.low) * self._factor(of_low, factor)
        return result

    def _factor(self, slope: Expr, factor: Expr) -> Expr:
        """Return the factor of the gradient; 0 where no value is quantised."""
        result = cast(slope, FLOAT) * factor
        defined = self.values.defined
        return stop_gradient(result if defined is None else select(defined, result, constant(0.0, FLOAT)))


def wide(bits: Expr) -> Expr:
    """Return the mask of the widths that are in force: 0 switches a quantiser off."""
    return marked(WIDTH, op("Greater", bits, 0))


def _zero(value: Expr) -> Expr:
    """Return 0, with gradient 1."""
    return value - stop_gradient(value)


def _rounded(position: Expr, noise: Expr | None) -> Expr:
    if noise is None:
        return op("Round", position)
    below = op("Floor", position)
    up = op("Less", cast(noise, position.dtype), position - below)
    return below + cast(up, position.dtype)


def cast(value: Expr, dtype: str) -> Expr:
    """Return the value in a dtype."""
    return value if value.dtype == dtype else op("Cast", value, DstT=Dtype(dtype))


def _split(limits: Expr, spec: QuantizerSpec) -> Limits:
    """Return the two limits in [..., 2], each [..., 1]; those of several ranges in the ranges' shape."""
    if not spec.by_row and spec.limits_shape not in (None, (2,)):
        shape = array(np.array(spec.kept, np.int32))
        low, high = (op("Reshape", limit, shape) for limit in _halves(limits))
        return Limits(low, high)
    return _halves(limits)


def _halves(limits: Expr) -> Limits:
    # Not Split, whose gradient takes the axis from the forward function: XLA then holds all that this function is given
    # for constants, and compiles a training step anew for each value.
    attrs = {"num": attr(2), "T": dtype_attr(limits.dtype), "axis": attr(-1)}
    low = Apply(limits.dtype, "Unpack", (limits,), attrs)
    halves = (op("ExpandDims", half, constant(-1, "int32")) for half in (low, Port(limits.dtype, low, 1)))
    return Limits(*halves)


def range_update_function(spec: QuantizerSpec, rows: int = 0) -> Function:
    """Return the function (value, limits) -> limits that moves limits towards the extremes of a value, as `Ema` says.

    Limits are float32 [2], or [R, 2]. Where no value counts, they stay.
    """
    scheme = spec.scheme
    if not isinstance(scheme.range, Ema) or not spec.per_tensor:
        raise AssertionError("only moving averages are moved, and each holds the extremes of a whole value")
    value, old = parameter("value", spec.dtype), parameter("limits", FLOAT)
    shape = spec.stacked(rows)
    values = Values(spec, value, shape)
    low, high = (_flat(cast(e, FLOAT), spec) for e in scheme.range_of(values.extremes()))
    extremes = concat((low, high), -1)
    if values.defined is None:
        raise AssertionError("a moving average counts defined values")
    counted = _flat(reduced("Any", values.defined, spec.axes), spec)
    momentum = np.float32(scheme.range.momentum)
    new = old * constant(momentum, FLOAT) + extremes * constant(np.float32(1) - momentum, FLOAT)
    parts = [f"bnqat_observe_{scheme.name}_momentum_{momentum:.9g}", *spec.labels]
    name = "_".join(parts + ([] if spec.dtype == FLOAT else [spec.dtype]) + ([f"{rows}_rows"] if rows else []))
    shapes = (shape, (rows, 2) if rows else (2,))
    return Function(re.sub(r"\W", "_", name), (value, old), shapes, (select(counted, new, old),))


def _flat(extreme: Expr, spec: QuantizerSpec) -> Expr:
    """Return the extreme of a value of several axes, [1, ..., 1], as [1]; that of vectors has this form already."""
    return extreme if len(spec.axes) == 1 else op("Reshape", extreme, array(np.array([1], np.int32)))


def learned_limits(schemes: Sequence[Scheme | None], scale: Expr, low: Expr | None) -> Expr:
    """Return the limits [L, 2] of learned scales [L] and low limits [L]; a scheme of None has no learned range.

    scale counts as max(|scale|, TINY), for the width that a scheme starts with.
    """
    bottoms, tops, has_low = np.zeros(len(schemes), np.float32), np.zeros(len(schemes), np.float32), []
    for index, scheme in enumerate(schemes):
        has_low.append(scheme is not None and scheme.has_low)
        if scheme is not None:
            bottoms[index], tops[index] = scheme.codes(scheme.bits)
    size = op("Maximum", op("Abs", scale), TINY)
    limits = [size * array(bottoms), size * array(tops)]
    if low is not None:
        offset = low * array(np.array(has_low, np.float32))
        limits = [offset + limit for limit in limits]
    attrs = {"N": attr(2), "T": dtype_attr(FLOAT), "axis": attr(1)}
    return Apply(FLOAT, "Pack", tuple(limits), attrs)


def row_function(shape: tuple[int, ...], dtype: str) -> Function:
    """Return the function (quantised, value) -> quantised, which says for which value one of several results stands."""
    quantized, value = parameter("quantized", dtype), parameter("value", dtype)
    sizes = f"{shape[0]}_channels" if len(shape) == 1 else "x".join(map(str, shape))
    name = f"bnqat_row_{sizes}" + ("" if dtype == FLOAT else f"_{dtype}")
    return Function(name, (quantized, value), (shape, shape), (op("Identity", quantized),))

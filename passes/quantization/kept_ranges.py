"""Ranges of weights that are kept: given ones, those with the least squared error, and learned ones.

A layer has one range, or one for each channel. The ranges of all layers lie in a few variables, one after the other:
`range/<role>` holds those of `Mse`, and `limit/<role>` and `low/<role>`, which are trained, those of `Learned`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from passes.quantization.custom import Quantizer
from passes.quantization.device_schemes import on_device
from passes.quantization.least_error import least_error_limits, own_limits
from passes.quantization.points import QuantizedLayer
from passes.quantization.ranges import Dynamic, Fixed, Learned, Mse
from passes.quantization.schemes import FLOAT, TINY, Scheme
from rewriter import protos
from rewriter.expr import Apply, Expr, PerCall, array, concat, op, per_call, read
from rewriter.ir import Error, Variable


class KeptRange(NamedTuple):
    """The range of a layer that is kept.

    Attributes:
        scheme: the layer's quantiser.
        limits: the limits that it begins with, float32 [ranges, 2].
        relative: true if what is learned is a fraction of the weights' own range.
    """

    scheme: Scheme
    limits: np.ndarray
    relative: bool


def kept_range(layer: QuantizedLayer, quantizer: Quantizer | None) -> KeptRange | None:
    """Return the range that a layer keeps; None if it keeps none.

    Raises:
        Error: the values with which it begins are not known.
    """
    if not isinstance(quantizer, Scheme) or isinstance(quantizer.range, Dynamic):
        return None
    scheme = on_device(quantizer)
    by_channel = quantizer.granularity != "per_tensor"
    if isinstance(scheme.range, Fixed):
        # The same for all channels.
        return KeptRange(scheme, np.array([scheme.fixed(scheme.range)], np.float32), relative=False)
    if by_channel and layer.channels is None:
        raise Error("its channels have no ranges that could be kept; choose a dynamic range, or granularity per_tensor")
    if layer.values is None:
        raise Error(f"its values, with which a range that is {scheme.range.name} would begin, are not known")
    values = layer.values()
    rows = values[0] if by_channel else np.concatenate([v.ravel() for v in values])[None]
    limits = least_error_limits(scheme, rows)
    relative = layer.normalized and isinstance(scheme.range, Learned)
    if relative:
        own = own_limits(scheme, rows)[:, 1:]
        high = np.divide(limits[:, 1:], own, out=np.ones_like(own), where=own > 0)
        limits = np.concatenate([high, high], 1)
    return KeptRange(scheme, limits, relative)


@dataclass
class KeptRanges:
    """The ranges of a role that are kept, of all layers.

    Attributes:
        kept: by layer.
        variable: makes a variable, or returns the model's: (name, initial value, trainable).
        variables: the variables that hold the ranges, by name.
    """

    role: str
    kept: Mapping[int, KeptRange]
    variable: Callable[[str, np.ndarray, bool], Variable]

    def __post_init__(self) -> None:
        self.variables: dict[str, Variable] = {}
        self._first: dict[int, int] = {}
        blocks = [self._given(), self._searched(), self._learned()]
        held = [block for block in blocks if block is not None]
        count = sum(len(k.limits) for k in self.kept.values())
        self._all: PerCall | None = (
            per_call(f"quantization_limits_{self.role}", concat(held), (count, 2)) if held else None
        )

    def of(self, layer: int) -> Expr:
        """Return the limits of a layer: float32 [2], or [ranges, 2] where it has several."""
        if self._all is None:
            raise AssertionError("no range is kept")
        count = len(self.kept[layer].limits)
        begin, size = (array(np.array(v, np.int32)) for v in ((self._first[layer], 0), (count, 2)))
        rows = op("Slice", self._all, begin, size)
        return rows if count > 1 else op("Reshape", rows, array(np.array([2], np.int32)))

    def _place(self, layers: Sequence[int]) -> np.ndarray:
        """Give some layers their places after those that have theirs, and return their limits."""
        limits = [self.kept[layer].limits for layer in layers]
        for layer in layers:
            self._first[layer] = sum(len(self.kept[i].limits) for i in self._first)
        return np.concatenate(limits)

    def _layers(self, range_: type) -> list[int]:
        return [layer for layer, kept in self.kept.items() if isinstance(kept.scheme.range, range_)]

    def _given(self) -> Expr | None:
        layers = self._layers(Fixed)
        return array(self._place(layers)) if layers else None

    def _searched(self) -> Expr | None:
        layers = self._layers(Mse)
        return read(self._new("range", self._place(layers), trainable=False)) if layers else None

    def _learned(self) -> Expr | None:
        """Return the limits of learned ranges: -p and p for symmetric schemes, p and p for fractions, else l and p."""
        layers = self._layers(Learned)
        if not layers:
            return None
        limits = self._place(layers)
        size = op("Maximum", op("Abs", read(self._new("limit", limits[:, 1], trainable=True))), TINY)
        kinds = [self.kept[layer] for layer in layers]
        counts = [len(kind.limits) for kind in kinds]
        sign = np.repeat(np.array([1 if k.relative else -1 for k in kinds], np.float32), counts)
        with_low = np.repeat(np.array([k.scheme.has_low and not k.relative for k in kinds]), counts)
        low: Expr = size * array(sign)
        if with_low.any():
            lows = read(self._new("low", np.where(with_low, limits[:, 0], np.float32(0)), trainable=True))
            low = op("Select", array(with_low), op("Minimum", lows, 0.0), low)
        attrs = {"N": protos.attr(2), "T": protos.dtype_attr(FLOAT), "axis": protos.attr(1)}
        return Apply(FLOAT, "Pack", (low, size), attrs)

    def _new(self, name: str, initial: np.ndarray, *, trainable: bool) -> Variable:
        full = f"{name}/{self.role}"
        self.variables[full] = self.variable(full, initial.astype(np.float32), trainable)
        return self.variables[full]

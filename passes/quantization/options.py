"""Options of quantisers, and of when they act. Importing this module does not import TensorFlow."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt

from passes.options import Check, Flag, Help, PassOptions, Step, Strict, Text
from passes.quantization.ranges import Ema, Fixed
from passes.quantization.roles import MAX_BITS, MIN_BITS
from rewriter.ir import Error

SchemeName = Literal["affine", "symmetric", "power_of_two", "log", "none"]
Rounding = Literal["nearest", "stochastic"]
Granularity = Literal["per_channel", "per_tensor"]
Width = Annotated[int, Strict(), Ge(MIN_BITS), Lt(MAX_BITS + 1)]

RANGES = ("dynamic", "ema", "learned", "mse")
"""Names of the ranges that have no limits of their own; `Fixed` is two numbers."""

FUNCTION = r"[\w.]+:[\w.]+"
"""Form of a function's name, as ``module:function``."""


def checked_range(value: Any) -> Any:
    """Return a range's name, or its limits as a list of two floats.

    Raises:
        ValueError: it is neither, or the limits are in no order.
    """
    if isinstance(value, str) and value in RANGES:
        return value
    if isinstance(value, list | tuple) and [type(v) in (int, float) for v in value] == [True, True]:
        low, high = (float(v) for v in value)
        try:
            Fixed(low, high)
        except Error as e:
            raise ValueError(str(e)) from e
        return [low, high]
    raise ValueError('it is "dynamic", "ema", "learned", "mse" or two numbers, [low, high]')


def checked_function(value: Any) -> Any:
    """Return a function, or the name of one.

    Raises:
        ValueError: it is neither.
    """
    if callable(value) or (isinstance(value, str) and re.fullmatch(FUNCTION, value)):
        return value
    raise ValueError("it is a function, or the name of one as module:function")


def range_from_text(text: str) -> str | list[float]:
    """Return a range: its name, or two limits from a text like ``-1:1``.

    Raises:
        ValueError: it is neither.
    """
    if text in RANGES:
        return text
    low, high = text.split(":")
    return [float(low), float(high)]


@dataclass(frozen=True)
class QuantizerOptions(PassOptions):
    """Options of the quantisers of a role; those of a more special table come before those of a more general one.

    Where a role has no scheme, it has the one that suits it; where narrow_range is not given, the scheme's usual.
    """

    scheme: Annotated[
        SchemeName | None,
        Help("How values are rounded"),
    ] = None
    bits: Annotated[
        Width,
        Help("Width of the codes"),
    ] = 8
    range: Annotated[
        Any,
        Check(checked_range),
        Text("range", range_from_text, f"a range is one of {', '.join(RANGES)}, or two limits like -1:1"),
        Help("Limits between which the levels lie: dynamic, ema, learned, mse, or two numbers like -1:1"),
    ] = "dynamic"
    range_momentum: Annotated[
        float,
        Ge(0),
        Lt(1),
        Help("Momentum of an ema range"),
    ] = Ema.momentum
    rounding: Annotated[
        Rounding,
        Help("Rounding of codes while training"),
    ] = "nearest"
    granularity: Annotated[
        Granularity | None,
        Help("Weights: a range for each channel, or one for the whole tensor"),
    ] = None
    narrow_range: Annotated[
        Flag | None,
        Help("Use one code fewer than 2^bits"),
    ] = None
    quantizer: Annotated[
        Annotated[Callable[[Any, Any], Any] | str, Check(checked_function)] | None,
        Text("module:function", str, "it is the name of a function as module:function"),
        Help("Your own function in place of a scheme"),
    ] = None


@dataclass(frozen=True)
class ScheduleOptions(PassOptions):
    """The steps at which quantisers begin to act: initial values of the variables of these names."""

    start_step: Annotated[Step, Help("First step at which quantisers act")] = 0
    ramp_steps: Annotated[Step, Help("Steps, from the start step on, that blend float and quantised values")] = 0

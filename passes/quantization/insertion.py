"""Insertion of quantisers: quantisation points and the quantisers of their layers, turned into edits."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from passes.quantization.controls import Controls, Schedule, counters
from passes.quantization.custom import Context, CustomQuantizer, Quantizer, Traced, TraceRequest
from passes.quantization.device_schemes import on_device
from passes.quantization.emission import QuantizerEmitter
from passes.quantization.grouping import CustomSpec, Operand, Used, groups
from passes.quantization.kept_ranges import KeptRange, kept_range
from passes.quantization.points import QuantizationPoint, QuantizedLayer, Quantizers, value_at
from passes.quantization.quantizers import QuantizerSpec
from passes.quantization.ranges import Dynamic, Fixed, Learned
from passes.quantization.schemes import Log, Scheme
from rewriter.edit import AddVariable, Define, Edit, Import, RunAfter
from rewriter.expr import Use, read
from rewriter.ir import MAIN, Edge, Model, Value

FLOATING = ("half", "float16", "bfloat16", "float32", "float64")
"""Dtypes of values that are quantised."""


@dataclass
class Family:
    """Layers that one provider numbers, their quantisers, and the points to quantise.

    Attributes:
        device: the roles whose codes are those of an integer device.
        kept: the ranges of these roles that are kept in variables, by layer.
    """

    layers: Sequence[QuantizedLayer]
    quantizers: Quantizers
    device: frozenset[str]
    points: list[QuantizationPoint] = field(default_factory=list)
    kept: dict[str, dict[int, KeptRange]] = field(default_factory=dict)

    def keep_range(self, role: str, layer: int) -> None:
        """Find the range that a layer is to keep, if it keeps one.

        Raises:
            Error: the values with which it begins are not known.
        """
        if role in self.device and layer not in self.kept.setdefault(role, {}):
            kept = kept_range(self.layers[layer], self.quantizers[role][layer])
            if kept is not None:
                self.kept[role][layer] = kept


def insertion(model: Model, families: Sequence[Family], schedule: Schedule) -> Iterator[Edit]:
    """Yield the edits that quantise the values at the points of all families.

    Raises:
        Error: the model holds control variables of other layers.
    """
    quantizers = {role: of_role for family in families for role, of_role in family.quantizers.items()}
    limits: dict[str, np.ndarray] = {}
    for family in families:
        of_vectors = {role: q for role, q in family.quantizers.items() if role not in family.device}
        limits |= starting_limits(model, family.layers, of_vectors)
    kept = {role: family.kept.get(role, {}) for family in families for role in family.device}
    controls = Controls(model, quantizers, schedule, limits, kept)
    yield from (AddVariable(v) for v in controls.variables.values() if v.key not in model.variables)
    # A run counts its step only after it has read the step that it compares.
    count = controls.variables["step"]
    yield from (RunAfter(MAIN, name, (read(count),), "quantization/step") for name in counters(model))
    operands = _Operands(model, controls)
    inserted = [(operands.of(family, point), point) for family in families for point in family.points]
    # TensorFlow traces and saves all of a user's functions in one go: each save takes tenths of a second.
    traced = _trace([operand for operand, _ in inserted], quantizers)
    if traced.graphs:
        yield Import(tuple(traced.graphs.values()), traced.gradients)
    emitter = QuantizerEmitter(model, controls, traced)
    for group in groups(model, [Used(operand, point.edge.node) for operand, point in inserted]):
        yield from emitter.place(group)
    # All values are quantised before any is replaced: what one edit puts in place is no value that another quantises.
    for operand, point in inserted:
        yield from point.edits(emitter.quantized[operand])
    if model.object_based:
        yield from (Define(function) for function in emitter.functions.values())


def starting_limits(model: Model, layers: Sequence[QuantizedLayer], quantizers: Quantizers) -> dict[str, np.ndarray]:
    """Return the limits that the ranges of each role begin with, float32 [layers, 2], in the schemes' coordinates."""
    return {
        role: np.array([_limits(model, layer, role, q) for layer, q in zip(layers, of_role, strict=True)], np.float32)
        for role, of_role in quantizers.items()
    }


def _limits(model: Model, layer: QuantizedLayer, role: str, quantizer: Quantizer | None) -> tuple[float, float]:
    members = [member for member in layer.members if role in member.variables]
    if not isinstance(quantizer, Scheme) or isinstance(quantizer.range, Dynamic):
        return 0.0, 0.0
    scheme = quantizer.within(layer.epsilon)
    if isinstance(scheme.range, Fixed):
        return scheme.fixed(scheme.range)
    if not members:  # no value of the layer has this role, as `why_not` refuses those that no variable holds
        return 0.0, 0.0
    values = [np.asarray(model.value_of(member.variables[role]), np.float32).ravel() for member in members]
    return scheme.limits_of(np.concatenate(values))


def why_not(model: Model, layer: QuantizedLayer, quantizer: Quantizer, point: QuantizationPoint) -> str:
    """Return the reason why a value cannot have its layer's quantiser; empty if it can."""
    dtype = (value_at(model, point.edge) if point.value is None else point.value).dtype
    if dtype not in FLOATING:
        return f"its values are {dtype}, and only floating-point values are quantised"
    return _why_not_on_device(quantizer, point) if point.device else _why_not_a_vector(model, layer, quantizer, point)


def _why_not_a_vector(model: Model, layer: QuantizedLayer, quantizer: Quantizer, point: QuantizationPoint) -> str:
    """Return the reason why a value, mostly a vector, cannot have its layer's quantiser; empty if it can."""
    custom, kept = isinstance(quantizer, CustomQuantizer), quantizer.range.name in ("ema", "learned")
    if not point.shape:
        return "it is a single number, which needs no codes"
    if (custom or quantizer.range.name == "learned") and -1 in point.shape:
        return "its shape is not known, which learned ranges and functions of your own need"
    if custom and not model.object_based:
        return "a function of your own needs a model in TensorFlow 2's format"
    if kept and point.axis is not None:
        return f"a range that is {quantizer.range.name} is one for all values, and it has one for each channel"
    if kept and not any(point.role in member.variables for member in layer.members):
        return f"no variable holds its values, with which a range that is {quantizer.range.name} would begin"
    if isinstance(quantizer, Log) and point.epsilon is None:
        return "the scheme log needs an epsilon, and it has none"
    return ""


def _why_not_on_device(quantizer: Quantizer, point: QuantizationPoint) -> str:
    """Return the reason why a weight cannot have its layer's quantiser; empty if it can."""
    if isinstance(quantizer, CustomQuantizer):
        return "functions of your own are for batch norms' vectors; weights have schemes alone"
    follows, whole = isinstance(quantizer.range, Dynamic), quantizer.granularity == "per_tensor"
    if point.lookup and follows and whole:
        return "rows that are looked up do not tell the range of the whole table; choose mse, learned or two limits"
    if isinstance(quantizer.range, Learned) and -1 in point.shape and not point.lookup:
        return "its shape is not known, which learned ranges need"
    return ""


class _Operands:
    """The operands of quantisers.

    Attributes:
        values: the expression for each value that a graph has: one, so that its uses share a quantiser.
    """

    def __init__(self, model: Model, controls: Controls) -> None:
        self.model = model
        self.controls = controls
        self.values: dict[tuple[str, Value], Use] = {}

    def of(self, family: Family, point: QuantizationPoint) -> Operand:
        """Return the value of a point, with the quantiser of its layer."""
        quantizer = family.quantizers[point.role][point.layer]
        if quantizer is None:
            raise AssertionError("what has no quantiser is no point")
        value = self._used(point.edge) if point.value is None else point.value
        spec = _spec(family.layers[point.layer], quantizer, point, value.dtype)
        tag = {
            "role": point.role,
            "scheme": quantizer.name if isinstance(quantizer, Scheme) else f"{quantizer.name} {quantizer.label}",
            "bits": quantizer.bits,
            "range": quantizer.range.name,
            "rounding": quantizer.rounding,
            "narrow_range": quantizer.narrow,
            "axis": _tagged_axis(quantizer, point),
            "layer_name": point.name,
            "layer": point.layer,
            "row": self.controls.row(point.role, point.layer),
            "use": point.use,
        }
        text, statistic = json.dumps(tag, sort_keys=True), point.use != "parameter"
        indices = None if point.lookup is None else self._used(point.lookup)
        return Operand(point.edge.graph, value, spec, point.role, point.layer, text, statistic, point.run, indices)

    def _used(self, edge: Edge) -> Use:
        """Return the value that is used at an edge."""
        use = value_at(self.model, edge)
        return self.values.setdefault((edge.graph, use.value), use)


def _spec(
    layer: QuantizedLayer, quantizer: Quantizer, point: QuantizationPoint, dtype: str
) -> QuantizerSpec | CustomSpec:
    """Return the properties by which the quantiser of a point's value differs from others."""
    shape = None if -1 in point.shape else point.shape
    if not isinstance(quantizer, Scheme):
        facts = Context(point.role, layer.name, point.epsilon)
        return CustomSpec(TraceRequest(quantizer.function, facts, shape or ()), dtype)
    context = "" if point.epsilon is None else f"epsilon_{point.epsilon:.9g}"
    if not point.device:
        scheme = quantizer.within(point.epsilon)
        return QuantizerSpec(scheme, shape, point.axes, dtype, point.trained, context).group_key
    axes = point.axes if _channel_axes(quantizer, point) else tuple(range(-len(point.shape), 0))
    relative = layer.normalized and isinstance(quantizer.range, Learned)
    by_row = point.lookup is not None and axes == (-1,)
    count = point.shape[-1] * (1 if by_row else layer.channels or 1) if point.lookup else 0
    spec = QuantizerSpec(on_device(quantizer), shape, axes, dtype, point.trained, context, relative, by_row, count)
    return spec.group_key


def _channel_axes(quantizer: Quantizer, point: QuantizationPoint) -> tuple[int, ...]:
    """Return the axes of the channels that have ranges of their own; given limits are the same for all."""
    whole = isinstance(quantizer, Scheme) and (
        quantizer.granularity == "per_tensor" or isinstance(quantizer.range, Fixed)
    )
    return () if whole else point.channel_axes


def _tagged_axis(quantizer: Quantizer, point: QuantizationPoint) -> int | list[int] | None:
    axes = _channel_axes(quantizer, point)
    return None if not axes else axes[0] if len(axes) == 1 else list(axes)


def _trace(operands: Iterable[Operand], quantizers: Quantizers) -> Traced:
    """Trace the functions of custom quantisers, all at once."""
    requests = list(dict.fromkeys(o.spec.request for o in operands if isinstance(o.spec, CustomSpec)))
    tracers = [q.trace for of_role in quantizers.values() for q in of_role if isinstance(q, CustomQuantizer)]
    return tracers[0](requests) if requests else Traced({}, {}, {})

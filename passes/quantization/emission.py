"""Fake-quantise calls as expressions: single, stacked or batched, and tagged so that inspection needs no log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from passes.quantization.batched import GENERAL, batch_function, layout
from passes.quantization.controls import Controls, gathered
from passes.quantization.custom import Traced
from passes.quantization.grouping import CustomSpec, DynamicBatch, Group, Operand, TensorBatch
from passes.quantization.quantizer_marks import TAG
from passes.quantization.quantizers import (
    QuantizerSpec,
    custom_function,
    fake_quantize_function,
    range_update_function,
    row_function,
)
from passes.quantization.ranges import Dynamic
from passes.quantization.schemes import FLOAT
from passes.quantization.tensors import tensor_function
from rewriter import ops, protos
from rewriter.edit import Edit, Run, RunAfter
from rewriter.expr import Apply, Expr, Function, Port, array, case, constant, handle, op
from rewriter.ir import MAIN, Model, unused
from rewriter.protos import Dtype


class QuantizerEmitter:
    """Emits fake-quantise calls, and holds their results.

    Attributes:
        functions: the quantising functions; vectors of one spec share a function.
        quantized: the quantised value of each operand.
    """

    def __init__(self, model: Model, controls: Controls, traced: Traced) -> None:
        self.model = model
        self.controls = controls
        self.traced = traced
        self.functions: dict[tuple[Any, ...], Function] = {}
        self.quantized: dict[Operand, Expr] = {}

    def place(self, group: Group | DynamicBatch | TensorBatch) -> Iterator[Edit]:
        """Emit the quantised value of each operand of a group; the edits are those that move its ranges."""
        if isinstance(group, DynamicBatch):
            self._place_batch(group.vectors)
            return
        if isinstance(group, TensorBatch):
            self._place_tensors(group.tensors)
            return
        first, spec = group[0], group[0].spec
        count = len(group) if len(group) > 1 else 0
        rows = [self.controls.row(v.role, v.layer) for v in group]
        value = _stacked(group, spec) if count else first.value
        arguments: list[Expr] = [
            self.controls.amount,
            gathered(self.controls.bits, np.reshape(rows, (-1, 1) if count else 1)),
        ]
        if isinstance(spec, CustomSpec):
            function = self._function(custom_function, self.traced.names[spec.request], spec.request.shape, spec.dtype)
            self.quantized[first] = function(*arguments, value, name=first.role, **{TAG: first.tag})
            return
        if not isinstance(spec.scheme.range, Dynamic):
            limits = self._limits(first) if not count else gathered(self.controls.given_limits, np.array(rows))
            if spec.observed:
                limits = self._call(
                    self._function(range_update_function, spec.range_key, count), value, limits, name="observed"
                )
                yield from self._store_limits(group, limits)
            arguments.append(limits)
        # The order of the arguments is that of `fake_quantize_function`.
        if spec.stochastic:
            arguments.append(self._noise(op("Shape", value), first))
        function = self._function(fake_quantize_function, spec.function_key, count)
        if not count:
            name = first.role if self.model.object_based else "quantized"
            self.quantized[first] = self._call(function, *arguments, value, name=name, **{TAG: first.tag})
            return
        quantized = function(*arguments, value, name="quantized")
        attrs = {
            "num": protos.attr(count),
            "T": protos.dtype_attr(spec.dtype),
            "_output_shapes": protos.shapes_attr([spec.shape or ()] * count),
        }
        unstacked = Apply(spec.dtype, "Unpack", (quantized,), attrs)
        self._tag([Port(spec.dtype, unstacked, port) for port in range(count)], group)

    def _place_batch(self, vectors: Sequence[Operand]) -> None:
        """Emit one call for vectors of one graph that all have dynamic ranges."""
        specs = tuple(v.spec for v in vectors if isinstance(v.spec, QuantizerSpec))
        bits, noise = [], []
        for row in layout(specs):
            row_vectors = [vectors[i] for i in row.places]
            rows = [self.controls.row(v.role, v.layer) for v in row_vectors]
            # int64: a function's int32 arguments are expected in host memory, and Case on a GPU copies none there.
            bits.append(op("Cast", gathered(self.controls.bits, np.reshape(rows, (-1, 1))), DstT=Dtype("int64")))
            if row.arithmetic.stochastic:
                noise.append(self._noise(array(np.array(row.shape, np.int32)), row_vectors[0]))
        arguments = (self.controls.amount, *bits, *noise, *(v.value for v in vectors))
        branches = [self._function(batch_function, specs, i) for i in range(GENERAL + 1)]
        call = case(self.controls.execution_mode, branches, arguments, "quantized", **{ops.GENERAL_BRANCH: GENERAL})
        self._tag([Port(v.value.dtype, call, i) for i, v in enumerate(vectors)], vectors)

    def _place_tensors(self, tensors: Sequence[Operand]) -> None:
        """Emit one call for tensors of one graph."""
        specs = tuple(t.spec for t in tensors if isinstance(t.spec, QuantizerSpec))
        rows = np.array([self.controls.row(t.role, t.layer) for t in tensors])
        # int64: a function's int32 arguments are expected in host memory, and Case on a GPU copies none there.
        bits = op("Cast", gathered(self.controls.bits, rows), DstT=Dtype("int64"))
        with_specs = list(zip(tensors, specs, strict=True))
        limits = [self._limits(tensor) for tensor, spec in with_specs if spec.limited]
        noise = [
            self._noise(array(np.array(spec.shape, np.int32)), tensor) for tensor, spec in with_specs if spec.stochastic
        ]
        arguments = (self.controls.amount, bits, *limits, *noise, *(t.value for t in tensors))
        if limits:  # where codes are clipped, XLA compiles no gradient of a Case
            call = self._function(tensor_function, specs, GENERAL)(*arguments, name="quantized")
        else:
            branches = [self._function(tensor_function, specs, i) for i in range(GENERAL + 1)]
            call = case(self.controls.execution_mode, branches, arguments, "quantized", **{ops.GENERAL_BRANCH: GENERAL})
        self._tag([call if not i else Port(t.value.dtype, call, i) for i, t in enumerate(tensors)], tensors)

    def _limits(self, operand: Operand) -> Expr:
        """Return the limits of one operand: float32 [2], or [ranges, 2]."""
        if operand.role in self.controls.kept:
            limits = self.controls.kept[operand.role].of(operand.layer)
            by_row = isinstance(operand.spec, QuantizerSpec) and operand.spec.limits_shape != (2,)
            if operand.indices is None or not by_row:
                return limits
            return op("GatherV2", limits, operand.indices, constant(0, "int32"))
        return gathered(self.controls.given_limits, np.array(self.controls.row(operand.role, operand.layer)))

    def _tag(self, quantized: Sequence[Expr], vectors: Sequence[Operand]) -> None:
        """Let each quantised value stand for its vector: a tagged call says which."""
        for value, vector in zip(quantized, vectors, strict=True):
            # The mark needs a node for each vector, and a batched op is one for all. A call is such a node at no cost:
            # Grappler inlines it when the model runs, but never in the SavedModel.
            if not isinstance(vector.spec, QuantizerSpec) or vector.spec.shape is None:
                raise AssertionError("what is one of several results has a known shape")
            function = self._function(row_function, vector.spec.shape, vector.spec.dtype)
            self.quantized[vector] = function(value, vector.value, name=vector.role, **{TAG: vector.tag})

    def _store_limits(self, group: Group, limits: Expr) -> Iterator[Edit]:
        """Store moved limits, after all else that a call does."""
        for role in dict.fromkeys(v.role for v in group):
            rows = [i for i, v in enumerate(group) if v.role == role]
            layers_of_role = array(np.array([group[i].layer for i in rows], np.int32))
            moved = limits if len(rows) == len(group) else gathered(limits, np.array(rows))
            if len(group) == 1:
                moved = op("Reshape", moved, array(np.array([1, 2], np.int32)))
            update = op("ResourceScatterUpdate", handle(self.controls.ranges(role)), layers_of_role, moved)
            if group[0].graph != MAIN:
                yield Run(group[0].graph, update, f"quantization/range/{role}", last=True)
            else:
                # In the main graph nothing runs but what a signature needs, such as the update of an average.
                yield RunAfter(MAIN, group[0].run, (update,), f"quantization/range/{role}")

    def _noise(self, shape: Expr, first: Operand) -> Expr:
        """Return random numbers that follow from the step and from the vectors that they are for."""
        # A layer's parameter and its statistic of the same role are rounded in one step, with numbers of their own.
        stream = 2 * self.controls.row(first.role, first.layer) + first.statistic
        counter = array(np.array([0, stream], np.uint64))  # the op counts the first up, once for four numbers
        return op(
            "StatelessRandomUniformV2", shape, self.controls.key, counter, constant(1, "int32"), dtype=Dtype(FLOAT)
        )

    def _call(self, function: Function, *inputs: Expr, name: str, **tags: str) -> Expr:
        """Return a call. In TensorFlow 1's format, where nothing differentiates through a call, it is inlined."""
        return (function if self.model.object_based else function.inlined)(*inputs, name=name, **tags)

    def _function(self, make: Callable[..., Function], *arguments: Any) -> Function:
        """Return the function that `make` gives for the arguments, made once and under a name of its own."""
        if (make, arguments) not in self.functions:
            function = make(*arguments)
            used_names = {*self.model.graphs, *(other.name for other in self.functions.values())}
            self.functions[make, arguments] = replace(function, name=unused(function.name, used_names))
        return self.functions[make, arguments]


def _stacked(group: Group, spec: QuantizerSpec | CustomSpec) -> Expr:
    """Return the vectors as the rows of a matrix."""
    attrs = {"N": protos.attr(len(group)), "T": protos.dtype_attr(spec.dtype)}
    if isinstance(spec, QuantizerSpec):
        attrs["_output_shapes"] = protos.shapes_attr([(len(group), *(spec.shape or ()))])
    return Apply(spec.dtype, "Pack", tuple(v.value for v in group), attrs, "stacked")

"""Quantised vectors as expressions: alone, in stacks or all together, tagged so that inspection needs no log."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from passes.quantization.batched import GENERAL, layout, way
from passes.quantization.controls import Controls, taken
from passes.quantization.custom import Traced
from passes.quantization.grouping import CustomSpec, DynamicBatch, Group, Vector
from passes.quantization.quantizer_marks import TAG
from passes.quantization.quantizers import QuantizerSpec, fake_quantize_function, piped, range_update_function, row
from passes.quantization.ranges import Dynamic
from passes.quantization.schemes import FLOAT
from rewriter import ops, protos
from rewriter.edit import Edit, Run, RunAfter
from rewriter.expr import Apply, Expr, Function, Port, array, case, constant, handle, op
from rewriter.ir import MAIN, Model, unused
from rewriter.protos import Dtype


class QuantizerEmitter:
    """Makes what stands for vectors.

    Attributes:
        functions: what quantises; vectors of one spec share a function.
        made: what stands for each vector, quantised.
    """

    def __init__(self, model: Model, controls: Controls, traced: Traced) -> None:
        self.model = model
        self.controls = controls
        self.traced = traced
        self.functions: dict[tuple[Any, ...], Function] = {}
        self.made: dict[Vector, Expr] = {}

    def place(self, group: Group | DynamicBatch) -> Iterator[Edit]:
        """Make what stands for each vector of a group; the edits are what has to run besides."""
        if isinstance(group, DynamicBatch):
            self._place_together(group.vectors)
            return
        first, spec = group[0], group[0].spec
        count = len(group) if len(group) > 1 else 0
        places = [self.controls.row(v.role, v.layer) for v in group]
        value = _stacked(group, spec) if count else first.value
        told: list[Expr] = [
            self.controls.amount,
            taken(self.controls.bits, np.reshape(places, (-1, 1) if count else 1)),
        ]
        if isinstance(spec, CustomSpec):
            function = self._function(piped, self.traced.names[spec.wanted], spec.wanted.size, spec.dtype)
            self.made[first] = function(*told, value, name=first.role, **{TAG: first.tag})
            return
        if self.controls.limits is not None and not isinstance(spec.scheme.range, Dynamic):
            limits = taken(self.controls.limits, np.array(places if count else places[0]))
            if spec.observed:
                limits = self._call(
                    self._function(range_update_function, spec.range_key, count), value, limits, name="observed"
                )
                yield from self._keep(group, limits)
            told.append(limits)
        if spec.stochastic:
            told.append(self._noise(op("Shape", value), first))
        function = self._function(fake_quantize_function, spec.function_key, count)
        if not count:
            name = first.role if self.model.object_based else "quantized"
            self.made[first] = self._call(function, *told, value, name=name, **{TAG: first.tag})
            return
        quantized = function(*told, value, name="quantized")
        attrs = {
            "num": protos.attr(count),
            "T": protos.dtype_attr(spec.dtype),
            "_output_shapes": protos.shapes_attr([(spec.size or 0,)] * count),
        }
        unstacked = Apply(spec.dtype, "Unpack", (quantized,), attrs)
        self._stand([Port(spec.dtype, unstacked, port) for port in range(count)], group)

    def _place_together(self, vectors: Sequence[Vector]) -> None:
        """Make what stands for vectors of one graph whose ranges follow their values."""
        specs = tuple(v.spec for v in vectors if isinstance(v.spec, QuantizerSpec))
        bits, noise = [], []
        for each in layout(specs):
            own = [vectors[i] for i in each.places]
            places = [self.controls.row(v.role, v.layer) for v in own]
            # int64, as a function's int32 arguments are taken to be in the host's memory, and a GPU's Case copies none.
            bits.append(op("Cast", taken(self.controls.bits, np.reshape(places, (-1, 1))), DstT=Dtype("int64")))
            if each.arithmetic.stochastic:
                noise.append(self._noise(array(np.array(each.shape, np.int32)), own[0]))
        told = (self.controls.amount, *bits, *noise, *(v.value for v in vectors))
        ways = [self._function(way, specs, i) for i in range(GENERAL + 1)]
        first = case(self.controls.how, ways, told, "quantized", **{ops.GENERAL_BRANCH: GENERAL})
        self._stand([Port(v.value.dtype, first, i) for i, v in enumerate(vectors)], vectors)

    def _stand(self, quantized: Sequence[Expr], vectors: Sequence[Vector]) -> None:
        """Let each stand for a vector."""
        for value, vector in zip(quantized, vectors, strict=True):
            if not isinstance(vector.spec, QuantizerSpec) or vector.spec.size is None:
                raise AssertionError("what is a row of others has a known size")
            stands = self._function(row, vector.spec.size, vector.spec.dtype)
            self.made[vector] = stands(value, vector.value, name=vector.role, **{TAG: vector.tag})

    def _keep(self, group: tuple[Vector, ...], limits: Expr) -> Iterator[Edit]:
        """Store moved limits, when all that a call does is done."""
        for role in dict.fromkeys(v.role for v in group):
            own = [i for i, v in enumerate(group) if v.role == role]
            layers_of_role = array(np.array([group[i].layer for i in own], np.int32))
            moved = limits if len(own) == len(group) else taken(limits, np.array(own))
            if len(group) == 1:
                moved = op("Reshape", moved, array(np.array([1, 2], np.int32)))
            update = op("ResourceScatterUpdate", handle(self.controls.ranges(role)), layers_of_role, moved)
            if group[0].graph != MAIN:
                yield Run(group[0].graph, update, f"quantization/range/{role}", last=True)
            else:
                # In the main graph nothing runs but what a signature needs, such as the update of an average.
                yield RunAfter(MAIN, group[0].run, (update,), f"quantization/range/{role}")

    def _noise(self, shape: Expr, first: Vector) -> Expr:
        """Random numbers that follow from the step and from what they are for."""
        place = 2 * self.controls.row(first.role, first.layer) + first.statistic
        counter = array(np.array([0, place], np.uint64))  # the first counts on with each four numbers
        return op(
            "StatelessRandomUniformV2", shape, self.controls.key, counter, constant(1, "int32"), dtype=Dtype(FLOAT)
        )

    def _call(self, function: Function, *inputs: Expr, name: str, **tags: str) -> Expr:
        """A call, or in TensorFlow 1's format, where nothing differentiates through one, what is called."""
        return (function if self.model.object_based else function.inlined)(*inputs, name=name, **tags)

    def _function(self, make: Callable[..., Function], *arguments: Any) -> Function:
        if (make, arguments) not in self.functions:
            function = make(*arguments)
            taken = {*self.model.graphs, *(known.name for known in self.functions.values())}
            self.functions[make, arguments] = replace(function, name=unused(function.name, taken))
        return self.functions[make, arguments]


def _stacked(group: Group, spec: QuantizerSpec | CustomSpec) -> Expr:
    """The vectors as rows."""
    attrs = {"N": protos.attr(len(group)), "T": protos.dtype_attr(spec.dtype)}
    if isinstance(spec, QuantizerSpec):
        attrs["_output_shapes"] = protos.shapes_attr([(len(group), spec.size or 0)])
    return Apply(spec.dtype, "Pack", tuple(v.value for v in group), attrs, "stacked")

"""Quantised vectors as expressions: alone, or as rows of a stack, tagged so that inspection needs no log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from passes.controls import Controls
from passes.pipelines import Traced
from passes.quantizers import Kind, observing, piped, quantizing, row
from passes.ranges import Dynamic
from passes.schemes import FLOAT
from passes.tags import TAG
from passes.uses import Piped, Vector
from rewriter import ops
from rewriter.edit import Edit, Run, RunAfter
from rewriter.expr import Apply, Expr, Function, Port, array, constant, handle, op
from rewriter.ir import MAIN, Model, unused
from rewriter.ops import Dtype


class Placing:
    """Makes what stands for vectors.

    Attributes:
        functions: what quantises; vectors of one kind share a function.
        made: what stands for each vector, quantised.
    """

    def __init__(self, model: Model, controls: Controls, traced: Traced) -> None:
        self.model = model
        self.controls = controls
        self.traced = traced
        self.functions: dict[tuple[Any, ...], Function] = {}
        self.made: dict[Vector, Expr] = {}

    def place(self, group: tuple[Vector, ...]) -> Iterator[Edit]:
        """Make what stands for each vector of a group; the edits are what has to run besides."""
        first, kind = group[0], group[0].kind
        count = len(group) if len(group) > 1 else 0
        rows = [self.controls.row(v.role, v.layer) for v in group]
        value = _stacked(group, kind) if count else first.value
        told: list[Expr] = [self.controls.amount, _taken(self.controls.bits, np.reshape(rows, (-1, 1) if count else 1))]
        if isinstance(kind, Piped):
            function = self._function(piped, self.traced.names[kind.wanted], kind.wanted.size, kind.dtype)
            self.made[first] = function(*told, value, name=first.role, **{TAG: first.tag})
            return
        if self.controls.limits is not None and not isinstance(kind.scheme.range, Dynamic):
            limits = _taken(self.controls.limits, np.array(rows if count else rows[0]))
            if kind.observed:
                limits = self._call(self._function(observing, kind.observing, count), value, limits, name="observed")
                yield from self._keep(group, limits)
            told.append(limits)
        if kind.stochastic:
            told.append(self._noise(value, rows[0], first.statistic))
        function = self._function(quantizing, kind.plain, count)
        if not count:
            name = first.role if self.model.object_based else "quantized"
            self.made[first] = self._call(function, *told, value, name=name, **{TAG: first.tag})
            return
        quantized = function(*told, value, name="quantized")
        dtype, size = kind.dtype, kind.size or 0
        attrs = {
            "num": ops.attr(count),
            "T": ops.dtype_attr(dtype),
            "_output_shapes": ops.shapes_attr([(size,)] * count),
        }
        rows_of = Apply(dtype, "Unpack", (quantized,), attrs)
        for port, vector in enumerate(group):
            stands = self._function(row, size, dtype)
            self.made[vector] = stands(Port(dtype, rows_of, port), vector.value, name=vector.role, **{TAG: vector.tag})

    def _keep(self, group: tuple[Vector, ...], limits: Expr) -> Iterator[Edit]:
        """Store moved limits, when all that a call does is done."""
        for role in dict.fromkeys(v.role for v in group):
            own = [i for i, v in enumerate(group) if v.role == role]
            layers_of_role = array(np.array([group[i].layer for i in own], np.int32))
            moved = limits if len(own) == len(group) else _taken(limits, np.array(own))
            if len(group) == 1:
                moved = op("Reshape", moved, array(np.array([1, 2], np.int32)))
            update = op("ResourceScatterUpdate", handle(self.controls.ranges(role)), layers_of_role, moved)
            if group[0].graph != MAIN:
                yield Run(group[0].graph, update, f"quantization/range/{role}", last=True)
            else:
                # In the main graph nothing runs but what a signature needs, such as the update of an average.
                yield RunAfter(MAIN, group[0].run, (update,), f"quantization/range/{role}")

    def _noise(self, value: Expr, row_: int, statistic: bool) -> Expr:
        """Random numbers that follow from the step and from what they are for."""
        counter = array(np.array([0, 2 * row_ + statistic], np.uint64))  # the first counts on with each four numbers
        shape = op("Shape", value)
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


def _stacked(group: tuple[Vector, ...], kind: Kind | Piped) -> Expr:
    """The vectors as rows."""
    attrs = {"N": ops.attr(len(group)), "T": ops.dtype_attr(kind.dtype)}
    if isinstance(kind, Kind):
        attrs["_output_shapes"] = ops.shapes_attr([(len(group), kind.size or 0)])
    return Apply(kind.dtype, "Pack", tuple(v.value for v in group), attrs, "stacked")


def _taken(values: Expr, index: np.ndarray) -> Expr:
    """Elements along the first axis, in the index's shape."""
    return op("GatherV2", values, array(index.astype(np.int32)), constant(0, "int32"))

"""Dynamic-range vectors of several layers, fake-quantised by one batched call.

The call is a Case with a branch for each execution mode:

- off: no quantiser acts, and the vectors pass unchanged;
- on: all quantisers act in full, so nothing is computed that only a ramp or a switched-off quantiser needs;
- partly: the general branch, which is right in every case.

The vectors are concatenated in blocks, so that one op does a step of the arithmetic for vectors of all sizes. Only
dynamic ranges are batched: they clip nothing, so the gradient goes to the inputs as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np

from passes.quantization.node_marks import marked
from passes.quantization.quantizers import OnGrid, QuantizerSpec, Values, cast, wide
from passes.quantization.ranges import Dynamic
from passes.quantization.schemes import FLOAT, Limits
from rewriter import ops, protos
from rewriter.expr import (
    Apply,
    Expr,
    Function,
    Port,
    array,
    concat,
    constant,
    filled,
    op,
    parameter,
    select,
    stop_gradient,
)
from rewriter.protos import attr, dtype_attr

BLOCK_SIZE = 32
"""Number of values in a block, which all belong to one vector. Of 16, 32, 64 and 128, the fastest for MobileNetV2."""

NAMES = ("off", "on", "partly")
"""Names of the execution modes."""

GENERAL = 2
"""The execution mode that is right in every case."""


def execution_mode(amount: Expr, bits: Expr) -> Expr:
    """Return the execution mode, int32 scalar: 0 if no quantiser acts, 1 if all act in full, else `GENERAL`.

    Args:
        amount: blend weight, float32 scalar.
        bits: int32 [rows], of all quantisers.
    """
    acting = op("Greater", amount, 0.0)
    partly = op("LogicalOr", amount < 1.0, op("LessEqual", op("Min", bits, array(np.array([0], np.int32))), 0))
    return op("Cast", acting, DstT=protos.Dtype("int32")) + op("Cast", acting & partly, DstT=protos.Dtype("int32"))


class BatchRow(NamedTuple):
    """Vectors of one spec, concatenated.

    Attributes:
        arithmetic: the spec, without a shape.
        places: the vectors' indices in the batch.
        sizes: the vectors' lengths.
    """

    arithmetic: QuantizerSpec
    places: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def lengths(self) -> np.ndarray:
        """The number of blocks of each vector, int64 [vectors]."""
        return -(-np.array(self.sizes) // BLOCK_SIZE)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the row in blocks, each of which belongs to one vector: (blocks, BLOCK_SIZE)."""
        return int(self.lengths.sum()), BLOCK_SIZE

    @property
    def blocks(self) -> Expr:
        """The index of the vector that each block belongs to, int64 [blocks]."""
        return array(np.repeat(np.arange(len(self.sizes), dtype=np.int64), self.lengths))

    def joined(self, vectors: Sequence[Expr]) -> Expr:
        """Return the vectors in blocks. A vector's last block is padded with NaN, which is not quantised."""
        pieces: list[Expr] = []
        for vector, size, length in zip(vectors, self.sizes, self.lengths, strict=True):
            padding = int(length) * BLOCK_SIZE - size
            pieces += [vector, *([filled(math.nan, vector.dtype, (padding,))] if padding else [])]
        return op("Reshape", concat(pieces), _shape(self.shape))

    def split(self, values: Expr) -> Iterator[Expr]:
        """Return the vectors that lie in blocks, [values]."""
        lengths = [int(length) * BLOCK_SIZE for length in self.lengths]
        attrs = {"num_split": attr(len(lengths)), "T": dtype_attr(values.dtype), "Tlen": dtype_attr("int32")}
        attrs["_output_shapes"] = protos.shapes_attr([(length,) for length in lengths])
        split_op = Apply(values.dtype, "SplitV", (values, _shape(tuple(lengths)), constant(0, "int32")), attrs)
        for index, (size, length) in enumerate(zip(self.sizes, lengths, strict=True)):
            padded = Port(values.dtype, split_op, index)
            # The padding is no output of its own: XLA cannot compile the gradient of an output that is not used.
            yield padded if size == length else op("Slice", padded, _shape((0,)), _shape((size,)))


def layout(specs: Sequence[QuantizerSpec]) -> list[BatchRow]:
    """Return the rows that vectors of these specs make: one for each spec but for its size.

    Raises:
        AssertionError: the size of a vector is not known, or its range is not dynamic.
    """
    places_by_spec: dict[QuantizerSpec, list[int]] = {}
    for place, spec in enumerate(specs):
        if spec.shape is None or len(spec.shape) != 1 or not isinstance(spec.scheme.range, Dynamic):
            raise AssertionError("what is quantised together are vectors of known size, whose ranges follow them")
        places_by_spec.setdefault(replace(spec, shape=None), []).append(place)
    return [BatchRow(spec, tuple(p), tuple(specs[i].sharing or 0 for i in p)) for spec, p in places_by_spec.items()]


def batch_function(specs: tuple[QuantizerSpec, ...], mode: int) -> Function:
    """Return the function of an execution mode: (amount, bits of each row, noise.., vectors..) -> vectors.

    Bits are int64 [vectors of the row, 1]. Noise is float32 of the row's shape, for each row with stochastic rounding.
    """
    rows = layout(specs)
    amount = parameter("amount", FLOAT)
    bits = [parameter(f"bits_{i}", "int64") for i, _ in enumerate(rows)]
    noise = {row: parameter(f"noise_{i}", FLOAT) for i, row in enumerate(rows) if row.arithmetic.stochastic}
    vectors = [parameter(f"vector_{i}", spec.dtype) for i, spec in enumerate(specs)]
    results: list[Expr] = list(vectors)
    for row, widths in zip(rows, bits, strict=True) if mode else ():
        raw = row.joined([vectors[i] for i in row.places])
        quantizer = _RowQuantizer(row, raw, widths)
        quantized = quantizer.partly(noise.get(row), amount) if mode == GENERAL else quantizer.fully(noise.get(row))
        for i, result in zip(row.places, row.split(straight_through(raw, quantized)), strict=True):
            results[i] = result
    shapes = [
        (),
        *((len(row.places), 1) for row in rows),
        *(row.shape for row in noise),
        *(spec.shape for spec in specs),
    ]
    parameters = (amount, *bits, *noise.values(), *vectors)
    return Function(f"bnqat_{len(specs)}_vectors_{NAMES[mode]}", parameters, tuple(shapes), tuple(results))


class _RowQuantizer:
    """The fake-quantise arithmetic of a row.

    A quantity that each vector has one of is computed for all vectors at once, as [vectors, 1].

    Attributes:
        values: the row's values, in blocks.
        grid: the levels of each vector, [vectors, 1].
    """

    def __init__(self, row: BatchRow, raw: Expr, bits: Expr) -> None:
        self.row = row
        self.bits = bits
        self.blocks = row.blocks  # once: each expression of it would be a constant of its own
        spec = row.arithmetic
        self.values = Values(spec, raw, row.shape)
        extremes = self.values.extremes()
        limits = Limits(self._of_vectors("Min", extremes.low), self._of_vectors("Max", extremes.high))
        self.grid = spec.scheme.grid(spec.scheme.range_of(limits), bits)

    def partly(self, noise: Expr | None, amount: Expr) -> Expr:
        """Return the values, blended with the quantised ones by `amount` where the width in force is not 0."""
        acting = wide(self._of_blocks(self.bits)) & self._defined
        return select(acting, self._on_grid(noise).blend(amount), self.values.value)

    def fully(self, noise: Expr | None) -> Expr:
        """Return the quantised values.

        A dynamic range clips nothing when values are rounded to nearest, but for affine codes: a value and the
        zero point are rounded separately, which can lead to one code too many.
        """
        scheme, value = self.row.arithmetic.scheme, self.values.value
        if noise is not None:
            quantized = self._on_grid(noise).value
        else:
            ceiling, grid = scheme.ceiling(self.grid), self.grid.mapped(self._of_blocks)
            steps = op("Round", grid.position(self.values.coordinate))
            if ceiling is not None:
                steps = op("Minimum", steps, self._of_blocks(ceiling))
            quantized = scheme.value(grid.level(steps))
        return op("Select", self._defined, cast(quantized, value.dtype), value)

    @property
    def _defined(self) -> Expr:
        if self.values.defined is None:
            raise AssertionError("the padding of blocks is not quantised")
        return self.values.defined

    def _on_grid(self, noise: Expr | None) -> OnGrid:
        return OnGrid(self.values, self.grid.mapped(self._of_blocks), noise)

    def _of_vectors(self, reduction: str, blocks: Expr) -> Expr:
        """Return the least or the greatest of each vector, [vectors, 1], from those of its blocks, [blocks, 1]."""
        count = constant(len(self.row.sizes), "int32")
        return op(f"UnsortedSegment{reduction}", blocks, self.blocks, count)

    def _of_blocks(self, vectors: Expr) -> Expr:
        """Repeat each vector's number for its blocks, and copy its mark: [vectors, 1] -> [blocks, BLOCK_SIZE]."""
        repeated = op("BroadcastTo", vectors, _shape((len(self.row.sizes), BLOCK_SIZE)))
        values = op("GatherV2", repeated, self.blocks, constant(0, "int32"))
        mark = vectors.attrs.get(ops.LABEL) if isinstance(vectors, Apply) else None
        return values if mark is None else marked(mark.s.decode(), values)


def straight_through(raw: Expr, quantized: Expr) -> Expr:
    """Return quantised values of any shape as [values], bit for bit, with the gradient of the raw ones.

    If two inputs have the same index, DynamicStitch keeps the last one, but its gradient goes to both.
    """
    place = array(np.zeros(1, np.int32))
    attrs = {"N": attr(2), "T": dtype_attr(raw.dtype)}
    one = _shape((1, -1))
    inputs = (place, place, op("Reshape", raw, one), stop_gradient(op("Reshape", quantized, one)))
    return op("Reshape", Apply(raw.dtype, "DynamicStitch", inputs, attrs), _shape((-1,)))


@cache
def _shape(shape: tuple[int, ...]) -> Expr:
    return array(np.array(shape, np.int32))

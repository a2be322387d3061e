"""Vectors that are quantised together, in whichever of three ways the moment asks for.

Where quantisers do not act, the vectors pass; where they act in full, on every vector, nothing is computed that only a
ramp or a switched-off vector needs; a third way is there for these. Vectors of all sizes are one behind the other, so
that a step of the arithmetic is one op for all of them. Only ranges that follow the values are quantised so: they clip
nothing, so that the gradient goes to what went in.
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
"""How many values a block has, which belong to one vector: of 16, 32, 64 and 128, the fastest for MobileNetV2."""

NAMES = ("off", "on", "partly")
GENERAL = 2
"""The way that is right in every case."""


def how(amount: Expr, bits: Expr) -> Expr:
    """Which way is to be taken, int32 scalar: 0 for no quantisers, 1 for all in full, else `GENERAL`.

    Args:
        amount: float32 scalar.
        bits: int32 [rows], of all quantisers.
    """
    acting = op("Greater", amount, 0.0)
    partly = op("LogicalOr", amount < 1.0, op("LessEqual", op("Min", bits, array(np.array([0], np.int32))), 0))
    return op("Cast", acting, DstT=protos.Dtype("int32")) + op("Cast", acting & partly, DstT=protos.Dtype("int32"))


class BatchRow(NamedTuple):
    """Vectors of one arithmetic, one behind the other.

    Attributes:
        arithmetic: what is done to them; its size says nothing.
        places: which of the vectors they are.
        sizes: how long each of them is.
    """

    arithmetic: QuantizerSpec
    places: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def lengths(self) -> np.ndarray:
        """How many blocks each vector takes."""
        return -(-np.array(self.sizes) // BLOCK_SIZE)

    @property
    def shape(self) -> tuple[int, int]:
        """As blocks, each of which belongs to one vector."""
        return int(self.lengths.sum()), BLOCK_SIZE

    @property
    def blocks(self) -> Expr:
        """The vector that each block belongs to, int64 [blocks]."""
        return array(np.repeat(np.arange(len(self.sizes), dtype=np.int64), self.lengths))

    def joined(self, vectors: Sequence[Expr]) -> Expr:
        """Its vectors in blocks; what is left of a vector's last one is filled with what is not quantised."""
        pieces: list[Expr] = []
        for vector, size, length in zip(vectors, self.sizes, self.lengths, strict=True):
            rest = int(length) * BLOCK_SIZE - size
            pieces += [vector, *([filled(math.nan, vector.dtype, (rest,))] if rest else [])]
        flat = concat(pieces) if pieces[1:] else pieces[0]
        return op("Reshape", flat, _shape(self.shape))

    def split(self, values: Expr) -> Iterator[Expr]:
        """The vectors of what is in blocks, [values]."""
        lengths = [int(length) * BLOCK_SIZE for length in self.lengths]
        attrs = {"num_split": attr(len(lengths)), "T": dtype_attr(values.dtype), "Tlen": dtype_attr("int32")}
        attrs["_output_shapes"] = protos.shapes_attr([(length,) for length in lengths])
        first = Apply(values.dtype, "SplitV", (values, _shape(tuple(lengths)), constant(0, "int32")), attrs)
        for index, (size, length) in enumerate(zip(self.sizes, lengths, strict=True)):
            whole = Port(values.dtype, first, index)
            # The rest is no output of its own: one that is not used has a gradient that XLA cannot compile.
            yield whole if size == length else op("Slice", whole, _shape((0,)), _shape((size,)))


def layout(specs: Sequence[QuantizerSpec]) -> list[BatchRow]:
    """What is done together to vectors of these specs.

    Raises:
        AssertionError: the size of one is not known, or its range does not follow its values.
    """
    found: dict[QuantizerSpec, list[int]] = {}
    for place, spec in enumerate(specs):
        if spec.size is None or not isinstance(spec.scheme.range, Dynamic):
            raise AssertionError("vectors that are quantised together have known sizes and ranges that follow them")
        found.setdefault(replace(spec, size=None), []).append(place)
    return [BatchRow(spec, tuple(own), tuple(specs[i].size or 0 for i in own)) for spec, own in found.items()]


def way(specs: tuple[QuantizerSpec, ...], index: int) -> Function:
    """The function for what `how` says: (amount, bits of each row, noise.., vectors..) -> vectors.

    Bits are int64 [vectors of the row, 1]; noise is float32 of the row's shape, for each whose rounding is stochastic.
    """
    found = layout(specs)
    amount = parameter("amount", FLOAT)
    bits = [parameter(f"bits_{i}", "int64") for i, _ in enumerate(found)]
    noise = {row: parameter(f"noise_{i}", FLOAT) for i, row in enumerate(found) if row.arithmetic.stochastic}
    vectors = [parameter(f"vector_{i}", spec.dtype) for i, spec in enumerate(specs)]
    results: list[Expr] = list(vectors)
    for row, widths in zip(found, bits, strict=True) if index else ():
        raw = row.joined([vectors[i] for i in row.places])
        placed = _Placed(row, raw, widths)
        made = placed.exactly(noise.get(row), amount) if index == GENERAL else placed.fully(noise.get(row))
        for i, result in zip(row.places, row.split(_straight_through(raw, made)), strict=True):
            results[i] = result
    shapes = [(), *((len(row.places), 1) for row in found), *(row.shape for row in noise), *(k.shape(0) for k in specs)]
    told = (amount, *bits, *noise.values(), *vectors)
    return Function(f"bnqat_{len(specs)}_vectors_{NAMES[index]}", told, tuple(shapes), tuple(results))


class _Placed:
    """Where the values of a row may lie; what there is one of for each vector is computed for all of them at once.

    Attributes:
        values: in blocks.
        grid: one for each vector, [vectors, 1].
    """

    def __init__(self, row: BatchRow, raw: Expr, bits: Expr) -> None:
        self.row = row
        self.bits = bits
        self.blocks = row.blocks  # once: each expression of it would be a constant of its own
        spec = row.arithmetic
        self.values = Values(spec, raw, row.shape)
        seen = self.values.seen()
        limits = Limits(self._of_vectors("Min", seen.low), self._of_vectors("Max", seen.high))
        self.grid = spec.scheme.grid(spec.scheme.range_of(limits, spec.epsilon), bits)

    def exactly(self, noise: Expr | None, amount: Expr) -> Expr:
        """The values on their levels, as much as there is to be of that, and where a width is in force."""
        acting = wide(self._of_blocks(self.bits)) & self.values.defined
        return select(acting, self._on_grid(noise).blend(amount), self.values.value)

    def fully(self, noise: Expr | None) -> Expr:
        """The values on their levels. To the nearest, nothing is clipped but what two roundings put too far."""
        scheme, value = self.row.arithmetic.scheme, self.values.value
        if noise is not None:
            made = self._on_grid(noise).value
        else:
            ceiling, grid = scheme.ceiling(self.grid), self.grid.each(self._of_blocks)
            steps = op("Round", grid.position(self.values.coordinate))
            if ceiling is not None:
                steps = op("Minimum", steps, self._of_blocks(ceiling))
            made = scheme.value(grid.level(steps), self.row.arithmetic.epsilon)
        return op("Select", self.values.defined, cast(made, value.dtype), value)

    def _on_grid(self, noise: Expr | None) -> OnGrid:
        return OnGrid(self.values, self.grid.each(self._of_blocks), noise)

    def _of_vectors(self, reduction: str, blocks: Expr) -> Expr:
        """The least or greatest of each vector, [vectors, 1], of those of its blocks, [blocks, 1]."""
        count = constant(len(self.row.sizes), "int32")
        return op(f"UnsortedSegment{reduction}", blocks, self.blocks, count)

    def _of_blocks(self, vectors: Expr) -> Expr:
        """For each value, what is its vector's, marked as what that is: [vectors, 1] -> [blocks, width]."""
        repeated = op("BroadcastTo", vectors, _shape((len(self.row.sizes), BLOCK_SIZE)))
        values = op("GatherV2", repeated, self.blocks, constant(0, "int32"))
        mark = vectors.attrs.get(ops.PART) if isinstance(vectors, Apply) else None
        return values if mark is None else marked(mark.s.decode(), values)


def _straight_through(raw: Expr, quantized: Expr) -> Expr:
    """The quantised values [values], bit for bit, with the gradient of the raw ones.

    Of what has the same place, the op keeps the last, and it gives the gradient to all.
    """
    place = array(np.zeros(1, np.int32))
    attrs = {"N": attr(2), "T": dtype_attr(raw.dtype)}
    one = _shape((1, -1))
    inputs = (place, place, op("Reshape", raw, one), stop_gradient(op("Reshape", quantized, one)))
    return op("Reshape", Apply(raw.dtype, "DynamicStitch", inputs, attrs), _shape((-1,)))


@cache
def _shape(shape: tuple[int, ...]) -> Expr:
    return array(np.array(shape, np.int32))

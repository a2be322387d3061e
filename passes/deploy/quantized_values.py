"""Quantised values of a model's variables. Only the quantisers are computed, and nothing else of the model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from tensorflow.core.framework import types_pb2
from tensorflow.python.framework import tensor_util

from passes.control_flow.running_graphs import running_from
from passes.quantization.node_marks import AMOUNT, CODE, EPSILON, ORIGIN, SCALE, WIDTH, ZERO_POINT
from passes.quantization.quantizer_marks import TAG, tag_of
from passes.weights.kernels import GATHERS
from rewriter import op_defs, ops, protos
from rewriter.constants import LARGEST
from rewriter.evaluation import evaluated
from rewriter.ir import Error, Model, Value
from rewriter.liveness import Assumption
from rewriter.terms import PORT, Bound, Term, Terms, cone

WHOLE = (types_pb2.DT_INT32, types_pb2.DT_INT64)
PARTS = (CODE, SCALE, ZERO_POINT, ORIGIN, EPSILON)

_Parts = tuple[Term, Mapping[str, Term]]
"""The width in force, and the parts by name."""

_Place = int | slice | None
"""The place of one value among several: a row, a slice of a row of all, or None where the value is alone."""


class Quantized(NamedTuple):
    """A value that one quantiser has quantised.

    Attributes:
        graph, node: the names of the quantiser's graph and node.
        way: the way of calls to the quantiser's function, one of several.
        tag: the metadata that the rewrite wrote on the quantiser.
        variable: the key of the variable that it quantises; "" where the value is no variable's.
        value: the quantised value, of the variable's dtype and shape [C], as it is once `start_step` and the ramp
            are over.
        raw: the value before it is quantised, likewise.
        bits: the width in force; 0 where the value passes as it is.
        parts: codes [C], scale, zero point, origin and epsilon of the arithmetic, as far as the scheme has them.
    """

    graph: str
    node: str
    way: Bound
    tag: Mapping[str, Any]
    variable: str
    value: np.ndarray
    raw: np.ndarray
    bits: int
    parts: Mapping[str, np.ndarray]


def tagged(model: Model) -> tuple[tuple[str, str], ...]:
    """Return (graph, node) of all quantisers."""
    return tuple((g.name, n.name) for g in model.graphs.values() for n in g.nodes.values() if TAG in n.attrs)


def quantized_values(model: Model) -> tuple[Quantized, ...]:
    """Return the quantised values of variables, in every function that can run.

    Raises:
        Error: a quantiser depends on a value that is only known while the model runs, or computes with ops that are
            not known to be harmless.
    """
    return _values(model, trust=False)


def trusted_values(model: Model) -> tuple[Quantized, ...]:
    """Return the quantised values of variables, whatever ops the quantisers compute with.

    Raises:
        Error: a quantiser depends on a value that is only known while the model runs.
    """
    return _values(model, trust=True)


def some_values(model: Model, wanted: Callable[[str, Mapping[str, Any]], bool]) -> tuple[Quantized, ...]:
    """Return the quantised values of some quantisers.

    Args:
        model: the model.
        wanted: returns true for the graph and the metadata of such a quantiser.

    Raises:
        Error: as `quantized_values`.
    """
    return _values(model, trust=False, wanted=wanted)


def _values(
    model: Model, *, trust: bool, wanted: Callable[[str, Mapping[str, Any]], bool] = lambda *_: True
) -> tuple[Quantized, ...]:
    quantizers = list(_quantizer_terms(model, Terms(model), wanted))
    values: dict[Term, np.ndarray] = {}
    for parcel in _parcels(quantizers):
        terms: dict[Term, None] = {}
        for quantizer in parcel:
            terms |= dict.fromkeys((quantizer.value, quantizer.raw, quantizer.width, *quantizer.parts.values()))
        # Whatever the step is, the quantisers are to act: the model may have been saved before they did.
        given = {t: np.array(1, np.float32) for t in cone(terms) if _part(t) == AMOUNT}
        # Rows of a table are quantised one by one, so the whole table is in place of those that are looked up.
        tables = {q.raw: q.table for q in parcel if q.table is not None}
        for rows, table in zip(
            tables, evaluated(model, list(tables.values()), {}, trust=trust) if tables else (), strict=True
        ):
            given |= {rows: table, rows.inputs[1]: np.arange(len(table), dtype=_index_dtype(rows))}
        values.update(zip(terms, evaluated(model, list(terms), given, trust=trust), strict=True))
    return tuple(quantizer.quantized(values) for quantizer in quantizers)


def table_of(rows: Term) -> Term | None:
    """Return the table of which a value is rows that are looked up; None for another value."""
    if rows.op not in GATHERS:
        return None
    table = rows.inputs[GATHERS[rows.op]]
    if rows.op != "ResourceGather":
        return table
    return Term("ReadVariableOp", (table,), attrs={"dtype": op_defs.attribute(rows, "dtype")})


def _index_dtype(rows: Term) -> str:
    """Return the dtype of the indices of looked-up rows."""
    return protos.dtype_name(op_defs.attribute(rows, "Tindices").type)


PARCEL = 100
"""Number of quantisers computed in one session: the time to run a graph grows faster than the graph."""


def _parcels(quantizers: Iterable[_QuantizerTerms]) -> Iterator[list[_QuantizerTerms]]:
    """Yield quantisers in parcels to compute; quantisers of one batched computation stay together."""
    batches: dict[Term, list[_QuantizerTerms]] = {}
    for quantizer in quantizers:
        batches.setdefault(quantizer.whole, []).append(quantizer)
    parcel: list[_QuantizerTerms] = []
    for batch in batches.values():
        parcel += batch
        if len(parcel) >= PARCEL:
            yield parcel
            parcel = []
    if parcel:
        yield parcel


class _QuantizerTerms(NamedTuple):
    """A quantiser's terms, the term of its whole batch, and its place in the width and in the parts."""

    graph: str
    node: str
    way: Bound
    tag: Mapping[str, Any]
    value: Term
    raw: Term
    whole: Term
    width: Term
    place: _Place
    parts: Mapping[str, Term]

    @property
    def table(self) -> Term | None:
        """The table of which the value is rows that are looked up; None for another value."""
        return table_of(self.raw)

    def quantized(self, values: Mapping[Term, np.ndarray]) -> Quantized:
        """Return the quantised value from the values of the terms.

        Raises:
            Error: their shapes are not those of a quantiser.
        """
        shape = values[self.value].shape
        try:
            parts = {name: self._own_part(values[term], whole=name == CODE) for name, term in self.parts.items()}
            bits = int(np.ravel(self._own_part(values[self.width], whole=False))[0])
        except IndexError:
            raise unknown(f"{self.node} in {self.graph}") from None
        # A mark is data from a file, and may stand on a node that bnqat did not write.
        if CODE in parts and (parts[CODE].shape != shape or any(_wider(parts[n], shape) for n in parts)):
            raise unknown(f"{self.node} in {self.graph}")
        return Quantized(
            self.graph,
            self.node,
            self.way,
            self.tag,
            self.raw.variable if self.table is None else self.table.variable,
            # Two forms of a quantiser may differ in the sign of zeros; one variable holds the values of both.
            values[self.value] + values[self.value].dtype.type(0),
            values[self.raw],
            bits,
            parts,
        )

    def _own_part(self, array: np.ndarray, *, whole: bool) -> np.ndarray:
        """Return this quantiser's part of an array: a number for each value, or else the number that all share.

        Raises:
            IndexError: the array has no such part.
        """
        if self.place is None or not array.ndim:
            return array
        if isinstance(self.place, int):
            row: np.ndarray = array[self.place]
            return row
        numbers = array.ravel()[self.place]
        return numbers if whole else numbers[[0]]


def _quantizer_terms(
    model: Model, terms: Terms, wanted: Callable[[str, Mapping[str, Any]], bool]
) -> Iterator[_QuantizerTerms]:
    reached: dict[str, list[Assumption]] = {}
    for entry in model.entries:
        for name, assumptions in running_from(model, entry).items():
            reached.setdefault(name, []).extend(assumptions)
    known_parts: dict[Term, _Parts] = {}
    for name, node in tagged(model):
        tag = tag_of(model.graphs[name].nodes[node])
        if wanted(name, tag) and any(assumed.runs(node) for assumed in reached.get(name, ())):
            raw = model.graphs[name].nodes[node].inputs[-1]
            for way in terms.ways(name, [Value(node)]):
                value = terms.on(name, Value(node), way)
                whole, place = _whole(value, f"{node} in {name}")
                if whole not in known_parts:
                    known_parts[whole] = _parts(whole, f"{node} in {name}")
                width, parts = known_parts[whole]
                yield _QuantizerTerms(name, node, way, tag, value, terms.on(name, raw, way), whole, width, place, parts)


def _whole(value: Term, where: str) -> tuple[Term, _Place]:
    """Return the term that quantises several values together, and the place of one value in it.

    Raises:
        Error: the value is not taken from the term as bnqat does.
    """
    # ``Unpack`` takes a row of a stack, and ``SplitV`` a vector of a batch, of which ``Slice`` leaves out the padding.
    sliced = value.op == "Slice"
    of = value.inputs[0] if sliced else value
    port, of = (of.port, of.inputs[0]) if of.op == PORT else (0, of)
    if of.op == "Unpack" and not sliced:
        return of.inputs[0], port
    if of.op != "SplitV":
        return value, None
    ends = np.cumsum(_numbers(of, 1, where))
    if not port < len(ends):
        raise unknown(where)
    first = int(ends[port - 1]) if port else 0
    if not sliced:
        return of.inputs[0], slice(first, int(ends[port]))
    begin, size = _numbers(value, 1, where), _numbers(value, 2, where)
    if begin.shape != (1,) or size.shape != (1,) or begin[0] or not 0 <= size[0] <= ends[port] - first:
        raise unknown(where)
    return of.inputs[0], slice(first, first + int(size[0]))


def _numbers(term: Term, position: int, where: str) -> np.ndarray:
    """Return the whole numbers of a term's input, which has to be a constant.

    Raises:
        Error: the input is no constant of whole numbers.
    """
    operand = term.inputs[position] if position < len(term.inputs) else term
    tensor = op_defs.attribute(operand, "value").tensor if operand.op == "Const" else None
    if tensor is None or tensor.dtype not in WHOLE or math.prod(d.size for d in tensor.tensor_shape.dim) > LARGEST:
        raise unknown(where)
    try:
        numbers: np.ndarray = tensor_util.MakeNdarray(tensor)
    except (TypeError, ValueError):
        raise unknown(where) from None
    return numbers.ravel()


def _parts(whole: Term, where: str) -> _Parts:
    """Return the width and the parts of the arithmetic that quantises a value, or several in rows."""
    parts: dict[str, Term] = {}
    width = None
    for term in cone([whole]):
        name = _part(term)
        if name == WIDTH and width is None:
            width = term.inputs[0]
        if name in PARTS:
            parts.setdefault(name, term)
    # The scheme log has both of these, and any other has neither.
    whole_log = (ORIGIN in parts) == (EPSILON in parts)
    if width is None or (CODE in parts) != (SCALE in parts) or not whole_log:
        raise unknown(where)
    return width, parts


def unknown(where: str) -> Error:
    """Return the error for a node that is marked as a quantiser, but does not compute as one."""
    return Error(f"{where} is marked as a quantiser, and is none of this version's; rewrite the float model again")


def _wider(array: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Return true if an array cannot be broadcast to a shape."""
    try:
        return np.broadcast_shapes(array.shape, shape) != shape
    except ValueError:
        return True


def _part(term: Term) -> str:
    mark = term.attrs.get(ops.LABEL)
    return "" if mark is None else protos.text(mark.s)

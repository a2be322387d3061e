"""What the quantisers of a model make of the values that its variables hold: only they are computed, nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from tensorflow.core.framework import types_pb2
from tensorflow.python.framework import tensor_util

from passes.batch_norm.entries import running_from
from passes.quantization.node_marks import AMOUNT, CODE, EPSILON, ORIGIN, SCALE, WIDTH, ZERO_POINT
from passes.quantization.quantizer_marks import TAG, tag_of
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
"""Where something is in several: in this row, at these places in a row of all, or it is alone."""


class Quantized(NamedTuple):
    """What one quantiser makes of one value.

    Attributes:
        graph, node: where the quantiser is.
        way: which of several ways to call its function this is.
        tag: what the rewrite said of it.
        variable: the key of the variable that it quantises; "" where it is none's value.
        value: the quantised value, of the variable's dtype and shape [C]; as `start_step` and ramp would have it when
            they are over.
        raw: the value before, likewise.
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
    """(graph, node) of all quantisers."""
    return tuple((g.name, n.name) for g in model.graphs.values() for n in g.nodes.values() if TAG in n.attrs)


def quantized_values(model: Model) -> tuple[Quantized, ...]:
    """What the quantisers make of variables, in every function that can run.

    Raises:
        Error: a quantiser depends on what is only known while the model runs, or computes with ops that are not known
            to be harmless.
    """
    return _values(model, trust=False)


def trusted_values(model: Model) -> tuple[Quantized, ...]:
    """The same, whatever ops the quantisers compute with."""
    return _values(model, trust=True)


def _values(model: Model, *, trust: bool) -> tuple[Quantized, ...]:
    found = list(_found(model, Terms(model)))
    values: dict[Term, np.ndarray] = {}
    for several in _parcels(found):
        wanted: dict[Term, None] = {}
        for each in several:
            wanted |= dict.fromkeys((each.value, each.raw, each.width, *each.parts.values()))
        # Whatever the step is, the quantisers are to act: the model may have been saved before they did.
        amounts = {t: np.array(1, np.float32) for t in cone(wanted) if _part(t) == AMOUNT}
        values.update(zip(wanted, evaluated(model, list(wanted), amounts, trust=trust), strict=True))
    return tuple(each.known(values) for each in found)


PARCEL = 100
"""How many quantisers are computed in a session: the time it takes to run a graph grows faster than the graph."""


def _parcels(found: Iterable[_Terms]) -> Iterator[list[_Terms]]:
    """Quantisers in parcels to compute; those of one computation stay together."""
    together: dict[Term, list[_Terms]] = {}
    for each in found:
        together.setdefault(each.whole, []).append(each)
    parcel: list[_Terms] = []
    for several in together.values():
        parcel += several
        if len(parcel) >= PARCEL:
            yield parcel
            parcel = []
    if parcel:
        yield parcel


class _Terms(NamedTuple):
    """A quantiser's terms, what computes them all, and where in the width and the parts what counts is."""

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

    def known(self, values: Mapping[Term, np.ndarray]) -> Quantized:
        """What was computed.

        Raises:
            Error: its shapes are not a quantiser's.
        """
        shape = values[self.value].shape
        try:
            parts = {name: self._own(values[term], whole=name == CODE) for name, term in self.parts.items()}
            bits = int(np.ravel(self._own(values[self.width], whole=False))[0])
        except IndexError:
            raise unknown(f"{self.node} in {self.graph}") from None
        if CODE in parts and (parts[CODE].shape != shape or any(_wider(parts[n], shape) for n in parts)):
            raise unknown(f"{self.node} in {self.graph}")
        return Quantized(
            self.graph,
            self.node,
            self.way,
            self.tag,
            self.raw.variable,
            values[self.value],
            values[self.raw],
            bits,
            parts,
        )

    def _own(self, array: np.ndarray, *, whole: bool) -> np.ndarray:
        """What of an array is this quantiser's: a number for each value, or else the number that all have.

        Raises:
            IndexError: it is not there.
        """
        if self.place is None or not array.ndim:
            return array
        if isinstance(self.place, int):
            own: np.ndarray = array[self.place]
            return own
        found = array.ravel()[self.place]
        return found if whole else found[[0]]


def _found(model: Model, terms: Terms) -> Iterator[_Terms]:
    reached: dict[str, list[Assumption]] = {}
    for entry in model.entries:
        for name, known in running_from(model, entry).items():
            reached.setdefault(name, []).extend(known)
    known_parts: dict[Term, _Parts] = {}
    for name, node in tagged(model):
        if any(assumed.runs(node) for assumed in reached.get(name, ())):
            tag = tag_of(model.graphs[name].nodes[node])
            raw = model.graphs[name].nodes[node].inputs[-1]
            for way in terms.ways(name, [Value(node)]):
                value = terms.on(name, Value(node), way)
                whole, place = _whole(value, f"{node} in {name}")
                if whole not in known_parts:
                    known_parts[whole] = _parts(whole, f"{node} in {name}")
                width, parts = known_parts[whole]
                yield _Terms(name, node, way, tag, value, terms.on(name, raw, way), whole, width, place, parts)


def _whole(value: Term, where: str) -> tuple[Term, _Place]:
    """What several values are quantised in together, and where in it this one is.

    Raises:
        Error: it is not taken from there as bnqat does.
    """
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
    """The whole numbers that an input of a term is, a constant.

    Raises:
        Error: it is none.
    """
    given = term.inputs[position] if position < len(term.inputs) else term
    tensor = op_defs.attribute(given, "value").tensor if given.op == "Const" else None
    if tensor is None or tensor.dtype not in WHOLE or math.prod(d.size for d in tensor.tensor_shape.dim) > LARGEST:
        raise unknown(where)
    try:
        found: np.ndarray = tensor_util.MakeNdarray(tensor)
    except (TypeError, ValueError):
        raise unknown(where) from None
    return found.ravel()


def _parts(whole: Term, where: str) -> _Parts:
    """The width and the parts of the arithmetic that quantises a value, or several in rows."""
    parts: dict[str, Term] = {}
    width = None
    for term in cone([whole]):
        name = _part(term)
        if name == WIDTH and width is None:
            width = term.inputs[0]
        if name in PARTS:
            parts.setdefault(name, term)
    whole_log = (ORIGIN in parts) == (EPSILON in parts)
    if width is None or (CODE in parts) != (SCALE in parts) or not whole_log:
        raise unknown(where)
    return width, parts


def unknown(where: str) -> Error:
    """What is marked as a quantiser, but does not compute as one."""
    return Error(f"{where} is marked as a quantiser, and is none of this version's; rewrite the float model again")


def _wider(array: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether an array does not fit to one of a shape, number by number."""
    try:
        return np.broadcast_shapes(array.shape, shape) != shape
    except ValueError:
        return True


def _part(term: Term) -> str:
    found = term.attrs.get(ops.PART)
    return "" if found is None else protos.text(found.s)

"""Computing terms: a graph of nothing but what they need, with variables' values as they are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rewriter import op_defs, protos
from rewriter.constants import LARGEST
from rewriter.ir import MAIN, Attrs, Error, Graph, Model, Node, Value
from rewriter.protos import dtype_attr, shape_attr
from rewriter.savedmodel.graphs import write_main
from rewriter.savedmodel.write import library
from rewriter.terms import PORT, UNKNOWN, VARIABLE, Term

# fmt: off
HARMLESS = frozenset(
    {
        "Abs", "AddN", "AddV2", "All", "Any", "ArgMax", "ArgMin", "Bitcast", "BitwiseAnd", "BitwiseOr", "BitwiseXor",
        "BroadcastTo", "Cast", "Ceil", "ClipByValue", "ConcatV2", "Const", "DynamicStitch", "Equal", "Exp",
        "ExpandDims", "Expm1",
        "FakeQuantWithMinMaxArgs", "FakeQuantWithMinMaxVars", "FakeQuantWithMinMaxVarsPerChannel", "Fill", "Floor",
        "FloorDiv", "FloorMod", "GatherV2", "Greater", "GreaterEqual", "IdentityN", "Inv", "Invert", "IsFinite",
        "IsInf", "IsNan", "LeftShift", "Less", "LessEqual", "Log", "Log1p", "LogicalAnd", "LogicalNot", "LogicalOr",
        "Max", "Maximum", "Mean", "Min", "Minimum", "Mul", "MulNoNan", "Neg", "NotEqual", "OnesLike", "Pack", "Pad",
        "PadV2", "Pow", "Prod", "QuantizeAndDequantizeV2", "QuantizeAndDequantizeV3", "QuantizeAndDequantizeV4",
        "Range", "Rank", "ReadVariableOp", "RealDiv", "Reciprocal", "Relu", "Relu6", "Reshape", "RightShift", "Rint",
        "Round", "Rsqrt", "Select", "SelectV2", "Shape", "Sigmoid", "Sign", "Size", "Slice", "Softplus", "Split",
        "SplitV", "Sqrt", "Square", "SquaredDifference", "Squeeze", "StridedSlice", "Sub", "Sum", "Tanh", "Tile",
        "TopKV2", "Transpose", "Unpack", "UnsortedSegmentMax", "UnsortedSegmentMin", "Where", "ZerosLike",
    }
)
# fmt: on
"""Ops that compute with numbers, keep no state, and reach neither files, network nor Python."""


FOLDED = 2**20
"""The most elements that quantisers may compute of constants alone, which is done one op at a time."""


def evaluated(
    model: Model, terms: Sequence[Term], known: Mapping[Term, np.ndarray], *, trust: bool
) -> list[np.ndarray]:
    """What some terms are, with the values that the variables of the model are to be saved with.

    Without trust, no value may be larger than `LARGEST` and all variables that are read, nor of a size that is not
    known before it is computed.

    Args:
        model: what the terms are of.
        terms: what to compute.
        known: what to take for some terms, in place of computing them.
        trust: compute with any ops; else with harmless ones alone.

    Raises:
        Error: one depends on what a caller supplies, or on an op that is not known to be harmless.
    """
    placing = _Placing(model, known, trust)
    fetched = [placing.place(term) for term in terms]
    largest = None if trust else max([LARGEST, *(value.size for value in placing.feeds.values())])
    functions = library(model, placing.called) if placing.called else None
    return run(Graph(MAIN, placing.nodes), placing.feeds, fetched, functions, largest)


class _Placing:
    """The graph that computes terms.

    Attributes:
        feeds: values of its placeholders.
        called: functions that its ops call.
    """

    def __init__(self, model: Model, known: Mapping[Term, np.ndarray], trust: bool) -> None:
        self.model = model
        self.trust = trust
        self.nodes: dict[str, Node] = {}
        self.feeds: dict[str, np.ndarray] = {}
        self.called: set[str] = set()
        self._folded_sizes = 0
        self._placed = {term: self._fed(value) for term, value in known.items()}

    def place(self, term: Term) -> Value:
        """Where a term is in the graph."""
        waiting = [term]
        while waiting:
            missing = [i for i in self._needed(waiting[-1]) if i not in self._placed]
            if missing:
                waiting += missing
            else:
                last = waiting.pop()
                if last not in self._placed:
                    self._placed[last] = self._folded(last) if self._constant(last) else self._new(last)
        return self._placed[term]

    @staticmethod
    def _needed(term: Term) -> tuple[Term, ...]:
        """The terms to be placed before this one; a variable is placed where it is read."""
        return tuple(i for i in term.inputs if i.op != VARIABLE)

    def _constant(self, term: Term) -> bool:
        """Whether a term is computed of constants alone, of which TensorFlow computes any to know shapes."""
        inputs = [self._placed.get(i) for i in _computing(term).inputs]
        return (
            bool(inputs) and not self.trust and all(v is not None and self.nodes[v.node].op == "Const" for v in inputs)
        )

    def _folded(self, term: Term) -> Value:
        """A term computed at once; as all that it is computed of has been, nothing grows without being looked at."""
        op = _computing(term)
        self._refuse(op)
        inputs = tuple(self._placed[i] for i in op.inputs)
        node = Node("folded", op.op, inputs, attrs=_public(op))
        nodes = {v.node: self.nodes[v.node] for v in inputs} | {node.name: node}
        (value,) = run(Graph(MAIN, nodes), {}, [Value(node.name, term.port)], largest=FOLDED)
        found = np.asarray(value)
        self._folded_sizes += found.size
        if self._folded_sizes > FOLDED:
            raise Error(
                f"quantisers compute more than {FOLDED} elements of constants alone; --trust computes them all the same"
            )
        if found.dtype.kind not in "biufc" and found.dtype.name != "bfloat16":
            raise Error(f"a quantiser computes by {op.op} what is no number")
        name = f"term_{len(self.nodes)}"
        self.nodes[name] = Node(
            name, "Const", attrs={"value": protos.attr(found), "dtype": dtype_attr(found.dtype.name)}
        )
        return Value(name)

    def _new(self, term: Term) -> Value:
        if term.op == PORT:
            return Value(self._placed[term.inputs[0]].node, term.port)
        if term.op == UNKNOWN:
            raise Error(f"a quantiser depends on {term.of}, which is only known while the model runs")
        if term.op == "ReadVariableOp" and term.inputs[0].op == VARIABLE:
            return self._fed(np.asarray(self.model.value_of(term.inputs[0].of)))
        self._refuse(term)
        for value in term.attrs.values():
            self.called.update(protos.functions_in(value))
        inputs = tuple(self._placed[i] if i in self._placed else self._new(i) for i in term.inputs)
        name = f"term_{len(self.nodes)}"
        self.nodes[name] = Node(name, term.op, inputs, attrs=_public(term))
        return Value(name)

    def _refuse(self, term: Term) -> None:
        """Refuse, without trust, large constants and ops that are not known to be harmless.

        Raises:
            Error: it is one.
        """
        if term.op == "Const" and not self.trust:
            sizes = [dim.size for dim in op_defs.attribute(term, "value").tensor.tensor_shape.dim]
            if math.prod(sizes) > LARGEST:
                raise Error(
                    f"a quantiser has a constant of {math.prod(sizes)} elements; --trust computes it all the same"
                )
        if term.op not in HARMLESS and not self.trust:
            graph, node = term.node
            raise Error(
                f"a quantiser computes with {term.op} ({node} in {graph}), which is not among the ops known to be "
                "harmless; pass --trust if you trust the model"
            )

    def _fed(self, value: np.ndarray) -> Value:
        name = f"given_{len(self.feeds)}"
        attrs = {"dtype": dtype_attr(value.dtype.name), "shape": shape_attr(value.shape)}
        self.nodes[name] = Node(name, "Placeholder", attrs=attrs)
        self.feeds[name] = value
        return Value(name)


def _computing(term: Term) -> Term:
    """The op of which a term is an output."""
    return term.inputs[0] if term.op == PORT else term


def _public(term: Term) -> Attrs:
    return {k: v for k, v in term.attrs.items() if k[0] != "_"}


def _run_once() -> Any:
    """The configuration of a session that runs a graph once: to optimise it takes longer than to run it."""
    import tensorflow as tf
    from tensorflow.core.protobuf import rewriter_config_pb2

    plain = tf.compat.v1.OptimizerOptions(opt_level=tf.compat.v1.OptimizerOptions.L0)
    as_it_is = rewriter_config_pb2.RewriterConfig(disable_meta_optimizer=True)
    options = tf.compat.v1.GraphOptions(optimizer_options=plain, rewrite_options=as_it_is)
    return tf.compat.v1.ConfigProto(graph_options=options)


def run(
    graph: Graph,
    feeds: Mapping[str, np.ndarray],
    fetched: Sequence[Value],
    functions: Any = None,
    largest: int | None = None,
) -> list[Any]:
    """What a graph computes.

    Args:
        graph: a graph without a library.
        feeds: values of its placeholders, by name.
        fetched: what to compute.
        functions: the library of functions that it calls, a ``FunctionDefLibrary``.
        largest: the most elements that any value in it may have, and an eighth of what all of them may have; None: any
            number, known beforehand or not.

    Raises:
        Error: TensorFlow refuses it, or a value is too large.
    """
    import tensorflow as tf

    proto = write_main(graph)
    proto.versions.producer = tf.version.GRAPH_DEF_VERSION  # older graphs' placeholders had no shapes
    if functions is not None:
        proto.library.CopyFrom(functions)
    try:
        with tf.Graph().as_default() as made, tf.compat.v1.Session(config=_run_once()) as session:
            tf.import_graph_def(proto, name="")
            if largest is not None:
                _refuse_large(made.get_operations(), largest)
            given = {f"{name}:0": value for name, value in feeds.items()}
            found: list[Any] = session.run([f"{v.node}:{v.port}" for v in fetched], given)
    except (tf.errors.OpError, ValueError, TypeError) as e:
        raise Error(f"what quantisers compute cannot be computed: {' '.join(str(e).split())[:200]}") from e
    return found


def _refuse_large(operations: Sequence[Any], largest: int) -> None:
    """Refuse ops whose outputs have more elements than are allowed, or perhaps have.

    Raises:
        Error: one does, or all do together.
    """
    total = 0
    for op in operations:
        for tensor in op.outputs:
            size = tensor.shape.num_elements()
            if size is None or size > largest:
                raise Error(
                    f"a quantiser computes a value of shape {tensor.shape} by {op.type}, which may have more than "
                    f"{largest} elements; --trust computes it all the same"
                )
            total += size
    if total > 8 * largest:
        raise Error(
            f"quantisers compute values of {total} elements together, more than {8 * largest}; --trust computes them "
            "all the same"
        )

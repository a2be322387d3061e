"""Computing terms: a graph of nothing but what they need, with variables' values as they are stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rewriter import ops
from rewriter.ir import MAIN, Error, Graph, Model, Node, Value
from rewriter.ops import dtype_attr, shape_attr
from rewriter.savedmodel.graphs import write_main
from rewriter.savedmodel.write import library
from rewriter.terms import PORT, UNKNOWN, VARIABLE, Term

# fmt: off
HARMLESS = frozenset(
    {
        "Abs", "AddN", "AddV2", "All", "Any", "ArgMax", "ArgMin", "Bitcast", "BitwiseAnd", "BitwiseOr", "BitwiseXor",
        "BroadcastTo", "Cast", "Ceil", "ClipByValue", "ConcatV2", "Const", "Equal", "Exp", "ExpandDims", "Expm1",
        "FakeQuantWithMinMaxArgs", "FakeQuantWithMinMaxVars", "FakeQuantWithMinMaxVarsPerChannel", "Fill", "Floor",
        "FloorDiv", "FloorMod", "GatherV2", "Greater", "GreaterEqual", "IdentityN", "Inv", "Invert", "IsFinite",
        "IsInf", "IsNan", "LeftShift", "Less", "LessEqual", "Log", "Log1p", "LogicalAnd", "LogicalNot", "LogicalOr",
        "Max", "Maximum", "Mean", "Min", "Minimum", "Mul", "MulNoNan", "Neg", "NotEqual", "OnesLike", "Pack", "Pad",
        "PadV2", "Pow", "Prod", "QuantizeAndDequantizeV2", "QuantizeAndDequantizeV3", "QuantizeAndDequantizeV4",
        "Range", "Rank", "ReadVariableOp", "RealDiv", "Reciprocal", "Relu", "Relu6", "Reshape", "RightShift", "Rint",
        "Round", "Rsqrt", "Select", "SelectV2", "Shape", "Sigmoid", "Sign", "Size", "Slice", "Softplus", "Split",
        "SplitV", "Sqrt", "Square", "SquaredDifference", "Squeeze", "StridedSlice", "Sub", "Sum", "Tanh", "Tile",
        "TopKV2", "Transpose", "Unpack", "Where", "ZerosLike",
    }
)
# fmt: on
"""Ops that compute with numbers, keep no state, and reach neither files, network nor Python."""


def evaluated(
    model: Model, terms: Sequence[Term], known: Mapping[Term, np.ndarray], *, trust: bool
) -> list[np.ndarray]:
    """What some terms are, with the values that the variables of the model are to be saved with.

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
    return run(Graph(MAIN, placing.nodes), placing.feeds, fetched, library(model, placing.called))


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
        self._placed = {term: self._fed(value) for term, value in known.items()}

    def place(self, term: Term) -> Value:
        """Where a term is in the graph."""
        if term not in self._placed:
            self._placed[term] = self._new(term)
        return self._placed[term]

    def _new(self, term: Term) -> Value:
        if term.op == PORT:
            return Value(self.place(term.inputs[0]).node, term.port)
        if term.op == UNKNOWN:
            raise Error(f"a quantiser depends on {term.of}, which is only known while the model runs")
        if term.op == "ReadVariableOp" and term.inputs[0].op == VARIABLE:
            return self._fed(np.asarray(self.model.value_of(term.inputs[0].of)))
        if term.op not in HARMLESS and not self.trust:
            graph, node = term.node
            raise Error(
                f"a quantiser computes with {term.op} ({node} in {graph}), which is not among the ops known to be "
                "harmless; pass --trust if you trust the model"
            )
        for value in term.attrs.values():
            self.called.update(ops.functions_in(value))
        inputs = tuple(self.place(i) for i in term.inputs)
        name = f"term_{len(self.nodes)}"
        attrs = {k: v for k, v in term.attrs.items() if k[0] != "_"}
        self.nodes[name] = Node(name, term.op, inputs, attrs=attrs)
        return Value(name)

    def _fed(self, value: np.ndarray) -> Value:
        name = f"given_{len(self.feeds)}"
        attrs = {"dtype": dtype_attr(value.dtype.name), "shape": shape_attr(value.shape)}
        self.nodes[name] = Node(name, "Placeholder", attrs=attrs)
        self.feeds[name] = value
        return Value(name)


def run(graph: Graph, feeds: Mapping[str, np.ndarray], fetched: Sequence[Value], functions: Any = None) -> list[Any]:
    """What a graph computes.

    Args:
        graph: a graph without a library.
        feeds: values of its placeholders, by name.
        fetched: what to compute.
        functions: the library of functions that it calls, a ``FunctionDefLibrary``.
    """
    import tensorflow as tf

    proto = write_main(graph)
    if functions is not None:
        proto.library.CopyFrom(functions)
    with tf.Graph().as_default(), tf.compat.v1.Session() as session:
        tf.import_graph_def(proto, name="")
        given = {f"{name}:0": value for name, value in feeds.items()}
        found: list[Any] = session.run([f"{v.node}:{v.port}" for v in fetched], given)
    return found

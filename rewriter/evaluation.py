"""Evaluation of terms by TensorFlow, in a graph of only the ops that they need, with the stored values of variables."""

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
        "Abs", "AddN", "AddV2", "All", "Any", "ArgMax", "ArgMin", "BatchMatMulV2", "Bitcast", "BitwiseAnd",
        "BitwiseOr", "BitwiseXor", "BroadcastTo", "Cast", "Ceil", "ClipByValue", "ConcatV2", "Const", "DynamicStitch",
        "Equal", "Exp", "ExpandDims", "Expm1", "FakeQuantWithMinMaxArgs", "FakeQuantWithMinMaxVars",
        "FakeQuantWithMinMaxVarsPerChannel", "Fill", "Floor", "FloorDiv", "FloorMod", "GatherV2", "Greater",
        "GreaterEqual", "IdentityN", "Inv", "Invert", "IsFinite", "IsInf", "IsNan", "LeftShift", "Less", "LessEqual",
        "Log", "Log1p", "LogicalAnd", "LogicalNot", "LogicalOr", "MatMul", "Max", "Maximum", "Mean", "Min", "Minimum",
        "Mul", "MulNoNan", "Neg", "NotEqual", "OnesLike", "Pack", "Pad", "PadV2", "Pow", "Prod",
        "QuantizeAndDequantizeV2", "QuantizeAndDequantizeV3", "QuantizeAndDequantizeV4", "Range", "Rank",
        "ReadVariableOp", "RealDiv", "Reciprocal", "Relu", "Relu6", "Reshape", "RightShift", "Rint", "Round", "Rsqrt",
        "Select", "SelectV2", "Shape", "Sigmoid", "Sign", "Size", "Slice", "Softplus", "Split", "SplitV", "Sqrt",
        "Square", "SquaredDifference", "Squeeze", "StridedSlice", "Sub", "Sum", "Tanh", "Tile", "TopKV2", "Transpose",
        "Unpack", "UnsortedSegmentMax", "UnsortedSegmentMin", "Where", "ZerosLike",
    }
)
# fmt: on
"""Ops that compute with numbers, keep no state, and do not reach files, the network or Python."""


FOLDED = 2**20
"""Largest total number of elements that quantisers may compute from constants alone; this runs one op at a time."""


def evaluated(
    model: Model, terms: Sequence[Term], given_values: Mapping[Term, np.ndarray], *, trust: bool
) -> list[np.ndarray]:
    """Return the values of terms, with the values that the model's variables will be saved with.

    Without trust, the size of every value must be known before it is computed. It must not exceed the larger of
    `LARGEST` and the size of the largest variable that is read.

    Args:
        model: the model that the terms belong to.
        terms: the terms to compute.
        given_values: values of some terms, which are not computed then.
        trust: compute with any op; otherwise with harmless ops only.

    Raises:
        Error: a term depends on a value that a caller supplies, or on an op that is not known to be harmless; or a
            value is too large.
    """
    term_graph = _TermGraph(model, given_values, trust)
    fetches = [term_graph.place(term) for term in terms]
    largest = None if trust else max([LARGEST, *(value.size for value in term_graph.feeds.values())])
    functions = library(model, term_graph.called) if term_graph.called else None
    return run(Graph(MAIN, term_graph.nodes), term_graph.feeds, fetches, functions, largest)


class _TermGraph:
    """A graph that computes terms.

    Attributes:
        feeds: values of its placeholders.
        called: functions that its ops call.
    """

    def __init__(self, model: Model, given_values: Mapping[Term, np.ndarray], trust: bool) -> None:
        self.model = model
        self.trust = trust
        self.nodes: dict[str, Node] = {}
        self.feeds: dict[str, np.ndarray] = {}
        self.called: set[str] = set()
        self._folded_sizes = 0
        self._placed = {term: self._placeholder(value) for term, value in given_values.items()}

    def place(self, term: Term) -> Value:
        """Return the value of a term in the graph; place the term and its inputs if they are new."""
        waiting = [term]
        while waiting:
            placed = waiting[-1] in self._placed
            missing = [i for i in self._inputs_to_place(waiting[-1]) if i not in self._placed and not placed]
            if missing:
                waiting += missing
            else:
                current = waiting.pop()
                if current not in self._placed:
                    self._placed[current] = self._fold(current) if self._is_constant(current) else self._place(current)
        return self._placed[term]

    @staticmethod
    def _inputs_to_place(term: Term) -> tuple[Term, ...]:
        """Return the terms to be placed before a term; a variable is placed where it is read."""
        return tuple(i for i in term.inputs if i.op != VARIABLE)

    def _is_constant(self, term: Term) -> bool:
        """Return true if a term is computed from constants alone, without trust.

        TensorFlow evaluates such ops itself while it infers shapes, before any size is checked.
        """
        inputs = [self._placed.get(i) for i in _op_term(term).inputs]
        return (
            bool(inputs) and not self.trust and all(v is not None and self.nodes[v.node].op == "Const" for v in inputs)
        )

    def _fold(self, term: Term) -> Value:
        """Compute a term of constants now, and return the constant that replaces it.

        Its inputs were folded before, so no value grows unchecked.
        """
        op = _op_term(term)
        self._refuse_unsafe(op)
        inputs = tuple(self._placed[i] for i in op.inputs)
        node = Node("folded", op.op, inputs, attrs=_public_attrs(op))
        nodes = {v.node: self.nodes[v.node] for v in inputs} | {node.name: node}
        (value,) = run(Graph(MAIN, nodes), {}, [Value(node.name, term.port)], largest=FOLDED)
        array = np.asarray(value)
        self._folded_sizes += array.size
        if self._folded_sizes > FOLDED:
            raise Error(
                f"quantisers compute more than {FOLDED} elements of constants alone; --trust computes them all the same"
            )
        # NumPy knows bfloat16 as a void type.
        if array.dtype.kind not in "biufc" and array.dtype.name != "bfloat16":
            raise Error(f"a quantiser computes by {op.op} what is no number")
        name = f"term_{len(self.nodes)}"
        self.nodes[name] = Node(
            name, "Const", attrs={"value": protos.attr(array), "dtype": dtype_attr(array.dtype.name)}
        )
        return Value(name)

    def _place(self, term: Term) -> Value:
        if term.op == PORT:
            return Value(self._placed[term.inputs[0]].node, term.port)
        if term.op == UNKNOWN:
            raise Error(f"a quantiser depends on {term.of}, which is only known while the model runs")
        if term.op == "ReadVariableOp" and term.inputs[0].op == VARIABLE:
            return self._placeholder(np.asarray(self.model.value_of(term.inputs[0].of)))
        self._refuse_unsafe(term)
        for value in term.attrs.values():
            self.called.update(protos.functions_in(value))
        # Only variables are not placed ahead; one that an op other than a read takes is refused here.
        inputs = tuple(self._placed[i] if i in self._placed else self._place(i) for i in term.inputs)
        name = f"term_{len(self.nodes)}"
        self.nodes[name] = Node(name, term.op, inputs, attrs=_public_attrs(term))
        return Value(name)

    def _refuse_unsafe(self, term: Term) -> None:
        """Refuse, without trust, large constants and ops that are not known to be harmless.

        Raises:
            Error: the term is a large constant, or its op is not known to be harmless.
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

    def _placeholder(self, value: np.ndarray) -> Value:
        name = f"given_{len(self.feeds)}"
        attrs = {"dtype": dtype_attr(value.dtype.name), "shape": shape_attr(value.shape)}
        self.nodes[name] = Node(name, "Placeholder", attrs=attrs)
        self.feeds[name] = value
        return Value(name)


def _op_term(term: Term) -> Term:
    """Return the op of which a term is an output."""
    return term.inputs[0] if term.op == PORT else term


def _public_attrs(term: Term) -> Attrs:
    """Return a term's attributes without TensorFlow's internal ones, which start with an underscore."""
    return {k: v for k, v in term.attrs.items() if k[0] != "_"}


def _unoptimized_config() -> Any:
    """Return the configuration of a session that does not optimise: for one run, this takes longer than the run."""
    import tensorflow as tf
    from tensorflow.core.protobuf import rewriter_config_pb2

    no_optimizer = tf.compat.v1.OptimizerOptions(opt_level=tf.compat.v1.OptimizerOptions.L0)
    no_grappler = rewriter_config_pb2.RewriterConfig(disable_meta_optimizer=True)
    options = tf.compat.v1.GraphOptions(optimizer_options=no_optimizer, rewrite_options=no_grappler)
    return tf.compat.v1.ConfigProto(graph_options=options)


def run(
    graph: Graph,
    feeds: Mapping[str, np.ndarray],
    fetches: Sequence[Value],
    functions: Any = None,
    largest: int | None = None,
) -> list[Any]:
    """Return values that a graph computes.

    Args:
        graph: a graph without a library.
        feeds: values of its placeholders, by name.
        fetches: the values to compute.
        functions: the library of functions that it calls, a ``FunctionDefLibrary``.
        largest: largest number of elements of any value in the graph; all values together may have eight times as
            many. With None, sizes are unlimited and need not be known.

    Raises:
        Error: TensorFlow refuses the graph, or a value is too large.
    """
    import tensorflow as tf

    proto = write_main(graph)
    proto.versions.producer = tf.version.GRAPH_DEF_VERSION  # older graphs' placeholders had no shapes
    if functions is not None:
        proto.library.CopyFrom(functions)
    try:
        with tf.Graph().as_default() as tf_graph, tf.compat.v1.Session(config=_unoptimized_config()) as session:
            tf.import_graph_def(proto, name="")
            if largest is not None:
                _refuse_large(tf_graph.get_operations(), largest)
            feed_dict = {f"{name}:0": value for name, value in feeds.items()}
            results: list[Any] = session.run([f"{v.node}:{v.port}" for v in fetches], feed_dict)
    except (tf.errors.OpError, ValueError, TypeError) as e:
        raise Error(f"what quantisers compute cannot be computed: {' '.join(str(e).split())[:200]}") from e
    return results


def _refuse_large(operations: Sequence[Any], largest: int) -> None:
    """Refuse ops whose outputs have, or may have, more elements than allowed.

    Raises:
        Error: one output is too large or of unknown size, or all outputs together are too large.
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

"""Does every node fit the definition of its op: attributes, inputs and their dtypes.

Source: ``tensorflow/core/framework/op_def.proto``, and ``node_def_util.cc``, which refuses the same on loading.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from tensorflow.python.framework import dtypes as tf_dtypes

from rewriter import op_defs, ops, protos
from rewriter.ir import ARG, Error, Graph, Model, Node, Value

KINDS = {
    "string": "s",
    "int": "i",
    "float": "f",
    "bool": "b",
    "type": "type",
    "shape": "shape",
    "tensor": "tensor",
    "func": "func",
}
"""The types of attributes -> the fields of ``AttrValue`` that hold them; a ``list(...)`` is in the field "list"."""

MANY = 1 << 20
"""More outputs than any node has: those of a Case of thousands of batch norms are some ten thousand."""

NUMBERS = {"half_val": 1, "float_val": 1, "double_val": 1, "int_val": 1, "string_val": 1, "int64_val": 1}
NUMBERS |= {"bool_val": 1, "uint32_val": 1, "uint64_val": 1, "scomplex_val": 2, "dcomplex_val": 2}
"""The fields of ``TensorProto`` -> how many of their values make an element."""


def conform(model: Model) -> None:
    """Check that all nodes of a model fit their ops.

    Raises:
        Error: names the graph, the node and what is wrong with it.
    """
    for graph in model.graphs.values():
        nodes = _Nodes(model, graph)
        for problem in nodes.problems():
            raise Error(f"in {graph.name or 'the main graph'}: {problem}")


class _Nodes:
    """The nodes of a graph, with the dtypes of their outputs as far as they were asked for."""

    def __init__(self, model: Model, graph: Graph) -> None:
        self.model = model
        self.graph = graph
        self._made: dict[str, list[tuple[int, tuple[int, ...]]]] = {}
        self._attributes: dict[str, tuple[Mapping[str, Any], list[str]]] = {}

    def problems(self) -> Iterator[str]:
        """What does not fit, a sentence each."""
        for node in self.graph.nodes.values():
            if node.op == ARG:
                if "T" not in node.attrs or not _is_dtype(node.attrs["T"].type):
                    yield f"the argument {node.name} has no dtype"
            elif node.op in self.model.graphs:
                callee = self.model.graphs[node.op]
                expected = [callee.nodes[a].attrs["T"].type for a in callee.arguments if a in callee.nodes]
                yield from self._input_problems(node, [(len(expected), tuple(expected))])
            else:
                definition = op_defs.op_def(self.model, node.op)
                attrs, wrong = self._attributes_of(definition, node)
                yield from wrong or self._input_problems(node, _runs(definition.input_arg, attrs))
                yield from () if wrong else self._call_problems(node, _runs(definition.output_arg, attrs))
                if not wrong and sum(count for count, _ in _runs(definition.output_arg, attrs)) > MANY:
                    yield f"{node.name} ({node.op}) has more than {MANY} outputs"
        shapes = self.graph.attrs.get("_input_shapes")
        if shapes is not None and (len(shapes.list.shape) != len(self.graph.arguments) or shapes.list.type):
            yield f"its attribute _input_shapes is not one of {len(self.graph.arguments)} shapes"
        for result in self.graph.results:
            made = self._dtype(result.value) if result.value.node in self.graph.nodes else None
            if made is not None and result.dtype and protos.dtype_name(made).removesuffix("_ref") != result.dtype:
                yield f"the result {result.name} is {result.dtype}, and {result.value.node} gives {_name(made)}"

    def _input_problems(self, node: Node, expected: list[tuple[int, tuple[int, ...]]]) -> Iterator[str]:
        count = sum(number for number, _ in expected)
        if count != len(node.inputs):
            yield f"{node.name} ({node.op}) has {len(node.inputs)} inputs and takes {count}"
            return
        position = 0
        for number, kinds in expected:
            for offset in range(number):
                value = node.inputs[position]
                position += 1
                taken = kinds[offset if len(kinds) > 1 else 0]
                made = self._dtype(value) if value.node in self.graph.nodes else None
                if made is not None and made % 100 != taken % 100:
                    yield (
                        f"{node.name} ({node.op}) takes {_name(taken)} as input {position - 1}, and {value.node} gives "
                        f"{_name(made)}"
                    )

    def _call_problems(self, node: Node, given: list[tuple[int, tuple[int, ...]]]) -> Iterator[str]:
        """Functions that take or return another number of values than a call passes or gives."""
        form = ops.call_form(self.model, node)
        if form is None:
            return
        passed, count = len(node.inputs) - form.first, sum(number for number, _ in given)
        called = [self.model.graphs[name] for name in ops.callees(self.model, node) if name in self.model.graphs]
        for position, callee in enumerate(called):
            taken = len(callee.arguments)
            if taken != passed:
                yield f"{node.name} ({node.op}) passes {passed} values to {callee.name}, which takes {taken}"
            condition = form.carried and position == 0
            if not condition and len(callee.results) != count:
                yield f"{node.name} ({node.op}) gives {count} values, and {callee.name} returns {len(callee.results)}"

    def _dtype(self, value: Value) -> int | None:
        """The dtype of a value, as a number; None where there is no such output."""
        if value.node not in self._made:
            self._made[value.node] = self._outputs(self.graph.nodes[value.node])
        port = value.port
        for count, kinds in self._made[value.node]:
            if 0 <= port < count:
                return kinds[port if len(kinds) > 1 else 0] or None
            port -= count
        return None

    def _outputs(self, node: Node) -> list[tuple[int, tuple[int, ...]]]:
        if node.op == ARG:
            return [(1, (node.attrs["T"].type,))] if "T" in node.attrs else []
        if node.op in self.model.graphs:
            results = self.model.graphs[node.op].results
            return [(len(results), tuple(protos.dtype_number(r.dtype) if r.dtype else 0 for r in results))]
        definition = op_defs.op_def(self.model, node.op)
        attrs, wrong = self._attributes_of(definition, node)
        return [] if wrong else _runs(definition.output_arg, attrs)

    def _attributes_of(self, definition: Any, node: Node) -> tuple[Mapping[str, Any], list[str]]:
        if node.name not in self._attributes:
            self._attributes[node.name] = _attributes(definition, node)
        return self._attributes[node.name]


def _attributes(definition: Any, node: Node) -> tuple[Mapping[str, Any], list[str]]:
    """A node's attributes with the defaults of its op, and what is wrong with them.

    If nothing is wrong, each attribute of the definition is there or has a default: `op_defs.attribute` relies on it.
    """
    attrs = dict(node.attrs)
    wrong = []
    for known in definition.attr:
        value = attrs.get(known.name)
        if value is None:
            if not known.HasField("default_value"):
                wrong.append(f"{node.name} ({node.op}) has no attribute {known.name}")
            attrs[known.name] = known.default_value
        elif not _of_kind(value, known.type):
            wrong.append(f"the attribute {known.name} of {node.name} ({node.op}) is not of the type {known.type}")
        elif known.HasField("allowed_values") and not _allowed(value, known.allowed_values):
            wrong.append(f"the attribute {known.name} of {node.name} ({node.op}) is none of the values it may have")
        elif known.has_minimum and (value.i if known.type == "int" else _length(value)) < known.minimum:
            wrong.append(f"the attribute {known.name} of {node.name} ({node.op}) is below {known.minimum}")
    if not wrong and node.op == "Const":
        tensor = attrs["value"].tensor
        if tensor.dtype != attrs["dtype"].type or not _is_whole(tensor):
            wrong.append(f"the constant {node.name} does not hold what its dtype and shape say")
    return attrs, wrong


def _of_kind(value: Any, kind: str) -> bool:
    held = value.WhichOneof("value")
    if kind.startswith("list("):
        fields = {field.name for field, _ in value.list.ListFields()}
        alike = held == "list" and fields <= {KINDS[kind[len("list(") : -1]]}
        return alike and all(_is_dtype(t) for t in value.list.type)
    if kind == "type":
        return bool(held == "type") and _is_dtype(value.type)
    return bool(held == KINDS[kind])


def _is_dtype(number: int) -> bool:
    try:
        return number != 0 and tf_dtypes.as_dtype(number) is not None
    except TypeError:
        return False


def _allowed(value: Any, allowed: Any) -> bool:
    held = value.WhichOneof("value")
    if held == "list":
        return set(value.list.type) <= set(allowed.list.type) and set(value.list.s) <= set(allowed.list.s)
    return bool(value.type in allowed.list.type if held == "type" else value.s in allowed.list.s)


def _length(value: Any) -> int:
    return max(len(items) for _, items in value.list.ListFields()) if value.list.ListFields() else 0


def _is_whole(tensor: Any) -> bool:
    """Whether a tensor holds an element for each that its shape has, or fewer, of which the last stands for the rest.

    Source: ``tensorflow/core/framework/tensor.proto``.
    """
    sizes = [dim.size for dim in tensor.tensor_shape.dim]
    if tensor.tensor_shape.unknown_rank or any(size < 0 for size in sizes):
        return False
    count = math.prod(sizes)
    if tensor.tensor_content:
        return bool(len(tensor.tensor_content) == count * (tf_dtypes.as_dtype(tensor.dtype).size or 0))
    held = sum(len(getattr(tensor, name)) // per for name, per in NUMBERS.items())
    return bool(held <= count)


def _runs(arguments: Any, attrs: Mapping[str, Any]) -> list[tuple[int, tuple[int, ...]]]:
    """(how many tensors, their dtypes: of each, or of all) for each argument of an op definition."""
    found: list[tuple[int, tuple[int, ...]]] = []
    for arg in arguments:
        if arg.type_list_attr:
            types = tuple(attrs[arg.type_list_attr].list.type)
            found.append((len(types), types))
        else:
            count = attrs[arg.number_attr].i if arg.number_attr else 1
            found.append((count, (attrs[arg.type_attr].type if arg.type_attr else arg.type,)))
    return found


def _name(number: int) -> str:
    return protos.dtype_name(number % 100)
